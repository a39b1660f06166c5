"""Builds whole models with small random weights, in milliseconds: 16x16 pictures, 8x8 latents of
two channels.

Test modules cannot import each other here, so they take it by path: `build =
runpy.run_path(...)["build"]`.
"""

import torch

from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.predict.conditioners.unconditional import Unconditional
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.sampling import Defaults

CLASSES = ("t-shirt/top", "ankle boot", "bag")
LATENT = (2, 8, 8)
PROCESSES = {"flow": ("flow", "flow"), "eps": ("cosine", "eps"), "v": ("scaled_linear", "v")}


def build(
    process: str = "flow", channels: int = 1, classes: tuple[str, ...] = CLASSES, seed: int = 0
) -> LatentDiffusion:
    """A model whose every weight is random, so that each input shows in the output. No `classes`:
    an unconditional one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
        autoencoder = AutoencoderKL(
            KLConfig(
                in_channels=channels,
                out_channels=channels,
                latent_channels=2,
                sample_size=16,
                **widths,
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
                **widths,
            )
        )
        with torch.no_grad():  # norms start at 1 and 0 otherwise, and many faults would not show
            for parameter in (*network.parameters(), *autoencoder.parameters()):
                parameter.add_(0.05 * torch.randn_like(parameter))
            if classes:
                network.class_embedding.weight.mul_(3)
    names = PROCESSES[process]
    conditioner = ClassNames(classes) if classes else Unconditional()
    denoiser = Denoiser(
        network.eval().requires_grad_(False),
        Process(schedule(names[0]), parameterization(names[1])),
    )
    return LatentDiffusion(
        autoencoder.eval().requires_grad_(False),
        denoiser,
        conditioner,
        Defaults(steps=3, guidance=2.0),
        "tiny",
    )
