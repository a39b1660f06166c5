"""Parity with diffusers' schedulers (0.42), at every network call and at the end.

The same network, times and noise make the same latents. diffusers' tables, levels and casts are
float32. To compare the algebra and not its rounding, a scheduler's module is lent float64 under the
name of float32 (`helpers.schedulers`): its own code, unchanged, then agrees with sfumato to 1e-9
(most of it to 1e-12; only a division by a difference of levels loses more). `test_as_shipped` runs
the schedulers as they are, within 1e-5. Noise is handed to both from one list. Some schedulers work
in x/alpha; the inputs of the network and the result are compared. Networks of diffusers take whole
timesteps where levels lie between them: that of sfumato then takes the same
(`Case.whole_timesteps`), and a test checks it.

Differences, with their reasons. Each has a test below that fails when diffusers changes (numbers
are diffusers' issues):

- DDIM, PNDM step by T // steps whatever the spacing (9261, 11347, 12633). sfumato: to the next time
  of the list (test: diffusers_steps_by_a_fixed_stride).
- DDPM, fixed_large: noise after the last step, if that begins above timestep 0. sfumato: the last
  step is its mean (test: diffusers_leaves_noise_at_the_end).
- Euler, Heun, LMS: sigma linear between whole timesteps. sfumato: log-SNR linear (test:
  diffusers_interpolates_sigma_between_timesteps).
- multistep: levels between timesteps, networks take whole ones. sfumato: the level's own timestep
  (test: networks_of_diffusers_take_whole_timesteps).
- multistep: equal whole timesteps end in an IndexError (12771). sfumato: times are real numbers
  (test: diffusers_whole_timesteps_collide).
- trailing by np.arange: 61 steps are 62, down to timestep -1. sfumato: steps are counted (test:
  diffusers_trailing_steps_are_summed_in_floating_point).
- leading with 1000 steps and offset 1 leaves the table (10003). sfumato: refused (test:
  leading_timesteps).
- linspace with one step begins at timestep 0. sfumato: at full noise (test: linspace_timesteps).
- sde-dpmsolver++ of order 3: one sign (since pull request 9104). sfumato: as k-diffusion and as eta
  0 (test: diffusers_third_order_sde_has_a_sign_wrong).
- from pure noise (cosine's end, level 20,000) steps by slopes of the level overshoot. sfumato: by
  x0, or over sigma/(alpha + sigma) (test: diffusers_steps_from_nothing_overshoot).
- DPM-Solver++ of order 3: half of the quadratic term is missing, its order is 2. sfumato: dpmpp_3m
  (tests/contracts/test_samplers.py measures both).
- EDM sde-dpmsolver++ of order 3: raises. sfumato: dpmpp_3m_sde (test:
  diffusers_third_order_sde_of_edm_is_missing).
- UniPC to sigma 0 with bh1, or with lower_order_final=False: not finite. sfumato: first order
  there, exact (test: diffusers_unipc_is_not_finite_at_zero).
- DPM-Solver-3 singlestep: second point by the midpoint rule (its NaN, 9007, is mended). sfumato: as
  in the paper (test: diffusers_third_order_singlestep).
- churn: noise added after the network call; v read at the old level. sfumato: Karras et al.'s
  (test: diffusers_churn_comes_after_the_network).
- flows: the least time is shifted twice (13243). sfumato: once; `end` gives diffusers' time (test:
  diffusers_flows_are_shifted_twice).
- eps at zero terminal SNR: divides by 0 (3851). sfumato: refused when built (test:
  eps_at_zero_terminal_snr).
- alpha^2 = 2^-24 put at the end of a table that falls to 0. sfumato: the table drawn out to it
  (test: nearly_zero_terminal_snr).
- alpha^2 = 2^-24 with linear betas: two levels before it are noisier. sfumato: falls to the end
  (test: diffusers_nearly_zero_snr_can_rise_again).
- PNDM: means of v read at one point. sfumato: each at its own (test:
  diffusers_pndm_reads_v_at_one_point).
- DDIMInverse: v read at the wrong end of the step. sfumato: at the end of the evaluation (test:
  diffusers_inversion_reads_v_at_the_wrong_end).
- TCD with eta 1: each step by way of timestep 0. sfumato: by way of the clean latent (test:
  diffusers_tcd_with_eta_one_keeps_the_least_noise).
- Euler's first noise in x/alpha: sigma, or sqrt(sigma^2 + 1) for leading. sfumato: sqrt(sigma^2 +
  1) (test: diffusers_first_noise).
- DEIS: ends at timestep 0; by noise level its last step has no length. sfumato: ends at t = 0
  (test: diffusers_deis_repeats_its_last_level).
- DPM-Solver++, DEIS: lower_order_final counts below 15 steps only. sfumato: always, where it is set
  (test: tables (20 steps)).
- DPM-Solver++ of order 3: second step by the midpoint rule. sfumato: as k-diffusion's; `solver`
  chooses (test: tables).
- flow multistep solvers: DPM-Solver++ begins at 0.999, UniPC at 1 - 1e-6. sfumato: at 1 (test:
  flow_multistep).
- consistency models end at sigma_min. sfumato: at 0 (test: consistency_models).
- ScoreSdeVe: noise after the last step. sfumato: the last step is its mean (test: score_sde_ve).

Without a counterpart here: clipping and thresholding, variance_type "learned" ("learned_range" is
in test_learned_variance.py), invert_sigmas, shift_terminal (give the times), sde-dpmsolver (not
++), SDE singlestep solvers, multistep dpmsolver (not ++), UniPC's predict_x0=False and solver_p,
SASolver, IPNDM, RePaint. KDPM2Ancestral and DPMSolverSDE (but for its Brownian path) are compared
in test_scheduler_configs.py.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import diffusers as _diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.schedulers import DOUBLE, float64_schedulers, noise_draws, step_sampler, step_scheduler
from sfumato.diffuse.parameterization import edm as edm_parameterization
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.run import run_sampler
from sfumato.diffuse.samplers.consistency import consistency
from sfumato.diffuse.samplers.ddim import ddim
from sfumato.diffuse.samplers.ddim_inversion import ddim_inversion
from sfumato.diffuse.samplers.ddpm import ddpm
from sfumato.diffuse.samplers.deis import deis
from sfumato.diffuse.samplers.dpm_solver_2 import dpm_solver_2
from sfumato.diffuse.samplers.dpm_solver_3 import dpm_solver_3
from sfumato.diffuse.samplers.dpmpp_2m import dpmpp_2m
from sfumato.diffuse.samplers.dpmpp_2m_sde import dpmpp_2m_sde
from sfumato.diffuse.samplers.dpmpp_2s import dpmpp_2s
from sfumato.diffuse.samplers.dpmpp_3m import dpmpp_3m as whole_3m
from sfumato.diffuse.samplers.dpmpp_3m_sde import dpmpp_3m_sde as whole_3m_sde
from sfumato.diffuse.samplers.euler import euler
from sfumato.diffuse.samplers.euler_ancestral import euler_ancestral
from sfumato.diffuse.samplers.heun import heun
from sfumato.diffuse.samplers.lcm import lcm
from sfumato.diffuse.samplers.lms import lms
from sfumato.diffuse.samplers.plms import plms
from sfumato.diffuse.samplers.pndm import pndm
from sfumato.diffuse.samplers.tcd import tcd
from sfumato.diffuse.samplers.unipc import unipc
from sfumato.diffuse.schedule import Schedule, schedule, table
from sfumato.diffuse.schedule_transforms import ZeroTerminalSNR, shifted_time
from sfumato.diffuse.timesteps import timesteps
from sfumato.errors import UserError
from sfumato.types import Prediction

# diffusers leaves out half of the quadratic term, and with it an order; sfumato by an option.
dpmpp_3m = partial(whole_3m, published=True)
dpmpp_3m_sde = partial(whole_3m_sde, published=True)

# of diffusers: numpy's copy, names to come
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

diffusers: Any = _diffusers  # its names are made at run time


def network(x: Tensor, timestep: float) -> Tensor:
    """A network's stand-in: smooth, nonlinear, and different at every timestep."""
    return 0.8 * torch.tanh(1.2 * x + math.sin(timestep / 150 + 1)) + 0.1 * x.roll(1, -1)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """diffusers' scheduler classes by name, in float64 and with the noise of `noise_draws()`."""
    with float64_schedulers(monkeypatch) as schedulers:
        yield schedulers


