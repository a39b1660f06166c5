"""Stable Diffusion 1 on disk (Rombach et al. 2022, arXiv:2112.10752), and its inpainting and
InstructPix2Pix models.
"""

from collections.abc import Mapping
from typing import ClassVar

from sfumato.checkpoints.checkpoint import Component
from sfumato.checkpoints.families._base import NETWORK, Config
from sfumato.checkpoints.families._clip import ClipTower
from sfumato.checkpoints.families._unet import LABELS, LEVELS, TEXT, UNetFamily, is_open_clip
from sfumato.checkpoints.families._unet_config import Heads
from sfumato.checkpoints.shapes import Shapes

_MIDDLE = f"{NETWORK}middle_block.1."


class Sd1(UNetFamily):
    """Stable Diffusion 1. A U-Net alone is of this family where convolutions surround its
    attention.
    """

    name, title = "sd1", "Stable Diffusion 1"
    marks = (f"{TEXT}transformer.text_model.", f"{TEXT}transformer.embeddings.")
    towers = (ClipTower("text_encoder", f"{TEXT}transformer."),)
    heads = 8
    pipelines: ClassVar = {
        "StableDiffusionPipeline": {},
        "StableDiffusionInpaintPipeline": {},
        "StableDiffusionInstructPix2PixPipeline": {"steps": 100},
    }

    def detect_alone(self, shapes: Shapes) -> bool:
        """A U-Net with convolutions around its attention."""
        lone = shapes.has(NETWORK) and not shapes.has(LABELS) and not shapes.has(LEVELS)
        return lone and shapes.rank(f"{_MIDDLE}proj_in.weight") != 2

    def fits(self, unet: Config, components: Mapping[str, Component]) -> bool:
        """CLIP with the quick GELU."""
        return not is_open_clip(components)

    def fits_alone(self, unet: Config) -> bool:
        """A U-Net without linear projections."""
        return not unet.get("addition_embed_type") and not unet.get("use_linear_projection")

    def head_rule(self, shapes: Shapes) -> Heads:
        """8 heads; not known of a U-Net alone with tokens of another width than CLIP L's."""
        tokens = f"{_MIDDLE}transformer_blocks.0.attn2.to_k.weight"
        below = shapes.below("")
        known = below.has(self.towers[0].prefix) or below.size(tokens, 1, 2) == 768
        return (self.heads, None) if known else (None, None)


FAMILIES = (Sd1(),)
