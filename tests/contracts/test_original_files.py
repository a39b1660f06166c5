"""Files in the original layouts as published.

They are pickles, nested, with buffers and running averages, damaged, renamed, transposed, of other
kinds; each is read rightly or refused in one sentence that names the error.
"""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import helpers.single_files as single
from helpers.tensors import equal_tensors
from sfumato.checkpoints import families
from sfumato.checkpoints.checkpoint import Checkpoint, OriginalConfig, ReadOptions
from sfumato.checkpoints.families._unet_map import unet_map
from sfumato.checkpoints.families._vae import vae_map
from sfumato.checkpoints.families.ldm_yaml import from_yaml, read_yaml
from sfumato.checkpoints.weight_map import WeightMap, with_prefix
from sfumato.errors import UserError

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 64,
}
KL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
}
VQ: dict[str, Any] = KL | {"_class_name": "VQModel", "num_vq_embeddings": 11, "vq_embed_dim": 4}
VQ |= {
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
}
CLIP: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "vocab_size": 20,
    "max_position_embeddings": 7,
}
BERT: dict[str, Any] = {
    "d_model": 64,
    "encoder_ffn_dim": 96,
    "encoder_layers": 2,
    "encoder_attention_heads": 8,
    "head_dim": 4,
}
BERT |= {"vocab_size": 20, "max_position_embeddings": 7}


def draw(rows: list[WeightMap]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {r.source: torch.randn(r.stored, generator=generator) for r in rows}


def body(vae: dict[str, Any] = KL, **fields: Any) -> dict[str, Tensor]:
    return draw(with_prefix(unet_map(UNET | fields), "model.diffusion_model.")) | draw(
        with_prefix(vae_map(vae), "first_stage_model.")
    )


def sd1() -> dict[str, Tensor]:
    return body() | draw(with_prefix(single.clip_map(CLIP), "cond_stage_model.transformer."))


def equal(a: Checkpoint, b: Checkpoint) -> bool:
    return a.components.keys() == b.components.keys() and all(
        a.components[k].config == b.components[k].config
        and equal_tensors(single.weights(a.components[k]), single.weights(b.components[k]))
        for k in a.components
    )


def test_pickles_and_safetensors_are_the_same_model(tmp_path: Path) -> None:
    file, expected = sd1(), single.split_tensors(sd1(), {}, "file")
    save_file(file, tmp_path / "a.safetensors")
    torch.save({"global_step": 470000, "state_dict": file, "epoch": 3}, tmp_path / "a.ckpt")
    torch.save(file, tmp_path / "a.bin")
    torch.save(
        {"state_dict": {"state_dict": file}},
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=False,
    )
    for name in ("a.safetensors", "a.ckpt", "a.bin", "a.pt"):
        assert equal(single.split(tmp_path / name), expected), name


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_would_run_code_does_not_run(tmp_path: Path, new: bool) -> None:
    witness = tmp_path / "witness"
    torch.save(
        {"state_dict": sd1(), "x": Evil(witness)},
        tmp_path / "evil.ckpt",
        _use_new_zipfile_serialization=new,
    )
    with pytest.raises(
        UserError, match=r"evil\.ckpt is refused: it is a pickle that wants to run code"
    ):
        single.split(tmp_path / "evil.ckpt")
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Evil(witness)))
    with pytest.raises(UserError, match=r"bare\.bin"):
        single.split(tmp_path / "bare.bin")
    assert not witness.exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)  # the trap works where nobody looks
    assert witness.exists()


