"""Exponential moving average of weights.

    avg <- d*avg + (1-d)*w   with d = min(decay, (1+n)/(10+n)) at update n

The ramp forgets the random start (Tan & Le 2019's implementation of Polyak averaging); averages are
float32 in any case.
"""

import copy

import torch
from torch import Tensor, nn


class EMA:
    """The average of a network's floating-point weights.

    Attributes:
        network: A frozen copy with the averaged weights.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.network = copy.deepcopy(network).float().eval().requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """The averaged state dict."""
        return self.network.state_dict()

    @torch.no_grad()
    def update(self, network: nn.Module, updates: int) -> None:
        """Average in the weights after `updates` earlier updates."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        for a, b in zip(self.network.parameters(), network.parameters(), strict=True):
            a.lerp_(b.detach().float(), 1 - decay)
        for a, b in zip(self.network.buffers(), network.buffers(), strict=True):
            a.copy_(b)
