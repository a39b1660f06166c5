"""scheduler_config.json: a scheduler of diffusers built from it and our sampler, spacing and process read from it end at the same latents.

The network is exact for Gaussian latents, and told a timestep by both. Their code runs in float64 (`Doubled`, as in test_samplers.py), so that
what agrees does so to 1e-9, and each greater tolerance is a difference with a reason (`DIFFERENT`, from the table of test_samplers.py).
"""

import inspect
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import diffusers as _diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.checkpoints.names.scheduler import (
    DynamicShift,
    Recipe,
    from_scheduler_config,
    gives_even_times,
    read_scheduler,
    to_scheduler_config,
    write_scheduler,
)
from sfumato.checkpoints.names.scheduler_fields import CLASSES, FLOW_CLASSES
from sfumato.checkpoints.names.scheduler_published import PUBLISHED
from sfumato.diffuse.parameterization import edm, parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.rescale import Shifted, ZeroTerminalSNR, dynamic_shift
from sfumato.diffuse.sample import sample
from sfumato.diffuse.samplers import calls
from sfumato.diffuse.schedule import BetaTable, Schedule, schedule, table
from sfumato.diffuse.timesteps import timesteps
from sfumato.errors import UserError
from sfumato.sampling import Defaults, sampler_of, spacing_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

diffusers: Any = _diffusers
SHAPE, DOUBLE = (1, 2, 4, 4), torch.float64
MEAN, SPREAD = 0.3, 0.6  # of the latents: a Gaussian
SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCALED = ("Euler", "Heun", "LMS", "KDPM2", "DPMSolverSDE")  # whose latents are x/alpha


def draws(seed: int = 5) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(SHAPE, generator=generator, dtype=DOUBLE)


class Doubled:
    """torch or numpy with float64 in the place of float32."""

    def __init__(self, module: Any) -> None:
        self.module, self.float32 = module, module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Their classes by name, in float64 and with our noise."""

    def theirs(name: str) -> Any:
        found = their_class(name)
        module, noise = sys.modules[found.__module__], draws()
        for part, value in (("torch", Doubled(torch)), ("np", Doubled(np)), ("randn_tensor", lambda *_, **__: next(noise))):
            if hasattr(module, part):
                monkeypatch.setattr(module, part, value)
        if hasattr(module, "BrownianTreeNoiseSampler"):  # independent draws in the place of one path's
            monkeypatch.setattr(module, "BrownianTreeNoiseSampler", lambda *_, **__: lambda *_: next(noise))
        return found

    before = torch.get_default_dtype()
    torch.set_default_dtype(DOUBLE)
    yield theirs
    torch.set_default_dtype(before)


def their_class(name: str) -> Any:
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    sys.modules.setdefault("torchsde", type(sys)("torchsde"))  # which makes its Brownian path, and is not installed
    from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler

    return DPMSolverSDEScheduler


def network(process: Process) -> Callable[[Tensor, float], Tensor]:
    """The exact network of Gaussian latents: what a process's target is on average, given the input and the timestep."""

    def answer(shown: Tensor, timestep: float) -> Tensor:
        t = process.schedule.time(torch.tensor(timestep, dtype=DOUBLE)).clamp(max=1)
        alpha, sigma = process.schedule.at(t)
        scale = process.parameterization.input_scale
        x = shown if scale is None else shown / scale(alpha, sigma)
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        x0 = MEAN + gain * (x - alpha * MEAN)
        a, b = process.parameterization.row(alpha, sigma)
        return a * x0 + b * (x - alpha * x0) / sigma

    return answer


def times_of(recipe: Recipe, steps: int, tokens: int | None = None) -> list[float]:
    name, options = spacing_of(recipe.spacing if tokens is None else recipe.spacing_for(tokens))
    return timesteps(name, steps, recipe.process.schedule, **options)


def our_run(recipe: Recipe, times: list[float], start: Tensor) -> Tensor:
    sampler, options = sampler_of(recipe.sampler)
    noise, y, process = draws(), network(recipe.process), recipe.process

    def denoise(x: Tensor, t: float) -> Any:
        timestep = float(process.schedule.timestep(torch.tensor(t, dtype=DOUBLE)))
        return process.split(x, y(process.network_input(x, t), timestep), t)

    run = sampler(start, times, process.schedule, lambda: next(noise), **options)
    found = sample(run, denoise, calls(sampler, times, process.schedule, **options))
    assert found is not None
    return found


def their_run(scheduler: Any, process: Process, start: Tensor) -> Tensor:
    x, y = start, network(process)
    scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
    for timestep in scheduler.timesteps:
        x = scheduler.step(y(scale(x, timestep), float(timestep)), timestep, x).prev_sample
    return x


def apart(made: Any, values: dict[str, Any], steps: int, spaced: dict[str, Any] | None = None, recipe: Recipe | None = None) -> float:
    """How far the two ends are from each other, relative to their size; both begin at the same x."""
    recipe = recipe or read_scheduler(values)
    scheduler = made.from_config(values)
    scheduler.set_timesteps(**(spaced or {"num_inference_steps": steps}))
    times = times_of(recipe, steps)
    first, last, start = recipe.process.schedule.point(times[0]), recipe.process.schedule.point(times[-1]), next(draws(9))
    start = start * math.hypot(*first)
    scaled = made.__name__.startswith(SCALED)
    theirs = their_run(scheduler, recipe.process, start / first[0] if scaled else start) * (last[0] if scaled else 1)
    ours = our_run(recipe, times, start)
    return float((ours - theirs).norm() / theirs.norm())
