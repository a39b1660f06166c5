"""Where pictures are written, under which names, and what their files remember of the model and the
machine.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.model import LatentDiffusion


def provenance(
    name: str, model: "LatentDiffusion", threads: int, torch_version: str
) -> dict[str, Any]:
    """What a PNG remembers of the model and the machine."""
    from sfumato import __version__

    return {
        "model": name,
        "model_hash": model.hash,
        "version": __version__,
        "torch": torch_version,
        "threads": threads,
    }


def target(out: Path | None, name: str) -> Path:
    """The PNG to write, of that name if `out` does not say another; with several pictures their
    numbers are added to it.
    """
    if out is None:
        return Path(f"{name}.png")
    if out.is_dir():
        return out / f"{name}.png"
    if out.suffix.lower() not in ("", ".png"):
        raise UserError(
            f"--out {out} ends in {out.suffix}: pictures are written as PNG, which keeps parameters; name it {out.with_suffix('.png')}"
        )
    parent = next((p for p in out.absolute().parents if p.exists()), Path("/"))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"--out {out} cannot be written: {parent} is not a folder that you may write to; choose another place"
        )
    return out if out.suffix else out.with_name(out.name + ".png")


def slug(prompt: str | None) -> str:
    """A file name for a prompt: 'Ankle boot, red!' -> 'ankle-boot-red'."""
    words = re.sub(r"[\W_]+", "-", (prompt or "").lower()).strip("-")
    # file systems allow 255 bytes, numbers and temporary names come on top
    while len(words.encode()) > 100:
        words = words[:-1]
    return words.strip("-") or "sfumato"


def set_threads(asked: int | None, recorded: Any) -> None:
    """As many threads as asked for, or as the PNG was made with where this machine has them: sums
    may be split by threads.
    """
    import torch

    if asked is not None:
        torch.set_num_threads(asked)
    elif isinstance(recorded, int) and 0 < recorded <= (os.cpu_count() or 1):
        torch.set_num_threads(recorded)
