"""Tokenizers of single files: original layouts hold weights only.

A tokenizer is the caller's, one that sfumato wrote into the file's metadata, or one on this
machine: of a package, of the cache of huggingface_hub, or from the hub.

CLIP's vocabulary (Radford et al. 2021, arXiv:2103.00020, section 2.4): 256 bytes as letters, the
same at a word's end, one entry a merge, begin and end. Latent Diffusion's text-to-image model
splits text as "bert-base-uncased" does (Devlin et al. 2019, arXiv:1810.04805).
"""

import base64
import gzip
import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sfumato.checkpoints.checkpoint import LoadOptions, RawCheckpoint
from sfumato.checkpoints.metadata import TOKENIZER, TOKENIZERS
from sfumato.errors import WRONG, UserError, explained
from sfumato.io.atomic import read_json
from sfumato.io.paths import expand_user
from sfumato.predict.text_encoders.base import Encoder
from sfumato.predict.text_encoders.bert import load_tokenizer
from sfumato.predict.text_encoders.t5 import SPIECE

HUB, BERT_HUB = "openai/clip-vit-large-patch14", "bert-base-uncased"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2  # of the list that OpenAI published, those that were used
_CLIP_FILES, _BERT_FILES = ["vocab.json", "merges.txt"], ["vocab.txt", "tokenizer_config.json"]
_FLAGS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
"""Settings of a `BertTokenizer` by their names in its normalizer."""
Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]
"""CLIP's entries with their numbers, and its merges."""
_SETTINGS = "settings"
"""Entry of the note with a tokenizer's settings that differ from the family's, by encoder."""
_WHOLE = "whole_words"
"""Entry of these settings: words that are tokens by themselves wherever they stand."""
log = logging.getLogger("sfumato")


# ---- CLIP ----------------------------------------------------------------------------------------


def pack_clip(encoders: Mapping[str, Encoder], pads: Mapping[str, str]) -> str:
    """The vocabulary of CLIP's tokenizers, for the metadata of a file.

    Settings that differ from those of the family's published models are noted beside it, with a
    warning: no other program reads them.

    Args:
        encoders: The text encoders by the ending of their folder's name; both of SDXL's have the
            same words.
        pads: The family's token that fills up prompts, for each of them.

    Raises:
        UserError: A tokenizer with added tokens, or of other rules.
    """
    tokenizer = [*encoders.values()][-1].tokenizer
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [list(m) if isinstance(m, list) else m.split(" ") for m in model["merges"]]
    note: dict[str, Any] = {"vocab": model["vocab"], "merges": merges}
    for end, encoder in encoders.items():
        positions = encoder.model.config.max_position_embeddings
        usual = _clip_settings(pads[end], positions)
        own = {name: getattr(encoder.tokenizer, name) for name in usual}
        own["model_max_length"] = min(own["model_max_length"], positions)
        if changed := {name: value for name, value in own.items() if value != usual[name]}:
            note.setdefault(_SETTINGS, {})[end] = changed
            log.warning(
                "tokenizer%s has %s instead of %s: the file notes it for sfumato, and other "
                "programs, which take their own, draw other images; save a folder for them",
                end,
                ", ".join(f"{name}={value!r}" for name, value in changed.items()),
                ", ".join(repr(usual[name]) for name in changed),
            )
    for end, encoder in encoders.items():
        length = encoder.model.config.max_position_embeddings
        again = clip_tokenizer(pads[end], length, None, {TOKENIZER: json.dumps(note)}, end)
        _require_same(f"tokenizer{end}", encoder.tokenizer, again)
        # such as "!", which a tokenizer that once padded with it never joins to a word
        whole = encoder.tokenizer.added_tokens_encoder.keys() - again.added_tokens_encoder.keys()
        if whole:
            note.setdefault(_SETTINGS, {}).setdefault(end, {})[_WHOLE] = sorted(whole)
    return json.dumps(note)


