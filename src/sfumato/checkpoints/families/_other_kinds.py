"""Files of weights that are no models, told by their keys, for messages."""

import re
from collections.abc import Collection

ADAPTER = "which changes a model: expected a whole model"
PART = "under diffusers' names, a part of a model: give the folder that has model_index.json"

KINDS = (
    (
        r"lora_(?:up|down|A|B)\b|lora_unet_|lora_te\d?_|_lora\.(?:up|down)\.|\.lora\.(?:up|down)\."
        r"|_lora\d\.(?:up|down)\.|^lllite_|hada_w1|lokr_w1|oft_blocks|^\w+:\d+:(?:up|down)$",
        f"a LoRA or the like, {ADAPTER}",
    ),
    (
        r"^emb_params$|^string_to_param\b|^clip_[lg]$|^text_encoders_[01]$|^<[^<>]+>$",
        "a textual inversion, the vectors of a word: expected a whole model",
    ),
    (r"^(?:control_model|controlnet_\w+|input_hint_block)\.", f"a ControlNet, {ADAPTER}"),
    (r"^(?:image_proj|ip_adapter)\.|\.ip_adapter_", f"an IP-Adapter, {ADAPTER}"),
    (r"motion_modules\.", f"a motion module, {ADAPTER}"),
    (r"^(?:320|640|768|1280)\.[01]\.", f"a hypernetwork, {ADAPTER}"),
    (r"^optimizer_states?\b|^param_groups$", "the state of an optimizer: expected a model"),
    (r"\.rdb1\.|\.RDB1\.|^conv_first\.", "an upscaler of pixels (ESRGAN): expected a model"),
    (
        r"^\d+\.conv\.0\.weight$",
        "half of a tiny autoencoder: give it as --vae, beside its other half",
    ),
    (r"^(?:down_blocks|mid_block)\.", f"a U-Net {PART}"),
    (r"^(?:encoder\.down_blocks|decoder\.up_blocks)\.", f"an autoencoder {PART}"),
    (r"^(?:single_)?transformer_blocks\.\d", f"a transformer {PART}"),
    (
        r"^text_model\.|^embeddings\.token_embedding\."
        r"|^(?:encoder|decoder)\.block\.|^(?:model\.)?layers\.\d+\.(?:self_attn|mlp)\.",
        "a text encoder, a part of a model: expected the model's folder",
    ),
)
"""Patterns of keys, and the kind of file that has one: the first that fits counts."""


def kind_of(keys: Collection[str]) -> str | None:
    """The kind of a file with these keys, and what to do; None for none of `KINDS`."""
    for pattern, kind in KINDS:
        if any(re.search(pattern, key) for key in keys):
            return kind
    return None