def sfumato_run(
    sampler: Any,
    process: Process,
    times: Sequence[float],
    start: Tensor,
    at: Sequence[float] | None = None,
    **options: Any,
) -> tuple[list[Tensor], list[float]]:
    """Inputs of the network, then the final latents of sfumato; and the timesteps of the calls.

    The timesteps are those of `at`, if any.
    """
    return step_sampler(sampler, process, times, network, start, at, **options)


def diffusers_run(
    scheduler: Any, start: Tensor, last: float = 1.0, **options: Any
) -> tuple[list[Tensor], list[float]]:
    """Inputs, final latents and timesteps of diffusers.

    `last` takes the result to sfumato's coordinates: alpha at the end, for schedulers that work in
    x/alpha.
    """
    *shown, x = step_scheduler(scheduler, network, start, **options)
    return [*shown, x * last], scheduler.timesteps.tolist()


def difference(actual: list[Tensor], reference: list[Tensor]) -> float:
    """The largest difference of any latent, relative to its size."""
    assert len(actual) == len(reference)
    # NaN if any is
    return float(
        torch.stack(
            [(a - b).norm() / b.norm() for a, b in zip(actual, reference, strict=True)]
        ).max()
    )


# ---- schedulers that have a table ----------------------------------------------------------------

TABLES: dict[str, tuple[dict[str, Any], Schedule]] = {
    "linear": (
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        schedule("linear"),
    ),
    "scaled_linear": (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        schedule("scaled_linear"),
    ),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, schedule("cosine")),
    # only DDPM's has it
    "sigmoid": (
        {"beta_schedule": "sigmoid", "beta_start": 0.0001, "beta_end": 0.02},
        schedule("sigmoid"),
    ),
    "trained": (
        {"trained_betas": [0.001 + 0.00001 * i for i in range(1000)]},
        table([0.001 + 0.00001 * i for i in range(1000)]),
    ),
}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
NEVER_CLIP = ("DDIM", "DDPM", "DDIMInverse", "LCM", "TCD", "HeunDiscrete")


@dataclass(frozen=True)
class Case:
    """A scheduler of diffusers with its options, and sfumato's call for the same run.

    end              where the run ends, for schedulers that do not go to t = 0
    again            diffusers evaluates the network once more at the end, for a step of no length
    sfumato_steps    sfumato's number of steps, where diffusers counts network calls
    whole_timesteps  diffusers rounds the network's timestep to a whole one, which is not that of
                     its noise level: sfumato's network then takes the same
    scaled           diffusers' latents are x/alpha
    """

    scheduler_name: str
    sampler: Any
    spacing: str = "trailing"
    config: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    steps: int = 10
    sfumato_steps: int = 0
    end: float = 0.0
    again: bool = False
    whole_timesteps: bool = False
    scaled: bool = False
    predictions: tuple[str, ...] = tuple(PREDICTIONS)

    def __str__(self) -> str:
        options = {**self.config, **self.step, "end": self.end, "steps": self.steps}
        return f"{self.scheduler_name}-{self.spacing}-" + ",".join(
            f"{k}={v}" for k, v in options.items() if v not in (0.0, False, 10)
        )

    def scheduler(self, output: Any, kind: str, prediction: str) -> Any:
        values = {
            "num_train_timesteps": 1000,
            **TABLES[kind][0],
            "prediction_type": prediction,
            **self.config,
        }
        if self.scheduler_name in NEVER_CLIP:
            values["clip_sample"] = False
        made = output(**values)
        made.set_timesteps(self.steps)
        return made

    def times(self, chosen: Schedule) -> list[float]:
        output = timesteps(self.spacing, self.sfumato_steps or self.steps, chosen, **self.space)
        return output if self.end == 0 else [t for t in output if t > self.end] + [self.end]


def at(timestep: float) -> float:
    """The time of a timestep in a table of 1000."""
    return (timestep + 1) / 1000


TRAILING, LEADING = {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading"}
LINSPACE, SD = {"timestep_spacing": "linspace"}, {"timestep_spacing": "leading", "steps_offset": 1}
WHOLE: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("trailing", TRAILING, {"whole": True}, {}),
    ("leading", LEADING, {}, {}),
    ("leading", SD, {"offset": 1}, {}),
    ("linspace", LINSPACE, {}, {}),
]
"""Spacings by time: (sfumato's spacing, fields of the scheduler's config, options, more)."""

MULTISTEP: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("trailing", TRAILING, {"whole": True}, {}),
    ("leading", LEADING, {"drop_last": True}, {}),
    ("leading", SD, {"offset": 1, "drop_last": True}, {}),
    ("linspace", LINSPACE, {"drop_last": True}, {}),
    ("karras", {"use_karras_sigmas": True}, {}, {"whole_timesteps": True}),
    ("exponential", {"use_exponential_sigmas": True}, {}, {"whole_timesteps": True}),
    ("beta", {"use_beta_sigmas": True}, {"over": "noise"}, {"whole_timesteps": True}),
]
SIGMAS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    *WHOLE,
    ("karras", {"use_karras_sigmas": True, **LINSPACE}, {}, {}),
    ("exponential", {"use_exponential_sigmas": True, **LINSPACE}, {}, {}),
    ("beta", {"use_beta_sigmas": True, **LINSPACE}, {"over": "noise"}, {}),
    # By noise level between the ends of another spacing: as in the configs of SDXL and Stable Video
    # Diffusion.
    ("karras", {"use_karras_sigmas": True, **SD}, {"start": at(901), "end": at(1)}, {}),
    ("karras", {"use_karras_sigmas": True, **TRAILING}, {"end": at(99)}, {}),
    ("exponential", {"use_exponential_sigmas": True, **SD}, {"start": at(901), "end": at(1)}, {}),
    ("beta", {"use_beta_sigmas": True, **TRAILING}, {"over": "noise", "end": at(99)}, {}),
]


def cases(
    spacings: Sequence[Any],
    scheduler_name: str,
    sampler: Any,
    config: dict[str, Any] | None = None,
    **rest: Any,
) -> list[Case]:
    """One case a spacing."""
    return [
        replace(
            Case(scheduler_name, sampler, spacing, {**(config or {}), **fields}, space, **rest),
            **more,
        )
        for spacing, fields, space, more in spacings
    ]


