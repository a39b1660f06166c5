"""References of guidance: weaker copies share every parameter of the network.

They change the named layers and nothing else.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

import sfumato.kernels.batch_invariant
from helpers.models import random_network
from helpers.tensors import normal
from sfumato.batching import DenoiserCall, drive, gather
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.errors import UserError
from sfumato.predict.denoiser import Denoiser, evaluate_calls
from sfumato.predict.guidance.settings import Guidance, build
from sfumato.predict.guidance_models import _layer_replacement
from sfumato.predict.guidance_models.perturbed_attention import PerturbedAttention
from sfumato.predict.guidance_models.skip_layers import SkipLayers
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.types import Conditioning

COMMON: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}
COMMON |= {"layers_per_block": 1, "attention_head_dim": 4}
KINDS: dict[str, dict[str, Any]] = {
    "self": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "cross": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
    },
}
ATTENTION = {
    "self": ["down_blocks.1", "up_blocks.0"],
    "cross": ["down_blocks.0", "mid_block", "up_blocks.1"],
}
every = pytest.mark.parametrize("kind", KINDS)


def setup(kind: str, seed: int = 0, **more: Any) -> tuple[Denoiser, Tensor, Conditioning]:
    network = random_network(lambda: UNet(UNetConfig(**(COMMON | KINDS[kind] | more))), seed)
    denoiser = Denoiser(network, Process(schedule("flow"), parameterization("flow")))
    return (
        denoiser,
        normal(3, 2, 8, 8, seed=1),
        Conditioning(tokens=normal(3, 5, 12, seed=2) if kind == "cross" else None),
    )


def weaker(reference: Any, denoiser: Denoiser, cond: Conditioning) -> Denoiser:
    weak, same = reference.pair(denoiser, cond, Conditioning(), None)
    assert same is cond  # the same condition: the network itself is weaker
    return weak


@every
@torch.inference_mode()
def test_perturbed_attention_is_attention_by_the_identity(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every self-attention map forced to the identity in the original, both are one network:
    softmax(...) V is V.
    """
    denoiser, x, cond = setup(kind)
    weak = weaker(PerturbedAttention(tuple(ATTENTION[kind])), denoiser, cond)
    result, plain = weak(x, 0.5, cond), denoiser(x, 0.5, cond)
    assert (result.x0 - plain.x0).abs().max() > 1e-3

    def identity(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        # to itself: the condition has five tokens, feature maps have 16 or 64 places
        if q.shape[2] == k.shape[2]:
            return torch.eye(q.shape[2]) @ v
        return true(q, k, v, attn_mask=attn_mask)

    true = F.scaled_dot_product_attention
    monkeypatch.setattr(sfumato.kernels.batch_invariant.F, "scaled_dot_product_attention", identity)
    forced = denoiser(x, 0.5, cond)
    torch.testing.assert_close(result.x0, forced.x0, rtol=1e-5, atol=1e-5)
    again = weak(x, 0.5, cond)
    # where maps are the identity it changes nothing
    torch.testing.assert_close(again.x0, forced.x0, rtol=1e-5, atol=1e-5)


@every
@torch.inference_mode()
def test_only_the_named_layers_are_perturbed(kind: str) -> None:
    denoiser, x, cond = setup(kind)
    each = [
        weaker(PerturbedAttention((layer,)), denoiser, cond)(x, 0.5, cond).x0
        for layer in ATTENTION[kind]
    ]
    both = weaker(PerturbedAttention(tuple(ATTENTION[kind])), denoiser, cond)(x, 0.5, cond).x0
    different = [denoiser(x, 0.5, cond).x0, *each, both]
    assert all((a - b).abs().max() > 1e-5 for i, a in enumerate(different) for b in different[:i])
    name = ATTENTION[kind][0] + ".attentions.0"
    assert torch.equal(
        weaker(PerturbedAttention((name,)), denoiser, cond)(x, 0.5, cond).x0, each[0]
    )


@every
@pytest.mark.parametrize(
    "reference", [PerturbedAttention(("up_blocks",)), SkipLayers(("up_blocks",))]
)
def test_a_copy_shares_every_parameter_and_leaves_the_original_alone(
    kind: str, reference: Any
) -> None:
    denoiser, x, cond = setup(kind)
    before = {name: id(module) for name, module in denoiser.network.named_modules()}
    plain = denoiser(x, 0.5, cond)
    weak = weaker(reference, denoiser, cond)
    parameters = {id(p) for p in denoiser.network.parameters()}
    assert (
        all(id(p) in parameters for p in weak.network.parameters())
        and weak.process is denoiser.process
    )
    modules = {id(m) for m in denoiser.network.modules()}
    assert not any(id(m) in modules for m in weak.network.modules()), (
        "modules are its own: replacing one must not reach the original"
    )
    assert before == {name: id(module) for name, module in denoiser.network.named_modules()}
    assert torch.equal(denoiser(x, 0.5, cond).x0, plain.x0)
    first = weak(x, 0.5, cond).x0
    with torch.no_grad():
        denoiser.network.conv_out.weight.mul_(1.5)
    assert not torch.allclose(weak(x, 0.5, cond).x0, first), "it follows the weights"


@torch.inference_mode()
def test_skipped_layers_add_nothing() -> None:
    """A residual branch whose last layer is zero adds nothing: leaving it out is then no change,
    for each kind of layer.
    """
    silent = {
        "down_blocks.0.resnets.0": ["conv2"],
        "down_blocks.1.resnets.0": ["conv2"],  # with a shortcut, which stays
        "mid_block.attentions.0": ["proj_out"],
        "mid_block.attentions.0.transformer_blocks.0": [
            "attn1.to_out.0",
            "attn2.to_out.0",
            "ff.net.2",
        ],
        "mid_block.attentions.0.transformer_blocks.0.attn1": ["to_out.0"],
        "mid_block.attentions.0.transformer_blocks.0.attn2": ["to_out.0"],
        "mid_block.attentions.0.transformer_blocks.0.ff": ["net.2"],
    }
    for layer, last in silent.items():
        denoiser, x, cond = setup("cross")
        weak = weaker(SkipLayers((layer,)), denoiser, cond)
        assert (weak(x, 0.5, cond).x0 - denoiser(x, 0.5, cond).x0).abs().max() > 1e-5
        for name in last:
            for parameter in denoiser.network.get_submodule(f"{layer}.{name}").parameters():
                parameter.zero_()
        torch.testing.assert_close(weak(x, 0.5, cond).x0, denoiser(x, 0.5, cond).x0)
    denoiser, x, cond = setup("self")
    weak = weaker(SkipLayers(("down_blocks.1.attentions",)), denoiser, cond)
    for parameter in denoiser.network.down_blocks[1].attentions[0].to_out[0].parameters():
        parameter.zero_()
    torch.testing.assert_close(weak(x, 0.5, cond).x0, denoiser(x, 0.5, cond).x0)


@every
@torch.inference_mode()
def test_a_block_is_left_out_with_all_that_is_in_it(kind: str) -> None:
    denoiser, x, cond = setup(kind)
    names = [f"up_blocks.0.resnets.{i}" for i in range(2)] + (
        [f"up_blocks.0.attentions.{i}" for i in range(2)] if kind == "self" else []
    )
    one, many = (
        weaker(SkipLayers(tuple(layers)), denoiser, cond)(x, 0.5, cond)
        for layers in (["up_blocks.0"], names)
    )
    assert torch.equal(one.x0, many.x0)
    nested = weaker(
        SkipLayers(("up_blocks", "up_blocks.0", "up_blocks.0.resnets.0")), denoiser, cond
    )(x, 0.5, cond)
    assert torch.equal(
        nested.x0, weaker(SkipLayers(("up_blocks",)), denoiser, cond)(x, 0.5, cond).x0
    )


@pytest.mark.parametrize(
    ("kind", "reference", "message"),
    [
        (
            "self",
            PerturbedAttention(("mid_block",)),
            "unknown layer with self-attention 'mid_block': "
            ".*expected one of down_blocks.1, down_blocks.1.attentions.0, up_bl",
        ),
        (
            "cross",
            PerturbedAttention(("mid",)),
            "unknown layer with self-attention 'mid': did you mean 'mid_block'",
        ),
        (
            "cross",
            PerturbedAttention(("mid_block", "down_blocks.1")),
            "unknown layer with self-attention 'down_blocks.1'",
        ),
        (
            "cross",
            PerturbedAttention(("mid_block.attentions.0.transformer_blocks.0.attn2",)),
            "unknown layer with self-attention",
        ),
        (
            "self",
            SkipLayers(("mid_block.attentions",)),
            "unknown layer that can be left out 'mid_block.attentions'",
        ),
        (
            "cross",
            SkipLayers(("conv_in",)),
            "unknown layer that can be left out 'conv_in': .*expected one of down_blocks.0",
        ),
        ("cross", SkipLayers(("",)), "unknown layer that can be left out ''"),
    ],
)
def test_layers_that_are_not_there_are_refused(kind: str, reference: Any, message: str) -> None:
    denoiser, _, cond = setup(kind)
    with pytest.raises(UserError, match=message):
        weaker(reference, denoiser, cond)


NUMBERED = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from(["", ".attn", ".ff.0", ".attentions.3.attn1"])),
    unique=True,
)


