"""`sfumato evaluate`: measure a model against real images, and write a report.

Model, data and metrics meet in this file: `sfumato.evaluate` imports no model. Samples are balanced
over the classes (sample k has class k mod K), or have the captions of the held-out images; sample k
is drawn from seed + k, and the metrics take images in [0, 1]. All that can fail is tried before the
first sample: the folder of the report, the data, the number of images, and the features.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sfumato.cli._names import check_names
from sfumato.cli._options import (
    MODELS,
    ModelOptions,
    Seed,
    at_least,
    load_guide_model,
    parse,
    unset,
)
from sfumato.cli._output import Clock, log_to_stderr, progress
from sfumato.cli._run import set_threads
from sfumato.errors import UserError
from sfumato.validate import seed_number

TRAINED = "the model's own"
LEAST = 6
"""Least number of samples: k + 1 neighbours."""
MOST = 5000
"""Number of samples where the held-out images allow it."""

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.data import ImageSet
    from sfumato.diffuse.run import Step
    from sfumato.evaluate import Features, Reference, Report
    from sfumato.model import LatentDiffusion


@dataclass(frozen=True, kw_only=True)
class Evaluate(ModelOptions):
    """Measure a model against real images.

    Metrics: Frechet distance, precision and recall, coverage, memorisation, reconstruction.
    """

    model: tyro.conf.Positional[str] = field()  # required, unlike other commands'
    """Bundled name, folder in the diffusers layout, single file or Hub id."""
    data: str
    """Training data of the model: fashion-mnist, a folder, a .parquet file or hf:NAME."""
    features: str = "auto"
    """Feature network: auto, fashion, efficientnet-lite0, inception:PATH, module:NAME, folder.

    auto is fashion for the classes of Fashion-MNIST in grey, else efficientnet-lite0."""
    samples: Annotated[int | None, unset("as many as held-out images, at most 5000")] = None
    """Number of samples, balanced over the classes, or with the captions of held-out images."""
    unconditional_samples: Annotated[int | None, unset("as --samples")] = None
    """Number of samples of class-conditional models without a class, measured apart; 0: none."""
    unconditional_steps: Annotated[int | None, unset("as many network calls as with a class")] = (
        None
    )
    """Number of sampling steps without a class."""
    batch: Annotated[int | None, unset("about 196,000 pixels")] = None
    """Number of samples drawn at a time."""
    seed: Seed = 0
    """Seed of the first sample, or random. Sample k is drawn from seed + k."""
    steps: Annotated[int | None, unset(MODELS)] = None
    """Number of sampling steps."""
    sampler: Annotated[str | None, unset(MODELS)] = None
    """Sampler, with options as in ddim:eta=0.5 (list: docs/reference/samplers.md)."""
    spacing: Annotated[str | None, unset(MODELS)] = None
    """Spacing of the timesteps: trailing, karras, karras:rho=5, tuned ..."""
    guidance: Annotated[str | None, unset(MODELS)] = None
    """Guidance scale, 0 to 1 is off; with options as in "3 interval:low=0.2,high=0.8"."""
    train_split: Annotated[str | None, unset(TRAINED)] = None
    """Split that the model was trained on: the reference."""
    test_split: Annotated[str | None, unset(TRAINED)] = None
    """Split that the model was not trained on: the floor (test, else validation)."""
    held_out: Annotated[float | None, unset(TRAINED)] = None
    """Share of the training images that replaces a missing test split; else 0.02."""
    layout: Annotated[str | None, unset(TRAINED)] = None
    """Meaning of the data's subfolders: auto, splits, classes or flat."""
    image_column: Annotated[str | None, unset(TRAINED)] = None
    """Column of the images in a table."""
    label_column: Annotated[str | None, unset(TRAINED)] = None
    """Column of the classes in a table; none: no classes."""
    caption_column: Annotated[str | None, unset(TRAINED)] = None
    """Column of the captions in a table; sidecar: text files; none: no captions."""
    on_error: Annotated[Literal["raise", "skip"] | None, unset(TRAINED)] = None
    """Broken images of the data: raise refuses the data, skip leaves them out, with a count."""
    limit: Annotated[int | None, unset("all")] = None
    """Number of images of each split, chosen at random and always the same, over all classes."""
    out: Annotated[Path | None, unset("NAME-evaluation, beside the model")] = None
    """Folder for report.json and report.html, which it must not hold yet."""
    overwrite: bool = False
    """Replace the report that --out holds."""
    threads: Annotated[int | None, unset("all cores")] = None
    """Number of CPU threads."""


