"""Recipes: two settings objects, `autoencoder` and `denoiser`, in a Python file.

Each has `run(out, resume)`. out/autoencoder and out/denoiser hold the runs; out/model is the
finished model folder.
"""

import importlib.util
import logging
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.checkpoints.families.taesd import load_taesd
from sfumato.checkpoints.formats.folder import load_part, save_part
from sfumato.compress.base import Autoencoder
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.data import (
    BucketedImages,
    BucketedLatents,
    Division,
    ImageSet,
    LatentSet,
    Reading,
    Split,
    cache_latents,
    open_split,
)
from sfumato.data.images import OnError
from sfumato.data.pixel_cache import PixelCache
from sfumato.data.reading import Layout
from sfumato.data.splits import open_training_buckets
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.diffuse.seeds import seed_torch
from sfumato.diffuse.vlb import check_has_vlb
from sfumato.errors import UserError
from sfumato.evaluate.features import load_features
from sfumato.images import grid
from sfumato.io.atomic import atomic_folder, hash_tensors, write_json
from sfumato.io.host_memory import parse_size
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.base import ClassConditioner, Conditioner
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.predict.conditioners.unconditional import Unconditional
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.base import Network, NetworkConfig, build, network_of
from sfumato.predict.networks.unet import UNetConfig
from sfumato.sampling import Defaults
from sfumato.train.caption_embeddings import Captions, open_text_conditioner
from sfumato.train.loop import LoopSettings, start, train
from sfumato.train.objective import Preview
from sfumato.train.objectives.autoencoder import AutoencoderLoss, AutoencoderObjective
from sfumato.train.objectives.denoiser import DenoiserLoss, DenoiserObjective

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSettings:
    """The source of the images, and their size, channels and held-out share."""

    source: str = "fashion-mnist"
    """fashion-mnist, a folder, a .parquet file or hf:NAME."""
    size: int | None = None
    channels: int | None = None
    flip: bool = False
    """Mirror at random (the autoencoder's stage only: cached latents are not mirrored)."""
    limit: int | None = None
    """Use so many images, chosen at random and always the same, from each class its share."""
    on_error: OnError = "raise"
    held_out: float = 0.02
    """Share of the images kept for measuring where the source has no test split of its own."""
    layout: Layout = "auto"
    """Meaning of subfolders: splits (train/, test/), classes, or flat (none)."""
    image_column: str | None = None
    """Column of the images of a table, or of the file names in metadata."""
    label_column: str | None = None
    """Column of the classes; "none": no classes."""
    caption_column: str | None = None
    """Column of the captions; "sidecar": text files beside the images; "none": no captions."""
    cache: str | None = None
    """Folder of resized pixels that memory cannot hold; "off": none; none: ~/.cache/sfumato."""
    cache_size: str = "20GB"
    """Most that the cache may take on the disk; the oldest pixels make room for new ones."""
    buckets: int | None = None
    """Step of the sides of aspect buckets in pixels; none: squares.

    In buckets images keep their aspect, in about size x size pixels (the denoiser's stage only)."""

    @property
    def reading(self) -> Reading:
        """The settings that decide where the source can be read in two ways."""
        return Reading(self.layout, self.image_column, self.label_column, self.caption_column)

    @property
    def pixel_cache(self) -> PixelCache | None:
        """The cache of resized pixels; None: off."""
        if self.cache == "off":
            return None
        folder = None if self.cache is None else Path(self.cache)
        return PixelCache(folder, parse_size(self.cache_size))

    def open(self) -> tuple[ImageSet, ImageSet]:
        """(training images, held-out images), all of one shape."""
        split = self.split()
        return split.training, split.held_out

    def split(self) -> Split:
        """Training images and held-out images, all of one shape, and their division."""
        return open_split(
            self.source,
            self.held_out,
            limit=self.limit,
            flip=self.flip,
            size=self.size,
            channels=self.channels,
            on_error=self.on_error,
            reading=self.reading,
            cache=self.pixel_cache,
        )

    def open_buckets(self) -> tuple[BucketedImages, Division]:
        """The training images in buckets of about size x size pixels, and the division."""
        if self.size is None or self.buckets is None:
            raise UserError(
                f"data.size={self.size} and data.buckets={self.buckets}: "
                "aspect buckets need both, a size and a step in pixels"
            )
        return open_training_buckets(
            self.source,
            self.held_out,
            side=self.size,
            step=self.buckets,
            channels=self.channels,
            on_error=self.on_error,
            limit=self.limit,
            reading=self.reading,
            cache=self.pixel_cache,
        )


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Act 1: train a KL autoencoder and measure its latents over the data.

    The autoencoder is written to out/autoencoder/vae.
    """

    data: DataSettings = field(default_factory=DataSettings)
    network: KLConfig = field(default_factory=KLConfig)
    loss: AutoencoderLoss = field(default_factory=AutoencoderLoss)
    loop: LoopSettings = field(default_factory=LoopSettings)
    features: str | None = None
    """Feature network of the held-out Frechet distance; none: not measured."""

    def run(self, out: Path, resume: bool = True) -> Path:
        """Train, or resume, and return the folder of the finished autoencoder."""
        started = time.perf_counter()
        if self.data.buckets is not None:
            raise UserError(
                f"data.buckets={self.data.buckets}: the autoencoder trains on squares; "
                "give aspect buckets to the denoiser alone"
            )
        split = self.data.split()
        images, held_out = split.training, split.held_out
        seed_torch(self.loop.seed)
        channels = images.shape[0]
        network = AutoencoderKL(replace(self.network, in_channels=channels, out_channels=channels))
        features = load_features(self.features) if self.features else None
        objective = AutoencoderObjective(network, images, held_out, self.loss, features)
        trained = train(objective, self.loop, out / "autoencoder", resume=resume)
        assert isinstance(trained, AutoencoderKL)
        accelerator = start(self.loop)
        with accelerator.main_process_first():  # the others find the first one's cache
            latents = encode_all(images.unflipped(), trained, out / "latents")
        trained.set_statistics(*latents.statistics())
        if accelerator.is_main_process:
            with atomic_folder(out / "autoencoder" / "vae") as temporary:
                save_part(temporary, trained)
            _finish(out / "autoencoder", started, len(images), split.division)
        accelerator.wait_for_everyone()
        return out / "autoencoder" / "vae"


@dataclass(frozen=True)
class DenoiserRecipe:
    """Act 3: train a network on the latents of a trained autoencoder and write out/model."""

    autoencoder: Path | None = None
    """Folder of a trained autoencoder, of any kind; none: out/autoencoder/vae."""
    data: DataSettings = field(default_factory=DataSettings)
    network: NetworkConfig = field(default_factory=UNetConfig)
    """Config of any network, unconditional or conditioned on classes or text.

    Its channels become the latent's; out_channels stay twice the in_channels where they are (a
    learned variance)."""
    schedule: str = "cosine"
    parameterization: str = "v"
    loss: DenoiserLoss = field(default_factory=DenoiserLoss)
    loop: LoopSettings = field(default_factory=LoopSettings)
    defaults: Defaults = field(default_factory=Defaults)
    name: str = "model"
    text: Path | None = None
    """Folder of the text encoder of the captions; none: classes, where there are any.

    It is a model's, or a sentence encoder's own."""

    def run(self, out: Path, resume: bool = True) -> Path:
        """Train, or resume, and return the folder of the finished model."""
        started = time.perf_counter()
        process = Process(schedule(self.schedule), parameterization(self.parameterization))
        autoencoder = _autoencoder(self.autoencoder or out / "autoencoder" / "vae")
        space = autoencoder.space
        outline = _outline(self.network, space.channels)
        images, division = _images(replace(self.data, flip=False), space.factor, outline.patch)
        accelerator = start(self.loop)
        with accelerator.main_process_first():  # the others find the first one's cache
            conditioner, conditions, prompts, fields = _conditioners(
                images, self.text, outline, out / "captions"
            )
        if outline.learned_variance and self.loss.variance:
            check_has_vlb(process.schedule)
        with accelerator.main_process_first():
            latents = _latents(images, autoencoder, out / "latents")
        # cells along a side of a sample; with buckets, of the square's
        square = (self.data.size or 0) // space.factor
        side = latents.shape[-1] if isinstance(latents, LatentSet) else square
        shape = outline.shape_fields(self.network, space.channels, side)
        seed_torch(self.loop.seed)
        network = build(replace(self.network, **shape, **fields))
        defaults = self.defaults
        # the model has the size, where the config of its network has none
        if "sample_size" not in shape and defaults.size is None:
            defaults = replace(defaults, size=side * space.factor)

        def model(network: nn.Module) -> LatentDiffusion:
            denoiser = Denoiser(network, process)
            return LatentDiffusion(
                autoencoder, denoiser, conditioner, defaults, self.name,
                training_data=division.to_json(),
            )  # fmt: skip

        def preview(network: nn.Module, step: int) -> Preview:
            shown = [prompts[i % len(prompts)] for i in range(80)]
            columns = max(len(prompts), 8) if len(prompts) <= 20 else 10
            return {}, {"samples": grid(model(network).generate(shown, seed=0), columns=columns)}

        objective = DenoiserObjective(
            network, process, latents, space, conditions, self.loss, preview
        )
        trained = train(objective, self.loop, out / "denoiser", resume=resume)
        if accelerator.is_main_process:
            model(trained).save(out / "model")
            _finish(out / "denoiser", started, len(images), division)
        accelerator.wait_for_everyone()
        return out / "model"


def _outline(config: Any, channels: int) -> Network:
    """The network of a config for latents of so many channels and any size, without weights."""
    with torch.device("meta"):
        return build(replace(config, **network_of(config).shape_fields(config, channels, 32)))


def _images(
    data: DataSettings, factor: int, patch: int
) -> tuple[ImageSet | BucketedImages, Division]:
    """The training images: squares, or buckets whose latents are whole patches of the network."""
    if data.buckets is None:
        split = data.split()
        return split.training, split.division
    if data.buckets < 1 or data.buckets % (factor * patch):
        raise UserError(
            f"data.buckets={data.buckets}: the step of the buckets' sides must be a multiple of "
            f"{factor * patch}, the autoencoder's factor {factor} times the network's patch {patch}"
        )
    return data.open_buckets()


def _latents(
    images: ImageSet | BucketedImages, autoencoder: Autoencoder, folder: Path
) -> LatentSet | BucketedLatents:
    if isinstance(images, ImageSet):
        return encode_all(images, autoencoder, folder)
    return BucketedLatents([encode_all(bucket, autoencoder, folder) for bucket in images.sets])


def _finish(folder: Path, started: float, images: int, division: Division) -> None:
    seconds = round(time.perf_counter() - started, 1)
    facts = {"seconds_this_run": seconds, "images": images, "data": division.to_json()}
    write_json(folder / "finished.json", facts)


def _autoencoder(folder: Path) -> Autoencoder:
    """An autoencoder in diffusers' layout, or a tiny one as published, in two files."""
    in_layout = (folder / "config.json").exists()
    if not in_layout and not any(folder.glob("*encoder.*")):
        raise UserError(
            f"{folder} has no trained autoencoder: "
            "run `sfumato train autoencoder` first, or give --autoencoder"
        )
    autoencoder = load_part(folder) if in_layout else load_taesd(folder)
    if not isinstance(autoencoder, Autoencoder):
        raise UserError(f"{folder} holds a {type(autoencoder).__name__}: expected an autoencoder")
    return autoencoder


