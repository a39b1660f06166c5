"""Autoguidance (Karras et al. 2024, arXiv:2406.02507): a smaller or less trained network, under the
same condition.

Both make the same kinds of mistakes, the weaker one larger: away from it is away from the mistakes,
and not from variety.
"""

from dataclasses import dataclass
from typing import Any

from sfumato.errors import UserError
from sfumato.types import Conditioning


@dataclass(frozen=True)
class Model:
    """path: which model, for whoever opens it: a name, a folder or a file. The caller hands over
    its denoiser as `weaker`.
    """

    path: str = ""

    condition = False

    def pair(
        self, denoiser: Any, conditioning: Conditioning, reference: Conditioning, weaker: Any
    ) -> tuple[Any, Conditioning]:
        """`UserError` without a weaker denoiser, or with one for which the same t means another
        noise level.
        """
        if weaker is None:
            raise UserError(
                f"guidance by a weaker model ({self.path or 'model'}) needs that model's denoiser: none was given"
            )
        ours, theirs = (
            getattr(getattr(d, "process", None), "schedule", None) for d in (denoiser, weaker)
        )
        if ours is not None and theirs is not None and ours != theirs:
            raise UserError(
                f"the weaker model {self.path or ''} has the schedule {_name(theirs)}, the model {_name(ours)}: expected the same one, "
                "so that both mean the same noise by a time"
            )
        here, there = (
            getattr(getattr(d, "network", None), "classes", 0) for d in (denoiser, weaker)
        )
        if here != there:
            raise UserError(
                f"the weaker model {self.path or ''} knows {there or 'no'} classes (with the one for none), the model {here or 'no'}: "
                "expected one trained on the same classes"
            )
        return weaker, conditioning


def _name(schedule: Any) -> str:
    return getattr(schedule, "kind", type(schedule).__name__)
