"""One CLIP text encoder with its tokenizer, read from and written to folders in diffusers' layout,
run by transformers.

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

from sfumato.errors import NumericalError, UserError, explained
from sfumato.io.atomic import hash_json, read_table, write_json, write_tensors
from sfumato.io.safetensors import (
    check_keys,
    find_weights,
    looked_at,
    not_finite,
    read_weights,
    require_finite,
)
from sfumato.predict.conditioners._chunks import Token
from sfumato.predict.conditioners._prompt import shown

logger = logging.getLogger(__name__)

CLASSES = {False: "CLIPTextModel", True: "CLIPTextModelWithProjection"}
PREFIX = "text_model."
STEM, PICKLED = "model", "pytorch_model"
"""What files of weights are called, with shards and variants: see sfumato.io.safetensors."""
POSITIONS = "embeddings.position_ids"
"""0, 1, 2 ...: a key of old files, not a weight."""
HARMLESS = {"dropout", "torch_dtype", "transformers_version", "architectures", "model_type"}
"""Fields of old configs that change no state."""
DECISIVE = ("hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id")
"""Fields that change states, and that the shapes of the weights do not show."""
ANY = (Exception,)
"""The libraries raise a dozen kinds of errors about a file's values, some of them no more than
`Exception`."""
LEGACY_END = 2
"""The end token's id in configs that name it wrongly: transformers then takes the highest id of the
text, which is the end token's."""


