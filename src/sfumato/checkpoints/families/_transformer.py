"""Families of diffusion transformers: files with a network alone, or with the rest of its model.

    model.diffusion_model.*   first_stage_model.* | vae.*   text_encoders.NAME.transformer.*

A network alone has its names without prefix. What the layout cannot tell stands in the metadata:
other programs read networks, autoencoder and text encoders, and take the rest as published.
"""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from sfumato.checkpoints import metadata as notes
from sfumato.checkpoints.checkpoint import (
    Checkpoint,
    Component,
    LoadOptions,
    RawCheckpoint,
    ReadOptions,
)
from sfumato.checkpoints.families import _vae
from sfumato.checkpoints.families._base import (
    AUTOENCODERS,
    NETWORK,
    Config,
    Family,
    Section,
    store_section,
)
from sfumato.checkpoints.families._registry import candidates
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.tokenizers import pack_encoders, tokenizer_folders
from sfumato.checkpoints.weight_map import WeightMap, check_sources, load_all, with_prefix
from sfumato.compress.kl import KLConfig
from sfumato.errors import UserError, explained
from sfumato.predict.text_encoders.base import require_transformers

TEXTS = "text_encoders."
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
"""The scheduler of flows, without its shift."""
SINUSOIDAL = 256
"""Numbers that a time becomes before the first layer of its embedding."""
_FREE = {"sample_size"}
"""Fields of a network that other readers may guess otherwise: the default size of images."""


