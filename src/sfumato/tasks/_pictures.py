"""What tasks share: pictures and masks as tensors, latents with the right noise, and the later part
of a run.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image as pil
from torch import Tensor

from sfumato.decode.image import to_tensor
from sfumato.errors import UserError, unknown
from sfumato.running import noise_of
from sfumato.sampling import Request, latent_shape, times_of

Picture = pil.Image | Sequence[pil.Image] | Tensor
POSTERIORS = ("mean", "sample")


def sized(
    model: Any, picture: Picture, request: Request
) -> tuple[Float[Tensor, "N C H W"], Request]:
    """The pixels of the picture(s), and the request for pictures of that size; `UserError` where it
    asks for another, or for too few.
    """
    pixels = model.pixels(picture)
    height, width = pixels.shape[2:]
    if (request.height or height, request.width or width) != (height, width):
        raise UserError(
            f"height={request.height}, width={request.width} for a picture of {height} x {width}: resize the picture first"
        )
    if len(pixels) not in (1, request.count):
        raise UserError(
            f"{len(pixels)} pictures for {request.count} images: expected one, or one an image"
        )
    return pixels, replace(request, height=height, width=width)


def mask_like(
    pixels: Float[Tensor, "N C H W"], mask: pil.Image | Tensor
) -> Float[Tensor, "M _ H W"]:
    """A mask (M, 1, H, W) in [0, 1], 1 where the picture is to be drawn anew: white of a picture,
    or numbers in [0, 1].
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


def covered(model: Any, mask: Float[Tensor, "M _ H W"]) -> Float[Tensor, "M _ h w"]:
    """1 for latent cells in which any pixel is to be drawn anew."""
    factor = model.autoencoder.space.factor
    return F.max_pool2d((mask > 0).float(), factor, ceil_mode=True)


class Draws:
    """The noise of a request's images, draw after draw, and how many have been made."""

    def __init__(self, model: Any, request: Request):
        assert request.height is not None and request.width is not None
        self.request, self.used = request, request.drawn
        self.noise = noise_of(model, request, latent_shape(model, request.height, request.width))
        for _ in range(request.drawn):
            self.noise()

    def __call__(self) -> Float[Tensor, "B c h w"]:
        self.used += 1
        return self.noise()


def encoded(
    model: Any, pixels: Float[Tensor, "N C H W"], posterior: str, draws: Draws
) -> Float[Tensor, "M c h w"]:
    """z of the pixels: the posterior's mean, or a "sample" of it for each image of the request."""
    if posterior not in POSTERIORS:
        raise unknown("posterior", posterior, POSTERIORS)
    if posterior == "mean":
        return model.encode(pixels)
    return model.encode(pixels.expand(draws.request.count, -1, -1, -1), draws())


def later(model: Any, request: Request, strength: float) -> list[float]:
    """The last part of the request's times: `strength` of its steps, rounded down."""
    if not 0 < strength <= 1:
        raise UserError(
            f"strength={strength}: expected a number above 0, which keeps the picture, up to 1, which keeps next to nothing of it"
        )
    times = times_of(model, request)
    count = int((len(times) - 1) * strength + 1e-9)
    if count == 0:
        raise UserError(
            f"strength={strength} of {len(times) - 1} steps is none: expected at least {1 / (len(times) - 1):.3g}, or more steps"
        )
    return times[-count - 1 :]


def extra_channels(model: Any) -> int:
    """What the network takes beside the latent: 0, a mask and a masked picture (1 + c), a picture
    (c) ...
    """
    return model.denoiser.network.in_channels - model.denoiser.network.channels


def nearest(model: Any, mask: Float[Tensor, "M _ H W"]) -> Float[Tensor, "M _ h w"]:
    """The mask at the latent's resolution, each cell by its first pixel, 0 or 1: as inpainting
    networks were trained.
    """
    factor = model.autoencoder.space.factor
    return (mask[:, :, ::factor, ::factor] >= 0.5).float()


def by_pixels(model: Any, mask: Float[Tensor, "M _ H W"]) -> Float[Tensor, "M K h w"]:
    """The mask, 0 or 1, with the pixels of each latent cell as channels, row by row."""
    factor, (height, width) = model.autoencoder.space.factor, mask.shape[2:]
    whole = F.pad(mask, (0, -width % factor, 0, -height % factor), mode="replicate")
    return F.pixel_unshuffle((whole >= 0.5).float(), factor)
