"""What a family is: detection, components, tables of keys, configs, text encoders, scheduler,
pipelines.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

Config = Mapping[str, Any]
NETWORK = "model.diffusion_model."
"""The prefix of networks in single files."""
AUTOENCODERS = ("first_stage_model.", "vae.")
"""Prefixes of autoencoders; the first is written."""
ABSENT = [None, None]
"""A part that model_index.json leaves out."""


@dataclass(frozen=True)
class Section:
    """One part of a single file: its config, its table with the file's prefixes, keys that are not
    read.
    """

    part: str
    config: dict[str, Any]
    maps: list[WeightMap]
    spare: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Tower(ABC):
    """A text encoder in single files: the part that it becomes, and its prefix.

    Attributes:
        decisive: fields of the config that change states and that no tensor's shape shows
        tokenizer_class: of its tokenizer in model_index.json
        eight_bits: whether its matrices are stored in eight bits where those of the transformer are
    """

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
        """The table, without the prefix. bare: in the form without `text_model.`, where there is
        one.
        """

    def is_bare(self, shapes: Shapes) -> bool:
        """Whether a file has the other form of the names."""
        return False

    def spare(self, config: Config, keys: Mapping[str, object]) -> set[str]:
        """Keys of a file that may stand below the prefix and are not read."""
        return set()

    def named(self, tensors: LazyTensors) -> LazyTensors:
        """An encoder's tensors by the targets of the table; what files do not hold is left out."""
        return tensors

    @abstractmethod
    def encoder(
        self, component: Component, tokenizer: Path | None, raw: RawCheckpoint, options: LoadOptions
    ) -> Any:
        """The encoder with its tokenizer.

        tokenizer: its folder in a model's folder; None: of the layouts that have none, by
        `tokenizers`.
        """

    @property
    def end(self) -> str:
        """The ending of its folder's name: "", "_2" or "_3"."""
        return self.part.removeprefix("text_encoder")

    def section(self, shapes: Shapes, config: Config | None = None) -> Section:
        """The encoder's section of a file. config: what is noted of it."""
        below = shapes.below(self.prefix)
        values = dict(config or self.config(below))
        maps = with_prefix(self.weight_map(values, self.is_bare(below)), self.prefix)
        return Section(self.part, values, maps, frozenset(self.spare(values, shapes.table)))


class Family(ABC):
    """A kind of published models. Final subclasses have one object each, in the table FAMILIES of
    their file.

    Attributes:
        name: by which it is chosen
        title: for messages
        alone: classes ("_class_name") of networks that have files of their own
        towers: text encoders of its single files
        conditioner_class: the conditioner of its models
        pipelines: beginnings of diffusers' pipeline classes, and what a run of them begins with
            there, other than 50 steps; the longest that fits counts
        even_times: whether diffusers' pipeline gives a flow's scheduler its own even times; None:
            where the scheduler's shift is dynamic
        is_transformer: whether convert streams it without building a model
        tells_latents: whether the scale of latents is known of its files
        autoencoder_folder: of its pipelines
        autoencoder_defaults: fields of the autoencoder's config that old folders leave out and that
            differ from today's defaults
        shift_rule: by which its pipelines shift times with the image's size; None: the scheduler's
    """

    name: ClassVar[str]
    title: ClassVar[str]
    alone: ClassVar[tuple[str, ...]] = ()
    towers: ClassVar[tuple[Tower, ...]] = ()
    conditioner_class: ClassVar[type | None] = None
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
        """Whether a single file is of this family."""

    def detect_alone(self, shapes: Shapes) -> bool:
        """Whether a file that no family detects has this family's network or autoencoder without
        its text encoders.
        """
        return False

    @abstractmethod
    def holds(self, components: Mapping[str, Component]) -> bool:
        """Whether these components make a single file of this family."""

    def publishes(self, network: Any, conditioner: Any, process: Any) -> bool:
        """Whether models with this network, conditioner and process were published as single
        files.
        """
        return False

    # ---- single files ----------------------------------------------------------------------------

    @abstractmethod
    def sections(
        self,
        raw: RawCheckpoint,
        shapes: Shapes,
        options: ReadOptions,
        configs: Mapping[str, Config],
    ) -> Iterator[Section]:
        """The parts of a file. configs: what is noted, or given, of each."""

    def read(
        self,
        raw: RawCheckpoint,
        options: ReadOptions | None = None,
        configs: Mapping[str, Config] | None = None,
    ) -> Checkpoint:
        """The parts of a file under our names; weights stay where they are.

        Args:
            raw: the file
            options: what the caller knows of a file with a U-Net
            configs: what the caller knows of each part's config

        Raises:
            UserError: a file with missing, extra or misshapen keys, or with parts of unknown sizes.
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
        """The checkpoint of a file's components: with schedulers, defaults and how its conditioner
        is built.
        """

    @abstractmethod
    def write(self, checkpoint: Checkpoint) -> RawCheckpoint:
        """The inverse of `read`: tensors under the original names, and metadata that other readers
        need.

        Raises:
            UserError: weights that do not fit their config; configs that a reader of the file could
                not find out again.
        """

    def single_file(self, checkpoint: Checkpoint) -> RawCheckpoint | None:
        """`write` for a whole model; None where a reader without sfumato's metadata would find
        another model.
        """
        return self.write(checkpoint)

    @abstractmethod
    def notes(self, checkpoint: Checkpoint, conditioner: Any) -> dict[str, str]:
        """sfumato's metadata of a whole model's file."""

    # ---- models ----------------------------------------------------------------------------------

    def text_components(
        self, conditioner: Any
    ) -> dict[str, tuple[dict[str, Any], Mapping[str, Any]]]:
        """Config and tensors of each text encoder of a model."""
        return {
            f"text_encoder{end}": (e.to_config(), e.tensors())
            for end, e in conditioner.encoders.items()
        }

    def pipeline(self, network: Any, conditioner: Any, references: int) -> str | None:
        """diffusers' pipeline for these parts; None where it has none.

        references: how many images the model reads.
        """
        return None

    def index(self, pipeline: str, conditioner: Any, guidance: Any) -> dict[str, Any]:
        """What a pipeline has in model_index.json beside network, autoencoder and scheduler.

        guidance: the model's own scale; 1 is off.
        """
        return conditioner.index()

    def folder_conditioner(self, index: Config, network: Any) -> Any | None:
        """The conditioner of a folder without text encoders and conditioner/config.json; None where
        it has none.
        """
        return None

    @abstractmethod
    def require_whole(self, checkpoint: Checkpoint) -> None:
        """`UserError` for a single file that lacks parts of a model."""

    def defaults(self, index: Config, learned_guidance: bool, scheduler: Config) -> dict[str, Any]:
        """What a run of a pipeline begins with, where that differs from its kind of network.

        Args:
            index: model_index.json, with its `_class_name`
            learned_guidance: whether the network has a guidance embedding
            scheduler: scheduler_config.json
        """
        pipeline = str(index.get("_class_name"))
        starts = [start for start in self.pipelines if pipeline.startswith(start)]
        return dict(self.pipelines[max(starts, key=len)]) if starts else {}

    def guidance(self, conditioner: Any) -> dict[str, Any]:
        """The guidance with which models that diffusers has no pipeline for are used."""
        return {}


def store_section(
    maps: list[WeightMap], component: Component, prefix: str, where: object
) -> dict[str, LazyTensor]:
    """A component's tensors under the file's names; `UserError` for tensors that do not fit."""
    check_targets(maps, component.tensors, where)
    return {prefix + key: lazy for key, lazy in store_all(maps, component.tensors).items()}
