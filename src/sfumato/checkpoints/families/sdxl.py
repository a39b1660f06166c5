"""SDXL and its refiner on disk (Podell et al. 2023, arXiv:2307.01952)."""

from typing import ClassVar

from sfumato.checkpoints.families._base import Config
from sfumato.checkpoints.families._clip import ClipTower, OpenClipTower
from sfumato.checkpoints.families._unet import LABELS, UNetFamily
from sfumato.checkpoints.shapes import Shapes

_FIRST, _BIG_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.{}.model."


class _Sdxl(UNetFamily):
    """The numbers that SDXL and its refiner share."""

    title = "SDXL"
    head_width = 64
    scaling_factor = 0.13025
    sample_size = 128


class Sdxl(_Sdxl):
    """SDXL, and its inpainting and InstructPix2Pix models."""

    name = "sdxl"
    marks = (_BIG_G.format(1), _FIRST)
    towers = (ClipTower("text_encoder", _FIRST), OpenClipTower("text_encoder_2", _BIG_G.format(1)))
    sizes = 6  # original, crop and target, two each
    pipelines: ClassVar = {
        "StableDiffusionXLPipeline": {"guidance": 5.0},
        "StableDiffusionXLInpaintPipeline": {"guidance": 7.5},
        "StableDiffusionXLInstructPix2PixPipeline": {},
    }

    def detect(self, shapes: Shapes) -> bool:
        """True for two encoders; `UserError` for Playground 2.5, whose latents differ in scale."""
        if any(key.startswith(("edm_mean", "edm_std")) for key in shapes.table):
            raise shapes.error(
                "Playground 2.5 (edm_mean, edm_std) is supported in folders only: use its folder"
            )
        return super().detect(shapes)

    def detect_alone(self, shapes: Shapes) -> bool:
        """True for a U-Net that takes a vector."""
        return shapes.has(LABELS)

    def fits_alone(self, unet: Config) -> bool:
        """True for a U-Net that takes a vector."""
        return bool(unet.get("addition_embed_type"))


class SdxlRefiner(_Sdxl):
    """SDXL's refiner."""

    name = "sdxl-refiner"
    marks, foreign_marks = (_BIG_G.format(0),), (_BIG_G.format(1), _FIRST)
    towers = (OpenClipTower("text_encoder_2", _BIG_G.format(0)),)
    sizes = 5  # original and crop, two each, and the aesthetic score
    pipelines: ClassVar = {"StableDiffusionXLImg2ImgPipeline": {"guidance": 5.0}}


FAMILIES = (Sdxl(), SdxlRefiner())
