"""Latent Diffusion's own files and conditioners as they come: the published configurations, damaged
files, YAMLs of other models, prompts that are no classes; each is read rightly or refused in one
sentence.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import helpers.single_files as single
from helpers import ldm_conditioners
from sfumato.checkpoints.checkpoint import ReadOptions
from sfumato.checkpoints.families._unet_map import unet_map
from sfumato.checkpoints.families._vae import vae_map
from sfumato.checkpoints.families.ldm_yaml import from_yaml
from sfumato.checkpoints.weight_map import with_prefix
from sfumato.errors import NumericalError, UserError
from sfumato.predict.conditioners.bert_text import BertText
from sfumato.predict.conditioners.class_embedding import ClassEmbedding, ClassEmbeddingConfig
from sfumato.predict.networks.base import registered
from sfumato.predict.text_encoders.ldm_bert import LDMBert, LDMBertConfig

# ---- the published configurations, on the meta device: shapes without numbers --------------------

_VQ4 = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4],
}
_VQ4 |= {"num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
_VQ8 = {**_VQ4, "z_channels": 4, "ch_mult": [1, 2, 2, 4], "attn_resolutions": [32]}
_KL8 = {**_VQ4, "double_z": True, "z_channels": 4, "ch_mult": [1, 2, 4, 4]}
_FACES = {
    "image_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 224,
    "attention_resolutions": [8, 4, 2],
}
_FACES |= {"num_res_blocks": 2, "channel_mult": [1, 2, 3, 4], "num_head_channels": 32}
_TOKENS = {"use_spatial_transformer": True, "transformer_depth": 1}
PUBLISHED: dict[str, dict[str, Any]] = {
    # unet: the YAML's; first: the autoencoder's; millions: parameters of the U-Net as the paper has
    # them (arXiv:2112.10752, appendix E), for text-to-image with the transformer (section 4.3.1:
    # 1.45 billion)
    "CelebA-HQ, FFHQ, LSUN bedrooms": {
        "unet": _FACES,
        "first": _VQ4,
        "millions": 274,
        "side": 64,
        "heads": {"attention_head_dim": 32},
    },
    "LSUN churches": {
        "unet": {
            **_FACES,
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 192,
            "num_head_channels": -1,
        }
        | {"attention_resolutions": [1, 2, 4, 8], "channel_mult": [1, 2, 2, 4, 4], "num_heads": 8}
        | {"use_scale_shift_norm": True, "resblock_updown": True},
        "first": _KL8,
        "millions": 294,
        "side": 32,
        "heads": {"num_attention_heads": 8, "attention_head_dim": None},
        "more": {"linear_end": 0.0155, "scale_by_std": True},
    },
    "ImageNet, cin256-v2": {
        "unet": {
            **_FACES,
            **_TOKENS,
            "model_channels": 192,
            "channel_mult": [1, 2, 3, 5],
            "context_dim": 512,
            "num_head_channels": -1,
        }
        | {"num_heads": 1},
        "first": _VQ4,
        "condition": {
            "target": "ClassEmbedder",
            "params": {"n_classes": 1001, "embed_dim": 512, "key": "class_label"},
        },
        "rows": lambda: single.class_map({"n_classes": 1001, "embed_dim": 512}),
        "millions": 400,
        "side": 64,
        "heads": {"attention_head_dim": 1},
    },
    "ImageNet, cin": {
        "unet": {
            **_FACES,
            **_TOKENS,
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 256,
            "context_dim": 512,
        }
        | {"attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4]},
        "first": _VQ8,
        "condition": {
            "target": "ClassEmbedder",
            "params": {"embed_dim": 512, "key": "class_label"},
        },
        "rows": lambda: single.class_map({"n_classes": 1000, "embed_dim": 512}),
        "millions": 395,
        "side": 32,
        "heads": {"attention_head_dim": [8, 16, 32]},
    },
    "text-to-image": {
        "unet": {
            **_FACES,
            **_TOKENS,
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "context_dim": 1280,
        }
        | {
            "attention_resolutions": [4, 2, 1],
            "channel_mult": [1, 2, 4, 4],
            "num_head_channels": -1,
            "num_heads": 8,
            "legacy": False,
        },
        "first": _KL8,
        "condition": {"target": "BERTEmbedder", "params": {"n_embed": 1280, "n_layer": 32}},
        "rows": lambda: single.bert_map(LDMBertConfig().to_dict()),
        "millions": 1450,
        "side": 32,
        "heads": {"attention_head_dim": 8},
        "more": {"linear_start": 0.00085, "linear_end": 0.012, "scale_factor": 0.18215},
    },
}


def published_yaml(name: str) -> dict[str, Any]:
    published = PUBLISHED[name]
    vq, wide = not published["first"]["double_z"], published["first"]["z_channels"]
    first = {
        "embed_dim": wide,
        "ddconfig": published["first"],
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    first |= {"n_embed": 8192 if wide == 3 else 16384} if vq else {}
    params = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 1000,
        "num_timesteps_cond": 1,
        "image_size": 64,
    }
    params |= {"channels": wide, "monitor": "val/loss", "concat_mode": False} | published.get(
        "more", {}
    )
    condition = published.get("condition", "__is_unconditional__")
    if isinstance(condition, dict):
        condition = {**condition, "target": f"ldm.modules.encoders.modules.{condition['target']}"}
    target = f"ldm.models.autoencoder.{'VQModelInterface' if vq else 'AutoencoderKL'}"
    params |= {
        "cond_stage_config": condition,
        "first_stage_config": {"target": target, "params": first},
    }
    params |= {
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": published["unet"],
        }
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def published_file(name: str) -> dict[str, Tensor]:
    """Every key with its shape, from the YAML's own words alone."""
    original = from_yaml(published_yaml(name))
    unet = {**original.parts["unet"], **PUBLISHED[name]["heads"]}
    up = {"ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D"}
    unet["up_block_types"] = [
        up.get(k, k.replace("Down", "Up")) for k in reversed(unet["down_block_types"])
    ]
    if "condition" not in PUBLISHED[name]:
        unet |= {"_class_name": "UNet2DModel", "upsample_type": unet["downsample_type"]}
    vae = dict(original.parts["vae"])
    vae["up_block_types"] = [
        k.replace("DownEncoder", "UpDecoder") for k in reversed(vae["down_block_types"])
    ]
    rows = with_prefix(unet_map(unet), "model.diffusion_model.") + with_prefix(
        vae_map(vae), "first_stage_model."
    )
    prefix = (
        "cond_stage_model.transformer."
        if "BERT" in str(PUBLISHED[name].get("condition"))
        else "cond_stage_model."
    )
    rows += with_prefix(PUBLISHED[name].get("rows", list)(), prefix)
    return {row.source: torch.empty(row.stored, device="meta") for row in rows}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name: str) -> None:
    """Read with their YAML, the networks have the paper's sizes; unconditional ones and
    text-to-image need no YAML.
    """
    published, file = PUBLISHED[name], published_file(name)
    result = single.split_tensors(
        file, {}, "file", ReadOptions(original_config=from_yaml(published_yaml(name)))
    )
    unet = result.components["unet"].config
    assert {k: unet.get(k) for k in published["heads"]} == published["heads"] and unet[
        "sample_size"
    ] == published["side"]
    network_class, config_class = registered()[unet["_class_name"]]
    with torch.device("meta"):
        network = network_class(config_class.from_dict(unet))
    count = sum(p.numel() for p in network.parameters())
    if name == "text-to-image":
        count += sum(math.prod(v.shape) for v in result.components["bert"].tensors.values())
    assert count / 1e6 == pytest.approx(published["millions"], rel=0.004)
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == {
        k: v.shape for k, v in result.components["unet"].tensors.items()
    }
    schedule = result.schedulers["scheduler"]
    more = published.get("more", {})
    assert (schedule["beta_start"], schedule["beta_end"]) == (
        more.get("linear_start", 0.0015),
        more.get("linear_end", 0.0195),
    )
    assert result.components["vae"].config["scaling_factor"] == more.get("scale_factor", 1.0)
    if "ImageNet" not in name:
        assert single.split_tensors(file, {}, "file").components["unet"].config == unet


