"""Layers over feature maps that come as horizontal strips: what is made is the whole map's, and
never more than a few rows are held.

A map (B, C, H, W) is an iterator of strips (B, C, r, W), top to bottom, of any heights r; a layer
is a function from such an iterator to another. Nothing is worked out before it is asked for, and
nothing twice: a convolution remembers the last rows that it saw, so that there are no halos to
recompute and no seams.

A group norm (Wu & He 2018, arXiv:1803.08494, eq. 1-3) needs two passes: `Moments` gathers the mean
and variance of the whole map, strip by strip, in float64 (the pairwise update of Chan, Golub &
LeVeque 1983, eq. 2.1), and then the norm is a scale and a shift a channel.

Iterators are chained with `map`, which forgets a strip when it hands it on; a generator's variables
would keep it alive.
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
"""Queries times keys in one call of attention: 256 MB, on devices whose kernels write the scores
down."""


# ---- strips --------------------------------------------------------------------------------------


def take(waiting: deque[Tensor], rows: int) -> Tensor:
    """The first `rows` rows of the strips that wait, which lose them."""
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
    """A map that is kept: strips are copied into slabs, which are let go one by one as they are
    read.

    Not the strips themselves: a heap in which strips that stay lie between scratch memory that goes
    is mostly holes. The C library gives a slab, of more than 32 MB, back to the system at once (its
    M_MMAP_THRESHOLD is never larger).
    """

    def __init__(self, height: int):
        self.missing = height  # rows for which there is no slab yet
        self.room = 0  # rows of the last slab that are empty
        self.slabs: deque[Tensor] = deque()

    def add(self, strip: Float[Tensor, "B C r W"]) -> None:
        """Copies a strip to the end."""
        while strip.shape[2]:
            if not self.room:
                self.room = min(
                    self.missing, _SLAB // (strip[:, :, :1].numel() * strip.element_size()) + 1
                )
                self.missing -= self.room
                self.slabs.append(strip.new_empty(*strip.shape[:2], self.room, strip.shape[3]))
            part, strip = strip[:, :, : self.room], strip[:, :, self.room :]
            begin = self.slabs[-1].shape[2] - self.room
            self.slabs[-1][:, :, begin : begin + part.shape[2]] = part
            self.room -= part.shape[2]

    def read(self, rows: int, release: bool) -> Strips:
        """The map in strips of at most `rows`."""
        return chain.from_iterable(
            map(
                lambda slab: slab.split(rows, 2), drain(self.slabs) if release else iter(self.slabs)
            )
        )


def drain(waiting: deque[Tensor]) -> Strips:
    """Strips that are let go as they are read."""
    while waiting:
        yield waiting.popleft()


def split(strips: Strips, rows: int) -> Strips:
    """The same rows in strips of at most `rows`."""
    return chain.from_iterable(map(lambda strip: strip.split(rows, 2), strips))


def finish(strips: Iterable[object]) -> None:
    """Runs to the end and keeps nothing."""
    deque(strips, maxlen=0)


def windows(
    run: Callable[[Tensor], Tensor], strips: Strips, kernel: int, stride: int, top: int, bottom: int
) -> Strips:
    """What a layer that looks at `kernel` rows in steps of `stride` makes of a map with `top` and
    `bottom` rows of zeros around it.

    run: (n - 1) * stride + kernel rows -> the output's rows for these n positions.
    """
    steps: Iterable[Tensor | None] = chain(strips, [None])
    return filter(_has_rows, map(_Window(run, kernel, stride, top, bottom).step, steps))


class _Window:
    """The last rows of a map, which the next ones need."""

    def __init__(
        self, run: Callable[[Tensor], Tensor], kernel: int, stride: int, top: int, bottom: int
    ):
        self.run, self.kernel, self.stride, self.top, self.bottom = run, kernel, stride, top, bottom
        self.held: Tensor | None = None

    def step(self, strip: Tensor | None) -> Tensor:
        """What can be made of these rows and those before them; None: no more come."""
        held = self.held
        if strip is None:
            assert held is not None, "a map has at least one strip"
            strip = held.new_zeros(*held.shape[:2], self.bottom, held.shape[3])
        if held is None:
            held = strip.new_zeros(*strip.shape[:2], self.top, strip.shape[3])
        rows = torch.cat([held, strip], 2) if held.shape[2] else strip
        n = max(0, (rows.shape[2] - self.kernel) // self.stride + 1)
        self.held = rows[:, :, n * self.stride :].clone()  # not a view, which would keep all rows
        return self.run(rows[:, :, : (n - 1) * self.stride + self.kernel]) if n else rows[:, :, :0]


def _has_rows(strip: Tensor) -> bool:
    return strip.shape[2] > 0


# ---- layers --------------------------------------------------------------------------------------


def pointwise(run: Callable[[Tensor], Tensor]) -> Layer:
    """A function of each number, or of each row, by itself."""
    return lambda strips: map(run, strips)


def convolution(conv: nn.Conv2d) -> Layer:
    """A convolution padded with zeros, the same at all sides."""
    (kernel, _), (stride, _), (above, aside) = conv.kernel_size, conv.stride, _numbers(conv)
    return lambda strips: windows(
        lambda rows: _convolve(conv, rows, aside), strips, kernel, stride, above, above
    )


def halving(down: Downsample) -> Layer:
    """`Downsample`: padding 0 means one row and column of zeros below and to the right only."""
    if not down.asymmetric:
        return convolution(down.conv)
    return lambda strips: windows(
        lambda rows: _convolve(down.conv, F.pad(rows, (0, 1)), 0), strips, 3, 2, 0, 1
    )


def doubling(up: Upsample) -> Layer:
    """`Upsample` to twice the size.

    As four convolutions of the map itself (kernels/upsample_conv.py). In half precision their sums
    of weights would be rounded coarsely; there the map is doubled and convolved as it is written.
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
    """How many numbers a convolution makes of `length`, along the height (axis 0) or the width
    (1).
    """
    return (length + 2 * _numbers(conv)[axis] - conv.kernel_size[axis]) // conv.stride[axis] + 1


