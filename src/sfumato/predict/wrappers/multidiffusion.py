"""MultiDiffusion: latents larger than the model's size, by averaging overlapping windows.

(Bar-Tal et al. 2023, arXiv:2302.08113, eq. 3-5.) The canvas that fits the predictions of all
windows best, in least squares with weights W (eq. 3-4), is their average (eq. 5):

    prediction = sum_i F_i^-1(W * model(F_i x)) / sum_i F_i^-1(W)

F_i cuts out the i-th window, F_i^-1 puts it back. The paper averages the results of a sampler's
step. Here predictions are averaged, which is the same where a step is linear in them, and leaves
the sampler (and noise drawn on the way) whole. All windows are predicted at once, each as the same
B rows under the same conditioning, so guidance belongs inside. A window has no position: each shows
the whole prompt, and windows agree only in the cells that they share.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sfumato.batching import DenoiseCalls, DenoiseFn, DenoiserCall, gather, map_calls
from sfumato.errors import UserError
from sfumato.types import Prediction
from sfumato.validate import one_of

WEIGHTS = ("uniform", "smooth")


def multidiffusion(
    denoise: DenoiseFn,
    size: int | tuple[int, int],
    stride: int | tuple[int, int],
    weights: str = "uniform",
    circular: bool = False,
) -> DenoiseFn:
    """Predict windows instead of all of x, and average them.

    A canvas smaller than a window is one window. `concat` of a conditioning has the canvas' size
    and is cut like x.

    Args:
        denoise: The denoiser of a run.
        size: Of the windows in latent cells, one for both sides or (height, width).
        stride: Between windows in latent cells, one for both sides or (down, right).
        weights: "uniform", or "smooth" (sin^2, small at a window's edges: no seams where a window
            begins).
        circular: The right edge of x continues at the left (panoramas).

    Raises:
        UserError: For a stride that would leave gaps, and for `residuals`, which have no one size
            to cut.
    """
    check_windows(size, stride)
    (height, width), (down, right) = _pair(size), _pair(stride)
    one_of("weighting of windows", weights, WEIGHTS)

    def canvas(x: Tensor, t: float) -> DenoiseCalls[Prediction]:
        windows = [
            (rows[:, None], columns)
            for rows in _windows(x.shape[2], height, down, False)
            for columns in _windows(x.shape[3], width, right, circular)
        ]
        if len(windows) == 1:
            return (yield from denoise(x, t))
        predictions = yield from gather(
            [_predict_window(denoise, x, t, window) for window in windows]
        )
        average = partial(_average, x, windows, _shares(windows, x.shape[2:], weights))
        variances = [p.variance for p in predictions if p.variance is not None]
        return Prediction(
            average([p.x0 for p in predictions]),
            average([p.eps for p in predictions]),
            average(variances) if variances else None,
        )

    return canvas


def check_windows(size: int | tuple[int, int], stride: int | tuple[int, int]) -> None:
    """Raise `UserError` for a stride that would leave gaps between windows."""
    (height, width), (down, right) = _pair(size), _pair(stride)
    if not (1 <= down <= height and 1 <= right <= width):
        raise UserError(
            f"windows of {height} x {width} cells every {down} x {right}: "
            "expected strides from 1 to the window's side"
        )


def identity_settings(x: Tensor, point: Any) -> dict[str, Any]:
    """Return one window around all of x: see the folder's docstring."""
    return {"size": tuple(x.shape[2:]), "stride": tuple(x.shape[2:])}


def _pair(sides: int | tuple[int, int]) -> tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else sides


def _windows(length: int, size: int, stride: int, circular: bool) -> list[Tensor]:
    """Return the cells of each window along one side, every `stride`.

    The last window ends at the edge; a circle has no edge.
    """
    size = min(size, length)
    last = length - size
    starts = range(0, length, stride) if circular else [*range(0, last, stride), last]
    return [torch.arange(start, start + size) % length for start in starts]


def _shares(
    windows: Sequence[tuple[Tensor, Tensor]], sides: Sequence[int], weights: str
) -> list[Tensor]:
    """Return each window's share of each of its cells, float64.

    Shares of a cell add up to 1; that of a cell in one window is exactly 1.
    """

    def profile(count: int) -> Tensor:
        if weights == "uniform":
            return torch.ones(count, dtype=torch.float64)
        middles = torch.arange(count, dtype=torch.float64) + 0.5
        return torch.sin(torch.pi * middles / count).square()

    weight = profile(len(windows[0][0]))[:, None] * profile(len(windows[0][1]))
    total = torch.zeros(*sides, dtype=torch.float64)
    for window in windows:
        total[window] = total[window] + weight
    return [weight / total[window] for window in windows]


def _average(
    x: Tensor,
    windows: Sequence[tuple[Tensor, Tensor]],
    shares: Sequence[Tensor],
    parts: Sequence[Tensor],
) -> Tensor:
    """Average the windows (eq. 5), one after the other."""
    canvas = torch.zeros(x.shape, dtype=parts[0].dtype, device=x.device)
    for (rows, columns), share, part in zip(windows, shares, parts, strict=True):
        cells = canvas[:, :, rows, columns]
        canvas[:, :, rows, columns] = cells + share.to(part.device, part.dtype) * part
    return canvas


def _predict_window(
    denoise: DenoiseFn, x: Tensor, t: float, window: tuple[Tensor, Tensor]
) -> DenoiseCalls[Prediction]:
    """Predict one window, with its part of the canvas' conditioning."""
    rows, columns = window
    run = denoise(x[:, :, rows, columns], t)
    return map_calls(run, lambda calls: [_cut(call, x, window) for call in calls])


def _cut(call: DenoiserCall, x: Tensor, window: tuple[Tensor, Tensor]) -> DenoiserCall:
    """Cut the canvas' conditioning to the window."""
    conditioning, concat = call.conditioning, call.conditioning.concat
    if conditioning.residuals:
        raise UserError(
            "a large canvas cannot cut residuals (ControlNet) into windows: "
            "expected none, or a canvas of the model's size"
        )
    if concat is None:
        return call
    if concat.shape[2:] != x.shape[2:]:
        raise UserError(
            f"concat of shape {tuple(concat.shape)} for a canvas of {x.shape[2]} x {x.shape[3]} "
            "cells: expected the canvas' height and width"
        )
    concat = concat[:, :, window[0], window[1]]
    return replace(call, conditioning=replace(conditioning, concat=concat))
