"""Ways to combine predictions, one file each, found by name.

A combine is a frozen dataclass of settings with

    begin() -> (x, moment, predictions, w) -> Prediction      predictions: the conditional one, then one a reference
    always  whether the references are needed where w is 1 too

`begin` is called once a run: what a combine remembers from step to step belongs to the function that it returns.
"""
