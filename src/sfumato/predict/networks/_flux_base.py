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
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.nn.attention import ImageTokenAttention, by_rows
from sfumato.nn.embeddings import from_patches, padded, patches
from sfumato.nn.mmdit import JointAttention, with_image_tokens
from sfumato.nn.modulation import Modulation, gated, modulated
from sfumato.nn.rope import angles, grid, rotate
from sfumato.predict.networks.base import Network, TransformerConfig
from sfumato.types import Conditioning

_FP16_MAX = 65504.0

ModulationParams = tuple[Tensor, ...]
"""Shifts, scales and gates (B, 1, D)."""


class FluxBaseConfig(TransformerConfig):
    """The numbers that FLUX.1 and FLUX.2 share."""

    axes_dims_rope: tuple[int, ...]

    def check_rope(self, count: int) -> None:
        """Raise `UserError` unless axes_dims_rope splits a head among `count` axes."""
        axes, head = self.axes_dims_rope, self.attention_head_dim
        if len(axes) != count or sum(axes) != head or any(w < 2 or w % 2 for w in axes):
            raise UserError(
                f"axes_dims_rope {axes}: expected {count} even numbers, {head} together, which is "
                "attention_head_dim"
            )


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
        """Rotations (cos, sin) of all tokens, float32, cached: not to be changed in place.

        Args:
            text: Number of text tokens, which come last.
            maps: (rows, columns) of each image.
            device: The device of the result.
        """
        if torch.compiler.is_compiling():  # a compiler's tensors cannot be cached
            return self.compute(text, maps, device).to(device)
        return _cached_rope(self, text, maps, device)

    def compute(
        self, text: int, maps: tuple[tuple[int, int], ...], device: torch.device
    ) -> Float[Tensor, "N d 2"]:
        """The same, computed on a device that has float64, and otherwise on the CPU."""
        device, axes = torch.device("cpu") if device.type == "mps" else device, len(self.widths)
        images = []
        for k, (rows, columns) in enumerate(maps):
            positions = torch.zeros(rows * columns, axes, device=device)
            positions[:, 0] = self.image_step * k
            positions[:, 1:3] = grid(rows, columns, device)
            images.append(positions)
        words = torch.zeros(text, axes, device=device)
        if self.text_axis:
            words[:, -1] = torch.arange(text, device=device)
        return angles(torch.cat([*images, words]), self.widths, self.theta)


@lru_cache(maxsize=16)
def _cached_rope(
    positions: RopePositions, text: int, maps: tuple[tuple[int, int], ...], device: torch.device
) -> Tensor:
    with torch.inference_mode(False):  # later calls may need gradients
        return positions.compute(text, maps, torch.device("cpu")).to(device)


# ---- layers --------------------------------------------------------------------------------------


def clamp_fp16(x: Tensor) -> Tensor:
    """x, in float16 clamped to its range, which some tokens of these networks exceed."""
    return x.clamp(-_FP16_MAX, _FP16_MAX) if x.dtype == torch.float16 else x


