"""Z-Image on disk (Z-Image team 2025, arXiv:2511.22699): Z-Image-Turbo and Z-Image.

The original has one matrix for q, k and v. All other layers have the same tensors as in diffusers.
The autoencoder is FLUX.1's, the text encoder Qwen3 with 4 billion parameters, whose head is never
used and is in no single file. Turbo and the base model differ in no config but the scheduler's:
their shift is 3 and 6. Single files without sfumato's metadata are opened as Turbo.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sfumato.checkpoints.checkpoint import Component, LoadOptions, RawCheckpoint
from sfumato.checkpoints.families._base import NETWORK, Config, Encoders, Tower
from sfumato.checkpoints.families._transformer import FLOW, SINUSOIDAL, TransformerFamily, axes
from sfumato.checkpoints.lazy_tensor import LazyTensors, load_tensors
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import WeightMap, chunked, linear, weight
from sfumato.predict.conditioners.z_image_text import ZImageText, ZImageTextConfig
from sfumato.predict.networks.base import Network
from sfumato.predict.networks.z_image import ZImageConfig
from sfumato.predict.text_encoders.language_model import (
    BASES,
    CLASSES,
    HEAD,
    PREFIX,
    LanguageModel,
    build_language_model,
    with_tokenizer,
)

_PATCH, _HEAD = 2, 128
_HIDDEN = 1024
"""Width between the two layers of the time embedding."""
_PIPELINE = "ZImagePipeline"
_TURBO, _BASE = {"steps": 8, "guidance": 1.0}, {"steps": 50, "guidance": 5.0}
"""Steps and guidance of the models' cards, whose scale is one less: 0 and 4."""
_TURBO_SHIFT, _BASE_SHIFT = 3.0, 6.0


