"""Autoencoders alone on disk: `ae.safetensors`, Latent Diffusion's first stages.

They are of the classes AutoencoderKL and VQModel.
"""

from collections.abc import Mapping

from sfumato.checkpoints.checkpoint import Checkpoint, RawCheckpoint
from sfumato.checkpoints.families._base import AUTOENCODERS, NETWORK, Components, store_section
from sfumato.checkpoints.families._unet import UNetFamily
from sfumato.checkpoints.families._vae import vae_map
from sfumato.checkpoints.families.sdxl import Sdxl
from sfumato.checkpoints.shapes import Shapes


class Autoencoder(UNetFamily):
    """An autoencoder alone. Its scale of latents is a guess: it differs between models."""

    name, title = "autoencoder", "autoencoders"
    tells_latents = False
    lone_prefix = ""
    conditioner_class = None

    def detect_alone(self, shapes: Shapes) -> bool:
        """True for encoder and decoder, with or without a prefix, and no network."""
        starts = ("encoder.", "decoder.", *AUTOENCODERS)
        return not shapes.has(NETWORK) and any(map(shapes.has, starts))

    def holds(self, components: Components) -> bool:
        """True for an autoencoder of the two classes, alone."""
        kinds = ("AutoencoderKL", "VQModel")
        alone = components.keys() == {"vae"}
        return alone and components["vae"].config.get("_class_name", kinds[0]) in kinds

    def default_scale(self, metadata: Mapping[str, str], vq: bool) -> float:
        """SDXL's scale by the metadata, 1 with a codebook, else SD 1's."""
        if "xl" in metadata.get("modelspec.architecture", ""):
            return Sdxl.scaling_factor
        return 1.0 if vq else self.scaling_factor

    def write(self, checkpoint: Checkpoint) -> RawCheckpoint:
        """Names without prefix; the file does not hold the scale of latents."""
        part, where = checkpoint.components["vae"], checkpoint.path
        return RawCheckpoint(store_section(vae_map(part.config), part, "", where), {}, where)


FAMILIES = (Autoencoder(),)
