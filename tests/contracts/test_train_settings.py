"""Settings of recipes: odd values, mistakes in the file, names and paths, notes."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.models import CONVOLUTIONAL_UNET, SMALL_BLOCKS
from sfumato.cli import main
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.errors import UserError
from sfumato.io import host_memory
from sfumato.predict import ModernDiTConfig
from sfumato.predict.networks.base import build
from sfumato.predict.networks.unet import UNetConfig
from sfumato.train import load_recipe
from sfumato.train.checks import built, check_memory
from sfumato.train.loop import LoopSettings
from sfumato.train.notes import autoencoder_notes, denoiser_notes, loop_notes, network_notes
from sfumato.train.objectives.autoencoder import AutoencoderLoss
from sfumato.train.objectives.denoiser import DenoiserLoss
from sfumato.train.recipe import AutoencoderRecipe, DataSettings, DenoiserRecipe
from sfumato.train.settings import check_counts, check_fields

ODD = (
    *(-1, 0, 10**30, 10**400, -(10**30), True, math.nan, math.inf, -math.inf, -0.5, 1e300, 1e-300),
    *("many", "", None, (), (1, "x"), (-1, 0), [math.nan], {"a": 1}, object, int, b"x"),
)
SETTINGS = (LoopSettings(), DataSettings(), AutoencoderLoss(), DenoiserLoss())
SETTINGS += (AutoencoderRecipe(), DenoiserRecipe())
NETWORKS = (
    KLConfig(latent_channels=2, **SMALL_BLOCKS),
    UNetConfig(**CONVOLUTIONAL_UNET),
    ModernDiTConfig(num_layers=1, num_attention_heads=1, attention_head_dim=8),
)


def with_value(settings: Any, name: str, value: Any) -> Any:
    """A copy with a value that the constructor's own types, checked in tests, would refuse."""
    copy = dataclasses.replace(settings)
    object.__setattr__(copy, name, value)
    return copy


def fields_of(*settings: Any) -> Iterator[Any]:
    for one in settings:
        for f in dataclasses.fields(one):
            yield pytest.param(one, f.name, id=f"{type(one).__name__}.{f.name}")


def refusal(work: Any) -> str:
    """The message of a `UserError`; empty where nothing is raised; any other error is a fault."""
    try:
        work()
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 700, message
        return message
    return ""


@pytest.mark.parametrize(("settings", "name"), fields_of(*SETTINGS))
def test_no_value_of_a_setting_is_unforeseen(settings: Any, name: str) -> None:
    """It is taken, or refused in one sentence with the setting's name or the value."""
    for value in ODD:
        wrong = with_value(settings, name, value)
        message = refusal(wrong.__post_init__)
        assert not message or name in message or repr(value) in message
    assert refusal(with_value(settings, name, object).__post_init__)  # no setting is a class


@pytest.mark.parametrize(("config", "name"), fields_of(*NETWORKS))
def test_no_number_of_a_network_is_unforeseen(config: Any, name: str) -> None:
    """It builds, or is refused in one sentence; no machine has room for the huge ones."""

    def work() -> None:
        check_counts(wrong)
        built(lambda: make(replace(wrong)), wrong)

    make = AutoencoderKL if isinstance(config, KLConfig) else build
    for value in ODD:
        wrong = with_value(config, name, value)
        if name == "sample_size" and value == 10**30:
            continue
        refusal(work)


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (LoopSettings(), "warmup", -1),
        (LoopSettings(), "betas", (0.9, 1.0)),
        (LoopSettings(), "betas", (0.9,)),
        (LoopSettings(), "weight_decay", math.nan),
        (LoopSettings(), "final_lr", -0.1),
        (LoopSettings(), "lr", math.inf),
        (LoopSettings(), "batch_size", 2**21),
        (LoopSettings(), "keep", 0),
        (LoopSettings(), "keep_every", 0),
        (LoopSettings(), "previews", -1),
        (AutoencoderLoss(), "discriminator_width", 6),
        (AutoencoderLoss(), "adversarial_start", -1),
        (DenoiserLoss(), "min_snr_gamma", 0.0),
        (DenoiserLoss(), "times_mean", math.inf),
        (DataSettings(), "size", 0),
        (DataSettings(), "size", 10**9),
        (DataSettings(), "channels", 2),
        (DataSettings(), "held_out", 1.0),
        (DataSettings(), "limit", 0),
        (DataSettings(), "cache_size", "20"),
        (DenoiserRecipe(), "loop", LoopSettings),
        (DenoiserRecipe(), "text", 3),
    ],
)
def test_impossible_values_are_refused(settings: Any, name: str, value: Any) -> None:
    assert name in refusal(with_value(settings, name, value).__post_init__)


