"""Networks with packed weights: the plain network's answers to rounding, bits that do not depend on
the batch, the plain weights back.
"""

import copy
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.models import randomised
from helpers.processes import run_python
from sfumato.errors import UserError
from sfumato.inference.prepack import Convolution, Winograd, can_prepack, compile_network, prepack
from sfumato.kernels import batch_invariant, winograd
from sfumato.nn.blocks import Upsample
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.types import Conditioning

CROSS: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
}
UNETS: dict[str, dict[str, Any]] = {
    "convolutions around transformers": CROSS,
    "linear maps around transformers": CROSS | {"use_linear_projection": True},
    "plain attention": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "resnet_time_scale_shift": "scale_shift",
    },
    "many channels": {
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": "UNetMidBlock2D",
        "block_out_channels": (256,),
        "layers_per_block": 1,
    },
}

pytestmark = pytest.mark.skipif(
    not batch_invariant.FIXED_ORDER, reason="networks are packed for oneDNN on AVX2 or later"
)


def unet(name: str, dtype: torch.dtype = torch.float32) -> UNet:
    config = UNetConfig(
        **{"in_channels": 3, "out_channels": 3, "norm_num_groups": 4, "block_out_channels": (8, 16)}
        | UNETS[name]
    )
    return randomised(UNet(config)).to(dtype).requires_grad_(True)


def inputs(count: int, *size: int) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    x, tokens = (
        torch.randn(count, 3, *size, generator=generator),
        torch.randn(count, 5, 12, generator=generator),
    )
    return x, 1000 * torch.rand(count, generator=generator), Conditioning(tokens=tokens)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (40, 36)], ids=str)
@pytest.mark.parametrize("name", UNETS)
@torch.inference_mode()
def test_the_same_to_rounding(name: str, size: tuple[int, int]) -> None:
    """Also more rows than the feed-forward layers take at a time, and sides that do not halve."""
    network = unet(name)
    quick = prepack(network)
    assert any(p.is_mkldnn for p in quick.parameters()), "something was packed"
    assert any(isinstance(m, Winograd) for m in quick.modules()) == (name == "many channels")
    if name == "many channels" and can_prepack(copy.deepcopy(network).bfloat16()):
        coarse = prepack(copy.deepcopy(network).bfloat16())
        assert not any(isinstance(m, Winograd) for m in coarse.modules()), (
            "they round more there: only where they save most"
        )
    x, t, cond = inputs(2, *size)
    expected, result = network(x, t, cond), quick(x, t, cond)
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.invariance
@pytest.mark.parametrize("name", UNETS)
@torch.inference_mode()
def test_bits_do_not_depend_on_the_batch(name: str) -> None:
    quick = prepack(unet(name))
    for size in ((8, 8), (40, 36)):
        x, t, cond = inputs(5, *size)
        together = quick(x, t, cond)
        for i in (0, 4):
            assert torch.equal(quick(x[i : i + 1], t[i : i + 1], cond[i : i + 1])[0], together[i])


@pytest.mark.parametrize("name", ["convolutions around transformers", "many channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_weights_come_back(dtype: torch.dtype, name: str) -> None:
    network = unet(name, dtype)
    if not can_prepack(network):
        pytest.skip(f"this processor has no products of {dtype}")
    quick = prepack(network)
    before, after = network.state_dict(), quick.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) and after[k].dtype == dtype for k in before)
    assert sum(p.numel() for p in quick.parameters()) == sum(
        p.numel() for p in network.parameters()
    )


@torch.inference_mode()
def test_bfloat16_is_as_near_to_float32_as_the_plain_network() -> None:
    network = unet("convolutions around transformers", torch.bfloat16)
    if not can_prepack(network):
        pytest.skip("this processor has no products of bfloat16")
    x, t, cond = inputs(2, 16, 16)
    small, narrow = x.bfloat16(), cond.to("cpu", torch.bfloat16)
    wide = Conditioning(tokens=None if narrow.tokens is None else narrow.tokens.float())
    quick = prepack(network)(small, t, narrow).float()
    plain = network(small, t, narrow).float()
    exact = network.float()(small.float(), t, wide)
    assert (quick - exact).square().mean() < 1.5 * (plain - exact).square().mean()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 8), (40, 70)], ids=str)
def test_fewer_products_are_the_same_convolution(size: tuple[int, int]) -> None:
    """To the last digits of float64; maps of odd sides, and of more tiles than are done at a
    time.
    """
    weight, x, plus = (
        torch.randn(5, 4, 3, 3).double(),
        torch.randn(3, *size, 4).double(),
        torch.randn(3, *size, 5).double(),
    )
    u, bias = [row.clone() for row in winograd.kernels(weight)], torch.randn(5).double()

    def product(i: int, j: int, rows: Tensor, added: Tensor | None) -> Tensor:
        y = rows @ u[i][j].T + (bias if (i, j) in ((0, 1), (3, 1)) else 0)
        return y if added is None else y + added

    result = winograd.convolve(x, 5, product, plus)
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1) + plus
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        winograd.convolve(x, 5, product), expected - plus, atol=1e-12, rtol=1e-12
    )


@torch.inference_mode()
def test_fewer_products_are_as_exact_as_the_kernel_they_replace() -> None:
    conv, x = nn.Conv2d(256, 320, 3, padding=1), torch.randn(2, 256, 20, 22)
    exact = conv.double()(x.double())
    conv.float()
    plain, result = Convolution(conv)(x) - exact, Winograd(conv)(x) - exact
    assert result.square().mean() < plain.square().mean()


