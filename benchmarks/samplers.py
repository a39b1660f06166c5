"""Every sampler of the registry against the exact answer, by network calls.

    python benchmarks/samplers.py                    # the mixture: all tables but the last, and
                                                     docs/images/samplers.png
    python benchmarks/samplers.py --model fashion    # the last table: a trained network (about a
                                                     minute on one thread)

The mixture is that of the tests (tests/helpers/mixture.py): three round Gaussians in two dimensions
(standard deviation 1.5 a coordinate), whose denoiser is known. Runs begin at its own noisy points,
so that what is measured is the sampler alone.

Deterministic samplers: the root-mean-square distance to the end of the flow, which is found by
Runge-Kutta's method of order four in even steps of sigma/(alpha + sigma), by nothing that is
measured. Whole runs go from t = 1 to 0; those from t = 0.95 to 0.15 show the order, in even steps
after short ones that give multistep methods their start (as tests/contracts/test_samplers.py has
them). Orders are fitted to the median point's error: the mean is that of a few points between two
components, which a small error sends to the other one. Stochastic samplers: the Wasserstein-1
distance of the samples to the mixture, mean over directions, each against the exact quantiles.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from _common import print_header, print_row
from sfumato.diffuse import SPACINGS, Schedule, Traits, calls, run_sampler, traits_of
from sfumato.diffuse.schedule import schedule
from sfumato.diffuse.timesteps import timesteps
from sfumato.loading import load
from sfumato.registry import find, names
from sfumato.sampling.request import sampler_of
from sfumato.types import Prediction

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the mixture is the tests'
from helpers.mixture import MEANS, STDS, WEIGHTS, Denoise, clean_mean, exact_denoiser, noisy_points

RUNS = (
    ("scaled_linear", "trailing"),
    ("scaled_linear", "karras"),
    ("flow", "trailing"),
    ("edm", "karras"),
)
DRAWN = ("flow", "trailing")  # in the picture
COLOURS = {1: "#7a7a7a", 2: "#1f6fb4", 3: "#d1570d", 4: "#2c8a4b"}


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    steps: tuple[int, ...] = (4, 6, 8, 12, 16, 24, 32, 64, 128)
    """Of the curves in the picture."""
    fitted: tuple[int, ...] = (32, 64, 128)
    """Orders are fitted to these."""
    budgets: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Network calls, in the tables: a run has the most steps that they pay for."""
    points: int = 300
    """For deterministic samplers."""
    samples: int = 4000
    """For stochastic ones."""
    seed: int = 0
    model: str = ""
    """A model to run instead of the mixture: 20 images of its classes, without guidance."""
    picture: Path = Path("docs/images/samplers.png")


# ---- the mixture ---------------------------------------------------------------------------------


def flow(
    x: Tensor,
    begin: tuple[float, float],
    end: tuple[float, float],
    ask: Callable[[Tensor, float, float], Tensor],
    steps: int,
) -> Tensor:
    """The flow's own end: y = x/(alpha + sigma) moves by dy/db = eps - x0 with b = sigma/(alpha +
    sigma); `ask` gives x0 at (1 - b, b).

    The last stretch to sigma = 0, of length 1e-5, is what the denoiser says.
    """

    def slope(y: Tensor, b: float) -> Tensor:
        return (y - ask(y, 1 - b, b)) / b

    y, (first, last) = x / sum(begin), (p[1] / sum(p) for p in (begin, end))
    places = np.linspace(first, max(last, 1e-5), steps + 1).tolist()
    for b, c in pairwise(places):
        h, middle = c - b, (b + c) / 2
        k1 = slope(y, b)
        k2 = slope(y + h / 2 * k1, middle)
        k3 = slope(y + h / 2 * k2, middle)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(y + h * k3, c))
    return ask(y, 1 - places[-1], places[-1]) if last == 0 else y * sum(end)


def mixture_flow(
    x: Tensor, begin: tuple[float, float], end: tuple[float, float], steps: int = 800
) -> Tensor:
    return flow(x, begin, end, clean_mean, steps)


