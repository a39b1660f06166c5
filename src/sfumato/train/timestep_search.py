"""Search of the best times for a number of steps: of the least error after a whole run.

1. A reference of many DDIM steps, whose predictions give the error of a single step from any time
   to any other.
2. The path of N steps with the least sum of those squared errors, by dynamic programming (Watson et
   al. 2021, arXiv:2106.03802, section 3).
3. From there, and from the best of the fixed spacings, Levenberg-Marquardt on the distance of the
   run's real end to the reference's, over the first time and the gaps (softmax, so that times
   fall). It is the objective of Sabour et al. 2024 (arXiv:2404.14507) taken at the end of the run.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.diffuse.run import Step
from sfumato.diffuse.samplers import draws_noise
from sfumato.diffuse.schedule import Schedule
from sfumato.diffuse.timesteps import SPACINGS, timesteps
from sfumato.errors import UserError, explained
from sfumato.io.atomic import read_table, write_json
from sfumato.model import LatentDiffusion
from sfumato.sampling.request import sampler_of

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, its finished steps and all of them."""


@dataclass(frozen=True)
class Tuned:
    """The best times of a search.

    Attributes:
        sampler: Name and options.
        guidance: A number, or JSON of the guidance.
        times: From noise to 0.
        errors: Distance of the runs' ends from the reference's, by name of spacing, and "tuned". It
            is the root mean square over latents of images outside the search.
    """

    sampler: str
    guidance: Any
    times: tuple[float, ...]
    errors: dict[str, float]


@dataclass(frozen=True)
class _Reference:
    """Ends (B, C, h, w) of long runs, and x and predictions at a coarser grid of times."""

    end: Tensor
    times: tuple[float, ...]
    x: tuple[Tensor, ...]
    x0: tuple[Tensor, ...]
    eps: tuple[Tensor, ...]


def tune_timesteps(
    model: LatentDiffusion,
    steps: Sequence[int],
    *,
    sampler: str | None = None,
    guidance: Any = None,
    prompts: Sequence[str | None] | None = None,
    images: int = 64,
    seed: int = 0,
    reference_steps: int = 1000,
    iterations: int = 6,
    progress: Progress | None = None,
) -> list[Tuned]:
    """Search the best times for each number of steps, with a deterministic sampler.

    Args:
        model: The model.
        steps: Numbers of steps.
        sampler: Name and options; None: the model's.
        guidance: See `Request`; None: the model's.
        prompts: Drawn in turn; None: the model's class names.
        images: Number of images of the search, and of as many others that judge it.
        seed: Of the first image.
        reference_steps: Steps of the run that counts as exact.
        iterations: Rounds of step 3.
        progress: See `Progress`.

    Raises:
        UserError: For impossible settings, and a sampler that draws noise.
    """
    settings = model.settings(sampler=sampler, guidance=guidance)
    name, weight = settings["sampler"], settings["guidance"]
    schedule = model.denoiser.process.schedule
    function, options = sampler_of(name)
    if draws_noise(function, timesteps("trailing", 20, schedule), schedule, **options):
        raise UserError(
            f"sampler {name!r} draws noise on the way: there is no one end to come near to; "
            "tune with a deterministic one"
        )
    limits = [("images", images, 2), ("reference_steps", reference_steps, 50)]
    limits += [("iterations", iterations, 0), *(("steps", count, 2) for count in steps)]
    for setting, value, low in limits:
        if value < low:
            raise UserError(f"{setting}={value}: expected at least {low}")
    most = min(reference_steps, 100, schedule.grid or 100)
    if max(steps) > most:
        limit = f"expected at most {most}; with more, the spacings hardly differ"
        raise UserError(f"steps={max(steps)}: {limit}")
    fixed = {count: _fixed(count, schedule) for count in steps}
    texts = list(prompts or model.class_names or [None])
    run = _Runner(model, [texts[k % len(texts)] for k in range(images)], name, weight)
    report = progress or (lambda stage, done, total: None)
    search = _reference(run, seed, reference_steps, report)
    judge = _reference(run, seed + images, reference_steps, report, path=False)
    results = []
    for count in steps:
        report(f"search for {count} steps", 0, iterations)
        scores = {name: run.error(times, seed, search.end) for name, times in fixed[count].items()}
        starts = [
            _shortest_path(search, model, count),
            fixed[count][min(scores, key=lambda name: scores[name])],
        ]
        best = min(
            (_descend(run, times, seed, search.end, iterations, count, report) for times in starts),
            key=lambda pair: pair[0],
        )[1]
        errors = {
            name: run.error(times, seed + images, judge.end)
            for name, times in {**fixed[count], "tuned": best}.items()
        }
        winner = min(errors, key=lambda spacing: errors[spacing])
        if winner != "tuned":  # by chance a fixed spacing judged better: then its times are kept
            best, errors["tuned"] = fixed[count][winner], errors[winner]
        results.append(Tuned(name, weight, tuple(best), errors))
    return results


def _fixed(steps: int, schedule: Schedule) -> dict[str, list[float]]:
    """The times of every spacing that has so many steps (lcm has 50 at most)."""
    tables: dict[str, list[float]] = {}
    for name in SPACINGS:
        with contextlib.suppress(UserError):
            tables[name] = timesteps(name, steps, schedule)
    tables.pop("uniform", None)  # trailing's other name
    return tables


