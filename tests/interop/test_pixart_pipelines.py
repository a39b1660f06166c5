"""Parity with PixArt's pipelines.

The same folder, prompts, seeds and steps give the same images, to 1e-3 of white in float32. The
models are small and random: alpha, with and without the image's size as a condition, and Sigma.
Folders of each library open in the other.
"""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from helpers import text_encoders
from helpers.models import random_network
from helpers.pipelines import (
    assert_same_images,
    count_equal_weight_files,
    open_pipeline,
    pipeline_images,
    quiet,
    save_pipelines,
    vae_blocks,
)
from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.sampling import Request
from sfumato.tasks.image_to_image import image_to_image
from sfumato.types import ImageSpec

SMALL: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "caption_channels": 48,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha, 1024 pixels": ("PixArtAlphaPipeline", {"sample_size": 128}),
    "alpha, 512 pixels": ("PixArtAlphaPipeline", {"sample_size": 64}),
    "Sigma, 1024 pixels": (
        "PixArtSigmaPipeline",
        {"sample_size": 128, "use_additional_conditions": False, "interpolation_scale": 2},
    ),
    "Sigma, small": ("PixArtSigmaPipeline", {"sample_size": 8}),
}
PROMPTS = [" A red CAT", "a dog, (very) red"]


def diffusers_pipeline(kind: str, scratch: Path) -> Any:
    """diffusers' pipeline with small random parts; the scheduler is that of the published folders
    (huggingface.co/PixArt-alpha).
    """
    name, shape = KINDS[kind]
    scale = 0.13025 if "Sigma" in name else 0.18215  # Sigma has SDXL's autoencoder
    build = getattr(diffusers, name)
    return quiet(
        build(
            transformer=random_network(
                lambda: diffusers.PixArtTransformer2DModel(**(SMALL | shape)), 1
            ),
            scheduler=diffusers.DPMSolverMultistepScheduler(
                beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
            ),
            vae=random_network(
                lambda: diffusers.AutoencoderKL(
                    block_out_channels=(4, 8),
                    latent_channels=4,
                    scaling_factor=scale,
                    **vae_blocks(),
                ),
                2,
            ),
            **text_encoders.parts("pixart_sigma", scratch),
        )
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(
        lambda kind: diffusers_pipeline(kind, tmp_path_factory.mktemp("scratch")),
        KINDS,
        tmp_path_factory,
    )


def diffusers_images(pipe: Any, prompts: list[str], **options: Any) -> Tensor:
    """Images of the requested size and of prompts as written.

    Neither the nearest trained size nor diffusers' cleaning of captions is used.
    """
    return pipeline_images(
        pipe, prompts, **({"use_resolution_binning": False, "clean_caption": False} | options)
    )


def compare(images: Tensor, expected: Tensor) -> None:
    assert_same_images(images, expected, tolerance=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.05


def same(model: LatentDiffusion, pipe: Any) -> None:
    """Guidance on and off, a negative prompt or none, sizes and shapes, an odd and an even number
    of steps.
    """
    for guidance, negative, steps, height, width in (
        (4.5, None, 3, 16, 16),
        (0.5, None, 4, 24, 8),
        (3.0, "the lazy dog", 4, 8, 40),
    ):
        options: dict[str, Any] = {"height": height, "width": width}
        negatives: dict[str, Any] = {} if negative is None else {"negative_prompt": negative}
        expected = diffusers_images(
            pipe,
            PROMPTS,
            guidance_scale=guidance,
            num_inference_steps=steps,
            **negatives,
            **options,
        )
        compare(
            model.generate(
                PROMPTS,
                guidance=guidance,
                steps=steps,
                negative_prompt=negative,
                output="tensor",
                **options,
            ),
            expected,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_folders_open_in_both_libraries(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model, name = load(folders[kind]), KINDS[kind][0]
    assert (model.defaults.steps, model.defaults.guidance, model.defaults.sampler) == (
        20,
        4.5,
        "dpmpp_2m",
    )
    assert model.sample_size == 2 * KINDS[kind][1]["sample_size"]
    same(model, open_pipeline(folders[kind], name))
    model.save(tmp_path / "sfumato")
    again = load(tmp_path / "sfumato")
    assert again.hash == model.hash and again.defaults == model.defaults
    second = open_pipeline(tmp_path / "sfumato")
    assert type(second).__name__ == name
    same(again, second)
    assert count_equal_weight_files(folders[kind], tmp_path / "sfumato") == 3
    again.save(tmp_path / "sfumato.safetensors")
    assert load(tmp_path / "sfumato.safetensors").hash == model.hash


def test_by_the_models_own_settings(folders: dict[str, Path]) -> None:
    """Default steps, guidance and size."""
    pipe = open_pipeline(folders["Sigma, small"], "PixArtSigmaPipeline")
    compare(
        load(folders["Sigma, small"]).generate(PROMPTS, output="tensor"),
        diffusers_images(pipe, PROMPTS),
    )


def test_the_size_reaches_the_network(folders: dict[str, Path]) -> None:
    """Alpha's model for 1024 pixels draws another image for another size condition.

    It runs image to image like other models.
    """
    model = load(folders["alpha, 1024 pixels"])
    size: dict[str, Any] = {"height": 16, "width": 24}
    usual, other = (
        model.generate("a cat", steps=3, output="tensor", image_spec=p, **size)
        for p in (None, ImageSpec(1024, 512))
    )
    assert (usual - other).abs().max() > 1e-3
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1
    result = model.run(
        image_to_image(model, image, Request("a cat", steps=4), strength=0.5), output="tensor"
    )
    assert (
        result.shape == (1, 3, 16, 24)
        and torch.isfinite(result).all()
        and (result - usual).abs().max() > 1e-3
    )
