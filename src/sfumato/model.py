"""LatentDiffusion: the four acts on one page, with parts that can be swapped one by one.

image --compress--> z --diffuse--> x_t --predict--> (x0, eps) --diffuse back--> z --decode--> image
"""

import copy
import math
import tempfile
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
from sfumato.checkpoints.folder import explained, index, load_part, read_table, save_part
from sfumato.checkpoints.names.scheduler import from_scheduler_config, to_scheduler_config
from sfumato.checkpoints.single_file import fold, unfold
from sfumato.compress.base import Autoencoder
from sfumato.decode.image import to_pil, to_tensor
from sfumato.decode.whole import check_latent, whole
from sfumato.diffuse.sample import SeededNoise, Step, answered, check_finite, conduct
from sfumato.diffuse.samplers import calls
from sfumato.diffuse.timesteps import SPACINGS, check_times, timesteps
from sfumato.errors import NumericalError, UserError, unknown
from sfumato.files import atomic_folder, hash_json, hash_tensors, write_json
from sfumato.predict.denoiser import Denoiser, answer
from sfumato.predict.guidance.combines.linear import Linear
from sfumato.predict.guidance.guide import guide
from sfumato.predict.guidance.weights.constant import Constant
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
        if self.spacing not in SPACINGS:
            raise unknown("timestep spacing", self.spacing, SPACINGS)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise UserError(f"steps={self.steps!r}: expected a whole number of at least 1")
        if not isinstance(self.guidance, int | float) or not 0 <= self.guidance < float("inf"):
            raise UserError(f"guidance={self.guidance!r}: expected a number of at least 0; 1 is off")


