"""SiT: DiT's transformer, trained as a flow (Ma et al. 2024, arXiv:2401.08740, sections 2.1 and 3;
github.com/willisma/SiT, models.py).

Theirs runs from noise at 0 to pictures at 1, along x = s z + (1 - s) eps, and answers dx/ds = z -
eps. Ours is `flow`, from pictures at 0 to noise at 1 with y = eps - z, so that with timesteps of
1000 t

    y = -network(x, s = 1 - timestep / 1000)

The waves of s have the frequencies 10000^(-k/128), k = 0 ... 127, of the original; diffusers' DiT
has 10000^(-k/127) instead. Weights have DiT's names and DiT's files. diffusers has no such class:
the config's is our own.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from sfumato.nn.embeddings import sinusoidal
from sfumato.predict.networks._patch_transformer import WAVES
from sfumato.predict.networks.dit import DiT, DiTConfig
from sfumato.types import Conditioning


@dataclass(frozen=True)
class SiTConfig(DiTConfig):
    """The numbers of a SiT: DiT's, with the eps of the original in all norms."""

    norm_eps: float = 1e-6

    def to_dict(self) -> dict[str, Any]:
        """The JSON of config.json."""
        return {**super().to_dict(), "_class_name": "SfumatoSiT"}


class SiTTransformer(DiT):
    """The transformer: see the module's docstring. Its process is a flow, whatever the times are
    shifted to.
    """

    config: SiTConfig
    parameterization: ClassVar[str | None] = "flow"

    def waves(self, timestep: Float[Tensor, " B"]) -> Float[Tensor, "B W"]:
        """Sines and cosines of s."""
        return sinusoidal(1 - timestep.float() / 1000, WAVES)

    @property
    def learned_variance(self) -> bool:
        """The channels behind what it predicts were never trained, and are left out."""
        return False

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B C h w"]:
        """x noisy latent, timestep in 0..1000, conditioning with `vector` -> eps - z."""
        return -super().forward(x, timestep, cond)[:, : self.channels]


CLASSES = {"SfumatoSiT": (SiTTransformer, SiTConfig)}
