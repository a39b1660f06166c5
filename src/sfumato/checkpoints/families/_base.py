"""Family: the base class of all that a published model means on disk."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from sfumato.checkpoints.checkpoint import (
    Checkpoint,
    Component,
    LoadOptions,
    RawCheckpoint,
    ReadOptions,
)
from sfumato.checkpoints.lazy_tensor import LazyTensor, LazyTensors
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.weight_map import (
    WeightMap,
    check_sources,
    check_targets,
    load_all,
    store_all,
    with_prefix,
)
from sfumato.diffuse.process import Process
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.networks.base import Network

Config = Mapping[str, Any]
Components = Mapping[str, Component]
Configs = Mapping[str, Config]
"""Configs by part."""
Encoders = Mapping[str, Any]
"""Text encoders by the endings of their folders' names."""
Parts = dict[str, tuple[dict[str, Any], Mapping[str, Any]]]
"""Config and tensors by part."""
NETWORK = "model.diffusion_model."
"""The prefix of networks in single files."""
AUTOENCODERS = ("first_stage_model.", "vae.")
"""Prefixes of autoencoders; the first is written."""
ABSENT = [None, None]
"""A part that model_index.json leaves out."""


@dataclass(frozen=True)
class Section:
    """One part of a single file.

    Attributes:
        part: Its name among the components.
        config: Its config.
        maps: Its table, with the file's prefixes.
        spare: Keys that the file may hold and that are not read.
    """

    part: str
    config: dict[str, Any]
    maps: list[WeightMap]
    spare: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Tower(ABC):
    """A text encoder in single files: the part that it becomes, and its prefix.

    Attributes:
        pad: the token that fills up prompts, as it was trained; empty: the tokenizer's
        decisive: fields of the config that change states and that no tensor's shape shows
        tokenizer_class: of its tokenizer in model_index.json
        eight_bits: whether its matrices are stored in eight bits where those of the transformer are
    """

    pad: ClassVar[str] = ""
    decisive: ClassVar[tuple[str, ...]]
    tokenizer_class: ClassVar[str]
    eight_bits: ClassVar[bool] = False

    part: str
    prefix: str

    @abstractmethod
    def config(self, shapes: Shapes) -> dict[str, Any]:
        """The config of the encoder below the prefix, in transformers' or diffusers' fields."""

    @abstractmethod
    def weight_map(self, config: Config, bare: bool = False) -> list[WeightMap]:
        """The table, without the prefix; `bare`: of the form without `text_model.`."""

    def is_bare(self, shapes: Shapes) -> bool:
        """True for a file with the bare form of the names."""
        return False

    def spare(self, config: Config, keys: Mapping[str, object]) -> set[str]:
        """Keys of a file that may stand below the prefix and are not read."""
        return set()

    def named(self, tensors: LazyTensors) -> LazyTensors:
        """An encoder's tensors by the targets of the table, without those that no file holds."""
        return tensors

    @abstractmethod
    def encoder(
        self, component: Component, tokenizer: Path | None, raw: RawCheckpoint, options: LoadOptions
    ) -> Any:
        """The encoder with its tokenizer.

        Args:
            component: The encoder's config and tensors.
            tokenizer: Its folder in a model's folder; None: `tokenizers` finds one, for the
                layouts that have none.
            raw: The file.
            options: The arguments of `load`.
        """

    @property
    def end(self) -> str:
        """The ending of its folder's name: "", "_2" or "_3"."""
        return self.part.removeprefix("text_encoder")

    def section(self, shapes: Shapes, config: Config | None = None) -> Section:
        """The encoder's section of a file; `config`: the one that is noted."""
        inner = shapes.below(self.prefix)
        values = dict(config or self.config(inner))
        maps = with_prefix(self.weight_map(values, self.is_bare(inner)), self.prefix)
        return Section(self.part, values, maps, frozenset(self.spare(values, shapes.table)))

    def store(self, component: Component, where: object) -> dict[str, LazyTensor]:
        """The encoder's tensors under the file's names."""
        named = Component(component.config, self.named(component.tensors))
        return store_section(self.weight_map(component.config), named, self.prefix, where)


