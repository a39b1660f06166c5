"""A scheduler of diffusers and the sampler read from its config end at the same latents.

Sampler, spacing and process are read from scheduler_config.json. The network is exact for Gaussian
latents and takes a timestep from both. diffusers runs in float64 (`helpers.schedulers`), so that
what agrees does so to 1e-9, and each greater tolerance is a difference with a reason (`DIFFERENT`,
from the list of test_samplers.py).
"""

import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers as _diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.schedulers import (
    DOUBLE,
    float64_schedulers,
    noise_draws,
    scheduler_class,
    step_sampler,
    step_scheduler,
    timesteps_of,
)
from sfumato.checkpoints.families import by_pipeline
from sfumato.checkpoints.schedulers.config import (
    DynamicShift,
    SchedulerSpec,
    from_scheduler_config,
    read_scheduler,
    to_scheduler_config,
    write_scheduler,
)
from sfumato.checkpoints.schedulers.fields import (
    CLASSES,
    FLOW_CLASSES,
    OTHER_CLASSES,
    UNSUPPORTED,
)
from sfumato.checkpoints.schedulers.samplers import canonical_sampler
from sfumato.checkpoints.schedulers.spacing import canonical_spacing
from sfumato.diffuse.parameterization import consistency, edm, parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import (
    BetaTable,
    ConsistencyEDM,
    Schedule,
    Trigonometric,
    cosine,
    schedule,
    table,
)
from sfumato.diffuse.schedule_transforms import Shifted, ZeroTerminalSNR, dynamic_shift
from sfumato.diffuse.timesteps import SPACINGS as SFUMATO_SPACINGS
from sfumato.diffuse.timesteps import timesteps
from sfumato.errors import UserError
from sfumato.sampling import Defaults
from sfumato.sampling.request import sampler_of, spacing_of
from sfumato.tasks._images import last_steps

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

diffusers: Any = _diffusers
MEAN, SPREAD = 0.3, 0.6  # of the latents: a Gaussian
SD = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
SCALED = ("Euler", "Heun", "LMS", "KDPM2", "DPMSolverSDE")  # whose latents are x/alpha


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """diffusers' scheduler classes by name, in float64 and with the noise of `noise_draws()`."""
    with float64_schedulers(monkeypatch) as schedulers:
        yield schedulers


def network(process: Process) -> Callable[[Tensor, float], Tensor]:
    """The exact network of Gaussian latents.

    It returns the mean of the process's target, for the input and the timestep.
    """

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


def times_of(recipe: SchedulerSpec, steps: int, tokens: int | None = None) -> list[float]:
    name, options = spacing_of(recipe.spacing if tokens is None else recipe.spacing_for(tokens))
    return timesteps(name, steps, recipe.process.schedule, **options)


def sfumato_run(
    recipe: SchedulerSpec, times: list[float], start: Tensor, at: list[float] | None = None
) -> Tensor:
    """The final latents of sfumato; `at` replaces the timesteps of the network's calls."""
    sampler, options = sampler_of(recipe.sampler)
    return step_sampler(
        sampler, recipe.process, times, network(recipe.process), start, at, **options
    )[0][-1]


def diffusers_run(scheduler: Any, process: Process, start: Tensor) -> Tensor:
    return step_scheduler(scheduler, network(process), start)[-1]


def apart(
    made: Any,
    values: Mapping[str, Any],
    steps: int,
    diffusers_timesteps: bool = False,
    even: bool | None = None,
    strength: float = 1.0,
    **spaced: Any,
) -> float:
    """The distance of the two ends, relative to their size; both begin at the same x.

    diffusers_timesteps: sfumato's network takes the (whole) timesteps of diffusers. strength: share
    of the steps that is run, as image to image does. spaced: arguments of diffusers'
    `set_timesteps` besides the steps.
    """
    recipe = read_scheduler(values, even)
    scheduler = made.from_config(values)
    scheduler.set_timesteps(
        **(spaced if "sigmas" in spaced else {"num_inference_steps": steps} | spaced)
    )
    times = begin_later(scheduler, times_of(recipe, steps), strength)
    first, last, start = (
        recipe.process.schedule.point(times[0]),
        recipe.process.schedule.point(times[-1]),
        next(noise_draws(9)),
    )
    start = start * math.hypot(*first)
    scaled = made.__name__.startswith(SCALED)
    reference = diffusers_run(scheduler, recipe.process, start / first[0] if scaled else start) * (
        last[0] if scaled else 1
    )
    actual = sfumato_run(
        recipe, times, start, timesteps_of(scheduler).tolist() if diffusers_timesteps else None
    )
    return float((actual - reference).norm() / reference.norm())