def _conditioners(
    images: ImageSet | BucketedImages, text: Path | None, network: Network, cache: Path
) -> tuple[Conditioner, ClassConditioner | Captions, list[str | None], dict[str, Any]]:
    """The conditioning of a model and of its training.

    Returns:
        The model's conditioner, the conditions of the training examples, prompts to show, and
        fields of the network's config.
    """
    if network.guidance_embeds:
        raise UserError(
            "guidance_embeds=True: the strength of guidance is learned from another model, "
            "not from data; expected False"
        )
    if text is None:
        if images.class_names and images.labels is not None:
            classes = ClassNames(images.class_names)
            return classes, classes, [*classes.names], network.class_fields(len(classes.names))
        if network.is_conditional:
            raise UserError(
                f"a {type(network).__name__} is conditioned on classes or text, and {images.name} "
                "has no classes: expected a folder for each class, captions with --text, "
                "or an unconditional network"
            )
        return Unconditional(), Unconditional(), [None], {}
    if images.captions is None:
        raise UserError(
            f"text={text}, and {images.name} has no captions: "
            "expected a column or file of them; leave text out for classes"
        )
    conditioner = open_text_conditioner(text)
    pooled = conditioner.null(1).vector
    fields = network.text_fields(conditioner.width, None if pooled is None else pooled.shape[1])
    captions = Captions(conditioner, images.caption_choices or images.captions, cache=cache)
    common = [caption for caption, _ in Counter(images.captions).most_common(10)]
    return conditioner, captions, [*common], fields


