"""Paths as users write them, and the folder of caches."""

import os
import tempfile
from pathlib import Path

from sfumato.errors import UserError


def expand_user(path: str | Path) -> Path:
    """Return a path with ~ and ~name replaced by the home folder.

    Raises:
        UserError: for the home folder of somebody who is not known here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path} begins with a home folder that is not known: write the path from / on"
        ) from error


def cache_folder(kind: str) -> Path:
    """Return the folder of one kind of cache: $XDG_CACHE_HOME/sfumato/KIND.

    The base is ~/.cache where the variable is not set, and the folder of temporary files where
    there is no home.

    Args:
        kind: Such as "kernels".
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        base = Path(tempfile.gettempdir())
    return base / "sfumato" / kind
