"""Families with a U-Net: Latent Diffusion's layout (Rombach et al. 2022, arXiv:2112.10752).

    model.diffusion_model.*   first_stage_model.* | vae.*   cond_stage_model.* |
                              conditioner.embedders.N.*
    betas, alphas_cumprod, ...

Configs are detected from keys and shapes. What the layout cannot tell a reader is refused when a
file is written.
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
    Config,
    Family,
    Section,
    store_section,
)
from sfumato.checkpoints.families._lossless import unrepresentable_fields
from sfumato.checkpoints.families._unet_config import Heads, unet_config
from sfumato.checkpoints.families._unet_map import is_plain, unet_map
from sfumato.checkpoints.families._vae import is_quantized, vae_config, vae_map
from sfumato.checkpoints.lazy_tensor import LazyTensor, LazyTensors, from_tensors
from sfumato.checkpoints.schedulers import betas
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.tokenizers import pack_clip
from sfumato.checkpoints.weight_map import with_prefix
from sfumato.errors import UserError, explained
from sfumato.predict.conditioners.clip_text import ClipText, ClipTextConfig

EPSILON, VELOCITY = PREDICTIONS[:2]
TEXT = "cond_stage_model."
LABELS, LEVELS = f"{NETWORK}label_emb.0.", f"{NETWORK}label_emb.weight"
"""A vector, and a table of noise levels, that join the time embedding."""
_PREDICTION_NOTES = {
    "epsilon": EPSILON,
    "eps": EPSILON,
    "v": VELOCITY,
    "v_prediction": VELOCITY,
    "sample": "sample",
    "x0": "sample",
}
_BUFFER = (
    r"(betas|alphas_cumprod(_prev)?|sqrt_(recipm?1?_|one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod|logvar|lvlb_weights|"
    r"posterior_(variance|log_variance_clipped|mean_coef[12]))"
)
_BUFFERS = re.compile(
    rf"(low_res_scale_model\.)?{_BUFFER}|denoiser\.sigmas|scale_factor|v_pred|ztsnr|global_step|model_ema\..+|(first_stage_model\.)?loss\..+|"
    r".+\.(position_ids|logit_scale|attn_mask)|(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?text_projection(\.weight)?"
)
"""Keys that are not weights of a part: tables made from betas, training losses, running
averages."""
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
        marks: beginnings of keys by which its files are known
        foreign_marks: those of families whose files have its marks, too
        heads: the number of heads of every attention, or
        head_width: of each; neither where files of the family differ
        betas: first and last of its schedule
        scaling_factor: of latents
        sample_size: the side of latents that it was trained at
        sizes: numbers beside the pooled text in the vector of SDXL
        predicts: the network's target
        notes_heads: whether files note the heads, because the family's differ and keys do not tell
        image_size: the side of images of all that were published; None: `sample_size` counts
        conditioner_class: the conditioner of its models
        more_schedulers: beside the denoiser's
        lone_prefix: of an autoencoder whose names begin with none of the usual ones; None: there is
        none
    """

    marks: ClassVar[tuple[str, ...]] = ()
    foreign_marks: ClassVar[tuple[str, ...]] = ()
    heads: ClassVar[int | None] = None
    head_width: ClassVar[int | None] = None
    betas: ClassVar[tuple[float, float]] = (0.00085, 0.012)
    scaling_factor: ClassVar[float] = 0.18215
    sample_size: ClassVar[int] = 64
    sizes: ClassVar[int] = 0
    predicts: ClassVar[str] = EPSILON
    notes_heads: ClassVar[bool] = False
    image_size: ClassVar[int | None] = None
    conditioner_class: ClassVar[type] = ClipText
    more_schedulers: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    lone_prefix: ClassVar[str | None] = None

    # ---- which -----------------------------------------------------------------------------------

    def detect(self, shapes: Shapes) -> bool:
        """Whether any key begins with one of the marks, and none with what other families have."""
        return any(shapes.has(mark) for mark in self.marks) and not any(
            shapes.has(mark) for mark in self.foreign_marks
        )

    def holds(self, components: Mapping[str, Component]) -> bool:
        """Whether the text encoders are the family's, or there are none and the U-Net alone is of
        its kind.
        """
        if "unet" not in components or is_plain(components["unet"].config):
            return False
        unet, texts = components["unet"].config, components.keys() & _TEXTS
        if texts:
            return texts == {tower.part for tower in self.towers} and self.fits(unet, components)
        return self.fits_alone(unet)

    def fits(self, unet: Config, components: Mapping[str, Component]) -> bool:
        """Whether these components are of this family, among those with the same text encoders."""
        return True

    def fits_alone(self, unet: Config) -> bool:
        """Whether a U-Net without text encoders is of this family."""
        return False

    # ---- single files ----------------------------------------------------------------------------

    def read(
        self,
        raw: RawCheckpoint,
        options: ReadOptions | None = None,
        configs: Mapping[str, Config] | None = None,
    ) -> Checkpoint:
        """The parts of a file; see `Family.read`. With `ema` the U-Net's weights are the running
        averages.
        """
        if options is not None and options.ema:
            raw = replace(raw, tensors=_averaged(raw))
        return super().read(raw, options, configs)

    def sections(
        self,
        raw: RawCheckpoint,
        shapes: Shapes,
        options: ReadOptions,
        configs: Mapping[str, Config],
    ) -> Iterator[Section]:
        """The U-Net, the autoencoder and the text encoders that are there."""
        found: dict[str, Section] = {}
        if shapes.has(NETWORK):
            below = shapes.below(NETWORK)
            config = self.unet_config(below, self._heads(raw, shapes, options))
            self.kind(config, raw.path)
            order = options.new_attention_order
            maps = unet_map(
                config,
                bool(options.original_config.new_attention_order if order is None else order),
            )
            found["unet"] = Section("unet", config, with_prefix(maps, NETWORK))
        prefix = next((p for p in AUTOENCODERS if shapes.has(p)), self.lone_prefix)
        if prefix is not None:
            found["vae"] = self._autoencoder(raw, shapes.below(prefix), options, configs.get("vae"))
        if self.image_size is not None and found.keys() >= {"unet", "vae"}:
            found["unet"].config["sample_size"] = self.image_size >> (
                len(found["vae"].config["block_out_channels"]) - 1
            )
        for tower in self.towers:
            if shapes.has(tower.prefix):
                found[tower.part] = tower.section(shapes)
        options.original_config.agree(
            {part: section.config for part, section in found.items()}, raw.path
        )
        yield from found.values()

    def unet_config(self, shapes: Shapes, heads: Heads) -> dict[str, Any]:
        """diffusers' config of the U-Net."""
        pooled = f"{self.towers[-1].prefix}text_projection" if self.towers else ""
        return unet_config(shapes, self.sample_size, heads, self.sizes, pooled)

    def head_rule(self, shapes: Shapes) -> Heads:
        """The heads of the family's attention."""
        return self.heads, self.head_width

    def _heads(self, raw: RawCheckpoint, shapes: Shapes, options: ReadOptions) -> Heads:
        """What the caller, the YAML, the file's metadata or the family say, in this order."""
        yaml = options.original_config
        rules = (
            (options.heads, None),
            (yaml.heads, yaml.head_width),
            notes.read_heads(raw.metadata, raw.path),
        )
        return next((rule for rule in rules if rule != (None, None)), self.head_rule(shapes))

    def kind(self, config: Config, where: object) -> str:
        """The family's name with a suffix for what the U-Net takes beside latents: an image
        ("-pix2pix"), and a mask ("-inpainting").
        """
        taken, channels = config["in_channels"], config["out_channels"]
        suffixes = {channels: "", 2 * channels: "-pix2pix", 2 * channels + 1: "-inpainting"}
        if taken not in suffixes:
            raise UserError(
                f"{where}: a U-Net of {taken} channels in and {channels} out is of no known kind: expected {', '.join(map(str, suffixes))} in"
            )
        return self.name + suffixes[taken]

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
        """The scale of latents where nothing tells it. vq: whether the autoencoder has a
        codebook.
        """
        return self.scaling_factor

    def buffers(self, keys: Mapping[str, object]) -> set[str]:
        """Tables, losses, averages."""
        return {key for key in keys if _BUFFERS.fullmatch(key)}

    def complete(
        self, raw: RawCheckpoint, options: ReadOptions, components: dict[str, Component]
    ) -> Checkpoint:
        """With the scheduler of the file's betas and of what it predicts, or those that its
        metadata note.
        """
        kind = self.kind(components["unet"].config, raw.path) if "unet" in components else self.name
        schedulers = self._schedulers(raw, options, kind) if "unet" in components else {}
        if "unet" in components:
            components["unet"].config.update(
                self.adjusted(schedulers["scheduler"]["prediction_type"])
            )
        with explained(raw.path):  # our own notes, where the layout says nothing
            schedulers |= {
                name: json.loads(raw.metadata[key])
                for name, key in notes.SCHEDULERS.items()
                if key in raw.metadata
            }
        return Checkpoint(
            components,
            schedulers,
            name=raw.path.stem,
            family=self,
            kind=kind,
            conditioner=lambda network, load_options: self._read_conditioner(
                raw, components, load_options
            ),
            path=raw.path,
            metadata=raw.metadata,
        )

    def require_whole(self, checkpoint: Checkpoint) -> None:
        """A U-Net and an autoencoder."""
        if not {"unet", "vae"} <= checkpoint.components.keys():
            parts = " and ".join(checkpoint.components)
            raise UserError(
                f"{checkpoint.path} holds {parts}: a model needs a U-Net and an autoencoder; give the file that has both"
            )

    def adjusted(self, prediction: str) -> dict[str, Any]:
        """Fields of the U-Net's config that follow from what it predicts."""
        return {}

    def _schedulers(
        self, raw: RawCheckpoint, options: ReadOptions, kind: str
    ) -> dict[str, dict[str, Any]]:
        """scheduler_config.json of the denoiser, from the file's betas where it has them."""
        yaml = options.original_config.schedule
        if "betas" in raw.tensors:
            table = betas.to_fields(raw.tensors["betas"].load(), raw.path)
            if yaml and not _close(betas.table(yaml), betas.table(table)):
                raise UserError(
                    f"{raw.path}: its betas ({table['beta_start']} to {table['beta_end']}) are not those of the YAML: use its own YAML"
                )
        else:
            table = yaml or betas.fields(*self.betas)
        rest: dict[str, Any] = {
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
        }
        if "ztsnr" in raw.tensors:
            rest |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return {
            "scheduler": {
                "_class_name": "DDIMScheduler",
                **table,
                "prediction_type": self._prediction(raw, options, kind),
                **rest,
            },
            **{name: dict(config) for name, config in self.more_schedulers.items()},
        }

    def _prediction(self, raw: RawCheckpoint, options: ReadOptions, kind: str) -> str:
        """See `ReadOptions`."""
        if said := options.prediction_type or options.original_config.prediction_type:
            return said
        if "v_pred" in raw.tensors:
            return VELOCITY
        noted, architecture = (
            raw.metadata.get("modelspec.prediction_type"),
            raw.metadata.get("modelspec.architecture", ""),
        )
        if noted is not None:
            if noted.lower() not in _PREDICTION_NOTES:
                raise UserError(
                    f"the file's note modelspec.prediction_type={noted!r} is not known: give prediction_type, one of {', '.join(PREDICTIONS)}"
                )
            return _PREDICTION_NOTES[noted.lower()]
        if "-v2-512" in architecture or "-v2-768-v" in architecture:
            return VELOCITY if architecture.partition("-v2-")[2].startswith("768-v") else EPSILON
        return self.default_prediction(kind, raw.metadata)

    def default_prediction(self, kind: str, metadata: Mapping[str, str]) -> str:
        """What the U-Net predicts where nothing tells it."""
        return self.predicts

    # ---- conditioners ----------------------------------------------------------------------------

    def _read_conditioner(
        self, raw: RawCheckpoint, components: Mapping[str, Component], options: LoadOptions
    ) -> Any:
        parts = components.keys() - {"unet", "vae"}
        if parts - {tower.part for tower in self.towers} or (self.towers and not parts):
            raise UserError(
                f"{raw.path} is conditioned by {' and '.join(sorted(parts)) or 'nothing'}: that is not run by this version"
            )
        return self.conditioner(raw, components, options)

    def conditioner(
        self, raw: RawCheckpoint, components: Mapping[str, Component], options: LoadOptions
    ) -> Any:
        """CLIP's text encoders, with a tokenizer from elsewhere."""
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
            settings = ClipTextConfig.from_dict(
                flags | json.loads(raw.metadata.get(notes.CONDITIONER, "{}"))
            )
        return ClipText(encoders.get(""), encoders.get("_2"), settings)

    # ---- writing ---------------------------------------------------------------------------------

    def write(self, checkpoint: Checkpoint) -> RawCheckpoint:
        """Every part with its prefix, and the few buffers that tell betas, the scale of latents and
        what is predicted.
        """
        towers = {tower.part: tower for tower in self.towers}
        tensors: dict[str, LazyTensor] = {}
        if foreign := sorted(checkpoint.components.keys() - {"unet", "vae", *towers}):
            raise UserError(
                f"part {foreign[0]!r} has no place in a single file of the {self.name} family: save a folder instead"
            )
        for name, part in checkpoint.components.items():
            if name == "unet":
                tensors |= store_section(unet_map(part.config), part, NETWORK, name)
            elif name == "vae":
                tensors |= store_section(vae_map(part.config), part, AUTOENCODERS[0], name)
            else:
                named = Component(part.config, towers[name].named(part.tensors))
                tensors |= store_section(
                    towers[name].weight_map(part.config), named, towers[name].prefix, name
                )
        tensors |= from_tensors(self._buffers(checkpoint))
        raw = RawCheckpoint(tensors, self._notes(checkpoint), checkpoint.path)
        lost = unrepresentable_fields(checkpoint, self.read(replace(raw, path=RawCheckpoint.path)))
        if lost:
            raise UserError(
                f"the original layout cannot tell {'; '.join(lost)}: save a folder instead"
            )
        return raw

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
        """What is predicted, by Stability AI's modelspec; and the heads, where the family's files
        differ.
        """
        if "unet" not in checkpoint.components:
            return {}
        prediction = checkpoint.schedulers.get("scheduler", {}).get("prediction_type", EPSILON)
        config = checkpoint.components["unet"].config
        heads = notes.write_heads(config, is_plain(config)) if self.notes_heads else {}
        return {"modelspec.prediction_type": "v" if prediction == VELOCITY else prediction, **heads}

    def notes(self, checkpoint: Checkpoint, conditioner: Any) -> dict[str, str]:
        """Schedulers, tokenizer and settings of the conditioner."""
        schedulers = {
            notes.SCHEDULERS[name]: json.dumps(config)
            for name, config in checkpoint.schedulers.items()
        }
        # both of SDXL's have the same words
        encoders = list(getattr(conditioner, "encoders", {}).values())
        tokenizer = (
            {notes.TOKENIZER: self.pack_tokenizer(encoders[-1].tokenizer)} if encoders else {}
        )
        return schedulers | tokenizer | {notes.CONDITIONER: json.dumps(conditioner.to_config())}

    @staticmethod
    def pack_tokenizer(tokenizer: Any) -> str:
        """The tokenizer of its text encoders, for the metadata."""
        return pack_clip(tokenizer)

    # ---- models ----------------------------------------------------------------------------------

    def publishes(self, network: Any, conditioner: Any, process: Any) -> bool:
        """Whether the conditioner is of this family."""
        return network.part == "unet" and isinstance(conditioner, self.conditioner_class)

    def pipeline(self, network: Any, conditioner: Any, references: int) -> str | None:
        """By what the U-Net takes beside the latent, and by its text encoders."""
        if network.part != "unet" or not isinstance(conditioner, ClipText):
            return None
        if "" not in conditioner.encoders:  # the refiner
            return "StableDiffusionXLImg2ImgPipeline"
        channels = network.config.in_channels - network.config.out_channels
        return _PIPELINES.get((channels, "_2" in conditioner.encoders), "LatentDiffusion")

    def index(self, pipeline: str, conditioner: Any, guidance: Any) -> dict[str, Any]:
        """The text encoders, and what diffusers' pipelines may have and these folders do not."""
        entries = conditioner.index()
        if "XL" in pipeline:
            return {**entries, "feature_extractor": ABSENT, "image_encoder": ABSENT}
        if pipeline == "StableDiffusionUpscalePipeline":
            return {
                **entries,
                "safety_checker": ABSENT,
                "feature_extractor": ABSENT,
                "watermarker": ABSENT,
            }
        absent = {"safety_checker": ABSENT, "feature_extractor": ABSENT, "image_encoder": ABSENT}
        return {**entries, **absent, "requires_safety_checker": False}


def is_open_clip(components: Mapping[str, Component]) -> bool:
    """Whether the first text encoder is open_clip's, by its activation."""
    return components["text_encoder"].config.get("hidden_act", "quick_gelu") == "gelu"


def _averaged(raw: RawCheckpoint) -> LazyTensors:
    """The U-Net's keys with the running averages, whose names have lost their dots."""
    flat = {
        k: "model_ema." + k.removeprefix("model.").replace(".", "")
        for k in raw.tensors
        if k.startswith(NETWORK)
    }
    lost = sorted(v for v in flat.values() if v not in raw.tensors)
    if lost:
        raise UserError(
            f"{raw.path} has no running average for {len(lost)} of {len(flat)} weights ({lost[0]}, ...): read it without ema"
        )
    return dict(raw.tensors) | {k: raw.tensors[v] for k, v in flat.items()}


def _close(a: Tensor, b: Tensor) -> bool:
    return len(a) == len(b) and torch.allclose(a, b, rtol=1e-3)