class DoubleBlock(nn.Module):
    """Joint attention of both streams, and a feed-forward layer for each.

    Subclasses make the layers. The modulation is the network's (FLUX.2) or the block's (FLUX.1).
    """

    streams = 2  # two streams of tokens in and out

    eps: float = 1e-6
    attn: JointAttention
    ff: nn.Module
    ff_context: nn.Module

    def modulation(self, c: Any) -> tuple[ModulationParams, ModulationParams]:
        """Two shifts, scales and gates for each stream."""
        return c

    def forward(
        self,
        img: Float[Tensor, "B N D"],
        txt: Float[Tensor, "B L D"],
        c: Any,
        rope: Float[Tensor, "S d 2"],
        mask: Bool[Tensor, "B S"] | None,
        count: int,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B L D"]]:
        """Both streams after the block.

        Args:
            img: Image tokens, and behind them those of reference images.
            txt: Text tokens.
            c: The input of `modulation`.
            rope: Rotations of all tokens.
            mask: False for keys that are hidden.
            count: Number of image tokens.
        """
        of_img, of_txt = self.modulation(c)
        img_shift, img_scale, img_gate, *img_mlp = of_img
        txt_shift, txt_scale, txt_gate, *txt_mlp = of_txt

        # attention
        attn_img, attn_txt = self.attn(
            modulated(img, img_scale, img_shift, self.eps),
            modulated(txt, txt_scale, txt_shift, self.eps),
            mask,
            rope,
            count,
        )
        img, txt = gated(img, img_gate, attn_img), gated(txt, txt_gate, attn_txt)

        # feed-forward
        return self._mlp(self.ff, img, img_mlp), clamp_fp16(
            self._mlp(self.ff_context, txt, txt_mlp)
        )

    def _mlp(
        self, ff: nn.Module, x: Float[Tensor, "B N D"], modulation: list[Tensor]
    ) -> Float[Tensor, "B N D"]:
        """Compute x + gate ff(LN(x) (1 + scale) + shift) with modulation (shift, scale, gate)."""

        def mlp(rows: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
            return gated(rows, gate, ff(modulated(rows, scale, shift, self.eps)))

        return by_rows(mlp, [x], *modulation)


class RotaryAttention(ImageTokenAttention):
    """Attention with rotary positions, and norms of queries and keys.

    Subclasses make the layers.
    """

    heads: int
    norm_q: nn.Module
    norm_k: nn.Module

    def attend(
        self,
        qkv: Iterable[Float[Tensor, "B S D"]],
        rope: Float[Tensor, "S d 2"],
        mask: Bool[Tensor, "B S"] | None,
        count: int,
    ) -> Float[Tensor, "B S D"]:
        """Attend with projected queries, keys and values of all tokens, `count` of an image."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv)  # (B, S, H, d)
        return self.attend_heads(
            rotate(self.norm_q(q), rope), rotate(self.norm_k(k), rope), v, mask, count
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
    norm_out: Modulation
    proj_out: nn.Module
    eps: float = 1e-6

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
        text = self._text(cond)
        maps = self._maps(x, cond)
        sizes = tuple((m.shape[2] // self.patch, m.shape[3] // self.patch) for m in maps)
        c = self.embedding(timestep, cond.vector, x.dtype)
        rope = self.positions.rope(text.shape[1], sizes, x.device)

        # embeddings
        tokens = [patches(m, self.patch) for m in maps]
        # (B, N + references, D)
        img = self.x_embedder(torch.cat(tokens, 1) if len(tokens) > 1 else tokens[0])
        txt = self.context_embedder(text)  # (B, L, D)
        mask = with_image_tokens(cond.mask, img.shape[1])

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
        scale, shift = self.norm_out(c)
        y = self.proj_out(modulated(both[:, :count], scale, shift, self.eps))
        return from_patches(y, sizes[0][0], self.patch)[:, :, : x.shape[2], : x.shape[3]]

    def _text(self, cond: Conditioning) -> Float[Tensor, "B L D"]:
        """The text tokens; `UserError` for a conditioning that does not fit."""
        width, numbers = self.token_width, (self.vector_width or 0) + self.guidance_embeds
        text = self.require(cond, "tokens", width, f"attends to text of width {width}")
        if cond.mask is not None and cond.mask.shape != text.shape[:2]:
            raise UserError(
                f"Conditioning.mask is {tuple(cond.mask.shape)}: expected one value a text token, "
                f"{tuple(text.shape[:2])}"
            )
        if numbers:
            parts = [f"{self.vector_width} numbers of a pooled text"] * bool(self.vector_width)
            parts += ["the guidance scale"] * self.guidance_embeds
            self.require(cond, "vector", numbers, f"needs {' and '.join(parts)}")
        if cond.image_tokens is not None:
            raise UserError(
                f"{type(self).__name__} has no attention to Conditioning.image_tokens "
                f"{tuple(cond.image_tokens.shape)}: leave them out"
            )
        return text

    def _maps(self, x: Tensor, cond: Conditioning) -> list[Tensor]:
        """The latent with `concat`, and the references, padded to whole patches.

        Raises:
            UserError: For other channels than the network's.
        """
        references = cond.references or ()
        for image in references:
            if image.shape[1] != self.in_channels:
                raise UserError(
                    f"{type(self).__name__} takes references of {self.in_channels} channels, got "
                    f"{image.shape[1]}: give latents of its autoencoder"
                )
        return [padded(m, self.patch) for m in (self.join_concat(x, cond), *references)]

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
                f"{len(residuals)} residuals of shapes {[*{tuple(r.shape) for r in residuals}]}: "
                f"expected {double} or {double + single} of {shape}"
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
    """Add the residual to the first tokens of x."""
    if residual is None:
        return x
    return x + nn.functional.pad(residual, (0, 0, 0, x.shape[1] - residual.shape[1]))
