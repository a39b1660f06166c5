"""A small random model of every family: its parts as diffusers' and transformers' networks build
them, and its schedulers.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from sfumato.checkpoints.checkpoint import Checkpoint, Component
from sfumato.checkpoints.lazy_tensor import from_tensors

LEVELS = {
    "D": ("DownBlock2D", "UpBlock2D"),
    "C": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
    "A": ("AttnDownBlock2D", "AttnUpBlock2D"),
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
SD3: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 3,
    "num_attention_heads": 1,
    "attention_head_dim": 64,
    "caption_projection_dim": 64,
}
SD3 |= {
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 6,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0,),
}
FLUX: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
}
FLUX |= {
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 14, 14),
    "guidance_embeds": True,
}
FLUX2: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
}
FLUX2 |= {
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 12,
    "axes_dims_rope": (4, 4, 4, 4),
}
DIT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 72,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 7,
}
DIT |= {"out_channels": 8, "norm_eps": 1e-6}
PIXART: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 72,
    "num_layers": 2,
    "cross_attention_dim": 144,
    "caption_channels": 24,
}
Z_IMAGE: dict[str, Any] = {
    "in_channels": 16,
    "dim": 64,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
}
Z_IMAGE |= {"cap_feat_dim": 24, "axes_dims": (8, 12, 12), "axes_lens": (1536, 512, 512)}


def unet(levels: str, widths: tuple[int, ...], **fields: Any) -> nn.Module:
    """A U-Net, a letter of LEVELS each level."""
    config: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": widths,
    } | fields
    kinds = {
        "down_block_types": [LEVELS[k][0] for k in levels],
        "up_block_types": [LEVELS[k][1] for k in reversed(levels)],
    }
    if "A" in levels:
        return diffusers.UNet2DModel(**kinds, **config)
    return diffusers.UNet2DConditionModel(**kinds, **{"cross_attention_dim": 64} | config)


def vae(kind: type[nn.Module] = diffusers.AutoencoderKL, **fields: Any) -> nn.Module:
    """An autoencoder of two levels."""
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    shared: dict[str, Any] = {
        "block_out_channels": [32, 64],
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 32,
    }
    return kind(**shared | kinds | fields)


def clip(kind: type[nn.Module] = CLIPTextModel, **fields: Any) -> nn.Module:
    """A CLIP text encoder."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "vocab_size": 50,
    }
    return kind(
        CLIPTextConfig(
            **sizes
            | {
                "max_position_embeddings": 9,
                "projection_dim": 64,
                "bos_token_id": 0,
                "eos_token_id": 2,
            }
            | fields
        )
    )


def t5() -> nn.Module:
    """T5's encoder."""
    sizes = {
        "vocab_size": 30,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 3,
    }
    return T5EncoderModel(
        T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    )


def qwen3() -> nn.Module:
    """A language model whose head is its table of tokens."""
    sizes = {
        "vocab_size": 30,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8, tie_word_embeddings=True))


def _sd1(**fields: Any) -> dict[str, nn.Module]:
    return {"unet": unet("CCD", (32, 64, 64), **fields), "vae": vae(), "text_encoder": clip()}


def _sd2(**fields: Any) -> dict[str, nn.Module]:
    network = unet(
        "CCD", (64, 128, 128), attention_head_dim=[1, 2, 2], use_linear_projection=True, **fields
    )
    return {
        "unet": network,
        "vae": vae(),
        "text_encoder": clip(hidden_act="gelu", num_hidden_layers=23),
    }


def _upscaler() -> dict[str, nn.Module]:
    only = {"only_cross_attention": [True, True, False], "num_class_embeds": 5, "in_channels": 7}
    network = unet("DCC", (32, 32, 96), use_linear_projection=True, **only)
    return {
        "unet": network,
        "vae": vae(scaling_factor=0.08333),
        "text_encoder": clip(hidden_act="gelu", num_hidden_layers=23),
    }


def _sdxl(sizes: int, levels: str, **fields: Any) -> dict[str, nn.Module]:
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + sizes * 8,
    }
    network = unet(
        levels,
        (64, 128, 128),
        attention_head_dim=[1, 2, 2],
        use_linear_projection=True,
        **added | fields,
    )
    second = clip(CLIPTextModelWithProjection, hidden_act="gelu", num_hidden_layers=12)
    return {"unet": network, "vae": vae(scaling_factor=0.13025), "text_encoder_2": second}


def _sdxl_base(**fields: Any) -> dict[str, nn.Module]:
    blocks = {"transformer_layers_per_block": [1, 2, 3], "layers_per_block": 2}
    return _sdxl(6, "DCC", **blocks | fields) | {"text_encoder": clip()}


def _sd3() -> dict[str, nn.Module]:
    first = clip(CLIPTextModelWithProjection)
    second = clip(
        CLIPTextModelWithProjection,
        hidden_act="gelu",
        hidden_size=128,
        num_attention_heads=2,
        projection_dim=96,
    )
    return {
        "transformer": diffusers.SD3Transformer2DModel(**SD3),
        "vae": _latents16(1.5305, 0.0609),
    } | {
        "text_encoder": first,
        "text_encoder_2": second,
        "text_encoder_3": t5(),
    }


def _flux() -> dict[str, nn.Module]:
    return {
        "transformer": diffusers.FluxTransformer2DModel(**FLUX),
        "vae": _latents16(0.3611, 0.1159),
        "text_encoder": clip(),
        "text_encoder_2": t5(),
    }