class Distance:
    """Wasserstein-1 to the mixture: mean over 32 directions of the mean distance of sorted
    projections to exact quantiles.
    """

    def __init__(self, count: int):
        angles = math.pi * torch.arange(32, dtype=torch.float64) / 32
        self.directions = torch.stack([angles.cos(), angles.sin()])
        centres, levels = (
            (MEANS @ self.directions).T[..., None],
            (torch.arange(count, dtype=torch.float64) + 0.5) / count,
        )
        low, high = (
            torch.full((32, count), -9.0, dtype=torch.float64),
            torch.full((32, count), 9.0, dtype=torch.float64),
        )
        for _ in range(40):
            middle = (low + high) / 2
            below = (
                WEIGHTS[:, None] * torch.special.ndtr((middle[:, None] - centres) / STDS[:, None])
            ).sum(1) < levels
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        self.quantiles = low

    def __call__(self, points: Tensor) -> float:
        return float(
            ((points.flatten(1) @ self.directions).T.sort(1).values - self.quantiles).abs().mean()
        )


# ---- runs ----------------------------------------------------------------------------------------


def named(spec: str) -> Callable[..., Any]:
    """A sampler by name, with its options if need be: "dpmpp_3m:published=true"."""
    sampler, options = sampler_of(spec)
    return partial(sampler, **options)


def run(
    name: str, x: Tensor, times: Sequence[float], chosen: Schedule, denoise: Denoise, seed: int = 1
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = lambda: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)  # noqa: E731
    end = run_sampler(named(name)(x, times, chosen, noise), denoise, 1)
    assert end is not None
    return end


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def median(a: Tensor, b: Tensor) -> float:
    return float((a - b).flatten(1).norm(dim=1).median())


def graded(steps: int, order: int) -> list[float]:
    """Times from 0.95 to 0.15 in equal steps h; before them steps that grow from h^(order/2), each
    half as long again as the last.
    """
    h, times = 0.8 / steps, [0.95]
    short = h ** (order / 2)
    while order > 1 and short < h:
        times.append(times[-1] - short)
        short *= 1.5
    last = times[-1]
    return [*times, *(last + (0.15 - last) * i / steps for i in range(1, steps + 1))]


@cache
def affordable(name: str, kind: str, spacing: str, budget: int) -> list[float] | None:
    """The times of the longest run that asks at most `budget` times; None where that leaves more
    than a third of them over.
    """
    chosen, sampler = schedule(kind), named(name)
    for steps in range(budget, 0, -1):
        times = timesteps(spacing, steps, chosen)
        if (count := calls(sampler, times, chosen)) <= budget:
            return times if 3 * count >= 2 * budget else None
    return None


@dataclass
class Curve:
    """Errors of one sampler over network calls."""

    calls: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def add(self, calls: int, error: float) -> None:
        self.calls.append(calls)
        self.errors.append(error)


@dataclass
class Measured:
    """By sampler and schedule, or sampler, schedule and spacing: the picture's curves, fitted
    orders, and errors at the budgets.
    """

    curves: dict[tuple[str, str], Curve] = field(default_factory=dict)
    orders: dict[tuple[str, ...], float] = field(default_factory=dict)
    at: dict[tuple[str, str, str], list[float | None]] = field(default_factory=dict)


def fitted(steps: Sequence[int], errors: Sequence[float]) -> float:
    # a sum, so that there is no -0.0
    return 0.0 - round(float(np.polyfit(np.log(steps), np.log(errors), 1)[0]), 1)


