"""The life of a run: signals, more steps, other settings, checkpoints that stay, export, init."""

import json
import logging
import math
import os
import random
import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PIL
from torch import Tensor, nn

import sfumato
from helpers.images import smooth_image_set
from helpers.models import CONVOLUTIONAL_UNET, SMALL_BLOCKS
from sfumato.cli import main
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.errors import Stopped, UserError
from sfumato.io.atomic import read_tensors
from sfumato.io.progress import report, reporting
from sfumato.predict.networks.unet import UNetConfig
from sfumato.sampling import Defaults
from sfumato.train import checkpoint, export_model
from sfumato.train.bars import Bars
from sfumato.train.loop import LoopSettings, train
from sfumato.train.objective import Draw, Objective
from sfumato.train.objectives.autoencoder import AutoencoderLoss, AutoencoderObjective
from sfumato.train.recipe import AutoencoderRecipe, DataSettings, DenoiserRecipe
from sfumato.train.signals import Signals

LOOP = LoopSettings(
    steps=8,
    batch_size=4,
    lr=1e-2,
    warmup=2,
    decay="cosine",
    ema=0.9,
    save_every=4,
    show_every=3,
    log_every=3,
)


class Line(Objective):
    """y = w x, and a preview that shows the weights' bytes."""

    main, stage = "line", "train line"

    def __init__(self, data: str = "line", act: Any = lambda step: None) -> None:
        torch.manual_seed(0)
        self.networks: dict[str, nn.Module] = {"line": nn.Linear(3, 1)}
        self.x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
        self.data, self.act = data, act

    @property
    def size(self) -> int:
        return len(self.x)

    @property
    def identity(self) -> dict[str, Any]:
        return {"network": "line", "loss": {"power": 2}, "data": {"name": self.data}}

    def batch(self, indices: Tensor, draw: Draw) -> dict[str, Tensor]:
        return {"x": self.x[indices]}

    def loss(
        self,
        phase: str,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Tensor],
        step: int,
        draw: Draw,
    ) -> tuple[Tensor, dict[str, float]]:
        noise = draw(lambda n, g: torch.randn(n, 3, generator=g))
        y = networks["line"](batch["x"] + noise) - batch["x"].sum(1, keepdim=True)
        return y.square().mean(), {}

    def show(self, network: nn.Module, step: int) -> Any:
        self.act(step)
        weight = network.get_parameter("weight").detach().numpy().tobytes()
        return {}, {"weight": PIL.frombytes("L", (len(weight), 1), weight)}


