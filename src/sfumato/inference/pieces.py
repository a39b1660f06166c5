"""Rows of a denoiser call, and images decoded or encoded at a time, that fit into memory.

Feature maps grow with the batch: 16 images of Stable Diffusion at 512 pixels would take 13 GB to
decode at once. They are counted for one row or image (`sfumato.io.allocations`), and a batch is
divided into even pieces of which each takes at most

    a model in memory     `PIECE` bytes; an eighth of a GPU's memory
    a streamed model      what its limit leaves beside Python, the libraries and the largest layers

Pieces do not change an image: image k of a batch is image k alone, on the CPU in float32 to the
last bit.
"""

import math
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from sfumato.compress.base import Autoencoder, SequentialAutoencoder
from sfumato.decode.memory import (
    decode_bytes,
    encode_bytes,
    strip_decode_bytes,
    strip_encode_bytes,
)
from sfumato.errors import WRONG, UserError
from sfumato.inference.offload.streaming import WeightStreamer, streamer_of
from sfumato.predict.networks.base import Network
from sfumato.predict.step_memory import conditions, step_bytes
from sfumato.sampling.plan import Plan
from sfumato.sampling.request import Model
from sfumato.validate import positive_int

PIECE = 2**30
"""Bytes of feature maps of a piece, for models in memory."""
SMALL = 2**12
"""Cells of a batch of latents that take less than `PIECE`, without counting."""
SCRATCH = 2**26
"""Bytes that kernels and the C library take beside feature maps."""
TILE = 64
"""Latent cells along a side of a tile, as of `decode.tiled`."""

Cells = tuple[int, int]
"""Height and width of a latent."""


@dataclass(frozen=True)
class Way:
    """A way to decode or encode, and the number of images at a time.

    Attributes:
        name: "whole", "exact" or "tiled".
        images: At least 1.
    """

    name: str
    images: int


# ---- denoiser calls ------------------------------------------------------------------------------