def inside(settings: Settings, promised: dict[str, Traits]) -> Measured:
    """Deterministic samplers from t = 0.95 to 0.15."""
    result = Measured()
    for kind in dict(RUNS):
        chosen = schedule(kind)
        denoise, high, low = exact_denoiser(chosen), chosen.point(0.95), chosen.point(0.15)
        x = noisy_points(settings.points, high, settings.seed)
        end = mixture_flow(x, high, low)
        for name, traits in promised.items():
            curve, medians = result.curves.setdefault((name, kind), Curve()), {}
            for n in sorted({*settings.fitted, *(settings.steps if kind == DRAWN[0] else ())}):
                times = graded(n, traits.order if traits.calls == 1 else 1)
                y = run(name, x, times, chosen, denoise)
                medians[n] = median(y, end)
                curve.add(calls(named(name), times, chosen), distance(y, end))
            result.orders[name, kind] = fitted(
                settings.fitted, [medians[n] for n in settings.fitted]
            )
    return result


def whole(settings: Settings, promised: dict[str, Traits]) -> Measured:
    """Deterministic samplers from t = 1 to 0."""
    result = Measured()
    for kind, spacing in RUNS:
        chosen = schedule(kind)
        denoise, top = exact_denoiser(chosen), chosen.point(1.0)
        x = noisy_points(settings.points, top, settings.seed)
        end = mixture_flow(x, top, (1.0, 0.0))
        for name in promised:
            curve, medians = Curve(), {}
            for n in sorted(
                {*settings.fitted, *(settings.steps if (kind, spacing) == DRAWN else ())}
            ):
                times = timesteps(spacing, n, chosen)
                y = run(name, x, times, chosen, denoise)
                medians[n] = median(y, end)
                curve.add(calls(named(name), times, chosen), distance(y, end))
            if (kind, spacing) == DRAWN:
                result.curves[name, kind] = curve
            result.orders[name, kind, spacing] = fitted(
                settings.fitted, [medians[n] for n in settings.fitted]
            )
            runs = [affordable(name, kind, spacing, budget) for budget in settings.budgets]
            result.at[name, kind, spacing] = [
                None if times is None else distance(run(name, x, times, chosen, denoise), end)
                for times in runs
            ]
    return result


def stochastic(settings: Settings, promised: dict[str, Traits]) -> tuple[Measured, list[float]]:
    """Wasserstein distances, and those of ten exact draws, among which nothing is seen."""
    result, measure = Measured(), Distance(settings.samples)
    floor = [measure(noisy_points(settings.samples, (1.0, 0.0), seed)) for seed in range(100, 110)]
    for kind, spacing in RUNS:
        chosen = schedule(kind)
        denoise, x = (
            exact_denoiser(chosen),
            noisy_points(settings.samples, chosen.point(1.0), settings.seed),
        )
        for name in promised:
            runs = [affordable(name, kind, spacing, budget) for budget in settings.budgets]
            result.at[name, kind, spacing] = [
                None if times is None else measure(run(name, x, times, chosen, denoise))
                for times in runs
            ]
    return result, floor


def consistency(settings: Settings, promised: dict[str, Traits]) -> list[list[str]]:
    """Samplers of distilled models, over a flow: with the exact flow's end for a network, and with
    an ordinary denoiser.
    """
    chosen, measure = schedule("flow"), Distance(settings.samples)
    x = noisy_points(settings.samples, chosen.point(1.0), settings.seed)

    def end(x: Tensor, t: float) -> Prediction:
        alpha, sigma = chosen.point(t)
        x0 = mixture_flow(x, (alpha, sigma), (1.0, 0.0), 30)
        return Prediction(x0, (x - alpha * x0) / sigma)

    rows = []
    for name in promised:
        cells = []
        for denoise in (end, exact_denoiser(chosen)):
            errors = [
                measure(run(name, x, timesteps("trailing", n, chosen), chosen, denoise))
                for n in (1, 2, 4)
            ]
            cells.append("  ".join(f"{e:.3f}" for e in errors))
        rows.append([f"`{name}`", *cells])
    return rows


