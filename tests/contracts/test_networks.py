"""Every network of the folder keeps the promises of `base.py`: found by its file, built small from
its own config.

A new network is tested without being named here, as long as its config speaks the field's usual
names (see SMALL).
"""

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.models import random_network
from helpers.tensors import normal
from sfumato.checkpoints.formats.folder import load_part, save_part
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.errors import UserError
from sfumato.inference.prepack import can_prepack, prepack
from sfumato.kernels import batch_invariant
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.guidance_models.perturbed_attention import PerturbedAttention, self_attentions
from sfumato.predict.guidance_models.skip_layers import SkipLayers, branches
from sfumato.predict.networks.base import Network, build, registered
from sfumato.types import Conditioning

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 12,
    "caption_channels": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 10,
    "cross_attention_dim": 32,
    "pos_embed_max_size": 12,
    "axes_dims_rope": (4, 6, 6),
    "num_embeds_ada_norm": 5,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 12,
    "axes_dims": (4, 6, 6),
}
ONE_OF: dict[str, dict[str, Any]] = {
    "UNet2DModel": {"attention_head_dim": 8, "num_attention_heads": None}
}
ONE_OF |= {"UNet2DConditionModel": {"attention_head_dim": 8, "num_class_embeds": 6}}
ONE_OF |= {
    "SfumatoUNet2DModel": {"attention_head_dim": None, "num_attention_heads": 2},
    "SfumatoDiT": {"num_class_embeds": 6},
}
ONE_OF |= {"Flux2Transformer2DModel": {"axes_dims_rope": (4, 4, 4, 4)}}
UNUSED_WEIGHTS = {"SD3Transformer2DModel": "transformer_blocks.1.attn.add_q_proj"}
"""Published weights that no output depends on: the queries of text in the last block."""
# others choose one of these
NETWORKS = sorted(name for name, (_, config) in registered().items() if is_dataclass(config))
SIZES = [(8, 8), (12, 6), (7, 9)]
TRANSFORMERS = [name for name in NETWORKS if registered()[name][0].part == "transformer"]
PARTS = ("attn", "attn1", "attn2", "attention", "ff", "ff_context", "feed_forward")
"""Names of a block's attention and feed-forward layers."""


def small(name: str) -> Network:
    """A network of which every weight shows, at rest."""
    config_class = registered()[name][1]
    names = {f.name for f in fields(config_class)}
    values = {key: value for key, value in SMALL.items() if key in names} | ONE_OF.get(name, {})
    network = random_network(lambda: build(config_class(**values)))
    assert isinstance(network, Network)
    return network.requires_grad_(True)


def conditions(network: Network, n: int, size: tuple[int, int]) -> Conditioning:
    """Something through every door that the network has."""
    width, vector = network.token_width, network.vector_width
    if network.classes:
        vectors = torch.eye(network.classes)[torch.arange(n) % network.classes]
    else:
        vectors = None if vector is None else 30 * normal(n, vector, seed=1).abs()
    if network.guidance_embeds:
        strength = 3 + torch.arange(n, dtype=torch.float32)[:, None]
        vectors = strength if vectors is None else torch.cat([vectors, strength], 1)
    extra = network.in_channels - network.channels
    return Conditioning(
        tokens=None
        if width is None
        else normal(n, 5, width if isinstance(width, int) else width[0], seed=2),
        vector=vectors,
        concat=normal(n, extra, *size, seed=3) if extra > 0 else None,
    )


def inputs(
    network: Network, n: int = 3, size: tuple[int, int] = (8, 8)
) -> tuple[Tensor, Tensor, Conditioning]:
    return (
        normal(n, network.channels, *size),
        1000 * (torch.arange(n) + 0.5) / n,
        conditions(network, n, size),
    )


