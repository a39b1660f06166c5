"""Parity with DiT and PixArt of diffusers: the same keys, outputs and files.

They are compared at every size that diffusers takes; other sizes are tested alone.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from torch import Tensor

from helpers.batch_invariance import batch_dependent
from helpers.models import randomised
from helpers.tensors import assert_close, normal
from sfumato.checkpoints.formats.folder import load_part, save_part
from sfumato.errors import UserError
from sfumato.predict.guidance_models._layer_replacement import replace_layers
from sfumato.predict.guidance_models.perturbed_attention import self_attentions
from sfumato.predict.networks.base import registered
from sfumato.predict.networks.dit import DiT, DiTConfig
from sfumato.predict.networks.pixart import PixArt, PixArtConfig
from sfumato.types import Conditioning

SMALL: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "out_channels": 8,
}
CLASSES = 5
DITS: dict[str, dict[str, Any]] = {
    "DiT": {},
    "DiT, patches of 4": {"patch_size": 4, "sample_size": 16},
    "DiT, a single cell a patch": {"patch_size": 1, "in_channels": 3, "out_channels": 3},
    "DiT without a variance": {"out_channels": None, "attention_bias": False},
    "DiT, GEGLU": {"activation_fn": "geglu", "norm_eps": 1e-3},
}
PIXARTS: dict[str, dict[str, Any]] = {
    "PixArt": {"caption_channels": 12},
    "PixArt, sizes": {"caption_channels": 12, "sample_size": 128},
    "PixArt, sizes asked for": {
        "caption_channels": 12,
        "use_additional_conditions": True,
        "norm_eps": 1e-3,
    },
    "PixArt Sigma": {
        "caption_channels": 12,
        "sample_size": 128,
        "use_additional_conditions": False,
        "interpolation_scale": 2,
    },
    "PixArt, no projection": {
        "cross_attention_dim": 12,
        "attention_bias": False,
        "activation_fn": "geglu",
    },
    "PixArt, stretched": {"caption_channels": 12, "interpolation_scale": 0.5, "out_channels": None},
}
every = pytest.mark.parametrize("name", [*DITS, *PIXARTS])


def diffusers_network(name: str, alike: bool = True) -> Any:
    """A network of diffusers with random weights.

    A DiT's layers for time and class are the same in all blocks, as in published files, unless
    `alike` is False.
    """
    if name in PIXARTS:
        values = SMALL | {"cross_attention_dim": 24} | PIXARTS[name]
        return randomised(diffusers.PixArtTransformer2DModel(**values), 1)
    network = randomised(
        diffusers.DiTTransformer2DModel(num_embeds_ada_norm=CLASSES - 1, **(SMALL | DITS[name])), 1
    )
    if alike:
        for block in network.transformer_blocks:
            block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    return network


def opened(network: Any, folder: Path) -> Any:
    network.save_pretrained(folder)
    return load_part(folder)


def inputs(
    network: Any, size: tuple[int, int], batch: int = 2
) -> tuple[Tensor, Tensor, Conditioning]:
    """x, times and a condition for each image: all doors of the network are in use, and some text
    is masked.
    """
    x, timestep = (
        normal(batch, network.config.in_channels, *size),
        torch.linspace(7, 999, batch) if batch > 1 else torch.tensor([999.0]),
    )
    if isinstance(network, DiT):
        return x, timestep, Conditioning(vector=torch.eye(CLASSES)[torch.arange(batch) % CLASSES])
    mask = (normal(batch, 6, seed=3) > -0.5) | (torch.arange(6) == 0)
    picture = torch.tensor([[1024.0, 768.0, 1024 / 768], [512.0, 1021.0, 512 / 1021]])[
        torch.arange(batch) % 2
    ]
    return (
        x,
        timestep,
        Conditioning(
            tokens=normal(batch, 6, network.token_width, seed=1), mask=mask, vector=picture
        ),
    )


def diffusers_output(network: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    """The output of diffusers' network.

    Its DiT joins tokens to squares only; other maps are joined here.
    """
    if isinstance(network, diffusers.PixArtTransformer2DModel):
        picture: Any = cond.vector
        added = {"resolution": picture[:, :2], "aspect_ratio": picture[:, 2:]}
        return network(x, cond.tokens, timestep, added, encoder_attention_mask=cond.mask).sample
    tokens: list[Tensor] = []
    hook = network.proj_out_2.register_forward_hook(
        lambda module, args, result: tokens.append(result)
    )
    vector: Any = cond.vector
    try:
        whole = network(x, timestep, vector.argmax(1)).sample
    except RuntimeError:
        whole = None
    hook.remove()
    patch, (rows, columns) = (
        network.config.patch_size,
        (side // network.config.patch_size for side in x.shape[2:]),
    )
    # (B, rows, columns, down, right, C)
    map = tokens[0].unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))
    result = map.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    assert rows != columns or (whole is not None and torch.equal(result, whole))
    return result


# ---- parity --------------------------------------------------------------------------------------


@every
@torch.inference_mode()
def test_parity_and_folders_in_both_directions(name: str, tmp_path: Path) -> None:
    peer = diffusers_network(name)
    network = opened(peer, tmp_path / "diffusers")
    save_part(tmp_path / "sfumato", network)
    again = type(peer).from_pretrained(tmp_path / "sfumato")
    before, after = peer.state_dict(), again.state_dict()
    assert network.state_dict().keys() == before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for size in ((8, 8), (16, 16), (4, 12), (20, 8), (4, 4)):
        x, timestep, cond = inputs(network, size)
        expected = diffusers_output(peer, x, timestep, cond)
        assert expected.shape[2:] == size and expected.std() > 0.05
        assert_close(network(x, timestep, cond), expected)
        assert_close(diffusers_output(again, x, timestep, cond), expected, 0)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["DiT", "PixArt, sizes", "PixArt Sigma"])
@torch.inference_mode()
def test_perturbed_attention(name: str, tmp_path: Path) -> None:
    """diffusers' processor, which its PixArt-Sigma pipeline sets in a block's first attention,
    perturbs the second half of a doubled batch.
    """
    peer = diffusers_network(name)
    network = opened(peer, tmp_path)
    x, timestep, cond = inputs(network, (8, 8))
    peer.transformer_blocks[1].attn1.set_processor(PAGIdentitySelfAttnProcessor2_0())
    plain, expected = diffusers_output(
        peer, x.repeat(2, 1, 1, 1), timestep.repeat(2), Conditioning.cat([cond, cond])
    ).chunk(2)
    result = replace_layers(network, ["transformer_blocks.1"], self_attentions, "layer")(
        x, timestep, cond
    )
    assert_close(network(x, timestep, cond), plain)
    assert_close(result, expected)
    assert (result - plain).abs().max() > 1e-3


def test_a_dit_with_modulation_layers_in_each_block(tmp_path: Path) -> None:
    """diffusers lets them differ, and uses each block's; also in place, in a network that shared
    them before, and back again.
    """
    peer = diffusers_network("DiT", alike=False)
    network = opened(peer, tmp_path / "diffusers")
    x, timestep, cond = inputs(network, (8, 8))
    assert_close(network(x, timestep, cond), diffusers_output(peer, x, timestep, cond))
    first, second = (block.norm1.emb for block in network.transformer_blocks)
    assert first is not second
    shared = DiT(network.config).eval()
    assert shared.transformer_blocks[0].norm1.emb is shared.transformer_blocks[1].norm1.emb
    shared.load_state_dict(peer.state_dict())
    assert_close(shared(x, timestep, cond), diffusers_output(peer, x, timestep, cond))
    save_part(tmp_path / "sfumato", shared)
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "sfumato")
    assert_close(
        diffusers_output(again, x, timestep, cond), diffusers_output(peer, x, timestep, cond), 0
    )
    peer = diffusers_network("DiT")
    shared.load_state_dict(peer.state_dict())
    assert shared.transformer_blocks[0].norm1.emb is shared.transformer_blocks[1].norm1.emb
    assert_close(shared(x, timestep, cond), diffusers_output(peer, x, timestep, cond))


def test_weights_of_a_checkpoint_come_into_the_parameters_that_an_optimizer_holds() -> None:
    """A resumed training goes on with the same objects, and with one module for all blocks."""
    network, peer = (
        DiT(DiTConfig(num_embeds_ada_norm=CLASSES - 1, **SMALL)),
        diffusers_network("DiT"),
    )
    before = list(network.parameters())
    network.load_state_dict(peer.state_dict())
    assert all(a is b for a, b in zip(before, network.parameters(), strict=True))
    assert all(
        torch.equal(tensor, peer.state_dict()[key]) for key, tensor in network.state_dict().items()
    )


@torch.inference_mode()
def test_the_shared_modulation_of_dit_blocks_is_stored_once(tmp_path: Path) -> None:
    network = opened(diffusers_network("DiT"), tmp_path)
    own = sum(p.numel() for p in diffusers_network("DiT").parameters())
    once = sum(p.numel() for p in network.transformer_blocks[0].norm1.emb.parameters())
    assert sum(p.numel() for p in network.parameters()) == own - once
    calls: list[int] = []
    network.transformer_blocks[1].norm1.emb.register_forward_hook(lambda *_: calls.append(1))
    network(*inputs(network, (8, 8)))
    assert len(calls) == 1


@every
@torch.inference_mode()
def test_every_input_shows_in_the_output(name: str, tmp_path: Path) -> None:
    """Without this, parity could hold because nothing matters."""
    network = opened(diffusers_network(name), tmp_path)
    x, timestep, cond = inputs(network, (8, 8))
    y = network(x, timestep, cond)
    changes: list[dict[str, Any]] = (
        [{"vector": cond.vector.flip(0)}] if network.vector_width or network.classes else []
    )
    if cond.tokens is not None:
        changes += [{"tokens": cond.tokens + 1}, {"mask": None}]
        masked = torch.where(cond.mask[:, :, None], cond.tokens, 7.0)
        assert not cond.mask.all() and torch.equal(
            network(x, timestep, replace(cond, tokens=masked)), y
        ), "what is masked is not read"
    for change in changes:
        assert (network(x, timestep, replace(cond, **change)) - y).abs().max() > 1e-3, change
    assert (network(x, timestep - 5, cond) - y).abs().max() > 1e-3
    assert (network(x.roll(2, 3), timestep, cond).roll(-2, 3) - y).abs().max() > 1e-3, (
        "places are told apart"
    )
    if name in PIXARTS and not network.vector_width:
        assert torch.equal(network(x, timestep, replace(cond, vector=None)), y)


@pytest.mark.parametrize("name", ["DiT", "DiT, patches of 4", "PixArt"])
@torch.inference_mode()
def test_sides_that_are_no_multiple_of_the_patch(name: str, tmp_path: Path) -> None:
    """The map is padded with its edge, and the output is cut to its size."""
    network = opened(diffusers_network(name), tmp_path)
    x, timestep, cond = inputs(network, (7, 9))
    patch = network.patch
    filled = torch.nn.functional.pad(x, (0, -9 % patch, 0, -7 % patch), mode="replicate")
    y = network(x, timestep, cond)
    assert y.shape == (2, 8, 7, 9) and torch.equal(y, network(filled, timestep, cond)[:, :, :7, :9])


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DiT", "PixArt", "PixArt, sizes"])
def test_the_class_of_the_first_files(name: str, tmp_path: Path) -> None:
    """Both libraries open folders of Transformer2DModel as networks of today's classes."""
    peer = diffusers_network(name)
    peer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "_class_name": "Transformer2DModel",
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_linear_projection": False,
    }
    config |= {"double_self_attention": False} | (
        {} if name in PIXARTS else {"cross_attention_dim": None}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = load_part(tmp_path)
    assert type(diffusers.Transformer2DModel.from_pretrained(tmp_path)) is type(peer)
    assert network.to_config()["_class_name"] == type(peer).__name__  # pyright: ignore[reportCallIssue]
    with torch.inference_mode():
        x, timestep, cond = inputs(network, (8, 8))
        assert_close(network(x, timestep, cond), diffusers_output(peer, x, timestep, cond))
    config["norm_type"] = "ada_norm"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError,
        match="norm_type 'ada_norm' of Transformer2DModel is not supported: "
        "expected one of ada_norm_zero",
    ):
        load_part(tmp_path)


