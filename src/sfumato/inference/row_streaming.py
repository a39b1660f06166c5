"""Row streaming: layers over feature maps in horizontal strips, with few rows in memory.

The result is that of the whole map. A map (B, C, H, W) is an iterator of strips (B, C, r, W), top
to bottom, of any heights r; a layer is a function from such an iterator to another. Evaluation is
lazy, and nothing is computed twice: a convolution keeps the last rows of its input, so there are no
halos to recompute and no seams.

A group norm (Wu & He 2018, arXiv:1803.08494, eq. 1-3) needs two passes. `Moments` accumulates the
mean and variance of the whole map, strip by strip, in float64 (the pairwise update of Chan, Golub &
LeVeque 1983, eq. 2.1). Then the norm is a scale and a shift per channel.

Iterators are chained with `map`, which releases a strip when it passes it on. A generator's
variables would keep it alive.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from itertools import chain

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import NumericalError
from sfumato.kernels import batch_invariant
from sfumato.kernels.upsample_conv import phase_kernels, upsample_convolve
from sfumato.nn.attention import SpatialAttention
from sfumato.nn.blocks import Downsample, Upsample

Strips = Iterator[Tensor]
Layer = Callable[[Strips], Strips]

_SLAB = 2**25
_SCORES = 2**26
"""Queries times keys in one call of attention: 256 MB where kernels keep the scores."""


# ---- strips --------------------------------------------------------------------------------------


def take(waiting: deque[Tensor], rows: int) -> Tensor:
    """Remove the first `rows` rows of the waiting strips and return them."""
    parts: list[Tensor] = []
    while rows:
        strip = waiting.popleft()
        if strip.shape[2] > rows:
            waiting.appendleft(strip[:, :, rows:])
            strip = strip[:, :, :rows]
        parts.append(strip)
        rows -= strip.shape[2]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class Store:
    """Storage of a map: strips are copied into slabs, which are released as they are read.

    The strips themselves are not kept: strips between temporary allocations would fragment the
    heap. The C library returns a slab of more than 32 MB to the system at once (M_MMAP_THRESHOLD
    is never larger).
    """

    def __init__(self, height: int):
        self.missing = height  # rows without a slab
        self.room = 0  # empty rows of the last slab
        self.slabs: deque[Tensor] = deque()

    def add(self, strip: Float[Tensor, "B C r W"]) -> None:
        """Append a copy of a strip."""
        while strip.shape[2]:
            if not self.room:
                row_bytes = strip[:, :, :1].numel() * strip.element_size()
                self.room = min(self.missing, _SLAB // row_bytes + 1)
                self.missing -= self.room
                self.slabs.append(strip.new_empty(*strip.shape[:2], self.room, strip.shape[3]))
            part, strip = strip[:, :, : self.room], strip[:, :, self.room :]
            begin = self.slabs[-1].shape[2] - self.room
            self.slabs[-1][:, :, begin : begin + part.shape[2]] = part
            self.room -= part.shape[2]

    def read(self, rows: int, release: bool) -> Strips:
        """Return the map in strips of at most `rows` rows."""
        slabs = drain(self.slabs) if release else iter(self.slabs)
        return chain.from_iterable(map(lambda slab: slab.split(rows, 2), slabs))


def drain(waiting: deque[Tensor]) -> Strips:
    """Yield strips and release them as they are read."""
    while waiting:
        yield waiting.popleft()


def split(strips: Strips, rows: int) -> Strips:
    """Split into strips of at most `rows` rows."""
    return chain.from_iterable(map(lambda strip: strip.split(rows, 2), strips))


def finish(strips: Iterable[object]) -> None:
    """Exhaust an iterator without keeping its items."""
    deque(strips, maxlen=0)


def windows(
    run: Callable[[Tensor], Tensor], strips: Strips, kernel: int, stride: int, top: int, bottom: int
) -> Strips:
    """Apply a layer with a window of `kernel` rows and a stride.

    Args:
        run: (n - 1) * stride + kernel input rows -> the output's rows at these n positions.
        strips: the map.
        kernel: rows of the window.
        stride: rows between windows.
        top: rows of zeros above the map.
        bottom: rows of zeros below it.
    """
    steps: Iterable[Tensor | None] = chain(strips, [None])
    return filter(_has_rows, map(_Window(run, kernel, stride, top, bottom).step, steps))


class _Window:
    """Buffer of the last rows of a map, which the next window needs."""

    def __init__(
        self, run: Callable[[Tensor], Tensor], kernel: int, stride: int, top: int, bottom: int
    ):
        self.run, self.kernel, self.stride, self.top, self.bottom = run, kernel, stride, top, bottom
        self.last_rows: Tensor | None = None

    def step(self, strip: Tensor | None) -> Tensor:
        """Return the output rows that the next strip completes; None ends the map."""
        last = self.last_rows
        if strip is None:
            assert last is not None, "a map has at least one strip"
            strip = last.new_zeros(*last.shape[:2], self.bottom, last.shape[3])
        if last is None:
            last = strip.new_zeros(*strip.shape[:2], self.top, strip.shape[3])
        rows = torch.cat([last, strip], 2) if last.shape[2] else strip
        n = max(0, (rows.shape[2] - self.kernel) // self.stride + 1)
        self.last_rows = rows[:, :, n * self.stride :].clone()  # a view would keep all rows
        return self.run(rows[:, :, : (n - 1) * self.stride + self.kernel]) if n else rows[:, :, :0]


def _has_rows(strip: Tensor) -> bool:
    return strip.shape[2] > 0


# ---- layers --------------------------------------------------------------------------------------


def pointwise(run: Callable[[Tensor], Tensor]) -> Layer:
    """Layer of a function that acts on each element or each row alone."""
    return lambda strips: map(run, strips)


def convolution(conv: nn.Conv2d) -> Layer:
    """Layer of a convolution with the same zero padding on all sides."""
    (kernel, _), (stride, _), (above, aside) = conv.kernel_size, conv.stride, _numbers(conv)
    return lambda strips: windows(
        lambda rows: _convolve(conv, rows, aside), strips, kernel, stride, above, above
    )


def halving(down: Downsample) -> Layer:
    """Layer of `Downsample`: padding 0 pads one row and column at the bottom and right only."""
    if not down.asymmetric:
        return convolution(down.conv)
    return lambda strips: windows(
        lambda rows: _convolve(down.conv, F.pad(rows, (0, 1)), 0), strips, 3, 2, 0, 1
    )


def doubling(up: Upsample) -> Layer:
    """Layer of `Upsample` to twice the size.

    It runs as four convolutions of the map (kernels/upsample_conv.py). In half precision their
    summed weights would be rounded coarsely, so the map is upsampled and convolved.
    """
    conv = up.conv
    if conv.weight.dtype not in (torch.float32, torch.float64):
        plain = convolution(conv)
        return lambda strips: plain(
            map(lambda s: F.interpolate(s, scale_factor=2.0, mode="nearest"), strips)
        )
    run = partial(_double, phase_kernels(conv.weight), conv.bias)
    return lambda strips: windows(run, strips, 3, 1, 1, 1)


def _double(four: list[list[Tensor]], bias: Tensor | None, rows: Tensor) -> Tensor:
    return upsample_convolve(
        F.pad(rows, (1, 1)),
        len(four[0][0]),
        lambda part, a, b: _plain_convolve(part, four[a][b], bias),
    )


def positions(conv: nn.Conv2d, axis: int, length: int) -> int:
    """Return the output size of a convolution along the height (axis 0) or the width (1)."""
    return (length + 2 * _numbers(conv)[axis] - conv.kernel_size[axis]) // conv.stride[axis] + 1


def _numbers(conv: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(conv.padding, str) and conv.dilation == (1, 1)
    return conv.padding[0], conv.padding[1]


def _convolve(conv: nn.Conv2d, rows: Tensor, aside: int) -> Tensor:
    """Convolve without vertical padding, with `aside` columns of zeros left and right."""
    return _plain_convolve(rows, conv.weight, conv.bias, conv.stride, (0, aside), conv.groups)


def _plain_convolve(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    groups: int = 1,
) -> Tensor:
    """Convolve as `batch_invariant.Conv2d`.

    torch's own call may unfold the input, which takes nine times the memory.
    """
    if batch_invariant.applies(rows, weight):
        return batch_invariant.convolve(rows, weight, bias, stride, padding, (1, 1), groups)
    return F.conv2d(rows, weight, bias, stride, padding, (1, 1), groups)


def residual(branch: Layer, join: Callable[[Tensor, Tensor], Tensor]) -> Layer:
    """Layer join(branch(x), x), row by row.

    Rows of x wait for the branch, whose windows need later rows.
    """

    def run(strips: Strips) -> Strips:
        waiting = deque[Tensor]()

        def watch(strip: Tensor) -> Tensor:
            waiting.append(strip)
            return strip

        return map(lambda y: join(y, take(waiting, y.shape[2])), branch(map(watch, strips)))

    return run


def series(layers: Iterable[Layer]) -> Layer:
    """Layer of several layers in sequence."""
    layers = list(layers)
    return lambda strips: reduce(lambda x, layer: layer(x), layers, strips)


# ---- layers that need the whole map --------------------------------------------------------------


class Moments:
    """Mean and sum of squared deviations per image and channel, over strips, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None  # (B, C)
        self.squares: Tensor | None = None

    def add(self, strip: Float[Tensor, "B C r W"]) -> Float[Tensor, "B C r W"]:
        """Add a strip and return it."""
        numbers = strip.float() if strip.dtype.itemsize < 4 else strip
        new = strip.shape[2] * strip.shape[3]
        # Deviations from a value near the mean do not cancel. Sums over a row, which torch adds in
        # pairs, are exact to a few bits of their dtype; the sums of rows are added in float64.
        near = numbers.mean((2, 3), keepdim=True)
        apart = numbers - near
        beside = apart.sum(3).double().sum(2) / new
        mean = near[:, :, 0, 0].double() + beside
        squares = apart.square_().sum(3).double().sum(2) - new * beside.square()
        if self.mean is None or self.squares is None:
            self.mean, self.squares = mean, squares
        else:
            between = mean - self.mean
            self.mean = self.mean + between * (new / (self.count + new))
            weight = self.count * new / (self.count + new)
            self.squares = self.squares + squares + between.square() * weight
        self.count += new
        return strip

    def watch(self, strips: Strips) -> Strips:
        """Add strips as they pass."""
        return map(self.add, strips)

    def norm(self, norm: nn.GroupNorm, silu: bool) -> Layer:
        """Layer of a group norm of a map with these moments, followed by SiLU or not.

        Raises:
            NumericalError: a moment is not finite.
        """
        assert self.mean is not None and self.squares is not None, "a map has at least one strip"
        means = self.mean.unflatten(1, (norm.num_groups, -1))  # (B, groups, C / groups)
        mean = means.mean(2, keepdim=True)
        between = (means - mean).square().mean(2, keepdim=True)
        within = self.squares.unflatten(1, (norm.num_groups, -1)).mean(2, keepdim=True) / self.count
        scale = (within + between + norm.eps).rsqrt().expand_as(means).flatten(1)
        if not scale.isfinite().all() or not self.mean.isfinite().all():
            raise NumericalError(
                "the mean or variance of a group norm is NaN or infinite "
                f"({str(norm.weight.dtype).removeprefix('torch.')}): nothing was written; "
                "look for NaN or infinity in the input and in the weights"
            )
        scale = scale * norm.weight.double()
        shift = norm.bias.double() - mean.expand_as(means).flatten(1) * scale
        scale, shift = scale[:, :, None, None], shift[:, :, None, None]

        run = partial(_affine, scale, shift, silu)
        return lambda strips: map(run, strips)


