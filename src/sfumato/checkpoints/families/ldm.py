"""Latent Diffusion's own models on disk (Rombach et al. 2022, arXiv:2112.10752): text-to-image,
ImageNet's classes, unconditional.
"""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from sfumato.checkpoints import metadata as notes
from sfumato.checkpoints.checkpoint import Component, LoadOptions, RawCheckpoint
from sfumato.checkpoints.families._base import NETWORK, Config, Tower
from sfumato.checkpoints.families._bert import BertTower
from sfumato.checkpoints.families._unet import TEXT, UNetFamily
from sfumato.checkpoints.families._unet_config import PLAIN_MARK, Heads, plain_config
from sfumato.checkpoints.families._unet_map import is_plain
from sfumato.checkpoints.lazy_tensor import load_tensors
from sfumato.checkpoints.shapes import Shapes
from sfumato.checkpoints.tokenizers import pack_bert
from sfumato.checkpoints.weight_map import WeightMap, weight
from sfumato.errors import UserError, explained
from sfumato.predict.conditioners.bert_text import BertText
from sfumato.predict.conditioners.class_embedding import KEY, ClassEmbedding
from sfumato.predict.conditioners.unconditional import Unconditional

_FOLDER = "vqvae"
"""The autoencoder's folder in the pipelines of Latent Diffusion, whether or not it has a
codebook."""


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
        self, raw: RawCheckpoint, components: Mapping[str, Component], options: LoadOptions
    ) -> BertText:
        """The transformer with BERT's tokenizer."""
        return BertText(self.towers[0].encoder(components["bert"], None, raw, options))

    def text_components(
        self, conditioner: BertText
    ) -> dict[str, tuple[dict[str, Any], Mapping[str, Any]]]:
        """The transformer is called "bert"."""
        model = conditioner.encoder.model
        return {"bert": (model.config.to_dict(), model.state_dict())}

    def pipeline(self, network: Any, conditioner: Any, references: int) -> str | None:
        """Its own."""
        return (
            "LDMTextToImagePipeline"
            if network.part == "unet" and isinstance(conditioner, BertText)
            else None
        )

    def index(self, pipeline: str, conditioner: Any, guidance: Any) -> dict[str, Any]:
        """The transformer."""
        return conditioner.index()


class ClassTower(Tower):
    """A table of classes, one token a class; the last row may stand for none."""

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """The table's size."""
        n, width = (shapes.size(KEY, axis, 2) for axis in (0, 1))
        return {"_class_name": "ClassEmbedder", "n_classes": n, "embed_dim": width}

    def weight_map(self, config: Config, bare: bool = False) -> list[WeightMap]:
        """The same name."""
        return [weight(KEY, KEY, config["n_classes"], config["embed_dim"])]

    def encoder(
        self, component: Component, tokenizer: Any, raw: RawCheckpoint, options: LoadOptions
    ) -> ClassEmbedding:
        """The table, with the names of the classes that the caller or the metadata give."""
        with explained(raw.path):
            values = json.loads(raw.metadata.get(notes.CONDITIONER, "{}"))
        if options.reading is not None and options.reading.class_names:
            values |= {"class_names": list(options.reading.class_names)}
        return ClassEmbedding.from_tensors(
            load_tensors(component.tensors), values, options.dtype, raw.path
        )


class LdmClass(UNetFamily):
    """ImageNet's classes."""

    name, title = "ldm-class", "Latent Diffusion"
    marks = (TEXT + KEY,)
    towers = (ClassTower("class_embedder", TEXT),)
    betas = (0.0015, 0.0195)
    scaling_factor = 1.0
    notes_heads = True
    image_size = 256
    conditioner_class = ClassEmbedding

    def conditioner(
        self, raw: RawCheckpoint, components: Mapping[str, Component], options: LoadOptions
    ) -> ClassEmbedding:
        """The table."""
        return self.towers[0].encoder(components["class_embedder"], None, raw, options)

    def text_components(
        self, conditioner: ClassEmbedding
    ) -> dict[str, tuple[dict[str, Any], Mapping[str, Any]]]:
        """The table is called "class_embedder"."""
        rows, width = conditioner.table.shape
        return {
            "class_embedder": (
                {"_class_name": "ClassEmbedder", "n_classes": rows, "embed_dim": width},
                conditioner.tensors(),
            )
        }

    def pipeline(self, network: Any, conditioner: Any, references: int) -> str | None:
        """diffusers has none."""
        return None

    def guidance(self, conditioner: Any) -> dict[str, Any]:
        """As in the paper's table 3 (LDM-4-G, s = 1.5)."""
        return {"guidance": 1.5 if conditioner.unconditional else 1.0}


class LdmUnconditional(UNetFamily):
    """Faces, bedrooms, churches: a U-Net without tokens."""

    name, title = "ldm-unconditional", "Latent Diffusion"
    marks = (NETWORK + PLAIN_MARK,)
    betas = (0.0015, 0.0195)
    scaling_factor = 1.0
    notes_heads = True
    image_size = 256
    pipelines: ClassVar = {"LDMPipeline": {"guidance": 1.0}}
    autoencoder_folder = _FOLDER
    # Folders are of the time before the field; diffusers now takes 0.18215 there, and
    # CompVis/ldm-celebahq-256 then draws noise
    # (https://github.com/huggingface/diffusers/issues/6725).
    autoencoder_defaults: ClassVar = {"scaling_factor": 1.0}
    conditioner_class = Unconditional

    def holds(self, components: Mapping[str, Component]) -> bool:
        """A U-Net without tokens."""
        return "unet" in components and is_plain(components["unet"].config)

    def unet_config(self, shapes: Shapes, heads: Heads) -> dict[str, Any]:
        """diffusers' UNet2DModel."""
        return plain_config(shapes, *heads)

    def kind(self, config: Config, where: object) -> str:
        """There is nothing beside latents."""
        taken, channels = config["in_channels"], config["out_channels"]
        if taken != channels:
            raise UserError(
                f"{where}: a U-Net without tokens that takes {taken} channels and gives {channels} is conditioned on a picture (Latent "
                "Diffusion's inpainting, super-resolution, semantic synthesis): that is not supported"
            )
        return self.name

    def conditioner(
        self, raw: RawCheckpoint, components: Mapping[str, Component], options: LoadOptions
    ) -> Unconditional:
        """None."""
        return Unconditional()

    def publishes(self, network: Any, conditioner: Any, process: Any) -> bool:
        """Whether the U-Net has no tokens, too."""
        return super().publishes(network, conditioner, process) and is_plain(network.to_config())

    def pipeline(self, network: Any, conditioner: Any, references: int) -> str | None:
        """diffusers' opens its own U-Nets only, not those with heads of several widths."""
        plain = network.to_config()["_class_name"] == "UNet2DModel"
        return "LDMPipeline" if isinstance(conditioner, Unconditional) and plain else None

    def index(self, pipeline: str, conditioner: Any, guidance: Any) -> dict[str, Any]:
        """Nothing."""
        return {}

    def guidance(self, conditioner: Any) -> dict[str, Any]:
        """Off."""
        return {"guidance": 1.0}


FAMILIES = (LdmText(), LdmClass(), LdmUnconditional())