@pytest.mark.invariance
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_image_has_the_bits_that_it_has_alone(name: str, size: tuple[int, int]) -> None:
    network = small(name)
    x, t, cond = inputs(network, 5, size)
    with torch.inference_mode():
        whole = network(x, t, cond)
        alone = torch.cat([network(x[k : k + 1], t[k : k + 1], cond[k : k + 1]) for k in range(5)])
    assert whole.shape[0] == 5 and whole.shape[2:] == size and whole.shape[1] >= network.channels
    assert torch.equal(whole, alone)
    assert len({float(row.sum()) for row in whole}) == 5


@pytest.mark.parametrize("name", NETWORKS)
def test_all_that_comes_in_is_heard(name: str) -> None:
    """x, the time and whatever comes through the doors change the answer."""
    network = small(name)
    x, t, cond = inputs(network)
    with torch.inference_mode():
        y = network(x, t, cond)
        assert not torch.allclose(network(x + 0.1, t, cond), y)
        assert not torch.allclose(network(x, t + 100, cond), y)
        for door in ("tokens", "vector"):
            value = getattr(cond, door)
            if value is not None and network.is_conditional:
                changed = Conditioning(**_with(cond, door, value.roll(1, 0)))
                assert not torch.allclose(network(x, t, changed), y), door


def _with(cond: Conditioning, door: str, value: Any) -> dict[str, Any]:
    return {f.name: value if f.name == door else getattr(cond, f.name) for f in fields(cond)}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_masked_token_is_as_if_it_were_not_there(name: str) -> None:
    network = small(name)
    if network.token_width is None:
        pytest.skip("it reads no tokens")
    x, t, cond = inputs(network)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    assert cond.tokens is not None
    with torch.inference_mode():
        one = network(
            x,
            t,
            Conditioning(**_with(Conditioning(**_with(cond, "mask", mask)), "tokens", cond.tokens)),
        )
        other = cond.tokens.clone()
        other[1, 3:] = 7.0
        two = network(
            x, t, Conditioning(**_with(Conditioning(**_with(cond, "mask", mask)), "tokens", other))
        )
        unmasked = network(x, t, cond)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(one[1], unmasked[1], atol=1e-4) and torch.allclose(
        one[0], unmasked[0], atol=1e-4
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_missing_parts_are_named_in_one_sentence(name: str) -> None:
    network = small(name)
    x, t, cond = inputs(network)
    for door in ("tokens", "vector"):
        if getattr(cond, door) is not None and (
            door == "tokens" or network.classes or network.guidance_embeds
        ):
            with pytest.raises(UserError, match=door):
                network(x, t, Conditioning(**_with(cond, door, None)))
    with pytest.raises(UserError, match="channels"):
        network(torch.cat([x, x], 1), t, cond)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folder_gives_the_same_network_back(name: str, tmp_path: Path) -> None:
    network = small(name)
    save_part(tmp_path, network)
    again = load_part(tmp_path)
    assert (
        isinstance(again, Network)
        and again.to_config() == network.to_config()
        and type(again.config) is type(network.config)
    )
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }
    x, t, cond = inputs(network)
    with torch.inference_mode():
        output, expected = again(x, t, cond), network(x, t, cond)
    if batch_invariant.FIXED_ORDER:
        assert torch.equal(output, expected)
    else:
        # MKL rounds by the alignment of the weights, which is the file's own where they are mapped
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"a_new_field": 1}))
    with pytest.raises(UserError, match="a_new_field"):
        load_part(tmp_path)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_is_trained(name: str) -> None:
    network = small(name).train()
    x, t, cond = inputs(network)
    network(x, t, cond).square().sum().backward()
    silent = [
        key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert not [key for key in silent if not key.startswith(UNUSED_WEIGHTS.get(name, "-"))]
    gone = [
        key
        for key, p in network.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    assert not gone


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_is_near(name: str) -> None:
    network = small(name)
    x, t, cond = inputs(network)
    with torch.inference_mode():
        exact = network(x, t, cond)
        half = network.bfloat16()(x.bfloat16(), t, cond.to(dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).norm() / exact.norm()) < 0.08


@pytest.mark.parametrize("name", NETWORKS)
def test_attributes(name: str) -> None:
    network = small(name)
    assert network.part in ("unet", "transformer")
    assert (
        network.channels >= 1
        and network.in_channels >= network.channels
        and network.patch >= 1
        and network.sample_size >= 1
    )
    assert all(isinstance(module, nn.Module) for module in network.children())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_is_ready_for_inference_answers_the_same(name: str) -> None:
    network = small(name).requires_grad_(False)
    x, t, cond = inputs(network)
    dtypes = [
        (dtype, limit)
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.03))
        if can_prepack(network.to(dtype))
    ]
    if not dtypes:
        pytest.skip("this processor has no such kernels")
    network.float()
    for dtype, limit in dtypes:
        network.to(dtype)
        ready = prepack(network)
        with torch.inference_mode():
            plain, quick = (
                net(x.to(dtype), t, cond.to(dtype=dtype)).float() for net in (network, ready)
            )
        assert float((quick - plain).norm() / plain.norm()) < limit, dtype
        weights, again = network.state_dict(), ready.state_dict()
        assert weights.keys() == again.keys() and not [
            key for key in weights if not torch.equal(weights[key], again[key])
        ]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_can_be_left_out(name: str) -> None:
    """Without its last block the network is the one with a block less."""
    network = small(name)
    x, t, cond = inputs(network)
    denoiser = Denoiser(network, Process(schedule("flow"), parameterization("flow")))
    for group in groups_of(network):
        weaker, _ = SkipLayers((f"{group}.0",)).pair(denoiser, cond, cond, None)
        shorter = copy.deepcopy(network)
        del getattr(shorter, group)[0]
        with torch.inference_mode():
            assert torch.equal(weaker.network(x, t, cond), shorter(x, t, cond)), group
            assert not torch.allclose(network(x, t, cond), shorter(x, t, cond))


