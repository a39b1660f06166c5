"""What every test runs under: shapes checked by beartype, no network, few threads; and the bundled model where there is one."""

import os
import sys
from pathlib import Path
from typing import Any

# Before any import that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # tests compare bits, and say so when they want a GPU

from jaxtyping import install_import_hook

assert not any(name.split(".")[0] == "sfumato" for name in sys.modules), "sfumato was imported before its shapes could be checked"
install_import_hook("sfumato", "beartype.beartype")

import pytest
import torch

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
        pytest.skip("the bundled model src/sfumato/bundled/fashion has not been trained into this checkout")
    import sfumato

    return sfumato.load("fashion")
