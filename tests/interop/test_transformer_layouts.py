"""Original files of diffusion transformers against diffusers.

diffusers' converters read the files of `write_transformer` as the same tensors under the same keys,
and `read_transformer` returns the written ones. The networks are small and random, or full-size on
the meta device.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor, nn

from helpers.tensors import equal_tensors
from sfumato.checkpoints import families
from sfumato.checkpoints.checkpoint import Checkpoint, Component, RawCheckpoint
from sfumato.checkpoints.families import NETWORK as PREFIX
from sfumato.checkpoints.families import TransformerFamily
from sfumato.checkpoints.families.dit import grid_table
from sfumato.checkpoints.lazy_tensor import LazyTensor, from_tensors, load_tensors
from sfumato.checkpoints.metadata import TRANSFORMER as NOTE
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import load_all, store_all
from sfumato.errors import UserError

KINDS = {
    family.name: family for family in families.registered() if isinstance(family, TransformerFamily)
}
Layout = TransformerFamily


def write_transformer(
    layout: Layout, config: dict[str, Any], tensors: dict[str, LazyTensor], where: str
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    raw = layout.write(Checkpoint({"transformer": Component(config, tensors)}, path=Path(where)))
    return dict(raw.tensors), dict(raw.metadata)


def read_transformer(
    layout: Layout,
    tensors: dict[str, LazyTensor],
    where: str,
    config: dict[str, Any] | None = None,
    notes: dict[str, str] | None = None,
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    raw = RawCheckpoint(tensors, notes or {}, Path(where))
    result = layout.read(raw, None, {} if config is None else {"transformer": config}).components[
        "transformer"
    ]
    return result.config, dict(result.tensors)


def detected(tensors: dict[str, Tensor]) -> Layout:
    result = families.candidates({k: tuple(v.shape) for k, v in tensors.items()}, "file")[0]
    assert isinstance(result, TransformerFamily)
    return result


SD3 = {
    "sample_size": 8,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "caption_projection_dim": 128,
}
SD3 |= {
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "in_channels": 4,
    "out_channels": 4,
    "pos_embed_max_size": 6,
}
FLUX = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
}
FLUX |= {"joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": (4, 14, 14)}
FLUX2 = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
}
FLUX2 |= {
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 12,
    "axes_dims_rope": (4, 4, 4, 4),
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 72,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 7,
    "out_channels": 8,
}
PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 72,
    "num_layers": 2,
    "cross_attention_dim": 144,
    "caption_channels": 24,
}
MODELS: dict[str, tuple[str, type[nn.Module], dict[str, Any]]] = {
    "sd3": ("sd3", diffusers.SD3Transformer2DModel, SD3),
    "sd3.5-medium": (
        "sd3",
        diffusers.SD3Transformer2DModel,
        SD3 | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    ),
    "sd3.5-large": ("sd3", diffusers.SD3Transformer2DModel, SD3 | {"qk_norm": "rms_norm"}),
    "flux-schnell": ("flux", diffusers.FluxTransformer2DModel, FLUX),
    "flux-dev": ("flux", diffusers.FluxTransformer2DModel, FLUX | {"guidance_embeds": True}),
    "flux-fill": (
        "flux",
        diffusers.FluxTransformer2DModel,
        FLUX | {"guidance_embeds": True, "in_channels": 24, "out_channels": 8},
    ),
    "flux2-dev": ("flux2", diffusers.Flux2Transformer2DModel, FLUX2),
    "flux2-klein": ("flux2", diffusers.Flux2Transformer2DModel, FLUX2 | {"guidance_embeds": False}),
    "dit": ("dit", diffusers.DiTTransformer2DModel, DIT),
    "pixart-1024": ("pixart", diffusers.PixArtTransformer2DModel, PIXART),
    "pixart-512": ("pixart", diffusers.PixArtTransformer2DModel, PIXART | {"sample_size": 64}),
}
CONVERTERS = {
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
}
# The published configs, as in diffusers' folders (stabilityai/stable-diffusion-3.5-*,
# black-forest-labs/FLUX.*, facebook/DiT-XL-2-256, PixArt-alpha/*).
SD3_FULL = {
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "in_channels": 16,
    "out_channels": 16,
}
SD3_FULL |= {"patch_size": 2, "sample_size": 128}
FLUX_FULL = {
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "joint_attention_dim": 4096,
}
FLUX_FULL |= {"pooled_projection_dim": 768, "axes_dims_rope": (16, 56, 56)}
KLEIN = {"in_channels": 128, "attention_head_dim": 128, "guidance_embeds": False}


def sd3_full(layers: int, side: int, **fields: Any) -> dict[str, Any]:
    sizes = {
        "num_layers": layers,
        "num_attention_heads": layers,
        "caption_projection_dim": 64 * layers,
        "pos_embed_max_size": side,
    }
    return SD3_FULL | sizes | fields


FULL: dict[str, tuple[str, type[nn.Module], dict[str, Any]]] = {
    "sd3-medium": ("sd3", diffusers.SD3Transformer2DModel, sd3_full(24, 192)),
    "sd3.5-medium": (
        "sd3",
        diffusers.SD3Transformer2DModel,
        sd3_full(24, 384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
    ),
    "sd3.5-large": ("sd3", diffusers.SD3Transformer2DModel, sd3_full(38, 192, qk_norm="rms_norm")),
    "flux-dev": (
        "flux",
        diffusers.FluxTransformer2DModel,
        FLUX_FULL | {"in_channels": 64, "guidance_embeds": True},
    ),
    "flux-schnell": ("flux", diffusers.FluxTransformer2DModel, FLUX_FULL | {"in_channels": 64}),
    "flux-fill": (
        "flux",
        diffusers.FluxTransformer2DModel,
        FLUX_FULL | {"in_channels": 384, "out_channels": 64, "guidance_embeds": True},
    ),
    "flux-canny": (
        "flux",
        diffusers.FluxTransformer2DModel,
        FLUX_FULL | {"in_channels": 128, "out_channels": 64, "guidance_embeds": True},
    ),
    "flux2-dev": ("flux2", diffusers.Flux2Transformer2DModel, {}),
    "flux2-klein-4b": (
        "flux2",
        diffusers.Flux2Transformer2DModel,
        KLEIN
        | {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
        },
    ),
    "flux2-klein-9b": (
        "flux2",
        diffusers.Flux2Transformer2DModel,
        KLEIN
        | {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
        },
    ),
    "dit-xl-2-256": ("dit", diffusers.DiTTransformer2DModel, {"out_channels": 8}),
    "dit-b": (
        "dit",
        diffusers.DiTTransformer2DModel,
        {"out_channels": 8, "num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 12},
    ),
    "pixart-1024": ("pixart", diffusers.PixArtTransformer2DModel, {"caption_channels": 4096}),
}


def build(name: str) -> tuple[Layout, dict[str, Any], dict[str, Tensor]]:
    """A small random network: layout, config, tensors.

    Copies of one embedding in every block are equal, as in diffusers' published files.
    """
    kind, network_class, fields = MODELS[name]
    torch.manual_seed(0)
    network = network_class(**fields)
    tensors = {k: torch.randn_like(v) for k, v in network.state_dict().items()}
    if kind == "dit":
        tensors = {
            k: tensors["transformer_blocks.0.norm1.emb" + k.partition("norm1.emb")[2]]
            if "norm1.emb" in k
            else v
            for k, v in tensors.items()
        }
    return KINDS[kind], dict(network.config), tensors


def written(name: str) -> tuple[Layout, dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    layout, config, tensors = build(name)
    return (
        layout,
        config,
        tensors,
        {
            k: v.load()
            for k, v in write_transformer(layout, config, from_tensors(tensors), name)[0].items()
        },
    )


@pytest.mark.parametrize("name", [n for n, (kind, *_) in MODELS.items() if kind in CONVERTERS])
def test_diffusers_reads_written_files(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, config, tensors, original = written(name)
    # diffusers' converter has FLUX's own width only; here the same cut at the test's width
    if layout.name == "flux":
        split = torch.split
        width = config["num_attention_heads"] * config["attention_head_dim"]
        monkeypatch.setattr(
            torch,
            "split",
            lambda t, sizes, dim=0: split(t, [s * width // 3072 for s in sizes], dim),
        )
    assert equal_tensors(CONVERTERS[layout.name](dict(original)), tensors)


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("name", MODELS)
def test_back_again(name: str, prefix: str) -> None:
    layout, config, tensors, original = written(name)
    file = {prefix + k: v for k, v in original.items()}
    assert detected(file) is layout
    hint = config if name == "pixart-512" else None
    read, again = read_transformer(layout, from_tensors(file), name, hint)
    beside = RawCheckpoint(
        from_tensors(file | {"first_stage_model.x": torch.ones(1)}), {}, Path(name)
    )
    assert layout.read_network(beside, hint or read).tensors.keys() == again.keys()
    assert equal_tensors({k: v.load() for k, v in again.items()}, tensors)
    assert all(
        v.dtype == tensors[k].dtype and v.shape == tensors[k].shape for k, v in again.items()
    )
    network = MODELS[name][1](**{k: v for k, v in read.items() if not k.startswith("_")})
    network.load_state_dict(tensors)  # the config that was read builds the same network
    assert read["_class_name"] == layout.class_name
    for key, value in read.items():
        if key not in ("_class_name", "sample_size", "norm_eps") and config[key] is not None:
            assert (
                list(config[key]) if isinstance(config[key], tuple) else config[key]
            ) == value, key


@pytest.mark.parametrize("name", FULL)
def test_full_size(name: str) -> None:
    """Every key and shape of the published sizes, and the config back from them."""
    kind, network_class, fields = FULL[name]
    with torch.device("meta"):
        network = network_class(**fields)
    layout, config, tensors = KINDS[kind], dict(network.config), network.state_dict()
    original, notes = write_transformer(layout, config, from_tensors(tensors), name)
    assert not json.loads(notes.get(NOTE, "{}")).keys() - {"sample_size", "norm_eps"}, notes
    read, again = read_transformer(
        layout,
        {k: v for k, v in original.items() if k != "pos_embed" or kind != "dit"}
        | _table(kind, config),
        name,
    )
    assert {k: v.shape for k, v in again.items()} == {k: tuple(v.shape) for k, v in tensors.items()}
    assert [
        read[k] for k in ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels")
    ] == [
        config[k]
        for k in ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels")
    ]
    if kind in CONVERTERS:
        assert {
            k: v.shape
            for k, v in CONVERTERS[kind](
                {k: torch.empty(v.shape, dtype=v.dtype, device="meta") for k, v in original.items()}
            ).items()
        } == {k: v.shape for k, v in tensors.items()}


def _table(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    if kind != "dit":
        return {}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return from_tensors(
        {"pos_embed": grid_table(width, config["sample_size"] // config["patch_size"])}
    )


def test_table_of_places_is_diffusers() -> None:
    network = diffusers.DiTTransformer2DModel(**DIT)
    assert torch.allclose(grid_table(144, 4), network.pos_embed.pos_embed, atol=1e-6)


def test_dit_with_another_table_or_unlike_copies_is_refused() -> None:
    layout, config, tensors, original = written("dit")
    for change in (lambda t: t.flip(1), lambda t: t[:, :9]):
        with pytest.raises(UserError, match="pos_embed is not the table"):
            read_transformer(
                layout,
                from_tensors(original | {"pos_embed": change(original["pos_embed"])}),
                "file",
                config,
            )
    tensors["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"] = torch.zeros(
        8, 144
    )
    with pytest.raises(
        UserError, match=r"transformer_blocks\.1\.\S+ differs from transformer_blocks\.0"
    ):
        [
            v.load()
            for v in write_transformer(layout, config, from_tensors(tensors), "folder")[0].values()
        ]


@pytest.mark.parametrize("name", MODELS)
def test_tables_are_inverses(name: str) -> None:
    layout, config, tensors, original = written(name)
    maps = layout.weight_map(config)
    assert equal_tensors(load_tensors(store_all(maps, from_tensors(tensors))), original)
    assert equal_tensors(load_tensors(load_all(maps, from_tensors(original), name)), tensors)
    for m in maps:  # tensor by tensor
        values = m.load(original[m.source])
        assert all(
            torch.equal(value, tensors[key]) for key, value in zip(m.targets, values, strict=True)
        )
        assert torch.equal(m.store(values), original[m.source])


@pytest.mark.parametrize("name", MODELS)
def test_all_errors_are_in_one_message(name: str) -> None:
    layout, config, _, original = written(name)
    hint = config if layout.name == "pixart" else None
    keys = sorted(
        k
        for k in original
        if k.endswith(("fc2.weight", "linear.weight", "mlp.2.weight", "final_layer.linear.weight"))
    )
    lost, bent = keys[0], keys[-1]
    table = {k: v for k, v in original.items() if k != lost} | {
        "one.more": torch.ones(2),
        bent: original[bent][:, :-1],
    }
    with pytest.raises(UserError) as error:
        read_transformer(layout, from_tensors(table), "a.safetensors", hint)
    message = str(error.value)
    if lost not in ("double_blocks.0.img_mlp.2.weight",):  # by which FLUX.2's MLPs are measured
        assert (
            f"1 missing ({lost})" in message
            and "1 not expected (one.more)" in message
            and f"1 of another shape ({bent}" in message
        )
    with pytest.raises(UserError, match="not of floating-point numbers"):
        read_transformer(
            layout,
            from_tensors(original | {bent: original[bent].to(torch.int8)}),
            "a.safetensors",
            hint,
        )


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sd3", {"attention_head_dim": 128, "num_attention_heads": 1}),
        ("sd3", {"sample_size": 4}),
        ("flux-dev", {"axes_dims_rope": (12, 10, 10)}),
        ("flux-dev", {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}),
        ("flux2-dev", {"rope_theta": 10000}),
        ("dit", {"attention_head_dim": 36, "num_attention_heads": 4}),
        ("pixart-512", {}),
    ],
)
def test_fields_that_keys_do_not_determine_are_noted(name: str, fields: dict[str, Any]) -> None:
    """With the note the config comes back.

    Without it, the config is another, or a message demands the field.
    """
    layout, config, tensors = build(name)
    config |= fields
    original, notes = write_transformer(layout, config, from_tensors(tensors), name)
    read, again = read_transformer(layout, original, name, notes=notes)
    assert all(
        read[k] == list(v) if isinstance(v, tuple) else read[k] == v for k, v in fields.items()
    )
    assert equal_tensors({k: v.load() for k, v in again.items()}, tensors)
    try:
        other, _ = read_transformer(layout, original, name)
        assert any(other[k] != read[k] for k in fields)
    except UserError as error:
        assert "--config" in str(error)
    for note in ("[1]", "{"):
        with pytest.raises(UserError, match=r"sfumato\.transformer"):
            read_transformer(layout, original, name, notes={NOTE: note})


def test_a_config_of_another_class_is_refused() -> None:
    layout, config, _, original = written("flux-dev")
    with pytest.raises(
        UserError, match="holds a FluxTransformer2DModel, and the given config is of a SD3"
    ):
        read_transformer(
            layout,
            from_tensors(original),
            "file",
            config | {"_class_name": "SD3Transformer2DModel"},
        )
    with pytest.raises(UserError, match="does not fit the architecture"):
        read_transformer(layout, from_tensors(original), "file", config | {"num_layers": 3})
    with pytest.raises(UserError, match=r"^file has a value of the wrong kind"):
        read_transformer(layout, from_tensors(original), "file", {})


def test_other_files_are_not_detected() -> None:
    keys = ["model.diffusion_model.input_blocks.0.0.weight", "double_blocks.0.img_attn.qkv.weight"]
    assert not any(kind.detect(Shapes(dict.fromkeys(keys, ()))) for kind in KINDS.values())
