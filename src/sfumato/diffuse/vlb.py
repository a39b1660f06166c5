"""Variational lower bound, the loss of a learned variance.

(Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.1.) A step of a table, from t to the time s
before it, has the posterior q(x_s | x_t, z) with variance small = beta sigma_s^2/sigma_t^2. The
model has p(x_s | x_t) with log variance log small + d, d = v (log large - log small) and large =
beta (eq. 15). The means differ by alpha_s beta/sigma_t^2 (z - x0), so

    L_{t-1} = KL(q || p) = (d + e^-d - 1 + w e^-d (z - x0)^2)/2       (eq. 6)
    w = alpha_s^2 beta/(sigma_t^2 sigma_s^2)

The first step of the table, to s = 0, has no posterior with a variance. There L_0 = -log p(z |
x_t), of a Gaussian with mean x0 and a variance between the small one of the step after it and
large. Published code (`discretized_gaussian_log_likelihood` of improved-diffusion and DiT) has the
probability of one of 256 grey values of pixels in [-1, 1] there. Latents are continuous and have
densities instead. Where the variance is wide against a grey value the two differ by a constant.
Densities may exceed 1, so L_0, and with it the bound, may be negative.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import Schedule
from sfumato.errors import UserError


def check_has_vlb(schedule: Schedule) -> None:
    """Raise `UserError` for a schedule without a table of steps, which has no such bound."""
    if schedule.grid is None:
        raise UserError(
            f"a learned variance with schedule {schedule.kind!r}: its loss is for tables of betas, "
            "such as cosine; expected variance=0 in the loss, which trains the mean alone, "
            "or a network with as many output channels as the latent has"
        )


def log_variances(schedule: Schedule, t: Float[Tensor, " B"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log small, log large, w) of the step of a table that begins at t.

    Args:
        schedule: One with a table.
        t: Times of the table.

    Returns:
        Three float64 tensors (B,). w of the first step, to s = 0, is infinite.
    """

    def at_step(number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            schedule.at(schedule.time(number)),
            schedule.at(schedule.time(number - 1)),
        )
        added = sigma_t.square() - (alpha_t / alpha_s * sigma_s).square()
        return (
            (added * (sigma_s / sigma_t).square()).log(),
            added.log(),
            (alpha_s / sigma_t / sigma_s).square() * added,
        )

    number = schedule.timestep(t).round()  # 0 is the first step
    small, large, weight = at_step(number)
    return torch.where(number == 0, at_step(torch.ones_like(number))[0], small), large, weight


def bound(
    process: Process,
    z: Float[Tensor, "B C h w"],
    x0: Float[Tensor, "B C h w"],
    variance: Float[Tensor, "B C h w"],
    t: Float[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """Return L_{t-1} of the step that begins at t, times the number T of steps.

    Its mean over uniform t is L_vlb (eq. 4) but for the prior's term, which has no parameters.

    Args:
        process: One whose schedule has a table.
        z: Clean latents.
        x0: Predictions of them.
        variance: 2 v - 1, see `types.Prediction`.
        t: Times of the table.

    Returns:
        Bits per number, one mean an image.

    Raises:
        UserError: For a schedule without a table.
    """
    check_has_vlb(process.schedule)
    assert process.schedule.grid is not None
    coefficients = log_variances(process.schedule, t)
    small, large, weight = (c.to(z.device, z.dtype).reshape(-1, 1, 1, 1) for c in coefficients)
    added = (variance + 1) / 2 * (large - small)
    error = (z - x0).square()
    step = torch.expm1(-added) + added + weight.nan_to_num(posinf=0.0) * (-added).exp() * error
    first = math.log(2 * math.pi) + small + added + (-small - added).exp() * error
    terms = torch.where(weight.isinf(), first, step) / 2
    return process.schedule.grid / math.log(2) * terms.mean((1, 2, 3))
