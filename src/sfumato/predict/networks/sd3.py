"""MMDiT: the network of Stable Diffusion 3 and 3.5.

Esser et al. 2024, arXiv:2403.03206, section 4.

y = U(x, t, conditioning): patches of the latent and tokens of a text go through blocks of joint
attention (`nn/mmdit.py`), each stream with weights of its own, modulated by time and a pooled text
(adaLN; Peebles & Xie 2022, arXiv:2212.09748). Positions are a table of sines, cropped from its
middle. Module names and config are diffusers' SD3Transformer2DModel.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.config import read_config
from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn.embeddings import (
    PatchEmbed,
    TimestepEmbedding,
    padded,
    sincos_2d,
    sinusoidal,
    unpatched,
)
from sfumato.nn.mmdit import JointBlock, with_picture
from sfumato.nn.modulation import Modulation, modulated
from sfumato.predict.networks.base import SINUSOIDAL_WIDTH, Network
from sfumato.types import Conditioning


@dataclass(frozen=True)
class SD3Config:
    """The numbers of an MMDiT, with diffusers' names and defaults.

    Attributes:
        sample_size: Latent cells along a side for which the table of positions was scaled (over
            patch_size).
        patch_size: Latent cells along a side of a patch.
        in_channels: Channels of the input.
        num_layers: Number of blocks.
        attention_head_dim: Width of a head.
        num_attention_heads: Heads of attention.
        joint_attention_dim: Channels of text tokens.
        caption_projection_dim: Channels of text tokens in the blocks, attention_head_dim *
            num_attention_heads.
        pooled_projection_dim: Channels of the pooled text, `Conditioning.vector`.
        out_channels: Channels of the output; None: in_channels.
        pos_embed_max_size: Tokens along a side of the table of positions, the most of a latent.
        dual_attention_layers: Blocks, from 0, with a second attention, of the image to itself (SD
            3.5 medium).
        qk_norm: "rms_norm" (SD 3.5) or None (SD 3), of each head's queries and keys.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name in ("dual_attention_layers", "qk_norm") or (
                name == "out_channels" and value is None
            ):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} {value!r}: expected a whole number of at least 1")
        if self.qk_norm not in (None, "rms_norm"):
            raise UserError(
                f"qk_norm {self.qk_norm!r} is not supported: expected null or 'rms_norm'"
            )
        if self.caption_projection_dim != self.width:
            raise UserError(
                f"caption_projection_dim {self.caption_projection_dim}: expected {self.width}, which is attention_head_dim "
                f"{self.attention_head_dim} * num_attention_heads {self.num_attention_heads}"
            )
        if self.width % 4:
            raise UserError(
                f"attention_head_dim {self.attention_head_dim} * num_attention_heads {self.num_attention_heads} is {self.width}: expected a "
                "multiple of 4, for sines and cosines of rows and columns"
            )
        if self.sample_size < self.patch_size:
            raise UserError(
                f"sample_size {self.sample_size} is less than patch_size {self.patch_size}: expected at least one whole patch"
            )
        for layer in self.dual_attention_layers:
            if layer not in range(self.num_layers):
                raise UserError(
                    f"dual_attention_layers {layer!r}: expected numbers from 0 to {self.num_layers - 1}, of the blocks that there are"
                )

    @property
    def width(self) -> int:
        """Channels of a token in the blocks."""
        return self.attention_head_dim * self.num_attention_heads

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SD3Config":
        """Read a diffusers config; `UserError` for unknown fields and unsupported values."""
        return read_config(cls, values, {})

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' SD3Transformer2DModel reads."""
        return {"_class_name": "SD3Transformer2DModel", **asdict(self)}


