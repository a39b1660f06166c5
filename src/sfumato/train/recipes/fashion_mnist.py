"""Recipe of the bundled model "fashion", trained on Fashion-MNIST.

Both stages together take less than an hour of 2 CPU cores.

Act 1: 28x28 grey -> 7x7 latents of 12 channels; L1, KL 1e-6, PatchGAN in the last part. Act 3: a
small U-Net, rectified flow, uniform times, a high learning rate with warm-up and decay, and an
average of the weights. Three conditions in ten are dropped, so that the classes come out evenly
when a request names none.

    sfumato train autoencoder fashion_mnist --out runs/fashion && sfumato train denoiser
    fashion_mnist --out runs/fashion
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
        block_out_channels=(32, 48, 96),
        layers_per_block=1,
        latent_channels=12,
        norm_num_groups=16,
        sample_size=28,
    ),
    loss=AutoencoderLoss(
        pixel="l1", kl=1e-6, adversarial=0.1, adversarial_start=4700, discriminator_width=32
    ),
    loop=LoopSettings(
        steps=5400,
        batch_size=32,
        lr=1.5e-3,
        warmup=150,
        decay="cosine",
        final_lr=0.02,
        weight_decay=0.0,
        betas=(0.9, 0.99),
        ema=0.998,
        precision="auto",
        save_every=900,
        show_every=1350,
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
        resnet_time_scale_shift="scale_shift",
    ),
    schedule="flow",
    parameterization="flow",
    loss=DenoiserLoss(times="uniform", drop=0.3),
    loop=LoopSettings(
        steps=10_500,
        batch_size=128,
        lr=1.5e-3,
        warmup=200,
        decay="cosine",
        final_lr=0.01,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        ema=0.999,
        precision="auto",
        save_every=1500,
        show_every=2625,
    ),
    # chosen by benchmarks/guidance.py
    defaults=Defaults(steps=20, sampler="ddim", guidance="1.5 interval:low=0.2,high=0.8"),
    name="fashion",
)
