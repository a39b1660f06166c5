"""SiT on disk (Ma et al. 2024, arXiv:2401.08740): DiT's layout, trained as a flow.

Keys and shapes are DiT's: a file's metadata, or the caller, must name the class.
"""

from typing import ClassVar

from sfumato.checkpoints.families.dit import Dit


class Sit(Dit):
    """SiT: networks alone."""

    name, title = "sit", "SiT"
    class_name = "SfumatoSiT"
    conditioner_class = None
    pipelines: ClassVar = {}


FAMILIES = (Sit(),)
