"""Models of the Hub: the files of a repository that a model needs, and their download.

A repository holds the same weights many times: in float32 and float16, as safetensors and pickled,
for ONNX, Flax and OpenVINO, as a single file, with and without running average. Those of the parts
that model_index.json names are downloaded, in the variant that is asked for. Configs come first, so
that a model which cannot be opened is refused before its weights.

    owner/name            owner/name@revision: a branch, a tag or a commit
"""

import errno
import glob
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sfumato.checkpoints.checkpoint import class_of
from sfumato.checkpoints.formats.folder import (
    INDEX,
    SETTINGS,
    TEXT_STEM,
    named_class,
    parts_of,
    read_index,
    require_variant,
    stems_of,
)
from sfumato.errors import UserError
from sfumato.io.atomic import read_table
from sfumato.io.key_marks import require_unquantized_config
from sfumato.io.safetensors import choose_weights, no_weights, shard_names

log = logging.getLogger("sfumato")

_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?")
_SITE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:(?://)?|git@hf\.co:")
_URL = re.compile(r"[A-Za-z][\w+.-]+://")
_SMALL = (".json", ".txt", ".model", ".jinja")
"""Endings of configs and tokenizers."""
_METADATA, _LARGEST_HEADER = "__metadata__", 100_000_000
"""Of safetensors: the key that is no tensor, and the bytes of the largest header."""
_TOKEN = "`hf auth login`, or the variable HF_TOKEN"


@dataclass(frozen=True)
class HubId:
    """A repository of models and its revision.

    Attributes:
        name: "owner/name".
        revision: A branch, a tag or a commit; None: the main branch.
    """

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def parse_id(source: str, revision: str | None = None) -> HubId | None:
    """Parse "owner/name" or "owner/name@revision"; None for anything else, such as a path.

    Args:
        source: The text.
        revision: A revision beside it.

    Raises:
        UserError: For two different revisions.
    """
    match = None if source.startswith((".", "/", "~")) else _ID.fullmatch(source)
    if match is None:
        return None
    if revision is not None and match[2] not in (None, revision):
        raise UserError(
            f"model {source!r} with revision {revision!r}: expected one revision; leave one out"
        )
    return HubId(match[1], match[2] or revision)


def explain(source: str) -> str | None:
    """Explain what to write for a text that means a model elsewhere, but is no id of the Hub.

    Args:
        source: A URL, an id with a slash or @ at its end, or one with a file or folder behind it,
            for which no file is there.

    Returns:
        A clause; None for other texts.
    """
    site = _SITE.match(source)
    if site is None and (url := _URL.match(source)):
        if url[0].lower() == "file://":
            return f"is a URL: write its path, {source[url.end() :]}"
        return "is a URL of a site other than the Hub: download the file and give its path"
    text = source if site is None else re.split("[?#]", source[site.end() :])[0]
    parts = [part for part in text.split("/") if part]
    if site is not None and parts[:1] in (["datasets"], ["spaces"]):
        return f"names one of the Hub's {parts[0]}: expected a model, as owner/name"
    name = "/".join(parts[:2]).removesuffix(".git").removesuffix("@")
    if len(parts) < 2 or not _ID.fullmatch(name):
        return None if site is None else "names no model of the Hub: write its id, as owner/name"
    if site is None and (source.startswith((".", "/", "~")) or Path(parts[0]).exists()):
        return None  # a path of this machine
    if site is not None and len(parts) > 3 and parts[2] in ("blob", "resolve", "raw", "tree"):
        revision, parts = parts[3], parts[:2] + parts[4:]
    else:
        revision = "main"
    at = "" if revision == "main" else f"@{revision}"
    missing = "" if site else "is no file or folder here and "
    if len(parts) == 2:
        return f"{missing}is no id of the Hub: write {name}{at}"
    option = "" if revision == "main" else f" --revision {revision}"
    inside = "/".join(parts[2:])
    return (
        f"{missing}names a part of a repository: download it by `hf download {name} {inside}"
        f"{option}` and give its path, or write {name}{at} for the whole model"
    )


def download(source: HubId, variant: str | None = None, replaced: Collection[str] = ()) -> Path:
    """Download what a model needs, where it is not in the cache yet.

    Without a connection the cache alone is used.

    Args:
        source: The repository.
        variant: Weights to prefer, such as "fp16"; parts without them are taken as they are.
        replaced: Folders of parts whose weights are read from elsewhere.

    Returns:
        The folder of the snapshot.

    Raises:
        UserError: For a repository that is missing, gated, of another layout or of an unknown kind,
            a variant that no part has, and a failed download.
    """
    with _explained(source):
        chosen = _choose(source, variant, replaced)
        if chosen.commit is None or not chosen.weights:
            return chosen.folder
        return _fetch(chosen.commit, chosen.weights)


def download_headers(
    source: HubId, place: Path, variant: str | None = None, replaced: Collection[str] = ()
) -> Path:
    """Download a model's configs, and of its weights the headers: names, shapes and dtypes.

    Args:
        source: The repository.
        place: A folder for a copy of the model, whose weights are zeros that take no place on disk.
        variant: As in `download`.
        replaced: As in `download`.

    Returns:
        The copy; or the folder of the snapshot, where the cache has the weights, or they are
        pickled, have no header, and are downloaded.

    Raises:
        UserError: As in `download`.
    """
    with _explained(source):
        chosen = _choose(source, variant, replaced)
        commit, weights = chosen.commit, chosen.weights
        if commit is None or all((chosen.folder / name).exists() for name in weights):
            return chosen.folder
        if any(not name.endswith(".safetensors") for name in weights):
            log.warning("%s: its weights are pickled, and are downloaded to be read", source)
            return _fetch(commit, weights)
        copy = place / chosen.folder.name
        for name in (*chosen.small, *weights):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
        for name in chosen.small:
            shutil.copyfile(chosen.folder / name, copy / name)
        for name in weights:
            _copy_header(commit, name, copy / name)
        return copy


@dataclass(frozen=True)
class _Chosen:
    """The files of a model.

    Attributes:
        commit: The repository at one commit; None: all files are in the cache.
        folder: The snapshot, which has `small`.
        small: Configs, tokenizers and indices of shards.
        weights: Files of weights.
    """

    commit: HubId | None
    folder: Path
    small: Sequence[str] = ()
    weights: Sequence[str] = ()


def _choose(source: HubId, variant: str | None, replaced: Collection[str]) -> _Chosen:
    """Choose the files of a model, and download those that are no weights."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(source.name, revision=source.revision)
        names = sorted(file.rfilename for file in info.siblings or ())
    except Exception as error:
        # offline, a repository that is gone or gated now: a copy in the cache is still good
        folder = None if "RevisionNotFoundError" in _kinds(error) else _cached(source)
        if folder is None:
            raise
        _require_cached(source, folder, variant, replaced, error)
        if not _is_offline(error):
            log.warning("%s: taken from the cache, because %s", source, _cause(source, error))
        return _Chosen(None, folder)
    if INDEX not in names:
        raise _no_index(source, names)
    folder = _fetch(source, [INDEX])
    # a push between two calls would mix two versions: all files are of this one's commit
    commit = HubId(source.name, folder.name)
    if info.sha != commit.revision:
        info = HfApi().model_info(commit.name, revision=commit.revision)
        names = sorted(file.rfilename for file in info.siblings or ())
    index = read_index(folder)
    files = {part: _files_below(part, names) for part in parts_of(index)}
    small = [n for below in files.values() for n in below if n.endswith(_SMALL)]
    small = [INDEX, *(name for name in small if ".index." not in Path(name).name)]
    _fetch(commit, small)
    needed = {part: below for part, below in files.items() if part not in replaced}
    for part in needed:
        _check_config(folder / part / "config.json", index[part])
    weights = _weights(source, needed, variant)
    indices = [name for name in weights if name.endswith(".json")]
    if indices:
        _fetch(commit, indices)
    return _Chosen(commit, folder, small + indices, _with_shards(folder, needed, weights))


def _weights(source: HubId, files: Mapping[str, Sequence[str]], variant: str | None) -> list[str]:
    """Choose the weights of each part, or the index of its shards."""
    chosen = [name for name in files.get("conditioner", ()) if name.endswith(".safetensors")]
    parts = {k: _plain(names) for k, names in files.items() if not k.startswith(SETTINGS)}
    for part, names in parts.items():
        stem, pickled = stems_of(part)
        name = choose_weights(names, stem, variant, pickled)
        if name is None:
            raise no_weights(f"{source}, part {part},", names, stem, variant)
        chosen.append(f"{part}/{name}")
    require_variant(source, parts, variant)
    return chosen


def _with_shards(
    folder: Path, files: Mapping[str, Sequence[str]], weights: Sequence[str]
) -> list[str]:
    """Replace each index of shards among the weights by the shards, which it lists."""
    names = [name for name in weights if not name.endswith(".json")]
    for index in sorted({*weights} - {*names}):
        part = index.split("/")[0]
        names += [f"{part}/{shard}" for shard in shard_names(folder / index, _plain(files[part]))]
    return names


def _check_config(path: Path, entry: object) -> None:
    """Raise `UserError` for a part that cannot be opened, before its weights are downloaded.

    Args:
        path: Its config.json.
        entry: Its entry in model_index.json.
    """
    part = path.parent.name
    if part.startswith(SETTINGS) or not path.exists():
        return  # the reader says so
    config = read_table(path)
    require_unquantized_config(config, path)
    name = named_class(entry) or config.get("_class_name")
    texts = stems_of(part)[0] == TEXT_STEM
    if not texts and isinstance(name, str) and class_of(name) is None:
        raise UserError(f"{path} is of class {name!r}, which sfumato does not have")


def _files_below(part: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{part}/") and name.count("/") == 1]


def _plain(names: Sequence[str]) -> list[str]:
    return [name.rpartition("/")[2] for name in names]


def _fetch(source: HubId, names: Sequence[str]) -> Path:
    """Download files of a repository; returns the folder of its snapshot."""
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    return Path(snapshot_download(source.name, revision=source.revision, allow_patterns=patterns))


def _copy_header(commit: HubId, name: str, place: Path) -> None:
    """Write a safetensors file with the header of one in a repository, and zeros.

    Running statistics, which describe latents, are those of the file.
    """
    size = int.from_bytes(_read_range(commit, name, 0, 8), "little")
    if size > _LARGEST_HEADER:
        raise UserError(f"{commit} has {name}, which is no safetensors file: it may be damaged")
    start = 8 + size
    text = _read_range(commit, name, 8, start)
    entries = {k: entry["data_offsets"] for k, entry in json.loads(text).items() if k != _METADATA}
    with place.open("wb") as file:
        file.write(size.to_bytes(8, "little") + text)
        file.truncate(start + max((end for _, end in entries.values()), default=0))
        for begin, end in (span for key, span in entries.items() if ".running_" in key):
            file.seek(start + begin)
            file.write(_read_range(commit, name, start + begin, start + end))


def _read_range(commit: HubId, name: str, start: int, end: int) -> bytes:
    """Read bytes of a file in a repository."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(commit.name, name, revision=commit.revision)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
    response = get_session().get(url, headers=headers, timeout=30)
    hf_raise_for_status(response)
    # a service without ranges sends the whole file
    return response.content if response.status_code == 206 else response.content[start:end]


def _cached(source: HubId) -> Path | None:
    """Return the cached snapshot of a repository; None where there is none."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            source.name, revision=source.revision, allow_patterns=[INDEX], local_files_only=True
        )
    except Exception:  # the library raises several kinds, all of which mean that it is not there
        return None
    return Path(folder) if (Path(folder) / INDEX).exists() else None


def _require_cached(
    source: HubId, folder: Path, variant: str | None, replaced: Collection[str], error: Exception
) -> None:
    """Raise `UserError` for a snapshot of the cache that lacks files of the model.

    Args:
        source: The repository.
        folder: The snapshot.
        variant: As in `download`.
        replaced: As in `download`.
        error: Why the repository cannot be read.
    """
    names = [str(path.relative_to(folder)) for path in folder.glob("*/*")]
    files = {part: _files_below(part, names) for part in parts_of(read_index(folder))}
    needed = {part: below for part, below in files.items() if part not in replaced}
    lacking = [f"{part}/" for part, below in files.items() if not below]
    try:
        if not lacking:
            weights = _with_shards(folder, needed, _weights(source, needed, variant))
            lacking = [name for name in weights if name not in names]
        reason = f"it lacks {', '.join(lacking[:4])}"
    except UserError as fault:
        lacking, reason = [""], str(fault)
    if lacking:
        cause = _unreached(error) if _is_offline(error) else _cause(source, error)
        raise UserError(
            f"model {str(source)!r}: the cache holds only a part of it ({reason}), and {cause}"
        ) from error


# ---- errors --------------------------------------------------------------------------------------


def _no_index(source: HubId, names: Sequence[str]) -> UserError:
    single = [n for n in names if "/" not in n and n.endswith((".safetensors", ".ckpt", ".gguf"))]
    if single:
        return UserError(
            f"{source} is no folder in diffusers' layout (no {INDEX}), and has single files "
            f"({', '.join(single[:6])}{', ...' if len(single) > 6 else ''}): "
            f"download one with `hf download {source.name} {single[0]}`, and give its path"
        )
    shown = ", ".join(names[:6]) or "nothing"
    return UserError(
        f"{source} is no model in diffusers' layout: it has no {INDEX} ({shown} ...); "
        "give the repository of a whole model"
    )


def _kinds(error: BaseException) -> set[str]:
    """Return the names of an error's classes, which keep across versions of the library."""
    return {kind.__name__ for kind in type(error).__mro__}


_OFFLINE = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "TransportError"}
_OFFLINE |= {"ConnectError", "TimeoutException", "Timeout"}