def test_names_of_training_frameworks_are_placeholders(tmp_path: Path) -> None:
    """SD 1.4's checkpoint names Lightning's callbacks: it is read, the module is never imported,
    and the trick does not open other doors.
    """
    path, witness = tmp_path / "lightning.ckpt", tmp_path / "witness"

    def swap(old: bytes, new: bytes) -> None:
        with zipfile.ZipFile(path) as archive:
            entries = {i.filename: archive.read(i) for i in archive.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, data in entries.items():
                archive.writestr(name, data.replace(old, new))

    torch.save({"state_dict": sd1(), "callbacks": {Path: {"monitor": "loss"}}}, path)
    module = Path.__module__.encode()
    swap(
        b"c" + module + b"\nPath\n",
        b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n",
    )
    assert equal(single.split(path), single.split_tensors(sd1(), {}, "file"))
    torch.save({"state_dict": sd1(), "x": Evil(witness)}, path)
    swap(b"cposix\nmkdir\n", b"cpytorch_lightning.x\nmkdir\n")
    # a call of a placeholder is a placeholder
    assert equal(single.split(path), single.split_tensors(sd1(), {}, "file"))
    assert not witness.exists()


def test_truncated_files(tmp_path: Path) -> None:
    save_file(sd1(), tmp_path / "a.safetensors")
    torch.save({"state_dict": sd1()}, tmp_path / "a.ckpt")
    for name in ("a.safetensors", "a.ckpt"):
        whole = (tmp_path / name).read_bytes()
        for size in (0, 1, 7, 100, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(UserError, match=r"a\.(ckpt|safetensors)"):
                single.split(tmp_path / name)


def test_strange_files(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "none.pt")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "x.zip").write_bytes(b"PK")
    cases = {
        "list.pt": "expected a dictionary",
        "none.pt": "no tensors",
        "other.safetensors": "no known layout",
        "x.zip": "ends in .safetensors",
        "absent.ckpt": "missing",
        "absent.safetensors": "missing",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            single.split(tmp_path / name)
    with pytest.raises(UserError, match="Playground"):
        single.split_tensors(sd1() | {"edm_mean": torch.zeros(4)}, {}, "file")


def test_missing_extra_misshapen_and_integer_keys_are_in_one_message() -> None:
    file = sd1()
    wide = "model.diffusion_model.input_blocks.3.0.in_layers.2.weight"
    del (
        file["model.diffusion_model.output_blocks.1.0.in_layers.0.bias"],
        file["first_stage_model.decoder.mid.attn_1.q.weight"],
    )
    file["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc9.bias"] = torch.zeros(3)
    file["somewhere.else"] = torch.zeros(3)
    file[wide] = file[wide].transpose(0, 1)
    file["model.diffusion_model.out.2.weight"] = torch.zeros(4, 32, 3, 3, dtype=torch.int64)
    with pytest.raises(UserError) as caught:
        single.split_tensors(file, {}, "some.safetensors")
    text = str(caught.value)
    for piece in (
        "some.safetensors",
        "2 missing (first_stage_model.decoder.mid.attn_1.q.weight, "
        "model.diffusion_model.output_blocks.1.0.in_layers.0.bias)",
        "2 not expected (cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc9.bias, "
        "somewhere.else)",
        f"1 of another shape ({wide} (32, 64, 3, 3) instead of (64, 32, 3, 3))",
        "1 not of floating-point numbers (model.diffusion_model.out.2.weight int64)",
    ):
        assert piece in text, piece


def test_every_single_fault_is_refused_and_names_its_key() -> None:
    """One key in three, one at a time: gone, renamed, transposed or flattened, of whole numbers.

    None goes through.
    """
    whole = sd1()
    for count, (key, value) in enumerate(list(whole.items())[::3]):
        rest = {k: v for k, v in whole.items() if k != key}
        faulty = [
            rest,
            rest | {key + "_": value},
            rest | {key: value.unsqueeze(0)},
            rest | {key: value.to(torch.int32)},
        ][count % 4]
        with pytest.raises(UserError) as caught:
            single.split_tensors(faulty, {}, "file")
        assert key in str(caught.value), key
        if count % 2 and value.ndim == 2 and value.shape[0] != value.shape[1]:
            with pytest.raises(UserError):
                single.split_tensors(rest | {key: value.T}, {}, "file")


def test_recognised_buffers_are_dropped() -> None:
    file, table = sd1(), torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    names = (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "logvar",
    )
    names += (
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
    )
    names += (
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "model_ema.decay",
        "model_ema.num_updates",
    )
    names += (
        "low_res_scale_model.betas",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.logit_scale",
    )
    names += ("first_stage_model.loss.discriminator.main.0.weight",)
    extra = {k: table for k in names}
    extra["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(7)[None]
    assert equal(
        single.split_tensors(file | extra, {}, "file"), single.split_tensors(file, {}, "file")
    )


def test_betas_are_read_from_the_file() -> None:
    steps = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64).square()
    result = single.split_tensors(sd1() | {"betas": steps.float()}, {}, "file").schedulers[
        "scheduler"
    ]
    assert (result["beta_schedule"], result["beta_start"], result["beta_end"]) == (
        "scaled_linear",
        0.0015,
        0.0195,
    )
    result = single.split_tensors(
        sd1() | {"betas": torch.linspace(0.0001, 0.02, 500)}, {}, "file"
    ).schedulers["scheduler"]
    assert (
        result["beta_schedule"],
        result["beta_start"],
        result["beta_end"],
        result["num_train_timesteps"],
    ) == ("linear", 0.0001, 0.02, 500)
    odd = torch.rand(10) * 0.1 + 0.1
    result = single.split_tensors(sd1() | {"betas": odd}, {}, "file").schedulers["scheduler"]
    assert torch.tensor(result["trained_betas"]).equal(odd)
    with pytest.raises(UserError, match="betas of shape"):
        single.split_tensors(sd1() | {"betas": torch.zeros(4)}, {}, "file")


def sd2() -> dict[str, Tensor]:
    fields = {"block_out_channels": [64, 128], "use_linear_projection": True}
    return body(**fields) | draw(with_prefix(single.open_clip_map(CLIP), "cond_stage_model.model."))


def test_the_parameterization_comes_from_caller_file_or_default(tmp_path: Path) -> None:
    def detected(
        notes: dict[str, str] | None = None, prediction: str | None = None, **extra: Tensor
    ) -> tuple[str, int]:
        result = single.split_tensors(
            sd2() | extra, notes or {}, "file", ReadOptions(prediction_type=prediction)
        )
        return result.schedulers["scheduler"]["prediction_type"], result.components["unet"].config[
            "sample_size"
        ]

    assert detected() == ("v_prediction", 96)
    assert detected(prediction="epsilon") == ("epsilon", 64)
    assert detected({"modelspec.prediction_type": "epsilon"}) == ("epsilon", 64)
    assert detected({"modelspec.prediction_type": "epsilon"}, prediction="v_prediction") == (
        "v_prediction",
        96,
    )
    assert detected({"modelspec.architecture": "stable-diffusion-v2-512"}) == ("epsilon", 64)
    assert detected({"modelspec.architecture": "stable-diffusion-v2-768-v"}) == ("v_prediction", 96)
    torch.save({"global_step": 875000, "state_dict": sd2()}, tmp_path / "base.ckpt")
    assert (
        single.split(tmp_path / "base.ckpt").schedulers["scheduler"]["prediction_type"] == "epsilon"
    )
    with pytest.raises(UserError, match="note modelspec"):
        detected({"modelspec.prediction_type": "banana"})
    with pytest.raises(UserError, match="unknown prediction_type"):
        ReadOptions(prediction_type="flow")
    result = single.split_tensors(
        sd1() | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, {}, "file"
    ).schedulers["scheduler"]
    assert result["prediction_type"] == "v_prediction" and result["rescale_betas_zero_snr"] is True


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_type_survives_the_file(tmp_path: Path, prediction: str) -> None:
    for make in (sd1, sd2):
        parts = single.split_tensors(make(), {}, "file", ReadOptions(prediction_type=prediction))
        single.save(tmp_path / "a.safetensors", parts)
        again = single.split(tmp_path / "a.safetensors")
        assert equal(again, parts) and again.schedulers == parts.schedulers


def test_requested_running_averages_are_absent() -> None:
    with pytest.raises(UserError, match="no running average"):
        single.split_tensors(sd1(), {}, "file", ReadOptions(ema=True))


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("unet", "attention_head_dim", 4),
        ("unet", "freq_shift", 1),
        ("unet", "norm_eps", 1e-6),
        ("unet", "act_fn", "gelu"),
        ("unet", "something_new", 1),
        ("unet", "time_cond_proj_dim", 256),
        ("vae", "norm_num_groups", 16),
        ("vae", "shift_factor", 0.1),
        ("vae", "latents_mean", [0.0, 0.0, 0.0, 1.0]),
        ("text_encoder", "num_attention_heads", 4),
        ("text_encoder", "layer_norm_eps", 1e-6),
    ],
)
def test_join_refuses_fields_outside_the_layout(part: str, field: str, value: Any) -> None:
    parts = single.split_tensors(sd1(), {}, "file")
    single.join(parts)
    parts.components[part].config[field] = value
    with pytest.raises(UserError, match=field):
        single.join(parts)