class Measured(Line):
    """A preview with a number."""

    def show(self, network: nn.Module, step: int) -> Any:
        return {"held_out/step": float(step)}, super().show(network, step)[1]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Signals are not ignored, though a script's background job may have started the tests."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def kill(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def files(out: Path) -> dict[str, bytes]:
    """Everything that a resumed run must have in common with one that was never stopped."""
    result = {
        str(f.relative_to(out)): f.read_bytes()
        for folder in ("samples", "checkpoints/step-00000008")
        for f in sorted((out / folder).iterdir())
    }
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return result | {"log": json.dumps(kept).encode()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train(Line(), LOOP, out)
    return out


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("step", [1, 5])
def test_a_signal_writes_a_checkpoint_and_the_run_resumes_bit_for_bit(
    number: int, step: int, whole: Path, tmp_path: Path
) -> None:
    def act(done: int) -> None:
        if done == step:
            kill(number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=rf"step {step + 1} of 8 .*same command goes on") as stopped:
        train(Line(), LOOP, tmp_path, on_step=act)
    assert stopped.value.signal == number and signal.getsignal(number) == before
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == step + 1
    train(Line(), LOOP, tmp_path)
    assert files(tmp_path) == files(whole)


def test_a_preview_is_left_at_a_signal_and_made_by_the_resumed_run(
    whole: Path, tmp_path: Path
) -> None:
    """A preview may take minutes: the checkpoint does not wait for it."""
    reached: list[int] = []

    def act(step: int) -> None:
        kill(signal.SIGINT)
        reached.append(step)  # the signal is delivered before

    with pytest.raises(Stopped, match="step 3 of 8"):
        train(Line(act=act), LOOP, tmp_path)
    assert reached == [] and not list((tmp_path / "samples").iterdir())
    with pytest.raises(Stopped, match="step 3 of 8"):
        train(Line(act=act), LOOP, tmp_path)
    train(Line(), LOOP, tmp_path)
    assert files(tmp_path) == files(whole)


def test_a_postponed_preview_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where runs end before their next checkpoint; a kill in between leaves no second line."""
    settings, out, shown = replace(LOOP, save_every=8), tmp_path / "run", list[int]()

    def ctrl_c(step: int) -> None:
        if step == 3:
            kill(signal.SIGINT)

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Stopped, match="step 3 of 8"):
        train(Measured(act=ctrl_c), settings, out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "preview_written", end)
        train(Measured(act=shown.append), settings, out)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(Measured(act=shown.append), settings, out, on_step=end)
    train(Measured(act=shown.append), settings, out)
    assert shown == [3, 3, 6, 8]
    train(Measured(), settings, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_was_ignored_stays_ignored(number: int, whole: Path, tmp_path: Path) -> None:
    """As in the background job of a script, whose Ctrl-C is for the job in front."""
    signal.signal(number, signal.SIG_IGN)
    try:
        train(Line(), LOOP, tmp_path, on_step=lambda done: kill(number))
    except Stopped:
        pytest.fail("the signal was heard")
    assert files(tmp_path) == files(whole)


def test_the_first_ctrl_c_of_a_process_is_its_first_after_that_of_another() -> None:
    others = SimpleNamespace(num_processes=2, device="cpu", reduce=lambda own, kind: own + 2.0)
    with Signals(lambda: "at once") as signals:
        assert signals.agreed(others) and signals.received is None
        assert signals.number == signal.SIGTERM
        kill(signal.SIGINT)
        assert signals.number == signal.SIGINT
        with pytest.raises(Stopped, match="at once"):
            kill(signal.SIGINT)


def test_a_second_ctrl_c_ends_at_once_without_a_broken_file(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between steps, and in the middle of writing a checkpoint; SIGTERM does not count twice."""

    def twice(done: int) -> None:
        if done == 5:
            kill(signal.SIGINT, signal.SIGINT)

    with pytest.raises(Stopped, match=r"stopped at once; the checkpoint of step 4 of 8"):
        train(Line(), LOOP, tmp_path, on_step=twice)
    assert checkpoint.steps(tmp_path / "checkpoints") == [4]
    write = checkpoint.write_tensors

    def writing(*arguments: Any) -> None:
        write(*arguments)
        kill(signal.SIGTERM, signal.SIGTERM, signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", writing)
        with pytest.raises(Stopped, match="at once"):
            train(Line(), LOOP, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [4]
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    train(Line(), LOOP, tmp_path)
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_exits_with_the_signals_code(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(words: list[str]) -> None:
        raise Stopped(number, "the same command goes on")

    monkeypatch.setattr("sfumato.cli._dispatch", stopped)
    assert main(["train"]) == code
    assert capsys.readouterr().err == "sfumato: the same command goes on\n"


# ---- other settings ------------------------------------------------------------------------------


def test_more_steps_and_another_rate_are_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Warm-up and decay begin again at the change; a resumed run keeps that."""
    train(Line(), LOOP, tmp_path)
    longer = replace(LOOP, steps=16, lr=5e-3, log_every=1)
    with pytest.raises(UserError, match=r"lr: 0.01 there, 0.005 now.*--change goes on"):
        train(Line(), longer, tmp_path)
    caplog.set_level(logging.INFO)

    def act(done: int) -> None:
        if done == 11:
            kill(signal.SIGTERM)

    with pytest.raises(Stopped):
        train(Line(), longer, tmp_path, change=True, on_step=act)
    assert "changed at step 8: loop.lr 0.01 -> 0.005, loop.steps 8 -> 16" in caplog.text
    train(Line(), longer, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line and line["step"] > 8}
    restarted = replace(LOOP, lr=5e-3)  # 8 steps, as from step 0
    assert rates == {9 + k: pytest.approx(restarted.lr_at(k)) for k in range(8)}
    record = json.loads((tmp_path / "run.json").read_text())
    (change,) = record["changes"]
    assert (change["step"], change["changed"]) == (
        8,
        {"loop.lr": [0.01, 0.005], "loop.steps": [8, 16]},
    )
    assert change in lines and lines.index(change) == [line["step"] for line in lines].index(9) - 1
    assert (tmp_path / "curves.png").exists()


def test_other_data_keep_the_clock_and_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(Line(), LOOP, tmp_path, on_step=lambda done: kill(*[signal.SIGTERM] * (done == 5)))
    train(Line("more"), replace(LOOP, clip=2.0), tmp_path, change=True)
    state = json.loads((tmp_path / "checkpoints/step-00000008/state.json").read_text())
    assert state["origin"] == 0 and state["changes"][0]["step"] == 6
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 8 and last["lr"] == LOOP.lr_at(7)
    with pytest.raises(UserError, match=r"network.*--init MODEL"):
        train(Other(), LOOP, tmp_path, change=True)


class Other(Line):
    """Another network."""

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"network": "other"}


def test_another_number_of_threads_is_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(Line(), replace(LOOP, decay="constant"), tmp_path)
    path = tmp_path / "checkpoints/step-00000008/state.json"
    state = json.loads(path.read_text())
    state["machine"]["threads"] += 1
    path.write_text(json.dumps(state))
    caplog.clear()
    train(Line(), replace(LOOP, decay="constant", steps=9), tmp_path)
    count = state["machine"]["threads"]
    assert f"threads {count} -> {count - 1}" in caplog.text and "by rounding" in caplog.text
    caplog.clear()
    train(Line(), replace(LOOP, decay="constant", steps=10), tmp_path)
    assert "threads" not in caplog.text


def test_no_resume_starts_anew_and_loses_nothing(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(Line(), replace(LOOP, seed=3), out)
    first = files(out)
    for _ in range(2):
        train(Line(), LOOP, out, resume=False)
        assert files(out) == files(whole)
    # the same command would start anew once more
    with pytest.raises(Stopped, match=r": without --no-resume the same command goes on from there"):
        train(Line(), LOOP, tmp_path / "other", resume=False, on_step=lambda _: kill(signal.SIGINT))
    assert files(tmp_path / "run-1") == first and files(tmp_path / "run-2") == files(whole)


def test_fewer_steps_than_a_run_has_are_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    constant = replace(LOOP, decay="constant")
    train(Line(), constant, tmp_path)
    train(Line(), replace(constant, steps=5), tmp_path)
    assert "the run has 8 already" in caplog.text


# ---- checkpoints, logs, previews -----------------------------------------------------------------


def test_checkpoints_are_kept_as_the_settings_say(tmp_path: Path) -> None:
    settings = replace(LOOP, save_every=1, keep=3, keep_every=3)
    train(Line(), settings, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [3, 6, 7, 8]


def test_without_a_terminal_there_is_a_line_for_each_line_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    train(Line(), LOOP, tmp_path)
    lines = [r.getMessage() for r in caplog.records if r.name == "sfumato.train.logger"]
    assert [line.split("  ")[0] for line in lines] == [
        "train line 3/8",
        "train line 6/8",
        "train line 8/8",
    ]
    assert all("line/loss" in line and line.endswith("0:00:00 left") for line in lines)

    err = capsys.readouterr().err
    assert "━" not in err and "\x1b" not in err


def test_previews_can_be_turned_off(tmp_path: Path) -> None:
    train(Line(act=lambda step: pytest.fail("shown")), replace(LOOP, previews=0), tmp_path)
    assert not list((tmp_path / "samples").iterdir())


def test_progress_is_reported_to_the_innermost() -> None:
    calls: list[Any] = []
    report("a", 1, 2)
    with reporting(lambda *call: calls.append(("outer", *call))):
        with reporting(lambda *call: calls.append(("inner", *call))):
            report("a", 1, 2)
        report("b", 2, 2)
    report("a", 1, 2)
    assert calls == [("inner", "a", 1, 2), ("outer", "b", 2, 2)]


def test_long_work_has_a_line_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    monkeypatch.setattr("sfumato.train.bars.time.monotonic", lambda: now[0])
    with Bars():
        for k in range(1, 61):
            now[0] = float(k)
            report("opening images", k, 60)
    lines = [r.getMessage() for r in caplog.records]
    assert lines == [f"opening images: {k} of 60" for k in (11, 21, 31, 41, 51)]


@pytest.mark.parametrize("pairs", [3, 11])
def test_held_out_images_go_through_by_pixels(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, in batches of a bounded area; originals above their reconstructions."""
    monkeypatch.setattr("sfumato.train.objectives.autoencoder.PIXELS", 4 * 16 * 16)
    images = smooth_image_set(13)
    torch.manual_seed(0)
    config = KLConfig(in_channels=1, out_channels=1, latent_channels=2, **SMALL_BLOCKS)
    network = AutoencoderKL(config).eval()
    objective = AutoencoderObjective(network, images, images, AutoencoderLoss(), pairs=pairs)
    counts: list[int] = []
    encode = type(network).encode

    def counting(self: Any, image: Tensor, *rest: Any) -> Tensor:
        counts.append(len(image))
        return encode(self, image, *rest)

    monkeypatch.setattr(type(network), "encode", counting)
    reports: list[Any] = []
    with reporting(lambda *call: reports.append(call)):
        numbers, shown = objective.show(network, 1)
    assert counts == [4, 4, 4, 1] and reports[-1] == ("held-out images", 13, 13)
    monkeypatch.setattr(type(network), "encode", encode)
    image = images.batch(range(13))["image"]
    with torch.no_grad():
        rebuilt = network.decode(network.encode(image)).clamp(-1, 1)
    error = ((image - rebuilt).double() / 2).square().mean()
    assert numbers["held_out/psnr"] == pytest.approx(-10 * math.log10(error), rel=1e-6)
    grid = np.asarray(shown["reconstructions"].convert("L"))
    columns, rows = min(8, pairs), 2 * -(-pairs // 8)
    assert grid.shape == (18 * rows - 2, 18 * columns - 2)  # two pixels between images
    cells = {(i, j): grid[18 * i :, 18 * j :][:16, :16] for i in range(rows) for j in range(8)}
    order = random.Random(0).sample(range(13), 13)
    for k in range(pairs):
        row, column = 2 * (k // 8), k % 8
        for pixels, cell in ((image, cells[row, column]), (rebuilt, cells[row + 1, column])):
            expected = (pixels[order[k], 0] + 1) * 127.5
            assert np.abs(cell - expected.numpy()).max() <= 0.51
    assert (image - rebuilt).abs().mean() > 0.1  # an untrained network's images are others
    if pairs == 11:  # blank cells fill the last row
        assert min(cells[2, j].min() for j in range(3, 8)) == 255


# ---- models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny recipes of two classes, with the autoencoder trained."""
    folder = tmp_path_factory.mktemp("classes")
    draw = np.random.default_rng(0)
    for name in ("coat", "bag"):
        (folder / "data" / name).mkdir(parents=True)
        for k in range(4):
            pixels = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = PIL.fromarray(pixels).resize((16, 16))
            image.save(folder / "data" / name / f"{k}.png")
    data = DataSettings(source=str(folder / "data"), size=16)
    loop = replace(LOOP, steps=2, save_every=1, show_every=1, previews=3)
    kl = KLConfig(latent_channels=2, sample_size=16, **SMALL_BLOCKS)
    vae = AutoencoderRecipe(data, kl, loop=loop).run(folder / "run")
    return DenoiserRecipe(
        autoencoder=vae,
        data=data,
        network=UNetConfig(**CONVOLUTIONAL_UNET),
        schedule="flow",
        parameterization="flow",
        loop=loop,
        defaults=Defaults(steps=2),
    )


def test_opening_encoding_and_sampling_report_their_progress(
    stages: DenoiserRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: dict[str, list[int]] = {}

    def update(self: Bars, title: str, done: int, total: int) -> None:
        if done == total:
            ends.setdefault(title, []).append(done)

    monkeypatch.setattr(Bars, "update", update)
    loop = replace(stages.loop, previews=5, steps=1)
    replace(stages, loop=loop).run(tmp_path)
    assert ends["opening images"] == [8]
    assert ends["encoding images"] == [7, 1], "training images, then held-out ones"
    assert ends["samples"] == [5]


def test_a_model_is_made_of_an_unfinished_run(
    stages: DenoiserRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The averaged weights of the newest checkpoint, without data or recipe; the run was moved."""
    vae = tmp_path / "old" / "autoencoder" / "vae"
    shutil.copytree(str(stages.autoencoder), vae)
    replace(stages, autoencoder=None).run(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "run")
    finished = sfumato.load(tmp_path / "run" / "model")
    average = read_tensors(tmp_path / "run/denoiser/checkpoints/step-00000001/average.safetensors")
    assert main(["train", "export", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'model-2'}\n"
    assert main(["train", "export", str(tmp_path / "run")]) == 2
    assert "model-2 is a model already" in capsys.readouterr().err
    assert main(["train", "export", str(tmp_path / "run"), "--overwrite"]) == 0
    capsys.readouterr()
    exported = sfumato.load(tmp_path / "run" / "model-2")
    assert exported.hash == finished.hash and exported.defaults == finished.defaults
    (tmp_path / "run/denoiser/checkpoints/step-00000002/state.json").unlink()
    place = export_model(tmp_path / "run" / "denoiser", tmp_path / "early")
    early = sfumato.load(place)
    for name, tensor in early.denoiser.network.state_dict().items():
        assert torch.equal(tensor, average[name])
    assert main(["train", "export", str(tmp_path / "run"), "--out", str(place)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    for run, words in ((tmp_path, "no denoiser's run"), (tmp_path / "no", "is not a folder")):
        assert main(["train", "export", str(run)]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "run" / "autoencoder" / "vae").rename(tmp_path / "vae")
    assert main(["train", "export", str(tmp_path / "run")]) == 2
    assert "run/autoencoder/vae, which is no longer there" in capsys.readouterr().err
    samples = PIL.open(tmp_path / "run/denoiser/samples/samples-00000002.png")
    assert samples.width < 5 * 20  # three images of 16 pixels in a row


def test_a_run_begins_with_the_weights_of_a_model(
    stages: DenoiserRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more class, in other order: old rows are kept by name, the new one is the empty prompt's.

    A learning rate of almost 0 leaves the weights where they began.
    """
    first = sfumato.load(stages.run(tmp_path / "first"))
    data = Path(stages.data.source)
    more = tmp_path / "more"
    for name, source in (("apron", "coat"), ("bag", "bag"), ("coat", "coat")):
        (more / name).mkdir(parents=True)
        for file in (data / source).iterdir():
            (more / name / file.name).write_bytes(file.read_bytes())
    recipe = replace(
        stages,
        data=replace(stages.data, source=str(more)),
        init="first/model",
        schedule="cosine",
        loop=replace(stages.loop, lr=1e-30, weight_decay=0.0),
    )
    monkeypatch.chdir(tmp_path)
    model = sfumato.load(recipe.run(tmp_path / "second"))
    assert model.class_names == ("bag", "coat", "apron")
    assert model.denoiser.process.schedule.kind == first.denoiser.process.schedule.kind
    for name, tensor in first.denoiser.network.state_dict().items():
        now = model.denoiser.network.state_dict()[name]
        if now.shape == tensor.shape:
            torch.testing.assert_close(now, tensor)
        else:
            torch.testing.assert_close(now, torch.cat([tensor, tensor[-1:]]))
    record = json.loads((tmp_path / "second/denoiser/run.json").read_text())
    assert record["init"] == {"model": recipe.init, "hash": first.hash}
    with pytest.raises(UserError, match=r"hash|init|network"):
        replace(recipe, init=None, schedule="flow").run(tmp_path / "second")
    monkeypatch.chdir(more)
    exported = sfumato.load(export_model(tmp_path / "second"))
    assert exported.hash == model.hash


def test_an_autoencoder_begins_with_the_weights_of_another(
    stages: DenoiserRecipe, tmp_path: Path
) -> None:
    loop = replace(stages.loop, lr=1e-30, weight_decay=0.0)
    recipe = AutoencoderRecipe(stages.data, loop=loop, init=str(stages.autoencoder))
    vae = recipe.run(tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    before, after = read_tensors(Path(str(stages.autoencoder), name)), read_tensors(vae / name)
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor)
    with pytest.raises(UserError, match=r"images of 3 channels, and an autoencoder of 1"):
        replace(recipe, init="fashion").run(tmp_path / "other")


def test_sizes_that_do_not_fit_are_refused_before_the_first_step(
    stages: DenoiserRecipe, tmp_path: Path
) -> None:
    odd = AutoencoderRecipe(replace(stages.data, size=15), KLConfig(**SMALL_BLOCKS), loop=LOOP)
    with pytest.raises(UserError, match=r"15x15 pixels do not divide .* factor 2: .*size 14"):
        odd.run(tmp_path)
    deep = replace(
        odd, data=stages.data, loss=AutoencoderLoss(adversarial=1, discriminator_layers=6)
    )
    with pytest.raises(UserError, match="cannot be a discriminator of these images"):
        deep.run(tmp_path)
    grey = replace(odd, data=replace(stages.data, channels=3), features="fashion")
    with pytest.raises(UserError, match="features 'fashion' are of grey images"):
        grey.run(tmp_path)
    for changes, flag in (({"size": 15}, "--data.size 14"), ({"channels": 1}, "--data.channels 3")):
        other = replace(stages, data=replace(stages.data, **changes))
        with pytest.raises(UserError, match=f"give {flag}"):
            other.run(tmp_path)
    assert not list(tmp_path.iterdir())
