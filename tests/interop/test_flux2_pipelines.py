"""Parity with diffusers' pipelines of FLUX.2, with small random networks.

The same folder, prompts, images and noise give the same images: Flux2Pipeline (Mistral, learned
guidance) and Flux2KleinPipeline (Qwen; with guidance by two passes, or distilled), from prompts
alone and with reference images. All is float32; images are compared in [0, 1]. Saved models open in
diffusers with the same tensors under the same names.
"""

import json
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
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
from sfumato.diffuse.schedule_transforms import flux2_shift
from sfumato.errors import UserError
from sfumato.images import to_pil
from sfumato.loading import load
from sfumato.sampling import Request
from sfumato.tasks.edit import edit

KINDS = {"dev": "Flux2Pipeline", "klein": "Flux2KleinPipeline", "distilled": "Flux2KleinPipeline"}
PARTS = ("transformer", "vae", "text_encoder")
PROMPTS = ["a red cat", "two dogs, 3 cats"]
SIZES = [(32, 48), (64, 32)]


@cache
def autoencoder() -> Any:
    """Eight channels at an eighth of the sides, packed to 32 at a sixteenth; statistics that are
    not 0 and 1.
    """
    vae = random_network(
        lambda: diffusers.AutoencoderKLFlux2(
            block_out_channels=(4, 4, 8, 8),
            latent_channels=8,
            layers_per_block=1,
            sample_size=64,
            **vae_blocks(4),
        ),
        2,
    )
    generator = torch.Generator().manual_seed(3)
    vae.bn.running_mean.copy_(0.2 * torch.randn(32, generator=generator))
    vae.bn.running_var.copy_(0.5 + torch.rand(32, generator=generator))
    return vae