@every
def test_configs_come_back(name: str) -> None:
    config = diffusers_network(name).config
    kind = PixArtConfig if name in PIXARTS else DiTConfig
    read = kind.from_dict(json.loads(json.dumps(dict(config))))
    assert {k: v for k, v in read.to_dict().items() if k != "_class_name"} == {
        k: v for k, v in config.items() if not k.startswith("_")
    }
    assert kind.from_dict(read.to_dict()) == read


FULL: dict[str, tuple[str, dict[str, Any], int]] = {
    # millions of parameters: 675 of DiT-XL/2 (Peebles & Xie 2022, arXiv:2212.09748); diffusers'
    # class has 750, with 27 copies of the same layers. The paper of PixArt gives 0.6 billion (Chen
    # et al. 2023, arXiv:2310.00426); 611 is what diffusers' class has with the published configs.
    "DiT-XL/2 256": ("DiTTransformer2DModel", {"out_channels": 8}, 675),
    "DiT-XL/2 512": ("DiTTransformer2DModel", {"out_channels": 8, "sample_size": 64}, 675),
    "PixArt-alpha 512": (
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "sample_size": 64},
        611,
    ),
    "PixArt-alpha 1024": ("PixArtTransformer2DModel", {"caption_channels": 4096}, 611),
    "PixArt-Sigma 1024": (
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "use_additional_conditions": False, "interpolation_scale": 2},
        611,
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_full_sizes(name: str) -> None:
    """Without memory for the weights: names, shapes and counts."""
    kind, values, millions = FULL[name]
    network_class, config = registered()[kind]
    with torch.device("meta"):
        network, expected = (
            network_class(config.from_dict(values)),
            getattr(diffusers, kind)(**values),
        )
    shapes = [{k: tuple(v.shape) for k, v in n.state_dict().items()} for n in (network, expected)]
    assert shapes[0] == shapes[1]
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


