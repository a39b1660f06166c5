"""Base of FLUX.1 and FLUX.2.

Image and text are two streams of tokens that attend to each other, then one stream:

y = out(single blocks(double blocks(img, txt))). Double blocks are MMDiT's (Esser et al. 2024,
arXiv:2403.03206, section 4), single blocks have attention and feed-forward side by side (Dehghani
et al. 2023, arXiv:2302.05442, section 2); both have rotary positions, and normalised queries and
keys. The image's tokens come first, then those of reference images, then the text's. Names of
layers are diffusers'.
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
from sfumato.nn.embeddings import TimestepEmbedding, from_patches, padded, patches, sinusoidal
from sfumato.nn.mmdit import with_picture
from sfumato.nn.modulation import modulated
from sfumato.nn.rope import angles, grid
from sfumato.predict.networks.base import Network
from sfumato.types import Conditioning

_FP16_MAX = 65504.0

ModulationParams = tuple[Tensor, ...]
"""Shifts, scales and gates (B, 1, D)."""


# ---- positions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RopePositions:
    """Positions of tokens on the axes of the rotary embedding.

    The axes are image, row, column, and text where there is a fourth.

    Attributes:
        widths: Channels of a head for each axis.
        theta: Base of the frequencies.
        image_step: Distance between an image and the next on the first axis; the image that is made
            is at 0.
        text_axis: Whether text tokens are numbered on the last axis; otherwise all are at the
            origin.
    """

    widths: tuple[int, ...]
    theta: float
    image_step: int
    text_axis: bool

    def rope(
        self, text: int, maps: tuple[tuple[int, int], ...], device: torch.device
    ) -> Float[Tensor, "N d 2"]:
        """cos and sin of all tokens, float32, cached: not to be changed in place.

        Args:
            text: Number of text tokens, which come last.
            maps: (rows, columns) of each image.
            device: The device of the result.
        """
        if torch.compiler.is_compiling():  # whose tensors cannot be cached
            return self.compute(text, maps, device).to(device)
        return _cached_rope(self, text, maps, device)

    def compute(
        self, text: int, maps: tuple[tuple[int, int], ...], device: torch.device
    ) -> Float[Tensor, "N d 2"]:
        """The same, computed on a device that has float64, and otherwise on the CPU."""
        where, axes = torch.device("cpu") if device.type == "mps" else device, len(self.widths)
        images = []
        for k, (rows, columns) in enumerate(maps):
            positions = torch.zeros(rows * columns, axes, device=where)
            positions[:, 0] = self.image_step * k
            positions[:, 1:3] = grid(rows, columns, where)
            images.append(positions)
        words = torch.zeros(text, axes, device=where)
        if self.text_axis:
            words[:, -1] = torch.arange(text, device=where)
        return angles(torch.cat([*images, words]), self.widths, self.theta)


@lru_cache(maxsize=16)
def _cached_rope(
    positions: RopePositions, text: int, maps: tuple[tuple[int, int], ...], device: torch.device
) -> Tensor:
    with torch.inference_mode(False):  # later calls may want gradients
        return positions.compute(text, maps, torch.device("cpu")).to(device)


# ---- layers --------------------------------------------------------------------------------------


class TimeEmbedding(nn.Module):
    """Time, guidance scale and pooled text as one embedding: (B,), (B, V) -> (B, E).

    The vector holds `pooled` numbers (0: none) and, with `guidance`, one more, whose thousandfold
    is embedded as time is.
    """

    def __init__(
        self, width: int, num_features: int, pooled: int, guidance: bool, bias: bool = True
    ):
        super().__init__()
        self.num_features, self.pooled = num_features, pooled
        self.timestep_embedder = TimestepEmbedding(num_features, width, bias)
        self.guidance_embedder = TimestepEmbedding(num_features, width, bias) if guidance else None
        self.text_embedder = TimestepEmbedding(pooled, width, bias) if pooled else None

    def forward(
        self, timestep: Float[Tensor, " B"], vector: Float[Tensor, "B V"] | None, dtype: torch.dtype
    ) -> Float[Tensor, "B E"]:
        c = self.timestep_embedder(sinusoidal(timestep, self.num_features).to(dtype))
        if vector is not None and self.guidance_embedder is not None:
            c = c + self.guidance_embedder(
                sinusoidal(1000 * vector[:, -1].float(), self.num_features).to(dtype)
            )
        if vector is not None and self.text_embedder is not None:
            c = c + self.text_embedder(vector[:, : self.pooled].to(dtype))
        return c


class OutNorm(nn.Module):
    """LayerNorm(x) (1 + scale) + shift: x (B, N, D), c (B, D) -> (B, N, D).

    scale and shift are linear in SiLU(c).
    """

    def __init__(self, width: int, bias: bool = True, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.linear = batch_invariant.Linear(width, 2 * width, bias=bias)

    def forward(self, x: Float[Tensor, "B N D"], c: Float[Tensor, "B D"]) -> Float[Tensor, "B N D"]:
        scale, shift = self.linear(batch_invariant.silu(c))[:, None].chunk(2, dim=-1)
        return modulated(x, scale, shift, self.eps)


def clamp_fp16(x: Tensor) -> Tensor:
    """x, in float16 clamped to its range, which some tokens of these networks exceed."""
    return x.clamp(-_FP16_MAX, _FP16_MAX) if x.dtype == torch.float16 else x


def check_numbers(
    config: Any, head: int, axes: tuple[int, ...], count: int, *least: tuple[str, int]
) -> None:
    """Check the whole numbers of a config, and how axes_dims_rope splits a head.

    Args:
        config: The config.
        head: Width of a head.
        axes: Channels of a head for each axis of the rotary embedding.
        count: Number of axes.
        least: (field, least value) of whole numbers.

    Raises:
        UserError: For a field that is no such number, and axes that do not split a head.
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


