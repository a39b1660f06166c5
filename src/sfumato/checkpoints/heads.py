"""The heads of attention in the metadata of single files that sfumato wrote, where a family's files
differ and keys do not tell.

sfumato.heads   {"num_heads": 8} or {"num_head_channels": 32}, in the words of Latent Diffusion's
                YAML
"""

import json
from collections.abc import Mapping
from typing import Any

from sfumato.checkpoints.names.ldm_unet import is_plain
from sfumato.errors import UserError

HEADS = "sfumato.heads"


def heads_note(config: Mapping[str, Any]) -> dict[str, str]:
    """The metadata for a U-Net of this config (diffusers' fields); none where one number does not
    say it.
    """
    heads = config.get("attention_head_dim", 8)
    if is_plain(config):
        many = config.get("num_attention_heads") or (1 if heads is None else None)
        found = {"num_heads": many} if many else {"num_head_channels": heads}
    elif isinstance(heads, int):
        found = {"num_heads": heads}
    else:
        each = {width // n for width, n in zip(config["block_out_channels"], heads, strict=True)}
        found = {"num_head_channels": each.pop()} if len(each) == 1 else None
    return {HEADS: json.dumps(found)} if found else {}


def noted_heads(notes: Mapping[str, str], where: object) -> tuple[int | None, int | None]:
    """The number of heads, or their width, that a file's metadata say; `UserError` for what is
    neither.
    """
    try:
        noted = json.loads(notes.get(HEADS, "{}"))
        found = noted.get("num_heads"), noted.get("num_head_channels")
    except (ValueError, AttributeError):
        found = 0, 0
    if not all(n is None or (isinstance(n, int) and n > 0) for n in found):
        raise UserError(
            f"{where}: its note {HEADS}={notes[HEADS]!r} is no number of heads or width of a head: it may be damaged; copy it again"
        )
    return found
