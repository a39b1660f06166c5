"""Paths as users write them."""

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
