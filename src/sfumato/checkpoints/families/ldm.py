"""Latent Diffusion's own models on disk: text-to-image, ImageNet's classes, unconditional.

Rombach et al. 2022, arXiv:2112.10752.
"""

from pathlib import Path
from typing import Any, ClassVar

from sfumato.checkpoints import metadata as notes
from sfumato.checkpoints.checkpoint import Component, LoadOptions, RawCheckpoint
from sfumato.checkpoints.families._base import NETWORK, Components, Config, Parts, Tower
from sfumato.checkpoints.families._bert import BertTower
from sfumato.checkpoints.families._unet import TEXT, UNetFamily
from sfumato.checkpoints.families._unet_config import PLAIN_MARK, Heads, plain_config
from sfumato.checkpoints.families._unet_map import is_plain
from sfumato.checkpoints.lazy_tensor import load_tensors
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.tokenizers import pack_bert
from sfumato.checkpoints.weight_map import WeightMap, weight
from sfumato.diffuse.process import Process
from sfumato.errors import UserError, explained
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.bert_text import BertText
from sfumato.predict.conditioners.class_embedding import KEY, ClassEmbedding
from sfumato.predict.conditioners.unconditional import Unconditional
from sfumato.predict.networks.base import Network

_FOLDER = "vqvae"
"""The autoencoder's folder in Latent Diffusion's pipelines, with a codebook or without."""


class LdmText(UNetFamily):
    """Text-to-image with a transformer trained with the model."""

    name, title = "ldm-text", "Latent Diffusion"
    marks = (f"{TEXT}transformer.attn_layers.",)
    towers = (BertTower("bert", f"{TEXT}transformer."),)
    heads = 8
    sample_size = 32
    pipelines: ClassVar = {"LDMTextToImagePipeline": {"guidance": 1.0}}
    autoencoder_folder = _FOLDER
    conditioner_class = BertText
    pack_tokenizer = staticmethod(pack_bert)

    def conditioner(
        self, raw: RawCheckpoint, components: Components, options: LoadOptions
    ) -> BertText:
        """The transformer with BERT's tokenizer."""
        return BertText(self.towers[0].encoder(components["bert"], None, raw, options))

    def text_components(self, conditioner: BertText) -> Parts:
        """The transformer, under the name "bert"."""
        model = conditioner.encoder.model
        return {"bert": (model.config.to_dict(), model.state_dict())}

    def pipeline(self, network: Network, conditioner: Conditioner, references: int) -> str | None:
        """Its own."""
        fits = network.part == "unet" and isinstance(conditioner, BertText)
        return "LDMTextToImagePipeline" if fits else None


class ClassTower(Tower):
    """A table of classes, one token a class; the last row may stand for none."""

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """The table's size."""
        rows, width = (shapes.size(KEY, axis, 2) for axis in (0, 1))
        return _class_config(rows, width)

    def weight_map(self, config: Config, bare: bool = False) -> list[WeightMap]:
        """The same name."""
        return [weight(KEY, KEY, config["n_classes"], config["embed_dim"])]

    def encoder(
        self, component: Component, tokenizer: Path | None, raw: RawCheckpoint, options: LoadOptions
    ) -> ClassEmbedding:
        """The table, with the classes' names of the caller or the metadata."""
        with explained(raw.path):
            values = notes.read_json(raw.metadata, notes.CONDITIONER)
        if options.reading is not None and options.reading.class_names:
            values |= {"class_names": list(options.reading.class_names)}
        tensors = load_tensors(component.tensors)
        return ClassEmbedding.from_tensors(tensors, values, options.dtype, raw.path)


def _class_config(rows: int, width: int) -> dict[str, Any]:
    return {"_class_name": "ClassEmbedder", "n_classes": rows, "embed_dim": width}


class _LdmImages(UNetFamily):
    """The numbers that Latent Diffusion's class-conditional and unconditional models share."""

    title = "Latent Diffusion"
    betas = (0.0015, 0.0195)
    scaling_factor = 1.0
    notes_heads = True
    image_size = 256


class LdmClass(_LdmImages):
    """ImageNet's classes."""

    name = "ldm-class"
    marks = (TEXT + KEY,)
    towers = (ClassTower("class_embedder", TEXT),)
    conditioner_class = ClassEmbedding

    def conditioner(
        self, raw: RawCheckpoint, components: Components, options: LoadOptions
    ) -> ClassEmbedding:
        """The table."""
        return self.towers[0].encoder(components["class_embedder"], None, raw, options)

    def text_components(self, conditioner: ClassEmbedding) -> Parts:
        """The table, under the name "class_embedder"."""
        return {"class_embedder": (_class_config(*conditioner.table.shape), conditioner.tensors())}

    def guidance(self, conditioner: ClassEmbedding) -> dict[str, Any]:
        """As in the paper's table 3 (LDM-4-G, s = 1.5)."""
        return {"guidance": 1.5 if conditioner.unconditional else 1.0}


class LdmUnconditional(_LdmImages):
    """Faces, bedrooms, churches: a U-Net without tokens."""

    name = "ldm-unconditional"
    marks = (NETWORK + PLAIN_MARK,)
    pipelines: ClassVar = {"LDMPipeline": {"guidance": 1.0}}
    autoencoder_folder = _FOLDER
    # Folders are of the time before the field; diffusers now takes 0.18215 there, and
    # CompVis/ldm-celebahq-256 then draws noise
    # (https://github.com/huggingface/diffusers/issues/6725).
    autoencoder_defaults: ClassVar = {"scaling_factor": 1.0}
    conditioner_class = Unconditional

    def holds(self, components: Components) -> bool:
        """True for a U-Net without tokens."""
        return "unet" in components and is_plain(components["unet"].config)

    def unet_config(self, shapes: Shapes, heads: Heads) -> dict[str, Any]:
        """Config in the fields of diffusers' UNet2DModel."""
        return plain_config(shapes, *heads)

    def kind(self, config: Config, where: object) -> str:
        """The family's name: there are no inputs beside latents."""
        inputs, channels = config["in_channels"], config["out_channels"]
        if inputs != channels:
            raise UserError(
                f"{where}: a U-Net without tokens that takes {inputs} channels and gives {channels}"
                " is conditioned on an image (inpainting, super-resolution): that is not supported"
            )
        return self.name

    def conditioner(
        self, raw: RawCheckpoint, components: Components, options: LoadOptions
    ) -> Unconditional:
        """The conditioner without prompts."""
        return Unconditional()

    def publishes(self, network: Network, conditioner: Conditioner, process: Process) -> bool:
        """True for a U-Net without tokens."""
        return super().publishes(network, conditioner, process) and is_plain(network.to_config())

    def pipeline(self, network: Network, conditioner: Conditioner, references: int) -> str | None:
        """A pipeline for diffusers' own U-Nets, not for those with heads of several widths."""
        plain = network.to_config()["_class_name"] == "UNet2DModel"
        return "LDMPipeline" if isinstance(conditioner, Unconditional) and plain else None

    def index(self, pipeline: str, conditioner: Conditioner, guidance: object) -> dict[str, Any]:
        """No entries."""
        return {}

    def guidance(self, conditioner: Conditioner) -> dict[str, Any]:
        """Off."""
        return {"guidance": 1.0}


FAMILIES = (LdmText(), LdmClass(), LdmUnconditional())