OUT: dict[str, Any] = {"predictions": ("epsilon", "v_prediction")}
EPS: dict[str, Any] = {"predictions": ("epsilon",)}
CASES: list[Case] = [
    *cases(WHOLE, "DDPM", ddpm),
    *cases(WHOLE[:1], "DDPM", ddpm, steps=7),
    # that end at timestep 0
    *cases(
        [WHOLE[1], WHOLE[3]],
        "DDPM",
        ddpm,
        {"variance_type": "fixed_large"},
        options={"variance": "large"},
    ),
    *(
        case
        for eta in (0.0, 0.5, 1.0)
        for case in cases(WHOLE[:3], "DDIM", ddim, step={"eta": eta}, options={"eta": eta})
    ),
    *cases(WHOLE[2:3], "DDIM", ddim, {"set_alpha_to_one": False}, end=at(0)),
    *cases(WHOLE[1:2], "DDIM", ddim, {"set_alpha_to_one": False}, end=at(0), again=True),
    *cases(WHOLE[1:3], "DDIM", ddim, steps=7),
    *cases(WHOLE[:3], "PNDM", pndm, {"set_alpha_to_one": True}, **EPS),
    *cases(WHOLE[:3], "PNDM", plms, {"set_alpha_to_one": True, "skip_prk_steps": True}, **EPS),
    # Stable Diffusion 1's
    *cases(
        WHOLE[2:3],
        "PNDM",
        plms,
        {"set_alpha_to_one": False, "skip_prk_steps": True},
        end=at(0),
        **EPS,
    ),
    *cases(WHOLE[2:3], "PNDM", pndm, {"set_alpha_to_one": False}, end=at(0), **EPS),
    *cases(
        WHOLE[1:2],
        "PNDM",
        plms,
        {"set_alpha_to_one": False, "skip_prk_steps": True},
        end=at(0),
        again=True,
        **EPS,
    ),
    *cases(SIGMAS, "EulerDiscrete", euler, scaled=True),
    *cases(
        WHOLE[:1],
        "EulerDiscrete",
        euler,
        {"final_sigmas_type": "sigma_min"},
        end=at(0),
        scaled=True,
    ),
    *cases(WHOLE, "EulerAncestralDiscrete", euler_ancestral, scaled=True, **OUT),
    *cases(SIGMAS, "HeunDiscrete", heun, scaled=True),
    *cases(SIGMAS, "LMSDiscrete", lms, scaled=True),
    *cases(WHOLE[:1], "LMSDiscrete", lms, step={"order": 2}, options={"order": 2}, scaled=True),
    *cases(WHOLE, "KDPM2Discrete", dpm_solver_2, scaled=True, **OUT),
    *cases(SIGMAS[4:8], "KDPM2Discrete", dpm_solver_2, scaled=True, whole_timesteps=True, **OUT),
    *cases(MULTISTEP, "DPMSolverMultistep", dpmpp_2m),
    *cases(MULTISTEP[:5], "DPMSolverMultistep", dpmpp_2m, {"lower_order_final": False}, steps=12),
    *cases(
        MULTISTEP,
        "DPMSolverMultistep",
        dpmpp_3m,
        {"solver_order": 3},
        options={"solver": "midpoint", "lower_order_final": True},
    ),
    *cases(
        MULTISTEP,
        "DPMSolverMultistep",
        dpmpp_3m,
        {"solver_order": 3, "lower_order_final": False},
        options={"solver": "midpoint"},
    ),
    *cases(
        MULTISTEP,
        "DPMSolverMultistep",
        dpmpp_3m,
        {"solver_order": 3, "solver_type": "heun"},
        options={"lower_order_final": True},
    ),
    # from 15 steps on diffusers lowers nothing but the step to 0
    *cases(
        MULTISTEP[:1],
        "DPMSolverMultistep",
        dpmpp_3m,
        {"solver_order": 3},
        options={"solver": "midpoint"},
        steps=20,
    ),
    *cases(MULTISTEP, "DPMSolverMultistep", dpmpp_2m_sde, {"algorithm_type": "sde-dpmsolver++"}),
    *cases(
        MULTISTEP[:5],
        "DPMSolverMultistep",
        dpmpp_2m_sde,
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        options={"solver": "heun"},
    ),
    *cases(MULTISTEP[:1], "DPMSolverMultistep", ddim, {"solver_order": 1}),
    *cases(
        MULTISTEP[:1],
        "DPMSolverMultistep",
        dpmpp_2m_sde,
        {"solver_type": "heun"},
        options={"eta": 0.0, "solver": "heun"},
    ),
    Case("DPMSolverMultistep", dpmpp_2m, "log_snr", {"use_lu_lambdas": True}, whole_timesteps=True),
    *(
        case
        for final in (True, False)
        for order, sampler, options in ((2, dpmpp_2m, {}), (3, dpmpp_3m, {"solver": "midpoint"}))
        for case in cases(
            MULTISTEP[:4],
            "DPMSolverMultistep",
            sampler,
            {"final_sigmas_type": "sigma_min", "lower_order_final": final, "solver_order": order},
            options={**options, "lower_order_final": final},
            end=at(0),
        )
    ),
    # diffusers counts calls: a step of two has its middle at the level between, which is half-way
    # in log-SNR where levels are in equal ratios.
    Case(
        "DPMSolverSinglestep",
        dpmpp_2s,
        "exponential",
        {"use_exponential_sigmas": True},
        steps=9,
        sfumato_steps=5,
        whole_timesteps=True,
    ),
    Case(
        "DPMSolverSinglestep",
        dpm_solver_2,
        "exponential",
        {
            "use_exponential_sigmas": True,
            "algorithm_type": "dpmsolver",
            "final_sigmas_type": "sigma_min",
        },
        steps=9,
        sfumato_steps=5,
        end=at(0),
        again=True,
        whole_timesteps=True,
    ),
    Case("DPMSolverSinglestep", ddim, "linspace", {"solver_order": 1}, {"drop_last": True}),
    *(
        case
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2")
        for case in cases(
            MULTISTEP[:4],
            "UniPCMultistep",
            unipc,
            {"solver_order": order, "solver_type": kind, "final_sigmas_type": "sigma_min"},
            options={"order": order, "variant": kind},
            end=at(0),
        )
    ),
    *(
        case
        for order in (1, 2, 3)
        for case in cases(
            MULTISTEP, "UniPCMultistep", unipc, {"solver_order": order}, options={"order": order}
        )
    ),
    *cases(
        MULTISTEP[:4],
        "UniPCMultistep",
        unipc,
        {"disable_corrector": list(range(20))},
        options={"corrector": False},
    ),
    *(
        case
        for order in (1, 2, 3)
        for case in cases(
            MULTISTEP[:4],
            "DEISMultistep",
            deis,
            {"solver_order": order},
            options={"order": order},
            end=at(0),
        )
    ),
    *(
        case
        for order in (1, 2, 3)
        for case in cases(
            MULTISTEP[4:],
            "DEISMultistep",
            deis,
            {"solver_order": order, "lower_order_final": False},
            options={"order": order, "lower_order_final": False},
            end=at(0),
            again=True,
        )
    ),
    *(Case("LCM", lcm, "lcm", steps=steps) for steps in (1, 4, 8)),
    *(
        Case("TCD", tcd, "lcm", step={"eta": eta}, options={"eta": eta}, steps=steps, end=at(0))
        for eta in (0.0, 0.3, 0.33)
        for steps in (1, 4, 8)
    ),
]


def coordinates(case: Case, chosen: Schedule, times: list[float]) -> tuple[Tensor, Tensor, float]:
    """The same start in the coordinates of sfumato and diffusers, and alpha at the end.

    It is 1 where diffusers does not work in x/alpha.
    """
    start, first, last = next(noise_draws(9)), chosen.point(times[0])[0], chosen.point(times[-1])[0]
    return start, start / first if case.scaled else start, last if case.scaled else 1.0


BY_NOISE = (heun, lms, plms, pndm, dpm_solver_2, deis)
"""Samplers that step by eps or by slopes of the noise level: from pure noise, as at cosine's end,
they do not do so here."""


def rotated() -> list[Any]:
    """Each case with one table and one prediction type, in turns; the first of each scheduler and
    sampler with all of them.
    """
    output, seen = [], set()
    for turn, case in enumerate(CASES):
        first = (case.scheduler_name, case.sampler) not in seen
        kinds = [kind for kind in TABLES if kind != "sigmoid" or case.scheduler_name == "DDPM"]
        seen.add((case.scheduler_name, case.sampler))
        for i in range(turn, turn + (len(kinds) if first else 1)):
            kind, prediction = kinds[i % len(kinds)], case.predictions[i % len(case.predictions)]
            if kind == "cosine" and (
                case.sampler in BY_NOISE or case.spacing in ("karras", "exponential", "beta", "lu")
            ):
                # levels of diffusers go up to 20,000 there, those of sfumato do not: see
                # diffusers_steps_from_nothing_overshoot
                kind = "linear"
            output.append(pytest.param(case, kind, prediction, id=f"{case}-{kind}-{prediction}"))
    return output


@pytest.mark.parametrize(("case", "kind", "prediction"), rotated())
def test_tables(case: Case, kind: str, prediction: str, double: Callable[[str], Any]) -> None:
    """Compare every latent and timestep that the network takes, and the result."""
    chosen = TABLES[kind][1]
    scheduler, times = (
        case.scheduler(double(case.scheduler_name + "Scheduler"), kind, prediction),
        case.times(chosen),
    )
    start, diffusers_start, last = coordinates(case, chosen, times)
    reference, reference_timesteps = diffusers_run(scheduler, diffusers_start, last, **case.step)
    if case.again:
        reference, reference_timesteps = [*reference[:-2], reference[-1]], reference_timesteps[:-1]
    process = Process(chosen, parameterization(PREDICTIONS[prediction]))
    actual, evaluated = sfumato_run(
        case.sampler,
        process,
        times,
        start,
        reference_timesteps if case.whole_timesteps else None,
        **case.options,
    )
    np.testing.assert_allclose(evaluated, reference_timesteps, atol=1e-6)
    assert difference(actual, reference) < 1e-9


