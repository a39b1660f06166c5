"""Stable Diffusion 3's network against diffusers' SD3Transformer2DModel: keys, outputs, folders,
ControlNet, guidance by a weaker network.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import (
    PAGCFGJointAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
)
from torch import Tensor

from helpers.models import randomised
from helpers.tensors import assert_close, normal
from sfumato.batching import drive
from sfumato.checkpoints.formats.folder import load_part, save_part
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.errors import UserError
from sfumato.inference.prepack import can_prepack, prepack
from sfumato.kernels import batch_invariant
from sfumato.predict.denoiser import Denoiser, evaluate_calls
from sfumato.predict.guidance.settings import Guidance, build
from sfumato.predict.guidance_models._layer_replacement import replace_layers
from sfumato.predict.guidance_models.perturbed_attention import self_attentions
from sfumato.predict.networks.sd3 import SD3, SD3Config
from sfumato.types import Conditioning

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
}
SMALL |= {
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
}
SMALL |= {"pos_embed_max_size": 12}
KINDS: dict[str, dict[str, Any]] = {
    "SD 3": {},
    "SD 3.5 large": {"qk_norm": "rms_norm"},
    "SD 3.5 medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "two attentions in the last block": {"dual_attention_layers": (0, 2)},
    "one block": {"num_layers": 1, "qk_norm": "rms_norm"},
    "other channels out": {"in_channels": 7, "out_channels": 5},
    "channels out as in": {"out_channels": None},
    "patches of one": {"patch_size": 1, "pos_embed_max_size": 16},
    "patches of three": {
        "patch_size": 3,
        "sample_size": 10,
        "attention_head_dim": 12,
        "caption_projection_dim": 48,
    },
}
SIZES = {1: [(8, 8), (3, 5)], 2: [(8, 8), (6, 14), (24, 2)], 3: [(9, 9), (6, 12)]}
FULL: dict[str, tuple[dict[str, Any], int, int, float]] = {}
"""name: (config, parameters, numbers of the file with the table of places, billions as published).

Configs are those of the published folders (huggingface.co/stabilityai:
stable-diffusion-3-medium-diffusers, stable-diffusion-3.5-medium, stable-diffusion-3.5-large;
transformer/config.json); billions: of their model cards and announcements (2, 2.5, 8.1), which
agree with the files' sizes in 16 bits: 4.17, 4.94 and 16.3 GB.
"""
_FULL = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
}
_FULL |= {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 192}
_MEDIUM = _FULL | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
_NEW = {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
_LARGE = _FULL | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
FULL["SD 3 medium"] = (_MEDIUM, 2_028_328_000, 2_084_951_104, 2.0)
FULL["SD 3.5 medium"] = (_MEDIUM | _NEW, 2_243_171_520, 2_469_663_936, 2.5)
FULL["SD 3.5 large"] = (_LARGE, 8_056_627_520, 8_146_280_768, 8.1)
every = pytest.mark.parametrize("kind", KINDS)


def network_of(kind: str, seed: int = 0, **more: Any) -> SD3:
    # Buffers too: a positional table that is computed anew instead of being read would not show.
    return randomised(SD3(SD3Config(**(SMALL | KINDS[kind] | more))), seed, buffers=True)


def peer_of(network: SD3) -> Any:
    values = {k: v for k, v in network.config.to_dict().items() if k != "_class_name"}
    peer = diffusers.SD3Transformer2DModel(**values).eval().requires_grad_(False)
    peer.load_state_dict(network.state_dict())
    return peer


def inputs(
    network: SD3, size: tuple[int, int], count: int = 2, length: int = 5
) -> tuple[Tensor, Tensor, Conditioning]:
    """x, timesteps and conditionings that differ from image to image."""
    t = torch.tensor([999.0, 123.25, 0.5])[:count]
    cond = Conditioning(tokens=normal(count, length, 12, seed=1), vector=normal(count, 10, seed=2))
    return normal(count, network.config.in_channels, *size, seed=3), t, cond


def diffusers_inputs(cond: Conditioning, t: Tensor) -> dict[str, Any]:
    """The same conditioning as arguments of diffusers' network."""
    return {"encoder_hidden_states": cond.tokens, "pooled_projections": cond.vector, "timestep": t}


