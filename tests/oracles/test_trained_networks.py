"""Recipes with any network's config.

Values of data, autoencoder and text encoder are filled in; impossible settings are refused before
the first step.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sfumato
from helpers import captioned_images, text_encoders
from sfumato.errors import UserError
from sfumato.predict.networks.dit import DiTConfig
from sfumato.predict.networks.flux import FluxConfig
from sfumato.predict.networks.flux2 import Flux2Config
from sfumato.predict.networks.modern_dit import ModernDiTConfig
from sfumato.predict.networks.pixart import PixArtConfig
from sfumato.predict.networks.sd3 import SD3Config
from sfumato.predict.networks.sit import SiTConfig
from sfumato.predict.networks.z_image import ZImageConfig
from sfumato.sampling import Defaults
from sfumato.train.loop import LoopSettings
from sfumato.train.objectives.denoiser import DenoiserLoss
from sfumato.train.recipe import DataSettings, DenoiserRecipe

SMALL: dict[str, Any] = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
FLUX: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
}
# its config, the text encoder (None: classes), fields of the folder's config
NETWORKS: dict[str, tuple[Any, str | None, dict[str, Any]]] = {
    "DiT": (DiTConfig(**SMALL), None, {"num_embeds_ada_norm": 2, "sample_size": 8}),
    "SiT": (SiTConfig(**SMALL), None, {"num_embeds_ada_norm": 2, "sample_size": 8}),
    "sfumato": (ModernDiTConfig(**SMALL, patch_size=2), None,
                {"num_class_embeds": 3, "sample_size": 8}),
    "PixArt": (PixArtConfig(**(SMALL | {"num_attention_heads": 3, "out_channels": 4}),
                            cross_attention_dim=24), "t5",
                            {"caption_channels": 48, "sample_size": 8}),
    "SD3": (SD3Config(**SMALL, caption_projection_dim=16, pos_embed_max_size=8), "flux",
            {"joint_attention_dim": 48, "pooled_projection_dim": 16, "in_channels": 4}),
    "FLUX.1": (FluxConfig(**FLUX, axes_dims_rope=(4, 6, 6)), "flux",
               {"in_channels": 16, "joint_attention_dim": 48, "pooled_projection_dim": 16}),
    "FLUX.2": (
        Flux2Config(**FLUX, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False), "t5",
        {"in_channels": 4, "joint_attention_dim": 48},
    ),
    "Z-Image": (
        ZImageConfig(
            dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, axes_dims=(4, 6, 6)
        ),
        "t5",
        {"in_channels": 4, "cap_feat_dim": 48},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned images, a folder with FLUX's text encoders, and images of two classes."""
    result = captioned_images.write(tmp_path_factory.mktemp("networks") / "parts")
    text_encoders.write(result / "flux", "flux")
    for name, value in (("red", 40), ("blue", 200)):
        (result / "classes" / name).mkdir(parents=True)
        for k in range(4):
            Image.fromarray(np.full((16, 16, 3), value + k, dtype=np.uint8)).save(
                result / "classes" / name / f"{k}.png"
            )
    return result


def recipe(
    place: Path, network: Any, text: str | None, source: str | None = None
) -> DenoiserRecipe:
    return DenoiserRecipe(
        autoencoder=place / "tiny",
        data=DataSettings(
            source=str(place / (source or ("pictures" if text else "classes"))),
            size=16,
            buckets=8 if text else None,
        ),
        text=place / text if text else None,
        network=network,
        schedule="flow",
        parameterization="flow",
        loss=DenoiserLoss(times="logit_normal", times_shift=2.0),
        loop=LoopSettings(
            steps=2,
            batch_size=2,
            lr=1e-2,
            warmup=1,
            save_every=2,
            show_every=9 if text == "flux" else 2,
        ),
        defaults=Defaults(steps=2, sampler="euler", guidance=2.0),
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_is_trained_by_a_recipe(name: str, place: Path, tmp_path: Path) -> None:
    """The folder opens, and its default size is that of training."""
    network, text, expected = NETWORKS[name]
    folder = recipe(place, network, text).run(tmp_path / "run")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert {key: config[key] for key in expected} == expected
    model = sfumato.load(folder)
    assert model.class_names == (() if text else ("blue", "red")) and model.sample_size == 16
    (picture,) = model.generate(captioned_images.WORDS[0] if text else "red")
    assert picture.size == (16, 16)
    if text != "flux":  # 512 tokens of text, in 80 pictures
        assert Image.open(tmp_path / "run" / "denoiser" / "samples" / "samples-00000002.png").size[
            0
        ] <= 10 * (16 + 4)


@pytest.mark.parametrize(
    ("network", "text", "source", "words"),
    [
        (SD3Config(), None, "classes", "a SD3 has no classes: train it from captions"),
        (PixArtConfig(), None, "classes", "a PixArt has no classes"),
        (
            DiTConfig(**SMALL, in_channels=4, out_channels=8),
            None,
            "classes",
            "a learned variance with schedule 'flow'",
        ),
        (
            DiTConfig(**SMALL),
            None,
            "pictures",
            "a DiT is conditioned on classes or text, and pictures has no classes",
        ),
        (
            Flux2Config(**FLUX, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=True),
            "flux",
            None,
            "guidance_embeds=True: the strength of guidance is learned from another model, not "
            "from data",
        ),
    ],
)
def test_untrainable_settings_are_refused_before_images_are_encoded(
    network: Any, text: str | None, source: str | None, words: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        recipe(place, network, text, source).run(tmp_path / "run")
    assert not (tmp_path / "run" / "latents").exists()
