"""Small random pipelines of diffusers, their images, and comparisons of images."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers import clip_encoders
from helpers.models import randomised
from helpers.tensors import equal_tensors
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.clip_text import ClipText

FOUR = {
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "block_out_channels": (8, 8, 16, 16),
}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 16),
    "transformer_layers_per_block": (1, 2, 3),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 10 + 6 * 8,
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
}
REFINER = {
    "down_block_types": (
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 8, 16, 16),
    "transformer_layers_per_block": 2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 10 + 5 * 8,
    "attention_head_dim": (1, 1, 2, 2),
    "use_linear_projection": True,
}
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCALED = {**SCALED_LINEAR, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1}
# pipeline, U-Net, scheduler, text encoders
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "SD 1": ("StableDiffusionPipeline", {**FOUR, "attention_head_dim": 2}, {}, "sd1"),
    "SD 2 with v": (
        "StableDiffusionPipeline",
        {
            **FOUR,
            "attention_head_dim": (1, 2, 4, 4),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        {"prediction_type": "v_prediction"},
        "sd2",
    ),
    "SD 2, zero terminal SNR": (
        "StableDiffusionPipeline",
        {**FOUR, "attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True},
        {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "steps_offset": 0,
        },
        "sd2",
    ),
    "SD 1 inpainting": (
        "StableDiffusionInpaintPipeline",
        {**FOUR, "attention_head_dim": 2, "in_channels": 9},
        {},
        "sd1",
    ),
    "InstructPix2Pix": (
        "StableDiffusionInstructPix2PixPipeline",
        {**FOUR, "attention_head_dim": 2, "in_channels": 8},
        {},
        "sd1",
    ),
    "x4 upscaler": (
        "StableDiffusionUpscalePipeline",
        {
            **FOUR,
            "in_channels": 7,
            "attention_head_dim": 2,
            "use_linear_projection": True,
            "num_class_embeds": 1000,
        }
        | {"only_cross_attention": (True, True, True, False)},
        {"prediction_type": "v_prediction"},
        "sd2",
    ),
    "SDXL": ("StableDiffusionXLPipeline", SDXL, {}, "sdxl"),
    "SDXL inpainting": ("StableDiffusionXLInpaintPipeline", {**SDXL, "in_channels": 9}, {}, "sdxl"),
    "refiner": ("StableDiffusionXLImg2ImgPipeline", REFINER, {}, "refiner"),
}
NORMS = {"layers_per_block": 1, "norm_num_groups": 4}
# Numbers of the layout, which its files do not hold: norms of 32 groups, 8 heads or heads 64
# wide.
WIDE = {"norm_num_groups": 32, "layers_per_block": 1}
ORIGINALS: dict[str, dict[str, Any]] = {
    "SD 1": {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 8},
    "SD 2 with v": {"block_out_channels": (64, 64, 128, 128), "attention_head_dim": (1, 1, 2, 2)},
    "SDXL": {
        "block_out_channels": (64, 64, 128),
        "attention_head_dim": (1, 1, 2),
        "addition_time_embed_dim": 256,
    },
}
SIDES = {"SD 1": 64, "SD 2 with v": 96, "SDXL": 128}


def published_schedulers() -> dict[str, Any]:
    """Build the schedulers of three families as the folders on the hub have them."""
    scaled = {**SCALED_LINEAR, "steps_offset": 1, "timestep_spacing": "leading"}
    return {
        "SD 1": diffusers.PNDMScheduler(**scaled, set_alpha_to_one=False, skip_prk_steps=True),
        "SD 2 with v": diffusers.DDIMScheduler(
            **scaled, set_alpha_to_one=False, prediction_type="v_prediction", clip_sample=False
        ),
        "SDXL": diffusers.EulerDiscreteScheduler(**scaled),
    }


def vae_blocks(levels: int = 2) -> dict[str, Any]:
    """Return the fields of an AutoencoderKL of convolutions alone, with norms of 4 groups."""
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return {**blocks, "norm_num_groups": 4}


def quiet(pipe: Any) -> Any:
    """Switch the progress bar off; return the pipeline."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_pipeline(folder: Path, name: str = "DiffusionPipeline", **components: Any) -> Any:
    """Load a folder by diffusers' class of this name, without a progress bar."""
    return quiet(getattr(diffusers, name).from_pretrained(folder, **components))


def assemble(family: str, **components: Any) -> Any:
    """Put components and a scheduler into a family's pipeline, without the optional parts."""
    name, _, scheduler, _ = FAMILIES[family]
    components["scheduler"] = diffusers.DDIMScheduler(**{**SCALED, **scheduler})
    if "Upscale" in name:
        low_res = diffusers.DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02, clip_sample=False
        )
        components["vae"].register_to_config(scaling_factor=0.08333)
        components |= {
            "safety_checker": None,
            "feature_extractor": None,
            "low_res_scheduler": low_res,
        }
    elif "XL" in name:
        components |= {"force_zeros_for_empty_prompt": True, "add_watermarker": False}
        if family == "refiner":
            components |= {
                "text_encoder": None,
                "tokenizer": None,
                "requires_aesthetics_score": True,
            }
    else:
        components |= {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    return quiet(getattr(diffusers, name)(**components))


def tiny_pipeline(family: str) -> Any:
    """Build the pipeline of a family with small random components: 16x16 images, 8x8 latents."""
    _, shape, _, texts = FAMILIES[family]
    components = clip_encoders.parts(texts)
    width = sum(
        part.config.hidden_size
        for key, part in components.items()
        if key.startswith("text_encoder")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"in_channels": 4, **shape, **NORMS}
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, out_channels=4, cross_attention_dim=width, **shape
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(4, 8),
            latent_channels=4,
            sample_size=16,
            layers_per_block=1,
            **vae_blocks(),
        )
    return assemble(
        family, **components, unet=randomised(unet, 1, 0.05), vae=randomised(vae, 2, 0.05)
    )


