"""Folders of images: one subfolder a class, or flat, with optional captions.

The layout is that of Hugging Face's `imagefolder`: an optional level of splits (train/, test/,
validation/), then classes, then files. `metadata.py` reads captions and classes of files.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sfumato.data.columns import Captions, empty_note
from sfumato.data.images import Listing
from sfumato.data.metadata import Notes, composed, file_key, read_notes
from sfumato.data.reading import Reading, Splits, canonical_split, is_split, listed
from sfumato.data.scan import Tree
from sfumato.errors import UserError
from sfumato.io.atomic import hash_json

logger = logging.getLogger(__name__)

_STORAGE = frozenset("image images img imgs jpegimages photo photos picture pictures".split())
"""Names of folders that hold the images themselves, in lower case: no class is called so."""
_REPEATS = re.compile(r"\d+_\S.*")
"""Folders as in LoRA training, such as "10_sks cat": 10 repeats of each image."""


def folder_splits(tree: Tree, on_error: str, reading: Reading) -> Splits:
    """The splits of a folder of images, which are listed in the order of their names.

    Raises:
        UserError: For a folder without images, and where two readings are possible. A listing also
            raises it for images beside class subfolders and, with on_error="raise", for captions
            that do not fit the files.
    """
    root, groups = tree.root, _groups(tree)
    if not tree.images and not tree.metadata:
        texts = Counter(path.suffix.lower() for path in tree.sidecars)
        holds = listed(tree.left_out + texts) or "nothing"
        raise UserError(
            f"{root} holds no images (found {holds}): expected files such as .png, .jpg or .webp"
        )
    folders = [name for name in groups if name is not None and is_split(name)]
    others = [name for name in groups if name not in folders]
    if reading.layout in ("classes", "flat") or not folders:
        if reading.layout == "splits":
            raise UserError(
                f"{root} has no folders of splits (layout=splits): expected train/ and, if you "
                "like, test/ or validation/"
            )
        return {"train": partial(_listing, tree, root, on_error, reading)}
    if others and reading.layout == "auto":
        more = ", ".join(f"{name}/" for name in others if name) or "images beside it"
        raise UserError(
            f"{root} has {_slashes(folders)}, which may be splits, and {more}: give "
            "layout=splits to read the splits alone, or layout=classes if all are classes"
        )
    for path in (*tree.images, *tree.sidecars, *tree.metadata):
        name = _top(tree, path)
        # each split reads metadata of the folder above it
        if name not in folders and (name is not None or path not in tree.metadata):
            place = f"in {name}/" if name else "beside the splits"
            tree.left_out[f"{place} (no split)"] += 1
    named: dict[str, list[str]] = {}
    for name in folders:
        named.setdefault(canonical_split(name), []).append(name)
    for split, names in named.items():
        if len(names) > 1:
            raise UserError(
                f"{root} has {_slashes(names)}, which all mean the split {split}: keep one of "
                "them, or give layout=classes if all are classes"
            )
    tree.report()
    counts = {split: len(groups[name]) for split, (name,) in named.items()}
    logger.info("splits of %s, by its folders: %s", root, listed(counts))
    return {
        split: partial(_listing, tree, root / name, on_error, reading)
        for split, (name,) in named.items()
    }


def _slashes(names: Sequence[str]) -> str:
    return " and ".join(f"{name}/" for name in names)


def _groups(tree: Tree) -> dict[str | None, list[Path]]:
    """The images of each subfolder of a tree's root; None: those directly in it."""
    groups: dict[str | None, list[Path]] = {}
    for path in tree.images:
        groups.setdefault(_top(tree, path), []).append(path)
    return groups


def _top(tree: Tree, path: Path) -> str | None:
    """The subfolder of a tree's root that a file lies in; None: directly in the root."""
    parts = path.relative_to(tree.root).parts
    return parts[0] if len(parts) > 1 else None


def _listing(whole: Tree, root: Path, on_error: str, reading: Reading) -> Listing:
    if root == whole.root:
        tree = replace(whole, left_out=Counter(whole.left_out))
        parent = Path(os.path.abspath(root)).parent
    else:
        tree, parent = whole.below(root), whole.root
        above = [p for p in whole.metadata if p.parent == parent]
        if above and tree.metadata:
            both = f"{above[0]} and {tree.metadata[0]}"
            raise UserError(f"{both} may both describe the images of {root}: keep one of them")
    notes = read_notes(tree, reading, parent, outside=root == whole.root)
    tree.report()
    excluded = {name for name, _ in notes.problems}
    if notes.problems and on_error == "raise":
        name, reason = notes.problems[0]
        raise UserError(
            f"{name}: {reason} ({len(notes.problems)} such in all); complete the captions, or "
            "open with on_error='skip' to leave these out (evaluate --on-error skip, "
            "train --data.on-error skip)"
        )
    files = [f for f in tree.images if str(f) not in excluded]
    labels, classes, origin = _classes(tree, files, notes, reading)
    captions: list[Captions] | None = None
    if notes.captions is not None:
        captions = [notes.captions[f] for f in files]
    parts = (origin, notes.origin, empty_note(labels, captions))
    described = [f"{len(files)} image{'s' if len(files) != 1 else ''}", *filter(None, parts)]
    logger.info("%s: %s", root, "; ".join(described))
    names = [file_key(f.relative_to(root).as_posix()) for f in files]
    return Listing(
        whole.root.resolve().name, tuple(files), tuple(map(str, files)).__getitem__, labels,
        classes, captions, notes.problems, identity=hash_json(names),
    )  # fmt: skip


