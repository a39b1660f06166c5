"""Parity with diffusers' pipelines of FLUX.1, with small random networks.

The same folder, prompts and noise give the same images: FluxPipeline (dev and schnell),
FluxImg2ImgPipeline, FluxInpaintPipeline, FluxFillPipeline, FluxControlPipeline,
FluxKontextPipeline. All is float32; images are compared in [0, 1]. Saved models open in diffusers
with the same tensors under the same names.
"""

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers import text_encoders
from helpers.models import random_network
from helpers.pipelines import (
    assert_same_images,
    open_pipeline,
    pipeline_images,
    quiet,
    save_pipelines,
    smooth_image,
    vae_blocks,
)
from sfumato.cli import main
from sfumato.errors import UserError
from sfumato.images import to_pil
from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.sampling import Request
from sfumato.tasks.control import control
from sfumato.tasks.edit import edit
from sfumato.tasks.image_to_image import image_to_image
from sfumato.tasks.inpaint import inpaint
from sfumato.tasks.variations import variations

# by channels beside the latent's and whether guidance is embedded: the pipeline that is saved
NAMES = {
    "dev": ("FluxPipeline", 0, True),
    "schnell": ("FluxPipeline", 0, False),
    "fill": ("FluxFillPipeline", 80, True),
    "control": ("FluxControlPipeline", 16, True),
    "kontext": ("FluxKontextPipeline", 0, True),
}
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
PROMPTS = ["a red cat", "two dogs, 3 cats"]
SIZE = {"height": 32, "width": 48}
FEW: dict[str, Any] = {"max_sequence_length": 256}
"""Settings that schnell was trained with; diffusers' pipelines take them as arguments."""


@cache
def parts() -> dict[str, Any]:
    """Text encoders and the autoencoder, which all kinds share: sixteen channels at an eighth of
    the sides, as the published.
    """
    numbers = {
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "layers_per_block": 1,
    }
    vae = random_network(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(4, 4, 8, 8),
            latent_channels=16,
            sample_size=64,
            **vae_blocks(4),
            **numbers,
        ),
        2,
    )
    return {"vae": vae}


def diffusers_pipeline(kind: str, scratch: Path) -> Any:
    name, extra, guided = NAMES[kind]
    numbers = {
        "in_channels": 4 * (16 + extra),
        "out_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "axes_dims_rope": (4, 6, 6),
    }
    width = {
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 16,
    }
    network = random_network(
        lambda: diffusers.FluxTransformer2DModel(**numbers, **width, guidance_embeds=guided), 1
    )
    moved = (
        {"shift": 1.0}
        if kind == "schnell"
        else {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.15}
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, **moved)
    return quiet(
        getattr(diffusers, name)(
            **text_encoders.parts("flux", scratch),
            **parts(),
            transformer=network,
            scheduler=scheduler,
        )
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(
        lambda kind: diffusers_pipeline(kind, tmp_path_factory.mktemp("scratch")),
        NAMES,
        tmp_path_factory,
    )


photo = partial(smooth_image, **SIZE)
compare = partial(assert_same_images, tolerance=1e-4, contrast=0.02)


def pictures(pipe: Any, count: int = 2, **options: Any) -> Tensor:
    return pipeline_images(pipe, n=count, **({"prompt": PROMPTS[:count]} | options))


def twice(picture: Tensor) -> Tensor:
    """One for each image: of a lone picture diffusers draws one sample, from the first image's
    generator.
    """
    return picture.expand(2, -1, -1, -1)


def hole() -> Tensor:
    """A mask of whole latent cells."""
    mask = torch.zeros(1, 1, SIZE["height"], SIZE["width"])
    mask[:, :, 8:24, 16:40] = 1
    return mask


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json without the names of versions.

    A T5TokenizerFast is transformers' T5Tokenizer.
    """
    text = (folder / "model_index.json").read_text().replace("T5TokenizerFast", "T5Tokenizer")
    return {
        k: v for k, v in json.loads(text).items() if k not in ("_sfumato", "_diffusers_version")
    }


@pytest.mark.parametrize("kind", list(NAMES))
def test_convert_keeps_the_pipeline(
    kind: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of diffusers becomes a file and a folder again: the same pipeline and run.

    So does a folder that sfumato saved.
    """
    expected = load(folders[kind])
    expected.save(tmp_path / "saved.safetensors")
    expected.save(tmp_path / "saved")
    index = read_index(folders[kind])
    for k, source in enumerate((folders[kind], tmp_path / "saved.safetensors", tmp_path / "saved")):
        file, folder = tmp_path / f"{k}.safetensors", tmp_path / str(k)
        assert (
            main(["convert", str(source), str(file)]) == 0
            and main(["convert", str(file), str(folder)]) == 0
        ), capsys.readouterr().err
        for model in (load(file), load(folder)):
            assert (model.hash, model.defaults) == (expected.hash, expected.defaults), (
                kind,
                source,
            )
        assert (
            read_index(folder) == index and type(open_pipeline(folder)).__name__ == NAMES[kind][0]
        )


# ---- text to image -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "steps"), [("dev", 28), ("schnell", 4), ("fill", 50), ("control", 28), ("kontext", 28)]
)
def test_defaults(kind: str, steps: int, folders: dict[str, Path], tmp_path: Path) -> None:
    """As the pipelines are called without a word; the shift by the picture's size is dev's, schnell
    has none.
    """
    model = load(folders[kind])
    defaults = model.defaults
    assert model.sample_size == diffusers_pipeline(kind, tmp_path).default_sample_size * 8 == 1024
    assert (defaults.steps, defaults.sampler, defaults.guidance) == (steps, "euler", 1.0)
    assert defaults.spacing == ("trailing" if kind == "schnell" else "dynamic")
    assert defaults.max_reference_images == (1 if kind == "kontext" else 0)
    assert defaults.distilled_guidance == (30.0 if kind == "fill" else 3.5)


