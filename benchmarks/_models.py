"""Published configs, and model folders of their sizes with random weights.

Folders are as diffusers writes them. Their vocabulary is small, because none is at hand offline;
the text encoders have their full size.
"""

import json
from pathlib import Path
from typing import Any

import torch

from _common import fill

VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
VAE |= {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
SCHEDULE |= {"steps_offset": 1}
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
"""stabilityai/stable-diffusion-3.5-medium, transformer/config.json."""
FLUX_DEV: dict[str, Any] = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
"""black-forest-labs/FLUX.1-dev, transformer/config.json."""
FAMILIES: dict[str, dict[str, Any]] = {
    "sd15": {
        "pipeline": "StableDiffusionPipeline",
        "unet": SD15_UNET,
        "vae": VAE | {"sample_size": 512, "scaling_factor": 0.18215},
        "texts": {"": CLIP_L},
        "index": {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        },
    },
    "sdxl": {
        "pipeline": "StableDiffusionXLPipeline",
        "unet": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
        "texts": {"": CLIP_L, "_2": CLIP_G | {"hidden_act": "gelu"}},
        "index": {"force_zeros_for_empty_prompt": True},
    },
}
"""Pipeline, configs of U-Net, autoencoder and text encoders by suffix, and further fields of
model_index.json."""


def write_folder(folder: Path, family: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """Write a model's folder part by part; leave a folder that is complete as it is.

    Args:
        folder: where the model is written.
        family: a value of `FAMILIES`, or one like it.
        dtype: dtype of the files.

    Returns:
        The folder.
    """
    if (folder / "model_index.json").exists():
        return folder
    import diffusers
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    index: dict[str, Any] = {
        "_class_name": family["pipeline"],
        "_diffusers_version": diffusers.__version__,
        **family["index"],
    }
    for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        with torch.device("meta"):
            network = getattr(diffusers, kind)(**family[part])
        fill(network, 0.03).to(dtype).save_pretrained(folder / part)
        index[part] = ["diffusers", kind]
    diffusers.DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    for suffix, sizes in family["texts"].items():
        kind = "CLIPTextModelWithProjection" if suffix else "CLIPTextModel"
        config = transformers.CLIPTextConfig(
            vocab_size=49408,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
            **sizes,
        )
        fill(getattr(transformers, kind)(config), 0.03).to(dtype).save_pretrained(
            folder / f"text_encoder{suffix}"
        )
        tokenizer = transformers.CLIPTokenizer(
            vocab={word: i for i, word in enumerate(words)},
            merges=[],
            model_max_length=77,
            pad_token="<|endoftext|>",
        )
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
        index |= {
            f"text_encoder{suffix}": ["transformers", kind],
            f"tokenizer{suffix}": ["transformers", "CLIPTokenizer"],
        }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
