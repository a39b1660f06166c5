"""The command line, run inside this process."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from _behaviour.names import FLAGS
from _behaviour.outcome import Notes


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    from sfumato.cli import main

    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # arguments that don't parse
            code = stop.code if isinstance(stop.code, int) else 1
    return code, out.getvalue(), error.getvalue()


def renamed(arguments: tuple[str | Path, ...]) -> list[str]:
    """The arguments with flags under the names that this version's command has."""
    texts = [str(argument) for argument in arguments]
    if not any(text in FLAGS for text in texts):
        return texts
    text = run(texts[0], "--help")[1]
    there = {
        flag: next((c for c in (*others, flag) if re.search(rf"{c}\b(?!-)", text)), flag)
        for flag, others in FLAGS.items()
    }
    return [there.get(text, text) for text in texts]


def sfumato(*arguments: str | Path) -> str:
    """Standard output of a command that has to succeed."""
    code, out, error = run(*renamed(arguments))
    if code:
        raise RuntimeError(
            f"{error.strip()[-300:]} (exit code {code} of sfumato {' '.join(map(str, arguments))})"
        )
    return out


def png(file: Path) -> list[Any]:
    """The picture in a file, and its metadata as notes."""
    with Image.open(file) as opened:
        opened.load()
        texts = {}
        for key, text in dict(opened.text).items():  # pyright: ignore[reportAttributeAccessIssue]
            try:
                texts[key] = json.loads(text)
            except ValueError:
                texts[key] = text
        return [opened.copy(), Notes(texts)]
