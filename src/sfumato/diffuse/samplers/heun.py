"""Heun's method on the flow: Euler's step, then again with the mean of both slopes.

(Karras et al. 2022, arXiv:2206.00364, algorithm 1.) In x/alpha over sigma/alpha; for flows and zero
terminal SNR, where that is infinite at t = 1, in x/(alpha + sigma) over sigma/(alpha + sigma),
which for a flow is x over t.
"""

from torch import Tensor

from sfumato.diffuse.samplers import Noise, Run, Schedule, Times, traits
from sfumato.diffuse.samplers.edm import edm


@traits(order=2, calls=2)
def heun(x: Tensor, times: Times, schedule: Schedule, noise: Noise) -> Run:
    """Call the network twice a step, once for a last step to t = 0."""
    return (yield from edm(x, times, schedule, noise, churn=0.0))
