"""The training loop: every objective, one process or several (accelerate), and exact resume.

Step n's batch, noise and learning rate depend on (seed, n) alone, so k steps, a kill, and N-k steps
are the N steps, bit for bit; and N processes make the steps of one, up to the order of summation
(dropout apart, which each process draws for its own examples). AdamW (Loshchilov & Hutter 2019,
arXiv:1711.05101), linear warm-up, cosine or linear decay, gradient clipping, weight averaging.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from sfumato.errors import NumericalError, UserError
from sfumato.train import checkpoint
from sfumato.train.batch_sampler import Order, derive_seed
from sfumato.train.ema import EMA
from sfumato.train.logger import Means, Record
from sfumato.train.objective import Draw, Objective
from sfumato.validate import number_in, one_of, positive_int

logger = logging.getLogger(__name__)

DECAYS = ("constant", "linear", "cosine")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast. Counts are optimizer steps; batch_size is over all processes
    together.
    """

    steps: int = 10_000
    batch_size: int = 64
    lr: float = 1e-4
    warmup: int = 100
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    final_lr: float = 0.0
    """What the decay falls to at the end of the run, as a fraction of lr."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    ema: float = 0.999
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    save_every: int = 1000
    show_every: int = 1000
    log_every: int = 50
    """A line of the log is the mean over these steps."""

    def __post_init__(self) -> None:
        one_of("decay", self.decay, DECAYS)
        one_of("precision", self.precision, PRECISIONS)
        for name in ("steps", "batch_size", "save_every", "show_every", "log_every"):
            positive_int(name, getattr(self, name))
        number_in("lr", self.lr, above=0)
        number_in("ema", self.ema, 0, below=1, hint="0 is none")
        if not self.clip > 0:  # infinity is no clipping
            raise UserError(f"clip={self.clip}: expected a number above 0; inf is none")

    def lr_at(self, step: int) -> float:
        """The learning rate of step 0..steps-1."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        done = min(1.0, max(0, step - self.warmup) / max(self.steps - self.warmup, 1))
        fall = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        }[self.decay]
        return self.lr * rise * (self.final_lr + (1 - self.final_lr) * fall)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide the weights. How often to look does not; how far to go does not
        either, if no decay depends on it.
        """
        free = {
            "save_every",
            "show_every",
            "log_every",
            *(["steps", "final_lr"] if self.decay == "constant" else []),
        }
        return {
            name: str(value) if value == math.inf else value
            for name, value in asdict(self).items()
            if name not in free
        }


def start(settings: LoopSettings) -> Any:
    """accelerate's Accelerator in the precision of the settings; `UserError` where this machine
    cannot.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise UserError(
            f"training needs the package {error.name}: run `pip install 'sfumato[train]'`"
        ) from error
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    precision = {"fp32": "no"}.get(settings.precision, settings.precision)
    try:
        # Told that there are only CPUs, accelerate joins the processes of torchrun; else each would
        # think that it is alone.
        cpu = not torch.accelerator.is_available()
        accelerator = Accelerator(
            cpu=cpu, mixed_precision=precision, step_scheduler_with_optimizer=False
        )
    except ValueError as error:
        raise UserError(
            f"precision={settings.precision!r} is not possible here ({error}): use another"
        ) from error
    # one that refuses its settings and leaves would fail the others in the middle of joining
    accelerator.wait_for_everyone()
    # accelerate would run in fp32 and not say so
    if settings.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError(
            "precision='fp16' needs a GPU, and this machine trains on its CPU: use bf16 or fp32"
        )
    if settings.batch_size % accelerator.num_processes:
        raise UserError(
            f"batch_size={settings.batch_size} does not divide among {accelerator.num_processes} processes: choose a multiple"
        )
    return accelerator


