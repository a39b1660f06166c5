"""Attention in bfloat16 on the CPU as two products a block of queries, the first of which ends in
the exponential.

    P = sigmoid(Q K^T / sqrt(d) - C)        y = (P V) / (P 1)

Softmax does not change if all scores of a row are lowered by C, and sigmoid(s) = e^s / (1 + e^s) is
e^s where s is well below 0: to e^s relatively, which is 1e-4 from s = -9 on, below bfloat16's
rounding. oneDNN has sigmoid, not exp, as an end of its products: it is done in float32 on the
numbers that were just summed, so that scores are never rounded, never written, and no maximum is
looked for. C is an upper bound of all scores of a head, max|q| max|k| / sqrt(d) + 9
(Cauchy-Schwarz): bfloat16 reaches down to e^-87, so that it may lie far above what the scores
reach.

1.6 to 1.9 times as quick as torch's kernel at 4.6 thousand tokens for heads of 128, 1.0 to 1.3
times for heads of 64: that multiplies in smaller pieces and exponentiates in passes of its own (AMD
EPYC with AVX-512, 2 threads). The result is rounded once more than there: 2 to 3e-3 from exact
beside 1.5 to 2e-3. `benchmarks/transformer_step.py` has it in whole networks.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

_ROWS = 256  # queries at a time: with 4.5 thousand keys their P is 2.3 MB, which stays in the cache
_KEYS = 64  # keys are filled up to a multiple: rows of P then begin on cache lines
_MARGIN = 9.0  # how far below 0 the largest score lies
# where scores may lie that count: e^-87 is the least number, and what is e^-17 of the largest is
# nothing
_LOWEST = -70.0
# queries and keys from which on it is quicker, by the least width of a head
_MANY = {64: 2048, 128: 1024}


def fits(q: Float[Tensor, "B N H d"], k: Float[Tensor, "B L H d"]) -> bool:
    """Whether it is quicker here: in inference in bfloat16 on the CPU, for many tokens and wide
    heads.
    """
    if (
        q.dtype != torch.bfloat16
        or not q.is_cpu
        or torch.is_grad_enabled()
        or torch.compiler.is_exporting()
    ):
        return False
    few, wide = min(q.shape[1], k.shape[1]), q.shape[-1]
    return any(wide >= least and few >= many for least, many in _MANY.items())


def attend(
    q: Float[Tensor, "B N H d"],
    k: Float[Tensor, "B L H d"],
    v: Float[Tensor, "B L H d"],
    mask: Bool[Tensor, "B L"] | None,
    onednn: torch._ops._OpNamespace,  # pyright: ignore[reportPrivateUsage]
) -> Float[Tensor, "B N D"] | None:
    """softmax(Q K^T / sqrt(d)) V in each head, side by side; mask True where a key counts. None:
    the scores may reach too far for it.
    """
    scale = q.shape[-1] ** -0.5
    bound = _longest(q) * _longest(k) * scale + _MARGIN  # (B, H)
    if not float(bound.max()) < -_LOWEST:  # a NaN too
        return None
    more = -k.shape[1] % _KEYS
    q, found = q * scale, torch.empty(*q.shape, dtype=q.dtype)
    for image in range(len(q)):
        for head in range(q.shape[2]):
            keys = onednn._reorder_linear_weight(F.pad(k[image, :, head], (0, 0, 0, more)), _ROWS)
            values = onednn._reorder_linear_weight(F.pad(v[image, :, head].t(), (0, more)), _ROWS)
            below = torch.full((k.shape[1],), -float(bound[image, head].ceil()), dtype=q.dtype)
            if mask is not None:
                below.masked_fill_(~mask[image], float("-inf"))
            below = F.pad(below, (0, more), value=float("-inf"))
            parts, sums = [], []
            for rows in q[image, :, head].contiguous().split(_ROWS):
                p = onednn._linear_pointwise(rows, keys, below, "sigmoid", [], "")  # (rows, L)
                sums.append(p.sum(-1, keepdim=True, dtype=torch.float32))
                parts.append(onednn._linear_pointwise(p, values, None, "none", [], ""))
            found[image, :, head] = torch.cat(parts).float().div_(torch.cat(sums))
    return found.flatten(2)


def _longest(x: Float[Tensor, "B N H d"]) -> Float[Tensor, "B H"]:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax(1)
