"""A whole SD 3 or FLUX.1 model as one file in the layout of its first publication, and what its
notes tell that the layout cannot.

Other programs read networks, autoencoder and text encoders, and take the rest as published. What
sfumato reads besides stands in the notes: every part's config, the tokenizers, how prompts are
read. A model that others would take for another one has no such file, and `write_model` answers
None.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.folder import storable
from sfumato.checkpoints.lazily import Table, present
from sfumato.checkpoints.tokenizer import CONDITIONER
from sfumato.checkpoints.transformer_files import NOTE
from sfumato.checkpoints.whole_files import LazyPart, read_whole, write_whole
from sfumato.checkpoints.whole_texts import TOKENIZERS, pack_tokenizers
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.errors import UserError, explained
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.flux_text import FluxText
from sfumato.predict.conditioners.sd3_text import Sd3Text

CONFIGS = "sfumato.configs"
"""Metadata of files that sfumato wrote: {part: config.json}, of parts whose config the file would
tell with other fields of no consequence."""
KINDS: dict[str, type] = {"SD3Transformer2DModel": Sd3Text, "FluxTransformer2DModel": FluxText}
"""What reads prompts for the networks that were published as whole files."""
_FREE = {"sample_size"}
"""Fields of a network that others may read otherwise: the size that is drawn if nobody says
another."""
_CLIP = ("architectures", "hidden_act", "layer_norm_eps", "num_attention_heads")
_T5 = (
    "feed_forward_proj",
    "layer_norm_epsilon",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)
"""Fields of text encoders that change states; sizes are held against the tensors."""


def has_whole(network: Any, conditioner: Conditioner, process: Any) -> bool:
    """Whether models of such parts were published as whole files."""
    kind = KINDS.get(network.to_config()["_class_name"])
    return (
        kind is not None
        and isinstance(conditioner, kind)
        and process.parameterization.name == "flow"
    )


def read_configs(notes: Mapping[str, str], where: object) -> dict[str, Any]:
    """The configs that a file notes, by part; `UserError` for a note that is none."""
    with explained(str(where)):
        found = json.loads(notes.get(CONFIGS, "{}"))
        if not isinstance(found, dict) or not all(
            isinstance(config, dict) for config in found.values()
        ):
            raise UserError(
                f"its note {CONFIGS} is no table of configs: it may be damaged; copy it again"
            )
        return found


def write_model(
    network: Any, autoencoder: Any, conditioner: Conditioner, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors under their original names, and notes; None where a reader without the notes would
    find another model.

    `NumericalError` for weights that are not finite in `dtype`.
    """
    if not isinstance(autoencoder, AutoencoderKL):
        return None
    given: dict[str, tuple[dict[str, Any], Mapping[str, Tensor]]] = {
        "transformer": (network.to_config(), network.state_dict()),
        "vae": (autoencoder.to_config(), autoencoder.state_dict()),
        **{
            f"text_encoder{end}": (_plain(e.to_config()), e.tensors())
            for end, e in conditioner.encoders.items()
        },
    }
    parts = {
        name: LazyPart(config, present(storable(dict(tensors), dtype)))
        for name, (config, tensors) in given.items()
    }
    try:
        table, notes = write_whole(parts, "the model")
        again = read_whole(table, notes, "the single file")
    except UserError:  # of no published kind
        return None
    noted = json.loads(notes.get(NOTE, "{}")).keys()
    if noted - _FREE or not all(
        _alike(name, parts[name].config, again[name].config)
        for name in parts
        if name != "transformer"
    ):
        return None
    ours = {
        CONFIGS: json.dumps({name: part.config for name, part in parts.items()}, sort_keys=True),
        TOKENIZERS: pack_tokenizers(conditioner),
        CONDITIONER: json.dumps(conditioner.to_config()),
    }
    return _made(table), notes | ours


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of transformers without what depends on how it was opened."""
    return {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}


def _made(table: Table) -> dict[str, Tensor]:
    return {key: lazy.make() for key, lazy in table.items()}


def _alike(part: str, given: dict[str, Any], told: dict[str, Any]) -> bool:
    """Whether a config means what a file tells."""
    if part == "vae":
        try:
            return _latents(given) == _latents(told)
        except UserError:  # what a reader takes for granted (groups of 32) does not even fit
            return False
    fields = _T5 if given.get("model_type") == "t5" else _CLIP
    return all(given.get(field) == told.get(field) for field in fields)


def _latents(config: dict[str, Any]) -> Any:
    """All that an autoencoder's config decides."""
    c = KLConfig.from_dict(config)
    return (
        c.encoder_levels,
        c.decoder_levels,
        c.space,
        c.in_channels,
        c.out_channels,
        c.use_quant_conv,
        c.use_post_quant_conv,
    )
