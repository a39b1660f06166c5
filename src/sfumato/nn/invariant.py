"""Layers that give a row of a batch the same bits whatever the batch: image k of n can then be made again alone.

On the CPU torch's libraries choose their kernels by the shape of the whole batch, and kernels sum in different orders; rows then differ
by some 1e-6 between a batch of 1, of 2 and of 16. What each op needs, so that every row takes the same way, was found by measurement
(PyTorch 2.13 with oneDNN 3.12 and MKL 2024.2, on an AMD EPYC with AVX-512, with 1 and 2 threads; no library promises it):

    convolution   torch calls oneDNN, or MKL image by image, by the size of the batch and the number of threads: oneDNN is called always.
    linear        MKL's kernels take rows in fours, and a few rows, or the rest of a few, otherwise: few rows are filled up. For large
                  weights oneDNN is called, which is quicker there, and takes one row otherwise than two and more: one becomes two.
    attention     as linear in each head's product of queries and keys; and it depends on how images, and the scratch memory of threads,
                  lie in the cache lines: queries are filled up, and the keys and values of each image begin on a cache line.
    SiLU, GELU    vector instructions do 32 numbers at a time, and the C library, which rounds otherwise, what remains at the end of a
                  thread's part: SiLU's numbers (GELU's by tanh, too) are filled up until nothing remains; GELU needs contiguous ones, which oneDNN does.

    group norm    of large maps with channels last in memory threads share the images out: such images go one by one.

Group norms of contiguous maps, layer norms, interpolation and arithmetic need nothing. This is for inference in float32 on the CPU; with
gradients, in other dtypes, on other devices and under compilers the calls are torch's own, but for two that a program compiled for inference on
the CPU makes as they are made here, for they are quicker: large products in float32, and attention in bfloat16 as in nn/blockwise.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.nn import blockwise, kernels

_LINE = 16  # float32 numbers in a cache line of 64 bytes
_ROWS = 4  # the rows that MKL's kernels take together; of 16 rows and more the rest gets the same bits as well
_LARGE = 2**16  # weights of more numbers are oneDNN's: below, what a call costs counts for more
_VECTOR = 32  # numbers that torch's loops give to vector instructions at a time with AVX-512; a multiple of what other processors need
_SHORT = 512  # tokens
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
        return _product(x, weight, bias) if _for_compiler(x, weight) else F.linear(x, weight, bias)
    # One contiguous matrix: torch would multiply image by image, or a transposed matrix, by the strides, and those of one image differ.
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    count = len(rows)
    if weight.numel() > _LARGE and count and onednn() is not None:
        return onednn_linear(rows, weight.contiguous(), bias).view(*x.shape[:-1], len(weight))
    missing = -count % _ROWS if count < 4 * _ROWS else 0
    # Products with few columns depend on how a row lies to 16 bytes.
    short = -rows.shape[1] % 4 if len(weight) < 16 else 0
    if short:
        weight = F.pad(weight, (0, short))
    if short or missing:
        rows = F.pad(rows, (0, short, 0, missing))
    return F.linear(rows, weight, bias)[:count].view(*x.shape[:-1], len(weight))


def _for_compiler(x: Tensor, weight: Tensor) -> bool:
    """Whether a program compiled for inference should call oneDNN: torch's compiler gives products in float32 to MKL, which takes a third longer."""
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() > _LARGE
        and _KNOWN
    )


_OURS = ("_linear_pointwise", "_convolution_pointwise", "_reorder_linear_weight", "_reorder_convolution_weight")
_KNOWN = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in _OURS)
_BFLOAT16 = _KNOWN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def onednn() -> Any:
    """torch's own operations over oneDNN, with weights that may be packed and products that end in a function; None where it has none."""
    return torch.ops.mkldnn if _KNOWN else None


def onednn_linear(
    x: Float[Tensor, "*B D"],
    weight: Tensor,
    bias: Float[Tensor, " E"] | None,
    end: str = "none",
    other: Float[Tensor, "*B E"] | None = None,
) -> Float[Tensor, "*B E"]:
    """x W^T + b, with its end in the same pass: "gelu" or "gelu tanh" of it, or "add" or "mul" with another (B, E). The weight may be packed."""
    alone = x.numel() == x.shape[-1]
    if alone:
        x, other = x.expand(2, *x.shape), None if other is None else other.expand(2, *other.shape)
    if other is None:
        name, _, way = end.partition(" ")
        y = onednn()._linear_pointwise(x, weight, bias, name, [], (way or "none") if name == "gelu" else "")
    else:
        y = onednn()._linear_pointwise.binary(x, other, weight, bias, end)
    return y[0] if alone else y


