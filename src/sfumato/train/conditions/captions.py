"""Captions of the data, encoded once before the first step by a frozen text encoder."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, final

import torch
from jaxtyping import Int
from torch import Tensor

from sfumato.checkpoints.formats.folder import read_index
from sfumato.data import ImageSet
from sfumato.errors import UserError
from sfumato.io.atomic import hash_json, hash_tensors, read_tensors, write_tensors
from sfumato.io.paths import expand_user
from sfumato.io.progress import report
from sfumato.predict.conditioners import text_conditioner_class, text_encoder_classes
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.clip_text import ClipText
from sfumato.predict.conditioners.sentence_text import SentenceText
from sfumato.predict.networks.base import Network
from sfumato.train.conditions.base import Condition, Source
from sfumato.train.objective import Draw
from sfumato.types import Conditioning

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raise it when the meaning of a kept table changes."""
TABLE = ("tokens", "mask", "vector")
"""Fields of the conditioning of a text."""


@final
class Captions(Condition):
    """The conditionings of N images' captions; no text encoder runs in training.

    An image may have several captions: each visit draws one of them. Positions that neither a
    caption nor the empty prompt uses are cut off, which changes no result: a mask hides them. A
    conditioner without a mask keeps all.

    Args:
        conditioner: The text conditioner. Brackets in captions are text, also where they weigh
            words of prompts.
        captions: A text or several texts an image, at least one image.
        batch_size: Texts encoded at a time.
        cache: Folder that keeps the encoded captions, by the encoder's weights and the texts; None:
            they are not kept.

    Raises:
        UserError: For no captions.
    """

    name = "captions"
    rank = 0

    def __init__(
        self,
        conditioner: Conditioner,
        captions: Sequence[str | tuple[str, ...]],
        batch_size: int = 64,
        cache: Path | None = None,
    ):
        if not captions:
            raise UserError("no captions: expected one an image")
        self.conditioner, self._cache = conditioner, cache
        choices = [(c,) if isinstance(c, str) else c for c in captions]
        self.prompts = [text for text, _ in Counter(c[0] for c in choices).most_common(10)]
        every = [text for texts in choices for text in texts]
        texts = list(dict.fromkeys(["", *every]))  # the empty prompt is row 0
        row = {text: index for index, text in enumerate(texts)}
        self._rows = torch.tensor([row[text] for text in every])
        self._counts = torch.tensor([len(texts) for texts in choices])
        self._starts = self._counts.cumsum(0) - self._counts
        self.several = len(every) > len(choices)
        self._identity = {
            "_class_name": "captions",
            "reader": conditioner.identity(),
            "weights": hash_tensors(conditioner.tensors()),
            # one text an image is kept as text: runs of earlier versions go on
            "captions": hash_json([c[0] if len(c) == 1 else list(c) for c in choices]),
        }
        # captions are data: "miku (vocaloid)" weighs nothing
        plain = conditioner.with_prompt_weights("none")
        encoder = {"reader": plain.identity(), "weights": self._identity["weights"]}
        key = hash_json({**encoder, "texts": texts, "batch": batch_size, "format": FORMAT})
        path = None if cache is None else cache / f"{key[:32]}.safetensors"
        self._table = _read(path) or _encode(plain, texts, batch_size, path)

    @classmethod
    def open(cls, source: Source) -> Self | None:
        """The captions of the images; None where no text encoder is named.

        The encoder is that of `source.text`, or of the model that the run begins with.

        Raises:
            UserError: For images without captions, and an encoder that needs more than them.
        """
        images, init = source.images, source.init
        if init is None and source.text is None:
            return None
        if init is not None and not init.conditioner.encoders:
            return None
        if images.captions is None and init is not None:
            raise UserError(
                f"{images.name} has no captions, and the model of init is conditioned on text: "
                "expected a column or file of captions"
            )
        if images.captions is None:
            raise UserError(
                f"text={source.text}, and {images.name} has no captions: "
                "expected a column or file of them; leave text out for classes"
            )
        if init is not None:
            conditioner, place = init.conditioner, "the model of init"
        else:
            assert source.text is not None
            conditioner, place = open_text_conditioner(source.text), f"text={source.text}"
        check_text(conditioner, place)
        texts = images.caption_choices or images.captions
        return cls(conditioner, texts, cache=source.cache / "captions")

    def held_out(self, images: ImageSet) -> "Captions":
        """The first caption of each image; the empty prompt for images without captions."""
        texts = images.captions or [""] * len(images)
        return type(self)(self.conditioner, texts, cache=self._cache)

    def fields(self, network: Network) -> dict[str, Any]:
        """The widths of the text's tokens and of its pooled vector."""
        pooled = self.conditioner.null(1).vector
        width = None if pooled is None else pooled.shape[1]
        return network.text_fields(self.conditioner.width, width)

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

    def identity(self) -> dict[str, Any]:
        """JSON of everything that decides these conditionings."""
        return self._identity


def _encode(
    conditioner: Conditioner, texts: Sequence[str], batch_size: int, path: Path | None
) -> Conditioning:
    """The table of texts, written to `path`."""
    logger.info("encoding %d captions", len(texts))
    parts = []
    for start in range(0, len(texts), batch_size):
        parts.append(conditioner([*texts[start : start + batch_size]]))
        report("encoding captions", min(start + batch_size, len(texts)), len(texts))
    table = _trimmed(Conditioning.cat(parts))
    if path is not None:
        fields = {name: getattr(table, name) for name in TABLE}
        tensors = {k: v.cpu().contiguous() for k, v in fields.items() if v is not None}
        write_tensors(path, tensors)
        logger.info("the encoded captions are kept in %s", path)
    return table


def _read(path: Path | None) -> Conditioning | None:
    """A table that was written; None where there is none, or where it is damaged."""
    if path is None or not path.is_file():
        return None
    try:
        tensors = read_tensors(path)
    except UserError:
        return None
    table = Conditioning(tensors.get("tokens"), tensors.get("mask"), tensors.get("vector"))
    logger.info("encoded captions are read from %s", path)
    return table


def _trimmed(table: Conditioning) -> Conditioning:
    if table.tokens is None or table.mask is None:
        return table
    used = int(table.mask.any(0).nonzero().max()) + 1
    return replace(table, tokens=table.tokens[:, :used].clone(), mask=table.mask[:, :used].clone())


def open_text_conditioner(folder: str | Path) -> Conditioner:
    """Open the text conditioner of a folder.

    Args:
        folder: A model's, in diffusers' layout with a model_index.json, or a sentence encoder's
            own, with config.json, weights and tokenizer side by side.

    Raises:
        UserError: For another folder.
    """
    folder = expand_user(folder)
    index = folder / "model_index.json"
    if index.exists():
        classes = text_encoder_classes(read_index(folder), index)
        return text_conditioner_class(classes, folder).from_folder(folder)
    if not (folder / "config.json").exists():
        raise UserError(
            f"text={folder}: expected a model's folder with text encoders, "
            "or a sentence encoder's, which has a config.json"
        )
    return SentenceText.from_encoder(folder)


def check_text(conditioner: Conditioner, source: str) -> None:
    """Raise `UserError` for a text conditioner that needs more than captions, as SDXL's does.

    Args:
        conditioner: The text conditioner.
        source: Its place, for the message.
    """
    if isinstance(conditioner, ClipText) and conditioner.encoder_2 is not None:
        raise UserError(
            f"{source} is conditioned on the image's size beside the text, as SDXL is: training "
            "has captions alone; expected other text encoders, such as Stable Diffusion 1's or 3's"
        )
