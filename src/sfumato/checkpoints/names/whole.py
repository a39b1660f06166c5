"""What a model's folder has beside its networks and a single file does not hold: the scheduler's
config, and the list of parts.

Numbers are those of diffusers' published folders: SD3 (Esser et al. 2024, arXiv:2403.03206, 5.3.2:
shift 3), FLUX.1 dev (a shift that follows the number of tokens) and schnell (none).
"""

from collections.abc import Mapping
from typing import Any, Protocol

from sfumato.checkpoints.names.pipeline_transformer import flux_class, transformer_entries


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
_SD3, _FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"


def extras(parts: Mapping[str, Configured], references: int = 0) -> dict[str, dict[str, Any]]:
    """Paths in a model's folder, and their JSON. Nothing for a model whose files were never whole.

    Tokenizers are not told by any file: the list of parts names none. Nor is it told whether FLUX.1
    reads pictures: `references`, how many.
    """
    config = parts["transformer"].config if "transformer" in parts else {}
    name = config.get("_class_name")
    if name not in (_SD3, _FLUX):
        return {}
    flux = name == _FLUX
    shifts = (
        DYNAMIC
        if flux and config.get("guidance_embeds")
        else {"shift": 1.0}
        if flux
        else {"shift": 3.0}
    )
    pipeline = _flux_pipeline(config, references) if flux else "StableDiffusion3Pipeline"
    index: dict[str, Any] = {
        "_class_name": pipeline,
        "scheduler": ["diffusers", FLOW["_class_name"]],
        **transformer_entries(pipeline, None),
    }
    for part, found in parts.items():
        kind = found.config.get("_class_name")
        index[part] = (
            ["diffusers", kind] if kind else ["transformers", found.config["architectures"][0]]
        )
    # diffusers wants to be told that T5 is left out
    if not flux and "text_encoder" in index and "text_encoder_3" not in index:
        index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    return {"model_index.json": index, "scheduler/scheduler_config.json": FLOW | shifts}


def _flux_pipeline(config: Mapping[str, Any], references: int) -> str:
    """By the config of the network, whose channels are those of tokens: four of a latent's each."""
    channels = config.get("in_channels", 64)
    return (
        flux_class((channels - (config.get("out_channels") or channels)) // 4, references)
        or "FluxPipeline"
    )
