"""LatentDiffusion: the four acts on one page, of parts that can be swapped one by one.

image --compress--> z --diffuse--> x_t --predict--> (x0, eps) --diffuse back--> z --decode--> image
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Unpack, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image as PIL
from torch import Tensor

from sfumato.batching import drive, gather
from sfumato.checkpoints.schedulers.config import to_scheduler_config
from sfumato.compress.base import Autoencoder
from sfumato.decode.exact import exact
from sfumato.decode.overflow import decode_in_range, encode_in_range
from sfumato.decode.tiled import tiled
from sfumato.decode.whole import check_latent, whole
from sfumato.diffuse.process import Process
from sfumato.diffuse.run import SeededNoise, Step, check_finite, run_sampler
from sfumato.diffuse.samplers import get_sampler
from sfumato.errors import NumericalError, UserError, usable_device
from sfumato.images import composite, put_back_originals, to_pil, to_tensor
from sfumato.inference import pieces
from sfumato.inference.offload.model import (
    conditioner_state,
    denoiser_streamer,
    network_state,
    offload_model,
    require_resident,
)
from sfumato.inference.threads import adapted_threads
from sfumato.io.atomic import hash_json, hash_tensors
from sfumato.io.host_memory import parse_size
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.denoiser import Denoiser, evaluate_calls
from sfumato.predict.networks.base import Network
from sfumato.sampling.plan import (
    Plan,
    latent_shape,
    prompt_list,
    resolve,
    resolve_settings,
    seeds_of,
    times_of,
)
from sfumato.sampling.request import Defaults, Prompt, Request, RequestFields
from sfumato.sampling.run import append_distilled_guidance, plan_coroutine
from sfumato.saving import save_model
from sfumato.types import Conditioning, ImageSpec, Prediction
from sfumato.validate import one_of

Output = Literal["pil", "tensor", "latent"]
OUTPUTS = ("pil", "tensor", "latent")
OnStep = Callable[[Step], bool | None]
_DECODE = {"whole": whole, "exact": exact, "tiled": tiled}


@dataclass(frozen=True)
class LatentDiffusion:
    """An autoencoder, a denoiser (network + process) and a conditioner.

    Immutable: `dataclasses.replace` swaps a part.

    Attributes:
        autoencoder: Image <-> latent.
        denoiser: Network and process.
        conditioner: Prompts -> `Conditioning`.
        defaults: Settings that apply where a request leaves them open.
        name: Of the model.
        low_res: Process that noises small images, for networks that upscale them; else None.
        training_data: Record of the images that it was trained on, see `data.Division`; empty where
            there is none. It decides no image.
    """

    autoencoder: Autoencoder
    denoiser: Denoiser
    conditioner: Conditioner
    defaults: Defaults = field(default_factory=Defaults)
    name: str = "model"
    low_res: Process | None = None
    training_data: Mapping[str, Any] = field(default_factory=dict)

    # ---- the four acts ---------------------------------------------------------------------------

    def compress(
        self,
        image: PIL.Image | Sequence[PIL.Image] | Float[Tensor, "B C H W"],
        seed: int | None = None,
    ) -> Float[Tensor, "B c h w"]:
        """Compress images to latents: act 1.

        Sides that are no multiples of the autoencoder's factor are padded with the image's edge, at
        the right and the bottom. Colour becomes grey (ITU-R 601 luma), and grey colour, where the
        autoencoder needs it.

        Args:
            image: PIL images, or pixels in [-1, 1].
            seed: Draw from the posterior, image k with seed + k; None: its mean.

        Returns:
            z, standardised.

        Raises:
            UserError: For anything but pixels.
            NumericalError: For NaN or infinity.
        """
        pixels = self.pixels(image)
        if seed is None:
            return self.encode(pixels)
        shape = latent_shape(self.autoencoder.space, *pixels.shape[2:])
        return self.encode(pixels, SeededNoise(shape, seeds_of(seed, len(pixels)), self.device)())

    def pixels(
        self, image: PIL.Image | Sequence[PIL.Image] | Float[Tensor, "B _ H W"]
    ) -> Float[Tensor, "B C H W"]:
        """Convert images to this autoencoder's channels.

        Returns:
            Float pixels (B, C, H, W) in [-1, 1].

        Raises:
            UserError: For anything else than images.
        """
        pixels = image if isinstance(image, Tensor) else to_tensor(image)
        if pixels.ndim != 4 or not pixels.is_floating_point() or not pixels.numel():
            raise UserError(
                f"image is {pixels.dtype} of shape {tuple(pixels.shape)}: "
                "expected floating-point pixels (B, C, H, W) in [-1, 1]"
            )
        low, high = (float(v) for v in pixels.aminmax())
        if not (low >= -1.001 and high <= 1.001):  # a NaN fails too
            raise UserError(
                f"image has pixels from {low:.4g} to {high:.4g}: "
                "expected [-1, 1]; bytes become so by value / 127.5 - 1"
            )
        channels = self.autoencoder.channels
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, channels, -1, -1)
        elif pixels.shape[1] == 3 and channels == 1:
            luma = pixels.new_tensor([0.299, 0.587, 0.114])  # ITU-R 601
            pixels = torch.einsum("bchw,c->bhw", pixels, luma)[:, None]
        return pixels

    def encode(
        self, pixels: Float[Tensor, "B C H W"], noise: Float[Tensor, "B c h w"] | None = None
    ) -> Float[Tensor, "B c h w"]:
        """Encode `pixels`, padded to whole cells as in `compress`.

        Args:
            pixels: In [-1, 1], of the autoencoder's channels.
            noise: Standard normal, for a draw from the posterior; None: its mean.

        Returns:
            z, standardised.
        """
        space = self.autoencoder.space
        shape = latent_shape(space, *pixels.shape[2:])
        bottom, right = (
            cells * space.factor - side
            for cells, side in zip(shape[1:], pixels.shape[2:], strict=True)
        )
        if bottom or right:  # the last cells cover more than the image: its edge is repeated there
            pixels = F.pad(pixels, (0, right, 0, bottom), mode="replicate")
        expected = (len(pixels), *shape)
        if noise is not None and noise.shape != expected:
            raise UserError(f"noise of shape {tuple(noise.shape)}: expected {expected}")
        if len(pixels) == 0:
            return torch.empty(expected, device=self.device)
        resident = denoiser_streamer(self) is None
        way = pieces.encoding_of(self, shape[1:], len(pixels))
        parts = pixels.split(way.images)
        noises = [None] * len(parts) if noise is None else noise.split(way.images)
        with torch.inference_mode():
            z = torch.cat(
                [
                    encode_in_range(
                        self.autoencoder,
                        part.to(self.device),
                        draw,
                        retry=resident,
                        strips=way.name == "exact",
                    )
                    for part, draw in zip(parts, noises, strict=True)
                ]
            )
        check_finite(z, f"compress, with the autoencoder in {_name(self.autoencoder.dtype)}")
        # a plain tensor, which training can use: those of inference mode cannot be saved for a
        # gradient
        return z.clone()

    def diffuse(
        self, z: Float[Tensor, "B C h w"], t: float, seed: int = 0
    ) -> Float[Tensor, "B C h w"]:
        """Add noise to latents: act 2.

        Args:
            z: Clean latent, standardised.
            t: Time in [0, 1], 0 is clean and 1 is noise.
            seed: Image k's noise is drawn from seed + k.

        Returns:
            x = alpha*z + sigma*eps.
        """
        if not 0 <= t <= 1:
            raise UserError(f"t={t}: expected a time in [0, 1], 0 is clean and 1 is noise")
        check_latent(self.autoencoder.space, z)
        eps = SeededNoise(z.shape[1:], seeds_of(seed, len(z)), z.device)()
        return self.denoiser.process.add_noise(z, eps, t)

    def predict(
        self, x: Float[Tensor, "B C h w"], t: float, conditioning: Conditioning | Prompt = None
    ) -> Prediction:
        """Predict clean latent and noise, without guidance: act 3.

        Args:
            x: Noisy latent.
            t: Time in (0, 1].
            conditioning: Conditioning, or prompt(s).

        Returns:
            `Prediction` of x0 and eps.
        """
        if not 0 < t <= 1:
            raise UserError(f"t={t}: expected a time in (0, 1]")
        encoded = self._condition(conditioning, x)
        with torch.inference_mode():
            prediction = self.denoiser(x.to(self.device), t, encoded)
        variance = prediction.variance
        return Prediction(
            prediction.x0.clone(),
            prediction.eps.clone(),
            None if variance is None else variance.clone(),
        )

    def decode(self, z: Float[Tensor, "B C h w"]) -> list[PIL.Image]:
        """Decode latents to PIL images: act 4.

        Mode L from a grey autoencoder, else RGB. `sfumato.decode` has tiled and exact decoding, and
        gives tensors.

        Args:
            z: Standardised latent.

        Raises:
            NumericalError: For NaN or infinity, in float32 too.
        """
        check_latent(self.autoencoder.space, z)
        return [image for part in self._decode(z.to(self.device)) for image in to_pil(part)]

    # ---- the main job ----------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt = None,
        *,
        output: Output = "pil",
        on_step: OnStep | None = None,
        batch: int | None = None,
        **fields: Unpack[RequestFields],
    ) -> Any:
        """Generate images: `run` of a `Request` of these fields.

        Args:
            prompt: One text for all images or one an image; None: no prompt.
            output: "pil": a list of PIL images, mode L from a grey model, else RGB; "tensor": (n,
                3, H, W) in [0, 1]; "latent": (n, C, h, w).
            on_step: Called after each network call; cancels the run by returning False (no images
                then).
            batch: Largest number of rows in a forward pass; None: as many as fit into memory.
            **fields: Any other field of `Request`: n, steps, sampler, guidance, seed, height ...

        Returns:
            n images, as `output` says; image k is drawn from seed + k.

        Raises:
            UserError: For impossible settings, before any weight is used.
            NumericalError: For NaN or infinity.
        """
        return self.run(Request(prompt, **fields), output=output, on_step=on_step, batch=batch)

    def run(
        self,
        request: Request | Plan,
        *,
        output: Output = "pil",
        on_step: OnStep | None = None,
        batch: int | None = None,
    ) -> Any:
        """Carry out a request, or the plan that a task made (`sfumato.tasks`).

        Args and results are those of `generate`.
        """
        watch = None if on_step is None else lambda k, step: on_step(step)
        return self.run_many([request], output=output, on_step=watch, batch=batch)[0]

    def run_many(
        self,
        requests: Sequence[Request | Plan | Mapping[str, Any]],
        *,
        output: Output = "pil",
        on_step: Callable[[int, Step], bool | None] | None = None,
        batch: int | None = None,
    ) -> list[Any]:
        """Carry out several requests in shared forward passes.

        Prompts, steps, samplers, spacings, guidance, seeds and sizes may all differ. Network calls
        that are pending at the same moment go through the network together.

        Args:
            requests: Requests, their fields as mappings, or plans.
            output: As for `generate`.
            on_step: Called as on_step(k, step) after each network call of request k; cancels that
                request by returning False.
            batch: Largest number of rows in a forward pass; None: as many as fit into memory.

        Returns:
            For each request the result of `generate` alone, bit for bit.

        Raises:
            UserError: For impossible settings in any of them, before any weight is used.
            NumericalError: For NaN or infinity.
        """
        one_of("output", output, OUTPUTS)
        plans = [r if isinstance(r, Plan) else self.plan(r) for r in requests]
        # in other dtypes the bits of decoding may depend on the number of threads
        exact = self.autoencoder.dtype == torch.float32
        with adapted_threads() if exact else nullcontext():
            return [
                self.finish(z, plan, output)
                for z, plan in zip(self._sample(plans, batch, on_step), plans, strict=True)
            ]

    def plan(self, request: Request | Mapping[str, Any]) -> Plan:
        """Resolve a request: defaults filled in and everything checked, without a weight.

        Args:
            request: A request, or its fields as a mapping.

        Returns:
            The plan, for `run`, or for `sample` and `finish`.

        Raises:
            UserError: For anything that cannot be carried out; only `NumericalError` is left then.
        """
        return resolve(
            self, request if isinstance(request, Request) else Request.from_dict(request)
        )

    def sample(
        self, plan: Plan, *, on_step: OnStep | None = None, batch: int | None = None
    ) -> Float[Tensor, "B C h w"]:
        """Sample a plan's latents.

        Args:
            plan: Made by this model's `plan`, or by a task.
            on_step: Called after each network call; cancels the run by returning False.
            batch: Largest number of rows in a forward pass; None: as many as fit into memory.

        Returns:
            (n, C, h, w), standardised; no rows where the run was cancelled.

        Raises:
            NumericalError: For NaN or infinity.
        """
        watch = None if on_step is None else lambda k, step: on_step(step)
        return self._sample([plan], batch, watch)[0]

    def finish(self, latents: Float[Tensor, "B C h w"], plan: Plan, output: Output = "pil") -> Any:
        """Decode a plan's latents, crop the images, and put back the pixels that stay.

        Args:
            latents: Result of `sample` for the plan.
            plan: The plan.
            output: As for `generate`.

        Raises:
            NumericalError: For NaN or infinity after decoding.
        """
        if output == "latent":
            # a plain tensor: those of inference mode cannot be saved for a gradient
            return latents.clone()
        images: list[Any] = []
        begin = 0
        for image in self._decode(latents, plan.request.decoding):
            image, rows = image[:, :, : plan.height, : plan.width], slice(begin, begin + len(image))
            if plan.request.composite is not None and len(image):
                original, mask = (p if len(p) == 1 else p[rows] for p in plan.request.composite)
                image = composite(image, original, mask)
            begin += len(image)
            if output == "pil":
                images += to_pil(image)
            else:
                grey = image.shape[1] == 1
                images.append((image.expand(-1, 3, -1, -1) if grey else image).add(1).div(2))
        if output != "pil":
            return torch.cat(images)
        request = plan.request
        if request.originals is not None and request.composite is not None:
            return put_back_originals(images, request.originals, request.composite[1])
        return images

    def fitted(self, plan: Plan) -> Plan:
        """Decide how a plan's images are decoded, and check its memory, before it is run.

        Args:
            plan: Made by this model's `plan`, or by a task.

        Returns:
            The plan with "whole" or "exact" in place of decoding "auto".

        Raises:
            UserError: Where a streamed model's memory has no room, with the least that has.
        """
        way = pieces.check_decoding(self, plan)
        pieces.rows_of(self, [plan])
        return replace(plan, request=replace(plan.request, decoding=way.name))

    def settings(self, **fields: Any) -> dict[str, Any]:
        """The settings of a run, with the model's defaults where a field is missing or None.

        Args:
            **fields: n, steps, sampler, spacing, timesteps, guidance, distilled_guidance, height,
                width, as for `generate`.

        Returns:
            The settings as a JSON object.

        Raises:
            UserError: For impossible ones.
        """
        return resolve_settings(self, Request(**fields)).to_json()

    def times(
        self, steps: int | None = None, sampler: str | None = None, spacing: str | None = None
    ) -> list[float]:
        """The times that a run visits, from noise to 0.

        Args:
            steps: Number of steps; None: the model's.
            sampler: Decides which tuned times apply; None: the model's.
            spacing: None: tuned times where the model has them for these steps, else the model's
                spacing.
        """
        request = Request(steps=steps, sampler=sampler, spacing=spacing)
        return times_of(self, request, resolve_settings(self, request))

    def invert(
        self,
        z: Float[Tensor, "B C h w"],
        prompt: Conditioning | Prompt = None,
        steps: int = 50,
        iterations: int = 5,
        spacing: str = "trailing",
        timesteps: Sequence[float] | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """The noise that DDIM would make a latent from.

        DDIM inversion (Song et al. 2021, arXiv:2010.02502, section 4.3).
        `generate(prompt, noise=..., sampler="ddim", guidance=1, ...)` with the same times draws z
        again, the closer the more iterations.

        Args:
            z: Clean latents, standardised.
            prompt: Prompt(s), or their conditioning.
            steps: Number of steps.
            iterations: Iterations of the fixed point at each step.
            spacing: Spacing of the times.
            timesteps: The times themselves, instead of `steps` and `spacing`.

        Returns:
            Standard-normal noise, (B, C, h, w).
        """
        conditioning = self._condition(prompt, z)
        schedule, factor = self.denoiser.process.schedule, self.autoencoder.space.factor
        if timesteps is None:  # they may depend on the size
            height, width = (side * factor for side in z.shape[2:])
            request = Request(
                steps=steps, sampler="ddim", spacing=spacing, height=height, width=width
            )
            timesteps = times_of(self, request, resolve_settings(self, request))
        sampler = get_sampler("ddim_inversion")(
            z.to(self.device).float(), timesteps, schedule, torch.empty, iterations=iterations
        )
        with torch.inference_mode():
            x = run_sampler(
                sampler,
                lambda x, t: self.denoiser(x, t, conditioning),
                iterations * (len(timesteps) - 1),
            )
        assert x is not None
        return x.clone() / math.hypot(*schedule.point(timesteps[0]))

    def _condition(
        self, prompt: Conditioning | Prompt, latents: Float[Tensor, "B C h w"]
    ) -> Conditioning:
        """Conditioning for latents; guidance-distilled networks get the model's own scale."""
        check_latent(self.autoencoder.space, latents)
        if isinstance(prompt, Conditioning):
            return prompt.to(self.device)
        count, factor = len(latents), self.autoencoder.space.factor
        height, width = (side * factor for side in latents.shape[2:])
        encoded = self.conditioner(prompt_list(prompt, count), ImageSpec(height, width))
        scale = self.defaults.distilled_guidance if self.denoiser.guidance_embeds else None
        return append_distilled_guidance(encoded, count, scale, self.device).to(self.device)

    @torch.inference_mode()
    def _sample(
        self,
        plans: Sequence[Plan],
        batch: int | None,
        on_step: Callable[[int, Step], bool | None] | None,
    ) -> list[Float[Tensor, "B C h w"]]:
        """The latents of each plan; no rows where `on_step` cancelled it."""
        rows = pieces.rows_of(self, plans, batch)
        runs = [
            plan_coroutine(self, plan, None if on_step is None else partial(on_step, k))
            for k, plan in enumerate(plans)
        ]
        try:
            with adapted_threads():
                latents = drive(gather(runs), partial(evaluate_calls, rows=rows))
        except NumericalError as error:
            dtype = next(self.denoiser.network.parameters()).dtype
            if dtype == torch.float32:
                raise
            raise NumericalError(f"{error} (the network ran in {_name(dtype)})") from error
        return [
            torch.empty(0, *plan.latent_shape, device=self.device) if z is None else z
            for z, plan in zip(latents, plans, strict=True)
        ]

    def _decode(self, z: Tensor, decoding: str = "auto") -> Iterator[Tensor]:
        """Decode to images in [-1, 1] by pieces, in float32 where half precision overflows."""
        resident = denoiser_streamer(self) is None
        height, width = z.shape[2:]
        way = pieces.decoding_of(self, (height, width), len(z), decoding)
        for part in z.split(way.images):
            yield decode_in_range(self.autoencoder, part, _DECODE[way.name], retry=resident)
            if way.name == "exact":  # rows leave the pages of a layer's weights in memory
                self.release()

    # ---- properties ------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.denoiser.network.parameters()).device

    @property
    def sample_size(self) -> int:
        """The default height and width of images, in pixels."""
        if self.defaults.size is not None:
            return self.defaults.size
        return self.denoiser.sample_size * self.autoencoder.space.factor

    @property
    def class_names(self) -> tuple[str, ...]:
        """The prompts of a class-conditional model, in the order of its labels; else empty."""
        return self.conditioner.class_names

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all weights and settings that decide an image; defaults are not among them."""
        parts = self.autoencoder, cast(Network, self.denoiser.network)
        configs = [*(part.to_config() for part in parts), self.conditioner.identity()]
        weights = [hash_tensors(network_state(part)) for part in parts]
        if self.low_res is not None:
            configs.append(to_scheduler_config(self.low_res))
        if self.conditioner.tensors():
            weights.append(hash_tensors(conditioner_state(self.conditioner)))
        return hash_json([configs, to_scheduler_config(self.denoiser.process), weights])

    def describe(self, hash: bool = True) -> dict[str, Any]:
        """Parts, sizes and defaults, for `sfumato info`.

        Args:
            hash: With the hash, for which all weights are read.
        """
        space, process, side = self.autoencoder.space, self.denoiser.process, self.sample_size
        networks = {"autoencoder": self.autoencoder, "denoiser": self.denoiser.network}
        networks |= {
            f"text_encoder{end}": encoder.model
            for end, encoder in self.conditioner.encoders.items()
        }
        return {
            "name": self.name,
            **({"hash": self.hash} if hash else {}),
            "parts": {
                k: {"class": type(m).__name__, "parameters": sum(p.numel() for p in m.parameters())}
                for k, m in networks.items()
            },
            "latent": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(space).items()},
            "process": {
                "schedule": process.schedule.kind,
                "parameterization": process.parameterization.name,
            },
            "image": {"channels": self.autoencoder.channels, "height": side, "width": side},
            "defaults": self.settings(),
            "class_names": list(self.class_names),
        }

    def to(self, device: str | torch.device) -> "LatentDiffusion":
        """The same model on a device; this one stays where it is.

        Args:
            device: "cpu", "cuda", "cuda:1" ...

        Raises:
            UserError: For a device that cannot be used, or weights that are streamed.
        """
        require_resident(self, "moving", "open it with device=")
        with usable_device(device):
            autoencoder, network = (
                copy.deepcopy(m).to(device) for m in (self.autoencoder, self.denoiser.network)
            )
        denoiser = replace(self.denoiser, network=network)
        conditioner = self.conditioner.to(device)
        return replace(self, autoencoder=autoencoder, denoiser=denoiser, conditioner=conditioner)

    def optimized(self, compile: bool = False) -> "LatentDiffusion":
        """The same model with its network prepared for inference.

        This one stays as it is, for training and saving.
        On the CPU, in float32 and in bfloat16 where the processor supports it, weights are packed
        for the kernels that read them (`inference/prepack.py`). On other devices feature maps get
        channels last. Results differ from this model's by rounding. A network that cannot be
        prepared stays as it is.

        Args:
            compile: Use torch.compile instead, with the weights as constants on the CPU; the first
                image of each size waits for the compiler, minutes for large networks.
        """
        require_resident(self, "packing", "use it as it is, or open it without memory=")
        model = replace(self, denoiser=self.denoiser.optimized(compile))
        if "hash" in self.__dict__:  # of the same weights: to unpack them takes memory
            model.__dict__["hash"] = self.hash
        return model

    def streamed(
        self,
        memory: int | str,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> "LatentDiffusion":
        """The same model with its weights streamed from their files, layer by layer.

        A layer's weights are freed when it has run; memory that is left keeps layers from step to
        step (`sfumato.inference.offload.streaming`). The images are this model's, bit for bit, if
        it has that dtype and device. `load(..., memory=...)` does this for a model that is not in
        memory yet; weights that are stay there. Not for training, saving or `optimized`.

        Args:
            memory: Limit in bytes, or as "3GB": of all that the process holds, or on a GPU of the
                memory there. Feature maps must leave room for a layer's weights.
            dtype: Of the weights; None: the denoiser's.
            device: "cpu" or a CUDA device.

        Raises:
            UserError: For less memory than works.
        """
        return offload_model(self, parse_size(memory), dtype, device)

    def release(self) -> None:
        """Free the weights that a streamed model holds at the moment; other models keep theirs."""
        streamer = denoiser_streamer(self)
        if streamer is not None:
            streamer.memory.release()

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model as a diffusers folder, or as one file, atomically.

        A model of that name is replaced as a whole. Single files have the layout of their first
        publication, which other programs open (Stable Diffusion 1 to 3.5, FLUX.1, Latent
        Diffusion); other models have our own.

        Args:
            folder: Folder, or a name that ends in .safetensors.
            dtype: Of the stored weights; None: their own.

        Raises:
            UserError: For the name of something else, or a full disk.
            NumericalError: For weights that are not finite in `dtype`.
        """
        require_resident(self, "saving", "open it without memory=, or copy its files")
        save_model(self, folder, dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
