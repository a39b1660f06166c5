"""Metrics against closed forms, published expectations and an independent implementation."""

import base64
import io
import json
import math
import re
import statistics
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers.tensors import normal, uniform
from sfumato.errors import NumericalError, UserError
from sfumato.evaluate import (
    Features,
    check_fit,
    choose_features,
    evaluate_reconstruction,
    evaluate_samples,
    load_features,
    measure_speed,
    prepare_reference,
    sanity,
)
from sfumato.evaluate.classes import classes, deviation_from_even
from sfumato.evaluate.frechet import (
    GaussianStatistics,
    frechet_distance,
    gaussian,
    gaussian_of_batches,
    load_statistics,
    save_statistics,
)
from sfumato.evaluate.memorisation import memorisation
from sfumato.evaluate.precision_recall import expected_coverage, manifold, nearest
from sfumato.evaluate.reconstruction import psnr, psnr_mean, reconstruction, ssim

noise = partial(normal, dtype=torch.float64)


# Frechet distance


def made(mean: Tensor, cov: Tensor) -> GaussianStatistics:
    return GaussianStatistics(1000, mean.double(), cov.double())


def test_frechet_of_commuting_covariances() -> None:
    rotation = torch.linalg.qr(noise(6, 6))[0]
    a, b = uniform(6, seed=1).double() + 0.1, uniform(6, seed=2).double() * 4
    shift = noise(6, seed=3)
    result = frechet_distance(
        made(torch.zeros(6), rotation @ a.diag() @ rotation.T),
        made(shift, rotation @ b.diag() @ rotation.T),
    )
    assert result == pytest.approx(
        float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()), rel=1e-12
    )


def test_frechet_of_two_by_two_covariances_that_do_not_commute() -> None:
    """For 2x2, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), with M similar to S1 S2."""
    a, b = (
        torch.tensor([[2.0, 0.7], [0.7, 1.0]]).double(),
        torch.tensor([[0.5, -0.3], [-0.3, 3.0]]).double(),
    )
    product = a @ b
    root = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(product.det())))
    mean = torch.tensor([1.0, -2.0])
    expected = 5.0 + float(a.trace() + b.trace()) - 2 * root
    assert frechet_distance(made(mean, a), made(torch.zeros(2), b)) == pytest.approx(
        expected, rel=1e-12
    )


def test_frechet_against_eigenvalues_of_the_product() -> None:
    """The published form, tr (S1 S2)^(1/2), through the eigenvalues of the non-symmetric
    product.
    """
    a, b = (
        gaussian(noise(300, 20)),
        gaussian(noise(300, 20, seed=1) @ (torch.eye(20) + 0.3 * noise(20, 20, seed=2))),
    )
    root = torch.linalg.eigvals(a.cov @ b.cov).real.clamp(min=0).sqrt().sum()
    expected = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


