"""The training loop: any objective, one process or several (accelerate), exact resume.

Step n's batch, noise and learning rate depend on (seed, n) alone, so k steps, a kill, and N-k steps
are the N steps, bit for bit; and N processes make the steps of one, up to the order of summation
(dropout apart, which each process draws for its own examples). The same bits need the same number
of threads and processes, the same device and torch: sums are split by them. AdamW (Loshchilov &
Hutter 2019, arXiv:1711.05101), linear warm-up, cosine or linear decay, gradient clipping, weight
averaging.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from sfumato.errors import NumericalError, Stopped, UserError
from sfumato.io.atomic import write_json
from sfumato.train import checkpoint
from sfumato.train.batch_sampler import BatchSampler, derive_seed
from sfumato.train.ema import EMA
from sfumato.train.history import History, set_aside, stopped_sentence, to_json
from sfumato.train.logger import Means, RunLog
from sfumato.train.objective import Draw, Objective
from sfumato.train.precision import choose_precision
from sfumato.train.settings import check_fields
from sfumato.train.signals import Signals
from sfumato.validate import number_in, one_of, positive_int, seed_number, whole_number

logger = logging.getLogger(__name__)

DECAYS = ("constant", "linear", "cosine")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class LoopSettings:
    """Length, speed and rhythm of a run.

    Counts are optimizer steps; batch_size is over all processes together.
    """

    steps: int = 10_000
    batch_size: int = 64
    accumulate: int = 1
    """Parts of a batch whose gradients are added up before a step: less memory, more time."""
    lr: float = 1e-4
    warmup: int = 100
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    final_lr: float = 0.0
    """The learning rate at the end of the decay, as a fraction of lr."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    """Largest norm of the gradient; inf is no clipping."""
    ema: float = 0.999
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """auto: bf16 where the GPU computes in it, or a timed step is faster (CPU); else fp32."""
    seed: int = 0
    save_every: int = 1000
    """A checkpoint is written every so many steps, at the end and at Ctrl-C."""
    keep: int = 2
    """Number of newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints of multiples of these steps are kept too; none: the newest alone."""
    show_every: int = 1000
    """A preview is written every so many steps, and at the end."""
    previews: int | None = None
    """Images of a preview, 0 turns previews off; none: 80 samples, or 16 pairs."""
    log_every: int = 50
    """A line of the log is the mean over these steps."""
    limit_time: float | None = None
    """Stop with a checkpoint after so many minutes; the same command goes on. None: no limit."""

    def __post_init__(self) -> None:
        check_fields(self)
        one_of("decay", self.decay, DECAYS)
        one_of("precision", self.precision, PRECISIONS)
        for name in ("steps", "save_every", "keep", "show_every", "log_every"):
            positive_int(name, getattr(self, name))
        whole_number("batch_size", self.batch_size, 1, 2**20)
        whole_number("accumulate", self.accumulate, 1, self.batch_size)
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size={self.batch_size} does not divide into accumulate={self.accumulate} "
                "parts: choose a multiple"
            )
        if self.limit_time is not None:
            number_in("limit_time", self.limit_time, above=0, hint="minutes; None is no limit")
        whole_number("warmup", self.warmup, 0)
        seed_number("seed", self.seed)
        if self.keep_every is not None:
            positive_int("keep_every", self.keep_every, hint="None keeps the newest alone")
        if self.previews is not None:
            whole_number("previews", self.previews, 0, 10_000, hint="0 turns previews off")
        number_in("lr", self.lr, above=0)
        number_in("final_lr", self.final_lr, 0, hint="a fraction of lr")
        number_in("weight_decay", self.weight_decay, 0, hint="0 is none")
        for beta in self.betas:
            number_in("betas", beta, 0, below=1)
        number_in("ema", self.ema, 0, below=1, hint="0 is none")
        if not self.clip > 0:  # infinity is no clipping
            raise UserError(f"clip={self.clip}: expected a number above 0; inf is none")

    def lr_at(self, step: int, origin: int = 0) -> float:
        """The learning rate of step 0..steps-1.

        Args:
            step: The step.
            origin: Step at which warm-up and decay began.
        """
        step, steps = step - origin, self.steps - origin
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        done = min(1.0, max(0, step - self.warmup) / max(steps - self.warmup, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": cosine}[self.decay]
        return self.lr * rise * (self.final_lr + (1 - self.final_lr) * fall)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide the weights.

        The intervals of logs and checkpoints do not. Nor does the length, if no decay depends on
        it.
        """
        free = {"save_every", "keep", "keep_every", "show_every", "previews", "log_every"}
        free |= {"limit_time"} | ({"accumulate"} if self.accumulate == 1 else set())
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
    precision = {"fp32": "no", "auto": "no"}.get(settings.precision, settings.precision)
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
    if settings.batch_size % (accelerator.num_processes * settings.accumulate):
        parts = f" in {settings.accumulate} parts each" if settings.accumulate > 1 else ""
        raise UserError(
            f"batch_size={settings.batch_size} does not divide among "
            f"{accelerator.num_processes} processes{parts}: choose a multiple"
        )
    return accelerator


