"""Small random models of every family, as folders.

diffusers' pipelines save them. Those that diffusers lacks are written in sfumato's own layout.

Shapes follow the published models where a layout on disk depends on them: norms of 32 groups,
heads of 64 channels.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from _behaviour import encoders, names
from _behaviour.encoders import randomised

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEVELS = {"C": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), "D": ("DownBlock2D", "UpBlock2D")}
HALVES: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
BARE = {"use_quant_conv": False, "use_post_quant_conv": False}
CLASSES = ["cat", "dog", "fox", "owl", "carp"]


# ---- parts ---------------------------------------------------------------------------------------


def unet(levels: str, widths: tuple[int, ...], **fields: Any) -> Any:
    """A U-Net with tokens; a letter for each level, C with cross-attention and D without."""
    import diffusers

    shape: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "in_channels": 4,
        "out_channels": 4,
    }
    shape |= {"block_out_channels": widths, "down_block_types": [LEVELS[k][0] for k in levels]}
    shape |= {"up_block_types": [LEVELS[k][1] for k in reversed(levels)]}
    return randomised(lambda: diffusers.UNet2DConditionModel(**shape | fields), 1, 0.03)


def kl(**fields: Any) -> Any:
    """A KL autoencoder of two levels."""
    import diffusers

    shape: dict[str, Any] = {
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 32,
    }
    shape |= {"sample_size": 16} | HALVES
    return randomised(lambda: diffusers.AutoencoderKL(**shape | fields), 2, 0.03)


def kl_of_eighths(**fields: Any) -> Any:
    """A KL autoencoder of four levels, without the layers beside the latent."""
    levels = {name: values * 2 for name, values in HALVES.items()}
    return kl(block_out_channels=(32,) * 4, sample_size=64, **levels, **fields)


def stable_diffusion(
    name: str, network: Any, texts: dict[str, Any], scheduler: Any, **parts: Any
) -> Any:
    """A pipeline of Stable Diffusion 1 or 2."""
    import diffusers

    parts = {"vae": kl(), "safety_checker": None, "feature_extractor": None} | parts
    if "Upscale" not in name:
        parts["requires_safety_checker"] = False
    return getattr(diffusers, name)(unet=network, scheduler=scheduler, **texts, **parts)


def sd1_texts() -> dict[str, Any]:
    """Text encoder and tokenizer of Stable Diffusion 1."""
    return {"text_encoder": encoders.clip(False, 1), "tokenizer": encoders.clip_tokenizer()}


def sd2_texts() -> dict[str, Any]:
    """Text encoder and tokenizer of Stable Diffusion 2, whose last layer is left out."""
    return {
        "text_encoder": encoders.clip(False, 1, hidden_act="gelu", num_hidden_layers=23),
        "tokenizer": encoders.clip_tokenizer("!"),
    }


def pndm(**fields: Any) -> Any:
    """The scheduler of Stable Diffusion 1 as published."""
    import diffusers

    return diffusers.PNDMScheduler(
        **SCALED | {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1} | fields
    )


def ddim(**fields: Any) -> Any:
    """The scheduler of Stable Diffusion 2 as published."""
    import diffusers

    return diffusers.DDIMScheduler(
        **SCALED | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1} | fields
    )


def flow(**fields: Any) -> Any:
    """The scheduler of flows."""
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, **fields)


# ---- models with a U-Net -------------------------------------------------------------------------


def sd1(name: str = "StableDiffusionPipeline", channels: int = 4, **parts: Any) -> Any:
    """Stable Diffusion 1, and its models that take more channels."""
    return stable_diffusion(
        name, unet("CCD", (32, 64, 64), in_channels=channels), sd1_texts(), pndm(), **parts
    )


def sd1_narrow() -> Any:
    """Stable Diffusion 1 with norms of four groups, which its single file can't tell."""
    shape = {"norm_num_groups": 4, "attention_head_dim": 2}
    vae = kl(block_out_channels=(4, 8), norm_num_groups=4)
    return stable_diffusion(
        "StableDiffusionPipeline", unet("CD", (8, 16), **shape), sd1_texts(), ddim(), vae=vae
    )


def sd1_tiny_autoencoder() -> Any:
    """Stable Diffusion 1 with TAESD."""
    import diffusers

    return sd1(vae=randomised(lambda: diffusers.AutoencoderTiny(**TINY), 4))


