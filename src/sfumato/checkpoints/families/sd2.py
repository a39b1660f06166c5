"""Stable Diffusion 2 on disk (Stability AI, 2022): 512 and 768, and its inpainting model."""

from collections.abc import Mapping
from typing import Any

from sfumato.checkpoints.families._base import Components, Config
from sfumato.checkpoints.families._clip import OpenClipTower
from sfumato.checkpoints.families._unet import LEVELS, TEXT, UNetFamily, is_open_clip

CLIP_H = OpenClipTower("text_encoder", f"{TEXT}model.", penultimate=True)
"""OpenCLIP's ViT-H, whose last layer is not used."""
_BASE_STEPS = "875000"  # the only trace of SD 2.0 base, which diffusers uses, too


class Sd2(UNetFamily):
    """Stable Diffusion 2.

    Its base models predict noise, those for 768 pixels velocity, under the same keys. The default
    is velocity, as in diffusers.
    """

    name, title = "sd2", "Stable Diffusion 2"
    marks, foreign_marks = (CLIP_H.prefix,), (LEVELS,)
    linear_projection = True
    towers = (CLIP_H,)
    head_width = 64
    sample_size = 96
    predicts = "v_prediction"

    def fits(self, unet: Config, components: Components) -> bool:
        """True for OpenCLIP without a table of noise levels."""
        return is_open_clip(components) and unet.get("num_class_embeds") is None

    def default_prediction(self, kind: str, metadata: Mapping[str, str]) -> str:
        """Noise for base and inpainting models."""
        base = metadata.get("global_step") == _BASE_STEPS
        return "epsilon" if base or kind != self.name else self.predicts

    def adjusted(self, prediction: str) -> dict[str, Any]:
        """The size of the models that predict noise, which are for 512 pixels."""
        return {"sample_size": 64} if prediction == "epsilon" else {}


FAMILIES = (Sd2(),)
