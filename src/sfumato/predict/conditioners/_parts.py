"""What conditioners with large text encoders share: prompts in, settings in a folder, a network
built from files, and moved to a device.

A network is built without memory for its weights and then takes those of its files as they are:
T5-XXL is 4.8 billion numbers, which nobody wants twice.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sfumato.config import read_config
from sfumato.errors import NumericalError, UserError, explained, unknown
from sfumato.io.atomic import hash_json, read_table, write_json, write_tensors
from sfumato.io.safetensors import (
    check_keys,
    find_weights,
    looked_at,
    not_finite,
    read_weights,
    require_finite,
)
from sfumato.predict.conditioners._prompt import shown

C = TypeVar("C")

STEM, PICKLED = "model", "pytorch_model"
"""What files of weights are called, with shards and variants: see sfumato.io.safetensors."""
ANY = (Exception,)
"""The libraries raise a dozen kinds of errors about a file's values, some of them no more than
`Exception`."""
LONG = ("refuse", "cut")
NOTES = set(
    "architectures dtype torch_dtype transformers_version return_dict output_hidden_states output_attentions use_cache initializer_range "
    "attention_dropout dropout id2label label2id problem_type chunk_size_feed_forward task_specific_params output_past".split()
)
"""Fields of transformers' configs that change no state in inference."""


# ---- prompts -------------------------------------------------------------------------------------


def texts(prompts: Sequence[str | None]) -> list[str]:
    """Prompts as texts; None, and nothing but spaces, is "". `UserError` for what is not a list of
    texts.
    """
    if (
        isinstance(prompts, str)
        or not prompts
        or not all(p is None or isinstance(p, str) for p in prompts)
    ):
        raise UserError(
            f"prompts {prompts!r}: expected a list of at least one, each a text or None"
        )
    return [prompt if prompt and prompt.strip() else "" for prompt in prompts]


def pairs(
    prompts: Sequence[str | None], prompts_2: Sequence[str | None] | None, readers: int
) -> list[tuple[str, str]]:
    """What the first encoder reads and what the others read, row by row; the same where `prompts_2`
    says nothing (None). `UserError` where that cannot be. readers: how many encoders there are.
    """
    first = texts(prompts)
    if prompts_2 is None:
        return list(zip(first, first, strict=True))
    second = texts(prompts_2)
    if readers < 2 or len(first) != len(second):
        raise UserError(
            f"{len(second)} prompts for a second text encoder, {len(first)} for the first of {readers}: expected as many, for at least two"
        )
    for one, two in zip(prompts, prompts_2, strict=True):
        if one is None and two is not None:
            raise UserError(
                f"no prompt but {shown(two)} for the second text encoder: expected both; '' is no words"
            )
    return [
        (a, a if given is None else b) for a, b, given in zip(first, second, prompts_2, strict=True)
    ]


