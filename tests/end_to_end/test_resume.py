"""Runs that are killed, that meet a full disk, that find damage or that are split over processes:
nothing is lost, not a bit.

Children are forks of a server that has imported everything and computed nothing, so that a kill -9
costs no import and no child inherits a lock held by a thread of the test runner; one test uses the
command line in processes of its own.
"""

import ctypes
import itertools
import json
import multiprocessing
import multiprocessing.process
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image as PIL
from safetensors import SafetensorError
from torch import Tensor, nn

from helpers.images import smooth_image_set
from helpers.latents import Latents
from helpers.models import CONVOLUTIONAL_UNET, SMALL_BLOCKS
from helpers.processes import environment
from helpers.tensors import normal
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.errors import Stopped, UserError
from sfumato.io import atomic
from sfumato.io.atomic import NotWritten, atomic_folder, read_tensors, recover, write_tensors
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.train import checkpoint
from sfumato.train.conditions.classes import Classes
from sfumato.train.logger import RunLog
from sfumato.train.loop import LoopSettings, train
from sfumato.train.objective import Draw, Objective
from sfumato.train.objectives.autoencoder import AutoencoderLoss, AutoencoderObjective
from sfumato.train.objectives.denoiser import DenoiserLoss, DenoiserObjective
from sfumato.types import LatentSpace

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need a system with fork")

LOOP = LoopSettings(
    steps=7,
    batch_size=4,
    lr=1e-3,
    warmup=2,
    decay="cosine",
    ema=0.9,
    save_every=2,
    show_every=3,
    log_every=1,
    weight_decay=0.1,
)
KINDS = ("autoencoder", "denoiser")
SKIP = 77


# ---- recipes -------------------------------------------------------------------------------------


LATENTS = normal(10, 2, 8, 8, seed=7)
CLASSES = torch.arange(10) % 2


images = partial(smooth_image_set, 10, flip=True)


def make(
    kind: str,
    width: int = 16,
    dropout: float = 0.2,
    seed: int = 0,
    loss: Any = None,
    labels: Tensor | None = None,
) -> Objective:
    """An autoencoder with a discriminator that joins at step 3 and mirrored images, or a denoiser
    with dropout.
    """
    torch.manual_seed(0)
    if kind == "autoencoder":
        config = KLConfig(
            in_channels=1,
            out_channels=1,
            latent_channels=2,
            **SMALL_BLOCKS | {"block_out_channels": (8, width)},
        )
        loss = loss or AutoencoderLoss(adversarial=0.5, adversarial_start=3, discriminator_width=8)
        return AutoencoderObjective(AutoencoderKL(config), images(seed=seed), images(seed=5), loss)
    fields = CONVOLUTIONAL_UNET | {"block_out_channels": (8, width)}
    config = UNetConfig(
        in_channels=2, out_channels=2, num_class_embeds=3, dropout=dropout, **fields
    )
    process = Process(schedule("cosine"), parameterization("v"))
    loss = loss or DenoiserLoss(weighting="min_snr", times="logit_normal", drop=0.3)
    space = LatentSpace(2, 2, (0.0, 0.0), (1.0, 1.0))
    latents = Latents(LATENTS, 0.2, CLASSES if labels is None else labels, f"toy{seed}")
    return DenoiserObjective(
        UNet(config), process, latents, space, Classes(ClassNames(("boot", "bag"))), loss
    )


def run(kind: str, out: Path, settings: LoopSettings = LOOP, **options: Any) -> nn.Module:
    return train(make(kind), settings, out, **options)


# ---- children ------------------------------------------------------------------------------------


SERVER = (
    multiprocessing.get_context("forkserver")
    if hasattr(os, "fork")
    else multiprocessing.get_context("spawn")
)
SERVER.set_forkserver_preload(
    [
        "torch._dynamo",
        "accelerate",
        "numpy",
        "PIL.Image",
        "pytest",
        "tensorboard",
        "sfumato.model",
        "sfumato.train.recipe",
    ]
)
# lambdas and this file's classes travel to the server
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Call:
    """Calls the function where it is unpickled: the whole of a child's work, though children can
    import no test.
    """

    def __init__(self, work: Callable[[], object], environment: dict[str, str]):
        self.work, self.environment = work, environment

    def __reduce__(self) -> Any:
        return _begin, (self.work, self.environment, torch.get_num_threads())


