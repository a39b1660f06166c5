"""model_index.json: diffusers' pipeline for a folder, and the settings of a run of it.

Both are properties of the family. "LatentDiffusion" is the class of models that only sfumato opens.
"""

from collections.abc import Mapping
from typing import Any

from sfumato.checkpoints import families
from sfumato.checkpoints.families import Family
from sfumato.checkpoints.schedulers.spacing import format_spacing
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.networks.base import Network
from sfumato.spec import Spec

OWN = "LatentDiffusion"


def pipeline_of(
    network: Network, conditioner: Conditioner, references: int = 0
) -> tuple[Family | None, str]:
    """The family and diffusers' pipeline of a model with these parts.

    They are None and `OWN` for a model that diffusers has no pipeline for.

    Args:
        network: The model's.
        conditioner: The model's.
        references: The number of reference images that the model takes.
    """
    for family in families.registered():
        name = family.pipeline(network, conditioner, references)
        if name is not None:
            return family, name
    return None, OWN


def pipeline_class(network: Network, conditioner: Conditioner, references: int = 0) -> str:
    """The name of the pipeline; arguments as in `pipeline_of`."""
    return pipeline_of(network, conditioner, references)[1]


def autoencoder_folder(pipeline: str) -> str:
    """The autoencoder's folder in a pipeline's model."""
    family = families.by_pipeline(pipeline)
    return "vae" if family is None else family.autoencoder_folder


def pipeline_index(network: Network, conditioner: Conditioner, defaults: Any) -> dict[str, Any]:
    """The entries of model_index.json that depend on the kind of model.

    Args:
        network: The model's.
        conditioner: The model's.
        defaults: The model's `sampling.Defaults`.
    """
    family, name = pipeline_of(network, conditioner, defaults.max_reference_images)
    if family is None:
        return {"_class_name": name, **conditioner.index()}
    return {"_class_name": name, **family.index(name, conditioner, defaults.guidance)}


def pipeline_defaults(
    index: Mapping[str, Any], network: Network, scheduler: Mapping[str, Any]
) -> dict[str, Any]:
    """Steps and guidance with which diffusers runs a folder's pipeline.

    Args:
        index: model_index.json.
        network: The model's.
        scheduler: scheduler_config.json.
    """
    family = families.by_index(index)
    own = {} if family is None else family.defaults(index, network.guidance_embeds, scheduler)
    return {"steps": 50, "guidance": 1.0 if network.part == "transformer" else 7.5} | own


def pipeline_spacing(spacing: str, family: Family | None) -> str:
    """A scheduler's spacing as a family's pipeline runs it."""
    spec, rule = Spec.parse(spacing), None if family is None else family.shift_rule
    if rule is None or spec.name != "dynamic":
        return spacing
    return format_spacing(spec.name, **spec.options, rule=rule)