def _classes(
    tree: Tree, files: Sequence[Path], notes: Notes, reading: Reading
) -> tuple[list[int] | None, tuple[str, ...], str]:
    """Labels of metadata, or of subfolders; class names; and where they are from."""
    by_folder, names = _folder_classes(tree, files, notes, reading)
    if notes.labels is None:
        if by_folder is None:
            return None, (), "no classes"
        shown = listed([*names])
        return by_folder, names, f"{len(names)} classes from subfolders ({shown})"
    labels = [notes.labels[f] for f in files]
    own = [composed(notes.class_names[k]) if k >= 0 else None for k in labels]
    if by_folder is not None and [names[k] for k in by_folder] != own:
        raise UserError(
            f"{tree.root} has subfolders ({listed([*names])}) and a column of other classes: "
            "give layout=flat for the column, or label_column=none for the subfolders"
        )
    return labels, notes.class_names, f"{len(notes.class_names)} classes"


def _folder_classes(
    tree: Tree, files: Sequence[Path], notes: Notes, reading: Reading
) -> tuple[list[int] | None, tuple[str, ...]]:
    """Labels, when all images lie in subfolders.

    With captions, a single subfolder is storage and not a class; one called "images" always is.
    """
    root, plain = tree.root, notes.captions is None and notes.labels is None
    folders = [_top(tree, f) for f in files]
    names = sorted({f for f in folders if f is not None})
    if repeats := [name for name in names if _REPEATS.fullmatch(name)]:
        logger.warning(
            "numbers in names of folders (%s) are no repeats here: each image counts once, and a "
            "class has the whole name", listed(repeats),
        )  # fmt: skip
    if reading.layout == "flat":
        return None, ()
    if None in folders:
        if names and (plain or reading.layout == "classes"):
            raise UserError(
                f"{root} has images both directly in it and in subfolders "
                f"({', '.join(names[:5])}): move all of them into class subfolders, open one "
                "subfolder, or give layout=flat, in which subfolders mean nothing"
            )
        return None, ()
    if reading.layout != "classes" and len(names) < 2:
        if not plain:
            return None, ()
        inner = sorted({p[1] for f in files if len(p := f.relative_to(root).parts) > 2})
        if inner and len(names) == 1 and len(inner) + (root / names[0] in _parents(files)) > 1:
            raise UserError(
                f"{root} holds one folder, {names[0]}/, with folders in it ({listed(inner)}): "
                f"open {root / names[0]}, or give layout=classes for one class, or layout=flat "
                "for none"
            )
    if reading.layout == "auto":
        if storage := [name for name in names if name.lower() in _STORAGE]:
            if len(names) == 1:
                return None, ()
            others = [name for name in names if name not in storage[:1]]
            raise UserError(
                f"{root} has {storage[0]}/, which may be all images, and {_slashes(others[:5])}, "
                f"which may be masks or other images of them: open {root / storage[0]}, or give "
                "layout=classes if all are classes, or layout=flat if all are images alike"
            )
        _refuse_splits_of_classes(root, files)
    empty = {f.relative_to(root).parts[0] for f in tree.folders} - {*names}
    if empty:
        logger.warning(
            "folders of %s without a readable image are no classes: %s",
            root, listed(sorted(empty)),
        )  # fmt: skip
    classes = tuple(dict.fromkeys(map(composed, names)))
    number = {name: classes.index(composed(name)) for name in names}
    return [number[f] for f in folders if f is not None], classes


def _refuse_splits_of_classes(root: Path, files: Sequence[Path]) -> None:
    """Refuse cat/train/ and cat/test/: as one class, test images would be trained on."""
    parts = (f.relative_to(root).parts for f in files)
    inner = {p[1]: p[0] for p in parts if len(p) > 2}
    if all(map(is_split, inner)) and any(canonical_split(name) != "train" for name in inner):
        shown = listed(sorted(f"{above}/{name}" for name, above in inner.items()))
        raise UserError(
            f"{root} has folders in its classes that may be splits ({shown}): move them above the "
            "classes (train/, test/), or give layout=classes to read all images of a class alike"
        )


def _parents(files: Sequence[Path]) -> set[Path]:
    return {f.parent for f in files}
