"""Conditions of training, one file a condition."""

from sfumato.errors import UserError
from sfumato.registry import find, names
from sfumato.train.conditions.base import Condition, Source, WordsConfig

__all__ = ["Condition", "Source", "WordsConfig", "open_condition"]


def open_condition(source: Source) -> Condition:
    """The condition of a run: of those that the source has, the one of the lowest rank.

    Captions come first, where a text encoder is named, then classes, then none.

    Raises:
        UserError: For data and a network that do not fit.
    """
    if source.network.guidance_embeds:
        raise UserError(
            "guidance_embeds=True: the strength of guidance is learned from another model, "
            "not from data; expected False"
        )
    folder = "train.conditions"
    kinds: list[type[Condition]] = [find(folder, name) for name in names(folder)]
    kinds.sort(key=lambda kind: kind.rank)
    return next(c for c in (kind.open(source) for kind in kinds) if c is not None)
