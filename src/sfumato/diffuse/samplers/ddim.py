"""DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12): x_s = alpha_s*x0 + sqrt(sigma_s^2 - nu^2)*eps + nu*noise.

nu is the standard deviation of eq. 16 written for any (alpha, sigma):
nu^2 = eta^2 * sigma_s^2 * (1 - (alpha_t*sigma_s / (alpha_s*sigma_t))^2). eta 0 is deterministic, eta 1 is DDPM.
"""

from collections.abc import Generator, Sequence
from itertools import pairwise

from torch import Tensor

from sfumato.diffuse.schedule import Schedule
from sfumato.errors import UserError
from sfumato.types import Noise, Prediction


def ddim(
    x: Tensor, times: Sequence[float], schedule: Schedule, noise: Noise, eta: float = 0.0
) -> Generator[tuple[Tensor, float], Prediction, Tensor]:
    """eta in [0, 1] (`UserError` otherwise). Order 1; one network call a step."""
    if not 0 <= eta <= 1:
        raise UserError(f"eta={eta}: expected a number in [0, 1], 0 is deterministic and 1 is DDPM")
    for t, s in pairwise(times):
        prediction = yield x, t
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
        nu2 = eta**2 * sigma_s**2 * (1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2)
        x = float(alpha_s) * prediction.x0 + float((sigma_s**2 - nu2).sqrt()) * prediction.eps
        if nu2 > 0:
            x = x + float(nu2.sqrt()) * noise()
    return x
