"""Wrappers: what asks, made to ask otherwise. One file each, found by name.

    name(ask, ...settings) -> DenoiseFn      a `DenoiseFn` in, a `DenoiseFn` out: wrappers stack,
                                             around guidance and around each other
    off(x, point) -> dict              the settings with which it changes no bit of runs over
                                       latents like x

A wrapper is built for one run, as guidance is (`guide`): what it remembers from step to step
belongs to the function that it returns. It passes on each list of questions as one list, so that
runs and windows share forward passes. Order, from the inside: guide, large_canvas, feature_cache,
known_region. `point` is t -> (alpha, sigma).
"""
