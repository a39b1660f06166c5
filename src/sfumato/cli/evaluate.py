"""`sfumato evaluate`: draws samples, measures them and the autoencoder against real images, and
writes a report.

This is the place where model, data and metrics meet: `sfumato.evaluate` itself knows no model.
Samples are balanced over the classes (sample k asks for class k mod K), sample k is drawn from seed
+ k, images are handed over in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sfumato.cli._options import MODELS, at_least, load_guide_model, parse, unset
from sfumato.cli._output import Clock, progress
from sfumato.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.data import ImageSet
    from sfumato.diffuse.run import Step
    from sfumato.evaluate import Features, Report
    from sfumato.model import LatentDiffusion


@dataclass(frozen=True)
class Evaluate:
    """Measures a model against real images: Frechet distance, precision and recall, coverage,
    memorisation, reconstruction.
    """

    model: tyro.conf.Positional[str]
    """A bundled name, a folder in the diffusers layout, a single file or a hub id."""
    data: str
    """Training data of the model: fashion-mnist, a folder, a .parquet file or hf:NAME."""
    features: str = "fashion"
    """The network whose features are compared: fashion, efficientnet-lite0, inception:PATH,
    module:attribute or a folder."""
    samples: int = 5000
    """Number of samples, balanced over the classes where the model has classes."""
    unconditional_samples: int = 5000
    """Number of samples without a class, measured apart; 0 for none."""
    unconditional_steps: Annotated[int | None, unset("as many network calls")] = None
    """Sampling steps without a class. Guidance calls the network twice a step, so by default twice
    the steps where there is guidance."""
    batch: int = 250
    """Samples drawn at a time."""
    seed: int = 0
    """Sample k is drawn from seed + k."""
    steps: Annotated[int | None, unset(MODELS)] = None
    """Sampling steps."""
    sampler: Annotated[str | None, unset(MODELS)] = None
    """The sampler's name, with options if need be."""
    spacing: Annotated[str | None, unset(MODELS)] = None
    """Spacing of the times."""
    guidance: Annotated[str | None, unset(MODELS)] = None
    """Guidance scale, 1 is off; or more, as "3 interval:low=0.2,high=0.8"."""
    train_split: str = "train"
    """The split that the model was trained on: the reference."""
    test_split: str = "test"
    """A split that it never saw: the floor."""
    held_out: float = 0.02
    """The share of the training images that is the floor where there is no such split: what its
    recipe held out of training."""
    limit: Annotated[int | None, unset("all")] = None
    """Only the first so many images of each split."""
    out: Path = Path()
    """The folder for report.json and report.html."""
    threads: Annotated[int | None, unset("all cores")] = None
    """CPU threads."""


def evaluate(arguments: Sequence[str]) -> None:
    """Measures a model against real images and writes report.json and report.html."""
    clock = Clock()
    options = parse(Evaluate, arguments, "evaluate")
    at_least(
        1,
        batch=options.batch,
        steps=options.steps,
        unconditional_steps=options.unconditional_steps,
        limit=options.limit,
        threads=options.threads,
    )
    at_least(6, samples=options.samples)  # k + 1 neighbours
    at_least(0, seed=options.seed)
    if options.unconditional_samples and options.unconditional_samples < 6:
        raise UserError(
            f"--unconditional-samples {options.unconditional_samples} is too small: expected 0 for none, or at least 6"
        )
    if options.out.exists() and not options.out.is_dir():
        raise UserError(
            f"--out {options.out} is a file: expected a folder for report.json and report.html"
        )

    import torch
    from rich.console import Console

    from sfumato.evaluate import load_features
    from sfumato.loading import load

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    clock.lap("import")
    model = load(options.model)
    features = load_features(options.features)
    clock.lap("load")
    train, test = _images(model, options)
    clock.lap("data")
    report = _measure(model, features, train, test, options, clock)
    options.out.mkdir(parents=True, exist_ok=True)
    report.to_json(options.out / "report.json")
    report.to_html(options.out / "report.html")
    Console().print(report)
    print(options.out / "report.json")
    print(options.out / "report.html")
    print(f"measured in {clock}")


