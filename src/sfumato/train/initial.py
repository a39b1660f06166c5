"""Runs that begin with the weights of a model (--init).

The model's parts stay: network, process, autoencoder, conditioner. A class that the model lacks
(train/conditions/classes.py) gets a new row in the network's table, which begins as the row of the
empty prompt.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sfumato.compress.kl import AutoencoderKL
from sfumato.errors import UserError
from sfumato.io.paths import expand_user
from sfumato.loading import bundled, load
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.networks.base import Network, build
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
