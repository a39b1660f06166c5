"""Which way attention takes, and a word where that is a slow one.

    blockwise   kernels/cpu_attention.py: bfloat16 on the CPU, many tokens
    products    plain products: training of few tokens in bfloat16 on the CPU
    flash, efficient, cudnn   torch's fused kernels, which keep no scores
    math        torch's plain way: all scores in memory, several times as slow

The choice is logged once a kind of call by the logger "sfumato", as "info"; "math" for many tokens
as a warning.
"""

import logging
from functools import lru_cache

import torch
from torch import Tensor

LOG = logging.getLogger("sfumato")
MANY = 2**20
"""Scores of a head from which on the plain way is worth a word: 1,024 tokens that attend to as
many."""

_TORCHS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}


def torchs_choice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """What torch's scaled_dot_product_attention takes for heads (B, H, N, d) and a mask."""
    choose = getattr(torch, "_fused_sdp_choice", None)
    return "unknown" if choose is None else _TORCHS.get(choose(q, k, v, mask), "unknown")


def report(way: str, q: Tensor, count: int, keys: int, masked: bool) -> None:
    """Says once which way attention of `count` to `keys` tokens takes. q: for its device, dtype and
    width of a head. Nothing on the meta device, where nothing is computed.
    """
    if count * keys >= MANY and not q.is_meta:
        _say(way, q.device.type, str(q.dtype).removeprefix("torch."), q.shape[-1], masked)


@lru_cache(maxsize=256)  # a memory of what was said
def _say(way: str, device: str, dtype: str, width: int, masked: bool) -> None:
    of = f"attention on {device} in {dtype}, heads of {width}{', masked' if masked else ''}"
    if way == "math":
        LOG.warning(
            "%s: no fused kernel of torch takes it, all scores are kept; bfloat16 and head widths of 64 or 128 are usual",
            of,
        )
    else:
        LOG.info("%s: %s", of, way)
