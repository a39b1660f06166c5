"""Latents larger than the model's own size: windows that overlap, each predicted alone, averaged
(MultiDiffusion, Bar-Tal et al. 2023, arXiv:2302.08113, eq. 3-5).

The canvas that fits all windows' answers best, in least squares with weights W (eq. 3-4), is their
average (eq. 5):

    prediction = sum_i F_i^-1(W * model(F_i x)) / sum_i F_i^-1(W)          F_i cuts out the i-th
    window, F_i^-1 puts it back

The paper averages the results of a sampler's step; we average the predictions, which is the same
where a step is linear in them, and leaves the sampler (and noise drawn on the way) whole. All
windows are asked at once, each as the same B rows under the same conditioning, so guidance belongs
inside. A window knows nothing of where it lies: each shows the whole prompt, and what agrees is
only what they share.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.batching import DenoiseCalls, DenoiseFn, DenoiserCall, gather
from sfumato.errors import UserError
from sfumato.types import Prediction
from sfumato.validate import one_of

WEIGHTS = ("uniform", "smooth")


def large_canvas(
    ask: DenoiseFn,
    size: int | tuple[int, int],
    stride: int | tuple[int, int],
    weights: str = "uniform",
    around: bool = False,
) -> DenoiseFn:
    """Asks about windows instead of all of x.

    size, stride: of the windows, in latent cells, one for both sides or (height, width); a canvas
    smaller than a window is one window. weights: "uniform", or "smooth" (sin^2, small at a window's
    edges: no seams where a window begins). around: x is circular, so that the right edge continues
    at the left (panoramas). Conditionings' `concat` is of the canvas' size and cut like x.
    `UserError` for a stride that would leave gaps, and for `residuals`, which have no one size to
    cut at.
    """
    check_windows(size, stride)
    (height, width), (down, right) = _pair(size), _pair(stride)
    one_of("weighting of windows", weights, WEIGHTS)

    def canvas(x: Tensor, t: float) -> DenoiseCalls[Prediction]:
        windows = [
            (rows[:, None], columns)
            for rows in _windows(x.shape[2], height, down, False)
            for columns in _windows(x.shape[3], width, right, around)
        ]
        if len(windows) == 1:
            return (yield from ask(x, t))
        found = yield from gather([_inside(ask, x, t, window) for window in windows])
        shares = _shares(windows, x.shape[2:], weights)
        x0, eps = (
            _joined(x, windows, shares, [getattr(p, name) for p in found]) for name in ("x0", "eps")
        )
        variances = [p.variance for p in found if p.variance is not None]
        return Prediction(x0, eps, _joined(x, windows, shares, variances) if variances else None)

    return canvas


def check_windows(size: int | tuple[int, int], stride: int | tuple[int, int]) -> None:
    """Raise `UserError` for a stride that would leave gaps between windows."""
    (height, width), (down, right) = _pair(size), _pair(stride)
    if not (1 <= down <= height and 1 <= right <= width):
        raise UserError(
            f"windows of {height} x {width} cells every {down} x {right}: expected strides from 1 to the window's side"
        )


def off(x: Tensor, point: Any) -> dict[str, Any]:
    """One window that holds all of x."""
    return {"size": tuple(x.shape[2:]), "stride": tuple(x.shape[2:])}


def _pair(sides: int | tuple[int, int]) -> tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else sides


def _windows(length: int, size: int, stride: int, around: bool) -> list[Tensor]:
    """The cells of each window along one side: every `stride`, the last flush with the edge; around
    a circle there is no edge.
    """
    size = min(size, length)
    starts = (
        range(0, length, stride) if around else [*range(0, length - size, stride), length - size]
    )
    return [torch.arange(start, start + size) % length for start in starts]


def _shares(
    windows: Sequence[tuple[Tensor, Tensor]], sides: Sequence[int], weights: str
) -> list[Tensor]:
    """What each window has of each of its cells, float64: they add up to 1, and a cell of one
    window is all its own, to the last bit.
    """

    def profile(count: int) -> Tensor:
        if weights == "uniform":
            return torch.ones(count, dtype=torch.float64)
        return torch.sin(
            torch.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count
        ).square()

    weight = profile(len(windows[0][0]))[:, None] * profile(len(windows[0][1]))
    total = torch.zeros(*sides, dtype=torch.float64)
    for window in windows:
        total[window] = total[window] + weight
    return [weight / total[window] for window in windows]


def _joined(
    x: Tensor,
    windows: Sequence[tuple[Tensor, Tensor]],
    shares: Sequence[Tensor],
    found: Sequence[Tensor],
) -> Tensor:
    """Eq. 5, one window after the other."""
    whole = torch.zeros(x.shape, dtype=found[0].dtype, device=x.device)
    for (rows, columns), share, part in zip(windows, shares, found, strict=True):
        whole[:, :, rows, columns] = (
            whole[:, :, rows, columns] + share.to(part.device, part.dtype) * part
        )
    return whole


def _inside(
    ask: DenoiseFn, x: Tensor, t: float, window: tuple[Tensor, Tensor]
) -> DenoiseCalls[Prediction]:
    """What is asked about one window, with what joins x cut as x is."""
    rows, columns = window
    questions = ask(x[:, :, rows, columns], t)
    try:
        asked = next(questions)
        while True:
            asked = questions.send((yield [_cut(query, x, window) for query in asked]))
    except StopIteration as stop:
        return stop.value
    finally:
        questions.close()


def _cut(query: DenoiserCall, x: Tensor, window: tuple[Tensor, Tensor]) -> DenoiserCall:
    """A window's question with its part of the canvas' conditioning."""
    given = query.conditioning
    if given.residuals:
        raise UserError(
            "a large canvas cannot cut residuals (ControlNet) into windows: ask without them, or with a canvas of the model's size"
        )
    if given.concat is None:
        return query
    if given.concat.shape[2:] != x.shape[2:]:
        raise UserError(
            f"concat of shape {tuple(given.concat.shape)} for a canvas of {x.shape[2]} x {x.shape[3]} cells: "
            "expected the canvas' height and width"
        )
    return replace(
        query, conditioning=replace(given, concat=given.concat[:, :, window[0], window[1]])
    )
