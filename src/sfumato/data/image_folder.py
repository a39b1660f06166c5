"""Folders of images: one subfolder a class, or flat, with optional captions.

The layout is that of Hugging Face's `imagefolder`: an optional train/ or test/ level, then classes,
then files. Captions are read from metadata.csv or metadata.jsonl beside the images.
"""

import csv
import io
import json
import os
from pathlib import Path

from sfumato.data.images import Listing
from sfumato.errors import UserError, unknown

SUFFIXES = frozenset(".png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .jp2 .avif".split())
CAPTIONS = ("text", "caption", "prompt", "description")
_SPLITS = ("train", "test", "validation", "val")


def list_folder(path: Path, split: str, limit: int | None, on_error: str) -> Listing:
    """List the images of a folder in the order of their names.

    Labels come from subfolders and captions from metadata.

    Raises:
        UserError: For an unknown split, a folder without images, images beside class subfolders,
            and, with on_error="raise", metadata that do not fit the files.
    """
    root = _split_folder(path, split)
    files, metadata = _image_files(root), _read_metadata(root)
    if not files and not metadata:
        suffixes = ", ".join(sorted({p.suffix for p in root.rglob("*") if p.is_file()}))
        raise UserError(
            f"{root} holds no images (found {suffixes or 'nothing'}): "
            "expected files such as .png, .jpg or .webp"
        )
    skipped: list[tuple[str, str]] = []
    if metadata:
        files, skipped = _match(root, files, metadata, on_error)
    files = files[:limit]
    labels, classes = _classes(root, files, strict=not metadata)
    captions = [metadata[f.relative_to(root).as_posix()] for f in files] if metadata else None
    name, image_name = path.resolve().name, tuple(map(str, files)).__getitem__
    return Listing(name, tuple(files), image_name, labels, classes, captions, tuple(skipped))


def _split_folder(path: Path, split: str) -> Path:
    splits = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name in _SPLITS)
    if split in splits:
        return path / split
    if splits or split != "train":  # a folder without split subfolders is all training data
        raise unknown(f"split of {path}", split, splits or ["train"])
    return path


def _image_files(root: Path) -> list[Path]:
    paths: list[Path] = []
    visited: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):  # class folders are often links
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [f for f in folders if not f.startswith(".")]
        visible = (Path(folder, f) for f in files if not f.startswith("."))
        paths += [path for path in visible if path.suffix.lower() in SUFFIXES]
    return sorted(paths)


def _classes(
    root: Path, files: list[Path], strict: bool
) -> tuple[list[int] | None, tuple[str, ...]]:
    """Labels, when all images lie in subfolders.

    With captions, a single subfolder ("images/") is storage and not a class.
    """
    folders = [f.relative_to(root).parts[0] if f.parent != root else None for f in files]
    names = sorted({f for f in folders if f is not None})
    if None in folders:
        if strict and names:
            raise UserError(
                f"{root} has images both directly in it and in subfolders "
                f"({', '.join(names[:5])}): "
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
    """Images that have a caption; images without, and captions without, are errors or skipped."""
    names = {f.relative_to(root).as_posix(): f for f in files}
    missing, unlisted = "metadata lists it but the file is missing", "it has no row in metadata"
    problems = [(str(root / n), missing) for n in metadata if n not in names]
    problems += [(str(f), unlisted) for n, f in names.items() if n not in metadata]
    if problems and on_error == "raise":
        name, reason = problems[0]
        advice = "complete the metadata, or open with on_error='skip' to leave them out"
        raise UserError(f"{name}: {reason} ({len(problems)} such in all); {advice}")
    return [f for n, f in names.items() if n in metadata], problems


def _read_metadata(root: Path) -> dict[str, str]:
    """file_name -> caption, from metadata.csv or metadata.jsonl; empty when there is neither."""
    paths = (root / "metadata.jsonl", root / "metadata.csv")
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            # not splitlines: a quoted caption may hold a line break
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        reason = f"{path} cannot be read ({error})"
        raise UserError(f"{reason}: expected one row an image with file_name and text") from error
    captions: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        column = next(
            (c for c in CAPTIONS if isinstance(row, dict) and isinstance(row.get(c), str)), None
        )
        if column is None or not isinstance(row.get("file_name"), str):
            raise UserError(
                f"row {number} of {path} lacks file_name or a caption: "
                f"expected file_name and one of {', '.join(CAPTIONS)}"
            )
        captions[row["file_name"]] = row[column]
    return captions
