"""A CLIP text encoder with its tokenizer, run by transformers.

A causal transformer over at most 77 tokens: begin, words, end, padding (Radford et al. 2021,
arXiv:2103.00020, section 2.4). The state of the end token after the final norm stands for the whole
text (FLUX.1's "pooled" vector), or its projection where there is one (SDXL's, SD 3's).

    tokenizer/      tokenizer.json, or vocab.json and merges.txt; tokenizer_config.json
    text_encoder/   config.json and model.safetensors (or shards, or a variant), its keys with or
                    without the "text_model." that older versions put before them
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.errors import UserError, explained, quoted
from sfumato.io.atomic import hash_json
from sfumato.predict.text_encoders._transformers import (
    ANY,
    build_network,
    check_class,
    check_counts,
    check_fields,
    check_tokenizer,
    further_vectors,
    load_network,
    open_tokenizer,
    spell_out,
    without_heads,
)
from sfumato.predict.text_encoders.base import Encoder, require_transformers
from sfumato.validate import number_in

logger = logging.getLogger(__name__)

CLASSES = {False: "CLIPTextModel", True: "CLIPTextModelWithProjection"}
"""The network's class, by whether it has a projection."""
PREFIX = "text_model."
VISION_HEADS = ("vision_model.", "visual_projection.", "logit_scale")
"""Beginnings of the names of a whole CLIP's other weights."""
POSITIONS = "embeddings.position_ids"
"""0, 1, 2 ...: a key of old files, not a weight."""
LEGACY_END = 2
"""The end token's id in old configs, which is wrong.

transformers then takes the highest id of the text, which is the end token's.
"""


@dataclass(frozen=True)
class Token:
    """One token of a prompt.

    Attributes:
        id: Its number in the vocabulary.
        weight: The factor of its state.
        last: Whether it ends a word.
        comma: Whether it is a comma.
    """

    id: int
    weight: float = 1.0
    last: bool = True
    comma: bool = False


