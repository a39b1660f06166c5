"""model_index.json: which of diffusers' pipelines opens a folder, and what a run of it begins with there.

The pipeline follows from the U-Net's inputs: nothing but the latent, a mask and a masked picture (inpainting), a picture (InstructPix2Pix) or
a small picture (the x4 upscaler); and from the text encoders, one, two, or the second alone (SDXL's refiner).
"""

from typing import Any

_FAMILIES = {  # by (channels beyond the latent's, second encoder): the class
    (0, False): "StableDiffusionPipeline",
    (5, False): "StableDiffusionInpaintPipeline",
    (4, False): "StableDiffusionInstructPix2PixPipeline",
    (3, False): "StableDiffusionUpscalePipeline",
    (0, True): "StableDiffusionXLPipeline",
    (5, True): "StableDiffusionXLInpaintPipeline",
    (4, True): "StableDiffusionXLInstructPix2PixPipeline",
}
_NOTHING = [None, None]
_DEFAULTS: dict[str, dict[str, Any]] = {  # as diffusers' pipelines are called without a word: steps 50, guidance 7.5
    "StableDiffusionXLPipeline": {"guidance": 5.0},
    "StableDiffusionXLImg2ImgPipeline": {"guidance": 5.0},
    "StableDiffusionXLInpaintPipeline": {"guidance": 7.5},
    "StableDiffusionInstructPix2PixPipeline": {"steps": 100},
    "StableDiffusionUpscalePipeline": {"steps": 75, "guidance": 9.0},
}


def pipeline_class(network: Any, conditioner: Any) -> str:
    """The name of diffusers' pipeline for these parts; "LatentDiffusion", which only sfumato opens, where it has none."""
    encoders = getattr(conditioner, "encoders", {})
    if not encoders:
        return "LatentDiffusion"
    if "" not in encoders:  # the refiner
        return "StableDiffusionXLImg2ImgPipeline"
    config = network.config
    return _FAMILIES.get((config.in_channels - config.out_channels, "_2" in encoders), "LatentDiffusion")


def pipeline_index(network: Any, conditioner: Any) -> dict[str, Any]:
    """The entries of model_index.json that depend on the kind of model."""
    name = pipeline_class(network, conditioner)
    if not hasattr(conditioner, "index"):
        return {"_class_name": name, "conditioner": ["sfumato", conditioner.to_config()["_class_name"]]}
    entries = {"_class_name": name, **conditioner.index()}
    if "XL" in name:
        return {**entries, "feature_extractor": _NOTHING, "image_encoder": _NOTHING}
    empty = {"safety_checker": _NOTHING, "feature_extractor": _NOTHING, "image_encoder": _NOTHING, "requires_safety_checker": False}
    if name == "StableDiffusionUpscalePipeline":
        del empty["image_encoder"], empty["requires_safety_checker"]
        empty["watermarker"] = _NOTHING
    return {**entries, **empty}


def pipeline_defaults(index: dict[str, Any]) -> dict[str, Any]:
    """Steps and guidance with which diffusers runs a folder's pipeline."""
    return {"steps": 50, "guidance": 7.5} | _DEFAULTS.get(str(index.get("_class_name")), {})
