"""Tokenizers of single files: original layouts hold weights only.

A tokenizer is the caller's, one that sfumato wrote into the file's metadata, or one on this
machine: of a package, of the cache of huggingface_hub, or from the hub.

CLIP's vocabulary (Radford et al. 2021, arXiv:2103.00020, section 2.4): 256 bytes as letters, the
same at a word's end, one entry a merge, begin and end. Latent Diffusion's text-to-image model reads
text as "bert-base-uncased" does (Devlin et al. 2019, arXiv:1810.04805).
"""

import base64
import gzip
import importlib.util
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sfumato.checkpoints.checkpoint import LoadOptions, RawCheckpoint
from sfumato.checkpoints.metadata import TOKENIZER, TOKENIZERS
from sfumato.errors import WRONG, UserError, explained
from sfumato.io.atomic import read_json
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


# ---- CLIP ----------------------------------------------------------------------------------------


def pack_clip(tokenizer: Any) -> str:
    """The vocabulary of a `CLIPTokenizer`, for the metadata of a file."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return json.dumps(
        {
            "vocab": model["vocab"],
            "merges": [list(m) if isinstance(m, list) else m.split(" ") for m in model["merges"]],
        }
    )


def clip_tokenizer(
    pad: str, length: int, folder: str | Path | None, metadata: Mapping[str, str]
) -> Any:
    """A `CLIPTokenizer`.

    Args:
        pad: the token that fills up prompts
        length: positions
        folder: with vocab.json and merges.txt; None: the file's own, or this machine's
        metadata: the file's

    Raises:
        UserError: no vocabulary is to be had; the message says what to do.
    """
    from transformers import CLIPTokenizer

    vocab, merges = _vocabulary(folder, metadata)
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": pad}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length, **special)  # pyright: ignore[reportArgumentType]


def _vocabulary(
    folder: str | Path | None, metadata: Mapping[str, str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if folder is not None:
        return _from_folder(Path(folder))
    if TOKENIZER in metadata:
        note = json.loads(metadata[TOKENIZER])
        return note["vocab"], [(a, b) for a, b in note["merges"]]
    for place in (
        _cached(HUB, _CLIP_FILES, local=True),
        _open_clip(),
        _cached(HUB, _CLIP_FILES, local=False),
    ):
        if place is not None:
            return place if isinstance(place, tuple) else _from_folder(place)
    raise UserError(
        "this file has text encoders and no tokenizer, as all files in its layout, and CLIP's is not on this machine: give its folder with "
        f"vocab.json and merges.txt (tokenizer=...), install open_clip_torch, or be online once ({HUB})"
    )


def _from_folder(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocab = read_json(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"{folder}/merges.txt cannot be read ({error.strerror}): expected CLIP's merges beside vocab.json"
        ) from error
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    if (
        not isinstance(vocab, dict)
        or BEGIN not in vocab
        or END not in vocab
        or any(len(m) != 2 for m in merges)
    ):
        raise UserError(
            f"{folder} holds no CLIP tokenizer: expected vocab.json with {BEGIN} and {END}, and two words in each line of merges.txt"
        )
    return vocab, merges  # pyright: ignore[reportReturnType]


def _cached(name: str, files: list[str], local: bool) -> Path | None:
    """The folder of a hub repository that has the first of these files, and of CLIP's both."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=files, local_files_only=local))
    except Exception:
        # the library raises a dozen kinds, all of which mean that it is not to be had
        return None
    required = files if files is _CLIP_FILES else files[:1]
    return folder if all((folder / file).exists() for file in required) else None


def _open_clip() -> tuple[dict[str, int], list[tuple[str, str]]] | None:
    """From the list of merges in the package `open_clip`, which is not imported."""
    spec = importlib.util.find_spec("open_clip")
    places = (
        [
            Path(p) / "bpe_simple_vocab_16e6.txt.gz"
            for p in (spec.submodule_search_locations or ())
            if spec
        ]
        if spec
        else []
    )
    file = next((p for p in places if p.exists()), None)
    if file is None:
        return None
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    merges = [(a, b) for a, b in (line.split() for line in lines)]
    return vocabulary(merges), merges


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Every entry's number: bytes, bytes at a word's end, merges, begin and end, in CLIP's order
    (printable bytes come first).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(b) for b in printable] + [chr(256 + k) for k in range(256 - len(printable))]
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(a + b for a, b in merges),
        BEGIN,
        END,
    ]
    return {word: number for number, word in enumerate(words)}


# ---- BERT ----------------------------------------------------------------------------------------


