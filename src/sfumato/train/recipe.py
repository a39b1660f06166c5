"""Recipes: two settings objects, `autoencoder` and `denoiser`, in a Python file.

Each has `run(out, resume)`. out/autoencoder and out/denoiser hold the runs; out/model is the
finished model folder.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.checkpoints.formats.folder import save_part
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
from sfumato.diffuse.run import Step
from sfumato.diffuse.schedule import schedule
from sfumato.diffuse.seeds import seed_torch
from sfumato.diffuse.vlb import check_has_vlb
from sfumato.errors import UserError
from sfumato.evaluate.features import check_fit, load_features
from sfumato.images import grid
from sfumato.io.atomic import atomic_folder, hash_tensors, write_json
from sfumato.io.host_memory import parse_size
from sfumato.io.progress import report
from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.predict.networks.base import Network, NetworkConfig, build, network_of
from sfumato.predict.networks.unet import UNetConfig
from sfumato.sampling import Defaults, Request
from sfumato.train.bars import Bars
from sfumato.train.checks import (
    built,
    check_autoencoder,
    check_denoiser,
    check_images,
    check_loss,
    check_memory,
    possible,
)
from sfumato.train.conditions import Condition, Source, WordsConfig, open_condition
from sfumato.train.history import to_json
from sfumato.train.initial import (
    fixed_source,
    initial_autoencoder,
    initial_network,
    with_classes,
)
from sfumato.train.loop import LoopSettings, start, train
from sfumato.train.notes import (
    autoencoder_notes,
    chosen,
    denoiser_notes,
    loop_notes,
    network_notes,
)
from sfumato.train.objective import Preview
from sfumato.train.objectives.autoencoder import AutoencoderLoss, AutoencoderObjective
from sfumato.train.objectives.denoiser import (
    HELD_OUT,
    DenoiserLoss,
    DenoiserObjective,
    HeldOut,
)
from sfumato.train.parts import Parts, open_autoencoder
from sfumato.train.settings import check_counts, check_fields
from sfumato.validate import number_in, positive_int, whole_number

logger = logging.getLogger(__name__)

PREVIEW_PIXELS = 80 * 128 * 128
"""Pixels of a preview that are sampled at a time."""


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

    def __post_init__(self) -> None:
        check_fields(self)
        parse_size(self.cache_size, "data.cache_size")
        if not self.source.strip():
            raise UserError("data.source is empty: expected a folder, a file or the name of a set")
        for name in ("size", "buckets"):
            if (side := getattr(self, name)) is not None:
                whole_number(f"data.{name}", side, 1, 16_384, unit="pixels")
        if self.channels not in (None, 1, 3):
            raise UserError(f"data.channels={self.channels}: expected 1 (grey), 3 (RGB) or None")
        if self.limit is not None:
            positive_int("data.limit", self.limit, unit="images", hint="None is all")
        number_in("data.held_out", self.held_out, above=0, below=1)

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
        return PixelCache(folder, parse_size(self.cache_size, "data.cache_size"))

    @property
    def _share(self) -> float | None:
        return self.held_out if chosen(self, "held_out") else None

    def open(self) -> tuple[ImageSet, ImageSet]:
        """(training images, held-out images), all of one shape."""
        split = self.split()
        return split.training, split.held_out

    def split(self) -> Split:
        """Training images and held-out images, all of one shape, and their division."""
        return open_split(
            self.source,
            self._share,
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
            self._share,
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
    init: str | None = None
    """Model, or folder of an autoencoder, whose weights and network the run begins with."""

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self, out: Path, resume: bool = True, change: bool = False) -> Path:
        """Train, or resume, and return the folder of the finished autoencoder.

        Args:
            out: Folder of the run; the stage's is out/autoencoder.
            resume: See `train`.
            change: See `train`.
        """
        started = time.perf_counter()
        check_counts(self.network)
        if self.data.buckets is not None:
            raise UserError(
                f"data.buckets={self.data.buckets}: the autoencoder trains on squares; "
                "give aspect buckets to the denoiser alone"
            )
        initial = None if self.init is None else initial_autoencoder(self.init)
        with Bars():
            split = self.data.split()
        images, held_out = split.training, split.held_out
        channels = images.shape[0]
        seed_torch(self.loop.seed)
        if initial is None:
            config = replace(self.network, in_channels=channels, out_channels=channels)
            network = built(lambda: AutoencoderKL(config), config)
        else:
            network = initial
            _log_notes([f"init={self.init}: the network is that autoencoder's, with its weights"])
        check_autoencoder(network, images.shape)
        features = load_features(self.features) if self.features else None
        if features is not None:
            check_fit(features, channels, max(images.shape[1:]), images.class_names)
        check_memory(self.loop, images.shape)
        pairs = 16 if self.loop.previews is None else max(1, self.loop.previews)
        with possible(self.loss, "be a discriminator of these images"):
            objective = AutoencoderObjective(network, images, held_out, self.loss, features, pairs)
        check_loss(objective)
        _log_notes(loop_notes(self.loop, len(images)))
        _log_notes(autoencoder_notes(self.loss, self.loop, self.features))
        if initial is None:
            _log_notes(network_notes(self.network, network.config))
        record: dict[str, Any] = {"recipe": to_json(asdict(self))}
        if initial is not None:
            record["init"] = {"model": self.init, "hash": hash_tensors(initial.state_dict())}
        trained = train(
            objective, self.loop, out / "autoencoder", resume=resume, change=change, record=record
        )
        assert isinstance(trained, AutoencoderKL)
        accelerator = start(self.loop)
        with accelerator.main_process_first(), Bars():  # the others find the first one's cache
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
    words: WordsConfig = field(default_factory=WordsConfig)
    """Text transformer that is trained with the network on the captions; layers 0: none."""
    init: str | None = None
    """Model (name, folder, file or Hub id) with whose weights the run begins.

    Network, autoencoder, text encoder, schedule and parameterization are the model's then. Classes
    that it lacks begin as its empty prompt."""

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self, out: Path, resume: bool = True, change: bool = False) -> Path:
        """Train, or resume, and return the folder of the finished model.

        Args:
            out: Folder of the run; the stage's is out/denoiser.
            resume: See `train`.
            change: See `train`.
        """
        started = time.perf_counter()
        check_counts(self.network)
        initial = None if self.init is None else load(self.init)
        if initial is None:
            process = Process(schedule(self.schedule), parameterization(self.parameterization))
            folder = Path(self.autoencoder or out / "autoencoder" / "vae")
            autoencoder = open_autoencoder(folder)
            outline = built(
                lambda: _outline(self.network, autoencoder.space.channels), self.network
            )
        else:
            process, autoencoder = initial.denoiser.process, initial.autoencoder
            outline, folder = initial_network(initial), None
            _log_notes(
                [f"init={self.init}: all parts of the model are that model's, with its weights"]
            )
        space = autoencoder.space
        with Bars():
            images, division, others = _images(
                replace(self.data, flip=False), space.factor, outline.patch
            )
            accelerator = start(self.loop)
            with accelerator.main_process_first():  # the others find the first one's cache
                condition = open_condition(
                    Source(images, outline, out, self.text, self.words, initial)
                )
            # a network that cannot have the condition is refused before anything is encoded
            fields = {} if initial is not None else condition.fields(outline)
            if outline.learned_variance and self.loss.variance:
                check_has_vlb(process.schedule)
            with accelerator.main_process_first():
                latents = _latents(images, autoencoder, out / "latents")
                measured = self.loop.previews != 0 and not division.shared
                shown = others if measured else None
                held_out = _held_out(shown, condition, autoencoder, out / "latents")
        conditioner, prompts = condition.conditioner, condition.prompts
        # cells along a side of a sample; with buckets, of the square's
        square = (self.data.size or 0) // space.factor
        side = latents.shape[-1] if isinstance(latents, LatentSet) else square
        seed_torch(self.loop.seed)
        defaults = self.defaults
        if initial is None:
            shape = outline.shape_fields(self.network, space.channels, side)
            config = replace(self.network, **shape, **fields)
            network = built(lambda: build(config), config)
        else:
            shape, network = {}, with_classes(outline, initial.class_names, conditioner)
        # the model has the size, where the config of its network has none
        if "sample_size" not in shape and defaults.size is None:
            defaults = replace(defaults, size=side * space.factor)
        parts = Parts(autoencoder, process, conditioner, defaults, self.name, division.to_json())
        sets = [latents] if isinstance(latents, LatentSet) else latents.sets
        joint = condition.wrap(network)
        check_denoiser(joint, condition, [s.shape for s in sets], network.config)
        check_memory(self.loop, sets[0].shape)
        count = 80 if self.loop.previews is None else self.loop.previews
        if count:  # an impossible request must not wait for the first preview
            parts.model(network).plan(Request(prompts, seed=0))

        def model_of(trained: nn.Module) -> LatentDiffusion:
            network, conditioner = condition.unwrap(trained)
            return replace(parts, conditioner=conditioner).model(network)

        def preview(network: nn.Module, step: int) -> Preview:
            shown = [prompts[i % len(prompts)] for i in range(count)]
            columns = max(len(prompts), 8) if len(prompts) <= 20 else 10
            samples = _samples(model_of(network), shown)
            return {}, {"samples": grid(samples, columns=min(columns, count))}

        objective = DenoiserObjective(
            joint, process, latents, space, condition, self.loss, preview, held_out
        )
        _log_notes(loop_notes(self.loop, len(images)))
        guidance, conditional = defaults.guidance, conditioner.is_conditional
        _log_notes(denoiser_notes(self.loss, conditional, network.learned_variance, guidance))
        _log_notes(self._notes(bool(images.class_names), images.captions is not None))
        if initial is None:
            _log_notes(network_notes(self.network, network.config))
        model = {
            "autoencoder": None if folder is None else _place(folder, out),
            "schedule": self.schedule,
            "parameterization": self.parameterization,
            "conditioner": None,
            **condition.record(),
            "text": None if self.text is None else str(Path(self.text).expanduser().absolute()),
            "init": None if self.init is None else fixed_source(self.init),
            "network": network.to_config(),
            "defaults": defaults.to_json(),
            "name": self.name,
            "data": division.to_json(),
        }
        record: dict[str, Any] = {"recipe": to_json(asdict(self)), "model": to_json(model)}
        if initial is not None:
            record["init"] = {"model": self.init, "hash": initial.hash}
        trained = train(
            objective, self.loop, out / "denoiser", resume=resume, change=change, record=record
        )
        if accelerator.is_main_process:
            model_of(trained).save(out / "model")
            _finish(out / "denoiser", started, len(images), division)
        accelerator.wait_for_everyone()
        return out / "model"

    def _notes(self, classes: bool, captions: bool) -> list[str]:
        """Settings of the recipe itself without effect, for data with classes or captions."""
        notes, begun = [], self.init is not None
        if self.data.flip:
            notes.append(
                "data.flip=True: the denoiser trains on cached latents, which are not mirrored"
            )
        if self.text is not None and classes and not begun:
            notes.append(f"text={self.text}: the data's classes are not used, their captions are")
        if self.text is None and not self.words.layers and captions and not begun:
            notes.append(
                "the data's captions are not used: --text FOLDER trains on them, "
                "and --words.layers 4 trains a text transformer on them too"
            )
        if begun:
            names = ("autoencoder", "text", "schedule", "parameterization")
            values = {n: getattr(self, n) for n in names if chosen(self, n)}
            notes += [f"{n}={v}: with init it is the model's" for n, v in values.items()]
        return notes


def _place(folder: Path, run: Path) -> str:
    """The absolute path of a folder, or its place in a run, which may be moved."""
    path, out = (p.expanduser().absolute() for p in (folder, run))
    return str(path.relative_to(out) if path.is_relative_to(out) else path)


def _log_notes(notes: Sequence[str]) -> None:
    for note in notes:
        logger.warning("%s", note)


def _samples(model: LatentDiffusion, prompts: Sequence[str | None]) -> list[Any]:
    """An image of each prompt, image k from seed k, some at a time where they are large."""
    area = model.sample_size**2
    batch = max(1, PREVIEW_PIXELS // area)
    images: list[Any] = []
    for first in range(0, len(prompts), batch):
        part = [*prompts[first : first + batch]]

        def on_step(step: Step, first: int = first, size: int = len(part)) -> None:
            done = first + size * (step.index + 1) / step.count
            report("samples", int(done), len(prompts))

        images += model.generate(part, seed=first, on_step=on_step)
    return images


def _outline(config: Any, channels: int) -> Network:
    """The network of a config for latents of so many channels and any size, without weights."""
    with torch.device("meta"):
        return build(replace(config, **network_of(config).shape_fields(config, channels, 32)))


def _images(
    data: DataSettings, factor: int, patch: int
) -> tuple[ImageSet | BucketedImages, Division, ImageSet | None]:
    """The training images, their division, and the held-out images.

    The first are squares, or buckets whose latents are whole patches of the network. Of buckets no
    held-out images are opened.
    """
    if data.buckets is None:
        split = data.split()
        return split.training, split.division, split.held_out
    if data.buckets % (factor * patch):
        raise UserError(
            f"data.buckets={data.buckets}: the step of the buckets' sides must be a multiple of "
            f"{factor * patch}, the autoencoder's factor {factor} times the network's patch {patch}"
        )
    return *data.open_buckets(), None


def _latents(
    images: ImageSet | BucketedImages, autoencoder: Autoencoder, folder: Path
) -> LatentSet | BucketedLatents:
    if isinstance(images, ImageSet):
        check_images(autoencoder, images.shape)
        return encode_all(images, autoencoder, folder)
    check_images(autoencoder, images.sets[0].shape)
    return BucketedLatents([encode_all(bucket, autoencoder, folder) for bucket in images.sets])


def _held_out(
    images: ImageSet | None, condition: Condition, autoencoder: Autoencoder, folder: Path
) -> HeldOut | None:
    """The latents of some held-out images, and their condition; None: there are none."""
    if images is None:
        return None
    count = min(HELD_OUT, len(images))
    images = images.subset(torch.linspace(0, len(images) - 1, count).long())
    own = condition.held_out(images)
    return HeldOut(encode_all(images, autoencoder, folder), own)


def _finish(folder: Path, started: float, images: int, division: Division) -> None:
    seconds = round(time.perf_counter() - started, 1)
    facts = {"seconds_this_run": seconds, "images": images, "data": division.to_json()}
    write_json(folder / "finished.json", facts)


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

    def progress(done: int, total: int) -> None:
        report("encoding images", done, total)

    return cache_latents(
        images, encode, hash_tensors(weights), folder, batch_size=batch_size, progress=progress
    )