# ---- weaker copies -------------------------------------------------------------------------------


def blocks_of(
    network: Network, find: Callable[[nn.Module], Iterable[tuple[str, nn.Module]]] = branches
) -> list[str]:
    """The names of a transformer's blocks, in the order in which they run. find: of those only that
    hold one of its layers.
    """
    blocks = [name for name, module in network.named_modules() if hasattr(module, "streams")]
    layers = [name for name, _ in find(network)]
    return [block for block in blocks if any(name.startswith(f"{block}.") for name in layers)]


def groups_of(network: Network) -> list[str]:
    """The names of the lists of blocks."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in blocks_of(network)))


def weakened(
    network: Network, reference: PerturbedAttention | SkipLayers, cond: Conditioning
) -> Network:
    denoiser = Denoiser(network, Process(schedule("flow"), parameterization("flow")))
    return reference.pair(denoiser, cond, cond, None)[0].network


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_perturbed_attention_is_attention_under_a_map(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map has minus infinity between a token of the image and the others of the image.

    Every token still attends to text, references and all other tokens, and those to all. The text's
    mask stays.
    """
    network = small(name)
    x, t, cond = inputs(network, 3, (16, 12))
    if cond.tokens is not None:
        cond = replace(cond, mask=torch.arange(5) < torch.tensor([[5], [2], [4]]))
    if name.startswith("Flux"):
        cond = replace(cond, references=(normal(3, network.in_channels, 4, 4, seed=4),))
    # more tokens than a text's with its padding
    picture = (16 // network.patch) * (12 // network.patch)
    names = blocks_of(network, self_attentions)

    def seen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        allowed = torch.ones(1, 1, q.shape[1], k.shape[1], dtype=torch.bool)
        if k.shape[1] >= picture:  # and not a text alone
            allowed[..., :picture, :picture] = torch.eye(picture, dtype=torch.bool)
        allowed = allowed if mask is None else allowed & mask[:, None, None]
        q, k, v = (p.transpose(1, 2) for p in (q, k, v))
        return (
            ((q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, float("-inf")).softmax(-1) @ v)
            .transpose(1, 2)
            .flatten(2)
        )

    with torch.inference_mode():
        plain, each = (
            network(x, t, cond),
            [weakened(network, PerturbedAttention((layer,)), cond)(x, t, cond) for layer in names],
        )
        assert all((y - plain).abs().max() > 1e-4 for y in each)
        result = weakened(network, PerturbedAttention(tuple(names)), cond)(x, t, cond)
        monkeypatch.setattr(batch_invariant, "attend", seen)
        torch.testing.assert_close(result, network(x, t, cond), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_picture_of_one_token_has_nothing_to_perturb(name: str) -> None:
    network = small(name)
    names = tuple(blocks_of(network, self_attentions))
    with torch.inference_mode():
        for cells, same in ((1, True), (2, False)):
            x, t, cond = inputs(network, 2, (network.patch, cells * network.patch))
            result, plain = (
                net(x, t, cond)
                for net in (
                    weakened(network, PerturbedAttention(names), cond),
                    network,
                )
            )
            assert torch.allclose(result, plain, rtol=1e-5, atol=1e-5) == same


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_no_layers_means_the_block_in_the_middle(name: str) -> None:
    network = small(name)
    x, t, cond = inputs(network)
    with torch.inference_mode():
        for kind, find in ((PerturbedAttention, self_attentions), (SkipLayers, branches)):
            names = blocks_of(network, find)
            result = weakened(network, kind(), cond)(x, t, cond)
            assert torch.equal(
                result, weakened(network, kind((names[len(names) // 2],)), cond)(x, t, cond)
            )
            assert (result - network(x, t, cond)).abs().max() > 1e-4


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_parts_of_blocks_can_be_left_out(name: str) -> None:
    """As if what they give were 0, or what they are given to add it to."""
    network = small(name)
    x, t, cond = inputs(network)
    blocks = {layer: network.get_submodule(layer) for layer in blocks_of(network)}
    parts = {
        f"{layer}.{part}"
        for layer, block in blocks.items()
        for part, _ in block.named_children()
        if part in PARTS
    }
    assert parts == {layer for layer, _ in branches(network)} - blocks.keys()

    def nothing(module: nn.Module, arguments: Any, named: dict[str, Any], y: Any) -> Any:
        if isinstance(y, tuple):
            return tuple(None if part is None else torch.zeros_like(part) for part in y)
        return named["plus"] if named.get("plus") is not None else torch.zeros_like(y)

    with torch.inference_mode():
        for part in parts:
            result = weakened(network, SkipLayers((part,)), cond)(x, t, cond)
            hook = network.get_submodule(part).register_forward_hook(nothing, with_kwargs=True)
            expected = network(x, t, cond)
            hook.remove()
            torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_layers_that_are_not_there_are_refused_by_those_that_are(name: str) -> None:
    network = small(name)
    _, _, cond = inputs(network)
    last = groups_of(network)[-1]
    for kind, label in (
        (PerturbedAttention, "layer with self-attention"),
        (SkipLayers, "layer that can be left out"),
    ):
        for wrong in (f"{last}.2", f"{last}.1-2", f"{last}.1-0", "proj_out"):
            with pytest.raises(
                UserError,
                match=rf"^unknown {label} '\w+[.0-9-]*': .*expected one of .*\b{last}\.0-1, "
                rf"{last}\.0-1\.att(?:n|ention)",
            ):
                weakened(network, kind((wrong,)), cond)
        every = weakened(network, kind((f"{last}.0-1",)), cond)
        x, t, cond = inputs(network)
        try:
            with torch.inference_mode():
                assert torch.equal(
                    every(x, t, cond), weakened(network, kind((last,)), cond)(x, t, cond)
                )
        except UserError as error:
            assert "at least one" in str(error)
