"""Operations whose result for an image does not depend on its batch, bit for bit.

Image k of a batch of n can be computed again alone. CPU libraries choose a kernel by the shape of
the whole batch, and kernels add up products in different orders. An image then differs by some 1e-6
between a batch of 1, of 2 and of 16, and each processor has its own table of kernels. So that the
result holds on every processor, each operation here is computed by a method that does not depend on
the batch:

    linear        oneDNN's matrix product, on x86 processors with AVX2 or later. Its brgemm kernels
                  add up a row in blocks whose length depends on the number of columns alone (512 or
                  1024), one block after the other. MKL's choice of kernel by the number of rows,
                  which differs between Intel and AMD, is not used. Two cases are avoided: one row
                  (a vector kernel: it is computed as two), and many columns with few outputs
                  (split among threads: image by image).
    convolution   oneDNN's direct kernels, which add up block of channels after block, and in each
                  block tap after tap. 1x1 convolutions are linear maps of pixels: oneDNN has
                  kernels of their own for them, which depend on the batch where threads are many.
    attention     torch's fused kernel, which calls MKL for each image and head with the same shape.
                  The order of an MKL sum may depend on the alignment of its operands: queries are
                  padded, and the keys and values of each image begin on a cache line. It may depend
                  on MKL's own threads, which work where torch's do not: one short head of one image
                  is computed twice. It may also depend on the number of threads that MKL counts on:
                  kernels/mkl_threads.py sets it to one.
    SiLU, GELU    torch computes most numbers by vector instructions and those that remain at the
                  end of a thread's part by the C library, which rounds differently. Numbers
                  beyond the last whole vector of a thread are computed apart, padded.
    group norm    with channels last in memory, threads share the images of a batch: such images are
                  computed one by one.

Elsewhere (AVX or older, other processors, torch without oneDNN), linear maps and convolutions are
computed image by image, from memory that begins on a cache line: the same call for every batch.
`method()` returns the one in use.

Group norms of contiguous maps, layer norms, interpolation and arithmetic need nothing. The
guarantee is for inference in float32 on the CPU. With gradients, in other dtypes, on other devices
and under compilers the calls are torch's own, except that programs compiled for inference on the
CPU call the faster kernels of this module: oneDNN for large float32 products,
kernels/cpu_attention.py for bfloat16 attention.

The orders of summation are those in the source of oneDNN 3.12, which torch 2.13 contains (cpu/x64:
matmul/brgemm_matmul_utils.cpp, jit_avx512_common_conv_kernel.cpp, jit_avx2_conv_kernel_f32.cpp,
jit_brgemm_conv_utils.cpp). No library promises them, so tests/contracts/test_arithmetic.py runs
every test of invariance with the kernels of other processors, and `sfumato info --machine` checks
the machine at hand.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.kernels import attention_backend, cpu_attention
from sfumato.kernels.measured import fastest
from sfumato.kernels.mkl_threads import one_thread

_LINE = 16  # float32 numbers in a cache line of 64 bytes
# Elements of a weight from which compiled programs call oneDNN: below, the call costs more than it
# gains.
_LARGE = 2**16
# oneDNN splits a row's sum among threads, by the number of rows, from this many columns and up to
# this many outputs.
_SPLIT = 20000
_FEW = 512
_PIXELS = 64  # pixels of a map from which 1x1 convolutions are computed image by image
# Elements that torch's loops process per vector step with AVX-512, a multiple of other processors'.
_VECTOR = 32
_SHORT = 512  # tokens
_MEASURED = 2**16  # scores of a head from which the kernel of bfloat16 attention is measured
_PIECE = 64  # more queries of a head than torch's fused attention takes as one piece of work
_GRAIN = 32768  # elements per thread in elementwise work (at::internal::GRAIN_SIZE)
_ALONE = 16384  # elements that one thread computes; above, torch divides GELU among all threads


def applies(x: Tensor, weight: Tensor | None = None) -> bool:
    """Return True where results must not depend on the batch.

    That is float32 on the CPU without gradient, compiler, tracing or autocast.
    """
    if not (x.is_cpu and x.dtype == torch.float32):
        return False
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad)
    ):
        return False
    return not (_is_traced() or torch.is_autocast_enabled("cpu"))


def _is_traced() -> bool:
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return torch.compiler.is_compiling() or tracing


def linear(
    x: Float[Tensor, "*B D"], weight: Float[Tensor, "E D"], bias: Float[Tensor, " E"] | None = None
) -> Float[Tensor, "*B E"]:
    """`F.linear` whose rows do not depend on their number.

    Without oneDNN each x[i] is a product of its own, so the first axis should be the batch.
    """
    if not applies(x, weight):
        return _product(x, weight, bias) if _for_compiler(x, weight) else F.linear(x, weight, bias)
    if not x.numel():
        return F.linear(x, weight, bias)
    # Contiguous: torch chooses by the strides to multiply image by image or a transposed matrix,
    # and the strides of one image differ.
    if FIXED_ORDER:
        return onednn_linear(x.contiguous(), weight.contiguous(), bias)
    images, weight = x if x.ndim > 2 else x.reshape(-1, 1, x.shape[-1]), weight.contiguous()
    return torch.stack([F.linear(aligned(image), weight, bias) for image in images]).view(
        *x.shape[:-1], len(weight)
    )


def aligned(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Return x contiguous, in memory that begins on a cache line."""
    x = x.contiguous()
    return x if x.data_ptr() % (4 * _LINE) == 0 else x.clone()


