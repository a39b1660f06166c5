"""PixArt's pipelines beside ours: the same folder, prompts, seeds and steps give the same pictures,
to 1e-3 of white in float32.

Small random models: alpha, with and without being told the picture's size, and Sigma. What
diffusers saved we open, what we save it opens.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.sampling import Request
from sfumato.tasks.image_to_image import image_to_image
from sfumato.types import ImageSpec

text: Any = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).resolve().parents[1] / "contracts" / "_text.py"))
)

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


def theirs(kind: str, scratch: Path) -> Any:
    """diffusers' pipeline with small random parts; the scheduler is that of the published folders
    (huggingface.co/PixArt-alpha).
    """
    name, shape = KINDS[kind]
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    scale = 0.13025 if "Sigma" in name else 0.18215  # Sigma has SDXL's autoencoder
    pipe = getattr(diffusers, name)(
        transformer=text.drawn(lambda: diffusers.PixArtTransformer2DModel(**(SMALL | shape)), 1),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
        ),
        vae=text.drawn(
            lambda: diffusers.AutoencoderKL(
                block_out_channels=(4, 8), latent_channels=4, scaling_factor=scale, **blocks
            ),
            2,
        ),
        **text.parts("pixart_sigma", scratch),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp("pixart") / kind.replace(" ", "_")
        theirs(kind, tmp_path_factory.mktemp("scratch")).save_pretrained(found[kind])
    return found


def their_pictures(pipe: Any, prompts: list[str], **asked: Any) -> Tensor:
    """(n, 3, H, W) in [0, 1]; image k from seed k. Of the size asked for, not of the nearest that
    the model was trained on; of the words as they are, not cleaned like captions from the web.
    """
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    usual: dict[str, Any] = {
        "output_type": "np",
        "use_resolution_binning": False,
        "clean_caption": False,
    }
    found = pipe(prompts, generator=generators, **usual, **asked).images
    return torch.from_numpy(found).permute(0, 3, 1, 2)


def compare(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and expected.std() > 0.05, (
        "pictures in which something can be seen"
    )
    assert (expected[0] - expected[1]).abs().max() > 0.05
    assert (found - expected).abs().max() < 1e-4, float((found - expected).abs().max())


def same(ours: LatentDiffusion, pipe: Any) -> None:
    """Guidance on and off, a negative prompt or none, sizes and shapes, an odd and an even number
    of steps.
    """
    for guidance, negative, steps, height, width in (
        (4.5, None, 3, 16, 16),
        (1.0, None, 4, 24, 8),
        (3.0, "the lazy dog", 4, 8, 40),
    ):
        asked: dict[str, Any] = {"height": height, "width": width}
        their_negative: dict[str, Any] = {} if negative is None else {"negative_prompt": negative}
        expected = their_pictures(
            pipe,
            PROMPTS,
            guidance_scale=guidance,
            num_inference_steps=steps,
            **their_negative,
            **asked,
        )
        compare(
            ours.generate(
                PROMPTS,
                guidance=guidance,
                steps=steps,
                negative_prompt=negative,
                output="tensor",
                **asked,
            ),
            expected,
        )


def key_for_key(one: Path, other: Path) -> int:
    """How many parts with weights two folders have: the same ones, with equal tensors by equal
    names.
    """
    files, others = (
        sorted(path.relative_to(folder) for path in folder.glob("*/*.safetensors"))
        for folder in (one, other)
    )
    assert files == others
    for file in files:
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys() and all(
            torch.equal(value, second[key]) for key, value in first.items()
        ), file
    return len(files)


@pytest.mark.parametrize("kind", KINDS)
def test_what_diffusers_saved_and_what_we_save(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    ours, name = load(folders[kind]), KINDS[kind][0]
    assert (ours.defaults.steps, ours.defaults.guidance, ours.defaults.sampler) == (
        20,
        4.5,
        "dpmpp_2m",
    )
    assert ours.sample_size == 2 * KINDS[kind][1]["sample_size"]
    pipe = getattr(diffusers, name).from_pretrained(folders[kind])
    pipe.set_progress_bar_config(disable=True)
    same(ours, pipe)
    ours.save(tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert again.hash == ours.hash and again.defaults == ours.defaults
    second = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(second).__name__ == name
    second.set_progress_bar_config(disable=True)
    same(again, second)
    assert key_for_key(folders[kind], tmp_path / "ours") == 3
    again.save(tmp_path / "ours.safetensors")
    assert load(tmp_path / "ours.safetensors").hash == ours.hash


def test_by_the_models_own_settings(folders: dict[str, Path]) -> None:
    """Steps, guidance and size where nobody says them."""
    pipe = diffusers.PixArtSigmaPipeline.from_pretrained(folders["Sigma, small"])
    pipe.set_progress_bar_config(disable=True)
    compare(
        load(folders["Sigma, small"]).generate(PROMPTS, output="tensor"),
        their_pictures(pipe, PROMPTS),
    )


def test_the_size_is_told(folders: dict[str, Path]) -> None:
    """Alpha's model for 1024 pixels draws another picture where it is told another size; and it
    begins with a picture as others do.
    """
    ours = load(folders["alpha, 1024 pixels"])
    size: dict[str, Any] = {"height": 16, "width": 24}
    usual, other = (
        ours.generate("a cat", steps=3, output="tensor", image_spec=p, **size)
        for p in (None, ImageSpec(1024, 512))
    )
    assert (usual - other).abs().max() > 1e-3
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1
    found = ours.run(
        image_to_image(ours, image, Request("a cat", steps=4), strength=0.5), output="tensor"
    )
    assert (
        found.shape == (1, 3, 16, 24)
        and torch.isfinite(found).all()
        and (found - usual).abs().max() > 1e-3
    )