# ---- bits, dtypes, training ----------------------------------------------------------------------


@pytest.mark.invariance
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.parametrize(
    "name", ["DiT", "DiT, GEGLU", "PixArt", "PixArt, sizes asked for", "PixArt, no projection"]
)
def test_an_image_has_the_bits_that_it_has_alone(
    name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    network = opened(diffusers_network(name), tmp_path)
    x, timestep, cond = inputs(network, size, 12)
    assert not batch_dependent(
        lambda rows: network(x[rows], timestep[rows], cond[rows]), (2, 3, 11)
    )


@pytest.mark.invariance
def test_a_wide_network_has_them_too() -> None:
    """Weights that go other ways than small ones: the table of classes, and oneDNN's."""
    network = randomised(
        DiT(DiTConfig(num_attention_heads=4, attention_head_dim=72, num_layers=1, sample_size=8))
    )
    x, timestep = normal(5, 4, 6, 8), torch.linspace(0, 999, 5)
    cond = Conditioning(vector=torch.eye(1001)[[1, 1000, 7, 1000, 999]])
    assert not batch_dependent(lambda rows: network(x[rows], timestep[rows], cond[rows]), (2, 4))


@pytest.mark.parametrize("name", ["DiT", "PixArt, sizes asked for"])
@torch.inference_mode()
def test_bfloat16(name: str, tmp_path: Path) -> None:
    network = opened(diffusers_network(name), tmp_path)
    x, timestep, cond = inputs(network, (8, 12))
    expected = network(x, timestep, cond)
    half = load_part(tmp_path, dtype=torch.bfloat16)
    result = half(x.bfloat16(), timestep, cond.to(dtype=torch.bfloat16))
    assert result.dtype == torch.bfloat16
    assert_close(result.float(), expected, 0.05)


@pytest.mark.parametrize(
    "name",
    ["DiT", "DiT, a single cell a patch", "PixArt, sizes asked for", "PixArt, no projection"],
)
def test_training(name: str) -> None:
    """A fresh network answers 0, as both papers begin; every weight has a gradient; and with
    gradients the numbers are the same.
    """
    kind = (PixArt, PixArtConfig) if name in PIXARTS else (DiT, DiTConfig)
    values = (
        {"cross_attention_dim": 24} | PIXARTS[name]
        if name in PIXARTS
        else {"num_embeds_ada_norm": CLASSES - 1} | DITS[name]
    )
    network: Any = kind[0](kind[1](**(SMALL | values)))
    x, timestep, cond = inputs(network, (8, 8), CLASSES)
    assert not network(x, timestep, cond).any()
    randomised(network)
    with torch.inference_mode():
        expected = network(x, timestep, cond)
    y = network.requires_grad_(True)(x, timestep, cond)
    assert_close(y.detach(), expected)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["DiT", "PixArt"])