def _begin(work: Callable[[], object], environment: dict[str, str], threads: int) -> None:
    os.environ.update(environment)
    torch.set_num_threads(threads)  # the bits of training depend on it
    work()


def fork(work: Callable[[], object], **environment: str) -> multiprocessing.process.BaseProcess:
    """Run the work in a child.

    Its exit code is 0 for done, 1 for an exception, or the argument of sys.exit.
    """
    child = SERVER.Process(
        target=cloudpickle.loads, args=(cloudpickle.dumps(Call(work, environment)),)
    )
    child.start()
    return child


def wait(child: multiprocessing.process.BaseProcess) -> int:
    """The exit code; minus the signal for a child that was killed."""
    child.join(120)
    if child.exitcode is None:
        child.kill()
        pytest.fail("a child did not end within two minutes")
    return child.exitcode


def in_child(work: Callable[[], object]) -> int:
    return wait(fork(work))


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FILE_EVENTS = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.scandir",
    "os.listdir",
    "shutil.rmtree",
}


def die_before(reached: Callable[[int, str, tuple[Any, ...]], bool]) -> Callable[[], None]:
    """Kill this process just before it touches the file system, when `reached` is true.

    `reached` takes the number of earlier touches, the event and its arguments. Counting starts when
    the returned function is called: Python's audit hooks receive every open, rename and removal.
    """
    seen = -1

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if seen >= 0 and event in FILE_EVENTS:
            if reached(seen, event, arguments):
                die()
            seen += 1

    def start() -> None:
        nonlocal seen
        seen = 0

    sys.addaudithook(hook)
    return start


