"""Networks of transformers: built from files, run on one text, written to folders.

A network is built without memory for its weights and then takes the tensors of its files as they
are. T5-XXL is 4.8 billion numbers, of which a second copy would not fit.
"""

import copy
import json
import logging
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sfumato.errors import NumericalError, UserError, explained, quoted, usable_device
from sfumato.io.atomic import hash_json, read_table, write_json, write_tensors
from sfumato.io.key_marks import require_unquantized_config
from sfumato.io.safetensors import (
    check_keys,
    find_weights,
    looked_at,
    not_finite,
    read_weights,
    require_finite,
)
from sfumato.io.signatures import odd_file
from sfumato.validate import whole_number

log = logging.getLogger("sfumato")

STEM, PICKLED = "model", "pytorch_model"
"""Names of files of weights, without shard and variant: see `sfumato.io.safetensors`."""
ANY = (Exception,)
"""Errors of the libraries about a file's values: of many kinds, some mere `Exception`."""
GENERATION_FIELDS = set(
    "add_cross_attention bad_words_ids begin_suppress_tokens cross_attention_hidden_size "
    "decoder_start_token_id diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task "
    "forced_bos_token_id forced_eos_token_id "
    "is_decoder is_encoder_decoder length_penalty max_length min_length no_repeat_ngram_size "
    "num_beam_groups num_beams num_return_sequences output_scores prefix pruned_heads "
    "remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id "
    "suppress_tokens temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings "
    "tokenizer_class top_k top_p torchscript typical_p use_bfloat16".split()
)
"""Fields of every config that transformers 4 wrote, about the generation of text."""
IGNORED_FIELDS = GENERATION_FIELDS | set(
    "architectures dtype torch_dtype transformers_version return_dict output_hidden_states "
    "output_attentions use_cache initializer_range attention_dropout dropout id2label label2id "
    "quantization_config problem_type chunk_size_feed_forward task_specific_params "
    "output_past".split()
)
"""Fields of transformers' configs that change no state in inference."""


# ---- one text ------------------------------------------------------------------------------------


def further_vectors(tokenizer: Any) -> dict[int, list[str]]:
    """Learned words of several vectors: the id of the first -> the names of the others.

    A textual inversion (Gal et al. 2022, arXiv:2208.01618) of three vectors is stored as the tokens
    `<cat>`, `<cat>_1` and `<cat>_2`, as diffusers adds them to a tokenizer.
    """
    names, words = tokenizer.added_tokens_encoder, dict[int, list[str]]()
    for name, number in names.items():
        others: list[str] = []
        while (other := f"{name}_{len(others) + 1}") in names:
            others.append(other)
        if others:
            words[number] = others
    return words


def spell_out(tokenizer: Any, text: str) -> str:
    """Write all vectors of a learned word where a text has its first.

    diffusers does the same (`maybe_convert_prompt`), but for words with capitals, of which it reads
    the first vector alone. A word that is written out stays as it is.
    """
    words = further_vectors(tokenizer)
    if not words:
        return text
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, spans = encoding["input_ids"], encoding["offset_mapping"]
    for k in reversed(range(len(ids))):
        others = words.get(ids[k], [])
        if others and ids[k + 1 : k + 2] != tokenizer.convert_tokens_to_ids(others[:1]):
            end = spans[k][1]
            text = " ".join((text[:end], *others)) + text[end:]
    return text


