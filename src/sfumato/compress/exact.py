"""Exact evaluation of autoencoders in horizontal strips, in a fraction of the memory.

The layers (`sfumato.inference.row_streaming`) take a few rows at a time. A few rows do not give the
means and variances of group norms and the keys and values of attention: each needs a pass over all
rows before the next layer may begin. Between passes one map is *kept*, in strips that are released
as the next kept map grows. Layers that lie *ahead* of it are run again in every pass.

The bytes that maps may take (`memory`) decide what is kept, and what is computed again. At each
norm and block:

    keep           the layers ahead are run once and their map is kept, if it fits
    both halves    of a residual block: its first half and its shortcut are kept, if they fit
                   together
    again          else a pass goes by for the moments alone, and nothing is kept of it

By default maps may take what the largest map after a residual block takes: less would mean to
compute whole blocks again for each norm above. In Stable Diffusion's decoder this is one map of 128
channels at the image's size. Then the last doubling is done three times and the first convolutions
of the last three blocks twice: 8 % more products than at once. With twice the memory nothing is
done again, and there are 16 % fewer than at once, since doublings are convolved where they are
small (14 % more, and as many, for the encoder; counted).

Tiny autoencoders have no norms but taef2's, at the lowest resolution: their strips pass from end to
end, and no large map is kept.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.compress.base import Posterior, SequentialAutoencoder
from sfumato.compress.conv_autoencoder import check_image
from sfumato.compress.tiny import Block, Scale
from sfumato.errors import UserError
from sfumato.inference import row_streaming as by
from sfumato.nn.attention import SpatialAttention
from sfumato.nn.blocks import Downsample, ResnetBlock, Upsample
from sfumato.validate import positive_int

STRIP = 2**23
"""Most bytes of a strip without a number of rows.

A strip is a sixteenth of the bytes that maps may take, but no more than this.
"""


def reconstruct(
    autoencoder: SequentialAutoencoder,
    raw: Float[Tensor, "B c h w"],
    rows: int | None = None,
    memory: int | None = None,
) -> Float[Tensor, "B C H W"]:
    """Reconstruct image by image and strip by strip, without gradient.

    Args:
        autoencoder: The autoencoder.
        raw: Raw latent.
        rows: About how many rows of any map a strip has; None: as many as make 8 MB, or less for
            small images.
        memory: Bytes that kept maps may take; more than the default saves repeated work, less costs
            more of it.

    Returns:
        The image, not clamped.

    Raises:
        UserError: For rows or memory below 1, an empty map, and layers that cannot run in strips.
    """
    return _run(autoencoder.decoder_parts(), autoencoder.to_cells(raw), rows, memory)


def posterior(
    autoencoder: SequentialAutoencoder,
    image: Float[Tensor, "B C H W"],
    rows: int | None = None,
    memory: int | None = None,
) -> Posterior:
    """The distribution of an image's raw latents, in strips and without gradient.

    Arguments and errors as for `reconstruct`.
    """
    check_image(image, autoencoder.channels, autoencoder.space.factor)
    return autoencoder.to_posterior(_run(autoencoder.encoder_parts(), image, rows, memory))


Size = tuple[int, int, int]
"""Channels, height, width."""


def _after(module: nn.Module, size: Size) -> Size:
    """The size of a part's output."""
    _, h, w = size
    match module:
        case ResnetBlock():
            return module.conv2.out_channels, h, w
        case Upsample():
            return module.conv.out_channels, 2 * h, 2 * w
        case Downsample():
            odd = 0 if module.asymmetric else 1
            return module.conv.out_channels, (h + odd) // 2, (w + odd) // 2
        case nn.Upsample():
            return size[0], 2 * h, 2 * w
        case nn.Conv2d():
            high, wide = (by.positions(module, k, side) for k, side in enumerate((h, w)))
            return module.out_channels, high, wide
    return size


def least(modules: Sequence[nn.Module], size: Size) -> int:
    """Numbers in the largest map after a residual block."""
    largest = 0
    for module in modules:
        size = _after(module, size)
        if isinstance(module, ResnetBlock | Block):
            largest = max(largest, _numbers(size))
    return largest


def _numbers(size: Size) -> int:
    return size[0] * size[1] * size[2]


@torch.no_grad()
def _run(modules: Sequence[nn.Module], x: Tensor, rows: int | None, memory: int | None) -> Tensor:
    """Run layers on each image by itself: neither memory nor an image depends on the batch."""
    for name, value in (("rows", rows), ("memory", memory)):
        if value is not None:
            positive_int(name, value, hint="None is the default")
    size: Size = (x.shape[1], x.shape[2], x.shape[3])
    if min(size) < 1:
        raise UserError(
            f"a map of shape {tuple(x.shape)} is empty: expected at least one row and one column"
        )
    allowed = memory or least(modules, size) * x.element_size()
    for module in modules:
        size = _after(module, size)
    out = x.new_empty(len(x), *size)
    for k in range(len(x)):
        walk = _Walk(x[k : k + 1], rows, allowed)
        for module in modules:
            walk.go(module)
        top = 0
        for strip in walk.strips(release=True):
            out[k : k + 1, :, top : top + strip.shape[2]] = strip
            top += strip.shape[2]
    return out


class _Kept(by.Store):
    """A kept map with its size and moments."""

    def __init__(self, strips: by.Strips, size: Size):
        super().__init__(size[1])
        self.size, self.moments = size, by.Moments()
        by.finish(map(self.add, self.moments.watch(strips)))


