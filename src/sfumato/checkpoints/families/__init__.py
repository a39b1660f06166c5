"""Families of published models: one file each, all that a model means on disk.

A file has a table FAMILIES of `Family` objects (`_base.py`), by which it is found; no other file
names a family. A new family is one file here, one network in `predict/networks/`, and where it
reads prompts in a new way one conditioner in `predict/conditioners/`.
"""

from sfumato.checkpoints.families._base import AUTOENCODERS, NETWORK, Family
from sfumato.checkpoints.families._other_kinds import kind_of
from sfumato.checkpoints.families._registry import (
    by_components,
    by_index,
    by_name,
    by_network,
    by_parts,
    by_pipeline,
    candidates,
    detect,
    registered,
    write,
)
from sfumato.checkpoints.families._transformer import FLOW, TransformerFamily, untold_latents
from sfumato.checkpoints.families._unet import UNetFamily, read_unet

__all__ = [
    "AUTOENCODERS",
    "FLOW",
    "NETWORK",
    "Family",
    "TransformerFamily",
    "UNetFamily",
    "by_components",
    "by_index",
    "by_name",
    "by_network",
    "by_parts",
    "by_pipeline",
    "candidates",
    "detect",
    "kind_of",
    "read_unet",
    "registered",
    "untold_latents",
    "write",
]
