"""Latent Diffusion's own layout against networks that are written out here.

The autoencoder and the text transformer follow the papers (arXiv:2112.10752, appendix G; pre-norm
transformer) under the original names, and diffusers' networks have the same weights.
"""

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from torch import Tensor

import helpers.single_files as single
from helpers.tensors import relative_error
from sfumato.checkpoints.checkpoint import Checkpoint
from sfumato.checkpoints.families import by_name
from sfumato.checkpoints.lazy_tensor import load_tensors
from sfumato.checkpoints.shapes import Shapes


class Names:
    """Functions of the original layout, with weights by name.

    The names that were used are noted.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self.taken: set[str] = set()

    def get(self, name: str) -> Tensor:
        self.taken.add(name)
        return self.tensors[name]

    def has(self, name: str) -> bool:
        return any(k.startswith(name) for k in self.tensors)

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = self.get(f"{name}.weight")
        return F.conv2d(
            x,
            weight,
            self.get(f"{name}.bias"),
            stride,
            weight.shape[-1] // 2 if padding is None else padding,
        )

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.get(f"{name}.weight"), self.get(f"{name}.bias"), 1e-6)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def linear(self, name: str, x: Tensor, bias: bool = True) -> Tensor:
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias") if bias else None)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.nin_shortcut", x) if self.has(f"{name}.nin_shortcut") else x)

    def attend(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{a}", h).flatten(2) for a in "qkv")  # (B, C, N)
        weight = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, -1)
        return x + self.conv(f"{name}.proj_out", (v @ weight.transpose(1, 2)).reshape(x.shape))

    def level(self, name: str, x: Tensor, layers: int) -> Tensor:
        for k in range(layers):
            x = self.block(f"{name}.block.{k}", x)
            x = self.attend(f"{name}.attn.{k}", x) if self.has(f"{name}.attn.") else x
        return x

    def middle(self, half: str, x: Tensor) -> Tensor:
        return self.block(
            f"{half}.mid.block_2",
            self.attend(f"{half}.mid.attn_1", self.block(f"{half}.mid.block_1", x)),
        )

    def encoder(self, x: Tensor, levels: int, layers: int) -> Tensor:
        x = self.conv("encoder.conv_in", x)
        for k in range(levels):
            x = self.level(f"encoder.down.{k}", x, layers)
            if k < levels - 1:
                x = self.conv(f"encoder.down.{k}.downsample.conv", F.pad(x, (0, 1, 0, 1)), 2, 0)
        x = self.middle("encoder", x)
        return self.conv(
            "quant_conv", self.conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", x)))
        )

    def decoder(self, z: Tensor, levels: int, layers: int) -> Tensor:
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z)))
        for k in reversed(range(levels)):
            x = self.level(f"decoder.up.{k}", x, layers + 1)
            if k:
                x = self.conv(
                    f"decoder.up.{k}.upsample.conv",
                    F.interpolate(x, scale_factor=2.0, mode="nearest"),
                )
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)))

    def nearest(self, z: Tensor) -> Tensor:
        codes = self.get("quantize.embedding.weight")
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        return (
            codes[torch.cdist(flat, codes).argmin(1)]
            .reshape(z.shape[0], *z.shape[2:], -1)
            .permute(0, 3, 1, 2)
        )

    def bert(self, tokens: Tensor, layers: int, heads: int) -> Tensor:
        x = self.get("token_emb.weight")[tokens] + self.get("pos_emb.emb.weight")[: tokens.shape[1]]
        for k in range(layers):
            a, f = f"attn_layers.layers.{2 * k}", f"attn_layers.layers.{2 * k + 1}"
            h = self.layer_norm(f"{a}.0", x)
            q, key, v = (
                self.linear(f"{a}.1.to_{n}", h, False).unflatten(-1, (heads, -1)).transpose(1, 2)
                for n in "qkv"
            )
            weight = torch.softmax(q @ key.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
            x = x + self.linear(f"{a}.1.to_out", (weight @ v).transpose(1, 2).flatten(2))
            x = x + self.linear(
                f"{f}.1.net.2", F.gelu(self.linear(f"{f}.1.net.0.0", self.layer_norm(f"{f}.0", x)))
            )
        return self.layer_norm("norm", x)


def kinds(attends: list[bool]) -> dict[str, list[str]]:
    down = ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends]
    return {
        "down_block_types": down,
        "up_block_types": [k.replace("DownEncoder", "UpDecoder") for k in reversed(down)],
    }


# factors 4 to 32, with attention where the published models have it: at the lowest resolutions of
# f16 and f32, one but last of f8 (VQ)
@pytest.mark.parametrize(
    "attends",
    [[False] * 3, [False, False, False, True], [False] * 4 + [True], [False] * 4 + [True] * 2],
)
def test_autoencoders(attends: list[bool]) -> None:
    torch.manual_seed(0)
    widths = [32, 32, 64, 64, 64, 96][: len(attends)]
    shared = {
        "block_out_channels": widths,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 32,
        **kinds(attends),
    }
    image = torch.randn(1, 3, 64, 96)
    vq = diffusers.VQModel(num_vq_embeddings=7, vq_embed_dim=3, scaling_factor=1.0, **shared).eval()
    kl = diffusers.AutoencoderKL(**shared).eval()
    with torch.no_grad():
        # so that several codes are near
        vq.quantize.embedding.weight[:5] = vq.encode(image).latents.flatten(2)[0].T[:5]
        names = Names(
            single.join(single.gather({"vae": single.part(dict(vq.config), vq.state_dict())}, {}))
        )
        z = names.encoder(image, len(widths), 1)
        assert relative_error(z, vq.encode(image).latents) < 1e-5
        codes = names.nearest(z)
        assert len(torch.unique(codes.flatten(2)[0].T, dim=0)) > 3
        assert relative_error(names.decoder(codes, len(widths), 1), vq(image).sample) < 1e-5
        assert names.taken == names.tensors.keys()
        names = Names(
            single.join(single.gather({"vae": single.part(dict(kl.config), kl.state_dict())}, {}))
        )
        z = names.encoder(image, len(widths), 1)
        assert relative_error(z, kl.encode(image).latent_dist.parameters) < 1e-5
        assert (
            relative_error(names.decoder(z[:, :4], len(widths), 1), kl.decode(z[:, :4]).sample)
            < 1e-5
        )
        assert names.taken == names.tensors.keys()


def test_text_transformer() -> None:
    torch.manual_seed(0)
    config = LDMBertConfig(
        vocab_size=30,
        max_position_embeddings=9,
        encoder_layers=3,
        encoder_ffn_dim=48,
        head_dim=4,
        d_model=24,
    )
    network = LDMBertModel(config).eval()
    prefix = "cond_stage_model.transformer."
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
        tensors = load_tensors(
            by_name("ldm-text")
            .write(Checkpoint({"bert": single.part(config.to_dict(), network.state_dict())}))
            .tensors
        )
        names = Names({k.removeprefix(prefix): v for k, v in tensors.items()})
        tokens = torch.randint(0, 30, (2, 7))
        assert relative_error(names.bert(tokens, 3, 8), network(tokens)[0]) < 1e-5
    assert names.taken | {"to_logits.weight", "to_logits.bias"} == names.tensors.keys()
    result = (
        by_name("ldm-text")
        .towers[0]
        .config(Shapes({k: tuple(v.shape) for k, v in tensors.items()}, prefix, "file"))
    )
    again = LDMBertModel(
        LDMBertConfig(
            **{k: v for k, v in result.items() if k not in ("architectures", "model_type")}
        )
    ).eval()
    again.load_state_dict(
        single.weights(single.split_tensors(tensors, {}, "file").components["bert"])
    )
    with torch.no_grad():
        assert torch.equal(again(tokens)[0], network(tokens)[0])