class Family(ABC):
    """A kind of published models.

    Final subclasses have one object each, in the table FAMILIES of their file.

    Attributes:
        name: The family's name in options and messages.
        title: The models' name, for messages.
        alone: Classes ("_class_name") of networks that have files of their own.
        towers: Text encoders of its single files.
        conditioner_class: The conditioner of its models.
        pipelines: Beginnings of diffusers' pipeline classes, with the defaults of a run there,
            other than 50 steps. The longest that fits counts.
        even_times: Whether diffusers' pipeline gives a flow's scheduler its own even times; None:
            where the scheduler's shift is dynamic.
        is_transformer: Whether `convert` streams it without building a model.
        tells_latents: Whether the scale of latents follows from its files.
        autoencoder_folder: The autoencoder's folder in its pipelines.
        autoencoder_defaults: Fields of the autoencoder's config that old folders leave out and that
            differ from today's defaults.
        shift_rule: The rule by which its pipelines shift times with the image's size; None: the
            scheduler's.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    alone: ClassVar[tuple[str, ...]] = ()
    towers: ClassVar[tuple[Tower, ...]] = ()
    conditioner_class: ClassVar[type[Conditioner] | None] = None
    pipelines: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    even_times: ClassVar[bool | None] = None
    is_transformer: ClassVar[bool] = False
    tells_latents: ClassVar[bool] = True
    autoencoder_folder: ClassVar[str] = "vae"
    autoencoder_defaults: ClassVar[Mapping[str, Any]] = {}
    shift_rule: ClassVar[str | None] = None

    # ---- which -----------------------------------------------------------------------------------

    @abstractmethod
    def detect(self, shapes: Shapes) -> bool:
        """True for a single file of this family."""

    def detect_alone(self, shapes: Shapes) -> bool:
        """True for a file with the network or autoencoder alone, which no family detects."""
        return False

    @abstractmethod
    def holds(self, components: Components) -> bool:
        """True where these components make a single file of this family."""

    def publishes(self, network: Network, conditioner: Conditioner, process: Process) -> bool:
        """True where models with these parts were published as single files."""
        return False

    # ---- single files ----------------------------------------------------------------------------

    @abstractmethod
    def sections(
        self, raw: RawCheckpoint, shapes: Shapes, options: ReadOptions, configs: Configs
    ) -> Iterator[Section]:
        """The parts of a file.

        Args:
            raw: The file.
            shapes: Of its tensors.
            options: The caller's settings of a file with a U-Net.
            configs: The noted or given config of each part.
        """

    def read(
        self, raw: RawCheckpoint, options: ReadOptions | None = None, configs: Configs | None = None
    ) -> Checkpoint:
        """The parts of a file under our names; weights stay where they are.

        Args:
            raw: The file.
            options: The caller's settings of a file with a U-Net.
            configs: The noted or given config of each part.

        Raises:
            UserError: A file with missing, extra or misshapen keys, or with parts of unknown sizes.
        """
        options = options or ReadOptions()
        shapes = Shapes(raw.shapes, "", raw.path)
        sections = list(self.sections(raw, shapes, options, configs or {}))
        maps = [m for section in sections for m in section.maps]
        spare = {key for section in sections for key in section.spare} | self.buffers(raw.tensors)
        check_sources(maps, raw.tensors, raw.path, spare - {m.source for m in maps})
        components = {
            s.part: Component(s.config, load_all(s.maps, raw.tensors, raw.path)) for s in sections
        }
        return self.complete(raw, options, components)

    def buffers(self, keys: Mapping[str, object]) -> set[str]:
        """Keys of a file that are no weights of a part and are not read."""
        return set()

    @abstractmethod
    def complete(
        self, raw: RawCheckpoint, options: ReadOptions, components: dict[str, Component]
    ) -> Checkpoint:
        """The checkpoint of a file's components, with schedulers, defaults and conditioner."""

    def checkpoint(
        self,
        raw: RawCheckpoint,
        components: dict[str, Component],
        schedulers: dict[str, dict[str, Any]],
        kind: str,
        note: Config | None = None,
    ) -> Checkpoint:
        """The checkpoint of a file's components; `note`: by `read_model_note`."""
        note = note or {}
        return Checkpoint(
            components,
            schedulers,
            defaults=note.get("defaults", {}),
            name=str(note.get("name", raw.path.stem)),
            family=self.name,
            kind=kind,
            conditioner=partial(self.read_conditioner, raw, components),
            path=raw.path,
            metadata=raw.metadata,
            training_data=dict(note.get("training_data", {})),
        )

    @abstractmethod
    def read_conditioner(
        self, raw: RawCheckpoint, components: Components, network: Network, options: LoadOptions
    ) -> Conditioner:
        """The conditioner of a file's components, for its network."""

    @abstractmethod
    def write(self, checkpoint: Checkpoint) -> RawCheckpoint:
        """The inverse of `read`: original names, and the metadata that other readers need.

        Raises:
            UserError: Weights that do not fit their config; configs that a reader of the file could
                not infer again.
        """

    def single_file(self, checkpoint: Checkpoint) -> RawCheckpoint | None:
        """The file of a whole model.

        None where a reader without sfumato's metadata would build another model.
        """
        return self.write(checkpoint)

    @abstractmethod
    def notes(self, checkpoint: Checkpoint, conditioner: Conditioner) -> dict[str, str]:
        """The metadata by which sfumato reads a whole model's file."""

    # ---- models ----------------------------------------------------------------------------------

    def text_components(self, conditioner: Conditioner) -> Parts:
        """Config and tensors of each text encoder of a model."""
        return {
            f"text_encoder{end}": (e.to_config(), e.tensors())
            for end, e in conditioner.encoders.items()
        }

    def pipeline(self, network: Network, conditioner: Conditioner, references: int) -> str | None:
        """The pipeline of diffusers for these parts; None where it has none.

        Args:
            network: The model's.
            conditioner: The model's.
            references: The number of reference images that the model takes.
        """
        return None

    def index(self, pipeline: str, conditioner: Conditioner, guidance: object) -> dict[str, Any]:
        """Entries of model_index.json beside network, autoencoder and scheduler.

        Args:
            pipeline: The pipeline's class.
            conditioner: The model's.
            guidance: The model's own scale; 1 is off.
        """
        return conditioner.index()

    def folder_conditioner(self, index: Config, network: Network) -> Conditioner | None:
        """The conditioner of a folder with neither text encoders nor conditioner/config.json.

        None where the folder has no conditioner at all.
        """
        return None

    @property
    def latent_scales(self) -> dict[str, Any]:
        """Scale and shift of latents of its autoencoder, as fields; empty where they differ."""
        return {}

    @abstractmethod
    def require_whole(self, checkpoint: Checkpoint) -> None:
        """Raise `UserError` for a single file that lacks parts of a model."""

    def defaults(self, index: Config, learned_guidance: bool, scheduler: Config) -> dict[str, Any]:
        """Defaults of a pipeline's run, where they differ from those of its kind of network.

        Args:
            index: model_index.json, with its `_class_name`.
            learned_guidance: Whether the network has a guidance embedding.
            scheduler: scheduler_config.json.
        """
        pipeline = str(index.get("_class_name"))
        starts = [start for start in self.pipelines if pipeline.startswith(start)]
        name = max(starts, key=len, default=next(iter(self.pipelines), None))
        return {} if name is None else dict(self.pipelines[name])

    def guidance(self, conditioner: Conditioner) -> dict[str, Any]:
        """The guidance of models that diffusers has no pipeline for."""
        return {}


def read_alone(
    raw: RawCheckpoint, section: Section, prefix: str, others: tuple[str, ...]
) -> Component:
    """The network of a file; other parts of the file are ignored.

    Args:
        raw: The file.
        section: The network's.
        prefix: Of the network's keys.
        others: Prefixes of other parts, where the network has none.
    """
    tensors = {
        key: lazy
        for key, lazy in raw.tensors.items()
        if key.startswith(prefix) and (prefix or not key.startswith(others))
    }
    check_sources(section.maps, tensors, raw.path, section.spare)
    return Component(section.config, load_all(section.maps, tensors, raw.path))


def store_section(
    maps: list[WeightMap], component: Component, prefix: str, where: object
) -> dict[str, LazyTensor]:
    """A component's tensors under the file's names; `UserError` for tensors that do not fit."""
    check_targets(maps, component.tensors, where)
    return {prefix + key: lazy for key, lazy in store_all(maps, component.tensors).items()}
