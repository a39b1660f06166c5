"""One call of Stable Diffusion 1.5's U-Net (860 M parameters), batch 2, 64x64 latents: ours beside
diffusers, on the same weights, in one run.

    python benchmarks/sd15_step.py [--dtypes float32 bfloat16] [--compile] [--repeats 3] [--threads
    2] [--device cpu]

"ours packed" is what `LatentDiffusion.optimized()` and the command line run on the CPU
(inference/prepack.py), "ours compiled" is `optimized(compile=True)`: torch.compile with constant
weights. Ways take turns, so that a machine that changes its pace changes it for all; the median of
each is printed, and two limits: the same arithmetic, and that of "ours packed", which needs fewer
products (kernels/winograd.py), at the machine's rate for a plain 3x3 convolution of the network's
shape (320 channels at 64x64), measured in the same run. --compile adds torch.compile of both
(minutes each). Weights are random: they do not change the time. Differences are to diffusers eager
in float32 with the same (rounded) weights: the largest over the largest number of the output, and
the root mean square over the output's.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sfumato.inference.prepack import Winograd, can_prepack, compile_network, prepack
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.types import Conditioning

CONFIG = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def filled(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of the usual size, without torch's own slow drawing of each layer."""
    generator = torch.Generator().manual_seed(seed)
    network.to_empty(device="cpu")
    for name, weight in network.named_parameters():
        weight.data.normal_(0, 0.02, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weight.data.add_(1)
    return network.eval().requires_grad_(False)


def attention_products(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
    """Operations of Q K^T and P V for heads (B, H, N, d)."""
    return 4 * q.numel() * k[-2]


def saved(network: nn.Module, call: Callable[[], Tensor]) -> int:
    """Operations that the network's 3x3 convolutions leave out: 20 of 36 products."""
    left_out = 0

    def hook(layer: nn.Module, _: object, y: Tensor) -> None:
        nonlocal left_out
        left_out += 2 * y.numel() * layer.in_channels * 9 * 20 // 36

    hooks = [
        layer.register_forward_hook(hook)
        for layer in network.modules()
        if isinstance(layer, Winograd)
    ]
    call()
    for one in hooks:
        one.remove()
    return left_out


def differences(y: Tensor, expected: Tensor) -> str:
    """The largest over the largest number, and the root mean square over the output's."""
    error = y - expected
    return f"{float(error.abs().max() / expected.abs().max()):.1e}, {float(error.norm() / expected.norm()):.1e}"


def timed(call: Callable[[], Tensor], device: str) -> float:
    begin = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description="SD 1.5's U-Net: ours beside diffusers.")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    import diffusers

    with torch.device("meta"):
        ours, theirs = UNet(UNetConfig(**CONFIG)), diffusers.UNet2DConditionModel(**CONFIG)
    filled(ours)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.eval().requires_grad_(False)
    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {options.device}, {torch.get_num_threads()} threads\n"
    )
    print(
        "| dtype | way | seconds a call | of diffusers eager | largest, mean difference to float32 |\n|---|---|---|---|---|"
    )
    for name in options.dtypes:
        compare(
            ours.to(options.device, getattr(torch, name)),
            theirs.to(options.device, getattr(torch, name)),
            name,
            options,
        )


@torch.inference_mode()
def compare(ours: nn.Module, theirs: nn.Module, name: str, options: argparse.Namespace) -> None:
    dtype, device = getattr(torch, name), options.device
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 64, 64, generator=generator).to(device, dtype)
    tokens = torch.randn(2, 77, 768, generator=generator).to(device, dtype)
    t = torch.full((2,), 500.0, device=device)
    cond = Conditioning(tokens=tokens)
    ways: dict[str, Callable[[], Tensor]] = {
        "diffusers eager": lambda: theirs(x, t, encoder_hidden_states=tokens).sample,
        "ours eager": lambda: ours(x, t, cond),
    }
    if can_prepack(ours):
        quick = prepack(ours)
        ways["ours packed"] = lambda: quick(x, t, cond)
    if options.compile:
        fast, slow = compile_network(ours), torch.compile(theirs)
        ways |= {
            "diffusers compiled": lambda: slow(x, t, encoder_hidden_states=tokens).sample,
            "ours compiled": lambda: fast(x, t, cond),
        }
    theirs.float()
    expected = theirs(x.float(), t, encoder_hidden_states=tokens.float()).sample
    theirs.to(dtype)
    error = {way: differences(call().float(), expected) for way, call in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way, call in ways.items():
            seconds[way].append(timed(call, device))
    base = statistics.median(seconds["diffusers eager"])
    for way, found in seconds.items():
        mine = statistics.median(found)
        print(f"| {name} | {way} | {mine:.2f} | {mine / base:.2f} | {error[way]} |", flush=True)
    # which torch does not count by itself
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: attention_products}) as counter:
        ways["diffusers eager"]()
    conv = nn.Conv2d(320, 320, 3, padding=1).to(device, dtype)
    image = torch.randn(2, 320, 64, 64, device=device).to(dtype)
    conv(image)
    rate = (
        2 * 320 * 320 * 9 * 2 * 64 * 64 / min(timed(lambda: conv(image), device) for _ in range(8))
    )
    counts = {"limit": counter.get_total_flops()}
    if "ours packed" in ways:
        counts["limit of ours packed"] = counts["limit"] - saved(quick, ways["ours packed"])
    for way, count in counts.items():
        print(
            f"| {name} | {way}: {count / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s | {count / rate:.2f} | {count / rate / base:.2f} | |",
            flush=True,
        )


if __name__ == "__main__":
    main()
