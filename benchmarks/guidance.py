"""Fixed against time-varying guidance on the bundled model: quality, distance from the fixed one's
pictures, network calls.

    python benchmarks/guidance.py [--samples 2000] [--settings quick|all|"TEXT; TEXT; ..."] [--steps
    20] [--sampler ddim] [--spacing trailing]

Every setting draws the same classes from the same seeds. Frechet distance, precision, recall,
density, coverage and class accuracy are those of `sfumato evaluate` (features of the bundled
classifier; the 60,000 training images as reference); the first row is real test images. PSNR and
SSIM are to the pictures of the first setting, the fixed weight: how much of it a cheaper or a
varying weight keeps. Network calls are rows of forward passes an image. A setting may name its own
sampler, spacing and steps: "1.25 @ dpmpp_2m @ karras @ 10". The last column is the distance of a
second set of seeds, of `--second` samples: what differs by as much is chance.
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from _common import all_pixels, print_header, print_row
from sfumato.data import open_images
from sfumato.evaluate import (
    classes,
    classify,
    extract,
    frechet_distance,
    gaussian,
    load_features,
    manifold,
    psnr,
    ssim,
)
from sfumato.evaluate.inputs import choose
from sfumato.loading import load

FIXED = ["1.25", "1", "1.5"]
VARYING = [
    "1.25 interval:low=0.1,high=0.9",
    "1.5 interval:low=0.2,high=0.8",
    "1.5 interval:low=0.0,high=0.6",
    "1.5 interval:low=0.4,high=1.0",
    "1.25 ramp:first=0,last=2",
    "1.25 ramp:first=2,last=0",
    "1.5 adaptive",
    "2 adaptive",
    "1.5 adaptive:disagreement=raises",
]
SHARES = ("precision", "recall", "density", "coverage")
OTHERS = ["1.25 project", "0.6 plus_plus", "1.25 @ dpmpp_2m", "1.25 @ dpmpp_2m_sde"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--settings", default="all")
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--spacing", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--second",
        type=int,
        default=0,
        help="samples of a second set of seeds, whose distance shows the chance in it",
    )
    options = parser.parse_args()
    groups = {"quick": [FIXED[0], VARYING[1]], "all": FIXED + VARYING + OTHERS}
    lines = groups.get(options.settings) or [text.strip() for text in options.settings.split(";")]

    model, features = load(options.model), load_features("fashion")
    images = {
        split: (all_pixels(open_images("fashion-mnist", split=split, size=28, channels=1)) + 1) / 2
        for split in ("train", "test")
    }
    f_train, f_test = (extract(features, images[split]) for split in ("train", "test"))
    reference = gaussian(f_train, features.hash)
    near = f_train[choose(len(f_train), options.samples, 0)]
    floor = f_test[choose(len(f_test), options.samples, 0)]
    passes = [0]
    model.denoiser.network.register_forward_hook(
        lambda module, inputs, y: passes.__setitem__(0, passes[0] + len(y))
    )

    def draw(text: str, count: int, seed: int) -> Tensor:
        parts = []
        for start in range(0, count, 250):
            size = min(250, count - start)
            words = [model.class_names[(start + k) % len(model.class_names)] for k in range(size)]
            parts.append(
                model.generate(
                    words, seed=seed + start, output="tensor", **settings_of(text, options)
                )[:, :1]
            )
        return torch.cat(parts)

    print(
        f"{options.samples} samples, {options.sampler}, {options.steps} steps, "
        f"{options.spacing or 'default spacing'}, seed {options.seed}\n"
    )
    print_header(
        "guidance",
        "Frechet distance",
        *SHARES,
        "class accuracy",
        "PSNR",
        "SSIM",
        "calls",
        "seconds",
        "second set",
    )
    result = manifold(near, floor, 5)
    print_row(
        "real images",
        f"{frechet_distance(gaussian(floor, features.hash), reference):.3f}",
        *shares(result),
        *[""] * 6,
    )
    first: Tensor | None = None
    for text in lines:
        passes[0], begin = 0, time.perf_counter()
        samples = draw(text, options.samples, options.seed)
        seconds, calls = time.perf_counter() - begin, passes[0] / options.samples
        first = samples if first is None else first
        f = extract(features, samples)
        labels = torch.tensor(
            [features.class_names.index(model.class_names[k % 10]) for k in range(options.samples)]
        )
        accuracy = classes(classify(features, samples), labels).accuracy
        moved = (
            ("", "")
            if samples is first
            else (f"{psnr(first, samples):.2f}", f"{ssim(first, samples):.4f}")
        )
        second = ""
        if options.second:
            again = extract(features, draw(text, options.second, options.seed + 1_000_000))
            second = f"{frechet_distance(gaussian(again, features.hash), reference):.3f}"
        distance = frechet_distance(gaussian(f, features.hash), reference)
        row = (
            f"{distance:.3f}",
            *shares(manifold(near, f, 5)),
            f"{accuracy:.3f}",
            *moved,
            f"{calls:.1f}",
            f"{seconds:.0f}",
            second,
        )
        print_row(text, *row)


def settings_of(text: str, options: argparse.Namespace) -> dict[str, object]:
    """guidance [@ sampler [@ spacing [@ steps]]]"""
    guidance, *rest = (part.strip() for part in text.split("@"))
    sampler, spacing, steps = (
        *rest,
        *(options.sampler, options.spacing, options.steps)[len(rest) :],
    )
    return {
        "guidance": guidance,
        "sampler": sampler,
        "spacing": spacing or None,
        "steps": int(steps),
    }


def shares(measured: Any) -> list[str]:
    """Precision, recall, density and coverage as cells of the table."""
    return [f"{getattr(measured, name):.3f}" for name in SHARES]


if __name__ == "__main__":
    main()
