"""Evaluation: images in [0, 1] in, a report out; no act of the library is imported.

    features = load_features("fashion")
    reference = prepare_reference(real_train, real_test, features)
    report = evaluate_samples(samples, labels, reference)
    report = report.join(evaluate_reconstruction(originals, reconstructions, features))
    report.to_json("report.json"); report.to_html("report.html")

One metric a file: reconstruction (PSNR, SSIM), frechet, precision_recall (precision, recall,
density, coverage), memorisation, classes, sanity, throughput.
"""

from sfumato.evaluate.classes import Classes, classes
from sfumato.evaluate.features import (
    FeatureNetwork,
    Features,
    check_fit,
    choose_features,
    classify,
    extract,
    load_features,
)
from sfumato.evaluate.frechet import (
    GaussianStatistics,
    frechet_distance,
    gaussian,
    gaussian_of_batches,
    load_statistics,
    save_statistics,
)
from sfumato.evaluate.inputs import ImageSource
from sfumato.evaluate.memorisation import Memorisation, memorisation
from sfumato.evaluate.precision_recall import Manifold, expected_coverage, manifold, nearest
from sfumato.evaluate.reconstruction import Reconstruction, psnr, psnr_mean, reconstruction, ssim
from sfumato.evaluate.report import Metric, Report
from sfumato.evaluate.run import (
    Reference,
    evaluate_reconstruction,
    evaluate_samples,
    prepare_reference,
)
from sfumato.evaluate.sanity import Sanity, sanity
from sfumato.evaluate.throughput import Speed, measure_speed

__all__ = [
    "Classes",
    "FeatureNetwork",
    "Features",
    "GaussianStatistics",
    "ImageSource",
    "Manifold",
    "Memorisation",
    "Metric",
    "Reconstruction",
    "Reference",
    "Report",
    "Sanity",
    "Speed",
    "check_fit",
    "choose_features",
    "classes",
    "classify",
    "evaluate_reconstruction",
    "evaluate_samples",
    "expected_coverage",
    "extract",
    "frechet_distance",
    "gaussian",
    "gaussian_of_batches",
    "load_features",
    "load_statistics",
    "manifold",
    "measure_speed",
    "memorisation",
    "nearest",
    "prepare_reference",
    "psnr",
    "psnr_mean",
    "reconstruction",
    "sanity",
    "save_statistics",
    "ssim",
]