@dataclass(frozen=True)
class Qwen3Tower(Tower):
    """Qwen3, with transformers' names."""

    decisive = (
        *("hidden_act", "rms_norm_eps", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("rope_theta", "rope_scaling", "sliding_window", "attention_bias"),
    )
    tokenizer_class = "Qwen2TokenizerFast"

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Fields of Qwen3ForCausalLM, as transformers has them."""
        layer = f"{PREFIX}layers.0"
        head = shapes.size(f"{layer}.self_attn.q_norm.weight")
        queries, keys = (shapes.size(f"{layer}.self_attn.{a}_proj.weight", 0, 2) for a in "qk")
        return {
            "architectures": [CLASSES["qwen3"]],
            "model_type": "qwen3",
            "hidden_size": shapes.size(f"{PREFIX}norm.weight"),
            "intermediate_size": shapes.size(f"{layer}.mlp.gate_proj.weight", 0, 2),
            "num_hidden_layers": shapes.count(f"{PREFIX}layers."),
            "num_attention_heads": shapes.heads(queries, head),
            "num_key_value_heads": shapes.heads(keys, head),
            "head_dim": head,
            "vocab_size": shapes.size(f"{PREFIX}embed_tokens.weight", 0, 2),
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "attention_bias": False,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        }

    def weight_map(self, config: Config, bare: bool = False) -> list[WeightMap]:
        """The same names in both."""
        return [_same(name, *shape) for name, shape in _qwen3(config)]

    def spare(self, config: Config, keys: Mapping[str, object]) -> set[str]:
        """The head."""
        return {self.prefix + HEAD}

    def named(self, tensors: LazyTensors) -> LazyTensors:
        """The language model's names, without its head."""
        return {
            key if key.startswith(PREFIX) else PREFIX + key: lazy
            for key, lazy in tensors.items()
            if key != HEAD
        }

    def encoder(
        self, component: Component, tokenizer: Path | None, raw: RawCheckpoint, options: LoadOptions
    ) -> LanguageModel:
        """The encoder with the tokenizer of a folder."""
        assert tokenizer is not None, "Qwen3's is in no package"
        tensors, path = load_tensors(component.tensors), raw.path
        stored = options.opened is None
        model = build_language_model(
            component.config, tensors, options.opened, path, path, lambda: stored
        )
        return with_tokenizer(model, tokenizer)


class ZImage(TransformerFamily):
    """Z-Image-Turbo and Z-Image."""

    name, title = "z_image", "Z-Image"
    class_name, mark = "ZImageTransformer2DModel", "layers.0.attention.qkv.weight"
    unread = ("norm_final.weight",)
    layers_field = "n_layers"
    latents = (0.3611, 0.1159)
    towers = (Qwen3Tower("text_encoder", "text_encoders.qwen3_4b.transformer."),)
    conditioner_class = ZImageText
    even_times = True
    pipelines: ClassVar = {"ZImage": {}}

    def detect(self, shapes: Shapes) -> bool:
        """True for the mark beside a padding token, which Lumina 2 does not have."""
        return super().detect(shapes) and any(
            prefix + "x_pad_token" in shapes.table for prefix in ("", NETWORK)
        )

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Fields of diffusers. Heads are as wide as the norms of q and k, or 128."""
        width, normed = shapes.size("x_embedder.bias"), shapes.has("layers.0.attention.q_norm.")
        head = shapes.size("layers.0.attention.q_norm.weight") if normed else _HEAD
        heads = shapes.heads(width, head)
        return {
            "_class_name": self.class_name,
            "all_patch_size": [_PATCH],
            "all_f_patch_size": [1],
            "in_channels": shapes.size("x_embedder.weight", 1, 2) // _PATCH**2,
            "dim": width,
            "n_layers": shapes.count("layers."),
            "n_refiner_layers": shapes.count("noise_refiner."),
            "n_heads": heads,
            "n_kv_heads": heads,
            "norm_eps": 1e-5,
            "qk_norm": normed,
            "cap_feat_dim": shapes.size("cap_embedder.0.weight"),
            "siglip_feat_dim": None,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": axes(shapes, head, [32, 48, 48]),
            "axes_lens": [1536, 512, 512],
        }

    def weight_map(self, config: Config) -> list[WeightMap]:
        """Names of diffusers."""
        return list(_network(ZImageConfig.from_dict(dict(config))))

    def scheduler(self, config: Config) -> dict[str, Any]:
        """Turbo's flow."""
        return FLOW | {"shift": _TURBO_SHIFT}

    def conditioner(self, encoders: Encoders, network: Network, settings: Config) -> ZImageText:
        """Qwen3 with the settings of the file."""
        return ZImageText(encoders[""], ZImageTextConfig.from_dict(settings))

    def file_pipeline(self, config: Config, references: int) -> str:
        """One pipeline for both."""
        return _PIPELINE

    def extras(
        self, pipeline: str, guidance: Any, parts: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """The text encoder's class: the language model without its head."""
        held = parts is not None and "text_encoder" in parts
        return {"text_encoder": ["transformers", BASES["qwen3"]]} if held else {}

    def defaults(self, index: Config, learned_guidance: bool, scheduler: Config) -> dict[str, Any]:
        """Of Turbo or of the base model, by the shift of times that is nearer."""
        shift = scheduler.get("shift") or scheduler.get("flow_shift") or _TURBO_SHIFT
        is_turbo = shift < (_TURBO_SHIFT + _BASE_SHIFT) / 2
        return super().defaults(index, learned_guidance, scheduler) | (
            _TURBO if is_turbo else _BASE
        )


FAMILIES = (ZImage(),)


def _network(config: ZImageConfig) -> Iterator[WeightMap]:
    width, embedding, patch = config.dim, config.embedding_width, config.all_patch_size[0]
    key, cells = f"{patch}-{config.all_f_patch_size[0]}", patch**2 * config.in_channels
    yield from linear("x_embedder", f"all_x_embedder.{key}", width, cells)
    yield _same("cap_embedder.0.weight", config.cap_feat_dim)
    for name, *shape in (
        ("cap_embedder.1", width, config.cap_feat_dim),
        ("t_embedder.mlp.0", _HIDDEN, SINUSOIDAL),
        ("t_embedder.mlp.2", embedding, _HIDDEN),
    ):
        yield from linear(name, name, *shape)
    for name in ("x_pad_token", "cap_pad_token"):
        yield _same(name, 1, width)
    for k in range(config.n_refiner_layers):
        yield from _block(f"noise_refiner.{k}", config, timed=True)
        yield from _block(f"context_refiner.{k}", config, timed=False)
    for k in range(config.n_layers):
        yield from _block(f"layers.{k}", config, timed=True)
    for name, *shape in (("adaLN_modulation.1", width, embedding), ("linear", cells, width)):
        yield from linear(f"final_layer.{name}", f"all_final_layer.{key}.{name}", *shape)


def _block(block: str, config: ZImageConfig, timed: bool) -> Iterator[WeightMap]:
    width, inner, attention = config.dim, config.inner, f"{block}.attention"
    if timed:
        name = f"{block}.adaLN_modulation.0"
        yield from linear(name, name, 4 * width, config.embedding_width)
    projections = [f"{attention}.to_{a}" for a in "qkv"]
    yield from chunked(f"{attention}.qkv", projections, width, width, bias=False)
    yield weight(f"{attention}.out.weight", f"{attention}.to_out.0.weight", width, width)
    for a in "qk" if config.qk_norm else "":
        source, target = f"{attention}.{a}_norm.weight", f"{attention}.norm_{a}.weight"
        yield weight(source, target, config.head_width)
    for name, *shape in (("w1", inner, width), ("w2", width, inner), ("w3", inner, width)):
        yield _same(f"{block}.feed_forward.{name}.weight", *shape)
    for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield _same(f"{block}.{name}.weight", width)


def _same(name: str, *shape: int) -> WeightMap:
    """A tensor of the same name in both."""
    return weight(name, name, *shape)


def _qwen3(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield f"{PREFIX}embed_tokens.weight", (config["vocab_size"], width)
    for k in range(config["num_hidden_layers"]):
        layer = f"{PREFIX}layers.{k}"
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, width)
        yield f"{layer}.self_attn.o_proj.weight", (width, queries)
        for name in "qk":
            yield f"{layer}.self_attn.{name}_norm.weight", (head,)
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}_proj.weight", (inner, width)
        yield f"{layer}.mlp.down_proj.weight", (width, inner)
        for name in ("input", "post_attention"):
            yield f"{layer}.{name}_layernorm.weight", (width,)
    yield f"{PREFIX}norm.weight", (width,)