def spacings(settings: Settings, budget: int = 10) -> list[list[str]]:
    """Errors of two samplers in ten calls under every spacing."""
    rows = []
    for spacing in SPACINGS:
        cells = []
        for kind in ("scaled_linear", "flow"):
            chosen = schedule(kind)
            x, times = (
                noisy_points(settings.points, chosen.point(1.0), settings.seed),
                timesteps(spacing, budget, chosen),
            )
            end = mixture_flow(x, chosen.point(1.0), (1.0, 0.0))
            # as a run begins that leaves out the top
            begin = x * (math.hypot(*chosen.point(times[0])) / math.hypot(*chosen.point(1.0)))
            cells += [
                f"{distance(run(n, begin, times, chosen, exact_denoiser(chosen)), end):.3f}"
                for n in ("ddim", "dpmpp_2m", "unipc")
            ]
        rows.append([f"`{spacing}`", *cells])
    return rows


@torch.inference_mode()
def network(settings: Settings, promised: dict[str, Traits]) -> list[list[str]]:
    """Errors with a trained network, against the flow that it defines itself."""
    model = load(settings.model)
    chosen, classes = model.denoiser.process.schedule, model.class_names or [None]
    cond = model.conditioner([classes[k % len(classes)] for k in range(20)])
    side = model.sample_size // model.autoencoder.space.factor
    generator = torch.Generator().manual_seed(settings.seed)
    x = math.hypot(*chosen.point(1.0)) * torch.randn(
        (20, model.autoencoder.space.channels, side, side), generator=generator
    )

    def denoise(x: Tensor, t: float) -> Prediction:
        return model.denoiser(x, t, cond)

    def ask(y: Tensor, alpha: float, sigma: float) -> Tensor:
        t = 1.0 if alpha == 0 else chosen.at_noise_level(sigma / alpha)
        return denoise(y * sum(chosen.point(t)), t).x0

    end = flow(x, chosen.point(1.0), (1.0, 0.0), ask, 100)
    rows = []
    for name in promised:
        sampler, cells = named(name), []
        for budget in settings.budgets[:4]:
            steps = max(
                n
                for n in range(1, budget + 1)
                if calls(sampler, timesteps("trailing", n, chosen), chosen) <= budget
            )
            result = run(name, x, timesteps("trailing", steps, chosen), chosen, denoise)
            cells.append(f"{distance(result, end):.3f}")
        rows.append([f"`{name}`", *cells])
    return rows