@dataclass(frozen=True, eq=False)
class ClipEncoder:
    """tokenizer: a `CLIPTokenizer`. model: a `CLIPTextModel`, or a `CLIPTextModelWithProjection`
    where `projected`.
    """

    tokenizer: Any
    model: Any
    projected: bool

    def __post_init__(self) -> None:
        config, tokenizer = self.model.config, self.tokenizer
        special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        if None in special or len(tokenizer) < 4:
            raise UserError(
                f"tokenizer has {len(tokenizer)} tokens, begin, end and padding are {special}: expected a CLIP tokenizer; copy its files again"
            )
        if not isinstance(tokenizer.model_max_length, int) or tokenizer.model_max_length < 3:
            raise UserError(
                f"tokenizer's model_max_length={tokenizer.model_max_length!r}: expected a whole number such as 77"
            )
        if max(len(tokenizer) - 1, *special) >= config.vocab_size:
            raise UserError(
                f"tokenizer has {len(tokenizer)} tokens, text encoder {config.vocab_size}: use parts of one model"
            )
        if config.eos_token_id not in (LEGACY_END, tokenizer.eos_token_id):
            raise UserError(
                f"text encoder has end token {config.eos_token_id}, tokenizer {tokenizer.eos_token_id}: use parts of one model"
            )

    @property
    def length(self) -> int:
        """Positions of a chunk, with the begin and the end token."""
        return min(self.model.config.max_position_embeddings, self.tokenizer.model_max_length)

    @property
    def width(self) -> int:
        """Channels of a position's state."""
        return self.model.config.hidden_size

    @property
    def pooled_width(self) -> int:
        """Channels of the pooled vector."""
        return self.model.config.projection_dim if self.projected else self.width

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return self.model.config.num_hidden_layers

    def tokens(self, pieces: Sequence[tuple[str, float]]) -> list[Token]:
        """[(text, weight)] -> tokens without begin and end; every piece is tokenized for itself."""
        found: list[Token] = []
        for text, weight in pieces:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for id, word in zip(ids, self.tokenizer.convert_ids_to_tokens(ids), strict=True):
                last = word.endswith("</w>") or id in self.tokenizer.added_tokens_decoder
                found.append(Token(id, weight, last, comma=word == ",</w>"))
        return found

    @torch.no_grad()
    def encode(
        self, chunk: Sequence[Token], layer: int, norm: bool
    ) -> tuple[Float[Tensor, "L D"], Float[Tensor, " V"]]:
        """One chunk -> the states of all positions (padding counts: so the models were trained) and
        the pooled vector, in float32.

        layer: 1 is the last, 2 the one before. norm: whether the model's final norm follows.
        """
        tokenizer, network = self.tokenizer, getattr(self.model, "text_model", self.model)
        ids = [tokenizer.bos_token_id, *(token.id for token in chunk), tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (self.length - len(ids))
        # One row at a time: a matrix product of several rows may round otherwise, and a prompt's
        # bits would depend on its neighbours.
        found = self.model(torch.tensor([ids], device=self.model.device), output_hidden_states=True)
        states = found.hidden_states[-layer]
        states = network.final_layer_norm(states) if norm else states
        return states[0].float(), (found.text_embeds if self.projected else found.pooler_output)[
            0
        ].float()

    def read(
        self, text: str, layer: int, norm: bool
    ) -> tuple[Float[Tensor, "L D"], Float[Tensor, " V"], Bool[Tensor, " L"]]:
        """`encode` of as much of a text as there is room for, as models read it that have a second
        encoder for the rest; and where there are words, their begin and their end.
        """
        found = self.tokens([(text, 1.0)])
        room = self.length - 2
        if len(found) > room:
            logger.info(
                "CLIP reads the first %d of %d tokens of prompt %s", room, len(found), shown(text)
            )
        states, pooled = self.encode(found[:room], layer, norm)
        return (
            states,
            pooled,
            torch.arange(self.length, device=states.device) < min(len(found), room) + 2,
        )

    def identity(self) -> dict[str, Any]:
        """What decides its states besides the weights, as JSON: fields of its config, and a hash
        over the tokenizer's vocabulary and merges.
        """
        model = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"]
        special = [
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
            self.tokenizer.pad_token_id,
            self.length,
        ]
        return {
            "config": {field: getattr(self.model.config, field) for field in DECISIVE},
            "tokenizer": hash_json([self.tokenizer.get_vocab(), model["merges"], special]),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Its weights by the names that files have. Not copies."""
        return {
            key if key.startswith((PREFIX, "text_projection.")) else PREFIX + key: tensor
            for key, tensor in self.model.state_dict().items()
        }

    def to_config(self) -> dict[str, Any]:
        """The JSON of config.json, as transformers writes it."""
        return {**self.model.config.to_dict(), "architectures": [CLASSES[self.projected]]}

    def save(self, tokenizer: Path, encoder: Path, dtype: torch.dtype | None = None) -> None:
        """Writes both folders; the weights in `dtype`, by default their own. `NumericalError` for
        weights that are not finite in it.
        """
        tensors = {
            key: tensor if dtype is None else tensor.to(dtype)
            for key, tensor in self.tensors().items()
        }
        for key in not_finite(tensors):
            raise NumericalError(
                f"weight {key} of {encoder.name} is NaN or infinite in {tensors[key].dtype}: nothing was written"
            )
        stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        for folder in (tokenizer, encoder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(encoder / "config.json", {**self.to_config(), "torch_dtype": stored})
        write_tensors(encoder / f"{STEM}.safetensors", tensors)
        self.tokenizer.save_pretrained(tokenizer)
        # vocab.json and merges.txt, which older programs read
        self.tokenizer.backend_tokenizer.model.save(str(tokenizer))


def read_encoder(
    tokenizer: Path,
    encoder: Path,
    projected: bool,
    dtype: torch.dtype | None,
    variant: str | None = None,
) -> ClipEncoder:
    """Opens both folders; `UserError` for what is missing, of another kind, or not finite. variant:
    the weights to prefer, such as "fp16".

    dtype None: as stored, not read and not looked at yet: to be streamed.
    """
    try:
        import transformers  # noqa: F401  (asked for once, here, so that its absence is one sentence)
    except ImportError as error:
        raise UserError(
            "text prompts need the package transformers: run `pip install 'sfumato[text]'`"
        ) from error
    opened, model = read_tokenizer(tokenizer), _read_model(encoder, projected, dtype, variant)
    with explained(tokenizer, ANY):
        return ClipEncoder(opened, model, projected)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; `UserError` for one that is missing or of another kind."""
    from transformers import CLIPTokenizer

    # Without its files the library makes a tokenizer of two tokens, and says nothing.
    if not (folder / "tokenizer.json").exists() and not all(
        (folder / name).exists() for name in ("vocab.json", "merges.txt")
    ):
        raise UserError(
            f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"
        )
    config = folder / "tokenizer_config.json"
    name = (
        str(read_table(config).get("tokenizer_class", "CLIPTokenizer"))
        if config.exists()
        else "CLIPTokenizer"
    )
    if name.removesuffix("Fast") != "CLIPTokenizer":
        raise UserError(f"{config} is of class {name!r}: expected CLIPTokenizer")
    with explained(folder, ANY):
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _read_model(
    folder: Path, projected: bool, dtype: torch.dtype | None, variant: str | None
) -> Any:
    """The encoder of a folder with config.json and weights."""
    path = folder / "config.json"
    values = read_table(path)
    files = find_weights(folder, STEM, variant, PICKLED)
    tensors = {
        key.removeprefix(PREFIX): tensor
        for key, tensor in read_weights(files).items()
        if not key.endswith(POSITIONS)
    }
    where = files[0] if len(files) == 1 else folder
    return build_model(
        values, tensors, projected, dtype, path, where, lambda: looked_at(files, tensors, dtype)
    )


def build_model(
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    projected: bool,
    dtype: torch.dtype | None,
    path: Path,
    file: Path,
    looked: Callable[[], bool] = lambda: False,
) -> Any:
    """Built without weights, then filled: transformers would draw what a file lacks, and say so in
    a log.

    tensors: by names without `PREFIX`. path, file: where the config and the weights are from, for
    what is said about them. looked: looks for NaN and infinity there, and says whether it did.
    """
    import transformers

    built_as = values.get("architectures") or [CLASSES[projected]]
    if values.get("model_type") != "clip_text_model" or built_as != [CLASSES[projected]]:
        raise UserError(
            f"{path} is of type {values.get('model_type')!r}, {built_as}: expected clip_text_model, {CLASSES[projected]}"
        )
    known = transformers.CLIPTextConfig().to_dict().keys() | HARMLESS
    for field in sorted(field for field in values.keys() - known if not field.startswith("_")):
        raise UserError(
            f"{path}: {field}={values[field]!r} is not known to a CLIP text encoder: it might change the result, so it is refused"
        )
    with explained(path, ANY), torch.device("meta"):
        config = transformers.CLIPTextConfig.from_dict(values)
        _check_config(config)
        model = getattr(transformers, CLASSES[projected])(config)
    names = {key.removeprefix(PREFIX): key for key in model.state_dict()}
    check_keys({name: model.state_dict()[key] for name, key in names.items()}, tensors, file)
    if dtype is not None and not looked():
        require_finite(tensors, file)
    model.load_state_dict(
        {
            names[name]: (tensor if dtype is None else tensor.to(dtype)).contiguous()
            for name, tensor in tensors.items()
        },
        assign=True,
    )
    embeddings = getattr(model, "text_model", model).embeddings
    embeddings.register_buffer(
        "position_ids", torch.arange(model.config.max_position_embeddings)[None], persistent=False
    )
    return model.eval().requires_grad_(False)


def _check_config(config: Any) -> None:
    """What transformers would build and then stumble over."""
    counts = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "projection_dim",
        "num_hidden_layers",
        "num_attention_heads",
    )
    for field, least in (*((field, 1) for field in counts), ("max_position_embeddings", 3)):
        value = getattr(config, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{field}={value!r}: expected a whole number of at least {least}")
    if not isinstance(config.layer_norm_eps, float) or config.layer_norm_eps <= 0:
        raise UserError(f"layer_norm_eps={config.layer_norm_eps!r}: expected a number above 0")
