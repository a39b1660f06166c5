"""Cost of batch invariance: this code beside plain torch, in one run.

Another checkout may run beside them.

    python benchmarks/batch_invariance.py [--before CHECKOUT] [--workloads fashion-1 ...] [--repeats
    7] [--threads 2]

"plain" is this code with torch's own layers, whose images depend on the batch. "before" is the code
of another checkout, such as a worktree of an older commit. Each way runs in a process of its own;
the processes take turns, so that a machine that changes its pace changes it for all. The best and
the median of the repeats are printed, in milliseconds, and the best over this code's best. Float32
on the CPU; weights are random except for the bundled model's.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from _common import fill, print_header, print_row, side_arguments, take_turns, timed
from _models import SD15_UNET, SD35_MEDIUM

ROOT = Path(__file__).resolve().parents[1]
Call = Callable[[], Any]


def fashion(count: int, prepared: bool) -> Call:
    """The bundled model: `count` images, guided, in ten steps."""
    import sfumato

    model = sfumato.load("fashion")
    model = model.optimized() if prepared else model
    return lambda: model.generate(
        "ankle boot", n=count, seed=0, steps=10, guidance=2.0, output="tensor"
    )


def sd15(batch: int, prepared: bool) -> Call:
    """One call of Stable Diffusion 1.5's U-Net, 64x64 latents."""
    from sfumato.inference.prepack import prepack
    from sfumato.predict.networks.unet import UNet, UNetConfig
    from sfumato.types import Conditioning

    with torch.device("meta"):
        network = UNet(UNetConfig(**SD15_UNET))
    network = prepack(fill(network)) if prepared else fill(network)
    x, t, cond = (
        torch.randn(batch, 4, 64, 64),
        torch.full((batch,), 500.0),
        Conditioning(tokens=torch.randn(batch, 77, 768)),
    )
    return lambda: network(x, t, cond)


def sd35(batch: int, prepared: bool) -> Call:
    """One call of two blocks of Stable Diffusion 3.5 medium's transformer, 64x64 latents."""
    from sfumato.inference.prepack import prepack
    from sfumato.predict.networks.base import build, registered
    from sfumato.types import Conditioning

    config = SD35_MEDIUM | {"num_layers": 2, "dual_attention_layers": (0,)}
    with torch.device("meta"):
        network = build(registered()["SD3Transformer2DModel"][1](**config))
    network = prepack(fill(network)) if prepared else fill(network)
    x, t = torch.randn(batch, 16, 64, 64), torch.full((batch,), 500.0)
    cond = Conditioning(tokens=torch.randn(batch, 333, 4096), vector=torch.randn(batch, 2048))
    return lambda: network(x, t, cond)


WORKLOADS: dict[str, tuple[Callable[[int, bool], Call], int, bool]] = {
    "fashion-1": (fashion, 1, False),
    "fashion-16": (fashion, 16, False),
    "fashion-1-prepared": (fashion, 1, True),
    "fashion-16-prepared": (fashion, 16, True),
    "sd15-2": (sd15, 2, False),
    "sd15-2-prepared": (sd15, 2, True),
    "sd35-blocks-2": (sd35, 2, False),
    "sd35-blocks-2-prepared": (sd35, 2, True),
}
"""name -> function, images, and whether the network is prepared for inference."""


def work(plain: bool, threads: int) -> None:
    """A child: make the workload that a line of stdin names, or run it where the line is "run" and
    print the seconds.
    """
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    if plain:
        from sfumato.kernels import batch_invariant

        batch_invariant.applies = lambda *_: False
    call: Call | None = None
    for line in sys.stdin:
        if line.strip() != "run":
            call = None
            gc.collect()
            function, count, prepared = WORKLOADS[line.strip()]
            call = function(count, prepared)
            call()
            print("ready", flush=True)
            continue
        assert call is not None
        print(timed(call), flush=True)


def child(checkout: Path, way: str, threads: int) -> "subprocess.Popen[str]":
    """A process that runs a checkout's code."""
    command = [sys.executable, __file__, "--side", way, str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(process: "subprocess.Popen[str]", line: str) -> str:
    """Answer of a child process to a line."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    answer = process.stdout.readline().strip()
    if not answer:
        sys.exit(f"a child ended at {line!r}")
    return answer


def main() -> None:
    if (side := side_arguments()) is not None:
        way, threads = side
        work(way == "plain", int(threads))
        return
    parser = argparse.ArgumentParser(
        description="The cost of images that do not depend on their batch."
    )
    parser.add_argument(
        "--before", type=Path, default=None, help="another checkout, to be measured beside this one"
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    ways = {"this code": ROOT, "plain": ROOT} | (
        {"before": options.before.resolve()} if options.before else {}
    )
    processes = {way: child(checkout, way, options.threads) for way, checkout in ways.items()}
    print_header("workload", "way", "best, ms", "median, ms", "of this code")
    for workload in options.workloads:
        # a prepared network is oneDNN's
        chosen = [way for way in ways if not (way == "plain" and workload.endswith("prepared"))]
        for way in chosen:
            ask(processes[way], workload)
        seconds = take_turns(
            {way: lambda way=way: float(ask(processes[way], "run")) for way in chosen},
            options.repeats,
        )
        for way, measured in seconds.items():
            best, median = 1000 * min(measured), 1000 * statistics.median(measured)
            print_row(
                workload,
                way,
                f"{best:.1f}",
                f"{median:.1f}",
                f"{min(measured) / min(seconds['this code']):.3f}",
            )
    for process in processes.values():
        process.terminate()


if __name__ == "__main__":
    main()