def leftovers(folder: Path) -> list[str]:
    return [str(f) for f in folder.rglob(".*")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run without interruption."""
    done: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp(kind)
            assert in_child(lambda: run(kind, done[kind])) == 0
        return done[kind]

    return folder


def log(out: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (out / "log.jsonl").read_text().splitlines()
    ]


def assert_same_run(out: Path, expected: Path) -> None:
    """Every byte of the state, every number and every picture."""
    assert (
        checkpoint.steps(out / "checkpoints")
        == checkpoint.steps(expected / "checkpoints")
        == [6, 7]
    )
    for folder in ("checkpoints/step-00000006", "checkpoints/step-00000007", "samples"):
        names = sorted(f.name for f in (expected / folder).iterdir())
        assert sorted(f.name for f in (out / folder).iterdir()) == names and (
            names or folder == "samples"
        )
        for name in names:
            # A bool with a name: pytest would explain for hours on CI's machines every difference
            # between two files of weights.
            same = (out / folder / name).read_bytes() == (expected / folder / name).read_bytes()
            assert same, f"{folder}/{name} differs"
    assert log(out) == log(expected)
    assert [line["step"] for line in log(out) if "lr" in line] == list(range(1, 8))
    assert leftovers(out) == []


# ---- kill -9 -------------------------------------------------------------------------------------


def test_the_state_is_more_than_weights(reference: Callable[[str], Path]) -> None:
    """It holds both networks, both optimizers with their moments, and the average."""
    names = sorted(
        f.name for f in (reference("autoencoder") / "checkpoints" / "step-00000007").iterdir()
    )
    both = [
        f"{n}{part}.safetensors"
        for n in ("autoencoder", "discriminator")
        for part in ("", ".optimizer")
    ]
    assert names == sorted([*both, "average.safetensors", "state.json"])
    moments = read_tensors(
        reference("autoencoder")
        / "checkpoints"
        / "step-00000007"
        / "discriminator.optimizer.safetensors"
    )
    assert (
        moments["0.step"] == 4
        and moments["0.exp_avg"].abs().sum() > 0
        and moments["0.exp_avg_sq"].abs().sum() > 0
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "steps", [(random.Random(k).randrange(1, 7),) for k in range(2)] + [(1, 3, 5)], ids=str
)
def test_a_killed_run_goes_on_bit_for_bit(
    kind: str, steps: tuple[int, ...], tmp_path: Path, reference: Callable[[str], Path]
) -> None:
    for step in steps:
        assert (
            in_child(
                lambda step=step: run(
                    kind, tmp_path, on_step=lambda done: die() if done == step else None
                )
            )
            == -signal.SIGKILL
        )
    assert in_child(lambda: run(kind, tmp_path)) == 0
    assert_same_run(tmp_path, reference(kind))


def test_a_run_that_was_never_killed_differs_with_another_seed(
    tmp_path: Path, reference: Callable[[str], Path]
) -> None:
    """The comparison can fail."""
    assert in_child(lambda: run("denoiser", tmp_path, replace(LOOP, seed=1))) == 0
    with pytest.raises(AssertionError, match="differs"):
        assert_same_run(tmp_path, reference("denoiser"))


def half_a_file(tensors: Mapping[str, Tensor], path: Path, metadata: Any = None) -> None:
    data = safetensors.torch.save(dict(tensors), metadata)
    path.write_bytes(data[: len(data) // 2])
    die()


def is_final(event: str, arguments: tuple[Any, ...]) -> bool:
    return (
        event == "os.rename"
        and re.fullmatch(r"step-\d{8}", Path(os.fsdecode(arguments[1])).name) is not None
    )


MOMENTS: dict[str, Callable[[int, str, tuple[Any, ...]], bool] | None] = {
    "in the middle of a file": None,
    "at the 12th access": lambda n, event, arguments: n == 12,
    "before the checkpoint gets its name": lambda n, event, arguments: is_final(event, arguments),
    "while an old one is removed": lambda n, event, arguments: event == "shutil.rmtree",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_during_a_save_goes_on_bit_for_bit(
    kind: str, moment: str, tmp_path: Path, reference: Callable[[str], Path]
) -> None:
    def work() -> None:
        reached, save, count = MOMENTS[moment], checkpoint.save, 0

        def saving(*arguments: Any, **options: Any) -> None:
            nonlocal count
            count += 1
            if count == 3:
                if reached is None:
                    safetensors.torch.save_file = half_a_file
                else:
                    die_before(reached)()
            save(*arguments, **options)

        checkpoint.save = saving
        run(kind, tmp_path)

    assert in_child(work) == -signal.SIGKILL
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == (
        6 if moment == "while an old one is removed" else 4
    )
    assert leftovers(tmp_path / "checkpoints") != []
    assert in_child(lambda: run(kind, tmp_path)) == 0
    assert_same_run(tmp_path, reference(kind))


def state(value: int) -> tuple[dict[str, nn.Module], nn.Module, dict[str, torch.optim.Optimizer]]:
    """A network, its average and its optimizer, all of whose numbers are `value`."""
    network, average = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tensors = [
        *network.parameters(),
        *average.parameters(),
        *(v for s in optimizer.state.values() for v in s.values()),
    ]
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(value)
    return {"net": network}, average, {"net": optimizer}


def save(folder: Path, step: int) -> None:
    networks, average, optimizers = state(step)
    checkpoint.save(folder, step, networks, average.state_dict(), optimizers, {"a": 1})


def values(folder: Path) -> set[float]:
    """All numbers of the newest checkpoint, after cleaning up."""
    networks, average, optimizers = state(0)
    checkpoint.clean(folder)
    result = checkpoint.load(folder, networks, average, optimizers, {"a": 1})
    assert result is not None
    tensors = [
        *networks["net"].parameters(),
        *average.parameters(),
        *(v for s in optimizers["net"].state.values() for v in s.values()),
    ]
    return {float(result["step"]), *(n for t in tensors for n in t.flatten().tolist())}


def kills(work: Callable[[], object]) -> Iterator[bool]:
    """Does the work again and again in children that are killed before the 1st, 2nd, 3rd ... access
    to the file system.

    True when the child was killed; ends after the one that came through.
    """
    for n in range(1000):

        def killed(n: int = n) -> None:
            die_before(lambda seen, event, arguments: seen == n)()
            work()

        code = in_child(killed)
        assert code in (0, -signal.SIGKILL)
        yield code != 0
        if code == 0:
            return


def test_a_kill_at_any_access_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """The newest is the old one or the new one, whole; the next start sweeps; and a save of the
    same step works.
    """
    base, folder = tmp_path / "base", tmp_path / "run"
    save(base, 1)
    save(base, 2)
    shutil.copytree(base, folder)
    result = []
    for killed in kills(lambda: save(folder, 3)):
        numbers = values(folder)
        assert numbers in ({2.0}, {3.0}) and (killed or numbers == {3.0})
        assert sorted(f.name for f in folder.iterdir()) == [
            f"step-{step:08d}" for step in checkpoint.steps(folder)
        ]
        assert all(
            len(list((folder / f"step-{step:08d}").iterdir())) == 4
            for step in checkpoint.steps(folder)
        ), "half of one is left"
        result.append(numbers)
        shutil.rmtree(folder)
        shutil.copytree(base, folder)
    assert len(result) > 20 and {2.0} in result and result.count({3.0}) > 1


@pytest.mark.parametrize("swaps", [True, False], ids=["swap", "two renames"])
def test_a_kill_at_any_access_leaves_the_old_folder_or_the_new(
    swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systems that can swap two names always have one of the folders.

    On others `recover` brings the old one back.
    """
    if swaps:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        if not atomic._exchange(tmp_path / "a", tmp_path / "b"):
            pytest.skip("this file system cannot swap two names")
    else:
        monkeypatch.setattr(atomic, "_exchange", atomic._exchange)  # put back after the test
    place = tmp_path / "place"
    path = place / "model"

    def write(text: str) -> None:
        if not swaps:
            atomic._exchange = lambda a, b: False  # also in the child
        with atomic_folder(path) as temporary:
            (temporary / "weights").write_text(text)

    write("old")
    result, absent = [], 0
    for killed in kills(lambda: write("new")):
        absent += not path.exists()
        recover(place)
        result.append((path / "weights").read_text())
        assert result[-1] in ("old", "new") and (killed or result[-1] == "new")
        assert leftovers(place) == []
        write("old")
    assert set(result) == {"old", "new"}
    assert (absent == 0) if swaps else (absent > 0)


def test_folders_of_running_processes_are_not_swept(tmp_path: Path) -> None:
    own, parent, gone = (
        tmp_path / f".a.{pid}.tmp" for pid in (os.getpid(), os.getppid(), wait_for_a_number())
    )
    for folder in (own, parent, gone, tmp_path / ".hidden"):
        folder.mkdir()
    recover(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([parent.name, ".hidden"])


def wait_for_a_number() -> int:
    """The number of a process that has ended."""
    child = fork(lambda: None)
    wait(child)
    assert child.pid is not None
    return child.pid


RECIPE = """
from sfumato.compress.kl import KLConfig
from sfumato.train.loop import LoopSettings
from sfumato.train.objectives.autoencoder import AutoencoderLoss
from sfumato.train.recipe import AutoencoderRecipe, DataSettings

autoencoder = AutoencoderRecipe(
    data=DataSettings(source={data!r}, flip=True),
    network=KLConfig(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=2, norm_num_groups=4
    ),
    loss=AutoencoderLoss(adversarial=0.5, adversarial_start=3, discriminator_width=8),
    loop=LoopSettings(
        steps=60, batch_size=4, lr=1e-3, warmup=2, ema=0.9, save_every=1, show_every=20, log_every=1
    ),
)
"""


@pytest.mark.slow
def test_the_command_line_killed_from_outside_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Real processes; the kill comes at whatever moment, with a save at every step most likely
    during one.
    """
    (tmp_path / "data").mkdir()
    draw = np.random.default_rng(0)
    for k in range(6):
        PIL.fromarray(draw.integers(0, 256, (16, 16), dtype=np.uint8)).save(
            tmp_path / "data" / f"{k}.png"
        )
    (tmp_path / "toy.py").write_text(RECIPE.format(data=str(tmp_path / "data")))

    def command(out: str) -> subprocess.Popen[bytes]:
        arguments = [
            sys.executable,
            "-m",
            "sfumato",
            "train",
            "autoencoder",
            "toy.py",
            "--out",
            out,
        ]
        return subprocess.Popen(
            arguments,
            cwd=tmp_path,
            env=environment(OMP_NUM_THREADS="1"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    whole = command("whole")
    _, output = whole.communicate()
    assert whole.returncode == 0, output.decode()
    killed = command("killed")
    while (
        not checkpoint.steps(tmp_path / "killed" / "autoencoder" / "checkpoints")
        and killed.poll() is None
    ):
        time.sleep(0.01)
    time.sleep(random.random() * 0.5)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "it was done before the kill: train for more steps"
    again = command("killed")
    _, output = again.communicate()
    assert again.returncode == 0, output.decode()
    a, b = tmp_path / "whole" / "autoencoder", tmp_path / "killed" / "autoencoder"
    names = [f.relative_to(a) for f in sorted(a.rglob("*.safetensors"))]
    assert len(names) == 2 * 5 + 1  # two checkpoints and the finished autoencoder
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)
    assert (a / "vae" / "config.json").read_bytes() == (b / "vae" / "config.json").read_bytes()
    assert log(a) == log(b)
    assert leftovers(b) == []


# ---- damage --------------------------------------------------------------------------------------


def copied(reference: Path, out: Path) -> Path:
    shutil.copytree(reference, out, dirs_exist_ok=True)
    return out / "checkpoints" / "step-00000007"


@pytest.mark.parametrize(
    "name",
    ["denoiser.safetensors", "denoiser.optimizer.safetensors", "average.safetensors", "state.json"],
)
@pytest.mark.parametrize("how", ["cut", "empty", "gone"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    name: str,
    how: str,
    tmp_path: Path,
    reference: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = copied(reference("denoiser"), tmp_path) / name
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 if how == "cut" else 0])
    done: list[int] = []
    run("denoiser", tmp_path, on_step=done.append)
    assert done == [7]
    assert_same_run(tmp_path, reference("denoiser"))
    assert (name == "state.json" and how == "gone") or "passed over" in caplog.text


def test_no_whole_checkpoint_is_one_sentence(
    tmp_path: Path, reference: Callable[[str], Path]
) -> None:
    newest = copied(reference("denoiser"), tmp_path)
    for folder in (newest, newest.with_name("step-00000006")):
        (folder / "average.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(.*average.safetensors"):
        run("denoiser", tmp_path)


# ---- another run ---------------------------------------------------------------------------------


OTHER: dict[str, tuple[str, Callable[[Path], object]]] = {
    "lr: 0.001 there, 0.01 now": (
        "denoiser",
        lambda out: run("denoiser", out, replace(LOOP, lr=0.01)),
    ),
    "batch_size": ("denoiser", lambda out: run("denoiser", out, replace(LOOP, batch_size=2))),
    "steps: 7 there, 9 now": ("denoiser", lambda out: run("denoiser", out, replace(LOOP, steps=9))),
    "precision": ("denoiser", lambda out: run("denoiser", out, replace(LOOP, precision="bf16"))),
    "block_out_channels": ("denoiser", lambda out: train(make("denoiser", width=24), LOOP, out)),
    "dropout: 0.2 there, 0.3 now": (
        "denoiser",
        lambda out: train(make("denoiser", dropout=0.3), LOOP, out),
    ),
    "weighting": (
        "denoiser",
        lambda out: train(
            make("denoiser", loss=DenoiserLoss(times="logit_normal", drop=0.3)), LOOP, out
        ),
    ),
    'latents: "toy0" there, "toy1" now': (
        "denoiser",
        lambda out: train(make("denoiser", seed=1), LOOP, out),
    ),
    "labels": (
        "denoiser",
        lambda out: train(make("denoiser", labels=torch.zeros(10, dtype=torch.int64)), LOOP, out),
    ),
    "pixels": ("autoencoder", lambda out: train(make("autoencoder", seed=1), LOOP, out)),
    "block_out_channels ": (
        "autoencoder",
        lambda out: train(make("autoencoder", width=24), LOOP, out),
    ),
    "adversarial: 0.5 there, 0.0 now": (
        "autoencoder",
        lambda out: train(make("autoencoder", loss=AutoencoderLoss()), LOOP, out),
    ),
}


@pytest.mark.parametrize("words", OTHER)
def test_other_settings_or_data_do_not_go_on(
    words: str, tmp_path: Path, reference: Callable[[str], Path]
) -> None:
    kind, work = OTHER[words]
    copied(reference(kind), tmp_path)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(UserError) as refused:
        work(tmp_path)
    assert words.strip() in str(refused.value) and "train into another folder" in str(refused.value)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_parts_trains_the_weights_of_the_whole(kind: str, tmp_path: Path) -> None:
    loss = AutoencoderLoss() if kind == "autoencoder" else None
    weights = []
    for parts in (1, 2, 4):
        made = make(kind, dropout=0, loss=loss)
        settings = replace(LOOP, accumulate=parts, save_every=7, show_every=7)
        weights.append(train(made, settings, tmp_path / str(parts)).state_dict())
    for other in weights[1:]:
        for key, tensor in other.items():
            # Adam divides small gradients by their size, and their rounding too
            torch.testing.assert_close(tensor, weights[0][key], rtol=1e-3, atol=3e-4)
    losses = [
        [json.loads(line) for line in (tmp_path / str(parts) / "log.jsonl").open()]
        for parts in (1, 4)
    ]
    for one, four in zip(*losses, strict=True):
        # the norm shows a sum in place of a mean, which Adam's steps do not
        for key in (k for k in one if k.endswith(("/loss", "/grad_norm"))):
            assert one[key] == pytest.approx(four[key], rel=2e-3), key
    with pytest.raises(UserError, match="accumulate=3 parts"):
        LoopSettings(batch_size=4, accumulate=3)


def test_a_run_stops_when_its_time_is_over_and_goes_on_bit_for_bit(
    tmp_path: Path, reference: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that moves a minute whenever it is read."""
    from sfumato.train import loop

    minutes = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(minutes)))
    limited = replace(LOOP, limit_time=2.5)
    for step in (3, 6):
        with pytest.raises(Stopped, match=f"checkpoint of step {step} of 7") as stop:
            run("denoiser", tmp_path / "run", limited)
        assert stop.value.signal == signal.SIGALRM
    run("denoiser", tmp_path / "run", limited)  # over at the last step: nothing is left to do
    assert_same_run(tmp_path / "run", reference("denoiser"))


