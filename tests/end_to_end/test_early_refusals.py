"""Refusals in time: names before torch is imported, all settings before a weight is read.

Flags for the way in which a model's files are read, which messages name as remedies.
"""

import json
import logging
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sfumato
from helpers import family_models, single_files
from helpers.errors import assert_one_sentence
from helpers.models import tiny_model
from helpers.pipelines import tiny_pipeline
from helpers.processes import run_python
from sfumato.checkpoints import families
from sfumato.checkpoints.checkpoint import LoadOptions
from sfumato.checkpoints.families.taesd import save_taesd
from sfumato.checkpoints.formats.folder import save_part
from sfumato.checkpoints.formats.lone_vae import read_autoencoder
from sfumato.cli import main
from sfumato.cli._names import SPACINGS, check_names, guidance_names
from sfumato.cli._options import parse
from sfumato.cli._run import check_prompts
from sfumato.cli.generate import Generate
from sfumato.cli.train import train as main_train
from sfumato.compress.tiny import AutoencoderTiny, TinyConfig
from sfumato.diffuse import timesteps
from sfumato.errors import UserError, unknown
from sfumato.io import safetensors
from sfumato.loading import outline
from sfumato.predict.conditioners.clip_text import ClipText
from sfumato.predict.conditioners.unconditional import Unconditional
from sfumato.sampling import Request
from sfumato.tasks.refine import handover

FREE = [
    ("generate", "--sampler", "bogus"),
    ("generate", "a", "red", "boot"),
    ("generate", "bag", "--cfg", "3"),
    ("generate", "--sampler", "ddim:eta"),
    ("generate", "--spacing", "karas"),
    ("generate", "--guidance", "3 intervall"),
    ("generate", "--height", "0"),
    ("generate", "--steps", "-1"),
    ("generate", "--memory", "10"),
    ("generate", "--memory", "much"),
    ("generate", "--clip-skip", "-1"),
    ("generate", "--out", "/dev/null/x.png"),
    ("edit", "missing.png", "winter"),
    ("vary", "here.png", "--way", "sideways"),
    ("vary", "here.png", "--strength", "2"),
    ("inpaint", "here.png", "--mask", "missing.png"),
    ("upscale", "here.png", "--sampler", "bogus"),
    ("interpolate", "--images", "here.png", "missing.png"),
    ("evaluate", "fashion", "--data", "x", "--spacing", "bogus"),
    ("tune-timesteps", "fashion", "--out", "new", "--guidance", "x"),
    ("info", "fashion", "--sampler", "bogus"),
]
"""Command lines that are refused without a model."""