def rows_of(model: Model, plans: Sequence[Plan], batch: int | None = None) -> int | None:
    """Choose the largest number of rows of a denoiser call, and check that the run fits.

    Args:
        model: The model.
        plans: Plans that run together.
        batch: Rows that the caller asks for; None: as many as fit, in even pieces.

    Returns:
        The number of rows; None: no limit.

    Raises:
        UserError: For plans that a streamed model's memory has no room for, with the least that
            has.
    """
    if batch is not None:
        positive_int("batch", batch, unit="rows in a forward pass")
    if not plans:
        return batch
    streamer = streamer_of(model.denoiser.network)
    largest = max((plan.latent_shape[1:] for plan in plans), key=math.prod)
    # guidance calls the network twice, or more often
    rows = sum(plan.n * (1 if plan.guidance.off else 2) for plan in plans)
    images = sum(plan.n for plan in plans)
    if streamer is None and (
        batch is not None or images == 1 or rows * math.prod(largest) <= SMALL
    ):
        return batch
    each = _row_bytes(model, largest)
    if streamer is None:
        return batch if each is None else _even(rows, _piece(model.device) // each)
    needs = [_decoding_need(model, plan)[1] for plan in plans]
    state = _state_bytes(model, plans)
    if each is not None:
        needs.append(_Need(streamer, each * (batch or 1) + state, "a call of the denoiser"))
    _check_needs(needs)
    if each is None:
        return batch
    chosen = _even(rows, (_room(streamer) - state) // each) if batch is None else batch
    streamer.make_room(chosen * each + state + SCRATCH)
    return chosen


def _row_bytes(model: Model, cells: Cells) -> int | None:
    """Bytes of feature maps of one row; None for networks that cannot be counted."""
    network = model.denoiser.network
    if not isinstance(network, Network):
        return None
    return _count_row(type(network), network.config, _dtype(network), cells)


@lru_cache(maxsize=64)
def _count_row(
    kind: type[Network], config: Hashable, dtype: torch.dtype, cells: Cells
) -> int | None:
    with suppress(*WRONG), torch.device("meta"):
        # the config gives the plain network, also of packed and streamed ones
        return step_bytes(kind(config).to(dtype).eval(), cells)
    return None


def _state_bytes(model: Model, plans: Sequence[Plan]) -> int:
    """Bytes that the images of plans hold between calls: latents, conditionings, pixels."""
    network, total = model.denoiser.network, 0
    for plan in plans:
        latent = 4 * math.prod(plan.latent_shape)
        pixels = 4 * model.autoencoder.channels * plan.height * plan.width
        total += plan.n * (16 * latent + pixels)
    if isinstance(network, Network):
        with suppress(*WRONG):  # conditions that the config does not determine
            tokens = conditions(network, 1, torch.float32).tokens
            # of both prompts, and as one batch
            total += 0 if tokens is None else 4 * tokens.nbytes * sum(plan.n for plan in plans)
    return total


# ---- autoencoders --------------------------------------------------------------------------------


def decoding_of(model: Model, cells: Cells, n: int, decoding: str = "auto") -> Way:
    """Choose how n latents are decoded, in pieces of one image at least.

    Args:
        model: The model.
        cells: Height and width of a latent.
        n: Number of latents.
        decoding: "auto": whole, or exact where a streamed model's memory has no room for it.
    """
    way, needs = _way(model, cells, n, decoding, "decode")
    streamer = streamer_of(model.autoencoder)
    if streamer is not None:
        streamer.make_room(way.images * needs + SCRATCH)
    return way


def check_decoding(model: Model, plan: Plan) -> Way:
    """Return how a plan's latents will be decoded.

    Raises:
        UserError: Where a streamed model's memory has no room for one image, with the least that
            has.
    """
    way, need = _decoding_need(model, plan)
    _check_needs([need])
    return way


def _decoding_need(model: Model, plan: Plan) -> "tuple[Way, _Need]":
    cells, decoding = plan.latent_shape[1:], plan.request.decoding
    way, needs = _way(model, cells, plan.n, decoding, "decode")
    need = _Need(streamer_of(model.autoencoder), needs, f"decoding one image ({way.name})")
    if way.name == decoding == "whole" and need.lacks > 0:
        less = _way(model, cells, plan.n, "auto", "decode")[0].name == "exact"
        need = replace(need, hint="; decoding 'exact' takes less" if less else "")
    return way, need


def encoding_of(model: Model, cells: Cells, n: int) -> Way:
    """Choose how n images are encoded: whole, or exact where memory has no room for it.

    Raises:
        UserError: As for `check_decoding`.
    """
    way, needs = _way(model, cells, n, "auto", "encode")
    streamer = streamer_of(model.autoencoder)
    if streamer is not None:
        _check_needs([_Need(streamer, needs, "encoding one image")])
        streamer.make_room(way.images * needs + SCRATCH)
    return way


def _way(model: Model, cells: Cells, n: int, name: str, act: str) -> tuple[Way, int]:
    """A way that fits, if any does, and the bytes that one image takes on it."""
    autoencoder, streamer = model.autoencoder, streamer_of(model.autoencoder)
    own = "whole" if name == "auto" else name
    small = n <= 1 or own == "exact" or n * math.prod(cells) <= SMALL // 4
    needs = None if streamer is None and small else _image_bytes(autoencoder, cells, own, act)
    if needs is None:
        return Way(own, 1 if own == "exact" else max(n, 1)), 0
    room = _piece(model.device) if streamer is None else _room(streamer)
    if name == "auto" and streamer is not None and needs > room:
        by_rows = _image_bytes(autoencoder, cells, "exact", act)
        if by_rows is not None and by_rows < needs:
            own, needs = "exact", by_rows
    return Way(own, 1 if own == "exact" else _even(max(n, 1), room // max(needs, 1))), needs


def _image_bytes(autoencoder: Autoencoder, cells: Cells, way: str, act: str) -> int | None:
    """Bytes that one image takes on a way; None for autoencoders that cannot be counted."""
    if not isinstance(autoencoder, SequentialAutoencoder):
        return None
    dtype = _dtype(autoencoder)
    return _count_image(type(autoencoder), autoencoder.config, dtype, cells, way, act)


@lru_cache(maxsize=64)
def _count_image(
    kind: type[SequentialAutoencoder],
    config: Hashable,
    dtype: torch.dtype,
    cells: Cells,
    way: str,
    act: str,
) -> int | None:
    plain = None
    with suppress(*WRONG), torch.device("meta"):
        plain = kind(config).to(dtype).eval()
    if plain is None:  # the config does not give it
        return None
    if way == "exact":
        strips = strip_decode_bytes if act == "decode" else strip_encode_bytes
        return strips(plain, cells)
    tile = min(cells[0], TILE), min(cells[1], TILE)
    count = decode_bytes if act == "decode" else encode_bytes
    pixels = 4 * plain.channels * math.prod(cells) * plain.space.factor**2
    return count(plain, cells if way == "whole" else tile) + 2 * pixels


# ---- memory --------------------------------------------------------------------------------------


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def _even(count: int, most: int) -> int:
    """The size of as few even pieces as a number has with at most `most` in each."""
    pieces = -(-count // max(most, 1))
    return -(-count // pieces)


def _piece(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 8
    return PIECE


def _room(streamer: WeightStreamer) -> int:
    """Bytes that a streamed network's limit leaves for feature maps."""
    return streamer.memory.free() - streamer.least - SCRATCH


@dataclass(frozen=True)
class _Need:
    """Feature maps of a network; without a streamer nothing limits them."""

    streamer: WeightStreamer | None
    size: int
    subject: str
    hint: str = ""

    @property
    def lacks(self) -> int:
        """Bytes that the limit lacks; below 1 they fit."""
        return 0 if self.streamer is None else self.size - _room(self.streamer)


def _check_needs(needs: Sequence[_Need]) -> None:
    """Raise `UserError` for a limit without room, with the least that has room for all needs."""
    worst = max(needs, key=lambda need: need.lacks)
    if worst.streamer is None or (lacks := worst.lacks) <= 0:
        return
    memory = worst.streamer.memory
    # a part of the limit stays free
    least = memory.limit + -(-lacks * memory.SHARE // (memory.SHARE - 1)) + 10**6
    raise UserError(
        f"memory {memory.limit // 10**6} MB is too little for {worst.subject}: expected at least "
        f"{-(-least // 10**6)} MB, of which feature maps take {-(-worst.size // 10**6)} MB"
        f"{worst.hint}"
    )