def same(network: Any, peer: Any) -> None:
    """Equal keys and shapes, and answers at several sizes and aspects."""
    shapes, peer_shapes = ({k: v.shape for k, v in n.state_dict().items()} for n in (network, peer))
    assert shapes == peer_shapes
    for size in SIZES[network.patch]:
        x, t, cond = inputs(network, size)
        assert_close(network(x, t, cond), peer(x, **diffusers_inputs(cond, t)).sample)


# ---- parity --------------------------------------------------------------------------------------


@every
@torch.inference_mode()
def test_in_both_directions_through_folders(kind: str, tmp_path: Path) -> None:
    network = network_of(kind)
    save_part(tmp_path / "sfumato", network)
    peer = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "sfumato")
    assert all(torch.equal(v, peer.state_dict()[k]) for k, v in network.state_dict().items())
    same(network, peer)
    peer = randomised(
        diffusers.SD3Transformer2DModel(**(SMALL | KINDS[kind])), seed=1, buffers=True
    )
    peer.save_pretrained(tmp_path / "diffusers")
    loaded = load_part(tmp_path / "diffusers", "SD3Transformer2DModel")
    assert isinstance(loaded, SD3) and loaded.config == network.config
    same(loaded, peer)


@pytest.mark.parametrize(
    "values",
    [{}, {"sample_size": 13, "pos_embed_max_size": 7}, {"patch_size": 3, "sample_size": 20}],
    ids=str,
)
def test_the_table_of_places_of_a_new_network(values: dict[str, Any]) -> None:
    """diffusers rounds its table to float32 on the way."""
    network, peer = (
        SD3(SD3Config(**(SMALL | values))),
        diffusers.SD3Transformer2DModel(**(SMALL | values)),
    )
    torch.testing.assert_close(
        network.state_dict()["pos_embed.pos_embed"],
        peer.state_dict()["pos_embed.pos_embed"],
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", FULL)
def test_full_sizes(name: str) -> None:
    values, parameters, numbers, billions = FULL[name]
    with torch.device("meta"):
        network, peer = SD3(SD3Config(**values)), diffusers.SD3Transformer2DModel(**values)
    shapes = {k: v.shape for k, v in network.state_dict().items()}
    assert shapes == {k: v.shape for k, v in peer.state_dict().items()}
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(s.numel() for s in shapes.values()) == numbers
    assert abs(numbers / 1e9 - billions) < 0.1
    assert SD3Config.from_dict(dict(peer.config)) == network.config


@torch.inference_mode()
def test_sides_that_are_no_whole_patches() -> None:
    """The map is padded with its edge to whole patches; the result is cut to its size."""
    network = network_of("SD 3.5 medium")
    peer = peer_of(network)
    for size in ((7, 9), (1, 1), (8, 5)):
        x, t, cond = inputs(network, size)
        whole = torch.nn.functional.pad(x, (0, size[1] % 2, 0, size[0] % 2), mode="replicate")
        assert_close(
            network(x, t, cond),
            peer(whole, **diffusers_inputs(cond, t)).sample[:, :, : size[0], : size[1]],
        )


@every
@torch.inference_mode()
def test_a_masked_token_is_as_none(kind: str) -> None:
    """diffusers has no mask: its network takes the shorter text."""
    network = network_of(kind)
    peer = peer_of(network)
    x, t, cond = inputs(network, SIZES[network.patch][0])
    lengths = (3, 5)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    result = network(x, t, replace(cond, mask=mask))
    for i, length in enumerate(lengths):
        alone = replace(cond[i : i + 1], tokens=cond[i : i + 1].tokens[:, :length])  # pyright: ignore[reportOptionalSubscript]
        assert_close(
            result[i : i + 1], peer(x[i : i + 1], **diffusers_inputs(alone, t[i : i + 1])).sample
        )
    assert (result[0] - network(x, t, cond)[0]).abs().max() > 1e-3


@torch.inference_mode()
def test_every_input_shows_in_the_output() -> None:
    network = network_of("SD 3.5 medium", in_channels=6)
    x, t, cond = inputs(network, (8, 8))
    x, cond = x[:, :4], replace(cond, concat=x[:, 4:])
    assert cond.tokens is not None and cond.vector is not None and cond.concat is not None
    y = network(x, t, cond)
    assert torch.equal(y, network(torch.cat([x, cond.concat], 1), t, replace(cond, concat=None)))
    changes: list[dict[str, Any]] = [
        {"tokens": cond.tokens + 1},
        {"vector": cond.vector + 1},
        {"concat": cond.concat + 1},
    ]
    for change in changes:
        assert (network(x, t, replace(cond, **change)) - y).abs().max() > 1e-3, change
    assert (network(x, t - 0.4, cond) - y).abs().max() > 1e-4
    assert (network(x.roll(2, dims=3), t, cond).roll(-2, dims=3) - y).abs().max() > 1e-3, (
        "places count"
    )


# ---- ControlNet ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@torch.inference_mode()
def test_a_controlnets_residuals(layers: int) -> None:
    """Of a real ControlNet, through `Conditioning.residuals`."""
    network = network_of("SD 3", num_layers=4)
    peer = peer_of(network)
    made = {
        "num_layers": layers,
        "num_extra_conditioning_channels": 0,
        "load_weights_from_transformer": False,
    }
    control = randomised(
        diffusers.SD3ControlNetModel.from_transformer(peer, **made), seed=2, buffers=True
    )
    x, t, cond = inputs(network, (6, 14))
    residuals = control(
        x,
        controlnet_cond=normal(2, 4, 6, 14, seed=5),
        conditioning_scale=0.7,
        return_dict=False,
        **diffusers_inputs(cond, t),
    )[0]
    assert len(residuals) == layers
    result = network(x, t, replace(cond, residuals=tuple(residuals)))
    assert_close(
        result,
        peer(x, block_controlnet_hidden_states=residuals, **diffusers_inputs(cond, t)).sample,
    )
    assert (result - network(x, t, cond)).abs().max() > 1e-3


@torch.inference_mode()
def test_residuals_of_every_number() -> None:
    """n residuals for m blocks, where n does not divide m too.

    After each block the residual that diffusers takes is added.
    """
    network = network_of("SD 3", num_layers=7)
    peer = peer_of(network)
    x, t, cond = inputs(network, (4, 4))
    for count in range(1, 8):
        residuals = tuple(normal(2, 4, 32, seed=10 + i) for i in range(count))
        assert_close(
            network(x, t, replace(cond, residuals=residuals)),
            peer(
                x, block_controlnet_hidden_states=list(residuals), **diffusers_inputs(cond, t)
            ).sample,
        )
    assert torch.equal(network(x, t, replace(cond, residuals=())), network(x, t, cond))
    wrong = [(normal(2, 4, 32),) * 8, (normal(2, 5, 32),), (normal(2, 4, 32), normal(2, 4, 31))]
    for residuals in wrong:
        with pytest.raises(
            UserError,
            match=rf"{len(residuals)} residuals of shapes .*expected at most 7 of \(2, 4, 32\)",
        ):
            network(x, t, replace(cond, residuals=residuals))


# ---- guidance by a weaker network ----------------------------------------------------------------


def denoiser_of(network: SD3) -> Denoiser:
    return Denoiser(network, Process(schedule("flow"), parameterization("flow")))


@pytest.mark.parametrize("layers", [(1,), (0, 2), (1, 2, 3)], ids=str)
@torch.inference_mode()
def test_skipped_blocks(layers: tuple[int, ...]) -> None:
    """As diffusers' pipeline has it: y + scale (y - y without the blocks).

    The last one, and blocks before a residual, too.
    """
    network = network_of("SD 3.5 medium", num_layers=4)
    peer, denoiser = peer_of(network), denoiser_of(network)
    x, _, cond = inputs(network, (8, 6))
    names = "+".join(f"transformer_blocks.{i}" for i in layers)
    for conditioning in (
        cond,
        replace(cond, residuals=(normal(2, 12, 32, seed=7), normal(2, 12, 32, seed=8))),
    ):
        words: dict[str, Any] = diffusers_inputs(conditioning, torch.full((2,), 400.0))
        words |= {"block_controlnet_hidden_states": conditioning.residuals}
        whole, without = (
            peer(x, **words).sample,
            peer(x, **words, skip_layers=list(layers)).sample,
        )
        ask = build(
            Guidance.parse(f"3.8 skip_layers:layers={names}"),
            denoiser,
            conditioning,
            conditioning,
            denoiser.process.schedule.point,
        )
        result = drive(ask(x, 0.4), evaluate_calls)
        expected = denoiser.process.split(x, whole + 2.8 * (whole - without), 0.4)
        assert_close(result.x0, expected.x0, 2e-5)
        assert (whole - without).abs().max() > 1e-3


@torch.inference_mode()
def test_away_from_no_condition_and_from_skipped_blocks() -> None:
    """Both at once, as diffusers' pipeline does from 1 to 20 % of its steps: y_0 + 7 (y - y_0) +
    2.8 (y - y without the blocks).
    """
    network = network_of("SD 3.5 medium")
    peer, denoiser, (x, _, cond) = (
        peer_of(network),
        denoiser_of(network),
        inputs(network, (8, 6)),
    )
    none, t = (
        Conditioning(tokens=normal(2, 5, 12, seed=8), vector=normal(2, 10, seed=9)),
        torch.full((2,), 400.0),
    )
    y, off, without = (
        peer(x, **diffusers_inputs(c, t), skip_layers=s).sample
        for c, s in ((cond, None), (none, None), (cond, [1]))
    )
    words = "7 dual:kind=away,second=3.8 condition skip_layers:layers=transformer_blocks.1"
    result = drive(
        build(Guidance.parse(words), denoiser, cond, none, denoiser.process.schedule.point)(x, 0.4),
        evaluate_calls,
    )
    assert_close(
        result.x0,
        denoiser.process.split(x, off + 7 * (y - off) + 2.8 * (y - without), 0.4).x0,
        5e-5,
    )


@torch.inference_mode()
def test_parts_of_a_block_are_left_out() -> None:
    """A branch that adds nothing, as its last layers are 0, is as one that is left out."""
    silent = {
        "transformer_blocks.0.attn": ["attn.to_out.0", "attn.to_add_out"],
        "transformer_blocks.0.attn2": ["attn2.to_out.0"],
        "transformer_blocks.2.attn": ["attn.to_out.0"],
        "transformer_blocks.1.ff": ["ff.net.2"],
        "transformer_blocks.1.ff_context": ["ff_context.net.2"],
    }
    for layer, last in silent.items():
        network = network_of("SD 3.5 medium")
        denoiser, (x, _, cond) = denoiser_of(network), inputs(network, (8, 8))
        (reference,) = Guidance.parse(f"2 skip_layers:layers={layer}").parts()[2]
        weak, _ = reference.pair(denoiser, cond, cond, None)
        assert (weak(x, 0.5, cond).x0 - denoiser(x, 0.5, cond).x0).abs().max() > 1e-5
        for name in last:
            for parameter in network.get_submodule(
                layer.rpartition(".")[0] + "." + name
            ).parameters():
                parameter.zero_()
        torch.testing.assert_close(weak(x, 0.5, cond).x0, denoiser(x, 0.5, cond).x0)


@torch.inference_mode()
def test_perturbed_attention() -> None:
    """Against diffusers' processor, which is given the plain path and the perturbed one as one
    batch (and passes over norms: SD 3 only).
    """
    network = network_of("SD 3")
    peer = peer_of(network)
    x, text = normal(2, 6, 32), normal(2, 5, 32, seed=1)
    for layer in (1, 2):
        name = f"transformer_blocks.{layer}.attn"
        attention = peer.get_submodule(name)
        attention.set_processor(PAGJointAttnProcessor2_0())
        expected, of_text = (
            y[2:] for y in attention(x.repeat(2, 1, 1), encoder_hidden_states=text.repeat(2, 1, 1))
        )
        result, result_text = replace_layers(
            network, [name], self_attentions, "layer"
        ).get_submodule(name)(x, text)
        assert_close(result, expected)
        assert (result - network.get_submodule(name)(x, text)[0]).abs().max() > 1e-3
        assert (result_text is None) == (layer == 2)
        if result_text is not None:
            assert_close(result_text, of_text)


@torch.inference_mode()
def test_away_from_no_condition_and_from_perturbed_attention() -> None:
    """Both at once, as in diffusers' pipeline, three parts of one batch; and alone, two.

    y_0 + 7 (y - y_0) + 3 (y - y perturbed). diffusers fails with dual blocks: it takes the second
    attention, which has no text, for a joint one.
    """
    network = network_of("SD 3", num_layers=4)
    peer, denoiser, (x, _, cond) = (
        peer_of(network),
        denoiser_of(network),
        inputs(network, (8, 6)),
    )
    none, point = (
        Conditioning(tokens=normal(2, 5, 12, seed=8), vector=normal(2, 10, seed=9)),
        denoiser.process.schedule.point,
    )

    def diffusers_parts(processor: Any, *conds: Conditioning) -> tuple[Tensor, ...]:
        for layer in (1, 2):
            peer.transformer_blocks[layer].attn.set_processor(processor)
        words = diffusers_inputs(Conditioning.cat(conds), torch.full((2 * len(conds),), 400.0))
        return peer(x.repeat(len(conds), 1, 1, 1), **words).sample.chunk(len(conds))

    off, y, worse = diffusers_parts(PAGCFGJointAttnProcessor2_0(), none, cond, cond)
    words = "7 dual:kind=away,second=4 condition perturbed_attention:layers=transformer_blocks.1-2"
    result = drive(
        build(Guidance.parse(words), denoiser, cond, none, point)(x, 0.4), evaluate_calls
    )
    assert_close(
        result.x0, denoiser.process.split(x, off + 7 * (y - off) + 3 * (y - worse), 0.4).x0, 5e-5
    )
    y, worse = diffusers_parts(PAGJointAttnProcessor2_0(), cond, cond)
    result = drive(
        build(
            Guidance.parse("4 perturbed_attention:layers=transformer_blocks.1-2"),
            denoiser,
            cond,
            none,
            point,
        )(x, 0.4),
        evaluate_calls,
    )
    assert_close(result.x0, denoiser.process.split(x, y + 3 * (y - worse), 0.4).x0, 2e-5)
    assert (y - worse).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["SD 3", "SD 3.5 large"])