# ---- tables and picture --------------------------------------------------------------------------


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A markdown table."""
    print(f"\n{title}\n")
    print_header(*columns)
    for row in rows:
        print_row(*row)


def cells(values: Sequence[float | None]) -> str:
    return "  ".join(
        "-" if v is None else f"{v:.3f}" if v >= 0.0095 else f"{v:.0e}".replace("e-0", "e-")
        for v in values
    )


def alike(curves: dict[str, Curve]) -> dict[str, Curve]:
    """Samplers whose curves are the same share one, under all their names."""
    result: dict[str, Curve] = {}
    for name, curve in curves.items():
        same = next(
            (
                k
                for k, c in result.items()
                if c.calls == curve.calls and np.allclose(c.errors, curve.errors, rtol=1e-6)
            ),
            None,
        )
        result[name if same is None else f"{same} =\n{name}"] = (
            curve if same is None else result.pop(same)
        )
    return result


def apart(places: Sequence[float], heights: Sequence[float], bottom: float) -> list[float]:
    """Places (rising) of labels, pushed apart until none overlap, none below `bottom`."""
    result = list(places)
    for _ in range(2000):
        result[0] = max(result[0], bottom)
        for i in range(len(result) - 1):
            lack = (heights[i] + heights[i + 1]) / 2 - (result[i + 1] - result[i])
            if lack > 0:
                result[i], result[i + 1] = result[i] - lack / 2, result[i + 1] + lack / 2
    return result


def lines(axes: Any, curves: dict[str, Curve], promised: dict[str, Traits]) -> None:
    """Errors over calls with their names at the right.

    Colour: order; dashed: several calls a step.
    """
    errors = [e for c in curves.values() for e in c.errors]
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="network calls",
        xlim=(3.4, 420),
        ylim=(min(errors) / 1.6, max(errors) * 1.6),
    )
    axes.set_xticks([5, 10, 20, 50, 100, 200, 400], [5, 10, 20, 50, 100, 200, 400])
    axes.set_xticks([], minor=True)
    ends = []
    for label, curve in alike(curves).items():
        traits = promised[label.split(" ")[0]]
        axes.plot(
            curve.calls,
            curve.errors,
            color=COLOURS[traits.order],
            linewidth=1.4,
            linestyle="--" if traits.calls > 1 else "-",
        )
        ends.append((math.log(curve.errors[-1]), curve.calls[-1], label, COLOURS[traits.order]))
    ends.sort()
    line = 0.043 * math.log(axes.get_ylim()[1] / axes.get_ylim()[0])
    places = apart(
        [y for y, *_ in ends],
        [line * (1 + label.count("\n")) for _, _, label, _ in ends],
        math.log(axes.get_ylim()[0]) + line / 2,
    )
    for (y, x, label, colour), place in zip(ends, places, strict=True):
        axes.plot(
            [x * 1.04, 430],
            [math.exp(y), math.exp(place)],
            color=colour,
            linewidth=0.5,
            alpha=0.6,
            clip_on=False,
        )
        axes.text(450, math.exp(place), label, color=colour, fontsize=8.5, va="center")


def guides(axes: Any, corner: float) -> None:
    """The slopes that the orders promise."""
    for order, colour in COLOURS.items():
        x = np.array([4.5, 14.0])
        y = corner * (x / x[0]) ** -order
        axes.plot(x, y, color=colour, linewidth=4, alpha=0.25)
        axes.text(x[1] * 1.08, y[1], f"order {order}", color=colour, fontsize=8, va="center")


def dots(
    axes: Any, rows: dict[str, list[float | None]], budgets: Sequence[int], floor: Sequence[float]
) -> None:
    """A row a sampler, a dot a number of calls, the darker the more."""
    shades = [str(v) for v in np.linspace(0.8, 0.0, len(budgets))]
    axes.axvspan(min(floor), max(floor), color="#2c8a4b", alpha=0.13, linewidth=0)
    for place, values in enumerate(rows.values()):
        measured = [v for v in values if v is not None]
        axes.plot(
            [min(measured, default=math.nan), max(measured, default=math.nan)],
            [place, place],
            color="0.85",
            linewidth=1,
            zorder=0,
        )
        for value, shade, budget in zip(values, shades, budgets, strict=True):
            axes.scatter(
                [value or math.nan],
                [place],
                color=shade,
                s=34,
                label=str(budget) if place == 0 else None,
                zorder=2,
            )
    axes.set(
        xscale="log",
        xlabel="Wasserstein-1 distance to the data",
        xlim=(0.012, 0.45),
        ylim=(len(rows) + 0.1, -1.7),
    )
    axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.4], ["0.02", "0.05", "0.1", "0.2", "0.4"])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(rows)), rows, fontsize=8.5)
    axes.text(
        math.sqrt(min(floor) * max(floor)),
        len(rows) - 0.25,
        "exact draws",
        fontsize=8,
        color="#2c8a4b",
        ha="center",
        va="center",
    )
    where = {"loc": "upper right", "bbox_to_anchor": (1.03, 1.02), "ncols": len(budgets)}
    axes.legend(
        **where,
        fontsize=8.5,
        frameon=False,
        handletextpad=-0.3,
        columnspacing=0.6,
        title="network calls",
        title_fontsize=8.5,
    )


def picture(
    settings: Settings,
    result: Sequence[Measured],
    floor: Sequence[float],
    promised: dict[str, Traits],
) -> None:
    """Orders, whole runs, samples: all over a flow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5))
    panels = [
        figure.add_axes((left, 0.11, width, 0.74))
        for left, width in ((0.055, 0.21), (0.385, 0.21), (0.785, 0.2))
    ]
    curves = [
        {name: c for (name, kind), c in f.curves.items() if kind == DRAWN[0] and name in promised}
        for f in result[:2]
    ]
    for axes, each in zip(panels, curves, strict=False):
        lines(axes, each, promised)
    guides(panels[0], 0.0013 * max(c.errors[0] for c in curves[0].values()))
    rows = {
        name: values for (name, *where), values in result[2].at.items() if tuple(where) == DRAWN
    }
    order = sorted(rows, key=lambda name: (rows[name][1] is None, rows[name][1] or 0.0))
    dots(panels[2], {name: rows[name] for name in order}, settings.budgets, floor)
    panels[0].set_ylabel("root-mean-square error")
    titles = (
        "from t = 0.95 to 0.15: orders show",
        "whole runs, spacing trailing",
        f"{settings.samples:,} samples of whole runs",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(alpha=0.25, which="major", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8.5)
    words = (
        "A Gaussian mixture's exact denoiser, flow schedule. Colour: "
        "promised order (grey 1, blue 2, orange 3, green 4); dashed: several calls a step"
    )
    figure.text(0.055, 0.945, words, fontsize=10)
    settings.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.picture, dpi=110)