# ---- damaged files, and those of other kinds -----------------------------------------------------

PLAIN: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 32,
}
VQ: dict[str, Any] = {
    "_class_name": "VQModel",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [32, 32],
    "layers_per_block": 1,
}
VQ |= {"latent_channels": 3, "num_vq_embeddings": 11, "vq_embed_dim": 3}


def plain(**fields: Any) -> dict[str, Tensor]:
    rows = with_prefix(unet_map(PLAIN | fields), "model.diffusion_model.") + with_prefix(
        vae_map(VQ), "first_stage_model."
    )
    generator = torch.Generator().manual_seed(0)
    return {row.source: torch.randn(row.stored, generator=generator) for row in rows}


def test_an_unconditional_file_there_and_back() -> None:
    file = plain()
    result = single.split_tensors(file, {}, "file")
    assert (
        result.kind == "ldm-unconditional"
        and {k: result.components["unet"].config[k] for k in PLAIN} == PLAIN
    )
    assert (
        result.schedulers["scheduler"]["beta_start"],
        result.components["vae"].config["scaling_factor"],
    ) == (0.0015, 1.0)
    again = single.join(result)
    assert {k: v for k, v in again.items() if k in file}.keys() == file.keys() and all(
        torch.equal(v, again[k]) for k, v in file.items()
    )
    assert single.notes(result)["sfumato.heads"] == '{"num_head_channels": 32}'
    matrices = {
        k: v.squeeze(-1) if k.endswith(("qkv.weight", "attn.proj_out.weight")) else v
        for k, v in file.items()
    }
    same = single.weights(
        single.split_tensors(matrices, {}, "file").components["unet"]
    )  # 1x1 convolutions that were stored as matrices
    assert all(
        torch.equal(v, same[k]) for k, v in single.weights(result.components["unet"]).items()
    )
    averaged = {
        k: "model_ema." + k.removeprefix("model.").replace(".", "")
        for k in file
        if k.startswith("model.")
    }
    both = file | {v: file[k] + 1 for k, v in averaged.items()}
    ema = single.weights(
        single.split_tensors(both, {}, "file", ReadOptions(ema=True)).components["unet"]
    )
    assert all(
        torch.equal(v + 1, ema[k]) for k, v in single.weights(result.components["unet"]).items()
    )


