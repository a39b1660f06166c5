"""Captions of the data, encoded once before the first step by a frozen text encoder."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, final

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
from sfumato.train.conditions._texts import Choices, Texts, texts_of, trimmed
from sfumato.train.conditions.base import Source
from sfumato.types import Conditioning

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raise it when the meaning of a kept table changes."""
TABLE = ("tokens", "mask", "vector")
"""Fields of the conditioning of a text."""


@final
class Captions(Texts):
    """The conditionings of N images' captions; no text encoder runs in training.

    A conditioner without a mask keeps all positions.

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
    rank = 1

    def __init__(
        self,
        conditioner: Conditioner,
        captions: Choices,
        batch_size: int = 64,
        cache: Path | None = None,
    ):
        self.conditioner, self._cache, self._batch_size = conditioner, cache, batch_size
        self._weights = hash_tensors(conditioner.tensors())
        super().__init__(captions)

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """The states of the frozen encoder, from the cache where it has them."""
        # captions are data: "miku (vocaloid)" weighs nothing
        plain = self.conditioner.with_prompt_weights("none")
        encoder = {"reader": plain.identity(), "weights": self._weights}
        key = hash_json({**encoder, "texts": texts, "batch": self._batch_size, "format": FORMAT})
        path = None if self._cache is None else self._cache / f"{key[:32]}.safetensors"
        return _read(path) or _encode(plain, texts, self._batch_size, path)

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
        texts = texts_of(images)
        assert texts is not None
        return cls(conditioner, texts, cache=source.cache / "captions")

    def held_out(self, images: ImageSet) -> "Captions":
        """The first caption of each image; the empty prompt for images without captions."""
        texts = images.captions or [""] * len(images)
        return type(self)(self.conditioner, texts, cache=self._cache)

    def identity(self) -> dict[str, Any]:
        """JSON of everything that decides these conditionings."""
        return {
            "_class_name": "captions",
            "reader": self.conditioner.identity(),
            "weights": self._weights,
            # one text an image is kept as text: runs of earlier versions go on
            "captions": hash_json([c[0] if len(c) == 1 else list(c) for c in self.choices]),
        }


def _encode(
    conditioner: Conditioner, texts: Sequence[str], batch_size: int, path: Path | None
) -> Conditioning:
    """The table of texts, written to `path`."""
    logger.info("encoding %d captions", len(texts))
    parts = []
    for start in range(0, len(texts), batch_size):
        parts.append(conditioner([*texts[start : start + batch_size]]))
        report("encoding captions", min(start + batch_size, len(texts)), len(texts))
    table = trimmed(Conditioning.cat(parts))
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
