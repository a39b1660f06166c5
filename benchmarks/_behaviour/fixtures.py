"""Files that both versions of the code read: small random models, pictures, PNGs with metadata, and
training runs.
"""

from pathlib import Path

import numpy as np
from PIL import Image


def make(folder: Path) -> None:
    """Fills a folder that is not there yet."""
    folder.mkdir(parents=True)
    pictures(folder / "pictures")


def pictures(folder: Path) -> None:
    """Smooth random pictures, grey and colour, in two sizes, and a mask for each size."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for side in (28, 32):
        for k in range(2):
            small = draw.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            picture = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
            picture.save(folder / f"colour-{side}-{k}.png")
            picture.convert("L").save(folder / f"grey-{side}-{k}.png")
        mask = np.zeros((side, side), np.uint8)
        mask[side // 4 : side // 2 + 3, side // 3 : side - 5] = 255
        mask[side // 4, :] = 128
        Image.fromarray(mask).save(folder / f"mask-{side}.png")