@torch.inference_mode()
def test_prepared_for_inference(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from sfumato.inference.prepack import can_prepack, prepack

    network = opened(diffusers_network(name), tmp_path).to(dtype)
    if not can_prepack(network):
        pytest.skip("this processor has no such kernels")
    x, timestep, cond = inputs(network, (8, 8))
    x, cond = x.to(dtype), cond.to(dtype=dtype)
    ready = prepack(network)
    assert_close(
        ready(x, timestep, cond),
        network(x, timestep, cond),
        1e-5 if dtype == torch.float32 else 0.05,
    )
    assert all(torch.equal(a, network.state_dict()[key]) for key, a in ready.state_dict().items())


# ---- bad input -----------------------------------------------------------------------------------


@torch.inference_mode()
def test_doors_that_are_missing_or_do_not_fit(tmp_path: Path) -> None:
    dit, pixart = (
        opened(diffusers_network("DiT"), tmp_path / "a"),
        opened(diffusers_network("PixArt, sizes"), tmp_path / "b"),
    )
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (
            dit,
            {"vector": None},
            r"this DiT is class-conditional: Conditioning.vector \(B, 5\) is missing",
        ),
        (
            dit,
            {"vector": torch.eye(4)[[0, 1]]},
            r"this DiT is class-conditional: Conditioning.vector \(B, 5\) has 4 numbers",
        ),
        (
            pixart,
            {"tokens": None},
            r"attends to tokens of width 12: Conditioning.tokens \(B, L, 12\) is missing",
        ),
        (pixart, {"tokens": normal(2, 6, 11)}, "attends to tokens of width 12: .* is 11 wide"),
        (
            pixart,
            {"vector": None},
            r"conditioned on the image's height, width and height/width: "
            r"Conditioning.vector \(B, 3\) is missing",
        ),
        (pixart, {"vector": normal(2, 2)}, r"Conditioning.vector \(B, 3\) has 2 numbers"),
        (
            pixart,
            {"residuals": (normal(2, 4, 8, 8),)},
            "this PixArt has no use for Conditioning.residuals",
        ),
        (dit, {"concat": normal(2, 4, 8, 8)}, "this DiT has no use for Conditioning.concat"),
    ]
    for network, change, sentence in wrong:
        x, timestep, cond = inputs(network, (8, 8))
        with pytest.raises(UserError, match=sentence):
            network(x, timestep, replace(cond, **change))
    with pytest.raises(UserError, match="this DiT takes 4 channels and was given 3"):
        dit(normal(2, 3, 8, 8), *inputs(dit, (8, 8))[1:])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_layers": 0}, "num_layers=0: expected a whole number of at least 1"),
        (
            {"num_attention_heads": True},
            "num_attention_heads=True has a value of the wrong kind: expected a whole number",
        ),
        ({"sample_size": 1}, "sample_size=1: expected a whole number of at least 2"),
        ({"out_channels": 3}, "out_channels=3: expected a whole number of at least 4"),
        (
            {"attention_head_dim": 7},
            "num_attention_heads \\* attention_head_dim is 21: expected a multiple of 4, for sine "
            "positions",
        ),
        ({"activation_fn": "relu"}, "activation_fn 'relu' is not supported"),
        ({"norm_eps": 0.0}, r"norm_eps=0.0: expected a number in \(0, 1\)"),
        ({"norm_type": "layer_norm"}, "norm_type='layer_norm' is not supported"),
        ({"dropout": 0.1}, "dropout=0.1 is not supported"),
        ({"surprise": 1}, "surprise=1 is not known"),
    ],
)
def test_impossible_configs(change: dict[str, Any], sentence: str) -> None:
    for kind in (DiTConfig, PixArtConfig):
        values = asdict(
            kind(**(SMALL | ({"cross_attention_dim": 24} if kind is PixArtConfig else {})))
        )
        with pytest.raises(UserError, match=sentence):
            kind.from_dict(values | change)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("DiT", {"patch_size": "2"}),
        ("DiT", {"norm_eps": "small"}),
        ("DiT", {"num_layers": [2]}),
        ("DiT", {"activation_fn": {}}),
        ("DiT", {"sample_size": [8, 8]}),
        ("DiT", {"attention_bias": "yes"}),
        ("PixArt", {"cross_attention_dim": None}),
        ("PixArt", {"interpolation_scale": "2"}),
        ("PixArt", {"caption_channels": 12.5}),
        ("PixArt", {"use_additional_conditions": "no"}),
    ],
)
def test_values_of_the_wrong_kind(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    diffusers_network(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=r"config\.json"):
        load_part(tmp_path)


def test_impossible_configs_of_pixart_alone() -> None:
    values = SMALL | {"cross_attention_dim": 24, "caption_channels": 12}
    for change, sentence in (
        (
            {"cross_attention_dim": 16},
            "cross_attention_dim 16 with caption_channels: expected the network's own width, 24",
        ),
        ({"caption_channels": 0}, "caption_channels=0: expected a whole number"),
        ({"interpolation_scale": 0}, "interpolation_scale=0: expected a number above 0"),
        (
            {
                "num_attention_heads": 2,
                "cross_attention_dim": 16,
                "use_additional_conditions": True,
            },
            "use_additional_conditions with a width of 16: height, width and aspect need a third "
            "of it each",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            PixArtConfig.from_dict(values | change)