def _clip_settings(pad: str, length: int) -> dict[str, Any]:
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": pad}
    return {**special, "model_max_length": length}


def _require_same(name: str, tokenizer: Any, again: Any) -> None:
    """Raise `UserError` where a file would give back another tokenizer.

    Args:
        name: Its folder in a model's folder, for the message.
        tokenizer: The model's.
        again: The one that a reader of the file builds.
    """
    added = tokenizer.added_tokens_encoder.keys() - again.get_vocab().keys()
    if added:
        names = sorted(added, key=tokenizer.added_tokens_encoder.__getitem__)
        raise UserError(
            f"{name} has {len(added)} added tokens ({', '.join(names[:6])}"
            f"{', ...' if len(names) > 6 else ''}), such as those of textual inversions, "
            "for which a single file has no place: save a folder instead"
        )
    before, after = (json.loads(t.backend_tokenizer.to_str()) for t in (tokenizer, again))
    for rule in ("normalizer", "pre_tokenizer"):
        if before[rule] != after[rule]:
            raise UserError(
                f"{name} has a {rule} of its own, for which a single file has no place: "
                "save a folder instead"
            )
    if tokenizer.get_vocab() != again.get_vocab():
        raise UserError(
            f"{name} has other words than the model's other tokenizer, and a single file holds "
            "one list: save a folder instead"
        )


def clip_tokenizer(
    pad: str,
    length: int,
    folder: str | Path | None,
    metadata: Mapping[str, str],
    end: str = "",
) -> Any:
    """A `CLIPTokenizer`.

    Args:
        pad: The token that fills up prompts, where the metadata note no other.
        length: The number of positions.
        folder: With vocab.json and merges.txt; None: the file's own, or this machine's.
        metadata: The file's.
        end: The ending of its encoder's folder.

    Raises:
        UserError: There is no vocabulary.
    """
    from transformers import AddedToken, CLIPTokenizer

    vocab, merges = _vocabulary(folder, metadata)
    tables: Any = {"vocab": vocab, "merges": merges}
    noted = json.loads(metadata.get(TOKENIZER, "{}")).get(_SETTINGS, {}).get(end, {})
    settings, whole = _clip_settings(pad, length), []
    if isinstance(noted, dict):
        noted = dict(noted)
        whole = noted.pop(_WHOLE, [])
    if not isinstance(noted, dict) or not noted.keys() <= settings.keys():
        raise UserError(
            f"the note {TOKENIZER} has settings {noted!r}: expected some of {', '.join(settings)}"
        )
    tokenizer = CLIPTokenizer(**tables, **{**settings, **noted})
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in whole])
    return tokenizer


def _vocabulary(folder: str | Path | None, metadata: Mapping[str, str]) -> Vocabulary:
    if folder is not None:
        return _from_folder(Path(folder))
    if TOKENIZER in metadata:
        note = json.loads(metadata[TOKENIZER])
        return note["vocab"], [(a, b) for a, b in note["merges"]]
    if (cached := _cached(HUB, _CLIP_FILES, local=True)) is not None:
        return _from_folder(cached)
    if (packaged := _open_clip()) is not None:
        return packaged
    if (downloaded := _cached(HUB, _CLIP_FILES, local=False)) is not None:
        return _from_folder(downloaded)
    remedy = "vocab.json and merges.txt (--tokenizer FOLDER), install open_clip_torch"
    raise _no_tokenizer("text encoders", "CLIP", remedy, HUB)


def _from_folder(folder: Path) -> Vocabulary:
    vocab = read_json(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"{folder}/merges.txt cannot be read ({error.strerror}): "
            "expected CLIP's merges beside vocab.json"
        ) from error
    pairs = [line.split() for line in lines if line and not line.startswith("#version")]
    special = isinstance(vocab, dict) and BEGIN in vocab and END in vocab
    if not special or any(len(pair) != 2 for pair in pairs):
        raise UserError(
            f"{folder} holds no CLIP tokenizer: expected vocab.json with {BEGIN} and {END}, "
            "and two words in each line of merges.txt"
        )
    return vocab, [(a, b) for a, b in pairs]


