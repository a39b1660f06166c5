"""Log which attention backend is used, with a warning for the slow math path.

    blockwise   kernels/cpu_attention.py: bfloat16 on the CPU, many tokens
    products    plain products: training of few tokens in bfloat16 on the CPU
    flash, efficient, cudnn   torch's fused kernels, which keep no scores
    math        torch's unfused path: all scores in memory, several times as slow

The logger "sfumato" logs each kind of call once: "math" for many tokens as a warning, others as
info.
"""

import logging
from functools import lru_cache

import torch
from torch import Tensor

LOG = logging.getLogger("sfumato")
MANY = 2**20
"""Scores of a head from which the math path is reported: 1,024 queries and as many keys."""

_SDPA_BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}


def sdpa_backend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """Name the backend of scaled_dot_product_attention for heads (B, H, N, d) and a mask."""
    choose = getattr(torch, "_fused_sdp_choice", None)
    return "unknown" if choose is None else _SDPA_BACKENDS.get(choose(q, k, v, mask), "unknown")


def report(backend: str, q: Tensor, count: int, keys: int, masked: bool) -> None:
    """Log the backend of a call once. Calls on the meta device are not logged.

    Args:
        backend: a name of the list above.
        q: queries, for device, dtype and head width.
        count: number of queries.
        keys: number of keys.
        masked: True where a mask is applied.
    """
    if count * keys >= MANY and not q.is_meta:
        _log_once(backend, q.device.type, str(q.dtype).removeprefix("torch."), q.shape[-1], masked)


@lru_cache(maxsize=256)  # remembers the kinds of calls already logged
def _log_once(backend: str, device: str, dtype: str, width: int, masked: bool) -> None:
    of = f"attention on {device} in {dtype}, heads of {width}{', masked' if masked else ''}"
    if backend == "math":
        LOG.warning(
            "%s: torch has no fused kernel for it and keeps all scores in memory; "
            "use bfloat16 and head widths of 64 or 128",
            of,
        )
    else:
        LOG.info("%s: %s", of, backend)
