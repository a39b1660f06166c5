"""Shared parts of tasks: images and masks as tensors, latents, the last part of a run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image as pil
from torch import Tensor

from sfumato.errors import UserError, unknown
from sfumato.images import to_tensor
from sfumato.model import LatentDiffusion
from sfumato.predict.networks.base import Network
from sfumato.sampling.plan import Plan, latent_shape
from sfumato.sampling.request import Request
from sfumato.sampling.run import noise_source

ImageInput = pil.Image | Sequence[pil.Image] | Tensor
"""One image for all, or one an image of the request: PIL images, or pixels in [-1, 1]."""
POSTERIORS = ("mean", "sample")


def resize_request(
    model: LatentDiffusion, image: ImageInput, request: Request
) -> tuple[Float[Tensor, "N C H W"], Request]:
    """Give the request the size of an image.

    Args:
        model: whose autoencoder decides the channels
        image: one for all images, or one an image
        request: may have the image's size already

    Returns:
        the pixels in [-1, 1], and the request with their height and width

    Raises:
        UserError: the request has another size, or another number of images
    """
    pixels = model.pixels(image)
    height, width = pixels.shape[2:]
    if (request.height or height, request.width or width) != (height, width):
        raise UserError(
            f"height={request.height}, width={request.width} for a picture of {height} x {width}: resize the picture first"
        )
    check_count(pixels, request.count)
    return pixels, replace(request, height=height, width=width)


def check_count(pixels: Tensor, count: int) -> None:
    """Raise `UserError` unless there is one image, or one for each of the request's."""
    if len(pixels) not in (1, count):
        raise UserError(f"{len(pixels)} pictures for {count} images: expected one, or one an image")


def mask_pixels(
    pixels: Float[Tensor, "N C H W"], mask: pil.Image | Tensor
) -> Float[Tensor, "M _ H W"]:
    """A mask (M, 1, H, W) in [0, 1] of an image's size.

    Args:
        pixels: the image
        mask: white, or 1, is drawn anew

    Raises:
        UserError: another size, or numbers outside of [0, 1]
    """
    if isinstance(mask, pil.Image):
        mask = to_tensor(mask.convert("L")).add(1).div(2)
    if (
        mask.ndim != 4
        or mask.shape[1] != 1
        or mask.shape[2:] != pixels.shape[2:]
        or not mask.is_floating_point()
    ):
        raise UserError(
            f"a mask of shape {tuple(mask.shape)} and type {mask.dtype} for a picture of shape {tuple(pixels.shape)}: expected floating-point "
            f"numbers of shape (1, 1, {pixels.shape[2]}, {pixels.shape[3]}), 1 is drawn anew"
        )
    low, high = (float(v) for v in mask.aminmax())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"a mask with values from {low:.4g} to {high:.4g}: expected [0, 1], 1 is drawn anew"
        )
    return mask


def latent_mask(model: LatentDiffusion, mask: Float[Tensor, "M _ H W"]) -> Float[Tensor, "M _ h w"]:
    """1 for latent cells in which any pixel is to be drawn anew."""
    factor = model.autoencoder.space.factor
    return F.max_pool2d((mask > 0).float(), factor, ceil_mode=True)


class NoiseDraws:
    """The noise of a plan's images, draw after draw, with their number in `used`."""

    def __init__(self, model: LatentDiffusion, plan: Plan):
        self.count, self.used = plan.n, plan.request.noise_offset
        self.noise = noise_source(plan, model.device)
        for _ in range(self.used):
            self.noise()

    def __call__(self) -> Float[Tensor, "B c h w"]:
        self.used += 1
        return self.noise()


def encode_images(
    model: LatentDiffusion, pixels: Float[Tensor, "N C H W"], posterior: str, draws: NoiseDraws
) -> Float[Tensor, "M c h w"]:
    """Encode pixels to z: the posterior's mean, or a "sample" for each image of the request."""
    if posterior == "mean":
        return model.encode(pixels)
    return model.encode(pixels.expand(draws.count, -1, -1, -1), draws())


def check_posterior(posterior: str) -> None:
    """Raise `UserError` for a posterior that there is not."""
    if posterior not in POSTERIORS:
        raise unknown("posterior", posterior, POSTERIORS)


def last_steps(times: Sequence[float], strength: float) -> Sequence[float]:
    """The last part of a run's times: `strength` of its steps, rounded down.

    Raises:
        UserError: a strength outside of (0, 1], or of less than one step
    """
    if not 0 < strength <= 1:
        raise UserError(
            f"strength={strength}: expected a number above 0, which keeps the picture, up to 1, which keeps next to nothing of it"
        )
    count = int((len(times) - 1) * strength + 1e-9)
    if count == 0:
        raise UserError(
            f"strength={strength} of {len(times) - 1} steps is none: expected at least {1 / (len(times) - 1):.3g}, or more steps"
        )
    return times[-count - 1 :]


def extra_channels(model: LatentDiffusion) -> int:
    """Channels that the network takes beside the latent.

    0, a mask and a masked image (1 + c), an image (c) ...
    """
    network = network_of(model)
    return network.in_channels - network.channels


def network_of(model: LatentDiffusion) -> Network:
    """The model's network, of this library's."""
    return cast("Network", model.denoiser.network)


def outline(
    model: LatentDiffusion, pixels: Float[Tensor, "N C H W"], channels: int | None = None
) -> Tensor:
    """The pixels' latent without numbers (meta device), for a plan made before encoding."""
    space = model.autoencoder.space
    _, *cells = latent_shape(space, *pixels.shape[2:])
    return torch.empty(
        len(pixels), space.channels if channels is None else channels, *cells, device="meta"
    )


def mask_by_cell(
    model: LatentDiffusion, mask: Float[Tensor, "M _ H W"]
) -> Float[Tensor, "M _ h w"]:
    """The mask by latent cells, each of its first pixel, 0 or 1, as networks were trained."""
    factor = model.autoencoder.space.factor
    return (mask[:, :, ::factor, ::factor] >= 0.5).float()


def mask_by_pixel(
    model: LatentDiffusion, mask: Float[Tensor, "M _ H W"]
) -> Float[Tensor, "M K h w"]:
    """The mask, 0 or 1, with the pixels of each latent cell as channels, row by row."""
    factor, (height, width) = model.autoencoder.space.factor, mask.shape[2:]
    whole = F.pad(mask, (0, -width % factor, 0, -height % factor), mode="replicate")
    return F.pixel_unshuffle((whole >= 0.5).float(), factor)
