"""Autoguidance: a smaller or less trained network, under the same condition.

(Karras et al. 2024, arXiv:2406.02507.) Both make the same kinds of mistakes, the weaker one larger:
away from it is away from the mistakes, and not from variety.
"""

from dataclasses import dataclass

from sfumato.batching import DenoiserLike
from sfumato.errors import UserError
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.guidance_models import Baseline, Pair
from sfumato.types import Conditioning


@dataclass(frozen=True)
class WeakerModel(Baseline):
    """Another model's denoiser, which the caller opens; "model" in a line of guidance.

    Args:
        path: Model to open: a name, a folder or a file.
    """

    path: str = ""

    def pair(
        self,
        denoiser: DenoiserLike,
        conditioning: Conditioning,
        negative: Conditioning,
        guide_model: DenoiserLike | None,
    ) -> Pair:
        """Return the guide model's denoiser with the conditioning.

        Raises:
            UserError: Without a guide model, or with one of another schedule (the same t would be
                another noise level) or of other classes.
        """
        if guide_model is None:
            raise UserError(
                f"guidance by a weaker model ({self.path or 'model'}) needs that model's denoiser: "
                "none was given"
            )
        if isinstance(denoiser, Denoiser) and isinstance(guide_model, Denoiser):
            self._check(denoiser, guide_model)
        return guide_model, conditioning

    def _check(self, denoiser: Denoiser, weaker: Denoiser) -> None:
        """Raise `UserError` for a weaker model of another schedule or of other classes."""
        name = f"the weaker model {self.path}"
        own, other = (d.process.schedule for d in (denoiser, weaker))
        if own != other:
            raise UserError(
                f"{name} has the schedule {other.kind}, the model {own.kind}: "
                "expected the same one, so that both mean the same noise by a time"
            )
        if denoiser.classes != weaker.classes:
            raise UserError(
                f"{name} has {weaker.classes or 'no'} classes (with the one for none), "
                f"the model {denoiser.classes or 'no'}: expected one trained on the same classes"
            )
