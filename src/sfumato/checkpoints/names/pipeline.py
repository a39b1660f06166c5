"""model_index.json: which of diffusers' pipelines opens a folder, and what a run of it begins with
there.

The pipeline follows from the U-Net's inputs: nothing but the latent, a mask and a masked picture
(inpainting), a picture (InstructPix2Pix) or a small picture (the x4 upscaler); and from the text
encoders, one, two, or the second alone (SDXL's refiner). Latent Diffusion's own pipelines are told
by BERT, or by a U-Net without tokens; they call the autoencoder "vqvae".
"""

from typing import Any

from sfumato.checkpoints.names.pipeline_transformer import (
    transformer_class,
    transformer_defaults,
    transformer_entries,
)
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.class_labels import ClassLabels

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
_LDM = {"LDMTextToImagePipeline", "LDMPipeline"}
# as diffusers' pipelines are called without a word: steps 50, guidance 7.5
_DEFAULTS: dict[str, dict[str, Any]] = {
    "StableDiffusionXLPipeline": {"guidance": 5.0},
    "StableDiffusionXLImg2ImgPipeline": {"guidance": 5.0},
    "StableDiffusionXLInpaintPipeline": {"guidance": 7.5},
    "StableDiffusionInstructPix2PixPipeline": {"steps": 100},
    "StableDiffusionUpscalePipeline": {"steps": 75, "guidance": 9.0},
    "LDMTextToImagePipeline": {"guidance": 1.0},
    "LDMPipeline": {"guidance": 1.0},
}


def autoencoder_name(pipeline: Any) -> str:
    """What a pipeline (the `_class_name` of model_index.json) calls its autoencoder."""
    return "vqvae" if pipeline in _LDM else "vae"


def autoencoder_unsaid(pipeline: Any) -> dict[str, Any]:
    """Fields that a pipeline's autoencoder has where its config does not say them: the scale of
    latents, 1, of unconditional Latent Diffusion.

    Such folders are of the time before the field; diffusers now takes 0.18215 there, and
    CompVis/ldm-celebahq-256 then draws noise
    (https://github.com/huggingface/diffusers/issues/6725).
    """
    return {"scaling_factor": 1.0} if pipeline == "LDMPipeline" else {}


def pipeline_class(network: Any, conditioner: Conditioner, references: int = 0) -> str:
    """The name of diffusers' pipeline for these parts; "LatentDiffusion", which only sfumato opens,
    where it has none.
    """
    if network.part == "transformer":
        return transformer_class(network, conditioner, references) or "LatentDiffusion"
    encoders, kind = conditioner.encoders, conditioner.name
    if kind == "bert_text":
        return "LDMTextToImagePipeline"
    if not conditioner.is_conditional and network.to_config()["_class_name"] == "UNet2DModel":
        return "LDMPipeline"
    if kind != "clip_text":  # diffusers has no U-Net that reads any other text encoder
        return "LatentDiffusion"
    if "" not in encoders:  # the refiner
        return "StableDiffusionXLImg2ImgPipeline"
    config = network.config
    return _FAMILIES.get(
        (config.in_channels - config.out_channels, "_2" in encoders), "LatentDiffusion"
    )


def pipeline_index(network: Any, conditioner: Conditioner, defaults: Any) -> dict[str, Any]:
    """The entries of model_index.json that depend on the kind of model. defaults: the model's."""
    name = pipeline_class(network, conditioner, defaults.max_reference_images)
    if name == "LDMPipeline":
        return {"_class_name": name}
    if name == "DiTPipeline" and isinstance(conditioner, ClassLabels):
        return {"_class_name": name, "id2label": conditioner.to_id2label()}
    entries = {"_class_name": name, **conditioner.index()}
    if network.part == "transformer":
        return {**entries, **transformer_entries(name, defaults.guidance)}
    if name in _LDM or conditioner.name != "clip_text":
        return entries
    if "XL" in name:
        return {**entries, "feature_extractor": _NOTHING, "image_encoder": _NOTHING}
    empty = {
        "safety_checker": _NOTHING,
        "feature_extractor": _NOTHING,
        "image_encoder": _NOTHING,
        "requires_safety_checker": False,
    }
    if name == "StableDiffusionUpscalePipeline":
        del empty["image_encoder"], empty["requires_safety_checker"]
        empty["watermarker"] = _NOTHING
    return {**entries, **empty}


def pipeline_defaults(index: dict[str, Any], network: Any) -> dict[str, Any]:
    """Steps and guidance with which diffusers runs a folder's pipeline."""
    if network.part == "transformer":
        return {"steps": 50, "guidance": 1.0} | transformer_defaults(
            index, getattr(network, "guidance_embeds", True)
        )
    return {"steps": 50, "guidance": 7.5} | _DEFAULTS.get(str(index.get("_class_name")), {})
