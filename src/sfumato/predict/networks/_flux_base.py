"""What FLUX.1 and FLUX.2 share: text and picture as two streams of tokens that attend to each
other, then as one.

y = out(single blocks(double blocks(picture, text))), where both are MMDiT's (Esser et al. 2024,
arXiv:2403.03206, section 4) with rotary places, normed queries and keys, and, in the single blocks,
attention and feed-forward side by side (Dehghani et al. 2023, arXiv:2302.05442, section 2). The
picture's tokens come first, then those of references, then the text's. Names of layers are
diffusers'.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn import rope
from sfumato.nn.embeddings import TimestepEmbedding, from_patches, padded, patches, sinusoidal
from sfumato.nn.mmdit import with_picture
from sfumato.nn.modulation import modulated
from sfumato.predict.networks.base import Network
from sfumato.types import Conditioning

_HALF = 65504.0  # the largest number of float16

Steer = tuple[Tensor, ...]
"""Shifts, scales and gates (B, 1, D)."""


# ---- where tokens are ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where tokens are on the axes of rotary places: picture k, row, column, and what else there
    is.

    widths  numbers of a head that each axis turns
    theta   of the slowest turn
    apart   between a picture and the next on the first axis; the picture that is made is at 0
    line    whether text tokens are one after the other on the last axis; otherwise all are at the
            origin
    """

    widths: tuple[int, ...]
    theta: float
    apart: int
    line: bool

    def turns(
        self, text: int, maps: tuple[tuple[int, int], ...], device: torch.device
    ) -> Float[Tensor, "N d 2"]:
        """cos and sin for the tokens of maps of (rows, columns) and then `text` tokens, float32;
        remembered, not to be changed.
        """
        # a program makes them itself: what a compiler looks at is no tensor to remember
        if torch.compiler.is_compiling():
            return self.made(text, maps, device).to(device)
        return _remembered(self, text, maps, device)

    def made(
        self, text: int, maps: tuple[tuple[int, int], ...], device: torch.device
    ) -> Float[Tensor, "N d 2"]:
        """The same, made where the device knows float64, and otherwise on the CPU."""
        where, axes = torch.device("cpu") if device.type == "mps" else device, len(self.widths)
        found = []
        for k, (rows, columns) in enumerate(maps):
            cells = torch.zeros(rows * columns, axes, device=where)
            cells[:, 0] = self.apart * k
            cells[:, 1:3] = rope.grid(rows, columns, where)
            found.append(cells)
        words = torch.zeros(text, axes, device=where)
        if self.line:
            words[:, -1] = torch.arange(text, device=where)
        return rope.angles(torch.cat([*found, words]), self.widths, self.theta)


@lru_cache(maxsize=16)
def _remembered(
    places: Places, text: int, maps: tuple[tuple[int, int], ...], device: torch.device
) -> Tensor:
    with torch.inference_mode(False):  # later calls may want gradients
        return places.made(text, maps, torch.device("cpu")).to(device)


# ---- layers --------------------------------------------------------------------------------------


class TimeEmbedding(nn.Module):
    """Time, the strength of guidance and a pooled text as one embedding: (B,), (B, V) -> (B, E).

    vector: `pooled` numbers (0: none), and if `guidance` one more, whose thousandfold is embedded
    as time is.
    """

    def __init__(self, width: int, waves: int, pooled: int, guidance: bool, bias: bool = True):
        super().__init__()
        self.waves, self.pooled = waves, pooled
        self.timestep_embedder = TimestepEmbedding(waves, width, bias)
        self.guidance_embedder = TimestepEmbedding(waves, width, bias) if guidance else None
        self.text_embedder = TimestepEmbedding(pooled, width, bias) if pooled else None

    def forward(
        self, timestep: Float[Tensor, " B"], vector: Float[Tensor, "B V"] | None, dtype: torch.dtype
    ) -> Float[Tensor, "B E"]:
        time = self.timestep_embedder(sinusoidal(timestep, self.waves).to(dtype))
        if vector is not None and self.guidance_embedder is not None:
            time = time + self.guidance_embedder(
                sinusoidal(1000 * vector[:, -1].float(), self.waves).to(dtype)
            )
        if vector is not None and self.text_embedder is not None:
            time = time + self.text_embedder(vector[:, : self.pooled].to(dtype))
        return time