def _for_compiler(x: Tensor, weight: Tensor) -> bool:
    """Return True where a program compiled for inference should call oneDNN.

    torch's compiler calls MKL for float32 products, which takes a third longer.
    """
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() > _LARGE
        and _HAS_ONEDNN
    )


_ONEDNN_OPS = ("_linear_pointwise", "_convolution_pointwise")
_ONEDNN_OPS += ("_reorder_linear_weight", "_reorder_convolution_weight")
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in _ONEDNN_OPS
)
_BFLOAT16 = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _fixed_order() -> bool:
    """Return True where oneDNN computes float32 products by its brgemm kernels.

    Their order of summation does not depend on the number of rows.
    """
    # The variables and values that oneDNN itself reads.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    return _HAS_ONEDNN and torch.cpu._is_avx2_supported() and limit.upper() not in ("SSE41", "AVX")


FIXED_ORDER = _fixed_order()
"""True where oneDNN computes a batch in one call; elsewhere images run one by one."""


def method() -> str:
    """Name the method that computes float32 linear maps and convolutions on this processor."""
    return "oneDNN, all images in one call" if FIXED_ORDER else "image by image"


def onednn() -> Any:
    """Return torch's operations over oneDNN, None where torch has none.

    They take packed weights and fuse an activation or an addition into a product.
    """
    return torch.ops.mkldnn if _HAS_ONEDNN else None


def onednn_linear(
    x: Float[Tensor, "*B D"],
    weight: Tensor,
    bias: Float[Tensor, " E"] | None,
    end: str = "none",
    other: Float[Tensor, "*B E"] | None = None,
) -> Float[Tensor, "*B E"]:
    """Compute x W^T + b and a fused operation in one pass. The weight may be packed.

    Args:
        x: (*B, D).
        weight: (E, D), plain or packed.
        bias: (E), or None.
        end: "none", "gelu", "gelu tanh", or "add" or "mul" with `other`.
        other: (*B, E), the second operand of "add" and "mul".
    """
    # image by image: oneDNN would split the sums by the number of rows
    if x.shape[-1] >= _SPLIT and weight.shape[0] <= _FEW and x.ndim > 1 and len(x) > 1:
        others = [None] * len(x) if other is None else other.split(1)
        pairs = zip(x.split(1), others, strict=True)
        return torch.cat([onednn_linear(image, weight, bias, end, o) for image, o in pairs])
    alone = x.numel() == x.shape[-1]
    if alone:  # one row would be computed by a kernel of its own, which adds up in another order
        x, other = torch.stack([x, x]), None if other is None else torch.stack([other, other])
    if other is not None:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, end)
    else:
        name, _, way = ("none", "", "") if end == "none" else end.partition(" ")
        y = torch.ops.mkldnn._linear_pointwise.default(
            x, weight, bias, name, [], (way or "none") if name == "gelu" else ""
        )
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
    q: Float[Tensor, "B N D"],
    k: Float[Tensor, "B L D"],
    v: Float[Tensor, "B L D"],
    heads: int,
    mask: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B N D"]:
    """softmax(Q K^T / sqrt(D / heads)) V in each head, heads side by side in D.

    Args:
        q: queries (B, N, D).
        k: keys (B, L, D).
        v: values (B, L, D).
        heads: number of heads, a divisor of D.
        mask: (B, L), True for keys to attend to.
    """
    q, k, v = (p.unflatten(-1, (heads, -1)) for p in (q, k, v))
    return attend(q, k, v, mask)


