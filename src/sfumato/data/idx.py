"""IDX files, the format of MNIST and Fashion-MNIST (LeCun, yann.lecun.com/exdb/mnist; Xiao et al.
2017, arXiv:1708.07747).

    0x00 0x00 type(0x08 = uint8) ndim, then ndim big-endian uint32 sizes, then the values, last axis
    fastest

The standard names are train-images-idx3-ubyte, train-labels-idx1-ubyte and the same with t10k for
the test split, .gz or not.
"""

import gzip
import math
import os
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from sfumato.data.images import Listing
from sfumato.errors import UserError
from sfumato.validate import one_of

FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_PREFIX = {"train": "train", "test": "t10k"}
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def fashion_mnist_folder() -> Path:
    """Where Fashion-MNIST lies: $SFUMATO_DATA, ./data, Debian's package, in this order; `UserError`
    when nowhere.
    """
    places = [Path("data/fashion-mnist"), _DEBIAN]
    if root := os.environ.get("SFUMATO_DATA"):
        places.insert(0, Path(root) / "fashion-mnist")
    for place in places:
        if has_idx(place):
            return place
    raise UserError(
        "fashion-mnist is not on this machine: run `apt-get install dataset-fashion-mnist`, or place the four IDX files "
        f"(train-images-idx3-ubyte.gz and so on) in one of {', '.join(map(str, places))}"
    )


def has_idx(folder: Path) -> bool:
    """Whether a folder holds IDX images of either split."""
    return any(_find(folder, f"{prefix}-images", 3) for prefix in _PREFIX.values())


def _find(folder: Path, stem: str, axes: int) -> Path | None:
    names = [f"{stem}{joint}idx{axes}-ubyte{end}" for joint in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Reads an IDX file of bytes, gzipped or not: a writable uint8 array of `axes` axes.
    `UserError` when it is not whole.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path} is a damaged gzip file ({error}): copy or download it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check the file and its permissions"
        ) from error
    if len(data) < 4 + 4 * axes or data[:4] != bytes([0, 0, 8, axes]):
        start = data[:4].hex(" ") or "nothing"
        raise UserError(
            f"{path} starts with {start}, expected the IDX header 00 00 08 {axes:02x}: it is another format or cut off"
        )
    sizes = tuple(int(n) for n in np.frombuffer(data, ">u4", axes, 4))
    expected, found = math.prod(sizes), len(data) - 4 - 4 * axes
    if expected != found:
        raise UserError(
            f"{path} is not whole: its header says {expected} bytes of {sizes}, but {found} follow; copy or download it again"
        )
    return np.frombuffer(bytearray(data), np.uint8, offset=4 + 4 * axes).reshape(sizes)


def list_idx(folder: Path, split: str, name: str) -> tuple[Listing, np.ndarray]:
    """The listing of one split of a folder of IDX files, and its pixels, uint8 (N, H, W)."""
    prefix = _PREFIX[one_of("split", split, _PREFIX)]
    paths = {
        kind: _find(folder, f"{prefix}-{kind}", axes)
        for kind, axes in (("images", 3), ("labels", 1))
    }
    for (kind, path), axes in zip(paths.items(), (3, 1), strict=True):
        if path is None:
            raise UserError(
                f"{folder} has no {prefix}-{kind}-idx{axes}-ubyte(.gz), which split {split!r} needs: place it there"
            )
    images_path, labels_path = paths["images"], paths["labels"]
    assert images_path is not None and labels_path is not None
    pixels, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if pixels.size == 0:
        raise UserError(
            f"{images_path} holds no image (its header says {pixels.shape}): choose another folder"
        )
    top = int(labels.max(initial=0))
    if "fashion" in folder.name.lower() or "fashion" in name.lower():
        classes = FASHION_CLASSES
        if top >= len(classes):
            raise UserError(
                f"{labels_path} has a label {top}, expected 0..{len(classes) - 1}: it is damaged, or not Fashion-MNIST"
            )
    else:
        classes = tuple(str(n) for n in range(max(10, top + 1)))
    listing = Listing(
        name,
        pixels,
        partial("image {1} of {0}".format, images_path),
        labels.astype(np.int64),
        classes,
    )
    return listing, pixels