def evaluate(arguments: Sequence[str]) -> None:
    """Measure a model against real images and write report.json and report.html."""
    clock = Clock()
    options = parse(Evaluate, arguments, "evaluate")
    at_least(options, 1, "batch", "steps", "unconditional_steps", "limit", "threads")
    at_least(options, 0, "clip_skip")
    check_names(options.sampler, options.spacing, options.guidance)
    for name in ("samples", "unconditional_samples"):
        count = getattr(options, name)
        if count is not None and count < LEAST and not (name != "samples" and count == 0):
            zero = "" if name == "samples" else "0 for none, or "
            raise UserError(
                f"--{name.replace('_', '-')} {count} is too small: expected {zero}at least {LEAST}"
            )
    most = max(options.samples or MOST, options.unconditional_samples or MOST)
    seed_number("--seed", options.seed, most)
    out = _check_out(options.out or _beside(options.model), options.overwrite)

    from rich.console import Console

    from sfumato.evaluate import check_fit, choose_features, load_features, prepare_reference
    from sfumato.loading import load

    settings = {name: getattr(options, name) for name in ("sampler", "spacing", "guidance")}
    options.check_early(
        lambda model: model.settings(steps=options.steps, **settings), options.sampler
    )
    set_threads(options.threads)
    log_to_stderr()
    clock.lap("import")
    features = None if options.features == "auto" else load_features(options.features)
    model = load(options.model, **options.reading(options.sampler))
    clock.lap("load")
    train, test = _images(model, options)
    clock.lap("data")
    kind = (train.shape[0], max(train.shape[1:]))
    features = features or load_features(choose_features(*kind, train.class_names))
    check_fit(features, *kind, model.class_names)
    options = _fitted(options, model, test)
    reference = prepare_reference(_pixels(train), _pixels(test), features, seed=options.seed)
    reference.sanity.require(features.name)
    clock.lap("measure")
    report = _measure(model, reference, train, test, options, clock)
    out.mkdir(parents=True, exist_ok=True)
    report.to_json(out / "report.json")
    report.to_html(out / "report.html")
    Console().print(report)
    print(out / "report.json")
    print(out / "report.html")
    print(f"measured in {clock}")


def _beside(model: str) -> Path:
    """The folder of the report: beside a model's folder or file, else in this folder."""
    path = Path(model)
    if not path.exists():
        return Path(f"{path.name}-evaluation")
    path = path.resolve()
    name = path.name if path.is_dir() else path.stem
    return path.parent / ("evaluation" if name == "model" else f"{name}-evaluation")