def sd2(**scheduler: Any) -> Any:
    """Stable Diffusion 2, which predicts v."""
    network = unet(
        "CCD",
        (64, 64, 64),
        attention_head_dim=[1, 1, 1],
        use_linear_projection=True,
        upcast_attention=True,
    )
    return stable_diffusion(
        "StableDiffusionPipeline",
        network,
        sd2_texts(),
        ddim(prediction_type="v_prediction", **scheduler),
    )


def sd2_zero_snr() -> Any:
    """The same with a schedule that ends in noise alone."""
    return sd2(rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=0)


def x4_upscaler() -> Any:
    """Stable Diffusion's x4 upscaler.

    A small picture of three channels joins the latent, and its noise level is a class.
    """
    import diffusers

    only = {"only_cross_attention": [True, True, False], "num_class_embeds": 50, "in_channels": 7}
    network = unet("DCC", (32, 32, 96), use_linear_projection=True, **only)
    small = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02, clip_sample=False
    )
    scheduler = ddim(prediction_type="v_prediction", beta_start=0.0001, beta_end=0.02)
    parts = {"low_res_scheduler": small, "vae": kl(scaling_factor=0.08333), "max_noise_level": 40}
    return stable_diffusion(
        "StableDiffusionUpscalePipeline", network, sd2_texts(), scheduler, **parts
    )


