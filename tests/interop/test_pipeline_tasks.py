"""Tasks beside diffusers' pipelines, to 1e-3 of white: the hand-over to a refiner, inpainting of
SDXL and at full strength, two prompts.

The small random models are those of `helpers.pipelines`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.pipelines import (
    FAMILIES,
    as_tensor,
    assert_same_images,
    open_pipeline,
    pipeline_images,
    published_schedulers,
    rectangle_mask,
    save_pipelines,
    seeded_generators,
    smooth_image,
    tiny_pipeline,
    without_prompt_weights,
)
from sfumato.cli import main
from sfumato.errors import UserError
from sfumato.images import read_parameters, to_pil
from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.clip_text import ClipText
from sfumato.sampling import Request
from sfumato.tasks.image_to_image import image_to_image
from sfumato.tasks.inpaint import inpaint
from sfumato.tasks.interpolate import interpolate, interpolate_images
from sfumato.tasks.refine import handover, refine
from sfumato.tasks.variations import variations, vary
from sfumato.types import ImageSpec

FAMILY_NAMES = (
    "SD 1",
    "SD 1 inpainting",
    "SDXL",
    "SDXL inpainting",
    "refiner",
    "InstructPix2Pix",
    "x4 upscaler",
)
REFINER, BASE = FAMILIES["refiner"][0], FAMILIES["SDXL"][0]
PROMPTS = ["a red cat", "a dog"]
SCALE = 4.0
REQUEST = Request(PROMPTS, steps=5, sampler="ddim", spacing="leading:offset=1", guidance=SCALE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(tiny_pipeline, FAMILY_NAMES, tmp_path_factory)


def opened(folder: Path) -> LatentDiffusion:
    return without_prompt_weights(load(folder))


# ---- base and refiner ----------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "steps", "offset"), [(0.8, 10, 1), (0.8, 10, 0), (0.33, 8, 1)])
def test_hand_over_to_a_refiner(
    at: float, steps: int, offset: int, folders: dict[str, Path]
) -> None:
    """Offset 0: a timestep lies on the border, 200 of 1000, and is the base's."""
    base, second = open_pipeline(folders["SDXL"], BASE), open_pipeline(folders["refiner"], REFINER)
    for pipe in (base, second):
        pipe.scheduler.register_to_config(steps_offset=offset)
    options: dict[str, Any] = {
        "guidance_scale": SCALE,
        "num_inference_steps": steps,
        "negative_prompt": ["ugly"] * 2,
    }
    latents = base(
        PROMPTS, generator=seeded_generators(2), denoising_end=at, output_type="latent", **options
    ).images
    expected = pipeline_images(second, PROMPTS, image=latents, denoising_start=at, **options)
    request = replace(
        REQUEST, steps=steps, spacing=f"leading:offset={offset}", negative_prompt="ugly"
    )
    first, last = opened(folders["SDXL"]), opened(folders["refiner"])
    plans = handover(first, last, request, at=at)
    begun = first.run(plans.first, output="latent")
    assert (begun - latents).abs().max() < 1e-4
    assert_same_images(last.run(plans.resume(begun), output="tensor"), expected)
    assert torch.equal(
        last.run(refine(first, last, request, at=at), output="tensor"),
        last.run(plans.resume(begun), output="tensor"),
    )


