"""Stable Diffusion 1 on disk, and its inpainting and InstructPix2Pix models.

Rombach et al. 2022, arXiv:2112.10752.
"""

from typing import ClassVar

from sfumato.checkpoints.families._base import Components, Config
from sfumato.checkpoints.families._clip import ClipTower
from sfumato.checkpoints.families._unet import MIDDLE, TEXT, UNetFamily, is_open_clip
from sfumato.checkpoints.families._unet_config import Heads
from sfumato.checkpoints.shapes import Shapes


class Sd1(UNetFamily):
    """Stable Diffusion 1."""

    name, title = "sd1", "Stable Diffusion 1"
    marks = (f"{TEXT}transformer.text_model.", f"{TEXT}transformer.embeddings.")
    linear_projection = False
    towers = (ClipTower("text_encoder", f"{TEXT}transformer."),)
    heads = 8
    pipelines: ClassVar = {
        "StableDiffusionPipeline": {},
        "StableDiffusionInpaintPipeline": {},
        "StableDiffusionInstructPix2PixPipeline": {"steps": 100},
        "LatentConsistencyModel": {"steps": 4, "guidance": 8.5},
    }

    def fits(self, unet: Config, components: Components) -> bool:
        """True for CLIP with the quick GELU."""
        return not is_open_clip(components)

    def head_rule(self, shapes: Shapes) -> Heads:
        """8 heads; undecided for a U-Net alone with tokens of another width than CLIP L's."""
        whole = shapes.below("")
        tokens = f"{MIDDLE}transformer_blocks.0.attn2.to_k.weight"
        is_clip_l = whole.has(self.towers[0].prefix) or whole.size(tokens, 1, 2) == 768
        return (self.heads if is_clip_l else None), None


FAMILIES = (Sd1(),)
