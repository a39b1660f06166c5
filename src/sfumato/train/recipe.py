"""Recipes: two settings objects, `autoencoder` and `denoiser`, in a Python file; each has `run(out,
resume)`.

out/autoencoder and out/denoiser hold the runs; out/model is the finished model folder.
"""

import importlib.util
import logging
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image as PIL
from torch import nn

from sfumato.checkpoints.families.taesd import load_taesd
from sfumato.checkpoints.formats.folder import load_part, save_part
from sfumato.compress.base import Autoencoder
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.data import (
    BucketedImages,
    BucketedLatents,
    ImageSet,
    LatentSet,
    cache_latents,
    open_both,
    open_buckets,
)
from sfumato.data.source import open_with
from sfumato.data.splits import split
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.diffuse.vlb import check_has_vlb
from sfumato.errors import UserError
from sfumato.evaluate.features import Features, load_features
from sfumato.images import grid
from sfumato.io.atomic import atomic_folder, hash_tensors, write_json
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.predict.conditioners.unconditional import Unconditional
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.base import Network, build, network_of
from sfumato.predict.networks.unet import UNetConfig
from sfumato.sampling import Defaults
from sfumato.train.caption_embeddings import Captions, open_reader
from sfumato.train.loop import LoopSettings, start, train
from sfumato.train.objectives.autoencoder import AutoencoderLoss, AutoencoderObjective
from sfumato.train.objectives.denoiser import DenoiserLoss, DenoiserObjective

logger = logging.getLogger(__name__)

_WIDTHS = ("caption_channels", "cross_attention_dim", "joint_attention_dim")
"""What configs of networks call the width of text tokens."""
_POOLED = "pooled_projection_dim"
"""And that of the pooled text."""


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
    """The step of the sides of aspect buckets in pixels: pictures keep their aspect, in about size
    x size pixels (the denoiser's stage only); none: squares."""

    def open(self) -> tuple[ImageSet, ImageSet]:
        """(training images, held-out images), all of one shape."""
        options: dict[str, Any] = {
            "size": self.size,
            "channels": self.channels,
            "on_error": self.on_error,
        }
        return open_both(self.source, self.held_out, limit=self.limit, flip=self.flip, **options)

    def open_buckets(self) -> BucketedImages:
        """The training images of `open`, by their aspects in buckets of about size x size
        pixels.
        """
        if self.size is None or self.buckets is None:
            raise UserError(
                f"data.size={self.size} and data.buckets={self.buckets}: aspect buckets need both, a size and a step in pixels"
            )
        options: dict[str, Any] = {"channels": self.channels, "on_error": self.on_error}
        images = open_buckets(
            self.source,
            side=self.size,
            step=self.buckets,
            limit=self.limit,
            flip=self.flip,
            **options,
        )
        try:
            open_with(
                lambda listing: None, self.source, split="test", on_error=self.on_error, limit=None
            )
            return images
        except UserError as error:
            training, _ = split(len(images), self.held_out, error)
            return images.subset(torch.isin(images.places, training).nonzero()[:, 0])


