"""Runs that begin with the weights of a model (--init).

The model's parts stay: network, process, autoencoder, conditioner. Classes are found by their
names; a class that the model lacks gets a new row in the network's table, which begins as the row
of the empty prompt.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sfumato.compress.kl import AutoencoderKL
from sfumato.data import BucketedImages, ImageSet
from sfumato.errors import UserError
from sfumato.io.paths import expand_user
from sfumato.loading import bundled, load
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.base import ClassConditioner, Conditioner
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.predict.networks.base import Network, build
from sfumato.train.caption_embeddings import Captions, captions_of, check_text
from sfumato.train.parts import open_autoencoder


def fixed_source(source: str) -> str:
    """The source of a model for another working folder: paths absolute, names as they are."""
    path = expand_user(source)
    return str(path.absolute()) if path.exists() and source not in bundled() else source


def initial_autoencoder(source: str) -> AutoencoderKL:
    """A copy of the autoencoder of a model, or of an autoencoder's folder, for training.

    Raises:
        UserError: For another kind of autoencoder.
    """
    folder = Path(source).expanduser()
    alone = (folder / "config.json").exists() and not (folder / "model_index.json").exists()
    autoencoder = open_autoencoder(folder) if alone else load(source).autoencoder
    if not isinstance(autoencoder, AutoencoderKL):
        raise UserError(
            f"init={source}: its autoencoder is a {type(autoencoder).__name__}, "
            "expected a KL autoencoder"
        )
    return copy.deepcopy(autoencoder).requires_grad_(True)


def initial_network(model: LatentDiffusion) -> Network:
    """A copy of the network of a model, for training."""
    network = model.denoiser.network
    if not isinstance(network, Network):
        raise UserError(
            f"the network of {model.name} is a {type(network).__name__}, which cannot be trained"
        )
    if network.guidance_embeds:
        raise UserError(
            f"{model.name} is guidance-distilled: the strength of guidance was learned from "
            "another model, not from data; begin with one that is not"
        )
    return copy.deepcopy(network).requires_grad_(True)


def initial_conditions(
    images: ImageSet | BucketedImages, model: LatentDiffusion, cache: Path
) -> tuple[Conditioner, ClassConditioner | Captions, list[str | None], dict[str, Any]]:
    """The conditioning of a run that begins with a model, see `recipe._conditioners`.

    Raises:
        UserError: For data without the captions or classes that the model is conditioned on.
    """
    conditioner = model.conditioner
    if conditioner.encoders:
        if images.captions is None:
            raise UserError(
                f"{images.name} has no captions, and the model of init is conditioned on text: "
                "expected a column or file of captions"
            )
        check_text(conditioner, "the model of init")
        return conditioner, *captions_of(images, conditioner, cache), {}
    if not isinstance(conditioner, ClassConditioner):
        raise UserError(
            f"init: a {type(conditioner).__name__} has no classes and no text encoder to train on"
        )
    if not conditioner.is_conditional:
        return conditioner, conditioner, [None], {}
    if not images.class_names:
        raise UserError(
            f"{images.name} has no classes, and the model of init has "
            f"{', '.join(conditioner.class_names[:10])}: expected a folder for each class"
        )
    grown = _with_names(conditioner, images.class_names)
    _relabel(images, [grown.label(name) for name in images.class_names])
    return grown, grown, [*images.class_names], {}


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


def _relabel(images: ImageSet | BucketedImages, numbers: list[int]) -> None:
    """Number the images' classes as the model does."""
    table = torch.tensor(numbers)
    for part in [images] if isinstance(images, ImageSet) else images.sets:
        if part.labels is not None:
            part.labels = torch.where(part.labels < 0, -1, table[part.labels.clamp(min=0)])


def with_classes(network: Network, before: Sequence[str], conditioner: Conditioner) -> Network:
    """The network with a row for each class of a conditioner; itself where it has them.

    Args:
        network: Its table has a row for each class of `before`, and a last one for no class.
        before: The classes of the table.
        conditioner: Its classes begin with `before`.
    """
    count = len(conditioner.class_names)
    if count == len(before):
        return network
    grown = build(replace(network.config, **network.class_fields(count)))
    state = grown.state_dict()
    for name, tensor in network.state_dict().items():
        if state[name].shape == tensor.shape:
            state[name].copy_(tensor)
        else:
            state[name][: len(before)] = tensor[: len(before)]
            state[name][len(before) :] = tensor[len(before)]
    return grown
