"""Diffusion transformer that draws photographs of clothes from captions.

It works on FLUX.2's latents, of a tiny autoencoder that is already trained. Pictures keep their
aspect, in buckets of about 128 x 128 pixels: 16 x 16 latents of 32 channels, 64 tokens of 2 x 2. A
sentence encoder (all-MiniLM-L6-v2; Wang et al. 2020, arXiv:2002.10957) reads the captions. 40
minutes of one CPU core for 3,068 pictures.

    sfumato train denoiser clothing --data.source clothing-256-train.parquet --autoencoder
    TAEF2_FOLDER --text MINILM_FOLDER --out runs/clothing

TAEF2_FOLDER holds taef2_encoder.safetensors and taef2_decoder.safetensors
(github.com/madebyollin/taesd), MINILM_FOLDER the files of sentence-transformers/all-MiniLM-L6-v2.
"""

from pathlib import Path

from sfumato.predict import ModernDiTConfig
from sfumato.sampling import Defaults
from sfumato.train import DataSettings, DenoiserLoss, DenoiserRecipe, LoopSettings

denoiser = DenoiserRecipe(
    autoencoder=Path("taef2"),
    data=DataSettings(source="clothing-256-train.parquet", size=128, buckets=16),
    text=Path("all-MiniLM-L6-v2"),
    network=ModernDiTConfig(
        patch_size=2, num_layers=8, num_attention_heads=3, attention_head_dim=64, register_tokens=4
    ),
    schedule="flow",
    parameterization="flow",
    loss=DenoiserLoss(times="logit_normal", drop=0.1),
    loop=LoopSettings(
        steps=1800,
        batch_size=64,
        lr=1e-3,
        warmup=200,
        decay="cosine",
        final_lr=0.01,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        ema=0.998,
        precision="auto",
        save_every=450,
        show_every=600,
    ),
    defaults=Defaults(steps=30, sampler="dpmpp_2m", guidance="3 interval:low=0.1,high=0.9"),
    name="clothing",
)
