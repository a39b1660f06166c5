"""Recipes: two settings objects, `autoencoder` and `denoiser`, in a Python file; each has `run(out, resume)`.

out/autoencoder and out/denoiser hold the runs; out/model is the finished model folder.
"""

import importlib.util
import logging
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image as PIL
from torch import nn

from sfumato.checkpoints.folder import load_part, save_part
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.data import BucketedImages, BucketedLatents, ImageSet, LatentSet, cache_latents, open_buckets, open_images
from sfumato.data.source import open_with
from sfumato.decode.image import grid
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.errors import UserError
from sfumato.evaluate.features import Features, load_features
from sfumato.files import atomic_folder, hash_tensors, write_json
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.predict.conditioners.nothing import Nothing
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks._network import build
from sfumato.predict.networks.unet import UNetConfig
from sfumato.sampling import Defaults
from sfumato.train.loop import LoopSettings, start, train
from sfumato.train.objectives.autoencoder import AutoencoderLoss, AutoencoderObjective
from sfumato.train.objectives.denoiser import DenoiserLoss, DenoiserObjective

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSettings:
    """Where the images come from: a name or a folder, and what is done to them."""

    source: str = "fashion-mnist"
    size: int | None = None
    channels: int | None = None
    flip: bool = False
    """Mirror at random (the autoencoder's stage only: cached latents are not mirrored)."""
    limit: int | None = None
    on_error: Literal["raise", "skip"] = "raise"
    held_out: float = 0.02
    """The share kept for measuring where the source has no test split of its own."""
    buckets: int | None = None
    """The step of the sides of aspect buckets in pixels: pictures keep their aspect, in about size x size pixels (the denoiser's stage only);
    none: squares."""

    def open(self) -> tuple[ImageSet, ImageSet]:
        """(training images, held-out images), all of one shape."""
        options: dict[str, Any] = {"size": self.size, "channels": self.channels, "on_error": self.on_error}
        images = open_images(self.source, split="train", limit=self.limit, flip=self.flip, **options)
        try:
            return images, open_images(self.source, split="test", **options)
        except UserError as error:
            training, held_out = self._split(len(images), error)
            return images.subset(training), images.subset(held_out)

    def open_buckets(self) -> BucketedImages:
        """The training images of `open`, by their aspects in buckets of about size x size pixels."""
        if self.size is None or self.buckets is None:
            raise UserError(f"data.size={self.size} and data.buckets={self.buckets}: aspect buckets need both, a size and a step in pixels")
        options: dict[str, Any] = {"channels": self.channels, "on_error": self.on_error}
        images = open_buckets(self.source, side=self.size, step=self.buckets, limit=self.limit, flip=self.flip, **options)
        try:
            open_with(lambda listing: None, self.source, split="test", on_error=self.on_error, limit=None)
            return images
        except UserError as error:
            training, _ = self._split(len(images), error)
            return images.subset(torch.isin(images.places, training).nonzero()[:, 0])

    def _split(self, count: int, why: UserError) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of the training images and of the held-out ones where one split serves for both; a single image is both."""
        logger.info("no test split (%s): a share of %g is held out of the training images", why, self.held_out)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        kept = max(1, round(self.held_out * count)) if count > 1 else 0
        return order[kept:].sort().values, order[: kept or 1].sort().values


def _features(name: str | None) -> Features | None:
    return load_features(name) if name else None


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Act 1: trains a KL autoencoder, measures its latents over the data and writes out/autoencoder/vae."""

    data: DataSettings = field(default_factory=DataSettings)
    network: KLConfig = field(default_factory=KLConfig)
    loss: AutoencoderLoss = field(default_factory=AutoencoderLoss)
    loop: LoopSettings = field(default_factory=LoopSettings)
    features: str | None = None
    """The feature network of the held-out Frechet distance; none: not measured."""

    def run(self, out: Path, resume: bool = True) -> Path:
        """Trains (or goes on) and returns the folder of the finished autoencoder."""
        started = time.perf_counter()
        if self.data.buckets is not None:
            raise UserError(
                f"data.buckets={self.data.buckets}: the autoencoder trains on squares; give aspect buckets to the denoiser alone"
            )
        images, held_out = self.data.open()
        torch.manual_seed(self.loop.seed)
        network = AutoencoderKL(replace(self.network, in_channels=images.shape[0], out_channels=images.shape[0]))
        objective = AutoencoderObjective(network, images, held_out, self.loss, _features(self.features))
        trained = train(objective, self.loop, out / "autoencoder", resume=resume)
        assert isinstance(trained, AutoencoderKL)
        accelerator = start(self.loop)
        with accelerator.main_process_first():  # the others find the first one's cache
            trained.set_statistics(*encode_all(images.unflipped(), trained, out / "latents").statistics())
        if accelerator.is_main_process:
            with atomic_folder(out / "autoencoder" / "vae") as temporary:
                save_part(temporary, trained)
            _finish(out / "autoencoder", started, len(images))
        accelerator.wait_for_everyone()
        return out / "autoencoder" / "vae"


