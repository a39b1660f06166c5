"""Vector-quantised autoencoder of Latent Diffusion: VQ-f4, f8, f16.

Rombach et al. 2022, arXiv:2112.10752, section 3.1, appendix G.

Each cell of the encoder's output h becomes the nearest of K learned codes (van den Oord et al.
2017, arXiv:1711.00937, eq. 1-2),

    code(h) = argmin_k |h - e_k|^2 = argmin_k |e_k|^2 - 2 <h, e_k>,

and e_code(h) is the decoder's input. Gradients pass straight through: d e / d h = 1 (section 3.2).
As in Latent Diffusion the quantisation is the decoder's first layer: the latent is h, which a
denoiser can be trained on, and `reconstruct` quantises. Encoder and decoder are those of
`compress.conv_autoencoder`. Config and names are diffusers' VQModel.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.compress.base import Posterior
from sfumato.compress.conv_autoencoder import (
    ConvAutoencoder,
    ConvAutoencoderConfig,
    Decoder,
    Encoder,
    without_plain_types,
)
from sfumato.config import read_config
from sfumato.errors import UserError
from sfumato.kernels import batch_invariant
from sfumato.types import LatentSpace
from sfumato.validate import positive_int

_FIXED = {"act_fn": "silu", "norm_type": "group"}
_ROWS = 4096  # cells that are compared with the codebook at a time: 4096 by 8192 codes are 128 MiB


@dataclass(frozen=True)
class VQConfig(ConvAutoencoderConfig):
    """The numbers of a vector-quantised autoencoder, with diffusers' names.

    `lookup_from_codebook` is a note on how other tools decode codes.

    Attributes:
        latent_channels: Channels inside encoder and decoder.
        num_vq_embeddings: Codes K.
        vq_embed_dim: Numbers in a code, and channels of the latent; None: `latent_channels`.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512)
    latent_channels: int = 3
    num_vq_embeddings: int = 8192
    vq_embed_dim: int | None = None
    scaling_factor: float = 0.18215
    lookup_from_codebook: bool = False
    force_upcast: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_int("num_vq_embeddings", self.num_vq_embeddings)
        positive_int("vq_embed_dim", self.code_channels)

    @property
    def code_channels(self) -> int:
        """Numbers in a code: the channels of the latent."""
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim

    @property
    def space(self) -> LatentSpace:
        """The latent space of one scaling factor."""
        c = self.code_channels
        return LatentSpace(c, self.factor, (0.0,) * c, (1.0 / self.scaling_factor,) * c)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VQConfig":
        """Read a diffusers config; `UserError` for unknown fields and unsupported values."""
        defaults = {
            "layers_per_block": 1,
            "sample_size": 32,
            "num_vq_embeddings": 256,
        }  # diffusers'
        return read_config(cls, defaults | without_plain_types(values), _FIXED)

    def to_dict(self) -> dict[str, Any]:
        """The JSON that diffusers' VQModel reads."""
        return {"_class_name": "VQModel", **self.fields(), **_FIXED}


class _Codebook(nn.Module):
    """K codes of C numbers, and the nearest of them to each cell."""

    def __init__(self, count: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(count, channels)

    def nearest(self, h: Float[Tensor, "B C h w"]) -> Int[Tensor, "B h w"]:
        """The index of the nearest code, the first of several at the same distance."""
        codes = self.embedding.weight.detach()
        lengths = codes.square().sum(1)
        cells = h.detach().movedim(1, -1).flatten(1, -2)  # (B, h*w, C)
        images = max(1, _ROWS // max(1, cells.shape[1]))

        def search(part: Tensor) -> Tensor:
            return torch.argmin(lengths - 2 * batch_invariant.linear(part, codes), dim=-1)

        nearest = [
            torch.cat([search(part) for part in batch.split(_ROWS, dim=1)], dim=1)
            for batch in cells.split(images)
        ]
        return torch.cat(nearest).unflatten(1, h.shape[2:])

    def look_up(self, indices: Int[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
        """The codes themselves."""
        return self.embedding(indices).movedim(-1, 1).contiguous()

    def forward(self, h: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Replace each cell by the nearest code. The gradient passes to h alone, unchanged."""
        quantised = self.look_up(self.nearest(h)).detach()
        # h - h is exactly 0: the value is the code's, to the bit
        return quantised + (h - h.detach()) if h.requires_grad else quantised


class VQModel(ConvAutoencoder):
    """The vector-quantised autoencoder: see the module's docstring.

    Built from a `VQConfig`; weights are random until loaded.
    """

    config: VQConfig

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        inner, code = config.latent_channels, config.code_channels
        self.encoder = Encoder(config.in_channels, inner, config.encoder_levels)
        self.quant_conv = batch_invariant.Conv2d(inner, code, 1)
        self.quantize = _Codebook(config.num_vq_embeddings, code)
        self.post_quant_conv = batch_invariant.Conv2d(code, inner, 1)
        self.decoder = Decoder(inner, config.out_channels, config.decoder_levels)

    def to_posterior(self, encoded: Float[Tensor, "B c h w"]) -> Posterior:
        """A point, before quantisation: std is 0."""
        return Posterior(encoded, torch.zeros_like(encoded))

    def to_cells(self, raw: Float[Tensor, "B c h w"]) -> Float[Tensor, "B c h w"]:
        """The nearest codes, the decoder's input."""
        return self.quantize(raw)

    def codes(self, image: Float[Tensor, "B C H W"]) -> Int[Tensor, "B h w"]:
        """The index of each cell's code, 0 to num_vq_embeddings - 1: log2(K) bits a cell."""
        return self.quantize.nearest(self.posterior(image).mean)

    def from_codes(self, indices: Int[Tensor, "B h w"]) -> Float[Tensor, "B C H W"]:
        """The image, not clamped, of indices of codes; `UserError` for an index of no code."""
        count = self.config.num_vq_embeddings
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < count:
            raise UserError(
                f"code indices from {int(indices.min())} to {int(indices.max())}: expected 0 to "
                f"{count - 1}, as `codes` returns"
            )
        return self.from_cells(self.quantize.look_up(indices))


CLASSES = {"VQModel": (VQModel, VQConfig)}
