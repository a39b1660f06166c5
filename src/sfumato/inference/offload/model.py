"""A whole model in less memory than its weights take: text encoders, denoiser and decoder stream
theirs, one after the other.

How a network does it is inference/offload/streaming.py. `model` in this file is a
`LatentDiffusion`, or anything with its autoencoder, denoiser and conditioner.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.inference.offload.placeholders import read_through
from sfumato.inference.offload.streaming import Memory, Stream, stream, streamed
from sfumato.inference.prepack import shared
from sfumato.io.host_memory import can_drop

ROOM = 2**25
"""Bytes beside the weights below which nothing at all can be computed."""


def networks(model: Any) -> dict[str, nn.Module]:
    """The networks of a model that can be streamed, by the names of their parts."""
    encoders = {name: encoder.model for name, encoder in _encoders(model.conditioner).items()}
    return {"autoencoder": model.autoencoder, "denoiser": model.denoiser.network, **encoders}


def _encoders(conditioner: Any) -> dict[str, Any]:
    """The text encoders of a conditioner: what in its fields has a network called `model`."""
    if not is_dataclass(conditioner):
        return {}
    held = {field.name: getattr(conditioner, field.name) for field in fields(conditioner)}
    return {
        name: value
        for name, value in held.items()
        if isinstance(getattr(value, "model", None), nn.Module)
    }


def stream_of(model: Any) -> Stream | None:
    """What streams the denoiser's weights, if something does."""
    return streamed(model.denoiser.network)


def refuse(model: Any, what: str, instead: str) -> None:
    """`UserError` for what cannot be done while weights are streamed."""
    if stream_of(model) is not None:
        raise UserError(
            f"{what} needs all weights in memory, and this model streams them: {instead}"
        )


def stream_model(
    model: Any, limit: int, dtype: torch.dtype | None, device: str | torch.device
) -> Any:
    """`LatentDiffusion.streamed`. `UserError` for a limit below what works, which it says, and for
    systems that cannot.
    """
    refuse(model, "streaming", "open it anew with the memory wanted")
    where = _device(device)
    if where.type == "cpu" and not can_drop():
        raise UserError(
            "memory= on the CPU needs Linux, where pages of files can be given back: open the model without it"
        )
    memory, computed = (
        Memory(limit, where),
        dtype or next(model.denoiser.network.parameters()).dtype,
    )
    streams: list[Stream] = []

    def streaming(network: nn.Module, part: str) -> nn.Module:
        found = stream(
            shared(network), memory, computed, f"the {part.replace('_', ' ')} of {model.name}"
        )
        mine = streamed(found)
        assert mine is not None
        streams.append(mine)
        return found

    encoders = {
        name: replace(encoder, model=streaming(encoder.model, name))
        for name, encoder in _encoders(model.conditioner).items()
    }
    conditioner = replace(model.conditioner, **encoders) if encoders else model.conditioner
    if where.type != "cpu" and not encoders and hasattr(conditioner, "to"):
        conditioner = conditioner.to(where)
    found = replace(
        model,
        autoencoder=streaming(model.autoencoder, "autoencoder"),
        denoiser=replace(model.denoiser, network=streaming(model.denoiser.network, "denoiser")),
        conditioner=conditioner,
    )
    _check(memory, max(s.least for s in streams))
    return found


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        # torch's words for a name that it does not know, or a device that is not there
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {str(device)!r} cannot be used ({reason}): expected one such as cpu or cuda"
        ) from error
    if found.type not in ("cpu", "cuda"):
        raise UserError(
            f"device {str(device)!r} with memory=: weights are streamed to the CPU or to CUDA"
        )
    return found


def _check(memory: Memory, largest: int) -> None:
    """`UserError` where not even the largest layers fit beside what is there already."""
    now = memory.now() or 0
    least = now + largest + ROOM
    if memory.limit < least:
        raise UserError(
            f"memory {_megabytes(memory.limit)} is too little: expected at least {_megabytes(least)} ({_megabytes(now)} for Python and its "
            f"libraries, {_megabytes(largest)} for the largest layers) and what feature maps take"
        )


def _megabytes(size: int) -> str:
    return f"{-(-size // 10**6)} MB"


def state(network: nn.Module) -> Mapping[str, Tensor]:
    """A network's weights by name; of one that streams them, one at a time in memory."""
    found = network.state_dict()
    return found if streamed(network) is None else read_through(found)


def words_state(conditioner: Any) -> Mapping[str, Tensor]:
    """A conditioner's weights by name, as `state`."""
    found = conditioner.tensors()
    return (
        read_through(found)
        if any(streamed(e.model) is not None for e in _encoders(conditioner).values())
        else found
    )