def test_join_refuses_weights_and_schedules_that_do_not_fit(tmp_path: Path) -> None:
    parts = single.split_tensors(sd1(), {}, "file")
    with pytest.raises(UserError, match=r"written as \.safetensors"):
        single.save(tmp_path / "a.ckpt", parts)
    flow = Checkpoint(
        parts.components, {"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}}
    )
    with pytest.raises(UserError, match="no table of betas"):
        single.join(flow)
    del parts.components["unet"].tensors["conv_in.bias"]
    with pytest.raises(UserError, match=r"1 missing \(conv_in.bias\)"):
        single.join(parts)
    with pytest.raises(UserError, match="'controlnet' has no place"):
        single.join(single.gather(parts.components | {"controlnet": parts.components["vae"]}, {}))
    assert not list(tmp_path.iterdir())


def test_scale_of_latents() -> None:
    file = sd1()
    assert (
        single.split_tensors(file, {}, "file").components["vae"].config["scaling_factor"] == 0.18215
    )
    result = single.split_tensors(file | {"scale_factor": torch.tensor(0.22765929)}, {}, "file")
    assert result.components["vae"].config["scaling_factor"] == pytest.approx(0.22765929, abs=1e-8)
    assert equal(single.split_tensors(single.join(result), single.notes(result), "file"), result)
    assert (
        single.split_tensors(file, {}, "file", ReadOptions(scaling_factor=0.5))
        .components["vae"]
        .config["scaling_factor"]
        == 0.5
    )
    lone = {k: v for k, v in file.items() if k.startswith("first_stage")}
    xl = single.split_tensors(
        lone, {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}, "file"
    )
    assert xl.components["vae"].config["scaling_factor"] == 0.13025


@pytest.mark.parametrize("vae", [KL, VQ], ids=["kl", "vq"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_autoencoders_alone(vae: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    file = draw(with_prefix(vae_map(vae), prefix)) | {f"{prefix}loss.logvar": torch.zeros(())}
    torch.save({"state_dict": file}, tmp_path / "model.ckpt")
    result = single.split(tmp_path / "model.ckpt")
    config = result.components["vae"].config
    assert result.kind == "autoencoder" and {k: config[k] for k in vae} == vae
    assert config["scaling_factor"] == (1.0 if vae is VQ else 0.18215)
    single.save(tmp_path / "one.safetensors", result)
    assert equal(single.split(tmp_path / "one.safetensors"), result)


def ldm_text() -> dict[str, Tensor]:
    return body() | draw(with_prefix(single.bert_map(BERT), "cond_stage_model.transformer."))


def ldm_class() -> dict[str, Tensor]:
    return body(VQ) | draw(
        with_prefix(single.class_map({"n_classes": 5, "embed_dim": 64}), "cond_stage_model.")
    )


def test_latent_diffusions_own_models(tmp_path: Path) -> None:
    result = single.split_tensors(ldm_text(), {}, "file")
    assert (
        result.kind == "ldm-text" and {k: result.components["bert"].config[k] for k in BERT} == BERT
    )
    assert equal(single.split_tensors(single.join(result), single.notes(result), "file"), result)
    with pytest.raises(UserError, match="give heads, or its YAML"):
        single.split_tensors(ldm_class(), {}, "file")
    result = single.split_tensors(ldm_class(), {}, "file", ReadOptions(heads=1))
    assert (
        result.kind == "ldm-class" and result.components["vae"].config["_class_name"] == "VQModel"
    )
    assert result.components["class_embedder"].config == {
        "_class_name": "ClassEmbedder",
        "n_classes": 5,
        "embed_dim": 64,
    }
    assert (
        result.schedulers["scheduler"]["beta_start"],
        result.schedulers["scheduler"]["beta_end"],
    ) == (0.0015, 0.0195)
    single.save(tmp_path / "one.safetensors", result)
    assert equal(single.split(tmp_path / "one.safetensors", ReadOptions(heads=1)), result)


YAML = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  base_learning_rate: 1.0e-06
  params:
    linear_start: 0.0015
    linear_end: 0.0195
    timesteps: 1000
    cond_stage_key: class_label
    image_size: 8
    channels: 4
    conditioning_key: crossattn
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {image_size: 8, in_channels: 4, out_channels: 4, model_channels: 32,
        attention_resolutions: [1], num_res_blocks: 1,
        channel_mult: [1, 2], num_head_channels: 32, use_spatial_transformer: true,
        transformer_depth: 1, context_dim: 64}
    first_stage_config:
      target: ldm.models.autoencoder.VQModelInterface
      params:
        embed_dim: 4
        n_embed: 11
        ddconfig: {double_z: false, z_channels: 4, resolution: 16, in_channels: 3, out_ch: 3,
          ch: 32, ch_mult: [1, 2], num_res_blocks: 1, attn_resolutions: [8], dropout: 0.0}
        lossconfig: {target: torch.nn.Identity}
    cond_stage_config:
      target: ldm.modules.encoders.modules.ClassEmbedder
      params: {embed_dim: 64, n_classes: 5, key: class_label}
"""


def changed_yaml(**changes: tuple[str, str]) -> OriginalConfig:
    import yaml

    text = YAML
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    return from_yaml(yaml.safe_load(text))


def test_yaml_sets_fields_that_keys_do_not_determine(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(YAML)
    read = read_yaml(tmp_path / "config.yaml")
    result = single.split_tensors(ldm_class(), {}, "file", ReadOptions(original_config=read))
    assert result.components["unet"].config["attention_head_dim"] == [1, 2]
    assert result.components["vae"].config["scaling_factor"] == 1.0
    assert result.schedulers["scheduler"]["prediction_type"] == "epsilon"
    more = changed_yaml(
        a=("num_head_channels: 32", "num_heads: 4"),
        b=("image_size: 8\n", "image_size: 8\n    parameterization: v\n    scale_factor: 0.5\n"),
    )
    result = single.split_tensors(ldm_class(), {}, "file", ReadOptions(original_config=more))
    assert (
        result.components["unet"].config["attention_head_dim"] == 4
        and result.components["vae"].config["scaling_factor"] == 0.5
    )
    assert result.schedulers["scheduler"]["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("channel_mult: [1, 2], num", "channel_mult: [1, 3], num", "block_out_channels"),
        ("n_embed: 11", "n_embed: 12", "num_vq_embeddings"),
        ("n_classes: 5", "n_classes: 6", "n_classes"),
        ("attn_resolutions: [8]", "attn_resolutions: []", "down_block_types"),
        ("context_dim: 64", "context_dim: 32", "cross_attention_dim"),
    ],
)
def test_a_yaml_of_another_model_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=f"not the model of the YAML.*{message}"):
        single.split_tensors(
            ldm_class(), {}, "file", ReadOptions(original_config=changed_yaml(a=(old, new)))
        )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ddpm.LatentDiffusion", "ddpm.Other", "unknown target of a model"),
        ("openaimodel.UNetModel", "openaimodel.Other", "unknown target of a U-Net"),
        ("VQModelInterface", "Other", "unknown target of a first stage"),
        ("ClassEmbedder", "Other", "unknown target of a conditioner"),
        ("timesteps: 1000", "timesteps: 1000\n    strange: 3", "strange=3 is not known"),
        ("context_dim: 64", "context_dim: 64, strange: 3", "strange=3 is not known"),
        ("n_embed: 11", "n_embed: 11\n        strange: 3", "strange=3 is not known"),
        (
            "use_spatial_transformer: true",
            "use_spatial_transformer: false",
            "use_spatial_transformer",
        ),
        ("timesteps: 1000", "beta_schedule: cosine", "beta_schedule"),
        ("num_head_channels: 32, ", "", "num_heads"),
        ("  target: ldm.models.diffusion.ddpm.LatentDiffusion\n", "", "not the YAML of a model"),
    ],
)
def test_unknown_targets_and_parameters_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        changed_yaml(a=(old, new))


def test_damaged_yaml(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    cases = ("", "a: [", "- 1\n- 2", f"!!python/object/apply:os.mkdir ['{witness}']", "\x00")
    for text in cases:
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(UserError, match=r"a\.yaml"):
            read_yaml(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="absent"):
        read_yaml(tmp_path / "absent.yaml")
    assert not witness.exists()


def test_half_precision_is_kept_and_nothing_is_copied(tmp_path: Path) -> None:
    save_file({k: v.half() for k, v in sd1().items()}, tmp_path / "half.safetensors")
    result = single.split(tmp_path / "half.safetensors")
    assert {v.dtype for p in result.components.values() for v in p.tensors.values()} == {
        torch.float16
    }
    file = sd1()
    stored = {v.untyped_storage().data_ptr() for v in file.values()}
    parts = single.split_tensors(file, {}, "file")
    assert all(
        v.load().untyped_storage().data_ptr() in stored
        for p in parts.components.values()
        for v in p.tensors.values()
    )


def test_a_part_that_is_wholly_absent_is_absent(tmp_path: Path) -> None:
    lone = {k: v for k, v in sd2().items() if k.startswith("model.")}
    result = single.split_tensors(lone, {}, "file")
    assert result.kind == "sd2" and result.components.keys() == {"unet"}
    lone = {k: v for k, v in sd1().items() if k.startswith("model.")}
    with pytest.raises(UserError, match="give heads"):  # tokens 64 wide: not SD 1, so who knows
        single.split_tensors(lone, {}, "file")
    result = single.split_tensors(lone, {}, "file", ReadOptions(heads=8))
    single.save(tmp_path / "a.safetensors", single.split_tensors(sd1(), {}, "file"))
    assert result.components.keys() == {"unet"} and set(
        load_file(tmp_path / "a.safetensors")
    ) > set(lone)


def test_every_family_is_reachable() -> None:
    ldm = {"ldm-text", "ldm-class", "ldm-unconditional"}
    named = {family.name for family in families.registered() if not family.is_transformer}
    assert named == {"sd1", "sd2", "x4-upscaler", "sdxl", "sdxl-refiner", *ldm, "autoencoder"}
