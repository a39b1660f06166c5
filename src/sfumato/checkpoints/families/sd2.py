"""Stable Diffusion 2 on disk (Stability AI, 2022): 512 and 768, and its inpainting model."""

from collections.abc import Mapping
from typing import Any

from sfumato.checkpoints.checkpoint import Component
from sfumato.checkpoints.families._base import NETWORK, Config
from sfumato.checkpoints.families._clip import OpenClipTower
from sfumato.checkpoints.families._unet import (
    EPSILON,
    LABELS,
    LEVELS,
    TEXT,
    VELOCITY,
    UNetFamily,
    is_open_clip,
)
from sfumato.checkpoints.shapes import Shapes

CLIP_H = OpenClipTower("text_encoder", f"{TEXT}model.", penultimate=True)
"""OpenCLIP's ViT-H, whose last layer is not used."""
_BASE_STEPS = "875000"  # the only trace by which diffusers knows SD 2.0 base


class Sd2(UNetFamily):
    """Stable Diffusion 2.

    Keys do not tell the base models, which predict noise, from those for 768 pixels, which predict
    velocity; the default is the latter, as in diffusers.
    """

    name, title = "sd2", "Stable Diffusion 2"
    marks, foreign_marks = (CLIP_H.prefix,), (LEVELS,)
    towers = (CLIP_H,)
    head_width = 64
    sample_size = 96
    predicts = VELOCITY

    def detect_alone(self, shapes: Shapes) -> bool:
        """A U-Net with linear projections around its attention."""
        lone = shapes.has(NETWORK) and not shapes.has(LABELS) and not shapes.has(LEVELS)
        return lone and shapes.rank(f"{NETWORK}middle_block.1.proj_in.weight") == 2

    def fits(self, unet: Config, components: Mapping[str, Component]) -> bool:
        """OpenCLIP without a table of noise levels."""
        return is_open_clip(components) and unet.get("num_class_embeds") is None

    def fits_alone(self, unet: Config) -> bool:
        """A U-Net with linear projections."""
        return not unet.get("addition_embed_type") and bool(unet.get("use_linear_projection"))

    def default_prediction(self, kind: str, metadata: Mapping[str, str]) -> str:
        """Noise for base and inpainting models."""
        return (
            EPSILON
            if kind != self.name or metadata.get("global_step") == _BASE_STEPS
            else self.predicts
        )

    def adjusted(self, prediction: str) -> dict[str, Any]:
        """The models that predict noise are for 512 pixels."""
        return {"sample_size": 64} if prediction == EPSILON else {}


FAMILIES = (Sd2(),)
