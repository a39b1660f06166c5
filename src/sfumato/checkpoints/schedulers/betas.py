"""Tables of betas: a file's `betas` buffer <-> diffusers' scheduler fields.

Latent Diffusion's "linear" schedule is linear in the square root: "scaled_linear" here and in
diffusers. Its "sqrt_linear" is "linear" here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.diffuse.schedule import BetaTable, schedule
from sfumato.errors import UserError

KINDS = {"linear": "linear", "scaled_linear": "scaled_linear"}
KINDS |= {"squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
"""diffusers' beta_schedule -> the kind of `BetaTable`."""
_STORED = ("scaled_linear", "linear", "squaredcos_cap_v2")
"""Values of beta_schedule in the original layout."""
_CLOSE = 1e-6


def beta_table(kind: str, steps: int, start: float, end: float) -> BetaTable:
    """Return the table of a `beta_schedule`; the cosine's has no ends to choose."""
    ends = {} if kind == "squaredcos_cap_v2" else {"start": start, "end": end}
    made = schedule(KINDS[kind], steps=steps, **ends)
    assert isinstance(made, BetaTable)
    return made


def fields(
    start: float, end: float, steps: int = 1000, kind: str = "scaled_linear"
) -> dict[str, Any]:
    """Return the four scheduler fields of a schedule in closed form."""
    return dict(num_train_timesteps=steps, beta_schedule=kind, beta_start=start, beta_end=end)


def to_fields(betas: Tensor, where: object) -> dict[str, Any]:
    """Return the scheduler fields of a table of betas.

    Args:
        betas: (T,) in (0, 1).
        where: What holds the table, for the error.

    Returns:
        The closed form that the table follows to float32's rounding, else the table itself.

    Raises:
        UserError: A tensor that is no table of betas.
    """
    values = betas.double()
    if values.ndim != 1 or len(values) < 2 or not bool(((values > 0) & (values < 1)).all()):
        raise UserError(
            f"{where}: betas of shape {tuple(betas.shape)}: "
            "expected a list of numbers strictly between 0 and 1"
        )
    start, end, steps = float(f"{values[0]:.6g}"), float(f"{values[-1]:.6g}"), len(values)
    cosine = fields(0.0001, 0.02, steps, "squaredcos_cap_v2")
    rounding = 1e-4 if betas.dtype != torch.float64 else _CLOSE
    for closed, rtol in (
        (fields(start, end, steps, "scaled_linear"), rounding),
        (fields(start, end, steps, "linear"), rounding),
        (cosine, 1e-4),
    ):
        if torch.allclose(values, table(closed), rtol=rtol, atol=_CLOSE):
            return closed
    return fields(start, end, steps, "linear") | {"trained_betas": values.tolist()}


def table(config: Mapping[str, Any]) -> Tensor:
    """Return the betas (T,), float64, of a scheduler config.

    Raises:
        UserError: A config without a table of betas, such as a flow's.
    """
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float64)
    kind, name = config.get("beta_schedule", "linear"), config.get("_class_name")
    if kind not in _STORED or name in ("FlowMatchEulerDiscreteScheduler", "SfumatoProcess"):
        raise UserError(
            f"scheduler {name!r} with beta_schedule {kind!r} has no table of betas that the "
            f"original layout could hold: expected one of {', '.join(_STORED)}; "
            "save a folder instead"
        )
    steps, start = config.get("num_train_timesteps", 1000), config.get("beta_start", 0.0001)
    betas = beta_table(kind, steps, start, config.get("beta_end", 0.02)).betas
    return torch.tensor(betas, dtype=torch.float64)
