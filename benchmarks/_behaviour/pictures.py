"""Training pictures: opening, resizing, splitting, buckets."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from _behaviour import names
from _behaviour.outcome import Case

if TYPE_CHECKING:
    from _behaviour.context import Context


def cases(context: "Context") -> Iterator[Case]:
    """Cases of the training pictures."""
    classes, captions = (str(context.fixtures / "data" / name) for name in ("classes", "captions"))

    def opened(source: str, **options: Any) -> Any:
        images = names.call(names.attribute("data", "open_images"), source, **options)
        return [
            images.batch(torch.arange(len(images))),
            list(images.class_names),
            list(images.captions or ()),
        ]

    def both(source: str, **options: Any) -> Any:
        return [
            images.batch(torch.arange(len(images)))
            for images in names.attribute("data", "open_both")(source, 0.3, **options)
        ]

    def buckets(source: str) -> Any:
        sets = names.call(names.attribute("data", "open_buckets"), source, side=32, step=8).sets
        return [images.batch(torch.arange(len(images))) for images in sets]

    yield Case("data/classes", lambda: opened(classes))
    yield Case("data/resized, colour", lambda: opened(classes, size=20, channels=3, limit=5))
    yield Case("data/captions", lambda: opened(captions, size=24))
    yield Case("data/captions, grey", lambda: opened(captions, size=16, channels=1))
    yield Case("data/held out", lambda: both(classes, flip=True))
    yield Case("data/buckets", lambda: buckets(captions))
