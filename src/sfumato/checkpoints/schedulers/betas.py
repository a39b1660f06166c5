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

KINDS = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
_CLOSE = 1e-6


def fields(
    start: float, end: float, steps: int = 1000, kind: str = "scaled_linear"
) -> dict[str, Any]:
    """Return the four scheduler fields of a schedule in closed form."""
    return {
        "num_train_timesteps": steps,
        "beta_schedule": kind,
        "beta_start": start,
        "beta_end": end,
    }


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
            f"{where}: betas of shape {tuple(betas.shape)}: expected a list of numbers strictly between 0 and 1"
        )
    start, end, steps = float(f"{values[0]:.6g}"), float(f"{values[-1]:.6g}"), len(values)
    for kind in ("scaled_linear", "linear"):
        closed = fields(start, end, steps, kind)
        if torch.allclose(
            values,
            table(closed),
            rtol=1e-4 if betas.dtype != torch.float64 else _CLOSE,
            atol=_CLOSE,
        ):
            return closed
    if torch.allclose(
        values,
        table({"num_train_timesteps": steps, "beta_schedule": "squaredcos_cap_v2"}),
        rtol=1e-4,
        atol=_CLOSE,
    ):
        return fields(0.0001, 0.02, steps, "squaredcos_cap_v2")
    return fields(start, end, steps, "linear") | {"trained_betas": values.tolist()}


def table(config: Mapping[str, Any]) -> Tensor:
    """Return the betas (T,), float64, of a scheduler config.

    Raises:
        UserError: A config without a table of betas, such as a flow's.
    """
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float64)
    kind = config.get("beta_schedule", "linear")
    if kind not in KINDS or config.get("_class_name") in (
        "FlowMatchEulerDiscreteScheduler",
        "SfumatoProcess",
    ):
        raise UserError(
            f"scheduler {config.get('_class_name')!r} with beta_schedule {kind!r} has no table of betas that the original layout could hold: "
            f"expected one of {', '.join(KINDS)}; save a folder instead"
        )
    ends = (
        {}
        if kind == "squaredcos_cap_v2"
        else {"start": config.get("beta_start", 0.0001), "end": config.get("beta_end", 0.02)}
    )
    beta_table = schedule(KINDS[kind], steps=config.get("num_train_timesteps", 1000), **ends)
    assert isinstance(beta_table, BetaTable)
    return torch.tensor(beta_table.betas, dtype=torch.float64)
