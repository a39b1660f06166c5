"""Every recipe of the package, by itself: it loads, has both stages, and trains both, shrunk to
seconds, into a model that opens.
"""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PIL

import sfumato
from helpers import captioned_images
from helpers.models import CONVOLUTIONAL_UNET, SMALL_BLOCKS
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.data.idx import fashion_mnist_folder, read_idx
from sfumato.errors import UserError
from sfumato.io.atomic import hash_tensors
from sfumato.predict.networks.unet import UNetConfig
from sfumato.sampling import Defaults
from sfumato.train import AutoencoderRecipe, DenoiserRecipe, load_recipe, run_recipe
from sfumato.train.loop import LoopSettings
from sfumato.train.recipe import DataSettings

FOLDER = Path(sfumato.__file__).parent / "train" / "recipes"
RECIPES = sorted(FOLDER.glob("[!_]*.py"))
STAGES = ("autoencoder", "denoiser")
READING = [f for f in RECIPES if "text=" in f.read_text()]
LOOP = LoopSettings(
    steps=2, batch_size=4, lr=1e-3, warmup=1, save_every=1, show_every=1, log_every=1
)
TINY_KL = KLConfig(latent_channels=2, sample_size=16, **SMALL_BLOCKS)
TINY_NET = UNetConfig(**CONVOLUTIONAL_UNET)


def stages_of(file: Path) -> tuple[str, ...]:
    """Both, or the second alone where the recipe goes on from an autoencoder that there is."""
    return STAGES if "AutoencoderRecipe(" in file.read_text() else STAGES[1:]


def test_there_are_recipes() -> None:
    assert "fashion_mnist" in {f.stem for f in RECIPES}


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_a_file_is_a_recipe_of_both_stages(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = [load_recipe(file, stage) for stage in stages_of(file)]
    assert isinstance(result[-1], DenoiserRecipe)
    if len(result) == 2:
        assert isinstance(result[0], AutoencoderRecipe)
        assert result[0].data == replace(result[1].data, flip=result[0].data.flip), (
            "both stages must see the same images"
        )
    elif result[0].text is None:
        assert (result[0].autoencoder / "config.json").exists(), (
            "a recipe of one stage names the autoencoder that it goes on from"
        )
    else:
        assert result[0].autoencoder is not None, (
            "a recipe that reads captions names what the caller has to give"
        )
    monkeypatch.chdir(tmp_path)
    assert load_recipe(file.stem.replace("_", "-"), "denoiser") == result[-1]


def idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes(), 1))


@pytest.fixture(scope="module")
def some_fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 64 training and 32 test images of Fashion-MNIST, in its own format."""
    try:
        whole = fashion_mnist_folder()
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("data") / "fashion-mnist"
    folder.mkdir()
    for prefix, count in (("train", 64), ("t10k", 32)):
        for name in (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"):
            idx(folder / name, read_idx(whole / name, 3 if "images" in name else 1)[:count])
    return folder


def shrunk(recipe: Any, source: Path) -> Any:
    """The same recipe, narrow and short, with all its parts."""
    loop = replace(
        recipe.loop, steps=2, batch_size=8, warmup=1, save_every=1, show_every=1, log_every=1
    )
    if hasattr(recipe.network, "block_out_channels"):
        widths = tuple(8 * (i + 1) for i in range(len(recipe.network.block_out_channels)))
        network = replace(recipe.network, block_out_channels=widths, norm_num_groups=4)
    else:
        network = replace(recipe.network, num_layers=2, num_attention_heads=2)
    recipe = replace(recipe, data=replace(recipe.data, source=str(source), limit=64), loop=loop)
    if isinstance(recipe, AutoencoderRecipe):
        return replace(
            recipe,
            network=network,
            loss=replace(recipe.loss, adversarial_start=1, discriminator_width=8),
        )
    return replace(
        recipe,
        network=replace(network, attention_head_dim=8),
        defaults=replace(recipe.defaults, steps=2),
    )


def statistics(
    autoencoder: AutoencoderKL, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std a channel of latents drawn from the posteriors: Var = Var(mean) + E[std^2]."""
    with torch.no_grad():
        posterior = autoencoder.posterior(images)
    mean = posterior.mean.double().mean((0, 2, 3))
    variance = posterior.mean.double().var(
        (0, 2, 3), correction=0
    ) + posterior.std.double().square().mean((0, 2, 3))
    return mean, variance.sqrt()


