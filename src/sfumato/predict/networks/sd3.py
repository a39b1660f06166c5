"""MMDiT: the network of Stable Diffusion 3 and 3.5.

Esser et al. 2024, arXiv:2403.03206, section 4.

y = U(x, t, conditioning): patches of the latent and tokens of a text go through blocks of joint
attention (`nn/mmdit.py`), each stream with weights of its own, modulated by time and a pooled text
(adaLN; Peebles & Xie 2022, arXiv:2212.09748). Positions are a table of sines, cropped from its
middle. Module names and config are diffusers' SD3Transformer2DModel.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn.embeddings import PatchEmbed, TimeEmbedding, padded, sincos_2d
from sfumato.nn.mmdit import JointBlock, with_image_tokens
from sfumato.nn.modulation import Modulation, modulated
from sfumato.predict.networks._patch_transformer import PatchNetwork, zero_init
from sfumato.predict.networks.base import SINUSOIDAL_WIDTH, TransformerConfig
from sfumato.types import Conditioning
from sfumato.validate import whole_number


@dataclass(frozen=True)
class SD3Config(TransformerConfig):
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

    class_name = "SD3Transformer2DModel"

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
        self.check_counts("sample_size patch_size in_channels num_layers pos_embed_max_size")
        self.check_counts("attention_head_dim num_attention_heads joint_attention_dim")
        self.check_counts("caption_projection_dim pooled_projection_dim")
        if self.out_channels is not None:
            whole_number("out_channels", self.out_channels, at_least=1)
        self.check_choice("qk_norm", None, "rms_norm")
        product = (
            f"attention_head_dim {self.attention_head_dim} * "
            f"num_attention_heads {self.num_attention_heads}"
        )
        if self.caption_projection_dim != self.width:
            raise UserError(
                f"caption_projection_dim {self.caption_projection_dim}: expected {self.width}, "
                f"which is {product}"
            )
        if self.width % 4:
            raise UserError(
                f"{product} is {self.width}: expected a multiple of 4, for sines and cosines of "
                "rows and columns"
            )
        if self.sample_size < self.patch_size:
            raise UserError(
                f"sample_size {self.sample_size} is less than patch_size {self.patch_size}: "
                "expected at least one whole patch"
            )
        for layer in self.dual_attention_layers:
            if layer not in range(self.num_layers):
                raise UserError(
                    f"dual_attention_layers {layer!r}: expected numbers from 0 to "
                    f"{self.num_layers - 1}, of the blocks that there are"
                )


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
        """Embed the patches of a latent, with positions."""
        y = self.proj(x).permute(0, 2, 3, 1)  # (B, rows, columns, D)
        rows, columns = y.shape[1:3]
        top, left = (self.most - rows) // 2, (self.most - columns) // 2
        positions = self.pos_embed.view(self.most, self.most, -1)[
            top : top + rows, left : left + columns
        ]
        return (y.contiguous() + positions).flatten(1, 2)


class SD3(PatchNetwork):
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
        self.time_text_embed = TimeEmbedding(width, SINUSOIDAL_WIDTH, config.pooled_projection_dim)
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
        # adaLN-Zero: every block begins as the identity (DiT, section 3.2)
        zero_init(self.proj_out)
        for module in self.modules():
            if isinstance(module, Modulation):
                zero_init(module.linear)

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
        width, vector_width = self.token_width, self.vector_width
        tokens = self.require(cond, "tokens", width, f"reads tokens of width {width}")
        pooled = self.require(cond, "vector", vector_width, f"reads vector of width {vector_width}")
        self.check_size(*x.shape[2:])
        size, x = x.shape[2:], padded(self.join_concat(x, cond), self.patch)

        # embeddings
        img = self.pos_embed(x)  # (B, N, D)
        c = self.time_text_embed(timestep, pooled, x.dtype)  # (B, D)
        txt = self.context_embedder(tokens)  # (B, L, D)

        # blocks
        mask = with_image_tokens(cond.mask, img.shape[1])
        for block, residual in zip(
            self.transformer_blocks, self._residuals(cond, img.shape), strict=True
        ):
            img, txt = block(img, txt, c, mask)
            if residual is not None:
                img = img + residual

        # out
        scale, shift = self.norm_out(c)
        return self.unpatchify(self.proj_out(modulated(img, scale, shift)), size)

    def check_size(self, height: int, width: int) -> None:
        """Raise `UserError` for latents larger than the table of positions."""
        most = self.config.pos_embed_max_size * self.patch
        if max(height, width) > most:
            raise UserError(
                f"a latent of {height} x {width} cells: this MMDiT has positions for {most} x "
                f"{most} at most; generate a smaller image"
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
                f"{len(residuals)} residuals of shapes "
                f"{sorted({tuple(r.shape) for r in residuals})}: expected at most {count} of "
                f"{tuple(shape)}, from a ControlNet for this MMDiT and this size"
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


CLASSES = {"SD3Transformer2DModel": (SD3, SD3Config)}
