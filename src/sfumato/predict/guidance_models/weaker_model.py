"""Autoguidance: a smaller or less trained network, under the same condition.

(Karras et al. 2024, arXiv:2406.02507.) Both make the same kinds of mistakes, the weaker one larger:
away from it is away from the mistakes, and not from variety.
"""

from dataclasses import dataclass
from typing import Any

from sfumato.errors import UserError
from sfumato.types import Conditioning


@dataclass(frozen=True)
class WeakerModel:
    """Another model's denoiser, which the caller opens; "model" in a line of guidance.

    Args:
        path: Model to open: a name, a folder or a file.
    """

    path: str = ""

    takes_negative = False

    def pair(
        self, denoiser: Any, conditioning: Conditioning, negative: Conditioning, guide_model: Any
    ) -> tuple[Any, Conditioning]:
        """Return the guide model's denoiser with the conditioning.

        Raises:
            UserError: Without a guide model, or with one of another schedule (the same t would be
                another noise level) or of other classes.
        """
        if guide_model is None:
            raise UserError(
                f"guidance by a weaker model ({self.path or 'model'}) needs that model's denoiser: none was given"
            )
        schedule, weaker = (
            getattr(getattr(d, "process", None), "schedule", None) for d in (denoiser, guide_model)
        )
        if schedule is not None and weaker is not None and schedule != weaker:
            raise UserError(
                f"the weaker model {self.path or ''} has the schedule {_name(weaker)}, the model {_name(schedule)}: expected the same one, "
                "so that both mean the same noise by a time"
            )
        classes, weaker_classes = (
            getattr(getattr(d, "network", None), "classes", 0) for d in (denoiser, guide_model)
        )
        if classes != weaker_classes:
            raise UserError(
                f"the weaker model {self.path or ''} has {weaker_classes or 'no'} classes (with the one for none), the model "
                f"{classes or 'no'}: expected one trained on the same classes"
            )
        return guide_model, conditioning


def _name(schedule: Any) -> str:
    return getattr(schedule, "kind", type(schedule).__name__)