def shipped() -> list[Any]:
    """One case a scheduler, sampler and kind of spacing."""
    output = {
        (case.scheduler_name, case.sampler, case.spacing): case
        for case in CASES
        if (case.steps, case.end) == (10, 0.0)
    }
    return [case for (_, _, spacing), case in output.items() if spacing in ("trailing", "karras")]


@pytest.mark.parametrize("case", shipped(), ids=str)
def test_as_shipped(case: Case) -> None:
    """The same in float32, as shipped: only rounding of tables, levels and latents is left."""
    # v, where a scheduler has it: in x0 eps's rounding is divided by alpha, 1/15 at the first step
    prediction = case.predictions[-1]
    scheduler = case.scheduler(
        getattr(diffusers, case.scheduler_name + "Scheduler"), "scaled_linear", prediction
    )
    noise, module = noise_draws(), sys.modules[type(scheduler).__module__]
    chosen = TABLES["scaled_linear"][1]
    times = case.times(chosen)
    start, diffusers_start, last = coordinates(case, chosen, times)
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda *_, **__: next(noise).float())
        reference, reference_timesteps = diffusers_run(
            scheduler, diffusers_start.float(), last, **case.step
        )
    process = Process(chosen, parameterization(PREDICTIONS[prediction]))
    actual, _ = sfumato_run(
        case.sampler, process, times, start, reference_timesteps, **case.options
    )
    assert difference(actual, reference) < 1e-5


# ---- zero terminal SNR ---------------------------------------------------------------------------


def zero_snr(
    name: str,
    double: Callable[[str], Any],
    prediction: str = "v_prediction",
    kind: str = "scaled_linear",
    **options: Any,
) -> Any:
    """A scheduler of diffusers with rescale_betas_zero_snr and ten trailing steps."""
    clip = {"clip_sample": False} if name in NEVER_CLIP else {}
    values = {
        **TABLES[kind][0],
        "prediction_type": prediction,
        "rescale_betas_zero_snr": True,
        **TRAILING,
        **clip,
        **options,
    }
    made = double(name + "Scheduler")(**values)
    made.set_timesteps(10 if name not in ("LCM", "TCD") else 5)
    return made


EXACT = [("DDIM", ddim, 0.0), ("DDPM", ddpm, 0.0), ("LCM", lcm, 0.0), ("TCD", tcd, at(0))]


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize(("name", "sampler", "end"), EXACT, ids=[name for name, _, _ in EXACT])
def test_zero_terminal_snr(
    name: str, sampler: Any, end: float, kind: str, double: Callable[[str], Any]
) -> None:
    """alpha is exactly 0 at t = 1."""
    chosen = ZeroTerminalSNR(TABLES[kind][1])
    times = Case(
        name,
        sampler,
        "lcm" if name in ("LCM", "TCD") else "trailing",
        steps=5 if name in ("LCM", "TCD") else 10,
        end=end,
    ).times(chosen)
    for prediction in ("sample", "v_prediction"):
        start = next(noise_draws(9))
        reference, reference_timesteps = diffusers_run(
            zero_snr(name, double, prediction, kind), start
        )
        actual, evaluated = sfumato_run(
            sampler, Process(chosen, parameterization(PREDICTIONS[prediction])), times, start
        )
        np.testing.assert_allclose(evaluated, reference_timesteps, atol=1e-6)
        assert difference(actual, reference) < 1e-9


NEARLY = [
    ("EulerDiscrete", euler, {}),
    ("EulerAncestralDiscrete", euler_ancestral, {}),
    ("DPMSolverMultistep", dpmpp_2m, {}),
    ("UniPCMultistep", unipc, {}),
]


@pytest.mark.parametrize(
    ("name", "sampler", "options"), NEARLY, ids=[name for name, _, _ in NEARLY]
)
def test_nearly_zero_terminal_snr(
    name: str, sampler: Any, options: dict[str, Any], double: Callable[[str], Any]
) -> None:
    """diffusers puts alpha^2 = 2^-24 at the end of a table that falls to 0.

    With the same betas sfumato makes the same latents. `ZeroTerminalSNR(last=2**-24)` draws the
    whole table out to 2^-24 instead, and is as smooth there as anywhere: alpha differs by 2^-12 at
    most, and the latents after the first steps by as little.
    """
    scheduler = zero_snr(name, double)
    products = scheduler.alphas_cumprod.tolist()
    same = table([1 - products[0], *(1 - b / a for a, b in pairwise(products))])
    scaled, start = name.startswith("Euler"), next(noise_draws(9))
    reference, reference_timesteps = diffusers_run(
        scheduler, start / same.point(1.0)[0] if scaled else start
    )
    times = timesteps("trailing", 10, same)
    actual, evaluated = sfumato_run(
        sampler, Process(same, parameterization("v")), times, start, **options
    )
    np.testing.assert_allclose(evaluated, reference_timesteps, atol=1e-6)
    assert difference(actual, reference) < 1e-9
    smooth = ZeroTerminalSNR(TABLES["scaled_linear"][1], last=2**-24)
    other, _ = sfumato_run(sampler, Process(smooth, parameterization("v")), times, start, **options)
    assert 1e-7 < difference(other, reference) < 2e-3


# ---- inversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("clean", [True, False])
def test_inversion(clean: bool, offset: int, double: Callable[[str], Any]) -> None:
    """From the clean latent up, or from timestep 0 (set_alpha_to_one=False)."""
    chosen = TABLES["scaled_linear"][1]
    options = {"steps_offset": offset, "set_alpha_to_one": clean, "clip_sample": False}
    scheduler = double("DDIMInverseScheduler")(**TABLES["scaled_linear"][0], **options)
    scheduler.set_timesteps(10)
    start = next(noise_draws(9))
    reference, reference_timesteps = diffusers_run(scheduler, start)
    times = [t for t in timesteps("leading", 10, chosen, offset=offset) if t > 0]
    if clean:
        times.append(0.0)
    elif offset:
        times.append(at(0))
    else:  # diffusers begins with a step of no length
        reference, reference_timesteps = reference[1:], reference_timesteps[1:]
    actual, evaluated = sfumato_run(
        ddim_inversion, Process(chosen, parameterization("eps")), times, start
    )
    np.testing.assert_allclose(evaluated, reference_timesteps, atol=1e-6)
    assert difference(actual, reference) < 1e-9


# ---- flows ---------------------------------------------------------------------------------------

FLOW = Process(schedule("flow"), parameterization("flow"))


def twice(shift: float) -> float:
    """The time at which flow schedulers of diffusers end by default: 0.001, shifted twice.

    It is shifted when they are built and again when the run is spaced.
    """
    return shifted_time(shifted_time(0.001, shift), shift)


FLOWS: dict[str, tuple[dict[str, Any], dict[str, Any], str, dict[str, Any]]] = {
    "plain": ({}, {}, "linspace", {}),
    "sd3": ({"shift": 3.0}, {}, "shifted", {"shift": 3.0, "end": twice(3.0)}),
    "flux": (
        {"use_dynamic_shifting": True},
        {"mu": 0.9, "sigmas": np.linspace(1, 1 / 10, 10)},
        "shifted",
        {"shift": math.exp(0.9)},
    ),
    "dynamic": (
        {"use_dynamic_shifting": True},
        {"mu": 0.9},
        "shifted",
        {"shift": math.exp(0.9), "end": shifted_time(0.001, math.exp(0.9))},
    ),
    "dynamic linear": (
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"mu": 2.5},
        "shifted",
        {"shift": 2.5, "end": shifted_time(0.001, 2.5)},
    ),
    "karras": ({"use_karras_sigmas": True}, {}, "karras", {}),
    "exponential": ({"use_exponential_sigmas": True}, {}, "exponential", {}),
    "beta": ({"use_beta_sigmas": True}, {}, "beta", {"over": "noise"}),
    "karras shifted": (
        {"use_karras_sigmas": True, "shift": 3.0},
        {},
        "karras",
        {"end": twice(3.0)},
    ),
    "even": ({}, {"sigmas": np.linspace(1, 1 / 10, 10)}, "trailing", {}),
}


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_euler(stochastic: bool, name: str, double: Callable[[str], Any]) -> None:
    """Euler's method and, for a stochastic scheduler, multistep consistency sampling."""
    config, spacing_options, spacing, space = FLOWS[name]
    scheduler = double("FlowMatchEulerDiscreteScheduler")(stochastic_sampling=stochastic, **config)
    scheduler.set_timesteps(10, **spacing_options)
    start = next(noise_draws(9))
    reference, reference_timesteps = flow_run(scheduler, start)
    actual, evaluated = sfumato_run(
        consistency if stochastic else euler,
        FLOW,
        timesteps(spacing, 10, FLOW.schedule, **space),
        start,
    )
    np.testing.assert_allclose(evaluated, reference_timesteps, atol=1e-6)
    assert difference(actual, reference) < 1e-9


