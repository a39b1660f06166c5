"""Checks of the inputs: images (N, C, H, W) in [0, 1], features and labels.

Images in [-1, 1], a NaN and too few images raise an error, since a metric would hide them.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sfumato.errors import NumericalError, UserError
from sfumato.io.atomic import hash_tensors
from sfumato.validate import positive_int

Images = Float[Tensor, "N C H W"]
"""Pixels in [0, 1], with 1 or 3 channels."""
ImageSource = Tensor | Callable[[int, int, int], Tensor]
"""Images, or `(n, batch, seed) -> n images` made in batches, image k from seed + k."""

TOLERANCE = 1e-3
"""Largest distance from [0, 1] that counts as rounding; such pixels are clamped."""


def check_images(images: Shaped[Tensor, "..."], name: str = "images") -> Images:
    """Return the images as float32 on the CPU, clamped to [0, 1].

    Args:
        images: (N, 1 or 3, H, W), floating point, on any device.
        name: Of the images, for the errors.

    Raises:
        NumericalError: For a value that is not finite.
        UserError: For another shape, integers, no images, or a value farther than `TOLERANCE`
            outside [0, 1].
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise UserError(
            f"{name} have shape {tuple(images.shape)}: "
            "expected (N, C, H, W) with 1 or 3 channels and at least one image"
        )
    if not images.is_floating_point():
        advice = "expected floating-point pixels in [0, 1]; divide bytes by 255"
        raise UserError(f"{name} are {images.dtype}: {advice}")
    images = images.detach().cpu()
    low, high = (float(v) for v in images.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int((~images.isfinite()).flatten(1).any(dim=1).sum())
        raise NumericalError(
            f"{name}: {bad} of {len(images)} hold a value that is not finite ({images.dtype}): "
            "nothing was measured"
        )
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        advice = "expected [0, 1]; images in [-1, 1] need (image + 1) / 2"
        raise UserError(f"{name} lie in [{low:.4g}, {high:.4g}]: {advice}")
    return images.float().clamp(0, 1)


def check_pair(a: Shaped[Tensor, "..."], b: Shaped[Tensor, "..."]) -> tuple[Images, Images]:
    """Return two batches of one shape, originals and reconstructions, as `check_images` does."""
    if a.shape != b.shape:
        raise UserError(
            f"originals have shape {tuple(a.shape)} and reconstructions {tuple(b.shape)}: "
            "expected the same shape, pair by pair"
        )
    return check_images(a, "originals"), check_images(b, "reconstructions")


def check_features(
    features: Shaped[Tensor, "..."], least: int, name: str = "features"
) -> Float[Tensor, "N D"]:
    """Return features (N, D) as float64 on the CPU.

    Raises:
        UserError: For another shape, or fewer than `least` rows.
        NumericalError: For a value that is not finite.
    """
    if features.ndim != 2 or len(features) < least:
        raise UserError(
            f"{name} have shape {tuple(features.shape)}: "
            f"expected (N, D) with at least {least} rows; give more images or a smaller k"
        )
    if not bool(features.isfinite().all()):
        raise NumericalError(
            f"{name}: a value is not finite ({features.dtype}): "
            "the feature network overflowed or the images are broken"
        )
    return features.double().cpu()


def check_labels(
    labels: Shaped[Tensor, "..."], count: int, classes: int, name: str = "labels"
) -> Shaped[Tensor, " N"]:
    """Return `count` labels in [0, classes) as int64 (N,) on the CPU; `UserError` for others."""
    if labels.shape != (count,) or labels.is_floating_point():
        shape = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise UserError(f"{name} are {shape}: expected {count} integers, one an image")
    if bool((labels < 0).any()) or bool((labels >= classes).any()):
        limits = f"[{int(labels.min())}, {int(labels.max())}]"
        raise UserError(f"{name} lie in {limits}: expected 0 to {classes - 1}")
    return labels.long().cpu()


def draw(
    source: ImageSource, n: int | None, batch: int, seed: int, name: str = "samples"
) -> Images:
    """Return checked images: the first n of a tensor, or n that the function makes.

    Args:
        source: Images, or a function that makes them.
        n: Number of images; None: all of the tensor.
        batch: Images that the function makes at a time.
        seed: Of the first image.
        name: Of the images, for the errors.

    Raises:
        UserError: For too few images, and a function without `n`.
    """
    if isinstance(source, Tensor):
        if n is not None and n > len(source):
            raise UserError(
                f"{n} {name} were requested and {len(source)} are there: request fewer or give more"
            )
        return check_images(source[:n], name)
    n = positive_int("n", n, unit="images", hint=f"{name} are made by a function")
    images = check_images(source(n, batch, seed), name)
    if len(images) != n:
        made = f"the function that makes {name} returned {len(images)} images"
        raise UserError(f"{made}: expected {n}")
    return images


def fingerprint(images: Shaped[Tensor, "..."]) -> str:
    """Hash of pixels, shape, dtype and order of images."""
    return hash_tensors({"images": images})


def choose(count: int, n: int, seed: int) -> Shaped[Tensor, " n"]:
    """Choose n different indices out of `count` by a seed, in rising order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:n].sort().values
