"""Models on disk: folders, single files and GGUF, in the layouts of the ecosystem.

    formats.open_file(path) -> RawCheckpoint -> family.read -> Checkpoint -> assemble -> model

`formats/` opens files, `families/` has one file a model family, `schedulers/` reads and writes
scheduler configs. `sfumato.load` and `model.save` are built on it. The names below are imported
when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.checkpoints.checkpoint import Checkpoint, OriginalConfig, RawCheckpoint, ReadOptions
    from sfumato.checkpoints.families.ldm_yaml import read_yaml

__all__ = ["Checkpoint", "OriginalConfig", "RawCheckpoint", "ReadOptions", "read_yaml"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sfumato.checkpoints' has no attribute {name!r}")
    home = "families.ldm_yaml" if name == "read_yaml" else "checkpoint"
    return getattr(importlib.import_module(f"sfumato.checkpoints.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
