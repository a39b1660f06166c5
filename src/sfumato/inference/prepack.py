"""Weight prepacking for inference on the CPU, with fused elementwise operations.

oneDNN needs the weights of a convolution in blocks and reorders them at each call. At 16 x 16
pixels and below this takes as long as the convolution. `prepack` reorders them once. Matrices in
float32 stay as they are: they would gain nothing and would be copied.

    3x3 convolution   of many channels: Winograd's (kernels/winograd.py), with 16/9 of the memory,
                      or oneDNN's. In bfloat16 Winograd's rounds three times as much as the direct
                      sum, and is considered for the lowest levels only, where it saves the most.
    1x1 convolution   in float32: a linear map of each pixel.
    upsampling        four convolutions of the small map (kernels/upsample_conv.py), or one of the
                      large map.
    linear map        the sum with a residual, GELU, and the product of a GEGLU are fused into the
                      matrix product.

Where there are two kernels, the faster one is measured on this machine at the first layer of its
kind (kernels/measured.py).

Feature maps have their channels last in memory. In float32 the rows of a batch do not depend on the
batch (kernels/batch_invariant.py). oneDNN's channels-last convolutions do not guarantee that: each
shape is verified at its first use, and computed image by image where it fails.

A prepacked network has no gradients, and its weights are fixed; `state_dict` returns the plain
weights, bit for bit.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.kernels import batch_invariant, winograd
from sfumato.kernels.measured import fastest
from sfumato.kernels.upsample_conv import phase_kernels, upsample_convolve
from sfumato.nn.attention import GEGLU, GELU
from sfumato.nn.blocks import Upsample

# Channels from which kernels/winograd.py is considered for 3x3 convolutions.
_MANY = {torch.float32: 256, torch.bfloat16: 640}
# Kinds of layers that are measured: least channels -> side of the feature map. Smaller layers take
# the preferred kernel.
_KINDS = {1280: 16, 640: 32, 320: 64, 256: 64, 128: 64}
_ROWS = 1024  # number of rows that matrices are packed for


def can_prepack(network: nn.Module) -> bool:
    """Return True where torch and this processor can prepack a network.

    It must be on the CPU, in float32, or in bfloat16 where the processor supports that.
    """
    onednn = batch_invariant.onednn()
    dtype = next(network.parameters()).dtype
    if onednn is None or any(not p.is_cpu or p.dtype != dtype for p in network.parameters()):
        return False
    if dtype == torch.float32:
        return batch_invariant.FIXED_ORDER
    return dtype == torch.bfloat16 and onednn._is_mkldnn_bf16_supported()


def prepack(network: nn.Module) -> nn.Module:
    """Return a prepacked clone of a network that `can_prepack` accepts.

    Matrices and kernels without gradient, such as those mapped from a file, are shared with the
    network. Change them in place, and the clone must be made again. Other weights are copies.
    """
    assert can_prepack(network), "see can_prepack"
    kept = {p.data_ptr() for p in network.parameters() if p.ndim > 1 and not p.requires_grad}
    clone = _with_packed(clone_sharing_weights(network))
    for tensor in (*clone.parameters(), *clone.buffers()):
        if not tensor.is_mkldnn and tensor.data_ptr() not in kept:
            tensor.data = tensor.detach().clone()
    return clone


def compile_network(network: nn.Module) -> nn.Module:
    """Return a clone of a network for torch.compile that shares its weights.

    On the CPU the weights are constants, which the compiler packs. Copies of the clone, such as
    those of guidance models, are not compiled: torch omits a module's compiled call in copies.
    """
    clone = clone_sharing_weights(network).requires_grad_(False)
    clone.compile()
    compiled_call, constant = clone._compiled_call_impl, next(network.parameters()).is_cpu
    assert compiled_call is not None

    def call(*inputs: Any) -> Tensor:
        # torch reads the setting while it traces; it is not an option of torch.compile.
        config = torch._inductor.config  # pyright: ignore[reportAttributeAccessIssue]
        with config.patch(freezing=constant):
            return compiled_call(*inputs)

    clone._compiled_call_impl = call
    return clone


def clone_sharing_weights(network: nn.Module) -> nn.Module:
    """Return a clone of a network for inference that shares its weights."""
    memory: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()
    }
    memory |= {id(buffer): buffer.detach() for buffer in network.buffers()}
    return copy.deepcopy(network, memory).eval()


def _with_packed(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        make = next((make for kind, make in _LAYERS.items() if isinstance(child, kind)), None)
        if make is None:
            _with_packed(child)
        else:
            setattr(module, name, make(child))
    return module


class _Packed(nn.Module):
    """A packed layer of a dtype, with the plain layer's state dict."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def plain(self) -> dict[str, Tensor]:
        """Return the plain layer's state dict."""
        return {
            name: p.to_dense(self.dtype) if p.is_mkldnn else p.detach()
            for name, p in self.named_parameters(recurse=False)
        }

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        del keep_vars
        for name, tensor in self.plain().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, *_: Any) -> None:
        raise UserError(
            "a prepacked network cannot load weights: load them into the network it was made from"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Packed":
        probe = fn(torch.empty(0, dtype=self.dtype))
        if probe.dtype != self.dtype or probe.device.type != "cpu":
            raise UserError(
                "a prepacked network stays on the CPU in its dtype: "
                "move the network it was made from"
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Packed":
        return self  # immutable


def _check(x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype or not x.is_cpu or (torch.is_grad_enabled() and x.requires_grad):
        wrong = "an input with gradient" if x.requires_grad else f"{x.dtype} on {x.device}"
        raise UserError(
            f"a network prepacked in {dtype} on the CPU was called with {wrong}: "
            "use the network it was made from"
        )


Convolve = Callable[[Tensor, Tensor | None], Tensor]
"""(x, plus) -> the convolution of x, plus `plus`; all with channels last."""


class _OneCall:
    """Convolution of a batch in one call where that is batch-invariant, else image by image.

    oneDNN splits the sum of a channels-last convolution by the size of the batch, the number of
    threads and the processor's caches. For each shape and number of threads, random numbers are
    convolved once as a batch and image by image, and compared. Only float32 is batch-invariant.
    """

    def __init__(self) -> None:
        self.verified: dict[tuple[int, ...], bool] = {}

    def __call__(self, convolve: Convolve, x: Tensor, plus: Tensor | None) -> Tensor:
        if len(x) < 2 or x.dtype != torch.float32:
            return convolve(x, plus)
        key = (*x.shape, plus is None, torch.get_num_threads())
        if key not in self.verified:
            self.verified[key] = self._verify(convolve, x, plus)
        return convolve(x, plus) if self.verified[key] else _last(_each(convolve, x, plus))

    def _verify(self, convolve: Convolve, x: Tensor, plus: Tensor | None) -> bool:
        x = torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(0))
        plus = None if plus is None else torch.ones_like(plus)
        return torch.equal(convolve(x, plus), _each(convolve, x, plus))


def _each(convolve: Convolve, x: Tensor, plus: Tensor | None) -> Tensor:
    """Convolve image by image."""
    added = [None] * len(x) if plus is None else plus.split(1)
    return torch.cat([convolve(image, p) for image, p in zip(x.split(1), added, strict=True)])


class Convolution(_Packed):
    """`nn.Conv2d` with zero padding."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.weight.dtype)
        assert not isinstance(conv.padding, str) and conv.padding_mode == "zeros"
        self.settings = [*conv.padding], [*conv.stride], [*conv.dilation], conv.groups
        size = [1, conv.in_channels, 64, 64]
        self.weight = _frozen(
            batch_invariant.onednn()._reorder_convolution_weight(
                conv.weight.detach().contiguous(), *self.settings, size
            )
        )
        self.bias = conv.bias
        self.one_call = _OneCall()

    def forward(
        self, x: Float[Tensor, "B C H W"], *, plus: Float[Tensor, "B D h w"] | None = None
    ) -> Float[Tensor, "B D h w"]:
        """Convolve in one call or image by image, and add `plus`."""
        _check(x, self.dtype)
        return self.one_call(self._convolve, _last(x), None if plus is None else _last(plus))

    def _convolve(self, x: Tensor, plus: Tensor | None) -> Tensor:
        if plus is None:
            return batch_invariant.onednn()._convolution_pointwise(
                x, self.weight, self.bias, *self.settings, "none", [], ""
            )
        added = batch_invariant.onednn()._convolution_pointwise.binary
        return added(x, plus, self.weight, self.bias, *self.settings, "add", 1, None, [], None)


class Pointwise(_Packed):
    """A 1x1 convolution in float32: a linear map of each pixel."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.weight.dtype)
        self.weight, self.bias = conv.weight, conv.bias

    def forward(
        self, x: Float[Tensor, "B C H W"], *, plus: Float[Tensor, "B D H W"] | None = None
    ) -> Float[Tensor, "B D H W"]:
        """Multiply the pixels, and add `plus`."""
        _check(x, self.dtype)
        rows = _last(x).permute(0, 2, 3, 1)
        plus = None if plus is None else _last(plus).permute(0, 2, 3, 1)
        end, weight = "none" if plus is None else "add", self.weight.flatten(1)
        y = batch_invariant.onednn_linear(rows, weight, self.bias, end, plus)
        return y.permute(0, 3, 1, 2)


class Winograd(_Packed):
    """A 3x3 convolution of stride 1 with padding 1 (kernels/winograd.py)."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.weight.dtype)
        self.in_channels, self.weight, self.bias = conv.in_channels, conv.weight, conv.bias
        self.products = [[_matrix(u) for u in row] for row in winograd.kernels(conv.weight)]

    def forward(
        self, x: Float[Tensor, "B C H W"], *, plus: Float[Tensor, "B D H W"] | None = None
    ) -> Float[Tensor, "B D H W"]:
        """Convolve by `winograd.convolve`, and add `plus`."""
        _check(x, self.dtype)
        x = x.detach().permute(0, 2, 3, 1)
        plus = None if plus is None else plus.detach().permute(0, 2, 3, 1)
        return winograd.convolve(x, len(self.weight), self._product, plus).permute(0, 3, 1, 2)

    def _product(self, i: int, j: int, rows: Tensor, added: Tensor | None) -> Tensor:
        bias = self.bias if (i, j) in ((0, 1), (3, 1)) else None
        return batch_invariant.onednn_linear(
            rows, self.products[i][j], bias, "none" if added is None else "add", added
        )


def _convolution(conv: nn.Conv2d) -> _Packed:
    if conv.weight.dtype == torch.float32 and batch_invariant.is_pointwise(
        conv.weight, conv.stride, cast("tuple[int, int]", conv.padding), conv.groups
    ):
        return Pointwise(conv)
    settings = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    plain = settings == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    channels = min(conv.in_channels, conv.out_channels)
    if not plain or channels < _MANY[conv.weight.dtype]:
        return Convolution(conv)
    return _fastest("3x3 convolution", conv, channels, (Winograd, Convolution))


def _upsample(up: Upsample) -> _Packed:
    return _fastest("upsampling", up, up.conv.out_channels, (UpsamplePhases, UpsampleWhole))


def _fastest(
    name: str, layer: nn.Module, channels: int, kernels: Sequence[Callable[[Any], _Packed]]
) -> _Packed:
    """Pack a layer by the faster kernel, measured once for each kind of layer.

    A kind is measured with random numbers and as many channels in as out. The choice does not
    depend on the sizes of feature maps, or bits would depend on the sizes of earlier calls.

    Args:
        name: Name of the layer's kind.
        layer: The plain layer.
        channels: The lesser of its numbers of channels.
        kernels: Packed layers; the first is the preferred one.
    """
    dtype = next(layer.parameters()).dtype
    least = next((least for least in _KINDS if channels >= least), None)
    if least is None:
        return kernels[0](layer)
    side = _KINDS[least]

    def prepare(kernel: Callable[[Any], _Packed]) -> Callable[[], object]:
        with torch.device("meta"):  # initial weights would be drawn from torch's random state
            plain = (
                Upsample(least) if isinstance(layer, Upsample) else nn.Conv2d(least, least, 3, 1, 1)
            )
        plain = plain.to_empty(device="cpu")
        numbers = torch.Generator().manual_seed(0)
        for weight in plain.parameters():
            weight.data.normal_(generator=numbers)
        smaller = side // 2 if isinstance(layer, Upsample) else side
        x = _last(torch.empty(1, least, smaller, smaller).normal_(generator=numbers).to(dtype))
        packed = kernel(plain.to(dtype).requires_grad_(False))
        return lambda: packed(x)

    kind = f"{name} of {least} channels, {side} x {side}, {str(dtype).removeprefix('torch.')}"
    by_name = {kernel.__name__: kernel for kernel in kernels}
    return by_name[fastest(kind, {n: partial(prepare, k) for n, k in by_name.items()})](layer)


class _Linear(_Packed):
    """`nn.Linear`, or `GELU`, whose activation is fused into the product."""

    def __init__(self, layer: nn.Linear | GELU):
        linear, self.prefix = (layer.proj, "proj.") if isinstance(layer, GELU) else (layer, "")
        super().__init__(linear.weight.dtype)
        packed = self.dtype == torch.bfloat16
        self.weight = _frozen(_matrix(linear.weight)) if packed else linear.weight
        self.bias, self.end = linear.bias, "gelu tanh" if self.prefix else "none"

    def plain(self) -> dict[str, Tensor]:
        return {self.prefix + name: value for name, value in super().plain().items()}

    def forward(
        self, x: Float[Tensor, "*B D"], *, plus: Float[Tensor, "*B E"] | None = None
    ) -> Float[Tensor, "*B E"]:
        _check(x, self.dtype)
        end, plus = (self.end, None) if plus is None else ("add", plus.contiguous())
        return batch_invariant.onednn_linear(x.contiguous(), self.weight, self.bias, end, plus)


class _Gated(_Packed):
    """`GEGLU`: GELU is fused into the gate's product, and the gate into the value's."""

    def __init__(self, gated: GEGLU):
        super().__init__(gated.proj.weight.dtype)
        weight, self.bias = gated.proj.weight, gated.proj.bias
        if self.dtype == torch.bfloat16:
            self.value, self.gate = (_frozen(_matrix(half)) for half in weight.chunk(2))
        else:
            self.weight = weight

    def plain(self) -> dict[str, Tensor]:
        state = super().plain()
        packed = "weight" not in state
        weight = torch.cat([state["value"], state["gate"]]) if packed else state["weight"]
        return {"proj.weight": weight, "proj.bias": state["bias"]}

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
        _check(x, self.dtype)
        packed = self.dtype == torch.bfloat16
        value, gate = (self.value, self.gate) if packed else self.weight.chunk(2)
        x, (value_bias, gate_bias) = x.contiguous(), self.bias.chunk(2)
        gated = batch_invariant.onednn_linear(x, gate, gate_bias, "gelu")
        return batch_invariant.onednn_linear(x, value, value_bias, "mul", gated)


class UpsampleWhole(_Packed):
    """`Upsample`: a convolution of the upsampled map."""

    def __init__(self, up: Upsample):
        super().__init__(up.conv.weight.dtype)
        self.conv = Convolution(up.conv)

    def forward(
        self, x: Float[Tensor, "B C h w"], size: torch.Size | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Upsample to `size`, or by 2, and convolve."""
        side = (2 * x.shape[-2], 2 * x.shape[-1]) if size is None else tuple(size)
        return self.conv(F.interpolate(x, size=side, mode="nearest"))


class UpsamplePhases(UpsampleWhole):
    """`Upsample`: four convolutions of the map itself, for output of exactly twice the size."""

    def __init__(self, up: Upsample):
        super().__init__(up)
        conv = up.conv
        self.width = conv.out_channels
        self.one_calls = [[_OneCall() for _ in range(2)] for _ in range(2)]
        size = [1, conv.in_channels, 64, 64]
        settings = [0, 0], [1, 1], [1, 1], 1, size
        reorder = batch_invariant.onednn()._reorder_convolution_weight
        kernels = phase_kernels(conv.weight)
        self.four = [[reorder(w.contiguous(), *settings) for w in row] for row in kernels]

    def forward(
        self, x: Float[Tensor, "B C h w"], size: torch.Size | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Convolve the map itself where the output has twice its size."""
        if size is not None and tuple(size) != (2 * x.shape[-2], 2 * x.shape[-1]):
            return super().forward(x, size)
        _check(x, self.dtype)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).permute(0, 3, 1, 2)
        return upsample_convolve(padded, self.width, self._convolve)

    def _convolve(self, part: Tensor, a: int, b: int) -> Tensor:
        weight, bias = self.four[a][b], self.conv.bias

        def convolve(x: Tensor, _: Tensor | None) -> Tensor:
            return batch_invariant.onednn()._convolution_pointwise(
                x, weight, bias, [0, 0], [1, 1], [1, 1], 1, "none", [], ""
            )

        return self.one_calls[a][b](convolve, _last(part), None)


def _matrix(weight: Tensor) -> Tensor:
    return batch_invariant.onednn()._reorder_linear_weight(weight.detach().contiguous(), _ROWS)


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _last(x: Tensor) -> Tensor:
    """Return x with channels last in memory."""
    return x.detach().contiguous(memory_format=torch.channels_last)


_LAYERS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    Upsample: _upsample,
    GEGLU: _Gated,
    GELU: _Linear,
    nn.Conv2d: _convolution,
    nn.Linear: _Linear,
}
