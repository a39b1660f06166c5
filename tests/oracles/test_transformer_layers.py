"""Layers of transformers against their formulas, and against what their formulas promise."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.tensors import normal
from sfumato.kernels import attention_backend, batch_invariant, cpu_attention
from sfumato.nn.attention import FeedForward
from sfumato.nn.embeddings import PatchEmbed, padded, sincos_2d, unpatched
from sfumato.nn.modulation import Modulation, RMSNorm, gated, modulated
from sfumato.nn.rope import angles, grid, rotate

# ---- rotary places -------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(-20, 20), st.integers(-20, 20))
def test_products_of_rotated_vectors_depend_on_the_distance_alone(
    row: int, column: int, down: int, right: int
) -> None:
    q, k = normal(1, 1, 2, 16), normal(1, 1, 2, 16, seed=1)

    def product(at: tuple[int, int], other: tuple[int, int]) -> Tensor:
        one, two = (
            angles(torch.tensor([place], dtype=torch.float32), (8, 8)) for place in (at, other)
        )
        return (rotate(q, one) * rotate(k, two)).sum(-1)

    here, moved = (
        product((0, 0), (row, column)),
        product((down, right), (row + down, column + right)),
    )
    torch.testing.assert_close(here, moved, atol=2e-4, rtol=1e-4)


def test_a_turn_is_a_multiplication_of_complex_numbers() -> None:
    x, places = normal(2, 6, 3, 8), grid(2, 3)
    turned = rotate(x, angles(places, (4, 4), theta=100.0))
    z = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    angle = torch.cat(
        [places[:, :1] * torch.tensor([1.0, 0.1]), places[:, 1:] * torch.tensor([1.0, 0.1])], 1
    )
    expected = torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(
        -2
    )
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_the_gradient_of_a_turn() -> None:
    turn = angles(grid(2, 2), (2, 2))
    x, weights = normal(1, 4, 1, 4).requires_grad_(), normal(1, 4, 1, 4, seed=1)
    (rotate(x, turn) * weights).sum().backward()
    back = torch.stack([turn[..., 0], -turn[..., 1]], -1)
    torch.testing.assert_close(x.grad, rotate(weights, back))
    half = x.detach().bfloat16().requires_grad_()
    rotate(half, turn).sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


# ---- norms, gates, feed-forward ------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_modulation_is_its_formula_with_and_without_gradients(count: int) -> None:
    x, scale, shift = (
        normal(count, 5, 12),
        normal(count, 1, 12, seed=1),
        normal(count, 1, 12, seed=2),
    )
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    expected = (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift
    torch.testing.assert_close(modulated(x, scale, shift), expected, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(modulated(x, scale, shift), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gated(x, scale, shift.expand_as(x)), x + scale * shift)


def test_modulation_begins_as_its_weights_are_initialised() -> None:
    layer, embedding = Modulation(6, 3), normal(2, 6)
    parts = layer(embedding)
    expected = F.linear(F.silu(embedding), layer.linear.weight, layer.linear.bias)
    assert len(parts) == 3 and parts[0].shape == (2, 1, 6)
    torch.testing.assert_close(torch.cat(parts, -1)[:, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rms_norm_is_torchs(dtype: torch.dtype) -> None:
    norm, x = RMSNorm(16, eps=1e-5), (3 * normal(4, 7, 16)).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(normal(16, seed=1))
    expected = F.rms_norm(x.double(), (16,), norm.weight.double(), 1e-5)
    error = (norm.to(dtype)(x).double() - expected).norm() / expected.norm()
    bounds = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float64: 1e-14}
    assert float(error) < bounds[dtype]


def test_feed_forwards_are_their_formulas() -> None:
    x = normal(2, 5, 8)
    for kind in ("gelu", "swiglu", "geglu"):
        layer = FeedForward(8, kind, 12, bias=kind != "swiglu")
        first, last = layer.net[0].proj, layer.net[2]
        y = first(x)
        if kind == "gelu":
            inner = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        else:
            a, b = y.chunk(2, -1)
            inner = a * torch.sigmoid(a) * b if kind == "swiglu" else a * F.gelu(b)
        torch.testing.assert_close(layer(x), last(inner), atol=1e-6, rtol=1e-5)
        assert (last.bias is None) == (kind == "swiglu")


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_training_is_attention_in_inference(masked: bool) -> None:
    """Few tokens in bfloat16 are trained by plain products: the same numbers, and the same
    gradients, to its rounding.
    """
    q, k, v = (normal(2, count, 3, 16, seed=s) for s, count in ((0, 20), (1, 30), (2, 30)))
    mask = (torch.arange(30) < torch.tensor([[30], [11]])) if masked else None
    result = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [p.to(dtype).detach().clone().requires_grad_() for p in (q, k, v)]
        y = batch_invariant.attend(*leaves, mask)
        (y.float() * normal(*y.shape, seed=5)).sum().backward()
        result.append([y.detach(), *(p.grad for p in leaves)])
    for exact, half in zip(*result, strict=True):
        assert half is not None and half.dtype == torch.bfloat16
        assert float((half.float() - exact).norm() / exact.norm()) < 0.02
    with torch.inference_mode():
        torch.testing.assert_close(
            batch_invariant.attend(q, k, v, mask), result[0][0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("width, count", [(128, 1030), (64, 2050)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_blocks_is_attention(width: int, count: int, masked: bool) -> None:
    """In bfloat16, many tokens: about as near to the exact result as torch's own kernel, whatever
    the scores, or not done at all.
    """
    mask = (torch.arange(count) < torch.tensor([[count], [701]])) if masked else None
    for strength in (1.0, 2.0, 8.0):
        q, k, v = (normal(2, count, 2, width, seed=s) for s in range(3))
        q, k = (strength * F.rms_norm(x, (width,)) for x in (q, 0.6 * k + 0.4 * q.roll(1, 1)))
        q, k, v = (x.bfloat16() for x in (q, k, v))
        exact = batch_invariant.attend(q.double(), k.double(), v.double(), mask)
        with torch.inference_mode():
            assert cpu_attention.fits(q, k)
            onednn = batch_invariant.onednn()
            result = (
                None
                if onednn is None or not onednn._is_mkldnn_bf16_supported()
                else cpu_attention.attend(q, k, v, mask, onednn)
            )
            used = batch_invariant.attend(q, k, v, mask)
        bits = mask is None and F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        ).transpose(1, 2).flatten(2)
        limit = (
            0.006
            if mask is not None
            else 2.5 * float((bits.double() - exact).norm() / exact.norm())
        )  # pyright: ignore
        for y in (used, result):
            assert y is None or float((y.double() - exact).norm() / exact.norm()) < max(
                limit, 0.004
            )
        assert result is None if strength == 8.0 else (result is None or torch.equal(result, used))


def test_attention_in_blocks_leaves_other_inputs_to_torch() -> None:
    q = normal(1, 1024, 1, 128)
    with torch.inference_mode():
        assert not cpu_attention.fits(q, q) and not cpu_attention.fits(
            q[:, :1000].bfloat16(), q.bfloat16()
        )
        assert not cpu_attention.fits(q[..., :64].bfloat16(), q[..., :64].bfloat16())
    assert not cpu_attention.fits(q.bfloat16(), q.bfloat16())  # a gradient may be needed


def test_the_attention_backend_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    attention_backend._log_once.cache_clear()
    q = normal(1, 1024, 1, 16)
    with caplog.at_level("INFO", logger="sfumato"), torch.inference_mode():
        for _ in range(3):
            batch_invariant.attend(q, q, q)
        batch_invariant.attend(q[:, :1000], q[:, :1000], q[:, :1000])  # too few to be worth a word
        assert [r.levelname for r in caplog.records] == ["INFO"] and "flash" in caplog.text
        attention_backend.report("math", q, 1024, 1024, False)
        attention_backend.report("math", q, 1024, 1024, False)
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING"]
    heads = q.transpose(1, 2)
    assert attention_backend.sdpa_backend(heads, heads, heads, None) == "flash"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counting_attention_reports_nothing(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """On the meta device, on which `sfumato info` runs networks, torch has its plain way for
    everything.
    """
    attention_backend._log_once.cache_clear()
    q = torch.empty(1, 1024, 1, 16, device="meta", dtype=dtype)
    with caplog.at_level("INFO", logger="sfumato"), torch.inference_mode():
        batch_invariant.attend(q, q, q)
    assert not caplog.records


# ---- patches and places --------------------------------------------------------------------------


def test_unpatched_undoes_patches() -> None:
    x = normal(2, 3, 6, 10)
    patches = x.reshape(2, 3, 3, 2, 5, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 15, 12)
    assert torch.equal(unpatched(patches, 3, 2), x)
    embed = PatchEmbed(3, 12, 2)
    with torch.no_grad():
        embed.proj.weight.copy_(torch.eye(12).reshape(12, 2, 2, 3).permute(0, 3, 1, 2))
        embed.proj.bias.zero_()
    torch.testing.assert_close(unpatched(embed(x), 3, 2), x)


def test_padding_goes_on_with_the_edge() -> None:
    x = normal(1, 2, 5, 4)
    y = padded(x, 3)
    assert y.shape == (1, 2, 6, 6) and torch.equal(y[..., :5, :4], x)
    assert torch.equal(y[..., 5, :4], x[..., 4, :]) and torch.equal(y[..., :5, 5], x[..., 3])
    assert padded(x, 1) is x


def test_positions_are_stretched_over_the_trained_ones() -> None:
    """A map twice as large has every trained place, and places between them."""
    small, large = sincos_2d(16, 4, 4, 4), sincos_2d(16, 8, 8, 4)
    torch.testing.assert_close(large.reshape(8, 8, 16)[::2, ::2].flatten(0, 1), small)
    torch.testing.assert_close(sincos_2d(16, 8, 8, 8, 2.0), large)
    wide = sincos_2d(16, 4, 8, 4).reshape(4, 8, 16)
    torch.testing.assert_close(wide[:, ::2].flatten(0, 1), small)
    # the column comes first, and its sine
    torch.testing.assert_close(small[1, 0], torch.tensor(1.0).sin())
