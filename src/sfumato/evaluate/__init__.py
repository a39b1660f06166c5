"""Evaluation: images in [0, 1] go in, a report comes out; no act of the library is imported.

    features = load_features("fashion")
    report = evaluate_samples(samples, labels, real_train, real_test, features)
    report = report.join(evaluate_reconstruction(originals, reconstructions, features))
    report.to_json("report.json"); report.to_html("report.html")

One metric a file: reconstruction (PSNR, SSIM), frechet, precision_recall (precision, recall,
density, coverage), memorisation, classes, throughput.
"""

from sfumato.evaluate.features import FeatureNetwork, Features, extract, load_features
from sfumato.evaluate.inputs import ImageSource
from sfumato.evaluate.report import Metric, Report
from sfumato.evaluate.run import evaluate_reconstruction, evaluate_samples
from sfumato.evaluate.throughput import measure_speed

__all__ = [
    "FeatureNetwork",
    "Features",
    "ImageSource",
    "Metric",
    "Report",
    "evaluate_reconstruction",
    "evaluate_samples",
    "extract",
    "load_features",
    "measure_speed",
]
