"""Guidance is weight x rule x baseline.

The weight is how far predictions move away from a baseline, the rule how they combine.

    weights/     w(t), or w of the predictions: one file each, found by name
    rules/       prediction = f(conditional, baselines, w): one file each, found by name
    guide.py     calls the denoiser, and the baselines where w is not 1
    algebra.py   a few lines that rules and weights share
    settings.py  `Guidance`: all of it as a number, a line of text or a JSON object

A baseline is the prediction to move away from: without the condition, or of a weaker network. It
needs networks, so it is in predict/guidance_models/.
"""