class OutNorm(nn.Module):
    """LayerNorm(x) (1 + scale) + shift, steered by an embedding: (B, N, D), (B, D) -> (B, N, D)."""

    def __init__(self, width: int, bias: bool = True, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.linear = batch_invariant.Linear(width, 2 * width, bias=bias)

    def forward(
        self, x: Float[Tensor, "B N D"], time: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B N D"]:
        scale, shift = self.linear(batch_invariant.silu(time))[:, None].chunk(2, dim=-1)
        return modulated(x, scale, shift, self.eps)


def limited(x: Tensor) -> Tensor:
    """The same; in float16, which some tokens of these networks leave, the nearest number that it
    has.
    """
    return x.clamp(-_HALF, _HALF) if x.dtype == torch.float16 else x


def check_numbers(
    config: Any, head: int, axes: tuple[int, ...], count: int, *least: tuple[str, int]
) -> None:
    """`UserError` unless each named field is a whole number of at least so much, and `count` axes
    share out the `head` numbers of a head.
    """
    for name, lowest in least:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise UserError(
                f"config field {name}={value!r}: expected a whole number of at least {lowest}"
            )
    if len(axes) != count or sum(axes) != head or any(width < 2 or width % 2 for width in axes):
        raise UserError(
            f"axes_dims_rope {axes}: expected {count} even numbers, {head} together, which is attention_head_dim"
        )


# ---- the network ---------------------------------------------------------------------------------


class Streams(Network):
    """A network of double and single blocks. Its sub-classes make the layers, and say where tokens
    are and what steers the blocks.

    Of `Conditioning`: `tokens` (B, L, D) are the text, `vector` (B, V) a pooled text and, last, the
    strength of guidance, where the network has been trained with these; `mask` (B, L) hides text;
    `concat` joins x along channels; `references` are read behind x; `residuals` are of a
    ControlNet, (B, N, D) for the N tokens of x: one a double block, and behind them one a single
    block, or none for those.
    """

    places: Places
    x_embedder: nn.Module
    context_embedder: nn.Module
    transformer_blocks: nn.ModuleList
    single_transformer_blocks: nn.ModuleList
    norm_out: OutNorm
    proj_out: nn.Module

    def steering(self, time: Float[Tensor, "B D"]) -> tuple[Any, Any]:
        """What every double block, and every single block, is steered by."""
        return time, time

    def embedding(
        self, timestep: Float[Tensor, " B"], vector: Float[Tensor, "B V"] | None, dtype: torch.dtype
    ) -> Float[Tensor, "B D"]:
        """Time, guidance and pooled text as one embedding."""
        raise NotImplementedError

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B D h w"]:
        """x noisy latent, timestep in 0..1000, conditioning -> y, the network's target."""
        maps = self._maps(x, cond)
        sizes = tuple((m.shape[2] // self.patch, m.shape[3] // self.patch) for m in maps)
        assert cond.tokens is not None
        time = self.embedding(timestep, cond.vector, x.dtype)
        turn = self.places.turns(cond.tokens.shape[1], sizes, x.device)

        # embeddings
        tokens = [patches(m, self.patch) for m in maps]
        # (B, N + references, D)
        picture = self.x_embedder(torch.cat(tokens, 1) if len(tokens) > 1 else tokens[0])
        text = self.context_embedder(cond.tokens)  # (B, L, D)
        mask = with_picture(cond.mask, picture.shape[1])

        # blocks
        count = tokens[0].shape[1]
        in_double, in_single = self._residuals(cond, (len(x), count, picture.shape[2]))
        doubles, singles = self.steering(time)
        for block, residual in zip(self.transformer_blocks, in_double, strict=True):
            picture, text = block(picture, text, doubles, turn, mask, count)
            picture = _added(picture, residual)
        both = torch.cat([picture, text], 1)  # (B, S, D)
        for block, residual in zip(self.single_transformer_blocks, in_single, strict=True):
            both = _added(block(both, singles, turn, mask, count), residual)

        # out
        y = self.proj_out(self.norm_out(both[:, :count], time))
        return from_patches(y, sizes[0][0], self.patch)[:, :, : x.shape[2], : x.shape[3]]

    def _maps(self, x: Tensor, cond: Conditioning) -> list[Tensor]:
        """x with what is joined to it, and the references, in whole patches; `UserError` for what
        is missing or does not fit.
        """
        name, vector = type(self).__name__, (self.vector_width or 0) + self.guidance_embeds
        if cond.tokens is None or cond.tokens.shape[2] != self.token_width:
            found = "missing" if cond.tokens is None else f"of width {cond.tokens.shape[2]}"
            raise UserError(
                f"{name} attends to text of width {self.token_width}: Conditioning.tokens (B, L, {self.token_width}) is {found}"
            )
        if cond.mask is not None and cond.mask.shape != cond.tokens.shape[:2]:
            raise UserError(
                f"Conditioning.mask is {tuple(cond.mask.shape)}: expected one value a text token, {tuple(cond.tokens.shape[:2])}"
            )
        if vector and (cond.vector is None or cond.vector.shape[1] != vector):
            found = "missing" if cond.vector is None else f"of {cond.vector.shape[1]} numbers"
            what = [f"{self.vector_width} of a pooled text"] * bool(self.vector_width) + [
                "the strength of guidance"
            ] * self.guidance_embeds
            raise UserError(
                f"{name} needs {' and '.join(what)}: Conditioning.vector (B, {vector}) is {found}"
            )
        if cond.image_tokens is not None:
            raise UserError(
                f"{name} has no attention to Conditioning.image_tokens {tuple(cond.image_tokens.shape)}: leave them out"
            )
        whole = x if cond.concat is None else torch.cat([x, cond.concat], 1)
        if whole.shape[1] != self.in_channels:
            raise UserError(
                f"{name} takes {self.in_channels} channels and was given {whole.shape[1]}, {whole.shape[1] - x.shape[1]} of them by "
                "Conditioning.concat: models that also take a mask, a picture or a depth map need the task that gives it"
            )
        references = cond.references or ()
        for picture in references:
            if picture.shape[1] != self.in_channels:
                raise UserError(
                    f"{name} reads references of {self.in_channels} channels, got {picture.shape[1]}: give latents of its autoencoder"
                )
        return [padded(m, self.patch) for m in (whole, *references)]

    def _residuals(
        self, cond: Conditioning, shape: tuple[int, int, int]
    ) -> tuple[Iterable[Tensor | None], Iterable[Tensor | None]]:
        """What is added behind each double and each single block."""
        double, single = len(self.transformer_blocks), len(self.single_transformer_blocks)
        given = cond.residuals or ()
        if not given:
            return (None,) * double, (None,) * single
        if len(given) not in (double, double + single) or any(r.shape != shape for r in given):
            raise UserError(
                f"residuals of shapes {[*{tuple(r.shape) for r in given}]}, {len(given)} of them: expected {double} or {double + single} of {shape}"
            )
        return given[:double], given[double:] or (None,) * single

    @property
    def channels(self) -> int:
        """Channels of the latents that it predicts."""
        return (self.config.out_channels or self.config.in_channels) // self.patch**2

    @property
    def in_channels(self) -> int:
        """Channels that it takes: the latent's, and those that `Conditioning.concat` adds."""
        return self.config.in_channels // self.patch**2

    @property
    def token_width(self) -> int:
        """The width of the text tokens that it attends to."""
        return self.config.joint_attention_dim

    @property
    def guidance_embeds(self) -> bool:
        """Whether it is told how strongly to follow the condition, as the last number of
        `Conditioning.vector`.
        """
        return self.config.guidance_embeds


def _added(
    x: Float[Tensor, "B S D"], residual: Float[Tensor, "B N D"] | None
) -> Float[Tensor, "B S D"]:
    """x, with the residual added to its first tokens."""
    return (
        x
        if residual is None
        else x + nn.functional.pad(residual, (0, 0, 0, x.shape[1] - residual.shape[1]))
    )
