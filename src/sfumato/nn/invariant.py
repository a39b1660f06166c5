"""Layers that give a row of a batch the same bits whatever the batch: image k of n can then be made again alone.

On the CPU torch's libraries choose their kernels by the shape of the whole batch, and kernels sum in different orders; rows then differ
by some 1e-6 between a batch of 1, of 2 and of 16. What each op needs, so that every row takes the same way, was found by measurement
(PyTorch 2.13 with oneDNN 3.12 and MKL 2024.2, on an AMD EPYC with AVX-512, with 1 and 2 threads; no library promises it):

    convolution   torch calls oneDNN, or MKL image by image, by the size of the batch and the number of threads: oneDNN is called always.
    linear        MKL's kernels take rows in fours, and a few rows, or the rest of a few, otherwise: few rows are filled up.
    attention     as linear in each head's product of queries and keys; and it depends on how images, and the scratch memory of threads,
                  lie in the cache lines: queries are filled up, and the keys and values of each image begin on a cache line.
    SiLU, GELU    vector instructions do 32 numbers at a time, and the C library, which rounds otherwise, what remains at the end of a
                  thread's part: SiLU's numbers are filled up until nothing remains; GELU needs contiguous ones, which oneDNN does.

Group norms of contiguous maps, layer norms, interpolation and arithmetic need nothing. This is for inference in float32 on the CPU; with
gradients, in other dtypes, on other devices and under compilers the calls are torch's own.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

_LINE = 16  # float32 numbers in a cache line of 64 bytes
_ROWS = 4  # the rows that MKL's kernels take together; of 16 rows and more the rest gets the same bits as well
_VECTOR = 32  # numbers that torch's loops give to vector instructions at a time with AVX-512; a multiple of what other processors need
_GRAIN = 32768  # numbers (at::internal::GRAIN_SIZE) for each thread that torch gives elementwise work to


def applies(x: Tensor, weight: Tensor | None = None) -> bool:
    """Whether rows must not depend on the batch here: no gradient, float32 on the CPU, not under a compiler or autocast."""
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
    return (
        not wants_gradient
        and x.is_cpu
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Float[Tensor, "*B D"], weight: Float[Tensor, "E D"], bias: Float[Tensor, " E"] | None = None) -> Float[Tensor, "*B E"]:
    """`F.linear` whose rows do not depend on their number."""
    if not applies(x, weight):
        return F.linear(x, weight, bias)
    # One contiguous matrix: torch would multiply image by image, or a transposed matrix, by the strides, and those of one image differ.
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    count = len(rows)
    missing = -count % _ROWS if count < 4 * _ROWS else 0
    # Products with few columns depend on how a row lies to 16 bytes.
    short = -rows.shape[1] % 4 if len(weight) < 16 else 0
    if short:
        weight = F.pad(weight, (0, short))
    if short or missing:
        rows = F.pad(rows, (0, short, 0, missing))
    return F.linear(rows, weight, bias)[:count].view(*x.shape[:-1], len(weight))


def attention(
    q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], v: Float[Tensor, "B L D"], heads: int, mask: Bool[Tensor, "B L"] | None = None
) -> Float[Tensor, "B N D"]:
    """softmax(Q K^T / sqrt(D / heads)) V in each head, side by side in D; mask True where a key counts."""
    count = q.shape[1]
    if applies(q):
        missing = -count % _LINE
        q, k, v = F.pad(q, (0, 0, 0, missing)) if missing else q, _on_lines(k), _on_lines(v)
    q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in (q, k, v))  # (B, heads, N, d)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
    return y.transpose(1, 2).flatten(2)[:, :count]


def _on_lines(x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
    """The same numbers, with unused memory between the images so that each begins on a cache line."""
    numbers = x.shape[1] * x.shape[2]
    if numbers % _LINE == 0:
        return x
    return F.pad(x.flatten(1), (0, -numbers % _LINE))[:, :numbers].unflatten(1, x.shape[1:])


def silu(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """`F.silu` whose numbers do not depend on where they lie in the tensor."""
    if not applies(x):
        return F.silu(x)
    numbers = x.numel()
    threads = max(1, min(torch.get_num_threads(), -(-numbers // _GRAIN)))
    missing = -numbers % (_VECTOR * threads)
    if not missing:
        return F.silu(x.contiguous())
    return F.silu(F.pad(x.flatten(), (0, missing)), inplace=True)[:numbers].view(x.shape)


def gelu(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """`F.gelu` whose numbers do not depend on where they lie in the tensor."""
    return F.gelu(x.contiguous() if applies(x) else x)


class Linear(nn.Linear):
    """`nn.Linear` whose rows do not depend on their number: see `linear`."""

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, padded with zeros, whose images do not depend on their number."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not applies(x, self.weight) or isinstance(self.padding, str) or not torch.backends.mkldnn.is_available():
            return super().forward(x)
        # contiguous: the layout of the input becomes the output's, and group norms of large maps with channels last sum by threads
        return torch.mkldnn_convolution(x.contiguous(), self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
