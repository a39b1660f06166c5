"""Models on disk: tensors of folders and files, saving, and conversion."""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from _behaviour import commands
from _behaviour.outcome import Case, Hashed, Notes

if TYPE_CHECKING:
    from _behaviour.context import Context

KEPT_AS_FOLDERS = ("sd1-narrow", "sd1-taesd")
"""Models that a single file can't tell."""


def tensors_of(place: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files at or below a place, by its file and its name."""
    from safetensors.torch import load_file

    files = [place] if place.is_file() else sorted(place.rglob("*.safetensors"))
    within = place.parent if place.is_file() else place
    return {
        f"{file.relative_to(within)}:{key}": tensor
        for file in files
        for key, tensor in load_file(file).items()
    }


def notes_of(place: Path) -> dict[str, Any]:
    """Configs, metadata of safetensors files, and the hashes of other files."""
    from safetensors import safe_open

    files = [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.is_file())
    within, notes = place.parent if place.is_file() else place, {}
    for file in files:
        if file.suffix == ".json" and "tokenizer" not in file.parts[-2]:
            notes[str(file.relative_to(within))] = json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                notes[str(file.relative_to(within))] = {
                    key: _read(text) for key, text in (opened.metadata() or {}).items()
                }
        else:
            notes[str(file.relative_to(within))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return notes


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def stored(place: Path) -> dict[str, Any]:
    """A model on disk as a result: tensors to the bit, texts as notes."""
    return {"tensors": Hashed(tensors_of(place)), "texts": Notes(notes_of(place))}


def cases(context: "Context") -> Iterator[Case]:
    """Cases of saving and converting."""
    import torch

    def save(name: str, suffix: str, source: Path, **options: Any) -> Any:
        target = context.scratch / "saved" / f"{name}{suffix}"
        target.parent.mkdir(exist_ok=True)
        context.load(source).save(target, **options)
        return stored(target)

    def convert(source: Path, target: str, *flags: str) -> Any:
        place = context.scratch / "converted" / target
        place.parent.mkdir(exist_ok=True)
        commands.sfumato("convert", source, place, *flags)
        return stored(place)

    models, files, networks = (context.fixtures / part for part in ("models", "files", "networks"))
    for model in sorted(models.iterdir()):
        yield Case(f"save/{model.name}, folder", partial(save, model.name, "", model))
        if model.name not in KEPT_AS_FOLDERS:
            yield Case(f"save/{model.name}, file", partial(save, model.name, ".safetensors", model))
            again = files / f"{model.name}.safetensors"
            yield Case(
                f"save/{model.name}, file to folder", partial(save, model.name, "-again", again)
            )
            yield Case(
                f"save/{model.name}, file to file",
                partial(save, model.name, "-again.safetensors", again),
            )
    yield Case(
        "save/sd1-narrow, file",
        partial(save, "narrow", ".safetensors", models / "sd1-narrow"),
        raises=True,
    )
    for name in ("sd2", "flux-dev", "dit"):
        for dtype in (torch.float16, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            yield Case(
                f"save/{name}, {kind}",
                partial(save, name, f"-{kind}.safetensors", models / name, dtype=dtype),
            )
    yield Case("save/bundled", lambda: save("fashion", "", Path("fashion")))
    yield Case("save/bundled, file", lambda: save("fashion", ".safetensors", Path("fashion")))
    for name, run in _conversions(convert, models, files, networks):
        yield Case(f"convert/{name}", run)


def _conversions(
    convert: Callable[..., Any], models: Path, files: Path, networks: Path
) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name in ("sd1", "sdxl", "ldm-text", "ldm-unconditional"):
        yield (
            f"{name}, folder to file",
            partial(convert, models / name, f"{name}.safetensors", "--dtype", "fp16"),
        )
        yield f"{name}, file to folder", partial(convert, files / f"{name}.safetensors", name)
    for name in ("sd3", "sd35-without-t5", "flux-dev", "flux-schnell", "flux-fill", "flux-kontext"):
        yield f"{name}, folder to file", partial(convert, models / name, f"{name}.safetensors")
        yield f"{name}, file to folder", partial(convert, files / f"{name}.safetensors", name)
    for name in ("sd3", "flux-dev"):
        yield (
            f"{name}, bare file to folder",
            partial(convert, files / f"{name}-bare.safetensors", f"{name}-bare"),
        )
        flags = ("--config", str(models / name))
        yield (
            f"{name}, bare file with a config",
            partial(convert, files / f"{name}-bare.safetensors", f"{name}-config", *flags),
        )
        for dtype in ("bf16", "fp16", "fp8"):
            yield (
                f"{name}, folder to {dtype}",
                partial(convert, models / name, f"{name}-{dtype}.safetensors", "--dtype", dtype),
            )
    for network in sorted(networks.iterdir()):
        flags = ("--network", "sit") if network.name.startswith("sit") else ()
        if network.name.startswith("pixart"):  # whose file does not tell the size of the pictures
            flags = ("--config", str(models / "pixart-sigma" / "transformer"))
        yield (
            f"{network.name} to folder",
            partial(convert, network, f"network-{network.name.replace('.', '-')}", *flags),
        )
    for name in ("sd3", "flux-dev", "flux2-dev", "pixart-alpha", "dit", "sit"):
        yield (
            f"{name}, transformer to file",
            partial(convert, models / name / "transformer", f"{name}-network.safetensors"),
        )
    for name in ("sd3", "flux-dev"):
        scaled = networks / f"{name}.safetensors"
        yield (
            f"{name}, transformer to scaled eight bits",
            partial(convert, scaled, f"{name}-scaled.safetensors", "--dtype", "fp8-scaled"),
        )
    for name in ("flux2-dev", "sd3"):
        yield (
            f"{name}, autoencoder to file",
            partial(convert, models / name / "vae", f"{name}-vae.safetensors"),
        )
