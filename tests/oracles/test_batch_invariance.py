"""Image k of a batch has the bits that it has alone: layers one by one, whole networks, and the way
from latents to pixels.

Equality is `torch.equal` throughout. test_arithmetic.py runs all of it with more threads and with
the kernels of other processors.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.batch_invariance import batch_dependent
from helpers.models import randomised
from helpers.tensors import normal
from sfumato.decode.whole import whole
from sfumato.inference.prepack import can_prepack, prepack
from sfumato.kernels import batch_invariant
from sfumato.kernels.mkl_threads import controlled
from sfumato.nn.attention import FeedForward, SpatialAttention, SpatialTransformer
from sfumato.nn.blocks import Downsample, ResnetBlock, Upsample
from sfumato.nn.embeddings import sinusoidal
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.types import Conditioning

pytestmark = pytest.mark.invariance

SOME = (2, 11, 17)
COUNT = 34


# ---- layers --------------------------------------------------------------------------------------

CONVOLUTIONS = [
    (12, 64, 3, 1, 7, 7),
    (64, 64, 3, 2, 7, 7),
    (128, 128, 3, 1, 4, 4),
    (5, 7, 3, 1, 6, 9),
    (8, 8, 3, 2, 3, 5),
]
CONVOLUTIONS += [
    (128, 64, 1, 1, 7, 7),
    (8, 16, 1, 1, 4, 5),
    (24, 16, 1, 1, 3, 5),
    (16, 24, 1, 1, 1, 1),
    (6, 6, 1, 1, 7, 7),
]
WIDE = [
    (640, 640, 3, 1, 4, 4),
    (1280, 640, 1, 1, 4, 4),
    (320, 64, 3, 2, 8, 8),
    (512, 8, 1, 1, 16, 16),
    (208, 64, 3, 1, 7, 7),
]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_convolutions(shape: tuple[int, ...], last: bool) -> None:
    inputs, outputs, kernel, stride, height, width = shape
    layer, x = (
        randomised(batch_invariant.Conv2d(inputs, outputs, kernel, stride, kernel // 2)),
        normal(COUNT, inputs, height, width),
    )
    layout = torch.channels_last if last else torch.contiguous_format
    assert not batch_dependent(lambda rows: layer(x[rows].contiguous(memory_format=layout)))


@pytest.mark.parametrize("ready", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_convolutions_of_many_channels(shape: tuple[int, ...], ready: bool) -> None:
    """oneDNN's own kernels for these differ from batch to batch where threads are many."""
    inputs, outputs, kernel, stride, height, width = shape
    layer: Any = randomised(
        nn.Sequential(batch_invariant.Conv2d(inputs, outputs, kernel, stride, kernel // 2))
    )
    if ready and not can_prepack(layer):
        pytest.skip("networks are prepared for oneDNN on AVX2 or later")
    layer, x = prepack(layer) if ready else layer, normal(COUNT, inputs, height, width)
    assert not batch_dependent(lambda rows: layer(x[rows]), (2, 3, 17))


def test_many_columns() -> None:
    """From 20,000 columns on oneDNN splits the sum of a row among threads, by the number of
    rows.
    """
    layer, x = randomised(batch_invariant.Linear(20480, 24)), normal(COUNT, 20480)
    assert not batch_dependent(lambda rows: layer(x[rows]), SOME)


@pytest.mark.parametrize("tokens", [None, 3, 9, 49])
@pytest.mark.parametrize(
    "widths",
    [(64, 256), (256, 128), (8, 64), (12, 8), (11, 256), (6, 6), (13, 8), (64, 1)],
    ids=str,
)
def test_linear_maps(widths: tuple[int, int], tokens: int | None) -> None:
    layer, x = (
        randomised(batch_invariant.Linear(*widths)),
        normal(COUNT, *([] if tokens is None else [tokens]), widths[0]),
    )
    assert not batch_dependent(lambda rows: layer(x[rows]))
    if tokens is not None:  # as they come from a feature map: channels first in memory
        assert not batch_dependent(lambda rows: layer(x[rows].mT.contiguous().mT))


@pytest.mark.parametrize(
    "shape", [(8, 7, 7), (96, 7, 7), (24, 3, 5), (19, 128), (32,), (5,)], ids=str
)
@pytest.mark.parametrize(
    "function",
    [batch_invariant.silu, batch_invariant.gelu, partial(batch_invariant.gelu, tanh=True)],
    ids=["silu", "gelu", "tanh"],
)
def test_activations(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    x = 3 * normal(COUNT, *shape)
    assert not batch_dependent(lambda rows: function(x[rows]))
    halves = 3 * normal(COUNT, *shape[:-1], 2 * shape[-1])
    assert not batch_dependent(lambda rows: function(halves[rows].chunk(2, dim=-1)[1]))


@pytest.mark.parametrize("width", [6, 10, 64, 320])
def test_sinusoidal_features(width: int) -> None:
    position = 1000 * torch.rand(COUNT, generator=torch.Generator().manual_seed(0))
    assert not batch_dependent(lambda rows: sinusoidal(position[rows], width))


@pytest.mark.parametrize(
    "tokens", [(16, 16), (49, 49), (6, 6), (15, 15), (49, 5), (9, 77), (1, 5)], ids=str
)
@pytest.mark.parametrize(("heads", "width"), [(1, 96), (2, 8), (8, 8), (1, 6), (3, 15)])
def test_attention(heads: int, width: int, tokens: tuple[int, int]) -> None:
    n, length = tokens
    q, k, v = (
        normal(COUNT, n, width),
        normal(COUNT, length, width, seed=1),
        normal(COUNT, length, width, seed=2),
    )
    mask = (normal(COUNT, length, seed=3) > -0.5) | (torch.arange(length) == 0)
    assert not batch_dependent(
        lambda rows: batch_invariant.attention(q[rows], k[rows], v[rows], heads), SOME
    )
    assert not batch_dependent(
        lambda rows: batch_invariant.attention(q[rows], k[rows], v[rows], heads, mask[rows]), SOME
    )


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (3, 5)], ids=str)
def test_blocks(size: tuple[int, int]) -> None:
    x, time, tokens = (
        normal(COUNT, 8, *size),
        normal(COUNT, 32, seed=1),
        normal(COUNT, 5, 12, seed=2),
    )
    resnet = randomised(ResnetBlock(8, 24, 4, 1e-5, time_width=32, scale_shift=True))
    assert not batch_dependent(lambda rows: resnet(x[rows], time[rows]), SOME)
    for linear in (False, True):
        transformer = randomised(
            SpatialTransformer(8, 4, 2, depth=1, context_width=12, groups=4, linear=linear)
        )
        assert not batch_dependent(
            lambda rows, layer=transformer: layer(x[rows], tokens[rows]), SOME
        )
    for layer in map(
        randomised,
        (SpatialAttention(8, 4, 4, 1e-5), Downsample(8, 0), Downsample(8, 1), Upsample(8)),
    ):
        assert not batch_dependent(lambda rows, layer=layer: layer(x[rows]), SOME)
    feed = randomised(FeedForward(8))
    assert not batch_dependent(lambda rows: feed(x[rows].flatten(2).mT), SOME)


# ---- whole networks ------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
SMALL |= {"cross_attention_dim": 12, "block_out_channels": (8, 16)}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SELF = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
UNETS: dict[str, dict[str, Any]] = {
    "cross-attention": CROSS,
    "linear projection": CROSS | {"use_linear_projection": True},
    "classes": SELF
    | {
        "mid_block_type": "UNetMidBlock2D",
        "num_class_embeds": 5,
        "resnet_time_scale_shift": "scale_shift",
    },
    "projected vector": SELF
    | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 5},
}