def flow_run(scheduler: Any, start: Tensor) -> tuple[list[Tensor], list[float]]:
    """`diffusers_run` for schedulers that scale no input."""
    scheduler.scale_model_input = lambda x, timestep: x
    return diffusers_run(scheduler, start)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_heun(shift: float, double: Callable[[str], Any]) -> None:
    scheduler = double("FlowMatchHeunDiscreteScheduler")(shift=shift)
    scheduler.set_timesteps(8)
    start = next(noise_draws(9))
    reference, reference_timesteps = flow_run(scheduler, start)
    actual, evaluated = sfumato_run(
        heun, FLOW, timesteps("shifted", 8, FLOW.schedule, shift=shift, end=twice(shift)), start
    )
    np.testing.assert_allclose(evaluated, reference_timesteps, atol=1e-6)
    assert difference(actual, reference) < 1e-9


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_flow_multistep(order: int, shift: float, double: Callable[[str], Any]) -> None:
    """DPM-Solver++ begins at the time 0.999 shifted, UniPC at 1 - 1e-6.

    Networks of diffusers take whole timesteps, rounded down.
    """
    values = {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": shift,
        "solver_order": order,
    }
    start = next(noise_draws(9))
    scheduler = double("DPMSolverMultistepScheduler")(**values)
    scheduler.set_timesteps(10)
    reference, reference_timesteps = diffusers_run(scheduler, start)
    times = timesteps("shifted", 10, FLOW.schedule, start=shifted_time(0.999, shift), shift=shift)
    samplers: dict[int, tuple[Any, dict[str, Any]]] = {
        1: (euler, {}),
        2: (dpmpp_2m, {}),
        3: (dpmpp_3m, {"solver": "midpoint", "lower_order_final": True}),
    }
    sampler, options = samplers[order]
    actual, _ = sfumato_run(sampler, FLOW, times, start, reference_timesteps, **options)
    assert difference(actual, reference) < 1e-9
    assert reference_timesteps == [math.floor(1000 * t) for t in times[:-1]]

    scheduler = double("UniPCMultistepScheduler")(**values)
    scheduler.set_timesteps(10)
    reference, reference_timesteps = diffusers_run(scheduler, start)
    times = timesteps("shifted", 11, FLOW.schedule, shift=shift, end=shifted_time(0.001, shift))
    times = [1 - 1e-6, *times[1:10], 0.0]
    actual, _ = sfumato_run(unipc, FLOW, times, start, reference_timesteps, order=order)
    assert difference(actual, reference) < 1e-8
    assert reference_timesteps == [math.floor(1000 * t) for t in times[:-1]]


# ---- schedulers of noise levels ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["karras", "exponential"])
@pytest.mark.parametrize(
    ("name", "sampler", "config", "options"),
    [
        ("EDMEuler", euler, {}, {}),
        ("EDMDPMSolverMultistep", euler, {"solver_order": 1}, {}),
        ("EDMDPMSolverMultistep", dpmpp_2m, {}, {}),
        (
            "EDMDPMSolverMultistep",
            dpmpp_3m,
            {"solver_order": 3},
            {"solver": "midpoint", "lower_order_final": True},
        ),
        (
            "EDMDPMSolverMultistep",
            dpmpp_3m,
            {"solver_order": 3, "solver_type": "heun", "lower_order_final": False},
            {},
        ),
        ("EDMDPMSolverMultistep", dpmpp_2m_sde, {"algorithm_type": "sde-dpmsolver++"}, {}),
    ],
)
def test_edm(
    name: str,
    sampler: Any,
    config: dict[str, Any],
    options: dict[str, Any],
    kind: str,
    double: Callable[[str], Any],
) -> None:
    """Karras et al.'s preconditioning, with their standard deviation of the data."""
    process = Process(schedule("edm"), edm_parameterization(0.5))
    scheduler = double(name + "Scheduler")(sigma_schedule=kind, **config)
    scheduler.set_timesteps(10)
    start = 80 * next(noise_draws(9))
    reference, reference_timesteps = diffusers_run(scheduler, start)
    latents, evaluated = sfumato_run(
        sampler, process, timesteps(kind, 10, process.schedule), start, **options
    )
    np.testing.assert_allclose(evaluated, reference_timesteps, atol=1e-6)
    assert difference(latents, reference) < 1e-9


def test_score_sde_ve(double: Callable[[str], Any]) -> None:
    """The reverse SDE's predictor is DDPM's step with the larger variance, whose score is
    -eps/sigma. The corrector has no counterpart.
    """
    scheduler = double("ScoreSdeVeScheduler")(sigma_min=0.02, sigma_max=40.0)
    scheduler.set_timesteps(12)
    scheduler.set_sigmas(12)
    chosen = schedule("ve", sigma_min=0.02, sigma_max=40.0)
    times = timesteps("exponential", 12, chosen, end=chosen.at_noise_level(0.02))
    levels = [chosen.noise_level(t) for t in times]
    np.testing.assert_allclose(scheduler.discrete_sigmas.flip(0), levels[:-1], rtol=1e-9)
    x, reference, result = 40 * next(noise_draws(9)), [], None
    start = x
    for timestep, level in zip(scheduler.timesteps, levels, strict=False):
        reference.append(x)
        score = -network(x / 40, level) / level
        x, result = scheduler.step_pred(score, timestep, x, return_dict=False)
    # without the last noise, which the scheduler adds and its pipeline leaves out
    assert result is not None
    noise, actual = noise_draws(), []

    def denoise(x: Tensor, t: float) -> Any:
        actual.append(x)
        level = chosen.noise_level(t)
        return Process(chosen, parameterization("eps")).split(x, network(x / 40, level), t)

    end = run_sampler(
        ddpm(start, times, chosen, lambda: next(noise), variance="large"), denoise, 12
    )
    assert end is not None and difference([*actual, end], [*reference, result]) < 1e-9
    torch.testing.assert_close(
        x - result, 0.02 * [n for n, _ in zip(noise_draws(), range(12), strict=False)][-1]
    )


def test_consistency_models(double: Callable[[str], Any]) -> None:
    """diffusers ends at sigma_min, sfumato at 0.

    diffusers adds sqrt(sigma^2 - sigma_min^2) of noise (Song et al. 2023, algorithm 1), sfumato
    sigma. With times at the levels of that noise, and with the same timesteps for the network, the
    latents are the same.
    """
    scheduler = double("CMStochasticIterativeScheduler")(clip_denoised=False)
    scheduler.set_timesteps(4)
    start = 80 * next(noise_draws(9))
    reference, reference_timesteps = diffusers_run(scheduler, start)
    chosen, levels = schedule("edm"), scheduler.sigmas.tolist()
    times = [
        chosen.at_noise_level(level)
        for level in (levels[0], *(math.sqrt(s**2 - 0.002**2) for s in levels[1:]))
    ]
    noise, shown = noise_draws(), []

    def denoise(x: Tensor, t: float) -> Any:
        sigma, timestep = levels[len(shown)], reference_timesteps[len(shown)]
        shown.append(x / math.hypot(sigma, 0.5))
        skip, out = (
            0.25 / ((sigma - 0.002) ** 2 + 0.25),
            (sigma - 0.002) * 0.5 / math.hypot(sigma, 0.5),
        )
        x0 = skip * x + out * network(shown[-1], timestep)
        return Prediction(x0, (x - x0) / chosen.noise_level(t))

    result = run_sampler(consistency(start, times, chosen, lambda: next(noise)), denoise, 4)
    assert result is not None and times[-1] == 0
    assert difference([*shown, result], reference) < 1e-9


