"""model_index.json of models with a transformer: which of diffusers' pipelines opens them, and what
a run of it begins with.

    SD 3, 3.5         StableDiffusion3Pipeline
    FLUX.1            FluxPipeline; by what it takes beside the latent: FluxFillPipeline (a masked
                      picture and a mask), FluxControlPipeline (a map); FluxKontextPipeline where it
                      reads pictures
    FLUX.2            Flux2Pipeline (Mistral), Flux2KleinPipeline (Qwen)
    PixArt            PixArtAlphaPipeline (120 tokens), PixArtSigmaPipeline (300)
    DiT               DiTPipeline, which knows ImageNet's thousand classes: class 1000 is none

Steps and guidance are those with which diffusers calls them; where a model was distilled to few
steps, those of its card.
"""

from collections.abc import Mapping
from typing import Any

from sfumato.checkpoints.schedulers.spacing import format_spacing
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.t5_text import T5Text
from sfumato.spec import Spec

_NOTHING = [None, None]
_FLUX = {0: "FluxPipeline", 16: "FluxControlPipeline", 80: "FluxFillPipeline"}
"""By channels beyond the latent's."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "StableDiffusion3": {"steps": 28, "guidance": 7.0},
    "FluxFill": {"steps": 50, "guidance": 1.0, "learned_guidance": 30.0},
    "FluxKontext": {"steps": 28, "guidance": 1.0, "learned_guidance": 3.5, "references": 1},
    "Flux2Klein": {"steps": 50, "guidance": 4.0, "references": 4},
    "Flux2": {"steps": 50, "guidance": 1.0, "learned_guidance": 4.0, "references": 10},
    "Flux": {"steps": 28, "guidance": 1.0, "learned_guidance": 3.5},
    "PixArt": {"steps": 20, "guidance": 4.5},
    "DiT": {"steps": 50, "guidance": 4.0},
}
"""By the beginning of a pipeline's name; the first that fits."""


def transformer_class(network: Any, conditioner: Conditioner, references: int = 0) -> str | None:
    """The pipeline for these parts; None where diffusers has none. references: how many pictures
    the model reads.
    """
    kind, reader = network.to_config()["_class_name"], conditioner.name
    if (kind, reader) == ("SD3Transformer2DModel", "sd3_text"):
        return "StableDiffusion3Pipeline"
    if (kind, reader) == ("FluxTransformer2DModel", "flux_text"):
        return flux_class(network.in_channels - network.channels, references)
    if (kind, reader) == ("Flux2Transformer2DModel", "flux2_text"):
        return (
            "Flux2Pipeline"
            if "Mistral" in conditioner.index()["text_encoder"][1]
            else "Flux2KleinPipeline"
        )
    if kind == "PixArtTransformer2DModel" and isinstance(conditioner, T5Text):
        return (
            "PixArtAlphaPipeline"
            if conditioner.config.max_sequence_length <= 120
            else "PixArtSigmaPipeline"
        )
    if (kind, reader) == ("DiTTransformer2DModel", "class_labels") and network.classes == 1001:
        return "DiTPipeline"
    return None


def flux_class(beyond: int, references: int = 0) -> str | None:
    """FLUX.1's pipeline for a network that takes so many channels beyond the latent's; None where
    diffusers has none.
    """
    name = _FLUX.get(beyond)
    return "FluxKontextPipeline" if name == "FluxPipeline" and references else name


def transformer_entries(name: str, guidance: Any) -> dict[str, Any]:
    """What a pipeline has in model_index.json beside its parts. guidance: the model's own, 1 is
    off.
    """
    if name == "Flux2KleinPipeline":
        return {"is_distilled": guidance == 1}
    if name in ("StableDiffusion3Pipeline", "FluxPipeline", "FluxKontextPipeline"):
        return {"image_encoder": _NOTHING, "feature_extractor": _NOTHING}
    return {}


def transformer_spacing(pipeline: str, spacing: str) -> str:
    """A scheduler's spacing as a pipeline (the `_class_name` of model_index.json) runs it: FLUX.2's
    gives a shift by the size its own rule.
    """
    spec = Spec.parse(spacing)
    return (
        format_spacing(spec.name, **spec.options, rule="flux2")
        if pipeline.startswith("Flux2") and spec.name == "dynamic"
        else spacing
    )


def transformer_defaults(index: Mapping[str, Any], learned_guidance: bool = True) -> dict[str, Any]:
    """Steps, guidance and how many pictures are read, of a folder's pipeline; empty for other
    pipelines. learned_guidance: its network's.
    """
    name = str(index.get("_class_name"))
    found = next((values for start, values in _DEFAULTS.items() if name.startswith(start)), {})
    if name.startswith("Flux2Klein") and index.get("is_distilled"):
        return {**found, "steps": 4, "guidance": 1.0}
    if name == "FluxPipeline" and not learned_guidance:  # FLUX.1 schnell
        return {**found, "steps": 4}
    return found
