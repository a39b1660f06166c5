"""Samplers: generator functions of pure algebra, one file each, found by name.

    def name(x, times, schedule, noise, **options):
        ... prediction = yield x, t ...
        return x

x (B, C, h, w) noisy latent at times[0]; times: floats, strictly descending, ending where the run ends (0 is clean); schedule gives
(alpha, sigma); noise() draws the next standard-normal tensor. A sampler holds no model, no device and no state between runs.
"""
