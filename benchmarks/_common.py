"""Shared parts of the benchmarks: random weights, turns, memory, child processes, tables.

A benchmark measures several ways to do one thing in one run. Ways take turns, so that a machine
that changes its pace changes it for all. Ways whose memory is measured run in processes of their
own, which the benchmark starts from its own file with `--side`.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Call = Callable[[], Tensor]
"""One measured piece of work, and its result."""


# ---- networks ------------------------------------------------------------------------------------


def fill(network: nn.Module, scale: float = 0.02, device: str = "cpu") -> nn.Module:
    """Give a network that was built on the meta device random weights; return it frozen.

    Args:
        network: module without memory for its weights.
        scale: standard deviation of weights and buffers; scales of norms get 1 more.
        device: where the weights are made.
    """
    generator = torch.Generator(device).manual_seed(0)
    network.to_empty(device=device)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if name.endswith("position_ids"):
            tensor.copy_(torch.arange(tensor.shape[-1]).expand(tensor.shape))
            continue
        tensor.data.normal_(0, scale, generator=generator)
        if "norm" in name and name.endswith("weight") and tensor.ndim == 1:
            tensor.data.add_(1)
    return network.eval().requires_grad_(False)


# ---- time ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepSettings:
    """Settings of benchmarks that measure one call of a network."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    compile: bool = False
    """Add torch.compile of both libraries' networks (minutes each)."""
    repeats: int = 3
    threads: int | None = None
    """Threads of torch; its own choice by default."""
    device: str = "cpu"


def timed(call: Callable[[], object], device: str = "cpu") -> float:
    """Return the seconds of one call, which on an accelerator ends when its work is done."""
    begin = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def take_turns(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure every way once a turn.

    Args:
        ways: functions that do the work once and return its seconds.
        repeats: number of turns.

    Returns:
        The seconds of every turn, by way.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, measure in ways.items():
            seconds[way].append(measure())
    return seconds


def median_seconds(ways: Mapping[str, Call], repeats: int, device: str) -> dict[str, float]:
    """Return the median seconds of calls that take turns, by way."""
    turns = take_turns(
        {way: lambda call=call: timed(call, device) for way, call in ways.items()}, repeats
    )
    return {way: statistics.median(seconds) for way, seconds in turns.items()}


def operations(call: Callable[[], object]) -> int:
    """Count the floating-point operations of a call, with those that torch's counter leaves out.

    These are attention on the CPU, and the products of oneDNN by which networks here are made
    independent of the batch.
    """
    from torch.utils.flop_counter import (
        FlopCounterMode,  # slow to import, and children are timed from their start
    )

    def attention(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
        return 4 * q.numel() * k[-2]  # Q K^T and P V of heads (B, H, N, d)

    def convolution(
        x: torch.Size, weight: torch.Size, *_: object, out_shape: torch.Size, **__: object
    ) -> int:
        return 2 * out_shape.numel() * weight[1:].numel()

    def linear(x: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
        return 2 * out_shape.numel() * x[-1]

    kernels: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention
    }
    if torch.backends.mkldnn.is_available():
        kernels |= {
            torch.ops.aten.mkldnn_convolution: convolution,
            torch.ops.mkldnn._linear_pointwise: linear,
        }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        call()
    return counter.get_total_flops()


def machine_rate(call: Call, count: int, device: str) -> float:
    """Return operations a second of a plain layer: `count` over the best of 8 calls."""
    call()
    return count / min(timed(call, device) for _ in range(8))


def differences(y: Tensor, expected: Tensor) -> str:
    """Format the largest error and the root mean square error, each over the values' own."""
    error = y - expected
    return (
        f"{float(error.abs().max() / expected.abs().max()):.1e}, "
        f"{float(error.norm() / expected.norm()):.1e}"
    )


# ---- memory --------------------------------------------------------------------------------------


def process_memory(field: str = "VmHWM") -> int:
    """Return bytes of this process, by Linux.

    Args:
        field: VmRSS, resident now; VmHWM, the largest resident so far; RssAnon, resident and of no
        file.
    """
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{field}:")
    )
    return 1024 * int(line.split()[1])


def weights_size(folder: Path) -> float:
    """Return GB of the safetensors files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e9


# ---- child processes -----------------------------------------------------------------------------


def flags(settings: Any, *names: str) -> list[str]:
    """Return settings as flags of the command line, for a child process."""
    return [f"--{name}={getattr(settings, name)}" for name in names]


def side_arguments() -> list[str] | None:
    """Return the arguments of a child that `run_side` started; None in the first process."""
    return sys.argv[2:] if sys.argv[1:2] == ["--side"] else None


def run_side(script: str, *arguments: object) -> str:
    """Run a benchmark's file again as a child process with `--side`; return what it printed."""
    command = [sys.executable, script, "--side", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def write_result(path: Path, image: Tensor, **numbers: Any) -> None:
    """Write the image and the numbers of a side, for `compare_sides`."""
    save_file({"image": image.contiguous()}, path, metadata={"numbers": json.dumps(numbers)})


def compare_sides(
    script: str, ways: Sequence[str], folder: Path, arguments: Sequence[str]
) -> Iterator[tuple[str, Tensor, Tensor, dict[str, Any]]]:
    """Run every way in a process of its own.

    A child's arguments are its way, the folder, and a file for `write_result`.

    Args:
        script: the benchmark's file.
        ways: names of the ways; the first is the reference.
        folder: the model's folder.
        arguments: further arguments of the child.

    Yields:
        Name, image, the reference's image, and numbers of each way.
    """
    reference: Tensor | None = None
    with TemporaryDirectory() as temporary:
        for way in ways:
            path = Path(temporary) / f"{way}.safetensors"
            run_side(script, way, folder, path, *arguments)
            with safe_open(path, "pt") as file:
                image, numbers = (
                    file.get_tensor("image"),
                    json.loads((file.metadata() or {})["numbers"]),
                )
            reference = image if reference is None else reference
            yield way, image, reference, numbers


# ---- tables and data -----------------------------------------------------------------------------


def print_header(*columns: str) -> None:
    """Print the first two lines of a markdown table."""
    print_row(*columns)
    print("|---" * len(columns) + "|", flush=True)


def print_row(*cells: str) -> None:
    """Print a row of a markdown table as soon as it is known."""
    print(f"| {' | '.join(cells)} |", flush=True)


def all_pixels(images: Any) -> Tensor:
    """Return the pixels of an image set in [-1, 1]: (N, C, H, W)."""
    parts = [
        images.batch(torch.arange(i, min(i + 1000, len(images))))["image"]
        for i in range(0, len(images), 1000)
    ]
    return torch.cat(parts)