# ---- which times ---------------------------------------------------------------------------------

COUNTS = [1, 2, 3, 4, 5, 7, 10, 20, 25, 28, 30, 50, 99, 100, 250, 333, 500, 600, 999, 1000]


def diffusers_timesteps(name: str, steps: int, **options: Any) -> np.ndarray:
    made = getattr(diffusers, name + "Scheduler")(**options)
    made.set_timesteps(steps)
    return made.timesteps.numpy()


def sfumato_timesteps(spacing: str, steps: int, **options: Any) -> np.ndarray:
    chosen = TABLES["linear"][1]
    return chosen.timestep(
        torch.tensor(timesteps(spacing, steps, chosen, **options)[:-1], dtype=DOUBLE)
    ).numpy()


@pytest.mark.parametrize("steps", COUNTS)
def test_trailing_timesteps(steps: int) -> None:
    """diffusers rounds to whole timesteps, sfumato with `whole=True` only.

    Its schedule is continuous.
    """
    reference = diffusers_timesteps("DDIM", steps, **TRAILING)
    np.testing.assert_allclose(
        sfumato_timesteps("trailing", steps, whole=True), reference, atol=1e-9
    )
    np.testing.assert_allclose(
        sfumato_timesteps("trailing", steps),
        reference,
        atol=1e-9 if 1000 % steps == 0 else 0.5 + 1e-9,
    )


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("offset", [0, 1])
def test_leading_timesteps(steps: int, offset: int) -> None:
    """An offset beyond the table is refused.

    That is timestep 1000 with 1000 steps and offset 1 (issue 10003).
    """
    reference = diffusers_timesteps("DDIM", steps, steps_offset=offset, **LEADING)
    if reference.max() > 999:
        with pytest.raises(UserError, match="has no 1000 different times"):
            sfumato_timesteps("leading", steps, offset=offset)
    else:
        np.testing.assert_allclose(
            sfumato_timesteps("leading", steps, offset=offset), reference, atol=1e-9
        )
    if steps + 1 + offset <= 1000:
        reference = diffusers_timesteps("DPMSolverMultistep", steps, steps_offset=offset, **LEADING)
        np.testing.assert_allclose(
            sfumato_timesteps("leading", steps, offset=offset, drop_last=True), reference, atol=1e-9
        )


@pytest.mark.parametrize("steps", COUNTS)
def test_linspace_timesteps(steps: int) -> None:
    """A single step begins at timestep 0 in diffusers, at the full noise in sfumato.

    There is nothing left to remove at timestep 0.
    """
    actual, reference = (
        sfumato_timesteps("linspace", steps),
        diffusers_timesteps("DDIM", steps, **LINSPACE),
    )
    if steps == 1:
        assert (actual, reference) == ([999], [0])
    else:
        np.testing.assert_allclose(actual, reference, atol=1e-9)
        np.testing.assert_allclose(
            sfumato_timesteps("linspace", steps, whole=False),
            diffusers_timesteps("EulerDiscrete", steps),
            atol=1e-4,
        )
    if steps < 1000:
        np.testing.assert_allclose(
            sfumato_timesteps("linspace", steps, drop_last=True),
            diffusers_timesteps("DPMSolverMultistep", steps),
            atol=1e-9,
        )


def test_halves_are_rounded_alike() -> None:
    """A timestep falls between two whole ones at a third of all numbers of steps.

    Both libraries round it to the same.
    """
    chosen, expected = TABLES["linear"][1], diffusers.DPMSolverMultistepScheduler()
    for steps in range(1, 1000, 3):
        expected.set_timesteps(steps)
        actual = np.array(timesteps("linspace", steps, chosen, drop_last=True)[:-1]) * 1000 - 1
        np.testing.assert_allclose(actual, expected.timesteps, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
@pytest.mark.parametrize("steps", [2, 3, 9, 30])
def test_noise_levels(steps: int, kind: str, double: Callable[[str], Any]) -> None:
    """Karras et al.'s, exponential and beta levels, and their timesteps, at more steps."""
    chosen = TABLES[kind][1]
    levels: dict[str, dict[str, Any]] = {"karras": {}, "exponential": {}, "beta": {"over": "noise"}}
    for spacing, options in levels.items():
        scheduler = double("EulerDiscreteScheduler")(
            **TABLES[kind][0], **{f"use_{spacing}_sigmas": True}
        )
        scheduler.set_timesteps(steps)
        times = timesteps(spacing, steps, chosen, **options)
        np.testing.assert_allclose(
            [chosen.noise_level(t) for t in times], scheduler.sigmas, rtol=1e-8
        )
        np.testing.assert_allclose(
            chosen.timestep(torch.tensor(times[:-1], dtype=DOUBLE)), scheduler.timesteps, atol=1e-6
        )


# ---- differences: each test fails when diffusers changes -----------------------------------------

SD_TABLE, SCALED = TABLES["scaled_linear"]


def first_step(scheduler: Any, start: Tensor) -> Tensor:
    timestep = scheduler.timesteps[0]
    return scheduler.step(
        network(scheduler.scale_model_input(start, timestep), float(timestep)), timestep, start
    ).prev_sample


@pytest.mark.parametrize("name", ["DDIM", "PNDM"])
def test_diffusers_steps_by_a_fixed_stride(name: str, double: Callable[[str], Any]) -> None:
    """From 999 diffusers goes to 999 - 100 and calls it 888.

    The timesteps are spaced evenly, the steps as for "leading".
    """
    clip = {"clip_sample": False} if name == "DDIM" else {"skip_prk_steps": True}
    scheduler, start = (
        double(name + "Scheduler")(**SD_TABLE, **LINSPACE, **clip),
        next(noise_draws(9)),
    )
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[:2].tolist() == [999, 888]
    process = Process(SCALED, parameterization("eps"))
    to = {
        timestep: sfumato_run(ddim, process, [1.0, at(timestep)], start)[0][-1]
        for timestep in (899, 888)
    }
    reference = first_step(scheduler, start)
    assert difference([to[899]], [reference]) < 1e-9 and difference([to[888]], [reference]) > 1e-2


@pytest.mark.parametrize(
    ("spacing", "config", "space"), [("trailing", TRAILING, {}), ("leading", SD, {"offset": 1})]
)
def test_diffusers_leaves_noise_at_the_end(
    spacing: str, config: Any, space: Any, double: Callable[[str], Any]
) -> None:
    """DDPM's larger variance is added in the last step too if that begins above timestep 0, and
    nothing is left to remove it.
    """
    case = Case("DDPM", ddpm, spacing, {"variance_type": "fixed_large", **config}, space)
    scheduler = case.scheduler(double("DDPMScheduler"), "scaled_linear", "v_prediction")
    start, times = next(noise_draws(9)), case.times(SCALED)
    reference, _ = diffusers_run(scheduler, start)
    actual, _ = sfumato_run(
        ddpm, Process(SCALED, parameterization("v")), times, start, variance="large"
    )
    assert difference(actual[:-1], reference[:-1]) < 1e-9
    last = [noise for noise, _ in zip(noise_draws(), range(10), strict=False)][-1]
    torch.testing.assert_close(reference[-1] - actual[-1], SCALED.point(times[-2])[1] * last)


@pytest.mark.parametrize("name", ["EulerDiscrete", "HeunDiscrete", "LMSDiscrete"])
def test_diffusers_interpolates_sigma_between_timesteps(
    name: str, double: Callable[[str], Any]
) -> None:
    """sfumato is linear in log-SNR, like diffusers' own way back from sigma to timesteps.

    At the levels of diffusers it makes the same latents.
    """
    scheduler = double(name + "Scheduler")(**SD_TABLE)
    scheduler.set_timesteps(8)
    times = timesteps("linspace", 8, SCALED, whole=False)
    reference_timesteps = list(dict.fromkeys(scheduler.timesteps.tolist()))
    np.testing.assert_allclose(
        SCALED.timestep(torch.tensor(times[:-1], dtype=DOUBLE)), reference_timesteps, atol=1e-9
    )
    sigmas = list(dict.fromkeys(scheduler.sigmas.tolist()))
    apart = np.abs(np.array([SCALED.noise_level(t) for t in times[:-1]]) / sigmas[:-1] - 1)
    assert 1e-7 < apart.max() < 1e-3
    start, process = next(noise_draws(9)), Process(SCALED, parameterization("eps"))
    same = [1.0, *(SCALED.at_noise_level(sigma) for sigma in sigmas[1:])]
    reference, reference_timesteps = diffusers_run(scheduler, start / SCALED.point(1.0)[0])
    actual, _ = sfumato_run(
        {"E": euler, "H": heun, "L": lms}[name[0]], process, same, start, reference_timesteps
    )
    assert difference(actual, reference) < 1e-9


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"])
def test_networks_of_diffusers_take_whole_timesteps(
    name: str, double: Callable[[str], Any]
) -> None:
    """By noise level, the timestep of the network is not that of the latents.

    It is the nearest whole one (Karras) or the one below (others).
    """
    for spacing, rounded in (("karras", np.round), ("exponential", np.floor)):
        scheduler = double(name + "Scheduler")(**SD_TABLE, **{f"use_{spacing}_sigmas": True})
        scheduler.set_timesteps(10)
        exact = SCALED.timestep(
            torch.tensor(timesteps(spacing, 10, SCALED)[:-1], dtype=DOUBLE)
        ).numpy()
        assert (
            scheduler.timesteps.tolist() == rounded(exact + 1e-9).tolist()
            and np.abs(exact - rounded(exact)).max() > 0.2
        )


@pytest.mark.parametrize(("name", "sampler"), [("HeunDiscrete", heun), ("PNDM", pndm)])
def test_diffusers_steps_from_nothing_overshoot(name: str, sampler: Callable[..., Any]) -> None:
    """Unit data, whose exact x0 is alpha x: the result should stay near 1.

    At cosine's end alpha is 5e-5.
    """
    chosen, steps = TABLES["cosine"][1], 20
    scheduler = getattr(diffusers, name + "Scheduler")(
        **TABLES["cosine"][0], **TRAILING, prediction_type="epsilon"
    )
    scheduler.set_timesteps(steps)
    x = start = next(noise_draws(9)).float()
    x = x * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, timestep)
        _, sigma = chosen.point((float(timestep) + 1) / 1000)
        x = scheduler.step(sigma * shown, timestep, x).prev_sample
    process = Process(chosen, parameterization("v"))

    def exact(x: Tensor, t: float) -> Prediction:
        alpha, sigma = process.schedule.point(t)
        return Prediction(alpha * x, sigma * x)

    actual = run_sampler(
        sampler(start, timesteps("trailing", steps, chosen), chosen, lambda: start), exact, 1
    )
    assert actual is not None and float(actual.abs().max()) < 1.5 * float(
        start.abs().max()
    ) < 0.4 * float(x.abs().max())


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "DEISMultistep"])
def test_diffusers_whole_timesteps_collide(name: str) -> None:
    """Issue 12771: the first level is looked up by its timestep, and where two have the same the
    second is taken.
    """
    scheduler = getattr(diffusers, name + "Scheduler")(
        beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True
    )
    scheduler.set_timesteps(20)
    assert len(set(scheduler.timesteps.tolist())) < 20
    with pytest.raises(IndexError, match="out of bounds"):
        diffusers_run(scheduler, next(noise_draws(9)).float())
    assert len(set(timesteps("karras", 20, TABLES["cosine"][1]))) == 21


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep"])
def test_diffusers_trailing_steps_are_summed_in_floating_point(name: str) -> None:
    """np.arange with a step of 1000/61 runs one too far, to timestep -1; with 1000/48 four
    timesteps are rounded the other way.
    """
    assert diffusers_timesteps(name, 61, **TRAILING)[-2:].tolist() == [15, -1]
    assert sfumato_timesteps("trailing", 61, whole=True)[-1] == pytest.approx(15)
    apart = sfumato_timesteps("trailing", 48, whole=True) - diffusers_timesteps(
        name, 48, **TRAILING
    )
    assert np.count_nonzero(apart.round()) == 4 and np.abs(apart).max() == pytest.approx(1)


