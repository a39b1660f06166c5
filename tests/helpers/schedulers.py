"""diffusers' schedulers and sfumato's samplers over the same network, times and noise.

diffusers' tables, levels and casts are float32. So that the algebra is compared and not its
rounding, a scheduler's module is lent float64 under the name of float32: its own code, unchanged,
then agrees with sfumato's to 1e-9.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.tensors import noise_stream
from sfumato.diffuse.process import Process
from sfumato.diffuse.run import run_sampler
from sfumato.diffuse.samplers import calls

SHAPE = (1, 2, 4, 4)
DOUBLE = torch.float64


def noise_draws(seed: int = 5) -> Iterator[Tensor]:
    """Draw the noise of both libraries: float64 tensors of `SHAPE`, from a seed."""
    return noise_stream(*SHAPE, seed=seed, dtype=DOUBLE)


class Float64:
    """torch or numpy with float64 in the place of float32."""

    def __init__(self, module: Any) -> None:
        self.module, self.float32 = module, module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def scheduler_class(name: str) -> Any:
    """Return diffusers' scheduler of this name; DPMSolverSDE also without torchsde."""
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    sys.modules.setdefault("torchsde", type(sys)("torchsde"))  # only its Brownian path needs it
    from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler

    return DPMSolverSDEScheduler


@contextmanager
def float64_schedulers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Yield `scheduler_class`, patched to float64 and to the noise of `noise_draws()`."""

    def patched(name: str) -> Any:
        scheduler = scheduler_class(name)
        module, noise = sys.modules[scheduler.__module__], noise_draws()
        substitutes = {
            "torch": Float64(torch),
            "np": Float64(np),
            "randn_tensor": lambda *_, **__: next(noise),
        }
        # Independent draws in the place of one Brownian path's.
        substitutes["BrownianTreeNoiseSampler"] = lambda *_, **__: lambda *_: next(noise)
        for attribute, value in substitutes.items():
            if hasattr(module, attribute):
                monkeypatch.setattr(module, attribute, value)
        return scheduler

    before = torch.get_default_dtype()
    # where diffusers writes torch.tensor(1.0) or torch.linspace(...)
    torch.set_default_dtype(DOUBLE)
    try:
        yield patched
    finally:
        torch.set_default_dtype(before)


Network = Callable[[Tensor, float], Tensor]
"""A network's output for its input and a timestep."""


def timesteps_of(scheduler: Any) -> Tensor:
    """Return the timesteps of a run, `timesteps_left` where it is begun later."""
    return vars(scheduler).get("timesteps_left", scheduler.timesteps)


def step_scheduler(scheduler: Any, network: Network, start: Tensor, **options: Any) -> list[Tensor]:
    """Run a scheduler of diffusers over its timesteps.

    Args:
        scheduler: one whose timesteps are set.
        network: function of the scaled latents and a timestep.
        start: noisy latents, in the scheduler's coordinates.
        options: keyword arguments of every `step`.

    Returns:
        The network's inputs and, last, the final latents.
    """
    x, inputs = start, []
    scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
    for timestep in timesteps_of(scheduler):
        inputs.append(scale(x, timestep))
        x = scheduler.step(network(inputs[-1], float(timestep)), timestep, x, **options).prev_sample
    return [*inputs, x]


def step_sampler(
    sampler: Any,
    process: Process,
    times: Sequence[float],
    network: Network,
    start: Tensor,
    timesteps: Sequence[float] | None = None,
    **options: Any,
) -> tuple[list[Tensor], list[float]]:
    """Run a sampler of sfumato over a process with the noise of `noise_draws()`.

    Args:
        sampler: a sampler function.
        process: schedule and parameterization.
        times: falling times in [0, 1].
        network: function of the process's network input and a timestep.
        start: noisy latents at the first time.
        timesteps: timesteps for the network, one a call; those of the times by default.
        options: keyword arguments of the sampler.

    Returns:
        The network's inputs and, last, the final latents; and the timesteps of its calls.
    """
    noise, inputs, called = noise_draws(), [], []

    def denoise(x: Tensor, t: float) -> Any:
        own = timesteps is None
        called.append(
            float(process.schedule.timestep(torch.tensor(t, dtype=DOUBLE)))
            if own
            else timesteps[len(called)]
        )
        inputs.append(process.network_input(x, t))
        return process.split(x, network(inputs[-1], called[-1]), t)

    run = sampler(start, times, process.schedule, lambda: next(noise), **options)
    result = run_sampler(run, denoise, calls(sampler, times, process.schedule, **options))
    assert result is not None
    return [*inputs, result], called
