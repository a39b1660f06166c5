"""Small models with random weights: any network, and a whole latent diffusion model."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.predict.conditioners.unconditional import Unconditional
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.sampling.request import Defaults

CLASSES = ("t-shirt/top", "ankle boot", "bag")
LATENT = (2, 8, 8)
PROCESSES = {"flow": ("flow", "flow"), "eps": ("cosine", "eps"), "v": ("scaled_linear", "v")}
"""Schedule and parameterization of each kind of process."""

SMALL_BLOCKS: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
"""Fields of the smallest autoencoder or U-Net with a level below the first."""
CONVOLUTIONAL_UNET: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    **SMALL_BLOCKS,
}
"""Fields of a small U-Net without attention."""

Network = TypeVar("Network", bound=nn.Module)


def randomised(
    network: Network, seed: int | None = 0, scale: float = 0.1, buffers: bool = False
) -> Network:
    """Add normal noise to every parameter in place; return the network frozen, in eval mode.

    Norms of a fresh network are 1 and 0 and some of its layers are 0, where mistakes do not show.

    Args:
        network: any module; modules that it shares stay shared.
        seed: seed of the noise; None continues torch's own generator.
        scale: standard deviation of the noise.
        buffers: randomise buffers too, after the parameters.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*network.parameters(), *(network.buffers() if buffers else ())):
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    return network.eval().requires_grad_(False)


def random_network(build: Callable[[], Network], seed: int = 0, scale: float = 0.1) -> Network:
    """Build a network and randomise it, all from one seed.

    Torch's own generator stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomised(build(), None, scale)


def tiny_model(
    process: str = "flow", channels: int = 1, classes: tuple[str, ...] = CLASSES, seed: int = 0
) -> LatentDiffusion:
    """Build a whole model: 16x16 images, 8x8 latents of two channels, every weight random.

    Args:
        process: a key of `PROCESSES`.
        channels: 1 for grey images, 3 for colour.
        classes: names of the classes; empty for an unconditional model.
        seed: seed of all weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = AutoencoderKL(
            KLConfig(
                in_channels=channels,
                out_channels=channels,
                latent_channels=2,
                sample_size=16,
                **SMALL_BLOCKS,
            )
        )
        autoencoder.set_statistics((0.1, -0.2), (0.5, 0.7))
        network = UNet(
            UNetConfig(
                sample_size=8,
                in_channels=2,
                out_channels=2,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                mid_block_type="UNetMidBlock2D",
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                num_class_embeds=len(classes) + 1 if classes else None,
                **SMALL_BLOCKS,
            )
        )
        randomised(network, None, 0.05)
        randomised(autoencoder, None, 0.05)
    if classes:
        network.class_embedding.weight.mul_(3)
    kind, target = PROCESSES[process]
    conditioner = ClassNames(classes) if classes else Unconditional()
    denoiser = Denoiser(network, Process(schedule(kind), parameterization(target)))
    return LatentDiffusion(
        autoencoder, denoiser, conditioner, Defaults(steps=3, guidance=2.0), "tiny"
    )