def _no_tokenizer(reader: str, kind: str, remedy: str, hub: str) -> UserError:
    return UserError(
        f"this file has {reader} and no tokenizer, as all files in its layout, and {kind}'s is not "
        f"on this machine: give its folder with {remedy}, or be online once ({hub})"
    )


def _cached(name: str, files: list[str], local: bool) -> Path | None:
    """The folder of a hub repository that has the first of these files, and of CLIP's both."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=files, local_files_only=local))
    except Exception:
        # the library raises a dozen kinds, all of which mean that there is no such folder
        return None
    required = files if files is _CLIP_FILES else files[:1]
    return folder if all((folder / file).exists() for file in required) else None


def _open_clip() -> Vocabulary | None:
    """The vocabulary of the merges in the package `open_clip`, which is not imported."""
    spec = importlib.util.find_spec("open_clip")
    places = [] if spec is None else spec.submodule_search_locations or []
    files = [Path(place) / "bpe_simple_vocab_16e6.txt.gz" for place in places]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return None
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    merges = [(a, b) for a, b in (line.split() for line in lines)]
    return vocabulary(merges), merges


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """The number of every entry: bytes, bytes at a word's end, merges, begin and end.

    Bytes are in CLIP's order, the printable ones first.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(b) for b in printable] + [chr(256 + k) for k in range(256 - len(printable))]
    ends = [letter + "</w>" for letter in letters]
    words = [*letters, *ends, *(a + b for a, b in merges), BEGIN, END]
    return {word: number for number, word in enumerate(words)}


# ---- BERT ----------------------------------------------------------------------------------------


def pack_bert(encoders: Mapping[str, Encoder], pads: Mapping[str, str]) -> str:
    """The words of a `BertTokenizer` in order, and its settings, for the metadata of a file.

    Args:
        encoders: The text transformer.
        pads: Not used: BERT's is among the words.

    Raises:
        UserError: A tokenizer of another kind, with added tokens, or with gaps in its numbers.
    """
    [encoder] = encoders.values()
    tokenizer = encoder.tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    rules, words = state["normalizer"] or {}, state["model"].get("vocab", {})
    kinds = state["model"].get("type"), rules.get("type")
    if kinds != ("WordPiece", "BertNormalizer") or set(words.values()) != {*range(len(words))}:
        raise UserError(
            f"a tokenizer of another kind ({kinds[0]} after {kinds[1]}, {len(words)} words): "
            "a single file holds BERT's, whose words are numbered from 0 without gaps; "
            "save a folder instead"
        )
    flags = {flag: rules.get(name) for flag, name in _FLAGS.items()}
    note = json.dumps({"wordpiece": sorted(words, key=words.__getitem__), **flags})
    length = encoder.model.config.max_position_embeddings
    again = bert_tokenizer(length, None, {TOKENIZER: note})
    _require_same("tokenizer", tokenizer, again)
    if tokenizer.pad_token_id != again.pad_token_id:
        raise UserError(
            f"tokenizer pads with {tokenizer.pad_token!r} instead of {again.pad_token!r}, "
            "for which a single file has no place: save a folder instead"
        )
    return note


def bert_tokenizer(length: int, folder: str | Path | None, metadata: Mapping[str, str]) -> Any:
    """A `BertTokenizer` from `folder`, the file's metadata, or this machine.

    Args:
        length: The number of positions.
        folder: With vocab.txt; None: the file's own, or this machine's.
        metadata: The file's.

    Raises:
        UserError: There is no vocabulary.
    """
    if folder is not None:
        return load_tokenizer(Path(folder))
    if TOKENIZER in metadata:
        from transformers import BertTokenizer

        note = json.loads(metadata[TOKENIZER])
        words = {word: number for number, word in enumerate(note["wordpiece"])}
        flags = {flag: note[flag] for flag in _FLAGS}
        return BertTokenizer(vocab=words, model_max_length=length, **flags)
    for local in (True, False):
        place = _cached(BERT_HUB, _BERT_FILES, local)
        if place is not None:
            return load_tokenizer(place)
    raise _no_tokenizer("a text transformer", "BERT", "vocab.txt (--tokenizer FOLDER)", BERT_HUB)


