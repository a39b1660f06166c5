"""Masks: from an image to numbers in [0, 1], and to the latent cells that they cover.

White is drawn anew, black stays, grey is blended. Levels within `NOISE` of black or white count as
black or white: noise and JPEG's artefacts would otherwise make every latent cell unknown, and the
hole would be drawn without its surroundings.

Transparency. Where all that is painted is white, unpainted pixels are black: a brush on an empty
layer. Other masks with transparency can be read in two ways (OpenAI's API draws transparent pixels
anew) and are refused, as are masks in colour.
"""

import logging

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image as pil
from torch import Tensor

from sfumato.errors import UserError
from sfumato.io.image_files import split_alpha
from sfumato.model import LatentDiffusion

NOISE = 16
"""Levels of 255 from black and from white that count as black and white."""

UNSEEN = 2 / 255
"""Largest mask value, of tensors, that leaves a latent cell as it is."""

COLOUR = 32
"""Largest difference between the channels of a grey image, in levels of 255."""

logger = logging.getLogger(__name__)


def mask_pixels(
    pixels: Float[Tensor, "N C H W"], mask: pil.Image | Tensor
) -> Float[Tensor, "M _ H W"]:
    """A mask (M, 1, H, W) in [0, 1] of an image's size.

    Args:
        pixels: The image.
        mask: White, or 1, is drawn anew.

    Raises:
        UserError: For another size, numbers outside of [0, 1], or an image that `read_mask`
            refuses.
    """
    if isinstance(mask, pil.Image):
        stored = (mask.height, mask.width)
        mask = read_mask(mask)
        if mask.shape[2:] != pixels.shape[2:]:
            turned = ""
            if stored == pixels.shape[2:]:
                turned = "; the mask's EXIF orientation turned it: save the mask upright"
            elif mask.shape[2:] == pixels.shape[:1:-1]:
                turned = "; the EXIF orientation of an image is applied: draw the mask upright"
            raise UserError(
                f"a mask of height {mask.shape[2]} and width {mask.shape[3]} for an image of "
                f"{pixels.shape[2]} and {pixels.shape[3]}: expected the same size{turned}"
            )
    fits = mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2:] == pixels.shape[2:]
    if not fits or not mask.is_floating_point():
        raise UserError(
            f"a mask of shape {tuple(mask.shape)} and type {mask.dtype} for an image of shape "
            f"{tuple(pixels.shape)}: expected floating-point numbers of shape "
            f"(1, 1, {pixels.shape[2]}, {pixels.shape[3]}), 1 is drawn anew"
        )
    low, high = (float(v) for v in mask.aminmax())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"a mask with values from {low:.4g} to {high:.4g}: expected [0, 1], 1 is drawn anew"
        )
    if high == 0:
        logger.warning("the mask is black everywhere: nothing is drawn anew")
    return mask


def read_mask(image: pil.Image) -> Float[Tensor, "1 1 H W"]:
    """Read a mask from an image of any mode.

    Levels are used as they are: a mask's ICC profile has no meaning.

    Returns:
        Numbers in [0, 1], upright; 1 is drawn anew.

    Raises:
        UserError: For an image in colour, one whose transparency has two readings, one that is
            nearly but not wholly black, and pixels whose white is unknown.
    """
    base, alpha = split_alpha(image)
    values = np.asarray(base if base.mode in ("L", "RGB") else base.convert("RGB")).astype(int)
    opacity = None if alpha is None else np.asarray(alpha).astype(int)
    if opacity is not None and opacity.min() >= 255 - NOISE:
        opacity = None
    shown = values if values.ndim == 2 else values.max(2)
    if opacity is not None:
        _check_opacity(255 - (values if values.ndim == 2 else values.min(2)), opacity)
        levels = opacity
    elif values.ndim == 3 and (shown - values.min(2)).max() > COLOUR:
        raise UserError(
            "the mask is in colour: expected black, white and grey; white is drawn anew"
        )
    else:
        levels = np.asarray(base.convert("L")).astype(int)
    highest = int(levels.max())
    if 0 < highest <= NOISE:
        raise UserError(
            f"the brightest level of the mask is {highest} of 255, which counts as black: "
            "expected white (255) where the image is drawn anew"
        )
    levels = np.where(levels <= NOISE, 0, np.where(levels >= 255 - NOISE, 255, levels))
    return torch.from_numpy(levels).to(torch.float32).div(255)[None, None]


def _check_opacity(darkness: np.ndarray, opacity: np.ndarray) -> None:
    """Raise `UserError` unless all that is painted is white.

    Args:
        darkness: Difference of each pixel from white, in levels.
        opacity: Alpha, in levels.
    """
    if opacity.max() <= NOISE:
        raise UserError(
            "the mask is transparent everywhere: expected white where the image is "
            "drawn anew, black elsewhere"
        )
    if (darkness * opacity).max() > NOISE * 255:
        raise UserError(
            "the mask has transparent pixels beside others than white ones, so that it has two "
            "readings: save it without transparency, white where the image is drawn anew, black "
            "elsewhere (a mask in OpenAI's convention: its alpha channel, inverted)"
        )


def latent_mask(model: LatentDiffusion, mask: Float[Tensor, "M _ H W"]) -> Float[Tensor, "M _ h w"]:
    """1 for latent cells in which any pixel is to be drawn anew."""
    factor = model.autoencoder.space.factor
    return F.max_pool2d((mask > UNSEEN).float(), factor, ceil_mode=True)


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
