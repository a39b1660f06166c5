"""JPEG files decoded at a fraction of their size before they are resized, beside whole ones.

    python benchmarks/jpeg_draft.py FOLDER --size 40     photographs as .jpg or .jpeg files
    python benchmarks/jpeg_draft.py FILE.parquet         their bytes in the column "image"

Of each photograph that is large enough for a fraction (`sfumato/data/draft.py`): the fraction, the
difference of the resized pixels from those of the whole file in dB (10 log10(255^2 / mean squared
error)) and in levels of 255, and the seconds of both ways, which take turns, in one thread.
"""

import io
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image

from _common import print_header, print_row, take_turns, timed
from sfumato.data import Transform, draft
from sfumato.data.draft import reduced


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    source: Annotated[Path, tyro.conf.Positional]
    """A folder of JPEG files, or a parquet file."""
    size: int = 40
    """Pixels along a side of the result."""
    count: int = 12
    """Photographs that are measured."""
    repeats: int = 15
    margin: int = draft.MARGIN
    """Least sides of the decoded photograph, in sides of the result."""


def photographs(source: Path) -> Iterator[bytes]:
    """Yield the bytes of JPEG files, in order of their names or rows."""
    if source.is_dir():
        names = (p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        yield from (path.read_bytes() for path in sorted(names))
        return
    import pyarrow.parquet as parquet

    for rows in parquet.ParquetFile(source).iter_batches(64, columns=["image"]):
        yield from (row["bytes"] for row in rows["image"].to_pylist())


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)
    draft.MARGIN = settings.margin
    transform = Transform(settings.size)

    def resized(data: bytes) -> np.ndarray:
        return transform.to_pixels(reduced(data, lambda shape: transform)[0])

    large = (data for data in photographs(settings.source) if reduced(data, lambda s: transform)[1])
    print_header("photograph", "sides", "decoded at", "dB", "levels", "whole, ms", "fraction, ms")
    rows: list[tuple[float, float, float]] = []
    for number, data in enumerate(islice(large, settings.count)):
        part, _ = reduced(data, lambda shape: transform)
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
        assert isinstance(part, Image.Image)
        error = resized(data).astype(float) - transform.to_pixels(data)
        quality = 10 * np.log10(255**2 / np.square(error).mean())
        ways: dict[str, Callable[[], float]] = {
            "whole": lambda data=data: timed(lambda: transform.to_pixels(data)),
            "fraction": lambda data=data: timed(lambda: resized(data)),
        }
        turns = take_turns(ways, settings.repeats)
        whole, fraction = (1000 * statistics.median(turns[way]) for way in ways)
        rows.append((quality, np.abs(error).max(), fraction / whole))
        cells = f"{quality:.1f}", f"{rows[-1][1]:.0f}", f"{whole:.2f}", f"{fraction:.2f}"
        print_row(str(number), f"{width}x{height}", f"1/{width // part.width}", *cells)
    if not rows:
        raise SystemExit(
            f"{settings.source} has no JPEG of {2 * settings.margin * settings.size} pixels"
        )
    best, levels, share = zip(*rows, strict=True)
    print(
        f"\n{len(rows)} photographs: {min(best):.0f} to {max(best):.0f} dB, at most "
        f"{max(levels):.0f} levels, {min(share):.2f} to {max(share):.2f} of the time"
    )


if __name__ == "__main__":
    main()
