"""What it costs that an image does not depend on its batch: this code beside plain torch, and
beside another checkout, in one run.

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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def filled(network: Any) -> Any:
    """Random weights of the usual size for a network that was made on the meta device."""
    import torch

    generator = torch.Generator().manual_seed(0)
    network.to_empty(device="cpu")
    for weight in (*network.parameters(), *network.buffers()):
        weight.data.normal_(0, 0.02, generator=generator)
    return network.eval().requires_grad_(False)


def sd15(batch: int, prepared: bool) -> Call:
    """One call of Stable Diffusion 1.5's U-Net, 64x64 latents."""
    import torch

    from sfumato.inference.prepack import prepack
    from sfumato.predict.networks.unet import UNet, UNetConfig
    from sfumato.types import Conditioning

    with torch.device("meta"):
        network = UNet(UNetConfig(sample_size=64, cross_attention_dim=768, attention_head_dim=8))
    network = filled(network)
    network = prepack(network) if prepared else network
    x, t, cond = (
        torch.randn(batch, 4, 64, 64),
        torch.full((batch,), 500.0),
        Conditioning(tokens=torch.randn(batch, 77, 768)),
    )
    return lambda: network(x, t, cond)


def sd35(batch: int, prepared: bool) -> Call:
    """One call of two blocks of Stable Diffusion 3.5 medium's transformer, 64x64 latents."""
    import torch

    from sfumato.inference.prepack import prepack
    from sfumato.predict.networks.base import build, registered
    from sfumato.types import Conditioning

    config = {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 24,
        "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "out_channels": 16,
        "pos_embed_max_size": 384, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }  # fmt: skip
    with torch.device("meta"):
        network = build(registered()["SD3Transformer2DModel"][1](**config))
    network = filled(network)
    network = prepack(network) if prepared else network
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
    import torch

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
        begin = time.perf_counter()
        call()
        print(time.perf_counter() - begin, flush=True)


def child(checkout: Path, way: str, threads: int) -> "subprocess.Popen[str]":
    """A process that runs a checkout's code."""
    command = [sys.executable, __file__, "--work", way, "--threads", str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(process: "subprocess.Popen[str]", line: str) -> str:
    """What a child answers to a line."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    answer = process.stdout.readline().strip()
    if not answer:
        sys.exit(f"a child ended at {line!r}")
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The cost of images that do not depend on their batch."
    )
    parser.add_argument(
        "--before", type=Path, default=None, help="another checkout, to be measured beside this one"
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work == "plain", options.threads)
        return
    ways = {"this code": ROOT, "plain": ROOT} | (
        {"before": options.before.resolve()} if options.before else {}
    )
    processes = {way: child(checkout, way, options.threads) for way, checkout in ways.items()}
    print("| workload | way | best, ms | median, ms | of this code |\n|---|---|---|---|---|")
    for workload in options.workloads:
        # a prepared network is oneDNN's
        chosen = [way for way in ways if not (way == "plain" and workload.endswith("prepared"))]
        for way in chosen:
            ask(processes[way], workload)
        seconds: dict[str, list[float]] = {way: [] for way in chosen}
        for _ in range(options.repeats):
            for way in chosen:
                seconds[way].append(float(ask(processes[way], "run")))
        for way, measured in seconds.items():
            best, median = 1000 * min(measured), 1000 * statistics.median(measured)
            print(
                f"| {workload} | {way} | {best:.1f} | {median:.1f} | {min(measured) / min(seconds['this code']):.3f} |",
                flush=True,
            )
    for process in processes.values():
        process.terminate()


if __name__ == "__main__":
    main()
