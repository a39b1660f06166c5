"""SiT: DiT's transformer, trained as a flow.

Ma et al. 2024, arXiv:2401.08740, sections 2.1 and 3; github.com/willisma/SiT, models.py.

The original runs from noise at 0 to images at 1, along x = s z + (1 - s) eps, and predicts dx/ds =
z - eps. `flow` runs from images at 0 to noise at 1 with y = eps - z, so that with timesteps of 1000
t

    y = -network(x, s = 1 - timestep / 1000)

The sinusoidal features of s have the frequencies 10000^(-k/128), k = 0 ... 127, of the original;
diffusers' DiT has 10000^(-k/127) instead. Weights have DiT's names and DiT's files. diffusers has
no such class: the name in the config is sfumato's own.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sfumato.nn.embeddings import sinusoidal
from sfumato.predict.networks.base import SINUSOIDAL_WIDTH
from sfumato.predict.networks.dit import DiT, DiTConfig
from sfumato.types import Conditioning


@dataclass(frozen=True)
class SiTConfig(DiTConfig):
    """The numbers of a SiT: DiT's, with the eps of the original in all norms."""

    class_name = "SfumatoSiT"

    norm_eps: float = 1e-6


class SiTTransformer(DiT):
    """The transformer: see the module's docstring.

    Its process is a flow, for every shift of the times.
    """

    config: SiTConfig
    parameterization: ClassVar[str | None] = "flow"

    def time_features(self, timestep: Float[Tensor, " B"]) -> Float[Tensor, "B W"]:
        """Sinusoidal features of s."""
        return sinusoidal(1 - timestep.float() / 1000, SINUSOIDAL_WIDTH)

    @property
    def learned_variance(self) -> bool:
        """False: the channels behind the target were never trained, and are left out."""
        return False

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B C h w"]:
        """The velocity eps - z. Arguments as in `DiT.forward`."""
        return -super().forward(x, timestep, cond)[:, : self.channels]


CLASSES = {"SfumatoSiT": (SiTTransformer, SiTConfig)}