def test_every_fault_of_an_unconditional_file_names_its_key() -> None:
    whole = {k: v for k, v in plain().items() if k.startswith("model.")}
    for count, (key, value) in enumerate(whole.items()):
        rest = {k: v for k, v in whole.items() if k != key}
        faulty = [
            rest,
            rest | {key + "_": value},
            rest | {key: value.unsqueeze(0)},
            rest | {key: value.to(torch.int32)},
        ][count % 4]
        with pytest.raises(UserError) as caught:
            single.split_tensors(faulty, {}, "file")
        text = str(caught.value)
        assert key in text or "it may be damaged" in text, (key, text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 7}, "takes 7 channels and gives 3 is conditioned on an image"),
        ({"num_class_embeds": 5}, r"conditioned on a class \(label_emb\) is not supported"),
    ],
)
def test_other_networks_without_tokens(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        single.split_tensors(plain(**change), {}, "file")


def test_heads_that_do_not_divide_and_notes_that_are_none() -> None:
    with pytest.raises(
        UserError, match="width 64 does not divide into 5 heads: give heads, or its YAML"
    ):
        single.split_tensors(plain(), {}, "file", ReadOptions(heads=5))
    for note in ("[]", "{", '{"num_heads": 0}', '{"num_head_channels": "x"}'):
        with pytest.raises(UserError, match=r"its note sfumato\.heads="):
            single.split_tensors(plain(), {"sfumato.heads": note}, "file")
    config = (
        single.split_tensors(plain(), {"sfumato.heads": '{"num_heads": 1}'}, "file")
        .components["unet"]
        .config
    )
    assert config["attention_head_dim"] is None


def test_fields_outside_the_layout_of_a_network_without_tokens() -> None:
    parts = single.split_tensors(plain(), {}, "file")
    for field, value in (
        ("freq_shift", 1),
        ("norm_num_groups", 16),
        ("downsample_padding", 0),
        ("time_embedding_dim", 64),
        ("new_field", 3),
    ):
        changed = {**parts.components["unet"].config, field: value}
        with pytest.raises(UserError, match=field):
            single.join(
                single.gather(
                    {
                        "unet": type(parts.components["unet"])(
                            changed, parts.components["unet"].tensors
                        )
                    },
                    {},
                )
            )
    for change in (
        {"add_attention": False},
        {"mid_block_type": None},
        {"up_block_types": ["UpBlock2D"] * 3},
        {"downsample_type": "resnet"},
    ):
        with pytest.raises(UserError, match="no name in the original layout"):
            unet_map(
                PLAIN
                | {"block_out_channels": [32, 64, 64], "layers_per_block": 1, **_three(), **change}
            )


def _three() -> dict[str, Any]:
    return {
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "LSUN churches",
            {"unet": {"resblock_updown": False}},
            "down_block_types.*ResnetDownsampleBlock2D",
        ),
        (
            "LSUN churches",
            {"unet": {"use_scale_shift_norm": False}},
            "resnet_time_scale_shift='scale_shift' instead of 'default'",
        ),
        ("LSUN churches", {"unet": {"attention_resolutions": [2]}}, "not the model of the YAML"),
        ("LSUN churches", {"first": {"ch": 64}}, "not the model of the YAML.*block_out_channels"),
        (
            "LSUN churches",
            {"unet": {"context_dim": 512}},
            "context_dim=512 is not supported: expected None",
        ),
        ("LSUN churches", {"unet": {"num_heads_upsample": 4}}, "num_heads_upsample=4 is not known"),
        (
            "LSUN churches",
            {"unet": {"use_spatial_transformer": True}},
            "use_spatial_transformer=True without a conditioner",
        ),
        (
            "LSUN churches",
            {"unet": {"num_heads": 8, "num_head_channels": 32}},
            "expected one of them",
        ),
        ("LSUN churches", {"model": {"concat_mode": True}}, "concat_mode=True is not supported"),
        (
            "LSUN churches",
            {"model": {"cond_stage_config": "__is_first_stage__"}},
            "__is_first_stage__.*not supported",
        ),
        ("LSUN churches", {"model": {"scale_factor": "x"}}, "is not the YAML of a model|could not"),
        (
            "ImageNet, cin256-v2",
            {"unet": {"use_spatial_transformer": False}},
            "use_spatial_transformer=False with a conditioner",
        ),
        (
            "ImageNet, cin256-v2",
            {"unet": {"use_new_attention_order": True}},
            "use_new_attention_order=True is not supported",
        ),
        (
            "ImageNet, cin256-v2",
            {"unet": {"resblock_updown": True}},
            "resblock_updown=True is not supported",
        ),
        (
            "ImageNet, cin256-v2",
            {"model": {"cond_stage_config": "__is_unconditional__"}},
            "use_spatial_transformer=True without a conditioner",
        ),
    ],
)
def test_yamls_that_do_not_fit(name: str, change: dict[str, Any], message: str) -> None:
    values = published_yaml(name)
    params = values["model"]["params"]
    params["unet_config"]["params"] = {**params["unet_config"]["params"], **change.get("unet", {})}
    first = params["first_stage_config"]["params"]
    first["ddconfig"] = {**first["ddconfig"], **change.get("first", {})}
    params |= change.get("model", {})
    if "scale_factor" in change.get("model", {}):
        del params["scale_by_std"]
    with pytest.raises(UserError, match=message) as caught:
        single.split_tensors(
            published_file(name), {}, "file", ReadOptions(original_config=from_yaml(values))
        )
    assert "\n" not in str(caught.value)


