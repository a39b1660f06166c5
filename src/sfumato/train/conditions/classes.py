"""Classes of the data: folders, or a column of labels.

A run that begins with a model (--init) keeps its classes. Classes are found by their names; those
that the model lacks come behind its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from sfumato.data import BucketedImages, ImageSet
from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.base import ClassConditioner
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.predict.networks.base import Network
from sfumato.train.conditions.base import Condition, Source
from sfumato.types import Conditioning


class Classes(Condition):
    """The class of each image, by its label in the batch.

    Args:
        conditioner: Of the classes, in the order of the labels.
        prompts: Classes to show; None: all.
    """

    name = "classes"
    rank = 2
    conditioner: ClassConditioner

    def __init__(self, conditioner: ClassConditioner, prompts: Sequence[str | None] | None = None):
        self.conditioner = conditioner
        self.prompts = conditioner.class_names if prompts is None else prompts

    @classmethod
    def open(cls, source: Source) -> Self | None:
        """The classes of the images, or those of the model that the run begins with.

        Raises:
            UserError: For images without the classes that this model has.
        """
        images = source.images
        if source.init is not None:
            conditioner = _initial(images, source.init)
            if conditioner is None:
                return None
            _relabel(images, conditioner)
            return cls(conditioner, images.class_names)
        if not images.class_names or images.labels is None:
            return None
        return cls(ClassNames(images.class_names))

    def held_out(self, images: ImageSet) -> Self:
        """The classes of the images; the condition is the same."""
        if tuple(images.class_names) != tuple(self.conditioner.class_names):
            _relabel(images, self.conditioner)
        return self

    def fields(self, network: Network) -> dict[str, Any]:
        """A row of the table of classes each."""
        return network.class_fields(len(self.conditioner.class_names))

    def conditioning(self, batch: Mapping[str, Tensor]) -> Conditioning:
        """The rows of the labels."""
        return self.conditioner.from_labels(batch["label"].cpu())

    def null(self, count: int) -> Conditioning:
        """No class, `count` times."""
        return self.conditioner.null(count)

    def record(self) -> dict[str, Any]:
        """The conditioner's config."""
        return {"conditioner": self.conditioner.to_config()}


def _initial(images: ImageSet | BucketedImages, model: LatentDiffusion) -> ClassConditioner | None:
    """The classes of a model, and behind them those that it lacks; None: it has no classes."""
    conditioner = model.conditioner
    if not isinstance(conditioner, ClassConditioner):
        raise UserError(
            f"init: a {type(conditioner).__name__} has no classes and no text encoder to train on"
        )
    if not conditioner.is_conditional:
        return None
    if not images.class_names:
        raise UserError(
            f"{images.name} has no classes, and the model of init has "
            f"{', '.join(conditioner.class_names[:10])}: expected a folder for each class"
        )
    return _with_names(conditioner, images.class_names)


def _with_names(conditioner: ClassConditioner, names: Sequence[str]) -> ClassConditioner:
    """The conditioner with the classes that it lacks behind its own."""

    def has(name: str) -> bool:
        try:
            return conditioner.label(name) >= 0
        except UserError:
            return False

    new = tuple(name for name in names if not has(name))
    if not new:
        return conditioner
    if not isinstance(conditioner, ClassNames):
        raise UserError(
            f"the model of init has no class {new[0]!r}: expected folders named as its classes"
        )
    return ClassNames((*conditioner.names, *new))


def _relabel(images: ImageSet | BucketedImages, conditioner: ClassConditioner) -> None:
    """Number the images' classes as a conditioner does."""
    table = torch.tensor([conditioner.label(name) for name in images.class_names])
    for part in [images] if isinstance(images, ImageSet) else images.sets:
        if part.labels is not None:
            part.labels = torch.where(part.labels < 0, -1, table[part.labels.clamp(min=0)])
