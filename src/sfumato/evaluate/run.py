"""From images to a report: `evaluate_samples` and `evaluate_reconstruction`.

    Frechet distance   n samples against *all* training images; floor: n held-out real images
                       against the same reference
    precision ...      n samples against n training images; floor: n held-out images against the
                       same n
    memorisation       samples' distances to the training set beside those of held-out images;
                       floor: one half of these beside the other
    classes            the label asked for beside the classifier's guess; floor: the classifier on
                       held-out images

Training and held-out images are disjoint by the caller's split. Where fewer than n held-out images
exist, the floor is made of those, and `floor_n` in the settings says so: the floor of the Frechet
distance is then too high.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sfumato.errors import UserError
from sfumato.evaluate import figures
from sfumato.evaluate.classes import Classes, classes
from sfumato.evaluate.features import Features, extract
from sfumato.evaluate.features import classify as classify_all
from sfumato.evaluate.figures import Picture
from sfumato.evaluate.frechet import frechet_distance, gaussian
from sfumato.evaluate.inputs import (
    ImageSource,
    check_images,
    check_labels,
    check_pair,
    choose,
    draw,
    fingerprint,
)
from sfumato.evaluate.memorisation import Memorisation, memorisation
from sfumato.evaluate.precision_recall import Manifold, expected_coverage, manifold
from sfumato.evaluate.reconstruction import reconstruction
from sfumato.evaluate.report import Metric, Report, Rows
from sfumato.evaluate.throughput import Speed

NEIGHBOURS = 3
"""Training images shown below a sample."""


def _describe(features: Features) -> dict[str, Any]:
    return {
        "name": features.name,
        "hash": features.hash,
        "dim": features.dim,
        "resize": features.resize,
    }


def _manifold_metrics(found: Manifold, floor: Manifold) -> tuple[Metric, ...]:
    expected = expected_coverage(found.real_count, found.sample_count, found.k)
    return (
        Metric(
            "precision",
            found.precision,
            floor.precision,
            "higher",
            f"share of samples among real images, k={found.k}",
        ),
        Metric(
            "recall",
            found.recall,
            floor.recall,
            "higher",
            f"share of real images among samples, k={found.k}",
        ),
        Metric(
            "density",
            found.density,
            floor.density,
            "higher",
            "mean number of real balls around a sample, over k; 1 expected",
        ),
        Metric(
            "coverage",
            found.coverage,
            floor.coverage,
            "higher",
            f"share of real images with a sample near; {expected:.4f} expected",
        ),
    )


def _memorisation_metrics(found: Memorisation, floor: Memorisation) -> tuple[Metric, ...]:
    return (
        Metric(
            "memorisation_ratio",
            found.ratio,
            floor.ratio,
            "near",
            "median distance to the training set over that of held-out images; 1 expected",
        ),
        Metric(
            "memorisation_share",
            found.closer_share,
            floor.closer_share,
            "near",
            "share of samples nearer to it than 99 % of held-out images; 0.01 expected",
        ),
    )


def _class_metrics(found: Classes, floor: Classes, names: tuple[str, ...]) -> tuple[Metric, Rows]:
    if found.accuracy is not None:
        metric = Metric(
            "class_accuracy",
            found.accuracy,
            floor.accuracy,
            "higher",
            "share of samples classified as what was asked for",
        )
    else:
        metric = Metric(
            "class_deviation",
            found.deviation,
            floor.deviation,
            "lower",
            "largest deviation of a class's count from even, in %",
        )
    nothing = (None,) * len(names)
    columns = ("class", "samples", "accuracy", "real images", "real accuracy")
    shares, real_shares = found.by_class or nothing, floor.by_class or nothing
    return metric, Rows(
        "Classes",
        columns,
        tuple(zip(names, found.counts, shares, floor.counts, real_shares, strict=True)),
    )


def evaluate_samples(
    samples: ImageSource,
    labels: Int64[Tensor, " N"] | None,
    real_train: Float[Tensor, "M C H W"],
    real_test: Float[Tensor, "T C H W"],
    features: Features,
    *,
    train_labels: Int64[Tensor, " M"] | None = None,
    test_labels: Int64[Tensor, " T"] | None = None,
    n: int | None = None,
    batch: int = 100,
    seed: int = 0,
    k: int = 5,
    settings: Mapping[str, Any] | None = None,
    speed: Speed | None = None,
    title: str = "Samples",
) -> Report:
    """Measures samples against real images.

    samples     (N, C, H, W) in [0, 1], or a function `(n, batch, seed) -> images`, which then needs
                `n`
    labels      the class that was asked for, one a sample; None for unconditional samples, whose
                classes are then only counted
    real_train  what the model was trained on: reference of the Frechet distance, source of nearest
                neighbours
    real_test   real images it never saw: the floor
    k           neighbours for precision, recall, density and coverage
    settings    anything that belongs in the report: steps, sampler, guidance

    Errors: `UserError` for images outside [0, 1], different sizes, or fewer than k + 1 samples;
    `NumericalError` for NaN.
    """
    shown = draw(samples, n, batch, seed)
    train, test = (
        check_images(real_train, "training images"),
        check_images(real_test, "test images"),
    )
    for name, images in (("training images", train), ("test images", test)):
        if images.shape[1:] != shown.shape[1:]:
            both = (
                f"samples have shape {tuple(shown.shape[1:])} and {name} {tuple(images.shape[1:])}"
            )
            raise UserError(f"{both}: expected equal channels and sides")
    count = len(shown)
    if count < k + 1 or len(train) < k + 1 or len(test) < 2 * (k + 1):
        found = f"{count} samples, {len(train)} training and {len(test)} test images"
        raise UserError(
            f"{found} are too few: expected at least k + 1 = {k + 1} of each, and twice as many of the last"
        )
    floor_rows = choose(len(test), min(count, len(test)), seed)

    f_samples, f_train, f_test = (
        extract(features, shown),
        extract(features, train),
        extract(features, test),
    )
    f_floor = f_test[floor_rows]
    f_near = f_train[choose(len(train), min(count, len(train)), seed)]
    reference = gaussian(f_train, features.hash)
    distance, floor_distance = (
        frechet_distance(gaussian(f, features.hash), reference) for f in (f_samples, f_floor)
    )
    copies = memorisation(f_samples, f_train, f_test, min(NEIGHBOURS, len(f_train)))
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    half = len(test) // 2
    metrics = (
        Metric(
            "frechet_distance",
            distance,
            floor_distance,
            "lower",
            f"{count} samples, {len(train)} real images, features {features.name}",
        ),
        *_manifold_metrics(manifold(f_near, f_samples, k), manifold(f_near, f_floor, k)),
        *_memorisation_metrics(
            copies, memorisation(f_test[order[:half]], f_train, f_test[order[half:]])
        ),
    )
    tables: tuple[Rows, ...] = ()
    guesses: Tensor | None = None
    if features.class_names:
        logits = classify_all(features, shown)
        guesses = logits.argmax(dim=1)
        asked = (
            None
            if labels is None
            else check_labels(labels[:count], count, len(features.class_names))
        )
        floor_labels = (
            None
            if test_labels is None
            else check_labels(test_labels, len(test), len(features.class_names))[floor_rows]
        )
        floor_classes = classes(classify_all(features, test[floor_rows]), floor_labels)
        metric, table = _class_metrics(classes(logits, asked), floor_classes, features.class_names)
        metrics, tables = (*metrics, metric), (table,)
    if speed is not None:
        about = f"median of {speed.calls} calls of {speed.images} images"
        metrics += (Metric("seconds_per_image", speed.seconds_per_image, None, "lower", about),)

    rows = guesses if labels is None else labels[:count]
    suspects = copies.distances[:, 0].argsort(stable=True)[:12]
    images = (
        Picture("Samples", _arranged(labels, guesses), figures.by_class(shown, rows)),
        Picture("Real images", "from the training set", figures.by_class(train, train_labels)),
        Picture(
            "The samples nearest to the training set",
            "top: the sample; below: its nearest training images",
            figures.neighbours(shown, train, copies.indices, suspects),
        ),
    )
    facts = {"n": count, "seed": seed, "k": k, "floor_n": len(floor_rows), **(settings or {})}
    data = {"samples": fingerprint(shown), "train": fingerprint(train), "test": fingerprint(test)}
    return Report(title, metrics, _describe(features), data, facts, tables, images)


def _arranged(labels: Tensor | None, guesses: Tensor | None) -> str:
    return (
        "one row a class that was asked for"
        if labels is not None
        else "one row a class, by the classifier"
        if guesses is not None
        else "the first"
    )


def evaluate_reconstruction(
    originals: Float[Tensor, "N C H W"],
    reconstructions: Float[Tensor, "_ _ _ _"],
    features: Features | None = None,
    *,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    title: str = "Reconstruction",
) -> Report:
    """Measures an autoencoder: PSNR, SSIM and, with features, the Frechet distance between
    originals and reconstructions.

    Both (N, C, H, W) in [0, 1], pair by pair. The floor of PSNR and SSIM is that of two *different*
    real images (each original beside the next), below which a reconstruction carries nothing; that
    of the Frechet distance is between two random halves of the originals.

    Errors: `UserError` for other shapes or ranges, `NumericalError` for NaN.
    """
    a, b = check_pair(originals, reconstructions)
    found, floor = (
        reconstruction(a, b),
        reconstruction(a, a.roll(1, dims=0)) if len(a) > 1 else None,
    )
    metrics: tuple[Metric, ...] = (
        Metric(
            "psnr",
            found.psnr,
            floor and floor.psnr,
            "higher",
            "dB, of the mean squared error over all images",
        ),
        Metric(
            "psnr_mean",
            found.psnr_mean,
            floor and floor.psnr_mean,
            "higher",
            "dB, mean of each image's own",
        ),
        Metric(
            "ssim", found.ssim, floor and floor.ssim, "higher", "11x11 Gaussian window, sigma 1.5"
        ),
    )
    if features is not None:
        if len(a) < 4:
            raise UserError(
                f"{len(a)} originals are too few for a Frechet distance: expected at least 4"
            )
        f_a, f_b = (
            extract(features, a, name="originals"),
            extract(features, b, name="reconstructions"),
        )
        order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
        first, second = (
            gaussian(f_a[rows], features.hash)
            for rows in (order[: len(a) // 2], order[len(a) // 2 :])
        )
        distance = frechet_distance(gaussian(f_b, features.hash), gaussian(f_a, features.hash))
        about = f"reconstructions against their originals, features {features.name}"
        metrics += (
            Metric(
                "reconstruction_frechet_distance",
                distance,
                frechet_distance(first, second),
                "lower",
                about,
            ),
        )
    pairs = Picture(
        "Reconstructions",
        "top: the original; below: its reconstruction",
        figures.side_by_side(a, b),
    )
    facts = {"reconstruction_n": len(a), **(settings or {})}
    data = {"originals": fingerprint(a), "reconstructions": fingerprint(b)}
    return Report(
        title, metrics, _describe(features) if features else {}, data, facts, (), (pairs,)
    )