def test_hand_over_without_a_word_about_samplers(folders: dict[str, Path], tmp_path: Path) -> None:
    """As published: Euler's method for both models, whose latents diffusers scales by 1/alpha."""
    published = published_schedulers()["SDXL"]
    options: dict[str, Any] = {"num_inference_steps": 10}
    pipes = [open_pipeline(folders["SDXL"], BASE), open_pipeline(folders["refiner"], REFINER)]
    for name, pipe in zip(("base", "refiner"), pipes, strict=True):
        pipe.scheduler = type(published).from_config(published.config)
        pipe.save_pretrained(tmp_path / name)
    latents = pipes[0](
        PROMPTS, generator=seeded_generators(2), denoising_end=0.7, output_type="latent", **options
    ).images
    expected = pipeline_images(pipes[1], PROMPTS, image=latents, denoising_start=0.7, **options)
    base, second = opened(tmp_path / "base"), opened(tmp_path / "refiner")
    assert base.defaults.sampler.startswith("euler") and second.defaults.guidance == 5.0
    assert_same_images(
        second.run(refine(base, second, Request(PROMPTS, steps=10), at=0.7), output="tensor"),
        expected,
    )


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_a_refiner_begins_with_a_picture(strength: float, folders: dict[str, Path]) -> None:
    image = smooth_image()
    options: dict[str, Any] = {
        "image": image.expand(2, -1, -1, -1),
        "strength": strength,
        "guidance_scale": SCALE,
        "num_inference_steps": 10,
    }
    scores: dict[str, Any] = {"aesthetic_score": 7.5, "negative_aesthetic_score": 1.5}
    expected = pipeline_images(
        open_pipeline(folders["refiner"], REFINER), PROMPTS, **options, **scores
    )
    model = opened(folders["refiner"])
    request = replace(REQUEST, steps=10, image_spec=ImageSpec(24, 16, **scores))
    assert_same_images(
        model.run(
            image_to_image(model, image * 2 - 1, request, strength=strength, posterior="sample"),
            output="tensor",
        ),
        expected,
    )
    other = image_to_image(
        model,
        image * 2 - 1,
        replace(request, image_spec=None),
        strength=strength,
        posterior="sample",
    )
    assert (model.run(other, output="tensor") - expected).abs().max() > 1e-3, "the score is told"


def test_a_refiner_is_saved_and_opened(folders: dict[str, Path], tmp_path: Path) -> None:
    model = opened(folders["refiner"])
    model.save(tmp_path / "sfumato")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "sfumato")
    assert type(pipe).__name__ == REFINER and load(tmp_path / "sfumato").hash == model.hash


# ---- inpainting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "strength"),
    [
        ("SD 1", "StableDiffusionInpaintPipeline", 1.0),
        ("SDXL", "StableDiffusionXLInpaintPipeline", 1.0),
        ("SDXL", "StableDiffusionXLInpaintPipeline", 0.6),
        ("SDXL inpainting", "StableDiffusionXLInpaintPipeline", 1.0),
        ("SDXL inpainting", "StableDiffusionXLInpaintPipeline", 0.6),
    ],
)
def test_inpainting(family: str, name: str, strength: float, folders: dict[str, Path]) -> None:
    """Ordinary models at full strength begin with noise alone, as in diffusers.

    `noise_only_start` sets it.
    """
    image, mask = smooth_image(), rectangle_mask()
    options: dict[str, Any] = {
        "height": 24,
        "width": 16,
        "strength": strength,
        "guidance_scale": SCALE,
        "num_inference_steps": 5,
    }
    options |= {"image": image.expand(2, -1, -1, -1), "mask_image": mask.expand(2, -1, -1, -1)}
    expected = pipeline_images(open_pipeline(folders[family], name), PROMPTS, **options)
    model, blind = opened(folders[family]), strength == 1 and "inpainting" not in family
    task = {"strength": strength, "posterior": "sample", "paste": False, "noise_only_start": blind}
    assert_same_images(
        model.run(inpaint(model, image * 2 - 1, mask, REQUEST, **task), output="tensor"), expected
    )
    if blind:
        seeing = inpaint(model, image * 2 - 1, mask, REQUEST, **{**task, "noise_only_start": False})
        assert (model.run(seeing, output="tensor") - expected).abs().max() > 1e-3, (
            "they differ by alpha(T) z"
        )


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("SD 1 inpainting", "StableDiffusionInpaintPipeline"),
        ("SDXL inpainting", "StableDiffusionXLInpaintPipeline"),
    ],
)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_image_to_image_with_inpainting_models(
    family: str, name: str, strength: float, folders: dict[str, Path]
) -> None:
    """The whole image is drawn anew, as with a white mask."""
    image = smooth_image()
    options: dict[str, Any] = {
        "height": 24,
        "width": 16,
        "strength": strength,
        "guidance_scale": SCALE,
        "num_inference_steps": 5,
        "image": image.expand(2, -1, -1, -1),
        "mask_image": torch.ones(2, 1, 24, 16),
    }
    expected = pipeline_images(open_pipeline(folders[family], name), PROMPTS, **options)
    plan = image_to_image(
        opened(folders[family]), image * 2 - 1, REQUEST, strength=strength, posterior="sample"
    )
    assert_same_images(opened(folders[family]).run(plan, output="tensor"), expected)


