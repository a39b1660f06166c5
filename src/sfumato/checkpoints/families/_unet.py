"""Families with a U-Net: Latent Diffusion's layout of single files.

    model.diffusion_model.*   first_stage_model.* | vae.*
    cond_stage_model.* | conditioner.embedders.N.*           betas, alphas_cumprod, ...

Rombach et al. 2022, arXiv:2112.10752. Configs are detected from keys and shapes. A model whose
config would not be detected again is refused when a file is written.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.checkpoints import metadata as notes
from sfumato.checkpoints.checkpoint import (
    PREDICTIONS,
    Checkpoint,
    Component,
    LoadOptions,
    RawCheckpoint,
    ReadOptions,
)
from sfumato.checkpoints.families._base import (
    ABSENT,
    AUTOENCODERS,
    NETWORK,
    Components,
    Config,
    Configs,
    Family,
    Section,
    read_alone,
    store_section,
)
from sfumato.checkpoints.families._lossless import unrepresentable_fields
from sfumato.checkpoints.families._other_kinds import kind_of
from sfumato.checkpoints.families._unet_config import Heads, unet_config
from sfumato.checkpoints.families._unet_map import is_plain, unet_map
from sfumato.checkpoints.families._vae import is_quantized, vae_config, vae_map
from sfumato.checkpoints.lazy_tensor import LazyTensor, LazyTensors, from_tensors
from sfumato.checkpoints.schedulers import betas
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.tokenizers import pack_clip
from sfumato.checkpoints.weight_map import with_prefix
from sfumato.diffuse.process import Process
from sfumato.errors import UserError, explained
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.clip_text import ClipText, ClipTextConfig
from sfumato.predict.networks.base import Network

EPSILON, VELOCITY = PREDICTIONS[:2]
TEXT = "cond_stage_model."
MIDDLE = f"{NETWORK}middle_block.1."
LABELS, LEVELS = f"{NETWORK}label_emb.0.", f"{NETWORK}label_emb.weight"
"""A vector, and a table of noise levels, that join the time embedding."""
_PREDICTION_NOTES = {"eps": EPSILON, "v": VELOCITY, "x0": "sample", **{k: k for k in PREDICTIONS}}
"""Targets by the values of modelspec.prediction_type."""
_TABLES = (
    r"betas|alphas_cumprod(_prev)?|sqrt_(recipm?1?_|one_minus_)?alphas_cumprod|"
    r"log_one_minus_alphas_cumprod|logvar|lvlb_weights|"
    r"posterior_(variance|log_variance_clipped|mean_coef[12])"
)
_BUFFERS = re.compile(
    rf"(low_res_scale_model\.)?({_TABLES})|denoiser\.sigmas|scale_factor|v_pred|ztsnr|global_step|"
    r"model_ema\..+|(first_stage_model\.)?loss\..+|.+\.(position_ids|logit_scale|attn_mask)|"
    r"(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?text_projection(\.weight)?"
)
"""Keys that are no weights: tables made from betas, training losses, running averages."""
_TEXTS = {"text_encoder", "text_encoder_2", "bert", "class_embedder"}
_PIPELINES = {  # by (channels beyond the latent's, second encoder): the class
    (0, False): "StableDiffusionPipeline",
    (5, False): "StableDiffusionInpaintPipeline",
    (4, False): "StableDiffusionInstructPix2PixPipeline",
    (3, False): "StableDiffusionUpscalePipeline",
    (0, True): "StableDiffusionXLPipeline",
    (5, True): "StableDiffusionXLInpaintPipeline",
    (4, True): "StableDiffusionXLInstructPix2PixPipeline",
}


class UNetFamily(Family):
    """A family with a U-Net.

    Attributes:
        marks: Beginnings of keys that its files have.
        foreign_marks: Beginnings of keys of other families, whose files have its marks, too.
        linear_projection: Whether projections around the attention are linear, by which a U-Net
            without text encoders is detected; None: such a U-Net is of another family.
        heads: The number of heads of every attention, or
        head_width: the width of each; neither where files of the family differ.
        betas: First and last of its schedule.
        scaling_factor: Of latents.
        sample_size: The side of latents that it was trained at.
        sizes: Numbers beside the pooled text in the vector of SDXL.
        predicts: The network's target.
        notes_heads: Whether files note the heads, which differ and do not follow from keys.
        image_size: The side of images of all that were published; None: `sample_size` counts.
        conditioner_class: The conditioner of its models; None: it has no whole models.
        more_schedulers: Schedulers beside the denoiser's.
        lone_prefix: The prefix of an autoencoder whose names begin with none of the usual ones;
            None: there is none.
    """

    marks: ClassVar[tuple[str, ...]] = ()
    foreign_marks: ClassVar[tuple[str, ...]] = ()
    linear_projection: ClassVar[bool | None] = None
    heads: ClassVar[int | None] = None
    head_width: ClassVar[int | None] = None
    betas: ClassVar[tuple[float, float]] = (0.00085, 0.012)
    scaling_factor: ClassVar[float] = 0.18215
    sample_size: ClassVar[int] = 64
    sizes: ClassVar[int] = 0
    predicts: ClassVar[str] = EPSILON
    notes_heads: ClassVar[bool] = False
    image_size: ClassVar[int | None] = None
    conditioner_class: ClassVar[type | None] = ClipText
    more_schedulers: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    lone_prefix: ClassVar[str | None] = None

    # ---- which -----------------------------------------------------------------------------------

    def detect(self, shapes: Shapes) -> bool:
        """True where a key begins with a mark, and none with another family's."""
        has = shapes.has
        return any(map(has, self.marks)) and not any(map(has, self.foreign_marks))

    def detect_alone(self, shapes: Shapes) -> bool:
        """True for a U-Net alone with the family's kind of projections around its attention."""
        alone = shapes.has(NETWORK) and not shapes.has(LABELS) and not shapes.has(LEVELS)
        if self.linear_projection is None or not alone:
            return False
        return (shapes.rank(f"{MIDDLE}proj_in.weight") == 2) is self.linear_projection

    def holds(self, components: Components) -> bool:
        """True where the text encoders are the family's, or where the U-Net alone is."""
        if "unet" not in components or is_plain(components["unet"].config):
            return False
        unet, texts = components["unet"].config, components.keys() & _TEXTS
        if texts:
            return texts == {tower.part for tower in self.towers} and self.fits(unet, components)
        return self.fits_alone(unet)

    def fits(self, unet: Config, components: Components) -> bool:
        """True for components of this family, among those with the same text encoders."""
        return True

    def fits_alone(self, unet: Config) -> bool:
        """True for a U-Net of this family, among those without text encoders."""
        linear = bool(unet.get("use_linear_projection"))
        return not unet.get("addition_embed_type") and linear is self.linear_projection

    # ---- single files ----------------------------------------------------------------------------

    def read(
        self, raw: RawCheckpoint, options: ReadOptions | None = None, configs: Configs | None = None
    ) -> Checkpoint:
        """The parts of a file, as in `Family.read`.

        With `ema` the U-Net's weights are the running averages.
        """
        if options is not None and options.ema:
            raw = replace(raw, tensors=_averaged(raw))
        return super().read(raw, options, configs)

    def sections(
        self, raw: RawCheckpoint, shapes: Shapes, options: ReadOptions, configs: Configs
    ) -> Iterator[Section]:
        """The U-Net, the autoencoder and the text encoders that the file holds."""
        yaml, sections = options.original_config, dict[str, Section]()
        if shapes.has(NETWORK):
            config = self.unet_config(shapes.below(NETWORK), self._heads(raw, shapes, options))
            self.kind(config, raw.path)
            order = options.new_attention_order
            maps = unet_map(config, bool(yaml.new_attention_order if order is None else order))
            sections["unet"] = Section("unet", config, with_prefix(maps, NETWORK))
        prefix = next((p for p in AUTOENCODERS if shapes.has(p)), self.lone_prefix)
        if prefix is not None:
            vae = self._autoencoder(raw, shapes.below(prefix), options, configs.get("vae"))
            sections["vae"] = vae
            if self.image_size is not None and "unet" in sections:
                steps = len(vae.config["block_out_channels"]) - 1
                sections["unet"].config["sample_size"] = self.image_size >> steps
        for tower in self.towers:
            if shapes.has(tower.prefix):
                sections[tower.part] = tower.section(shapes)
        yaml.agree({part: section.config for part, section in sections.items()}, raw.path)
        yield from sections.values()

    def unet_config(self, shapes: Shapes, heads: Heads) -> dict[str, Any]:
        """The U-Net's config in diffusers' fields."""
        pooled = f"{self.towers[-1].prefix}text_projection" if self.towers else ""
        return unet_config(shapes, self.sample_size, heads, self.sizes, pooled)

    def head_rule(self, shapes: Shapes) -> Heads:
        """The heads of the family's attention."""
        return self.heads, self.head_width

    def _heads(self, raw: RawCheckpoint, shapes: Shapes, options: ReadOptions) -> Heads:
        """The heads of the caller, the YAML, the file's metadata or the family, in this order."""
        yaml = options.original_config
        rules = (
            (options.heads, None),
            (yaml.heads, yaml.head_width),
            notes.read_heads(raw.metadata, raw.path),
        )
        return next((rule for rule in rules if rule != (None, None)), self.head_rule(shapes))

    def kind(self, config: Config, where: object) -> str:
        """The family's name with a suffix for the U-Net's inputs beside latents.

        Args:
            config: The U-Net's.
            where: The file, for messages.

        Raises:
            UserError: A number of input channels that no model of the family has.
        """
        inputs, channels = config["in_channels"], config["out_channels"]
        suffixes = self.suffixes(channels)
        if inputs not in suffixes:
            raise UserError(
                f"{where}: a U-Net of {inputs} channels in and {channels} out is of no known kind: "
                f"expected {', '.join(map(str, suffixes))} in"
            )
        return self.name + suffixes[inputs]

    def suffixes(self, channels: int) -> dict[int, str]:
        """Kinds of the family by their input channels: an image ("-pix2pix"), and a mask, too."""
        return {channels: "", 2 * channels: "-pix2pix", 2 * channels + 1: "-inpainting"}

    def _autoencoder(
        self, raw: RawCheckpoint, shapes: Shapes, options: ReadOptions, config: Config | None
    ) -> Section:
        values = dict(config or vae_config(shapes, 1.0))
        if config is None:
            values["scaling_factor"] = self._scaling_factor(raw, options, is_quantized(values))
        return Section("vae", values, with_prefix(vae_map(values), shapes.prefix))

    def _scaling_factor(self, raw: RawCheckpoint, options: ReadOptions, vq: bool) -> float:
        """The caller's, the file's buffer, the YAML's, then the family's."""
        if options.scaling_factor is not None:
            return options.scaling_factor
        buffer = raw.tensors.get("scale_factor")
        if buffer is not None and buffer.load().numel() == 1:
            # the shortest decimal that is this float32
            return float(str(buffer.load().float().reshape(()).numpy()))
        if options.original_config.scaling_factor is not None:
            return options.original_config.scaling_factor
        return self.default_scale(raw.metadata, vq)

    def default_scale(self, metadata: Mapping[str, str], vq: bool) -> float:
        """The scale of latents without one in the file; `vq`: the autoencoder has a codebook."""
        return self.scaling_factor

    def buffers(self, keys: Mapping[str, object]) -> set[str]:
        """Tables, losses, averages."""
        return {key for key in keys if _BUFFERS.fullmatch(key)}

    def complete(
        self, raw: RawCheckpoint, options: ReadOptions, components: dict[str, Component]
    ) -> Checkpoint:
        """With the schedulers of the file's betas, or those that its metadata note."""
        kind, schedulers = self.name, dict[str, dict[str, Any]]()
        if "unet" in components:
            unet = components["unet"].config
            kind = self.kind(unet, raw.path)
            schedulers = self._schedulers(raw, options, kind)
            unet.update(self.adjusted(schedulers["scheduler"]["prediction_type"]))
        with explained(raw.path):
            schedulers |= {
                name: json.loads(raw.metadata[key])
                for name, key in notes.SCHEDULERS.items()
                if key in raw.metadata
            }
            model = notes.read_model_note(raw.metadata)
        for part, fields in notes.read_free_fields(raw.metadata, raw.path).items():
            if part in components:
                components[part].config.update(fields)
        return self.checkpoint(raw, components, schedulers, kind, model)

    @property
    def latent_scales(self) -> dict[str, Any]:
        """The published scale."""
        return {"scaling_factor": self.scaling_factor}

    def require_whole(self, checkpoint: Checkpoint) -> None:
        """Raise `UserError` without a U-Net or an autoencoder."""
        if checkpoint.components.keys() == {"unet"}:
            raise UserError(
                f"{checkpoint.path} holds a U-Net alone: give a folder with the other parts of its "
                "model, and this as its network "
                "(load(FOLDER, transformer=FILE), --transformer FILE)"
            )
        if not {"unet", "vae"} <= checkpoint.components.keys():
            raise UserError(
                f"{checkpoint.path} holds {' and '.join(checkpoint.components)}: "
                "a model needs a U-Net and an autoencoder; give the file that has both, "
                "or the autoencoder beside it (--vae FILE)"
            )

    def adjusted(self, prediction: str) -> dict[str, Any]:
        """Fields of the U-Net's config that follow from what it predicts."""
        return {}

    def _schedulers(
        self, raw: RawCheckpoint, options: ReadOptions, kind: str
    ) -> dict[str, dict[str, Any]]:
        """The schedulers' configs, from the file's betas where it has them."""
        yaml = options.original_config.schedule
        table = yaml or betas.fields(*self.betas)
        if "betas" in raw.tensors:
            table = betas.to_fields(raw.tensors["betas"].load(), raw.path)
            if yaml and not _close(betas.table(yaml), betas.table(table)):
                raise UserError(
                    f"{raw.path}: its betas ({table['beta_start']} to {table['beta_end']}) are not "
                    "those of the YAML: use its own YAML"
                )
        scheduler = {
            "_class_name": "DDIMScheduler",
            **table,
            "prediction_type": self._prediction(raw, options, kind),
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
        }
        if "ztsnr" in raw.tensors:
            scheduler |= {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
        more = {name: dict(config) for name, config in self.more_schedulers.items()}
        return {"scheduler": scheduler, **more}

    def _prediction(self, raw: RawCheckpoint, options: ReadOptions, kind: str) -> str:
        """The U-Net's target, see `ReadOptions`."""
        if chosen := options.prediction_type or options.original_config.prediction_type:
            return chosen
        if "v_pred" in raw.tensors:
            return VELOCITY
        noted = raw.metadata.get("modelspec.prediction_type")
        architecture = raw.metadata.get("modelspec.architecture", "")
        if noted is not None:
            if noted.lower() not in _PREDICTION_NOTES:
                raise UserError(
                    f"the file's note modelspec.prediction_type={noted!r} is not known: "
                    f"give prediction_type, one of {', '.join(PREDICTIONS)}"
                )
            return _PREDICTION_NOTES[noted.lower()]
        if "-v2-512" in architecture or "-v2-768-v" in architecture:
            return VELOCITY if architecture.partition("-v2-")[2].startswith("768-v") else EPSILON
        return self.default_prediction(kind, raw.metadata)

    def default_prediction(self, kind: str, metadata: Mapping[str, str]) -> str:
        """The U-Net's target where neither caller nor file decide it."""
        return self.predicts

    # ---- conditioners ----------------------------------------------------------------------------

    def read_conditioner(
        self, raw: RawCheckpoint, components: Components, network: Network, options: LoadOptions
    ) -> Conditioner:
        """The conditioner; `UserError` for a file without text encoders."""
        if self.towers and components.keys() <= {"unet", "vae"}:
            raise UserError(
                f"{raw.path} has no text encoder: give the file or folder of a whole model"
            )
        return self.conditioner(raw, components, options)

    def conditioner(
        self, raw: RawCheckpoint, components: Components, options: LoadOptions
    ) -> Conditioner:
        """The text encoders of CLIP, with a tokenizer from elsewhere."""
        encoders = {
            t.end: t.encoder(components[t.part], None, raw, options)
            for t in self.towers
            if t.part in components
        }
        flags = {
            "force_zeros_for_empty_prompt": "_2" in encoders,
            "requires_aesthetics_score": [*encoders] == ["_2"],
        }
        with explained(raw.path):
            settings = flags | notes.read_json(raw.metadata, notes.CONDITIONER)
            values = ClipTextConfig.from_dict(settings)
        return ClipText(encoders.get(""), encoders.get("_2"), values)

    # ---- writing ---------------------------------------------------------------------------------

    def write(self, checkpoint: Checkpoint) -> RawCheckpoint:
        """Every part with its prefix, and buffers for betas, scale of latents and target."""
        towers = {tower.part: tower for tower in self.towers}
        tensors: dict[str, LazyTensor] = {}
        if foreign := sorted(checkpoint.components.keys() - {"unet", "vae", *towers}):
            raise UserError(
                f"part {foreign[0]!r} has no place in a file of {self.title}: save a folder instead"
            )
        for name, part in checkpoint.components.items():
            if name == "unet":
                tensors |= store_section(unet_map(part.config), part, NETWORK, name)
            elif name == "vae":
                tensors |= store_section(vae_map(part.config), part, AUTOENCODERS[0], name)
            else:
                tensors |= towers[name].store(part, name)
        tensors |= from_tensors(self._buffers(checkpoint))
        raw = RawCheckpoint(tensors, self._notes(checkpoint), checkpoint.path)
        again = self.read(replace(raw, path=RawCheckpoint.path))
        if lost := unrepresentable_fields(checkpoint, again):
            raise UserError(
                f"the original layout has no place for {'; '.join(lost)}: save a folder instead"
            )
        configs, inferred = (
            {name: part.config for name, part in c.components.items()} for c in (checkpoint, again)
        )
        free = notes.write_free_fields(configs, inferred)
        return replace(raw, metadata={**raw.metadata, **free})

    def single_file(self, checkpoint: Checkpoint) -> RawCheckpoint | None:
        """The file; None for a U-Net with a guidance scale, which has no original layout."""
        unet = checkpoint.components.get("unet")
        if unet is not None and unet.config.get("time_cond_proj_dim") is not None:
            return None
        return super().single_file(checkpoint)

    def _buffers(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        buffers: dict[str, Tensor] = {}
        vae, config = checkpoint.components.get("vae"), checkpoint.schedulers.get("scheduler")
        scale = self.scaling_factor if vae is None else vae.config.get("scaling_factor", 0.18215)
        if scale != self.scaling_factor:
            buffers["scale_factor"] = torch.tensor(scale)
        if config is None:
            return buffers
        table = betas.table(config)
        buffers |= {"betas": table.float(), "alphas_cumprod": torch.cumprod(1 - table, 0).float()}
        if config.get("rescale_betas_zero_snr"):
            buffers["ztsnr"] = torch.tensor([1.0])
        if self.sizes and config.get("prediction_type") == VELOCITY:
            buffers["v_pred"] = torch.tensor([1.0])
        return buffers

    def _notes(self, checkpoint: Checkpoint) -> dict[str, str]:
        """The target, by Stability AI's modelspec, and the heads where the files differ."""
        if "unet" not in checkpoint.components:
            return {}
        prediction = checkpoint.schedulers.get("scheduler", {}).get("prediction_type", EPSILON)
        config = checkpoint.components["unet"].config
        heads = notes.write_heads(config, is_plain(config)) if self.notes_heads else {}
        return {"modelspec.prediction_type": "v" if prediction == VELOCITY else prediction, **heads}

    def notes(self, checkpoint: Checkpoint, conditioner: Conditioner) -> dict[str, str]:
        """Schedulers, tokenizer, settings of the conditioner, and the model's note."""
        noted = {
            notes.SCHEDULERS[name]: json.dumps(config)
            for name, config in checkpoint.schedulers.items()
        }
        if conditioner.encoders:
            pads = {tower.end: tower.pad for tower in self.towers}
            noted[notes.TOKENIZER] = self.pack_tokenizer(conditioner.encoders, pads)
        noted |= notes.write_model_note(
            checkpoint.name, checkpoint.defaults, checkpoint.training_data
        )
        return noted | {notes.CONDITIONER: json.dumps(conditioner.to_config())}

    @staticmethod
    def pack_tokenizer(encoders: Mapping[str, Any], pads: Mapping[str, str]) -> str:
        """The tokenizers of its text encoders, for the metadata; arguments of `pack_clip`."""
        return pack_clip(encoders, pads)

    # ---- models ----------------------------------------------------------------------------------

    def defaults(self, index: Config, learned_guidance: bool, scheduler: Config) -> dict[str, Any]:
        """The pipeline's; of latent consistency models the guidance is the embedded scale."""
        own = super().defaults(index, learned_guidance, scheduler)
        if not learned_guidance:
            return own
        few = {"steps": 4} if scheduler.get("_class_name") == "LCMScheduler" else {}
        scale = {"guidance": 1.0, "distilled_guidance": own.get("guidance", 7.5)}
        return {**own, **few, **scale}

    def publishes(self, network: Network, conditioner: Conditioner, process: Process) -> bool:
        """True where the conditioner is of this family."""
        kind = self.conditioner_class
        return network.part == "unet" and kind is not None and isinstance(conditioner, kind)

    def pipeline(self, network: Network, conditioner: Conditioner, references: int) -> str | None:
        """By the U-Net's inputs beside the latent, and by its text encoders."""
        fits = network.part == "unet" and isinstance(conditioner, ClipText)
        if not fits or self.conditioner_class is not ClipText:
            return None
        if "" not in conditioner.encoders:  # the refiner
            return "StableDiffusionXLImg2ImgPipeline"
        channels = network.config.in_channels - network.config.out_channels
        return _PIPELINES.get((channels, "_2" in conditioner.encoders), "LatentDiffusion")

    def index(self, pipeline: str, conditioner: Conditioner, guidance: object) -> dict[str, Any]:
        """The text encoders, and parts that diffusers' pipelines may have and these do not."""
        if self.conditioner_class is not ClipText:
            return conditioner.index()
        if "XL" in pipeline:
            return conditioner.index() | _absent("feature_extractor", "image_encoder")
        if pipeline == "StableDiffusionUpscalePipeline":
            absent = _absent("safety_checker", "feature_extractor", "watermarker")
            return conditioner.index() | absent
        absent = _absent("safety_checker", "feature_extractor", "image_encoder")
        return {**conditioner.index(), **absent, "requires_safety_checker": False}


def read_unet(raw: RawCheckpoint, config: Config) -> Component:
    """The U-Net of a file by a known config; other parts of the file are ignored.

    Args:
        raw: A file with original names, with their prefix or without it, or with diffusers'.
        config: In diffusers' fields.

    Raises:
        UserError: A file without a U-Net of this config.
    """
    if "conv_in.weight" in raw.tensors and "down_blocks.0.resnets.0.conv1.weight" in raw.tensors:
        return Component(dict(config), raw.tensors)
    first = "input_blocks.0.0.weight"
    prefix = next((p for p in (NETWORK, "") if p + first in raw.tensors), None)
    if prefix is None:
        if (kind := kind_of(raw.tensors)) is not None:
            raise UserError(f"{raw.path} holds no U-Net: it is {kind}")
        shown = ", ".join(sorted(raw.tensors)[:4])
        raise UserError(
            f"{raw.path} holds no U-Net under its original names or diffusers' "
            f"(its first keys: {shown})"
        )
    buffers = frozenset(key for key in raw.tensors if _BUFFERS.fullmatch(key))
    maps = with_prefix(unet_map(config), prefix)
    section = Section("unet", dict(config), maps, buffers)
    return read_alone(raw, section, prefix, (*AUTOENCODERS, TEXT, "conditioner."))


def _absent(*parts: str) -> dict[str, Any]:
    return dict.fromkeys(parts, ABSENT)


def is_open_clip(components: Components) -> bool:
    """True where the first text encoder is open_clip's, by its activation."""
    return components["text_encoder"].config.get("hidden_act", "quick_gelu") == "gelu"


def _averaged(raw: RawCheckpoint) -> LazyTensors:
    """The U-Net's keys with the running averages, whose names have lost their dots."""
    flat = {
        k: "model_ema." + k.removeprefix("model.").replace(".", "")
        for k in raw.tensors
        if k.startswith(NETWORK)
    }
    missing = sorted(v for v in flat.values() if v not in raw.tensors)
    if missing:
        raise UserError(
            f"{raw.path} has no running average for {len(missing)} of {len(flat)} weights "
            f"({missing[0]}, ...): read it without ema"
        )
    return dict(raw.tensors) | {k: raw.tensors[v] for k, v in flat.items()}


def _close(a: Tensor, b: Tensor) -> bool:
    return len(a) == len(b) and torch.allclose(a, b, rtol=1e-3)