def test_diffusers_third_order_sde_has_a_sign_wrong(double: Callable[[str], Any]) -> None:
    """diffusers subtracts half of a term that k-diffusion adds.

    The second difference weighs alpha ((1 - e^-2h - 2h)/(2h)^2 + 1/2), as at eta 0; diffusers
    subtracts the half.
    """
    case = Case(
        "DPMSolverMultistep",
        dpmpp_3m_sde,
        config={**TRAILING, "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    )
    scheduler = case.scheduler(double("DPMSolverMultistepScheduler"), "scaled_linear", "sample")
    times, start = timesteps("trailing", 10, SCALED), next(noise_draws(9))
    reference, reference_timesteps = diffusers_run(scheduler, start)
    actual, _ = sfumato_run(
        dpmpp_3m_sde, Process(SCALED, parameterization("x0")), times, start, solver="midpoint"
    )
    assert difference(actual[:3], reference[:3]) < 1e-9
    x0 = [
        network(x, timestep) for x, timestep in zip(actual[:3], reference_timesteps, strict=False)
    ]
    at_log = [-math.log(SCALED.noise_level(t)) for t in times[:4]]
    h = [b - a for a, b in pairwise(at_log)]
    slopes = (x0[2] - x0[1]) * (h[2] / h[1]), (x0[1] - x0[0]) * (h[2] / h[0])
    second = (slopes[0] - slopes[1]) / ((h[1] + h[0]) / h[2])
    torch.testing.assert_close(actual[3] - reference[3], SCALED.point(times[3])[0] * second)


def test_diffusers_third_order_sde_of_edm_is_missing(double: Callable[[str], Any]) -> None:
    scheduler = double("EDMDPMSolverMultistepScheduler")(
        solver_order=3, algorithm_type="sde-dpmsolver++"
    )
    scheduler.set_timesteps(5)
    with pytest.raises(UnboundLocalError):
        diffusers_run(scheduler, next(noise_draws(9)))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"solver_type": "bh1"}, {"variant": "bh1"}),
        ({"lower_order_final": False}, {"lower_order_final": False}),
    ],
)
def test_diffusers_unipc_is_not_finite_at_zero(
    config: dict[str, Any], options: dict[str, Any], double: Callable[[str], Any]
) -> None:
    """At sigma 0 the step in log-SNR is infinite: inf times 0.

    So is B(h) = -h of "bh1", or the ratios to it of the second order. sfumato makes that step of
    first order, which is exact there.
    """
    scheduler = double("UniPCMultistepScheduler")(**SD_TABLE, **TRAILING, **config)
    scheduler.set_timesteps(10)
    start = next(noise_draws(9))
    reference, _ = diffusers_run(scheduler, start)
    latents, _ = sfumato_run(
        unipc,
        Process(SCALED, parameterization("eps")),
        timesteps("trailing", 10, SCALED),
        start,
        **options,
    )
    assert difference(latents[:-1], reference[:-1]) < 1e-9
    assert not bool(reference[-1].isfinite().any()) and bool(latents[-1].isfinite().all())


