"""Condition: the part of the training data that a denoiser is conditioned on.

A condition reads its entry of the data and encodes it once, with a cache. In training it adds its
entry to each batch, and turns a batch into a `Conditioning`. It knows its null, which replaces it
at random (classifier-free guidance), and the prompts that a sample grid shows.

    open -> (batch -> conditioning, or null)        one file of this folder each
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from jaxtyping import Int
from torch import Tensor, nn

from sfumato.data import BucketedImages, ImageSet
from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.networks.base import Network
from sfumato.train.objective import Draw
from sfumato.train.settings import check_fields
from sfumato.types import Conditioning
from sfumato.validate import whole_number


@dataclass(frozen=True)
class WordsConfig:
    """A text transformer that is trained with the network, and its own tokenizer."""

    layers: int = 0
    """Layers; 0: there is none."""
    width: int = 192
    heads: int = 4
    vocabulary: int = 4000
    """Most word pieces, which are learned from the captions."""
    length: int = 32
    """Positions of a caption, the first and last marks among them; longer ones are cut."""

    def __post_init__(self) -> None:
        check_fields(self)
        whole_number("words.layers", self.layers, 0, 64)
        whole_number("words.width", self.width, 8, 4096)
        whole_number("words.heads", self.heads, 1, 64)
        whole_number("words.vocabulary", self.vocabulary, 100, 200_000)
        whole_number("words.length", self.length, 4, 512)
        if self.width % self.heads:
            raise UserError(
                f"words.width={self.width} does not divide among words.heads={self.heads}: "
                "choose a multiple"
            )


@dataclass(frozen=True)
class Source:
    """Everything that a condition is opened with.

    Attributes:
        images: The training images, with their classes and captions.
        network: The network to train, or its outline without weights.
        cache: Folder of the run, for what is encoded once.
        text: Folder of a text encoder; None: the recipe names none.
        words: Of a text transformer that is trained with the network.
        init: The model whose weights the run begins with; None: none.
    """

    images: ImageSet | BucketedImages
    network: Network
    cache: Path
    text: Path | None = None
    words: WordsConfig = WordsConfig()
    init: LatentDiffusion | None = None


class Condition(ABC):
    """A condition of training. A subclass is one file of this folder.

    Attributes:
        name: The name of its file.
        rank: Its place among conditions of which a run has one: the first that a source has.
        conditioner: Prompts -> `Conditioning` in the finished model.
        prompts: At least one, to show in the sample grid.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    conditioner: Conditioner
    prompts: Sequence[str | None]

    @classmethod
    @abstractmethod
    def open(cls, source: Source) -> Self | None:
        """Read and encode the condition of a source; None: the source has none of this kind.

        Raises:
            UserError: For data or a network that does not fit.
        """

    def held_out(self, images: ImageSet) -> "Condition":
        """The same condition of held-out images, which have what the training images have.

        Args:
            images: Their labels are numbered as the conditioner does.
        """
        return self

    def fields(self, network: Network) -> dict[str, Any]:
        """Fields of the config of a network that takes this condition."""
        return {}

    def batch(self, indices: Int[Tensor, " B"], draw: Draw) -> dict[str, Tensor]:
        """Entries that the condition adds to the batch of these images.

        Args:
            indices: Of the images.
            draw: Random numbers of the step.
        """
        return {}

    @abstractmethod
    def conditioning(self, batch: Mapping[str, Tensor]) -> Conditioning:
        """The `Conditioning` of a batch.

        Args:
            batch: With "label" (B,), -1 for no class, and the entries of `batch`.
        """

    @abstractmethod
    def null(self, count: int) -> Conditioning:
        """The null condition, `count` times."""

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network that is trained: with the condition's own weights, where it has some."""
        return network

    def unwrap(self, trained: nn.Module) -> tuple[nn.Module, Conditioner]:
        """The network and the conditioner of a trained or averaged `wrap`."""
        return trained, self.conditioner

    def identity(self) -> dict[str, Any]:
        """JSON of everything that decides the conditionings, for a resumed run."""
        return self.conditioner.identity()

    def record(self) -> dict[str, Any]:
        """JSON by which an unfinished run finds the conditioner again."""
        return {}
