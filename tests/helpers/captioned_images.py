"""Small inputs of training from captions: images with captions, a T5, an autoencoder."""

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from helpers import text_encoders
from sfumato.checkpoints.families.taesd import save_taesd
from sfumato.compress.tiny import AutoencoderTiny, TinyConfig

WORDS = ("a red dog runs", "a cat sat on the mat", "two cats")
SIZES = ((16, 16), (12, 24), (24, 12))
"""(height, width)"""


def write(folder: Path, count: int = 9) -> Path:
    """Write captioned images, a model's folder with a T5, and a tiny autoencoder; return the
    folder.

    Args:
        folder: gets pictures/, t5/ (tokens 48 wide) and tiny/ (factor 2, 4 channels, two files).
        count: number of images, three of each size.
    """
    (folder / "pictures").mkdir(parents=True)
    draw = np.random.default_rng(0)
    with (folder / "pictures" / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        for k in range(count):
            pixels = draw.integers(0, 256, (*SIZES[k // 3 % 3], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / f"{k:02d}.png")
            rows.writerow([f"{k:02d}.png", WORDS[k % 3]])
    text_encoders.write(folder / "t5", "pixart_alpha")
    widths = {
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1),
    }  # fmt: skip
    (folder / "tiny").mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        save_taesd(
            folder / "tiny" / "small",
            AutoencoderTiny(TinyConfig(latent_channels=4, **widths)),
            torch.float32,
        )
    return folder