def train(
    objective: Objective,
    settings: LoopSettings,
    out: Path,
    *,
    resume: bool = True,
    change: bool = False,
    record: Mapping[str, Any] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> nn.Module:
    """Train to `settings.steps`.

    out/checkpoints holds the state, out/run.json the settings, out/log.jsonl the numbers,
    out/samples the images, out/tensorboard both. Ctrl-C and SIGTERM write a checkpoint.

    Args:
        objective: The training problem.
        settings: Of the run.
        out: Its folder.
        resume: Go on from the newest checkpoint; False: move an earlier run aside and start anew.
        change: Go on although settings of the loop, the loss or the data differ from the
            checkpoint's. run.json and log.jsonl record it. Where the learning rate's settings
            differ, its warm-up and decay begin again at this step (Loshchilov & Hutter 2017,
            arXiv:1608.03983).
        record: More entries of run.json.
        on_step: Called with the number of finished steps.

    Returns:
        The averaged main network, in float32 and eval mode.

    Raises:
        UserError: For settings that are impossible here, and a folder with another run.
        NumericalError: For a loss, gradient or weight that is not finite.
        Stopped: After Ctrl-C, SIGTERM or SIGHUP.
    """
    begun = time.monotonic()
    accelerator = start(settings)
    plain, checkpoints = objective.networks, out / "checkpoints"
    if accelerator.is_main_process:
        if not resume:
            set_aside(out)
        checkpoint.clean(checkpoints)
    accelerator.wait_for_everyone()
    if settings.precision == "auto":
        with _enough_memory(settings, 0):
            chosen = choose_precision(
                objective,
                settings.batch_size // settings.accumulate,
                settings.seed,
                accelerator,
                checkpoints,
            )
        settings = replace(settings, precision=chosen)  # pyright: ignore[reportArgumentType]
        accelerator = start(settings)
    main, rank = accelerator.is_main_process, accelerator.process_index
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
    if record is not None and "init" in record:  # whose weights it began with
        run["init"] = record["init"]
    state = checkpoint.load(checkpoints, plain, average.network, optimizers, run, change) or {}
    history = History.of(state, accelerator)
    first, origin = history.step, history.origin
    history.tell(settings.steps)
    networks = {name: accelerator.prepare(network) for name, network in plain.items()}
    prepared = {name: accelerator.prepare(optimizer) for name, optimizer in optimizers.items()}
    update = _Update(objective, settings, accelerator, networks, prepared, origin)
    means = Means.from_state(state.get("means", {}))
    if state.get("scaler") and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])

    order = BatchSampler(objective.groups, settings.batch_size, settings.seed)
    share = settings.batch_size // (accelerator.num_processes * settings.accumulate)
    places = range(rank * settings.accumulate, (rank + 1) * settings.accumulate)
    mine = [slice(k * share, (k + 1) * share) for k in places]
    if main:
        entries = {"loop": to_json(asdict(settings)), **(record or {}), **history.entries}
        write_json(out / "run.json", entries)
    postponed = bool(state.get("preview")) and settings.previews != 0
    main_log = (
        RunLog(out, first, settings.steps, objective.stage, history.changes, postponed)
        if main
        else nullcontext()
    )

    def stopped(done: int | None) -> str:
        return stopped_sentence(checkpoints, done, settings.steps, resume)

    signals = Signals(lambda: stopped(None))
    with signals, main_log as log:

        def show(step: int) -> bool:
            """Write a preview; True where a signal left it for later."""
            preview: list[Any] = []
            work = lambda: preview.append(objective.show(average.network, step))  # noqa: E731
            if log is None or not signals.attempt(work):
                return log is not None
            log.show(step, *preview[0])
            return False

        waiting = postponed and show(first)
        if main and postponed and not waiting:
            checkpoint.preview_written(checkpoints, first)
        if signals.agreed(accelerator):
            raise Stopped(signals.number, stopped(first or None))
        for step in range(first, settings.steps):
            torch.manual_seed(derive_seed(settings.seed, "layers", step, rank))  # dropout
            parts: list[Part] = []
            for rows in mine:  # each draws the numbers of the whole batch, and keeps its rows
                generator = torch.Generator().manual_seed(derive_seed(settings.seed, "draws", step))
                draw = Draw(generator, settings.batch_size, rows)
                batch = objective.batch(order(step)[rows], draw)
                parts.append(({k: v.to(accelerator.device) for k, v in batch.items()}, draw))
            for phase in plain:
                if objective.active(phase, step):
                    with _enough_memory(settings, step):
                        numbers = update(phase, parts, step)
                    means.add(numbers)
            average.update(plain[objective.main], step)
            done = step + 1
            logs, shows, saves = (
                done % n == 0 or done == settings.steps
                for n in (settings.log_every, settings.show_every, settings.save_every)
            )
            shows = shows and settings.previews != 0
            if logs:
                numbers = {"lr": settings.lr_at(step, origin), **update.mean(means.now())}
                means = Means()
            else:
                numbers = means.now() if log and log.due else {}
            if log:
                log.step(done, numbers, log=logs)
            if shows:
                waiting = show(done)
            if settings.limit_time and time.monotonic() - begun > 60 * settings.limit_time:
                signals.time_is_over()
            stops = signals.agreed(accelerator) and done < settings.steps
            saves = saves or stops
            if saves:
                update.check_weights({**plain, "average": average.network}, done)
                sums = means.state(update.mean)
            if main and saves:
                scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
                checkpoint.save(
                    checkpoints,
                    done,
                    plain,
                    average.state(),
                    optimizers,
                    run,
                    scaler,
                    sums,
                    settings.keep,
                    settings.keep_every,
                    {**history.entries, "origin": origin, "preview": waiting},
                )
            if shows or saves:
                accelerator.wait_for_everyone()
            if on_step is not None:
                on_step(done)
            if stops:
                raise Stopped(signals.number, stopped(done))
    return average.network