# ---- classes -------------------------------------------------------------------------------------

NAMED = {"class_names": ("tench", "great white shark", "7", "shark/ray")}


@pytest.mark.parametrize(
    ("prompt", "row"),
    [("0", 0), (" 3 ", 3), ("+2", 2), ("003", 3), (None, 4), ("", 4), ("  ", 4)],
)
def test_numbers_are_rows(prompt: str | None, row: int) -> None:
    classes = ldm_conditioners.class_embedding()
    result = classes([prompt]).tokens
    assert result.shape == (1, 1, 24) and torch.equal(result[0, 0], classes.table[row])


def test_names_are_rows_too() -> None:
    classes = ldm_conditioners.class_embedding(**NAMED)
    for prompt, row in (
        ("tench", 0),
        ("Great White Sharks", 1),
        ("1", 1),
        ("7", 2),
        ("ray", 3),
        (None, 4),
    ):
        assert torch.equal(classes([prompt]).tokens[0, 0], classes.table[row]), prompt
    with pytest.raises(UserError, match="unknown class 'tenhc': did you mean 'tench'"):
        classes(["tenhc"])
    with pytest.raises(UserError, match="class number 8: expected 0 to 3"):
        classes(["8"])


@pytest.mark.parametrize("wrong", ["4", "-1", "+99", "9" * 5000, "1001", " 12 "])
def test_numbers_out_of_range(wrong: str) -> None:
    with pytest.raises(
        UserError, match=r"class number .*: expected 0 to 3; for no class leave the prompt empty"
    ) as caught:
        ldm_conditioners.class_embedding()([wrong])
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "wrong", ["tench", "1.5", "\u00b2", "\u0663", "0x1", "1 2", "None", "a" * 1000]
)
def test_words_without_names(wrong: str) -> None:
    with pytest.raises(UserError, match="class") as caught:
        ldm_conditioners.class_embedding(20)([wrong])
    assert "expected a number from 0 to 18" in str(caught.value) and len(str(caught.value)) < 250
    for prompts in ("0", []):
        with pytest.raises(UserError, match="expected a list of at least one"):
            ldm_conditioners.class_embedding()(prompts)


