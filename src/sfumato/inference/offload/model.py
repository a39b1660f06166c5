"""Offload of a whole model: its networks stream their weights in turn.

inference/offload/streaming.py does it for one network.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sfumato.errors import UserError, usable_device
from sfumato.inference.offload.placeholders import materialized
from sfumato.inference.offload.streaming import (
    MemoryBudget,
    WeightStreamer,
    stream_weights,
    streamer_of,
)
from sfumato.inference.prepack import clone_sharing_weights
from sfumato.io.host_memory import can_drop_pages, return_large_blocks
from sfumato.predict.conditioners.base import Conditioner
from sfumato.sampling.request import Model

M = TypeVar("M", bound=Model)
ROOM = 2**25
"""Least bytes for anything besides weights."""


def offloadable_networks(model: Model) -> dict[str, nn.Module]:
    """Return the networks of a model that can be offloaded, by component name."""
    encoders = {
        f"encoder{end}": encoder.model for end, encoder in model.conditioner.encoders.items()
    }
    return {"autoencoder": model.autoencoder, "denoiser": model.denoiser.network, **encoders}


def denoiser_streamer(model: Model) -> WeightStreamer | None:
    """Return the streamer of the denoiser's network, None for models in memory."""
    return streamer_of(model.denoiser.network)


def require_resident(model: Model, subject: str, instead: str) -> None:
    """Check that a model is not offloaded.

    Args:
        model: the model.
        subject: of the message.
        instead: what to do, for the message.

    Raises:
        UserError: the model streams its weights.
    """
    if denoiser_streamer(model) is not None:
        raise UserError(
            f"{subject} needs all weights in memory, and this model streams them: {instead}"
        )


def offload_model(
    model: M,
    limit: int,
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> M:
    """Return a model that streams its weights, see `LatentDiffusion.streamed`.

    Args:
        model: the model, with weights as stored.
        limit: bytes that the process, or the GPU, may use.
        dtype: compute dtype; None: that of the denoiser's first weight.
        device: cpu or cuda.

    Raises:
        UserError: the limit is too low, or the system cannot drop pages of files.
    """
    require_resident(model, "streaming", "open it again with another memory=")
    where = _device(device)
    if where.type == "cpu" and not can_drop_pages():
        raise UserError(
            "a memory limit on the CPU needs Linux, which can drop pages of files: "
            "open the model without --memory (memory=)"
        )
    if where.type == "cpu":
        return_large_blocks()
    memory = MemoryBudget(limit, where)
    computed = dtype or next(model.denoiser.network.parameters()).dtype
    streamers: list[WeightStreamer] = []

    def streaming(network: nn.Module, part: str) -> nn.Module:
        source = f"the {part.replace('_', ' ')} of {model.name}"
        clone = stream_weights(clone_sharing_weights(network), memory, computed, source)
        streamer = streamer_of(clone)
        assert streamer is not None
        streamers.append(streamer)
        return clone

    encoders = {
        end: replace(encoder, model=streaming(encoder.model, f"encoder{end}"))
        for end, encoder in model.conditioner.encoders.items()
    }
    conditioner = model.conditioner.with_encoders(encoders)
    if where.type != "cpu" and not encoders:
        conditioner = conditioner.to(where)
    offloaded = replace(
        cast(Any, model),
        autoencoder=streaming(model.autoencoder, "autoencoder"),
        denoiser=replace(model.denoiser, network=streaming(model.denoiser.network, "denoiser")),
        conditioner=conditioner,
    )
    _check(memory, max(streamer.least for streamer in streamers))
    return offloaded


def _device(device: str | torch.device) -> torch.device:
    with usable_device(device):
        result = torch.device(device)
        torch.empty(0, device=result)
    if result.type not in ("cpu", "cuda"):
        raise UserError(
            f"device {str(device)!r} with a memory limit: "
            "expected cpu or cuda, which weights can stream to"
        )
    return result


def _check(memory: MemoryBudget, largest: int) -> None:
    """Raise `UserError` where the largest layers do not fit beside the memory in use."""
    now = memory.now() or 0
    least = now + largest + ROOM
    if memory.limit < least:
        raise UserError(
            f"memory {_megabytes(memory.limit)} is too little: expected at least "
            f"{_megabytes(least)} ({_megabytes(now)} for Python and its libraries, "
            f"{_megabytes(largest)} for the largest layers), plus feature maps"
        )


def _megabytes(size: int) -> str:
    return f"{-(-size // 10**6)} MB"


def network_state(network: nn.Module) -> Mapping[str, Tensor]:
    """Return a network's state dict; of an offloaded one, with one tensor in memory at a time."""
    tensors = network.state_dict()
    return tensors if streamer_of(network) is None else materialized(tensors)


def conditioner_state(conditioner: Conditioner) -> Mapping[str, Tensor]:
    """Return a conditioner's weights by name, as `network_state`."""
    tensors = conditioner.tensors()
    encoders = conditioner.encoders.values()
    offloaded = any(streamer_of(encoder.model) is not None for encoder in encoders)
    return materialized(tensors) if offloaded else tensors