def test_settings_that_decide_nothing_may_change(tmp_path: Path) -> None:
    """Intervals of logs; and, with a constant learning rate, the number of steps.

    The longer run is the run that was longer from the start.
    """
    settings = replace(LOOP, decay="constant")
    run("denoiser", tmp_path / "a", replace(settings, steps=4))
    longer = replace(settings, save_every=3, show_every=2, log_every=2)
    a, b = run("denoiser", tmp_path / "a", longer), run("denoiser", tmp_path / "b", settings)
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("stop", [1, 2, 4, 5])
def test_a_line_in_the_middle_of_which_a_run_stopped_is_the_same(stop: int, tmp_path: Path) -> None:
    """The mean over all of its steps: those before a checkpoint are kept in it."""
    settings = replace(LOOP, log_every=3, save_every=2)

    def halt(done: int) -> None:
        if done == stop:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(Curve(), settings, tmp_path / "stopped", on_step=halt)
    for name in ("stopped", "whole"):
        train(Curve(), settings, tmp_path / name)
    assert log(tmp_path / "stopped") == log(tmp_path / "whole")
    assert [line["step"] for line in log(tmp_path / "whole")] == [3, 6, 7]


# ---- full disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "call"), [("autoencoder", 3), ("denoiser", 0), ("denoiser", 2)])
def test_a_full_disk_during_a_save_loses_nothing(
    kind: str,
    call: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reference: Callable[[str], Path],
) -> None:
    """The disk is full at some file of the second save: one sentence, and the checkpoint before is
    there and goes on.
    """
    write, count = safetensors.torch.save_file, 0

    def full(*arguments: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == per_save + 1 + call:
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        write(*arguments, **options)

    per_save = 5 if kind == "autoencoder" else 3
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(
            NotWritten,
            match=r"could not write .*step-00000004: .*No space left on device.*free some space",
        ) as error:
            run(kind, tmp_path)
    assert ".tmp" not in str(error.value)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2] and leftovers(tmp_path) == []
    run(kind, tmp_path)
    assert_same_run(tmp_path, reference(kind))


