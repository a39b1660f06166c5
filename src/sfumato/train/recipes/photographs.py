"""Autoencoder and transformer for photographs of your own, with or without classes.

Act 1: 64x64 colour -> 16x16 latents of 8 channels; L1, KL 1e-6, PatchGAN in the last part. Act 3:
64 tokens of 2 x 2, rectified flow. Made for a few thousand images and some hours of a desktop's
cores; a hundred steps of each show within minutes that the data are read as they are meant.

    sfumato train autoencoder photographs --data.source my-images --out runs/mine
    sfumato train denoiser photographs --data.source my-images --out runs/mine
"""

from sfumato.compress import KLConfig
from sfumato.predict import ModernDiTConfig
from sfumato.sampling import Defaults
from sfumato.train import (
    AutoencoderLoss,
    AutoencoderRecipe,
    DataSettings,
    DenoiserLoss,
    DenoiserRecipe,
    LoopSettings,
)

data = DataSettings(source="my-images", size=64, channels=3)

autoencoder = AutoencoderRecipe(
    data=data,
    network=KLConfig(
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=16,
        sample_size=64,
    ),
    loss=AutoencoderLoss(
        pixel="l1", kl=1e-6, adversarial=0.1, adversarial_start=4000, discriminator_width=32
    ),
    loop=LoopSettings(
        steps=5000,
        batch_size=16,
        lr=1e-3,
        warmup=100,
        decay="cosine",
        final_lr=0.02,
        weight_decay=0.0,
        betas=(0.9, 0.99),
        ema=0.998,
        save_every=500,
        show_every=500,
    ),
)

denoiser = DenoiserRecipe(
    data=data,
    network=ModernDiTConfig(
        patch_size=2, num_layers=8, num_attention_heads=3, attention_head_dim=64, register_tokens=4
    ),
    schedule="flow",
    parameterization="flow",
    loss=DenoiserLoss(times="logit_normal", drop=0.1),
    loop=LoopSettings(
        steps=10_000,
        batch_size=32,
        lr=1e-3,
        warmup=200,
        decay="cosine",
        final_lr=0.01,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        ema=0.998,
        save_every=500,
        show_every=1000,
        previews=40,
    ),
    defaults=Defaults(steps=30, sampler="dpmpp_2m", guidance="2 interval:low=0.1,high=0.9"),
    name="photographs",
)
