"""Files of weights that are no models are refused by the name of their kind."""

import gzip
import json
from pathlib import Path

import pytest

from sfumato.checkpoints import families
from sfumato.errors import UserError

ASSETS = Path(__file__).parents[3] / "shared" / "assets"

KEYS = {
    "a LoRA": ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"],
    "a LoRA or the like": ["diffusion_model.double_blocks.0.img_attn.proj.lokr_w1"],
    "a textual inversion": ["emb_params"],
    "a textual inversion,": ["clip_g", "clip_l"],
    "a ControlNet": ["control_model.zero_convs.0.0.weight"],
    "an IP-Adapter": ["image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"],
    "a motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"],
    "a hypernetwork": ["768.0.linear.0.weight"],
    "the state of an optimizer": ["state", "param_groups"],
    "an upscaler of pixels": ["conv_first.weight"],
    "half of a tiny autoencoder": ["7.conv.0.weight", "7.conv.0.bias"],
    "a U-Net under": ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "an autoencoder under": ["encoder.down_blocks.0.resnets.0.conv1.weight"],
    "a transformer under": ["transformer_blocks.0.attn.to_q.weight"],
    "a text encoder": ["text_model.embeddings.token_embedding.weight"],
    "a text encoder,": ["model.layers.0.self_attn.q_proj.weight"],
    "of no known layout": ["x.weight"],
}


@pytest.mark.parametrize("kind", KEYS)
def test_the_kind_of_a_file(kind: str) -> None:
    with pytest.raises(UserError, match=f"^place.safetensors is {kind}"):
        families.detect(dict.fromkeys(KEYS[kind], (4, 4)), "place.safetensors")


PUBLISHED = {
    "lora": "a LoRA",
    "lokr": "a LoRA",
    "lllite": "a LoRA",
    "controlnet_state": "a ControlNet",
    "ip_adapter": "an IP-Adapter",
    "procs": "a LoRA",
}
"""Kinds by a part of a file's name."""


def test_published_adapters() -> None:
    if not (ASSETS / "keys").is_dir():
        pytest.skip("the files of other programs are absent")
    count = 0
    for path in sorted((ASSETS / "keys").glob("*.json*")):
        kind = next((kind for part, kind in PUBLISHED.items() if part in path.name), None)
        if kind is None:
            continue
        table = path.read_bytes()
        keys = json.loads(gzip.decompress(table) if path.suffix == ".gz" else table)
        assert (families.kind_of(list(keys)) or "").startswith(kind), path.name
        count += 1
    assert count > 15