def train(
    objective: Objective,
    settings: LoopSettings,
    out: Path,
    *,
    resume: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> nn.Module:
    """Trains to `settings.steps` and returns the averaged main network (float32, eval mode).

    out/checkpoints holds the state, out/log.jsonl the numbers, out/samples the pictures,
    out/tensorboard both. With `resume` a run that stopped goes on from its newest checkpoint;
    without, a folder that has one is refused. `on_step` is called after each step.
    """
    accelerator = start(settings)
    processes, rank, main = (
        accelerator.num_processes,
        accelerator.process_index,
        accelerator.is_main_process,
    )
    plain, checkpoints = objective.networks, out / "checkpoints"
    if not resume and checkpoint.steps(checkpoints):
        raise UserError(
            f"{checkpoints} holds a run already: resume it, or train into another folder"
        )
    for network in plain.values():
        network.to(accelerator.device).train()
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.AdamW(
            network.parameters(), settings.lr, settings.betas, weight_decay=settings.weight_decay
        )
        for name, network in plain.items()
    }
    average = EMA(plain[objective.main], settings.ema)
    run = {"loop": settings.identity, "objective": objective.identity}
    if main:
        checkpoint.clean(checkpoints)
    accelerator.wait_for_everyone()
    state = checkpoint.load(checkpoints, plain, average.network, optimizers, run)
    first = state["step"] if state else 0
    wrapped = {name: accelerator.prepare(network) for name, network in plain.items()}
    stepped = {name: accelerator.prepare(optimizer) for name, optimizer in optimizers.items()}
    means = Means.from_state((state or {}).get("means", {}))
    if state and state.get("scaler") and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])

    order = Order(objective.groups, settings.batch_size, settings.seed)
    share = settings.batch_size // processes
    mine = slice(rank * share, (rank + 1) * share)
    with Record(out, first, settings.steps, objective.stage, active=main) as record:
        for step in range(first, settings.steps):
            torch.manual_seed(derive_seed(settings.seed, "layers", step, rank))  # dropout
            draw = Draw(
                torch.Generator().manual_seed(derive_seed(settings.seed, "draws", step)),
                settings.batch_size,
                mine,
            )
            batch = {
                k: v.to(accelerator.device)
                for k, v in objective.batch(order(step)[mine], draw).items()
            }
            for phase in plain:
                if objective.active(phase, step):
                    means.add(
                        _update(
                            objective,
                            phase,
                            wrapped,
                            stepped[phase],
                            batch,
                            step,
                            draw,
                            settings,
                            accelerator,
                        )
                    )
            average.update(plain[objective.main], step)
            done = step + 1
            logs, shows, saves = (
                done % n == 0 or done == settings.steps
                for n in (settings.log_every, settings.show_every, settings.save_every)
            )
            if logs:
                record.step(
                    done, {"lr": settings.lr_at(step), **_mean(means.now(), accelerator)}, log=True
                )
                means = Means()
            else:
                record.step(done, means.now() if record.due else {}, log=False)
            if main and shows:
                record.show(done, *objective.show(average.network, done))
            if saves:
                _check_weights(objective, {**plain, "average": average.network}, done, settings)
                seen = means.state(lambda sums: _mean(sums, accelerator))
            if main and saves:
                scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
                checkpoint.save(
                    checkpoints, done, plain, average.state(), optimizers, run, scaler, seen
                )
            if shows or saves:
                accelerator.wait_for_everyone()
            if on_step is not None:
                on_step(done)
    return average.network


def _update(
    objective: Objective,
    phase: str,
    networks: dict[str, nn.Module],
    optimizer: Any,
    batch: dict[str, Tensor],
    step: int,
    draw: Draw,
    settings: LoopSettings,
    accelerator: Any,
) -> dict[str, float | Tensor]:
    """One optimizer step of one phase; the loss and its gradient must be finite."""
    for group in optimizer.param_groups:
        group["lr"] = settings.lr_at(step)
    with accelerator.autocast():
        loss, numbers = objective.loss(phase, networks, batch, step, draw)
    if not torch.isfinite(loss):
        _refuse(f"the loss is {loss.item()}", objective.stage, phase, step + 1, settings)
    optimizer.zero_grad(set_to_none=True)
    accelerator.backward(loss)
    found = accelerator.clip_grad_norm_(networks[phase].parameters(), settings.clip)
    norm = float(found) if found is not None else 0.0
    # with a scaler (fp16) such a step is left out, by design
    if not math.isfinite(norm) and accelerator.scaler is None:
        _refuse(f"the gradient's norm is {norm}", objective.stage, phase, step + 1, settings)
    optimizer.step()
    known = {f"{phase}/grad_norm": norm} if math.isfinite(norm) else {}
    return {f"{phase}/loss": loss.detach(), **known, **numbers}


def _mean(numbers: dict[str, float], accelerator: Any) -> dict[str, float]:
    """Each number's mean over the processes."""
    if accelerator.num_processes == 1 or not numbers:
        return numbers
    values = torch.tensor(list(numbers.values()), dtype=torch.float32, device=accelerator.device)
    return dict(zip(numbers, accelerator.reduce(values, "mean").tolist(), strict=True))


def _check_weights(
    objective: Objective, networks: dict[str, nn.Module], step: int, settings: LoopSettings
) -> None:
    """What is about to be saved must be finite."""
    for name, network in networks.items():
        for key, tensor in network.state_dict().items():
            if not torch.isfinite(tensor).all():
                _refuse(f"the weight {key} is not finite", objective.stage, name, step, settings)


def _refuse(what: str, stage: str, phase: str, step: int, settings: LoopSettings) -> NoReturn:
    raise NumericalError(
        f"{what} in {stage} ({phase}) at step {step} ({settings.precision}): "
        "nothing after the last checkpoint was kept; lower lr, or train in fp32"
    )
