"""PSNR and SSIM: distance of a reconstruction from its original, by pixels and by windows.

    PSNR = 10 log10(1 / MSE), pixels in [0, 1]
    SSIM = mean over pixels and channels of (2 ma mb + C1)(2 sab + C2) / ((ma^2 + mb^2 + C1)(saa +
    sbb + C2))

with ma, mb, saa, sbb, sab the means, variances and covariance under an 11x11 Gaussian window of
sigma 1.5, C1 = 0.01^2, C2 = 0.03^2: Wang et al. 2004, "Image Quality Assessment", Eq. 13. As in the
authors' code, only windows that lie wholly inside the image count; libraries that reflect the image
beyond its border (torchmetrics) give other numbers, most of all for small images.

`psnr` is the PSNR of the mean MSE over the data set (what autoencoder papers report); `psnr_mean`
is the mean of each image's own PSNR, which is larger (Jensen) and infinite as soon as one image is
exact.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from sfumato.errors import UserError
from sfumato.evaluate.inputs import check_pair

PIXELS = 196_000
"""Pixels that are drawn or reconstructed at a time, about: 250 images of 28 x 28."""
WINDOW = 11
SIGMA = 1.5


@dataclass(frozen=True)
class Reconstruction:
    """Quality of `count` reconstructions.

    Attributes:
        psnr: In decibels, of the mean squared error over all images.
        psnr_mean: In decibels, the mean of the images' own; infinite where one is exact.
        ssim: In [-1, 1].
        count: Number of pairs.
    """

    psnr: float
    psnr_mean: float
    ssim: float
    count: int


def decibels(mse: float) -> float:
    """PSNR in dB of a mean squared error of pixels in [0, 1]; infinite for 0."""
    return math.inf if mse == 0 else -10 * math.log10(mse)


def mse_by_image(a: Float[Tensor, "N C H W"], b: Float[Tensor, "_ _ _ _"]) -> Float64[Tensor, " N"]:
    """Mean squared error of each pair, pixels in [0, 1]."""
    a, b = check_pair(a, b)
    return (a.double() - b.double()).square().mean(dim=(1, 2, 3))


def psnr(a: Float[Tensor, "N C H W"], b: Float[Tensor, "_ _ _ _"]) -> float:
    """PSNR in dB of the mean squared error over all images; infinite where the sets are equal."""
    return decibels(float(mse_by_image(a, b).mean()))


def psnr_mean(a: Float[Tensor, "N C H W"], b: Float[Tensor, "_ _ _ _"]) -> float:
    """Mean over images of each image's PSNR in dB; infinite where one of them is exact."""
    return math.fsum(decibels(float(mse)) for mse in mse_by_image(a, b)) / len(a)


def _window() -> Float64[Tensor, " w"]:
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = (-(offsets**2) / (2 * SIGMA**2)).exp()
    return weights / weights.sum()


def _blur(x: Float64[Tensor, "B C H W"]) -> Float64[Tensor, "B C h w"]:
    """Means under the Gaussian window, one axis after the other."""
    window = _window()
    rows, columns = window.reshape(1, 1, -1, 1), window.reshape(1, 1, 1, -1)
    means = F.conv2d(F.conv2d(x.flatten(0, 1)[:, None], rows), columns)
    return means.unflatten(0, x.shape[:2])[:, :, 0]


def ssim(a: Float[Tensor, "N C H W"], b: Float[Tensor, "_ _ _ _"], batch: int = 100) -> float:
    """Mean SSIM over images; `UserError` for sides of less than 11 pixels."""
    if min(a.shape[-2:]) < WINDOW:
        size = f"{a.shape[-2]}x{a.shape[-1]}"
        raise UserError(
            f"images of {size} pixels are too small for SSIM: expected at least {WINDOW}x{WINDOW}"
        )
    a, b = check_pair(a, b)
    values = [
        _ssim_by_image(x.double(), y.double())
        for x, y in zip(a.split(batch), b.split(batch), strict=True)
    ]
    return float(torch.cat(values).mean())


def _ssim_by_image(
    a: Float64[Tensor, "B C H W"], b: Float64[Tensor, "B C H W"]
) -> Float64[Tensor, " B"]:
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = _blur(a), _blur(b)
    var_a = _blur(a * a) - mean_a**2
    var_b = _blur(b * b) - mean_b**2
    cov = _blur(a * b) - mean_a * mean_b
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    score /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return score.mean(dim=(1, 2, 3))


def reconstruction(a: Float[Tensor, "N C H W"], b: Float[Tensor, "_ _ _ _"]) -> Reconstruction:
    """PSNR and SSIM of originals and reconstructions, (N, C, H, W) in [0, 1]."""
    return Reconstruction(psnr(a, b), psnr_mean(a, b), ssim(a, b), len(a))