def sdxl(channels: int = 4, name: str = "StableDiffusionXLPipeline") -> Any:
    """Stable Diffusion XL."""
    import diffusers

    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 6 * 8,
    }
    heads = {
        "attention_head_dim": [1, 1, 1],
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2, 3],
    }
    sizes = {"cross_attention_dim": 128, "in_channels": channels}
    network = unet("DCC", (64, 64, 64), **added, **heads, **sizes)
    return getattr(diffusers, name)(
        unet=network,
        vae=kl(scaling_factor=0.13025),
        scheduler=euler(),
        text_encoder=encoders.clip(False, 1, num_hidden_layers=12),
        tokenizer=encoders.clip_tokenizer(),
        **second_clip(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def second_clip() -> dict[str, Any]:
    """The second text encoder of SDXL, the only one of its refiner."""
    encoder = encoders.clip(True, 2, hidden_act="gelu", num_hidden_layers=12)
    return {"text_encoder_2": encoder, "tokenizer_2": encoders.clip_tokenizer("!")}


def euler() -> Any:
    """SDXL's scheduler as published."""
    import diffusers

    return diffusers.EulerDiscreteScheduler(
        **SCALED, steps_offset=1, timestep_spacing="leading", interpolation_type="linear"
    )


def sdxl_refiner() -> Any:
    """SDXL's refiner."""
    import diffusers

    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 5 * 8,
    }
    heads = {
        "attention_head_dim": [1, 1, 1],
        "use_linear_projection": True,
        "transformer_layers_per_block": 2,
    }
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        unet=unet("DCD", (64, 64, 64), **added, **heads),
        vae=kl(scaling_factor=0.13025),
        scheduler=euler(),
        text_encoder=None,
        tokenizer=None,
        **second_clip(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


LDM = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}


def vq() -> Any:
    """Latent Diffusion's vector-quantised autoencoder, its codes among the latents."""
    import diffusers

    blocks = {name: values[:1] * 3 for name, values in HALVES.items()}
    shape = {
        "block_out_channels": (32,) * 3,
        "layers_per_block": 1,
        "num_vq_embeddings": 40,
        "latent_channels": 3,
        "sample_size": 32,
    }
    network = randomised(
        lambda: diffusers.VQModel(scaling_factor=1.0, norm_num_groups=32, **shape, **blocks),
        2,
        0.03,
    )
    network.quantize.embedding.weight.copy_(
        torch.randn(40, 3, generator=torch.Generator().manual_seed(5))
    )
    return network


def plain_unet(**fields: Any) -> Any:
    """A U-Net without tokens, with heads of 32 channels as published."""
    import diffusers

    shape: dict[str, Any] = {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "attention_head_dim": 32,
        "sample_size": 8,
    }
    shape |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")}
    shape |= {"up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
    return randomised(lambda: diffusers.UNet2DModel(**shape | fields), 1, 0.03)


def ldm_unconditional(**fields: Any) -> Any:
    """Latent Diffusion's model of faces."""
    import diffusers

    return diffusers.LDMPipeline(vqvae=vq(), unet=plain_unet(**fields), scheduler=ddim(**LDM))


def ldm_churches() -> Any:
    """The same with residual blocks that change the size."""
    resnets = {
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
    }
    resnets |= {"up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "AttnUpBlock2D")}
    steps = {
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
    }
    return ldm_unconditional(**resnets, **steps)


def ldm_text() -> Any:
    """Latent Diffusion's text-to-image model, with a BERT of its own."""
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
        LDMTextToImagePipeline,
    )

    numbers = {
        "vocab_size": 120,
        "encoder_layers": 2,
        "encoder_ffn_dim": 48,
        "head_dim": 4,
        "d_model": 24,
        "encoder_attention_heads": 8,
    }
    network = unet("CD", (32, 64), cross_attention_dim=24, sample_size=4)
    levels = {name: values * 2 for name, values in HALVES.items()}
    return LDMTextToImagePipeline(
        bert=randomised(lambda: LDMBertModel(LDMBertConfig(**numbers)), 1),
        tokenizer=encoders.bert_tokenizer(),
        unet=network,
        vqvae=kl(block_out_channels=(32,) * 4, **levels),
        scheduler=ddim(),
    )


# ---- models with a transformer -------------------------------------------------------------------

SD3: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 1,
    "attention_head_dim": 64,
}
SD3 |= {
    "caption_projection_dim": 64,
    "joint_attention_dim": 192,
    "pooled_projection_dim": 160,
    "pos_embed_max_size": 12,
}


def sd3(folder: Path, t5: bool = True, **fields: Any) -> Any:
    """Stable Diffusion 3, with or without T5."""
    import diffusers

    shape = {**SD3, "in_channels": 16, "out_channels": 16, **fields}
    big = {"hidden_size": 128, "num_attention_heads": 2, "projection_dim": 96, "hidden_act": "gelu"}
    return diffusers.StableDiffusion3Pipeline(
        transformer=randomised(lambda: diffusers.SD3Transformer2DModel(**shape), 1),
        scheduler=flow(shift=3.0),
        vae=kl(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, **BARE),
        text_encoder=encoders.clip(True, 1),
        tokenizer=encoders.clip_tokenizer(),
        text_encoder_2=encoders.clip(True, 2, **big),
        tokenizer_2=encoders.clip_tokenizer("!"),
        text_encoder_3=encoders.t5(192) if t5 else None,
        tokenizer_3=encoders.t5_tokenizer(folder / "t5") if t5 else None,
    )


def flux(folder: Path, name: str = "FluxPipeline", extra: int = 0, guided: bool = True) -> Any:
    """FLUX.1: dev, schnell, Fill, Canny and Depth, Kontext.

    extra: channels beside the latent's 16, before packing.
    """
    import diffusers

    shape = {
        "in_channels": 4 * (16 + extra),
        "out_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "axes_dims_rope": (4, 14, 14),
    }
    width = {
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 64,
    }
    moved = (
        {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.15}
        if guided
        else {"shift": 1.0}
    )
    return getattr(diffusers, name)(
        transformer=randomised(
            lambda: diffusers.FluxTransformer2DModel(**shape, **width, guidance_embeds=guided), 1
        ),
        scheduler=flow(**moved),
        vae=kl_of_eighths(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, **BARE),
        text_encoder=encoders.clip(False, 1),
        tokenizer=encoders.clip_tokenizer(),
        text_encoder_2=encoders.t5(32),
        tokenizer_2=encoders.t5_tokenizer(folder / "t5"),
    )


def flux2(name: str = "Flux2Pipeline", **flags: Any) -> Any:
    """FLUX.2 dev, and klein with guidance by two passes or distilled."""
    import diffusers

    dev = name == "Flux2Pipeline"
    shape = {
        "in_channels": 32,
        "num_layers": 1,
        "num_single_layers": 1,
        "axes_dims_rope": (4, 4, 4, 4),
        "timestep_guidance_channels": 32,
    }
    width = {
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 36,
        "guidance_embeds": dev,
    }
    levels = {key: values * 2 for key, values in HALVES.items()}
    sizes = {
        "block_out_channels": (4, 4, 8, 8),
        "latent_channels": 8,
        "layers_per_block": 1,
        "sample_size": 64,
        "norm_num_groups": 4,
    }
    vae = randomised(lambda: diffusers.AutoencoderKLFlux2(**sizes, **levels), 2)
    generator = torch.Generator().manual_seed(3)
    vae.bn.running_mean.copy_(0.2 * torch.randn(32, generator=generator))
    vae.bn.running_var.copy_(0.5 + torch.rand(32, generator=generator))
    return getattr(diffusers, name)(
        transformer=randomised(lambda: diffusers.Flux2Transformer2DModel(**shape, **width), 1),
        scheduler=flow(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoders.mistral() if dev else encoders.qwen(),
        tokenizer=encoders.mistral_tokenizer() if dev else encoders.qwen_tokenizer(),
        **flags,
    )


def pixart(folder: Path, name: str, **fields: Any) -> Any:
    """PixArt-alpha, conditioned on the size of the picture at 1024 pixels, and -Sigma."""
    import diffusers

    shape: dict[str, Any] = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "num_layers": 2,
        "cross_attention_dim": 24,
    }
    shape |= {"caption_channels": 48} | fields
    scale = 0.13025 if "Sigma" in name else 0.18215
    return getattr(diffusers, name)(
        transformer=randomised(lambda: diffusers.PixArtTransformer2DModel(**shape), 1),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
        ),
        vae=kl(block_out_channels=(4, 8), norm_num_groups=4, scaling_factor=scale),
        text_encoder=encoders.t5(48),
        tokenizer=encoders.t5_tokenizer(folder / "t5"),
    )