def _z_image() -> dict[str, nn.Module]:
    return {
        "transformer": diffusers.ZImageTransformer2DModel(**Z_IMAGE),
        "vae": _latents16(0.3611, 0.1159),
        "text_encoder": qwen3(),
    }


def _latents16(scale: float, shift: float) -> nn.Module:
    bare = {"use_quant_conv": False, "use_post_quant_conv": False}
    return vae(latent_channels=16, scaling_factor=scale, shift_factor=shift, **bare)


def _bert() -> nn.Module:
    sizes = {
        "vocab_size": 30,
        "max_position_embeddings": 9,
        "encoder_layers": 2,
        "encoder_ffn_dim": 48,
    }
    return LDMBertModel(LDMBertConfig(**sizes, head_dim=4, d_model=64))


class _Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 64)


def _plain() -> nn.Module:
    return unet(
        "DA",
        (32, 64),
        in_channels=3,
        out_channels=3,
        attention_head_dim=32,
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
    )


MODELS: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "autoencoder": lambda: {
        "vae": vae(diffusers.VQModel, num_vq_embeddings=7, vq_embed_dim=3, scaling_factor=1.0)
    },
    "dit": lambda: {"transformer": diffusers.DiTTransformer2DModel(**DIT)},
    "flux": _flux,
    "flux2": lambda: {"transformer": diffusers.Flux2Transformer2DModel(**FLUX2)},
    "ldm-text": lambda: {"unet": unet("CD", (32, 64)), "vae": vae(), "bert": _bert()},
    "ldm-class": lambda: {
        "unet": unet("CD", (32, 64)),
        "vae": vae(scaling_factor=1.0),
        "class_embedder": _Classes(),
    },
    "ldm-unconditional": lambda: {
        "unet": _plain(),
        "vae": vae(latent_channels=3, scaling_factor=1.0),
    },
    "pixart": lambda: {"transformer": diffusers.PixArtTransformer2DModel(**PIXART)},
    "sd1": _sd1,
    "sd2": _sd2,
    "sd3": _sd3,
    "sdxl": _sdxl_base,
    "sdxl-refiner": lambda: _sdxl(5, "DCD", transformer_layers_per_block=2),
    "sit": lambda: {"transformer": diffusers.DiTTransformer2DModel(**DIT)},
    "x4-upscaler": _upscaler,
    "z_image": _z_image,
}
"""By the names of families."""
VARIANTS: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "sd1-inpainting": lambda: _sd1(in_channels=9),
    "sd1-pix2pix": lambda: _sd1(in_channels=8),
    "sd2-inpainting": lambda: _sd2(in_channels=9),
    "sdxl-inpainting": lambda: _sdxl_base(in_channels=9),
}
"""With other inputs of their U-Nets."""
PREDICTIONS = {"sd2": "v_prediction", "x4-upscaler": "v_prediction"}
BETAS = {
    "x4-upscaler": (0.0001, 0.02),
    "ldm-class": (0.0015, 0.0195),
    "ldm-unconditional": (0.0015, 0.0195),
}


def scheduler(name: str, prediction: str | None = None) -> dict[str, Any]:
    """scheduler_config.json of a U-Net's family."""
    start, end = BETAS.get(name, (0.00085, 0.012))
    return SCHEDULER | {
        "beta_start": start,
        "beta_end": end,
        "prediction_type": prediction or PREDICTIONS.get(name, "epsilon"),
    }


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """A network's weights as files hold them."""
    state = network.state_dict()
    if isinstance(network, Qwen3ForCausalLM):
        return {k: v for k, v in state.items() if k != "lm_head.weight"}
    tensors = {
        k: v
        for k, v in state.items()
        if k != "encoder.embed_tokens.weight" or "shared.weight" not in state
    }
    if not isinstance(network, CLIPTextModel | CLIPTextModelWithProjection):
        return tensors
    return {
        k if k.startswith(("text_model.", "text_projection")) else f"text_model.{k}": v
        for k, v in tensors.items()
    }


def component(network: nn.Module) -> Component:
    """A part of a checkpoint."""
    if isinstance(network, _Classes):
        config: dict[str, Any] = {"_class_name": "ClassEmbedder", "n_classes": 5, "embed_dim": 64}
    elif isinstance(network, LDMBertModel):
        config = network.config.to_dict()
    elif isinstance(network, diffusers.ModelMixin):
        config = {**network.config, "_class_name": type(network).__name__}
    else:
        config = network.config.to_dict() | {"architectures": [type(network).__name__]}
    return Component(config, from_tensors(tensors_of(network)))


def networks(name: str) -> dict[str, nn.Module]:
    """The networks of a model, with random weights."""
    torch.manual_seed(0)
    parts = (MODELS | VARIANTS)[name]()
    with torch.no_grad():
        for part in parts.values():
            for value in part.parameters():
                value.normal_()
        for block in getattr(parts.get("transformer"), "transformer_blocks", ()):
            # every block of DiT has a copy of one embedding
            if getattr(getattr(block, "norm1", None), "emb", None) is not None:
                block.norm1.emb.load_state_dict(
                    parts["transformer"].transformer_blocks[0].norm1.emb.state_dict()
                )
    return parts


def checkpoint(name: str, parts: dict[str, nn.Module]) -> Checkpoint:
    """A model's checkpoint."""
    components = {part: component(network) for part, network in parts.items()}
    if name == "sit":
        components["transformer"].config["_class_name"] = "SfumatoSiT"
    return Checkpoint(
        components,
        {"scheduler": scheduler(name.split("-inpainting")[0])} if "unet" in parts else {},
    )