def attend(
    q: Float[Tensor, "B N H d"],
    k: Float[Tensor, "B L H d"],
    v: Float[Tensor, "B L H d"],
    mask: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B N D"]:
    """`attention` for inputs that are split into heads, D = H d.

    For inference in bfloat16 on the CPU see `_attend_bfloat16`.
    """
    if q.dtype == torch.bfloat16 and q.is_cpu and not torch.is_grad_enabled():
        y = _attend_bfloat16(q, k, v, mask)
        if y is not None:
            return y
    count = q.shape[1]
    if _short(q, k):
        return _by_products(q, k, v, mask)
    lone = False
    if applies(q):
        missing = -count % _LINE
        q, k, v = F.pad(q, (0, 0, 0, 0, 0, missing)) if missing else q, _on_lines(k), _on_lines(v)
        # torch runs a single piece of work outside its threads, where MKL would divide a product
        # among threads of its own.
        lone = q.shape[0] * q.shape[2] == 1 and count <= _PIECE
        if lone:
            q, k, v = (torch.cat([p, p]) for p in (q, k, v))
    q, k, v = (p.transpose(1, 2) for p in (q, k, v))  # (B, H, N, d)
    keep = None if mask is None else mask[:, None, None, :]
    if count * k.shape[2] >= attention_backend.MANY and not _is_traced():
        backend = attention_backend.sdpa_backend(q, k, v, keep)
        attention_backend.report(backend, q, count, k.shape[2], mask is not None)
    with one_thread() if applies(q) else nullcontext():
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    return y.transpose(1, 2).flatten(2)[: 1 if lone else None, :count]


def _attend_bfloat16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
    """Attend in bfloat16 by the fastest kernel on this machine; None where that is torch's.

    kernels/cpu_attention.py is a choice for many tokens and wide heads, and float32 for all. The
    preferred kernel is the faster one on Zen 4, where torch's bfloat16 kernel takes a fifth longer
    than float32 for heads of 40 (64 x 64 cells), and a tenth less for heads of 128.
    """
    rule = "float32" if q.shape[-1] < 128 else "bfloat16"
    kernels: dict[str, Callable[..., Tensor | None]] = {
        "blockwise": lambda q, k, v: cpu_attention.attend(q, k, v, None, onednn()),
        "float32": lambda q, k, v: attend(q.float(), k.float(), v.float()).bfloat16(),
        "bfloat16": lambda q, k, v: F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        ),
    }
    if not (_BFLOAT16 and cpu_attention.fits(q, k)):
        del kernels["blockwise"]
    elif torch.compiler.is_compiling():
        return _attend(q, k, v, mask)
    preferred = [name for name in ("blockwise", rule) if name in kernels]
    ordered = {name: kernels[name] for name in dict.fromkeys((*preferred, *kernels))}
    kernel = preferred[0] if _is_traced() else _fastest_attention(q, k, ordered)
    if kernel == "blockwise":
        y = cpu_attention.attend(q, k, v, mask, onednn())
        if y is not None:
            attention_backend.report("blockwise", q, q.shape[1], k.shape[1], mask is not None)
            return y
        kernel = rule
    if kernel == "float32":
        return attend(q.float(), k.float(), v.float(), mask).bfloat16()
    return None


