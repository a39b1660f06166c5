"""Text encoders of single files with a whole SD 3 or FLUX.1 model: parts of a file -> what reads
prompts, and tokenizers into the file's notes.

The layout has no place for tokenizers. They are those of a model's folder (tokenizer, tokenizer_2,
tokenizer_3), or, in files that sfumato wrote, the files of these folders in a note: {"tokenizer":
{"tokenizer.json": text, ...}, ...}, with spiece.model in base 64.
"""

import base64
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.checkpoints.conditioners import Source
from sfumato.checkpoints.names.pipeline_transformer import transformer_defaults
from sfumato.checkpoints.tokenizer import CONDITIONER, MODEL, SCHEDULER
from sfumato.checkpoints.whole_files import TOWERS, LazyPart
from sfumato.errors import WRONG, UserError, explained
from sfumato.io.atomic import read_table
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.flux_text import SCHNELL, FluxText, FluxTextConfig
from sfumato.predict.conditioners.sd3_text import Sd3Text, Sd3TextConfig
from sfumato.predict.text_encoders import clip, t5
from sfumato.predict.text_encoders.base import require_transformers
from sfumato.predict.text_encoders.clip import POSITIONS, PREFIX, ClipEncoder, build_clip
from sfumato.predict.text_encoders.t5 import SPIECE, T5Encoder, build_t5

TOKENIZERS = "sfumato.tokenizers"
"""Metadata of files that sfumato wrote: the tokenizers' folders."""
BESIDE = {SCHEDULER: "scheduler/scheduler_config.json", CONDITIONER: "conditioner/config.json"}
"""Notes that are files of a model's folder."""


def read_texts(
    family: str, parts: Mapping[str, LazyPart], network: Any, source: Source
) -> Sd3Text | FluxText:
    """What reads prompts by the text encoders of a file. network: the model's, which tells how long
    FLUX's prompts are, and how wide SD 3's tokens where there is no T5. `UserError` where encoders
    or tokenizers are missing or do not fit.
    """
    require_transformers()
    towers = {part: name for part, name in TOWERS[family].items() if part in parts}
    with _tokenizers(
        source, [part.replace("text_encoder", "tokenizer") for part in towers]
    ) as folder:
        read = {
            part: _encoder(
                name, parts[part], folder / part.replace("text_encoder", "tokenizer"), source
            )
            for part, name in towers.items()
        }
    with explained(source.path):
        noted = json.loads(source.notes.get(CONDITIONER, "{}"))
        if family == "flux":
            told = {} if network.guidance_embeds else {"max_sequence_length": SCHNELL}
            return FluxText(
                read["text_encoder"], read["text_encoder_2"], FluxTextConfig.from_dict(told | noted)
            )
        told = {} if "text_encoder_3" in read else {"joint_attention_dim": network.token_width}
        settings = Sd3TextConfig.from_dict(told | noted)
        return Sd3Text(
            read["text_encoder"], read["text_encoder_2"], read.get("text_encoder_3"), settings
        )


def _encoder(name: str, part: LazyPart, folder: Path, source: Source) -> Any:
    """One encoder with the tokenizer of a folder."""
    path, tensors = source.path, {key: lazy.make() for key, lazy in part.tensors.items()}
    if name == "t5xxl":
        opened = t5.load_tokenizer(folder)
        model = build_t5(part.config, tensors, source.opened, path, path, lambda: True)
        spiece = (folder / SPIECE).read_bytes() if (folder / SPIECE).exists() else None
        with explained(path):
            return T5Encoder(opened, model, spiece)
    opened, projected = (
        clip.load_tokenizer(folder),
        part.config["architectures"] == ["CLIPTextModelWithProjection"],
    )
    bare: dict[str, Tensor] = {
        k.removeprefix(PREFIX): v for k, v in tensors.items() if not k.endswith(POSITIONS)
    }
    model = build_clip(part.config, bare, projected, source.opened, path, path, lambda: True)
    with explained(path):
        return ClipEncoder(opened, model, projected)


@contextmanager
def _tokenizers(source: Source, names: list[str]) -> Iterator[Path]:
    """A folder with the tokenizers of these names."""
    if source.tokenizer is None and TOKENIZERS in source.notes:
        with tempfile.TemporaryDirectory() as temporary:
            try:
                with explained(source.path, WRONG):
                    unpack_tokenizers(source.notes, names, Path(temporary))
                yield Path(temporary)
            except UserError as error:  # what is wrong is wrong in the file that the user named
                raise UserError(str(error).replace(temporary, str(source.path))) from error
        return
    wanted = " and ".join(names)
    if source.tokenizer is None:
        raise UserError(
            f"{source.path} has text encoders and no tokenizers, as all files in its layout: give the folder of a model of its kind, which has "
            f"{wanted} (tokenizer=...)"
        )
    folder = Path(source.tokenizer).expanduser()
    lost = [name for name in names if not (folder / name).is_dir()]
    if lost:
        raise UserError(
            f"tokenizer={source.tokenizer} has no folder {lost[0]}: expected a model's folder with {wanted}"
        )
    yield folder


def unpack_tokenizers(
    notes: Mapping[str, str], names: Iterable[str] | None, folder: Path
) -> list[str]:
    """Writes the tokenizers' folders of these names (None: all) that a file notes; gives their
    names.
    """
    found = json.loads(notes[TOKENIZERS])
    names = sorted(found) if names is None else list(names)
    for name in names:
        if name not in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            raise UserError(
                f"its note {TOKENIZERS} names {name!r}: expected tokenizer, tokenizer_2 or tokenizer_3"
            )
        (folder / name).mkdir()
        for file, text in found[name].items():
            if Path(file).name != file:
                raise UserError(f"its note {TOKENIZERS} names a path ({file!r}): it is refused")
            data = base64.b64decode(text, validate=True) if file == SPIECE else text.encode()
            (folder / name / file).write_bytes(data)
    return names


def pack_tokenizers(conditioner: Conditioner) -> str:
    """The tokenizers' folders, for the metadata of a file."""
    packed: dict[str, dict[str, str]] = {}
    for end, encoder in conditioner.encoders.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            encoder.tokenizer.save_pretrained(folder)
            packed[f"tokenizer{end}"] = _packed(folder)
        if isinstance(encoder, T5Encoder) and encoder.spiece is not None:
            packed[f"tokenizer{end}"][SPIECE] = base64.b64encode(encoder.spiece).decode()
    return json.dumps(packed, sort_keys=True)


def _packed(folder: Path) -> dict[str, str]:
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
    )
    return {
        p.name: (base64.b64encode(p.read_bytes()) if p.name == SPIECE else p.read_bytes()).decode()
        for p in files
    }


def notes_of_folder(folder: Path, network: Mapping[str, Any]) -> dict[str, str]:
    """What a single file notes of a model's folder: tokenizers, scheduler, how prompts are read,
    and its name and defaults where sfumato wrote it; else those of its pipeline, without a name.
    network: the config of its transformer.
    """
    found = sorted(path for path in folder.glob("tokenizer*") if path.is_dir())
    notes = (
        {TOKENIZERS: json.dumps({path.name: _packed(path) for path in found}, sort_keys=True)}
        if found
        else {}
    )
    for key, path in BESIDE.items():
        if (folder / path).exists():
            notes[key] = json.dumps(read_table(folder / path))
    index = read_table(folder / "model_index.json")
    begin = {"defaults": transformer_defaults(index, bool(network.get("guidance_embeds")))}
    return notes | {
        MODEL: json.dumps({k: v for k, v in index.get("_sfumato", begin).items() if k != "version"})
    }