def test_a_file_size_limit_is_met_like_a_full_disk(
    tmp_path: Path, reference: Callable[[str], Path]
) -> None:
    """The system itself refuses to write (RLIMIT_FSIZE), after the first save."""

    def limited(done: int) -> None:
        if done == 3:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            )

    def work() -> None:
        try:
            run("denoiser", tmp_path, on_step=limited)
        except UserError as error:
            (tmp_path / "told").write_text(str(error))
            sys.exit(5)

    assert in_child(work) == 5
    assert "could not write" in (tmp_path / "told").read_text()
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]
    assert in_child(lambda: run("denoiser", tmp_path)) == 0
    assert_same_run(tmp_path, reference("denoiser"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full to write to")
def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(NotWritten, match=r"could not write .*log.jsonl: No space left on device"),
        RunLog(tmp_path, 0, 3, "toy") as record,
    ):
        record.file = open("/dev/full", "a")  # noqa: SIM115 (the record closes it)
        record.step(1, {"loss": 1.0}, log=True)


def small_disk(place: Path, size: str, again: bool = False) -> None:
    """Mount a tmpfs for this (child) process alone.

    It exits with SKIP where the system does not let it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user, private, remount = 0x20000, 0x10000000, 0x44000, 32
    if not again:
        flags = new_namespace if os.geteuid() == 0 else new_namespace | new_user
        if libc.unshare(flags) or libc.mount(b"none", b"/", None, ctypes.c_ulong(private), None):
            sys.exit(SKIP)
    if libc.mount(
        b"tmpfs",
        os.fsencode(place),
        b"tmpfs",
        ctypes.c_ulong(remount if again else 0),
        f"size={size}".encode(),
    ):
        sys.exit(SKIP)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="a small disk is made with Linux's tmpfs"
)
@pytest.mark.parametrize("checkpoints", [0.3, 0.95, 1.5, 2.8])
def test_a_disk_that_is_really_full(
    checkpoints: float, tmp_path: Path, reference: Callable[[str], Path]
) -> None:
    """Whatever does not fit (a checkpoint, a picture, the log): one sentence; with more space the
    run goes on and ends the same.
    """
    expected = reference("denoiser")
    size = str(
        int(
            checkpoints
            * sum(f.stat().st_size for f in (expected / "checkpoints" / "step-00000007").iterdir())
        )
    )
    disk = tmp_path / "disk"
    disk.mkdir()

    def work() -> None:
        small_disk(disk, size)
        try:
            run("denoiser", disk / "run")
        except UserError as error:
            (tmp_path / "told").write_text(str(error))
        small_disk(disk, "64m", again=True)
        saved = checkpoint.steps(disk / "run" / "checkpoints")
        (tmp_path / "saved").write_text(str(saved))
        done: list[int] = []
        run("denoiser", disk / "run", on_step=done.append)
        assert done == list(range((saved or [0])[-1] + 1, 8))
        shutil.copytree(disk / "run", tmp_path / "run")

    code = in_child(work)
    if code == SKIP:
        pytest.skip("this system does not let a test mount a tmpfs")
    assert code == 0
    assert "No space left on device" in (tmp_path / "told").read_text(), "the disk was large enough"
    assert_same_run(tmp_path / "run", expected)


# ---- several processes ---------------------------------------------------------------------------


class Curve(Objective):
    """A small regression in float64 with noise, so that 2 processes and 1 differ by rounding alone;
    its examples may be in two groups.
    """

    main, stage = "curve", "train curve"

    def __init__(self, cut: int = 0) -> None:
        torch.manual_seed(0)
        self.cut = cut
        self.networks: dict[str, nn.Module] = {
            "curve": nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        }
        self.x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    @property
    def size(self) -> int:
        return len(self.x)

    @property
    def groups(self) -> tuple[range, ...]:
        return (range(self.cut), range(self.cut, self.size))

    @property
    def identity(self) -> dict[str, Any]:
        return {}

    def batch(self, indices: Tensor, draw: Draw) -> dict[str, Tensor]:
        assert (indices < self.cut).all() or (indices >= self.cut).all()
        return {"x": self.x[indices]}

    def loss(
        self,
        phase: str,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Tensor],
        step: int,
        draw: Draw,
    ) -> tuple[Tensor, dict[str, float]]:
        noisy = batch["x"] + 0.3 * draw(
            lambda n, g: torch.randn(n, 3, generator=g, dtype=torch.float64)
        )
        return (networks["curve"](noisy) - batch["x"].prod(1, keepdim=True)).square().mean(), {}


def gather(count: int, work: Callable[[int], object]) -> list[int]:
    """Exit codes of `count` processes, connected over gloo as torchrun's are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    children = [
        fork(lambda rank=rank: work(rank), RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(count)
    ]
    return [wait(child) for child in children]


def train_together(
    count: int, objective: Callable[[], Objective], settings: LoopSettings, out: Path, stop: int = 0
) -> list[int]:
    def work(rank: int) -> None:
        network = objective()

        def each(done: int) -> None:
            if done == 1 and rank == 0:
                gradients = {
                    f"{n}.{k}": p.grad
                    for n, m in network.networks.items()
                    for k, p in m.named_parameters()
                    if p.grad is not None
                }
                write_tensors(out / "gradients.safetensors", gradients)
            if done == stop:
                die()

        if rank > 0:
            checkpoint.save = die  # type: ignore[assignment]  # one process writes
        assert settings.batch_size % count == 0
        train(network, settings, out, on_step=each)

    return gather(count, work)


def test_two_processes_stop_together_at_the_signal_of_one(tmp_path: Path) -> None:
    """After the same step; one checkpoint is written, with which one process goes on."""
    settings = replace(LOOP, batch_size=8, save_every=7)

    def work(rank: int) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # scripts' jobs ignore it
        if rank > 0:
            checkpoint.save = die  # type: ignore[assignment]  # one process writes

        def each(done: int) -> None:
            if done == 3 and rank == 1:
                os.kill(os.getpid(), signal.SIGINT)

        try:
            train(Curve(), settings, tmp_path / "run", on_step=each)
        except Stopped as stopped:
            (tmp_path / str(rank)).write_text(str(stopped))

    assert gather(2, work) == [0, 0]
    words = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert words[0] == words[1] and "the checkpoint of step 4 of 7 is in" in words[0]
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4]
    stopped, whole = (train(Curve(), settings, tmp_path / name) for name in ("run", "whole"))
    pairs = zip(stopped.parameters(), whole.parameters(), strict=True)
    assert all((a - b).abs().max() < 1e-9 for a, b in pairs)