@pytest.mark.parametrize("kind", ["dev", "schnell"])
@pytest.mark.parametrize("size", [(32, 48), (64, 32)])
def test_text_to_image(kind: str, size: tuple[int, int], folders: dict[str, Path]) -> None:
    pipe, model = open_pipeline(folders[kind]), load(folders[kind])
    options: dict[str, Any] = {"height": size[0], "width": size[1]}
    arguments = options | (FEW if kind == "schnell" else {})
    compare(
        model.generate(PROMPTS, steps=3, output="tensor", **options),
        pictures(pipe, num_inference_steps=3, **arguments),
    )
    compare(
        model.generate("a cat", steps=2, output="tensor", **options),
        pictures(pipe, 1, prompt="a cat", num_inference_steps=2, **arguments),
    )


def test_learned_guidance_and_a_second_pass(folders: dict[str, Path]) -> None:
    """A single `guidance` is the network's input.

    Beside `distilled_guidance` it is the scale of two passes (diffusers' true_cfg_scale).
    """
    pipe, model = open_pipeline(folders["dev"]), load(folders["dev"])
    plain = pictures(pipe, num_inference_steps=3, guidance_scale=7.0, **SIZE)
    compare(model.generate(PROMPTS, steps=3, guidance=7.0, output="tensor", **SIZE), plain)
    compare(
        model.generate(PROMPTS, steps=3, distilled_guidance=7.0, output="tensor", **SIZE), plain
    )
    words: dict[str, Any] = {"negative_prompt": ["a dog"] * 2}
    twice = pictures(
        pipe, num_inference_steps=3, guidance_scale=2.5, true_cfg_scale=2.0, **words, **SIZE
    )
    result = model.generate(
        PROMPTS,
        steps=3,
        guidance=2.0,
        distilled_guidance=2.5,
        negative_prompt="a dog",
        output="tensor",
        **SIZE,
    )
    compare(result, twice)
    assert (plain - twice).abs().max() > 0.01


def test_guidance_of_0(folders: dict[str, Path]) -> None:
    """Off for schnell, whose card says guidance_scale=0; an input of dev's network like any other.

    A true_cfg_scale up to 1 is off, whatever the negative prompt.
    """
    pipe, model = open_pipeline(folders["schnell"]), load(folders["schnell"])
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 0.0, **SIZE}
    words: dict[str, Any] = {"negative_prompt": ["a dog"] * 2, "true_cfg_scale": 0.5}
    expected = pictures(pipe, **options, **words, **FEW)
    for scale in (0, 0.5):
        compare(model.generate(PROMPTS, steps=2, guidance=scale, output="tensor", **SIZE), expected)
    pipe, model = open_pipeline(folders["dev"]), load(folders["dev"])
    compare(
        model.generate(PROMPTS, steps=2, guidance=0, output="tensor", **SIZE),
        pictures(pipe, **options),
    )
    with pytest.raises(UserError, match="negative prompt 'a dog' with distilled guidance 0 alone"):
        model.generate(PROMPTS, guidance=0, negative_prompt="a dog", **SIZE)