def test_faults_of_the_command_line_alone_are_refused_before_torch(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "here.png")
    program = """
import json, sys
from sfumato.cli import main
for words in json.loads(sys.argv[1]):
    print(main(words), "torch" not in sys.modules, words)
"""
    done = run_python("-c", program, json.dumps(FREE), cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == len(FREE)
    assert all(line.startswith("2 True") for line in lines), done.stdout
    assert "unforeseen" not in done.stderr and len(done.stderr.splitlines()) == len(lines)
    assert [path.name for path in tmp_path.iterdir()] == ["here.png"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a red boot", "unexpected 'red', 'boot': a prompt of several words stands in quotes"),
        ("bag --cfg 3", "unknown flag '--cfg' of sfumato generate: did you mean --guidance?"),
        ("bag --num_inference_steps=3", "did you mean --steps?"),
        ("bag --size 32", "did you mean --height or --width?"),
        ("bag --overwrit", "did you mean --overwrite?"),
        ("bag --bogus", "'--bogus' of sfumato generate: `sfumato generate --help` lists"),
        ("--prompt bag", "'--prompt' is no flag of sfumato generate: give its value alone"),
    ],
)
def test_words_that_no_flag_takes(line: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(Generate, line.split(), "generate")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--lr", "did you mean --loop.lr?"),
        ("--data.sourc", "did you mean --data.source or"),
        ("--settings.data.source", "did you mean --data.source?"),
    ],
)
def test_unknown_settings_of_a_recipe(flag: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        main_train(["denoiser", "fashion_mnist", flag, "3"])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Euler a", "euler_ancestral here"),
        ("DPM++ 2M Karras", "dpmpp_2m with --spacing karras here"),
        ("DPM++ 2M SGM Uniform", "dpmpp_2m with --spacing trailing here"),
        ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde here"),
        ("DPM++ 3M SDE Exponential", "dpmpp_3m_sde with --spacing exponential here"),
        ("uni_pc", "unipc here"),
        ("DPM2 a", "dpm_solver_2_ancestral here"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m here"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral here"),
        ("FlowMatchEulerDiscreteScheduler", "euler here"),
        ("KDPM2DiscreteScheduler", "dpm_solver_2 here"),
    ],
)
def test_samplers_by_names_of_other_programs(name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_names(name, None, None)
    assert str(caught.value) == f"unknown sampler {name!r}: write {words}"


def test_names_that_no_sampler_has() -> None:
    for name in ("DPM adaptive", "DPM++ 2S a", "karras", ""):
        with pytest.raises(UserError, match="expected one of consistency, ddim"):
            check_names(name, None, None)
    with pytest.raises(UserError, match=r"spacing 'sgm_uniform': write trailing here$"):
        check_names(None, "sgm_uniform", None)
    with pytest.raises(UserError, match="expected one of align_your_steps"):
        check_names(None, "simple", None)


def test_near_words_of_long_names() -> None:
    assert "did you mean 'ankle boot'?" in str(unknown("class", "boots", ["ankle boot", "bag"]))
    assert "did you mean" not in str(unknown("class", "quux", ["ankle boot", "bag"]))


def test_names_are_those_of_the_library() -> None:
    from sfumato.predict.guidance.settings import FOLDERS, Guidance

    assert set(SPACINGS) == {*timesteps.SPACINGS, "tuned"} and len(FOLDERS) == 3
    with pytest.raises(UserError) as caught:
        Guidance.parse("2 bogus")
    assert all(name in str(caught.value) for name in guidance_names())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("early")
    tiny_model().save(place / "own")
    tiny_model().save(place / "own.safetensors")
    for kind in ("SD 1", "SDXL"):
        tiny_pipeline(kind).save_pretrained(place / kind)
    return {path.name: path for path in place.iterdir()}


SETTINGS = [
    ("own", "generate bag --sampler ddim:eta=x"),
    ("own", "generate bag --sampler ddim:strength=1"),
    ("own", "generate bag --spacing karras:rho=x"),
    ("own", "generate bag --spacing tuned"),
    ("own", "generate bag --guidance '3 interval:low=x'"),
    ("own", "generate bag --guidance -1"),
    ("own", "generate bag --distilled-guidance 3"),
    ("own", "generate bag --timesteps 1 1 0"),
    ("own", "generate bag --steps 3 --sampler ddim_inversion"),
    ("own", "generate bagg"),
    ("own", "generate bag --negative-prompt bagg"),
    ("own", "generate bag --prompt-2 bag"),
    ("own", "generate bag --refiner ./missing"),
    ("own", "generate bag --refiner {sd1}"),
    ("own", "generate bag --guidance '2 model:path=./missing'"),
    ("own", "vary here.png bagg"),
    ("own", "edit here.png bag --sampler ddim:eta=x"),
    ("own", "interpolate bag bag --to-seed 3 --distilled-guidance 2"),
    ("SD 1", "generate cat --height 9 --width 9 --spacing beta:alpha=x"),
    ("SD 1", "generate cat --prompt-2 dog"),
    ("SD 1", "generate cat --clip-skip 50"),
    ("SDXL", "generate cat --truncation cut"),
    ("SDXL", "generate cat --sampler lms:order=99"),
    ("own", "evaluate {own} --data x --sampler ddim:eta=x"),
    ("own", "tune-timesteps {own} --guidance '2 interval:low=x'"),
]


@pytest.mark.parametrize(("kind", "line"), SETTINGS)
def test_settings_are_refused_before_a_weight_is_read(
    kind: str,
    line: str,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (16, 16)).save("here.png")
    read: list[object] = []
    monkeypatch.setattr(safetensors, "_finite", lambda numbers: read.append(numbers) or True)
    monkeypatch.setattr("sfumato.loading.load", lambda *a, **k: read.append(a))
    words = shlex.split(line.format(own=models["own"], sd1=shlex.quote(str(models["SD 1"]))))
    own = [] if words[0] in ("evaluate", "tune-timesteps") else ["--model", str(models[kind])]
    assert main([*words, *own]) == 2
    err = capsys.readouterr().err
    assert not read, f"weights were read before: {err}"
    assert_one_sentence(UserError(err.strip()), "sfumato: ")
    assert [p.name for p in tmp_path.iterdir()] == ["here.png"]


@pytest.mark.parametrize("kind", ["own", "SD 1", "SDXL"])
def test_an_outline_reads_no_weight(
    kind: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plan is the model's own."""
    request = {"prompt": "bag" if kind == "own" else "a cat", "steps": 3, "n": 2}
    expected = sfumato.load(models[kind]).plan(request)
    monkeypatch.setattr(safetensors, "_finite", lambda numbers: pytest.fail("a weight was read"))
    model = outline(models[kind])
    assert model is not None
    plan = model.plan(request)
    assert (plan.to_json(), plan.timesteps) == (expected.to_json(), expected.timesteps)
    with pytest.raises(pytest.fail.Exception):
        sfumato.load(models[kind])


def test_prompts_are_checked_by_the_rule_of_the_request(models: dict[str, Path]) -> None:
    model = outline(models["SD 1"])
    assert model is not None
    with pytest.raises(UserError, match="from:to:when"):
        check_prompts(model, Request("[cat:dog:0.5]"))
    check_prompts(model, Request("[cat:dog:0.5]", prompt_weights="none"))


def test_a_refiner_gets_the_rule_of_brackets_that_it_can_read(models: dict[str, Path]) -> None:
    model = outline(models["SD 1"])
    assert model is not None
    plan = model.plan(Request(steps=4, guidance=1))
    request = plan.explicit_request()
    assert request.prompt_weights == plan.prompt_weights == "lerp"
    assert handover(model, model, request, at=0.5).last.prompt_weights == "lerp"
    unconditional = replace(model, conditioner=Unconditional())
    assert handover(model, unconditional, request, at=0.5).last.prompt_weights is None


def test_the_early_check_logs_nothing(
    models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The run opens the model and checks the request again, and logs then."""
    logger = logging.getLogger("sfumato.sampling.plan")
    Generate(model=str(models["own"])).check_early(lambda model: logger.warning("twice"))
    assert not caplog.records
    logger.warning("once")
    assert [record.message for record in caplog.records] == ["once"]


def test_names_of_the_models_own_number_of_images_are_checked_early(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("boots-1.png").write_bytes(b"older")
    monkeypatch.setattr("sfumato.loading.load", lambda *a, **k: pytest.fail("the model is opened"))
    words = ["generate", "bag", "--no-grid", "--out", "boots", "--model", str(models["own"])]
    assert main(words) == 2
    assert "boots-1.png exists and is left as it is" in capsys.readouterr().err


def test_models_whose_weights_are_computed_have_no_outline(models: dict[str, Path]) -> None:
    assert outline(models["own.safetensors"]) is None
    assert main(["generate", "bagg", "--model", str(models["own.safetensors"])]) == 2


# ---- flags for the way in which files are read ---------------------------------------------------


def draw(*flags: str | Path, model: Path, out: Path) -> dict[str, Any]:
    """The parameters of a PNG that the command line draws with these flags."""
    from sfumato.images import read_parameters

    words = ["generate", "cat", "--n", "1", "--steps", "1", "--no-grid", "--overwrite"]
    assert main([*words, "--model", str(model), "--out", str(out), *map(str, flags)]) == 0
    return read_parameters(next(out.glob("*.png")))


@pytest.fixture
def sd1(models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models["SD 1"], tmp_path / "model"))


def test_clip_skip_is_that_of_the_library(sd1: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    out.mkdir()
    plain, skipped = (draw(*f, model=sd1, out=out) for f in ((), ("--clip-skip", "1")))
    assert plain["model_hash"] != skipped["model_hash"]
    assert "clip_skip" not in plain and skipped["clip_skip"] == 1
    model = sfumato.load(sd1, clip_skip=1)
    assert isinstance(model.conditioner, ClipText) and model.conditioner.config.clip_skip == 1
    assert model.hash == skipped["model_hash"]
    with pytest.raises(UserError, match="clip_skip 1: the prompts of this model"):
        tiny_model().save(tmp_path / "own")
        sfumato.load(tmp_path / "own", clip_skip=1)


def test_another_vae(sd1: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """A folder, a model's folder, a file of diffusers' names: each the other model's own."""
    other = Path(shutil.copytree(sd1 / "vae", tmp_path / "other"))
    file = next(other.glob("*.safetensors"))
    tensors = {k: v * 1.01 for k, v in safetensors.read_tensors(file).items()}
    save_file(tensors, file, {"format": "pt"})
    loose = Path(shutil.copy(file, tmp_path / "loose.safetensors"))
    whole = tmp_path / "whole"
    shutil.copytree(other, whole / "vae")
    for place in (other, loose, whole):
        model = sfumato.load(sd1, vae=place)
        state = model.autoencoder.state_dict()
        assert all(torch.equal(state[key], value) for key, value in tensors.items())
        assert model.autoencoder.space == sfumato.load(sd1).autoencoder.space
    original = tmp_path / "original.safetensors"  # in the layout of Stable Diffusion's authors
    vae = family_models.component(family_models.vae())
    single_files.save(original, single_files.gather({"vae": vae}, {}))
    state = sfumato.load(sd1, vae=original).autoencoder.state_dict()
    assert all(torch.equal(state[key], lazy.load()) for key, lazy in vae.tensors.items())
    tiny = AutoencoderTiny(TinyConfig(latent_channels=4))  # its scale of latents is 1
    small = Path(shutil.copytree(sd1, tmp_path / "small"))
    shutil.rmtree(small / "vae")
    save_part(small / "vae", tiny)
    index = json.loads((small / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderTiny"]
    (small / "model_index.json").write_text(json.dumps(index))
    assert sfumato.load(small).autoencoder.space.std == (1.0,) * 4
    space = sfumato.load(sd1, vae=original).autoencoder.space
    assert sfumato.load(small, vae=original).autoencoder.space == space
    published = families.by_name("sdxl").latent_scales
    result = read_autoencoder(original, tiny.to_config(), LoadOptions(), published)
    assert result.config["scaling_factor"] == 0.13025
    (sd1 / "vae" / file.name).unlink()  # the own one may be missing
    out = tmp_path / "images"
    out.mkdir()
    assert draw("--vae", loose, model=sd1, out=out)["vae"] == str(loose)
    for place, words in (
        (tmp_path / "gone", r"the autoencoder .* was not found"),
        (sd1 / "unet" / file.name, "is a U-Net under diffusers' names"),
    ):
        with pytest.raises(UserError, match=words):
            sfumato.load(sd1, vae=place)


def test_another_network(sd1: Path, tmp_path: Path) -> None:
    """Its folder, a model's folder, and the file in it."""
    whole = Path(shutil.copytree(sd1, tmp_path / "whole"))
    file = next((whole / "unet").glob("*.safetensors"))
    tensors = {k: v * 1.01 for k, v in safetensors.read_tensors(file).items()}
    save_file(tensors, file, {"format": "pt"})
    for place in (whole, whole / "unet", file):
        state = sfumato.load(sd1, transformer=place).denoiser.network.state_dict()
        assert all(torch.equal(state[key], value) for key, value in tensors.items())
    for place, words in (
        (tmp_path, "is a folder without config.json"),
        (sd1 / "vae", "holds a AutoencoderKL: expected a UNet2DConditionModel"),
        (next((sd1 / "vae").glob("*.safetensors")), "no U-Net: it is an autoencoder under"),
        (tmp_path / "gone", "was not found"),
    ):
        with pytest.raises(UserError, match=words):
            sfumato.load(sd1, transformer=place)


def test_half_of_a_tiny_autoencoder_finds_the_other(sd1: Path, tmp_path: Path) -> None:
    tiny = AutoencoderTiny(TinyConfig(latent_channels=4))
    encoder, decoder = save_taesd(tmp_path / "tiny", tiny, torch.float32)
    for place in (encoder, decoder):
        state = sfumato.load(sd1, vae=place).autoencoder.state_dict()
        assert all(torch.equal(state[key], value) for key, value in tiny.state_dict().items())
    encoder.unlink()
    with pytest.raises(UserError, match=r"tiny_encoder\.safetensors was not found"):
        sfumato.load(sd1, vae=decoder)
    odd = decoder.rename(tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="expected a name that ends in encoder or decoder"):
        sfumato.load(sd1, vae=odd)


def test_parts_of_a_model_name_the_model(sd1: Path) -> None:
    unet = next((sd1 / "unet").glob("*.safetensors"))
    for place, words in (
        (sd1 / "unet", f"it is a part of the model {sd1}: give that folder"),
        (sd1 / "model_index.json", f"describes the model {sd1}: give that folder"),
        (unet, "is a U-Net under diffusers' names, a part of a model: give the folder"),
    ):
        with pytest.raises(UserError) as caught:
            sfumato.load(place)
        assert words in str(caught.value)


def test_variants_have_a_flag(sd1: Path, tmp_path: Path) -> None:
    for file in sd1.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    with pytest.raises(UserError, match=r"ask for variant 'fp16' \(--variant fp16\)"):
        sfumato.load(sd1)
    out = tmp_path / "images"
    out.mkdir()
    assert draw("--variant", "fp16", model=sd1, out=out)["variant"] == "fp16"
    assert main(["info", str(sd1), "--variant", "fp16"]) == 0
    assert main(["info", str(sd1)]) == 2


def test_an_unknown_scheduler_opens_with_a_sampler(sd1: Path, tmp_path: Path) -> None:
    """Its process is that of the fields that schedulers share."""
    expected = sfumato.load(sd1)
    config = sd1 / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "_class_name": "MyScheduler", "my_field": 3}))
    index = json.loads((sd1 / "model_index.json").read_text())
    index["scheduler"] = ["my_scheduler", "MyScheduler"]
    (sd1 / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"'MyScheduler' is not known: .*; with --sampler NAME"):
        sfumato.load(sd1)
    model = sfumato.load(sd1, sampler="euler")
    assert model.denoiser.process == expected.denoiser.process
    assert model.defaults.sampler == "euler"
    out = tmp_path / "images"
    out.mkdir()
    assert draw("--sampler", "heun", model=sd1, out=out)["sampler"] == "heun"
    assert main(["info", str(sd1), "--sampler", "euler"]) == 0
