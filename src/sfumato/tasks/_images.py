"""Shared parts of tasks: images as tensors, latents, the last part of a run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float
from PIL import Image as pil
from torch import Tensor

from sfumato.errors import UserError
from sfumato.io.image_files import to_srgb, with_own_colours
from sfumato.model import LatentDiffusion
from sfumato.predict.networks.base import Network
from sfumato.sampling import Plan, Request
from sfumato.sampling.plan import latent_shape
from sfumato.sampling.run import noise_source
from sfumato.validate import number_in, one_of

ImageInput = pil.Image | Sequence[pil.Image] | Tensor
"""One image for all, or one an image of the request: PIL images, or pixels in [-1, 1]."""
POSTERIORS = ("mean", "sample")


def resize_request(
    model: LatentDiffusion, image: ImageInput, request: Request | None
) -> tuple[Float[Tensor, "N C H W"], Request]:
    """Give the request the size of an image.

    Args:
        model: The model, whose autoencoder has the channels of the pixels.
        image: One image for all of the request's, or one each.
        request: May have the image's size already; None: a request of defaults.

    Returns:
        The pixels in [-1, 1], and the request with their height and width.

    Raises:
        UserError: For a request with another size, or another number of images.
    """
    pixels, request = model.pixels(image), request or Request()
    height, width = pixels.shape[2:]
    if (request.height or height, request.width or width) != (height, width):
        raise UserError(
            f"height={request.height}, width={request.width} for an image of {height} x {width}: "
            "resize the image first"
        )
    check_count(pixels, request.count)
    return pixels, replace(request, height=height, width=width)


def check_count(pixels: Tensor, count: int) -> None:
    """Raise `UserError` unless there is one image, or one for each of the request's."""
    if len(pixels) not in (1, count):
        raise UserError(
            f"{len(pixels)} input images for {count} images: expected one, or one an image"
        )


class NoiseDraws:
    """The noise of a plan's images, draw after draw, with their number in `used`.

    Args:
        model: The model that runs the plan.
        plan: The plan; the draws that it skips are skipped.
        posterior: "mean" or "sample", as in `encode`.
    """

    def __init__(self, model: LatentDiffusion, plan: Plan, posterior: str = "mean"):
        self.posterior = one_of("posterior", posterior, POSTERIORS)
        self.model, self.plan = model, plan
        self.count, self.used = plan.n, plan.request.noise_offset
        self.noise = noise_source(plan, model.device)
        for _ in range(self.used):
            self.noise()

    def __call__(self) -> Float[Tensor, "B c h w"]:
        self.used += 1
        return self.noise()

    def encode(self, pixels: Float[Tensor, "N C H W"]) -> Float[Tensor, "M c h w"]:
        """Encode pixels to z: the posterior's mean, or a sample for each image of the plan."""
        self.model.fitted(self.plan)  # memory for the run is checked before the time is spent
        if self.posterior == "mean":
            return self.model.encode(pixels)
        return self.model.encode(pixels.expand(self.count, -1, -1, -1), self())


def last_steps(times: Sequence[float], strength: float) -> Sequence[float]:
    """The last part of a run's times: `strength` of its steps, rounded down.

    Raises:
        UserError: For a strength outside of (0, 1], or of less than one step.
    """
    hint = "near 0 keeps the image, 1 next to nothing of it"
    number_in("strength", strength, above=0, at_most=1, hint=hint)
    steps = len(times) - 1
    count = int(steps * strength + 1e-9)
    if count == 0:
        raise UserError(
            f"strength={strength} of {steps} steps is none: expected at least {1 / steps:.3g}, "
            "or more steps"
        )
    return times[-count - 1 :]


def network_of(model: LatentDiffusion) -> Network:
    """The model's network, of this library's."""
    return cast("Network", model.denoiser.network)


def extra_channels(model: LatentDiffusion) -> int:
    """Channels that the network takes beside the latent.

    0, a mask and a masked image (1 + c), an image (c) ...
    """
    network = network_of(model)
    return network.in_channels - network.channels


def channels_error(model: LatentDiffusion, expected: str) -> UserError:
    """The error for a network with other input channels than a task needs."""
    extra = extra_channels(model)
    return UserError(f"this model takes {extra} channels beside the latent: {expected}")


def inpainting_channels(model: LatentDiffusion) -> tuple[int, int]:
    """Channels beside the latent of models trained for inpainting.

    Returns:
        Of a mask by latent cells and a masked image, and of a masked image and a mask by pixels.
    """
    space = model.autoencoder.space
    return 1 + space.channels, space.channels + space.factor**2


def own_task(model: LatentDiffusion) -> str:
    """Name the task of a model with other extra channels than inpainting's, for messages."""
    if model.low_res is not None:
        return "upscale"
    if extra_channels(model) == model.autoencoder.space.channels:
        return "edit" if network_of(model).part == "unet" else "control"
    return ""


def own_colours(image: ImageInput) -> tuple[pil.Image, ...] | None:
    """Images with the transparency and profiles of the input.

    Returns:
        As `Request.originals` takes them; None: tensors, and opaque images in sRGB, have neither.
    """
    if isinstance(image, Tensor):
        return None
    images = [image] if isinstance(image, pil.Image) else list(image)
    own = [with_own_colours(one) for one in images]
    if all(one is None for one in own):
        return None
    pairs = zip(images, own, strict=True)
    return tuple(to_srgb(plain) if one is None else one for plain, one in pairs)


def outline(
    model: LatentDiffusion, pixels: Float[Tensor, "N C H W"], channels: int | None = None
) -> Tensor:
    """The pixels' latent without numbers (meta device), for a plan made before encoding."""
    own, *cells = latent_shape(model.autoencoder.space, *pixels.shape[2:])
    return torch.empty(len(pixels), own if channels is None else channels, *cells, device="meta")
