"""Decode and encode in overlapping tiles: memory grows with the tile, not with the image.

For the exact result see `sfumato.decode.exact`.

Neighbours share `overlap` latent cells. Over these a tile's weight is 0 in the outer quarter, next
to a border that is not the image's, rises linearly over the middle half, and is 1 in the inner
quarter; the weights of all tiles sum to 1 at every pixel. So a decoder whose output depends on no
latent cell farther away than overlap/4 gives the same image as all at once. Group norms and
attention are over the tile and not the image: for them this is an approximation, exact where one
tile covers everything. Encoders likewise, with tiles of whole cells.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.compress.base import Autoencoder, Posterior
from sfumato.decode.whole import check_decoded, check_latent, whole
from sfumato.errors import UserError


def _starts(length: int, tile: int, stride: int) -> list[int]:
    """Start of each tile along one side; the last one ends at the edge."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, stride), length - tile]


def _ramp(start: int, tile: int, length: int, overlap: int) -> Tensor:
    """Weights (tile,) along one side of a tile.

    They rise and fall over the overlap, but not at the image's own edges.
    """
    position = torch.arange(tile, dtype=torch.float32) + 0.5
    weight = torch.ones(tile)
    for meets_neighbour, depth in ((start > 0, position), (start + tile < length, tile - position)):
        if meets_neighbour:
            weight = torch.minimum(weight, (2 * depth / overlap - 0.5).clamp(0, 1))
    return weight


@torch.no_grad()
def tiled(
    autoencoder: Autoencoder, z: Float[Tensor, "B C h w"], tile: int = 64, overlap: int = 16
) -> Float[Tensor, "B c H W"]:
    """Decode standardised latents by tiles.

    Args:
        autoencoder: The autoencoder.
        z: Standardised latents.
        tile: Latent cells along a side of a tile.
        overlap: Cells that neighbours share.

    Returns:
        The images in [-1, 1], clamped, float32.

    Raises:
        UserError: Unless 0 < overlap < tile, and for latents that do not fit.
        NumericalError: For NaN or infinity.
    """
    _check(tile, overlap)
    check_latent(autoencoder.space, z)
    h, w = z.shape[2:]
    if h <= tile and w <= tile:
        return whole(autoencoder, z)
    f = autoencoder.space.factor

    def run(top: int, left: int) -> Tensor:
        piece = z[:, :, top : top + tile, left : left + tile]
        pixels = autoencoder.decode(piece.to(autoencoder.dtype)).float()
        check_decoded(pixels, autoencoder.dtype)
        return pixels

    return _blend(run, h, w, tile, overlap, f).clamp(-1, 1)


@torch.no_grad()
def tiled_posterior(
    autoencoder: Autoencoder, image: Float[Tensor, "B C H W"], tile: int = 64, overlap: int = 16
) -> Posterior:
    """Encode images in [-1, 1] by tiles, blending means and stds each by itself.

    Arguments and errors as for `tiled`.

    Returns:
        The distribution of raw latents, float32.
    """
    _check(tile, overlap)
    f = autoencoder.space.factor
    if image.shape[2] % f or image.shape[3] % f:
        raise UserError(
            f"image of shape {tuple(image.shape)}: this autoencoder takes sides that are multiples "
            f"of {f}"
        )
    h, w = image.shape[2] // f, image.shape[3] // f

    def run(top: int, left: int) -> Tensor:
        piece = image[:, :, top * f : (top + tile) * f, left * f : (left + tile) * f]
        posterior = autoencoder.posterior(piece.to(autoencoder.dtype))
        return torch.cat([posterior.mean, posterior.std], 1).float()

    mean, std = _blend(run, h, w, tile, overlap, 1).chunk(2, dim=1)
    return Posterior(mean, std)


def _check(tile: int, overlap: int) -> None:
    if not 0 < overlap < tile:
        raise UserError(
            f"tile={tile}, overlap={overlap}: expected 0 < overlap < tile, in latent cells"
        )


def _blend(
    run: Callable[[int, int], Tensor], h: int, w: int, tile: int, overlap: int, f: int
) -> Tensor:
    """The weighted mean of tiles.

    Args:
        run: (top, left) in latent cells -> the tile there.
        h: Latent cells along the vertical side.
        w: Latent cells along the horizontal side.
        tile: Latent cells along a side of a tile.
        overlap: Latent cells that neighbours share.
        f: Numbers along a side of a tile for one latent cell.
    """
    blend, total = torch.zeros(()), torch.zeros(())
    for top in _starts(h, tile, tile - overlap):
        for left in _starts(w, tile, tile - overlap):
            piece = run(top, left)
            height, width = piece.shape[2:]
            rows = _ramp(top * f, height, h * f, overlap * f)
            columns = _ramp(left * f, width, w * f, overlap * f)
            weight = (rows[:, None] * columns[None, :]).to(piece.device)
            if not blend.ndim:
                blend = torch.zeros(*piece.shape[:2], h * f, w * f, device=piece.device)
                total = torch.zeros(1, 1, h * f, w * f, device=piece.device)
            y, x = slice(top * f, top * f + height), slice(left * f, left * f + width)
            blend[:, :, y, x] += weight * piece
            total[:, :, y, x] += weight
    return blend / total