# ---- whole folders -------------------------------------------------------------------------------


@contextmanager
def tokenizer_folders(raw: RawCheckpoint, names: list[str], options: LoadOptions) -> Iterator[Path]:
    """A folder with the tokenizers of these names: the caller's, or the ones in the metadata.

    Args:
        raw: The file.
        names: Folders, such as "tokenizer" and "tokenizer_2".
        options: With the caller's folder in `tokenizer`.

    Raises:
        UserError: There are no tokenizers, or one of them is missing or damaged.
    """
    if options.tokenizer is None and TOKENIZERS in raw.metadata:
        with tempfile.TemporaryDirectory() as temporary:
            try:
                with explained(raw.path, WRONG):
                    unpack_folders(raw.metadata, names, Path(temporary))
                yield Path(temporary)
            except UserError as error:  # the fault is in the file that the user named
                raise UserError(str(error).replace(temporary, str(raw.path))) from error
        return
    expected = " and ".join(names)
    if options.tokenizer is None:
        raise UserError(
            f"{raw.path} has text encoders and no tokenizers, as all files in its layout: give the "
            f"folder of a model of its kind, which has {expected} (--tokenizer FOLDER)"
        )
    folder = expand_user(options.tokenizer)
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"the tokenizer {options.tokenizer} has no folder {missing[0]}: "
            f"expected a model's folder with {expected}"
        )
    yield folder


def unpack_folders(
    metadata: Mapping[str, str], names: Iterable[str] | None, folder: Path
) -> list[str]:
    """Write the tokenizers' folders that a file's metadata hold.

    Args:
        metadata: The file's.
        names: The folders to write; None: all.
        folder: The place to write them.

    Returns:
        The names of the written folders.

    Raises:
        UserError: Metadata with another folder's name, or with a path.
    """
    packed = json.loads(metadata[TOKENIZERS])
    names = sorted(packed) if names is None else list(names)
    for name in names:
        if name not in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            raise UserError(
                f"its note {TOKENIZERS} names {name!r}: expected tokenizer, tokenizer_2 or _3"
            )
        (folder / name).mkdir()
        for file, text in packed[name].items():
            if Path(file).name != file:
                raise UserError(f"its note {TOKENIZERS} names a path ({file!r}): it is refused")
            data = base64.b64decode(text, validate=True) if file == SPIECE else text.encode()
            (folder / name / file).write_bytes(data)
    return names


def pack_encoders(encoders: Mapping[str, Encoder]) -> str:
    """The tokenizers' folders of a conditioner's encoders, for the metadata of a file."""
    packed: dict[str, dict[str, str]] = {}
    for end, encoder in encoders.items():
        with tempfile.TemporaryDirectory() as temporary:
            encoder.write_tokenizer(Path(temporary))
            packed[f"tokenizer{end}"] = _packed(Path(temporary))
    return json.dumps(packed, sort_keys=True)


def pack_folders(folder: Path) -> dict[str, str]:
    """The metadata of the tokenizers in a model's folder; empty where it has none."""
    folders = sorted(path for path in folder.glob("tokenizer*") if path.is_dir())
    packed = {path.name: _packed(path) for path in folders}
    return {TOKENIZERS: json.dumps(packed, sort_keys=True)} if packed else {}


def _packed(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    contents = {file.name: file.read_bytes() for file in files}
    return {
        name: (base64.b64encode(data) if name == SPIECE else data).decode()
        for name, data in contents.items()
    }