@given(st.sampled_from(["blocks", "up_blocks.2.attentions", "mid"]), NUMBERED)
def test_names_that_differ_in_numbers_are_gathered_and_spread_again(
    block: str, ends: list[tuple[int, str]]
) -> None:
    names = [f"{block}.{k}{end}" for k, end in ends]
    short = _layer_replacement.collapse_ranges(names)
    assert sorted(one for name in short for one in _layer_replacement.expand_range(name)) == sorted(
        names
    )
    assert len(short) <= len(names)


def test_runs_of_layers() -> None:
    """a.1-2.b is a.1.b and a.2.b; every name that the error lists is accepted."""
    names = [f"{group}.{i}" for group in ("up", "down") for i in range(3)] + [
        "up.0.attn",
        "up.1.attn",
        "up.7",
        "mid",
    ]
    assert _layer_replacement.collapse_ranges(names) == [
        "down.0-2",
        "mid",
        "up.0-1.attn",
        "up.0-2",
        "up.7",
    ]
    assert [*_layer_replacement.expand_range("a.1-2.b.0-1")] == [
        "a.1.b.0",
        "a.1.b.1",
        "a.2.b.0",
        "a.2.b.1",
    ]
    assert [*_layer_replacement.expand_range("a.2-1")] == ["a.2-1"] and [
        *_layer_replacement.expand_range("a-1.x1-2")
    ] == ["a-1.x1-2"]
    denoiser, x, cond = setup("cross")
    with torch.inference_mode():
        for kind, named in (
            (SkipLayers, "up_blocks.0.resnets.0-1"),
            (PerturbedAttention, "up_blocks.1.attentions.0-1"),
        ):
            apart = (named.replace("0-1", "0"), named.replace("0-1", "1"))
            one, both = (
                weaker(kind(layers), denoiser, cond)(x, 0.5, cond).x0
                for layers in ((named,), apart)
            )
            assert torch.equal(one, both)
    with pytest.raises(
        UserError, match=r"unknown layer that can be left out 'up_blocks.0.resnets.2': "
    ):
        weaker(SkipLayers(("up_blocks.0.resnets.0-999999999",)), denoiser, cond)