@pytest.mark.parametrize("size", [(7, 7), (6, 9)], ids=str)
@pytest.mark.parametrize("name", UNETS)
def test_small_unets(name: str, size: tuple[int, int]) -> None:
    network = randomised(UNet(UNetConfig(**(SMALL | UNETS[name]))))
    vector = (
        None
        if "cross_attention_dim" in UNETS[name] or UNETS[name].get("use_linear_projection")
        else normal(COUNT, 5).softmax(1)
    )
    mask = (normal(COUNT, 5) > -0.5) | (torch.arange(5) == 0)
    cond = Conditioning(tokens=normal(COUNT, 5, 12, seed=1), mask=mask, vector=vector)
    x, t = (
        normal(COUNT, 3, *size, seed=2),
        1000 * torch.rand(COUNT, generator=torch.Generator().manual_seed(3)),
    )
    assert not batch_dependent(lambda rows: network(x[rows], t[rows], cond[rows]), SOME)


def test_the_bundled_network(fashion: Any) -> None:
    network, classes = fashion.denoiser.network, len(fashion.class_names) + 1
    x, t = (
        normal(COUNT, 12, 7, 7),
        1000 * torch.rand(COUNT, generator=torch.Generator().manual_seed(1)),
    )
    cond = Conditioning(vector=torch.eye(classes)[torch.arange(COUNT) % classes])
    assert not batch_dependent(
        lambda rows: network(x[rows], t[rows], cond[rows]), (2, 3, 7, 16, 33)
    )