class CroppedPatchEmbed(PatchEmbed):
    """Patches as tokens, with their positions added: (B, C, h, w) -> (B, h/p * w/p, D).

    Positions are sines of a map of `most` x `most` tokens, scaled to `base`
    (`nn.embeddings.sincos_2d`). A smaller map is cropped from the middle, so that its centre has
    the same position for every size (Esser et al. 2024, section 5.3.2). The table is stored in the
    file.
    """

    def __init__(self, channels: int, width: int, patch: int, most: int, base: int):
        super().__init__(channels, width, patch)
        self.most = most
        table = torch.empty(1, most * most, width)
        if not table.is_meta:
            # of one axis, (most, D / 2)
            line = sincos_2d(width, most, 1, base)[:, width // 2 :].to(table)
            halves = table.view(most, most, 2, width // 2)  # the column's, the row's
            halves[:, :, 0], halves[:, :, 1] = line, line[:, None]
        self.register_buffer("pos_embed", table)
        self.pos_embed: Tensor

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N D"]:
        y = self.proj(x).permute(0, 2, 3, 1)  # (B, rows, columns, D)
        rows, columns = y.shape[1:3]
        top, left = (self.most - rows) // 2, (self.most - columns) // 2
        positions = self.pos_embed.view(self.most, self.most, -1)[
            top : top + rows, left : left + columns
        ]
        return (y.contiguous() + positions).flatten(1, 2)


class TimeTextEmbedding(nn.Module):
    """A timestep in 0..1000 (B,) and a pooled text (B, V) as one embedding (B, D)."""

    def __init__(self, width: int, pooled: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(SINUSOIDAL_WIDTH, width)
        self.text_embedder = TimestepEmbedding(pooled, width)

    def forward(
        self, timestep: Float[Tensor, " B"], pooled: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B D"]:
        return self.timestep_embedder(
            sinusoidal(timestep, SINUSOIDAL_WIDTH).to(pooled.dtype)
        ) + self.text_embedder(pooled)


class SD3(Network):
    """The MMDiT: see the module's docstring.

    Built from an `SD3Config`; weights are random until loaded.

    Of `Conditioning`: `tokens` (B, L, D) are the text and `vector` (B, V) a pooled text; both are
    required. `mask` (B, L) hides text tokens (the published models were trained with attention to
    padding). `concat` joins x along channels. `residuals` are a ControlNet's, (B, N, D) for the N
    patches of x: n of them for m blocks are added behind m / n blocks each.
    """

    text_width_fields = ("joint_attention_dim", "pooled_projection_dim")
    config: SD3Config

    def __init__(self, config: SD3Config):
        super().__init__()
        self.config = config
        width, last = config.width, config.num_layers - 1
        self.pos_embed = CroppedPatchEmbed(
            config.in_channels,
            width,
            config.patch_size,
            config.pos_embed_max_size,
            config.sample_size // config.patch_size,
        )
        self.time_text_embed = TimeTextEmbedding(width, config.pooled_projection_dim)
        self.context_embedder = batch_invariant.Linear(config.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(
                width,
                config.num_attention_heads,
                config.qk_norm is not None,
                i in config.dual_attention_layers,
                i == last,
            )
            for i in range(config.num_layers)
        )
        self.norm_out = Modulation(width, 2)
        self.proj_out = batch_invariant.Linear(width, config.patch_size**2 * self.channels)
        for layer in (
            *(m.linear for m in self.modules() if isinstance(m, Modulation)),
            self.proj_out,
        ):
            # adaLN-Zero: every block begins as the identity (DiT, section 3.2)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B D h w"]:
        """The network's target.

        Args:
            x: Noisy latent, of any sides up to `pos_embed_max_size` patches.
            timestep: In 0..1000.
            cond: See the class.

        Raises:
            UserError: For a latent or a conditioning that does not fit.
        """
        tokens, pooled = self._text(cond)
        full = padded(self._joined(x, cond), self.patch)

        # embeddings
        img = self.pos_embed(full)  # (B, N, D)
        c = self.time_text_embed(timestep, pooled.to(x.dtype))  # (B, D)
        txt = self.context_embedder(tokens)  # (B, L, D)

        # blocks
        mask = with_picture(cond.mask, img.shape[1])
        for block, residual in zip(
            self.transformer_blocks, self._residuals(cond, img.shape), strict=True
        ):
            img, txt = block(img, txt, c, mask)
            if residual is not None:
                img = img + residual

        # out
        scale, shift = self.norm_out(c)
        y = self.proj_out(modulated(img, scale, shift))
        return unpatched(y, full.shape[2] // self.patch, self.patch)[
            :, :, : x.shape[2], : x.shape[3]
        ]

    def _text(self, cond: Conditioning) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B V"]]:
        """Text tokens and pooled text; `UserError` where they are missing or of another width."""
        c = self.config
        for name, value, shape, width in (
            ("tokens", cond.tokens, "(B, L, D)", c.joint_attention_dim),
            ("vector", cond.vector, "(B, V)", c.pooled_projection_dim),
        ):
            if value is None or value.shape[-1] != width:
                state = "is missing" if value is None else f"is {value.shape[-1]} wide"
                raise UserError(
                    f"this MMDiT reads {name} of width {width}: Conditioning.{name} {shape} {state}; use the model's text encoders"
                )
        assert cond.tokens is not None and cond.vector is not None
        return cond.tokens, cond.vector

    def _joined(self, x: Float[Tensor, "B C h w"], cond: Conditioning) -> Float[Tensor, "B D h w"]:
        """x with `concat`; `UserError` for other channels, and a latent that is too large."""
        if cond.concat is not None:
            x = torch.cat([x, cond.concat], dim=1)
        if x.shape[1] != self.in_channels:
            joined = 0 if cond.concat is None else cond.concat.shape[1]
            raise UserError(
                f"this MMDiT takes {self.in_channels} channels and was given {x.shape[1]}, {joined} of them by Conditioning.concat: "
                "models that also take a mask or a picture need the task that gives it"
            )
        self.check_size(*x.shape[2:])
        return x

    def check_size(self, height: int, width: int) -> None:
        """Raise `UserError` for latents larger than the table of positions."""
        most = self.config.pos_embed_max_size * self.patch
        if max(height, width) > most:
            raise UserError(
                f"a latent of {height} x {width} cells: this MMDiT has places for {most} x {most} at most; ask for a smaller picture"
            )

    def _residuals(self, cond: Conditioning, shape: torch.Size) -> Iterable[Tensor | None]:
        """The residual added behind each block.

        Of n residuals, number floor(i / (m / n)) is behind block i of m, and none behind the last.
        """
        count, residuals = len(self.transformer_blocks), cond.residuals
        if not residuals:
            return [None] * count
        if len(residuals) > count or any(r.shape != shape for r in residuals):
            raise UserError(
                f"{len(residuals)} residuals of shapes {sorted({tuple(r.shape) for r in residuals})}: expected at most {count} of {tuple(shape)}, "
                "from a ControlNet for this MMDiT and this size"
            )
        interval = count / len(residuals)
        return [*(residuals[int(i / interval)] for i in range(count - 1)), None]

    @property
    def channels(self) -> int:
        """Channels of the latents that it predicts."""
        return self.config.out_channels or self.config.in_channels

    @property
    def token_width(self) -> int:
        """Channels of `Conditioning.tokens`."""
        return self.config.joint_attention_dim

    @property
    def vector_width(self) -> int:
        """Numbers of `Conditioning.vector`, the pooled text."""
        return self.config.pooled_projection_dim

    @property
    def patch(self) -> int:
        """Latent cells along a side of one token."""
        return self.config.patch_size


CLASSES = {"SD3Transformer2DModel": (SD3, SD3Config)}
