"""The denoiser: network + process, (x, t, conditioning) -> Prediction(x0, eps). Casts happen here and nowhere else.

Coefficients are float64, the state float32, the network runs in its own dtype.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.diffuse.process import Process
from sfumato.types import Conditioning, Prediction


@dataclass(frozen=True)
class Denoiser:
    """A network that speaks the process's parameterization. `t` is one number, or one an image (B,)."""

    network: nn.Module
    process: Process

    def output(self, x: Float[Tensor, "B C h w"], t: float | Tensor, conditioning: Conditioning) -> Float[Tensor, "B C h w"]:
        """The network's raw output y at x, float32."""
        dtype = next(self.network.parameters()).dtype
        timestep = self.process.schedule.timestep(torch.as_tensor(t, dtype=torch.float64)).to(x.device, torch.float32)
        y = self.network(x.to(dtype), timestep.expand(len(x)), conditioning.to(x.device, dtype))
        return y.float()

    def __call__(self, x: Float[Tensor, "B C h w"], t: float | Tensor, conditioning: Conditioning) -> Prediction:
        """What x is made of, according to the network: x0 and eps, float32."""
        return self.process.split(x.float(), self.output(x, t, conditioning), t)