@torch.inference_mode()
def test_a_first_attention_to_the_condition_alone_is_not_perturbed() -> None:
    """`only_cross_attention`: it is no attention of the picture to itself."""
    denoiser, x, cond = setup("cross", only_cross_attention=(True, False))
    with pytest.raises(
        UserError,
        match=r"unknown layer with self-attention 'down_blocks.0': .*expected one of mid_block",
    ):
        weaker(PerturbedAttention(("down_blocks.0",)), denoiser, cond)
    assert weaker(PerturbedAttention(), denoiser, cond)(x, 0.5, cond).x0.isfinite().all()


@every
@torch.inference_mode()
def test_no_layers_means_the_deepest_attention_that_there_is(kind: str) -> None:
    """The middle block's where it has any, else that of the last block of the way down that has."""
    denoiser, x, cond = setup(kind)
    named = "mid_block" if kind == "cross" else "down_blocks.1"
    for reference in (PerturbedAttention, SkipLayers):
        layers = (named,) if reference is PerturbedAttention else (f"{named}.attentions",)
        assert torch.equal(
            weaker(reference(), denoiser, cond)(x, 0.5, cond).x0,
            weaker(reference(layers), denoiser, cond)(x, 0.5, cond).x0,
        )


def test_a_copy_is_made_once_and_goes_with_its_denoiser() -> None:
    denoiser, x, cond = setup("cross")
    reference = PerturbedAttention()
    weak = weaker(reference, denoiser, cond)
    assert (
        weaker(PerturbedAttention(), denoiser, cond) is weak
        and weaker(SkipLayers(), denoiser, cond) is not weak
    )
    other, _, _ = setup("cross")
    assert weaker(reference, other, cond) is not weak
    # a part is swapped: an old copy would not follow
    denoiser.network.conv_out = torch.nn.Conv2d(8, 2, 3, padding=1)
    fresh = weaker(reference, denoiser, cond)
    assert fresh is not weak and fresh.network.conv_out.weight is denoiser.network.conv_out.weight
    denoiser.network.train()
    assert weaker(reference, denoiser, cond).network.training
    kept, gone = len(_layer_replacement._CACHE), weakref.ref(denoiser.network)
    del denoiser, weak, fresh, x
    gc.collect()
    assert gone() is None and len(_layer_replacement._CACHE) < kept


