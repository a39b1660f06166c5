"""The files of a folder: images, captions, metadata and tables; all others are counted.

A file is an image by its ending or, with an unusual one, by its first bytes. Files of systems and
programs (.DS_Store, @eaDir, __MACOSX, Thumbs.db) are no images, whatever they hold.
"""

import logging
import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from sfumato.data.reading import listed

logger = logging.getLogger(__name__)

SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .jif .webp .bmp .dib .gif .tif .tiff "
    ".ppm .pgm .pbm .pnm .jp2 .avif".split()
)
SIDECARS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SERVICE = frozenset(
    "@eadir __macosx $recycle.bin #recycle #snapshot @recycle @recently-snapshot lost+found".split()
) | {"system volume information"}
"""Folders that systems and network drives make, in lower case."""
_NEVER = (".thm", ".bak", ".tmp", ".part", ".crdownload", ".download")
"""Endings of previews, copies and unfinished downloads, which may hold an image."""
# no TIFF: cameras' raw files are TIFF files of a preview
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "JPEG2000", "AVIF")
_MASKS = ("-masklabel", "-condlabel", "_mask")
"""Ends of the names of masks beside an image, such as 1-masklabel.png of LoRA training."""
_FOREIGN = {".heic", ".heif", ".jxl", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw"}

_TABLES = {".csv", ".tsv", ".json", ".jsonl"}


@dataclass
class Tree:
    """The files below a folder.

    Attributes:
        root: The folder.
        images: In the order of their names.
        sidecars: Text files that may hold captions.
        metadata: Files named as `METADATA`.
        tables: Other parquet files.
        folders: All subfolders that were read.
        left_out: Reason -> number of files.
    """

    root: Path
    images: list[Path] = field(default_factory=list)
    sidecars: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def below(self, folder: Path) -> "Tree":
        """The part of the tree in a subfolder; nothing of it is counted as left out."""

        def inside(paths: Iterable[Path]) -> list[Path]:
            return [p for p in paths if p.is_relative_to(folder)]

        return Tree(
            folder,
            inside(self.images),
            inside(self.sidecars),
            inside(self.metadata),
            inside(self.tables),
            [f for f in inside(self.folders) if f != folder],
        )

    def leave_out(self, place: str, tables: bool = False) -> None:
        """Count the images, text files and metadata as left out, such as "beside the tables"."""
        kinds = {"images": self.images, "text files": self.sidecars, "metadata": self.metadata}
        for name, paths in {**kinds, "tables": self.tables if tables else []}.items():
            self.left_out[f"{name} {place}"] += len(paths)
        self.left_out = +self.left_out

    def report(self) -> None:
        """Log in one line the files that are left out, with their reasons."""
        if not (total := self.left_out.total()):
            return
        foreign = sorted(_FOREIGN & self.left_out.keys())
        advice = f"; convert {' and '.join(foreign)} to JPEG or PNG" if foreign else ""
        if tables := sorted(_TABLES & self.left_out.keys()):
            advice += f"; of {' and '.join(tables)} files metadata.csv and .jsonl alone are read"
        plural = "s" if total > 1 else ""
        logger.warning(
            "left out %d file%s of %s: %s%s",
            total, plural, self.root, listed(self.left_out), advice,
        )  # fmt: skip


def scan(root: Path) -> Tree:
    """Read the names of all files below a folder, behind links too.

    Raises:
        OSError: For a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    tree = Tree(root)
    visited: set[str] = set()
    for place, folders, files in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(place)
        if real in visited:  # a link to a folder that was read
            tree.left_out["folders that are links to others"] += 1
            folders.clear()
            continue
        visited.add(real)
        folder = Path(place)
        if folder != root:
            tree.folders.append(folder)
        for name in [f for f in folders if f.startswith(".") or f.lower() in _SERVICE]:
            folders.remove(name)
            tree.left_out[f"in {name}"] += sum(len(f) for _, _, f in os.walk(folder / name))
        folders.sort()
        for name in files:
            _add(tree, folder / name)
    _leave_out_masks(tree)
    for paths in (tree.images, tree.sidecars, tree.metadata, tree.tables, tree.folders):
        paths.sort()
    tree.left_out = +tree.left_out
    return tree


def _add(tree: Tree, path: Path) -> None:
    name, suffix = path.name.lower(), path.suffix.lower()
    if name.startswith("."):
        tree.left_out["hidden"] += 1
    elif _is_device(path):
        tree.left_out["no plain file"] += 1
    elif name in METADATA:
        tree.metadata.append(path)
    elif suffix == ".parquet":
        tree.tables.append(path)
    elif suffix in SIDECARS:
        tree.sidecars.append(path)
    elif suffix in SUFFIXES or (suffix not in _NEVER and name[-1] != "~" and _is_image(path)):
        tree.images.append(path)
    else:
        tree.left_out[ending(path)] += 1


def _leave_out_masks(tree: Tree) -> None:
    """Leave out masks beside their images, such as 1-masklabel.png beside 1.jpg."""
    stems = {path.with_suffix("") for path in tree.images}
    images: list[Path] = []
    for path in tree.images:
        end = next((end for end in _MASKS if path.stem.lower().endswith(end)), "")
        if end and path.with_name(path.stem[: -len(end)]) in stems:
            tree.left_out[f"{end} of an image"] += 1
        else:
            images.append(path)
    tree.images = images


def _is_device(path: Path) -> bool:
    """True for pipes, sockets and devices, on which a reader waits for ever."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:  # a link to nothing: decoding names it
        return False


def ending(path: Path) -> str:
    """The ending of a file's name in lower case, or a word that it has none."""
    return path.suffix.lower() or "without an ending"


def _is_image(path: Path) -> bool:
    """True for a file whose first bytes are those of an image that Pillow opens."""
    try:
        with Image.open(path, formats=_FORMATS):
            return True
    except Exception:  # Pillow's plugins raise errors of many kinds for other files
        return False
