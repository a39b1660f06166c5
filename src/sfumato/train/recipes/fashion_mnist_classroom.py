"""Recipe of a common classroom exercise on Fashion-MNIST, for comparison.

The exercise sets 4x-downsampled latents of 4 channels (7x7), 12,000 steps at batch 32, a cosine
schedule, lr 1e-4, weight decay 0.01, EMA 0.995 and guidance 1.25. It expects 90 minutes on a T4 and
a PSNR above 18 dB. It leaves the networks' widths and the autoencoder's training open: here they
are the networks of fashion_mnist, a plain squared error with KL 1e-6, and noise prediction, so that
the comparison is about the recipe.

    sfumato train autoencoder fashion_mnist_classroom --out runs/classroom && sfumato train denoiser
    fashion_mnist_classroom --out runs/classroom
"""

from sfumato.compress import KLConfig
from sfumato.predict import UNetConfig
from sfumato.sampling import Defaults
from sfumato.train import (
    AutoencoderLoss,
    AutoencoderRecipe,
    DataSettings,
    DenoiserLoss,
    DenoiserRecipe,
    LoopSettings,
)

data = DataSettings(source="fashion-mnist")

autoencoder = AutoencoderRecipe(
    data=data,
    network=KLConfig(
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=28,
    ),
    loss=AutoencoderLoss(pixel="l2", kl=1e-6),
    loop=LoopSettings(
        steps=1900,
        batch_size=32,
        lr=1e-4,
        warmup=0,
        decay="constant",
        weight_decay=0.01,
        ema=0.995,
        precision="auto",
        save_every=500,
        show_every=950,
    ),
    features="fashion",
)

denoiser = DenoiserRecipe(
    data=data,
    network=UNetConfig(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=32,
    ),
    schedule="cosine",
    parameterization="eps",
    loss=DenoiserLoss(drop=0.1),
    loop=LoopSettings(
        steps=12_000,
        batch_size=32,
        lr=1e-4,
        warmup=0,
        decay="constant",
        weight_decay=0.01,
        ema=0.995,
        precision="auto",
        save_every=1000,
        show_every=3000,
    ),
    # noise prediction says next to nothing at pure noise
    defaults=Defaults(steps=20, sampler="ddim", guidance=1.25, spacing="leading"),
    name="classroom",
)