class FluxBase(Network):
    """A network of double and single blocks.

    Subclasses make the layers, the positions and the modulation.

    Of `Conditioning`: `tokens` (B, L, D) are the text. `vector` (B, V) is a pooled text and, last,
    the guidance scale, where the network was trained with these. `mask` (B, L) hides text. `concat`
    joins x along channels. `references` are attended to behind x. `residuals` are a ControlNet's,
    (B, N, D) for the N tokens of x: one a double block, and behind them one a single block, or none
    for those.
    """

    positions: RopePositions
    x_embedder: nn.Module
    context_embedder: nn.Module
    transformer_blocks: nn.ModuleList
    single_transformer_blocks: nn.ModuleList
    norm_out: OutNorm
    proj_out: nn.Module

    def modulation(self, c: Float[Tensor, "B D"]) -> tuple[Any, Any]:
        """The modulation input of every double block, and of every single block."""
        return c, c

    def embedding(
        self, timestep: Float[Tensor, " B"], vector: Float[Tensor, "B V"] | None, dtype: torch.dtype
    ) -> Float[Tensor, "B D"]:
        """Time, guidance scale and pooled text as one embedding."""
        raise NotImplementedError

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B D h w"]:
        """The network's target.

        Args:
            x: Noisy latent, of any sides.
            timestep: In 0..1000.
            cond: See the class.

        Raises:
            UserError: For a latent or a conditioning that does not fit.
        """
        maps = self._maps(x, cond)
        sizes = tuple((m.shape[2] // self.patch, m.shape[3] // self.patch) for m in maps)
        assert cond.tokens is not None
        c = self.embedding(timestep, cond.vector, x.dtype)
        rope = self.positions.rope(cond.tokens.shape[1], sizes, x.device)

        # embeddings
        tokens = [patches(m, self.patch) for m in maps]
        # (B, N + references, D)
        img = self.x_embedder(torch.cat(tokens, 1) if len(tokens) > 1 else tokens[0])
        txt = self.context_embedder(cond.tokens)  # (B, L, D)
        mask = with_picture(cond.mask, img.shape[1])

        # blocks
        count = tokens[0].shape[1]
        double_residuals, single_residuals = self._residuals(cond, (len(x), count, img.shape[2]))
        double_modulation, single_modulation = self.modulation(c)
        for block, residual in zip(self.transformer_blocks, double_residuals, strict=True):
            img, txt = block(img, txt, double_modulation, rope, mask, count)
            img = _add_residual(img, residual)
        both = torch.cat([img, txt], 1)  # (B, S, D)
        for block, residual in zip(self.single_transformer_blocks, single_residuals, strict=True):
            both = _add_residual(block(both, single_modulation, rope, mask, count), residual)

        # out
        y = self.proj_out(self.norm_out(both[:, :count], c))
        return from_patches(y, sizes[0][0], self.patch)[:, :, : x.shape[2], : x.shape[3]]

    def _maps(self, x: Tensor, cond: Conditioning) -> list[Tensor]:
        """x with `concat`, and the references, padded to whole patches.

        Raises:
            UserError: For a latent or a conditioning that does not fit.
        """
        name, vector = type(self).__name__, (self.vector_width or 0) + self.guidance_embeds
        if cond.tokens is None or cond.tokens.shape[2] != self.token_width:
            state = "missing" if cond.tokens is None else f"of width {cond.tokens.shape[2]}"
            raise UserError(
                f"{name} attends to text of width {self.token_width}: Conditioning.tokens (B, L, {self.token_width}) is {state}"
            )
        if cond.mask is not None and cond.mask.shape != cond.tokens.shape[:2]:
            raise UserError(
                f"Conditioning.mask is {tuple(cond.mask.shape)}: expected one value a text token, {tuple(cond.tokens.shape[:2])}"
            )
        if vector and (cond.vector is None or cond.vector.shape[1] != vector):
            state = "missing" if cond.vector is None else f"of {cond.vector.shape[1]} numbers"
            parts = [f"{self.vector_width} of a pooled text"] * bool(self.vector_width)
            parts += ["the strength of guidance"] * self.guidance_embeds
            raise UserError(
                f"{name} needs {' and '.join(parts)}: Conditioning.vector (B, {vector}) is {state}"
            )
        if cond.image_tokens is not None:
            raise UserError(
                f"{name} has no attention to Conditioning.image_tokens {tuple(cond.image_tokens.shape)}: leave them out"
            )
        joined = x if cond.concat is None else torch.cat([x, cond.concat], 1)
        if joined.shape[1] != self.in_channels:
            raise UserError(
                f"{name} takes {self.in_channels} channels and was given {joined.shape[1]}, {joined.shape[1] - x.shape[1]} of them by "
                "Conditioning.concat: models that also take a mask, a picture or a depth map need the task that gives it"
            )
        references = cond.references or ()
        for image in references:
            if image.shape[1] != self.in_channels:
                raise UserError(
                    f"{name} reads references of {self.in_channels} channels, got {image.shape[1]}: give latents of its autoencoder"
                )
        return [padded(m, self.patch) for m in (joined, *references)]

    def _residuals(
        self, cond: Conditioning, shape: tuple[int, int, int]
    ) -> tuple[Iterable[Tensor | None], Iterable[Tensor | None]]:
        """The residual added behind each double and each single block.

        Raises:
            UserError: For residuals of another number or shape.
        """
        double, single = len(self.transformer_blocks), len(self.single_transformer_blocks)
        residuals = cond.residuals or ()
        if not residuals:
            return (None,) * double, (None,) * single
        if len(residuals) not in (double, double + single) or any(
            r.shape != shape for r in residuals
        ):
            raise UserError(
                f"residuals of shapes {[*{tuple(r.shape) for r in residuals}]}, {len(residuals)} of them: expected {double} or "
                f"{double + single} of {shape}"
            )
        return residuals[:double], residuals[double:] or (None,) * single

    @property
    def channels(self) -> int:
        """Channels of the latents that it predicts."""
        return (self.config.out_channels or self.config.in_channels) // self.patch**2

    @property
    def in_channels(self) -> int:
        """Channels of its input: the latent's, and those that `Conditioning.concat` adds."""
        return self.config.in_channels // self.patch**2

    @property
    def token_width(self) -> int:
        """Channels of `Conditioning.tokens`."""
        return self.config.joint_attention_dim

    @property
    def guidance_embeds(self) -> bool:
        """True for guidance-distilled networks (see `Network`)."""
        return self.config.guidance_embeds


def _add_residual(
    x: Float[Tensor, "B S D"], residual: Float[Tensor, "B N D"] | None
) -> Float[Tensor, "B S D"]:
    """x with the residual added to its first tokens."""
    return (
        x
        if residual is None
        else x + nn.functional.pad(residual, (0, 0, 0, x.shape[1] - residual.shape[1]))
    )