def _is_offline(error: BaseException) -> bool:
    return bool(_kinds(error) & _OFFLINE)


@contextmanager
def _explained(source: HubId) -> Iterator[None]:
    """Turn the errors of a download into a `UserError` that names the cause and the remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen kinds for a failed download
        raise UserError(f"model {str(source)!r}: {_cause(source, error)}") from error


def _unreached(error: Exception) -> str:
    name = type(error).__name__
    return f"the Hub cannot be reached ({name}); check the connection, or give a folder"


def _cause(source: HubId, error: Exception) -> str:
    from huggingface_hub import constants

    kinds, page = _kinds(error), f"{constants.ENDPOINT}/{source.name}"
    if "GatedRepoError" in kinds:
        return (
            f"the repository is gated; accept its licence at {page}, and log in with a token of "
            f"your account ({_TOKEN})"
        )
    if "RevisionNotFoundError" in kinds:
        return (
            f"the repository has no revision {source.revision or 'main'!r}; "
            f"its branches, tags and commits are at {page}/tree/main"
        )
    if "RepositoryNotFoundError" in kinds:
        return (
            "there is no such folder, and no such repository on the Hub that you may read; "
            f"check the name, or log in if it is private ({_TOKEN})"
        )
    if "HFValidationError" in kinds:
        return "there is no such folder, and the name is none of a repository (owner/name)"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk of the cache is full; free space, or set HF_HOME to a folder elsewhere"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        return (
            f"the cache cannot be written ({error.strerror}: {error.filename}); "
            "set HF_HOME to a folder that you may write to"
        )
    if _is_offline(error):
        return f"there is no such folder, it is not in the cache, and {_unreached(error)}"
    reason = " ".join(str(error).split())[:200]
    return f"the download failed ({type(error).__name__}: {reason}); try again, or give a folder"