def _affine(scale: Tensor, shift: Tensor, silu: bool, strip: Tensor) -> Tensor:
    """Return scale * strip + shift, in float32 at least, rounded once; then SiLU if `silu`."""
    at = torch.float32 if strip.dtype.itemsize < 4 else strip.dtype
    y = torch.addcmul(shift.to(at), strip.to(at), scale.to(at)).to(strip.dtype)
    return F.silu(y, inplace=True) if silu else y


def attention(module: SpatialAttention, moments: Moments, strips: Strips) -> Layer:
    """Layer of `SpatialAttention` over a map.

    Keys and values are computed now, queries as the layer runs.

    Args:
        module: the attention.
        moments: moments of the map.
        strips: the map.
    """
    normed = moments.norm(module.group_norm, silu=False)
    keys, values = [], []
    for strip in normed(strips):
        keys.append(module.to_k(_tokens(strip)))
        values.append(module.to_v(_tokens(strip)))
    attend = partial(_attend, module, torch.cat(keys, 1), torch.cat(values, 1))
    return residual(lambda s: map(attend, normed(s)), torch.add)


def _attend(module: SpatialAttention, k: Tensor, v: Tensor, strip: Tensor) -> Tensor:
    """Attend from the positions of a strip, in chunks of queries."""
    chunk = max(16, _SCORES // (k.shape[1] * module.heads))
    queries = module.to_q(_tokens(strip)).split(chunk, 1)
    y = torch.cat([batch_invariant.attention(q, k, v, module.heads) for q in queries], 1)
    return module.to_out[0](y).transpose(1, 2).unflatten(2, strip.shape[2:])


def _tokens(strip: Tensor) -> Tensor:
    """(B, C, r, W) -> (B, r * W, C)."""
    return strip.flatten(2).transpose(1, 2)
