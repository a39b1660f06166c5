"""Autoencoders alone on disk (`ae.safetensors`, Latent Diffusion's first stages): AutoencoderKL and
VQModel.
"""

from collections.abc import Mapping

from sfumato.checkpoints.checkpoint import Checkpoint, Component, RawCheckpoint
from sfumato.checkpoints.families._base import AUTOENCODERS, NETWORK, store_section
from sfumato.checkpoints.families._unet import UNetFamily
from sfumato.checkpoints.families._vae import vae_map
from sfumato.checkpoints.families.sdxl import Sdxl
from sfumato.checkpoints.shapes import Shapes


class Autoencoder(UNetFamily):
    """An autoencoder alone. Its scale of latents is a guess: it differs between models."""

    name, title = "autoencoder", "autoencoders"
    tells_latents = False
    lone_prefix = ""

    def detect_alone(self, shapes: Shapes) -> bool:
        """Encoder and decoder, with or without a prefix, and no network."""
        return not shapes.has(NETWORK) and any(
            key.startswith(("encoder.", "decoder.", *AUTOENCODERS)) for key in shapes.table
        )

    def holds(self, components: Mapping[str, Component]) -> bool:
        """An autoencoder of the two classes, alone."""
        kinds = ("AutoencoderKL", "VQModel")
        return (
            components.keys() == {"vae"}
            and components["vae"].config.get("_class_name", kinds[0]) in kinds
        )

    def publishes(self, network: object, conditioner: object, process: object) -> bool:
        """No model is an autoencoder alone."""
        return False

    def pipeline(self, network: object, conditioner: object, references: int) -> None:
        """No pipeline is an autoencoder alone."""

    def default_scale(self, metadata: Mapping[str, str], vq: bool) -> float:
        """A codebook's latents are not scaled; SDXL's are otherwise than others."""
        if "xl" in metadata.get("modelspec.architecture", ""):
            return Sdxl.scaling_factor
        return 1.0 if vq else self.scaling_factor

    def write(self, checkpoint: Checkpoint) -> RawCheckpoint:
        """Names without prefix; the scale of latents is not told."""
        part = checkpoint.components["vae"]
        return RawCheckpoint(
            store_section(vae_map(part.config), part, "", checkpoint.path), {}, checkpoint.path
        )


FAMILIES = (Autoencoder(),)