@contextmanager
def _enough_memory(settings: LoopSettings, step: int) -> Iterator[None]:
    """Turn a failed allocation into a `UserError` that names the setting."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not re.search(
            r"alloc\w* memory|DefaultCPUAllocator", reason
        ):
            raise
        raise UserError(
            f"batch_size={settings.batch_size} does not fit into the memory at step {step + 1} "
            f"({reason[:120]}): use a smaller batch or more parts of it (accumulate), "
            "smaller images or a smaller network"
        ) from error


Part = tuple[dict[str, Tensor], Draw]
"""A part of a batch with its random numbers."""


@dataclass(frozen=True)
class _Update:
    """The optimizer steps of a run; the loss, its gradient and the weights must be finite."""

    objective: Objective
    settings: LoopSettings
    accelerator: Any
    networks: Mapping[str, nn.Module]
    optimizers: Mapping[str, Any]
    origin: int = 0

    def __call__(self, phase: str, parts: Sequence[Part], step: int) -> dict[str, float | Tensor]:
        """Make one step of one phase, and return the means of its numbers over the parts."""
        accelerator, optimizer = self.accelerator, self.optimizers[phase]
        for group in optimizer.param_groups:
            group["lr"] = self.settings.lr_at(step, self.origin)
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float | Tensor] = {}
        for index, (batch, draw) in enumerate(parts):
            last = index == len(parts) - 1
            # processes exchange their gradients once a step
            with nullcontext() if last else accelerator.no_sync(self.networks[phase]):
                with accelerator.autocast():
                    loss, numbers = self.objective.loss(phase, self.networks, batch, step, draw)
                if not torch.isfinite(loss):
                    self.fail(f"the loss is {loss.item()}", phase, step + 1)
                accelerator.backward(loss / len(parts) if len(parts) > 1 else loss)
            for name, value in {f"{phase}/loss": loss.detach(), **numbers}.items():
                sums[name] = sums[name] + value if name in sums else value
        if len(parts) > 1:
            sums = {name: value / len(parts) for name, value in sums.items()}
        parameters = self.networks[phase].parameters()
        gradient = accelerator.clip_grad_norm_(parameters, self.settings.clip)
        norm = float(gradient) if gradient is not None else 0.0
        # with a scaler (fp16) such a step is left out, by design
        if not math.isfinite(norm) and accelerator.scaler is None:
            self.fail(f"the gradient's norm is {norm}", phase, step + 1)
        optimizer.step()
        finite = {f"{phase}/grad_norm": norm} if math.isfinite(norm) else {}
        return {**sums, **finite}

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
