"""Bytes of feature maps that a call of a network allocates."""

import torch

from sfumato.io.allocations import counted
from sfumato.predict.networks.base import Network
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.types import Conditioning

TOKENS = {"unet": 77, "transformer": 512}
"""Number of text tokens: CLIP's, and the usual maximum of T5."""


def step_bytes(network: Network, cells: tuple[int, int], rows: int = 1) -> int:
    """Return the bytes that one call of a network on the meta device allocates.

    Args:
        network: on the meta device.
        cells: height and width of the latents.
        rows: size of the batch.
    """
    dtype = next(network.parameters()).dtype
    x = torch.empty(rows, network.in_channels, *cells, dtype=dtype, device="meta")
    cond = conditions(network, rows, dtype)
    return x.nbytes + counted(lambda: network(x, torch.empty(rows, device="meta"), cond))


def conditions(network: Network, rows: int, dtype: torch.dtype) -> Conditioning:
    """Return the tokens and the vector that a network's config determines."""
    wide, count = network.token_width, TOKENS[network.part]
    width = max(wide) if isinstance(wide, tuple) else wide
    tokens = None if width is None else torch.empty(rows, count, width, dtype=dtype, device="meta")
    vector = _sdxl_vector(network.config) if isinstance(network, UNet) else 0
    vector = (vector or network.vector_width or network.classes or 0) + network.guidance_embeds
    return Conditioning(tokens, vector=torch.empty(rows, vector, device="meta") if vector else None)


def _sdxl_vector(config: UNetConfig) -> int:
    """Return the width of a U-Net's vector, in which sizes are not yet sinusoidal features."""
    total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    if not total or not each:
        return total or 0
    # six sizes beside the pooled text, or five of SDXL's refiner
    sizes = 6 if total - 6 * each > 0 and (total - 6 * each) % 256 == 0 else 5
    return total + sizes - sizes * each
