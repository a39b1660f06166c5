"""One call of SD 3.5 medium's and FLUX.1's transformers, cut to a few blocks: ours beside
diffusers, on the same weights, in one run.

    python benchmarks/transformer_step.py [--kinds sd3 flux] [--dtypes float32 bfloat16] [--compile]
    [--size 1024] [--repeats 3] [--threads 2]

Full width and full length: pictures of 1024 pixels are 4,096 tokens beside 333 (SD 3.5, batch 2 for
guidance) or 512 (FLUX.1, batch 1) of text. Of SD 3.5 medium's 24 blocks 2 run (one of the 13 with
two attentions, and the last kind), of FLUX.1's 19 + 38 one and one; --blocks 0: all of them, on a
GPU (--device cuda). "ours packed" is what `LatentDiffusion.optimized()` and the command line run on
the CPU, "ours compiled" is `optimized(compile=True)`. Ways take turns; the median of each is
printed, and a limit: the same arithmetic at the machine's rate for a plain product of the network's
shape, measured in the same run. Weights are random: they do not change the time. Differences are to
diffusers eager in float32 with the same (rounded) weights: the largest over the largest number of
the output, and the root mean square over the output's.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sfumato.inference.prepack import can_prepack, compile_network, prepack
from sfumato.predict.networks.base import build, registered
from sfumato.types import Conditioning

SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "out_channels": 16,
    "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
"""stabilityai/stable-diffusion-3.5-medium, transformer/config.json."""
FLUX_DEV: dict[str, Any] = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
"""black-forest-labs/FLUX.1-dev, transformer/config.json."""
Call = Callable[[], Tensor]


def filled(network: nn.Module, device: str) -> nn.Module:
    """Random weights of the usual size."""
    generator = torch.Generator(device).manual_seed(0)
    network.to_empty(device=device)
    for name, weight in (*network.named_parameters(), *network.named_buffers()):
        weight.data.normal_(0, 0.02, generator=generator)
        if "norm_" in name and name.endswith("weight") and weight.ndim == 1:
            weight.data.add_(1)
    return network.eval().requires_grad_(False)


def pair(kind: str, blocks: int | None) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs, without memory for the weights."""
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
    """How to call a network of ours, and one of theirs, with the same numbers. Theirs takes and
    gives packed tokens (FLUX).
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

    def theirs(net: nn.Module) -> Call:
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
                tokens_of_x, encoder_hidden_states=tokens.to(like), pooled_projections=pooled.to(like), timestep=t.to(like) / 1000,
                img_ids=ids, txt_ids=text_ids, guidance=strength.to(like),
            ).sample  # fmt: skip
            return (
                y.reshape(batch, half, half, 16, 2, 2)
                .permute(0, 3, 1, 4, 2, 5)
                .reshape(batch, 16, cells, cells)
            )

        return call

    return lambda net: lambda: net(x, t, cond), theirs


def attention_products(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
    """Operations of Q K^T and P V for heads (B, H, N, d)."""
    return 4 * q.numel() * k[-2]


def differences(y: Tensor, expected: Tensor) -> str:
    """The largest over the largest number, and the root mean square over the output's."""
    error = y - expected
    return f"{float(error.abs().max() / expected.abs().max()):.1e}, {float(error.norm() / expected.norm()):.1e}"


def timed(call: Call, device: str) -> float:
    begin = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


@torch.inference_mode()
def compare(kind: str, name: str, options: argparse.Namespace) -> None:
    """One table row a way."""
    dtype, device = getattr(torch, name), options.device
    ours, theirs = pair(kind, options.blocks or None)
    filled(ours, device)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.eval().requires_grad_(False)
    ours.to(dtype), theirs.to(dtype)
    call_ours, call_theirs = calls(kind, options.size, dtype, device)
    ways: dict[str, Call] = {"diffusers eager": call_theirs(theirs), "ours eager": call_ours(ours)}
    if can_prepack(ours):
        ways["ours packed"] = call_ours(prepack(ours))
    if options.compile:
        ways |= {
            "diffusers compiled": call_theirs(torch.compile(theirs)),
            "ours compiled": call_ours(compile_network(ours)),
        }
    exact, (_, call_exact) = theirs.float(), calls(kind, options.size, torch.float32, device)
    expected = call_exact(exact)()
    theirs.to(dtype)
    gc.collect()
    error = {way: differences(call().float(), expected) for way, call in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way, call in ways.items():
            seconds[way].append(timed(call, device))
    base = statistics.median(seconds["diffusers eager"])
    for way, found in seconds.items():
        mine = statistics.median(found)
        print(
            f"| {kind} | {name} | {way} | {mine:.3f} | {base / mine:.2f} | {error[way]} |",
            flush=True,
        )
    # which torch does not count by itself
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: attention_products}) as counter:
        ways["diffusers eager"]()
    width = 1536 if kind == "sd3" else 3072
    layer, rows = (
        nn.Linear(width, 4 * width).to(device, dtype),
        torch.randn(4096, width, device=device).to(dtype),
    )
    layer(rows)
    rate, count = (
        2 * 4096 * width * 4 * width / min(timed(lambda: layer(rows), device) for _ in range(8)),
        counter.get_total_flops(),
    )
    print(
        f"| {kind} | {name} | limit: {count / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s | {count / rate:.3f} | {base * rate / count:.2f} | |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Transformers of SD 3.5 and FLUX.1: ours beside diffusers."
    )
    parser.add_argument("--kinds", nargs="+", default=["sd3", "flux"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    import diffusers

    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {options.device}, {torch.get_num_threads()} threads, {options.size} px\n"
    )
    print(
        "| network | dtype | way | seconds a call | times as quick as diffusers eager | largest, mean difference to float32 |"
    )
    print("|---|---|---|---|---|---|")
    for kind in options.kinds:
        for name in options.dtypes:
            compare(kind, name, options)
            gc.collect()


if __name__ == "__main__":
    main()