def newest(out: Path, name: str) -> dict[str, Tensor]:
    return read_tensors(
        out
        / "checkpoints"
        / f"step-{checkpoint.steps(out / 'checkpoints')[-1]:08d}"
        / f"{name}.safetensors"
    )


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.mark.parametrize("cut", [0, 13])
def test_two_processes_train_the_weights_of_one(cut: int, tmp_path: Path) -> None:
    """The same batch, the same noise, the mean gradient: equal up to rounding, also when a run goes
    over from one to two.
    """
    settings = replace(LOOP, batch_size=8, lr=1e-2, steps=12, save_every=4, log_every=3)
    assert train_together(1, lambda: Curve(cut), settings, tmp_path / "one") == [0]
    assert train_together(2, lambda: Curve(cut), settings, tmp_path / "two") == [0, 0]
    assert train_together(1, lambda: Curve(cut), settings, tmp_path / "over", stop=6) == [
        -signal.SIGKILL
    ]
    assert train_together(2, lambda: Curve(cut), settings, tmp_path / "over") == [0, 0]
    one = newest(tmp_path / "one", "curve")
    assert largest_difference(one, {k: torch.zeros_like(v) for k, v in one.items()}) > 0.1
    for other in ("two", "over"):
        assert largest_difference(one, newest(tmp_path / other, "curve")) < 1e-9
        for a, b in zip(log(tmp_path / "one"), log(tmp_path / other), strict=True):
            assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_see_the_gradient_of_the_whole_batch(kind: str, tmp_path: Path) -> None:
    """With the discriminator and its adaptive weight from the first step, with mirrored images,
    with conditions dropped.
    """
    loss = (
        AutoencoderLoss(adversarial=0.5, discriminator_width=8) if kind == "autoencoder" else None
    )
    settings = replace(LOOP, steps=3, clip=1e9)
    for count in (1, 2):
        assert (
            train_together(
                count, lambda: make(kind, dropout=0.0, loss=loss), settings, tmp_path / str(count)
            )
            == [0] * count
        )
    a, b = (read_tensors(tmp_path / str(count) / "gradients.safetensors") for count in (1, 2))
    for name in a:
        assert (a[name] - b[name]).norm() < 1e-4 * a[name].norm() + 1e-6, name
    for x, y in zip(log(tmp_path / "1"), log(tmp_path / "2"), strict=True):
        assert x == pytest.approx(y, rel=2e-2, abs=1e-3)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with pytest.raises(UserError, match="batch_size=5 does not divide among 2 processes"):
            train(Curve(), replace(LOOP, batch_size=5), tmp_path)

    assert gather(2, work) == [0, 0]


# ---- TensorBoard ---------------------------------------------------------------------------------


def test_tensorboard_shows_a_killed_run_once(tmp_path: Path) -> None:
    """Steps that were made twice, after a kill past the last checkpoint, are shown once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = replace(LOOP, save_every=4)
    assert (
        in_child(
            lambda: run(
                "denoiser", tmp_path, settings, on_step=lambda done: die() if done == 6 else None
            )
        )
        == -signal.SIGKILL
    )
    assert in_child(lambda: run("denoiser", tmp_path, settings)) == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [e.step for e in events.Scalars("denoiser/loss")] == list(range(1, 8))
