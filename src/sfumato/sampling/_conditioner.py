"""Questions about a conditioner that `plan.py` answers until `Conditioner` does.

merge: Conditioner.check, Conditioner.vector_width and a `masks_padding` replace this file.
"""

from collections.abc import Sequence

from sfumato.errors import UserError
from sfumato.predict.conditioners.class_embedding import ClassEmbedding
from sfumato.predict.conditioners.class_labels import ClassLabels
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.predict.conditioners.clip_text import ClipText
from sfumato.predict.conditioners.flux_text import FluxText
from sfumato.predict.conditioners.nothing import Nothing
from sfumato.predict.conditioners.sd3_text import Sd3Text
from sfumato.predict.conditioners.t5_text import T5Text
from sfumato.sampling.request import ConditionerLike
from sfumato.types import ImageSpec


def check_prompts(
    conditioner: ConditionerLike,
    prompts: Sequence[str | None],
    image_spec: ImageSpec,
    second: Sequence[str | None] | None = None,
) -> None:
    """Raise `UserError` for prompts that the conditioner refuses, without a weight."""
    check = getattr(conditioner, "check", None)
    if check is not None:
        check(prompts, image_spec, second)
    elif isinstance(conditioner, Nothing):
        conditioner(prompts)
    elif isinstance(conditioner, ClassNames | ClassLabels | ClassEmbedding):
        labels = [conditioner.label(prompt) for prompt in prompts]
        if (
            isinstance(conditioner, ClassEmbedding)
            and not conditioner.unconditional
            and min(labels) < 0
        ):
            raise UserError(
                "this model has no row for no class: expected a class for every image, and guidance 1"
            )


def fills_vector(conditioner: ConditionerLike) -> bool | None:
    """True where the conditioner gives a `Conditioning.vector`; None: not known."""
    if hasattr(conditioner, "vector_width"):  # merge: Conditioner.vector_width
        return conditioner.vector_width is not None  # pyright: ignore
    if isinstance(conditioner, ClipText):
        return conditioner.encoder_2 is not None
    if isinstance(conditioner, ClassNames | ClassLabels | FluxText | Sd3Text | T5Text):
        return True
    return False if type(conditioner).__module__.startswith("sfumato.") else None


def masks_padding(conditioner: ConditionerLike) -> bool:
    """True where the conditioner masks padded words."""
    config = getattr(conditioner, "config", None)
    return bool(getattr(config, "mask_padding", getattr(config, "masked", False)))
