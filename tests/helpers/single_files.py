"""Single files in memory: the tests' short words for a family's `read` and `write`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.checkpoints import families
from sfumato.checkpoints.checkpoint import Checkpoint, Component, RawCheckpoint, ReadOptions
from sfumato.checkpoints.families._bert import BertTower
from sfumato.checkpoints.families._clip import ClipTower, OpenClipTower
from sfumato.checkpoints.families.ldm import ClassTower
from sfumato.checkpoints.formats import open_file
from sfumato.checkpoints.lazy_tensor import from_tensors, load_tensors, write_file
from sfumato.checkpoints.weight_map import WeightMap
from sfumato.errors import explained


def part(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Component:
    """A component of tensors in memory."""
    return Component(config, from_tensors(tensors))


def weights(component: Component) -> dict[str, Tensor]:
    """Its tensors."""
    return load_tensors(component.tensors)


def gather(components: dict[str, Component], schedulers: dict[str, Any]) -> Checkpoint:
    """A checkpoint with its family."""
    family: Any = families.by_components(components)
    kind = (
        family.kind(components["unet"].config, "these parts")
        if "unet" in components
        else family.name
    )
    return Checkpoint(components, schedulers, family=family.name, kind=kind)


def join(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of its single file."""
    return load_tensors(families.write(checkpoint).tensors)


def notes(checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata of its single file."""
    return dict(families.write(checkpoint).metadata)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes its single file."""
    raw = families.write(checkpoint)
    write_file(path, raw.tensors, raw.metadata)


def _read(raw: RawCheckpoint, options: ReadOptions | None) -> Checkpoint:
    with explained(raw.path):
        return families.detect(raw.shapes, raw.path).read(raw, options)


def split_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    where: str,
    options: ReadOptions | None = None,
) -> Checkpoint:
    """The checkpoint of a file in memory."""
    return _read(RawCheckpoint(from_tensors(tensors), metadata, Path(where)), options)


def split(path: Path, options: ReadOptions | None = None) -> Checkpoint:
    """The checkpoint of a file."""
    return _read(open_file(path), options)


def clip_map(config: dict[str, Any]) -> list[WeightMap]:
    """CLIP's table."""
    return ClipTower("text_encoder", "").weight_map(config)


def open_clip_map(config: dict[str, Any]) -> list[WeightMap]:
    """open_clip's table."""
    return OpenClipTower("text_encoder", "").weight_map(config)


def bert_map(config: dict[str, Any]) -> list[WeightMap]:
    """The table of Latent Diffusion's text transformer."""
    return BertTower("bert", "").weight_map(config)


def class_map(config: dict[str, Any]) -> list[WeightMap]:
    """The table of a table of classes."""
    return ClassTower("class_embedder", "").weight_map(config)