def pack_bert(tokenizer: Any) -> str:
    """The words of a `BertTokenizer` in their order, and its settings, for the metadata of a file;
    `UserError` for one that differs more.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    rules, words = state["normalizer"] or {}, state["model"].get("vocab", {})
    if (
        state["model"].get("type") != "WordPiece"
        or rules.get("type") != "BertNormalizer"
        or set(words.values()) != {*range(len(words))}
    ):
        kind = f"{state['model'].get('type')} after {rules.get('type')}, {len(words)} words"
        raise UserError(
            f"a tokenizer of another kind ({kind}): a single file holds BERT's, whose words are numbered from 0 without gaps; save a folder instead"
        )
    ordered = sorted(words, key=words.__getitem__)
    return json.dumps(
        {"wordpiece": ordered, **{flag: rules.get(name) for flag, name in _FLAGS.items()}}
    )


def bert_tokenizer(length: int, folder: str | Path | None, metadata: Mapping[str, str]) -> Any:
    """A `BertTokenizer` from `folder`, the file's metadata, or this machine; `UserError` where
    there is none.
    """
    if folder is not None:
        return load_tokenizer(Path(folder))
    if TOKENIZER in metadata:
        from transformers import BertTokenizer

        note = json.loads(metadata[TOKENIZER])
        words = {word: number for number, word in enumerate(note["wordpiece"])}
        return BertTokenizer(
            vocab=words, model_max_length=length, **{flag: note[flag] for flag in _FLAGS}
        )
    for local in (True, False):
        place = _cached(BERT_HUB, _BERT_FILES, local)
        if place is not None:
            return load_tokenizer(place)
    raise UserError(
        "this file has a text transformer and no tokenizer, as all files in its layout, and BERT's is not on this machine: give its folder with "
        f"vocab.txt (tokenizer=...), or be online once ({BERT_HUB})"
    )


# ---- whole folders -------------------------------------------------------------------------------


@contextmanager
def tokenizer_folders(raw: RawCheckpoint, names: list[str], options: LoadOptions) -> Iterator[Path]:
    """A folder with the tokenizers of these names: the caller's, or those that the file's metadata
    hold.
    """
    if options.tokenizer is None and TOKENIZERS in raw.metadata:
        with tempfile.TemporaryDirectory() as temporary:
            try:
                with explained(raw.path, WRONG):
                    unpack_folders(raw.metadata, names, Path(temporary))
                yield Path(temporary)
            except UserError as error:  # what is wrong is wrong in the file that the user named
                raise UserError(str(error).replace(temporary, str(raw.path))) from error
        return
    expected = " and ".join(names)
    if options.tokenizer is None:
        raise UserError(
            f"{raw.path} has text encoders and no tokenizers, as all files in its layout: give the folder of a model of its kind, which has "
            f"{expected} (tokenizer=...)"
        )
    folder = Path(options.tokenizer).expanduser()
    lost = [name for name in names if not (folder / name).is_dir()]
    if lost:
        raise UserError(
            f"tokenizer={options.tokenizer} has no folder {lost[0]}: expected a model's folder with {expected}"
        )
    yield folder


def unpack_folders(
    metadata: Mapping[str, str], names: Iterable[str] | None, folder: Path
) -> list[str]:
    """Write the tokenizers' folders of these names (None: all) that a file's metadata hold; returns
    their names.
    """
    packed = json.loads(metadata[TOKENIZERS])
    names = sorted(packed) if names is None else list(names)
    for name in names:
        if name not in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            raise UserError(
                f"its note {TOKENIZERS} names {name!r}: expected tokenizer, tokenizer_2 or tokenizer_3"
            )
        (folder / name).mkdir()
        for file, text in packed[name].items():
            if Path(file).name != file:
                raise UserError(f"its note {TOKENIZERS} names a path ({file!r}): it is refused")
            data = base64.b64decode(text, validate=True) if file == SPIECE else text.encode()
            (folder / name / file).write_bytes(data)
    return names


def pack_encoders(encoders: Mapping[str, Any]) -> str:
    """The tokenizers' folders of a conditioner's encoders, for the metadata of a file."""
    packed: dict[str, dict[str, str]] = {}
    for end, encoder in encoders.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            encoder.tokenizer.save_pretrained(folder)
            packed[f"tokenizer{end}"] = _packed(folder)
        spiece = getattr(encoder, "spiece", None)
        if spiece is not None:
            packed[f"tokenizer{end}"][SPIECE] = base64.b64encode(spiece).decode()
    return json.dumps(packed, sort_keys=True)


def pack_folders(folder: Path) -> dict[str, str]:
    """The metadata of the tokenizers in a model's folder; empty where it has none."""
    folders = sorted(path for path in folder.glob("tokenizer*") if path.is_dir())
    return (
        {TOKENIZERS: json.dumps({path.name: _packed(path) for path in folders}, sort_keys=True)}
        if folders
        else {}
    )


def _packed(folder: Path) -> dict[str, str]:
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
    )
    return {
        p.name: (base64.b64encode(p.read_bytes()) if p.name == SPIECE else p.read_bytes()).decode()
        for p in files
    }
