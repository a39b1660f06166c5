"""Guidance weights, one file each, found by name. 1 is off: there the references are not asked.

A weight is a frozen dataclass of settings with two methods:

    active(moment) -> bool                  whether the references are needed at this time at all
    begin() -> (moment, conditional, reference) -> float | Tensor (B, 1, 1, 1)

`begin` is called once a run: what a weight remembers from step to step belongs to the function that it returns.
"""
