"""The precision of a training run, by a measurement of its step on this machine.

bfloat16 halves the time of a step where a processor multiplies in it, and lengthens it where layers
are small: small U-Nets train 1.5 times as slow in bfloat16 as in float32 on an Intel Xeon with AMX.
On a CPU a step of each is timed once (kernels/measured.py), and bfloat16 is taken where it saves a
tenth; on a GPU it is taken where the GPU computes in it.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sfumato.kernels.batch_invariant import onednn
from sfumato.kernels.measured import fastest
from sfumato.train import checkpoint
from sfumato.train.batch_sampler import BatchSampler, derive_seed
from sfumato.train.objective import Draw, Objective

logger = logging.getLogger(__name__)


def choose_precision(
    objective: Objective, batch_size: int, seed: int, accelerator: Any, checkpoints: Path
) -> str:
    """Choose "bf16" or "fp32" for a run.

    A run that resumes keeps the precision of its checkpoint. Of several processes the first one
    measures.

    Args:
        objective: The training problem; its networks are on the CPU.
        batch_size: Examples of a step, over all processes.
        seed: Of the run.
        accelerator: accelerate's Accelerator.
        checkpoints: Folder of the run's checkpoints.
    """
    from accelerate.utils import broadcast_object_list

    choice = [""]
    if accelerator.is_main_process:
        share = batch_size // accelerator.num_processes
        choice = [
            checkpoint.saved_precision(checkpoints)
            or _measured(objective, batch_size, share, seed, accelerator.device)
        ]
        logger.info("precision %s", choice[0])
    if accelerator.num_processes > 1:
        broadcast_object_list(choice)
    return choice[0]


def _measured(objective: Objective, total: int, share: int, seed: int, device: torch.device) -> str:
    """Time a step of each precision on a CPU that has bfloat16; take it on a GPU that has it."""
    if device.type == "cuda":
        # older GPUs emulate it, which takes longer than float32
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp32"
    library = onednn()
    if device.type != "cpu" or library is None or not library._is_mkldnn_bf16_supported():
        return "fp32"
    weights = sum(p.numel() for p in objective.networks[objective.main].parameters())
    name = type(objective.networks[objective.main]).__name__
    rows = BatchSampler(objective.groups, total, seed)(0)[:share]
    first = objective.batch(rows, _draw(seed, total, share))
    shapes = ", ".join("x".join(map(str, v.shape)) for v in first.values() if v.ndim > 1)
    kind = f"training step of a {name} with {weights} weights, batch {shapes}"

    def prepare(enabled: bool) -> Callable[[], None]:
        def step() -> None:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    loss, _ = objective.loss(
                        objective.main,
                        objective.networks,
                        {key: value.clone() for key, value in first.items()},
                        0,
                        _draw(seed, total, share),
                    )
                loss.backward()
            for network in objective.networks.values():
                network.zero_grad(set_to_none=True)

        return step

    return fastest(kind, {"fp32": lambda: prepare(False), "bf16": lambda: prepare(True)})


def _draw(seed: int, total: int, share: int) -> Draw:
    generator = torch.Generator().manual_seed(derive_seed(seed, "draws", 0))
    return Draw(generator, total, slice(share))