def test_possible_values_are_taken() -> None:
    """What a recipe may write: infinity for no clipping, whole numbers for numbers, lists."""
    for settings in (
        with_value(LoopSettings(), "clip", math.inf),
        with_value(LoopSettings(), "lr", 1),
        with_value(LoopSettings(), "betas", [0.9, 0.99]),
        with_value(LoopSettings(), "previews", 0),
        with_value(DenoiserRecipe(), "text", "folder"),
    ):
        assert refusal(settings.__post_init__) == ""
    check_fields(with_value(KLConfig(), "block_out_channels", [32, 64]))


def test_a_network_and_a_batch_that_no_memory_holds_are_refused() -> None:
    huge = ModernDiTConfig(num_layers=48, num_attention_heads=4096, attention_head_dim=128)
    assert "GB" in refusal(lambda: built(lambda: build(huge), huge))
    loop = LoopSettings(batch_size=2**20)
    assert "batch_size" in refusal(lambda: check_memory(loop, (3, 4096, 4096)))


def test_the_control_group_limits_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's memory is not the machine's."""
    monkeypatch.setattr(host_memory, "CONTROL_GROUP", tmp_path)
    physical, loop = host_memory.total_bytes(), LoopSettings(batch_size=64)
    assert physical is not None and refusal(lambda: check_memory(loop, (3, 64, 64))) == ""
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.total_bytes() == physical
    (tmp_path / "memory.max").write_text("2000000\n")
    assert host_memory.total_bytes() == 2_000_000
    assert host_memory.available_bytes() == 1_999_000
    assert "has 0.002 GB" in refusal(lambda: check_memory(loop, (3, 64, 64)))


# ---- mistakes in the file ------------------------------------------------------------------------

HEAD = "from sfumato.train import *\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("x = (", 2, "SyntaxError"),
        ("\ndenoiser = Recipe()", 3, "NameError: name 'Recipe' is not defined"),
        ("import nowhere", 2, "ModuleNotFoundError"),
        ("def f():\n    return 1 / 0\nf()", 3, "ZeroDivisionError"),
        ("loop = LoopSettings(stepz=3)", 2, "did you mean 'steps'"),
        ("loop = LoopSettings(steps=-3)", 2, "steps=-3"),
        ("\nloop = LoopSettings(lr=float('nan'))", 3, "lr=nan"),
        ("raise SystemExit(3)", 2, "ends the program"),
        ("def f(): f()\nf()", 2, "RecursionError"),
        ("denoiser = DenoiserRecipe", 2, "the class DenoiserRecipe"),
        ("denoiser = AutoencoderRecipe()", 2, "expected a DenoiserRecipe"),
        ("denoiser: int = 7", 2, "denoiser is 7"),
    ],
)
def test_a_mistake_in_a_recipe_has_file_and_line(
    tmp_path: Path, text: str, line: int, words: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(HEAD + text + "\n")
    message = refusal(lambda: load_recipe(file, "denoiser"))
    assert f"recipe {file}, line {line}: " in message and words in message, message
    assert [f.name for f in tmp_path.iterdir()] == ["mine.py"], "nothing is written beside it"


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe\x00 = 3")
    (tmp_path / "notes.txt").write_text("steps = 3")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "one.py").write_text(HEAD + "autoencoder = AutoencoderRecipe()")
    for name in ("bytes.py", "notes.txt", "folder.py", "nowhere.py", "one.py"):
        assert name in refusal(lambda name=name: load_recipe(tmp_path / name, "denoiser"))
    message = refusal(lambda: load_recipe(tmp_path / "one.py", "denoiser"))
    assert "it has the stage autoencoder alone" in message
    assert refusal(lambda: load_recipe("", "denoiser")) != ""


def test_a_path_never_loads_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are of ./recipes, then of the package; anything with a folder is that file alone."""
    monkeypatch.chdir(tmp_path)
    assert load_recipe("fashion_mnist", "denoiser").name == "fashion"
    for path in ("other/fashion_mnist", "./fashion_mnist", "other/fashion_mnist.py"):
        assert "was not found" in refusal(lambda path=path: load_recipe(path, "denoiser"))
    for folder in ("other", "recipes"):
        Path(folder).mkdir()
        text = f"{HEAD}denoiser = DenoiserRecipe(name={folder!r})\n"
        Path(folder, "fashion_mnist.py").write_text(text)
    assert "did you mean other/fashion_mnist.py" in refusal(
        lambda: load_recipe("other/fashion_mnist", "denoiser")
    )
    assert load_recipe("other/fashion_mnist.py", "denoiser").name == "other"
    assert load_recipe("fashion_mnist", "denoiser").name == "recipes"
    assert load_recipe("fashion-mnist", "denoiser").name == "recipes"
    Path("recipes/my-own.py").write_text(f"{HEAD}denoiser = DenoiserRecipe(name='own')\n")
    assert load_recipe("my-own", "denoiser").name == "own"
    assert "did you mean 'fashion_mnist'" in refusal(
        lambda: load_recipe("fashion_mnits", "denoiser")
    )


