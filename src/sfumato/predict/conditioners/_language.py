"""A language model that reads prompts in a chat's frame, with its tokenizer: Mistral Small 3 (with
its eyes, which stay shut) or Qwen3.

The prompt becomes a user's message, the chat's template puts its marks around it, and the states of
some of the layers, side by side, are what a diffusion model attends to. Words look back only, and
never at padding.

    tokenizer/      tokenizer.json, tokenizer_config.json, and the template of the chat in it or in
                    chat_template.jinja; Mistral's folder may hold the settings of a processor for
                    pictures too, which are kept as they are
    text_encoder/   config.json and model.safetensors (or shards, or a variant)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.errors import UserError, explained
from sfumato.io.atomic import atomic_file
from sfumato.predict.conditioners._parts import (
    ANY,
    check_fields,
    fill,
    padded,
    read_network,
    require_count,
    require_finite_states,
    require_transformers,
    table,
    tokenizer_hash,
    write_network,
)

CLASSES = {"mistral3": "Mistral3ForConditionalGeneration", "qwen3": "Qwen3ForCausalLM"}
"""The model's class by the `model_type` of its config."""
CONFIGS = {"mistral3": "Mistral3Config", "qwen3": "Qwen3Config", "mistral": "MistralConfig"}
HEAD = "lm_head.weight"
NAMES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
"""How Mistral 3's weights are called in files, and by transformers since version 4.52."""
DECISIVE = (
    *(
        "model_type",
        "hidden_act",
        "rms_norm_eps",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("rope_parameters", "sliding_window", "layer_types", "attention_bias"),
)
"""Fields that change states, and that the shapes of the weights do not all show."""
HARMLESS = set(
    "rope_theta rope_scaling bos_token_id eos_token_id pad_token_id tie_word_embeddings vision_feature_layer is_composition".split()
)
"""Fields of older configs, which transformers takes into newer ones, and such as change nothing
where only text is read."""
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "chat_template.json")
PICTURE = "[IMG]"
"""The mark of a picture in Mistral's text: taken out of prompts, as FLUX.2's own program does,
because there is no picture."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """tokenizer: of transformers. model: one of `CLASSES`. template: the chat's, in Jinja. kept:
    files of the tokenizer's folder, by name, that are written back as they were.
    """

    tokenizer: Any
    model: Any
    template: str
    kept: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = self.text_config.vocab_size
        if self.tokenizer.pad_token_id is None:
            raise UserError(
                "tokenizer has no padding token: expected the one of the model's own; copy its files again"
            )
        if max(len(self.tokenizer) - 1, self.tokenizer.pad_token_id) >= size:
            raise UserError(
                f"tokenizer has {len(self.tokenizer)} tokens, language model {size}: use parts of one model"
            )

    @property
    def kind(self) -> str:
        """ "mistral3" or "qwen3"."""
        return self.model.config.model_type

    @property
    def text_config(self) -> Any:
        """The config of the part that reads text."""
        return getattr(self.model.config, "text_config", self.model.config)

    @property
    def width(self) -> int:
        """Channels of a position's state."""
        return self.text_config.hidden_size

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return self.text_config.num_hidden_layers

    def framed(self, prompt: str, system: str | None) -> str:
        """A prompt in the chat's frame: after the system's message for Mistral; for Qwen up to
        where an answer without thinking would begin.
        """
        if self.kind == "qwen3":
            messages: list[dict[str, Any]] = (
                [{"role": "system", "content": system}] if system is not None else []
            )
            messages += [{"role": "user", "content": prompt}]
            more: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": False}
        else:
            said = [("system", system), ("user", prompt.replace(PICTURE, ""))]
            messages = [
                {"role": role, "content": [{"type": "text", "text": text}]}
                for role, text in said
                if text is not None
            ]
            more = {"add_generation_prompt": False}
        with explained("the tokenizer's chat template", ANY):
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, **more
            )

    @torch.no_grad()
    def encode(
        self, prompt: str, system: str | None, layers: Sequence[int], length: int, long: str
    ) -> tuple[Float[Tensor, "L D"], Bool[Tensor, " L"]]:
        """The states after some layers (1 is the first) side by side, at `length` positions, in
        float32; and where they are more than padding.

        long: "refuse" (`UserError`) or "cut" a text of more tokens. `NumericalError` where the
        numbers of the model's type do not suffice.
        """
        text = self.framed(prompt, system)
        begin = self.tokenizer.bos_token
        ids, mask = padded(
            self.tokenizer,
            text,
            length,
            long,
            prompt,
            special=begin is None or not text.startswith(begin),
        )
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        # without the head, and without Mistral's eyes
        reader = getattr(self.model.model, "language_model", self.model.model)
        # One row at a time: a matrix product of several rows may round otherwise, and a prompt's
        # bits would depend on its neighbours.
        found = reader(
            input_ids=ids[None],
            attention_mask=mask[None].long(),
            output_hidden_states=True,
            use_cache=False,
        )
        states = torch.cat([found.hidden_states[layer][0] for layer in layers], 1).float()
        require_finite_states(states, self.model, prompt)
        return states, mask

    def identity(self) -> dict[str, Any]:
        """What decides its states besides the weights, as JSON."""
        config = self.text_config.to_dict()
        return {
            "config": {name: config.get(name) for name in DECISIVE},
            "tokenizer": tokenizer_hash(self.tokenizer),
            "template": self.template,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Its weights by the names that files have. Not copies."""
        found = self.model.state_dict()
        if found[HEAD].data_ptr() == self.model.get_input_embeddings().weight.data_ptr():
            del found[HEAD]  # one table under two names
        return {
            _renamed(key, [(new, old) for old, new in NAMES]) if self.kind == "mistral3" else key: t
            for key, t in found.items()
        }

    def to_config(self) -> dict[str, Any]:
        """The JSON of config.json, as transformers writes it, and as its versions before 5 read
        it.
        """
        return {**_with_theta(self.model.config.to_dict()), "architectures": [CLASSES[self.kind]]}

    def index(self) -> dict[str, Any]:
        """The entries of model_index.json."""
        name = type(self.tokenizer).__name__
        if self.kind == "mistral3" and not {*PROCESSOR[:2]}.isdisjoint(self.kept):
            tokenizer = "PixtralProcessor"
        else:
            tokenizer = (
                "Qwen2TokenizerFast"
                if name.startswith("Qwen2Tokenizer")
                else "PreTrainedTokenizerFast"
            )
        return {
            "tokenizer": ["transformers", tokenizer],
            "text_encoder": ["transformers", CLASSES[self.kind]],
        }

    def save(self, tokenizer: Path, encoder: Path, dtype: torch.dtype | None = None) -> None:
        """Writes both folders; the weights in `dtype`, by default their own. `NumericalError` for
        weights that are not finite in it.
        """
        write_network(encoder, self.to_config(), self.tensors(), dtype)
        tokenizer.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(tokenizer)
        for name, content in self.kept.items():
            with atomic_file(tokenizer / name) as temporary:
                temporary.write_bytes(content)


def read_language_model(
    tokenizer: Path, encoder: Path, dtype: torch.dtype | None, variant: str | None = None
) -> LanguageModel:
    """Opens both folders; `UserError` for what is missing, of another kind, or not finite. variant:
    the weights to prefer, such as "fp16".
    """
    require_transformers()
    model = read_network(encoder, dtype, variant, build_language_model)
    kept = {
        name: (tokenizer / name).read_bytes() for name in PROCESSOR if (tokenizer / name).exists()
    }
    opened = _read_tokenizer(tokenizer)
    template = opened.chat_template or table(tokenizer / PROCESSOR[2]).get("chat_template")
    if not isinstance(template, str):
        raise UserError(
            f"{tokenizer} has no chat template: expected one in tokenizer_config.json or chat_template.jinja; copy its files again"
        )
    with explained(tokenizer, ANY):
        return LanguageModel(opened, model, template, kept)


def _read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    # Without its files the library makes a tokenizer of a few tokens, and says nothing.
    if not (folder / "tokenizer.json").exists() and not all(
        (folder / name).exists() for name in ("vocab.json", "merges.txt")
    ):
        raise UserError(
            f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"
        )
    table(folder / "tokenizer_config.json")
    with explained(folder, ANY):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def build_language_model(
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    path: Path,
    file: Path,
    looked: Any,
) -> Any:
    """The model of a config and its weights. path, file: where they are from, for what is said
    about them. looked: looks for NaN and infinity there, and says whether it did.
    """
    import transformers

    kind = values.get("model_type")
    if kind not in CLASSES or values.get("architectures", [CLASSES[kind]]) not in (
        None,
        [CLASSES[kind]],
    ):
        raise UserError(
            f"{path} is of type {kind!r}, {values.get('architectures')}: expected one of {', '.join(CLASSES.values())}"
        )
    _check_fields(values, kind, path)
    ours = (
        {_renamed(key, NAMES): tensor for key, tensor in tensors.items()}
        if kind == "mistral3"
        else tensors
    )
    embed = (
        "model.language_model.embed_tokens.weight"
        if kind == "mistral3"
        else "model.embed_tokens.weight"
    )

    def build() -> Any:
        config = getattr(transformers, CONFIGS[kind]).from_dict(values)
        _check_config(getattr(config, "text_config", config))
        return getattr(transformers, CLASSES[kind])(config)

    # The head is not run: where a file has none, the table of tokens stands for it, as in models
    # that tie the two.
    return fill(build, ours, {HEAD: embed}, lambda key: dtype, path, file, looked)


def _with_theta(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, and those within it, with the base of rotary positions where transformers 4 looks
    for it: it would take another, and say nothing.
    """
    found = {
        key: _with_theta(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
    }
    theta = (found.get("rope_parameters") or {}).get("rope_theta")
    return found if theta is None else {**found, "rope_theta": theta}


def _renamed(key: str, names: Sequence[tuple[str, str]]) -> str:
    """A key under its other name, if it has one."""
    return next((new + key.removeprefix(old) for old, new in names if key.startswith(old)), key)


def _check_fields(values: Mapping[str, Any], kind: str, path: Path) -> None:
    """`UserError` for fields that the model does not know, Mistral's reader among them."""
    import transformers

    check_fields(
        values,
        set(getattr(transformers, CONFIGS[kind])().to_dict()) | HARMLESS,
        path,
        "this language model",
    )
    if kind == "mistral3":
        inner = values.get("text_config", {})
        if not isinstance(inner, dict) or inner.get("model_type", "mistral") != "mistral":
            raise UserError(
                f"{path}: text_config is not one of type mistral: FLUX.2 reads with Mistral Small 3; copy the file again"
            )
        check_fields(inner, set(transformers.MistralConfig().to_dict()) | HARMLESS, path, "Mistral")


def _check_config(config: Any) -> None:
    """What transformers would build and then stumble over."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "head_dim")
    for name in (*sizes, "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        require_count(name, getattr(config, name))
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise UserError(
            f"{config.num_attention_heads} heads of {config.head_dim} numbers over {config.num_key_value_heads} keys: expected a multiple, and an even size"
        )
    if not isinstance(config.rms_norm_eps, float) or not 0 < config.rms_norm_eps < 1:
        raise UserError(
            f"rms_norm_eps={config.rms_norm_eps!r}: expected a number above 0 and below 1"
        )
