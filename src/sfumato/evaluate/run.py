"""From images to a report: `evaluate_samples` and `evaluate_reconstruction`.

    Frechet distance   m samples against *all* training images; floor: m held-out real images
                       against the same reference
    precision ...      m samples against m training images; floor: m held-out images against the
                       same m
    sanity             Frechet distances of noise and of flat colours (sanity.py)
    memorisation       samples' distances to the training set beside those of held-out images;
                       floor: one half of these beside the other
    classes            the requested label beside the classifier's guess; floor: the classifier on
                       held-out images

Training and held-out images are disjoint by the caller's split. A number that depends on the number
of images is compared at an equal one: m is the number of samples n or, where there are fewer, that
of the held-out images. The first m samples count then, the settings report m as `floor_n`, and the
Frechet distance of all n stands beside it without a floor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sfumato.errors import UserError
from sfumato.evaluate import figures
from sfumato.evaluate.classes import Classes, classes
from sfumato.evaluate.features import Features, check_fit, extract
from sfumato.evaluate.features import classify as classify_all
from sfumato.evaluate.figures import Figure
from sfumato.evaluate.frechet import GaussianStatistics, frechet_distance, gaussian
from sfumato.evaluate.inputs import (
    Images,
    ImageSource,
    check_images,
    check_labels,
    check_pair,
    choose,
    draw,
    fingerprint,
)
from sfumato.evaluate.memorisation import memorisation
from sfumato.evaluate.precision_recall import expected_coverage, manifold
from sfumato.evaluate.reconstruction import reconstruction
from sfumato.evaluate.report import Metric, Report, Rows
from sfumato.evaluate.sanity import COUNT, Sanity, sanity
from sfumato.evaluate.throughput import Speed

NEIGHBOURS = 3
"""Training images shown below a sample."""


def _describe(features: Features) -> dict[str, Any]:
    return {name: getattr(features, name) for name in ("name", "hash", "dim", "resize")}


def _metrics(
    values: object, floor: object | None, better: Literal["lower", "higher", "near"], **about: str
) -> tuple[Metric, ...]:
    """Metrics of the fields that `about` describes."""
    floors = {} if floor is None else vars(floor)
    return tuple(
        Metric(name, vars(values)[name], floors.get(name), better, text)
        for name, text in about.items()
    )


def _class_metrics(values: Classes, floor: Classes, names: tuple[str, ...]) -> tuple[Metric, Rows]:
    if values.accuracy is not None:
        about = "share of samples classified as what was asked for"
        metric = Metric("class_accuracy", values.accuracy, floor.accuracy, "higher", about)
    else:
        about = "largest deviation of a class's count from even, in %"
        metric = Metric("class_deviation", values.deviation, floor.deviation, "lower", about)
    nothing = (None,) * len(names)
    columns = ("class", "samples", "accuracy", "real images", "real accuracy")
    shares, real_shares = values.by_class or nothing, floor.by_class or nothing
    rows = zip(names, values.counts, shares, floor.counts, real_shares, strict=True)
    return metric, Rows("Classes", columns, tuple(rows))


@dataclass(frozen=True, eq=False)
class Reference:
    """Real images and their features: what samples are compared with.

    Attributes:
        train: The training images (M, C, H, W) in [0, 1].
        test: Real images (T, C, H, W) that are not in the training set.
        features: The feature network.
        train_features: (M, D).
        test_features: (T, D).
        statistics: Of the training images' features.
        k: Neighbours for precision, recall, density and coverage.
        seed: Of all random choices.
    """

    train: Tensor
    test: Tensor
    features: Features
    train_features: Tensor
    test_features: Tensor
    statistics: GaussianStatistics
    k: int
    seed: int

    def floor_rows(self, count: int) -> Int64[Tensor, " m"]:
        """Choose the held-out images that `count` samples are compared with: as many, or all."""
        return choose(len(self.test), min(count, len(self.test)), self.seed)

    @cached_property
    def sanity(self) -> Sanity:
        """Noise and flat colours beside as many held-out images, measured once."""
        rows, network = self.floor_rows(COUNT), self.features.hash
        floor = frechet_distance(gaussian(self.test_features[rows], network), self.statistics)
        return sanity(self.features, self.test[rows], self.statistics, floor, self.seed)


def prepare_reference(
    real_train: Float[Tensor, "M C H W"],
    real_test: Float[Tensor, "T C H W"],
    features: Features,
    *,
    k: int = 5,
    seed: int = 0,
) -> Reference:
    """Check real images and compute their features, once for several measurements.

    Args:
        real_train: The training images in [0, 1]: reference of the Frechet distance, source of
            nearest neighbours.
        real_test: Real images that are not in the training set: the floor.
        features: The network whose features are compared.
        k: Neighbours for precision, recall, density and coverage.
        seed: Of all random choices.

    Raises:
        UserError: For images outside [0, 1], too few of them, and images of another kind than the
            feature network's.
        NumericalError: For NaN.
    """
    train = check_images(real_train, "training images")
    test = check_images(real_test, "test images")
    if train.shape[1:] != test.shape[1:]:
        both = f"{tuple(train.shape[1:])} and test images {tuple(test.shape[1:])}"
        raise UserError(f"training images have shape {both}: expected equal channels and sides")
    if len(train) < k + 1 or len(test) < 2 * (k + 1):
        raise UserError(
            f"{len(train)} training and {len(test)} test images are too few: "
            f"expected at least k + 1 = {k + 1} training images, and {2 * (k + 1)} test images; "
            "hold out a larger share (--held-out 0.5; in training --data.held-out 0.5), raise "
            "--limit, or give more data"
        )
    check_fit(features, train.shape[1], max(train.shape[2:]))
    f_train, f_test = extract(features, train), extract(features, test)
    statistics = gaussian(f_train, features.hash)
    return Reference(train, test, features, f_train, f_test, statistics, k, seed)


def evaluate_samples(
    samples: ImageSource,
    labels: Int64[Tensor, " N"] | None,
    reference: Reference,
    *,
    train_labels: Int64[Tensor, " M"] | None = None,
    test_labels: Int64[Tensor, " T"] | None = None,
    n: int | None = None,
    batch: int = 100,
    settings: Mapping[str, Any] | None = None,
    speed: Speed | None = None,
    title: str = "Samples",
) -> Report:
    """Measure samples against real images.

    Args:
        samples: (N, C, H, W) in [0, 1], or a function `(n, batch, seed) -> images`, which needs
            `n`.
        labels: The requested class of each sample; None for unconditional samples, whose classes
            are only counted.
        reference: The real images, of `prepare_reference`.
        train_labels: Classes of the training images, for the figure.
        test_labels: Classes of the held-out images, for the classifier's own accuracy.
        n: Number of samples; None: all.
        batch: Samples that the function makes at a time.
        settings: Entries of the report's settings: steps, sampler, guidance.
        speed: The measured speed of sampling, for the report.
        title: Of the report.

    Raises:
        UserError: For images outside [0, 1], different sizes, or fewer than k + 1 samples.
        NumericalError: For NaN.
    """
    train, test, features = reference.train, reference.test, reference.features
    k, seed = reference.k, reference.seed
    shown = draw(samples, n, batch, seed)
    if train.shape[1:] != shown.shape[1:]:
        both = f"{tuple(shown.shape[1:])} and training images {tuple(train.shape[1:])}"
        raise UserError(f"samples have shape {both}: expected equal channels and sides")
    count = len(shown)
    if count < k + 1:
        raise UserError(f"{count} samples are too few: expected at least k + 1 = {k + 1}")
    floor_rows = reference.floor_rows(count)
    equal = len(floor_rows)

    f_samples = extract(features, shown)
    f_train, f_test = reference.train_features, reference.test_features
    f_floor = f_test[floor_rows]
    f_near = f_train[choose(len(train), min(equal, len(train)), seed)]
    distance, floor_distance = (
        frechet_distance(gaussian(f, features.hash), reference.statistics)
        for f in (f_samples[:equal], f_floor)
    )
    near, near_floor = manifold(f_near, f_samples[:equal], k), manifold(f_near, f_floor, k)
    expected = expected_coverage(near.real_count, near.sample_count, near.k)
    copies = memorisation(f_samples, f_train, f_test, min(NEIGHBOURS, len(f_train)))
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    half = len(test) // 2
    copies_floor = memorisation(f_test[order[:half]], f_train, f_test[order[half:]])
    about = f"{equal} samples, {len(train)} real images, features {features.name}"
    metrics = (Metric("frechet_distance", distance, floor_distance, "lower", about),)
    if count > equal:
        every = frechet_distance(gaussian(f_samples, features.hash), reference.statistics)
        about = f"all {count} samples; {equal} held-out images give no floor for so many"
        metrics += (Metric("frechet_distance_all", every, None, "lower", about),)
    worthless = reference.sanity
    metrics += (
        *_metrics(
            near,
            near_floor,
            "higher",
            precision=f"share of samples among real images, k={k}",
            recall=f"share of real images among samples, k={k}",
            density="mean number of real balls around a sample, over k; 1 expected",
            coverage=f"share of real images with a sample near; {expected:.4f} expected",
        ),
        Metric(
            "memorisation_ratio",
            copies.ratio,
            copies_floor.ratio,
            "near",
            "median distance to the training set over that of held-out images; 1 expected",
        ),
        Metric(
            "memorisation_share",
            copies.closer_share,
            copies_floor.closer_share,
            "near",
            "share of samples nearer to it than 99 % of held-out images; 0.01 expected",
        ),
    )
    for name, kind in (("noise", "images of noise"), ("flat", "flat colours")):
        about = f"of the features: Frechet distance of {worthless.count} {kind}"
        value = getattr(worthless, name)
        metrics += (Metric(f"sanity_{name}", value, worthless.floor, "higher", about),)
    tables: tuple[Rows, ...] = ()
    guesses: Tensor | None = None
    if features.class_names:
        logits, kinds = classify_all(features, shown), len(features.class_names)
        guesses = logits.argmax(dim=1)
        requested = None if labels is None else check_labels(labels[:count], count, kinds)
        real = None
        if test_labels is not None:
            real = check_labels(test_labels, len(test), kinds)[floor_rows]
        floor = classes(classify_all(features, test[floor_rows]), real)
        metric, table = _class_metrics(classes(logits, requested), floor, features.class_names)
        metrics, tables = (*metrics, metric), (table,)
    if speed is not None:
        about = f"median of {speed.calls} calls of {speed.images} images"
        metrics += (Metric("seconds_per_image", speed.seconds_per_image, None, "lower", about),)

    rows = guesses if labels is None else labels[:count]
    suspects = copies.distances[:, 0].argsort(stable=True)[:12]
    images = (
        Figure("Samples", _arrangement(labels, guesses), figures.by_class(shown, rows)),
        Figure("Real images", "from the training set", figures.by_class(train, train_labels)),
        Figure(
            "The samples nearest to the training set",
            "top: the sample; below: its nearest training images",
            figures.neighbours(shown, train, copies.indices, suspects),
        ),
    )
    facts = {"n": count, "seed": seed, "k": k, "floor_n": equal, **(settings or {})}
    data = {"samples": fingerprint(shown), "train": fingerprint(train), "test": fingerprint(test)}
    return Report(title, metrics, _describe(features), data, facts, tables, images)


def _arrangement(labels: Tensor | None, guesses: Tensor | None) -> str:
    if labels is not None:
        return "one row a class that was asked for"
    return "the first" if guesses is None else "one row a class, by the classifier"


def evaluate_reconstruction(
    originals: Images,
    reconstructions: Float[Tensor, "_ _ _ _"],
    features: Features | None = None,
    *,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    title: str = "Reconstruction",
) -> Report:
    """Measure an autoencoder: PSNR, SSIM and, with features, the Frechet distance.

    The floor of PSNR and SSIM is that of two *different* real images (each original beside the
    next), below which a reconstruction carries nothing. That of the Frechet distance is between two
    random halves of the originals.

    Args:
        originals: (N, C, H, W) in [0, 1].
        reconstructions: As many, pair by pair.
        features: The network whose features are compared; None: no Frechet distance.
        seed: Of the two halves.
        settings: Entries of the report's settings.
        title: Of the report.

    Raises:
        UserError: For other shapes or ranges, and fewer than 4 images with features.
        NumericalError: For NaN.
    """
    a, b = check_pair(originals, reconstructions)
    metrics = _metrics(
        reconstruction(a, b),
        reconstruction(a, a.roll(1, dims=0)) if len(a) > 1 else None,
        "higher",
        psnr="dB, of the mean squared error over all images",
        psnr_mean="dB, mean of each image's own",
        ssim="11x11 Gaussian window, sigma 1.5",
    )
    if features is not None:
        if len(a) < 4:
            few = f"{len(a)} originals are too few for a Frechet distance"
            raise UserError(f"{few}: expected at least 4")
        f_a = extract(features, a, name="originals")
        f_b = extract(features, b, name="reconstructions")
        order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
        real, rebuilt, first, second = (
            gaussian(f, features.hash)
            for f in (f_a, f_b, f_a[order[: len(a) // 2]], f_a[order[len(a) // 2 :]])
        )
        distance, floor = frechet_distance(rebuilt, real), frechet_distance(first, second)
        name = "reconstruction_frechet_distance"
        about = f"reconstructions against their originals, features {features.name}"
        metrics += (Metric(name, distance, floor, "lower", about),)
    pairs = Figure(
        "Reconstructions",
        "top: the original; below: its reconstruction",
        figures.side_by_side(a, b),
    )
    facts = {"reconstruction_n": len(a), **(settings or {})}
    data = {"originals": fingerprint(a), "reconstructions": fingerprint(b)}
    network = _describe(features) if features else {}
    return Report(title, metrics, network, data, facts, (), (pairs,))