class _Walk:
    """The state of one image between layers.

    A map is kept, and the layers ahead of it have not run or will run again.
    """

    def __init__(self, x: Tensor, rows: int | None, memory: int):
        self.rows, self.memory, self.bytes = rows, memory, x.element_size()
        self.strip = min(STRIP, memory // 16)
        self.size: Size = (x.shape[1], x.shape[2], x.shape[3])  # after all that lies ahead
        self.kept = _Kept(iter([x]), self.size)
        self.ahead: list[by.Layer] = []

    def go(self, module: nn.Module) -> None:
        """Pass one part."""
        after = _after(module, self.size)
        match module:
            case ResnetBlock():
                self._settle()
                self._resnet(module, after)
            case SpatialAttention():
                self._keep()
                self.ahead.append(by.attention(module, self.kept.moments, self.strips()))
                self._keep()
            case Block():
                self._tiny_block(module)
            case nn.GroupNorm():
                self._settle()
                self.ahead.append(self._moments().norm(module, silu=True))
            case Upsample():
                self._settle()
                self.ahead += [self._split(after, 0.5), by.doubling(module)]
            case nn.Upsample():
                self.ahead += [self._split(after, 0.5), by.pointwise(module)]
            case Downsample():
                self.ahead.append(by.halving(module))
            case nn.Conv2d():
                self.ahead += [self._split(after, module.stride[0]), by.convolution(module)]
            case nn.ReLU() | Scale():
                self.ahead.append(by.pointwise(module))
            case _:
                raise UserError(
                    f"{type(module).__name__} cannot be run in strips: use decoding='whole' or "
                    "'tiled'"
                )
        self.size = after

    def strips(self, release: bool = False) -> by.Strips:
        """The map after all layers ahead, strip by strip.

        `release` releases the kept map on the way.
        """
        return by.series(self.ahead)(self.kept.read(self._rows(self.kept.size), release))

    def _rows(self, size: Size) -> int:
        return self.rows or max(1, self.strip // (size[0] * size[2] * self.bytes))

    def _split(self, after: Size, step: float) -> by.Layer:
        """Split into strips that are small enough behind a layer.

        Each row behind it needs `step` rows.
        """
        rows = max(1, int(self._rows(after) * step))
        return lambda strips: by.split(strips, rows)

    def _fits(self, *sizes: Size) -> bool:
        """True where maps that grow together while the kept one is released fit the memory."""
        return max(_numbers(self.kept.size), sum(map(_numbers, sizes))) * self.bytes <= self.memory

    def _keep(self) -> None:
        """Run the layers ahead and keep the map."""
        if self.ahead:
            self.kept = _Kept(self.strips(release=True), self.size)
            self.ahead = []

    def _settle(self) -> None:
        if self._fits(self.size):
            self._keep()

    def _moments(self, *layers: by.Layer) -> by.Moments:
        """The moments of the map after all layers ahead, and these.

        They are stored with a kept map, and otherwise from a pass that keeps nothing.
        """
        if not self.ahead and not layers:
            return self.kept.moments
        moments = by.Moments()
        by.finish(moments.watch(by.series(layers)(self.strips())))
        return moments

    def _resnet(self, block: ResnetBlock, after: Size) -> None:
        """Norm, SiLU, conv, norm, SiLU, conv, plus the input or a 1x1 convolution of it."""
        assert block.time_emb_proj is None, "blocks of autoencoders have no time embedding"
        first = by.series(
            [self._moments().norm(block.norm1, silu=True), by.convolution(block.conv1)]
        )
        shortcut = block.conv_shortcut or nn.Identity()
        if not self._fits(after, after):
            second = by.series(
                [self._moments(first).norm(block.norm2, silu=True), by.convolution(block.conv2)]
            )
            both = by.series([first, second])
            self.ahead.append(by.residual(both, lambda y, x: y.add_(shortcut(x))))
            return
        aside = by.Store(after[1])
        self.ahead.append(by.residual(first, partial(_put_aside, aside, shortcut)))
        self.size = after
        self._keep()
        second = by.series(
            [self.kept.moments.norm(block.norm2, silu=True), by.convolution(block.conv2)]
        )
        self.ahead.append(
            lambda strips: map(lambda y: y.add_(by.take(aside.slabs, y.shape[2])), second(strips))
        )
        self._keep()  # at once: the rows put aside can be read only once

    def _tiny_block(self, block: Block) -> None:
        """Compute relu(convs(x) + x), after the branch with a norm where there is one."""
        if block.pool is not None:
            self._settle()
            first, norm, relu, last = block.pool
            assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)
            assert isinstance(norm, nn.GroupNorm)
            wide = by.convolution(first)
            normed = self._moments(wide).norm(norm, silu=False)
            branch = by.series([wide, normed, by.pointwise(relu), by.convolution(last)])
            self.ahead.append(by.residual(branch, torch.add))
        layers = [
            by.convolution(part) if isinstance(part, nn.Conv2d) else by.pointwise(part)
            for part in block.conv
        ]
        self.ahead.append(by.residual(by.series(layers), lambda y, x: y.add_(x).relu_()))


def _put_aside(aside: by.Store, shortcut: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """Store the input, or its 1x1 convolution, beside y."""
    aside.add(shortcut(x))
    return y
