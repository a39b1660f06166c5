"""Strips against the whole: layers one by one, autoencoders of many shapes, in every height of
strips and at every memory, with the memory in use.

In float64 the results agree to 1e-10, so that a halo, a border or a statistic that is only nearly
right shows.
"""

import math
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.models import randomised
from helpers.tensors import normal, relative_error
from sfumato.compress import exact as walk
from sfumato.compress.base import Autoencoder, SequentialAutoencoder
from sfumato.compress.exact import posterior, reconstruct
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.compress.kl_flux2 import AutoencoderKLFlux2, KLFlux2Config
from sfumato.compress.tiny import AutoencoderTiny, TinyConfig
from sfumato.compress.vq import VQConfig, VQModel
from sfumato.decode.exact import exact, exact_posterior
from sfumato.decode.tiled import tiled_posterior
from sfumato.decode.whole import whole
from sfumato.errors import NumericalError, UserError
from sfumato.inference import row_streaming as by
from sfumato.kernels import batch_invariant
from sfumato.nn.attention import SpatialAttention
from sfumato.nn.blocks import Downsample, Upsample

MEMORIES = (None, 1, 10**4, 10**9)
"""Bytes for maps: the default; nothing fits; some fit; all fit."""


def kl(dtype: torch.dtype = torch.float64, **changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    values = {
        "block_out_channels": (8, 16, 12),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 3,
    }
    return randomised(AutoencoderKL(KLConfig(**{**values, **changes}))).to(dtype)


OTHERS: dict[str, Callable[[], SequentialAutoencoder]] = {
    "vq": lambda: VQModel(
        VQConfig(
            block_out_channels=(8, 16, 12), norm_num_groups=4, num_vq_embeddings=23, vq_embed_dim=2
        )
    ),
    "vq with attention": lambda: VQModel(
        VQConfig(
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            num_vq_embeddings=23,
            down_block_types=(
                "DownEncoderBlock2D",
                "AttnDownEncoderBlock2D",
                "AttnDownEncoderBlock2D",
            ),
            up_block_types=("AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        )
    ),
    "flux2": lambda: AutoencoderKLFlux2(
        KLFlux2Config(
            block_out_channels=(8, 16, 12),
            decoder_block_out_channels=(12, 8, 16),
            norm_num_groups=4,
            latent_channels=3,
        )
    ),
    "tiny": lambda: AutoencoderTiny(tiny()),
    "tiny with norms": lambda: AutoencoderTiny(tiny(use_midblock_gn=True)),
    "tiny, grey": lambda: AutoencoderTiny(
        tiny(
            in_channels=1,
            out_channels=1,
            num_encoder_blocks=(2, 1, 1),
            num_decoder_blocks=(1, 1, 2),
        )
    ),
}
"""The kinds of autoencoders besides `kl`."""


def tiny(**changes: Any) -> TinyConfig:
    widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (12, 12, 12)}
    return TinyConfig(
        **{**widths, "num_encoder_blocks": (1, 2, 1), "num_decoder_blocks": (1, 2, 1), **changes}
    )


def other(kind: str, dtype: torch.dtype = torch.float64) -> SequentialAutoencoder:
    torch.manual_seed(0)
    # a seed with which few pixels are limited to [-1, 1]
    return randomised(OTHERS[kind](), 3).to(dtype)


def apart(result: Tensor, expected: Tensor) -> float:
    assert result.dtype == expected.dtype
    return relative_error(result, expected)


def cut(x: Tensor, rows: int) -> by.Strips:
    return iter(x.split(rows, 2))


def joined(strips: by.Strips) -> Tensor:
    return torch.cat(list(strips), 2)


# ---- layers --------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], tuple[nn.Module, Callable[[Any], by.Layer]]]] = {
    "3x3": lambda: (batch_invariant.Conv2d(4, 6, 3, padding=1), by.convolution),
    "1x1": lambda: (batch_invariant.Conv2d(4, 6, 1), by.convolution),
    "5x5": lambda: (nn.Conv2d(4, 6, 5, padding=2, groups=2), by.convolution),
    "5x5 in threes": lambda: (nn.Conv2d(4, 6, 5, stride=3, padding=1, bias=False), by.convolution),
    "halving": lambda: (Downsample(4, 0), by.halving),
    "halving evenly": lambda: (Downsample(4, 1), by.halving),
    "doubling": lambda: (Upsample(4), by.doubling),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_makes_the_same_map(name: str, dtype: torch.dtype) -> None:
    module, of = LAYERS[name]()
    randomised(module).to(dtype)
    for height, width in ((1, 4), (2, 3), (7, 5), (12, 8)):
        if "5x5" in name and height < 3:
            continue  # smaller than the kernel with its padding
        x = normal(2, 4, height, width, dtype=dtype)
        if name.startswith("halving") and height == 1:
            continue  # nothing is left
        expected = module(x)
        for rows in (1, 2, 3, height):
            limit = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
            assert apart(joined(of(module)(cut(x, rows))), expected) < limit, (height, width, rows)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_attention_over_strips(heads: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where queries are taken a few at a time."""
    module, x = (
        randomised(SpatialAttention(8, 8 // heads, 4, 1e-6)).double(),
        normal(2, 8, 5, 6, dtype=torch.float64),
    )
    moments = by.Moments()
    by.finish(moments.watch(cut(x, rows)))
    for scores in (2**26, 1):
        monkeypatch.setattr(by, "_SCORES", scores)
        assert (
            apart(joined(by.attention(module, moments, cut(x, rows))(cut(x, rows))), module(x))
            < 1e-12
        )


@pytest.mark.parametrize("rows", [1, 3, 11])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_are_those_of_the_whole_map(rows: int, offset: float) -> None:
    """In float32, far from zero, a sum of squares would have lost the variance: 1e8 has steps of
    8.
    """
    x = normal(2, 8, 11, 30) + offset + 3 * torch.arange(8)[:, None, None]
    moments, norm = by.Moments(), randomised(nn.GroupNorm(4, 8, 1e-6))
    assert torch.equal(joined(moments.watch(cut(x, rows))), x)
    assert moments.mean is not None and moments.squares is not None
    assert (moments.mean - x.double().mean((2, 3))).abs().max() < 1e-6 * (1 + offset)
    assert apart(moments.squares / x[0, 0].numel(), x.double().var((2, 3), correction=0)) < 1e-5
    expected = F.silu(norm.double()(x.double())).float()
    result = joined(moments.norm(norm.float(), silu=True)(cut(x, 4)))
    # x itself is rounded to 1e-3 of its spread there
    assert apart(result, expected) < (1e-6 if offset == 0 else 1e-2)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 13), st.integers(1, 13))
def test_stores_return_rows_in_order(height: int, slab: int, rows: int, again: int) -> None:
    """A store, whatever the slabs; read once or twice; and the rows that wait beside a branch."""
    x = normal(1, 2, height, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by, "_SLAB", (slab - 1) * x[:, :, :1].numel() * 4)
        store = by.Store(height)
        for strip in cut(x, rows):
            store.add(strip)
    assert all(s.shape[2] <= slab for s in store.slabs)
    strips = list(store.read(again, release=False))
    assert torch.equal(torch.cat(strips, 2), x) and max(s.shape[2] for s in strips) <= again
    waiting, parts = deque(store.slabs), []
    while waiting:
        parts.append(by.take(waiting, min(again, sum(s.shape[2] for s in waiting))))
    assert torch.equal(torch.cat(parts, 2), x) and all(p.shape[2] == again for p in parts[:-1])
    assert torch.equal(joined(store.read(again, release=True)), x) and not store.slabs


def test_slabs_are_let_go_as_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the memory would be that of two maps."""
    monkeypatch.setattr(by, "_SLAB", 0)
    store, alive = by.Store(6), []
    store.add(normal(1, 1, 6, 4))
    slabs = [weakref.ref(slab) for slab in store.slabs]
    for _ in by.convolution(randomised(nn.Conv2d(1, 1, 3, padding=1)))(store.read(2, release=True)):
        alive.append(sum(slab() is not None for slab in slabs))
    assert (
        len(slabs) == 6
        and alive == sorted(alive, reverse=True)
        and alive[0] > alive[-1]
        and max(alive) <= 6
        and alive[-1] <= 1
    )


# ---- autoencoders --------------------------------------------------------------------------------

SHAPES: list[dict[str, Any]] = [
    {},
    {"block_out_channels": (8, 16), "layers_per_block": 2},
    {
        "block_out_channels": (16, 8, 8, 24),
        "norm_num_groups": 8,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    {"mid_block_add_attention": False, "in_channels": 1, "out_channels": 1},
    {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (8, 16),
    },
]


@pytest.mark.parametrize(
    ("shape", "memory"),
    [(SHAPES[0], memory) for memory in MEMORIES]
    + [(shape, memory) for shape in SHAPES[1:] for memory in MEMORIES[1:3]],
    ids=str,
)
def test_decoding_and_encoding_in_strips_is_the_whole(
    shape: dict[str, Any], memory: int | None
) -> None:
    strips_are_the_whole(kl(**shape), memory)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("memory", MEMORIES[1::2])
def test_other_kinds_in_strips_are_the_whole(kind: str, memory: int | None) -> None:
    strips_are_the_whole(other(kind), memory)


def strips_are_the_whole(autoencoder: SequentialAutoencoder, memory: int | None) -> None:
    """A single cell, and odd numbers of cells."""
    for height, width in ((1, 1), (5, 3)):
        raw = normal(2, autoencoder.space.channels, height, width, dtype=torch.float64)
        image = autoencoder.reconstruct(raw)
        expected = autoencoder.posterior(image.tanh())
        for rows in (1, 3, None):
            assert apart(reconstruct(autoencoder, raw, rows, memory), image) < 1e-10
            result = posterior(autoencoder, image.tanh(), rows, memory)
            assert apart(result.mean, expected.mean) < 1e-10
            assert torch.equal(result.std, expected.std) or apart(result.std, expected.std) < 1e-10


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_in_float32(kind: str) -> None:
    """From z to pixels and back, with the statistics of the latent between."""
    autoencoder = other(kind, torch.float32)
    for cells in ((7, 3), (4, 9)):
        z = 0.2 * normal(2, autoencoder.space.channels, *cells)
        expected = whole(autoencoder, z)
        assert expected.std() > 0.05 and apart(exact(autoencoder, z, rows=3), expected) < 1e-5
        mean = autoencoder.posterior(expected.clone()).mean
        assert apart(exact_posterior(autoencoder, expected.clone(), rows=3).mean, mean) < 1e-5


def test_a_tiny_autoencoder_keeps_no_large_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no norms: its strips go from end to end.

    Only they and the result are alive.
    """
    monkeypatch.setattr(by, "_SLAB", 2**12)
    autoencoder, raw, image = (
        other("tiny", torch.float32),
        normal(1, 4, 64, 2),
        normal(1, 3, 256, 8),
    )
    largest = 12 * 256 * 8 * 4
    for run in (
        lambda: reconstruct(autoencoder, raw, rows=2),
        lambda: posterior(autoencoder, image, rows=2),
    ):
        with torch.no_grad(), Alive() as strips:
            _ = run()
        assert strips.most < 0.8 * largest


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.sampled_from([8, 12]), min_size=2, max_size=4),
    st.integers(1, 2),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 40),
    st.integers(1, 2**18),
)
def test_any_shape_any_strips_any_memory(
    widths: list[int], depth: int, cells: tuple[int, int], rows: int, memory: int
) -> None:
    autoencoder = kl(block_out_channels=tuple(widths), layers_per_block=depth)
    raw = normal(1, 3, *cells, dtype=torch.float64)
    image = autoencoder.reconstruct(raw)
    assert apart(reconstruct(autoencoder, raw, rows, memory), image) < 1e-10
    assert (
        apart(posterior(autoencoder, image, rows, memory).mean, autoencoder.posterior(image).mean)
        < 1e-10
    )


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_exact_is_whole_in_the_dtype_of_the_weights(dtype: torch.dtype, limit: float) -> None:
    """In half precision two ways to round, no more: bfloat16's steps are 1/256, and there are some
    twenty layers.
    """
    autoencoder, z = kl(dtype), 0.2 * normal(2, 3, 9, 7)
    expected = whole(autoencoder, z)
    result = exact(autoencoder, z, rows=2)
    assert expected.std() > 0.1 and apart(result, expected) < limit
    image = expected.clone()
    mean, again = (
        autoencoder.posterior(image.to(dtype)).mean,
        exact_posterior(autoencoder, image, rows=3).mean,
    )
    assert again.dtype == dtype and apart(again.float(), mean.float()) < limit
    assert not result.is_inference() and not result.requires_grad


@pytest.mark.invariance
def test_no_image_depends_on_the_batch_and_no_input_is_changed() -> None:
    autoencoder, z = kl(torch.float32), normal(3, 3, 6, 5)
    before, image = z.clone(), exact(autoencoder, z, rows=2)
    assert torch.equal(z, before)
    assert all(
        torch.equal(exact(autoencoder, z[k : k + 1], rows=2), image[k : k + 1]) for k in range(3)
    )
    unchanged = image.clone()
    exact_posterior(autoencoder, image, rows=2, memory=10**9)
    assert torch.equal(image, unchanged)
    assert exact(autoencoder, z[:0]).shape == (0, 3, 24, 20)


class Alive(TorchDispatchMode):
    """The most bytes of tensors made under it that were alive at the end of an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize("part", ["decode", "encode"])
def test_nothing_near_the_size_of_two_maps_is_alive(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest map once, some strips, and the result are alive.

    The whole run holds several such maps.
    """
    monkeypatch.setattr(by, "_SLAB", 2**12)
    autoencoder = kl(
        torch.float32,
        block_out_channels=(16, 16, 16),
        layers_per_block=2,
        mid_block_add_attention=False,
    )
    raw, image, largest = normal(1, 3, 40, 4), normal(1, 3, 160, 16), 16 * 160 * 16 * 4
    with torch.no_grad(), Alive() as strips:
        _ = (
            reconstruct(autoencoder, raw, rows=2)
            if part == "decode"
            else posterior(autoencoder, image, rows=2)
        )
    with torch.no_grad(), Alive() as at_once:
        _ = autoencoder.reconstruct(raw) if part == "decode" else autoencoder.posterior(image)
    assert largest < strips.most < 1.7 * largest  # an image of 3 channels is 0.2 of it
    assert at_once.most > 1.8 * strips.most


def test_more_memory_saves_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolved numbers by memory: with room for all maps, no convolution of rows is done twice."""
    autoencoder, raw, real, done = (
        kl(),
        normal(1, 3, 6, 4, dtype=torch.float64),
        by._plain_convolve,
        [],
    )

    def counted(*arguments: Any) -> Tensor:
        y = real(*arguments)
        done.append(y.numel() * arguments[1][0].numel())
        return y

    monkeypatch.setattr(by, "_plain_convolve", counted)
    work = []
    for memory in (1, None, 10**9):
        done.clear()
        reconstruct(autoencoder, raw, 2, memory)
        work.append(sum(done))
    once = sum(_products(autoencoder, raw))
    assert work[0] > work[1] > work[2] == once


def _products(autoencoder: AutoencoderKL, raw: Tensor) -> list[int]:
    """Multiplications of each convolution of a whole run, doublings counted as four 2x2 kernels."""
    result: list[int] = []
    doubled = {m.conv for m in autoencoder.modules() if isinstance(m, Upsample)}

    def count(module: nn.Module, _: Any, y: Tensor) -> None:
        result.append(y.numel() * module.weight[0].numel() * (4 if module in doubled else 9) // 9)  # pyright: ignore

    convolutions = {k: m for k, m in autoencoder.named_modules() if isinstance(m, nn.Conv2d)}
    # called as they are
    hooks = [m.register_forward_hook(count) for k, m in convolutions.items() if "shortcut" not in k]
    autoencoder.reconstruct(raw)
    for hook in hooks:
        hook.remove()
    return result


# ---- refused inputs ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["latent", "weights", "last weights"])
def test_a_number_that_is_not_finite_never_becomes_a_picture(value: float, where: str) -> None:
    autoencoder, z = kl(torch.float32), normal(1, 3, 6, 5)
    if where == "latent":
        z[0, 1, 5, 2] = value
    else:
        (
            autoencoder.decoder.conv_in if where == "weights" else autoencoder.decoder.conv_out
        ).weight[0, 0, 1, 1] = value
    for way in (whole, exact):
        with pytest.raises(
            NumericalError, match=r"NaN or infinite.*float32\).*nothing was written"
        ):
            way(autoencoder, z)


def test_wrong_input_is_refused() -> None:
    autoencoder = kl(torch.float32)
    with pytest.raises(UserError, match=r"expected .* \(B, 3, h, w\)"):
        exact(autoencoder, torch.zeros(1, 4, 8, 8))
    for shape in ((1, 1, 8, 8), (1, 3, 9, 8), (1, 3, 8, 6)):
        with pytest.raises(UserError, match="sides that are multiples of 4"):
            exact_posterior(autoencoder, torch.zeros(shape))
    with pytest.raises(
        UserError, match="rows=0: expected a whole number of at least 1; None is the default"
    ):
        exact(autoencoder, torch.zeros(1, 3, 4, 4), rows=0)
    with pytest.raises(UserError, match="memory=-5: expected a whole number of at least 1"):
        exact_posterior(autoencoder, torch.zeros(1, 3, 4, 4), memory=-5)
    with pytest.raises(UserError, match="is empty"):
        exact(autoencoder, torch.zeros(1, 3, 0, 4))
    with pytest.raises(
        UserError,
        match="Other is not a SequentialAutoencoder and cannot be run in strips: "
        "use whole or tiled",
    ):
        exact(Other(), torch.zeros(1, 3, 4, 4))
    with pytest.raises(UserError, match="Linear cannot be run in strips"):
        walk._run([nn.Linear(2, 2)], torch.zeros(1, 3, 4, 4), None, None)


class Other(Autoencoder):
    """Of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.space = KLConfig(latent_channels=3).space

    def posterior(self, image: Tensor) -> Any:
        raise NotImplementedError

    def reconstruct(self, raw: Tensor) -> Tensor:
        raise NotImplementedError

    def to_config(self) -> dict[str, Any]:
        return {}


# ---- encoding in tiles ---------------------------------------------------------------------------


def test_one_tile_that_covers_everything_encodes_the_whole() -> None:
    autoencoder, image = kl(torch.float32), normal(2, 3, 20, 32)
    expected, result = (
        autoencoder.posterior(image),
        tiled_posterior(autoencoder, image, tile=8, overlap=3),
    )
    assert apart(result.mean, expected.mean) < 1e-6 and apart(result.std, expected.std) < 1e-6


def test_tiles_encode_the_whole_where_the_overlap_covers_the_receptive_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without norms and attention (here the norms do nothing) a cell depends on its neighbourhood
    only.
    """
    autoencoder, image = (
        kl(mid_block_add_attention=False),
        normal(1, 3, 4 * 80, 4 * 10, dtype=torch.float64),
    )
    for block in autoencoder.encoder.modules():
        for name in ("norm1", "norm2", "conv_norm_out"):
            if isinstance(getattr(block, name, None), nn.GroupNorm):
                setattr(block, name, nn.Identity())
    expected = autoencoder.posterior(image)
    result = tiled_posterior(autoencoder, image, tile=64, overlap=48)
    assert (
        result.mean.shape == expected.mean.shape
        and apart(result.mean, expected.mean.float()) < 1e-5
    )
    # so it can fail
    assert (
        apart(tiled_posterior(autoencoder, image, tile=16, overlap=1).mean, expected.mean.float())
        > 1e-4
    )


def test_wrong_tiles_and_images_are_refused() -> None:
    autoencoder = kl(torch.float32)
    with pytest.raises(UserError, match="tile=8, overlap=8: expected 0 < overlap < tile"):
        tiled_posterior(autoencoder, torch.zeros(1, 3, 8, 8), tile=8, overlap=8)
    with pytest.raises(UserError, match="sides that are multiples of 4"):
        tiled_posterior(autoencoder, torch.zeros(1, 3, 10, 8))