def test_a_blind_start_is_for_ordinary_models_at_full_strength(folders: dict[str, Path]) -> None:
    for family, strength in (("SDXL inpainting", 1.0), ("SDXL", 0.6)):
        with pytest.raises(UserError, match="noise_only_start=True with strength"):
            inpaint(
                opened(folders[family]),
                smooth_image() * 2 - 1,
                rectangle_mask(),
                REQUEST,
                strength=strength,
                noise_only_start=True,
            )


# ---- two prompts ---------------------------------------------------------------------------------


def test_each_encoder_reads_its_own_prompt(folders: dict[str, Path]) -> None:
    pipe, model = open_pipeline(folders["SDXL"], BASE), opened(folders["SDXL"])
    words = {
        "prompt": "a cat",
        "prompt_2": "a red dog",
        "negative_prompt": "dog",
        "negative_prompt_2": "red",
    }
    tokens, not_tokens, pooled, not_pooled = pipe.encode_prompt(
        **words, do_classifier_free_guidance=True
    )
    assert isinstance(model.conditioner, ClipText)
    for one, two, expected, vector in (
        ("a cat", "a red dog", tokens, pooled),
        ("dog", "red", not_tokens, not_pooled),
    ):
        result = model.conditioner([one], ImageSpec(16, 16), [two])
        assert result.tokens is not None and result.vector is not None
        assert (result.tokens - expected).abs().max() < 1e-5 and (
            result.vector[:, :10] - vector
        ).abs().max() < 1e-5
    pictures = pipe(
        **words,
        generator=seeded_generators(1),
        guidance_scale=SCALE,
        num_inference_steps=5,
        output_type="np",
    )
    request = replace(REQUEST, **words)
    assert_same_images(model.run(request, output="tensor"), as_tensor(pictures.images))


def test_unused_second_prompts(folders: dict[str, Path]) -> None:
    for family, options, message in (
        (
            "SD 1",
            {"prompt_2": "a dog"},
            "this model has no second text encoder, put everything into prompt",
        ),
        (
            "refiner",
            {"prompt_2": "a dog"},
            "this model has no second text encoder, put everything into prompt",
        ),
        (
            "SDXL",
            {"prompt_2": "a dog", "prompt": None},
            "without prompt: expected a text for the first text encoder too",
        ),
        (
            "SDXL",
            {"negative_prompt_2": "a dog"},
            "negative_prompt_2 'a dog' without negative_prompt",
        ),
        ("SDXL", {"prompt_2": ["a dog", "a cat"], "prompt": "a cat"}, "2 prompts for 1 images"),
        (
            "SDXL",
            {"negative_prompt": "", "negative_prompt_2": "a dog", "guidance": 1.0},
            "nothing is moved away from it",
        ),
    ):
        request = replace(Request("a cat", steps=1, guidance=2.0), **options)
        with pytest.raises(UserError, match=message):
            opened(folders[family]).run(request)


def test_a_refiner_reads_the_first_prompt(folders: dict[str, Path]) -> None:
    base, second = opened(folders["SDXL"]), opened(folders["refiner"])
    request = replace(REQUEST, prompt="a cat", prompt_2="a red dog")
    handed = refine(base, second, request, at=0.5).request
    assert handed.prompt == "a cat" and handed.prompt_2 is None
    assert refine(base, base, request, at=0.5).request.prompt_2 == "a red dog"


# ---- series between prompts of different lengths -------------------------------------------------


@pytest.mark.parametrize("family", ["SD 1", "SDXL"])
def test_a_series_between_a_short_and_a_long_prompt(family: str, folders: dict[str, Path]) -> None:
    """One chunk of 77 tokens and three: both ends are the plain pictures, and nothing jumps beside
    them.
    """
    model, long = opened(folders[family]), " ".join(["a red dog"] * 50)
    request = Request("a cat", n=3, steps=3, guidance=SCALE, seed=4)
    series = model.run(interpolate(request, to_prompt=long), output="tensor")
    for result, words in ((series[0], "a cat"), (series[-1], long)):
        assert (
            result - model.run(replace(request, n=1, prompt=words), output="tensor")[0]
        ).abs().max() < 1e-5
    assert not torch.equal(series[0], series[1]) and not torch.equal(series[1], series[2])
    near = replace(request, n=2, prompt_mix=(long, [0.0, 1e-4]), noise_mix=([4, 4], [0.0, 0.0]))
    first, beside = model.run(near, output="tensor")
    assert 0 < (first - beside).abs().max() < 1e-2