def test_diffusers_third_order_singlestep(double: Callable[[str], Any]) -> None:
    """The second point of diffusers is reached by the midpoint rule.

    The paper's (arXiv:2206.00927, algorithm 2) is by the rule of exponential integrators. Levels in
    equal ratios put it at 1/3 and 2/3 of a step in both. (3n - 1 steps ended in NaN until 0.33,
    issue 9007: no more.)
    """
    options = {"use_exponential_sigmas": True, "solver_order": 3}
    scheduler = double("DPMSolverSinglestepScheduler")(
        **SD_TABLE, **options, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(7)
    start = next(noise_draws(9))
    reference, reference_timesteps = diffusers_run(scheduler, start)
    times = [*timesteps("exponential", 3, SCALED)[:2], at(0)]
    process = Process(SCALED, parameterization("eps"))
    actual, _ = sfumato_run(dpm_solver_3, process, times, start, reference_timesteps)
    assert (
        difference(actual[:2], reference[:2])
        < 1e-9
        < 1e-2
        < difference(actual[2:3], reference[2:3])
    )
    midpoint, _ = sfumato_run(
        dpm_solver_2,
        process,
        [1.0, SCALED.at_noise_level(float(scheduler.sigmas[2]))],
        start,
        reference_timesteps,
    )
    assert difference(midpoint[2:], reference[2:3]) < 1e-9
    scheduler = double("DPMSolverSinglestepScheduler")(
        **SD_TABLE, solver_order=3, lower_order_final=True
    )
    scheduler.set_timesteps(11)
    assert bool(diffusers_run(scheduler, start)[0][-1].isfinite().all())


def test_diffusers_churn_comes_after_the_network(double: Callable[[str], Any]) -> None:
    """diffusers adds the noise of churn after the network call.

    Karras et al.'s algorithm 2 evaluates the network on the noisier latent, at its level.
    """
    scheduler = double("EulerDiscreteScheduler")(**SD_TABLE, **TRAILING)
    scheduler.set_timesteps(10)
    start, timestep = next(noise_draws(9)), scheduler.timesteps[0]
    sigma, after = float(scheduler.sigmas[0]), float(scheduler.sigmas[1])
    higher = sigma * math.sqrt(2)
    answer = network(scheduler.scale_model_input(start, timestep), 999)
    reference = scheduler.step(answer, timestep, start, s_churn=40.0).prev_sample
    noisy = start + next(noise_draws()) * math.sqrt(higher**2 - sigma**2)
    torch.testing.assert_close(reference, noisy + (after - higher) * answer)
    # and a v is read at the level that the latent no longer has
    scheduler = double("EulerDiscreteScheduler")(
        **SD_TABLE, **TRAILING, prediction_type="v_prediction"
    )
    scheduler.set_timesteps(10)
    scheduler.scale_model_input(start, timestep)
    reference = scheduler.step(answer, timestep, start, s_churn=40.0).prev_sample
    x0 = noisy / (sigma**2 + 1) - answer * sigma / math.sqrt(sigma**2 + 1)
    torch.testing.assert_close(reference, noisy + (after - higher) * (noisy - x0) / higher)


def test_diffusers_flows_are_shifted_twice(double: Callable[[str], Any]) -> None:
    """Issue 13243: the least time is shifted twice.

    It is shifted when the scheduler is built and again when a run is spaced. `end` gives sfumato
    the same time.
    """
    for name in ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"):
        scheduler = double(name + "Scheduler")(shift=3.0)
        assert float(scheduler.sigmas[-1]) == pytest.approx(shifted_time(0.001, 3.0))
        scheduler.set_timesteps(10)
        assert float(scheduler.sigmas[-2]) == pytest.approx(twice(3.0)) and twice(
            3.0
        ) > 2.9 * shifted_time(0.001, 3.0)


def test_eps_at_zero_terminal_snr(double: Callable[[str], Any]) -> None:
    """Issue 3851: diffusers divides by 0 and goes on; sfumato refuses such a process."""
    reference, _ = diffusers_run(zero_snr("DDIM", double, "epsilon"), next(noise_draws(9)))
    assert not bool(reference[1].isfinite().any())
    with pytest.raises(UserError, match="cannot be solved"):
        Process(ZeroTerminalSNR(SCALED), parameterization("eps"))


def test_diffusers_nearly_zero_snr_can_rise_again(double: Callable[[str], Any]) -> None:
    """The last level is quieter than the two before.

    With the linear betas the table falls below 2^-24 before its end, where diffusers puts 2^-24.
    The table of sfumato falls to the end.
    """
    scheduler = double("EulerDiscreteScheduler")(rescale_betas_zero_snr=True)
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    assert (
        float(levels[-1]) == pytest.approx(4096)
        and float(levels[-2]) > 15000
        and float(levels[-3]) > 7000
    )
    actual = ZeroTerminalSNR(TABLES["linear"][1], last=2**-24)
    assert actual.noise_level(1.0) == pytest.approx(4096) and actual.noise_level(at(998)) < 4096


@pytest.mark.parametrize("sampler", [plms, pndm])
def test_diffusers_pndm_reads_v_at_one_point(sampler: Any, double: Callable[[str], Any]) -> None:
    """diffusers turns a mean of v from several points into noise at one of them.

    It uses the coefficients and the latent of that one; sfumato turns each v at its own point.
    """
    case = Case(
        "PNDM",
        sampler,
        config={"set_alpha_to_one": True, "skip_prk_steps": sampler is plms, **TRAILING},
        space={"whole": True},
    )
    scheduler = case.scheduler(double("PNDMScheduler"), "scaled_linear", "v_prediction")
    start = next(noise_draws(9))
    reference, _ = diffusers_run(scheduler, start)
    actual, _ = sfumato_run(
        sampler, Process(SCALED, parameterization("v")), case.times(SCALED), start
    )
    assert (
        difference(actual[:2], reference[:2])
        < 1e-9
        < 1e-4
        < difference(actual[2:3], reference[2:3])
    )


def test_diffusers_inversion_reads_v_at_the_wrong_end(double: Callable[[str], Any]) -> None:
    """diffusers evaluates v at the target of a step and reads it at the origin.

    The network takes the timestep that the step goes to; its v is turned into noise with the
    coefficients of the timestep that the step comes from.
    """
    scheduler = double("DDIMInverseScheduler")(
        **SD_TABLE, prediction_type="v_prediction", clip_sample=False
    )
    scheduler.set_timesteps(10)
    x, timestep = next(noise_draws(9)), scheduler.timesteps[5]
    y, here, there = network(x, float(timestep)), SCALED.point(at(400)), SCALED.point(at(500))
    reference = scheduler.step(y, timestep, x).prev_sample
    torch.testing.assert_close(
        reference, there[0] * (here[0] * x - here[1] * y) + there[1] * (here[0] * y + here[1] * x)
    )
    actual, _ = sfumato_run(
        ddim_inversion, Process(SCALED, parameterization("v")), [at(500), at(400)], x
    )
    assert difference(actual[-1:], [reference]) > 1e-2


def test_diffusers_tcd_with_eta_one_keeps_the_least_noise(double: Callable[[str], Any]) -> None:
    """Each step of diffusers goes to timestep 0 before noise is added.

    sfumato goes to the clean latent: consistency sampling, as in the paper.
    """
    case = Case("TCD", tcd, "lcm", steps=4, end=at(0))
    scheduler = case.scheduler(double("TCDScheduler"), "scaled_linear", "v_prediction")
    start, process = next(noise_draws(9)), Process(SCALED, parameterization("v"))
    reference, _ = diffusers_run(scheduler, start, eta=1.0)
    actual, _ = sfumato_run(tcd, process, case.times(SCALED), start, eta=1.0)
    plain, _ = sfumato_run(consistency, process, [*case.times(SCALED)[:-1], 0.0], start)
    assert difference(actual[:-1], plain[:-1]) < 1e-12
    assert 1e-4 < difference(actual[:-1], reference[:-1]) < 0.05


@pytest.mark.parametrize(("config", "size"), [(TRAILING, 14.6), (LINSPACE, 14.6), (LEADING, 12.0)])
def test_diffusers_first_noise(config: dict[str, Any], size: float) -> None:
    """In x/alpha diffusers begins with noise of sigma or of sqrt(sigma^2 + 1).

    The first is for even spacings, the second for leading; sfumato always takes the second.
    """
    scheduler = diffusers.EulerDiscreteScheduler(**SD_TABLE, **config)
    scheduler.set_timesteps(10)
    sigma = float(scheduler.sigmas[0])
    assert sigma == pytest.approx(size, abs=4)
    reference = float(scheduler.init_noise_sigma) / math.sqrt(sigma**2 + 1)  # times alpha
    assert reference == pytest.approx(1 if config is LEADING else sigma / math.sqrt(sigma**2 + 1))


def test_diffusers_deis_repeats_its_last_level(double: Callable[[str], Any]) -> None:
    """By noise level, DEIS evaluates the least one twice, for a step of no length.

    It never goes to t = 0.
    """
    for config in ({"use_karras_sigmas": True}, {"use_exponential_sigmas": True}):
        scheduler = double("DEISMultistepScheduler")(**SD_TABLE, **config)
        scheduler.set_timesteps(10)
        assert (
            float(scheduler.sigmas[-1])
            == float(scheduler.sigmas[-2])
            == pytest.approx(SCALED.noise_level(at(0)))
        )
    scheduler = double("DEISMultistepScheduler")(**SD_TABLE)
    scheduler.set_timesteps(10)
    assert float(scheduler.sigmas[-1]) == pytest.approx(SCALED.noise_level(at(0)))
