"""Families of diffusion transformers: single files with a network alone or a whole model.

    model.diffusion_model.*   first_stage_model.* | vae.*   text_encoders.NAME.transformer.*

A network alone has its names without prefix. The metadata hold what does not follow from the
layout: other programs read networks, autoencoder and text encoders, and take the rest as published.
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
    Components,
    Config,
    Configs,
    Encoders,
    Family,
    Section,
    read_alone,
    store_section,
)
from sfumato.checkpoints.families._registry import candidates
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.tokenizers import pack_encoders, tokenizer_folders
from sfumato.checkpoints.weight_map import WeightMap, with_prefix
from sfumato.compress.kl import KLConfig
from sfumato.diffuse.process import Process
from sfumato.errors import UserError, explained
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.networks.base import Network
from sfumato.predict.text_encoders.base import require_transformers

TEXTS = "text_encoders."
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
"""The scheduler of flows, without its shift."""
SINUSOIDAL = 256
"""Sinusoidal features of a timestep, before the first layer of its embedding."""
_FREE = {"sample_size"}
"""Fields of a network that other readers may guess otherwise: the default size of images."""


class TransformerFamily(Family):
    """A diffusion transformer with its published file layout.

    Attributes:
        class_name: "_class_name" of the network's config.
        mark: A key that networks of this family alone have.
        unread: Keys that a network's file may hold and that are not read.
        latents: Scale and shift of latents, which no file holds; None: there are no whole files.
        optional: Towers that a whole file may lack.
        layers_field: The config's number of layers, which follows from the keys: metadata with this
            field holds the whole config.
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
        """The published scheduler_config.json of a network; empty where there is none."""
        return {}

    @staticmethod
    def width(config: Config) -> int:
        """The width of a network's tokens."""
        return config["num_attention_heads"] * config["attention_head_dim"]

    @staticmethod
    def outputs(config: Config) -> int:
        """Numbers that a network's last layer gives for one token."""
        channels = config.get("out_channels") or config["in_channels"]
        return config.get("patch_size", 1) ** 2 * channels

    # ---- which -----------------------------------------------------------------------------------

    def detect(self, shapes: Shapes) -> bool:
        """True where the file has the mark, with prefix or without."""
        return NETWORK + self.mark in shapes.table or self.mark in shapes.table

    def holds(self, components: Components) -> bool:
        """True where the network is of this class."""
        network = components.get("transformer")
        return network is not None and network.config.get("_class_name") == self.class_name

    # ---- single files ----------------------------------------------------------------------------

    def sections(
        self, raw: RawCheckpoint, shapes: Shapes, options: ReadOptions, configs: Configs
    ) -> Iterator[Section]:
        """The network, the autoencoder and the text encoders that the file holds."""
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
        """The network's section; None where the file has none. `config`: the caller's."""
        prefix = next((p for p in (NETWORK, "") if p + self.mark in shapes.table), None)
        if prefix is None:
            return None
        values = self._config(shapes.below(prefix), config, raw.metadata)
        with explained(str(raw.path)):
            maps = self.weight_map(values)
        unread = frozenset(prefix + key for key in self.unread)
        return Section("transformer", values, with_prefix(maps, prefix), unread)

    def _config(
        self, shapes: Shapes, config: Config | None, metadata: Mapping[str, str]
    ) -> dict[str, Any]:
        if config is not None:
            held = notes.network_class(metadata) or self.class_name
            if config.get("_class_name", held) != held:
                raise UserError(
                    f"{shapes.where} holds a {held}, and the given config is of a "
                    f"{config['_class_name']}: give its own config"
                )
            return {"_class_name": self.class_name, **config}
        fields = notes.read_network_fields(metadata, shapes.where)
        if self.layers_field in fields:  # the whole config
            return {"_class_name": self.class_name, **fields}
        return self.config(shapes) | fields

    def autoencoder(self, shapes: Shapes, config: Config | None) -> Section:
        """The autoencoder's section; `config`: the caller's."""
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
        """The network alone, by a known config; other parts of the file are ignored."""
        shapes = Shapes(raw.shapes, "", raw.path)
        section = self.network(raw, shapes, config)
        assert section is not None, "see detect"
        prefix = NETWORK if NETWORK + self.mark in shapes.table else ""
        return read_alone(raw, section, prefix, (*AUTOENCODERS, TEXTS))

    def complete(
        self, raw: RawCheckpoint, options: ReadOptions, components: dict[str, Component]
    ) -> Checkpoint:
        """With the scheduler that the metadata note, or else the published one."""
        with explained(raw.path):
            model = notes.read_model_note(raw.metadata)
            scheduler = json.loads(raw.metadata.get(notes.SCHEDULER, "null"))
        if scheduler is None and "transformer" in components:
            scheduler = self.scheduler(components["transformer"].config)
        schedulers = {"scheduler": scheduler} if scheduler else {}
        return self.checkpoint(raw, components, schedulers, self.name, model)

    def require_whole(self, checkpoint: Checkpoint) -> None:
        """Raise `UserError` without network, autoencoder or a text encoder that is not optional."""
        parts = checkpoint.components.keys()
        required = {"transformer", "vae", *self._tower_parts} - set(self.optional)
        if self.latents is None or not required <= parts:
            titles = {"transformer": "a network", "vae": "an autoencoder"}
            names = " and ".join(titles.get(name, name) for name in parts)
            raise UserError(
                f"{checkpoint.path} holds {names} alone: give a folder with the other parts of its "
                "model, and this as its transformer "
                "(--model FOLDER --transformer FILE, or load(FOLDER, transformer=FILE))"
            )

    @property
    def latent_scales(self) -> dict[str, Any]:
        """The published ones, of whole files."""
        fields = ("scaling_factor", "shift_factor")
        return {} if self.latents is None else dict(zip(fields, self.latents, strict=True))

    @property
    def _tower_parts(self) -> set[str]:
        return {tower.part for tower in self.towers}

    def read_conditioner(
        self, raw: RawCheckpoint, components: Components, network: Network, options: LoadOptions
    ) -> Conditioner:
        """The conditioner with the tokenizers of the caller or the metadata."""
        require_transformers()
        towers = [tower for tower in self.towers if tower.part in components]
        names = [f"tokenizer{tower.end}" for tower in towers]
        with tokenizer_folders(raw, names, options) as folder:
            encoders = {
                t.end: t.encoder(components[t.part], folder / f"tokenizer{t.end}", raw, options)
                for t in towers
            }
        with explained(raw.path):
            settings = notes.read_json(raw.metadata, notes.CONDITIONER)
            return self.conditioner(encoders, network, settings)

    def conditioner(self, encoders: Encoders, network: Network, settings: Config) -> Conditioner:
        """The conditioner of a whole file.

        Args:
            encoders: By the endings of their folders' names.
            network: The model's.
            settings: The settings that the file notes.
        """
        raise NotImplementedError

    # ---- writing ---------------------------------------------------------------------------------

    def write(self, checkpoint: Checkpoint) -> RawCheckpoint:
        """With prefixes, but for a network or an autoencoder alone.

        The metadata hold the fields of the network's config that do not follow from keys.
        """
        components, where = checkpoint.components, checkpoint.path
        vae, whole = components.get("vae"), len(components) > 1
        if vae is not None and not whole:
            return RawCheckpoint(self._store_autoencoder(vae, "", where), {}, where)
        foreign = sorted(components.keys() - {"transformer", "vae", *self._tower_parts})
        if foreign or (whole and self.latents is None):
            part = [*foreign, *sorted(components.keys() - {"transformer"})][0]
            raise UserError(
                f"{where}: {part} has no place in a single file with a {self.class_name}: "
                "convert the folders transformer and vae one by one"
            )
        network = components["transformer"]
        stored = store_section(self.weight_map(network.config), network, "", where)
        fields = self._noted_fields(network.config, {k: lazy.shape for k, lazy in stored.items()})
        metadata = {notes.TRANSFORMER: json.dumps(fields, sort_keys=True)} if fields else {}
        if not whole:
            return RawCheckpoint(stored, metadata, where)
        tensors = {NETWORK + key: lazy for key, lazy in stored.items()}
        if vae is not None:
            latents = tuple(vae.config.get(key) for key in ("scaling_factor", "shift_factor"))
            if latents != self.latents:
                raise UserError(
                    f"{where}: a single file has no place for scale and shift {latents}: "
                    f"a reader would take {self.latents}"
                )
            tensors |= self._store_autoencoder(vae, AUTOENCODERS[0], where)
        for tower in self.towers:
            if tower.part in components:
                tensors |= tower.store(components[tower.part], where)
        return RawCheckpoint(tensors, metadata, where)

    def _store_autoencoder(self, vae: Component, prefix: str, where: object) -> dict[str, Any]:
        return store_section(self.autoencoder_map(vae.config), vae, prefix, where)

    def _noted_fields(
        self, config: Config, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """Fields of the network's config that a reader would not infer from the tensors."""
        try:
            inferred = self.config(Shapes(shapes, "", "the single file"))
        except UserError:  # of no published kind: its config is the note
            inferred = {}
        fields = {
            k: v
            for k, v in config.items()
            if not k.startswith("_")
            and _differ(v, inferred.get(k))
            and (not inferred or k in inferred)
        }
        first = candidates(shapes, "the single file")[0]
        return fields if first is self else fields | {"_class_name": self.class_name}

    def fits(self, network: Network, conditioner: Conditioner) -> bool:
        """True where network and conditioner are of this family's classes."""
        kind = self.conditioner_class
        same = network.to_config()["_class_name"] == self.class_name
        return same and kind is not None and isinstance(conditioner, kind)

    def publishes(self, network: Network, conditioner: Conditioner, process: Process) -> bool:
        """True where there are whole files, and the model's parts are of their kinds."""
        is_flow = process.parameterization.name == "flow"
        return self.latents is not None and self.fits(network, conditioner) and is_flow

    def single_file(self, checkpoint: Checkpoint) -> RawCheckpoint | None:
        """The file; None for no published kind, and where a reader would guess other configs."""
        try:
            raw = self.write(checkpoint)
            again = self.read(raw).components
        except UserError:
            return None
        fields = notes.read_json(raw.metadata, notes.TRANSFORMER).keys()
        decisive = {tower.part: tower.decisive for tower in self.towers}
        same = all(
            _alike(part.config, again[name].config, decisive.get(name))
            for name, part in checkpoint.components.items()
            if name != "transformer"
        )
        return raw if same and not fields - _FREE else None

    def notes(self, checkpoint: Checkpoint, conditioner: Conditioner) -> dict[str, str]:
        """Configs, tokenizers, settings of the conditioner, scheduler, and the model's note."""
        configs = {name: part.config for name, part in checkpoint.components.items()}
        return {
            notes.CONFIGS: json.dumps(configs, sort_keys=True),
            notes.TOKENIZERS: pack_encoders(conditioner.encoders),
            notes.CONDITIONER: json.dumps(conditioner.to_config()),
            notes.SCHEDULER: json.dumps(checkpoint.schedulers["scheduler"]),
        } | notes.write_model_note(checkpoint.name, checkpoint.defaults, checkpoint.training_data)

    # ---- model_index.json ------------------------------------------------------------------------

    def pipeline(self, network: Network, conditioner: Conditioner, references: int) -> str | None:
        """The pipeline of a whole file with the same network."""
        if self.latents is None or not self.fits(network, conditioner):
            return None
        return self.file_pipeline(network.to_config(), references)

    def file_index(self, parts: Components, references: int) -> dict[str, Any]:
        """The model_index.json of a whole file's parts.

        Tokenizers are left out: no file holds their classes.

        Args:
            parts: The file's.
            references: The number of reference images that the model takes, which no file holds.
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
        """The pipeline of a whole file, by its network's config; arguments as in `file_index`."""
        raise NotImplementedError

    def extras(
        self, pipeline: str, guidance: object, parts: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """Entries of model_index.json that are no parts of the model.

        Args:
            pipeline: The pipeline's class.
            guidance: The model's own scale; 1 is off.
            parts: Of a file; None: all of them.
        """
        return {}

    def index(self, pipeline: str, conditioner: Conditioner, guidance: object) -> dict[str, Any]:
        """The conditioner's entries, and `extras`."""
        return {**conditioner.index(), **self.extras(pipeline, guidance)}


def untold_latents(where: object) -> UserError:
    """The error for an autoencoder's file, which does not hold the scale of its latents."""
    return UserError(
        f"{where} holds an autoencoder and does not tell the scale of its latents, which differs "
        "between models: give the folder of its config.json (--config)"
    )


def axes(shapes: Shapes, head: int, published: list[int]) -> list[int]:
    """The split of a head's channels among the axes of rotary embeddings.

    It is in proportion to the published split. Angles take channels in pairs.
    """
    split = [head * a // sum(published) for a in published]
    if sum(split) != head or any(a % 2 for a in split):
        raise shapes.error(
            f"heads {head} wide do not divide into axes as {published}: give its config (--config)"
        )
    return split


def patch_fields(shapes: Shapes, width: int, head: int) -> dict[str, Any]:
    """The fields that DiT's and PixArt's networks share."""
    patch = shapes.size("x_embedder.proj.weight", 2, 4)
    return {
        "num_attention_heads": shapes.heads(width, head),
        "attention_head_dim": head,
        "in_channels": shapes.size("x_embedder.proj.weight", 1, 4),
        "out_channels": shapes.size("final_layer.linear.bias") // patch**2,
        "num_layers": shapes.count("blocks."),
    }


def _differ(value: Any, inferred: Any) -> bool:
    if value is None:  # the default, which follows from the other fields
        return False
    if isinstance(value, int | float) and isinstance(inferred, int | float):
        return abs(value - inferred) > 1e-6 * abs(inferred)
    return (list(value) if isinstance(value, tuple) else value) != inferred


def _alike(config: Config, inferred: Config, decisive: tuple[str, ...] | None) -> bool:
    """True where a config has the same meaning as the one that is inferred from a file.

    Args:
        config: The config.
        inferred: The inferred one.
        decisive: The fields that count for a text encoder; None: an autoencoder.
    """
    if decisive is None:
        try:
            return _autoencoder_values(config) == _autoencoder_values(inferred)
        except UserError:  # the reader's groups of 32 do not even fit
            return False
    return all(config.get(field) == inferred.get(field) for field in decisive)


def _autoencoder_values(config: Config) -> tuple[Any, ...]:
    """All that an AutoencoderKL's config decides; `UserError` for another class."""
    kind = config.get("_class_name")
    if kind != "AutoencoderKL":
        raise UserError(f"autoencoder of class {kind!r}: expected AutoencoderKL")
    c = KLConfig.from_dict(dict(config))
    levels, channels = (c.encoder_levels, c.decoder_levels), (c.in_channels, c.out_channels)
    return levels, c.space, channels, c.use_quant_conv, c.use_post_quant_conv
