"""A language model with its tokenizer: Mistral Small 3 or Qwen3.

The prompt becomes a user's message in the chat's template. A diffusion model attends to the states
after some of the layers, side by side. Attention is causal and masks padding.
Mistral's vision tower is loaded and stored, and not run.

    tokenizer/      tokenizer.json, tokenizer_config.json, and the chat template in it or in
                    chat_template.jinja; Mistral's folder may hold the settings of an image
                    processor too, which are kept as they are
    text_encoder/   config.json and model.safetensors (or shards, or a variant)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.errors import UserError, explained
from sfumato.io.atomic import atomic_file
from sfumato.predict.text_encoders._transformers import (
    ANY,
    build_network,
    check_counts,
    check_fields,
    check_length,
    check_tokenizer,
    load_network,
    open_tokenizer,
    read_optional_json,
    require_finite_states,
    tokenize,
    tokenizer_hash,
)
from sfumato.predict.text_encoders.base import Encoder, require_transformers
from sfumato.validate import number_in

CLASSES = {"mistral3": "Mistral3ForConditionalGeneration", "qwen3": "Qwen3ForCausalLM"}
"""The model's class by the `model_type` of its config."""
BASES = {"qwen3": "Qwen3Model"}
"""The class without the head, by `model_type`; names of its weights may lack `PREFIX`."""
PREFIX = "model."
CONFIGS = {"mistral3": "Mistral3Config", "qwen3": "Qwen3Config"}
HEAD = "lm_head.weight"
COMPUTED = ".rotary_emb.inv_freq"
"""End of the names of a buffer of old files that follows from the config."""
NAMES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
"""Prefixes of Mistral 3's weights in files, and in transformers since version 4.52."""
IGNORED_FIELDS = set(
    "rope_theta rope_scaling bos_token_id eos_token_id pad_token_id "
    "vision_feature_layer is_composition".split()
)
"""Fields of older configs, which transformers converts, and fields without effect on text."""
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "chat_template.json")
IMAGE_TOKEN = "[IMG]"
"""The mark of an image in Mistral's text.

It is removed from prompts, as FLUX.2's own program does, because there is no image.
"""


