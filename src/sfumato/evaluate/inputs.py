"""What the evaluation accepts: images (N, C, H, W) in [0, 1], or a function that makes them;
everything else is refused.

A metric over images that are secretly in [-1, 1], contain a NaN or are too few is worse than no
metric.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sfumato.errors import NumericalError, UserError
from sfumato.io.atomic import hash_tensors
from sfumato.validate import positive_int

ImageSource = Tensor | Callable[[int, int, int], Tensor]
"""Images, or `(n, batch, seed) -> images`: makes n images in batches, image k from seed + k."""

TOLERANCE = 1e-3
"""How far outside [0, 1] rounding may carry a pixel; such pixels are clamped."""


def check_images(images: Shaped[Tensor, "..."], name: str = "images") -> Float[Tensor, "N C H W"]:
    """The images as float32 on the CPU, clamped to [0, 1].

    Errors: `NumericalError` for a value that is not finite; `UserError` for a shape that is not (N,
    1 or 3, H, W), integers, no images, or a value farther than `TOLERANCE` outside [0, 1].
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise UserError(
            f"{name} have shape {tuple(images.shape)}: expected (N, C, H, W) with 1 or 3 channels and at least one image"
        )
    if not images.is_floating_point():
        raise UserError(
            f"{name} are {images.dtype}: expected floating-point pixels in [0, 1]; divide bytes by 255"
        )
    images = images.detach().cpu()
    low, high = (float(v) for v in images.aminmax())
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        bad = int((~images.isfinite()).flatten(1).any(dim=1).sum())
        raise NumericalError(
            f"{name}: {bad} of {len(images)} hold a value that is not finite ({images.dtype}): nothing was measured"
        )
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise UserError(
            f"{name} lie in [{low:.4g}, {high:.4g}]: expected [0, 1]; images in [-1, 1] need (image + 1) / 2"
        )
    return images.float().clamp(0, 1)


def check_pair(
    a: Shaped[Tensor, "..."], b: Shaped[Tensor, "..."]
) -> tuple[Float[Tensor, "N C H W"], Float[Tensor, "N C H W"]]:
    """Two batches of one shape, each checked by `check_images`."""
    if a.shape != b.shape:
        raise UserError(
            f"originals have shape {tuple(a.shape)} and reconstructions {tuple(b.shape)}: expected the same shape, pair by pair"
        )
    return check_images(a, "originals"), check_images(b, "reconstructions")


def check_features(
    features: Shaped[Tensor, "..."], least: int, name: str = "features"
) -> Float[Tensor, "N D"]:
    """Features (N, D) in float64 with at least `least` rows; `NumericalError` where one is not
    finite.
    """
    if features.ndim != 2 or len(features) < least:
        raise UserError(
            f"{name} have shape {tuple(features.shape)}: expected (N, D) with at least {least} rows; give more images or a smaller k"
        )
    if not bool(features.isfinite().all()):
        raise NumericalError(
            f"{name}: a value is not finite ({features.dtype}): the feature network overflowed or the images are broken"
        )
    return features.double().cpu()


def check_labels(
    labels: Shaped[Tensor, "..."], count: int, classes: int, name: str = "labels"
) -> Shaped[Tensor, " N"]:
    """Labels (N,) as int64 in [0, classes)."""
    if labels.shape != (count,) or labels.is_floating_point():
        raise UserError(
            f"{name} are {labels.dtype} of shape {tuple(labels.shape)}: expected {count} integers, one an image"
        )
    if bool((labels < 0).any()) or bool((labels >= classes).any()):
        raise UserError(
            f"{name} lie in [{int(labels.min())}, {int(labels.max())}]: expected 0 to {classes - 1}"
        )
    return labels.long().cpu()


def draw(
    source: ImageSource, n: int | None, batch: int, seed: int, name: str = "samples"
) -> Float[Tensor, "N C H W"]:
    """Checked images: those given (the first n of them), or n that the function makes."""
    if isinstance(source, Tensor):
        if n is not None and n > len(source):
            raise UserError(
                f"{n} {name} were asked for and {len(source)} are given: ask for fewer or give more"
            )
        return check_images(source[:n], name)
    n = positive_int("n", n, unit="images", hint=f"{name} are made by a function")
    images = check_images(source(n, batch, seed), name)
    if len(images) != n:
        raise UserError(
            f"the function that makes {name} returned {len(images)} images: expected {n}"
        )
    return images


def fingerprint(images: Shaped[Tensor, "..."]) -> str:
    """Hash of pixels, shape and dtype: two reports with equal fingerprints used the same images in
    the same order.
    """
    return hash_tensors({"images": images})


def choose(count: int, n: int, seed: int) -> Shaped[Tensor, " n"]:
    """n different row numbers out of `count`, in rising order, fixed by the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:n].sort().values
