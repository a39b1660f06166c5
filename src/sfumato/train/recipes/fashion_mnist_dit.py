"""Diffusion transformer for Fashion-MNIST, on the bundled model's latents.

It has the compute of the bundled model's U-Net: 0.42 PFLOP (FLOPs counted by torch).

    sfumato train denoiser fashion_mnist_dit --out runs/fashion-dit
"""

from importlib import resources
from pathlib import Path

from sfumato.predict import ModernDiTConfig
from sfumato.sampling import Defaults
from sfumato.train import DataSettings, DenoiserLoss, DenoiserRecipe, LoopSettings

denoiser = DenoiserRecipe(
    autoencoder=Path(str(resources.files("sfumato"))) / "bundled" / "fashion" / "vae",
    data=DataSettings(source="fashion-mnist"),
    network=ModernDiTConfig(
        patch_size=1, num_layers=6, num_attention_heads=3, attention_head_dim=64, register_tokens=2
    ),
    schedule="flow",
    parameterization="flow",
    loss=DenoiserLoss(times="uniform", drop=0.3),
    loop=LoopSettings(
        steps=7_900,
        batch_size=64,
        lr=1.2e-3,
        warmup=200,
        decay="cosine",
        final_lr=0.01,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        ema=0.999,
        precision="auto",
        save_every=1580,
        show_every=1580,
    ),
    defaults=Defaults(steps=20, sampler="ddim", guidance="1.5 interval:low=0.2,high=0.8"),
    name="fashion",
)