@dataclass(frozen=True, eq=False)
class LanguageModel(Encoder):
    """A language model with its chat template.

    Attributes:
        tokenizer: A tokenizer of transformers.
        model: One of `CLASSES`.
        template: The chat template, in Jinja.
        extra_files: Files of the tokenizer's folder, by name, that are written back unchanged.
    """

    CONFIG_FIELDS = tuple(
        "model_type hidden_act rms_norm_eps num_attention_heads num_key_value_heads head_dim "
        "rope_parameters sliding_window layer_types attention_bias".split()
    )

    template: str
    extra_files: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = self.text_config.vocab_size
        check_tokenizer(self.tokenizer, "pad", "the model's own", "language model", size, 0)

    @property
    def kind(self) -> str:
        """The `model_type`, "mistral3" or "qwen3"."""
        return self.model.config.model_type

    @property
    def text_config(self) -> Any:
        """The config of the language part."""
        return getattr(self.model.config, "text_config", self.model.config)

    @property
    def width(self) -> int:
        """Channels of a position's state."""
        return self.text_config.hidden_size

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.text_config.num_hidden_layers

    def apply_template(self, prompt: str, system: str | None, thinking: bool = False) -> str:
        """A prompt in the chat template.

        Mistral's begins with the system message. Qwen's ends where the answer would begin.

        Args:
            prompt: The user's message.
            system: The system message; None leaves it out.
            thinking: Whether Qwen's answer would begin with thinking.

        Raises:
            UserError: For a template that fails.
        """
        if self.kind == "qwen3":
            messages: list[dict[str, Any]] = (
                [{"role": "system", "content": system}] if system is not None else []
            )
            messages += [{"role": "user", "content": prompt}]
            options: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": thinking}
        else:
            texts = [("system", system), ("user", prompt.replace(IMAGE_TOKEN, ""))]
            messages = [
                {"role": role, "content": [{"type": "text", "text": text}]}
                for role, text in texts
                if text is not None
            ]
            options = {"add_generation_prompt": False}
        with explained("the tokenizer's chat template", ANY):
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, **options
            )

    def _adds_special_tokens(self, text: str) -> bool:
        """False where the template wrote the begin token, which the tokenizer would add."""
        begin = self.tokenizer.bos_token
        return begin is None or not text.startswith(begin)

    def check(
        self, prompt: str, system: str | None, length: int, truncation: str, thinking: bool = False
    ) -> None:
        """Raise every `UserError` of `encode`, without running the network."""
        text = self.apply_template(prompt, system, thinking)
        if truncation == "refuse":
            check_length(self.tokenizer, text, length, prompt, self._adds_special_tokens(text))

    @torch.no_grad()
    def encode(
        self,
        prompt: str,
        system: str | None,
        layers: Sequence[int],
        length: int,
        truncation: str,
        thinking: bool = False,
        padding: bool = True,
    ) -> tuple[Float[Tensor, "L D"], Bool[Tensor, " L"]]:
        """One prompt -> hidden states (L, layers * width) in float32 and a mask (L,).

        The mask is False on padding.

        Args:
            prompt: The user's message.
            system: The system message; None leaves it out.
            layers: The layers whose states stand side by side; 1 is the first.
            length: Positions L, those of the template among them.
            truncation: "refuse" a longer text, or "cut" it.
            thinking: Whether Qwen's answer would begin with thinking.
            padding: Whether the network runs on padding too; without it L is the text's own length.

        Raises:
            UserError: For a template that fails, and a longer text that is not cut.
            NumericalError: For states beyond the range of the network's dtype.
        """
        self.check(prompt, system, length, truncation, thinking)
        text = self.apply_template(prompt, system, thinking)
        ids, mask = tokenize(self.tokenizer, text, length, self._adds_special_tokens(text))
        if not padding:
            ids, mask = ids[mask], mask[mask]
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        # without the head, and without Mistral's vision tower
        network = getattr(self.model.model, "language_model", self.model.model)
        # One row at a time: a matrix product of several rows may round otherwise, and a prompt's
        # bits would depend on its neighbours.
        output = network(
            input_ids=ids[None],
            attention_mask=mask[None].long(),
            output_hidden_states=True,
            use_cache=False,
        )
        states = torch.cat([output.hidden_states[layer][0] for layer in layers], 1).float()
        require_finite_states(states, self.model, prompt)
        return states, mask

    def identity(self) -> dict[str, Any]:
        """JSON of everything beside the weights that decides the states, for hashing."""
        config = self.text_config.to_dict()
        return {
            "config": {name: config.get(name) for name in self.CONFIG_FIELDS},
            "tokenizer": tokenizer_hash(self.tokenizer),
            "template": self.template,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The weights by the names that files have; not copies."""
        tensors = self.model.state_dict()
        if tensors[HEAD].data_ptr() == self.model.get_input_embeddings().weight.data_ptr():
            del tensors[HEAD]  # one table under two names
        if self.kind != "mistral3":
            return dict(tensors)
        stored = [(new, old) for old, new in NAMES]
        return {_renamed(key, stored): tensor for key, tensor in tensors.items()}

    def to_config(self) -> dict[str, Any]:
        """The JSON of config.json, as transformers writes it and its versions before 5 read it."""
        return {**_with_theta(self.model.config.to_dict()), "architectures": [self.class_name]}

    def index(self) -> dict[str, Any]:
        """The entries of model_index.json."""
        tokenizer = "PreTrainedTokenizerFast"
        if self.kind == "mistral3" and not {*PROCESSOR[:2]}.isdisjoint(self.extra_files):
            tokenizer = "PixtralProcessor"
        elif type(self.tokenizer).__name__.startswith("Qwen2Tokenizer"):
            tokenizer = "Qwen2TokenizerFast"
        return {
            "tokenizer": ["transformers", tokenizer],
            "text_encoder": ["transformers", self.class_name],
        }

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's folder."""
        super().write_tokenizer(folder)
        for name, content in self.extra_files.items():
            with atomic_file(folder / name) as temporary:
                temporary.write_bytes(content)


def load_language_model(
    tokenizer: Path, encoder: Path, dtype: torch.dtype | None, variant: str | None = None
) -> LanguageModel:
    """Open a tokenizer's and a network's folder.

    Args:
        tokenizer: The tokenizer's folder.
        encoder: The network's folder.
        dtype: Of the weights; None leaves them as stored and unread, to be streamed.
        variant: The weights to prefer, such as "fp16".

    Raises:
        UserError: For files that are missing, of another kind, or not finite.
    """
    require_transformers()
    return with_tokenizer(load_network(encoder, dtype, variant, build_language_model), tokenizer)


def with_tokenizer(model: Any, tokenizer: Path) -> LanguageModel:
    """A network of `build_language_model` with the tokenizer of a folder.

    Raises:
        UserError: For a folder without tokenizer or chat template, or of another model.
    """
    extra_files = {
        name: (tokenizer / name).read_bytes() for name in PROCESSOR if (tokenizer / name).exists()
    }
    loaded = load_tokenizer(tokenizer)
    stored = read_optional_json(tokenizer / PROCESSOR[2])
    template = loaded.chat_template or stored.get("chat_template")
    if not isinstance(template, str):
        raise UserError(
            f"{tokenizer} has no chat template: expected one in tokenizer_config.json or "
            "chat_template.jinja; copy its files again"
        )
    with explained(tokenizer, ANY):
        return LanguageModel(loaded, model, template, extra_files)


def load_tokenizer(folder: Path) -> Any:
    """Open the tokenizer of a folder; `UserError` for one that is missing."""
    expected = "tokenizer.json, or vocab.json and merges.txt"
    files = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    return open_tokenizer(folder, "AutoTokenizer", expected, *files, trust_remote_code=False)


def build_language_model(
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    path: Path,
    file: Path,
    check_files: Callable[[], bool],
) -> Any:
    """The network of a config and its weights.

    Args:
        values: The config.
        tensors: Weights by the names that files have.
        dtype: Of the weights; None leaves them as stored, to be streamed.
        path: Where the config is from, for messages.
        file: Where the weights are from, for messages.
        check_files: Checks the files for NaN and infinity and returns True, or returns False where
            it cannot.

    Raises:
        UserError: For another kind of network, unknown fields, keys that do not fit and weights
            that are not finite.
    """
    import transformers

    kind = values.get("model_type")
    if kind not in CLASSES or values.get("architectures") not in (
        None,
        [CLASSES[kind]],
        [BASES.get(kind, CLASSES[kind])],
    ):
        raise UserError(
            f"{path} is of type {kind!r}, {values.get('architectures')}: expected one of "
            f"{', '.join(CLASSES.values())}"
        )
    _check_fields(values, kind, path)
    embed = f"{PREFIX}embed_tokens.weight"
    weights: Mapping[str, Tensor] = tensors
    if kind == "mistral3":
        embed = f"{PREFIX}language_model.embed_tokens.weight"
        weights = {_renamed(key, NAMES): tensor for key, tensor in tensors.items()}
    elif embed.removeprefix(PREFIX) in tensors:
        weights = {key if key == HEAD else PREFIX + key: t for key, t in tensors.items()}
    weights = {key: tensor for key, tensor in weights.items() if not key.endswith(COMPUTED)}

    def build() -> Any:
        config = getattr(transformers, CONFIGS[kind]).from_dict(values)
        _check_config(getattr(config, "text_config", config))
        return getattr(transformers, CLASSES[kind])(config)

    # The head is not run: where a file has none, the table of tokens takes its place, as in models
    # that tie the two.
    return build_network(build, weights, {HEAD: embed}, lambda key: dtype, path, file, check_files)


def _with_theta(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the base of rotary positions where transformers 4 looks for it.

    So are the configs within it. Without it that version takes another base, and raises nothing.
    """
    values = {
        key: _with_theta(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
    }
    theta = (values.get("rope_parameters") or {}).get("rope_theta")
    return values if theta is None else {**values, "rope_theta": theta}


def _renamed(key: str, names: Sequence[tuple[str, str]]) -> str:
    """A key by its other name, if it has one. names: pairs of prefixes, old and new."""
    return next((new + key.removeprefix(old) for old, new in names if key.startswith(old)), key)


def _check_fields(values: Mapping[str, Any], kind: str, path: Path) -> None:
    """Raise `UserError` for fields that the model does not have, in Mistral's text_config too."""
    import transformers

    config = getattr(transformers, CONFIGS[kind])
    check_fields(values, config, IGNORED_FIELDS, path, "this language model")
    if kind == "mistral3":
        inner = values.get("text_config", {})
        if not isinstance(inner, dict) or inner.get("model_type", "mistral") != "mistral":
            raise UserError(
                f"{path}: text_config is not one of type mistral: FLUX.2 has Mistral Small 3; copy "
                "the file again"
            )
        check_fields(inner, transformers.MistralConfig, IGNORED_FIELDS, path, "Mistral")


def _check_config(config: Any) -> None:
    """Raise `UserError` for values that transformers would build and fail on later."""
    check_counts(config, "vocab_size hidden_size intermediate_size head_dim")
    check_counts(config, "num_hidden_layers num_attention_heads num_key_value_heads")
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise UserError(
            f"{config.num_attention_heads} heads of {config.head_dim} numbers over "
            f"{config.num_key_value_heads} keys: expected a multiple, and an even size"
        )
    number_in("rms_norm_eps", config.rms_norm_eps, above=0, below=1)
