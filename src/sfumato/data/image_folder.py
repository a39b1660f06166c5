"""Folders of pictures: one subfolder a class, or flat; captions from metadata.csv or metadata.jsonl
beside them.

The layout is that of Hugging Face's `imagefolder`: an optional train/ or test/ level, then classes,
then files.
"""

import csv
import io
import json
import os
from pathlib import Path

from sfumato.data.images import Listing
from sfumato.errors import UserError, unknown

SUFFIXES = frozenset(
    [
        ".png",
        ".jpg",
        ".jpeg",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".jp2",
        ".avif",
    ]
)
CAPTIONS = ("text", "caption", "prompt", "description")
_SPLITS = ("train", "test", "validation", "val")


def list_folder(path: Path, split: str, limit: int | None, on_error: str) -> Listing:
    """The pictures of a folder in the order of their names, with labels from subfolders and
    captions from metadata.
    """
    root = _split_folder(path, split)
    files = _pictures(root)
    metadata = _read_metadata(root)
    if not files and not metadata:
        suffixes = sorted({p.suffix for p in root.rglob("*") if p.is_file()})
        raise UserError(
            f"{root} holds no pictures (found {', '.join(suffixes) or 'nothing'}): expected files such as .png, .jpg or .webp"
        )
    skipped: list[tuple[str, str]] = []
    if metadata:
        files, skipped = _match(root, files, metadata, on_error)
    files = files[:limit]
    labels, classes = _classes(root, files, strict=not metadata)
    captions = [metadata[str(f.relative_to(root).as_posix())] for f in files] if metadata else None
    return Listing(
        path.resolve().name,
        tuple(files),
        tuple(map(str, files)).__getitem__,
        labels,
        classes,
        captions,
        tuple(skipped),
    )


def _split_folder(path: Path, split: str) -> Path:
    splits = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name in _SPLITS)
    if split in splits:
        return path / split
    if splits or split != "train":  # a folder without split subfolders is all training data
        raise unknown(f"split of {path}", split, splits or ["train"])
    return path


def _pictures(root: Path) -> list[Path]:
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, files in os.walk(root, followlinks=True):  # class folders are often links
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else [f for f in folders if not f.startswith(".")]
        found += (
            []
            if real in seen
            else [
                Path(here, f)
                for f in files
                if Path(f).suffix.lower() in SUFFIXES and not f.startswith(".")
            ]
        )
        seen.add(real)
    return sorted(found)


def _classes(
    root: Path, files: list[Path], strict: bool
) -> tuple[list[int] | None, tuple[str, ...]]:
    """Labels when all pictures lie in subfolders. With captions, a single subfolder ("images/") is
    storage and not a class.
    """
    folders = [f.relative_to(root).parts[0] if f.parent != root else None for f in files]
    names = sorted({f for f in folders if f is not None})
    if None in folders:
        if strict and names:
            raise UserError(
                f"{root} has pictures both directly in it and in subfolders ({', '.join(names[:5])}): "
                "move all of them into class subfolders, or open one subfolder"
            )
        return None, ()
    if not strict and len(names) < 2:
        return None, ()
    number = {name: i for i, name in enumerate(names)}
    return [number[f] for f in folders if f is not None], tuple(names)


def _match(
    root: Path, files: list[Path], metadata: dict[str, str], on_error: str
) -> tuple[list[Path], list[tuple[str, str]]]:
    """Pictures that have a caption; those without, and captions without a picture, are errors or
    skipped.
    """
    names = {str(f.relative_to(root).as_posix()): f for f in files}
    problems = [
        (str(root / n), "metadata lists it but the file is missing")
        for n in metadata
        if n not in names
    ]
    problems += [
        (str(f), "it has no row in metadata") for n, f in names.items() if n not in metadata
    ]
    if problems and on_error == "raise":
        name, reason = problems[0]
        advice = "complete the metadata, or open with on_error='skip' to leave them out"
        raise UserError(f"{name}: {reason} ({len(problems)} such in all); {advice}")
    return [f for n, f in names.items() if n in metadata], problems


def _read_metadata(root: Path) -> dict[str, str]:
    """file_name -> caption, from metadata.csv or metadata.jsonl; empty when there is neither."""
    for path in (root / "metadata.jsonl", root / "metadata.csv"):
        if path.is_file():
            break
    else:
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            # not splitlines: a quoted caption may hold a line break
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read ({error}): expected one row a picture with file_name and text"
        ) from error
    captions: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        column = next(
            (c for c in CAPTIONS if isinstance(row, dict) and isinstance(row.get(c), str)), None
        )
        if column is None or not isinstance(row.get("file_name"), str):
            raise UserError(
                f"row {number} of {path} lacks file_name or a caption: expected file_name and one of {', '.join(CAPTIONS)}"
            )
        captions[row["file_name"]] = row[column]
    return captions