def _features(name: str | None) -> Features | None:
    return load_features(name) if name else None


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Act 1: trains a KL autoencoder, measures its latents over the data and writes
    out/autoencoder/vae.
    """

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
        network = AutoencoderKL(
            replace(self.network, in_channels=images.shape[0], out_channels=images.shape[0])
        )
        objective = AutoencoderObjective(
            network, images, held_out, self.loss, _features(self.features)
        )
        trained = train(objective, self.loop, out / "autoencoder", resume=resume)
        assert isinstance(trained, AutoencoderKL)
        accelerator = start(self.loop)
        with accelerator.main_process_first():  # the others find the first one's cache
            trained.set_statistics(
                *encode_all(images.unflipped(), trained, out / "latents").statistics()
            )
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
    """A folder with a trained autoencoder, of any kind; none: out/autoencoder/vae."""
    data: DataSettings = field(default_factory=DataSettings)
    network: Any = field(default_factory=UNetConfig)
    """The config of any network that is told nothing, classes, or text. Its channels become the
    latent's; out_channels stay twice the in_channels where they are (a learned variance)."""
    schedule: str = "cosine"
    parameterization: str = "v"
    loss: DenoiserLoss = field(default_factory=DenoiserLoss)
    loop: LoopSettings = field(default_factory=LoopSettings)
    defaults: Defaults = field(default_factory=Defaults)
    name: str = "model"
    text: Path | None = None
    """A folder with a text encoder, which reads the captions: a model's, or a sentence encoder's
    own. None: classes, where there are any."""

    def run(self, out: Path, resume: bool = True) -> Path:
        """Trains (or goes on) and returns the folder of the finished model."""
        started = time.perf_counter()
        process = Process(schedule(self.schedule), parameterization(self.parameterization))
        autoencoder = _autoencoder(self.autoencoder or out / "autoencoder" / "vae")
        space = autoencoder.space
        outline = _outline(self.network, space.channels)
        images = _pictures(replace(self.data, flip=False), space.factor, outline.patch)
        accelerator = start(self.loop)
        conditioner, told, prompts, fields = _told(images, self.text, self.network, outline)
        if outline.learned_variance and self.loss.variance:
            check_has_vlb(process.schedule)
        with accelerator.main_process_first():
            latents = _latents(images, autoencoder, out / "latents")
        side = _side(latents, self.data, space.factor)
        shape = outline.shape_fields(self.network, space.channels, side)
        torch.manual_seed(self.loop.seed)
        network = build(replace(self.network, **shape, **fields))
        defaults = self.defaults
        # the model says it, where no config of the network can
        if "sample_size" not in shape and defaults.size is None:
            defaults = replace(defaults, size=side * space.factor)

        def model(denoiser: nn.Module) -> LatentDiffusion:
            return LatentDiffusion(
                autoencoder, Denoiser(denoiser, process), conditioner, defaults, self.name
            )

        def preview(
            denoiser: nn.Module, step: int
        ) -> tuple[dict[str, float], dict[str, PIL.Image]]:
            shown = [prompts[i % len(prompts)] for i in range(80)]
            columns = max(len(prompts), 8) if len(prompts) <= 20 else 10
            return {}, {"samples": grid(model(denoiser).generate(shown, seed=0), columns=columns)}

        objective = DenoiserObjective(network, process, latents, space, told, self.loss, preview)
        trained = train(objective, self.loop, out / "denoiser", resume=resume)
        if accelerator.is_main_process:
            model(trained).save(out / "model")
            _finish(out / "denoiser", started, len(images))
        accelerator.wait_for_everyone()
        return out / "model"


def _outline(config: Any, channels: int) -> Network:
    """The network of a config without weights, for latents of so many channels and of any size: it
    tells what it is.
    """
    with torch.device("meta"):
        return build(replace(config, **network_of(config).shape_fields(config, channels, 32)))


def _pictures(data: DataSettings, factor: int, patch: int) -> ImageSet | BucketedImages:
    """The training images: squares, or aspect buckets whose latents are whole patches of the
    network.
    """
    if data.buckets is None:
        return data.open()[0]
    if data.buckets < 1 or data.buckets % (factor * patch):
        why = f"the autoencoder's factor {factor} times the network's patch {patch}"
        raise UserError(
            f"data.buckets={data.buckets}: the step of the buckets' sides must be a multiple of {factor * patch}, {why}"
        )
    return data.open_buckets()


def _latents(
    images: ImageSet | BucketedImages, autoencoder: Autoencoder, folder: Path
) -> LatentSet | BucketedLatents:
    if isinstance(images, ImageSet):
        return encode_all(images, autoencoder, folder)
    return BucketedLatents([encode_all(bucket, autoencoder, folder) for bucket in images.sets])


def _side(latents: LatentSet | BucketedLatents, data: DataSettings, factor: int) -> int:
    """The side of the latents that the model draws if nobody says otherwise, in cells; with
    buckets, the square's.
    """
    return latents.shape[-1] if isinstance(latents, LatentSet) else (data.size or 0) // factor