def begin_later(scheduler: Any, times: list[float], strength: float) -> list[float]:
    """The last part of a run: sfumato's times, and diffusers' as its image-to-image pipelines."""
    steps = len(times) - 1
    skipped = (steps - int(steps * strength)) * scheduler.order
    if not skipped:
        return times
    scheduler.timesteps_left = scheduler.timesteps[skipped:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return list(last_steps(times, strength))


# ---- the same run from the same config -----------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A class and its fields; `within`: how far apart the ends may be, with the reason where that
    is more than rounding.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    diffusers_timesteps: bool = False
    within: float = 1e-9
    why: str = ""
    steps: tuple[int, ...] = (7, 20)

    def __str__(self) -> str:
        return f"{self.name}-" + ",".join(f"{key}={value}" for key, value in self.fields.items())

    @property
    def config(self) -> dict[str, Any]:
        name = self.name + "Scheduler"
        table = (
            {}
            if name in FLOW_CLASSES
            or name in OTHER_CLASSES
            or name.startswith("EDM")
            or self.fields.get("use_flow_sigmas")
            else SD
        )
        clips = ("clip_sample", "clip_denoised")
        clip = {field: False for field in clips if field in CLASSES[name]}
        return {"_class_name": name, **table, **clip, **self.fields}


TRAILING, LINSPACE = {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}
LEADING, LEADING_0 = (
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "leading"},
)
SPACINGS: list[dict[str, Any]] = [TRAILING, LEADING, LEADING_0, LINSPACE]
LEVELS: list[dict[str, Any]] = [
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
]
V: dict[str, Any] = {"prediction_type": "v_prediction"}
X0: dict[str, Any] = {"prediction_type": "sample"}
TO_NOISE: dict[str, Any] = {"final_sigmas_type": "sigma_min"}
ZERO: dict[str, Any] = {"rescale_betas_zero_snr": True, **V, **TRAILING}
SDE: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++"}
FLOW: dict[str, Any] = {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "flow_shift": 3.0,
}
MULTISTEP: list[tuple[str, dict[str, Any]]] = [
    ("DPMSolverMultistep", {}),
    ("DPMSolverMultistep", {"solver_order": 1}),
    ("DPMSolverMultistep", {"solver_order": 3}),
    ("DPMSolverMultistep", {"solver_order": 3, "solver_type": "heun", "lower_order_final": False}),
    ("DPMSolverMultistep", {"solver_type": "heun"}),
    ("DPMSolverMultistep", SDE),
    ("DPMSolverMultistep", SDE | {"solver_order": 1}),
    ("DPMSolverMultistep", SDE | {"solver_type": "heun"}),
    ("DPMSolverMultistep", TO_NOISE),
    ("UniPCMultistep", {}),
    ("UniPCMultistep", {"solver_order": 3}),
    ("UniPCMultistep", {"disable_corrector": list(range(20))}),
    ("DEISMultistep", {}),
    ("DEISMultistep", {"solver_order": 3, "lower_order_final": False}),
    ("DEISMultistep", {"solver_order": 3}),
    ("SASolver", {}),
    ("SASolver", {"predictor_order": 3, "corrector_order": 4}),
    ("SASolver", {"predictor_order": 1, "corrector_order": 1, "lower_order_final": False}),
]
OLD_LEVELS = (
    "EulerDiscrete",
    "HeunDiscrete",
    "LMSDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
    "DPMSolverSDE",
)
SIGMA = {"within": 5e-6, "why": "between timesteps their sigma is linear, ours in log-SNR"}
NEAR = {"within": 3e-4, "why": "their table is put to 2^-24 at its end, ours drawn out to it"}
LATE = {"within": 4e-3, "why": "their flows begin at 0.999"}
CASES: list[Case] = [
    *(
        Case("DDIM", s | p)
        for s in (LEADING, LEADING_0)
        for p in ({}, V | {"set_alpha_to_one": False})
    ),
    *(
        Case("DDIM", TRAILING | p, steps=(5, 20))
        for p in (V, X0, ZERO, V | {"set_alpha_to_one": False})
    ),
    *(Case("DDPM", s | p) for s, p in zip(SPACINGS, ({}, V, X0, V), strict=True)),
    Case("DDPM", LINSPACE | {"variance_type": "fixed_large"}),
    Case("DDPM", {"beta_schedule": "sigmoid", "beta_start": 0.0001, "beta_end": 0.02, **LEADING}),
    *(
        Case("PNDM", s | {"skip_prk_steps": skip})
        for s in (LEADING, LEADING_0)
        for skip in (True, False)
    ),
    Case("PNDM", LEADING | {"skip_prk_steps": True, "set_alpha_to_one": True}),
    *(
        Case(name, s | p, **(SIGMA if s is LINSPACE else {}))
        for name in (*OLD_LEVELS, "EulerAncestralDiscrete")
        for s, p in zip(SPACINGS, ({}, V, {}, V), strict=True)
    ),
    *(
        Case(name, s | level, diffusers_timesteps=name.startswith("KDPM2"))
        for name in OLD_LEVELS
        for i, level in enumerate(LEVELS)
        for s in ((SPACINGS[i], LINSPACE) if name == "EulerDiscrete" else (SPACINGS[i],))
    ),
    *(Case("EulerDiscrete", s | TO_NOISE) for s in (TRAILING, LEADING)),
    *(
        Case(name, ZERO, **NEAR)
        for name in (
            "EulerDiscrete",
            "EulerAncestralDiscrete",
            "DPMSolverMultistep",
            "UniPCMultistep",
        )
    ),
    *(
        Case("EulerDiscrete", V | LEVELS[0] | {"timestep_type": "continuous"} | s)
        for s in ({}, {"sigma_min": 0.002, "sigma_max": 700.0})
    ),
    *(
        Case(name, s | more)
        for i, (name, more) in enumerate(MULTISTEP)
        for s in (SPACINGS if not more else SPACINGS[i % 4 :][:1])
    ),
    *(
        Case(name, x | more, diffusers_timesteps=True)
        for i, (name, more) in enumerate(MULTISTEP)
        for x in (LEVELS if not more else LEVELS[i % 3 :][:1])
    ),
    *(
        Case("DPMSolverMultistep", s | TO_NOISE | more)
        for s in (TRAILING, LEADING)
        for more in (
            {"euler_at_final": True},
            {"euler_at_final": True, "solver_order": 3},
            {"lower_order_final": False},
            {"solver_order": 3},
        )
    ),
    *(
        Case(name, LEVELS[i % 3] | TO_NOISE | more, diffusers_timesteps=True, steps=(7, 12))
        for name in ("UniPCMultistep", "DPMSolverMultistep")
        for i, more in enumerate(
            (
                {},
                {"solver_order": 1},
                {"solver_order": 3},
                {"lower_order_final": False},
                {"solver_order": 3, "euler_at_final": True},
                {"solver_order": 3, "disable_corrector": list(range(20))},
                {"solver_order": 3, "solver_type": "bh1"},
            )
        )
        if more.keys() <= CLASSES[name + "Scheduler"].keys()
    ),
    *(
        Case(name, LEADING | {"solver_order": 3}, steps=(14, 15))
        for name in ("DPMSolverMultistep", "DEISMultistep")
    ),  # on either side of 15
    Case("UniPCMultistep", TRAILING | TO_NOISE | {"solver_type": "bh1"}),
    Case("DPMSolverMultistep", {"use_lu_lambdas": True}, diffusers_timesteps=True),
    Case("DPMSolverSinglestep", {"solver_order": 1}),
    *(
        Case("DPMSolverMultistep", FLOW | {"solver_order": k}, diffusers_timesteps=True, **LATE)
        for k in (1, 2, 3)
    ),
    *(
        Case(
            "UniPCMultistep",
            FLOW | {"solver_order": k},
            diffusers_timesteps=True,
            within=1e-3,
            why="theirs begins at 1 - 1e-6",
        )
        for k in (1, 2, 3)
    ),
    *(
        Case("LCM", more, steps=(1, 4, 8))
        for more in ({}, V | {"original_inference_steps": 25}, {"timestep_scaling": 5.0})
    ),
    *(Case("TCD", more, steps=(1, 4, 8)) for more in ({}, V)),
    *(
        Case(name, more)
        for name in ("EDMEuler", "EDMDPMSolverMultistep")
        for more in (
            {},
            V | {"sigma_data": 1.0, "sigma_max": 120.0},
            {"sigma_schedule": "exponential"},
            {"rho": 5.0},
        )
    ),
    Case("EDMEuler", TO_NOISE),
    *(
        Case("EDMDPMSolverMultistep", more)
        for more in (
            {"solver_order": 3},
            {"solver_order": 1},
            SDE,
        )
    ),
    Case("EDMDPMSolverMultistep", {"solver_order": 3, **TO_NOISE}, steps=(7, 12)),
    *(
        Case("CMStochasticIterative", more, steps=(1, 2, 7, 13))
        for more in ({}, {"num_train_timesteps": 18, "rho": 5.0, "sigma_data": 1.0})
    ),
    *(
        Case(name, shift | level)
        for name in ("FlowMatchEulerDiscrete", "FlowMatchLCM")
        for shift in ({}, {"shift": 3.0})
        for level in ({}, *LEVELS)
    ),
    Case("FlowMatchEulerDiscrete", {"stochastic_sampling": True, "shift": 3.0}),
    *(Case("FlowMatchHeunDiscrete", shift) for shift in ({}, {"shift": 3.0})),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_libraries_end_alike(case: Case, double: Callable[[str], Any]) -> None:
    assert not read_scheduler(case.config, strict=True).notes
    for steps in case.steps:
        assert (
            apart(double(case.name + "Scheduler"), case.config, steps, case.diffusers_timesteps)
            < case.within
        ), case.why


DIFFERENT: list[tuple[Case, str]] = [
    (Case("DDIM", LINSPACE), "they step by a fixed stride whatever the spacing"),
    (
        Case("PNDM", TRAILING | {"skip_prk_steps": True}, steps=(7,)),
        "they step by a fixed stride whatever the spacing",
    ),
    (Case("PNDM", V | LEADING | {"skip_prk_steps": True}), "they read means of v at one point"),
    (Case("DDPM", LEADING | {"variance_type": "fixed_large"}), "they leave noise at the end"),
    (Case("DPMSolverMultistep", SDE | {"solver_order": 3}), "their third order has a sign wrong"),
    (
        Case("IPNDM"),
        "at alpha = 0 they have no clean latent: their first step keeps the noise alone",
    ),
]


@pytest.mark.parametrize(("case", "why"), DIFFERENT, ids=lambda value: str(value)[:60])
def test_defects_of_diffusers_are_not_copied(
    case: Case, why: str, double: Callable[[str], Any]
) -> None:
    """diffusers' result differs, for the reason beside each case.

    The test fails when diffusers mends it, or when sfumato changes.
    """
    assert not read_scheduler(case.config, strict=True).notes
    assert all(
        1e-4 < apart(double(case.name + "Scheduler"), case.config, steps) < 1
        for steps in case.steps
    ), why


MIDDLE = [
    Case("UniPCMultistep", LEVELS[0] | TO_NOISE, diffusers_timesteps=True),
    Case("UniPCMultistep", LEADING),
    Case("DPMSolverMultistep", TRAILING),
    Case("DEISMultistep", LEVELS[1], diffusers_timesteps=True),
    Case("SASolver", LEADING),
    Case("SASolver", LEVELS[0], diffusers_timesteps=True),
    Case("EulerDiscrete", LEVELS[0] | TRAILING),
    Case("HeunDiscrete", LEADING),
    Case("KDPM2Discrete", LEADING),
    Case("DDIM", LEADING),
    Case("IPNDM"),
    Case("FlowMatchEulerDiscrete", {"shift": 3.0}),
]


@pytest.mark.parametrize("case", MIDDLE, ids=str)
def test_runs_begun_in_the_middle_end_alike(case: Case, double: Callable[[str], Any]) -> None:
    for steps in (12, 20):
        made = double(case.name + "Scheduler")
        assert apart(made, case.config, steps, case.diffusers_timesteps, strength=0.5) < case.within


MIDDLE_DIFFERENT = [
    (Case("LMSDiscrete", LEADING), "they take the weights of order 4 for fewer slopes", 3.0),
    (Case("LMSDiscrete", LEVELS[0]), "they take the weights of order 4 for fewer slopes", 2.0),
    (
        Case("PNDM", LEADING | {"skip_prk_steps": True}),
        "they begin a step earlier and take the third call a step too late",
        2.0,
    ),
    (Case("PNDM", LEADING), "they begin within a Runge-Kutta step", 10.0),
]


@pytest.mark.parametrize(("case", "why", "ratio"), MIDDLE_DIFFERENT, ids=str)
def test_defects_of_runs_begun_in_the_middle_are_not_copied(
    case: Case, why: str, ratio: float, double: Callable[[str], Any]
) -> None:
    """On Gaussian latents the flow is known, and sfumato ends nearer to it."""
    recipe, steps = read_scheduler(case.config), 20
    scheduler = double(case.name + "Scheduler").from_config(case.config)
    scheduler.set_timesteps(steps)
    times = begin_later(scheduler, times_of(recipe, steps), 0.5)
    earlier = (float(scheduler.timesteps_left[0]) + 1) / 1000
    scaled = case.name.startswith(SCALED)
    point, noise = recipe.process.schedule.point, next(noise_draws(9))

    def error(run: Callable[[Tensor], Tensor], t: float) -> float:
        # of the distance to the mean, which the flow keeps in units of the spread
        (alpha, sigma), (a, s) = point(t), point(times[-1])
        end = run(alpha * MEAN + noise * math.hypot(alpha * SPREAD, sigma))
        return float((end - (a * MEAN + noise * math.hypot(a * SPREAD, s))).norm() / end.norm())

    def diffusers_end(x: Tensor) -> Tensor:
        alpha = point(times[0])[0] if scaled else 1.0
        end = diffusers_run(scheduler, recipe.process, x / alpha)
        return end * (point(times[-1])[0] if scaled else 1.0)

    error_of_diffusers = error(diffusers_end, times[0] if scaled else earlier)
    error_of_sfumato = error(lambda x: sfumato_run(recipe, times, x), times[0])
    assert error_of_diffusers > ratio * error_of_sfumato, why


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "DEISMultistep"])
def test_the_order_is_lowered_by_the_steps_that_are_run(
    name: str, double: Callable[[str], Any]
) -> None:
    """10 of 20 steps are fewer than 15: diffusers counts the steps before the first, too."""
    case, made = Case(name, LEADING | {"solver_order": 3}), double(name + "Scheduler")
    assert 1e-4 < apart(made, case.config, 20, strength=0.5) < 1
    assert apart(made, case.config, 40, strength=0.5) < case.within
    assert apart(made, case.config, 12, strength=0.5) < case.within


