"""Single files with a whole SD3 or FLUX model, and autoencoders alone.

diffusers and transformers read written files as the same tensors under the same keys; sfumato reads
them back.
"""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from helpers.clip_encoders import wide_encoder
from helpers.tensors import equal_tensors
from sfumato.checkpoints import families
from sfumato.checkpoints.checkpoint import Checkpoint, Component, RawCheckpoint
from sfumato.checkpoints.families import TransformerFamily
from sfumato.checkpoints.families.flux2 import BATCHES
from sfumato.checkpoints.lazy_tensor import LazyTensor, from_tensors
from sfumato.errors import UserError

LATENTS = {
    family.name: family.latents
    for family in families.registered()
    if isinstance(family, TransformerFamily) and family.latents
}
T5 = {
    "vocab_size": 30,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
}
SD3 = {
    "sample_size": 128,
    "num_layers": 2,
    "num_attention_heads": 1,
    "attention_head_dim": 64,
    "caption_projection_dim": 64,
}
SD3 |= {
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 6,
    "qk_norm": "rms_norm",
}
FLUX = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
}
FLUX |= {
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 14, 14),
    "guidance_embeds": True,
}
LEVELS = {"block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 32}
LEVELS |= {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


def write_whole(
    parts: dict[str, Component], where: str
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    raw = families.write(Checkpoint(parts, path=Path(where)))
    return dict(raw.tensors), dict(raw.metadata)


def read_whole(
    tensors: dict[str, LazyTensor],
    notes: dict[str, str],
    where: str,
    configs: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Component]:
    raw = RawCheckpoint(tensors, notes, Path(where))
    return families.detect(raw.shapes, where).read(raw, None, configs).components


def vae(family: str) -> nn.Module:
    if family == "flux2":
        return diffusers.AutoencoderKLFlux2(**LEVELS, latent_channels=4)
    scale, shift = LATENTS[family]
    bare = {"use_quant_conv": False, "use_post_quant_conv": False}
    return diffusers.AutoencoderKL(
        **LEVELS, latent_channels=16, scaling_factor=scale, shift_factor=shift, **bare
    )


def models(family: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(**T5, tie_word_embeddings=False))
    if family == "sd3":
        second = wide_encoder(
            CLIPTextModelWithProjection,
            hidden_act="gelu",
            hidden_size=128,
            num_attention_heads=2,
            projection_dim=96,
        )
        first = wide_encoder(CLIPTextModelWithProjection)
        with torch.no_grad():
            first.text_projection.weight.copy_(torch.eye(64))
        texts = {"text_encoder": first, "text_encoder_2": second, "text_encoder_3": t5}
        return {"transformer": diffusers.SD3Transformer2DModel(**SD3), "vae": vae(family), **texts}
    texts = {"text_encoder": wide_encoder(CLIPTextModel), "text_encoder_2": t5}
    return {"transformer": diffusers.FluxTransformer2DModel(**FLUX), "vae": vae(family), **texts}


def names(network: nn.Module) -> dict[str, Tensor]:
    """Of a network's weights, as files hold them."""
    tensors = {
        k: v
        for k, v in network.state_dict().items()
        if k != "encoder.embed_tokens.weight" or "shared.weight" not in network.state_dict()
    }
    if not isinstance(network, CLIPTextModel | CLIPTextModelWithProjection):
        return tensors
    return {
        k if k.startswith(("text_model.", "text_projection")) else f"text_model.{k}": v
        for k, v in tensors.items()
    }


def part(network: nn.Module) -> Component:
    if isinstance(network, diffusers.ModelMixin):
        return Component(
            {"_class_name": type(network).__name__, **network.config}, from_tensors(names(network))
        )
    return Component(
        network.config.to_dict() | {"architectures": [type(network).__name__]},
        from_tensors(names(network)),
    )


def file_of(networks: dict[str, nn.Module]) -> dict[str, Tensor]:
    table, notes = write_whole({k: part(v) for k, v in networks.items()}, "folder")
    assert not notes
    return {k: v.load() for k, v in table.items()}


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_whole_and_back(family: str) -> None:
    networks = models(family)
    file = file_of(networks)
    parts = read_whole(from_tensors(file), {}, "file")
    assert parts.keys() == networks.keys()
    for name, result in parts.items():
        assert equal_tensors(
            {k: v.load() for k, v in result.tensors.items()}, names(networks[name])
        ), name
    for name in networks:  # the configs that were read build the same networks
        network, config = networks[name], parts[name].config
        if isinstance(network, diffusers.ModelMixin):
            again = type(network).from_config(config)
            for key in ("scaling_factor", "shift_factor") if name == "vae" else ():
                assert config[key] == network.config[key]
        else:
            assert config["architectures"] == [type(network).__name__]
            again = type(network)(
                type(network.config)(
                    **{k: v for k, v in config.items() if k not in ("architectures", "model_type")}
                )
            )
        again.load_state_dict(network.state_dict())
        if name.startswith("text_encoder"):
            tokens = torch.tensor([[5, 7, 29, 1]])
            with torch.no_grad():
                a, b = (n.eval()(tokens, output_hidden_states=True) for n in (network, again))
            assert all(
                torch.equal(x, y) for x, y in zip(a.hidden_states, b.hidden_states, strict=True)
            )
            assert torch.equal(a[0], b[0])


def test_diffusers_reads_the_parts_of_sd3() -> None:
    networks = models("sd3")
    file = file_of(networks)
    result = single_file_utils.convert_ldm_vae_checkpoint(dict(file), networks["vae"].config)
    assert equal_tensors(result, names(networks["vae"]))
    for part_name, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        tower = single_file_utils.convert_ldm_clip_checkpoint(
            dict(file), f"text_encoders.{name}.transformer."
        )
        expected = names(networks[part_name])
        assert equal_tensors(
            tower | ({"text_projection.weight": torch.eye(64)} if name == "clip_l" else {}),
            expected,
        )
    assert equal_tensors(
        single_file_utils.convert_sd3_t5_checkpoint_to_diffusers(dict(file)),
        names(networks["text_encoder_3"]),
    )
    assert equal_tensors(
        single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(
            below(file, "model.diffusion_model.")
        ),
        names(networks["transformer"]),
    )


def test_a_projection_that_is_none_is_kept() -> None:
    networks = models("sd3")
    with torch.no_grad():
        networks["text_encoder"].text_projection.weight.mul_(2)
    file = file_of(networks)
    again = (
        read_whole(from_tensors(file), {}, "file")["text_encoder"]
        .tensors["text_projection.weight"]
        .load()
    )
    assert torch.equal(again, 2 * torch.eye(64))


def test_files_as_they_come() -> None:
    """Without text encoders; with `vae.` before the autoencoder; with T5's table twice; with scales
    of CLIP's loss.
    """
    networks = models("sd3")
    file = file_of(networks)
    bare = {k: v for k, v in file.items() if not k.startswith("text_encoders.")}
    assert read_whole(from_tensors(bare), {}, "file").keys() == {"transformer", "vae"}
    renamed = {k.replace("first_stage_model.", "vae."): v for k, v in file.items()}
    renamed |= {
        "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight": file[
            "text_encoders.t5xxl.transformer.shared.weight"
        ]
    }
    renamed |= {
        "text_encoders.clip_g.logit_scale": torch.ones(()),
        "text_encoders.t5xxl.logit_scale": torch.ones(()),
    }
    parts = read_whole(from_tensors(renamed), {}, "file")
    assert all(
        equal_tensors({k: v.load() for k, v in p.tensors.items()}, names(networks[n]))
        for n, p in parts.items()
    )
    for odd in ("something.else", "text_encoders.gemma.weight", "text_encoders.clip_l.more"):
        with pytest.raises(UserError, match=odd.replace(".", r"\.")):
            read_whole(from_tensors(file | {odd: torch.ones(1)}), {}, "file")
    for lost, extra in (
        ("first_stage_model.decoder.conv_out.weight", "first_stage_model.x"),
        ("text_encoders.t5xxl.transformer.shared.weight", None),
    ):
        table = {k: v for k, v in file.items() if k != lost} | (
            {extra: torch.ones(1)} if extra else {}
        )
        with pytest.raises(UserError, match=lost.replace(".", r"\.")):
            read_whole(from_tensors(table), {}, "file")


@pytest.mark.parametrize("family", ["sd3", "flux", "flux2"])
def test_autoencoder_alone(family: str) -> None:
    network = vae(family)
    file = file_of({"vae": network})
    assert not any(k.startswith(("vae.", "first_stage_model.")) for k in file)
    shapes = {k: tuple(v.shape) for k, v in file.items()}
    # of others `convert` asks for the config
    assert families.detect(shapes, "file").tells_latents is (family == "flux2")
    config = None if family == "flux2" else {"vae": dict(network.config)}
    for tensors in (file, {k: v for k, v in file.items() if k != BATCHES}):
        result = read_whole(from_tensors(tensors), {}, "file", config)["vae"]
        assert equal_tensors({k: v.load() for k, v in result.tensors.items()}, network.state_dict())
    if family == "flux2":
        assert all(
            list(v) == result.config[k] if isinstance(v, tuple) else v == result.config[k]
            for k, v in network.config.items()
            if k in result.config
        )
        assert (
            file["encoder.quant_conv.weight"] is not None
            and file["decoder.post_quant_conv.bias"] is not None
        )
        assert result.config["_class_name"] == "AutoencoderKLFlux2"
    else:
        assert equal_tensors(
            single_file_utils.convert_ldm_vae_checkpoint(dict(file), network.config),
            network.state_dict(),
        )


def test_parts_without_a_place_are_refused() -> None:
    networks = models("flux")
    with pytest.raises(UserError, match="text_encoder_3 has no place"):
        write_whole(
            {k: part(v) for k, v in networks.items()}
            | {"text_encoder_3": part(networks["text_encoder_2"])},
            "folder",
        )
    with pytest.raises(UserError, match="scale and shift"):
        write_whole(
            {"transformer": part(networks["transformer"]), "vae": part(vae("sd3"))}, "folder"
        )
    with pytest.raises(UserError, match="expected a diffusion transformer"):
        write_whole({"text_encoder": part(networks["text_encoder"])}, "folder")
    with pytest.raises(UserError, match="of no known layout"):
        read_whole(from_tensors({"a.weight": torch.ones(2)}), {}, "file")
    twos = diffusers.Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 4, 4),
    )
    with pytest.raises(UserError, match="vae has no place in a single file with a Flux2"):
        write_whole({"transformer": part(twos), "vae": part(vae("flux2"))}, "folder")