def _images(model: "LatentDiffusion", options: Evaluate) -> "tuple[ImageSet, ImageSet]":
    from sfumato.data import open_both, open_first

    shape = model.describe()["image"]
    size, channels, train, test = (
        shape["height"],
        shape["channels"],
        options.train_split,
        options.test_split,
    )
    if options.limit is None:
        return open_both(
            options.data, options.held_out, train=train, test=test, size=size, channels=channels
        )
    return open_first(
        options.data,
        options.limit,
        options.held_out,
        train=train,
        test=test,
        size=size,
        channels=channels,
    )


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
    features: "Features",
    train: "ImageSet",
    test: "ImageSet",
    options: Evaluate,
    clock: Clock,
) -> "Report":
    """Samples, samples without a class, reconstructions: one report."""
    import torch

    from sfumato.evaluate import evaluate_reconstruction, evaluate_samples
    from sfumato.predict.guidance.settings import Guidance

    settings = model.settings(
        steps=options.steps,
        sampler=options.sampler,
        spacing=options.spacing,
        guidance=options.guidance,
    )
    del settings["n"]  # of one call; the report has its own
    facts = {
        "model": options.model,
        "model_hash": model.hash,
        "data": options.data,
        "batch": options.batch,
        "torch": torch.__version__,
        **settings,
    }
    real_train, real_test = _pixels(train), _pixels(test)
    train_labels, test_labels = _as_classes(train, features), _as_classes(test, features)

    def report(samples: "Tensor", labels: "Tensor | None", title: str, **changed: Any) -> "Report":
        return evaluate_samples(
            samples,
            labels,
            real_train,
            real_test,
            features,
            train_labels=train_labels,
            test_labels=test_labels,
            seed=options.seed,
            settings={**facts, **changed},
            title=title,
        )

    kinds = len(model.class_names)
    equal = settings["steps"] * (1 if Guidance.parse(settings["guidance"]).off else 2)
    # there may be no tuned times for so many steps
    spacing = None if options.spacing == "tuned" else options.spacing
    free = model.settings(
        steps=options.unconditional_steps or equal,
        sampler=options.sampler,
        spacing=spacing,
        guidance=options.guidance,
    )
    del free["n"]
    asked = torch.arange(options.samples) % kinds if kinds else None
    samples = _draw(model, asked, options.samples, options, settings)
    clock.lap("sample")
    found = report(
        samples,
        _translate(asked, model.class_names, features.class_names),
        f"{options.model} on {options.data}",
    )
    clock.lap("measure")
    if kinds and options.unconditional_samples:
        drawn = _draw(model, None, options.unconditional_samples, options, free)
        clock.lap("sample")
        found = found.join(
            _renamed(
                report(drawn, None, "Samples without a class", steps=free["steps"]), "unconditional"
            )
        )
        clock.lap("measure")
    rebuilt = _reconstruct(model, real_test, options.batch)
    clock.lap("reconstruct")
    found = found.join(evaluate_reconstruction(real_test, rebuilt, features, seed=options.seed))
    clock.lap("measure")
    return found


def _draw(
    model: "LatentDiffusion",
    asked: "Tensor | None",
    count: int,
    options: Evaluate,
    settings: dict[str, Any],
) -> "Tensor":
    """`count` samples, (N, C, H, W) in [0, 1]; with `asked`, sample k is of class `asked[k]`.
    Sample k is drawn from seed + k.
    """
    import torch

    parts, guide_model = [], load_guide_model(settings["guidance"])
    starts = range(0, count, options.batch)
    with progress("sampling") as update:
        for run, start in enumerate(starts):

            def on_step(step: "Step", run: int = run) -> None:
                update(run * step.count + step.index + 1, len(starts) * step.count)

            size = min(options.batch, count - start)
            prompts = (
                None
                if asked is None
                else [model.class_names[int(k)] for k in asked[start : start + size]]
            )
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

    parts = [whole(model.autoencoder, model.compress(part * 2 - 1)) for part in images.split(batch)]
    return (torch.cat(parts) + 1) / 2


def _as_classes(images: "ImageSet", features: "Features") -> "Tensor | None":
    """The set's labels as numbers of the classifier's classes, where both speak of the same
    classes.
    """
    return (
        None
        if images.labels is None
        else _translate(images.labels, images.class_names, features.class_names)
    )


def _translate(
    labels: "Tensor | None", ours: Sequence[str], theirs: Sequence[str]
) -> "Tensor | None":
    """Labels that count `ours` as labels that count `theirs`; None where a name is not in both, or
    a label is missing.
    """
    import torch

    if labels is None or not theirs or set(ours) != set(theirs) or bool((labels < 0).any()):
        return None
    return torch.tensor([theirs.index(name) for name in ours])[labels]


def _renamed(report: "Report", prefix: str) -> "Report":
    """The report with `prefix` before its names, so that it can be joined with another of the same
    metrics.
    """
    metrics = tuple(replace(m, name=f"{prefix}_{m.name}") for m in report.metrics)
    tables = tuple(replace(t, title=f"{t.title} ({prefix})") for t in report.tables)
    pictures = tuple(
        replace(p, title=f"{p.title} ({prefix})")
        for p in report.pictures
        if p.title != "Real images"
    )
    data = {
        f"{prefix}_{key}" if key == "samples" else key: value for key, value in report.data.items()
    }
    settings = {f"{prefix}_{key}": report.settings[key] for key in ("n", "floor_n", "steps")}
    return replace(
        report, metrics=metrics, tables=tables, pictures=pictures, data=data, settings=settings
    )
