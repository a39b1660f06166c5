"""Old key names of autoencoders, and of U-Nets without tokens -> today's. Attention's layers were
called query, key, value and proj_attn until diffusers 0.17 (2023).
"""

import re

from torch import Tensor

from sfumato.errors import UserError

_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LAYER = re.compile(rf"(.*\battentions\.\d+)\.({'|'.join(_OLD)})\.(weight|bias)")


def modern(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under today's names; those that have them already are left alone.
    `UserError` for a weight under both.
    """
    renamed = {_modern(key): tensor for key, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        both = next(key for key in tensors if _modern(key) != key and _modern(key) in tensors)
        raise UserError(
            f"weights hold both {both} and {_modern(both)}, its new name: expected one of them; use a file of one layout"
        )
    return renamed


def _modern(key: str) -> str:
    found = _LAYER.fullmatch(key)
    return f"{found[1]}.{_OLD[found[2]]}.{found[3]}" if found else key
