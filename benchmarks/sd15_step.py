"""One call of Stable Diffusion 1.5's U-Net (860 M parameters), batch 2, 64x64 latents.

sfumato and diffusers are compared on the same weights, in one run.

    python benchmarks/sd15_step.py [--dtypes float32 bfloat16] [--compile] [--repeats 3] [--threads
    2] [--device cpu]

"sfumato packed" is what `LatentDiffusion.optimized()` and the command line run on the CPU
(inference/prepack.py), "sfumato compiled" is `optimized(compile=True)`: torch.compile with constant
weights. Ways take turns, so that a machine that changes its pace changes it for all; the median of
each is printed, and two limits: the same arithmetic, and that of "sfumato packed", which needs
fewer products (kernels/winograd.py), at the machine's rate for a plain 3x3 convolution of the
network's shape (320 channels at 64x64), measured in the same run. --compile adds torch.compile of
both (minutes each). Weights are random: they do not change the time. Differences are to diffusers
eager in float32 with the same (rounded) weights: the largest over the largest number of the output,
and the root mean square over the output's.
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
def compare(
    sfumato_unet: nn.Module, diffusers_unet: nn.Module, name: str, settings: StepSettings
) -> None:
    """Print a table row a way."""
    dtype, device = getattr(torch, name), settings.device
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 64, 64, generator=generator).to(device, dtype)
    tokens = torch.randn(2, 77, 768, generator=generator).to(device, dtype)
    t = torch.full((2,), 500.0, device=device)
    cond = Conditioning(tokens=tokens)
    ways: dict[str, Call] = {
        "diffusers eager": lambda: diffusers_unet(x, t, encoder_hidden_states=tokens).sample,
        "sfumato eager": lambda: sfumato_unet(x, t, cond),
    }
    if can_prepack(sfumato_unet):
        quick = prepack(sfumato_unet)
        ways["sfumato packed"] = lambda: quick(x, t, cond)
    if settings.compile:
        fast, slow = compile_network(sfumato_unet), torch.compile(diffusers_unet)
        ways |= {
            "diffusers compiled": lambda: slow(x, t, encoder_hidden_states=tokens).sample,
            "sfumato compiled": lambda: fast(x, t, cond),
        }
    diffusers_unet.float()
    expected = diffusers_unet(x.float(), t, encoder_hidden_states=tokens.float()).sample
    diffusers_unet.to(dtype)
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
    if "sfumato packed" in ways:
        counts["limit of sfumato packed"] = counts["limit"] - winograd_savings(
            quick, ways["sfumato packed"]
        )
    for way, count in counts.items():
        limit = f"{way}: {count / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s"
        print_row(name, limit, f"{count / rate:.2f}", f"{count / rate / base:.2f}", "")


def main(settings: StepSettings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    import diffusers

    with torch.device("meta"):
        sfumato_unet, diffusers_unet = (
            UNet(UNetConfig(**SD15_UNET)),
            diffusers.UNet2DConditionModel(**SD15_UNET),
        )
    fill(sfumato_unet)
    diffusers_unet.load_state_dict(sfumato_unet.state_dict(), assign=True)
    diffusers_unet.eval().requires_grad_(False)
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
            sfumato_unet.to(settings.device, dtype),
            diffusers_unet.to(settings.device, dtype),
            name,
            settings,
        )


if __name__ == "__main__":
    main(tyro.cli(StepSettings, description=__doc__))
