r"""Rules by which a prompt's weights act on a text encoder's states.

With the states z of a chunk, their tokens' weights w, and the states z_0 of an empty prompt:

    lerp            z_0 + w (z - z_0): ComfyUI's rule (comfy/sd1_clip.py, encode_token_weights)
                    with AUTOMATIC1111's notation; the default
    comfyui         the same rule with ComfyUI's notation
    a1111           f w z, f = mean(z)/mean(w z): AUTOMATIC1111's "Original"
                    (modules/sd_emphasis.py)
    a1111_no_norm   w z: its "No norm"
    none            z; brackets and BREAK are text, as in diffusers

There are no papers. Only f acts on tokens of weight 1. The mean of a chunk is near 0 for encoders
without a final norm (SDXL's), so that f can be large or negative. It stays as it is in that
program, whose images depend on it, and is logged (level warning).
"""

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.errors import UserError
from sfumato.predict.conditioners._prompt import Segment, parse, parse_comfyui
from sfumato.predict.text_encoders.clip import Token

logger = logging.getLogger(__name__)

LERP = ("lerp", "comfyui")
"""The rules that need the states of an empty prompt."""
USUAL = (0.5, 2.0)
"""Factors of AUTOMATIC1111's rule beyond these are logged."""


def segments(prompt: str, rule: str) -> list[Segment]:
    """Parse a prompt by a rule's notation: pieces (text, weight) between BREAKs.

    Raises:
        UserError: For weights and notations that are refused.
    """
    if rule == "none":
        return [[(prompt, 1.0)]]
    return [parse_comfyui(prompt)] if rule == "comfyui" else parse(prompt)


def weigh(
    states: Float[Tensor, "L D"],
    chunk: Sequence[Token],
    rule: str,
    empty: Float[Tensor, "L D"] | None = None,
) -> Float[Tensor, "L D"]:
    """Weigh the states of a chunk's tokens. They are unchanged if all weigh 1.

    Args:
        states: The states of a chunk, in which begin, end and padding weigh 1.
        chunk: The chunk's tokens.
        rule: One of the rules above.
        empty: The states of an empty prompt; not None for the rules `LERP`.

    Raises:
        UserError: For weights that leave no mean to divide by (rule a1111).
    """
    if all(token.weight == 1 for token in chunk):
        return states
    weights = torch.ones(len(states), 1)
    weights[1 : len(chunk) + 1, 0] = torch.tensor([token.weight for token in chunk])
    weights = weights.to(states.device)
    if rule in LERP:
        assert empty is not None
        return torch.where(weights == 1, states, empty + weights * (states - empty))
    weighted = states * weights
    return weighted * _factor(states, weighted, chunk) if rule == "a1111" else weighted


def _factor(states: Tensor, weighted: Tensor, chunk: Sequence[Token]) -> Tensor:
    """The factor that restores the mean."""
    factor, values = states.mean() / weighted.mean(), sorted({token.weight for token in chunk})
    if not torch.isfinite(factor):
        raise UserError(
            f"weights {values} leave a prompt no mean, by which a1111 divides: "
            "expected the rule lerp, or other weights"
        )
    if not USUAL[0] <= factor <= USUAL[1]:
        logger.warning(
            "weights %s multiply all states of a prompt by %.3g under the rule a1111, as in that "
            "program: the mean of this text encoder is near 0, and lerp has no such factor",
            values,
            float(factor),
        )
    return factor
