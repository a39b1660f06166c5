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
from torch import Tensor

from sfumato.data import BucketedImages, ImageSet
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.networks.base import Network
from sfumato.train.objective import Draw
from sfumato.types import Conditioning


@dataclass(frozen=True)
class Source:
    """Everything that a condition is opened with.

    Attributes:
        images: The training images, with their classes and captions.
        network: The network to train, or its outline without weights.
        cache: Folder of the run, for what is encoded once.
        text: Folder of a text encoder; None: the recipe names none.
        init: The model whose weights the run begins with; None: none.
    """

    images: ImageSet | BucketedImages
    network: Network
    cache: Path
    text: Path | None = None
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

    def identity(self) -> dict[str, Any]:
        """JSON of everything that decides the conditionings, for a resumed run."""
        return self.conditioner.identity()

    def record(self) -> dict[str, Any]:
        """JSON by which an unfinished run finds the conditioner again."""
        return {}