@dataclass(frozen=True, eq=False)
class ClipEncoder(Encoder):
    """A CLIP text encoder.

    Attributes:
        tokenizer: A `CLIPTokenizer`.
        model: A `CLIPTextModel`, or a `CLIPTextModelWithProjection` where `projected`.
        projected: Whether the pooled vector is projected.
    """

    CONFIG_FIELDS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id")

    projected: bool

    def __post_init__(self) -> None:
        config, tokenizer = self.model.config, self.tokenizer
        check_tokenizer(
            tokenizer, "bos eos pad", "a CLIP tokenizer", "text encoder", config.vocab_size
        )
        if not isinstance(tokenizer.model_max_length, int) or tokenizer.model_max_length < 3:
            raise UserError(
                f"tokenizer's model_max_length={tokenizer.model_max_length!r}: expected a whole "
                "number such as 77"
            )
        if config.eos_token_id not in (LEGACY_END, tokenizer.eos_token_id):
            raise UserError(
                f"text encoder has end token {config.eos_token_id}, tokenizer "
                f"{tokenizer.eos_token_id}: use parts of one model"
            )

    @property
    def length(self) -> int:
        """Positions of a chunk, with the begin and the end token."""
        return min(self.model.config.max_position_embeddings, self.tokenizer.model_max_length)

    @property
    def pooled_width(self) -> int:
        """Channels of the pooled vector."""
        return self.model.config.projection_dim if self.projected else self.width

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.model.config.num_hidden_layers

    def tokens(self, pieces: Sequence[tuple[str, float]]) -> list[Token]:
        """[(text, weight)] -> tokens without begin and end; every piece is tokenized on its own.

        A learned word is all of its vectors (`spell_out`), which stay in one chunk.
        """
        tokenizer, tokens = self.tokenizer, list[Token]()
        parts = further_vectors(tokenizer).values()
        inner = {number for names in parts for number in tokenizer.convert_tokens_to_ids(names)}
        for text, weight in pieces:
            text = spell_out(tokenizer, text)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            words = tokenizer.convert_ids_to_tokens(ids)
            for id, word, following in zip(ids, words, [*ids[1:], None][: len(ids)], strict=True):
                last = word.endswith("</w>") or id in tokenizer.added_tokens_decoder
                last = last and following not in inner
                tokens.append(Token(id, weight, last, comma=word == ",</w>"))
        return tokens

    @torch.no_grad()
    def encode(
        self, chunk: Sequence[Token], layer: int, norm: bool
    ) -> tuple[Float[Tensor, "L D"], Float[Tensor, " V"]]:
        """One chunk -> the states of all positions and the pooled vector, in float32.

        Padding is attended to: so the models were trained.

        Args:
            chunk: At most `length` - 2 tokens.
            layer: The layer whose states are taken, counted from the end: 1 is the last.
            norm: Whether the network's final norm follows.
        """
        tokenizer, network = self.tokenizer, getattr(self.model, "text_model", self.model)
        ids = [tokenizer.bos_token_id, *(token.id for token in chunk), tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (self.length - len(ids))
        # One row at a time: a matrix product of several rows may round otherwise, and a prompt's
        # bits would depend on its neighbours.
        output = self.model(
            torch.tensor([ids], device=self.model.device), output_hidden_states=True
        )
        states = output.hidden_states[-layer]
        states = network.final_layer_norm(states) if norm else states
        pooled = output.text_embeds if self.projected else output.pooler_output
        return states[0].float(), pooled[0].float()

    def encode_text(
        self, text: str, layer: int, norm: bool
    ) -> tuple[Float[Tensor, "L D"], Float[Tensor, " V"], Bool[Tensor, " L"]]:
        """`encode` the first chunk of a text, and a mask that is False on padding.

        For models whose second encoder takes the rest, which is logged. `layer` and
        `norm` as in `encode`.
        """
        tokens = self.tokens([(text, 1.0)])
        room = self.length - 2
        if len(tokens) > room:
            logger.info(
                "CLIP reads the first %d of %d tokens of prompt %s", room, len(tokens), quoted(text)
            )
        states, pooled = self.encode(tokens[:room], layer, norm)
        positions = torch.arange(self.length, device=states.device)
        return states, pooled, positions < min(len(tokens), room) + 2

    def identity(self) -> dict[str, Any]:
        """JSON of everything beside the weights that decides the states, for hashing."""
        tokenizer = self.tokenizer
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        rules = [tokenizer.get_vocab(), merges, [*special, self.length]]
        return {**super().identity(), "tokenizer": hash_json(rules)}

    def tensors(self) -> dict[str, Tensor]:
        """The weights by the names that files have, with `PREFIX`; not copies."""
        return {
            key if key.startswith((PREFIX, "text_projection.")) else PREFIX + key: tensor
            for key, tensor in self.model.state_dict().items()
        }

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's folder."""
        super().write_tokenizer(folder)
        # vocab.json and merges.txt, which older programs read
        self.tokenizer.backend_tokenizer.model.save(str(folder))


def load_clip(
    tokenizer: Path,
    encoder: Path,
    projected: bool,
    dtype: torch.dtype | None,
    variant: str | None = None,
) -> ClipEncoder:
    """Open a tokenizer's and a network's folder.

    Args:
        tokenizer: The tokenizer's folder.
        encoder: The network's folder.
        projected: Whether the network has a projection.
        dtype: Of the weights; None leaves them as stored and unread, to be streamed.
        variant: The weights to prefer, such as "fp16".

    Raises:
        UserError: For files that are missing, of another kind, or not finite.
    """
    require_transformers()

    def build(
        values: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype | None, *files: Any
    ) -> Any:
        return build_clip(values, tensors, projected, dtype, *files)

    loaded, model = load_tokenizer(tokenizer), load_network(encoder, dtype, variant, build)
    with explained(tokenizer, ANY):
        return ClipEncoder(loaded, model, projected)


def load_tokenizer(folder: Path) -> Any:
    """Open the tokenizer of a folder; `UserError` for one that is missing or of another kind."""
    files = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    return open_tokenizer(
        folder, "CLIPTokenizer", "tokenizer.json, or vocab.json and merges.txt", *files
    )


def build_clip(
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    projected: bool,
    dtype: torch.dtype | None,
    path: Path,
    file: Path,
    check_files: Callable[[], bool] = lambda: False,
) -> Any:
    """The network of a config and its weights.

    It is built without weights and then filled: transformers would draw missing ones at random. A
    projection that is not asked for and the vision half of a whole CLIP are left out.

    Args:
        values: The config, of a text encoder with a projection or without, or of a whole CLIP.
        tensors: Weights by names with or without `PREFIX`.
        projected: Whether the network has a projection.
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

    values = _text_config(values)
    check_class(values, path, "clip_text_model", CLASSES[projected], CLASSES[not projected])
    check_fields(values, transformers.CLIPTextConfig, {"model_type"}, path, "a CLIP text encoder")

    def build() -> Any:
        config = transformers.CLIPTextConfig.from_dict(values)
        _check_config(config)
        model = getattr(transformers, CLASSES[projected])(config)
        positions = torch.arange(config.max_position_embeddings, device="cpu")[None]
        embeddings = getattr(model, "text_model", model).embeddings
        embeddings.register_buffer("position_ids", positions, persistent=False)
        return model

    heads = VISION_HEADS if projected else (*VISION_HEADS, "text_projection.")
    weights = {
        key.removeprefix(PREFIX): tensor
        for key, tensor in without_heads(tensors, heads, file).items()
        if not key.endswith(POSITIONS)
    }
    return build_network(
        build,
        weights,
        {},
        lambda key: dtype,
        path,
        file,
        lambda: dtype is None or check_files(),
        PREFIX,
    )


def _text_config(values: dict[str, Any]) -> dict[str, Any]:
    """The config of the text half of a whole CLIP; other configs as they are."""
    inner = values.get("text_config")
    if values.get("model_type") != "clip" or not isinstance(inner, dict):
        return values
    return {**inner, "model_type": "clip_text_model", "architectures": None}


def _check_config(config: Any) -> None:
    """Raise `UserError` for values that transformers would build and fail on later."""
    check_counts(config, "vocab_size hidden_size intermediate_size projection_dim")
    check_counts(config, "num_hidden_layers num_attention_heads")
    check_counts(config, "max_position_embeddings", at_least=3)
    number_in("layer_norm_eps", config.layer_norm_eps, above=0)