@pytest.mark.parametrize("file", READING, ids=lambda f: f.stem)
def test_a_recipe_that_reads_captions_trains_a_model_that_opens(file: Path, tmp_path: Path) -> None:
    """With a text encoder, an autoencoder and pictures of several sizes, all of them small: 16
    pixels stand for its size, 4 for its step.
    """
    parts = captioned_images.write(tmp_path / "parts")
    recipe = shrunk(load_recipe(file, "denoiser"), parts / "pictures")
    data = replace(recipe.data, size=16, buckets=4 if recipe.data.buckets else None)
    recipe = replace(recipe, autoencoder=parts / "tiny", text=parts / "t5", data=data)
    model = sfumato.load(recipe.run(tmp_path / "run"))
    assert model.defaults == recipe.defaults and model.name == recipe.name
    assert (
        np.asarray(
            PIL.open(tmp_path / "run" / "denoiser" / "samples" / "samples-00000002.png")
        ).std()
        > 1
    )
    sizes = [
        model.generate(captioned_images.WORDS[0], height=h, width=w)[0].size
        for h, w in ((16, 16), (12, 20))
    ]
    assert sizes == [(16, 16), (20, 12)]


@pytest.mark.parametrize("file", [f for f in RECIPES if f not in READING], ids=lambda f: f.stem)
def test_a_recipe_trains_a_model_that_opens(file: Path, some_fashion: Path, tmp_path: Path) -> None:
    stages = [shrunk(load_recipe(file, stage), some_fashion) for stage in stages_of(file)]
    for recipe in stages:
        recipe.run(tmp_path)
    pictures = ["denoiser/samples/samples"]
    if len(stages) == 2:
        numbers = {
            name
            for line in (tmp_path / "autoencoder" / "log.jsonl").read_text().splitlines()
            for name in json.loads(line)
        }
        frechet = {"held_out/frechet"} if stages[0].features else set()
        assert {"held_out/psnr", "held_out/ssim"} | frechet <= numbers, (
            "a recipe must measure on held-out images while it trains"
        )
        assert ("discriminator/loss" in numbers) is bool(stages[0].loss.adversarial)
        pictures.append("autoencoder/samples/reconstructions")
    for name in pictures:
        assert np.asarray(PIL.open(tmp_path / f"{name}-00000002.png")).std() > 1

    model = sfumato.load(tmp_path / "model")
    images = stages[0].data.open()[0]
    assert len(images) == 64
    assert model.class_names == images.class_names and len(model.class_names) == 10
    assert model.defaults == stages[-1].defaults and model.name == stages[-1].name
    assert isinstance(model.autoencoder, AutoencoderKL)
    if len(stages) == 2:
        mean, std = statistics(model.autoencoder, images.batch(range(64))["image"])
        assert model.autoencoder.space.mean == pytest.approx(mean.tolist(), rel=1e-3, abs=1e-4)
        assert model.autoencoder.space.std == pytest.approx(std.tolist(), rel=1e-3)
        z = model.compress(images.batch(range(64))["image"])
        assert z.mean((0, 2, 3)).abs().max() < 1e-2
    first, second = model.generate(["bag", "ankle boot"], seed=3)
    assert first.size == second.size == images.shape[1:]


def small(source: Path, **options: Any) -> tuple[AutoencoderRecipe, DenoiserRecipe]:
    data = DataSettings(source=str(source), **options)
    return AutoencoderRecipe(data, TINY_KL, loop=LOOP), DenoiserRecipe(
        data=data,
        network=TINY_NET,
        loop=replace(LOOP, previews=2),
        schedule="flow",
        parameterization="flow",
        defaults=Defaults(steps=2),
    )


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder with three colour pictures of different sizes, and nothing else."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for k, size in enumerate([(20, 16), (16, 16), (30, 24)]):
        PIL.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size).save(
            folder / f"{k}.png"
        )
    return folder


