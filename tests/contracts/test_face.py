"""The face of the package: its names are there, and importing it costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

import sfumato
from helpers.processes import run_python

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.mark.parametrize("name", sfumato.__all__)
def test_every_promised_name_is_there(name: str) -> None:
    assert getattr(sfumato, name) is not None and name in dir(sfumato)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sfumato' has no attribute 'lod'"):
        _ = sfumato.lod  # pyright: ignore[reportAttributeAccessIssue]


def test_tasks_are_functions_of_one_module() -> None:
    assert set(sfumato.tasks.__all__) <= set(vars(sfumato.tasks)) and callable(
        sfumato.tasks.inpaint
    )


def test_importing_the_package_imports_no_torch_and_takes_no_time() -> None:
    """Processor time of a fresh interpreter, the best of five."""
    program = f"""
import sys, time
sys.path.insert(0, {str(SOURCE)!r})
begin = time.process_time()
import sfumato
took = time.process_time() - begin
assert not {{"torch", "numpy", "PIL"}} & set(sys.modules), "heavy libraries are imported"
print(took)
"""
    runs = [
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        for _ in range(5)
    ]
    assert min(float(run.stdout) for run in runs) < 0.03


FACES = ("checkpoints", "compress", "decode", "diffuse", "evaluate", "predict", "sampling")
FACES += ("tasks", "train")


@pytest.mark.parametrize("room", FACES)
def test_every_export_of_a_room_is_there(room: str) -> None:
    """In a fresh interpreter, whatever file of the room is imported first."""
    program = f"""
import importlib, pkgutil
face = importlib.import_module("sfumato.{room}")
for file in pkgutil.iter_modules(face.__path__):
    importlib.import_module("sfumato.{room}." + file.name)
for name in face.__all__:
    assert not isinstance(getattr(face, name), type(face)), name + " is a module"
assert set(face.__all__) <= set(dir(face))
try:
    face.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError("an unknown name is no AttributeError")
"""
    run_python("-c", program)