EMPTY_END: list[tuple[str, dict[str, Any]]] = [
    ("DPMSolverMultistep", LEVELS[2] | {"solver_order": 3}),
    ("UniPCMultistep", LEVELS[0] | {"solver_order": 3, "lower_order_final": False}),
]


@pytest.mark.parametrize(("name", "fields"), EMPTY_END)
def test_diffusers_third_order_over_a_step_of_no_length_is_not_finite(
    name: str, fields: dict[str, Any], double: Callable[[str], Any]
) -> None:
    """In 20 steps, in which the order of the last ones is not lowered."""
    config = Case(name, TO_NOISE | fields).config
    recipe, scheduler = read_scheduler(config), double(name + "Scheduler").from_config(config)
    scheduler.set_timesteps(20)
    start, times = next(noise_draws(9)), times_of(recipe, 20)
    try:
        finite = bool(diffusers_run(scheduler, recipe.process, start).isfinite().all())
    except RuntimeError:  # a singular matrix
        finite = False
    assert not finite and bool(sfumato_run(recipe, times, start).isfinite().all())


SIZES: list[tuple[int, dict[str, Any]]] = [
    (256, {}),
    (4096, {}),
    (1024, {"max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}),  # Qwen-Image's
    (2000, {"time_shift_type": "linear", "base_shift": 1.5, "max_shift": 3.0}),
]


@pytest.mark.parametrize(("tokens", "more"), SIZES)
@pytest.mark.parametrize("even", [True, False])
def test_a_flow_shifted_by_the_images_size(
    even: bool, tokens: int, more: dict[str, Any], double: Callable[[str], Any]
) -> None:
    """Even times as of FLUX's pipelines, and the scheduler's own.

    mu is computed from the config's four numbers as by the pipelines.
    """
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": True,
        **more,
    }
    recipe, values = read_scheduler(config, even), CLASSES["FlowMatchEulerDiscreteScheduler"] | more
    low, high = values["base_image_seq_len"], values["max_image_seq_len"]
    mu = values["base_shift"] + (values["max_shift"] - values["base_shift"]) * (tokens - low) / (
        high - low
    )
    for steps in (1, 7, 20):
        scheduler = double("FlowMatchEulerDiscreteScheduler").from_config(config)
        if steps == 1 and more.get("shift_terminal"):
            continue  # diffusers stretches the only time, from which nothing can begin
        spaced = (
            {"sigmas": np.linspace(1, 1 / steps, steps)} if even else {"num_inference_steps": steps}
        )
        scheduler.set_timesteps(mu=mu, **spaced)
        np.testing.assert_allclose(times_of(recipe, steps, tokens), scheduler.sigmas, atol=1e-9)
    assert recipe.dynamic is not None and recipe.spacing == recipe.spacing_for(high)
    start = next(noise_draws(9))
    reference = diffusers_run(scheduler, recipe.process, start)
    actual = sfumato_run(recipe, times_of(recipe, 20, tokens), start)
    assert float((actual - reference).norm() / reference.norm()) < 1e-9


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_even_times_of_a_flow(shift: float, double: Callable[[str], Any]) -> None:
    """FLUX.1-schnell: no dynamic shift, and its pipeline gives even times."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    assert read_scheduler(config, even=True).spacing == "trailing" != read_scheduler(config).spacing
    for steps in (4, 20):
        assert (
            apart(
                double("FlowMatchEulerDiscreteScheduler"),
                config,
                steps,
                even=True,
                sigmas=np.linspace(1, 1 / steps, steps),
            )
            < 1e-9
        )
    even = {
        name: getattr(by_pipeline(f"{name}Pipeline"), "even_times", None)
        for name in ("Flux", "Flux2", "StableDiffusion3", "LDM")
    }
    assert even == {"Flux": True, "Flux2": True, "StableDiffusion3": False, "LDM": None}


# ---- published families --------------------------------------------------------------------------

# Scheduler configs of published families, less the fields that their class does not read, written
# down without the files at hand. The repositories: CompVis/stable-diffusion-v1-4,
# stabilityai/stable-diffusion-2-1, -xl-base-1.0, -xl-refiner-1.0, sdxl-turbo, sd-turbo,
# -x4-upscaler, -3-medium, -3.5-large, SimianLuo/LCM_Dreamshaper_v7, black-forest-labs/FLUX.1-dev
# and -schnell, cosxl, playground-v2.5. FLUX.1-schnell's pipeline gives it even times
# (`Family.even_times`).
SD_LEADING = SD | {"timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "epsilon"}
SD_DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
FLOW_EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
FLUX_SIZES = {
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SD_TURBO = SD | {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "sd1": {
        "_class_name": "PNDMScheduler",
        **SD_LEADING,
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
    },
    "sd2-base": {
        "_class_name": "PNDMScheduler",
        **SD_LEADING,
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
    },
    "sd2": {**SD_DDIM, **SD_LEADING, "prediction_type": "v_prediction"},
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler",
        **SD_LEADING,
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
    },
    "sdxl-refiner": {
        "_class_name": "EulerDiscreteScheduler",
        **SD_LEADING,
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
    },
    "sdxl-turbo": SD_TURBO,
    "sd-turbo": {**SD_TURBO, "_class_name": "EulerDiscreteScheduler"},
    "x4-upscaler": {
        **SD_DDIM,
        **SD,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "prediction_type": "v_prediction",
        "steps_offset": 1,
    },
    "x4-upscaler-low-res": {
        "_class_name": "DDPMScheduler",
        **SD,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
        "clip_sample": True,  # it only adds noise to the small image
    },
    "lcm": {
        "_class_name": "LCMScheduler",
        **SD,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
        "prediction_type": "epsilon",
    },
    "sd3": {**FLOW_EULER, "shift": 3.0},
    "sd3.5": {**FLOW_EULER, "shift": 3.0},
    "flux-dev": {**FLOW_EULER, **FLUX_SIZES, "shift": 3.0, "use_dynamic_shifting": True},
    "flux-schnell": {**FLOW_EULER, **FLUX_SIZES, "shift": 1.0, "use_dynamic_shifting": False},
    "cosxl": {
        "_class_name": "EDMEulerScheduler",
        "sigma_min": 0.002,
        "sigma_max": 120.0,
        "sigma_data": 1.0,
        "sigma_schedule": "exponential",
        "prediction_type": "v_prediction",
    },
    "playground-v2.5": {
        "_class_name": "EDMDPMSolverMultistepScheduler",
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "sigma_data": 0.5,
        "prediction_type": "epsilon",
        "solver_order": 2,
    },
}

WAYS = {
    "sd1": ("plms", "leading:clean=false,offset=1", "eps"),
    "sd2-base": ("plms", "leading:clean=false,offset=1", "eps"),
    "sd2": ("ddim", "leading:clean=false,offset=1", "v"),
    "sdxl": ("euler", "leading:offset=1", "eps"),
    "sdxl-refiner": ("euler", "leading:offset=1", "eps"),
    "sdxl-turbo": ("euler_ancestral", "trailing:whole=true", "eps"),
    "sd-turbo": ("euler", "trailing:whole=true", "eps"),
    "x4-upscaler": ("ddim", "leading:clean=false,offset=1", "v"),
    "x4-upscaler-low-res": ("ddpm", "leading", "eps"),
    "lcm": ("lcm", "lcm", "eps"),
    "sd3": ("euler", "linspace:end=0.0029940119760479044", "flow"),
    "sd3.5": ("euler", "linspace:end=0.0029940119760479044", "flow"),
    "flux-dev": ("euler", f"shifted:shift={math.exp(1.15)}", "flow"),
    "flux-schnell": ("euler", "linspace", "flow"),
    "cosxl": ("euler", "exponential", "edm_v"),
    "playground-v2.5": ("dpmpp_2m", "karras", "edm"),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_families(family: str, double: Callable[[str], Any]) -> None:
    """Each is read as expected, accepted as a model's defaults, and ends where diffusers' scheduler
    does.
    """
    config = PUBLISHED[family]
    recipe = read_scheduler(config)
    assert (recipe.sampler, recipe.spacing, recipe.process.parameterization.name) == WAYS[family]
    # clip_sample, in a scheduler that only adds noise
    assert bool(recipe.notes) == (family == "x4-upscaler-low-res")
    Defaults(sampler=recipe.sampler, spacing=recipe.spacing)
    config = {**config, "clip_sample": False} if "clip_sample" in config else config
    for steps in {"lcm": (4, 8), "sdxl-turbo": (1, 4), "sd-turbo": (1, 4)}.get(family, (7, 20)):
        spaced = (
            {"mu": 1.15, "sigmas": np.linspace(1, 1 / steps, steps)} if family == "flux-dev" else {}
        )
        assert apart(double(config["_class_name"]), config, steps, **spaced) < 1e-9


# ---- back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_read_config_is_written_so_that_diffusers_makes_the_same_run(
    case: Case, double: Callable[[str], Any]
) -> None:
    """A written config gives diffusers' class the times and levels of the config that was read.

    sfumato reads the same from both.
    """
    recipe = read_scheduler(case.config)
    written = json.loads(
        json.dumps(write_scheduler(recipe.process, recipe.sampler, recipe.spacing, recipe.dynamic))
    )
    assert read_scheduler(written, strict=True) == recipe and "_sfumato" not in written
    # see they_step_by_a_fixed_stride
    strides = written["_class_name"] == "DDIMScheduler" and not case.name.startswith("DDIM")
    for steps in (5,) if strides else case.steps[:1]:
        results = []
        for values in (case.config, written):
            scheduler = double(values["_class_name"]).from_config(values)
            scheduler.set_timesteps(steps)
            x = next(noise_draws(9)) * (
                1
                if case.name.startswith(SCALED)
                else math.hypot(*recipe.process.schedule.point(1.0))
            )
            results.append(
                (
                    scheduler.timesteps,
                    getattr(scheduler, "sigmas", None),
                    diffusers_run(scheduler, recipe.process, x),
                )
            )
        for once, again in zip(*results, strict=True):
            assert (
                once is None
                or again is None
                or torch.allclose(
                    once.double(), again.double(), rtol=1e-9, atol=1e-9, equal_nan=True
                )
            )


NOT_IN_DIFFUSERS: list[tuple[Process, str, str]] = [
    (Process(schedule("flow"), parameterization("flow")), "euler", "trailing"),
    (Process(schedule("flow"), parameterization("flow")), "unipc", "karras:rho=5"),
    (Process(schedule("flow"), parameterization("v")), "heun", "linspace"),
    (Process(Shifted(schedule("flow"), 3.0), parameterization("flow")), "restart", "beta"),
    (Process(schedule("cosine"), parameterization("v")), "edm:churn=10", "trailing"),
    (
        Process(schedule("scaled_linear"), parameterization("eps")),
        "ddim:eta=0.5",
        "align_your_steps",
    ),
    (Process(schedule("sigmoid"), parameterization("x0")), "dpmpp_2m", "karras"),
    (
        Process(ZeroTerminalSNR(schedule("scaled_linear")), parameterization("v")),
        "dpmpp_2m",
        "trailing",
    ),
    (
        Process(ZeroTerminalSNR(schedule("scaled_linear"), 2.0**-24), parameterization("v")),
        "restart",
        "trailing",
    ),
    (Process(schedule("vp"), parameterization("eps")), "dpmpp_3m", "log_snr"),
    (Process(schedule("edm"), edm(0.5, flipped=True)), "edm", "karras"),
    (Process(table(cosine(30).betas), parameterization("x0")), "lms:order=2", "trailing"),
    (Process(Trigonometric(), parameterization("v")), "ipndm:order=2", "trailing"),
    (Process(Trigonometric(), parameterization("flow")), "ipndm", "crash"),
    (Process(ConsistencyEDM(), consistency()), "consistency", "karras"),
    (Process(ConsistencyEDM(), consistency(0.5, 0.01)), "consistency", "karras"),
    (Process(ConsistencyEDM(), edm(0.5)), "heun", "karras"),
    (
        Process(schedule("scaled_linear"), parameterization("eps")),
        "sa_solver:tau=0.5",
        "leading",
    ),
]


@pytest.mark.parametrize(
    ("process", "sampler", "spacing"),
    NOT_IN_DIFFUSERS,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_runs_that_diffusers_has_not_come_back_too(
    process: Process, sampler: str, spacing: str, tmp_path: Path
) -> None:
    """The run is in a note of sfumato's own.

    The process is in a class of diffusers where there is one, and diffusers opens it.
    """
    written = write_scheduler(process, sampler, spacing)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(written))
    read = read_scheduler(json.loads((tmp_path / "scheduler_config.json").read_text()), strict=True)
    assert read == SchedulerSpec(process, read.sampler, read.spacing) and "_sfumato" in written
    assert sampler_of(read.sampler)[0] is sampler_of(sampler)[0]
    assert spacing_of(spacing) == spacing_of(read.spacing)
    if written["_class_name"] == "SfumatoProcess":
        return
    reference: Any = getattr(diffusers, written["_class_name"]).from_pretrained(tmp_path)
    reference.set_timesteps(5)
    chosen = process.schedule
    if isinstance(chosen, BetaTable):
        torch.testing.assert_close(
            reference.betas, torch.tensor(chosen.betas), rtol=1e-4, atol=1e-7
        )


def test_a_note_is_dropped_when_the_fields_beside_it_change() -> None:
    """An edited config (Karras' levels, another class) counts more than the note in it."""
    written = write_scheduler(
        Process(schedule("scaled_linear"), parameterization("eps")), "restart", "trailing"
    )
    assert read_scheduler(written).sampler == "restart"
    assert read_scheduler({**written, "timestep_spacing": "leading"}).spacing == "leading"
    assert read_scheduler({**written, "_class_name": "EulerDiscreteScheduler"}).sampler == "euler"


@pytest.mark.parametrize(
    "dynamic",
    [
        DynamicShift(),
        DynamicShift(even=False),
        DynamicShift((256, 0.5), (8192, 0.9), True, True, 0.02),
    ],
)
def test_dynamic_shifts_come_back(dynamic: DynamicShift) -> None:
    process = Process(schedule("flow"), parameterization("flow"))
    for sampler in ("euler", "heun", "consistency"):
        recipe = SchedulerSpec(process, sampler, dynamic.spacing_for(dynamic.top[0]), dynamic)
        assert (
            read_scheduler(
                json.loads(json.dumps(write_scheduler(process, sampler, recipe.spacing, dynamic)))
            )
            == recipe
        )
    assert dynamic_shift(256) < dynamic_shift(4096)


# ---- words and refusals --------------------------------------------------------------------------


def test_every_field_of_diffusers_classes_is_listed_with_its_default() -> None:
    """A field or a default that diffusers changes fails here."""
    for name, actual in CLASSES.items():
        reference = {
            k: p.default
            for k, p in inspect.signature(scheduler_class(name).__init__).parameters.items()
            if k != "self"
        }
        assert actual == reference, name


NOTED: list[tuple[str, dict[str, Any], str, str]] = [
    ("DDIM", {"clip_sample": True}, "ddim", "clip_sample=True is for pixels"),
    ("DPMSolverMultistep", {"thresholding": True}, "dpmpp_2m", "thresholding=True is for pixels"),
    (
        "DPMSolverMultistep",
        {"algorithm_type": "dpmsolver", **TO_NOISE},
        "dpmpp_2m:lower_below=15",
        "dpmsolver\\+\\+",
    ),
    (
        "DPMSolverMultistep",
        {"algorithm_type": "sde-dpmsolver"},
        "dpmpp_2m_sde",
        "sde-dpmsolver\\+\\+",
    ),
    ("DPMSolverMultistep", {"lambda_min_clipped": -5.1}, "dpmpp_2m", "lambda_min_clipped=-5.1"),
    ("DPMSolverSinglestep", {}, "dpmpp_2s", "counts network calls"),
    (
        "DPMSolverSinglestep",
        {"algorithm_type": "dpmsolver", "solver_order": 3},
        "dpm_solver_3",
        "counts network calls",
    ),
    ("UniPCMultistep", {"predict_x0": False}, "unipc", "predict_x0=False"),
    ("UniPCMultistep", {"disable_corrector": [3]}, "unipc:corrector=false", "disable_corrector"),
    ("UniPCMultistep", {"disable_corrector": [0, 1]}, "unipc:corrector=false", "out of all steps"),
    ("SASolver", {"algorithm_type": "noise_prediction"}, "sa_solver", "noise_prediction"),
    ("SASolver", {"tau_func": "t"}, "sa_solver", "tau_func is left out"),
    (
        "CMStochasticIterative",
        {"s_noise": 1.01},
        "consistency:sigma_min=0.002",
        "s_noise=1.01 is left out",
    ),
    (
        "CMStochasticIterative",
        {"clip_denoised": True},
        "consistency:sigma_min=0.002",
        "clip_denoised=True is for pixels",
    ),
    ("DDPM", {"variance_type": "learned"}, "ddpm", "variance_type='learned' is left out"),
    ("EulerDiscrete", {"interpolation_type": "log_linear"}, "euler", "log_linear"),
    ("EulerDiscrete", {"sigma_max": 10.0, "use_karras_sigmas": True}, "euler", "sigma_max=10.0"),
    ("FlowMatchLCM", {"scale_factors": [0.5]}, "consistency", "scale_factors"),
    ("FlowMatchEulerDiscrete", {"shift_terminal": 0.1}, "euler", "shift_terminal=0.1"),
    ("DEISMultistep", FLOW, "deis:lower_below=15,lower_order_final=false", "ends at t = 0"),
]


@pytest.mark.parametrize(("name", "fields", "sampler", "words"), NOTED)
def test_differences_are_reported(
    name: str, fields: dict[str, Any], sampler: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning with the nearest sampler; an error in strict mode.

    Nothing is reported where only the process is read.
    """
    config = Case(name, fields).config
    with caplog.at_level(logging.WARNING, "sfumato"):
        assert from_scheduler_config(config) and not caplog.records
        recipe = read_scheduler(config)
    assert recipe.sampler == sampler and len(recipe.notes) == len(caplog.records) == 1
    with pytest.raises(UserError, match=words):
        read_scheduler(config, strict=True)
    Defaults(sampler=recipe.sampler, spacing=recipe.spacing)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("DDIM", {"prediction_type": "flow"}, "prediction_type='flow': expected one of"),
    ("DDIM", {"prediction_type": "flow_prediction"}, "expected epsilon, sample or v_prediction"),
    ("DDIM", {"beta_schedule": "laplace"}, "beta_schedule='laplace'"),
    ("DDIM", {"beta_start": 2.0}, "between 0 and 1"),
    ("DDIM", {"num_train_timesteps": 0}, "num_train_timesteps=0"),
    ("DDIM", {"num_train_timesteps": True}, "num_train_timesteps=True: expected a whole number"),
    ("DDIM", {"trained_betas": [0.1, "0.2"], "num_train_timesteps": 2}, "expected as many numbers"),
    ("DDIM", {"trained_betas": 3}, "trained_betas=3"),
    ("DDIM", {"rescale_betas_zero_snr": True}, "cannot be solved"),
    ("DDIM", {"rescale_betas_zero_snr": 1}, "expected true or false"),
    ("DDIM", {"timestep_spacing": "even"}, "timestep_spacing='even'"),
    ("DDIM", {"steps_offset": -1}, "steps_offset=-1"),
    ("DDIM", {"snr_shift_scale": 3.0}, "snr_shift_scale=3.0 is not known"),
    ("EulerDiscrete", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "expected one of them"),
    ("DPMSolverMultistep", {"solver_order": 4}, "expected 1 to 3"),
    (
        "DPMSolverMultistep",
        {"use_flow_sigmas": True},
        "prediction_type='epsilon': expected flow_prediction or sample",
    ),
    ("UniPCMultistep", {"disable_corrector": "all"}, "expected a list of steps"),
    ("SASolver", {"predictor_order": 5}, "predictor_order=5: expected 1 to 4"),
    ("SASolver", {"algorithm_type": "deis"}, "expected data_prediction or noise_prediction"),
    ("IPNDM", {"trained_betas": [0.1]}, "trained_betas"),
    ("CMStochasticIterative", {"num_train_timesteps": 0}, "expected at least 1"),
    ("EDMEuler", X0, "expected epsilon or v_prediction"),
    ("EDMEuler", {"sigma_max": 0.001}, "expected 0 < sigma_min < sigma_max"),
    ("FlowMatchEulerDiscrete", {"num_train_timesteps": 500}, "num_train_timesteps=500"),
    ("FlowMatchEulerDiscrete", {"invert_sigmas": True}, "invert_sigmas=True"),
    ("FlowMatchEulerDiscrete", {"shift": 0}, "shift=0: expected a positive number"),
    ("FlowMatchEulerDiscrete", {"shift_terminal": 2.0}, "shift_terminal=2.0"),
    (
        "FlowMatchEulerDiscrete",
        {"use_dynamic_shifting": True, "max_image_seq_len": 9},
        "expected 0 < base < max",
    ),
    ("FlowMatchEulerDiscrete", {"beta_start": 0.1}, "beta_start=0.1 is not known"),
]


@pytest.mark.parametrize(("name", "fields", "words"), REFUSED)
def test_unsupported_fields_are_refused(name: str, fields: dict[str, Any], words: str) -> None:
    good = Case(name, {}).config
    read_scheduler(good, strict=True)
    with pytest.raises(UserError, match=words) as caught:
        read_scheduler({**good, **fields})
    assert "\n" not in str(caught.value)


def test_unknown_classes() -> None:
    for name in ("MyScheduler", None, 3, ["DDIMScheduler"], "", "Scheduler"):
        with pytest.raises(UserError, match="is not known: DDIM") as caught:
            read_scheduler({"_class_name": name})
        assert "\n" not in str(caught.value)
    for name, near in (
        ("EulerDiscrete", "EulerDiscreteScheduler"),
        ("EulerScheduler", "EulerDiscreteScheduler or EulerAncestralDiscreteScheduler"),
        ("UniPCMultiStepScheduler", "UniPCMultistepScheduler"),
    ):
        with pytest.raises(UserError, match=rf"is not known: did you mean {near}\?"):
            read_scheduler({"_class_name": name})


def test_every_class_of_diffusers_opens_or_is_refused_by_its_name() -> None:
    """With a reason and the nearest class that opens, and without a guess at its spelling."""
    listed = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    listed |= {"DPMSolverSDEScheduler", "LMSDiscreteScheduler", "CosineDPMSolverMultistepScheduler"}
    assert listed == CLASSES.keys() | UNSUPPORTED.keys() and not CLASSES.keys() & UNSUPPORTED.keys()
    for name, reason in UNSUPPORTED.items():
        with pytest.raises(UserError, match=f"{name}' is not supported: ") as caught:
            read_scheduler({"_class_name": name})
        words = set(re.findall(r"\w+Scheduler", str(caught.value))) - {name}
        assert reason in str(caught.value) and "did you mean" not in str(caught.value)
        assert words <= CLASSES.keys() and "\n" not in reason


def test_configs_that_jax_wrote() -> None:
    config = PUBLISHED["sd1"]
    assert read_scheduler({**config, "_class_name": "FlaxPNDMScheduler"}) == read_scheduler(config)


def test_fields_of_sister_classes_are_ignored_as_in_diffusers() -> None:
    """SDXL's Euler config has fields of PNDM and DDIM."""
    config = {
        **PUBLISHED["sdxl"],
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        "clip_sample": True,
        "sample_max_value": 1.0,
    }
    assert read_scheduler(config, strict=True) == read_scheduler(PUBLISHED["sdxl"])


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2000),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.floats(0.1, 0.2), max_size=3),
    st.just({}),
)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(CLASSES)), data=st.data())
def test_any_config_is_read_or_refused_in_one_sentence(name: str, data: st.DataObject) -> None:
    """Whatever the fields hold: a recipe that `generate` takes, and that comes back when it is
    written; or one sentence.
    """
    logging.getLogger("sfumato").disabled = True
    fields = sorted({*CLASSES[name], "solver_order", "nonsense"})
    choices = [
        "linspace",
        "leading",
        "trailing",
        "v_prediction",
        "sample",
        "flow_prediction",
        "heun",
        "bh1",
        "sigma_min",
        "karras",
    ]
    values = data.draw(
        st.dictionaries(st.sampled_from(fields), ODD | st.sampled_from(choices), max_size=4)
    )
    try:
        recipe = read_scheduler({"_class_name": name, **values})
    except UserError as error:
        assert "\n" not in str(error)
        return
    finally:
        logging.getLogger("sfumato").disabled = False
    Defaults(sampler=recipe.sampler, spacing=recipe.spacing)
    assert isinstance(recipe.process.schedule, Schedule)
    if recipe.process.schedule.grid in (None, 1000):
        written = json.loads(
            json.dumps(
                write_scheduler(recipe.process, recipe.sampler, recipe.spacing, recipe.dynamic)
            )
        )
        assert read_scheduler(written) == recipe