@torch.library.custom_op("sfumato::product", mutates_args=())
def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`onednn_linear` for a compiler, which does not look into it."""
    return onednn_linear(x, weight, bias)


@_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    del bias
    return x.new_empty(*x.shape[:-1], len(weight))


def attention(
    q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], v: Float[Tensor, "B L D"], heads: int, mask: Bool[Tensor, "B L"] | None = None
) -> Float[Tensor, "B N D"]:
    """softmax(Q K^T / sqrt(D / heads)) V in each head, side by side in D; mask True where a key counts."""
    q, k, v = (p.unflatten(-1, (heads, -1)) for p in (q, k, v))
    return attend(q, k, v, mask)


def attend(
    q: Float[Tensor, "B N H d"], k: Float[Tensor, "B L H d"], v: Float[Tensor, "B L H d"], mask: Bool[Tensor, "B L"] | None = None
) -> Float[Tensor, "B N D"]:
    """The same for heads that are cut already (D = H d), as where queries and keys are normed or turned before.

    In bfloat16 on the CPU many tokens go as in nn/blockwise.py, and else narrow heads are done in float32: torch's kernel takes a fifth longer to round on the way (64 x 64 cells, 8 heads of
    40; a tenth for heads of 64, and a tenth less for heads of 128).
    """
    if _BFLOAT16 and blockwise.fits(q, k):
        if torch.compiler.is_compiling():
            return _attend(q, k, v, mask)
        y = blockwise.attend(q, k, v, mask, onednn())
        if y is not None:
            kernels.report("blockwise", q, q.shape[1], k.shape[1], mask is not None)
            return y
    if q.dtype == torch.bfloat16 and q.is_cpu and q.shape[-1] < 128 and not torch.is_grad_enabled():
        return attend(q.float(), k.float(), v.float(), mask).bfloat16()
    count = q.shape[1]
    if _short(q, k):
        return _by_products(q, k, v, mask)
    if applies(q):
        missing = -count % _LINE
        q, k, v = F.pad(q, (0, 0, 0, 0, 0, missing)) if missing else q, _on_lines(k), _on_lines(v)
    q, k, v = (p.transpose(1, 2) for p in (q, k, v))  # (B, H, N, d)
    keep = None if mask is None else mask[:, None, None, :]
    if count * k.shape[2] >= kernels.MANY and not torch.compiler.is_compiling() and not torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        kernels.report(kernels.torchs_choice(q, k, v, keep), q, count, k.shape[2], mask is not None)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    return y.transpose(1, 2).flatten(2)[:, :count]


@torch.library.custom_op("sfumato::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` for a compiler, which does not look into it."""
    return attend(q, k, v, mask)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    del k, v, mask
    return q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])


def _short(q: Tensor, k: Tensor) -> bool:
    """Whether attention is being trained in bfloat16 on the CPU over few tokens, where the gradient of torch's kernel takes two to four
    times as long as that of plain products (51 to 256 tokens, heads of 64)."""
    lower = q.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return q.is_cpu and q.requires_grad and lower and max(q.shape[1], k.shape[1]) <= _SHORT


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` as the formula says it; the scores are rounded to the dtype of q."""
    q, k, v = (p.transpose(1, 2) for p in (q * q.shape[-1] ** -0.5, k, v))
    scores = q @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return (torch.softmax(scores, -1, dtype=scores.dtype) @ v).transpose(1, 2).flatten(2)


def _on_lines(x: Float[Tensor, "B L H d"]) -> Float[Tensor, "B L H d"]:
    """The same numbers, with unused memory between the images so that each begins on a cache line."""
    numbers = x.shape[1:].numel()
    if numbers % _LINE == 0:
        return x
    return F.pad(x.flatten(1), (0, -numbers % _LINE))[:, :numbers].unflatten(1, x.shape[1:])


def silu(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """`F.silu` whose numbers do not depend on where they lie in the tensor."""
    return _by_vectors(x, F.silu) if applies(x) else F.silu(x)


def gelu(x: Float[Tensor, "*S"], tanh: bool = False) -> Float[Tensor, "*S"]:
    """`F.gelu` whose numbers do not depend on where they lie in the tensor; `tanh`: its approximation by that function."""
    if tanh:
        return _by_vectors(x, _gelu_tanh) if applies(x) else _gelu_tanh(x)
    return F.gelu(x.contiguous() if applies(x) else x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _by_vectors(x: Float[Tensor, "*S"], function: Callable[[Tensor], Tensor]) -> Float[Tensor, "*S"]:
    """An elementwise function of numbers that are all taken by vector instructions."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return _by_vectors(x.permute(0, 2, 3, 1), function).permute(0, 3, 1, 2)
    numbers = x.numel()
    threads = max(1, min(torch.get_num_threads(), -(-numbers // _GRAIN)))
    missing = -numbers % (_VECTOR * threads)
    if not missing:
        return function(x.contiguous())
    return function(F.pad(x.flatten(), (0, missing)))[:numbers].view(x.shape)


class Linear(nn.Linear):
    """`nn.Linear` whose rows do not depend on their number: see `linear`. `plus` is added to what it gives."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "*B D"], *, plus: Float[Tensor, "*B E"] | None = None
    ) -> Float[Tensor, "*B E"]:
        y = linear(x, self.weight, self.bias)
        return y if plus is None else plus + y


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, padded with zeros, whose images do not depend on their number. `plus` is added to what it gives."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "B C H W"], *, plus: Float[Tensor, "B D h w"] | None = None
    ) -> Float[Tensor, "B D h w"]:
        y = self._convolve(x)
        return y if plus is None else plus + y

    def _convolve(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        if not applies(x, self.weight) or isinstance(self.padding, str) or not torch.backends.mkldnn.is_available():
            return super().forward(x)
        # contiguous: the layout of the input becomes the output's, and group norms of large maps with channels last sum by threads
        return torch.mkldnn_convolution(x.contiguous(), self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` whose images do not depend on their number, also with channels last in memory."""

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        if len(input) < 2 or input.is_contiguous() or not applies(input, self.weight):
            return super().forward(input)
        y = torch.empty_like(input)
        for image, place in zip(input.split(1), y.split(1), strict=True):
            place.copy_(super().forward(image))
        return y
