"""Parity of whole pipelines with diffusers.

The same folder, prompt, seeds and steps give the same images, to 1e-3 of white in float32. The
models are small, random and of every family, with the shapes that make the family. Folders of each
library open in the other.
"""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import diffusers
import pytest
import torch
from PIL import Image as pil
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.models import randomised
from helpers.pipelines import (
    FAMILIES,
    ORIGINALS,
    SCALED,
    SCALED_LINEAR,
    assert_same_images,
    open_pipeline,
    original_pipeline,
    pipeline_images,
    published_schedulers,
    quiet,
    rectangle_mask,
    save_pipelines,
    smooth_image,
    tiny_pipeline,
    without_prompt_weights,
)
from helpers.tensors import equal_tensors
from sfumato.cli import main
from sfumato.cli._options import PromptWeights
from sfumato.errors import UserError
from sfumato.images import read_parameters, write_png
from sfumato.kernels import batch_invariant
from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.base import PROMPT_WEIGHTS
from sfumato.predict.conditioners.clip_text import ClipText
from sfumato.sampling import Request
from sfumato.tasks.edit import edit
from sfumato.tasks.image_to_image import image_to_image
from sfumato.tasks.inpaint import inpaint
from sfumato.tasks.upscale import upscale

TEXT_TO_IMAGE = [
    family
    for family, (_, shape, _, texts) in FAMILIES.items()
    if "in_channels" not in shape and texts != "refiner"
]
STEPS = {"SD 2, zero terminal SNR": "trailing:whole=true"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    # which test_pipeline_tasks.py has
    families = [family for family in FAMILIES if family not in ("SDXL inpainting", "refiner")]
    return save_pipelines(tiny_pipeline, families, tmp_path_factory)


def same(model: LatentDiffusion, pipe: Any, spacing: str = "leading:offset=1") -> None:
    """Compare prompts, a negative prompt or none, guidance on and off, another size.

    The number of steps, 5, divides 1000: diffusers' DDIM steps by 1000 // steps.
    """
    prompts = ["a red cat", "a dog, (very) red"]
    for negative, guidance, size in (
        (None, 5.0, 16),
        ("a cat", 7.5, 16),
        (None, 1.0, 16),
        ("dog", 3.0, 24),
    ):
        options: dict[str, Any] = {"height": size, "width": 16}
        negatives = None if negative is None else [negative] * 2
        if guidance == 1:
            negative = negatives = None
        expected = pipeline_images(
            pipe,
            prompts,
            negative_prompt=negatives,
            guidance_scale=guidance,
            num_inference_steps=5,
            **options,
        )
        result = without_prompt_weights(model).generate(
            prompts,
            negative_prompt=negative,
            guidance=guidance,
            steps=5,
            sampler="ddim",
            spacing=spacing,
            output="tensor",
            **options,
        )
        assert_same_images(result, expected)


@pytest.mark.parametrize("family", TEXT_TO_IMAGE)
def test_folders_of_diffusers_open(family: str, folders: dict[str, Path]) -> None:
    same(
        load(folders[family]),
        open_pipeline(folders[family], FAMILIES[family][0]),
        STEPS.get(family, "leading:offset=1"),
    )


@pytest.mark.parametrize("family", ["SD 1", "SDXL"])
def test_guidance_up_to_1_draws_the_prompt(family: str, folders: dict[str, Path]) -> None:
    """Distilled models are run with guidance_scale=0: the prompt, one call a step.

    diffusers ignores a negative prompt then, which is refused here.
    """
    model, pipe = load(folders[family]), open_pipeline(folders[family], FAMILIES[family][0])
    options: dict[str, Any] = {"steps": 2, "sampler": "ddim", "spacing": "leading:offset=1"}
    for scale in (0.0, 0.5, 1.0):
        expected = pipeline_images(
            pipe,
            ["a red cat"],
            negative_prompt=["a dog"],
            guidance_scale=scale,
            num_inference_steps=2,
        )
        result = model.generate("a red cat", guidance=scale, output="tensor", **options)
        assert_same_images(result, expected)
        with pytest.raises(UserError, match=r"negative prompt 'a dog' with guidance .* above 1"):
            model.generate("a red cat", guidance=scale, negative_prompt="a dog", **options)
    guided = model.generate("a red cat", guidance=2.0, output="tensor", **options)
    assert (guided - result).abs().max() > 0.01, "guidance shows"


WEIGHTED = "a (cat:1.8), [red] BREAK dog"


def test_a_request_sets_the_rule_of_prompt_weights(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(folders["SDXL"])
    images = {
        rule: model.generate(WEIGHTED, steps=1, prompt_weights=rule, output="tensor")
        for rule in (None, *PROMPT_WEIGHTS)
    }
    assert torch.equal(images[None], images["lerp"])
    distinct = [images[rule] for rule in PROMPT_WEIGHTS]
    assert not any(torch.equal(a, b) for a, b in combinations(distinct, 2))
    plan = model.plan(Request(WEIGHTED, prompt_weights="comfyui"))
    assert plan.to_json()["prompt_weights"] == "comfyui"
    assert model.settings()["prompt_weights"] == "lerp"
    stored = replace(model, conditioner=model.conditioner.with_prompt_weights("none"))
    assert torch.equal(stored.generate(WEIGHTED, steps=1, output="tensor"), images["none"]), (
        "the model's own rule applies where the request has none"
    )
    with pytest.raises(UserError, match=r"unknown rule of prompt weights 'A1111': .* 'a1111'"):
        model.plan(Request(WEIGHTED, prompt_weights="A1111"))
    # notations that a rule refuses are text under another one
    with pytest.raises(UserError, match=r"has \[from:to:when\]"):
        model.plan(Request("a [cat:dog:0.5]"))
    model.plan(Request("a [cat:dog:0.5]", negative_prompt="[a|b]", prompt_weights="none"))
    assert not [r for r in caplog.records if "BREAK" in r.message]


def test_a_png_records_the_rule_and_older_ones_mean_a1111(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(*arguments: str) -> tuple[Any, dict[str, Any]]:
        out = tmp_path / f"{len([*tmp_path.iterdir()])}.png"
        assert main(["generate", *arguments, "--out", str(out)]) == 0, capsys.readouterr().err
        return pil.open(out).tobytes(), read_parameters(out)

    request = ["--model", str(folders["SD 1"]), "--n", "1", "--steps", "1"]
    pixels, parameters = draw(WEIGHTED, *request, "--prompt-weights", "comfyui")
    assert parameters["prompt_weights"] == "comfyui"
    again, _ = draw("--from", str(tmp_path / "0.png"))
    usual, parameters = draw(WEIGHTED, *request)
    assert again == pixels != usual and parameters["prompt_weights"] == "lerp"
    older = {name: value for name, value in parameters.items() if name != "prompt_weights"}
    write_png(tmp_path / "2.png", pil.open(tmp_path / "0.png"), older)
    again, parameters = draw("--from", str(tmp_path / "2.png"))
    a1111, _ = draw(WEIGHTED, *request, "--prompt-weights", "a1111")
    assert again == a1111 != usual and parameters["prompt_weights"] == "a1111"


def test_the_command_line_has_every_rule() -> None:
    assert get_args(PromptWeights) == PROMPT_WEIGHTS


@pytest.mark.parametrize("family", TEXT_TO_IMAGE)
def test_saved_folders_open_in_diffusers(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load(folders[family])
    model.save(tmp_path / "sfumato")
    again = load(tmp_path / "sfumato")
    assert again.hash == model.hash and again.defaults == model.defaults
    pipe = open_pipeline(tmp_path / "sfumato")
    assert type(pipe).__name__ == FAMILIES[family][0]
    pipe.scheduler = diffusers.DDIMScheduler(**{**SCALED, **FAMILIES[family][2]})
    same(again, pipe, STEPS.get(family, "leading:offset=1"))


PUBLISHED = published_schedulers()


@pytest.mark.parametrize("family", PUBLISHED)
def test_runs_without_a_word_about_samplers(family: str, tmp_path: Path) -> None:
    """The folder's scheduler sets sampler, spacing and end, also after the model was saved."""
    pipe = tiny_pipeline(family)
    pipe.scheduler = PUBLISHED[family]
    pipe.save_pretrained(tmp_path / "diffusers")
    model = load(tmp_path / "diffusers")
    model.save(tmp_path / "sfumato")
    again = open_pipeline(tmp_path / "sfumato", type(pipe).__name__)
    expected = pipeline_images(pipe, ["a red cat", "a dog"], num_inference_steps=10)
    assert (
        pipeline_images(again, ["a red cat", "a dog"], num_inference_steps=10) - expected
    ).abs().max() < 1e-3
    for each in (model, load(tmp_path / "sfumato")):
        assert_same_images(
            without_prompt_weights(each).generate(
                ["a red cat", "a dog"], steps=10, output="tensor"
            ),
            expected,
        )


def test_a_model_describes_its_parts(folders: dict[str, Path]) -> None:
    parts = load(folders["SDXL"]).describe()["parts"]
    assert [*parts] == ["autoencoder", "denoiser", "text_encoder", "text_encoder_2"]
    assert (
        parts["text_encoder_2"]["class"] == "CLIPTextModelWithProjection"
        and parts["text_encoder"]["parameters"] > 0
    )


def test_defaults_are_those_of_their_pipelines(folders: dict[str, Path]) -> None:
    for family, guidance in (("SD 1", 7.5), ("SDXL", 5.0)):
        defaults = load(folders[family]).defaults
        assert (defaults.steps, defaults.guidance) == (50, guidance)


# ---- tasks ---------------------------------------------------------------------------------------


REQUEST = Request(
    ["a red cat", "a dog"], steps=5, sampler="ddim", spacing="leading:offset=1", guidance=4.0
)


@pytest.mark.parametrize(
    ("family", "name"),
    [("SD 1", "StableDiffusionImg2ImgPipeline"), ("SDXL", "StableDiffusionXLImg2ImgPipeline")],
)
@pytest.mark.parametrize("strength", [0.4, 0.8, 1.0])
def test_image_to_image(family: str, name: str, strength: float, folders: dict[str, Path]) -> None:
    image = smooth_image()
    options = {
        "image": image.expand(2, -1, -1, -1),
        "strength": strength,
        "guidance_scale": 4.0,
        "num_inference_steps": 5,
    }
    expected = pipeline_images(
        open_pipeline(folders[family], name),
        REQUEST.prompt,
        negative_prompt=["ugly"] * 2,
        **options,
    )
    model = without_prompt_weights(load(folders[family]))
    request = image_to_image(
        model,
        image * 2 - 1,
        replace(REQUEST, negative_prompt="ugly"),
        strength=strength,
        posterior="sample",
    )
    assert_same_images(model.run(request, output="tensor"), expected)


@pytest.mark.parametrize(
    ("family", "strength"), [("SD 1", 0.6), ("SD 1 inpainting", 1.0), ("SD 1 inpainting", 0.6)]
)
def test_inpainting(family: str, strength: float, folders: dict[str, Path]) -> None:
    """With an ordinary model, and with a network of mask and masked image."""
    image, mask = smooth_image(), rectangle_mask()
    options: dict[str, Any] = {
        "height": 24,
        "width": 16,
        "strength": strength,
        "guidance_scale": 4.0,
    }
    # one a prompt: each from its own generator
    options |= {"image": image.expand(2, -1, -1, -1), "mask_image": mask.expand(2, -1, -1, -1)}
    expected = pipeline_images(
        open_pipeline(folders[family], "StableDiffusionInpaintPipeline"),
        REQUEST.prompt,
        num_inference_steps=5,
        **options,
    )
    model = without_prompt_weights(load(folders[family]))
    request = inpaint(
        model, image * 2 - 1, mask, REQUEST, strength=strength, posterior="sample", paste=False
    )
    assert_same_images(model.run(request, output="tensor"), expected)
    kept = model.run(
        inpaint(model, image * 2 - 1, mask, REQUEST, strength=strength), output="tensor"
    )
    outside = (mask == 0).expand(2, 3, -1, -1)
    assert torch.equal(
        kept[outside], (image * 2 - 1).add(1).div(2).expand(2, -1, -1, -1)[outside]
    ), "to the last bit"
    assert not torch.equal(kept[0], kept[1])


def test_instructions(folders: dict[str, Path]) -> None:
    image = smooth_image(height=16)
    pipe = open_pipeline(folders["InstructPix2Pix"], "StableDiffusionInstructPix2PixPipeline")
    expected = pipeline_images(
        pipe,
        REQUEST.prompt,
        image=image.expand(2, -1, -1, -1),
        guidance_scale=4.0,
        image_guidance_scale=1.7,
        num_inference_steps=5,
    )
    model = without_prompt_weights(load(folders["InstructPix2Pix"]))
    assert_same_images(
        model.run(edit(model, image * 2 - 1, REQUEST, image_guidance=1.7), output="tensor"),
        expected,
    )


def test_enlarging(folders: dict[str, Path], tmp_path: Path) -> None:
    """The noisy low-resolution image is concatenated to the latent.

    The tiny autoencoder's factor is 2. The saved model gives the same.
    """
    image = smooth_image(height=14, width=10)
    options = {
        "image": image.expand(2, -1, -1, -1) * 2 - 1,
        "noise_level": 37,
        "guidance_scale": 4.0,
        "num_inference_steps": 5,
    }
    expected = pipeline_images(
        open_pipeline(folders["x4 upscaler"], "StableDiffusionUpscalePipeline"),
        REQUEST.prompt,
        **options,
    )
    model = without_prompt_weights(load(folders["x4 upscaler"]))
    model.save(tmp_path / "sfumato")
    again = without_prompt_weights(load(tmp_path / "sfumato"))
    assert again.hash == model.hash and again.low_res == model.low_res is not None
    for each in (model, again):
        result = each.run(upscale(each, image * 2 - 1, REQUEST, noise_level=37), output="tensor")
        assert result.shape == (2, 3, 28, 20)
        assert_same_images(result, expected)
    pipe = open_pipeline(tmp_path / "sfumato")
    pipe.scheduler = diffusers.DDIMScheduler(**{**SCALED, "prediction_type": "v_prediction"})
    assert_same_images(pipeline_images(pipe, REQUEST.prompt, **options), expected)
    with pytest.raises(UserError, match="noise_level=1000: expected a whole number from 0 to 999"):
        upscale(model, image * 2 - 1, noise_level=1000)
    with pytest.raises(UserError, match="was not trained to enlarge images"):
        upscale(load(folders["SD 1"]), image * 2 - 1)


def test_networks_that_need_more_inputs_name_them(folders: dict[str, Path]) -> None:
    with pytest.raises(
        UserError, match=r"takes 9 channels and was given 4.*need the task that gives it"
    ):
        load(folders["SD 1 inpainting"]).generate("a cat", steps=1)
    for family, task in (("InstructPix2Pix", "edit"), ("x4 upscaler", "upscale")):
        with pytest.raises(UserError, match=f"channels beside the latent: use {task}$"):
            image_to_image(load(folders[family]), smooth_image() * 2 - 1)
    with pytest.raises(UserError, match="instructions need a model that takes an image"):
        edit(load(folders["SD 1"]), smooth_image() * 2 - 1)
    with pytest.raises(
        UserError,
        match="takes 4 channels beside the latent: inpainting needs none, or a mask and an image",
    ):
        inpaint(load(folders["InstructPix2Pix"]), smooth_image() * 2 - 1, rectangle_mask())


# ---- latent consistency models -------------------------------------------------------------------


def lcm_pipeline(family: str) -> Any:
    """A family's pipeline whose U-Net takes the guidance scale, with the published scheduler."""
    pipe = tiny_pipeline(family)
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    config["time_cond_proj_dim"] = 256
    unet = randomised(diffusers.UNet2DConditionModel(**config), 4, 0.05)
    scheduler = diffusers.LCMScheduler(**SCALED_LINEAR, steps_offset=1)
    pipe.register_modules(unet=unet, scheduler=scheduler)
    if family != "SD 1":
        return pipe
    return quiet(
        diffusers.LatentConsistencyModelPipeline(
            **{**pipe.components, "image_encoder": None}, requires_safety_checker=False
        )
    )


@pytest.mark.parametrize(("family", "scale"), [("SD 1", 8.5), ("SDXL", 5.0)])
def test_latent_consistency_models_in_both_directions(
    family: str, scale: float, tmp_path: Path
) -> None:
    """The guidance scale is an input of the U-Net: one call a step, by default and as given."""
    pipe, prompts = lcm_pipeline(family), ["a red cat", "a dog"]
    pipe.save_pretrained(tmp_path / "diffusers")
    model = without_prompt_weights(load(tmp_path / "diffusers"))
    defaults = model.defaults
    assert (defaults.steps, defaults.guidance, defaults.distilled_guidance) == (4, 1.0, scale)
    assert (defaults.sampler, defaults.spacing) == ("lcm", "lcm")
    model.save(tmp_path / "sfumato")
    model.save(tmp_path / "sfumato.safetensors")
    for place in ("sfumato", "sfumato.safetensors"):
        again = load(tmp_path / place)
        assert again.hash == model.hash and again.defaults == defaults
    peer = open_pipeline(tmp_path / "sfumato")
    assert peer.unet.config.time_cond_proj_dim == 256
    assert type(peer.scheduler).__name__ == "LCMScheduler"
    expected = pipeline_images(pipe, prompts, num_inference_steps=4, guidance_scale=scale)
    assert (
        pipeline_images(peer, prompts, num_inference_steps=4, guidance_scale=scale) - expected
    ).abs().max() < 1e-3
    result = model.generate(prompts, output="tensor")
    assert_same_images(result, expected)
    # the U-Net alone is a folder on the hub, beside the model that it was distilled from
    tiny_pipeline(family).save_pretrained(tmp_path / "base")
    base = without_prompt_weights(
        load(tmp_path / "base", transformer=tmp_path / "diffusers" / "unet")
    )
    settings = {"sampler": "lcm", "spacing": "lcm", "steps": 4, "distilled_guidance": scale}
    assert torch.equal(base.generate(prompts, output="tensor", **settings, guidance=1.0), result)
    for guidance in (1.0, 2.5, 0.0):
        options = {"num_inference_steps": 2, "guidance_scale": guidance}
        expected = pipeline_images(pipe, prompts, **options)
        assert_same_images(
            model.generate(prompts, steps=2, guidance=guidance, output="tensor"), expected
        )
        assert (expected - result).abs().max() > 1e-3, "the scale and the steps show"


# ---- single files in the original layout ---------------------------------------------------------


def in_scaled_fp8(tensors: dict[str, Tensor], scale: str, mark: bytes = b"") -> dict[str, Tensor]:
    """Matrices and convolutions in eight bits with a scale each, as ComfyUI has them."""
    quantized: dict[str, Tensor] = {}
    for key, value in tensors.items():
        stem, _, last = key.rpartition(".")
        if last != "weight" or value.ndim < 2 or key.endswith("embedding.weight"):
            quantized[key] = value
            continue
        quantized[key] = (value * 16).to(torch.float8_e4m3fn)
        quantized[f"{stem}.{scale}"] = torch.tensor(1 / 16)
        if mark:
            quantized[f"{stem}.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    return quantized


@pytest.mark.parametrize("family", ORIGINALS)
def test_files_with_a_unet_in_scaled_fp8(family: str, tmp_path: Path) -> None:
    """A whole file in eight bits, one with the U-Net alone in them, and a U-Net beside a folder."""
    original_pipeline(family).save_pretrained(tmp_path / "folder")
    folder = load(tmp_path / "folder")
    folder.save(tmp_path / "one.safetensors")
    tensors = load_file(tmp_path / "one.safetensors")
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        metadata = file.metadata()
    prefix = "model.diffusion_model."
    unet = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    marked = in_scaled_fp8(unet, "weight_scale", b'{"format": "float8_e4m3fn"}')
    marker = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    eights = in_scaled_fp8(unet, "scale_weight")
    mixed = {prefix + k: v for k, v in (eights | marker).items()}
    mixed |= {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    files = {
        "whole": in_scaled_fp8(tensors, "scale_weight") | {f"{prefix}scaled_fp8": torch.empty(0)},
        "mixed": mixed,
        "alone": eights | marker,
        "marked": {prefix + k: v for k, v in marked.items()},
        "diffusers": in_scaled_fp8(
            load_file(tmp_path / "folder/unet/diffusion_pytorch_model.safetensors"), "weight_scale"
        ),
    }
    expected = {
        key: (16 * value).to(torch.float8_e4m3fn).float() / 16
        if key.endswith("weight") and value.ndim > 1
        else value
        for key, value in folder.denoiser.network.state_dict().items()
    }
    for name, content in files.items():
        place = tmp_path / f"{name}.safetensors"
        save_file(content, place, metadata if name in ("whole", "mixed") else None)
        whole = name in ("whole", "mixed")
        model = load(place) if whole else load(tmp_path / "folder", transformer=place)
        assert equal_tensors(dict(model.denoiser.network.state_dict()), expected), name
        assert model.denoiser.process == folder.denoiser.process
        assert equal_tensors(
            dict(model.autoencoder.state_dict()), dict(folder.autoencoder.state_dict())
        ) == (name != "whole")
    with pytest.raises(UserError, match=r"alone\.safetensors is of no known layout"):
        load(tmp_path / "alone.safetensors")
    alone = (
        "heads of attention do not follow" if family == "SD 1" else "a U-Net alone: give a folder"
    )
    with pytest.raises(UserError, match=alone):
        load(tmp_path / "marked.safetensors")
    del marked["out.2.weight"]
    save_file(marked, tmp_path / "damaged.safetensors")
    with pytest.raises(UserError, match=r"out\.2\.weight"):
        load(tmp_path / "folder", transformer=tmp_path / "damaged.safetensors")
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds no U-Net"):
        load(tmp_path / "folder", transformer=tmp_path / "other.safetensors")


@pytest.mark.parametrize("family", ORIGINALS)
def test_single_files_both_ways(family: str, tmp_path: Path) -> None:
    """A folder of diffusers, saved as one file, opens in both libraries: the same images."""
    pipe = original_pipeline(family)
    pipe.save_pretrained(tmp_path / "folder")
    folder = load(tmp_path / "folder")
    assert isinstance(folder.conditioner, ClipText)
    skipping = replace(
        folder.conditioner,
        config=replace(folder.conditioner.config, clip_skip=1, truncation="refuse"),
    )
    replace(folder, conditioner=skipping).save(tmp_path / "skips.safetensors")
    assert load(tmp_path / "skips.safetensors").conditioner.config == skipping.config, (
        "how prompts are read is not lost"
    )
    folder.save(tmp_path / "one.safetensors")
    model = load(tmp_path / "one.safetensors")
    result = [
        m.generate("a (red:1.2) cat", steps=3, height=16, width=24, seed=4, output="tensor")
        for m in (folder, model)
    ]
    # Not to the last bit: how weights lie to cache lines in a file decides how a product of one row
    # (a pooled text) is rounded.
    assert (result[0] - result[1]).abs().max() < (1e-5 if batch_invariant.FIXED_ORDER else 5e-5)
    assert model.denoiser.process == folder.denoiser.process
    reference = type(pipe).from_single_file(
        tmp_path / "one.safetensors", config=str(tmp_path / "folder"), local_files_only=True
    )
    quiet(reference)
    reference.scheduler = pipe.scheduler
    expected = pipeline_images(
        reference, ["a red cat"], num_inference_steps=5, guidance_scale=4.0, height=16, width=24
    )
    options: dict[str, Any] = {
        "steps": 5,
        "sampler": "ddim",
        "spacing": "leading:offset=1",
        "guidance": 4.0,
        "height": 16,
        "width": 24,
    }
    assert_same_images(
        without_prompt_weights(model).generate(["a red cat"], output="tensor", **options), expected
    )
