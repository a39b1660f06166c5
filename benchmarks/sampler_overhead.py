"""Cost of a run beside the network: the sampler's algebra, guidance, checks and calls.

    python benchmarks/sampler_overhead.py [--n 16] [--steps 20] [--repeats 15] [--samplers ddim ...]
    [--guidance 1.5] [--diffusers]

Every sampler of the registry on the bundled model: seconds of whole runs, less the seconds inside
the network's `forward`, per network call and as a share of one. The limit is the algebra's own
memory traffic: a few passes over x, which is 1000 times smaller than the network's activations.
With --diffusers the same network runs in the loop of its pipelines too, with guidance at every
step, as they have it (--guidance 1.5 gives sfumato the same): two copies of the latent in one
batch, `chunk`, the line through both, `scheduler.step`. Decoding and drawing the first noise are
not part of a run's steps and are left out by running from given noise to latents.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from _common import print_header, print_row, timed
from sfumato.diffuse import traits_of
from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.registry import find, names
from sfumato.types import Conditioning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=16, help="images in a run")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--guidance", default=None)
    parser.add_argument("--samplers", nargs="*", default=None, help="all of them, if none is named")
    parser.add_argument(
        "--diffusers",
        action="store_true",
        help="the loop of diffusers' pipelines around the same network",
    )
    options = parser.parse_args()
    model = load("fashion")
    network, calls = model.denoiser.network, []
    forward = network.forward

    def timed_forward(*arguments):
        begin = time.perf_counter()
        y = forward(*arguments)
        calls.append(time.perf_counter() - begin)
        return y

    network.forward = timed_forward
    noise = torch.randn(options.n, *(12, 7, 7), generator=torch.Generator().manual_seed(0))
    print(
        f"n={options.n}, {options.steps} steps, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, median of {options.repeats} runs\n"
    )
    print_header("sampler", "calls", "ms a call in the network", "ms beside it", "share")

    def report(name: str, work: Callable[[], object]) -> None:
        beside, inside = [], []
        for repeat in range(options.repeats + 2):
            calls.clear()
            total = timed(work)
            if repeat >= 2:  # the first runs fill memories
                beside.append((total - sum(calls)) / len(calls))
                inside.append(sum(calls) / len(calls))
        a, b = statistics.median(inside), statistics.median(beside)
        print_row(name, str(len(calls)), f"{1e3 * a:.2f}", f"{1e3 * b:.3f}", f"{100 * b / a:.2f} %")

    for name in options.samplers or names("diffuse.samplers"):
        if not traits_of(find("diffuse.samplers", name)).inverts:
            values = {
                "n": options.n,
                "steps": options.steps,
                "sampler": name,
                "noise": noise,
                "guidance": options.guidance,
            }
            report(name, lambda values=values: model.generate("bag", **values, output="latent"))
    if options.diffusers:
        for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"):
            report(
                f"diffusers {name}",
                lambda name=name: diffusers_run(name, model, noise, options.steps),
            )


@torch.inference_mode()
def diffusers_run(
    name: str, model: LatentDiffusion, noise: Tensor, steps: int, guidance: float = 1.5
) -> Tensor:
    """The denoising loop of diffusers' pipelines with guidance, on a flow."""
    import diffusers

    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(steps)
    n, latents = len(noise), noise
    vector = torch.cat([model.conditioner([words] * n).vector for words in (None, "bag")])
    for t in scheduler.timesteps:
        both = torch.cat([latents] * 2)
        y = model.denoiser.network(both, t.expand(len(both)), Conditioning(vector=vector))
        unconditional, conditional = y.chunk(2)
        latents = scheduler.step(
            unconditional + guidance * (conditional - unconditional), t, latents, return_dict=False
        )[0]
    return latents


if __name__ == "__main__":
    main()