def diffusers_pipeline(kind: str, scratch: Path) -> Any:
    numbers = {
        "in_channels": 32,
        "num_layers": 1,
        "num_single_layers": 1,
        "axes_dims_rope": (4, 4, 4, 4),
        "timestep_guidance_channels": 32,
    }
    width = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 36}
    network = random_network(
        lambda: diffusers.Flux2Transformer2DModel(
            **numbers, **width, guidance_embeds=kind == "dev"
        ),
        1,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True
    )
    parts = text_encoders.parts("flux2_dev" if kind == "dev" else "flux2_klein", scratch)
    more = {"is_distilled": kind == "distilled"} if kind != "dev" else {}
    return quiet(
        getattr(diffusers, KINDS[kind])(
            **parts, vae=autoencoder(), transformer=network, scheduler=scheduler, **more
        )
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pipelines(
        lambda kind: diffusers_pipeline(kind, tmp_path_factory.mktemp("scratch")),
        KINDS,
        tmp_path_factory,
    )


compare = partial(assert_same_images, tolerance=1e-4, contrast=0.02)


def pictures(pipe: Any, count: int = 2, **options: Any) -> Tensor:
    return pipeline_images(pipe, n=count, **({"prompt": PROMPTS[:count]} | options))


def photo(seed: int = 5, height: int = 64, width: int = 96) -> Any:
    """A smooth PIL image; diffusers takes none below 64 pixels."""
    return to_pil(smooth_image(seed, height, width) * 2 - 1)[0]


# ---- times ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 6, 256, 4096, 4300, 4301, 16384])
@pytest.mark.parametrize("steps", [1, 4, 10, 50, 200, 500])
def test_the_shift_of_a_size_and_a_number_of_steps(tokens: int, steps: int) -> None:
    mu = compute_empirical_mu(tokens, steps)
    assert math.isclose(
        flux2_shift(tokens, steps, exponential=False), mu, rel_tol=1e-9, abs_tol=1e-9
    )
    assert math.isclose(flux2_shift(tokens, steps), math.exp(mu), rel_tol=1e-9)


def test_shifts_of_nothing() -> None:
    for tokens, steps in ((0, 4), (4, 0)):
        with pytest.raises(UserError, match="at least 1"):
            flux2_shift(tokens, steps)


@pytest.mark.parametrize(
    ("height", "width", "steps"),
    [(1024, 1024, 50), (1024, 1024, 4), (1536, 1024, 28), (2048, 1024, 20)],
)
def test_times_of_large_pictures(
    height: int, width: int, steps: int, folders: dict[str, Path]
) -> None:
    """The times alone, at sizes on which the network would take too long here."""
    model = load(folders["dev"])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        folders["dev"] / "scheduler"
    )
    even = torch.linspace(1, 1 / steps, steps).tolist()
    scheduler.set_timesteps(sigmas=even, mu=compute_empirical_mu(height * width // 256, steps))
    result = torch.tensor(model.plan(Request(steps=steps, height=height, width=width)).timesteps)
    assert (result - scheduler.sigmas).abs().max() < 1e-6


def test_another_rule_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="rule"):
        load(folders["dev"]).generate("a cat", spacing="dynamic:rule=flux3", height=32, width=32)


# ---- pictures ------------------------------------------------------------------------------------


def test_defaults(folders: dict[str, Path]) -> None:
    """Steps and guidance as the pipelines are called without a word; of a distilled model as its
    card calls it.
    """
    models = {kind: load(folder) for kind, folder in folders.items()}
    assert [model.sample_size for model in models.values()] == [1024] * 3
    result = {kind: model.defaults for kind, model in models.items()}
    assert [(d.steps, d.guidance, d.max_reference_images) for d in result.values()] == [
        (50, 1.0, 10),
        (50, 4.0, 4),
        (4, 1.0, 4),
    ]
    assert result["dev"].distilled_guidance == 4.0
    assert {(d.sampler, d.spacing) for d in result.values()} == {("euler", "dynamic:rule=flux2")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_text_to_image(kind: str, size: tuple[int, int], folders: dict[str, Path]) -> None:
    pipe, model = open_pipeline(folders[kind]), load(folders[kind])
    options: dict[str, Any] = {"height": size[0], "width": size[1]}
    compare(
        model.generate(PROMPTS, steps=3, output="tensor", **options),
        pictures(pipe, num_inference_steps=3, **options),
    )


def test_strengths_of_guidance(folders: dict[str, Path]) -> None:
    options: dict[str, Any] = {"height": 32, "width": 32}
    for kind, scale in (("dev", 1.5), ("klein", 2.0), ("klein", 1.0), ("klein", 0.0)):
        pipe, model = open_pipeline(folders[kind]), load(folders[kind])
        expected = pictures(pipe, num_inference_steps=2, guidance_scale=scale, **options)
        compare(
            model.generate(PROMPTS, steps=2, guidance=scale, output="tensor", **options), expected
        )
        assert (expected - pictures(pipe, num_inference_steps=2, **options)).abs().max() > 1e-3, (
            "guidance shows"
        )


def test_another_negative_prompt(folders: dict[str, Path]) -> None:
    pipe, model = open_pipeline(folders["klein"]), load(folders["klein"])
    options: dict[str, Any] = {"height": 32, "width": 32}
    tokens, _ = pipe.encode_prompt(["a dog"] * 2)
    expected = pictures(pipe, num_inference_steps=2, negative_prompt_embeds=tokens, **options)
    compare(
        model.generate(PROMPTS, steps=2, negative_prompt="a dog", output="tensor", **options),
        expected,
    )


@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_streamed(kind: str, folders: dict[str, Path]) -> None:
    """The networks' weights are read from the files when they are needed.

    The images are the same, bit for bit.
    """
    whole, streamed = load(folders[kind]), load(folders[kind], memory="64GB")
    request = edit(whole, photo(), Request(PROMPTS, steps=2, height=32, width=32))
    assert torch.equal(streamed.run(request, output="tensor"), whole.run(request, output="tensor"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2])
def test_pictures_that_are_read(kind: str, count: int, folders: dict[str, Path]) -> None:
    """One reference image and two, of another size than the generated image."""
    pipe, model = open_pipeline(folders[kind]), load(folders[kind])
    read = [photo(5), photo(6, 80, 64)][:count]
    options: dict[str, Any] = {"height": 48, "width": 32}
    expected = pictures(pipe, image=list(read), num_inference_steps=2, **options)
    result = model.run(
        edit(model, read[0], Request(PROMPTS, steps=2, **options), also=read[1:]), output="tensor"
    )
    compare(result, expected)
    assert (expected - pictures(pipe, num_inference_steps=2, **options)).abs().max() > 1e-3, (
        "the pictures show"
    )


def test_a_picture_that_is_not_of_whole_tokens(folders: dict[str, Path]) -> None:
    """The image is cut to whole tokens at its sides; the generated image has the same size."""
    pipe, model = open_pipeline(folders["distilled"]), load(folders["distilled"])
    read = photo(7, 75, 109)
    expected = pictures(pipe, image=read, num_inference_steps=2)
    assert expected.shape[2:] == (64, 96)
    compare(model.run(edit(model, read, Request(PROMPTS, steps=2)), output="tensor"), expected)


def test_pictures_that_are_too_large(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are reduced as by diffusers, then cut; a tiny one is enlarged to a token.

    The filter differs: Lanczos in diffusers, bicubic in sfumato.
    """
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    model, read, largest = load(folders["distilled"]), photo(7, 150, 230), 100 * 100
    seen, encode = [], model.encode
    monkeypatch.setattr(
        type(model), "encode", lambda self, pixels: seen.append(pixels) or encode(pixels)
    )
    made = edit(model, read, Request("a cat"), also=[photo(8, 5, 40)], largest=largest)
    small = Flux2ImageProcessor._resize_to_target_area(read, largest)
    height, width = small.height // 16 * 16, small.width // 16 * 16
    expected = Flux2ImageProcessor().preprocess(
        small, height=height, width=width, resize_mode="crop"
    )
    assert seen[0].shape == expected.shape and (seen[0] - expected).abs().max() < 0.1
    assert seen[1].shape[2:] == (16, 32) and (made.height, made.width) == (height, width)


# ---- saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folders_open_in_diffusers(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The same class, the same tensors under the same names, and the same pictures."""
    model = load(folders[kind])
    model.save(tmp_path / "sfumato")
    again, pipe, before = (
        load(tmp_path / "sfumato"),
        open_pipeline(tmp_path / "sfumato"),
        open_pipeline(folders[kind]),
    )
    assert (
        type(pipe).__name__ == KINDS[kind]
        and again.hash == model.hash
        and again.defaults == model.defaults
    )
    assert pipe.config.get("is_distilled") == before.config.get("is_distilled")
    for name in PARTS:
        written, published = (getattr(which, name).state_dict() for which in (pipe, before))
        assert written.keys() == published.keys() and all(
            torch.equal(written[key], published[key]) for key in written
        ), name
    assert pipe.scheduler.config["use_dynamic_shifting"]
    index = json.loads((tmp_path / "sfumato" / "model_index.json").read_text())
    assert {key for key in index if not key.startswith("_")} == {
        key for key in pipe.config if not key.startswith("_")
    }
    options: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32}
    assert torch.equal(pictures(pipe, **options), pictures(before, **options))
