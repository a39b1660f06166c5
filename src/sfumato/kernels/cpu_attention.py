"""Attention in bfloat16 on the CPU as two products per block of queries.

    P = sigmoid(Q K^T / sqrt(d) - C)        y = (P V) / (P 1)

Softmax does not change if all scores of a row are lowered by C. sigmoid(s) = e^s / (1 + e^s) is e^s
where s is well below 0: the relative error is e^s, which is 1e-4 from s = -9 on, below bfloat16's
rounding. oneDNN can fuse sigmoid, not exp, into a product. It is computed in float32 on the sums,
so scores are never rounded or written, and no maximum is needed. C is an upper bound of all scores
of a head, max|q| max|k| / sqrt(d) + 9 (Cauchy-Schwarz). bfloat16 reaches down to e^-87, so the
bound may lie far above the scores.

At 4.6 thousand tokens it takes 1/1.6 to 1/1.9 of the time of torch's kernel for heads of 128, and
1 to 1/1.3 for heads of 64: torch multiplies in smaller pieces and exponentiates in separate passes
(AMD EPYC with AVX-512, 2 threads). The result is rounded once more: 2 to 3e-3 from exact, 1.5 to
2e-3 with torch. `benchmarks/transformer_step.py` measures it in whole networks.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

_ROWS = 256  # queries per block: with 4.5 thousand keys their P is 2.3 MB, which stays in the cache
_KEYS = 64  # keys are padded to a multiple of it, so that rows of P begin on cache lines
_MARGIN = 9.0  # distance of the largest score below 0
# Lowest score that counts: e^-87 is the least bfloat16 number, and e^-17 of the largest is nothing.
_LOWEST = -70.0
_MANY = {64: 2048, 128: 1024}  # least head width -> queries and keys from which it is faster


def fits(q: Float[Tensor, "B N H d"], k: Float[Tensor, "B L H d"]) -> bool:
    """Return True where this kernel is faster than torch's.

    That is inference in bfloat16 on the CPU, with many tokens and wide heads.
    """
    if q.dtype != torch.bfloat16 or not q.is_cpu:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_exporting():
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
    """softmax(Q K^T / sqrt(d)) V in each head, heads side by side.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: (B, L), True for keys to attend to.
        onednn: torch's operations over oneDNN.

    Returns:
        (B, N, H d), or None where the bound of the scores is too high for bfloat16.
    """
    scale = q.shape[-1] ** -0.5
    bound = _longest(q) * _longest(k) * scale + _MARGIN  # (B, H)
    if not float(bound.max()) < -_LOWEST:  # a NaN too
        return None
    more = -k.shape[1] % _KEYS
    q, y = q * scale, torch.empty(*q.shape, dtype=q.dtype)
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
            y[image, :, head] = torch.cat(parts).float().div_(torch.cat(sums))
    return y.flatten(2)


def _longest(x: Float[Tensor, "B N H d"]) -> Float[Tensor, "B H"]:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax(1)