@dataclass(frozen=True)
class _Runner:
    model: LatentDiffusion
    prompts: list[str | None]
    sampler: str
    guidance: Any

    def __call__(
        self,
        times: Sequence[float],
        seed: int,
        sampler: str | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Tensor:
        return self.model.generate(
            self.prompts,
            timesteps=times,
            sampler=sampler or self.sampler,
            guidance=self.guidance,
            seed=seed,
            output="latent",
            on_step=on_step,
        )

    def error(self, times: Sequence[float], seed: int, end: Tensor) -> float:
        return float((self(times, seed) - end).square().mean().sqrt())


def _reference(
    run: _Runner, seed: int, steps: int, report: Progress, path: bool = True
) -> _Reference:
    """A long DDIM run; where `path`, with every (steps/100)-th of its predictions."""
    times = timesteps("trailing", steps, run.model.denoiser.process.schedule)
    kept: list[Step] = []

    def keep(step: Step) -> None:
        report("reference", step.index + 1, step.count)
        if path and step.index % max(steps // 100, 1) == 0:
            kept.append(step)

    end = run(times, seed, "ddim", keep)
    x, predictions = [step.x for step in kept], [step.prediction for step in kept]
    times = (*(step.t for step in kept), 0.0)
    x0, eps = tuple(p.x0 for p in predictions), tuple(p.eps for p in predictions)
    return _Reference(end, times, (*x, end), x0, eps)


def _shortest_path(reference: _Reference, model: LatentDiffusion, steps: int) -> list[float]:
    """The path of `steps` steps with the least sum of squared errors of single steps."""
    n, point = len(reference.x0), model.denoiser.process.schedule.point
    points = [point(t) for t in reference.times]
    cost = torch.full((n + 1, n + 1), math.inf, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1, n + 1):
            alpha, sigma = points[j]
            # An error at s reaches the end shrunk by what the flow does to it: by about
            # 1/sqrt(alpha^2 + sigma^2) of unit data.
            error = alpha * reference.x0[i] + sigma * reference.eps[i] - reference.x[j]
            cost[i, j] = float(error.square().mean() / (alpha**2 + sigma**2))
    best, back = cost[0].clone(), []
    best[0] = math.inf
    for _ in range(steps - 1):
        total = best[:, None] + cost
        best, before = total.min(0)
        back.append(before)
    place, path = n, [n]
    for before in reversed(back):
        place = int(before[place])
        path.append(place)
    return [1.0, *(reference.times[k] for k in reversed(path))]


def _descend(
    run: _Runner,
    times: Sequence[float],
    seed: int,
    end: Tensor,
    iterations: int,
    steps: int,
    report: Progress,
) -> tuple[float, list[float]]:
    """Levenberg-Marquardt over the first time and the gaps: (error on the images, times)."""
    # The variables are the shares of [0, 1]: the part above the first time, and the gaps. No share
    # vanishes.
    least = 1e-3
    gaps = [1 - times[0], *(a - b for a, b in pairwise(times))]
    shares = torch.tensor(gaps, dtype=torch.float64).clamp(min=2 * least)
    theta = (shares / shares.sum() - least).log()

    def unfold(theta: Tensor) -> list[float]:
        shares = least + (1 - least * len(theta)) * theta.softmax(0)
        return [*(1 - shares.cumsum(0)[:-1]).tolist(), 0.0]

    def residual(theta: Tensor) -> Tensor:
        return ((run(unfold(theta), seed) - end) / math.sqrt(end.numel())).flatten()

    now = residual(theta)
    damping = 0.1
    for k in range(iterations):
        units = torch.eye(len(theta), dtype=torch.float64)
        columns = [(residual(theta + 0.03 * unit) - now) / 0.03 for unit in units]
        jacobian = torch.stack(columns, 1).double()
        normal, slope = jacobian.T @ jacobian, jacobian.T @ now.double()
        for _ in range(4):
            damped = normal + damping * torch.diag(normal.diag() + 1e-12)
            step = torch.linalg.solve(damped, -slope).clamp(-0.7, 0.7)
            there = residual(theta + step)
            if there.square().sum() < now.square().sum():
                theta, now, damping = theta + step, there, damping / 3
                break
            damping *= 4
        else:
            break
        report(f"search for {steps} steps", k + 1, iterations)
    return float(now.square().sum().sqrt()), unfold(theta)


def with_tuned(model: LatentDiffusion, results: Sequence[Tuned]) -> LatentDiffusion:
    """Return the model with these times, for their samplers and numbers of steps."""
    tables = _merged(model.defaults.tuned_timesteps, results)
    return replace(model, defaults=replace(model.defaults, tuned_timesteps=tables))


def store_tuned(folder: str | Path, results: Sequence[Tuned]) -> None:
    """Write times into a model's model_index.json, beside those of other samplers and steps.

    Raises:
        UserError: For a file that is missing or broken.
    """
    path = Path(folder) / "model_index.json"
    with explained(path):
        values: dict[str, Any] = read_table(path)
    notes = values.setdefault("_sfumato", {})
    defaults = notes.setdefault("defaults", {})
    old = defaults.pop("tuned", {})  # older folders' name
    defaults["tuned_timesteps"] = _merged(defaults.get("tuned_timesteps", old), results)
    write_json(path, values)


def _merged(before: Any, results: Sequence[Tuned]) -> dict[str, list[list[float]]]:
    tables = {
        sampler: {len(times): list(times) for times in tables} for sampler, tables in before.items()
    }
    for tuned in results:
        tables.setdefault(tuned.sampler, {})[len(tuned.times)] = list(tuned.times)
    return {sampler: [table[n] for n in sorted(table)] for sampler, table in tables.items()}