def _fastest_attention(
    q: Tensor, k: Tensor, kernels: Mapping[str, Callable[..., Tensor | None]]
) -> str:
    """Name the fastest kernel for about so many tokens, measured once for each kind of call."""
    count, keys = (2 ** min(12, int(math.log2(max(1, x.shape[1])))) for x in (q, k))
    if count * keys < _MEASURED:
        return next(iter(kernels))
    heads, width = min(q.shape[2], 4 * torch.get_num_threads()), q.shape[3]

    def prepare(kernel: Callable[..., Tensor | None]) -> Callable[[], object]:
        numbers = torch.Generator().manual_seed(0)
        parts = [
            torch.empty(1, n, heads, width).normal_(generator=numbers).to(q.dtype)
            for n in (count, keys, keys)
        ]
        return lambda: kernel(*parts)

    kind = f"attention in bfloat16, {heads} heads of {width}, {count} x {keys} tokens"
    return fastest(kind, {name: partial(prepare, kernel) for name, kernel in kernels.items()})


@torch.library.custom_op("sfumato::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` for a compiler, which does not look into it."""
    return attend(q, k, v, mask)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    del k, v, mask
    return q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])


def _short(q: Tensor, k: Tensor) -> bool:
    """Return True for training in bfloat16 on the CPU over few tokens.

    The gradient of torch's kernel takes two to four times as long there as that of plain products
    (51 to 256 tokens, heads of 64).
    """
    lower = q.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return q.is_cpu and q.requires_grad and lower and max(q.shape[1], k.shape[1]) <= _SHORT


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` by plain products. Scores are rounded to the dtype of q."""
    q, k, v = (p.transpose(1, 2) for p in (q * q.shape[-1] ** -0.5, k, v))
    scores = q @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return (torch.softmax(scores, -1, dtype=scores.dtype) @ v).transpose(1, 2).flatten(2)


def _on_lines(x: Float[Tensor, "B L H d"]) -> Float[Tensor, "B L H d"]:
    """Return x with unused memory between images, so that each begins on a cache line."""
    numbers = x.shape[1:].numel()
    if numbers % _LINE == 0:
        return x
    return F.pad(x.flatten(1), (0, -numbers % _LINE))[:, :numbers].unflatten(1, x.shape[1:])


def silu(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """`F.silu` whose results do not depend on the position in the tensor."""
    return _by_vectors(x, F.silu, _silu_threads) if applies(x) else F.silu(x)


def gelu(x: Float[Tensor, "*S"], tanh: bool = False) -> Float[Tensor, "*S"]:
    """`F.gelu` whose results do not depend on the position in the tensor.

    Args:
        x: any shape.
        tanh: use the tanh approximation.
    """
    if not applies(x):
        return F.gelu(x, approximate="tanh" if tanh else "none")
    # oneDNN masks its last vector, but a single element has a kernel of its own.
    if FIXED_ORDER and not tanh:
        return F.gelu(x.contiguous()) if x.numel() != 1 else F.gelu(torch.stack([x, x]))[0]
    return _by_vectors(x, _gelu_tanh if tanh else F.gelu, _gelu_threads)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _silu_threads(numbers: int) -> int:
    """Return the number of threads among which torch divides an elementwise function."""
    return max(1, min(torch.get_num_threads(), -(-numbers // _GRAIN)))


def _gelu_threads(numbers: int) -> int:
    """`_silu_threads` for GELU: torch divides all elements evenly among the threads."""
    return torch.get_num_threads() if numbers > _ALONE else 1


def _by_vectors(
    x: Float[Tensor, "*S"], function: Callable[[Tensor], Tensor], threads: Callable[[int], int]
) -> Float[Tensor, "*S"]:
    """Apply an elementwise function by vector instructions alone.

    Each thread's part must be whole vectors. Elements beyond them are padded to a vector and
    computed apart.
    """
    if not x.is_contiguous():
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return _by_vectors(x.permute(0, 2, 3, 1), function, threads).permute(0, 3, 1, 2)
        x = x.contiguous()
    numbers = whole = x.numel()
    while rest := whole % (_VECTOR * threads(whole)):
        whole -= rest
    if whole == numbers:
        return function(x)
    flat = x.flatten()
    if numbers <= _ALONE:
        return function(F.pad(flat, (0, -numbers % _VECTOR)))[:numbers].view(x.shape)
    y = torch.empty_like(flat)
    y[:whole] = function(flat[:whole])
    for part, out in zip(flat[whole:].split(_ALONE), y[whole:].split(_ALONE), strict=True):
        out.copy_(function(F.pad(part, (0, -len(part) % _VECTOR)))[: len(part)])
    return y.view(x.shape)


class Linear(nn.Linear):
    """`nn.Linear` whose rows do not depend on their number (`linear`).

    `plus` is added to the output.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "*B D"], *, plus: Float[Tensor, "*B E"] | None = None
    ) -> Float[Tensor, "*B E"]:
        """Compute `linear`, and add `plus`."""
        y = linear(x, self.weight, self.bias)
        return y if plus is None else plus + y


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with zero padding whose images do not depend on their number.

    `plus` is added to the output.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "B C H W"], *, plus: Float[Tensor, "B D h w"] | None = None
    ) -> Float[Tensor, "B D h w"]:
        """Convolve by `convolve` where it applies, and add `plus`."""
        y = self._convolve(x)
        return y if plus is None else plus + y

    def _convolve(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        if not applies(x, self.weight) or isinstance(self.padding, str):
            return super().forward(x)
        return convolve(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


def convolve(
    x: Float[Tensor, "B C H W"],
    weight: Float[Tensor, "D _ k l"],
    bias: Float[Tensor, " D"] | None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Float[Tensor, "B D h w"]:
    """`F.conv2d` whose images do not depend on their number, where `applies` is True."""
    if not FIXED_ORDER:
        weight = weight.contiguous()
        if not x.numel():
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        settings = weight, bias, stride, padding, dilation, groups
        return torch.cat([F.conv2d(aligned(image), *settings) for image in x.split(1)])
    if weight.shape[3] == 1 and x.numel() and is_pointwise(weight, stride, padding, groups):
        return _pointwise(x, weight.flatten(1), bias)
    # Contiguous maps make oneDNN use its direct kernels. Group norms of large maps with channels
    # last would sum by threads.
    return torch.mkldnn_convolution(x.contiguous(), weight, bias, padding, stride, dilation, groups)


def _pointwise(
    x: Float[Tensor, "B C H W"], weight: Float[Tensor, "D C"], bias: Float[Tensor, " D"] | None
) -> Float[Tensor, "B D H W"]:
    """Apply a linear map to each pixel."""
    if x.shape[2] * x.shape[3] < _PIXELS:  # rows are pixels
        y = linear(x.flatten(2).transpose(1, 2), weight, bias)  # (B, H W, D)
        return y.transpose(1, 2).contiguous().unflatten(2, x.shape[2:])
    # Rows are output channels, so that neither map is transposed: y = W x, image by image.
    y = x.new_empty(len(x), len(weight), *x.shape[2:])
    for image, out in zip(x.contiguous().flatten(2), y.flatten(2), strict=True):
        product = onednn_linear(weight, image.T, None)
        torch.add(product, 0.0 if bias is None else bias[:, None], out=out)
    return y


def is_pointwise(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """True for a 1x1 convolution that is a linear map of each pixel."""
    return (
        weight.shape[3] == weight.shape[2] == 1
        and groups == 1
        and max(stride) == 1
        and max(padding) == 0
    )


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` whose images do not depend on their number, also with channels last."""

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalise image by image where the batch would change the result."""
        if len(input) < 2 or input.is_contiguous() or not applies(input, self.weight):
            return super().forward(input)
        y = torch.empty_like(input)
        for image, place in zip(input.split(1), y.split(1), strict=True):
            place.copy_(super().forward(image))
        return y
