"""What a model's folder has beside its networks and a single file does not hold: the scheduler's config, and the list of parts.

Numbers are those of diffusers' published folders: SD3 (Esser et al. 2024, arXiv:2403.03206, 5.3.2: shift 3), FLUX.1 dev (a shift that follows the
number of tokens) and schnell (none).
"""

from collections.abc import Mapping
from typing import Any, Protocol


class Configured(Protocol):
    """Anything with a config."""

    @property
    def config(self) -> dict[str, Any]:
        """In the fields of diffusers or transformers."""
        ...


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
DYNAMIC = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
PIPELINES = {"SD3Transformer2DModel": "StableDiffusion3Pipeline", "FluxTransformer2DModel": "FluxPipeline"}


def extras(parts: Mapping[str, Configured]) -> dict[str, dict[str, Any]]:
    """Paths in a model's folder, and their JSON. Nothing for a model whose files were never whole.

    Tokenizers are not told by any file: the list of parts names none.
    """
    config = parts["transformer"].config if "transformer" in parts else {}
    name = config.get("_class_name")
    if name not in PIPELINES:
        return {}
    flux = name == "FluxTransformer2DModel"
    shifts = DYNAMIC if flux and config.get("guidance_embeds") else {"shift": 1.0} if flux else {"shift": 3.0}
    index: dict[str, Any] = {"_class_name": PIPELINES[name], "scheduler": ["diffusers", FLOW["_class_name"]]}
    for part, found in parts.items():
        kind = found.config.get("_class_name")
        index[part] = ["diffusers", kind] if kind else ["transformers", found.config["architectures"][0]]
    return {"model_index.json": index, "scheduler/scheduler_config.json": FLOW | shifts}