def encode_all(
    images: ImageSet, autoencoder: Autoencoder, folder: Path, pixels: int = 200_000
) -> LatentSet:
    """Encode a set of images, with a cache.

    The cache is keyed by the images, their transform and the encoder's weights.

    Args:
        images: The images.
        autoencoder: Its posterior is cached.
        folder: Of the caches.
        pixels: Number of pixel values encoded at a time, about.
    """

    def encode(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = autoencoder.posterior(image.to(autoencoder.device))
        return posterior.mean, posterior.std

    encoder = ("encoder", "quant_conv")
    weights = {k: v for k, v in autoencoder.state_dict().items() if k.startswith(encoder)}
    logger.info("encoding %d images", len(images))
    batch_size = max(1, pixels // math.prod(images.shape[1:]))
    return cache_latents(images, encode, hash_tensors(weights), folder, batch_size=batch_size)


def load_recipe(recipe: str | Path, stage: str) -> AutoencoderRecipe | DenoiserRecipe:
    """Load the settings of a stage from a recipe.

    Args:
        recipe: A Python file, or the name of one in ./recipes.
        stage: "autoencoder" or "denoiser".

    Raises:
        UserError: For a missing file, and a file without these settings.
    """
    path = Path(recipe)
    if not path.suffix:
        path = Path("recipes") / f"{path.name.replace('-', '_')}.py"
    if not path.is_file():
        recipes = ", ".join(sorted(p.stem for p in Path("recipes").glob("*.py")))
        raise UserError(
            f"recipe {str(recipe)!r} was not found: expected a Python file, "
            f"or a name from recipes/ ({recipes or 'none in ./recipes'})"
        )
    spec = importlib.util.spec_from_file_location(f"sfumato_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    settings = getattr(module, stage, None)
    if not isinstance(settings, AutoencoderRecipe | DenoiserRecipe):
        expected = "an AutoencoderRecipe" if stage == "autoencoder" else "a DenoiserRecipe"
        raise UserError(f"recipe {path} defines no {stage!r}: expected {expected} of that name")
    return settings


def run_recipe(recipe: str | Path, stage: str, out: Path, resume: bool = True) -> Path:
    """Run one stage of a recipe with its own settings, see `load_recipe`."""
    return load_recipe(recipe, stage).run(out, resume)
