"""Parity with k-diffusion (Katherine Crowson).

The same network, noise and noise levels give the same latents. The functions of k-diffusion take
sigma alone. The samplers of sfumato run in any (alpha, sigma) and are compared in its coordinates,
x/alpha at sigma/alpha, at every network call and at the end. All is in float64, which k-diffusion
keeps; its spacings begin in float32, where the tests put float64.

Differences:

- churn above the schedule's own highest level: k-diffusion goes there; sfumato stays, because no
  network was trained there.
- without a counterpart here: `sample_dpmpp_2s_ancestral` and `sample_dpm_2_ancestral` with
  eta > 0, `sample_dpm_fast` and `sample_dpm_adaptive`, and the noise of a Brownian tree (the
  default of k-diffusion's SDE samplers: the same path whatever the steps).
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.diffuse.run import run_sampler
from sfumato.diffuse.samplers import calls
from sfumato.diffuse.samplers.dpm_solver_2 import dpm_solver_2
from sfumato.diffuse.samplers.dpmpp_2m import dpmpp_2m
from sfumato.diffuse.samplers.dpmpp_2m_sde import dpmpp_2m_sde
from sfumato.diffuse.samplers.dpmpp_2s import dpmpp_2s
from sfumato.diffuse.samplers.dpmpp_3m_sde import dpmpp_3m_sde
from sfumato.diffuse.samplers.dpmpp_sde import dpmpp_sde
from sfumato.diffuse.samplers.edm import edm
from sfumato.diffuse.samplers.euler import euler
from sfumato.diffuse.samplers.euler_ancestral import euler_ancestral
from sfumato.diffuse.samplers.heun import heun
from sfumato.diffuse.samplers.lms import lms
from sfumato.diffuse.schedule import Schedule, schedule
from sfumato.diffuse.schedule_transforms import ZeroTerminalSNR
from sfumato.diffuse.timesteps import timesteps
from sfumato.types import Prediction

SHAPE = (2, 3, 4, 4)
ABSENT = (
    "k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1 (without "
    "what it asks for: one file of it is read)"
)


@pytest.fixture(scope="module")
def k_diffusion() -> Iterator[Any]:
    """The file sampling.py of k-diffusion alone.

    Imports that the samplers here never call are replaced, so that nothing else is installed.
    """
    try:
        files = distribution("k-diffusion").files or []
    except PackageNotFoundError:
        pytest.skip(ABSENT)
    path = next(
        Path(str(file.locate())) for file in files if file.as_posix() == "k_diffusion/sampling.py"
    )
    package, utils = ModuleType("_k_diffusion"), ModuleType("_k_diffusion.utils")
    package.__path__ = []
    utils.__dict__["append_dims"] = lambda x, dimensions: x.reshape(
        *x.shape, *[1] * (dimensions - x.ndim)
    )
    package.__dict__["utils"] = utils
    torchdiffeq = ModuleType("torchdiffeq")
    torchdiffeq.__dict__["odeint"] = None  # for log_likelihood
    stand_ins = {
        "_k_diffusion": package,
        "_k_diffusion.utils": utils,
        "torchdiffeq": torchdiffeq,
        "torchsde": ModuleType("torchsde"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location("_k_diffusion.sampling", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def noises(count: int = 64) -> list[Tensor]:
    """The same draws for both."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def denoised(x: Tensor, sigma: float) -> Tensor:
    """The stand-in of a network in the coordinates of k-diffusion.

    It is smooth, nonlinear, and different at every level.
    """
    return torch.tanh(1.2 * x / (1 + sigma) + 0.3 * math.log1p(sigma)) + 0.1 * x.roll(1, -1) / (
        1 + sigma
    )


def sfumato_run(
    sampler: Any, chosen: Schedule, times: list[float], start: Tensor, **options: Any
) -> list[Tensor]:
    """Return x/alpha at every network call and, last, the result."""
    draws, seen = iter(noises()), []

    def denoise(x: Tensor, t: float) -> Prediction:
        alpha, sigma = chosen.point(t)
        seen.append(x / alpha)
        x0 = denoised(x / alpha, sigma / alpha)
        return Prediction(x0, (x - alpha * x0) / sigma)

    run = sampler(start * chosen.point(times[0])[0], times, chosen, lambda: next(draws), **options)
    result = run_sampler(run, denoise, calls(sampler, times, chosen, **options))
    assert result is not None
    return [*seen, result / chosen.point(times[-1])[0]]


