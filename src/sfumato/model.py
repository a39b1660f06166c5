"""LatentDiffusion: the four acts on one page, with parts that can be swapped one by one.

image --compress--> z --diffuse--> x_t --predict--> (x0, eps) --diffuse back--> z --decode--> image
"""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image as PIL
from torch import Tensor

from sfumato.batching import drive, gather
from sfumato.checkpoints.names.scheduler import to_scheduler_config
from sfumato.compress.base import Autoencoder
from sfumato.decode.exact import exact
from sfumato.decode.image import pasted, to_pil, to_tensor
from sfumato.decode.tiled import tiled
from sfumato.decode.whole import check_latent, whole
from sfumato.diffuse.process import Process
from sfumato.diffuse.sample import SeededNoise, Step, all_finite, check_finite, sample
from sfumato.errors import NumericalError, UserError, unknown
from sfumato.inference.offload.model import (
    conditioner_state,
    denoiser_streamer,
    network_state,
    offload_model,
    require_resident,
)
from sfumato.io.atomic import hash_json, hash_tensors
from sfumato.io.host_memory import parse_size
from sfumato.predict.denoiser import Denoiser, answer
from sfumato.predict.networks._network import Network
from sfumato.registry import find
from sfumato.running import questions, told_guidance
from sfumato.sampling import (
    Defaults,
    Prompt,
    Request,
    latent_shape,
    prompts,
    request_from,
    seeds_of,
    settings,
    times_of,
)
from sfumato.saving import save_model
from sfumato.types import Conditioning, ImageSpec, Prediction

LOG = logging.getLogger("sfumato")