def test_a_recipe_of_the_package_is_copied_to_be_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "copy", "cifar10"]) == 0
    assert capsys.readouterr().out == "recipes/cifar10.py\n"
    assert load_recipe("recipes/cifar10.py", "denoiser") == load_recipe("cifar10", "denoiser")
    assert main(["train", "copy", "cifar10"]) == 2
    assert "recipes/cifar10.py exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        "--loop.steps -1",
        "--loop.lr nan",
        "--loop.betas 0.9 2",
        "--loop.batch-size 100000000000000000000000000",
        "--loop.warmup 1e3",
        "--data.size 0",
        "--data.held-out nan",
        "--loss.drop 2",
        "--defaults.steps 0",
        "--defaults.guidance x",
        "--network.num-layers -2",
        "--network.num-layers 99999999",
        "--network.attention-head-dim 7",
        "--network.ffn-ratio inf",
        "--schedule linearr",
        "--out /dev/null/run",
    ],
)
def test_impossible_flags_exit_with_2(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "denoiser", "fashion_mnist_dit", "--data.source", "nowhere"]
    try:
        code = main([*words, *flags.split()])
    except SystemExit as error:  # tyro's own
        code = error.code
    err = capsys.readouterr().err
    assert code == 2 and "unforeseen" not in err and "nowhere does not exist" not in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--loop.steps -1", "--loop.steps -1: expected a whole number of at least 1;"),
        ("--data.size 0", "--data.size 0: expected a whole number of pixels from 1 to"),
        ("--loop.betas 0.9", "sfumato train denoiser fashion_mnist_dit: Missing value for"),
        ("--defaults.guidance x", "--defaults.guidance 'x': expected a number, or one with parts"),
    ],
)
def test_an_impossible_flag_is_one_sentence_with_its_name(
    flags: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "denoiser", "fashion_mnist_dit", *flags.split()]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert sentence in f"{line}\n" and "Error parsing" not in line and "full helptext" not in line


