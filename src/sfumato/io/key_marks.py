"""Marks in the keys of files: wrappers of training, which are left out, and quantisations.

    _orig_mod.  module.  _fsdp_wrapped_module.  _checkpoint_wrapped_module.
        torch.compile, DistributedDataParallel, FSDP, activation checkpointing

Quantised weights lie in several tensors, by whose names each method is recognised. Those that
sfumato does not read are refused by their name, before a config is compared with the keys.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from sfumato.errors import UserError

T = TypeVar("T")

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that wrappers of modules put into keys.

No network here has a layer of such a name.
"""
_WRAPPED = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(WRAPPERS)})\.")
_METHODS = {
    "bitsandbytes in 4 bits": r"\.weight\.(absmax|quant_map|quant_state\..+|nested_absmax)",
    "bitsandbytes in 8 bits": r"\.(SCB|weight_format)",
    "SVDQuant (nunchaku)": r"\.(wscales|wtscale|wcscales|smooth_factor(_orig)?|smooth_orig)",
    "GPTQ": r"\.g_idx",
    "AWQ or GPTQ": r"\.(qweight|qzeros)",
    "optimum-quanto": r"\.weight\._(data|scale|shift)",
    "torchao": r"\._?weight[_.](qdata|tensor_impl.*|int_data|packed_weight)",
    "HQQ": r"\.W_q",
    "NVFP4": r"\.weight_scale_2",
    "AQLM": r"\.codebooks",
}
"""Names of methods, the more special first, and the ends of keys that only they write."""
_MARKS = {name: re.compile(rf".*{end}") for name, end in _METHODS.items()}
_REMEDY = (
    "use the model's weights in bf16, fp16 or fp8, or a GGUF file of its network (--transformer)"
)


def unwrapped(tensors: Mapping[str, T], where: object) -> dict[str, T]:
    """Return the same tensors without the names of wrappers in their keys.

    Args:
        tensors: by their keys.
        where: the file or folder, for the message.

    Raises:
        UserError: a weight with a wrapper and without, or with two.
    """
    olds: dict[str, str] = {}
    for key in tensors:
        first = olds.setdefault(_WRAPPED.sub("", key), key)
        if first != key:
            raise UserError(
                f"{where} holds both {first} and {key}, the same weight with other wrappers: "
                "expected one of them; save the network without its wrapper"
            )
    return {new: tensors[key] for new, key in olds.items()}


def require_unquantized(keys: Iterable[str], where: object) -> None:
    """Raise `UserError` for quantised weights that are not read, with the method's name.

    Args:
        keys: of a file's tensors.
        where: the file or folder, for the message.
    """
    keys = list(keys)
    for method, mark in _MARKS.items():
        key = next((key for key in keys if mark.fullmatch(key)), None)
        if key is not None:
            raise UserError(
                f"{where} is quantised by {method} (it has {key}), which is not read: {_REMEDY}"
            )


def require_unquantized_config(config: Mapping[str, Any], where: object) -> None:
    """Raise `UserError` for the config of quantised weights.

    Args:
        config: of a network, an autoencoder or a text encoder.
        where: its file, for the message.
    """
    settings = config.get("quantization_config")
    if not settings:
        return
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    raise UserError(
        f"{where}: quantization_config says that its weights are quantised by "
        f"{method or 'a method without a name'}, which is not read: {_REMEDY}"
    )
