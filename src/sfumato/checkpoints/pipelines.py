"""model_index.json: which of diffusers' pipelines opens a folder, and what a run of it begins with
there.

Both are the family's to say. "LatentDiffusion" is the class of models that only sfumato opens.
"""

from collections.abc import Mapping
from typing import Any

from sfumato.checkpoints import families
from sfumato.checkpoints.families import Family
from sfumato.checkpoints.schedulers.spacing import format_spacing
from sfumato.spec import Spec

OWN = "LatentDiffusion"


def pipeline_of(network: Any, conditioner: Any, references: int = 0) -> tuple[Family | None, str]:
    """The family and diffusers' pipeline of a model with these parts; None and `OWN` where
    diffusers has none.

    references: how many images the model reads.
    """
    for family in families.registered():
        name = family.pipeline(network, conditioner, references)
        if name is not None:
            return family, name
    return None, OWN


def pipeline_class(network: Any, conditioner: Any, references: int = 0) -> str:
    """The name of the pipeline."""
    return pipeline_of(network, conditioner, references)[1]


def autoencoder_folder(pipeline: str) -> str:
    """The autoencoder's folder in a pipeline's model."""
    family = families.by_pipeline(pipeline)
    return "vae" if family is None else family.autoencoder_folder


def pipeline_index(network: Any, conditioner: Any, defaults: Any) -> dict[str, Any]:
    """The entries of model_index.json that depend on the kind of model. defaults: the model's."""
    family, name = pipeline_of(network, conditioner, defaults.max_reference_images)
    if family is not None:
        return {"_class_name": name, **family.index(name, conditioner, defaults.guidance)}
    return {"_class_name": name, **conditioner.index()}


def pipeline_defaults(
    index: Mapping[str, Any], network: Any, scheduler: Mapping[str, Any]
) -> dict[str, Any]:
    """Steps and guidance with which diffusers runs a folder's pipeline."""
    family = families.by_pipeline(str(index.get("_class_name")))
    own = {} if family is None else family.defaults(index, network.guidance_embeds, scheduler)
    return {"steps": 50, "guidance": 1.0 if network.part == "transformer" else 7.5} | own


def pipeline_spacing(spacing: str, family: Family | None) -> str:
    """A scheduler's spacing as a family's pipeline runs it."""
    spec, rule = Spec.parse(spacing), None if family is None else family.shift_rule
    if rule is None or spec.name != "dynamic":
        return spacing
    return format_spacing(spec.name, **spec.options, rule=rule)
