"""Checks of networks before the first step: they are built, they run, they fit."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from sfumato.compress.base import Autoencoder
from sfumato.errors import WRONG, UserError
from sfumato.io.host_memory import total_bytes
from sfumato.train.conditions.base import Condition
from sfumato.train.loop import LoopSettings
from sfumato.train.objectives.autoencoder import AutoencoderObjective

T = TypeVar("T")


@contextmanager
def possible(settings: Any, action: str) -> Iterator[None]:
    """Turn torch's errors about impossible sizes into a `UserError` that names the settings.

    Args:
        settings: Whose class the message names.
        action: Completes "a network with these settings cannot ...".
    """
    try:
        yield
    except UserError:
        raise
    except (*WRONG, AssertionError, MemoryError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"a network with these settings cannot {action} ({reason}): "
            f"change {type(settings).__name__}, data.size or data.channels"
        ) from error


def built(make: Callable[[], T], settings: Any) -> T:
    """Return `make()`, first without memory for its weights.

    Args:
        make: Builds a network.
        settings: Named in the message.

    Raises:
        UserError: For sizes that are impossible, and weights that do not fit into memory.
    """
    with possible(settings, "be built"):
        with torch.random.fork_rng([]), torch.device("meta"):
            outline = make()
        if isinstance(outline, nn.Module):
            need, memory = 4 * sum(p.numel() for p in outline.parameters()), _memory()
            if need > memory:
                raise UserError(
                    f"a network with these settings has {need // 4:.3g} weights, "
                    f"{need / 1e9:.3g} GB, and this machine has {memory / 1e9:.3g} GB: "
                    f"make {type(settings).__name__} smaller"
                )
        return make()


def check_memory(loop: LoopSettings, shape: Sequence[int]) -> None:
    """Raise `UserError` for a batch of examples of a shape that no memory holds."""
    # the example, its noise, the noisy one and the target, at the least
    need, memory = 16 * loop.batch_size * math.prod(shape), _memory()
    if need > memory:
        raise UserError(
            f"loop.batch_size={loop.batch_size}: examples of {'x'.join(map(str, shape))} take "
            f"{need / 1e9:.3g} GB, and this machine has {memory / 1e9:.3g} GB: use a smaller batch"
        )


def check_images(network: Autoencoder, shape: Sequence[int]) -> None:
    """Raise `UserError` unless an autoencoder takes images of a shape (C, H, W)."""
    size, factor = f"{shape[1]}x{shape[2]}", network.space.factor
    if shape[1] % factor or shape[2] % factor:
        raise UserError(
            f"images of {size} pixels do not divide by the autoencoder's factor {factor}: "
            f"give --data.size {max(factor, shape[1] // factor * factor)}"
        )
    if network.channels != shape[0]:
        raise UserError(
            f"images of {shape[0]} channels, and an autoencoder of {network.channels}: "
            f"give --data.channels {network.channels}"
        )


@torch.no_grad()
def check_autoencoder(network: Autoencoder, shape: Sequence[int]) -> None:
    """Raise `UserError` unless an image of a shape (C, H, W) comes back in that shape."""
    check_images(network, shape)
    image, size = torch.zeros(1, *shape), f"{shape[1]}x{shape[2]}"
    training = network.training
    with possible(network.config, f"take images of {size} pixels"):
        rebuilt = network.eval().decode(network.encode(image))
    network.train(training)
    if rebuilt.shape != image.shape:
        raise UserError(
            f"images of {size} pixels come back as {rebuilt.shape[2]}x{rebuilt.shape[3]}: "
            "give another --data.size"
        )


@torch.no_grad()
def check_loss(objective: AutoencoderObjective) -> None:
    """Raise `UserError` where the discriminator or the feature network cannot take the images."""
    image = torch.zeros(2, *objective.images.shape)
    if "discriminator" in objective.networks:
        with possible(objective.weights, "be a discriminator of these images"):
            objective.networks["discriminator"](image)
    if objective.features is not None:
        with possible(objective.features, "measure these images"):
            objective.features((image + 1) / 2)


@torch.no_grad()
def check_denoiser(
    network: nn.Module, condition: Condition, shapes: Sequence[Sequence[int]], config: Any
) -> None:
    """Raise `UserError` unless a network of a config takes latents of these shapes (C, h, w)."""
    training = network.training
    for shape in {tuple(shape) for shape in shapes}:
        with possible(config, f"take latents of {'x'.join(map(str, shape))}"):
            network.eval()(torch.zeros(1, *shape), torch.ones(1), condition.null(1))
    network.train(training)


def _memory() -> int:
    """Bytes of this machine's memory, so many that all fits where they are unknown."""
    return total_bytes() or 2**46