def test_brackets_are_text_which_is_logged(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """T5 has no weights: a prompt of another program draws its brackets."""
    model = load(folders["schnell"])
    for prompt, text in (
        ("a (red:1.3) cat", "'red'"),
        ("a [red] cat", "'red'"),
        ("a BREAK cat", "'BREAK'"),
        ("at (12:30)", "'at (12:30)'"),
    ):
        caplog.clear()
        plan = model.plan(Request(prompt))
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert f"which reads them as text ({text}): leave them out" in caplog.text
        caplog.clear()
        assert model.plan(Request(prompt, prompt_weights="none")).prompts == plan.prompts
        model.plan(Request("a cat: red, 3 o'clock"))
        assert not caplog.records
    model.plan(Request("a cat AND a dog", prompt_weights="none"))
    assert not caplog.records
    model.plan(Request("a cat AND a dog"))
    assert "'AND' is a notation of other programs, and text here: leave it out" in caplog.text
    words = {"negative_prompt": "(ugly)", "guidance": 2}
    model.plan(Request("a cat", **words))
    assert "(ugly)" not in caplog.text and "'ugly'" in caplog.text
    assert "prompt_weights" not in model.plan(Request("a cat")).to_json()
    with pytest.raises(UserError, match="prompt_weights='a1111': this model cannot weigh"):
        model.plan(Request("a cat", prompt_weights="a1111"))
    with pytest.raises(UserError, match="unknown rule of prompt weights 'a1112'"):
        model.plan(Request("a cat", prompt_weights="a1112"))


def test_schnell_by_two_passes(folders: dict[str, Path]) -> None:
    pipe, model = open_pipeline(folders["schnell"]), load(folders["schnell"])
    words: dict[str, Any] = {"negative_prompt": ["ugly", "a dog"]}
    twice = pictures(pipe, num_inference_steps=2, true_cfg_scale=3.0, **words, **FEW, **SIZE)
    compare(model.generate(PROMPTS, steps=2, guidance=3.0, output="tensor", **words, **SIZE), twice)
    with pytest.raises(UserError, match="is not guidance-distilled"):
        model.generate(PROMPTS, steps=2, distilled_guidance=3.0, **SIZE)


def test_a_second_prompt(folders: dict[str, Path]) -> None:
    """T5 reads the second, CLIP the first."""
    pipe, model = open_pipeline(folders["dev"]), load(folders["dev"])
    expected = pictures(pipe, num_inference_steps=2, prompt_2=["the mat"] * 2, **SIZE)
    compare(
        model.run(Request(PROMPTS, steps=2, prompt_2="the mat", **SIZE), output="tensor"), expected
    )
    assert (expected - pictures(pipe, num_inference_steps=2, **SIZE)).abs().max() > 1e-3


def test_streamed(folders: dict[str, Path]) -> None:
    """The networks' weights are read from the files when they are needed.

    The images are the same, bit for bit.
    """
    options: dict[str, Any] = {
        "steps": 2,
        "guidance": 2.0,
        "distilled_guidance": 3.0,
        "negative_prompt": "a dog",
        "output": "tensor",
        **SIZE,
    }
    whole, streamed = load(folders["dev"]), load(folders["dev"], memory="64GB")
    assert torch.equal(streamed.generate(PROMPTS, **options), whole.generate(PROMPTS, **options))


# ---- with pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "strength", "sfumato_strength"),
    [("dev", 0.5, 0.5), ("dev", 1.0, 1.0), ("dev", 0.6, 0.75), ("schnell", 0.75, 0.75)],
)
def test_image_to_image(
    kind: str, strength: float, sfumato_strength: float, folders: dict[str, Path]
) -> None:
    """A strength of no whole number of steps is rounded down by sfumato, up by diffusers.

    0.6 of four steps are three in diffusers.
    """
    pipe, model = open_pipeline(folders[kind], "FluxImg2ImgPipeline"), load(folders[kind])
    options = SIZE | (FEW if kind == "schnell" else {})
    expected = pictures(
        pipe,
        image=twice(photo()),
        strength=strength,
        num_inference_steps=4,
        guidance_scale=3.5,
        **options,
    )
    request = Request(PROMPTS, steps=4)
    compare(
        model.run(
            image_to_image(
                model, photo() * 2 - 1, request, strength=sfumato_strength, posterior="sample"
            ),
            output="tensor",
        ),
        expected,
    )


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_with_an_ordinary_model(strength: float, folders: dict[str, Path]) -> None:
    pipe, model = open_pipeline(folders["dev"], "FluxInpaintPipeline"), load(folders["dev"])
    options: dict[str, Any] = {
        "image": twice(photo()),
        "mask_image": twice(hole()),
        "strength": strength,
        "guidance_scale": 3.5,
    }
    expected = pictures(pipe, num_inference_steps=4, **options, **SIZE)
    task = {
        "strength": strength,
        "posterior": "sample",
        "paste": False,
        "noise_only_start": strength == 1,
    }
    compare(
        model.run(
            inpaint(model, photo() * 2 - 1, hole(), Request(PROMPTS, steps=4), **task),
            output="tensor",
        ),
        expected,
    )


