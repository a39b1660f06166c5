"""The registry of families: found by names, networks, pipelines, parts and keys."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from sfumato.checkpoints.checkpoint import Checkpoint, Component, RawCheckpoint
from sfumato.checkpoints.families._base import Family
from sfumato.checkpoints.families._other_kinds import kind_of
from sfumato.checkpoints.shapes import Shapes
from sfumato.diffuse.process import Process
from sfumato.errors import UserError, unknown
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.networks.base import Network
from sfumato.registry import module_of, names

_PACKAGE = "checkpoints.families"


@cache
def registered() -> tuple[Family, ...]:
    """Every family of this folder, by the names of their files."""
    modules = [module_of(_PACKAGE, file) for file in names(_PACKAGE)]
    return tuple(family for module in modules for family in getattr(module, "FAMILIES", ()))


def by_name(name: str) -> Family:
    """The family of this name; the `UserError` for another name lists them."""
    family = next((family for family in registered() if family.name == name), None)
    if family is None:
        raise unknown("family", name, (family.name for family in registered()))
    return family


def by_network(class_name: object) -> Family | None:
    """The family with files of this network alone, by the "_class_name" of its config."""
    return next((family for family in registered() if class_name in family.alone), None)


def by_pipeline(pipeline: str) -> Family | None:
    """The family that diffusers opens with a pipeline (the `_class_name` of model_index.json)."""
    starts = {start: family for family in registered() for start in family.pipelines}
    fitting = [start for start in starts if pipeline.startswith(start)]
    return starts[max(fitting, key=len)] if fitting else None


def by_index(index: Mapping[str, Any]) -> Family | None:
    """The family of a model's folder.

    It is that of its pipeline; for one that diffusers does not have (a community's), that of its
    transformer.

    Args:
        index: model_index.json.
    """
    family = by_pipeline(str(index.get("_class_name")))
    network = index.get("transformer")
    if family is not None or not isinstance(network, list):
        return family
    return by_network(network[-1]) if network else None


def by_components(components: Mapping[str, Component]) -> Family | None:
    """The family whose single file holds these components."""
    return next((family for family in registered() if family.holds(components)), None)


def by_parts(network: Network, conditioner: Conditioner, process: Process) -> Family | None:
    """The family of a model with these parts whose models were published as single files."""
    parts = network, conditioner, process
    return next((family for family in registered() if family.publishes(*parts)), None)


def detect(keys: Mapping[str, tuple[int, ...]], where: object, network: object = None) -> Family:
    """The family of a file.

    Args:
        keys: The shapes of its tensors.
        where: The file, for messages.
        network: The class of its network, which decides where several families have its keys.

    Raises:
        UserError: A file of no known layout.
    """
    fitting = candidates(keys, where)
    if not fitting:
        if (kind := kind_of(keys)) is not None:
            raise UserError(f"{where} is {kind}")
        shown = ", ".join(sorted(keys)[:4]) or "none"
        titles = ", ".join(dict.fromkeys(family.title for family in registered()))
        raise UserError(
            f"{where} is of no known layout (its first keys: {shown}): "
            f"expected the original names of {titles}"
        )
    return next((family for family in fitting if network in family.alone), fitting[0])


def candidates(keys: Mapping[str, tuple[int, ...]], where: object) -> list[Family]:
    """Every family that has the keys of a file; those with a part of it where none has all."""
    shapes = Shapes(keys, "", where)
    whole = [family for family in registered() if family.detect(shapes)]
    if whole or kind_of(keys) is not None:
        return whole
    return [family for family in registered() if family.detect_alone(shapes)]


def write(checkpoint: Checkpoint) -> RawCheckpoint:
    """A checkpoint as a single file; `UserError` where there is no family with such a file."""
    family = by_components(checkpoint.components)
    if family is None:
        parts = " and ".join(sorted(checkpoint.components)) or "nothing"
        raise UserError(
            f"{checkpoint.path} holds {parts}: expected a diffusion transformer of a known class"
        )
    return family.write(checkpoint)