def test_the_bundled_autoencoder(fashion: Any) -> None:
    z, image = normal(COUNT, 12, 7, 7), normal(COUNT, 1, 28, 28, seed=1).tanh()
    assert not batch_dependent(lambda rows: whole(fashion.autoencoder, z[rows]), (2, 7, 17))
    assert not batch_dependent(lambda rows: fashion.autoencoder.encode(image[rows]), (2, 7))
    together = whole(fashion.autoencoder, z[:7], batch=3)
    assert torch.equal(together, whole(fashion.autoencoder, z[:7])), "however the batch is cut"


def test_generated_pictures(fashion: Any) -> None:
    """Through sampling with guidance: picture 2 of 3 is the picture of its own seed."""
    words = {"steps": 3, "guidance": 2.0, "output": "tensor"}
    together = fashion.generate("bag", n=3, seed=5, **words)
    assert torch.equal(together[2:], fashion.generate("bag", n=1, seed=7, **words))


def test_with_two_threads() -> None:
    """Two cut a batch in the middle, and MKL and oneDNN choose other kernels for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        linear, conv, pixel = (
            randomised(batch_invariant.Linear(64, 256)),
            randomised(batch_invariant.Conv2d(8, 8, 3, 2, 1)),
            randomised(batch_invariant.Conv2d(8, 16, 1)),
        )
        rows_in, maps, wide = normal(COUNT, 64), normal(COUNT, 8, 7, 7), normal(COUNT, 96, 7, 7)
        assert not batch_dependent(lambda rows: linear(rows_in[rows]), (2, 5, 11))
        assert not batch_dependent(lambda rows: conv(maps[rows]), (2, 3))
        assert not batch_dependent(lambda rows: pixel(maps[rows]), (2, 3))
        assert not batch_dependent(lambda rows: batch_invariant.silu(wide[rows]), (7, 9))
        network = randomised(UNet(UNetConfig(**(SMALL | CROSS))))
        x, t, cond = (
            normal(COUNT, 3, 7, 7),
            torch.full((COUNT,), 500.0),
            Conditioning(tokens=normal(COUNT, 5, 12, seed=1)),
        )
        assert not batch_dependent(lambda rows: network(x[rows], t[rows], cond[rows]), (2, 11))
    finally:
        torch.set_num_threads(before)


def test_attention_does_not_depend_on_the_threads() -> None:
    """Neither on their number nor on numbers set before, which torch's other threads keep; the
    caller's number for MKL stays.
    """
    q, k, v = normal(5, 360, 16), normal(5, 360, 16, seed=1), normal(5, 360, 16, seed=2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2, 1, 5):
            torch.set_num_threads(threads)
            # a nested region, in which torch's other threads set their number
            torch.ones(4, 4, 256, 256).sum((1, 2, 3))
            together = batch_invariant.attention(q, k, v, 2)
            results.append(together)
            assert all(
                torch.equal(
                    batch_invariant.attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], 2)[0],
                    together[i],
                )
                for i in range(5)
            )
            if controlled():
                assert torch.equal(together, results[0])
                assert mkl_threads() == threads
    finally:
        torch.set_num_threads(before)


def mkl_threads() -> int:
    """The number of threads that MKL counts on in this thread."""
    return ctypes.CDLL(
        str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    ).MKL_Get_Max_Threads()


# ---- what it leaves alone, and whether it can fail -----------------------------------------------


def test_the_plain_layers_differ() -> None:
    """Otherwise the tests above would hold for any layers."""
    plain = {
        "linear": nn.Linear(64, 256),
        "3x3": nn.Conv2d(12, 64, 3, padding=1),
        "1x1": nn.Conv2d(128, 64, 1),
    }
    inputs = {
        "linear": normal(COUNT, 64),
        "3x3": normal(COUNT, 12, 7, 7),
        "1x1": normal(COUNT, 128, 7, 7),
    }
    result = [
        batch_dependent(lambda rows, x=inputs[name], layer=layer: layer(x[rows]), SOME)
        for name, layer in plain.items()
    ]
    if not any(result):
        pytest.skip(
            "the kernels of this machine give plain layers' rows the same bits, so that they "
            "cannot show a difference"
        )


def test_training_is_torchs_own() -> None:
    """With gradients the layers are nn's, to the bit, forwards and backwards; and so are the keys
    of their weights.
    """
    pairs: list[tuple[Any, Any, Tensor]] = [
        (batch_invariant.Linear(6, 8), nn.Linear(6, 8), normal(3, 6)),
        (
            batch_invariant.Conv2d(6, 8, 3, padding=1),
            nn.Conv2d(6, 8, 3, padding=1),
            normal(3, 6, 5, 5),
        ),
        (batch_invariant.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 1), normal(1, 6, 5, 5)),
    ]
    for layer, plain, x in pairs:
        plain.load_state_dict(layer.state_dict())
        a, b = layer(x), plain(x)
        a.square().sum().backward()
        b.square().sum().backward()
        assert torch.equal(a, b) and all(
            torch.equal(p.grad, q.grad)
            for p, q in zip(layer.parameters(), plain.parameters(), strict=True)
        )


@torch.inference_mode()
def test_values_are_torchs() -> None:
    """To rounding; padding changes neither the output nor its shape.

    An empty batch gives an empty result.
    """
    linear, conv, pixel = (
        randomised(batch_invariant.Linear(6, 5)),
        randomised(batch_invariant.Conv2d(6, 8, 3, 2, 1)),
        randomised(batch_invariant.Conv2d(6, 8, 1)),
    )
    for count in (0, 1, 3, 17):
        x, maps = normal(count, 3, 6), normal(count, 6, 5, 4)
        torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
        torch.testing.assert_close(
            conv(maps), nn.functional.conv2d(maps, conv.weight, conv.bias, 2, 1)
        )
        torch.testing.assert_close(
            pixel(maps), nn.functional.conv2d(maps, pixel.weight, pixel.bias)
        )
        torch.testing.assert_close(batch_invariant.silu(x), nn.functional.silu(x))
        torch.testing.assert_close(batch_invariant.gelu(x), nn.functional.gelu(x))
    q, k, v = normal(2, 7, 6), normal(2, 5, 6, seed=1), normal(2, 5, 6, seed=2)
    mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    scores = (
        q.unflatten(-1, (2, 3)).transpose(1, 2) @ k.unflatten(-1, (2, 3)).transpose(1, 2).mT
    ) / 3**0.5
    weights = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
    expected = (weights @ v.unflatten(-1, (2, 3)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(batch_invariant.attention(q, k, v, 2, mask), expected)


def test_other_dtypes_and_compilers_are_left_alone() -> None:
    layer, x = randomised(batch_invariant.Conv2d(4, 8, 3, padding=1)), normal(2, 4, 5, 5)
    with torch.inference_mode():
        assert (
            batch_invariant.applies(x)
            and not batch_invariant.applies(x.bfloat16())
            and not batch_invariant.applies(x.to("meta"))
        )
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    alone, both = (layer.float().requires_grad_(False)(x[:n])[0] for n in (1, 2))
    assert torch.equal(alone, both), "where no gradient is wanted there need be no context manager"
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        assert "mkldnn" not in str(program.graph), (
            "an exported graph holds operations that other runtimes know"
        )
