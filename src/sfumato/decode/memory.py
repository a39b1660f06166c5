"""Bytes that ways to decode and encode allocate for one image.

`whole` and `tiled` are counted on the meta device. In strips an autoencoder's weights stay in
memory, since layers are not called one by one, beside two of the largest map after a residual block
(one is released as the next one grows) and strips (`sfumato.compress.exact`). Measured for Stable
Diffusion's decoder at 512 pixels: 525 MB, where this counts 533.
"""

from collections.abc import Sequence

import torch
from torch import nn

from sfumato.compress.base import Autoencoder, SequentialAutoencoder
from sfumato.compress.exact import least
from sfumato.io.allocations import counted

_STRIPS = 2**26
"""Bytes of the strips that pass from layer to layer."""


def decode_bytes(autoencoder: Autoencoder, cells: tuple[int, int]) -> int:
    """Return the bytes that decoding one latent at once allocates.

    Args:
        autoencoder: on the meta device.
        cells: height and width of the latent.
    """
    z = torch.empty(1, autoencoder.space.channels, *cells, dtype=autoencoder.dtype, device="meta")
    return counted(lambda: autoencoder.reconstruct(z))


def encode_bytes(autoencoder: Autoencoder, cells: tuple[int, int]) -> int:
    """Return the bytes that encoding one image at once allocates; arguments as `decode_bytes`."""
    sides = (side * autoencoder.space.factor for side in cells)
    image = torch.empty(1, autoencoder.channels, *sides, dtype=autoencoder.dtype, device="meta")
    return counted(lambda: autoencoder.posterior(image))


def strip_decode_bytes(autoencoder: SequentialAutoencoder, cells: tuple[int, int]) -> int:
    """Return the bytes that decoding one latent in strips takes, as `decode_bytes`."""
    z = torch.empty(1, autoencoder.space.channels, *cells, device="meta")
    _, channels, height, width = autoencoder.to_cells(z.to(autoencoder.dtype)).shape
    return _strip_bytes(autoencoder, autoencoder.decoder_parts(), (channels, height, width))


def strip_encode_bytes(autoencoder: SequentialAutoencoder, cells: tuple[int, int]) -> int:
    """Return the bytes that encoding one image in strips takes, as `decode_bytes`."""
    height, width = (side * autoencoder.space.factor for side in cells)
    size = autoencoder.channels, height, width
    return _strip_bytes(autoencoder, autoencoder.encoder_parts(), size)


def _strip_bytes(
    autoencoder: Autoencoder, parts: Sequence[nn.Module], size: tuple[int, int, int]
) -> int:
    width = autoencoder.dtype.itemsize
    weights = sum(p.numel() for part in parts for p in part.parameters())
    return (weights + 2 * least(parts, size)) * width + _STRIPS