def original_pipeline(family: str) -> Any:
    """Build the pipeline of a family with the numbers that its single files imply.

    It is otherwise as small as can be.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    _, shape, _, texts = FAMILIES[family]
    parts, size = clip_encoders.parts(texts), len(clip_encoders.vocabulary())
    act = "gelu" if texts == "sd2" else "quick_gelu"
    for key in [k for k in parts if k.startswith("text_encoder")]:
        two = key.endswith("_2")
        values = CLIPTextConfig(
            vocab_size=size, hidden_size=128 if two else 64, intermediate_size=512 if two else 256,
            num_hidden_layers=3,
            num_attention_heads=2 if two else 1, projection_dim=128 if two else 64,
            hidden_act="gelu" if two else act,
            bos_token_id=size - 2, eos_token_id=size - 1,
        )  # fmt: skip
        parts[key] = randomised(
            (CLIPTextModelWithProjection if two else CLIPTextModel)(values), 3, 0.05
        )
    width = sum(
        part.config.hidden_size for key, part in parts.items() if key.startswith("text_encoder")
    )
    shape = {"in_channels": 4, **shape, **WIDE, **ORIGINALS[family]}
    if texts == "sdxl":
        shape["projection_class_embeddings_input_dim"] = 128 + 6 * 256
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDES[family], out_channels=4, cross_attention_dim=width, **shape
    )
    scale = {"scaling_factor": 0.13025} if texts == "sdxl" else {}
    levels = {**vae_blocks(), "block_out_channels": (32, 32), **WIDE}
    vae = diffusers.AutoencoderKL(
        **levels, latent_channels=4, sample_size=SIDES[family] * 8, **scale
    )
    return assemble(family, **parts, unet=randomised(unet, 1, 0.05), vae=randomised(vae, 2, 0.05))


def save_pipelines(
    build: Callable[[str], Any], kinds: Iterable[str], paths: pytest.TempPathFactory
) -> dict[str, Path]:
    """Save a pipeline of every kind as diffusers does; return the folder of each kind."""
    folders = {kind: paths.mktemp("pipelines") / kind.replace(" ", "_") for kind in kinds}
    for kind, folder in folders.items():
        build(kind).save_pretrained(folder)
    return folders


def as_tensor(images: Any) -> Tensor:
    """Convert the NumPy images of a pipeline to (n, 3, H, W) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def seeded_generators(n: int) -> list[torch.Generator]:
    """Return a generator an image: image k from seed k, as sfumato draws them."""
    return [torch.Generator().manual_seed(k) for k in range(n)]


def pipeline_images(pipe: Any, *inputs: Any, n: int | None = None, **options: Any) -> Tensor:
    """Run a pipeline; image k is drawn from seed k.

    Args:
        pipe: a pipeline of diffusers.
        inputs: positional arguments of its call, the prompts or classes first.
        n: number of images; the length of the first input by default.
        options: keyword arguments of its call.

    Returns:
        Images (n, 3, H, W) in [0, 1].
    """
    generators = seeded_generators(len(inputs[0]) if n is None else n)
    return as_tensor(pipe(*inputs, generator=generators, output_type="np", **options).images)


def assert_same_images(
    images: Tensor, expected: Tensor, tolerance: float = 1e-3, contrast: float = 0.05
) -> None:
    """Assert that images differ by at most `tolerance` of white, and that they show something.

    Args:
        images: (n, 3, H, W) in [0, 1].
        expected: reference of the same shape.
        tolerance: bound on the largest difference of a value.
        contrast: least standard deviation of the reference.
    """
    assert images.shape == expected.shape
    assert expected.std() > contrast, "images in which something can be seen"
    assert (images - expected).abs().max() < tolerance, float((images - expected).abs().max())


def count_equal_weight_files(folder: Path, other: Path) -> int:
    """Assert that two folders have equal weight files, tensor by tensor; return their number."""
    files, others = (
        sorted(path.relative_to(place) for path in place.glob("*/*.safetensors"))
        for place in (folder, other)
    )
    assert files == others
    for file in files:
        assert equal_tensors(load_file(folder / file), load_file(other / file)), file
    return len(files)


def smooth_image(seed: int = 5, height: int = 24, width: int = 16) -> Tensor:
    """Draw smooth colours in [0, 1]: (1, 3, height, width). A random autoencoder keeps them."""
    rough = torch.rand(1, 3, 3, 2, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(rough, (height, width), mode="bilinear")


def rectangle_mask(height: int = 24, width: int = 16) -> Tensor:
    """Return a mask (1, 1, height, width) that is 1 in a rectangle at the right edge."""
    mask = torch.zeros(1, 1, height, width)
    mask[:, :, 4:14, 6:16] = 1
    return mask


def without_prompt_weights(model: LatentDiffusion) -> LatentDiffusion:
    """Return the model with brackets in prompts read as text, as diffusers reads them."""
    assert isinstance(model.conditioner, ClipText)
    return replace(
        model,
        conditioner=replace(
            model.conditioner, config=replace(model.conditioner.config, weighting="none")
        ),
    )
