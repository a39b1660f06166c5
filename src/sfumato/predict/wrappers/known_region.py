"""Inpainting with an ordinary model: what is known is predicted exactly, and only the rest is asked
for.

A distribution that is one point z has the denoiser x0 = z, eps = (x - alpha z)/sigma. With it where
the mask m is 1, the model's elsewhere,

    x0 = m z + (1 - m) x0_model,      eps = m (x - alpha z)/sigma + (1 - m) eps_model,

every sampler keeps the known part of x_t at alpha_t z + sigma_t noise and ends there at z (LCM
nearly: its boundary condition blends x in). It is what "replacement" does by hand at each step
(Song et al. 2021, arXiv:2011.13456, appendix I.2; RePaint, Lugmayr et al. 2022, arXiv:2201.09865,
eq. 8), without a word in the sampler.

It is not conditioning (Ho et al. 2022, arXiv:2204.03458, section 3.1; Trippe et al. 2022,
arXiv:2206.04119, on "replacement"): the model sees the known part through x_t only, as noisy as the
rest, where the exact answer would know z itself. It is exact where known and unknown are
independent. How far off it is otherwise, for two cells of variance 1 and correlation rho, the exact
denoiser, and many steps:

                                   slope of the found cell on the known one                 at rho =
                                   0.8   variance about it
    exact conditioning             rho                                                      0.80
                                   0.36
    deterministic samplers         rho/2 (1 - rho^2)^1/4 int_1^inf (u^2 - rho^2)^-5/4 du    0.34
                                   0.67
    ancestral (ddpm)               (1 - sqrt(1 - rho^2))/rho                                0.50
                                   0.52
    edm with its churn of 40       -                                                        0.69
                                   0.43

(cosine schedule; 1000 steps of ddim, for the others 20,000 draws of 100 steps:
tests/oracles/test_wrappers.py). What is found is tied too loosely to what is known. Samplers that
draw noise on the way do better, and the more the better (RePaint's resampling is that).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.batching import DenoiseCalls, DenoiseFn
from sfumato.errors import UserError
from sfumato.types import Prediction

Point = Callable[[float], tuple[float, float]]


def known_region(
    ask: DenoiseFn,
    z: Float[Tensor, "N C h w"],
    mask: Float[Tensor, "M K H W"],
    point: Point,
    first: Float[Tensor, "B C h w"] | None = None,
) -> DenoiseFn:
    """z is kept where mask is 1 and found where it is 0; in between the predictions are blended.

    z: (B or 1, C, h, w), standardised; what lies under 0 is not looked at, but must be finite.
    mask: (B or 1, 1 or C, h, w) in [0, 1]. point: t -> (alpha, sigma). Begin the run at `start`,
    and give what it ends with to `finish`. `UserError` for what does not fit. first: what the
    network sees at the first question in place of x, from which it may differ where z is known.
    """
    check_region(z, mask)
    nothing = not mask.any()
    waiting = [] if first is None or nothing else [first]

    def known(x: Tensor, t: float) -> DenoiseCalls[Prediction]:
        found = yield from ask(waiting.pop() if waiting else x, t)
        alpha, sigma = point(t)
        if not sigma > 0:
            raise UserError(
                f"t={t}: there is no noise, and so nothing to ask: expected a time in (0, 1]"
            )
        kept, m = _like(x, z, mask)
        if nothing:
            return found
        eps = (x - alpha * kept) * (1 / sigma)
        # of a point: the smallest
        variance = (
            None if found.variance is None else _mixed(torch.full_like(x, -1), found.variance, m)
        )
        return Prediction(_mixed(kept, found.x0, m), _mixed(eps, found.eps, m), variance)

    return known


def start(
    noise: Float[Tensor, "B _ _ _"],
    z: Float[Tensor, "N C h w"],
    mask: Float[Tensor, "M K H W"],
    point: Point,
    t: float,
) -> Float[Tensor, "B _ _ _"]:
    """x at the first time of a run: alpha z + sigma noise where z is known; elsewhere the usual,
    noise of variance alpha^2 + sigma^2.
    """
    check_region(z, mask)
    kept, m = _like(noise, z, mask)
    alpha, sigma = point(t)
    return _mixed(alpha * kept + sigma * noise, math.hypot(alpha, sigma) * noise, m)


def finish(
    found: Float[Tensor, "B _ _ _"], z: Float[Tensor, "N C h w"], mask: Float[Tensor, "M K H W"]
) -> Float[Tensor, "B _ _ _"]:
    """The end of a run with z put back bit for bit where the mask is 1: the sampler's own
    arithmetic had rounded it.
    """
    check_region(z, mask)
    kept, m = _like(found, z, mask)
    return torch.where(m == 1, kept, found)


def off(x: Tensor, point: Point) -> dict[str, Any]:
    """Nothing is known."""
    return {"z": torch.zeros_like(x), "mask": torch.zeros_like(x[:1, :1]), "point": point}


def _mixed(known: Tensor, found: Tensor, m: Tensor) -> Tensor:
    """m known + (1 - m) found, one rounding at a time; where m is 0 or 1 it is the one or the other
    to the last bit.
    """
    return m * known + (1 - m) * found


def check_region(z: Tensor, mask: Tensor) -> None:
    """Raise `UserError` unless the mask has values in [0, 1], z is finite, and the one can be laid
    on the other.
    """
    if (
        mask.shape[2:] != z.shape[2:]
        or mask.shape[1] not in (1, z.shape[1])
        or (len(mask) != len(z) and 1 not in (len(mask), len(z)))
    ):
        raise UserError(
            f"a mask of shape {tuple(mask.shape)} for z of shape {tuple(z.shape)}: expected (B or 1, 1 or {z.shape[1]}, "
            f"{z.shape[2]}, {z.shape[3]})"
        )
    if not torch.isfinite(z).all():
        raise UserError(
            "z has numbers that are NaN or infinite: expected finite ones, also where the mask is 0"
        )
    low, high = (float(v) for v in mask.aminmax())
    if not (low >= 0 and high <= 1):  # a NaN fails too
        raise UserError(
            f"a mask with values from {low:.4g} to {high:.4g}: expected [0, 1], 1 is known"
        )


def check_fits(shape: Sequence[int], z: Tensor, mask: Tensor) -> None:
    """Raise `UserError` unless z and mask fit latents of `shape` (B, C, h, w)."""
    if z.shape[1:] != tuple(shape[1:]) or any(len(v) not in (1, shape[0]) for v in (z, mask)):
        raise UserError(
            f"z of shape {tuple(z.shape)} and a mask of shape {tuple(mask.shape)} for latents of shape {tuple(shape)}: expected the "
            "same channels, height and width, and one for all or one an image"
        )


def _like(x: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """z and mask on the device and in the dtype of x (B, C, h, w); `UserError` if they are of other
    latents.
    """
    check_fits(x.shape, z, mask)
    return z.to(x.device, x.dtype), mask.to(x.device, x.dtype)
