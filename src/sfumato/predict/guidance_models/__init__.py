"""Baselines of guidance, one file each, found by name: the network to move away from.

That is the same network without the condition, or a weaker network with it. A baseline is a frozen
dataclass of settings with

    pair(denoiser, conditioning, negative, guide_model) -> (denoiser, conditioning)
    takes_negative      True if its conditioning is `negative`: of no prompt, or a negative prompt

`guide_model` is a denoiser of another model, which only `weaker_model` takes.
"""

ALIASES = {"weaker_model": "model"}
"""Name in a line of guidance and in files, of a file with another name; either is read."""
