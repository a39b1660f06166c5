"""Parity with Stable Diffusion 3's pipelines.

The same folder, prompts, seeds and steps give the same images, to 1e-3 of white in float32. The
models are small and random, with and without T5, with the additions of SD 3.5: text to image, with
and without negative prompts and skipped layers; image to image; inpainting, by an ordinary model
and by a network of mask and masked image. Folders of each library open in the other.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers import text_encoders
from helpers.models import random_network
from helpers.pipelines import (
    assert_same_images,
    count_equal_weight_files,
    open_pipeline,
    pipeline_images,
    quiet,
    rectangle_mask,
    save_pipelines,
    seeded_generators,
    smooth_image,
    vae_blocks,
)
from sfumato.cli import main
from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.sampling import Request
from sfumato.tasks.image_to_image import image_to_image
from sfumato.tasks.inpaint import inpaint

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
}
SMALL |= {"joint_attention_dim": 48, "pooled_projection_dim": 20, "pos_embed_max_size": 12}
# text encoders, network, scheduler
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "SD 3": ("sd3", {}, {"shift": 3.0}),
    "SD 3.5 without T5": (
        "sd3_without_t5",
        {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
        {"shift": 3.0},
    ),
    "dynamic shift": (
        "sd3_without_t5",
        {},
        {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 30},
    ),
    "inpainting": ("sd3_without_t5", {"in_channels": 33}, {"shift": 3.0}),
}
PROMPTS = ["a red cat", "a dog, (very) red"]
LAYERS = "transformer_blocks.0+transformer_blocks.2"


def diffusers_pipeline(kind: str, scratch: Path) -> Any:
    """diffusers' pipeline with small random parts."""
    texts, shape, scheduler = KINDS[kind]
    space = {
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=random_network(
                lambda: diffusers.SD3Transformer2DModel(
                    **{**SMALL, "in_channels": 16, "out_channels": 16, **shape}
                ),
                1,
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=random_network(
                lambda: diffusers.AutoencoderKL(
                    block_out_channels=(4, 8), sample_size=16, **vae_blocks(), **space
                ),
                2,
            ),
            **text_encoders.parts(texts, scratch),
        )
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(
        lambda kind: diffusers_pipeline(kind, tmp_path_factory.mktemp("scratch")),
        KINDS,
        tmp_path_factory,
    )


def opened(folder: Path, name: str = "StableDiffusion3Pipeline") -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    # which diffusers' loader takes as arguments
    absent = {key: None for key in ("text_encoder_3", "tokenizer_3") if index[key] == [None, None]}
    return open_pipeline(folder, name, **absent)


def compare(images: Tensor, expected: Tensor) -> None:
    assert_same_images(images, expected, tolerance=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.05


def same(model: LatentDiffusion, pipe: Any) -> None:
    """Guidance on and off, a negative prompt or none, other words for the second encoder, other
    sizes.
    """
    cases: tuple[tuple[float, dict[str, Any], dict[str, Any]], ...] = (
        (7.0, {}, {"height": 16, "width": 16}),
        (0.0, {}, {"height": 24, "width": 12}),
        (
            4.0,
            {
                "negative_prompt": "ugly",
                "prompt_2": "two cats",
                "negative_prompt_2": "the lazy dog",
            },
            {"height": 12, "width": 20},
        ),
    )
    for guidance, words, size in cases:
        prompts = {key: [value] * 2 for key, value in words.items()}
        # T5 reads what the second CLIP reads
        prompts |= {
            key.replace("_2", "_3"): value for key, value in prompts.items() if key.endswith("_2")
        }
        expected = pipeline_images(
            pipe, PROMPTS, guidance_scale=guidance, num_inference_steps=3, **prompts, **size
        )
        compare(
            model.run(
                Request(PROMPTS, guidance=guidance, steps=3, **words, **size), output="tensor"
            ),
            expected,
        )


@pytest.mark.parametrize("kind", ["SD 3", "SD 3.5 without T5", "dynamic shift"])
def test_folders_open_in_both_libraries(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load(folders[kind])
    assert (
        model.defaults.steps,
        model.defaults.guidance,
        model.defaults.sampler,
        model.defaults.max_reference_images,
    ) == (28, 7.0, "euler", 0)
    same(model, opened(folders[kind]))
    model.save(tmp_path / "sfumato")
    again = load(tmp_path / "sfumato")
    assert again.hash == model.hash and again.defaults == model.defaults
    pipe = opened(tmp_path / "sfumato", "DiffusionPipeline")
    assert type(pipe).__name__ == "StableDiffusion3Pipeline"
    same(again, pipe)
    first, second = (one.scheduler.config for one in (opened(folders[kind]), pipe))
    assert all(second[key] == value for key, value in first.items() if not key.startswith("_"))
    assert count_equal_weight_files(folders[kind], tmp_path / "sfumato") == 5 - (
        "without" in KINDS[kind][0]
    )
    again.save(tmp_path / "sfumato.safetensors")
    assert load(tmp_path / "sfumato.safetensors").hash == model.hash


@pytest.mark.parametrize("kind", ["SD 3", "SD 3.5 without T5"])
def test_convert_keeps_the_pipeline(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """diffusers' folder -> file -> folder: one that it opens as the same pipeline, T5 left out
    where it was.
    """
    file, folder = tmp_path / "a.safetensors", tmp_path / "folder"
    assert (
        main(["convert", str(folders[kind]), str(file)]) == 0
        and main(["convert", str(file), str(folder)]) == 0
    )
    expected = load(folders[kind])
    for model in (load(file), load(folder)):
        assert (model.hash, model.defaults) == (expected.hash, expected.defaults)
    one, two = (
        (place / "model_index.json").read_text().replace("T5TokenizerFast", "T5Tokenizer")
        for place in (folder, folders[kind])
    )
    assert json.loads(one) == {
        k: v for k, v in json.loads(two).items() if k != "_diffusers_version"
    }
    assert type(opened(folder, "DiffusionPipeline")).__name__ == "StableDiffusion3Pipeline"


def test_by_the_models_own_settings(folders: dict[str, Path]) -> None:
    """Default steps, guidance and size."""
    kind = "dynamic shift"
    expected = pipeline_images(opened(folders[kind]), PROMPTS)
    compare(load(folders[kind]).generate(PROMPTS, output="tensor"), expected)


@pytest.mark.parametrize(
    ("part", "interval"),
    [((-1.0, 2.0), ""), ((0.1, 0.7), ",low={low:.3f},high={high:.3f}")],
    ids=["always", "steps 1 to 3"],
)
def test_away_from_skipped_layers(
    part: tuple[float, float], interval: str, folders: dict[str, Path]
) -> None:
    """diffusers' scale is less by one: 1.8 there is 2.8 in sfumato.

    diffusers skips the layers in the steps between two shares of the run, sfumato between two
    times.
    """
    kind = "SD 3.5 without T5"
    pipe, model, (start, stop) = opened(folders[kind]), load(folders[kind]), part
    options: dict[str, Any] = {"height": 16, "width": 12}
    skipped = {
        "skip_guidance_layers": [0, 2],
        "skip_layer_guidance_scale": 1.8,
        "skip_layer_guidance_start": start,
    }
    expected = pipeline_images(
        pipe,
        PROMPTS,
        guidance_scale=4.0,
        num_inference_steps=5,
        skip_layer_guidance_stop=stop,
        **skipped,
        **options,
    )
    times = model.plan(Request(steps=5, **options)).timesteps
    between = interval.format(low=(times[3] + times[4]) / 2, high=(times[0] + times[1]) / 2)
    words = f"4 dual:kind=away,second=2.8{between} condition skip_layers:layers={LAYERS}"
    compare(model.generate(PROMPTS, guidance=words, steps=5, output="tensor", **options), expected)
    assert (
        model.generate(PROMPTS, guidance=4, steps=5, output="tensor", **options) - expected
    ).abs().max() > 0.01, "it shows"


# ---- tasks ---------------------------------------------------------------------------------------


REQUEST = Request(PROMPTS, steps=5, guidance=4.0, negative_prompt="ugly")
OPTIONS: Mapping[str, Any] = {
    "guidance_scale": 4.0,
    "num_inference_steps": 5,
    "negative_prompt": ["ugly"] * 2,
    "height": 24,
    "width": 16,
}


@pytest.mark.parametrize(
    ("kind", "strength"), [("SD 3", 0.6), ("dynamic shift", 0.4), ("dynamic shift", 1.0)]
)
def test_image_to_image(kind: str, strength: float, folders: dict[str, Path]) -> None:
    image = smooth_image()
    pipe = opened(folders[kind], "StableDiffusion3Img2ImgPipeline")
    expected = pipeline_images(
        pipe, PROMPTS, image=image.expand(2, -1, -1, -1), strength=strength, **OPTIONS
    )
    model = load(folders[kind])
    compare(
        model.run(
            image_to_image(model, image * 2 - 1, REQUEST, strength=strength, posterior="sample"),
            output="tensor",
        ),
        expected,
    )


@pytest.mark.parametrize(
    ("kind", "strength"),
    [("dynamic shift", 0.6), ("dynamic shift", 1.0), ("inpainting", 0.6), ("inpainting", 1.0)],
)
def test_inpainting(kind: str, strength: float, folders: dict[str, Path]) -> None:
    """By an ordinary model, and by a network of mask and masked image.

    Latents are compared: diffusers 0.42.1 leaves the autoencoder's shift out when its inpainting
    pipeline decodes them; the text-to-image pipeline does not.
    """
    image, mask = smooth_image(), rectangle_mask()
    # one a prompt: each from its own generator
    pair = {"image": image.expand(2, -1, -1, -1), "mask_image": mask.expand(2, -1, -1, -1)}
    pipe = opened(folders[kind], "StableDiffusion3InpaintPipeline")
    expected = pipe(
        PROMPTS,
        generator=seeded_generators(2),
        output_type="latent",
        strength=strength,
        **pair,
        **OPTIONS,
    ).images
    model = load(folders[kind])
    blind = kind != "inpainting" and strength == 1
    request = inpaint(
        model,
        image * 2 - 1,
        mask,
        REQUEST,
        strength=strength,
        posterior="sample",
        paste=False,
        noise_only_start=blind,
    )
    compare(model.run(request, output="latent"), expected)


def test_on_the_command_line(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sfumato info` and `sfumato generate` on a folder of diffusers.

    The image is that of diffusers but for the rounding to bytes.
    """
    folder = folders["SD 3"]
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (
        facts["parts"]["denoiser"]["class"] == "SD3"
        and facts["parts"]["text_encoder_3"]["parameters"] > 0
    )
    assert (
        facts["defaults"]["steps"],
        facts["defaults"]["guidance"],
        facts["defaults"]["sampler"],
    ) == (28, 7.0, "euler")
    flags = [
        "--steps",
        "3",
        "--height",
        "12",
        "--width",
        "20",
        "--n",
        "1",
        "--negative-prompt",
        "ugly",
        "--out",
        str(tmp_path / "cat.png"),
    ]
    assert main(["generate", "a red cat", "--model", str(folder), *flags]) == 0
    with Image.open(tmp_path / "cat.png") as image:
        result = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    expected = pipeline_images(
        opened(folder),
        PROMPTS[:1],
        num_inference_steps=3,
        height=12,
        width=20,
        negative_prompt=["ugly"],
    )[0]
    assert result.shape == expected.shape and expected.std() > 0.05
    assert (result - expected).abs().max() < 0.5 / 255 + 1e-3
