"""CLIP's tokenizer for single files, which hold weights only: the caller's, one that sfumato wrote
into the file, or one on this machine.

Vocabulary (Radford et al. 2021, arXiv:2103.00020, section 2.4): 256 bytes as letters, the same at a
word's end, one entry a merge, begin and end.
"""

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

from sfumato.errors import UserError
from sfumato.io.atomic import read_json

KEY = "sfumato.tokenizer"
"""Metadata of files that sfumato wrote: {"vocab": {...}, "merges": [...]} as JSON."""
SCHEDULER = "sfumato.scheduler"
LOW_RES = "sfumato.low_res_scheduler"
CONDITIONER = "sfumato.conditioner"
MODEL = "sfumato.model"
"""Metadata beside it that the layout has no place for either: the model's scheduler configs, how it
reads prompts, and its name and defaults (of whole files of SD 3 and FLUX.1)."""
HUB = "openai/clip-vit-large-patch14"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2  # of the list that OpenAI published, those that were used


def packed(tokenizer: Any) -> str:
    """The vocabulary of a `CLIPTokenizer`, for the metadata of a file."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return json.dumps(
        {
            "vocab": model["vocab"],
            "merges": [list(m) if isinstance(m, list) else m.split(" ") for m in model["merges"]],
        }
    )


def clip_tokenizer(pad: str, length: int, folder: str | Path | None, notes: dict[str, str]) -> Any:
    """A `CLIPTokenizer` that fills up with `pad`: from `folder` (vocab.json and merges.txt), the
    file's own notes, the cache of huggingface_hub, an installed package `open_clip`, or the hub;
    `UserError` that says what to do where there is none.
    """
    from transformers import CLIPTokenizer

    vocab, merges = _vocabulary(folder, notes)
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": pad}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length, **special)  # pyright: ignore[reportArgumentType]


def _vocabulary(
    folder: str | Path | None, notes: dict[str, str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if folder is not None:
        return _from_folder(Path(folder))
    if KEY in notes:
        found = json.loads(notes[KEY])
        return found["vocab"], [(a, b) for a, b in found["merges"]]
    for place in (_cached(local=True), _open_clip(), _cached(local=False)):
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


def _cached(local: bool) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        found = Path(
            snapshot_download(
                HUB, allow_patterns=["vocab.json", "merges.txt"], local_files_only=local
            )
        )
    except Exception:
        # the library raises a dozen kinds, all of which mean that it is not to be had
        return None
    return found if (found / "vocab.json").exists() and (found / "merges.txt").exists() else None


def _open_clip() -> tuple[dict[str, int], list[tuple[str, str]]] | None:
    """From the list of merges in the package `open_clip`, which is not imported."""
    found = importlib.util.find_spec("open_clip")
    places = (
        [
            Path(p) / "bpe_simple_vocab_16e6.txt.gz"
            for p in (found.submodule_search_locations or ())
            if found
        ]
        if found
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
