"""Z-Image: a single-stream diffusion transformer (Z-Image team 2025, arXiv:2511.22699).

    x <- x + tanh(gate) norm(attention(norm(x) (1 + scale)))
    x <- x + tanh(gate') norm(ff(norm(x) (1 + scale')))        scale, gate, scale', gate' = W c(t)

Image tokens (2 x 2 latent cells) pass through blocks of their own, text tokens through blocks
without time; then both are one sequence, the image first. Each part is padded to a multiple of 32
by a learned token, to which all tokens attend. Rotary positions have three axes: text token i is at
(1 + i, 0, 0), the image token of row r and column c at (1 + P, r, c) behind a text of P tokens with
its padding, and the image's padding at (0, 0, 0).

The published network takes time 0 for noise and 1 for clean, and predicts z - eps. Here both are
reversed: timestep 1000 is noise, and y = eps - z. Layer names and config are those of diffusers'
ZImageTransformer2DModel. The published models have 6 billion parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.nn import rope
from sfumato.nn.attention import Attention, Branch, ImageTokenAttention, by_rows
from sfumato.nn.embeddings import padded, sinusoidal, unpatched
from sfumato.nn.modulation import RMSNorm, gated, modulated
from sfumato.predict.networks._flux_base import clamp_fp16
from sfumato.predict.networks.base import SINUSOIDAL_WIDTH, Network, NetworkConfig
from sfumato.types import Conditioning
from sfumato.validate import flag, number_in, whole_number

MULTIPLE = 32
"""Image tokens, and text tokens, are padded to a multiple of this number."""
_HIDDEN_WIDTH = 1024  # between the two layers of the time embedding
_EMBEDDING_WIDTH = 256  # of the time embedding, at most
_HEAD_EPS = 1e-5  # of the norms of queries and keys; diffusers has it apart from norm_eps


@dataclass(frozen=True)
class ZImageConfig(NetworkConfig):
    """The numbers of a Z-Image transformer, with diffusers' names and defaults.

    Attributes:
        all_patch_size: Latent cells along a side of a token, one number.
        all_f_patch_size: Frames of a token: (1,).
        in_channels: Channels of the latents.
        dim: Channels of a token.
        n_layers: Blocks of image and text together.
        n_refiner_layers: Blocks of the image alone, and of the text alone.
        n_heads: Heads of attention.
        n_kv_heads: Heads of keys and values: as many as n_heads.
        norm_eps: Added to the mean squares in RMS norms.
        qk_norm: Whether queries and keys are normed.
        cap_feat_dim: Channels of text tokens.
        rope_theta: Base of the rotary frequencies.
        t_scale: Factor of the time in [0, 1] before it is embedded.
        axes_dims: Channels of a head for the rotary positions of text, row and column.
        axes_lens: Number of positions on each axis.
    """

    class_name = "ZImageTransformer2DModel"
    fixed: ClassVar[Mapping[str, Any]] = {"siglip_feat_dim": None}  # of the unpublished Omni models

    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)

    def __post_init__(self) -> None:
        self.check_counts("in_channels dim n_layers n_heads cap_feat_dim")
        self.check_counts("n_refiner_layers", at_least=0)
        flag("qk_norm", self.qk_norm)
        for name, count in (
            ("all_patch_size", 1),
            ("all_f_patch_size", 1),
            ("axes_dims", 3),
            ("axes_lens", 3),
        ):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != count:
                raise UserError(
                    f"{name} {value!r}: expected a list of {count} whole number{'s' * (count > 1)}"
                )
            for number in value:
                whole_number(name, number, 1)
        if self.all_f_patch_size != (1,):
            raise UserError(
                f"all_f_patch_size {list(self.all_f_patch_size)}: expected [1], as an image has "
                "one frame"
            )
        if self.n_kv_heads != self.n_heads:
            raise UserError(
                f"n_kv_heads {self.n_kv_heads!r}: expected n_heads, {self.n_heads}, as in all "
                "published models"
            )
        if (
            self.dim % self.n_heads
            or sum(self.axes_dims) != self.head_width
            or any(width % 2 for width in self.axes_dims)
        ):
            raise UserError(
                f"axes_dims {list(self.axes_dims)}: expected even numbers whose sum is the width "
                f"of a head, dim {self.dim} / n_heads {self.n_heads}"
            )
        for name in ("norm_eps", "rope_theta", "t_scale"):
            number_in(name, getattr(self, name), above=0)

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.dim // self.n_heads

    @property
    def embedding_width(self) -> int:
        """Width of the time embedding."""
        return min(self.dim, _EMBEDDING_WIDTH)

    @property
    def inner(self) -> int:
        """Hidden width of a feed-forward layer."""
        return int(self.dim / 3 * 8)


# ---- positions -----------------------------------------------------------------------------------


class Group(NamedTuple):
    """Neighbouring images of a batch whose texts, with padding, have the same length.

    Attention runs group by group, without a mask. An image's bits then do not depend on the longest
    text of its batch.

    Attributes:
        images: Rows of the batch.
        length: Number of tokens, from the first.
        rotation: (length, d, 2), cos and sin of each token's position (`nn.rope`).
    """

    images: slice
    length: int
    rotation: Tensor


def padded_length(count: int) -> int:
    """The multiple of `MULTIPLE` to which `count` tokens are padded, at least one."""
    return max(-(-count // MULTIPLE), 1) * MULTIPLE


def groups_of(
    config: ZImageConfig, lengths: Sequence[int], rows: int, columns: int, device: torch.device
) -> list[Group]:
    """The groups of a batch, for the sequence of image and text.

    Args:
        config: The network's config.
        lengths: The length of each image's text, with padding.
        rows: Rows of image tokens.
        columns: Columns of image tokens.
        device: The device of the rotations.
    """
    # Tensors of a trace cannot be cached.
    make = rotation_of if torch.compiler.is_compiling() else _cached_rotation
    groups, start = [], 0
    for length, run in groupby(lengths):
        stop = start + len(list(run))
        rotation = make(config, length, rows, columns, device)
        groups.append(Group(slice(start, stop), len(rotation), rotation))
        start = stop
    return groups


def rotation_of(
    config: ZImageConfig, text: int, rows: int, columns: int, device: torch.device
) -> Float[Tensor, "S d 2"]:
    """Cosine and sine of the positions of all tokens: image, its padding, text."""
    cpu = torch.device("cpu")  # some devices have no float64
    positions = torch.zeros(
        padded_length(rows * columns) + text, 3, dtype=torch.float64, device=cpu
    )
    image = positions[: rows * columns]
    image[:, 0], image[:, 1:] = text + 1, rope.grid(rows, columns, cpu)
    positions[len(positions) - text :, 0] = torch.arange(1, text + 1, device=cpu)
    angles = []
    for axis, width in enumerate(config.axes_dims):
        frequency = config.rope_theta ** (
            -torch.arange(0, width, 2, dtype=torch.float64, device=cpu) / width
        )
        angles.append(positions[:, axis, None] * frequency)
    # Angles are rounded to float32 before the cosine, as in the published program: at position 500
    # this changes them by up to 1.5e-5.
    angle = torch.cat(angles, 1).float()
    return torch.stack([angle.cos(), angle.sin()], -1).to(device)


@lru_cache(maxsize=32)
def _cached_rotation(
    config: ZImageConfig, text: int, rows: int, columns: int, device: torch.device
) -> Float[Tensor, "S d 2"]:
    """`rotation_of`, cached: not to be changed in place."""
    with torch.inference_mode(False):  # later calls may want gradients
        return rotation_of(config, text, rows, columns, device)


# ---- layers --------------------------------------------------------------------------------------


class RotaryAttention(Attention):
    """Self-attention of normed and rotated queries and keys: (B, S, D) -> (B, S, D).

    Tokens behind a group's length take no part in it.
    """

    def __init__(self, config: ZImageConfig):
        super().__init__(config.dim, config.n_heads, config.head_width, bias=False)
        self.norm_q, self.norm_k = (
            RMSNorm(config.head_width, _HEAD_EPS) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "B S D"], groups: Sequence[Group], count: int
    ) -> Float[Tensor, "B S D"]:
        """Attend within each image.

        Args:
            x: Tokens.
            groups: The images by the length of their sequence.
            count: Number of the image's tokens, which come first.
        """
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v)
        )  # (B, S, H, d)
        q, k, parts = self.norm_q(q), self.norm_k(k), []
        for images, length, rotation in groups:
            queries, keys = (rope.rotate(part[images, :length], rotation) for part in (q, k))
            y = self.attend(queries, keys, v[images, :length], count)
            parts.append(F.pad(y, (0, 0, 0, x.shape[1] - length)) if length < x.shape[1] else y)
        return self.to_out[0](torch.cat(parts) if len(parts) > 1 else parts[0])

    def attend(
        self,
        q: Float[Tensor, "B S H d"],
        k: Float[Tensor, "B S H d"],
        v: Float[Tensor, "B S H d"],
        count: int,
    ) -> Float[Tensor, "B S D"]:
        """Attend in each head: softmax(Q K^T / sqrt(d)) V."""
        del count
        return batch_invariant.attend(q, k, v)


class ImageAttention(RotaryAttention, ImageTokenAttention):
    """Rotary attention whose first `count` tokens are an image's, which can be perturbed."""

    def attend(
        self,
        q: Float[Tensor, "B S H d"],
        k: Float[Tensor, "B S H d"],
        v: Float[Tensor, "B S H d"],
        count: int,
    ) -> Float[Tensor, "B S D"]:
        """Attend in each head by `ImageTokenAttention.attend_heads`."""
        return self.attend_heads(q, k, v, None, count)