def _check_out(folder: Path, overwrite: bool) -> Path:
    """Return the folder of the report, which can be written.

    Raises:
        UserError: For a file of that name, a folder that cannot be written, and another report
            there unless `overwrite`.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: expected a folder for report.json, report.html")
    older = (folder / name for name in ("report.json", "report.html"))
    if not overwrite and (taken := next((file for file in older if file.exists()), None)):
        raise UserError(
            f"{taken} is the report of an earlier run and is left as it is: "
            "choose another --out, or add --overwrite to replace it"
        )
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if is_new:  # until there is a report
            folder.rmdir()
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be written ({error.strerror}): choose another folder"
        ) from error
    return folder


def _fitted(options: Evaluate, model: "LatentDiffusion", test: "ImageSet") -> Evaluate:
    """The options with the numbers of samples that the held-out images allow."""
    from sfumato.evaluate.reconstruction import PIXELS

    classes = len(model.class_names)
    samples = options.samples
    if samples is None:
        samples = min(MOST, len(test))
        if samples > classes > 0:
            samples -= samples % classes
        samples = max(LEAST, samples)
    free = samples if options.unconditional_samples is None else options.unconditional_samples
    batch = options.batch or max(1, PIXELS // (test.shape[1] * test.shape[2]))
    return replace(options, samples=samples, unconditional_samples=free, batch=batch)


def _images(model: "LatentDiffusion", options: Evaluate) -> "tuple[ImageSet, ImageSet]":
    """Training images and held-out images, in the model's size and channels.

    They are divided as the model's training divided them, where it is the same data.
    """
    from sfumato.data import Division, Reading, open_split

    shape, record = model.describe()["image"], model.training_data
    names = ("layout", "image_column", "label_column", "caption_column")
    own = {name: value for name in names if (value := getattr(options, name)) is not None}
    division = Division.from_json(record) if record else None
    split = open_split(
        options.data,
        options.held_out,
        train=options.train_split,
        test=options.test_split,
        size=shape["height"],
        channels=shape["channels"],
        on_error=options.on_error,
        reading=Reading(**own),
        sample=options.limit,
        division=division,
    )
    return split.training, split.held_out


def _pixels(images: "ImageSet", batch: int = 1000) -> "Tensor":
    """All images of a set, (N, C, H, W) in [0, 1]."""
    import torch

    parts = [
        images.batch(range(start, min(start + batch, len(images))))["image"]
        for start in range(0, len(images), batch)
    ]
    return (torch.cat(parts) + 1) / 2


def _measure(
    model: "LatentDiffusion",
    reference: "Reference",
    train: "ImageSet",
    test: "ImageSet",
    options: Evaluate,
    clock: Clock,
) -> "Report":
    """Samples, samples without a class, reconstructions: one report."""
    import torch

    from sfumato.evaluate import evaluate_reconstruction, evaluate_samples
    from sfumato.predict.guidance.settings import Guidance

    features = reference.features
    count, free_count = options.samples, options.unconditional_samples
    assert count is not None and free_count is not None and options.batch is not None
    sampling = {name: getattr(options, name) for name in ("sampler", "spacing", "guidance")}
    settings = model.settings(steps=options.steps, **sampling)
    del settings["n"]  # of one call; the report has its own
    prompts = _prompts(model, reference, test, count)
    # brackets in a caption are text, as in training
    settings |= {"prompt_weights": "none"} if prompts.texts and not model.class_names else {}
    facts = {
        "model": options.model,
        "model_hash": model.hash,
        "data": options.data,
        "batch": options.batch,
        "torch": torch.__version__,
        "prompts": prompts.source,
        **settings,
    }
    train_labels, test_labels = _as_classes(train, features), _as_classes(test, features)

    def measure(samples: "Tensor", labels: "Tensor | None", title: str, **changed: Any) -> "Report":
        return evaluate_samples(
            samples,
            labels,
            reference,
            train_labels=train_labels,
            test_labels=test_labels,
            settings={**facts, **changed},
            title=title,
        )

    num_classes = len(model.class_names)
    # guidance calls the network twice a step
    equal = settings["steps"] * (1 if Guidance.parse(settings["guidance"]).off else 2)
    if options.spacing == "tuned":  # there may be no tuned times for so many steps
        sampling["spacing"] = None
    free = model.settings(steps=options.unconditional_steps or equal, **sampling)
    del free["n"]
    samples = _draw(model, prompts.texts, count, options, settings)
    clock.lap("sample")
    sample_labels = _translate(prompts.labels, model.class_names, features.class_names)
    report = measure(samples, sample_labels, f"{options.model} on {options.data}")
    clock.lap("measure")
    if num_classes and free_count:
        samples = _draw(model, None, free_count, options, free)
        clock.lap("sample")
        unconditional = measure(samples, None, "Samples without a class", steps=free["steps"])
        report = report.join(_renamed(unconditional, "unconditional"))
        clock.lap("measure")
    originals = reference.test
    rebuilt = _reconstruct(model, originals, options.batch)
    clock.lap("reconstruct")
    report = report.join(evaluate_reconstruction(originals, rebuilt, features, seed=options.seed))
    clock.lap("measure")
    return report


@dataclass(frozen=True)
class _Prompts:
    """The prompts of the samples: texts, their classes, and one line for the report."""

    texts: list[str] | None
    labels: "Tensor | None"
    source: str


def _prompts(
    model: "LatentDiffusion", reference: "Reference", test: "ImageSet", count: int
) -> _Prompts:
    """Classes in turn, or the captions of the held-out images; None for other models.

    The captions are those of the images that the samples are compared with.
    """
    import torch

    from sfumato.predict.conditioners.base import ClassConditioner

    if model.class_names:
        labels = torch.arange(count) % len(model.class_names)
        texts = [model.class_names[int(k)] for k in labels]
        return _Prompts(texts, labels, f"{len(model.class_names)} classes in turn")
    if isinstance(model.conditioner, ClassConditioner):
        return _Prompts(None, None, "none: the model is unconditional")
    if test.captions is None:
        return _Prompts(None, None, f"none: {test.name} has no captions")
    rows = reference.floor_rows(count).tolist()
    captions = [test.captions[rows[k % len(rows)]] for k in range(count)]
    return _Prompts(captions, None, f"captions of {len(rows)} held-out images")


def _draw(
    model: "LatentDiffusion",
    texts: list[str] | None,
    count: int,
    options: Evaluate,
    settings: dict[str, Any],
) -> "Tensor":
    """`count` samples, (N, C, H, W) in [0, 1], sample k with prompt `texts[k]`, from seed + k."""
    import torch

    assert options.batch is not None
    parts, guide_model = [], load_guide_model(settings["guidance"])
    starts = range(0, count, options.batch)
    with progress("sampling") as update:
        for run, start in enumerate(starts):

            def on_step(step: "Step", run: int = run) -> None:
                update(run * step.count + step.index + 1, len(starts) * step.count)

            size = min(options.batch, count - start)
            prompts = None if texts is None else texts[start : start + size]
            images = model.generate(
                prompts,
                n=1 if prompts else size,
                seed=options.seed + start,
                output="tensor",
                on_step=on_step,
                guide_model=guide_model,
                **settings,
            )
            # grey models return three equal channels
            parts.append(images[:, : model.autoencoder.channels])
    return torch.cat(parts)


def _reconstruct(model: "LatentDiffusion", images: "Tensor", batch: int) -> "Tensor":
    """Images in [0, 1] through the autoencoder and back."""
    import torch

    from sfumato.decode.whole import whole

    parts = []
    with progress("reconstructing") as update:
        for part in images.split(batch):
            parts.append(whole(model.autoencoder, model.compress(part * 2 - 1)))
            update(sum(map(len, parts)), len(images))
    return (torch.cat(parts) + 1) / 2


def _as_classes(images: "ImageSet", features: "Features") -> "Tensor | None":
    """The set's labels as numbers of the classifier's classes, if both have the same classes."""
    return _translate(images.labels, images.class_names, features.class_names)


def _translate(
    labels: "Tensor | None", source: Sequence[str], target: Sequence[str]
) -> "Tensor | None":
    """Labels into the names `source` as labels into the names `target`.

    None if the names differ, or a label is missing.
    """
    import torch

    if labels is None or not target or set(source) != set(target) or bool((labels < 0).any()):
        return None
    return torch.tensor([target.index(name) for name in source])[labels]


def _renamed(report: "Report", prefix: str) -> "Report":
    """The report with `prefix` in its names, to join another of the same metrics."""
    return replace(
        report,
        metrics=tuple(
            replace(m, name=f"{prefix}_{m.name}")
            for m in report.metrics
            if not m.name.startswith("sanity")  # of the features: in the other report already
        ),
        tables=tuple(replace(t, title=f"{t.title} ({prefix})") for t in report.tables),
        figures=tuple(
            replace(p, title=f"{p.title} ({prefix})")
            for p in report.figures
            if p.title != "Real images"
        ),
        data={f"{prefix}_{k}" if k == "samples" else k: value for k, value in report.data.items()},
        settings={f"{prefix}_{key}": report.settings[key] for key in ("n", "floor_n", "steps")},
    )