def k_diffusion_run(
    function: Callable[..., Tensor],
    levels: list[float],
    start: Tensor,
    patch: pytest.MonkeyPatch,
    **options: Any,
) -> list[Tensor]:
    """Return x at every network call of k-diffusion and, last, the result.

    Noise comes by noise_sampler, or where a function has none (churn) by torch.randn_like.
    """
    draws, seen = iter(noises()), []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return denoised(x, float(sigma[0]))

    if options.pop("noise", False):
        options["noise_sampler"] = lambda sigma, sigma_next: next(draws)
    with patch.context() as inner:
        inner.setattr(torch, "randn_like", lambda x: next(draws))
        result = function(
            model, start, torch.tensor(levels, dtype=torch.float64), disable=True, **options
        )
    return [*seen, result]


def compare(actual: list[Tensor], reference: list[Tensor], relative: float = 1e-9) -> float:
    """The largest difference of any latent, relative to its size."""
    assert len(actual) == len(reference)
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(actual, reference, strict=True))
    assert worst < relative, worst
    return worst


SCHEDULES: dict[str, Schedule] = {
    "ve": schedule("ve", sigma_min=0.02, sigma_max=40.0),
    "edm": schedule("edm"),
    "vp": schedule("vp"),
    "scaled_linear": schedule("scaled_linear"),
    "zero_snr": ZeroTerminalSNR(schedule("scaled_linear"), last=2**-24),
}
SPACINGS = {
    "karras": {},
    "exponential": {},
    "polyexponential": {"rho": 1.7},
}
SAMPLERS: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {
    "euler": (euler, "sample_euler", {}, {}),
    "heun": (heun, "sample_heun", {}, {}),
    "dpm_2": (dpm_solver_2, "sample_dpm_2", {}, {}),
    "lms": (lms, "sample_lms", {}, {}),
    "lms order 2": (lms, "sample_lms", {"order": 2}, {"order": 2}),
    "2s": (dpmpp_2s, "sample_dpmpp_2s_ancestral", {}, {"eta": 0.0, "noise": True}),
    "2m": (dpmpp_2m, "sample_dpmpp_2m", {}, {}),
    "euler_ancestral": (euler_ancestral, "sample_euler_ancestral", {}, {"noise": True}),
    "euler_ancestral half": (
        euler_ancestral,
        "sample_euler_ancestral",
        {"eta": 0.5, "noise_scale": 1.1},
        {"eta": 0.5, "s_noise": 1.1, "noise": True},
    ),
    "sde": (dpmpp_sde, "sample_dpmpp_sde", {}, {"noise": True}),
    "sde third": (
        dpmpp_sde,
        "sample_dpmpp_sde",
        {"eta": 0.6, "r": 1 / 3},
        {"eta": 0.6, "r": 1 / 3, "noise": True},
    ),
    "2m_sde midpoint": (dpmpp_2m_sde, "sample_dpmpp_2m_sde", {}, {"noise": True}),
    "2m_sde heun": (
        dpmpp_2m_sde,
        "sample_dpmpp_2m_sde",
        {"solver": "heun"},
        {"solver_type": "heun", "noise": True},
    ),
    "2m_sde half": (dpmpp_2m_sde, "sample_dpmpp_2m_sde", {"eta": 0.5}, {"eta": 0.5, "noise": True}),
    "2m heun": (
        dpmpp_2m_sde,
        "sample_dpmpp_2m_sde",
        {"eta": 0.0, "solver": "heun"},
        {"eta": 0.0, "solver_type": "heun", "noise": True},
    ),
    "3m_sde": (dpmpp_3m_sde, "sample_dpmpp_3m_sde", {"published": True}, {"noise": True}),
    "3m": (
        dpmpp_3m_sde,
        "sample_dpmpp_3m_sde",
        {"eta": 0.0, "published": True},
        {"eta": 0.0, "noise": True},
    ),
}