def fill(model: LatentDiffusion, request: Request, **options: Any) -> Tensor:
    return model.run(
        inpaint(
            model, photo() * 2 - 1, options.pop("mask", hole()), request, paste=False, **options
        ),
        output="tensor",
    )


def test_fill(folders: dict[str, Path]) -> None:
    """The mask by pixels: one that is not of whole cells."""
    pipe, model = open_pipeline(folders["fill"]), load(folders["fill"])
    mask = hole()
    mask[:, :, 3:9, 5:11] = 1
    options: dict[str, Any] = {"image": twice(photo()), "mask_image": twice(mask)}
    expected = pictures(
        pipe, num_inference_steps=4, guidance_scale=10.0, strength=0.5, **options, **SIZE
    )
    compare(
        fill(
            model,
            Request(PROMPTS, steps=4, guidance=10.0),
            mask=mask,
            strength=0.5,
            posterior="sample",
        ),
        expected,
    )
    expected = pictures(settled(pipe), num_inference_steps=3, **options, **SIZE)
    compare(fill(model, Request(PROMPTS, steps=3), mask=mask), expected)


def settled(pipe: Any) -> Any:
    """The pipeline with an autoencoder whose samples are its means.

    It draws no noise for them.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    made = pipe.vae.encode

    class Certain(DiagonalGaussianDistribution):
        def sample(self, generator: Any = None) -> Tensor:
            return self.mode()

    def encode(x: Tensor) -> Any:
        return SimpleNamespace(latent_dist=Certain(made(x).latent_dist.parameters))

    pipe.vae.encode = encode
    return pipe


def test_control(folders: dict[str, Path]) -> None:
    pipe, model = open_pipeline(folders["control"]), load(folders["control"])
    expected = pictures(
        pipe, control_image=photo() * 2 - 1, guidance_scale=10.0, num_inference_steps=3, **SIZE
    )
    sampled = control(
        model, photo() * 2 - 1, Request(PROMPTS, steps=3, guidance=10.0), posterior="sample"
    )
    compare(model.run(sampled, output="tensor"), expected)
    expected = pictures(
        settled(pipe), control_image=photo(6) * 2 - 1, num_inference_steps=3, **SIZE
    )
    compare(
        model.run(control(model, photo(6) * 2 - 1, Request(PROMPTS, steps=3)), output="tensor"),
        expected,
    )


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_kontext(size: tuple[int, int], folders: dict[str, Path]) -> None:
    """A reference image for both images, one for each, two passes, and none.

    The first has another size than the generated images.
    """
    pipe, model = open_pipeline(folders["kontext"]), load(folders["kontext"])
    options: dict[str, Any] = {"height": size[0], "width": size[1]}
    arguments: dict[str, Any] = {
        "image": photo(),
        "_auto_resize": False,
        "max_area": size[0] * size[1],
        "num_inference_steps": 3,
    } | options
    request = Request(PROMPTS, steps=3, **options)
    compare(
        model.run(edit(model, photo() * 2 - 1, request), output="tensor"),
        pictures(pipe, **arguments),
    )
    other = torch.cat([photo(), photo(6)])
    compare(
        model.run(edit(model, other * 2 - 1, request), output="tensor"),
        pictures(pipe, **{**arguments, "image": other}),
    )
    expected = pictures(
        pipe, negative_prompt=["ugly"] * 2, true_cfg_scale=2.0, guidance_scale=4.0, **arguments
    )
    request = Request(
        PROMPTS, steps=3, guidance=2.0, distilled_guidance=4.0, negative_prompt="ugly", **options
    )
    compare(model.run(edit(model, photo() * 2 - 1, request), output="tensor"), expected)
    del arguments["image"]
    compare(
        model.generate(PROMPTS, steps=3, output="tensor", **options), pictures(pipe, **arguments)
    )


def test_inversion_takes_the_distilled_guidance(folders: dict[str, Path]) -> None:
    """The noise of an image gives the image back, with the same distilled guidance.

    Two passes are off unless the caller sets them.
    """
    model = load(folders["dev"])
    z = model.encode(photo() * 2 - 1)
    plan = variations(
        model,
        photo() * 2 - 1,
        Request("a cat", steps=12, guidance=6.0),
        strength=0.0,
        way="inversion",
    )
    assert (plan.guidance.to_json(), plan.distilled_guidance) == (1.0, 6.0)
    errors = [
        (model.run(r, output="latent") - z).norm() / z.norm()
        for r in (plan, replace(plan, distilled_guidance=1.0))
    ]
    assert errors[0] < 0.02 < errors[1], errors
    assert (
        variations(
            model, photo() * 2 - 1, Request("a cat", steps=2), way="inversion"
        ).distilled_guidance
        == 3.5
    )


def test_tasks_on_the_command_line(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both guidances, and weights from the files: the same picture."""
    picture, paths = tmp_path / "photo.png", [tmp_path / "whole.png", tmp_path / "streamed.png"]
    to_pil(photo() * 2 - 1)[0].save(picture)
    words = [
        "control",
        str(picture),
        "a cat",
        "--model",
        str(folders["control"]),
        "--steps",
        "2",
        "--negative-prompt",
        "a dog",
    ]
    for path, more in zip(paths, ([], ["--memory", "64GB"]), strict=True):
        assert (
            main(
                [*words, "--guidance", "2", "--distilled-guidance", "3", "--out", str(path), *more]
            )
            == 0
        ), capsys.readouterr().err
    whole, streamed = (Image.open(path) for path in paths)
    assert whole.tobytes() == streamed.tobytes()
    assert json.loads(whole.info["sfumato"])["distilled_guidance"] == 3.0
    assert main([*words, "--guidance", "2", "--out", str(tmp_path / "third.png")]) == 2
    assert "with distilled guidance 2 alone" in capsys.readouterr().err