@torch.inference_mode()
def test_perturbed_attention_is_attention_under_a_map(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain layer, with minus infinity between a place of the picture and every other, and
    where the text is masked.
    """
    network, name = network_of(kind), "transformer_blocks.1.attn"
    x, text, mask = (
        normal(2, 6, 32),
        normal(2, 5, 32, seed=1),
        torch.arange(11) < torch.tensor([9, 11])[:, None],
    )
    perturbed = replace_layers(network, [name], self_attentions, "layer").get_submodule(name)
    result, result_text = perturbed(x, text, mask)
    assert_close(
        result_text, network.get_submodule(name)(x, text, mask)[1], 1e-6
    )  # the text sees all

    def seen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, picture: int) -> Tensor:
        allowed = torch.ones(11, 11, dtype=torch.bool)
        allowed[:picture, :picture] = torch.eye(picture)
        allowed = allowed & mask[:, None, None]
        q, k, v = (p.transpose(1, 2) for p in (q, k, v))
        return (
            ((q @ k.mT / 8**0.5).masked_fill(~allowed, float("-inf")).softmax(-1) @ v)
            .transpose(1, 2)
            .flatten(2)
        )

    monkeypatch.setattr(network.get_submodule(name), "attend_heads", seen)
    assert_close(result, network.get_submodule(name)(x, text, mask)[0])


@torch.inference_mode()
def test_the_second_attention_is_perturbed_to_its_values() -> None:
    network = network_of("SD 3.5 medium")
    x = normal(2, 6, 32)
    plain = network.get_submodule("transformer_blocks.0.attn2")
    perturbed = replace_layers(
        network, ["transformer_blocks.0"], self_attentions, "layer"
    ).get_submodule("transformer_blocks.0.attn2")
    assert_close(perturbed(x), plain.to_out[0](plain.to_v(x)))  # pyright: ignore[reportCallIssue, reportIndexIssue]
    denoiser, (image, _, cond) = denoiser_of(network), inputs(network, (8, 8))
    ask = build(
        Guidance.parse("3 perturbed_attention"),
        denoiser,
        cond,
        cond,
        denoiser.process.schedule.point,
    )
    assert drive(ask(image, 0.5), evaluate_calls).x0.isfinite().all()


# ---- inference -----------------------------------------------------------------------------------


@pytest.mark.invariance
@pytest.mark.parametrize(
    ("kind", "prepare"),
    [
        *((kind, copy.deepcopy) for kind in KINDS),
        ("SD 3.5 medium", prepack),
        ("patches of three", prepack),
    ],
)
def test_bits_do_not_depend_on_the_batch(kind: str, prepare: Callable[[Any], Any]) -> None:
    plain = network_of(kind)
    if prepare is prepack and not can_prepack(plain):
        pytest.skip("this torch has no oneDNN")
    network, count = prepare(plain), 7
    for size in SIZES[plain.patch]:
        x = normal(count, plain.config.in_channels, *size)
        t = 1000 * torch.rand(count, generator=torch.Generator().manual_seed(4))
        mask = (normal(count, 5, seed=5) > -0.5) | (torch.arange(5) == 0)
        cond = Conditioning(
            tokens=normal(count, 5, 12, seed=1), vector=normal(count, 10, seed=2), mask=mask
        )
        with torch.inference_mode():
            alone = [network(x[i : i + 1], t[i : i + 1], cond[i : i + 1])[0] for i in range(count)]
            for begin, end in ((0, 2), (1, 4), (2, 7), (0, 7)):
                together = network(x[begin:end], t[begin:end], cond[begin:end])
                assert all(torch.equal(y, alone[begin + i]) for i, y in enumerate(together))


@pytest.mark.invariance
def test_bits_of_a_perturbed_network_do_not_depend_on_the_batch() -> None:
    network = replace_layers(
        network_of("SD 3.5 medium"), ["transformer_blocks"], self_attentions, "layer"
    )
    x, t, cond = inputs(network_of("SD 3.5 medium"), (6, 14), count=3)
    with torch.inference_mode():
        together = network(x, t, cond)
        assert all(
            torch.equal(network(x[i : i + 1], t[i : i + 1], cond[i : i + 1])[0], together[i])
            for i in range(3)
        )


@torch.inference_mode()
def test_wide_layers_and_more_rows_than_are_taken_at_a_time() -> None:
    """Feed-forward layers take rows by parts, and matrices are large.

    Packed and plain networks are compared with diffusers.
    """
    wide: dict[str, Any] = {
        "num_layers": 2,
        "attention_head_dim": 64,
        "caption_projection_dim": 256,
        "pos_embed_max_size": 40,
    }
    network = network_of("SD 3.5 medium", **wide)
    x, t, cond = inputs(network, (66, 64), length=77)
    expected = peer_of(network)(x, **diffusers_inputs(cond, t)).sample
    assert_close(network(x, t, cond), expected)
    assert torch.equal(network(x, t, cond)[1:], network(x[1:], t[1:], cond[1:]))
    if can_prepack(network):
        quick = prepack(network)
        assert_close(quick(x, t, cond), expected)
        assert torch.equal(quick(x, t, cond)[1:], quick(x[1:], t[1:], cond[1:]))
        assert all(torch.equal(v, network.state_dict()[k]) for k, v in quick.state_dict().items())


@pytest.mark.parametrize("kind", ["SD 3", "SD 3.5 medium"])
@torch.inference_mode()
def test_bfloat16(kind: str) -> None:
    """The error to float32 is as small as that of diffusers."""
    exact = network_of(kind)
    x, t, cond = inputs(exact, (8, 8))
    y = exact(x, t, cond)
    network, narrow, small = (
        copy.deepcopy(exact).bfloat16(),
        cond.to("cpu", torch.bfloat16),
        x.bfloat16(),
    )
    assert narrow.vector is not None and narrow.vector.dtype == torch.float32
    result, words = (
        network(small, t, narrow),
        diffusers_inputs(narrow, t) | {"pooled_projections": narrow.vector.bfloat16()},
    )
    expected = peer_of(exact).bfloat16()(small, **words)
    assert result.dtype == torch.bfloat16
    assert (
        (result - y).square().mean()
        < 1.5 * (expected.sample - y).square().mean()
        < 1e-3 * y.square().mean()
    )
    if can_prepack(network):
        assert (prepack(network)(small, t, narrow) - y).square().mean() < 1.5 * (
            expected.sample - y
        ).square().mean()


# ---- training ------------------------------------------------------------------------------------


@every
def test_every_parameter_that_is_used_gets_a_gradient(kind: str) -> None:
    """All but the text's queries in the last block, whose result is not used.

    The same parameters of diffusers have no gradient.
    """
    network = network_of(kind).requires_grad_(True).train()
    x, t, cond = inputs(network, SIZES[network.patch][0])
    network(x, t, cond).square().mean().backward()
    idle = {name for name, p in network.named_parameters() if p.grad is None}
    assert idle == {
        name for name, p in SD3(network.config).named_parameters() if not p.requires_grad
    }, "nobody waits for what never comes"
    last = f"transformer_blocks.{network.config.num_layers - 1}.attn"
    assert idle == {f"{last}.add_q_proj.weight", f"{last}.add_q_proj.bias"} | (
        {f"{last}.norm_added_q.weight"} if network.config.qk_norm else set()
    )
    assert not [
        name for name, p in network.named_parameters() if p.grad is not None and not p.grad.any()
    ]
    peer = peer_of(network).requires_grad_(True)
    peer(x, **diffusers_inputs(cond, t)).sample.square().mean().backward()
    for (name, p), q in zip(
        sorted(network.named_parameters()),
        (q for _, q in sorted(peer.named_parameters())),
        strict=True,
    ):
        # without norms all keys move by it together, which nothing shows
        if name not in idle and not name.endswith("attn2.to_k.bias"):
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-4, atol=1e-5 * float(q.grad.abs().max())
            )


def test_a_new_network_answers_nothing_and_learns() -> None:
    """adaLN-Zero: gates and the last layer begin at 0."""
    network = SD3(SD3Config(**(SMALL | KINDS["SD 3.5 medium"])))
    x, t, cond = inputs(network, (8, 8))
    assert not network(x, t, cond).any()
    optimizer, losses = torch.optim.AdamW(network.parameters(), 1e-2), []
    for _ in range(8):
        losses.append((network(x, t, cond) - x).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_training_in_mixed_precision() -> None:
    """Under autocast, as in the training loop: gradients near float32's."""
    network = network_of("SD 3.5 medium").requires_grad_(True).train()
    x, t, cond = inputs(network, (8, 8))
    result = []
    for mixed in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = (network(x, t, cond).float() - x).square().mean()
        loss.backward()
        result.append(
            torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        )
    assert torch.cosine_similarity(*result, dim=0) > 0.999


# ---- bad input -----------------------------------------------------------------------------------


@torch.inference_mode()
def test_missing_or_mismatched_parts_are_named() -> None:
    network = network_of("SD 3")
    x, t, cond = inputs(network, (8, 8))
    wrong: list[tuple[Tensor, dict[str, Any], str]] = [
        (
            x,
            {"tokens": None},
            r"reads tokens of width 12: Conditioning.tokens \(B, L, 12\) is missing",
        ),
        (x, {"tokens": normal(2, 5, 11)}, "reads tokens of width 12: .* is 11 wide"),
        (
            x,
            {"vector": None},
            r"reads vector of width 10: Conditioning.vector \(B, 10\) is missing",
        ),
        (x, {"vector": normal(2, 9)}, "reads vector of width 10: .* has 9 numbers"),
        (x[:, :3], {}, "takes 4 channels and was given 3, 0 of them by Conditioning.concat"),
        (
            x,
            {"concat": normal(2, 2, 8, 8)},
            "takes 4 channels and was given 6, 2 of them by Conditioning.concat",
        ),
        (
            normal(2, 4, 26, 8),
            {},
            "a latent of 26 x 8 cells: this MMDiT has positions for 24 x 24 at most; "
            "generate a smaller image",
        ),
        (normal(2, 4, 8, 25), {}, "a latent of 8 x 25 cells"),
    ]
    for image, change, expected in wrong:
        with pytest.raises(UserError, match=expected):
            network(image, t, replace(cond, **change))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_layers": 0}, "num_layers=0: expected a whole number of at least 1"),
        (
            {"patch_size": True},
            "patch_size=True has a value of the wrong kind: expected a whole number",
        ),
        ({"out_channels": 0}, "out_channels=0: expected a whole number"),
        (
            {"caption_projection_dim": 33},
            r"caption_projection_dim 33: expected 32, which is attention_head_dim 8 \* "
            r"num_attention_heads 4",
        ),
        (
            {"qk_norm": "layer_norm"},
            "qk_norm 'layer_norm' is not supported: expected null or 'rms_norm'",
        ),
        (
            {"dual_attention_layers": (0, 3)},
            "dual_attention_layers 3: expected numbers from 0 to 2",
        ),
        (
            {"attention_head_dim": 3, "num_attention_heads": 2, "caption_projection_dim": 6},
            "is 6: expected a multiple of 4",
        ),
        ({"sample_size": 1}, "sample_size 1 is less than patch_size 2"),
        ({"norm_eps": 1e-5}, "config field norm_eps=1e-05 is not known to SD3Config"),
    ],
    ids=str,
)
def test_configs_that_are_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        SD3Config.from_dict({"_class_name": "SD3Transformer2DModel", **SMALL, **values})


def test_attributes_of_the_network() -> None:
    network = network_of("other channels out")
    assert (network.channels, network.in_channels, network.patch, network.part) == (
        5,
        7,
        2,
        "transformer",
    )
    assert (network.token_width, network.vector_width, network.classes, network.is_conditional) == (
        12,
        10,
        0,
        True,
    )
    assert not batch_invariant.FIXED_ORDER or isinstance(prepack(network), SD3)
