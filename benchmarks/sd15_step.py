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
from _models import SD15_UNET
from sfumato.inference.prepack import Winograd, can_prepack, compile_network, prepack
from sfumato.predict import UNet, UNetConfig
from sfumato.types import Conditioning


def winograd_savings(network: nn.Module, call: Call) -> int:
    """Count the operations that the network's 3x3 convolutions leave out: 20 of 36 products."""
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
    for handle in hooks:
        handle.remove()
    return left_out


@torch.inference_mode()
def compare(actual: nn.Module, reference: nn.Module, name: str, settings: StepSettings) -> None:
    """Print a table row a way."""
    dtype, device = getattr(torch, name), settings.device
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 64, 64, generator=generator).to(device, dtype)
    tokens = torch.randn(2, 77, 768, generator=generator).to(device, dtype)
    t = torch.full((2,), 500.0, device=device)
    cond = Conditioning(tokens=tokens)
    ways: dict[str, Call] = {
        "diffusers eager": lambda: reference(x, t, encoder_hidden_states=tokens).sample,
        "ours eager": lambda: actual(x, t, cond),
    }
    if can_prepack(actual):
        quick = prepack(actual)
        ways["ours packed"] = lambda: quick(x, t, cond)
    if settings.compile:
        fast, slow = compile_network(actual), torch.compile(reference)
        ways |= {
            "diffusers compiled": lambda: slow(x, t, encoder_hidden_states=tokens).sample,
            "ours compiled": lambda: fast(x, t, cond),
        }
    reference.float()
    expected = reference(x.float(), t, encoder_hidden_states=tokens.float()).sample
    reference.to(dtype)
    error = {way: differences(call().float(), expected) for way, call in ways.items()}
    seconds = median_seconds(ways, settings.repeats, device)
    base = seconds["diffusers eager"]
    for way, median in seconds.items():
        print_row(name, way, f"{median:.2f}", f"{median / base:.2f}", error[way])
    conv, image = (
        nn.Conv2d(320, 320, 3, padding=1).to(device, dtype),
        torch.randn(2, 320, 64, 64, device=device).to(dtype),
    )
    rate = machine_rate(lambda: conv(image), 2 * 320 * 320 * 9 * 2 * 64 * 64, device)
    counts = {"limit": operations(ways["diffusers eager"])}
    if "ours packed" in ways:
        counts["limit of ours packed"] = counts["limit"] - winograd_savings(
            quick, ways["ours packed"]
        )
    for way, count in counts.items():
        limit = f"{way}: {count / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s"
        print_row(name, limit, f"{count / rate:.2f}", f"{count / rate / base:.2f}", "")


def main(settings: StepSettings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    import diffusers

    with torch.device("meta"):
        actual, reference = (
            UNet(UNetConfig(**SD15_UNET)),
            diffusers.UNet2DConditionModel(**SD15_UNET),
        )
    fill(actual)
    reference.load_state_dict(actual.state_dict(), assign=True)
    reference.eval().requires_grad_(False)
    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {settings.device}, "
        f"{torch.get_num_threads()} threads\n"
    )
    print_header(
        "dtype",
        "way",
        "seconds a call",
        "of diffusers eager",
        "largest, mean difference to float32",
    )
    for name in settings.dtypes:
        dtype = getattr(torch, name)
        compare(
            actual.to(settings.device, dtype), reference.to(settings.device, dtype), name, settings
        )


if __name__ == "__main__":
    main(tyro.cli(StepSettings, description=__doc__))
