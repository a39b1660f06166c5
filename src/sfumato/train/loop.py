"""The training loop: any objective, one process or several (accelerate), exact resume.

Step n's batch, noise and learning rate depend on (seed, n) alone, so k steps, a kill, and N-k steps
are the N steps, bit for bit; and N processes make the steps of one, up to the order of summation
(dropout apart, which each process draws for its own examples). AdamW (Loshchilov & Hutter 2019,
arXiv:1711.05101), linear warm-up, cosine or linear decay, gradient clipping, weight averaging.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from sfumato.errors import NumericalError, UserError
from sfumato.train import checkpoint
from sfumato.train.batch_sampler import BatchSampler, derive_seed
from sfumato.train.ema import EMA
from sfumato.train.logger import Means, RunLog
from sfumato.train.objective import Draw, Objective
from sfumato.validate import number_in, one_of, positive_int, seed_number

logger = logging.getLogger(__name__)

DECAYS = ("constant", "linear", "cosine")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class LoopSettings:
    """Length, speed and rhythm of a run.

    Counts are optimizer steps; batch_size is over all processes together.
    """

    steps: int = 10_000
    batch_size: int = 64
    lr: float = 1e-4
    warmup: int = 100
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    final_lr: float = 0.0
    """The learning rate at the end of the decay, as a fraction of lr."""
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
        seed_number("seed", self.seed)
        number_in("lr", self.lr, above=0)
        number_in("ema", self.ema, 0, below=1, hint="0 is none")
        if not self.clip > 0:  # infinity is no clipping
            raise UserError(f"clip={self.clip}: expected a number above 0; inf is none")

    def lr_at(self, step: int) -> float:
        """The learning rate of step 0..steps-1."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        done = min(1.0, max(0, step - self.warmup) / max(self.steps - self.warmup, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": cosine}[self.decay]
        return self.lr * rise * (self.final_lr + (1 - self.final_lr) * fall)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide the weights.

        The intervals of logs and checkpoints do not. Nor does the length, if no decay depends on
        it.
        """
        free = {"save_every", "show_every", "log_every"}
        if self.decay == "constant":
            free |= {"steps", "final_lr"}
        return {
            name: str(value) if value == math.inf else value
            for name, value in asdict(self).items()
            if name not in free
        }


def start(settings: LoopSettings) -> Any:
    """Return accelerate's Accelerator in the precision of the settings.

    Raises:
        UserError: Where accelerate is missing, this machine lacks the precision, or the batch does
            not divide among the processes.
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
    # With cpu=True on machines without a GPU, accelerate joins the processes of torchrun; else each
    # would run by itself.
    cpu = not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(
            cpu=cpu, mixed_precision=precision, step_scheduler_with_optimizer=False
        )
    except ValueError as error:
        raise UserError(
            f"precision={settings.precision!r} is not possible here ({error}): use another"
        ) from error
    # one that refuses its settings and leaves would fail the others in the middle of joining
    accelerator.wait_for_everyone()
    # accelerate would run in fp32 without a message
    if settings.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError(
            "precision='fp16' needs a GPU, and this machine trains on its CPU: use bf16 or fp32"
        )
    if settings.batch_size % accelerator.num_processes:
        raise UserError(
            f"batch_size={settings.batch_size} does not divide among "
            f"{accelerator.num_processes} processes: choose a multiple"
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
    """Train to `settings.steps`.

    out/checkpoints holds the state, out/log.jsonl the numbers, out/samples the images,
    out/tensorboard both.

    Args:
        objective: The training problem.
        settings: Of the run.
        out: Its folder.
        resume: Go on from the newest checkpoint; False: refuse a folder that has one.
        on_step: Called with the number of finished steps.

    Returns:
        The averaged main network, in float32 and eval mode.

    Raises:
        UserError: For settings that are impossible here, and a folder with another run.
        NumericalError: For a loss, gradient or weight that is not finite.
    """
    accelerator = start(settings)
    main, rank = accelerator.is_main_process, accelerator.process_index
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
    state = checkpoint.load(checkpoints, plain, average.network, optimizers, run) or {}
    first = state.get("step", 0)
    networks = {name: accelerator.prepare(network) for name, network in plain.items()}
    prepared = {name: accelerator.prepare(optimizer) for name, optimizer in optimizers.items()}
    update = _Update(objective, settings, accelerator, networks, prepared)
    means = Means.from_state(state.get("means", {}))
    if state.get("scaler") and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])

    order = BatchSampler(objective.groups, settings.batch_size, settings.seed)
    share = settings.batch_size // accelerator.num_processes
    mine = slice(rank * share, (rank + 1) * share)
    main_log = RunLog(out, first, settings.steps, objective.stage) if main else nullcontext()
    with main_log as log:
        for step in range(first, settings.steps):
            torch.manual_seed(derive_seed(settings.seed, "layers", step, rank))  # dropout
            generator = torch.Generator().manual_seed(derive_seed(settings.seed, "draws", step))
            draw = Draw(generator, settings.batch_size, mine)
            batch = {
                k: v.to(accelerator.device)
                for k, v in objective.batch(order(step)[mine], draw).items()
            }
            for phase in plain:
                if objective.active(phase, step):
                    means.add(update(phase, batch, step, draw))
            average.update(plain[objective.main], step)
            done = step + 1
            logs, shows, saves = (
                done % n == 0 or done == settings.steps
                for n in (settings.log_every, settings.show_every, settings.save_every)
            )
            if logs:
                numbers = {"lr": settings.lr_at(step), **update.mean(means.now())}
                means = Means()
            else:
                numbers = means.now() if log and log.due else {}
            if log:
                log.step(done, numbers, log=logs)
            if log and shows:
                log.show(done, *objective.show(average.network, done))
            if saves:
                update.check_weights({**plain, "average": average.network}, done)
                sums = means.state(update.mean)
            if main and saves:
                scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
                checkpoint.save(
                    checkpoints, done, plain, average.state(), optimizers, run, scaler, sums
                )
            if shows or saves:
                accelerator.wait_for_everyone()
            if on_step is not None:
                on_step(done)
    return average.network


