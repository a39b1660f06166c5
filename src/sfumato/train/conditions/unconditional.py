"""No condition: images without classes, for an unconditional network."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from sfumato.errors import UserError
from sfumato.predict.conditioners.base import ClassConditioner
from sfumato.predict.conditioners.unconditional import Unconditional as NoPrompts
from sfumato.train.conditions.base import Condition, Source
from sfumato.types import Conditioning


class Unconditional(Condition):
    """No condition: every row is the null condition."""

    name = "unconditional"
    rank = 9
    prompts = (None,)

    def __init__(self, conditioner: ClassConditioner | None = None):
        self.conditioner = conditioner or NoPrompts()

    @classmethod
    def open(cls, source: Source) -> Self:
        """No condition; `UserError` for a network that needs one."""
        if source.init is not None:
            conditioner = source.init.conditioner
            assert isinstance(conditioner, ClassConditioner)
            return cls(conditioner)
        if source.network.is_conditional:
            raise UserError(
                f"a {type(source.network).__name__} is conditioned on classes or text, and "
                f"{source.images.name} has no classes: expected a folder for each class, captions "
                "with --text, or an unconditional network"
            )
        return cls()

    def conditioning(self, batch: Mapping[str, Tensor]) -> Conditioning:
        """The null condition of each row."""
        return self.null(len(next(iter(batch.values()))))

    def null(self, count: int) -> Conditioning:
        """The null condition, `count` times."""
        return self.conditioner.null(count)

    def record(self) -> dict[str, Any]:
        """The conditioner's config."""
        return {"conditioner": self.conditioner.to_config()}
