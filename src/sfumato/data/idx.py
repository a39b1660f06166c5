"""IDX files, the format of MNIST and Fashion-MNIST.

    0x00 0x00 type(0x08 = uint8) ndim, then ndim big-endian uint32 sizes, then the values, last axis
    fastest

LeCun, yann.lecun.com/exdb/mnist; Xiao et al. 2017, arXiv:1708.07747. The standard names are
train-images-idx3-ubyte, train-labels-idx1-ubyte and the same with t10k for the test split, .gz or
not.
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

FASHION_CLASSES = tuple(
    "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(",")
)
_PREFIX = {"train": "train", "test": "t10k"}
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def fashion_mnist_folder() -> Path:
    """Find Fashion-MNIST in $SFUMATO_DATA, ./data or Debian's package, in this order.

    Raises:
        UserError: Where none of them has it.
    """
    folders = [Path("data/fashion-mnist"), _DEBIAN]
    if root := os.environ.get("SFUMATO_DATA"):
        folders.insert(0, Path(root) / "fashion-mnist")
    for folder in folders:
        if splits_of_idx(folder):
            return folder
    raise UserError(
        "fashion-mnist is not on this machine: run `apt-get install dataset-fashion-mnist`, "
        "or place the four IDX files (train-images-idx3-ubyte.gz and so on) "
        f"in one of {', '.join(map(str, folders))}"
    )


def splits_of_idx(folder: Path) -> list[str]:
    """The splits whose images a folder has; none where it has no IDX files."""
    return [s for s, prefix in _PREFIX.items() if _find(folder, f"{prefix}-images", 3)]


def idx_files(folder: Path) -> list[Path]:
    """The IDX files of images and labels that a folder has."""
    kinds = (("images", 3), ("labels", 1))
    every = (_find(folder, f"{p}-{kind}", axes) for p in _PREFIX.values() for kind, axes in kinds)
    return [path for path in every if path is not None]


def _find(folder: Path, stem: str, axes: int) -> Path | None:
    names = [f"{stem}{joint}idx{axes}-ubyte{end}" for joint in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Read an IDX file of bytes, gzipped or not.

    Args:
        path: The file.
        axes: The number of axes that it must have.

    Returns:
        A writable uint8 array of `axes` axes.

    Raises:
        UserError: For a file that is not whole or of another format.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        reason = f"{path} is a damaged gzip file ({error})"
        raise UserError(f"{reason}: copy or download it again") from error
    except OSError as error:
        reason = f"{path} cannot be read ({error.strerror})"
        raise UserError(f"{reason}: check the file and its permissions") from error
    if len(data) < 4 + 4 * axes or data[:4] != bytes([0, 0, 8, axes]):
        raise UserError(
            f"{path} starts with {data[:4].hex(' ') or 'nothing'}, expected the IDX header "
            f"00 00 08 {axes:02x}: it is another format or cut off"
        )
    sizes = tuple(int(n) for n in np.frombuffer(data, ">u4", axes, 4))
    expected, size = math.prod(sizes), len(data) - 4 - 4 * axes
    if expected != size:
        raise UserError(
            f"{path} is not whole: its header says {expected} bytes of {sizes}, "
            f"but {size} follow; copy or download it again"
        )
    return np.frombuffer(bytearray(data), np.uint8, offset=4 + 4 * axes).reshape(sizes)


def list_idx(folder: Path, split: str, name: str) -> Listing:
    """The listing of one split of a folder of IDX files; its images are uint8 (N, H, W).

    Raises:
        UserError: For an unknown split, and files that are missing or do not fit together.
    """
    prefix = _PREFIX[one_of("split", split, _PREFIX)]
    paths: list[Path] = []
    for kind, axes in (("images", 3), ("labels", 1)):
        path = _find(folder, f"{prefix}-{kind}", axes)
        if path is None:
            missing = f"{folder} has no {prefix}-{kind}-idx{axes}-ubyte(.gz)"
            raise UserError(f"{missing}, which split {split!r} needs: place it there")
        paths.append(path)
    pixels, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if pixels.size == 0:
        shape = f"its header says {pixels.shape}"
        raise UserError(f"{paths[0]} holds no image ({shape}): choose another folder")
    top = int(labels.max(initial=0))
    classes = tuple(str(n) for n in range(max(10, top + 1)))
    if "fashion" in folder.name.lower() or "fashion" in name.lower():
        classes = FASHION_CLASSES
        if top >= len(classes):
            raise UserError(
                f"{paths[1]} has a label {top}, expected 0..{len(classes) - 1}: "
                "it is damaged, or not Fashion-MNIST"
            )
    image_name = partial("image {1} of {0}".format, paths[0])
    labels = labels.astype(np.int64)
    return Listing(name, pixels, image_name, labels, classes)