def test_a_plain_folder_of_three_pictures_becomes_a_model(three: Path, tmp_path: Path) -> None:
    """Colour, no classes, no test split, a batch larger than the data."""
    for recipe in small(three, size=16):
        recipe.run(tmp_path / "run")
    model = sfumato.load(tmp_path / "run" / "model")
    assert model.class_names == ()
    (image,) = model.generate(seed=1, steps=2)
    assert image.mode == "RGB" and image.size == (16, 16)
    again = run_stages(small(three, size=16), tmp_path / "run")
    assert again == tmp_path / "run" / "model"


def run_stages(stages: tuple[AutoencoderRecipe, DenoiserRecipe], out: Path) -> Path:
    return [stage.run(out) for stage in stages][-1]


def test_held_out_pictures_are_not_trained_on(three: Path) -> None:
    train, held_out = DataSettings(source=str(three), size=16).open()
    assert (len(train), len(held_out)) == (2, 1)
    a, b = train.batch(range(2))["image"], held_out.batch(range(1))["image"]
    assert not any(torch.equal(image, b[0]) for image in a)
    again = DataSettings(source=str(three), size=16).open()
    assert [s.fingerprint for s in again] == [train.fingerprint, held_out.fingerprint]


def test_the_denoiser_needs_an_autoencoder(three: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no trained autoencoder.*sfumato train autoencoder"):
        small(three, size=16)[1].run(tmp_path / "run")


def test_another_autoencoder_means_other_latents(three: Path, tmp_path: Path) -> None:
    """A denoiser's run does not go on after its autoencoder has been trained anew: its latents
    would be others.
    """
    stages = small(three, size=16)
    run_stages(stages, tmp_path / "run")
    other = replace(stages[0], loop=replace(LOOP, seed=1)).run(tmp_path / "other")
    with pytest.raises(UserError, match="latents"):
        replace(stages[1], autoencoder=other).run(tmp_path / "run")


def test_a_second_run_of_a_finished_stage_changes_nothing(three: Path, tmp_path: Path) -> None:
    stages = small(three, size=16)
    models = [sfumato.load(run_stages(stages, tmp_path / "run")) for _ in range(2)]
    assert models[0].hash == models[1].hash
    fresh = sfumato.load(run_stages(stages, tmp_path / "fresh"))
    weights = [hash_tensors(m.denoiser.network.state_dict()) for m in (models[0], fresh)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("text", "stage", "words"),
    [
        ("x = 1", "autoencoder", "defines no 'autoencoder': expected an AutoencoderRecipe"),
        ("denoiser = 3", "denoiser", "a DenoiserRecipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_explained(
    text: str, stage: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=words):
        load_recipe(tmp_path / "mine.py", stage)


def test_a_recipe_that_is_not_there_names_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    with pytest.raises(UserError, match="fashion_mnist"):
        load_recipe("fashion-mnits", "autoencoder")


def test_run_recipe_runs_a_file(three: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from sfumato.compress.kl import KLConfig\n"
        "from sfumato.train.loop import LoopSettings\n"
        "from sfumato.train.recipe import AutoencoderRecipe, DataSettings\n"
        f"autoencoder = AutoencoderRecipe(DataSettings({str(three)!r}, size=16), "
        "KLConfig(block_out_channels=(8, 16), layers_per_block=1, "
        "latent_channels=2, norm_num_groups=4), loop=LoopSettings(steps=1, batch_size=2))\n"
    )
    folder = run_recipe(tmp_path / "mine.py", "autoencoder", tmp_path / "run")
    assert sorted(f.name for f in folder.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert (
        len(config["latents_mean"]) == len(config["latents_std"]) == 2
        and min(config["latents_std"]) > 0
    )
