"""DDPM ancestral sampling: a draw from the posterior q(x_s | x_t, x0).

(Ho et al. 2020, arXiv:2006.11239, eq. 6-7.) With r = alpha_t / alpha_s and
beta = sigma_t^2 - r^2 sigma_s^2 (the variance added between s and t):

    mean      r*(sigma_s^2/sigma_t^2)*x_t + alpha_s*(beta/sigma_t^2)*x0
    variance  beta*sigma_s^2/sigma_t^2 ("small") or beta ("large"); or the network's, on the line
              through their logarithms ("learned"; Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15)

s and t need not be neighbours in the table. The learned variance lies between the two of the step
that is taken (section 4).
"""

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.errors import UserError
from sfumato.validate import one_of


@traits(order=1, noise=True)
def ddpm(
    x: Tensor,
    times: Times,
    schedule: Schedule,
    noise: Noise,
    variance: Literal["small", "large", "learned"] = "small",
) -> Run:
    """Call the network once a step.

    Options:
        variance: "small", eq. 7's beta-tilde (exact for a point), "large", beta (exact for a
            standard normal), or "learned", the network's.

    Raises:
        UserError: For "learned" with a network that predicts no variance.
    """
    one_of("variance", variance, ("small", "large", "learned"))
    for t, s in pairwise(times):
        prediction = yield x, t
        learned = prediction.variance if variance == "learned" else None
        if variance == "learned" and learned is None:
            raise UserError(
                "ddpm with variance 'learned': this network predicts no variance; "
                "expected 'small' or 'large'"
            )
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.point(t), schedule.point(s)
        ratio = alpha_t / alpha_s
        added = sigma_t**2 - ratio**2 * sigma_s**2
        x = prediction.at(alpha_s * added / sigma_t**2, 0.0, ratio * sigma_s**2 / sigma_t**2, x)
        if sigma_s > 0:  # the last step is its mean: no noise is added at t = 0
            spread = math.sqrt(added * (sigma_s**2 / sigma_t**2 if variance == "small" else 1.0))
            if learned is None:
                x.add_(spread * noise())
            else:  # 1 is the large one; -1 makes it smaller by sigma_s/sigma_t
                x.add_(
                    ((1 - learned) * (math.log(sigma_s / sigma_t) / 2))
                    .exp_()
                    .mul_(spread)
                    .mul_(noise())
                )
    return x