def test_labels_of_data() -> None:
    classes = ldm_conditioners.class_embedding()
    assert torch.equal(
        classes.from_labels(torch.tensor([3, -1])).tokens[:, 0], classes.table[[3, 4]]
    )
    for wrong in (4, -2, 10**6):
        with pytest.raises(UserError, match="expected 0 to 3, or -1 for none"):
            classes.from_labels(torch.tensor([0, wrong]))


def test_a_table_of_a_thousand_has_no_row_for_none() -> None:
    assert (
        ldm_conditioners.class_embedding(1000).count == 1000
        and ldm_conditioners.class_embedding(1001).count == 1000
    )
    whole = ldm_conditioners.class_embedding(1000)
    assert torch.equal(whole(["999"]).tokens[0, 0], whole.table[999])
    for none in (lambda: whole([None, "0"]), lambda: whole.null(2)):
        with pytest.raises(UserError, match="no row for no class"):
            none()
    assert (
        ldm_conditioners.class_embedding(1000, unconditional=True).count == 999
        and ldm_conditioners.class_embedding(5, unconditional=False).count == 5
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"class_names": ["a", "b"]}, "2 class names for 4 classes"),
        ({"class_names": ["a", "b", "b", "c"]}, "all of them different"),
        ({"class_names": 3}, "class_names=3, unconditional=True: expected a list"),
        ({"class_names": "abcd"}, "class_names=abcd"),
        ({"unconditional": "yes"}, "unconditional='yes'"),
        ({"something": 1}, "something=1 is not known"),
        ({"_class_name": "nothing"}, "expected an object of class class_embedding"),
    ],
)
def test_damaged_configs_of_classes(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    ldm_conditioners.class_embedding().save(tmp_path)
    file = tmp_path / "conditioner" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(UserError, match=message) as caught:
        ClassEmbedding.from_folder(tmp_path)
    assert str(tmp_path / "conditioner") in str(caught.value)


def test_damaged_tables(tmp_path: Path) -> None:
    ldm_conditioners.class_embedding().save(tmp_path)
    file = tmp_path / "conditioner" / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    nan = whole["embedding.weight"].clone()
    nan[1, 2] = torch.nan
    cases = [
        ({}, "holds nothing"),
        ({"embedding.weight": nan}, "NaN"),
        ({"embedding.weight": whole["embedding.weight"][0]}, "a table"),
    ]
    cases += [
        ({**whole, "more": torch.zeros(2)}, "alone"),
        ({"embedding.weight": torch.zeros(1, 24)}, "at least one besides"),
    ]
    for tensors, message in cases:
        save_file(tensors, file)
        with pytest.raises(UserError, match=message):
            ClassEmbedding.from_folder(tmp_path)
    with pytest.raises(NumericalError, match=r"NaN or infinite in torch\.float16"):
        ClassEmbedding(torch.full((3, 2), 1e6), ClassEmbeddingConfig()).save(
            tmp_path, torch.float16
        )


# ---- text ----------------------------------------------------------------------------------------


def test_a_prompt_is_read_as_bert_reads_it() -> None:
    bert = ldm_conditioners.bert_text()
    tokens = bert(["A RED cat, dogs", None]).tokens
    ids = [2, *map(ldm_conditioners.WORDS.index, ["a", "red", "cat", ",", "dog", "##s"]), 3]
    expected = [ids + [0] * (77 - len(ids)), [2, 3] + [0] * 75]
    with torch.no_grad():
        assert torch.equal(
            tokens, torch.cat([bert.encoder.model(torch.tensor([row])) for row in expected])
        )
    assert torch.equal(bert([""]).tokens, tokens[1:]) and tokens.shape == (2, 77, 24)


def test_prompts_that_do_not_fit_are_not_cut() -> None:
    bert = ldm_conditioners.bert_text()
    bert(["cat " * 75])
    with pytest.raises(UserError, match="has 76 tokens: expected at most 75; shorten it"):
        bert(["cat " * 76])
    for wrong in ("cat", []):
        with pytest.raises(UserError, match="expected a list of at least one"):
            bert(wrong)


def test_damaged_folders_of_text(tmp_path: Path) -> None:
    ldm_conditioners.bert_text().save(tmp_path)
    weights, config, vocabulary = (
        tmp_path / p for p in ("bert/model.safetensors", "bert/config.json", "tokenizer/vocab.txt")
    )
    whole, values = load_file(weights), json.loads(config.read_text())

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            BertText.from_folder(tmp_path)
        assert "\n" not in str(caught.value)
        save_file(whole, weights)
        config.write_text(json.dumps(values))

    key = "model.layers.1.self_attn.q_proj.weight"
    save_file(
        {k: v for k, v in whole.items() if k != key}
        | {"model.odd": torch.zeros(2), "to_logits.bias": torch.zeros(3)},
        weights,
    )
    refused(
        f"1 missing \\({key}\\); 1 not expected \\(model.odd\\); "
        "1 of another shape \\(to_logits.bias "
    )
    save_file({**whole, key: torch.full_like(whole[key], torch.inf)}, weights)
    refused(f"{key} has NaN or infinite numbers")
    weights.unlink()
    refused("has no weights")
    for change, message in (
        ({"encoder_layers": 3}, "missing"),
        ({"encoder_layers": 0}, "encoder_layers=0"),
        ({"d_model": "x"}, "d_model"),
        ({"activation_function": "relu"}, "activation_function='relu' is not supported"),
        ({"scale_embedding": True}, "scale_embedding=True"),
        ({"rotary": True}, "rotary=True is not known"),
        ({"model_type": "bert"}, "of type 'bert': expected ldmbert"),
    ):
        config.write_text(json.dumps(values | change))
        refused(message)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    # vocab.txt alone does
    assert BertText.from_folder(tmp_path)(["a cat"]).tokens.shape == (1, 77, 24)
    vocabulary.write_text("\n".join([*ldm_conditioners.WORDS, "more"]))
    refused(r"tokenizer has \d+ tokens, text transformer \d+: use parts of one model")
    vocabulary.unlink()
    refused("has no tokenizer: expected BERT's tokenizer.json or vocab.txt")


def test_positions_and_precision() -> None:
    bert = ldm_conditioners.bert_text()
    with pytest.raises(UserError, match="78 tokens: this text transformer has 77 positions"):
        bert.encoder.model(torch.zeros(1, 78, dtype=torch.long))
    with pytest.raises(UserError, match="max_position_embeddings=2: expected at least 3"):
        ldm_conditioners.bert_text(max_position_embeddings=2)
    whole = bert(["a red cat", "dogs"]).tokens
    assert torch.equal(bert(["dogs"]).tokens, whole[1:])
    broken = LDMBert(bert.encoder.model.config).eval()
    broken.to_logits.weight.data.fill_(1e6)
    with pytest.raises(NumericalError, match=r"to_logits\.weight of bert is NaN or infinite"):
        type(bert.encoder)(bert.encoder.tokenizer, broken).save(
            Path("tokenizer"), Path("bert"), torch.float16
        )