@dataclass(frozen=True)
class LatentDiffusion:
    """An autoencoder, a denoiser (network + process) and a conditioner. Immutable: `dataclasses.replace` swaps a part."""

    autoencoder: Autoencoder
    denoiser: Denoiser
    conditioner: Any
    defaults: Defaults = field(default_factory=Defaults)
    name: str = "model"

    # ---- the four acts -------------------------------------------------------------------------------------------------

    def compress(
        self, image: PIL.Image | Sequence[PIL.Image] | Float[Tensor, "B C H W"], seed: int | None = None
    ) -> Float[Tensor, "B c h w"]:
        """Image(s) -> z, standardised: PIL images, or a tensor in [-1, 1]. With a seed a draw from the posterior, else its mean.

        Image k's draw is seeded with seed + k. Colour becomes grey (ITU-R 601 luma) and grey colour where the autoencoder needs it.
        """
        pixels = image if isinstance(image, Tensor) else to_tensor(image)
        if pixels.ndim != 4 or not pixels.is_floating_point() or not pixels.numel():
            raise UserError(
                f"image is {pixels.dtype} of shape {tuple(pixels.shape)}: expected floating-point pixels (B, C, H, W) in [-1, 1]"
            )
        low, high = (float(v) for v in pixels.aminmax())
        if not (low >= -1.001 and high <= 1.001):  # a NaN fails too
            raise UserError(f"image has pixels from {low:.4g} to {high:.4g}: expected [-1, 1]; bytes become so by value / 127.5 - 1")
        channels = self.autoencoder.channels
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, channels, -1, -1)
        elif pixels.shape[1] == 3 and channels == 1:
            pixels = torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor([0.299, 0.587, 0.114]))[:, None]
        shape = self._latent_shape(*pixels.shape[2:])
        noise = None if seed is None else SeededNoise(shape, _seeds(seed, len(pixels)), self.device)()
        with torch.inference_mode():
            z = self.autoencoder.encode(pixels.to(self.device, self.autoencoder.dtype), noise).float()
        check_finite(z, f"compress, with the autoencoder in {_name(self.autoencoder.dtype)}")
        return z.clone()  # a plain tensor, which training can use: those of inference mode cannot be saved for a gradient

    def diffuse(self, z: Float[Tensor, "B C h w"], t: float, seed: int = 0) -> Float[Tensor, "B C h w"]:
        """z -> x at time t in [0, 1]: alpha*z + sigma*eps, with image k's noise from seed + k."""
        if not 0 <= t <= 1:
            raise UserError(f"t={t}: expected a time in [0, 1], 0 is clean and 1 is noise")
        check_latent(self.autoencoder.space, z)
        eps = SeededNoise(z.shape[1:], _seeds(seed, len(z)), z.device)()
        return self.denoiser.process.add_noise(z, eps, t)

    def predict(self, x: Float[Tensor, "B C h w"], t: float, conditioning: Conditioning | Prompt = None) -> Prediction:
        """(x, t, conditioning or prompt(s)) -> Prediction(x0, eps), without guidance. t in (0, 1]."""
        if not 0 < t <= 1:
            raise UserError(f"t={t}: expected a time in (0, 1]")
        check_latent(self.autoencoder.space, x)
        given = conditioning if isinstance(conditioning, Conditioning) else self.conditioner(_prompts(conditioning, len(x)))
        with torch.inference_mode():
            found = self.denoiser(x.to(self.device), t, given.to(self.device))
        return Prediction(found.x0.clone(), found.eps.clone())

    def decode(self, z: Float[Tensor, "B C h w"]) -> list[PIL.Image]:
        """z -> PIL images, mode L from a grey autoencoder, else RGB. `sfumato.decode` has tiled and preview decoding, and tensors."""
        return to_pil(whole(self.autoencoder, z.to(self.device)))

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
        if not isinstance(n, int) or n < 1:
            raise UserError(f"n={n!r}: expected a whole number of at least 1 image")
        given = {"steps": steps, "sampler": sampler, "guidance": guidance}
        chosen = replace(self.defaults, **{k: v for k, v in given.items() if v is not None})
        size = self.sample_size
        height, width = size if height is None else height, size if width is None else width
        factor = self.autoencoder.space.factor
        if not all(isinstance(side, int) and side > 0 and side % factor == 0 for side in (height, width)):
            raise UserError(f"height={height}, width={width}: expected positive multiples of {factor} pixels")
        return {"n": n, "steps": chosen.steps, "sampler": chosen.sampler, "guidance": chosen.guidance, "height": height, "width": width}

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
        """Prompt -> n images: a list of PIL images, or "tensor" (n, 3, H, W) in [0, 1], or "latent" (n, c, h, w).

        prompt: one for all or one an image (then n is their number); None draws unconditionally. Image k uses seed + k.
        timesteps: the times to visit, falling, 1 is noise and the last is where the run ends (0: clean); overrides `steps`.
        noise: the start (n, c, h, w) instead of the seeds' own; what a sampler adds later is the seeds' in any case. on_step sees
        each step and cancels by returning False (returns [] then, or a tensor of no images). A grey model's "tensor" has three equal
        channels, so that every model gives the same shape; its PIL images have mode L.
        Raises `UserError` for impossible settings and `NumericalError` for NaN or infinity.
        """
        if output not in ("pil", "tensor", "latent"):
            raise unknown("output", output, ("pil", "tensor", "latent"))
        if isinstance(prompt, Sequence) and not isinstance(prompt, str):
            if n not in (1, len(prompt)):
                raise UserError(f"n={n} with {len(prompt)} prompts: expected one image a prompt")
            n = len(prompt)
        given = None if timesteps is None else check_times(timesteps)
        chosen = self.settings(n, steps if given is None else len(given) - 1, sampler, guidance, height, width)
        times = given or self.times(chosen["steps"])
        seeds = _seeds(seed, n)
        conditioning, reference = (self.conditioner(_prompts(words, n)).to(self.device) for words in (prompt, negative_prompt))
        z = self._sample(times, chosen, seeds, noise, conditioning, reference, on_step)
        if z is None:
            z = torch.empty(0, *self._latent_shape(chosen["height"], chosen["width"]), device=self.device)
        if output == "latent":
            return z.clone()  # a plain tensor: those of inference mode cannot be saved for a gradient
        image = whole(self.autoencoder, z)
        if output == "pil":
            return to_pil(image)
        return (image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image).add(1).div(2)

    @torch.inference_mode()
    def _sample(
        self,
        times: Sequence[float],
        chosen: dict[str, Any],
        seeds: Sequence[int],
        noise: Tensor | None,
        conditioning: Conditioning,
        reference: Conditioning,
        on_step: Callable[[Step], bool | None] | None,
    ) -> Tensor | None:
        """The latents of a run, or None if `on_step` cancelled it."""
        process, dtype = self.denoiser.process, next(self.denoiser.network.parameters()).dtype
        draw = SeededNoise(self._latent_shape(chosen["height"], chosen["width"]), seeds, self.device)
        start = draw()  # drawn also where `noise` takes its place: what is drawn next is then the same
        if noise is not None:
            if noise.shape != start.shape or not torch.isfinite(noise).all():
                raise UserError(f"noise of shape {tuple(noise.shape)}: expected finite numbers of shape {tuple(start.shape)}")
            start = noise.to(self.device, torch.float32)
        # Where the two passes would be one, as for an unconditional draw, there is nothing to guide.
        weight = 1.0 if _same(conditioning, reference) else chosen["guidance"]
        ask = guide(self.denoiser, conditioning, [(self.denoiser, reference)], Constant(weight), Linear(), process.schedule.point)
        # x_t of standardised latents has variance alpha^2 + sigma^2, at full noise and where a run begins later.
        sampler, schedule = find("diffuse.samplers", chosen["sampler"]), process.schedule
        x = math.hypot(*schedule.point(times[0])) * start
        questions = conduct(sampler(x, times, schedule, draw), ask, calls(sampler, times, schedule), on_step)
        try:
            return answered(questions, answer)
        except NumericalError as error:
            if dtype == torch.float32:
                raise
            raise NumericalError(f"{error} (the network ran in {_name(dtype)})") from error

    def times(self, steps: int) -> list[float]:
        """The times a run of `steps` network calls visits, by the model's default spacing, on its table where it has one."""
        return timesteps(self.defaults.spacing, steps, self.denoiser.process.schedule)

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
        return hash_json([configs, to_scheduler_config(self.denoiser.process), self.defaults.spacing, weights])

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
        """The same model on a device ("cpu", "cuda", "cuda:1"); this one is left where it is."""
        try:
            autoencoder, network = (copy.deepcopy(m).to(device) for m in (self.autoencoder, self.denoiser.network))
        except (RuntimeError, AssertionError) as error:  # torch's words for a name that it does not know, or a device that is not there
            raise UserError(
                f"device {str(device)!r} cannot be used ({str(error).splitlines()[0]}): expected one such as cpu or cuda"
            ) from error
        return replace(self, autoencoder=autoencoder, denoiser=replace(self.denoiser, network=network))

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the model as a diffusers folder, atomically; `dtype` (e.g. torch.float16) changes what is stored.

        A name that ends in .safetensors gets the same in one file, which `load` opens too. A model of that name is replaced as a whole;
        `UserError` for a file or folder that is something else, or a full disk, `NumericalError` for weights that are not finite in `dtype`.
        """
        if Path(folder).suffix == ".safetensors":
            with tempfile.TemporaryDirectory() as temporary:
                self.save(Path(temporary) / "model", dtype)
                fold(Path(temporary) / "model", folder)
            return
        target = Path(folder).expanduser().resolve()  # through a link: the folder behind it is replaced, not the link
        if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / "model_index.json").exists()):
            raise UserError(f"{folder} exists and is not a model folder: it is left as it is; choose another name or remove it first")
        with atomic_folder(target) as temporary:
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
    if not isinstance(prompt, Sequence) or not all(p is None or isinstance(p, str) for p in prompt):
        raise UserError(f"prompt {prompt!r}: expected text, a list of texts, or None")
    if len(prompt) != n:
        raise UserError(f"{len(prompt)} prompts for {n} images: expected one, or one an image")
    return list(prompt)


def _seeds(seed: int, n: int) -> list[int]:
    """Image k's seed is seed + k; all of them must be numbers that torch's generators take."""
    if not isinstance(seed, int) or not -(2**63) <= seed <= 2**63 - n:
        raise UserError(f"seed={seed!r}: expected a whole number from -2^63 to 2^63 - {n}, for {n} image{'s' if n > 1 else ''}")
    return [seed + k for k in range(n)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _same(a: Conditioning, b: Conditioning) -> bool:
    """Whether two conditionings are equal, door by door."""
    pairs = [(getattr(a, k), getattr(b, k)) for k in ("tokens", "mask", "vector", "concat", "image_tokens")]
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs) and a.residuals is b.residuals


def bundled() -> dict[str, Path]:
    """The models that travel in the package, by name."""
    root = Path(str(resources.files("sfumato"))) / "bundled"
    return {p.name: p for p in sorted(root.iterdir()) if (p / "model_index.json").exists()} if root.is_dir() else {}


def load(source: str | Path, device: str = "cpu") -> LatentDiffusion:
    """Opens a model: a bundled name ("fashion"), a folder in diffusers' layout, a single file, or a hub id

    ("owner/name"; its files are cached by `huggingface_hub`).
    """
    found = bundled()
    path = found.get(str(source), Path(source).expanduser())
    if path.is_file():
        with tempfile.TemporaryDirectory() as temporary:
            try:
                with explained(path):
                    unfold(path, temporary)
                return _open(Path(temporary), path.stem, device)
            except UserError as error:  # what is wrong is wrong in the file that the user named
                raise UserError(str(error).replace(temporary, str(path))) from error
    if not path.is_dir():
        if str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
            path = _from_hub(str(source))
        else:
            known = ", ".join(found) or "none"
            raise UserError(
                f"model {str(source)!r} was not found: expected a bundled name ({known}), a folder, or a hub id such as owner/name"
            )
    return _open(path, path.name, device)


def _open(path: Path, name: str, device: str) -> LatentDiffusion:
    """Builds a model from a folder in diffusers' layout."""
    parts = index(path)
    if "unet" not in parts or "vae" not in parts:
        raise UserError(
            f"{path}/model_index.json names {', '.join(k for k in parts if not k.startswith('_'))}: expected at least vae and unet"
        )
    autoencoder = load_part(path / "vae", "AutoencoderKL")
    network = load_part(path / "unet", "UNet2DConditionModel")
    scheduler, config = path / "scheduler" / "scheduler_config.json", path / "conditioner" / "config.json"
    with explained(scheduler):
        process = from_scheduler_config(read_table(scheduler))
    if not config.exists():
        raise UserError(f"{path} has no conditioner/config.json: this version opens models that sfumato saved; text encoders come later")
    with explained(config):
        values = read_table(config)
        conditioner = find("predict.conditioners", values.get("_class_name", "")).from_config(values)
    with explained(path / "model_index.json"):
        notes = parts.get("_sfumato", {})
        defaults = Defaults(**{k: v for k, v in notes.get("defaults", {}).items() if k in Defaults.__dataclass_fields__})
    assert isinstance(autoencoder, Autoencoder)
    _check_parts(path, autoencoder, network, conditioner)
    model = LatentDiffusion(autoencoder, Denoiser(network, process), conditioner, defaults, str(notes.get("name", name)))
    return model if device == "cpu" else model.to(device)


def _check_parts(path: Path, autoencoder: Autoencoder, network: Any, conditioner: Any) -> None:
    """`UserError` where the parts of a folder belong to different models."""
    channels, config, classes = autoencoder.space.channels, network.config, len(getattr(conditioner, "names", ()))
    if (config.in_channels, config.out_channels) != (channels, channels):
        found = f"unet takes {config.in_channels} channels and gives {config.out_channels}, latents of vae have {channels}"
    elif config.class_embed_type is None and (config.num_class_embeds or 0) != (classes + 1 if classes else 0):
        found = f"unet has {config.num_class_embeds or 0} class embeddings, conditioner has {classes} classes (and one for none)"
    else:
        return
    raise UserError(f"the parts of {path} do not fit: {found}; use parts of one model")


def _from_hub(name: str) -> Path:
    """The local snapshot of a hub repository (`huggingface_hub`), fetched when it is not there and the network is."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the library raises a dozen kinds: all of them mean that the model is not to be had
        raise UserError(
            f"model {name!r} could not be had from the hub ({type(error).__name__}): check the name and the network, or give a folder"
        ) from error