@pytest.mark.parametrize("text", ["2", "2 ramp"])
def test_default_guidance_is_one_flag(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "denoiser", "fashion_mnist_dit", "--data.source", "nowhere"]
    assert main([*words, "--defaults.guidance", text]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


# ---- settings without effect ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 99, "log_every": 50}, "warmup=100 is not over"),
        ({"steps": 100, "warmup": 0, "ema": 0.9999}, "a larger loop.ema changes nothing"),
        # the only update averages with a decay of 1 / 10
        ({"steps": 1, "warmup": 0, "ema": 0.15}, "0.1 after 1 steps"),
        ({"decay": "constant", "final_lr": 0.1}, "final_lr=0.1"),
        ({"batch_size": 300}, "more than the 200 images"),
        ({"steps": 100, "log_every": 101}, "log_every=101"),
        ({"steps": 100, "save_every": 101}, "save_every=101"),
        ({"steps": 100, "show_every": 101}, "show_every=101"),
        ({"previews": 0, "show_every": 5}, "show_every=5"),
        ({"keep_every": 1500}, "keep_every=1500"),
    ],
)
def test_settings_of_the_loop_without_effect(changes: dict[str, Any], words: str) -> None:
    quiet = LoopSettings()
    assert loop_notes(quiet, 200) == []
    notes = loop_notes(replace(quiet, **changes), 200)
    assert any(words in note for note in notes), notes


def test_settings_of_the_losses_without_effect() -> None:
    loop, loss = LoopSettings(steps=50), AutoencoderLoss(adversarial=0.5)
    assert autoencoder_notes(loss, loop, None) == []
    late = replace(loss, adversarial_start=50)
    (note,) = autoencoder_notes(late, loop, None)
    assert "never starts in 50 steps" in note
    (note,) = autoencoder_notes(AutoencoderLoss(adversarial_start=3), loop, None)
    assert "adversarial_start=3 has no effect" in note
    (note,) = autoencoder_notes(AutoencoderLoss(perceptual_network="a:b"), loop, None)
    assert "perceptual_network=a:b" in note
    (note,) = autoencoder_notes(AutoencoderLoss(), replace(loop, previews=0), "fashion")
    assert "nothing is measured" in note

    def names(loss: DenoiserLoss, conditional: bool = True, guidance: Any = 1.0) -> list[str]:
        notes = denoiser_notes(loss, conditional, False, guidance)
        return [note.split("=")[0] for note in notes]

    assert names(DenoiserLoss()) == names(DenoiserLoss(), conditional=False) == []
    assert names(DenoiserLoss(drop=0.3)) == []
    assert names(DenoiserLoss(drop=0.3), conditional=False) == ["loss.drop"]
    assert names(DenoiserLoss(), conditional=False, guidance=3.0) == ["defaults.guidance"]
    assert names(DenoiserLoss(times_mean=1.0)) == ["loss.times_mean"]
    assert names(DenoiserLoss(times="logit_normal", times_mean=1.0)) == []
    assert names(DenoiserLoss(times_scale=1.0)) == ["loss.times_scale"]
    assert names(DenoiserLoss(min_snr_gamma=1.0)) == ["loss.min_snr_gamma"]
    assert names(DenoiserLoss(variance=0.1)) == ["loss.variance"]
    requested = UNetConfig(in_channels=5, **CONVOLUTIONAL_UNET)
    (note,) = network_notes(requested, replace(requested, in_channels=2))
    assert "network.in_channels=5" in note
    assert network_notes(UNetConfig(), UNetConfig(in_channels=2)) == []


def test_settings_of_a_recipe_without_effect() -> None:
    notes = DenoiserRecipe(data=DataSettings(flip=True))._notes(True, True)
    assert ["not mirrored" in notes[0], "--text FOLDER" in notes[1]] == [True, True]
    (note,) = DenoiserRecipe(text=Path("t5"))._notes(True, True)
    assert "classes are not used" in note
    (note,) = DenoiserRecipe(schedule="flow", init="fashion")._notes(True, False)
    assert "schedule=flow" in note
    assert DenoiserRecipe(schedule="flow")._notes(True, False) == []
