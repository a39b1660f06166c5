"""Tasks: plans made of images, one file each.

    task(model, image(s) ..., request, its own settings) -> Plan

A task sets where a run begins, what it keeps and what else the network reads. `model.run(plan)`, or
`model.run_many` with others, draws the images. Everything else (prompt, steps, sampler, guidance,
seed ...) is the request's. `vary` and `interpolate` need no model and give a `Request`.
"""

from sfumato.tasks.control import control
from sfumato.tasks.edit import edit
from sfumato.tasks.enlarge import enlarge, two_pass
from sfumato.tasks.image_to_image import image_to_image
from sfumato.tasks.inpaint import inpaint
from sfumato.tasks.interpolate import interpolate, interpolate_images
from sfumato.tasks.outpaint import outpaint
from sfumato.tasks.refine import Handover, handover, refine
from sfumato.tasks.upscale import upscale
from sfumato.tasks.variations import variations, vary

__all__ = [
    "Handover",
    "control",
    "edit",
    "enlarge",
    "handover",
    "image_to_image",
    "inpaint",
    "interpolate",
    "interpolate_images",
    "outpaint",
    "refine",
    "two_pass",
    "upscale",
    "variations",
    "vary",
]