def dit_network() -> Any:
    """DiT's transformer, with one table of classes for all blocks."""
    import diffusers

    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "num_layers": 2,
        "sample_size": 8,
        "out_channels": 8,
        "norm_eps": 1e-6,
    }
    network = randomised(
        lambda: diffusers.DiTTransformer2DModel(**shape, num_embeds_ada_norm=len(CLASSES)), 1
    )
    for block in network.transformer_blocks:
        block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    return network


# ---- folders -------------------------------------------------------------------------------------

PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sd1": lambda _: sd1(),
    "sd1-narrow": lambda _: sd1_narrow(),
    "sd1-taesd": lambda _: sd1_tiny_autoencoder(),
    "sd1-inpainting": lambda _: sd1("StableDiffusionInpaintPipeline", 9),
    "sd1-pix2pix": lambda _: sd1("StableDiffusionInstructPix2PixPipeline", 8),
    "sd2": lambda _: sd2(),
    "sd2-zero-snr": lambda _: sd2_zero_snr(),
    "x4-upscaler": lambda _: x4_upscaler(),
    "sdxl": lambda _: sdxl(),
    "sdxl-inpainting": lambda _: sdxl(9, "StableDiffusionXLInpaintPipeline"),
    "sdxl-refiner": lambda _: sdxl_refiner(),
    "ldm-unconditional": lambda _: ldm_unconditional(),
    "ldm-churches": lambda _: ldm_churches(),
    "ldm-text": lambda _: ldm_text(),
    "sd3": sd3,
    "sd35-without-t5": lambda folder: sd3(
        folder, False, qk_norm="rms_norm", dual_attention_layers=(0,)
    ),
    "sd3-inpainting": lambda folder: sd3(folder, False, in_channels=33),
    "flux-dev": flux,
    "flux-schnell": lambda folder: flux(folder, guided=False),
    "flux-fill": lambda folder: flux(folder, "FluxFillPipeline", 80),
    "flux-control": lambda folder: flux(folder, "FluxControlPipeline", 16),
    "flux-kontext": lambda folder: flux(folder, "FluxKontextPipeline"),
    "flux2-dev": lambda _: flux2(),
    "flux2-klein": lambda _: flux2("Flux2KleinPipeline", is_distilled=False),
    "flux2-klein-distilled": lambda _: flux2("Flux2KleinPipeline", is_distilled=True),
    "pixart-alpha": lambda folder: pixart(folder, "PixArtAlphaPipeline", sample_size=128),
    "pixart-sigma": lambda folder: pixart(folder, "PixArtSigmaPipeline", sample_size=8),
}
"""By the name of the folder; each gets a folder for files of tokenizers."""

TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "latent_channels": 4,
}
TINY |= {"num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1)}


def write(folder: Path, scratch: Path) -> None:
    """All models, each in a folder of its name."""
    for name, build in PIPELINES.items():
        build(scratch / name).save_pretrained(folder / name)
    dit(folder / "dit")
    sit(folder / "sit")
    ldm_classes(folder / "ldm-classes")
    modern_dit(folder / "modern-dit-classes", num_class_embeds=len(CLASSES) + 1)
    modern_dit(folder / "modern-dit-text", caption_channels=24)


def dit(folder: Path) -> None:
    """DiT, its labels in model_index.json as on the hub."""
    import diffusers

    diffusers.DiTPipeline(
        dit_network(), kl(), diffusers.DDIMScheduler(clip_sample=False)
    ).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    labels = {str(i): f"{name}, the {name}" for i, name in enumerate(CLASSES)}
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": labels}))


def sit(folder: Path) -> None:
    """SiT: DiT's weights under another class, and a flow."""
    dit(folder)
    flow().save_pretrained(folder / "scheduler")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "SfumatoSiT"}))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "LatentDiffusion", "transformer": ["diffusers", "SfumatoSiT"]}
    index |= {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "conditioner": ["sfumato", "class_labels"],
    }
    del index["id2label"]
    labels = [f"{name}, the {name}" for name in CLASSES]
    _own(
        folder,
        index,
        {"_class_name": "class_labels", "names": labels},
        {"steps": 4, "sampler": "ddim"},
    )


def ldm_classes(folder: Path) -> None:
    """Latent Diffusion's model of classes: a table of tokens, the last one for no class."""
    from safetensors.torch import save_file

    vq().save_pretrained(folder / "vae")
    unet(
        "CD",
        (32, 64),
        cross_attention_dim=24,
        in_channels=3,
        out_channels=3,
        attention_head_dim=1,
        sample_size=64,
    ).save_pretrained(folder / "unet")
    ddim(**LDM).save_pretrained(folder / "scheduler")
    (folder / "conditioner").mkdir()
    table = torch.randn(len(CLASSES) + 1, 24, generator=torch.Generator().manual_seed(2))
    save_file(
        {"embedding.weight": table}, folder / "conditioner" / "diffusion_pytorch_model.safetensors"
    )
    index = {
        "vae": ["diffusers", "VQModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    index |= {"conditioner": ["sfumato", "class_embedding"], "_class_name": "LatentDiffusion"}
    conditioner = {"_class_name": "class_embedding", "class_names": CLASSES, "unconditional": True}
    _own(
        folder,
        index,
        conditioner,
        {"guidance": 1.5, "steps": 50, "spacing": "leading:clean=false,offset=1"},
    )


def modern_dit(folder: Path, **fields: Any) -> None:
    """The library's own transformer, with classes or with a sentence encoder."""
    from safetensors.torch import save_file

    home = "predict.networks.modern_dit"
    sizes = {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "register_tokens": 2,
    }
    config = names.build(home, "ModernDiTConfig", **sizes, **fields)
    network = randomised(lambda: names.attribute(home, "ModernDiT")(config), 1)
    kl().save_pretrained(folder / "vae")
    flow().save_pretrained(folder / "scheduler")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(network.to_config()))
    save_file(network.state_dict(), folder / "transformer" / "diffusion_pytorch_model.safetensors")
    index: dict[str, Any] = {
        "vae": ["diffusers", "AutoencoderKL"],
        "transformer": ["diffusers", "SfumatoDiT"],
    }
    index |= {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "_class_name": "LatentDiffusion",
    }
    conditioner: dict[str, Any] | None = None
    if "num_class_embeds" in fields:
        conditioner = {"_class_name": "class_names", "names": CLASSES}
        index["conditioner"] = ["sfumato", "class_names"]
    else:
        encoders.bert().save_pretrained(folder / "text_encoder")
        encoders.bert_tokenizer().save_pretrained(folder / "tokenizer")
        index |= {
            "text_encoder": ["transformers", "BertModel"],
            "tokenizer": ["transformers", "BertTokenizer"],
        }
    _own(folder, index, conditioner, {"steps": 4, "sampler": "dpmpp_2m", "guidance": 2.0})


def _own(
    folder: Path,
    index: dict[str, Any],
    conditioner: dict[str, Any] | None,
    defaults: dict[str, Any],
) -> None:
    """Write sfumato's own parts of a folder: the conditioner's config and the notes."""
    if conditioner is not None:
        (folder / "conditioner").mkdir(exist_ok=True)
        (folder / "conditioner" / "config.json").write_text(json.dumps(conditioner))
    notes = {"version": "0.1.0", "name": folder.name, "defaults": defaults}
    (folder / "model_index.json").write_text(json.dumps({**index, "_sfumato": notes}, indent=2))
