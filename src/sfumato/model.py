"""LatentDiffusion: the four acts on one page, with parts that can be swapped one by one.

    image --compress--> z --diffuse--> x_t --predict--> (x0, eps) --diffuse back--> z --decode--> image
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image as PIL
from torch import Tensor

from sfumato import __version__
from sfumato.checkpoints.folder import index, load_part, save_part
from sfumato.checkpoints.names.scheduler import from_scheduler_config, to_scheduler_config
from sfumato.compress.base import Autoencoder
from sfumato.decode.image import to_pil, to_tensor
from sfumato.decode.whole import whole
from sfumato.diffuse.sample import SeededNoise, Step, sample
from sfumato.diffuse.timesteps import check_times, timesteps
from sfumato.errors import UserError, unknown
from sfumato.files import atomic_folder, hash_json, hash_tensors, read_json, write_json
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.guidance.classifier_free import classifier_free
from sfumato.registry import find, names
from sfumato.types import Conditioning, Prediction

Prompt = str | None | Sequence[str | None]


@dataclass(frozen=True)
class Defaults:
    """What `generate` uses where the caller says nothing. They travel with the model."""

    steps: int = 20
    sampler: str = "ddim"
    guidance: float = 1.0
    spacing: str = "trailing"

    def __post_init__(self) -> None:
        if self.sampler not in names("diffuse.samplers"):
            raise unknown("sampler", self.sampler, names("diffuse.samplers"))
        if self.steps < 1:
            raise UserError(f"steps={self.steps}: expected at least 1")
        if not 0 <= self.guidance < float("inf"):
            raise UserError(f"guidance={self.guidance}: expected a number of at least 0; 1 is off")


@dataclass(frozen=True)
class LatentDiffusion:
    """An autoencoder, a denoiser (network + process) and a conditioner. Immutable: `dataclasses.replace` swaps a part."""

    autoencoder: Autoencoder
    denoiser: Denoiser
    conditioner: Any
    defaults: Defaults = field(default_factory=Defaults)
    name: str = "model"

    # ---- the four acts -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def compress(self, image: PIL.Image | Sequence[PIL.Image] | Float[Tensor, "B C H W"], seed: int | None = None) -> Float[Tensor, "B c h w"]:
        """Image(s) -> z, standardised: PIL images, or a tensor in [-1, 1]. With a seed a draw from the posterior, else its mean."""
        pixels = image if isinstance(image, Tensor) else to_tensor(image)
        channels = self.autoencoder.channels
        if pixels.shape[1] != channels and 1 in (pixels.shape[1], channels):
            pixels = pixels.expand(-1, channels, -1, -1) if pixels.shape[1] == 1 else pixels.mean(1, keepdim=True)
        shape = self._latent_shape(*pixels.shape[2:])
        noise = None if seed is None else SeededNoise(shape, [seed + i for i in range(len(pixels))], self.device)()
        return self.autoencoder.encode(pixels.to(self.device, self.autoencoder.dtype), noise).float()

    def diffuse(self, z: Float[Tensor, "B C h w"], t: float, seed: int = 0) -> Float[Tensor, "B C h w"]:
        """z -> x at time t in [0, 1]: alpha*z + sigma*eps, with image k's noise from seed + k."""
        if not 0 <= t <= 1:
            raise UserError(f"t={t}: expected a time in [0, 1], 0 is clean and 1 is noise")
        eps = SeededNoise(z.shape[1:], [seed + k for k in range(len(z))], z.device)()
        return self.denoiser.process.add_noise(z, eps, t)

    @torch.inference_mode()
    def predict(self, x: Float[Tensor, "B C h w"], t: float, conditioning: Conditioning | Prompt = None) -> Prediction:
        """(x, t, conditioning or prompt(s)) -> Prediction(x0, eps). t in (0, 1]."""
        if not 0 < t <= 1:
            raise UserError(f"t={t}: expected a time in (0, 1]")
        if not isinstance(conditioning, Conditioning):
            conditioning = self.conditioner(_prompts(conditioning, len(x)))
        return self.denoiser(x, t, conditioning.to(self.device))

    def decode(self, z: Float[Tensor, "B C h w"]) -> list[PIL.Image]:
        """z -> PIL images. `sfumato.decode` has tiled and preview decoding, and tensors."""
        return to_pil(whole(self.autoencoder, z))

    # ---- the main job --------------------------------------------------------------------------------------------------

    def settings(
        self,
        n: int = 1,
        steps: int | None = None,
        sampler: str | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> dict[str, Any]:
        """The settings that `generate` would run with: the model's defaults where the caller says None. `UserError` for impossible ones."""
        if n < 1:
            raise UserError(f"n={n}: expected at least 1 image")
        given = {"steps": steps, "sampler": sampler, "guidance": guidance}
        chosen = replace(self.defaults, **{k: v for k, v in given.items() if v is not None})
        size = self.sample_size
        height, width = height or size, width or size
        factor = self.autoencoder.space.factor
        if height < factor or width < factor or height % factor or width % factor:
            raise UserError(f"height={height}, width={width}: expected positive multiples of {factor} pixels")
        return {"n": n, "steps": chosen.steps, "sampler": chosen.sampler, "guidance": chosen.guidance, "height": height, "width": width}

    @torch.inference_mode()
    def generate(
        self,
        prompt: Prompt = None,
        *,
        n: int = 1,
        steps: int | None = None,
        sampler: str | None = None,
        guidance: float | None = None,
        seed: int = 0,
        negative_prompt: Prompt = None,
        height: int | None = None,
        width: int | None = None,
        timesteps: Sequence[float] | None = None,
        noise: Tensor | None = None,
        output: Literal["pil", "tensor", "latent"] = "pil",
        on_step: Callable[[Step], bool | None] | None = None,
    ) -> Any:
        """Prompt -> n images: a list of PIL images, or "tensor" (n, C, H, W) in [0, 1], or "latent" (n, c, h, w).

        prompt: one for all or one an image (then n is their number); None draws unconditionally. Image k uses seed + k.
        timesteps: the times to visit, falling, 1 is noise and the last is where the run ends (0: clean); overrides `steps`.
        noise: the start (n, c, h, w) instead of the seeds' own. on_step sees each step and cancels by returning False (returns []
        then, or an empty tensor). Raises `UserError` for impossible settings and `NumericalError` for NaN or infinity.
        """
        if output not in ("pil", "tensor", "latent"):
            raise unknown("output", output, ("pil", "tensor", "latent"))
        if isinstance(prompt, Sequence) and not isinstance(prompt, str):
            if n not in (1, len(prompt)):
                raise UserError(f"n={n} with {len(prompt)} prompts: expected one image a prompt")
            n = len(prompt)
        chosen = self.settings(n, len(timesteps) - 1 if timesteps is not None else steps, sampler, guidance, height, width)
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63 - n:
            raise UserError(f"seed={seed!r}: expected a whole number of at most 63 bits")
        times = self.times(chosen["steps"]) if timesteps is None else check_times(timesteps)
        shape = self._latent_shape(chosen["height"], chosen["width"])
        draw = SeededNoise(shape, [seed + k for k in range(n)], self.device)
        if noise is not None and tuple(noise.shape) != (n, *shape):
            raise UserError(f"noise of shape {tuple(noise.shape)}: expected {(n, *shape)}")
        start = draw() if noise is None else noise.to(self.device, torch.float32)
        _, sigma = self.denoiser.process.schedule.at(times[0])
        conditioning = self.conditioner(_prompts(prompt, n)).to(self.device)
        reference = self.conditioner(_prompts(negative_prompt, n)).to(self.device)
        weight = chosen["guidance"]
        if _same(conditioning, reference):
            weight = 1.0  # the two passes would be one: an unconditional draw needs no guidance
        guided = classifier_free(self.denoiser, reference, weight)
        generator = find("diffuse.samplers", chosen["sampler"])(float(sigma) * start, times, self.denoiser.process.schedule, draw)
        z = sample(generator, lambda x, t: guided(x, t, conditioning), len(times) - 1, on_step)
        if z is None:
            return [] if output == "pil" else start[:0]
        if output == "latent":
            return z
        image = whole(self.autoencoder, z)
        return to_pil(image) if output == "pil" else (image + 1) / 2

    def times(self, steps: int) -> list[float]:
        """The times a run of `steps` network calls visits, by the model's default spacing."""
        return timesteps(self.defaults.spacing, steps)

    # ---- what it is ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.denoiser.network.parameters()).device

    @property
    def sample_size(self) -> int:
        """The default height and width of images, in pixels."""
        return (self.denoiser.network.config.sample_size or 64) * self.autoencoder.space.factor  # pyright: ignore

    @property
    def class_names(self) -> tuple[str, ...]:
        """The prompts of a class-conditional model, in the order of its labels; empty for others."""
        return getattr(self.conditioner, "names", ())

    @cached_property
    def hash(self) -> str:
        """SHA-256 over all weights and settings that decide an image."""
        configs = [self.autoencoder.to_config(), self.denoiser.network.to_config(), self.conditioner.to_config()]  # pyright: ignore
        weights = [hash_tensors(m.state_dict()) for m in (self.autoencoder, self.denoiser.network)]
        return hash_json([configs, to_scheduler_config(self.denoiser.process), weights])

    def describe(self) -> dict[str, Any]:
        """Parts, sizes and defaults, for `sfumato info`."""
        space, process = self.autoencoder.space, self.denoiser.process
        networks = {"autoencoder": self.autoencoder, "denoiser": self.denoiser.network}
        return {
            "name": self.name,
            "hash": self.hash,
            "parts": {k: {"class": type(m).__name__, "parameters": sum(p.numel() for p in m.parameters())} for k, m in networks.items()},
            "latent": {"channels": space.channels, "factor": space.factor, "mean": list(space.mean), "std": list(space.std)},
            "process": {"schedule": getattr(process.schedule, "kind", "?"), "parameterization": process.parameterization.name},
            "image": {"channels": self.autoencoder.channels, "height": self.sample_size, "width": self.sample_size},
            "defaults": self.settings() | {"spacing": self.defaults.spacing},
            "class_names": list(self.class_names),
        }

    def to(self, device: str | torch.device) -> "LatentDiffusion":
        """The same model on a device; this one is left where it is."""
        network = copy.deepcopy(self.denoiser.network).to(device)
        return replace(self, autoencoder=copy.deepcopy(self.autoencoder).to(device), denoiser=replace(self.denoiser, network=network))

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the model as a diffusers folder, atomically; `dtype` (e.g. torch.float16) changes what is stored."""
        with atomic_folder(folder) as temporary:
            save_part(temporary / "vae", self.autoencoder, dtype)
            save_part(temporary / "unet", self.denoiser.network, dtype)  # pyright: ignore[reportArgumentType]
            (temporary / "scheduler").mkdir()
            scheduler = to_scheduler_config(self.denoiser.process)
            write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
            (temporary / "conditioner").mkdir()
            write_json(temporary / "conditioner" / "config.json", self.conditioner.to_config())
            parts = {
                "_class_name": "LatentDiffusion",
                "_sfumato": {"version": __version__, "name": self.name, "defaults": self.defaults.__dict__},
                "vae": ["diffusers", "AutoencoderKL"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "scheduler": ["diffusers", scheduler["_class_name"]],
                "conditioner": ["sfumato", self.conditioner.to_config()["_class_name"]],
            }
            write_json(temporary / "model_index.json", parts)

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        space = self.autoencoder.space
        return space.channels, height // space.factor, width // space.factor


def _prompts(prompt: Prompt, n: int) -> list[str | None]:
    """One prompt an image."""
    if prompt is None or isinstance(prompt, str):
        return [prompt] * n
    if len(prompt) != n:
        raise UserError(f"{len(prompt)} prompts for {n} images: expected one, or one an image")
    return list(prompt)


def _same(a: Conditioning, b: Conditioning) -> bool:
    """Whether two conditionings are equal, door by door."""
    pairs = [(getattr(a, k), getattr(b, k)) for k in ("tokens", "mask", "vector", "concat", "image_tokens")]
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs) and a.residuals is b.residuals


def bundled() -> dict[str, Path]:
    """The models that travel in the package, by name."""
    root = Path(str(resources.files("sfumato"))) / "bundled"
    return {p.name: p for p in sorted(root.iterdir()) if (p / "model_index.json").exists()} if root.is_dir() else {}


def load(source: str | Path, device: str = "cpu") -> LatentDiffusion:
    """Opens a model: a bundled name ("fashion"), a folder in diffusers' layout, or a hub id ("name/model"; its files are cached)."""
    found = bundled()
    path = found.get(str(source), Path(source).expanduser())
    if path.is_file():
        raise UserError(f"{source} is a single file: this version opens folders in diffusers' layout, not single files; give the folder")
    if not path.is_dir():
        if str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
            path = _from_hub(str(source))
        else:
            known = ", ".join(found) or "none"
            raise UserError(f"model {str(source)!r} was not found: expected a bundled name ({known}), a folder, or a hub id such as owner/name")
    parts = index(path)
    if "unet" not in parts or "vae" not in parts:
        raise UserError(f"{path}/model_index.json names {', '.join(k for k in parts if not k.startswith('_'))}: expected at least vae and unet")
    notes = parts.get("_sfumato", {})
    autoencoder = load_part(path / "vae", "AutoencoderKL")
    network = load_part(path / "unet", "UNet2DConditionModel")
    process = from_scheduler_config(read_json(path / "scheduler" / "scheduler_config.json"))
    config = path / "conditioner" / "config.json"
    if not config.exists():
        raise UserError(f"{path} has no conditioner/config.json: this version opens models that sfumato saved; text encoders come later")
    values = read_json(config)
    conditioner = find("predict.conditioners", values["_class_name"]).from_config(values)
    assert isinstance(autoencoder, Autoencoder)
    known = {k: v for k, v in notes.get("defaults", {}).items() if k in Defaults.__dataclass_fields__}
    model = LatentDiffusion(autoencoder, Denoiser(network, process), conditioner, Defaults(**known), notes.get("name", path.name))
    return model if device == "cpu" else model.to(device)


def _from_hub(name: str) -> Path:
    """The local snapshot of a hub repository (`huggingface_hub`), fetched when it is not there and the network is."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the library raises a dozen kinds: all of them mean that the model is not to be had
        raise UserError(f"model {name!r} could not be had from the hub ({type(error).__name__}): check the name and the network, or give a folder") from error
