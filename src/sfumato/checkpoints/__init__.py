"""Models on disk: folders, single files and GGUF, in the layouts of the ecosystem.

    formats.open_file(path) -> RawCheckpoint -> family.read -> Checkpoint -> assemble -> model

`formats/` opens files, `families/` has one file a model family, `schedulers/` reads and writes
scheduler configs. `sfumato.load` and `model.save` are built on it. The names below are imported
when they are first used.
"""

from typing import TYPE_CHECKING

from sfumato.registry import lazy_exports

if TYPE_CHECKING:
    from sfumato.checkpoints.checkpoint import (
        Checkpoint,
        OriginalConfig,
        RawCheckpoint,
        ReadOptions,
    )
    from sfumato.checkpoints.families.ldm_yaml import read_yaml

__all__ = ["Checkpoint", "OriginalConfig", "RawCheckpoint", "ReadOptions", "read_yaml"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "checkpoint": ("Checkpoint", "OriginalConfig", "RawCheckpoint", "ReadOptions"),
        "families.ldm_yaml": ("read_yaml",),
    },
)
