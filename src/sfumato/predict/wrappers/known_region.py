"""Inpainting with an ordinary model: the known region is predicted exactly.

A distribution that is one point z has the denoiser x0 = z, eps = (x - alpha z)/sigma. With it where
the mask m is 1, the model's elsewhere,

    x0 = m z + (1 - m) x0_model,      eps = m (x - alpha z)/sigma + (1 - m) eps_model,

every sampler keeps the known part of x_t at alpha_t z + sigma_t noise and ends there at z (LCM
nearly: its boundary condition blends x in). "Replacement" does the same by hand at each step
(Song et al. 2021, arXiv:2011.13456, appendix I.2; RePaint, Lugmayr et al. 2022, arXiv:2201.09865,
eq. 8); here samplers need no change.

It is not conditioning (Ho et al. 2022, arXiv:2204.03458, section 3.1; Trippe et al. 2022,
arXiv:2206.04119, on "replacement"): the model's input has the known part in x_t only, as noisy as
the rest, where the exact answer would depend on z itself. It is exact where known and unknown are
independent. How far off it is otherwise, for two cells of variance 1 and correlation rho, the exact
denoiser, and many steps:

                                slope at    variance     slope of the inpainted cell
                                rho = 0.8   about it     on the known one
    exact conditioning            0.80        0.36       rho
    deterministic samplers        0.34        0.67       rho/2 (1 - rho^2)^1/4
                                                         int_1^inf (u^2 - rho^2)^-5/4 du
    ancestral (ddpm)              0.50        0.52       (1 - sqrt(1 - rho^2))/rho
    edm with its churn of 40      0.69        0.43       -

(cosine schedule; 1000 steps of ddim, for the others 20,000 draws of 100 steps:
tests/oracles/test_wrappers.py). The inpainted part is tied too loosely to the known one. Samplers
that draw noise on the way do better, and the more the better (RePaint's resampling is that).
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
    denoise: DenoiseFn,
    z: Float[Tensor, "N C h w"],
    mask: Float[Tensor, "M K H W"],
    point: Point,
    first: Float[Tensor, "B C h w"] | None = None,
) -> DenoiseFn:
    """Keep z where the mask is 1, draw where it is 0, and blend predictions in between.

    A run begins at `start`, and its result goes through `finish`.

    Args:
        denoise: The denoiser of a run.
        z: (B or 1, C, h, w), standardised and finite; unused where the mask is 0.
        mask: (B or 1, 1 or C, h, w) in [0, 1].
        point: The schedule's t -> (alpha, sigma).
        first: Input of the network's first call in place of x, which may differ from x where z is
            known.

    Raises:
        UserError: For tensors that do not fit together.
    """
    check_region(z, mask)
    empty = not mask.any()
    first_inputs = [] if first is None or empty else [first]

    def inpaint(x: Tensor, t: float) -> DenoiseCalls[Prediction]:
        prediction = yield from denoise(first_inputs.pop() if first_inputs else x, t)
        alpha, sigma = point(t)
        if not sigma > 0:
            raise UserError(f"t={t}: expected a time in (0, 1], 0 has no noise to predict")
        kept, m = _like(x, z, mask)
        if empty:
            return prediction
        eps = (x - alpha * kept) * (1 / sigma)
        variance = prediction.variance
        if variance is not None:
            variance = _blend(torch.full_like(x, -1), variance, m)  # a point's is the smallest
        return Prediction(_blend(kept, prediction.x0, m), _blend(eps, prediction.eps, m), variance)

    return inpaint


def start(
    noise: Float[Tensor, "B _ _ _"],
    z: Float[Tensor, "N C h w"],
    mask: Float[Tensor, "M K H W"],
    point: Point,
    t: float,
) -> Float[Tensor, "B _ _ _"]:
    """Return x at the first time of a run.

    It is alpha z + sigma noise where z is known; elsewhere, as usual, noise of variance
    alpha^2 + sigma^2.

    Args:
        noise: Standard-normal noise.
        z: See `known_region`.
        mask: See `known_region`.
        point: The schedule's t -> (alpha, sigma).
        t: First time of the run.
    """
    check_region(z, mask)
    kept, m = _like(noise, z, mask)
    alpha, sigma = point(t)
    return _blend(alpha * kept + sigma * noise, math.hypot(alpha, sigma) * noise, m)


def finish(
    latents: Float[Tensor, "B _ _ _"], z: Float[Tensor, "N C h w"], mask: Float[Tensor, "M K H W"]
) -> Float[Tensor, "B _ _ _"]:
    """Put z back bit for bit where the mask is 1, which the sampler's arithmetic has rounded.

    Args:
        latents: Result of the run.
        z: See `known_region`.
        mask: See `known_region`.
    """
    check_region(z, mask)
    kept, m = _like(latents, z, mask)
    return torch.where(m == 1, kept, latents)


def identity_settings(x: Tensor, point: Point) -> dict[str, Any]:
    """Return an empty region: see the folder's docstring."""
    return {"z": torch.zeros_like(x), "mask": torch.zeros_like(x[:1, :1]), "point": point}


def _blend(a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    """Return m a + (1 - m) b, one rounding at a time; exactly a or b where m is 1 or 0."""
    return m * a + (1 - m) * b


def check_region(z: Tensor, mask: Tensor) -> None:
    """Raise `UserError` unless mask is in [0, 1], z is finite and both have one size."""
    if (
        mask.shape[2:] != z.shape[2:]
        or mask.shape[1] not in (1, z.shape[1])
        or (len(mask) != len(z) and 1 not in (len(mask), len(z)))
    ):
        raise UserError(
            f"a mask of shape {tuple(mask.shape)} for z of shape {tuple(z.shape)}: "
            f"expected (B or 1, 1 or {z.shape[1]}, {z.shape[2]}, {z.shape[3]})"
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
            f"z of shape {tuple(z.shape)} and a mask of shape {tuple(mask.shape)} "
            f"for latents of shape {tuple(shape)}: expected the same channels, height and width, "
            "and one for all or one an image"
        )


def _like(x: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return z and mask on the device and in the dtype of x (B, C, h, w).

    `UserError` if they are of other latents.
    """
    check_fits(x.shape, z, mask)
    return z.to(x.device, x.dtype), mask.to(x.device, x.dtype)
