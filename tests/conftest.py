"""Conditions of every test: shapes checked by beartype, no network, few threads; and shared
models.
"""

import os
import sys
import types
from pathlib import Path
from typing import Any, Self, get_args, runtime_checkable

# Before any import that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["SFUMATO_KERNELS"] = "fixed"  # no test depends on the times of this machine
# tests compare bits; those that need a GPU set it themselves
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import install_import_hook

assert not any(name.split(".")[0] == "sfumato" for name in sys.modules), (
    "sfumato was imported before its shapes could be checked"
)
# The hook decorates methods one by one, where beartype cannot know what Self is: it is not checked.
# An int is a fine float (PEP 484's tower).
settings = BeartypeConf(hint_overrides=FrozenDict({Self: object}), is_pep484_tower=True)


def check_types(function: Any) -> Any:
    """Apply beartype, after making protocols checkable by their methods' names."""
    waiting = list(getattr(function, "__annotations__", {}).values())
    while waiting:
        hint = waiting.pop()
        if isinstance(hint, type) and getattr(hint, "_is_protocol", False):
            runtime_checkable(hint)
        waiting += get_args(hint)
    return beartype(function, conf=settings)


checker = types.ModuleType("sfumato_typechecker")  # the hook takes a name only
checker.check = check_types  # type: ignore[attr-defined]
sys.modules[checker.__name__] = checker
install_import_hook("sfumato", "sfumato_typechecker.check")

import pytest
import torch

pytest.register_assert_rewrite("helpers")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "sfumato"


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def source() -> Path:
    """The package's folder in the checkout."""
    return SOURCE


@pytest.fixture(scope="session")
def fashion() -> Any:
    """The bundled model, loaded once."""
    if not (SOURCE / "bundled" / "fashion" / "model_index.json").exists():
        pytest.skip(
            "the bundled model src/sfumato/bundled/fashion has not been trained into this checkout"
        )
    import sfumato

    return sfumato.load("fashion")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `tiny_model` with two classes."""
    from helpers.models import tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(classes=("boot", "bag")).save(folder)
    return folder


@pytest.fixture
def working_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A fresh current folder, where the command line shows no traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFUMATO_DEBUG", raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def same_weights_every_time() -> None:
    """Networks that a test builds have the same random weights in every run, so bounds hold
    always.
    """
    torch.manual_seed(20260701)
