"""Networks prepared for inference on the CPU: weights in the memory order that oneDNN's kernels
read, and elementwise ends fused into products.

oneDNN wants the weights of a convolution in blocks and reorders them at each call: at 16 x 16
pixels and below this takes as long as the convolution. `packed` reorders them once. Matrices in
float32 stay as they are: they would gain nothing and would be copied.

    3x3 convolution   of many channels: Winograd's (kernels/winograd.py), with 16/9 of the memory.
                      In bfloat16 it rounds three times as much as the direct sum, and is used for
                      the lowest levels only, where it saves the most time.
    1x1 convolution   in float32: a linear map of each pixel.
    doubling          four convolutions of the small map (kernels/upsample_conv.py).
    linear map        the sum with a residual, GELU, and the product of a GEGLU are computed on the
                      numbers that the product has just made.

Feature maps have their channels last in memory. In float32 the rows of a batch do not depend on the
batch (nn/batch_invariant.py). oneDNN's channels-last convolutions do not promise that: each shape
is verified at its first use, and computed image by image where it fails.

A prepared network has no gradients and takes no new weights; `state_dict` returns the plain
weights, bit for bit.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.kernels import batch_invariant, winograd
from sfumato.kernels.upsample_conv import phase_kernels, upsample_convolve
from sfumato.nn.attention import GEGLU, GELU
from sfumato.nn.blocks import Upsample

# channels from which on 3x3 convolutions are done as in kernels/winograd.py
_MANY = {torch.float32: 256, torch.bfloat16: 640}
_ROWS = 1024  # that matrices are packed for


def can_prepack(network: nn.Module) -> bool:
    """Whether torch and this processor have such kernels for the network: on the CPU, in float32,
    or in bfloat16 where it knows that.
    """
    ours = batch_invariant.onednn()
    if ours is None or not all(
        p.device.type == "cpu" and p.dtype == next(network.parameters()).dtype
        for p in network.parameters()
    ):
        return False
    dtype = next(network.parameters()).dtype
    return (dtype == torch.float32 and batch_invariant.FIXED_ORDER) or (
        dtype == torch.bfloat16 and ours._is_mkldnn_bf16_supported()
    )


def prepack(network: nn.Module) -> nn.Module:
    """The same network with packed convolutions; the one given is left as it is. `packable` says
    for which.

    Weights that are not packed, and those that `state_dict` gives again and that are not read
    otherwise, are copies, except where they want no gradient, such as those of a file: matrices and
    kernels are shared then, and may lie in the file. Whoever changes such weights in place prepares
    the network again.
    """
    assert can_prepack(network), "see packable"
    kept = {p.data_ptr() for p in network.parameters() if p.ndim > 1 and not p.requires_grad}
    found = _with_packed(clone_sharing_weights(network))
    for tensor in (*found.parameters(), *found.buffers()):
        if not tensor.is_mkldnn and tensor.data_ptr() not in kept:
            tensor.data = tensor.detach().clone()
    return found


def compile_network(network: nn.Module) -> nn.Module:
    """The same network by torch.compile, sharing its memory; on the CPU with weights as constants,
    which the compiler packs as above.

    Copies of it, such as those that guidance weakens, are not compiled: torch leaves a module's
    compiled call out of them.
    """
    found = clone_sharing_weights(network).requires_grad_(False)
    found.compile()
    quick, constant = found._compiled_call_impl, next(network.parameters()).device.type == "cpu"
    assert quick is not None

    def call(*given: Any) -> Tensor:
        # The setting is read while the network is traced, not among torch.compile's own options.
        with torch._inductor.config.patch(freezing=constant):  # pyright: ignore[reportAttributeAccessIssue]
            return quick(*given)

    found._compiled_call_impl = call
    return found


def clone_sharing_weights(network: nn.Module) -> nn.Module:
    """The same network for inference, another object that holds the same memory."""
    memory: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()
    }
    memory |= {id(buffer): buffer.detach() for buffer in network.buffers()}
    return copy.deepcopy(network, memory).eval()


def _with_packed(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        kind = next((kind for known, kind in _KINDS.items() if isinstance(child, known)), None)
        if kind is None:
            _with_packed(child)
        else:
            setattr(module, name, kind(child))
    return module


class _Packed(nn.Module):
    """A packed layer of a dtype. Its state is the plain layer's."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def plain(self) -> dict[str, Tensor]:
        """The plain layer's state."""
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
            "a network prepared for inference takes no weights: give them to the one that it was made from"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Packed":
        probe = fn(torch.empty(0, dtype=self.dtype))
        if probe.dtype != self.dtype or probe.device.type != "cpu":
            raise UserError(
                "a network prepared for inference stays on the CPU, in its dtype: move the one that it was made from"
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Packed":
        return self  # nothing in it changes


def _check(x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype or not x.is_cpu or (torch.is_grad_enabled() and x.requires_grad):
        wrong = "needs a gradient" if x.requires_grad else f"is {x.dtype} on {x.device}"
        raise UserError(
            f"a network prepared for inference in {dtype} on the CPU was given what {wrong}: use the one that it was made from"
        )


Convolve = Callable[[Tensor, Tensor | None], Tensor]
"""(x, plus) -> the convolution of x, and plus added; all with channels last."""


class _OneCall:
    """A convolution of a batch in one call of oneDNN, where that gives each image the bits that it
    has alone; else image by image.

    oneDNN cuts the sum of a channels-last convolution into parts by the size of the batch, the
    number of threads and the processor's caches. For each of these, random numbers are convolved
    once together and alone. float32 only: others promise nothing.
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
        generator = torch.Generator().manual_seed(0)
        x, plus = (
            torch.empty_like(x).normal_(generator=generator),
            None if plus is None else torch.ones_like(plus),
        )
        return torch.equal(convolve(x, plus), _each(convolve, x, plus))


def _each(convolve: Convolve, x: Tensor, plus: Tensor | None) -> Tensor:
    """Image by image."""
    return torch.cat(
        [convolve(x[i : i + 1], None if plus is None else plus[i : i + 1]) for i in range(len(x))]
    )


class Convolution(_Packed):
    """`nn.Conv2d` padded with zeros."""

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
        _check(x, self.dtype)
        rows, plus = (
            _last(x).permute(0, 2, 3, 1),
            None if plus is None else _last(plus).permute(0, 2, 3, 1),
        )
        end = "none" if plus is None else "add"
        return batch_invariant.onednn_linear(
            rows, self.weight.flatten(1), self.bias, end, plus
        ).permute(0, 3, 1, 2)


class Winograd(_Packed):
    """A 3x3 convolution with as many pixels as its input, by fewer products."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.weight.dtype)
        self.in_channels, self.weight, self.bias = conv.in_channels, conv.weight, conv.bias
        self.products = [[_matrix(u) for u in row] for row in winograd.kernels(conv.weight)]

    def forward(
        self, x: Float[Tensor, "B C H W"], *, plus: Float[Tensor, "B D H W"] | None = None
    ) -> Float[Tensor, "B D H W"]:
        _check(x, self.dtype)
        plus = None if plus is None else plus.detach().permute(0, 2, 3, 1)
        return winograd.convolve(
            x.detach().permute(0, 2, 3, 1), len(self.weight), self._product, plus
        ).permute(0, 3, 1, 2)

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
    plain = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) == (
        (3, 3),
        (1, 1),
        (1, 1),
        (1, 1),
        1,
    )
    many = min(conv.in_channels, conv.out_channels) >= _MANY[conv.weight.dtype]
    return Winograd(conv) if plain and many else Convolution(conv)


class _Linear(_Packed):
    """`nn.Linear`."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.weight.dtype)
        self.weight = (
            _frozen(_matrix(linear.weight)) if self.dtype == torch.bfloat16 else linear.weight
        )
        self.bias = linear.bias

    def forward(
        self, x: Float[Tensor, "*B D"], *, plus: Float[Tensor, "*B E"] | None = None
    ) -> Float[Tensor, "*B E"]:
        _check(x, self.dtype)
        end = "none" if plus is None else "add"
        return batch_invariant.onednn_linear(
            x.contiguous(), self.weight, self.bias, end, plus if plus is None else plus.contiguous()
        )


class _Gated(_Packed):
    """`GEGLU`: the gate's product ends in GELU, the value's in the product with it."""

    def __init__(self, gated: GEGLU):
        super().__init__(gated.proj.weight.dtype)
        weight, self.bias = gated.proj.weight, gated.proj.bias
        if self.dtype == torch.bfloat16:
            self.value, self.gate = (_frozen(_matrix(half)) for half in weight.chunk(2))
        else:
            self.weight = weight

    def plain(self) -> dict[str, Tensor]:
        state = super().plain()
        weight = (
            state["weight"] if "weight" in state else torch.cat([state["value"], state["gate"]])
        )
        return {"proj.weight": weight, "proj.bias": state["bias"]}

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
        _check(x, self.dtype)
        value, gate = (
            (self.value, self.gate) if self.dtype == torch.bfloat16 else self.weight.chunk(2)
        )
        x, (first, second) = x.contiguous(), self.bias.chunk(2)
        return batch_invariant.onednn_linear(
            x, value, first, "mul", batch_invariant.onednn_linear(x, gate, second, "gelu")
        )


class _Curved(_Packed):
    """`GELU`: the product ends in the function."""

    def __init__(self, layer: GELU):
        super().__init__(layer.proj.weight.dtype)
        weight, self.bias = layer.proj.weight, layer.proj.bias
        self.weight = _frozen(_matrix(weight)) if self.dtype == torch.bfloat16 else weight

    def plain(self) -> dict[str, Tensor]:
        return {f"proj.{name}": value for name, value in super().plain().items()}

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
        _check(x, self.dtype)
        return batch_invariant.onednn_linear(x.contiguous(), self.weight, self.bias, "gelu tanh")


class _Doubling(_Packed):
    """`Upsample`: four convolutions of the map itself, where it is doubled exactly."""

    def __init__(self, up: Upsample):
        super().__init__(up.conv.weight.dtype)
        conv = up.conv
        self.conv = Convolution(conv)  # for maps with an odd side; and the state's weights
        self.width = conv.out_channels
        self.one_calls = [[_OneCall() for _ in range(2)] for _ in range(2)]
        size = [1, conv.in_channels, 64, 64]
        self.four = [
            [
                batch_invariant.onednn()._reorder_convolution_weight(
                    w.contiguous(), [0, 0], [1, 1], [1, 1], 1, size
                )
                for w in row
            ]
            for row in phase_kernels(conv.weight)
        ]

    def forward(
        self, x: Float[Tensor, "B C h w"], size: torch.Size | None = None
    ) -> Float[Tensor, "B C H W"]:
        if size is not None and tuple(size) != (2 * x.shape[-2], 2 * x.shape[-1]):
            return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))
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
    """Channels last in memory."""
    return x.detach().contiguous(memory_format=torch.channels_last)


_KINDS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    Upsample: _Doubling,
    GEGLU: _Gated,
    GELU: _Curved,
    nn.Conv2d: _convolution,
    nn.Linear: _Linear,
}