def main(settings: Settings) -> None:
    """Prints the tables of docs/results/samplers.md and draws its picture."""
    torch.set_num_threads(1)
    every = {name: traits_of(find("diffuse.samplers", name)) for name in names("diffuse.samplers")}
    every = {name: traits for name, traits in every.items() if not traits.inverts}
    smooth = {name: traits for name, traits in every.items() if not traits.noise}
    rough = {
        name: traits
        for name, traits in every.items()
        if traits.noise and traits.network_type == "denoiser"
    }
    distilled = {
        name: traits for name, traits in every.items() if traits.network_type == "consistency"
    }
    smooth["dpmpp_3m:published=true"] = Traits(order=2)  # as other implementations have it
    if settings.model:
        shown = ", ".join(map(str, settings.budgets[:4]))
        title = (
            f"{settings.model}: error of latents at {shown} calls, 20 images, spacing "
            f"trailing, seed {settings.seed}"
        )
        table(title, ["sampler", *map(str, settings.budgets[:4])], network(settings, smooth))
        return
    part, runs, columns = (
        inside(settings, smooth),
        whole(settings, smooth),
        [f"{kind}, {spacing}" for kind, spacing in RUNS],
    )
    rows = [
        [
            f"`{name}`",
            str(smooth[name].order),
            *(f"{part.orders[name, k]:.1f}" for k in dict(RUNS)),
            *(f"{runs.orders[name, *r]:.1f}" for r in RUNS),
        ]
        for name in smooth
    ]
    title = "Fitted order, from t = 0.95 to 0.15 and of whole runs"
    table(title, ["sampler", "promised", *dict(RUNS), *(f"whole: {c}" for c in columns)], rows)
    budgets = ", ".join(map(str, settings.budgets))
    rows = [[f"`{name}`", *(cells(runs.at[name, *r]) for r in RUNS)] for name in smooth]
    table(f"Root-mean-square error of whole runs at {budgets} calls", ["sampler", *columns], rows)
    shown = rough | {name: smooth[name] for name in ("ddim", "dpmpp_2m", "unipc")}
    samples, floor = stochastic(settings, shown)
    rows = [[f"`{name}`", *(cells(samples.at[name, *r]) for r in RUNS)] for name in shown]
    title = (
        f"Wasserstein-1 distance of {settings.samples:,} samples at {budgets} calls; "
        f"ten exact draws {min(floor):.3f} to {max(floor):.3f}"
    )
    table(title, ["sampler", *columns], rows)
    title = "The same in 1, 2 and 4 calls for samplers of distilled models, over a flow"
    table(
        title,
        ["sampler", "network: the flow's end", "network: a denoiser"],
        consistency(settings, distilled),
    )
    heads = [
        f"{kind}: {name}"
        for kind in ("scaled_linear", "flow")
        for name in ("ddim", "dpmpp_2m", "unipc")
    ]
    table("Root-mean-square error in 10 calls", ["spacing", *heads], spacings(settings))
    picture(settings, (part, runs, samples), floor, every)
    print(f"\n{settings.picture}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