@pytest.mark.parametrize("count", [400, 10])
def test_frechet_of_a_set_with_itself_is_zero_even_with_fewer_images_than_features(
    count: int,
) -> None:
    x = noise(count, 50)
    assert frechet_distance(gaussian(x), gaussian(x)) < 1e-10
    shuffled = x[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    assert frechet_distance(gaussian(x), gaussian(shuffled)) < 1e-10
    assert frechet_distance(gaussian(x), gaussian(x + 1)) == pytest.approx(50, rel=1e-9)


def test_frechet_of_samples_approaches_the_closed_form() -> None:
    a, b = noise(40000, 4), 2 * noise(40000, 4, seed=1) + 1
    assert frechet_distance(gaussian(a), gaussian(b)) == pytest.approx(4 + 4, rel=0.02)


@pytest.mark.parametrize("sizes", [(100,), (30, 30, 40), (1, 98, 1), (99, 1)])
def test_streamed_statistics_are_those_of_the_whole(sizes: tuple[int, ...]) -> None:
    x = noise(100, 5) + 1e4
    whole, streamed = gaussian(x), gaussian_of_batches(x.split(list(sizes)))
    torch.testing.assert_close(streamed.cov, whole.cov, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(streamed.mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(whole.cov, x.T.cov(), rtol=1e-9, atol=1e-9)
    assert streamed.count == 100


def test_statistics_file_is_exact_and_guards_its_hashes(tmp_path) -> None:
    saved = gaussian(noise(50, 4), network="n1", data="d1")
    save_statistics(tmp_path / "s.safetensors", saved)
    back = load_statistics(tmp_path / "s.safetensors", features="n1", data="d1")
    assert (
        torch.equal(back.mean, saved.mean) and torch.equal(back.cov, saved.cov) and back.count == 50
    )
    with pytest.raises(UserError, match="other features"):
        load_statistics(tmp_path / "s.safetensors", features="n2")
    with pytest.raises(UserError, match="different feature networks"):
        frechet_distance(back, replace(back, features="n2"))


# Precision, recall, density, coverage


def test_manifold_of_points_on_a_line() -> None:
    """Real 0, 1, 2, 3 and 10 with k = 1: radii 1, 1, 1, 1, 7.

    Samples 0.5, 2.5, 20, 21: radii 2, 2, 1, 1.
    """
    real = torch.tensor([0.0, 1, 2, 3, 10])[:, None]
    samples = torch.tensor([0.5, 2.5, 20, 21])[:, None]
    result = manifold(real, samples, k=1)
    assert result.precision == 0.5  # 20 and 21 lie in no real ball (10 reaches 17)
    assert result.recall == 0.8  # 10 lies in no sample's ball
    assert result.density == (2 + 2 + 0 + 0) / 4  # 2.5 lies 7.5 from 10, whose ball reaches 3
    assert result.coverage == 0.8


def test_manifold_for_equal_distributions_has_the_published_expectations() -> None:
    runs = [
        manifold(noise(300, 8, seed=2 * s), noise(300, 8, seed=2 * s + 1), k=5) for s in range(8)
    ]
    expected = expected_coverage(300, 300, 5)
    assert expected == pytest.approx(1 - math.prod((300 - i) / (600 - i) for i in range(1, 6)))
    assert expected == pytest.approx(1 - 0.5**5, abs=2e-3)
    assert statistics.mean(r.coverage for r in runs) == pytest.approx(expected, abs=0.01)
    assert statistics.mean(r.density for r in runs) == pytest.approx(1, abs=0.05)


def test_dropped_modes_cost_recall_and_coverage_and_not_precision() -> None:
    def modes(count: int, seed: int) -> Tensor:
        return noise(400, 4, seed=seed) + 100 * torch.arange(400)[:, None].remainder(count)

    whole, half = manifold(modes(4, 0), modes(4, 1)), manifold(modes(4, 0), modes(2, 1))
    assert half.precision > 0.85 and whole.recall > 0.85
    assert half.recall == pytest.approx(whole.recall / 2, abs=0.05)
    assert half.coverage < 0.51 < 0.9 < whole.coverage


def test_manifold_ignores_order_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, samples = noise(150, 6), noise(120, 6, seed=1)
    result = manifold(real, samples)
    assert (
        manifold(
            real.flip(0), samples[torch.randperm(120, generator=torch.Generator().manual_seed(3))]
        )
        == result
    )
    monkeypatch.setattr("sfumato.evaluate.precision_recall.ENTRIES", 700)
    assert manifold(real, samples) == result


def test_one_outlier_inflates_recall_and_not_coverage() -> None:
    """Naeem et al., Figure 1: one odd sample makes a huge sample ball, which takes in the half of
    the real images that faces it.
    """
    real = noise(200, 4)
    samples = 1e-3 * noise(100, 4, seed=1)
    collapsed = manifold(real, samples)
    samples[-1] += 1e3
    result = manifold(real, samples)
    assert collapsed.recall < 0.02 < 0.4 < result.recall
    assert collapsed.coverage == result.coverage < 0.2


def test_nearest_against_cdist_and_exact_for_duplicates() -> None:
    a, b = noise(60, 9), noise(80, 9, seed=1)
    indices, distances = nearest(a, b, 4)
    values, rows = torch.cdist(a, b).topk(4, largest=False)
    assert torch.equal(indices, rows)
    torch.testing.assert_close(distances, values)
    assert nearest(b[5:6] + 0, b, 1)[1].item() == 0
    own = nearest(torch.cat([b, b]), torch.cat([b, b]), 1, same=True)
    assert torch.equal(own[0][:, 0], torch.arange(160).roll(80)) and own[1].abs().max() == 0


# Memorisation


def test_memorisation_distinguishes_copies_from_fresh_draws() -> None:
    train, held_out = noise(2000, 6), noise(1000, 6, seed=1)
    honest = memorisation(noise(1000, 6, seed=2), train, held_out)
    assert honest.ratio == pytest.approx(1, abs=0.06) and honest.closer_share < 0.03
    rows = torch.arange(500) * 3
    copied = memorisation(train[rows] + 1e-4 * noise(500, 6, seed=3), train, held_out)
    assert copied.ratio < 0.01 and copied.closer_share == 1
    assert torch.equal(copied.indices[:, 0], rows)
    same = memorisation(held_out, train, held_out)
    assert same.ratio == 1 and same.closer_share == 0.01


# Reconstruction


def test_psnr_of_a_constant_offset() -> None:
    a = torch.full((3, 1, 16, 16), 0.25)
    assert psnr(a, a + 0.125) == pytest.approx(-20 * math.log10(0.125), rel=1e-12)
    assert psnr(a, a) == math.inf


def test_psnr_of_the_mean_error_and_mean_psnr() -> None:
    a = torch.zeros(2, 1, 12, 12)
    b = torch.stack([torch.full((1, 12, 12), 0.5), torch.full((1, 12, 12), 0.0625)])
    assert psnr(a, b) == pytest.approx(-10 * math.log10((0.25 + 0.0625**2) / 2))
    assert psnr_mean(a, b) == pytest.approx(-10 * (math.log10(0.25) + math.log10(0.0625**2)) / 2)
    assert psnr_mean(a, b) > psnr(a, b)
    assert (
        psnr_mean(torch.cat([a, a]), torch.cat([b, a]))
        == math.inf
        > psnr(torch.cat([a, a]), torch.cat([b, a]))
    )


@pytest.mark.parametrize("shape", [(4, 3, 32, 40), (5, 1, 28, 28)])
def test_ssim_against_torchmetrics(shape: tuple[int, ...]) -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    smooth = torch.nn.functional.avg_pool2d(uniform(*shape), 5, 1, 2)
    other = (smooth + 0.1 * noise(*shape, seed=1).float()).clamp(0, 1)
    _, everywhere = structural_similarity_index_measure(
        other.double(), smooth.double(), data_range=1.0, return_full_image=True
    )
    assert isinstance(everywhere, Tensor)
    # torchmetrics reflects the image beyond its border; Wang et al. do not
    inside = everywhere[..., 5:-5, 5:-5].mean()
    assert ssim(smooth, other) == pytest.approx(float(inside), abs=1e-9)
    assert ssim(smooth, smooth) == pytest.approx(1, abs=1e-12)


def test_ssim_of_constants_is_the_luminance_term() -> None:
    a, b, c1 = 0.25, 0.5, 0.01**2
    result = ssim(torch.full((1, 1, 11, 11), a), torch.full((1, 1, 11, 11), b))
    assert result == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), rel=1e-9)


# Classes and speed


def test_classes_counts_and_accuracy() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 1, 2]), 4).float()
    result = classes(logits, torch.tensor([0, 1, 1, 1, 0, 2]))
    assert result.accuracy == pytest.approx(4 / 6)
    assert result.by_class == pytest.approx((0.5, 2 / 3, 1.0, None))
    assert result.counts == (2, 3, 1, 0)
    assert result.deviation == pytest.approx(100)  # 3 and 0 where 1.5 would be even
    assert deviation_from_even(torch.tensor([5, 5, 5])) == 0
    assert deviation_from_even(torch.tensor([0, 0, 9])) == pytest.approx(200)


