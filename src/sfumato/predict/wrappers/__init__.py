"""Wrappers around the denoiser of a run, one file each, found by name.

    name(denoise, ...settings) -> DenoiseFn
    identity_settings(x, point) -> dict     settings with which no bit changes, for latents like x

Wrappers stack, around guidance and around each other. A wrapper is built for one run, as guidance
is (`guide`): memory from step to step belongs to the function that it returns. It passes each list
of denoiser calls on as one list, so that runs and windows share forward passes. Order, from the
inside: guide, multidiffusion, feature_cache, known_region. `point` is the schedule's t -> (alpha,
sigma).
"""