def test_noise_predicted_at_a_nearly_zero_terminal_snr() -> None:
    """Classes that rescale to exactly zero cannot hold it.

    They are passed over when the config is written.
    """
    recipe = read_scheduler(
        {"_class_name": "DPMSolverMultistepScheduler", "rescale_betas_zero_snr": True}
    )
    assert (
        read_scheduler(
            write_scheduler(recipe.process, recipe.sampler, recipe.spacing, recipe.dynamic)
        )
        == recipe
    )


def test_both_ways_for_processes_alone() -> None:
    """`to_scheduler_config` writes the process alone, by which saved models are told apart."""
    assert to_scheduler_config(Process(schedule("flow"), parameterization("flow"))) == {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 1.0,
    }
    for process, _, _ in NOT_IN_DIFFUSERS:
        assert (
            from_scheduler_config(json.loads(json.dumps(to_scheduler_config(process)))) == process
        )


def test_a_flow_trained_in_sfumato_runs_in_diffusers_with_its_defaults(
    double: Callable[[str], Any],
) -> None:
    """ddim in even times is DPM-Solver++ of order 1 over flow sigmas, but for its first 0.001;
    FlowMatchEuler would end elsewhere.
    """
    written = write_scheduler(
        Process(schedule("flow"), parameterization("flow")), "ddim", "trailing"
    )
    assert written["_class_name"] == "DPMSolverMultistepScheduler" and "_sfumato" not in written
    assert (
        apart(double("DPMSolverMultistepScheduler"), written, 20, diffusers_timesteps=True) < 1e-3
    )