@dataclass(frozen=True)
class LatentDiffusion:
    """An autoencoder, a denoiser (network + process) and a conditioner. Immutable:
    `dataclasses.replace` swaps a part.
    """

    autoencoder: Autoencoder
    denoiser: Denoiser
    conditioner: Any
    defaults: Defaults = field(default_factory=Defaults)
    name: str = "model"
    # how small pictures are made noisy, for networks that enlarge them
    low_res: Process | None = None

    # ---- the four acts ---------------------------------------------------------------------------

    def compress(
        self,
        image: PIL.Image | Sequence[PIL.Image] | Float[Tensor, "B C H W"],
        seed: int | None = None,
    ) -> Float[Tensor, "B c h w"]:
        """Image(s) -> z, standardised: PIL images, or a tensor in [-1, 1]. With a seed a draw from
        the posterior, else its mean.

        Sides that are no multiples of the autoencoder's factor are filled up with the image's edge,
        at the right and the bottom. Image k's draw is seeded with seed + k. Colour becomes grey
        (ITU-R 601 luma) and grey colour where the autoencoder needs it.
        """
        pixels = self.pixels(image)
        shape = latent_shape(self, *pixels.shape[2:])
        return self.encode(
            pixels,
            None
            if seed is None
            else SeededNoise(shape, seeds_of(seed, len(pixels)), self.device)(),
        )

    def pixels(
        self, image: PIL.Image | Sequence[PIL.Image] | Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B C H W"]:
        """Image(s) as this model's autoencoder takes them: in [-1, 1], grey or colour. `UserError`
        for what are no pixels.
        """
        pixels = image if isinstance(image, Tensor) else to_tensor(image)
        if pixels.ndim != 4 or not pixels.is_floating_point() or not pixels.numel():
            raise UserError(
                f"image is {pixels.dtype} of shape {tuple(pixels.shape)}: expected floating-point pixels (B, C, H, W) in [-1, 1]"
            )
        low, high = (float(v) for v in pixels.aminmax())
        if not (low >= -1.001 and high <= 1.001):  # a NaN fails too
            raise UserError(
                f"image has pixels from {low:.4g} to {high:.4g}: expected [-1, 1]; bytes become so by value / 127.5 - 1"
            )
        channels = self.autoencoder.channels
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, channels, -1, -1)
        elif pixels.shape[1] == 3 and channels == 1:
            pixels = torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor([0.299, 0.587, 0.114]))[
                :, None
            ]
        return pixels

    def encode(
        self, pixels: Float[Tensor, "B C H W"], noise: Float[Tensor, "B c h w"] | None = None
    ) -> Float[Tensor, "B c h w"]:
        """`pixels` -> z: the posterior's mean, or a draw with this noise. `compress` says what
        happens to odd sides and overflow.
        """
        shape, factor = latent_shape(self, *pixels.shape[2:]), self.autoencoder.space.factor
        bottom, right = (
            cells * factor - side for cells, side in zip(shape[1:], pixels.shape[2:], strict=True)
        )
        if bottom or right:  # the last cells cover more than the image: its edge goes on there
            pixels = F.pad(pixels, (0, right, 0, bottom), mode="replicate")
        with torch.inference_mode():
            z = self.autoencoder.encode(
                pixels.to(self.device, self.autoencoder.dtype), noise
            ).float()
            if (
                self.autoencoder.dtype != torch.float32
                and not all_finite(z)
                and denoiser_streamer(self) is None
            ):
                LOG.warning(
                    "the autoencoder's %s overflowed; encoding again in float32",
                    _name(self.autoencoder.dtype),
                )
                z = (
                    copy.deepcopy(self.autoencoder)
                    .float()
                    .encode(pixels.to(self.device, torch.float32), noise)
                )
        check_finite(z, f"compress, with the autoencoder in {_name(self.autoencoder.dtype)}")
        # a plain tensor, which training can use: those of inference mode cannot be saved for a
        # gradient
        return z.clone()

    def diffuse(
        self, z: Float[Tensor, "B C h w"], t: float, seed: int = 0
    ) -> Float[Tensor, "B C h w"]:
        """z -> x at time t in [0, 1]: alpha*z + sigma*eps, with image k's noise from seed + k."""
        if not 0 <= t <= 1:
            raise UserError(f"t={t}: expected a time in [0, 1], 0 is clean and 1 is noise")
        check_latent(self.autoencoder.space, z)
        eps = SeededNoise(z.shape[1:], seeds_of(seed, len(z)), z.device)()
        return self.denoiser.process.add_noise(z, eps, t)

    def predict(
        self, x: Float[Tensor, "B C h w"], t: float, conditioning: Conditioning | Prompt = None
    ) -> Prediction:
        """(x, t, conditioning or prompt(s)) -> Prediction(x0, eps), without guidance. t in (0,
        1].
        """
        if not 0 < t <= 1:
            raise UserError(f"t={t}: expected a time in (0, 1]")
        check_latent(self.autoencoder.space, x)
        factor = self.autoencoder.space.factor
        picture = ImageSpec(x.shape[2] * factor, x.shape[3] * factor)
        given = (
            conditioning
            if isinstance(conditioning, Conditioning)
            else self._read(prompts(conditioning, len(x)), picture)
        )
        with torch.inference_mode():
            found = self.denoiser(x.to(self.device), t, given.to(self.device))
        return Prediction(
            found.x0.clone(),
            found.eps.clone(),
            None if found.variance is None else found.variance.clone(),
        )

    def decode(self, z: Float[Tensor, "B C h w"]) -> list[PIL.Image]:
        """z -> PIL images, mode L from a grey autoencoder, else RGB. `sfumato.decode` has tiled and
        preview decoding, and tensors.
        """
        return to_pil(self._decoded(z.to(self.device)))

    # ---- the main job ----------------------------------------------------------------------------

    def settings(self, **asked: Any) -> dict[str, Any]:
        """The settings that `generate` would run with: the model's defaults where the caller says
        nothing or None.

        Takes n, steps, sampler, spacing, guidance, height and width as `generate` does; `UserError`
        for impossible ones.
        """
        return settings(self, Request(**asked))

    def generate(
        self,
        prompt: Prompt = None,
        *,
        n: int = 1,
        steps: int | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        guidance: Any = None,
        seed: int = 0,
        negative_prompt: Prompt = None,
        height: int | None = None,
        width: int | None = None,
        timesteps: Sequence[float] | None = None,
        noise: Tensor | None = None,
        known: tuple[Tensor, Tensor] | None = None,
        canvas: tuple[int, int] | None = None,
        cache: int | Sequence[int] | None = None,
        weaker: Any = None,
        picture: ImageSpec | None = None,
        output: Literal["pil", "tensor", "latent"] = "pil",
        on_step: Callable[[Step], bool | None] | None = None,
        batch: int | None = None,
        decoding: str = "whole",
        learned_guidance: float | None = None,
    ) -> Any:
        """Prompt -> n images: a list of PIL images, or "tensor" (n, 3, H, W) in [0, 1], or "latent"
        (n, c, h, w).

        prompt: one for all or one an image (then n is their number); None draws unconditionally.
        Image k uses seed + k. sampler, spacing: a name, with options if need be ("ddim:eta=0.5",
        "karras:rho=5"). timesteps: the times to visit, falling, 1 is noise and the last is where
        the run ends (0: clean); overrides `steps` and `spacing`. guidance: a number (1 is off), or
        more ("3 interval:low=0.2,high=0.8", see predict/guidance/settings.py); weaker: the model
        that the reference "model" (autoguidance) moves away from.
        learned_guidance: what a network is told that learned guidance (FLUX.1 dev); for such a
        model a `guidance` that is given alone, as a number, is that: there is no second pass then.
        known: (z, mask), latents to keep where the mask (n or 1, 1 or c, h, w) is 1. canvas: (size,
        stride) in latent cells, for images larger than the model's, drawn through overlapping
        windows. cache: the network's deep features are made anew at every so-many-th call only.
        picture: what an SDXL-class model is told about sizes, crops and quality; by default a
        picture of this height and width, not cut. noise: the start (n, c, h, w) instead of the
        seeds' own; what a sampler adds later is the seeds' in any case. on_step sees each network
        call and cancels by returning False (returns [] then, or a tensor of no images). batch
        bounds the rows of a forward pass. decoding: "whole", "exact" (the same in strips, about an
        eighth of the memory for more time) or "tiled" (approximate). A grey model's "tensor" has
        three equal channels, so that every model gives the same shape; its PIL images have mode L.
        Raises `UserError` for impossible settings and `NumericalError` for NaN or infinity.
        """
        if output not in ("pil", "tensor", "latent"):
            raise unknown("output", output, ("pil", "tensor", "latent"))
        request = Request(
            prompt,
            n,
            steps,
            sampler,
            spacing,
            guidance,
            seed,
            negative_prompt,
            height,
            width,
            timesteps,
            noise,
        )
        request = replace(
            request,
            known=known,
            canvas=canvas,
            cache=cache,
            weaker=weaker,
            picture=picture,
            decoding=decoding,
            learned_guidance=learned_guidance,
        )
        (z,) = self._latents(
            [request], batch, None if on_step is None else lambda k, step: on_step(step)
        )
        return self._output(z, request, output)

    def run(
        self,
        request: Request,
        *,
        output: Literal["pil", "tensor", "latent"] = "pil",
        on_step: Callable[[Step], bool | None] | None = None,
        batch: int | None = None,
    ) -> Any:
        """What `generate` returns, for a request: one that a task made of pictures, say
        (`sfumato.tasks`).
        """
        return self.sample_many(
            [request],
            output=output,
            on_step=None if on_step is None else lambda k, step: on_step(step),
            batch=batch,
        )[0]

    def sample_many(
        self,
        requests: Sequence[Request | Mapping[str, Any]],
        *,
        output: Literal["pil", "tensor", "latent"] = "pil",
        on_step: Callable[[int, Step], bool | None] | None = None,
        batch: int | None = None,
    ) -> list[Any]:
        """Several requests in shared forward passes; each gets what `generate` alone would have
        returned.

        requests: `Request`s, or their fields as mappings: prompts, steps, samplers, spacings,
        guidance, seeds and sizes may all differ. At every moment all that is asked by runs under
        way goes through the network together. on_step(k, step) sees request k's network calls and
        cancels that request by returning False (its answer is then empty). batch bounds the rows of
        a forward pass.
        """
        if output not in ("pil", "tensor", "latent"):
            raise unknown("output", output, ("pil", "tensor", "latent"))
        asked = [r if isinstance(r, Request) else request_from(r) for r in requests]
        return [
            self._output(z, r, output)
            for z, r in zip(self._latents(asked, batch, on_step), asked, strict=True)
        ]

    def invert(
        self,
        z: Float[Tensor, "B C h w"],
        prompt: Conditioning | Prompt = None,
        steps: int = 50,
        iterations: int = 5,
        spacing: str = "trailing",
    ) -> Float[Tensor, "B C h w"]:
        """z -> the noise that DDIM would make it from: `generate(prompt, noise=..., sampler="ddim",
        guidance=1, ...)` with the same steps and

        spacing draws z again, the closer the more `iterations` of the fixed point at each step
        (DDIM inversion; Song et al. 2021, section 4.3).
        """
        check_latent(self.autoencoder.space, z)
        n, schedule = len(z), self.denoiser.process.schedule
        factor = self.autoencoder.space.factor
        picture = ImageSpec(z.shape[2] * factor, z.shape[3] * factor)
        request = Request(
            n=n,
            steps=steps,
            sampler="ddim",
            spacing=spacing,
            height=picture.height,
            width=picture.width,
        )
        times = times_of(self, request)  # which may depend on the size
        given = (
            prompt if isinstance(prompt, Conditioning) else self._read(prompts(prompt, n), picture)
        )
        conditioning = given.to(self.device)
        sampler = find("diffuse.samplers", "ddim_inversion")(
            z.to(self.device).float(), times, schedule, torch.empty, iterations=iterations
        )
        with torch.inference_mode():
            x = sample(
                sampler,
                lambda x, t: self.denoiser(x, t, conditioning),
                iterations * (len(times) - 1),
            )
        assert x is not None
        return x.clone() / math.hypot(*schedule.point(times[0]))

    def _read(self, words: Sequence[str | None], picture: ImageSpec) -> Conditioning:
        """What the network is told by words alone; one that learned guidance is told the model's
        own strength of it.
        """
        learned = self.settings().get("learned_guidance")
        return told_guidance(self.conditioner(words, picture), len(words), learned, self.device)

    @torch.inference_mode()
    def _latents(
        self,
        requests: Sequence[Request],
        batch: int | None,
        on_step: Callable[[int, Step], bool | None] | None,
    ) -> list[Tensor | None]:
        """The latents of each request, None where `on_step` cancelled it."""
        if batch is not None and (not isinstance(batch, int) or batch < 1):
            raise UserError(
                f"batch={batch!r}: expected a whole number of at least 1 row in a forward pass"
            )
        runs = [
            questions(self, r, None if on_step is None else partial(on_step, k))
            for k, r in enumerate(requests)
        ]
        try:
            return drive(gather(runs), partial(answer, rows=batch))
        except NumericalError as error:
            dtype = next(self.denoiser.network.parameters()).dtype
            if dtype == torch.float32:
                raise
            raise NumericalError(f"{error} (the network ran in {_name(dtype)})") from error

    def _output(self, z: Tensor | None, request: Request, output: str) -> Any:
        if z is None:
            chosen = settings(self, request)
            z = torch.empty(
                0, *latent_shape(self, chosen["height"], chosen["width"]), device=self.device
            )
        if output == "latent":
            # a plain tensor: those of inference mode cannot be saved for a gradient
            return z.clone()
        chosen = settings(self, request)
        image = self._decoded(z, request.decoding)[:, :, : chosen["height"], : chosen["width"]]
        if request.paste is not None:
            image = pasted(image, *request.paste)
        if output == "pil":
            return to_pil(image)
        return (image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image).add(1).div(2)

    def _decoded(self, z: Tensor, way: str = "whole") -> Tensor:
        """z -> image in [-1, 1]; where half precision overflows (SDXL's autoencoder in float16),
        again in float32, said aloud.
        """
        dtype, run = self.autoencoder.dtype, {"whole": whole, "exact": exact, "tiled": tiled}[way]
        try:
            return run(self.autoencoder, z)
        except NumericalError as error:
            if dtype == torch.float32 or not all_finite(z) or denoiser_streamer(self) is not None:
                raise
            LOG.warning(
                "%s; decoding again in float32 (load the model in bfloat16 or float32 to save the time)",
                error,
            )
            return run(copy.deepcopy(self.autoencoder).float(), z)

    def times(
        self, steps: int | None = None, sampler: str | None = None, spacing: str | None = None
    ) -> list[float]:
        """The times that a run visits, from noise to 0: by `spacing` or the model's own, tuned ones
        where it has them for these steps.
        """
        return times_of(self, Request(steps=steps, sampler=sampler, spacing=spacing))

    # ---- what it is ------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.denoiser.network.parameters()).device

    @property
    def sample_size(self) -> int:
        """The default height and width of images, in pixels."""
        if self.defaults.size is not None:
            return self.defaults.size
        network: Any = self.denoiser.network
        # another's
        side = (
            network.sample_size
            if isinstance(network, Network)
            else getattr(network.config, "sample_size", None) or 64
        )
        return side * self.autoencoder.space.factor

    @property
    def class_names(self) -> tuple[str, ...]:
        """The prompts of a class-conditional model, in the order of its labels; empty for
        others.
        """
        return getattr(self.conditioner, "names", ())

    @cached_property
    def hash(self) -> str:
        """SHA-256 over all weights and settings that decide an image; defaults, which a request may
        change, are not among them.
        """
        texts = getattr(self.conditioner, "identity", self.conditioner.to_config)()
        configs = [self.autoencoder.to_config(), self.denoiser.network.to_config(), texts]  # pyright: ignore
        weights = [
            hash_tensors(network_state(m)) for m in (self.autoencoder, self.denoiser.network)
        ]
        if self.low_res is not None:
            configs.append(to_scheduler_config(self.low_res))
        if hasattr(self.conditioner, "tensors"):
            weights.append(hash_tensors(conditioner_state(self.conditioner)))
        return hash_json([configs, to_scheduler_config(self.denoiser.process), weights])

    def describe(self) -> dict[str, Any]:
        """Parts, sizes and defaults, for `sfumato info`."""
        space, process = self.autoencoder.space, self.denoiser.process
        networks = {"autoencoder": self.autoencoder, "denoiser": self.denoiser.network}
        networks |= {
            f"text_encoder{end}": encoder.model
            for end, encoder in getattr(self.conditioner, "encoders", {}).items()
        }
        return {
            "name": self.name,
            "hash": self.hash,
            "parts": {
                k: {"class": type(m).__name__, "parameters": sum(p.numel() for p in m.parameters())}
                for k, m in networks.items()
            },
            "latent": {
                "channels": space.channels,
                "factor": space.factor,
                "mean": list(space.mean),
                "std": list(space.std),
            },
            "process": {
                "schedule": getattr(process.schedule, "kind", "?"),
                "parameterization": process.parameterization.name,
            },
            "image": {
                "channels": self.autoencoder.channels,
                "height": self.sample_size,
                "width": self.sample_size,
            },
            "defaults": self.settings(),
            "class_names": list(self.class_names),
        }

    def to(self, device: str | torch.device) -> "LatentDiffusion":
        """The same model on a device ("cpu", "cuda", "cuda:1"); this one is left where it is."""
        require_resident(self, "moving", "open it with the device wanted")
        try:
            autoencoder, network = (
                copy.deepcopy(m).to(device) for m in (self.autoencoder, self.denoiser.network)
            )
        except (RuntimeError, AssertionError) as error:
            # torch's words for a name that it does not know, or a device that is not there
            raise UserError(
                f"device {str(device)!r} cannot be used ({str(error).splitlines()[0]}): expected one such as cpu or cuda"
            ) from error
        conditioner = (
            self.conditioner.to(device) if hasattr(self.conditioner, "to") else self.conditioner
        )
        return replace(
            self,
            autoencoder=autoencoder,
            denoiser=replace(self.denoiser, network=network),
            conditioner=conditioner,
        )

    def optimized(self, compile: bool = False) -> "LatentDiffusion":
        """The same model with a network made ready for inference where it is; this one is left as
        it is, for training and saving.

        On the CPU, in float32 and in bfloat16 where the processor knows that, weights are packed
        for the kernels that read them (`inference/prepack.py`); on other devices feature maps have
        their channels last in memory. Results differ from this model's by rounding. compile: by
        torch.compile instead, with the weights as constants on the CPU; the first picture of each
        size waits for the compiler, which takes minutes for large networks. What cannot be made
        ready stays as it is.
        """
        require_resident(self, "packing", "use it as it is, or open it without memory=")
        found = replace(self, denoiser=self.denoiser.optimized(compile))
        if "hash" in self.__dict__:  # of the same weights: to unpack them takes memory
            found.__dict__["hash"] = self.hash
        return found

    def streamed(
        self,
        memory: int | str,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> "LatentDiffusion":
        """The same model in no more memory than said, in bytes or as "3GB", where the feature maps
        of its pictures leave room for a layer's weights.

        Weights come from their files layer by layer, in `dtype` (default: the denoiser's), and go
        when the layer has run; what memory is left keeps layers from step to step
        (`sfumato.inference.offload.streaming`). The pictures are this model's, bit for bit, if it
        has that dtype and device. memory counts all that the process holds, or on a GPU what lies
        there. `load(..., memory=...)` is this for a model that is not in memory yet; weights that
        are stay there. Not for training, saving or `optimized`. `UserError` for less memory than
        works.
        """
        return offload_model(self, parse_size(memory), dtype, device)

    def release(self) -> None:
        """Gives back the memory of the weights that a streamed model holds at the moment; others
        keep theirs.
        """
        found = denoiser_streamer(self)
        if found is not None:
            found.memory.release()

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the model as a diffusers folder, atomically; `dtype` (e.g. torch.float16) changes
        what is stored.

        A name that ends in .safetensors gets the same in one file, which `load` opens too: Stable
        Diffusion's (1 to 3.5), FLUX.1's and Latent Diffusion's models in the layout of their first
        publication, which other programs open, others in our own. A model of that name is replaced
        as a whole; `UserError` for a file or folder that is something else, or a full disk,
        `NumericalError` for weights that are not finite in `dtype`.
        """
        require_resident(self, "saving", "open it without memory=, or copy its files")
        save_model(self, folder, dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