def padded(
    tokenizer: Any, text: str, length: int, long: str, about: str, special: bool = True
) -> tuple[Int[Tensor, " L"], Bool[Tensor, " L"]]:
    """A text's token ids and where they are more than padding, as the model's own tokenizer cuts
    and pads to `length`.

    `UserError` for a longer text, unless `long` is "cut". about: the prompt, for that sentence.
    special: whether the tokenizer adds its own tokens to those that stand in the text.
    """
    if long == "refuse":
        count = len(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        if count > length:
            frame = count - len(
                tokenizer(about, add_special_tokens=False, verbose=False)["input_ids"]
            )
            raise UserError(
                f"prompt {shown(about)} has {count - frame} tokens: expected at most {length - frame}; "
                f"shorten it, set long='cut', or raise max_sequence_length={length}"
            )
    found = tokenizer(
        text,
        add_special_tokens=special,
        padding="max_length",
        truncation=True,
        max_length=length,
        verbose=False,
    )
    return torch.tensor(found["input_ids"]), torch.tensor(found["attention_mask"]).bool()


@torch.no_grad()
def states_of(
    tokenizer: Any, model: Any, text: str, length: int, masked: bool, long: str
) -> tuple[Float[Tensor, "L D"], Bool[Tensor, " L"]]:
    """The last states of a network of transformers at `length` positions in float32, and where they
    are more than padding.

    masked: whether words look away from padding. long: "refuse" (`UserError`) or "cut" a text of
    more tokens. `NumericalError` where the numbers of the model's type do not suffice.
    """
    ids, mask = padded(tokenizer, text, length, long, text)
    ids, mask = ids.to(model.device), mask.to(model.device)
    # One row at a time: a matrix product of several rows may round otherwise, and a prompt's bits
    # would depend on its neighbours.
    found = model(ids[None], attention_mask=mask[None].long() if masked else None, return_dict=True)
    states = found.last_hidden_state[0].float()
    require_finite_states(states, model, text)
    return states, mask


def require_finite_states(states: Tensor, model: Any, prompt: str) -> None:
    """`NumericalError` that says what to do about states that are NaN or infinite."""
    if not torch.isfinite(states).all():
        kind = str(model.dtype).removeprefix("torch.")
        raise NumericalError(
            f"text encoder {type(model).__name__} in {kind} gives NaN or infinite states for prompt {shown(prompt)}: load it in bfloat16 or float32"
        )


# ---- settings ------------------------------------------------------------------------------------


def check_settings(config: Any) -> None:
    """`UserError` for values of the settings that all these conditioners have: max_sequence_length,
    masked, long.
    """
    if config.long not in LONG:
        raise unknown("way with long prompts", config.long, LONG)
    if not isinstance(config.masked, bool):
        raise UserError(f"masked={config.masked!r}: expected true or false")
    require_count("max_sequence_length", config.max_sequence_length, 2)


def require_count(name: str, value: Any, least: int = 1) -> None:
    """`UserError` unless a value is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name}={value!r}: expected a whole number of at least {least}")


def read_settings(cls: type[C], name: str, folder: Path, told: Mapping[str, Any]) -> C:
    """The settings of a model's folder: those of conditioner/config.json, which must be of the
    conditioner `name`; for the rest, and where there is no such file, what the folder's other files
    say (`told`).
    """
    file = folder / "conditioner" / "config.json"
    if not file.exists():
        with explained(folder):
            return read_config(cls, told, {})
    values = read_table(file)
    if values.get("_class_name") != name:
        raise UserError(
            f"{file} is of class {values.get('_class_name')!r}: expected {name}, as the folder has its text encoders"
        )
    with explained(file):
        return read_config(cls, {**told, **values}, {})


def write_settings(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes conditioner/config.json."""
    (folder / "conditioner").mkdir(parents=True, exist_ok=True)
    write_json(folder / "conditioner" / "config.json", dict(values))


def table(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    return read_table(path) if path.exists() else {}


# ---- networks of transformers --------------------------------------------------------------------


def require_transformers() -> None:
    """`UserError` where the package that runs text encoders is not installed."""
    try:
        import transformers  # noqa: F401  (asked for once, here, so that its absence is one sentence)
    except ImportError as error:
        raise UserError(
            "text prompts need the package transformers: run `pip install 'sfumato[text]'`"
        ) from error


def check_fields(values: Mapping[str, Any], known: set[str], path: Path, what: str) -> None:
    """`UserError` for a field of a config that `what` does not know."""
    for field in sorted(
        field for field in values.keys() - known - NOTES if not field.startswith("_")
    ):
        raise UserError(
            f"{path}: {field}={values[field]!r} is not known to {what}: it might change the result, so it is refused"
        )


def read_network(
    folder: Path, dtype: torch.dtype | None, variant: str | None, build: Callable[..., Any]
) -> Any:
    """A network from config.json and the weights beside it: `build(values, tensors, dtype, path,
    file, looked)`, where path and file are what the two were read from, and looked as in `fill`.
    variant: the weights to prefer, such as "fp16".
    """
    path = folder / "config.json"
    values = read_table(path)
    files = find_weights(folder, STEM, variant, PICKLED)
    tensors = read_weights(files)
    return build(
        values,
        tensors,
        dtype,
        path,
        files[0] if len(files) == 1 else folder,
        lambda: looked_at(files, tensors, dtype),
    )


def fill(
    build: Callable[[], Any],
    tensors: Mapping[str, Tensor],
    ties: Mapping[str, str],
    kind: Callable[[str], torch.dtype | None],
    path: Path,
    file: Path,
    looked: Callable[[], bool] = lambda: False,
) -> Any:
    """A network of transformers with the weights of its files; `UserError` for keys and numbers
    that do not fit.

    ties: {key that a file may lack: key whose weight it is then}. kind: the dtype of a key's weight
    (None: as stored, to be streamed). path, file: where the config and the weights are from, for
    what is said about them. looked: looks for NaN and infinity there, and says whether it did.
    """
    with explained(path, ANY), torch.device("meta"):
        model = build()
    expected = model.state_dict()
    missing = {
        key
        for key, source in ties.items()
        if key in expected and key not in tensors and source in tensors
    }
    check_keys(
        {key: tensor for key, tensor in expected.items() if key not in missing}, tensors, file
    )
    if not looked():
        require_finite(tensors, file)
    ready = {
        key: tensor.to(kind(key) or tensor.dtype).contiguous() for key, tensor in tensors.items()
    }
    model.load_state_dict(ready | {key: ready[ties[key]] for key in missing}, assign=True)
    # one parameter under two names, not two with the same numbers: it is moved once
    for key in missing:
        place, _, name = key.rpartition(".")
        setattr(model.get_submodule(place), name, model.get_parameter(ties[key]))
    with explained(path, ANY):
        _make_buffers(model)
    return model.eval().requires_grad_(False)


def _make_buffers(model: Any) -> None:
    """Makes what is computed from the config and kept in no file (places, angles of rotary ones),
    by building the modules that hold it anew.
    """
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if names:
            fresh = type(module)(getattr(module, "config", model.config))
            for name in names:
                module.register_buffer(name, getattr(fresh, name), persistent=False)


def moved(model: Any, device: str | torch.device) -> Any:
    """A copy on a device, whose weights are made there at once; what is on that device already is
    shared. `UserError` for no such device.
    """
    try:
        memo: dict[int, Any] = {id(b): b.to(device) for b in model.buffers()}
        memo |= {id(p): nn.Parameter(p.to(device), requires_grad=False) for p in model.parameters()}
    except (RuntimeError, AssertionError) as error:
        # torch's words for a device that it does not know, or that is not there
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {str(device)!r} cannot be used ({reason}): expected one such as cpu or cuda"
        ) from error
    return copy.deepcopy(model, memo)


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash over all that decides how a tokenizer reads text."""
    known = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = [
        known[key]
        for key in ("normalizer", "pre_tokenizer", "model", "post_processor", "added_tokens")
    ]
    return hash_json(
        [*parts, tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.truncation_side]
    )


def write_network(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> None:
    """Writes config.json and the weights, in `dtype` or their own. `NumericalError` for weights
    that are not finite in it.
    """
    ready = {key: tensor if dtype is None else tensor.to(dtype) for key, tensor in tensors.items()}
    for key in not_finite(ready):
        raise NumericalError(
            f"weight {key} of {folder.name} is NaN or infinite in {ready[key].dtype}: nothing was written"
        )
    folder.mkdir(parents=True, exist_ok=True)
    stored = str(next(iter(ready.values())).dtype).removeprefix("torch.")
    write_json(
        folder / "config.json",
        {**{k: v for k, v in config.items() if k != "dtype"}, "torch_dtype": stored},
    )
    write_tensors(folder / f"{STEM}.safetensors", ready)