def spaced(name: str, steps: int, chosen: Schedule) -> list[float]:
    return timesteps(name.removeprefix("poly"), steps, chosen, **SPACINGS[name])


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(k_diffusion: Any, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the latents of every network call, and the last; the spacings in turns."""
    sampler, function, options, k_options = SAMPLERS[name]
    chosen = SCHEDULES[kind]
    spacing = list(SPACINGS)[
        (list(SAMPLERS).index(name) + list(SCHEDULES).index(kind)) % len(SPACINGS)
    ]
    times = spaced(spacing, 7, chosen)
    levels = [chosen.noise_level(t) for t in times]
    start = noises()[-1] * levels[0]
    compare(
        sfumato_run(sampler, chosen, times, start, **options),
        k_diffusion_run(getattr(k_diffusion, function), levels, start, monkeypatch, **k_options),
    )


@pytest.mark.parametrize("kind", ["ve", "edm", "scaled_linear"])
# over 8 steps: below and above the cap of sqrt(2) - 1
@pytest.mark.parametrize("churn", [1.0, 40.0])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_churn(
    k_diffusion: Any, name: str, churn: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within limits of noise levels, and with the noise scaled."""
    chosen = SCHEDULES[kind]
    times = timesteps("karras", 8, chosen)
    levels = [chosen.noise_level(t) for t in times]
    limits = levels[-3] * 0.9, levels[1] * 1.1  # the first and the last levels stay out
    start = noises()[-1] * levels[0]
    k_options = {"s_churn": churn, "s_tmin": limits[0], "s_tmax": limits[1], "s_noise": 1.003}
    # k-diffusion draws in every step, used or not: so does sfumato where nothing is added
    unused = [not limits[0] <= level <= limits[1] for level in levels[:-1]]
    draws = [noise for noise, skip in zip(noises(), unused, strict=False) if not skip]
    monkeypatch.setattr(sys.modules[__name__], "noises", lambda count=64: [*draws, start])
    actual = sfumato_run(
        {"euler": euler, "heun": edm}[name],
        chosen,
        times,
        start,
        churn=churn,
        churn_from=limits[0],
        churn_to=limits[1],
        churn_noise=1.003,
    )
    monkeypatch.undo()
    compare(
        actual,
        k_diffusion_run(
            getattr(k_diffusion, f"sample_{name}"), levels, start, monkeypatch, **k_options
        ),
    )


def test_churn_stops_at_the_highest_level(
    k_diffusion: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k-diffusion raises the noise above sigma_max in the first step.

    sfumato has no time for such a level and leaves the noise as it is.
    """
    chosen = SCHEDULES["edm"]
    times = timesteps("karras", 5, chosen)
    levels = [chosen.noise_level(t) for t in times]
    start = noises()[-1] * levels[0]
    actual = sfumato_run(euler, chosen, times, start, churn=40.0)
    other = k_diffusion_run(k_diffusion.sample_euler, levels, start, monkeypatch, s_churn=40.0)
    assert torch.equal(actual[0], start)
    raised = levels[0] * math.sqrt(2)
    torch.testing.assert_close(
        other[0], start + noises()[0] * math.sqrt(raised**2 - levels[0] ** 2)
    )


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 5, 18, 40])
def test_spacings(k_diffusion: Any, steps: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Karras, exponential and polyexponential levels.

    They go from the schedule's highest to the least that its network was trained on.
    """
    monkeypatch.setattr(
        torch,
        "linspace",
        lambda *values, f=torch.linspace, **options: f(
            *values, **{"dtype": torch.float64, **options}
        ),
    )
    chosen = SCHEDULES[kind]
    high, low = chosen.noise_level(1.0), chosen.noise_level(chosen.first)
    expected = {
        "karras": k_diffusion.get_sigmas_karras(steps, low, high),
        "exponential": k_diffusion.get_sigmas_exponential(steps, low, high),
        "polyexponential": k_diffusion.get_sigmas_polyexponential(steps, low, high, rho=1.7),
    }
    for name, sigmas in expected.items():
        actual = torch.tensor(
            [chosen.noise_level(t) for t in spaced(name, steps, chosen)], dtype=torch.float64
        )
        torch.testing.assert_close(actual, sigmas, rtol=1e-9, atol=0)


def test_vp_spacing(k_diffusion: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """k-diffusion's levels of the continuous VP process are even times of it."""
    monkeypatch.setattr(
        torch,
        "linspace",
        lambda *values, f=torch.linspace, **options: f(
            *values, **{"dtype": torch.float64, **options}
        ),
    )
    chosen = SCHEDULES["vp"]
    actual = torch.tensor(
        [chosen.noise_level(t) for t in timesteps("linspace", 12, chosen)], dtype=torch.float64
    )
    torch.testing.assert_close(actual, k_diffusion.get_sigmas_vp(12), rtol=1e-9, atol=0)
