"""The wheel alone, in an environment of its own, draws an image; `make` installs only once.

The environment borrows the heavy libraries (PyTorch and the rest) of the one that runs the tests
through a .pth file, which is read after the environment's own folder: code, entry point and weights
come from the wheel.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WHEEL_LIMIT = 12 * 2**20  # bytes

pytestmark = pytest.mark.slow


def quiet_environment() -> dict[str, str]:
    """No way back to the checkout, not through PYTHONPATH or the current folder, and no word of a
    make that runs these tests.
    """
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PYTHON", "VIRTUAL_ENV", "COV_", "MAKE", "MFLAGS", "ARGS", "PROMPT"))
    }
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=quiet_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (
        f"{command} failed with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    )
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout so that no build folder is left in it."""
    pytest.importorskip(
        "setuptools", reason="building the wheel needs setuptools (the test extra brings it)"
    )
    if not (ROOT / "README.md").exists():
        pytest.skip("this checkout has no README.md, which the wheel's metadata needs")
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(
        ROOT / "src",
        copy / "src",
        ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "*.tmp"),
    )
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        ".",
        cwd=copy,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a bare environment that has the wheel, and the outer environment's
    libraries behind it.
    """
    home = tmp_path_factory.mktemp("env")
    venv.create(home, with_pip=False, symlinks=True)
    binaries = home / "bin"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        binaries / "python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=home,
    )
    own = Path(
        run(
            binaries / "python",
            "-c",
            "import sysconfig; print(sysconfig.get_path('purelib'))",
            cwd=home,
        ).stdout.strip()
    )
    # A plain path is appended to sys.path without reading the .pth files in it: an editable install
    # there stays unseen.
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return binaries


def test_the_wheel_is_small_and_carries_the_bundled_files(wheel: Path) -> None:
    assert wheel.stat().st_size <= WHEEL_LIMIT, (
        f"{wheel.name} weighs {wheel.stat().st_size / 2**20:.1f} MiB"
    )
    inside = set(zipfile.ZipFile(wheel).namelist())
    here = {
        str(f.relative_to(ROOT / "src"))
        for f in (ROOT / "src" / "sfumato").rglob("*")
        if f.suffix in (".py", ".json", ".safetensors")
    }
    assert here | {"sfumato/py.typed"} <= inside, f"left behind: {sorted(here - inside)}"
    assert not [name for name in inside if name.startswith(("tests", "recipes", "benchmarks"))]


def test_the_wheel_names_its_licence_and_lean_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    assert "License-Expression: Apache-2.0" in lines
    needs = {
        line.split(": ")[1].split(">")[0].strip()
        for line in lines
        if line.startswith("Requires-Dist") and "extra ==" not in line
    }
    assert needs == {
        "torch",
        "numpy",
        "pillow",
        "safetensors",
        "huggingface_hub",
        "jaxtyping",
        "tyro",
        "rich",
    }


def test_the_installed_command_is_the_wheels_own(installed: Path, tmp_path: Path) -> None:
    where = run(
        installed / "python", "-c", "import sfumato; print(sfumato.__file__)", cwd=tmp_path
    ).stdout.strip()
    assert Path(where).is_relative_to(installed.parent)
    assert "generate" in run(installed / "sfumato", "--help", cwd=tmp_path).stdout
    command = ("train", "denoiser", "fashion_mnist", "--help")  # a recipe, without the repository
    assert "--loop.steps" in run(installed / "sfumato", *command, cwd=tmp_path).stdout


def test_the_runtime_needs_no_extra(installed: Path, tmp_path: Path) -> None:
    """Every library that `generate` loads is one of the eight that the wheel names, or comes with
    them.
    """
    if not (ROOT / "src/sfumato/bundled/fashion/model_index.json").exists():
        pytest.skip(
            "the bundled model src/sfumato/bundled/fashion has not been trained into this checkout"
        )
    extras = [
        "accelerate",
        "beartype",
        "datasets",
        "diffusers",
        "hypothesis",
        "matplotlib",
        "pandas",
        "pyarrow",
        "scipy",
        "tensorboard",
    ]
    extras += ["torchmetrics", "transformers"]
    program = f"""
import sys
from sfumato.cli import main
sys.modules.update(dict.fromkeys({extras!r}))  # importing a module that is None is an ImportError
sys.exit(main(['generate', 'sandal', '--n', '1', '--steps', '2']))
"""
    run(installed / "python", "-c", program, cwd=tmp_path)


def test_the_wheel_alone_draws_a_sandal(installed: Path, tmp_path: Path) -> None:
    if not (ROOT / "src/sfumato/bundled/fashion/model_index.json").exists():
        pytest.skip(
            "the bundled model src/sfumato/bundled/fashion has not been trained into this checkout"
        )
    out = run(installed / "sfumato", "generate", "sandal", "--n", "4", cwd=tmp_path).stdout
    assert out.splitlines()[0] == "sandal-seed0.png"
    with Image.open(tmp_path / "sandal-seed0.png") as picture:
        low, high = picture.convert("L").getextrema()
        assert high - low > 100, "the picture is flat"
        first = picture.tobytes()
    run(installed / "sfumato", "generate", "--from", "sandal-seed0.png", cwd=tmp_path)
    with Image.open(tmp_path / "sandal-seed0-again.png") as picture:
        assert picture.tobytes() == first


def test_make_installs_once_and_calls_the_environments_own_command(tmp_path: Path) -> None:
    """`make -n` prints the commands.

    After an install it is the command itself; after a new constraint, the install.
    """
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    fresh = run("make", "-n", "generate", cwd=tmp_path).stdout
    assert "-m venv .venv" in fresh and "-c constraints.txt -e ." in fresh
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    again = run("make", "-n", "generate", cwd=tmp_path).stdout.strip().splitlines()
    assert again == ['.venv/bin/sfumato generate "$PROMPT"']
    stamp = (tmp_path / ".venv" / ".installed").stat().st_mtime
    os.utime(tmp_path / "constraints.txt", (stamp + 10, stamp + 10))
    assert "-c constraints.txt -e ." in run("make", "-n", "generate", cwd=tmp_path).stdout


def test_make_hands_the_prompt_over_whole(tmp_path: Path) -> None:
    """Quotes and spaces of a prompt reach the command as they are."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    command = tmp_path / ".venv" / "bin" / "sfumato"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    command.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    prompt = 'a "red" boot; it\'s new & shiny'
    assert (
        run("make", "generate", f"PROMPT={prompt}", "ARGS=--n 4", cwd=tmp_path).stdout
        == f"<generate><{prompt}><--n><4>"
    )