class FeedForward(Branch):
    """SwiGLU without biases, W2 (silu(W1 x) * W3 x): (..., D) -> (..., D).

    Shazeer 2020, arXiv:2002.05202, eq. 6.
    """

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.w1 = batch_invariant.Linear(width, inner, bias=False)
        self.w2 = batch_invariant.Linear(inner, width, bias=False)
        self.w3 = batch_invariant.Linear(width, inner, bias=False)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Widen, gate and project back."""
        return self.w2(clamp_fp16(batch_invariant.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Attention and feed-forward, each normed before and after: (B, S, D) -> (B, S, D).

    Args:
        config: The network's config.
        timed: Whether the block has image tokens, and is scaled and gated by time; else it is one
            of the text alone.
    """

    streams = 1  # one stream of tokens in and out

    def __init__(self, config: ZImageConfig, timed: bool = True):
        super().__init__()
        width = config.dim
        self.attention = ImageAttention(config) if timed else RotaryAttention(config)
        self.feed_forward = FeedForward(width, config.inner)
        self.attention_norm1 = RMSNorm(width, config.norm_eps)
        self.ffn_norm1 = RMSNorm(width, config.norm_eps)
        self.attention_norm2 = RMSNorm(width, config.norm_eps)
        self.ffn_norm2 = RMSNorm(width, config.norm_eps)
        modulation = batch_invariant.Linear(config.embedding_width, 4 * width) if timed else None
        self.adaLN_modulation = None if modulation is None else nn.Sequential(modulation)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        groups: Sequence[Group],
        count: int = 0,
        time: Float[Tensor, "B E"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Add both branches.

        Args:
            x: Tokens.
            groups: The images by the length of their sequence.
            count: Number of the image's tokens, which come first.
            time: The embedding of time, for timed blocks.
        """
        if self.adaLN_modulation is None:
            x = x + self._attended(self.attention_norm1(x), groups, count)
            return by_rows(lambda rows: rows + self._mlp(self.ffn_norm1(rows)), [x])
        # (B, 1, D) each
        scale, gate, ff_scale, ff_gate = self.adaLN_modulation(time)[:, None].chunk(4, dim=-1)
        attended = self._attended(self.attention_norm1(x) * (1 + scale), groups, count)
        x = gated(x, gate.tanh(), attended)

        def mlp(rows: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
            return gated(rows, gate, self._mlp(self.ffn_norm1(rows) * (1 + scale)))

        return by_rows(mlp, [x], ff_scale, ff_gate.tanh())

    # Both branches exceed the range of float16, and are clamped to it before their norm.

    def _attended(self, x: Tensor, groups: Sequence[Group], count: int) -> Tensor:
        return self.attention_norm2(clamp_fp16(self.attention(x, groups, count)))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.ffn_norm2(clamp_fp16(self.feed_forward(x)))


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of time, and two layers with a SiLU between: (B,) -> (B, E)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            batch_invariant.Linear(SINUSOIDAL_WIDTH, _HIDDEN_WIDTH),
            nn.Identity(),
            batch_invariant.Linear(_HIDDEN_WIDTH, width),
        )

    def forward(self, t: Float[Tensor, " B"], dtype: torch.dtype) -> Float[Tensor, "B E"]:
        """Embed times in a dtype."""
        widen, _, back = self.mlp
        return back(batch_invariant.silu(widen(sinusoidal(t, SINUSOIDAL_WIDTH).to(dtype))))


class FinalLayer(nn.Module):
    """W (LayerNorm(x) (1 + scale)), scaled by time: (B, N, D) -> (B, N, K)."""

    def __init__(self, config: ZImageConfig, outputs: int):
        super().__init__()
        self.linear = batch_invariant.Linear(config.dim, outputs)
        self.adaLN_modulation = nn.Sequential(
            nn.Identity(), batch_invariant.Linear(config.embedding_width, config.dim)
        )

    def forward(
        self, x: Float[Tensor, "B N D"], time: Float[Tensor, "B E"]
    ) -> Float[Tensor, "B N K"]:
        """Scale the normed tokens by time and project them."""
        scale = self.adaLN_modulation(batch_invariant.silu(time))[:, None]
        return self.linear(modulated(x, scale, torch.zeros_like(scale)))


# ---- the network ---------------------------------------------------------------------------------


class ZImageTransformer(Network):
    """Z-Image: see the module's docstring.

    Its latents are (B, 16, h, w), of any sides. Of `Conditioning`: `tokens` (B, L, D) are the text,
    `mask` (B, L) is False where a token is left out; the others close the gap. It ignores `vector`.
    """

    parameterization = "flow"
    text_width_fields = ("cap_feat_dim",)
    config: ZImageConfig

    def __init__(self, config: ZImageConfig):
        super().__init__()
        self.config = config
        width, cells = config.dim, self.patch**2 * config.in_channels
        self.all_x_embedder = nn.ModuleDict({self._key: batch_invariant.Linear(cells, width)})
        self.all_final_layer = nn.ModuleDict({self._key: FinalLayer(config, cells)})
        self.noise_refiner = nn.ModuleList(Block(config) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(
            Block(config, timed=False) for _ in range(config.n_refiner_layers)
        )
        self.t_embedder = TimestepEmbedder(config.embedding_width)
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, config.norm_eps),
            batch_invariant.Linear(config.cap_feat_dim, width),
        )
        self.x_pad_token, self.cap_pad_token = (
            nn.Parameter(torch.zeros(1, width)) for _ in range(2)
        )
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))

    @property
    def _key(self) -> str:
        """The name of the layers for the patch size, "2-1"."""
        return f"{self.config.all_patch_size[0]}-{self.config.all_f_patch_size[0]}"

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B C h w"]:
        """The velocity eps - z.

        Args:
            x: Noisy latent, of any sides.
            timestep: In 0..1000.
            cond: See the class.

        Raises:
            UserError: For a latent or a conditioning that does not fit, and more tokens along an
                axis than it has positions.
        """
        tokens = self._text_tokens(x, cond)
        cells = padded(x, self.patch)
        rows, columns = cells.shape[2] // self.patch, cells.shape[3] // self.patch
        count = rows * columns

        # embeddings
        time = self.t_embedder((1000 - timestep) / 1000 * self.config.t_scale, x.dtype)  # (B, E)
        text, lengths = self._embed_text(tokens, cond.mask)  # (B, P, D)
        image = self.all_x_embedder[self._key](_patches(cells, self.patch))
        image_padding = self.x_pad_token.expand(len(x), padded_length(count) - count, -1)
        image = torch.cat([image, image_padding], 1)  # (B, N, D)

        # blocks of the image alone and of the text alone
        self._check_positions(max(lengths), rows, columns)
        groups, size = groups_of(self.config, lengths, rows, columns, x.device), image.shape[1]
        of_image = [Group(g.images, size, g.rotation[:size]) for g in groups]
        of_text = [Group(g.images, g.length - size, g.rotation[size:]) for g in groups]
        for block in self.noise_refiner:
            image = block(image, of_image, count, time)
        for block in self.context_refiner:
            text = block(text, of_text)

        # blocks of both
        both = torch.cat([image, text], 1)  # (B, N + P, D)
        for block in self.layers:
            both = block(both, groups, count, time)
        y = self.all_final_layer[self._key](both[:, :count], time)
        return -unpatched(y, rows, self.patch)[:, :, : x.shape[2], : x.shape[3]]

    def _embed_text(
        self, tokens: Float[Tensor, "B L E"], mask: Bool[Tensor, "B L"] | None
    ) -> tuple[Float[Tensor, "B P D"], list[int]]:
        """Embed the unmasked tokens, followed by padding.

        Returns:
            The embedded texts, and the length of each with its padding.
        """
        counts = [tokens.shape[1]] * len(tokens) if mask is None else mask.sum(1).tolist()
        if mask is not None:  # unmasked tokens first, in their order
            order = mask.int().argsort(dim=1, descending=True, stable=True)
            tokens = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
        lengths = [padded_length(count) for count in counts]
        tokens = F.pad(tokens[:, : max(lengths)], (0, 0, 0, max(max(lengths) - tokens.shape[1], 0)))
        positions = torch.arange(max(lengths), device=tokens.device)
        is_padding = positions >= torch.tensor(counts, device=tokens.device)[:, None]
        embedded = self.cap_embedder(tokens)
        return torch.where(is_padding[..., None], self.cap_pad_token, embedded), lengths

    def _text_tokens(self, x: Tensor, cond: Conditioning) -> Float[Tensor, "B L E"]:
        """The text's tokens; `UserError` for a latent or a conditioning that does not fit."""
        if cond.tokens is None or cond.tokens.shape[2] != self.token_width:
            state = "missing" if cond.tokens is None else f"of width {cond.tokens.shape[2]}"
            raise UserError(
                f"Z-Image attends to text of width {self.token_width}: "
                f"Conditioning.tokens (B, L, {self.token_width}) is {state}"
            )
        if cond.mask is not None and cond.mask.shape != cond.tokens.shape[:2]:
            raise UserError(
                f"Conditioning.mask is {tuple(cond.mask.shape)}: expected one value a text token, "
                f"{tuple(cond.tokens.shape[:2])}"
            )
        for name in ("concat", "residuals", "image_tokens", "references"):
            if getattr(cond, name) is not None:
                raise UserError(
                    f"Z-Image has no use for Conditioning.{name}: leave it out, or take a model "
                    "that reads it"
                )
        if x.shape[1] != self.in_channels:
            raise UserError(
                f"Z-Image takes latents of {self.in_channels} channels and was given {x.shape[1]}"
            )
        return cond.tokens

    def _check_positions(self, text: int, rows: int, columns: int) -> None:
        """Raise `UserError` for more tokens than the axes have positions, counted from 0."""
        needed = (text + 2, rows, columns)
        if any(count > most for count, most in zip(needed, self.config.axes_lens, strict=True)):
            raise UserError(
                f"a text of {text} tokens with padding and {rows} x {columns} tokens of the image "
                f"need {needed} positions: this Z-Image has {self.config.axes_lens}; shorten the "
                "prompt or ask for a smaller image"
            )

    @classmethod
    def shape_fields(cls, config: Any, channels: int, side: int) -> dict[str, Any]:
        """Fields for other latents: no field is the side."""
        return {"in_channels": channels}

    @property
    def sample_size(self) -> int:
        """The default side of its latents: 1024 pixels, in no config."""
        return 128

    @property
    def token_width(self) -> int:
        """Channels of `Conditioning.tokens`."""
        return self.config.cap_feat_dim

    @property
    def patch(self) -> int:
        """Latent cells along a side of one token."""
        return self.config.all_patch_size[0]


def _patches(x: Float[Tensor, "B C h w"], patch: int) -> Float[Tensor, "B N D"]:
    """Cut a map into patches, row by row, with channels last within a token.

    token[(i p + j) C + c] = x[c, p r + i, p s + j] for the patch at (r, s); inverse of `unpatched`.
    """
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, -1, patch * patch * c)


CLASSES = {"ZImageTransformer2DModel": (ZImageTransformer, ZImageConfig)}