def counting(passes: list[list[int]]) -> Callable[[list[DenoiserCall]], list]:
    """Evaluate calls and count the images of each denoiser.

    Denoisers come in the order of their first calls.
    """

    def answers(queries: list[DenoiserCall]) -> list:
        sizes: dict[int, int] = {}
        for query in queries:
            sizes[id(query.denoiser)] = sizes.get(id(query.denoiser), 0) + len(query.x)
        passes.append(list(sizes.values()))
        return evaluate_calls(queries)

    return answers


@torch.inference_mode()
def test_weaker_networks_are_evaluated_where_they_count_and_runs_share_them() -> None:
    denoiser, x, cond = setup("cross")
    point = denoiser.process.schedule.point
    guidance = Guidance.parse("3 perturbed_attention interval:low=0.3,high=0.7")
    passes: list[list[int]] = []
    # equal conditionings: no difference here
    asks = [build(guidance, denoiser, cond, cond, point) for _ in range(2)]
    for t in (0.9, 0.5, 0.1):
        drive(gather([ask(x, t) for ask in asks]), counting(passes))
    assert passes == [[6], [6, 6], [6]]
    dual = build(
        Guidance.parse("3 dual:kind=away,second=2 condition skip_layers"),
        denoiser,
        cond,
        Conditioning(tokens=0 * cond.tokens),
        point,
    )
    passes.clear()
    result = drive(dual(x, 0.5), counting(passes))
    assert passes == [[6, 3]]
    on, off = denoiser(x, 0.5, cond), denoiser(x, 0.5, Conditioning(tokens=0 * cond.tokens))
    bad = weaker(SkipLayers(), denoiser, cond)(x, 0.5, cond)
    torch.testing.assert_close(result.x0, on.x0 + 2 * (on.x0 - off.x0) + (on.x0 - bad.x0))


@torch.inference_mode()
def test_autoguidance_is_the_line_through_two_models() -> None:
    """x0 = weak + w (strong - weak), both under the same condition (Karras et al. 2024)."""
    denoiser, x, cond = setup("cross")
    small, _, _ = setup("cross", seed=9)
    on, off = denoiser(x, 0.4, cond), small(x, 0.4, cond)
    for w in (1.0, 1.5, 2.5):
        ask = build(
            Guidance.parse(f"{w} model:path=small"),
            denoiser,
            cond,
            cond,
            denoiser.process.schedule.point,
            guide_model=small,
        )
        result = drive(ask(x, 0.4), evaluate_calls)
        for a, b, c in ((result.x0, on.x0, off.x0), (result.eps, on.eps, off.eps)):
            torch.testing.assert_close(a, c + w * (b - c), rtol=1e-5, atol=1e-5)
    with pytest.raises(
        UserError, match=r"a weaker model \(small\) needs that model's denoiser: none was given"
    ):
        build(
            Guidance.parse("2 model:path=small"),
            denoiser,
            cond,
            cond,
            denoiser.process.schedule.point,
        )
    cosine = Denoiser(small.network, Process(schedule("cosine"), parameterization("v")))
    with pytest.raises(
        UserError, match="has the schedule cosine, the model flow: expected the same one"
    ):
        build(
            Guidance.parse("2 model"),
            denoiser,
            cond,
            cond,
            denoiser.process.schedule.point,
            guide_model=cosine,
        )