@dataclass(frozen=True)
class _Update:
    """The optimizer steps of a run; the loss, its gradient and the weights must be finite."""

    objective: Objective
    settings: LoopSettings
    accelerator: Any
    networks: Mapping[str, nn.Module]
    optimizers: Mapping[str, Any]

    def __call__(
        self, phase: str, batch: dict[str, Tensor], step: int, draw: Draw
    ) -> dict[str, float | Tensor]:
        """Make one step of one phase and return its numbers."""
        accelerator, optimizer = self.accelerator, self.optimizers[phase]
        for group in optimizer.param_groups:
            group["lr"] = self.settings.lr_at(step)
        with accelerator.autocast():
            loss, numbers = self.objective.loss(phase, self.networks, batch, step, draw)
        if not torch.isfinite(loss):
            self.fail(f"the loss is {loss.item()}", phase, step + 1)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        parameters = self.networks[phase].parameters()
        gradient = accelerator.clip_grad_norm_(parameters, self.settings.clip)
        norm = float(gradient) if gradient is not None else 0.0
        # with a scaler (fp16) such a step is left out, by design
        if not math.isfinite(norm) and accelerator.scaler is None:
            self.fail(f"the gradient's norm is {norm}", phase, step + 1)
        optimizer.step()
        finite = {f"{phase}/grad_norm": norm} if math.isfinite(norm) else {}
        return {f"{phase}/loss": loss.detach(), **finite, **numbers}

    def mean(self, numbers: dict[str, float]) -> dict[str, float]:
        """Each number's mean over the processes."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1 or not numbers:
            return numbers
        values = torch.tensor([*numbers.values()], dtype=torch.float32, device=accelerator.device)
        return dict(zip(numbers, accelerator.reduce(values, "mean").tolist(), strict=True))

    def check_weights(self, networks: Mapping[str, nn.Module], step: int) -> None:
        """Raise `NumericalError` for weights that are not finite, before they are saved."""
        for name, network in networks.items():
            for key, tensor in network.state_dict().items():
                if not torch.isfinite(tensor).all():
                    self.fail(f"the weight {key} is not finite", name, step)

    def fail(self, problem: str, phase: str, step: int) -> NoReturn:
        """Raise `NumericalError` with the stage, phase, step and precision."""
        raise NumericalError(
            f"{problem} in {self.objective.stage} ({phase}) at step {step} "
            f"({self.settings.precision}): nothing after the last checkpoint was kept; "
            "lower lr, or train in fp32"
        )