@pytest.mark.parametrize("kind", ["scaled_linear", "cosine", "flow", "edm"])
@pytest.mark.parametrize("name", [name for name in SFUMATO_SPACINGS if name != "uniform"])
def test_every_spacing_may_end_early_and_by_level_between_others(name: str, kind: str) -> None:
    chosen = schedule(kind)
    for steps in (2, 7, 20):
        whole, stopped = timesteps(name, steps, chosen), timesteps(name, steps, chosen, clean=False)
        assert (
            whole[-1] == 0
            and stopped[-1] == chosen.first
            and stopped[:-1] == [t for t in whole if t > chosen.first * (1 + 1e-9)]
        )
    if name in ("karras", "exponential", "beta"):
        options: dict[str, Any] = {"over": "noise"} if name == "beta" else {}
        for even, offset in (("leading", 1), ("trailing", 0)):
            spaced: dict[str, Any] = {"offset": offset} if even == "leading" else {"whole": True}
            ends = timesteps(even, 10, chosen, **spaced)
            result = timesteps(name, 10, chosen, between=even, offset=offset, **options)
            assert result[0] == ends[0] and chosen.noise_level(result[-2]) == pytest.approx(
                chosen.noise_level(ends[-2]), abs=1e-9
            )
        with pytest.raises(UserError, match="unknown between 'linspace'"):
            timesteps(name, 10, chosen, between="linspace", **options)


def test_words_have_one_spelling() -> None:
    assert (
        canonical_spacing("karras:rho=5")
        == canonical_spacing("karras:rho=5.0,clean=true")
        == "karras:rho=5.0"
    )
    assert canonical_sampler("lms:order=4") == "lms"
    with pytest.raises(UserError, match="unknown option of sampler ddim 'order'"):
        canonical_sampler("ddim:order=2")
    with pytest.raises(UserError, match="unknown timestep spacing 'tuned'"):
        canonical_spacing("tuned")