def _finish(folder: Path, started: float, images: int) -> None:
    write_json(
        folder / "finished.json",
        {"seconds_this_run": round(time.perf_counter() - started, 1), "images": images},
    )


def _autoencoder(folder: Path) -> Autoencoder:
    """An autoencoder of any kind: in diffusers' layout, or a tiny one as its author publishes it,
    an encoder's file and a decoder's.
    """
    if not (folder / "config.json").exists() and not any(folder.glob("*encoder.*")):
        raise UserError(
            f"{folder} has no trained autoencoder: run `sfumato train autoencoder` first, or give --autoencoder"
        )
    found = load_part(folder) if (folder / "config.json").exists() else load_taesd(folder)
    if not isinstance(found, Autoencoder):
        raise UserError(f"{folder} holds a {type(found).__name__}: expected an autoencoder")
    return found


def _told(
    images: ImageSet | BucketedImages, text: Path | None, network: Any, outline: Network
) -> tuple[Any, Any, list[str | None], dict[str, Any]]:
    """What the network is told: the model's conditioner, the examples' conditions in training,
    prompts to show, fields of the network's config.
    """
    if outline.guidance_embeds:
        raise UserError(
            "guidance_embeds=True: the strength of guidance is learned from another model, not from data; expected False"
        )
    if text is None:
        if images.class_names and images.labels is not None:
            names = ClassNames(images.class_names)
            return names, names, list(names.names), outline.class_fields(len(names.names))
        if outline.is_conditional:
            raise UserError(
                f"a {type(outline).__name__} is told classes or text, and {images.name} has no classes: expected a folder for each class, "
                "captions with --text, or a network that is told nothing"
            )
        return Unconditional(), Unconditional(), [None], {}
    if images.captions is None:
        raise UserError(
            f"text={text}, and {images.name} has no captions: expected a column or file of them; leave text out for classes"
        )
    reader = open_reader(text)
    field = next((name for name in _WIDTHS if hasattr(network, name)), None)
    if field is None:
        raise UserError(
            f"a {type(network).__name__} reads no text: expected one of a network with {' or '.join(_WIDTHS)}, such as ModernDiTConfig"
        )
    told = Captions(reader, images.captions)
    fields, pooled = {field: reader.width}, told.null(1).vector
    if pooled is not None and hasattr(network, _POOLED):
        fields[_POOLED] = pooled.shape[1]
    common = [caption for caption, _ in Counter(images.captions).most_common(10)]
    return reader, told, [*common], fields


def encode_all(
    images: ImageSet, autoencoder: Autoencoder, folder: Path, pixels: int = 200_000
) -> LatentSet:
    """The latents of a set of images, cached under the images, their transform and the encoder's
    weights. pixels: at a time, about.
    """

    def encode(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = autoencoder.posterior(image.to(autoencoder.device))
        return posterior.mean, posterior.std

    weights = {
        k: v for k, v in autoencoder.state_dict().items() if k.startswith(("encoder", "quant_conv"))
    }
    logger.info("encoding %d images", len(images))
    return cache_latents(
        images,
        encode,
        hash_tensors(weights),
        folder,
        batch_size=max(1, pixels // math.prod(images.shape[1:])),
    )


def load_recipe(recipe: str | Path, stage: str) -> AutoencoderRecipe | DenoiserRecipe:
    """The settings object `autoencoder` or `denoiser` of a recipe: a path to a Python file, or the
    name of one in ./recipes.
    """
    path = Path(recipe)
    if not path.suffix:
        path = Path("recipes") / f"{path.name.replace('-', '_')}.py"
    if not path.is_file():
        known = (
            ", ".join(sorted(p.stem for p in Path("recipes").glob("*.py"))) or "none in ./recipes"
        )
        raise UserError(
            f"recipe {str(recipe)!r} was not found: expected a Python file, or a name from recipes/ ({known})"
        )
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