def test_speed_is_the_median_after_the_warm_up() -> None:
    times = iter([0.0, 1.0, 10.0, 19.0, 20.0, 22.0])
    calls: list[int] = []
    result = measure_speed(
        lambda: calls.append(0), images=4, calls=3, warmup=2, clock=lambda: next(times)
    )
    assert (result.seconds_per_call, result.seconds_per_image, result.fastest_call, len(calls)) == (
        2.0,
        0.5,
        1.0,
        5,
    )


# Reports


def toy_features() -> Features:
    """Eight block means as features; their order as classes."""

    def blocks(images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(
            images.mean(1, keepdim=True), (2, 4)
        ).flatten(1)

    return Features("toy", "0" * 64, 8, "none", blocks, blocks, tuple("abcdefgh"))


def report_parts(**changes):
    arguments = {
        "samples": uniform(40, 3, 16, 16, seed=1),
        "labels": torch.arange(40) % 8,
        "n": None,
        **changes,
    }
    samples, labels = arguments.pop("samples"), arguments.pop("labels")
    train, test = uniform(90, 3, 16, 16, seed=2), uniform(60, 3, 16, 16, seed=3)
    seed = arguments.pop("seed", 0)
    reference = prepare_reference(train, test, toy_features(), seed=seed)
    fixed = {"test_labels": torch.arange(60) % 8, "settings": {"steps": 4}}
    return evaluate_samples(samples, labels, reference, **fixed, **arguments)


def test_report_is_the_same_to_the_last_digit() -> None:
    a, b = uniform(20, 1, 16, 16), uniform(20, 1, 16, 16, seed=9)
    texts = [
        report_parts().join(evaluate_reconstruction(a, b, toy_features())).to_json()
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    result = json.loads(texts[0])
    names = (
        "frechet_distance precision recall density coverage memorisation_ratio "
        "memorisation_share class_accuracy psnr psnr_mean ssim sanity_noise sanity_flat"
    )
    assert {*names.split(), "reconstruction_frechet_distance"} == set(result["metrics"])
    assert all(isinstance(m["floor"], float) for m in result["metrics"].values())
    assert result["settings"] == {
        "n": 40,
        "floor_n": 40,
        "seed": 0,
        "k": 5,
        "steps": 4,
        "reconstruction_n": 20,
    }
    assert result["features"]["hash"] == "0" * 64 and set(result["data"]) == {
        "samples",
        "train",
        "test",
        "originals",
        "reconstructions",
    }
    assert report_parts(seed=1).to_json() != report_parts().to_json()


def test_samples_from_the_held_out_images_score_the_floor() -> None:
    test = uniform(60, 3, 16, 16, seed=3)
    report = report_parts(samples=test, labels=torch.arange(60) % 8)
    for name in (
        "frechet_distance",
        "precision",
        "recall",
        "density",
        "coverage",
        "class_accuracy",
    ):
        assert report[name].value == pytest.approx(report[name].floor), name
    assert report["memorisation_ratio"].value == 1


def test_samples_from_a_function_and_the_order_of_samples() -> None:
    def make(n: int, batch: int, seed: int) -> Tensor:
        assert (n, batch, seed) == (40, 100, 0)
        return uniform(40, 3, 16, 16, seed=1)

    expected = report_parts()
    assert report_parts(samples=make, n=40).to_json() == expected.to_json()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    moved = report_parts(
        samples=uniform(40, 3, 16, 16, seed=1)[order], labels=(torch.arange(40) % 8)[order]
    )
    for metric in expected.metrics:
        assert moved[metric.name].value == pytest.approx(metric.value, rel=1e-9), metric.name


def test_unconditional_samples_are_counted() -> None:
    report = report_parts(labels=None)
    assert "class_deviation" in {m.name for m in report.metrics} and "class_accuracy" not in {
        m.name for m in report.metrics
    }
    assert sum(row[1] for row in report.tables[0].rows) == 40


def test_page_is_one_file_with_pictures_that_decode(tmp_path) -> None:
    from rich.console import Console

    report = replace(report_parts(), title="a <b> & c")
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<title>a &lt;b&gt; &amp; c</title>" in page
    assert not re.search(r"(src|href)=(?!['\"]?data:)", page)
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(images) == 3
    for data in images:
        assert Image.open(io.BytesIO(base64.b64decode(data))).size[0] > 100
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(report)
    assert "frechet_distance" in console.export_text()


def test_neighbour_picture_shows_the_copied_image() -> None:
    train, test = uniform(90, 1, 16, 16, seed=2), uniform(60, 1, 16, 16, seed=3)
    samples = uniform(30, 1, 16, 16, seed=4)
    samples[7] = train[33]
    report = evaluate_samples(samples, None, prepare_reference(train, test, toy_features()))
    picture = torch.from_numpy(np.array(Image.open(io.BytesIO(report.figures[2].png))))
    # a copy is the nearest, so it comes first
    assert torch.equal(picture[:64, :64], picture[66:130, :64])
    expected = (
        (train[33, 0] * 255).round().to(torch.uint8).repeat_interleave(4, 0).repeat_interleave(4, 1)
    )
    assert torch.equal(picture[:64, :64, 0], expected)


def test_value_and_floor_are_of_equal_counts() -> None:
    """More samples than held-out images: the first ones count, and all stand beside them."""
    many = uniform(100, 3, 16, 16, seed=1)
    report, equal = (
        report_parts(samples=many, labels=None),
        report_parts(samples=many[:60], labels=None),
    )
    for name in ("frechet_distance", "precision", "recall", "density", "coverage"):
        assert report[name].value == equal[name].value and report[name].floor == equal[name].floor
    assert report.settings["n"] == 100 and report.settings["floor_n"] == 60
    every = report["frechet_distance_all"]
    # of one distribution: the distance falls as the number of samples grows
    assert every.floor is None and every.value < report["frechet_distance"].value
    assert "frechet_distance_all" not in {metric.name for metric in equal.metrics}


# Features that fit, and their sanity


def photographs(count: int, seed: int) -> Tensor:
    """Smooth random images: large shapes of different brightness."""
    coarse = uniform(count, 3, 4, 4, seed=seed)
    return torch.nn.functional.interpolate(coarse, size=16, mode="bilinear", align_corners=True)


def means_of_images() -> Features:
    """One mean a channel: features that cannot tell an image from a flat colour."""
    return Features("means", "1" * 64, 3, "none", lambda images: images.mean((2, 3)))


def test_worthless_images_are_far_from_real_ones_in_features_that_count() -> None:
    train, test = photographs(90, 1), photographs(60, 2)
    reference = prepare_reference(train, test, toy_features())
    good = reference.sanity
    assert good.separates and good.count == 60
    good.require("toy")
    report = evaluate_samples(photographs(60, 3), None, reference)
    assert report["sanity_flat"].value == good.flat > 2 * report["sanity_flat"].floor
    blind = prepare_reference(train, test, means_of_images()).sanity
    assert blind.flat == pytest.approx(blind.floor, rel=1e-3) and not blind.separates
    with pytest.raises(
        UserError, match="features 'means' with 60 images do not tell worthless images from real"
    ):
        blind.require("means")


def test_sanity_of_flat_colours_in_closed_form() -> None:
    """For the mean of each channel, flat colours of real images are these real images."""
    test = photographs(50, 2)
    reference = prepare_reference(photographs(90, 1), test, means_of_images())
    floor = frechet_distance(gaussian(test.mean((2, 3)), "1" * 64), reference.statistics)
    result = sanity(reference.features, test, reference.statistics, floor)
    assert result.flat == pytest.approx(floor, rel=1e-4)
    assert result.noise > 10 * floor  # its means are all 1/2


@pytest.mark.parametrize(
    ("channels", "side", "classes", "spec"),
    [
        (1, 28, ("bag", "fashion"), "efficientnet-lite0"),
        (3, 28, (), "efficientnet-lite0"),
        (1, 256, (), "efficientnet-lite0"),
        (3, 512, (), "efficientnet-lite0"),
    ],
)
def test_features_are_chosen_by_the_images(
    channels: int, side: int, classes: tuple[str, ...], spec: str
) -> None:
    assert choose_features(channels, side, classes) == spec


def test_features_of_other_images_are_refused() -> None:
    fashion = load_features("fashion")
    assert choose_features(1, 28, fashion.class_names[::-1]) == "fashion"
    check_fit(fashion, 1, 28, fashion.class_names)
    check_fit(fashion, 1, 32)
    for kind, words in (
        ((3, 28), "are of grey images, and these have 3 channels"),
        ((1, 64), "are of images of 28 pixels, and these have 64"),
        ((1, 28, ("zero", "one")), "are of the classes .*, and these images are of zero, one"),
    ):
        with pytest.raises(UserError, match=f"features 'fashion' {words}.*'efficientnet-lite0'"):
            check_fit(fashion, *kind)
    with pytest.raises(UserError, match="grey images, and these have 3 channels"):
        prepare_reference(uniform(20, 3, 28, 28), uniform(20, 3, 28, 28), fashion)


# Refusals: one sentence each


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x: x.index_fill(0, torch.tensor([3]), float("nan")), NumericalError, "1 of 40"),
        (lambda x: 2 * x - 1, UserError, r"expected \[0, 1\]"),
        (lambda x: 255 * x, UserError, r"expected \[0, 1\]"),
        (lambda x: (255 * x).byte(), UserError, "divide bytes by 255"),
        (lambda x: x[:5], UserError, "5 samples"),
        (lambda x: x[..., :8], UserError, "equal channels and sides"),
        (lambda x: x[0], UserError, r"expected \(N, C, H, W\)"),
        (lambda x: x[:0], UserError, "at least one image"),
    ],
)
def test_bad_samples_are_refused(change, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        report_parts(samples=change(uniform(40, 3, 16, 16, seed=1)), labels=None)
    assert "\n" not in str(caught.value)


def test_rounding_outside_the_range_is_allowed() -> None:
    samples = uniform(40, 3, 16, 16, seed=1)
    report_parts(samples=samples + 5e-4)
    with pytest.raises(UserError):
        report_parts(samples=samples + 0.01)


def test_other_refusals() -> None:
    a = uniform(3, 1, 16, 16)
    with pytest.raises(UserError, match="same shape"):
        reconstruction(a, a[:2])
    with pytest.raises(UserError, match="too small for SSIM"):
        ssim(a[..., :8], a[..., :8])
    with pytest.raises(UserError, match="at least 6 rows"):
        manifold(noise(5, 2), noise(50, 2))
    with pytest.raises(
        UserError, match="k=0: expected a whole number of nearest neighbours, at least 1"
    ):
        manifold(noise(50, 2), noise(50, 2), k=0)
    with pytest.raises(NumericalError, match="not finite"):
        gaussian(noise(5, 2) * float("inf"))
    with pytest.raises(UserError, match="expected 40 integers"):
        report_parts(labels=torch.zeros(39, dtype=torch.long))
    with pytest.raises(UserError, match="expected 0 to 7"):
        report_parts(labels=torch.full((40,), 8))
    with pytest.raises(UserError, match="n=None: expected a whole number of images, at least 1"):
        report_parts(samples=lambda n, batch, seed: uniform(n, 3, 16, 16))