# ---- saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMES)
def test_saved_folders_open_in_diffusers(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The same class, the same tensors under the same names, the same configs of networks, and the
    same pictures.
    """
    model = load(folders[kind])
    model.save(tmp_path / "sfumato")
    again, pipe, before = (
        load(tmp_path / "sfumato"),
        open_pipeline(tmp_path / "sfumato"),
        open_pipeline(folders[kind]),
    )
    assert (
        type(pipe).__name__ == NAMES[kind][0]
        and again.hash == model.hash
        and again.defaults == model.defaults
    )
    for name in PARTS:
        written, published = (getattr(which, name).state_dict() for which in (pipe, before))
        assert written.keys() == published.keys() and all(
            torch.equal(written[key], published[key]) for key in written
        ), name
    for name in (
        "use_dynamic_shifting",
        "base_shift",
        "max_shift",
        "base_image_seq_len",
        "max_image_seq_len",
    ):
        assert pipe.scheduler.config[name] == before.scheduler.config[name]
    index = json.loads((tmp_path / "sfumato" / "model_index.json").read_text())
    assert {key for key in index if not key.startswith("_")} == {
        key for key in pipe.config if not key.startswith("_")
    }
    options: dict[str, Any] = {"num_inference_steps": 2, "max_sequence_length": 64, **SIZE}
    options |= {
        "fill": {"image": photo(), "mask_image": hole()},
        "control": {"control_image": photo() * 2 - 1},
    }.get(kind, {})
    assert torch.equal(pictures(pipe, **options), pictures(before, **options))