def check_length(tokenizer: Any, text: str, length: int, prompt: str, special: bool = True) -> None:
    """Refuse a text of more than `length` tokens.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The encoder's input.
        length: Positions of the encoder, special tokens among them.
        prompt: The user's own text, for the message: `text` may be it in a template.
        special: Whether the tokenizer adds its own tokens to those in the text.

    Raises:
        UserError: For a longer text, with the counts of the prompt's own tokens.
    """
    text, prompt = spell_out(tokenizer, text), spell_out(tokenizer, prompt)
    count = len(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    if count > length:
        frame = count - len(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
        raise UserError(
            f"prompt {quoted(prompt)} has {count - frame} tokens: expected at most "
            f"{length - frame}; shorten it, set truncation='cut' (--truncation cut), or raise "
            f"max_sequence_length={length} in the model's conditioner/config.json"
        )


def tokenize(
    tokenizer: Any, text: str, length: int, special: bool = True
) -> tuple[Int[Tensor, " L"], Bool[Tensor, " L"]]:
    """Token ids of a text, cut or padded to `length`, and a mask that is False on padding.

    The model's own tokenizer decides on which side it cuts and pads. `special` as in
    `check_length`.
    """
    encoding = tokenizer(
        spell_out(tokenizer, text),
        add_special_tokens=special,
        padding="max_length",
        truncation=True,
        max_length=length,
        verbose=False,
    )
    return torch.tensor(encoding["input_ids"]), torch.tensor(encoding["attention_mask"]).bool()


@torch.no_grad()
def last_states(
    tokenizer: Any, model: Any, text: str, length: int, mask_padding: bool
) -> tuple[Float[Tensor, "L D"], Bool[Tensor, " L"]]:
    """Hidden states after the last layer, in float32, and a mask that is False on padding.

    Args:
        tokenizer: A tokenizer of transformers.
        model: Its network.
        text: One prompt, which is cut where it is longer.
        length: Positions L of the result.
        mask_padding: Whether padding is masked in the network's attention.

    Raises:
        NumericalError: For states beyond the range of the network's dtype.
    """
    ids, mask = (part.to(model.device) for part in tokenize(tokenizer, text, length))
    # One row at a time: a matrix product of several rows may round otherwise, and a prompt's
    # bits would depend on its neighbours.
    output = model(
        ids[None], attention_mask=mask[None].long() if mask_padding else None, return_dict=True
    )
    states = output.last_hidden_state[0].float()
    require_finite_states(states, model, text)
    return states, mask


def require_finite_states(states: Tensor, model: Any, prompt: str) -> None:
    """Raise `NumericalError` for states that are NaN or infinite."""
    if not torch.isfinite(states).all():
        dtype = str(model.dtype).removeprefix("torch.")
        raise NumericalError(
            f"text encoder {type(model).__name__} in {dtype} gives NaN or infinite states for "
            f"prompt {quoted(prompt)}: load it in bfloat16 or float32"
        )


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of everything that decides how a tokenizer splits text."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = ("normalizer", "pre_tokenizer", "model", "post_processor", "added_tokens")
    padding = [tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.truncation_side]
    return hash_json([*(settings[rule] for rule in rules), *padding])


# ---- checks --------------------------------------------------------------------------------------


def check_class(values: Mapping[str, Any], path: Path, kind: str, *classes: str) -> None:
    """Raise `UserError` for the config of another network.

    Args:
        values: The config.
        path: The config's file, for the message.
        kind: The `model_type`.
        classes: Names in `architectures`, the usual one first; none: any.
    """
    built_as = values.get("architectures") or list(classes[:1])
    if values.get("model_type") != kind or (classes and built_as not in [[c] for c in classes]):
        expected = ", ".join([kind, *classes[:1]])
        raise UserError(
            f"{path} is of type {values.get('model_type')!r}, {built_as}: expected {expected}"
        )


def check_fields(
    values: Mapping[str, Any], config: Any, ignored: Set[str], path: Path, kind: str
) -> None:
    """Raise `UserError` for a field that a network's config does not have.

    Args:
        values: The config.
        config: Its class of transformers.
        ignored: Further fields, beside `IGNORED_FIELDS`, that change no state.
        path: The config's file, for the message.
        kind: The network's kind, for the message.
    """
    supported = config().to_dict().keys() | ignored | IGNORED_FIELDS
    for field in sorted(values.keys() - supported):
        if not field.startswith("_"):
            raise UserError(
                f"{path}: {field}={values[field]!r} is not known to {kind}: it might change the "
                "result, so it is refused"
            )


def check_counts(config: Any, fields: str, at_least: int = 1) -> None:
    """Raise `UserError` unless fields, named with spaces between, are whole numbers."""
    for field in fields.split():
        whole_number(field, getattr(config, field), at_least)


def check_tokenizer(
    tokenizer: Any, special: str, expected: str, network: str, vocabulary: int, at_least: int = 4
) -> None:
    """Raise `UserError` for a tokenizer of another kind or with tokens beyond a vocabulary.

    Args:
        tokenizer: A tokenizer of transformers.
        special: Names of the special tokens that it needs, with spaces between: "bos eos pad".
        expected: Its kind, for the message.
        network: The network's kind, for the message.
        vocabulary: Rows of the network's table of tokens.
        at_least: Number of tokens; without its files the library makes a few.
    """
    ids = [getattr(tokenizer, f"{name}_token_id") for name in special.split()]
    if None in ids or len(tokenizer) < at_least:
        raise UserError(
            f"tokenizer has {len(tokenizer)} tokens, special tokens ({special}) {ids}: expected "
            f"{expected}; copy its files again"
        )
    if max(len(tokenizer) - 1, *ids) >= vocabulary:
        raise UserError(
            f"tokenizer has {len(tokenizer)} tokens, {network} {vocabulary}: use parts of one model"
        )


def open_tokenizer(
    folder: Path, name: str, expected: str, *files: tuple[str, ...], **options: Any
) -> Any:
    """Open the tokenizer of a folder.

    Args:
        folder: The tokenizer's folder.
        name: Its class in transformers, which tokenizer_config.json has too ("Fast" or not);
            AutoTokenizer: any.
        expected: Description of `files`, for the message.
        files: Sets of files, one of which is complete.
        options: Further arguments of `from_pretrained`.

    Raises:
        UserError: For a tokenizer that is missing or of another kind.
    """
    import transformers

    # Without its files the library makes a tokenizer of a few tokens, and raises nothing.
    if not any(all((folder / file).exists() for file in group) for group in files):
        raise UserError(f"{folder} has no tokenizer: expected {expected}")
    config = folder / "tokenizer_config.json"
    stored = str(read_optional_json(config).get("tokenizer_class", name))
    if name not in ("AutoTokenizer", stored.removesuffix("Fast")):
        raise UserError(f"{config} is of class {stored!r}: expected {name}")
    texts = (file for group in files for file in group if not file.endswith(".model"))
    if odd := odd_file(folder / file for file in texts):
        raise UserError(odd)
    with explained(folder, ANY):
        tokenizer = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, **options
        )
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float):
        raise UserError(
            f"{folder}: tokenizer's model_max_length={length!r}: expected a whole number"
        )
    return tokenizer


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read the JSON object of a file, empty where the file is missing."""
    return read_table(path) if path.exists() else {}


# ---- networks ------------------------------------------------------------------------------------


def load_network(
    folder: Path, dtype: torch.dtype | None, variant: str | None, build: Callable[..., Any]
) -> Any:
    """Build a network from a folder's config.json and weights.

    Args:
        folder: The network's folder.
        dtype: Of the weights; None leaves them as stored and unread, to be streamed.
        variant: The weights to prefer, such as "fp16".
        build: Called with (config, tensors, dtype, config path, weights path, check_files); the
            last as in `build_network`.
    """
    path = folder / "config.json"
    values = read_table(path)
    require_unquantized_config(values, path)
    files = find_weights(folder, STEM, variant, PICKLED)
    tensors = read_weights(files)
    file = files[0] if len(files) == 1 else folder
    return build(values, tensors, dtype, path, file, lambda: looked_at(files, tensors, dtype))


def without_heads(
    tensors: Mapping[str, Tensor], heads: tuple[str, ...], where: object
) -> dict[str, Tensor]:
    """Leave out the weights of heads and other halves, which are not run; the log names them.

    Args:
        tensors: Weights by the names that files have.
        heads: Beginnings of the names to leave out.
        where: The file, for the log.
    """
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(heads)}
    if left := sorted({head for head in heads for key in tensors if key.startswith(head)}):
        count = len(tensors) - len(kept)
        log.warning(
            "%s: left out %d weights that are not used (%s*)", where, count, "*, ".join(left)
        )
    return kept


def build_network(
    build: Callable[[], Any],
    tensors: Mapping[str, Tensor],
    ties: Mapping[str, str],
    dtype_of: Callable[[str], torch.dtype | None],
    path: Path,
    file: Path,
    check_files: Callable[[], bool] = lambda: False,
    prefix: str = "",
) -> Any:
    """A network with the weights of its files, in eval mode and without gradients.

    Args:
        build: Makes the network; called on the meta device.
        tensors: Weights by the network's names, without `prefix`.
        ties: {key that a file may lack: key of the weight that takes its place}.
        dtype_of: The dtype of a key's weight; None leaves it as stored.
        path: Where the config is from, for messages.
        file: Where the weights are from, for messages.
        check_files: Checks the files for NaN and infinity and returns True, or returns False where
            it cannot.
        prefix: Prefix of the network's names that some versions of transformers have.

    Raises:
        UserError: For keys that do not fit the config, and weights that are NaN or infinite.
    """
    with explained(path, ANY), torch.device("meta"):
        model = build()
    state = model.state_dict()
    names = {key.removeprefix(prefix): key for key in state}
    expected = {name: state[key] for name, key in names.items()}
    missing = {k for k, source in ties.items() if k in names.keys() - tensors and source in tensors}
    check_keys({k: tensor for k, tensor in expected.items() if k not in missing}, tensors, file)
    if not check_files():
        require_finite(tensors, file)
    weights = {
        names[key]: tensor.to(dtype_of(key) or tensor.dtype).contiguous()
        for key, tensor in tensors.items()
    }
    model.load_state_dict(weights | {key: weights[ties[key]] for key in missing}, assign=True)
    for key in missing:  # one parameter under two names: it is moved once
        place, _, name = key.rpartition(".")
        setattr(model.get_submodule(place), name, model.get_parameter(ties[key]))
    with explained(path, ANY):
        _make_buffers(model)
    return model.eval().requires_grad_(False)


def _make_buffers(model: Any) -> None:
    """Compute the buffers that no file holds, by building their modules anew.

    Such as positions and rotary frequencies.
    """
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if names:
            fresh = type(module)(getattr(module, "config", model.config))
            for name in names:
                module.register_buffer(name, getattr(fresh, name), persistent=False)


def on_device(model: Any, device: str | torch.device) -> Any:
    """A copy of a network on a device, which shares the tensors that are there already.

    Raises:
        UserError: For a device that cannot be used.
    """
    with usable_device(device):
        memo: dict[int, Any] = {id(b): b.to(device) for b in model.buffers()}
        memo |= {id(p): nn.Parameter(p.to(device), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def write_network(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> None:
    """Write config.json and the weights.

    Args:
        folder: The network's folder.
        config: The JSON of config.json; its dtype is replaced by that of the weights.
        tensors: Weights by the names that files have.
        dtype: The dtype to store; None keeps each weight's own.

    Raises:
        NumericalError: For weights that are not finite in `dtype`; nothing is written then.
    """
    weights = {key: tensor.to(dtype or tensor.dtype) for key, tensor in tensors.items()}
    for key in not_finite(weights):
        raise NumericalError(
            f"weight {key} of {folder.name} is NaN or infinite in {weights[key].dtype}: nothing "
            "was written"
        )
    folder.mkdir(parents=True, exist_ok=True)
    stored = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    values = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": stored}
    write_json(folder / "config.json", values)
    write_tensors(folder / f"{STEM}.safetensors", weights)