@dataclass(frozen=True)
class DenoiserRecipe:
    """Act 3: trains a network on the latents of a trained autoencoder and writes out/model."""

    autoencoder: Path | None = None
    """A folder with a trained autoencoder; none: out/autoencoder/vae."""
    data: DataSettings = field(default_factory=DataSettings)
    network: Any = field(default_factory=UNetConfig)
    """The config of any network that is told nothing, or classes."""
    schedule: str = "cosine"
    parameterization: str = "v"
    loss: DenoiserLoss = field(default_factory=DenoiserLoss)
    loop: LoopSettings = field(default_factory=LoopSettings)
    defaults: Defaults = field(default_factory=Defaults)
    name: str = "model"

    def run(self, out: Path, resume: bool = True) -> Path:
        """Trains (or goes on) and returns the folder of the finished model."""
        started = time.perf_counter()
        folder = self.autoencoder or out / "autoencoder" / "vae"
        if not (folder / "config.json").exists():
            raise UserError(f"{folder} has no trained autoencoder: run `sfumato train autoencoder` first, or give --autoencoder")
        process = Process(schedule(self.schedule), parameterization(self.parameterization))
        autoencoder = load_part(folder, "AutoencoderKL")
        assert isinstance(autoencoder, AutoencoderKL)
        images = _pictures(replace(self.data, flip=False), autoencoder.space.factor, self.network)
        accelerator = start(self.loop)
        with accelerator.main_process_first():
            latents = _latents(images, autoencoder, out / "latents")
        conditioner = ClassNames(images.class_names) if images.class_names and images.labels is not None else Nothing()
        space = autoencoder.space
        shape = {"sample_size": _side(latents, self.data, space.factor), "in_channels": space.channels, "out_channels": space.channels}
        classes = {"num_class_embeds": len(images.class_names) + 1} if isinstance(conditioner, ClassNames) else {}
        torch.manual_seed(self.loop.seed)
        network = build(replace(self.network, **shape, **classes))

        def model(denoiser: nn.Module) -> LatentDiffusion:
            return LatentDiffusion(autoencoder, Denoiser(denoiser, process), conditioner, self.defaults, self.name)

        def preview(denoiser: nn.Module, step: int) -> tuple[dict[str, float], dict[str, PIL.Image]]:
            names = list(conditioner.names) or [None]
            prompts = [names[i % len(names)] for i in range(80)]
            return {}, {"samples": grid(model(denoiser).generate(prompts, seed=0), columns=max(len(names), 8) if len(names) <= 20 else 10)}

        objective = DenoiserObjective(network, process, latents, space, conditioner, self.loss, preview)
        trained = train(objective, self.loop, out / "denoiser", resume=resume)
        if accelerator.is_main_process:
            model(trained).save(out / "model")
            _finish(out / "denoiser", started, len(images))
        accelerator.wait_for_everyone()
        return out / "model"


def _pictures(data: DataSettings, factor: int, network: Any) -> ImageSet | BucketedImages:
    """The training images: squares, or aspect buckets whose latents are whole patches of the network."""
    if data.buckets is None:
        return data.open()[0]
    with torch.device("meta"):  # no weights: only its patch is asked for
        patch = getattr(build(network), "patch", 1)
    if data.buckets < 1 or data.buckets % (factor * patch):
        why = f"the autoencoder's factor {factor} times the network's patch {patch}"
        raise UserError(f"data.buckets={data.buckets}: the step of the buckets' sides must be a multiple of {factor * patch}, {why}")
    return data.open_buckets()


def _latents(images: ImageSet | BucketedImages, autoencoder: AutoencoderKL, folder: Path) -> LatentSet | BucketedLatents:
    if isinstance(images, ImageSet):
        return encode_all(images, autoencoder, folder)
    return BucketedLatents([encode_all(bucket, autoencoder, folder) for bucket in images.sets])


def _side(latents: LatentSet | BucketedLatents, data: DataSettings, factor: int) -> int:
    """The side of the latents that the model draws if nobody says otherwise, in cells; with buckets, the square's."""
    return latents.shape[-1] if isinstance(latents, LatentSet) else (data.size or 0) // factor


def _finish(folder: Path, started: float, images: int) -> None:
    write_json(folder / "finished.json", {"seconds_this_run": round(time.perf_counter() - started, 1), "images": images})


def encode_all(images: ImageSet, autoencoder: AutoencoderKL, folder: Path, batch_size: int = 250) -> LatentSet:
    """The latents of a set of images, cached under the images, their transform and the encoder's weights."""

    def encode(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = autoencoder.posterior(image.to(next(autoencoder.parameters()).device))
        return posterior.mean, posterior.std

    weights = {k: v for k, v in autoencoder.state_dict().items() if k.startswith(("encoder", "quant_conv"))}
    logger.info("encoding %d images", len(images))
    return cache_latents(images, encode, hash_tensors(weights), folder, batch_size=batch_size)


def load_recipe(recipe: str | Path, stage: str) -> AutoencoderRecipe | DenoiserRecipe:
    """The settings object `autoencoder` or `denoiser` of a recipe: a path to a Python file, or the name of one in ./recipes."""
    path = Path(recipe)
    if not path.suffix:
        path = Path("recipes") / f"{path.name.replace('-', '_')}.py"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in Path("recipes").glob("*.py"))) or "none in ./recipes"
        raise UserError(f"recipe {str(recipe)!r} was not found: expected a Python file, or a name from recipes/ ({known})")
    spec = importlib.util.spec_from_file_location(f"sfumato_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found = getattr(module, stage, None)
    if not isinstance(found, AutoencoderRecipe | DenoiserRecipe):
        expected = "an AutoencoderRecipe" if stage == "autoencoder" else "a DenoiserRecipe"
        raise UserError(f"recipe {path} defines no {stage!r}: expected {expected} of that name")
    return found


def run_recipe(recipe: str | Path, stage: str, out: Path, resume: bool = True) -> Path:
    """Loads a recipe and runs one stage with its own settings."""
    return load_recipe(recipe, stage).run(out, resume)
