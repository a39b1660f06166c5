"""Texts of images as a condition: a table with a row a text, of which a batch takes some."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sfumato.data import BucketedImages, ImageSet
from sfumato.errors import UserError
from sfumato.predict.networks.base import Network
from sfumato.train.conditions.base import Condition
from sfumato.train.objective import Draw
from sfumato.types import Conditioning

Choices = Sequence[str | tuple[str, ...]]
"""A text or several texts an image."""


class Texts(Condition):
    """A condition of N images' texts.

    An image may have several: each visit draws one of them. Positions that neither a text nor the
    empty one uses are cut off, which changes no result: a mask hides them.

    Args:
        choices: A text or several texts an image, at least one image.

    Raises:
        UserError: For no texts.
    """

    def __init__(self, choices: Choices):
        if not choices:
            raise UserError("no captions: expected one an image")
        self.choices = [(c,) if isinstance(c, str) else c for c in choices]
        self.prompts = [text for text, _ in Counter(c[0] for c in self.choices).most_common(10)]
        every = [text for texts in self.choices for text in texts]
        texts = list(dict.fromkeys(["", *every]))  # the empty text is row 0
        row = {text: index for index, text in enumerate(texts)}
        self._rows = torch.tensor([row[text] for text in every])
        self._counts = torch.tensor([len(texts) for texts in self.choices])
        self._starts = self._counts.cumsum(0) - self._counts
        self.several = len(every) > len(self.choices)
        self._table = self.encode(texts)

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """The table of different texts, the empty one first."""

    def __len__(self) -> int:
        return len(self._counts)

    def choose(self, images: Int[Tensor, " B"], draw: Draw) -> Int[Tensor, " B"]:
        """Indices of images (B,) -> indices of captions, one of each image's own.

        Nothing is drawn where every image has one caption.
        """
        if not self.several:
            return images
        share = draw(lambda n, generator: torch.rand(n, generator=generator))
        counts = self._counts[images]
        return self._starts[images] + (share * counts).long().clamp(max=counts - 1)

    def batch(self, indices: Int[Tensor, " B"], draw: Draw) -> dict[str, Tensor]:
        """The index of a caption of each image, as "caption" (B,)."""
        return {"caption": self.choose(indices, draw)}

    def conditioning(self, batch: Mapping[str, Tensor]) -> Conditioning:
        """The encoded captions of a batch."""
        return self.from_labels(batch["caption"].cpu())

    def from_labels(self, labels: Int[Tensor, " B"]) -> Conditioning:
        """Indices of captions (B,), of all images one after the other -> `Conditioning`."""
        return self._table[self._rows[labels]]

    def null(self, count: int) -> Conditioning:
        """The empty prompt, `count` times."""
        return self._table[torch.zeros(count, dtype=torch.int64)]

    def fields(self, network: Network) -> dict[str, Any]:
        """The widths of the text's tokens and of its pooled vector."""
        vector = self.conditioner.null(1).vector
        width = None if vector is None else vector.shape[1]
        return network.text_fields(self.conditioner.width, width)


def texts_of(images: ImageSet | BucketedImages) -> Choices | None:
    """The captions of images, all of each; None where there are none."""
    return images.caption_choices or images.captions


def trimmed(table: Conditioning) -> Conditioning:
    """The table without positions that no row uses."""
    if table.tokens is None or table.mask is None:
        return table
    used = int(table.mask.any(0).nonzero().max()) + 1
    return replace(table, tokens=table.tokens[:, :used].clone(), mask=table.mask[:, :used].clone())
