"""Stable Diffusion's x4 upscaler on disk (Stability AI, 2022).

Beside the latent its U-Net takes a small image, and the noise level of that image.
"""

from typing import ClassVar

from sfumato.checkpoints.families._base import Components, Config
from sfumato.checkpoints.families._unet import LABELS, LEVELS, UNetFamily, is_open_clip
from sfumato.checkpoints.families.sd2 import CLIP_H
from sfumato.checkpoints.schedulers import betas as schedules


class X4Upscaler(UNetFamily):
    """The x4 upscaler."""

    name, title = "x4-upscaler", "the x4 upscaler"
    marks, foreign_marks = (LEVELS,), (LABELS,)
    towers = (CLIP_H,)
    heads = 8
    betas = (0.0001, 0.02)
    scaling_factor = 0.08333
    sample_size = 128
    predicts = "v_prediction"
    more_schedulers: ClassVar = {  # adds noise to the small image
        "low_res_scheduler": {
            "_class_name": "DDPMScheduler",
            **schedules.fields(0.0001, 0.02),
            "prediction_type": "epsilon",
            "clip_sample": True,
        }
    }
    pipelines: ClassVar = {"StableDiffusionUpscalePipeline": {"steps": 75, "guidance": 9.0}}

    def fits(self, unet: Config, components: Components) -> bool:
        """True for OpenCLIP and a table of noise levels."""
        return is_open_clip(components) and unet.get("num_class_embeds") is not None

    def suffixes(self, channels: int) -> dict[int, str]:
        """One kind: the small image has three channels."""
        return {channels + 3: ""}


FAMILIES = (X4Upscaler(),)