def test_the_other_tasks_with_refiners_inpainting_and_instructions(
    folders: dict[str, Path],
) -> None:
    """Variations and series need a network of the latent alone; others are refused."""
    for family in ("SDXL inpainting", "InstructPix2Pix"):
        model = opened(folders[family])
        for way in ("noise", "inversion"):
            if (family, way) != ("SDXL inpainting", "noise"):
                with pytest.raises(UserError, match="channels beside the latent"):
                    variations(model, smooth_image() * 2 - 1, way=way)
            with pytest.raises(UserError, match="channels beside the latent"):
                interpolate_images(
                    model, smooth_image() * 2 - 1, smooth_image(6) * 2 - 1, Request(n=2), way=way
                )
    second = opened(folders["refiner"])
    result = second.run(vary(Request("a cat", n=2, steps=2), strength=0.3), output="tensor")
    assert torch.isfinite(result).all() and not torch.equal(result[0], result[1])


# ---- on the command line -------------------------------------------------------------------------


def test_commands_with_text_models(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, made = str(tmp_path / "photo.png"), tmp_path / "made.png"
    to_pil(smooth_image() * 2 - 1)[0].save(photo)
    out = ["--steps", "4", "--n", "1", "--out", str(made), "--overwrite"]
    xl, second = (load(folders[name]) for name in ("SDXL", "refiner"))
    words = [
        "a cat",
        "--prompt-2",
        "a red dog",
        "--negative-prompt",
        "dog",
        "--negative-prompt-2",
        "red",
        "--model",
        str(folders["SDXL"]),
    ]
    request = Request(
        "a cat", steps=4, prompt_2="a red dog", negative_prompt="dog", negative_prompt_2="red"
    )
    assert main(["generate", *words, *out]) == 0
    assert same(made, xl.run(request)[0]) and read_parameters(made)["prompt_2"] == "a red dog"
    assert main(
        ["generate", "--from", str(made), "--out", str(tmp_path / "again.png")]
    ) == 0 and same(tmp_path / "again.png", xl.run(request)[0])
    assert (
        main(["generate", *words, *out, "--refiner", str(folders["refiner"]), "--handover", "0.5"])
        == 0
    )
    assert same(made, second.run(refine(xl, second, request, at=0.5))[0])
    assert main(["edit", photo, *words, *out, "--strength", "0.5"]) == 0, (
        "style transfer: an ordinary model and a description"
    )
    assert same(made, xl.run(image_to_image(xl, picture_of(photo), request, strength=0.5))[0])
    whole = load(folders["SDXL inpainting"])
    words = ["red", "--model", str(folders["SDXL inpainting"])]
    assert main(["edit", photo, *words, *out, "--strength", "0.5"]) == 0
    plan = image_to_image(whole, picture_of(photo), Request("red", steps=4), strength=0.5)
    assert same(made, whole.run(plan)[0])
    for arguments, message in (
        (
            ["edit", photo, "red", "--strength", "0.5", "--model", str(folders["InstructPix2Pix"])],
            "this model follows instructions",
        ),
        (
            ["edit", photo, "red", "--model", str(folders["x4 upscaler"])],
            "takes 3 channels beside the latent: use upscale",
        ),
        (
            ["vary", photo, "red", "--model", str(folders["InstructPix2Pix"])],
            "takes 4 channels beside the latent: use edit",
        ),
        (
            ["upscale", photo, "red", "--scale", "2", "--model", str(folders["x4 upscaler"])],
            "--scale 2.0: this model is an upscaler",
        ),
        (
            ["upscale", photo, "red", "--strength", "0.2", "--model", str(folders["x4 upscaler"])],
            "--strength 0.2: this model is an upscaler",
        ),
        (
            ["generate", "red", "--negative-prompt-2", "cat", "--model", str(folders["SDXL"])],
            "without negative_prompt",
        ),
    ):
        made.unlink(missing_ok=True)
        assert main([*arguments, *out]) == 2 and not made.exists()
        assert message in capsys.readouterr().err


def picture_of(path: str) -> Image.Image:
    with Image.open(path) as result:
        result.load()
        return result


def same(path: Path, expected: Image.Image) -> bool:
    return np.array_equal(np.asarray(picture_of(str(path))), np.asarray(expected))