@torch.inference_mode()
def test_doubling_is_a_convolution_of_the_doubled_map() -> None:
    for size in ((1, 1), (3, 5), (8, 8)):
        up, x = Upsample(6), torch.randn(2, 6, *size)
        quick = prepack(nn.Sequential(up))
        torch.testing.assert_close(quick(x), up(x), atol=1e-5, rtol=1e-5)


def test_it_is_a_copy_for_inference() -> None:
    """Later changes of the network do not reach the packed one.

    Calls that would be silently wrong are refused.
    """
    network = unet("convolutions around transformers")
    quick, (x, t, cond) = prepack(network), inputs(1, 8, 8)
    with torch.no_grad():
        before = quick(x, t, cond)
        for p in network.parameters():
            p.zero_()
        assert torch.equal(quick(x, t, cond), before)
    assert all(p.requires_grad for p in network.parameters())
    for wrong in (
        lambda: quick.bfloat16(),
        lambda: quick.load_state_dict(network.state_dict()),
        lambda: quick.to("meta"),
    ):
        with pytest.raises(UserError, match="made from"):
            wrong()
    with pytest.raises(UserError, match="gradient"):
        quick(x.requires_grad_(), t, cond)
    assert not can_prepack(network.half()), "float16 is left to torch"


def test_a_model_made_ready(fashion: Any) -> None:
    """Pictures to rounding, the hash and the bits of pictures made alone; the model that it was
    made from is left as it was.
    """
    ready = replace(fashion).optimized()
    assert ready.hash == fashion.hash and ready.describe()["parts"] == fashion.describe()["parts"]
    words = {"steps": 3, "seed": 5, "output": "tensor"}
    expected, result = fashion.generate("bag", n=3, **words), ready.generate("bag", n=3, **words)
    assert (result - expected).abs().max() < 1e-4
    assert torch.equal(ready.generate("bag", **words | {"seed": 7})[0], result[2])
    assert not any(p.is_mkldnn for p in fashion.denoiser.network.parameters())


def test_a_ready_model_is_saved_like_any_other(fashion: Any, tmp_path: Any) -> None:
    from sfumato.loading import load

    fashion.optimized().save(tmp_path / "model")
    assert load(tmp_path / "model").hash == fashion.hash


@torch.inference_mode()
def test_a_copy_of_a_compiled_network_is_its_own() -> None:
    """Guidance weakens copies of the network.

    A copy that still called the compiled network would silently not be weaker.
    """
    network, (x, t, cond) = unet("convolutions around transformers"), inputs(1, 8, 8)
    changed, expected = copy.deepcopy(compile_network(network)), copy.deepcopy(network)
    for one in (changed, expected):
        one.get_parameter("conv_out.bias").add_(1)
    assert torch.equal(changed(x, t, cond), expected(x, t, cond)) and not torch.equal(
        changed(x, t, cond), network(x, t, cond)
    )


COMPILED = """
import torch
from sfumato.inference.prepack import compile_network
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.types import Conditioning

torch.manual_seed(0)
config = UNetConfig(
    in_channels=3, out_channels=3, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
    down_block_types=("DownBlock2D",), mid_block_type="UNetMidBlock2D",
    up_block_types=("UpBlock2D",),
)
network = UNet(config).eval()
x, t, cond = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0]), Conditioning()
with torch.inference_mode():
    quick, expected = compile_network(network), network(x, t, cond)
    result = quick(x, t, cond)
error = (result - expected).abs().max()
assert error < 1e-5 * expected.abs().max(), error
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "it was compiled, in one piece"
assert list(quick.state_dict()) == list(network.state_dict())
"""


KERNELS = """
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from sfumato.kernels import cpu_attention
from sfumato.kernels import batch_invariant
from sfumato.nn.attention import Attention
from sfumato.inference.prepack import compile_network

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention(320, 2, 128)

    def forward(self, x, mask):
        return self.attention(x, None, mask)

torch.manual_seed(0)
network = Layer().eval()
with torch.inference_mode():
    for dtype, least in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        exact = network.to(dtype)
        quick = compile_network(exact)
        for batch, count in ((2, 1030), (3, 1100), (1, 12)):  # the second is compiled for any size
            x = torch.randn(batch, count, 320).to(dtype)
            mask = torch.arange(count) < torch.tensor([[count], [count // 2], [3]])[:batch]
            expected = exact(x, mask)
            quick(x, mask)
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                result = quick(x, mask)
            error = (result - expected).abs().max() / expected.abs().max()
            assert error < least, (dtype, batch, count, error)
            ran = {event.key for event in profiler.key_averages()}
            if batch_invariant.onednn() is not None:
                assert ("sfumato::product" in ran) == (dtype == torch.float32), ran
            if batch_invariant._BFLOAT16:
                long = count >= 1024
                assert ("sfumato::attend" in ran) == (dtype == torch.bfloat16 and long), ran
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("program", [COMPILED, KERNELS], ids=["network", "kernels"])
def test_compiled_is_the_same_to_rounding(program: str) -> None:
    """In a process of its own: the compiler cannot look through the checks of types and shapes that
    tests run with.
    """
    run_python("-c", program)