def _numbers(conv: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(conv.padding, str) and conv.dilation == (1, 1)
    return conv.padding[0], conv.padding[1]


def _convolve(conv: nn.Conv2d, rows: Tensor, aside: int) -> Tensor:
    """All positions at which the kernel lies within the rows; `aside` columns of zeros left and
    right.
    """
    return _plain_convolve(rows, conv.weight, conv.bias, conv.stride, (0, aside), conv.groups)


def _plain_convolve(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    groups: int = 1,
) -> Tensor:
    """As `batch_invariant.Conv2d`: torch's own call may unfold the input, which takes nine times
    the memory.
    """
    if batch_invariant.applies(rows, weight):
        return batch_invariant.convolve(rows, weight, bias, stride, padding, (1, 1), groups)
    return F.conv2d(rows, weight, bias, stride, padding, (1, 1), groups)


def residual(branch: Layer, join: Callable[[Tensor, Tensor], Tensor]) -> Layer:
    """join(branch(x), x), row by row: x waits until the branch, which sees some rows farther, has
    caught up.
    """
    return lambda strips: _Beside(join).run(branch, strips)


class _Beside:
    """The rows of x that wait."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]):
        self.join, self.waiting = join, deque[Tensor]()

    def run(self, branch: Layer, strips: Strips) -> Strips:
        return map(self.meet, branch(map(self.watch, strips)))

    def watch(self, strip: Tensor) -> Tensor:
        self.waiting.append(strip)
        return strip

    def meet(self, y: Tensor) -> Tensor:
        return self.join(y, take(self.waiting, y.shape[2]))


def series(layers: Iterable[Layer]) -> Layer:
    """One after the other."""
    layers = list(layers)
    return lambda strips: reduce(lambda found, layer: layer(found), layers, strips)


# ---- what needs the whole map --------------------------------------------------------------------


class Moments:
    """Mean and sum of squared differences of each image and channel, in float64, of all the strips
    that were added.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None  # (B, C)
        self.squares: Tensor | None = None

    def add(self, strip: Float[Tensor, "B C r W"]) -> Float[Tensor, "B C r W"]:
        """Counts a strip and returns it."""
        numbers = strip.float() if strip.dtype.itemsize < 4 else strip
        new = strip.shape[2] * strip.shape[3]
        # Around a number near the mean nothing cancels. Sums over a row, which torch adds in pairs,
        # are good to a few bits of their dtype; the many sums of rows are added in float64.
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
            self.squares = (
                self.squares + squares + between.square() * (self.count * new / (self.count + new))
            )
        self.count += new
        return strip

    def watch(self, strips: Strips) -> Strips:
        """The strips, counted as they pass."""
        return map(self.add, strips)

    def norm(self, norm: nn.GroupNorm, silu: bool) -> Layer:
        """The group norm of a map with these moments, with SiLU after it or not. `NumericalError`
        if a moment is not finite.
        """
        assert self.mean is not None and self.squares is not None, "a map has at least one strip"
        means = self.mean.unflatten(1, (norm.num_groups, -1))  # (B, groups, C / groups)
        mean = means.mean(2, keepdim=True)
        between = (means - mean).square().mean(2, keepdim=True)
        within = self.squares.unflatten(1, (norm.num_groups, -1)).mean(2, keepdim=True) / self.count
        scale = (within + between + norm.eps).rsqrt().expand_as(means).flatten(1)
        if not scale.isfinite().all() or not self.mean.isfinite().all():
            raise NumericalError(
                f"the mean or variance of a group norm is NaN or infinite ({str(norm.weight.dtype).removeprefix('torch.')}): "
                "nothing was written; look for NaN or infinity in what was given and in the weights"
            )
        scale = scale * norm.weight.double()
        shift = norm.bias.double() - mean.expand_as(means).flatten(1) * scale
        scale, shift = scale[:, :, None, None], shift[:, :, None, None]

        run = partial(_affine, scale, shift, silu)
        return lambda strips: map(run, strips)


def _affine(scale: Tensor, shift: Tensor, silu: bool, strip: Tensor) -> Tensor:
    """scale * strip + shift, in float32 at least, rounded once; then SiLU or not."""
    at = torch.float32 if strip.dtype.itemsize < 4 else strip.dtype
    y = torch.addcmul(shift.to(at), strip.to(at), scale.to(at)).to(strip.dtype)
    return F.silu(y, inplace=True) if silu else y


def attention(module: SpatialAttention, moments: Moments, strips: Strips) -> Layer:
    """`SpatialAttention` over a map of these moments; keys and values are made from its strips now,
    queries as the layer runs.
    """
    normed = moments.norm(module.group_norm, silu=False)
    keys, values = [], []
    for strip in normed(strips):
        keys.append(module.to_k(_tokens(strip)))
        values.append(module.to_v(_tokens(strip)))
    attend = partial(_attend, module, torch.cat(keys, 1), torch.cat(values, 1))
    return residual(lambda s: map(attend, normed(s)), torch.add)


def _attend(module: SpatialAttention, k: Tensor, v: Tensor, strip: Tensor) -> Tensor:
    """What the positions of a strip take from all; some queries at a time."""
    chunk = max(16, _SCORES // (k.shape[1] * module.heads))
    queries = module.to_q(_tokens(strip)).split(chunk, 1)
    y = torch.cat([batch_invariant.attention(q, k, v, module.heads) for q in queries], 1)
    return module.to_out[0](y).transpose(1, 2).unflatten(2, strip.shape[2:])


def _tokens(strip: Tensor) -> Tensor:
    """(B, C, r, W) -> (B, r * W, C)"""
    return strip.flatten(2).transpose(1, 2)
