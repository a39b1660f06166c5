"""One call of SD 3.5 medium's and FLUX.1's transformers, cut to a few blocks.

sfumato and diffusers are compared on the same weights, in one run.

    python benchmarks/transformer_step.py [--kinds sd3 flux] [--dtypes float32 bfloat16] [--compile]
    [--size 1024] [--repeats 3] [--threads 2]

Full width and full length: pictures of 1024 pixels are 4,096 tokens beside 333 (SD 3.5, batch 2 for
guidance) or 512 (FLUX.1, batch 1) of text. Of SD 3.5 medium's 24 blocks 2 run (one of the 13 with
two attentions, and the last kind), of FLUX.1's 19 + 38 one and one; --blocks 0: all of them, on a
GPU (--device cuda). "sfumato packed" is what `LatentDiffusion.optimized()` and the command line run
on the CPU, "sfumato compiled" is `optimized(compile=True)`. Ways take turns; the median of each is
printed, and a limit: the same arithmetic at the machine's rate for a plain product of the network's
shape, measured in the same run. Weights are random: they do not change the time. Differences are to
diffusers eager in float32 with the same (rounded) weights: the largest over the largest number of
the output, and the root mean square over the output's.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn

from _common import (
    Call,
    StepSettings,
    differences,
    fill,
    machine_rate,
    median_seconds,
    operations,
    print_header,
    print_row,
)
from _models import FLUX_DEV, SD35_MEDIUM
from sfumato.inference.prepack import can_prepack, compile_network, prepack
from sfumato.predict.networks.base import build, registered
from sfumato.types import Conditioning


@dataclass(frozen=True)
class Settings(StepSettings):
    """Networks, and how much of them is measured."""

    kinds: tuple[str, ...] = ("sd3", "flux")
    size: int = 1024
    """Pixels along a side."""
    blocks: int = 2
    """Blocks that are kept; 0: all."""


def pair(kind: str, blocks: int | None) -> tuple[nn.Module, nn.Module]:
    """Networks of sfumato and of diffusers, without memory for the weights."""
    import diffusers

    if kind == "sd3":
        name, values = "SD3Transformer2DModel", dict(SD35_MEDIUM)
        if blocks:
            values |= {"num_layers": blocks, "dual_attention_layers": tuple(range(blocks - 1))}
    else:
        name, values = "FluxTransformer2DModel", dict(FLUX_DEV)
        if blocks:
            values |= {"num_layers": blocks // 2, "num_single_layers": blocks - blocks // 2}
    with torch.device("meta"):
        return build(registered()[name][1](**values)), getattr(diffusers, name)(**values)


def calls(
    kind: str, size: int, dtype: torch.dtype, device: str
) -> tuple[Callable[[nn.Module], Call], Callable[[nn.Module], Call]]:
    """Calls of a network of sfumato and of one of diffusers, on the same numbers.

    FLUX of diffusers takes and returns packed tokens.
    """
    cells, generator = size // 8, torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    batch = 2 if kind == "sd3" else 1
    x, t = normal(batch, 16, cells, cells), torch.full((batch,), 500.0, device=device)
    if kind == "sd3":
        tokens, vector = normal(batch, 333, 4096), normal(batch, 2048)
        cond = Conditioning(tokens=tokens, vector=vector)
        return (
            lambda net: lambda: net(x, t, cond),
            lambda net: (
                lambda: (
                    net(
                        x, encoder_hidden_states=tokens, pooled_projections=vector, timestep=t
                    ).sample
                )
            ),
        )
    tokens, pooled, strength = (
        normal(batch, 512, 4096),
        normal(batch, 768),
        torch.full((batch,), 3.5, device=device),
    )
    cond = Conditioning(tokens=tokens, vector=torch.cat([pooled.float(), strength[:, None]], 1))
    half = cells // 2
    ids = torch.zeros(half, half, 3, device=device)
    ids[..., 1], ids[..., 2] = (
        torch.arange(half, device=device)[:, None],
        torch.arange(half, device=device),
    )
    ids, text_ids = ids.reshape(-1, 3), torch.zeros(512, 3, device=device)

    def call_diffusers(net: nn.Module) -> Call:
        def call() -> Tensor:
            like = pooled.dtype if net.dtype == pooled.dtype else net.dtype  # pyright: ignore
            tokens_of_x = (
                x.to(like)
                .unflatten(2, (half, 2))
                .unflatten(4, (half, 2))
                .permute(0, 2, 4, 1, 3, 5)
                .reshape(batch, half * half, 64)
            )
            y = net(
                tokens_of_x, encoder_hidden_states=tokens.to(like),
                pooled_projections=pooled.to(like), timestep=t.to(like) / 1000,
                img_ids=ids, txt_ids=text_ids, guidance=strength.to(like),
            ).sample  # fmt: skip
            return (
                y.reshape(batch, half, half, 16, 2, 2)
                .permute(0, 3, 1, 4, 2, 5)
                .reshape(batch, 16, cells, cells)
            )

        return call

    return lambda net: lambda: net(x, t, cond), call_diffusers


@torch.inference_mode()
def compare(kind: str, name: str, settings: Settings) -> None:
    """Print a table row a way."""
    dtype, device = getattr(torch, name), settings.device
    sfumato_network, diffusers_network = pair(kind, settings.blocks or None)
    fill(sfumato_network, device=device)
    diffusers_network.load_state_dict(sfumato_network.state_dict(), assign=True)
    diffusers_network.eval().requires_grad_(False)
    sfumato_network.to(dtype), diffusers_network.to(dtype)
    call_sfumato, call_diffusers = calls(kind, settings.size, dtype, device)
    ways: dict[str, Call] = {
        "diffusers eager": call_diffusers(diffusers_network),
        "sfumato eager": call_sfumato(sfumato_network),
    }
    if can_prepack(sfumato_network):
        ways["sfumato packed"] = call_sfumato(prepack(sfumato_network))
    if settings.compile:
        ways |= {
            "diffusers compiled": call_diffusers(torch.compile(diffusers_network)),
            "sfumato compiled": call_sfumato(compile_network(sfumato_network)),
        }
    exact, (_, call_exact) = (
        diffusers_network.float(),
        calls(kind, settings.size, torch.float32, device),
    )
    expected = call_exact(exact)()
    diffusers_network.to(dtype)
    gc.collect()
    error = {way: differences(call().float(), expected) for way, call in ways.items()}
    seconds = median_seconds(ways, settings.repeats, device)
    base = seconds["diffusers eager"]
    for way, median in seconds.items():
        print_row(kind, name, way, f"{median:.3f}", f"{base / median:.2f}", error[way])
    width = 1536 if kind == "sd3" else 3072
    layer, rows = (
        nn.Linear(width, 4 * width).to(device, dtype),
        torch.randn(4096, width, device=device).to(dtype),
    )
    rate, count = (
        machine_rate(lambda: layer(rows), 2 * 4096 * width * 4 * width, device),
        operations(ways["diffusers eager"]),
    )
    limit = f"limit: {count / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s"
    print_row(kind, name, limit, f"{count / rate:.3f}", f"{base * rate / count:.2f}", "")


def main(settings: Settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    import diffusers

    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"{versions}, {settings.device}, {torch.get_num_threads()} threads, {settings.size} px\n")
    quotient, error = "times as quick as diffusers eager", "largest, mean difference to float32"
    print_header("network", "dtype", "way", "seconds a call", quotient, error)
    for kind in settings.kinds:
        for name in settings.dtypes:
            compare(kind, name, settings)
            gc.collect()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