class TransformerFamily(Family):
    """A diffusion transformer with its published file layout.

    Attributes:
        class_name: "_class_name" of the network's config
        mark: a key that networks of this family alone have
        unread: keys that a network's file may hold and that are not read
        latents: scale and shift of latents, which no file holds; None: there are no whole files
        optional: towers that a whole file may lack
        layers_field: the config's number of layers, which keys always tell: a note that has it is
            the whole config
    """

    is_transformer = True
    class_name: ClassVar[str]
    mark: ClassVar[str]
    unread: ClassVar[tuple[str, ...]] = ()
    latents: ClassVar[tuple[float, float] | None] = None
    optional: ClassVar[tuple[str, ...]] = ()
    layers_field: ClassVar[str] = "num_layers"

    def __init_subclass__(cls) -> None:
        """Networks of this class have files of their own."""
        cls.alone = (cls.class_name,)

    @abstractmethod
    def config(self, shapes: Shapes) -> dict[str, Any]:
        """The network's config in diffusers' fields, from keys and shapes."""

    @abstractmethod
    def weight_map(self, config: Config) -> list[WeightMap]:
        """The network's table, without prefix; `UserError` for a config that has no names there."""

    def scheduler(self, config: Config) -> dict[str, Any]:
        """The published scheduler_config.json of a network; empty where it follows from nothing."""
        return {}

    # ---- which -----------------------------------------------------------------------------------

    def detect(self, shapes: Shapes) -> bool:
        """Whether the mark is there, with prefix or without."""
        return NETWORK + self.mark in shapes.table or self.mark in shapes.table

    def holds(self, components: Mapping[str, Component]) -> bool:
        """Whether the network is of this class."""
        return (
            "transformer" in components
            and components["transformer"].config.get("_class_name") == self.class_name
        )

    # ---- single files ----------------------------------------------------------------------------

    def sections(
        self,
        raw: RawCheckpoint,
        shapes: Shapes,
        options: ReadOptions,
        configs: Mapping[str, Config],
    ) -> Iterator[Section]:
        """The network, the autoencoder and the text encoders that are there."""
        network = self.network(raw, shapes, configs.get("transformer"))
        if network is not None:
            yield network
        prefix = next((p for p in AUTOENCODERS if shapes.has(p)), "" if network is None else None)
        if prefix is not None:
            yield self.autoencoder(shapes.below(prefix), configs.get("vae"))
        for tower in self.towers:
            if shapes.has(tower.prefix):
                yield tower.section(shapes, configs.get(tower.part))

    def network(self, raw: RawCheckpoint, shapes: Shapes, config: Config | None) -> Section | None:
        """The network's section; None where the file has none. config: what is known of it."""
        prefix = next((p for p in (NETWORK, "") if p + self.mark in shapes.table), None)
        if prefix is None:
            return None
        values = self._config(shapes.below(prefix), config, raw.metadata)
        with explained(str(raw.path)):
            maps = self.weight_map(values)
        return Section(
            "transformer",
            values,
            with_prefix(maps, prefix),
            frozenset(prefix + key for key in self.unread),
        )

    def _config(
        self, shapes: Shapes, config: Config | None, metadata: Mapping[str, str]
    ) -> dict[str, Any]:
        if config is not None:
            held = notes.network_class(metadata) or self.class_name
            if config.get("_class_name", held) != held:
                raise UserError(
                    f"{shapes.where} holds a {held}, and the given config is of a {config['_class_name']}: give its own config"
                )
            return {"_class_name": self.class_name, **config}
        fields = notes.read_network_fields(metadata, shapes.where)
        if self.layers_field in fields:  # the whole config
            return {"_class_name": self.class_name, **fields}
        return self.config(shapes) | fields

    def autoencoder(self, shapes: Shapes, config: Config | None) -> Section:
        """The autoencoder's section. config: what is known of it."""
        if config is None and self.latents is None:
            raise untold_latents(shapes.where)
        values = dict(config or self.autoencoder_config(shapes))
        with explained(str(shapes.where)):
            maps = self.autoencoder_map(values)
        return Section("vae", values, with_prefix(maps, shapes.prefix))

    def autoencoder_config(self, shapes: Shapes) -> dict[str, Any]:
        """The autoencoder's config in diffusers' fields."""
        assert self.latents is not None, "see autoencoder"
        return _vae.vae_config(shapes, self.latents[0], 1024) | {"shift_factor": self.latents[1]}

    def autoencoder_map(self, config: Config) -> list[WeightMap]:
        """The autoencoder's table, without prefix."""
        return _vae.vae_map(config)

    def read_network(self, raw: RawCheckpoint, config: Config) -> Component:
        """The network alone, by a known config; other parts of the file are not looked at."""
        shapes = Shapes(raw.shapes, "", raw.path)
        section = self.network(raw, shapes, config)
        assert section is not None, "see detect"
        prefix = NETWORK if NETWORK + self.mark in shapes.table else ""
        others = (*AUTOENCODERS, TEXTS) if prefix == "" else ()
        tensors = {
            key: lazy
            for key, lazy in raw.tensors.items()
            if key.startswith(prefix) and not key.startswith(others)
        }
        check_sources(section.maps, tensors, raw.path, section.spare)
        return Component(section.config, load_all(section.maps, tensors, raw.path))

    def complete(
        self, raw: RawCheckpoint, options: ReadOptions, components: dict[str, Component]
    ) -> Checkpoint:
        """The published scheduler, or what the metadata note."""
        with explained(raw.path):
            model = notes.read_model_note(raw.metadata)
            scheduler = (
                json.loads(raw.metadata[notes.SCHEDULER])
                if notes.SCHEDULER in raw.metadata
                else None
            )
        if scheduler is None and "transformer" in components:
            scheduler = self.scheduler(components["transformer"].config)
        return Checkpoint(
            components,
            {"scheduler": scheduler} if scheduler else {},
            defaults=model.get("defaults", {}),
            name=str(model.get("name", raw.path.stem)),
            family=self,
            kind=self.name,
            conditioner=lambda network, load_options: self._read_conditioner(
                raw, components, network, load_options
            ),
            path=raw.path,
            metadata=raw.metadata,
        )

    def require_whole(self, checkpoint: Checkpoint) -> None:
        """Network, autoencoder and text encoders, but for those that may be left out."""
        parts = checkpoint.components.keys()
        if (
            self.latents is None
            or not {"transformer", "vae", *(tower.part for tower in self.towers)}
            - set(self.optional)
            <= parts
        ):
            names = " and ".join(
                name.replace("vae", "an autoencoder").replace("transformer", "a network")
                for name in parts
            )
            raise UserError(
                f"{checkpoint.path} holds {names} alone: give a folder with the other parts of its model, and this as its transformer "
                "(load(FOLDER, transformer=FILE), --transformer FILE)"
            )

    def _read_conditioner(
        self,
        raw: RawCheckpoint,
        components: Mapping[str, Component],
        network: Any,
        options: LoadOptions,
    ) -> Any:
        require_transformers()
        towers = [tower for tower in self.towers if tower.part in components]
        with tokenizer_folders(
            raw, [f"tokenizer{tower.end}" for tower in towers], options
        ) as folder:
            encoders = {
                t.end: t.encoder(components[t.part], folder / f"tokenizer{t.end}", raw, options)
                for t in towers
            }
        with explained(raw.path):
            return self.conditioner(
                encoders, network, json.loads(raw.metadata.get(notes.CONDITIONER, "{}"))
            )

    def conditioner(self, encoders: Mapping[str, Any], network: Any, settings: Config) -> Any:
        """The conditioner of a whole file.

        Args:
            encoders: by the endings of their folders' names
            network: the model's
            settings: that the file notes
        """
        raise UserError(f"a whole file with a {self.class_name} is not known: give a folder")

    # ---- writing ---------------------------------------------------------------------------------

    def write(self, checkpoint: Checkpoint) -> RawCheckpoint:
        """Tensors with prefixes, but for a network or an autoencoder alone, and the fields that
        keys do not tell.
        """
        components, where = checkpoint.components, checkpoint.path
        whole = len(components) > 1
        if not whole and "vae" in components:
            return RawCheckpoint(
                store_section(
                    self.autoencoder_map(components["vae"].config), components["vae"], "", where
                ),
                {},
                where,
            )
        foreign = sorted(
            components.keys() - {"transformer", "vae", *(tower.part for tower in self.towers)}
        )
        if foreign or (whole and self.latents is None):
            part = foreign[0] if foreign else sorted(components.keys() - {"transformer"})[0]
            raise UserError(
                f"{where}: {part} has no place in a single file with a {self.class_name}: convert the folders transformer and vae one by one"
            )
        network = components["transformer"]
        stored = store_section(self.weight_map(network.config), network, "", where)
        fields = self._untold(network.config, {key: lazy.shape for key, lazy in stored.items()})
        metadata = {notes.TRANSFORMER: json.dumps(fields, sort_keys=True)} if fields else {}
        if not whole:
            return RawCheckpoint(stored, metadata, where)
        tensors = {NETWORK + key: lazy for key, lazy in stored.items()}
        if "vae" in components:
            vae = components["vae"]
            latents = tuple(vae.config.get(key) for key in ("scaling_factor", "shift_factor"))
            if latents != self.latents:
                raise UserError(
                    f"{where}: a single file cannot tell that latents have scale and shift {latents}: a reader would take {self.latents}"
                )
            tensors |= store_section(self.autoencoder_map(vae.config), vae, AUTOENCODERS[0], where)
        for tower in self.towers:
            if tower.part in components:
                part = components[tower.part]
                named = Component(part.config, tower.named(part.tensors))
                tensors |= store_section(tower.weight_map(part.config), named, tower.prefix, where)
        return RawCheckpoint(tensors, metadata, where)

    def _untold(self, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Fields of the network's config that a reader would not find out from the tensors."""
        try:
            told = self.config(Shapes(shapes, "", "the single file"))
        except UserError:  # of no published kind: its config is the note
            told = {}
        fields = {
            k: v
            for k, v in config.items()
            if not k.startswith("_") and _differ(v, told.get(k)) and (not told or k in told)
        }
        return (
            fields
            if candidates(shapes, "the single file")[0] is self
            else fields | {"_class_name": self.class_name}
        )

    def fits(self, network: Any, conditioner: Any) -> bool:
        """Whether network and conditioner are of this family's classes."""
        kind = self.conditioner_class
        return (
            network.to_config()["_class_name"] == self.class_name
            and kind is not None
            and isinstance(conditioner, kind)
        )

    def publishes(self, network: Any, conditioner: Any, process: Any) -> bool:
        """Whether there are whole files, and the model's parts are of their kinds."""
        return (
            self.latents is not None
            and self.fits(network, conditioner)
            and process.parameterization.name == "flow"
        )

    def single_file(self, checkpoint: Checkpoint) -> RawCheckpoint | None:
        """`write`; None for what is of no published kind, and where a reader would guess other
        configs.
        """
        try:
            raw = self.write(checkpoint)
            again = self.read(raw).components
        except UserError:
            return None
        fields = json.loads(raw.metadata.get(notes.TRANSFORMER, "{}")).keys()
        decisive = {tower.part: tower.decisive for tower in self.towers}
        same = all(
            _alike(part.config, again[name].config, decisive.get(name))
            for name, part in checkpoint.components.items()
            if name != "transformer"
        )
        return raw if same and not fields - _FREE else None

    def notes(self, checkpoint: Checkpoint, conditioner: Any) -> dict[str, str]:
        """Configs, tokenizers, settings of the conditioner, scheduler, name and defaults."""
        return {
            notes.CONFIGS: json.dumps(
                {name: part.config for name, part in checkpoint.components.items()}, sort_keys=True
            ),
            notes.TOKENIZERS: pack_encoders(conditioner.encoders),
            notes.CONDITIONER: json.dumps(conditioner.to_config()),
            notes.SCHEDULER: json.dumps(checkpoint.schedulers["scheduler"]),
            notes.MODEL: json.dumps({"name": checkpoint.name, "defaults": checkpoint.defaults}),
        }

    # ---- model_index.json ------------------------------------------------------------------------

    def file_index(self, parts: Mapping[str, Component], references: int) -> dict[str, Any]:
        """model_index.json of a whole file's parts, without tokenizers, of which no file tells the
        classes.

        references: how many images the model reads, which no file tells either.
        """
        config = parts["transformer"].config
        pipeline = self.file_pipeline(config, references)
        index = {
            "_class_name": pipeline,
            "scheduler": ["diffusers", self.scheduler(config)["_class_name"]],
            **self.extras(pipeline, None),
        }
        for name, part in parts.items():
            kind = part.config.get("_class_name")
            index[name] = (
                ["diffusers", kind] if kind else ["transformers", part.config["architectures"][0]]
            )
        return index | self.extras(pipeline, None, parts)

    def file_pipeline(self, config: Config, references: int) -> str:
        """The pipeline of a whole file, by its network's config."""
        raise UserError(f"a whole file with a {self.class_name} is not known: give a folder")

    def extras(
        self, pipeline: str, guidance: Any, parts: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """What a pipeline has in model_index.json beside its parts. parts: of a file; None: all of
        them.
        """
        return {}

    def index(self, pipeline: str, conditioner: Any, guidance: Any) -> dict[str, Any]:
        """The conditioner's entries, and `extras`."""
        return {**conditioner.index(), **self.extras(pipeline, guidance)}


def untold_latents(where: object) -> UserError:
    """The error for an autoencoder's file that does not tell the scale of its latents."""
    return UserError(
        f"{where} holds an autoencoder and does not tell the scale of its latents, which differs between models: give the folder of its "
        "config.json (--config)"
    )


def axes(shapes: Shapes, head: int, published: list[int]) -> list[int]:
    """The published split of a head's channels among the axes of rotary embeddings, in proportion
    where heads are narrower.

    Angles take channels in pairs.
    """
    split = [head * a // sum(published) for a in published]
    if sum(split) != head or any(a % 2 for a in split):
        raise UserError(
            f"{shapes.where}: heads {head} wide do not divide among the axes as {published} do: give its config.json (--config)"
        )
    return split


def _differ(value: Any, told: Any) -> bool:
    if value is None:  # the default, which depends on the other fields as what is told does
        return False
    if isinstance(value, int | float) and isinstance(told, int | float):
        return abs(value - told) > 1e-6 * abs(told)
    return (list(value) if isinstance(value, tuple) else value) != told


def _alike(config: Config, told: Config, decisive: tuple[str, ...] | None) -> bool:
    """Whether a config means what a file tells. decisive: fields of a text encoder; None: of an
    autoencoder.
    """
    if decisive is None:
        try:
            return _autoencoder_values(config) == _autoencoder_values(told)
        except UserError:  # what a reader takes for granted (groups of 32) does not even fit
            return False
    return all(config.get(field) == told.get(field) for field in decisive)


def _autoencoder_values(config: Config) -> Any:
    """All that an autoencoder's config decides; `UserError` for another class than
    AutoencoderKL.
    """
    if config.get("_class_name") != "AutoencoderKL":
        raise UserError(
            f"autoencoder of class {config.get('_class_name')!r}: expected AutoencoderKL"
        )
    c = KLConfig.from_dict(dict(config))
    return (
        c.encoder_levels,
        c.decoder_levels,
        c.space,
        c.in_channels,
        c.out_channels,
        c.use_quant_conv,
        c.use_post_quant_conv,
    )
