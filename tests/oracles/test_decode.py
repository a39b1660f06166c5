"""Act 4 and the latent's coordinates: tiles against the whole, weights that sum to one, previews of
linear decoders, numbers that are not finite.
"""

import math
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.models import SMALL_BLOCKS
from helpers.tensors import normal
from sfumato.compress.base import Autoencoder, Posterior
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.decode.preview import Preview
from sfumato.decode.tiled import _ramp, _starts, tiled, tiled_posterior
from sfumato.decode.whole import whole
from sfumato.errors import NumericalError, UserError
from sfumato.types import LatentSpace


class Linear(Autoencoder):
    """A decoder of two 3x3 convolutions around a nearest-neighbour doubling.

    Its receptive field is 1.5 latent cells around a pixel, so 2 are enough.
    """

    def __init__(self, reach: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.space, self.channels = LatentSpace(3, 2, (0.1, -0.2, 0.3), (0.5, 1.0, 2.0)), 3
        self.first = nn.Conv2d(3, 4, 2 * reach + 1, padding=reach)
        self.second = nn.Conv2d(4, 3, 3, padding=1)
        self.seen: list[tuple[int, ...]] = []
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.3)  # so that nothing is clamped

    def posterior(self, image: Tensor) -> Posterior:
        raise NotImplementedError

    def reconstruct(self, raw: Tensor) -> Tensor:
        self.seen.append(tuple(raw.shape[2:]))
        return self.second(F.interpolate(self.first(raw), scale_factor=2.0, mode="nearest"))

    def to_config(self) -> dict[str, Any]:
        return {}


class Averaging(Linear):
    """Every pixel is the mean of the whole latent that was given, as a group norm's statistics are:
    no two tiles agree.
    """

    def __init__(self) -> None:
        super().__init__()
        self.colours: list[float] = []

    def reconstruct(self, raw: Tensor) -> Tensor:
        mean = raw.mean((1, 2, 3), keepdim=True)
        self.colours += mean.flatten().tolist()
        return mean.expand(-1, 3, 2 * raw.shape[2], 2 * raw.shape[3])


def kl(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    values = SMALL_BLOCKS | {"latent_channels": 3}
    return AutoencoderKL(KLConfig(**{**values, **changes})).eval().requires_grad_(False)


# ---- tiles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (5, 8), (3, 2)])
def test_one_tile_that_covers_everything_is_the_whole_exactly(size: tuple[int, int]) -> None:
    """Bit for bit, with group norms and attention."""
    autoencoder, z = kl(), normal(2, 3, *size)
    assert torch.equal(tiled(autoencoder, z, tile=8, overlap=3), whole(autoencoder, z))


@pytest.mark.parametrize("size", [(40, 33), (12, 50), (18, 12), (64, 7)])
@pytest.mark.parametrize(("tile", "overlap"), [(12, 8), (16, 8), (17, 9), (12, 11)])
def test_tiles_are_the_whole_where_the_overlap_covers_the_receptive_field(
    size: tuple[int, int], tile: int, overlap: int
) -> None:
    """Linear() looks 2 cells far: a quarter of every overlap here."""
    autoencoder, z = Linear().requires_grad_(False), normal(2, 3, *size)
    expected = whole(autoencoder, z)
    assert expected.abs().max() < 1  # nothing is clamped
    autoencoder.seen.clear()
    result = tiled(autoencoder, z, tile=tile, overlap=overlap)
    assert result.dtype == torch.float32 and result.shape == (2, 3, 2 * size[0], 2 * size[1])
    assert (result - expected).abs().max() < 1e-5
    # memory is bounded by the tile
    assert len(autoencoder.seen) > 1 and all(h <= tile and w <= tile for h, w in autoencoder.seen)


def test_tiles_differ_from_the_whole_where_the_overlap_is_too_small() -> None:
    """So the test above can fail: a decoder that looks 6 cells far."""
    autoencoder, z = Linear(reach=6).requires_grad_(False), normal(1, 3, 40, 40)
    assert (tiled(autoencoder, z, tile=16, overlap=8) - whole(autoencoder, z)).abs().max() > 1e-3
    assert (tiled(autoencoder, z, tile=36, overlap=28) - whole(autoencoder, z)).abs().max() < 1e-5


@pytest.mark.parametrize(("tile", "overlap"), [(16, 8), (16, 12), (24, 16)])
def test_no_seams_where_tiles_disagree(tile: int, overlap: int) -> None:
    """Averaging() makes each tile one flat colour: from pixel to pixel the image may then change
    only as fast as the ramps do.

    A ramp rises by 1 in half of an overlap's 2 * overlap pixels; where three tiles meet, all of
    them change.
    """
    autoencoder, z = Averaging().requires_grad_(False), 0.3 * normal(1, 3, 45, 37)
    image = tiled(autoencoder, z, tile=tile, overlap=overlap)
    spread = max(autoencoder.colours) - min(autoencoder.colours)
    assert spread > 0.02  # the tiles do disagree
    for d in (2, 3):
        assert image.diff(dim=d).abs().max() < 3 * spread / overlap


@pytest.mark.parametrize("part", ["decode", "encode"])
def test_no_step_at_the_borders_of_tiles(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smooth picture, an autoencoder with norms and attention: along the lines where tiles begin
    and end the error changes no more, on average, than along others. (At the image's own edges,
    left out here, it changes most.)
    """
    autoencoder, tile, overlap, size = kl(), 24, 8, (64, 56)
    autoencoder.decoder.conv_out.weight.mul_(0.3)  # so that nothing is clamped
    z = F.interpolate(normal(1, 3, 4, 4), size, mode="bicubic").mul(0.5).tanh()
    image = F.interpolate(z, scale_factor=2, mode="bicubic").clamp(-1, 1)
    decodes, cell = part == "decode", 2 if part == "decode" else 1
    expected = whole(autoencoder, z) if decodes else autoencoder.posterior(image).mean
    assert not decodes or expected.abs().max() < 1

    def steps() -> tuple[float, float]:
        """The largest mean change from a row or column to the next: at borders, elsewhere."""
        result = (
            tiled(autoencoder, z, tile, overlap)
            if decodes
            else tiled_posterior(autoencoder, image, tile, overlap).mean
        )
        at, elsewhere = [0.0], [0.0]
        for d, side in ((2, size[0]), (3, size[1])):
            changes = (result - expected).diff(dim=d).abs().transpose(0, d).flatten(1).mean(1)
            starts = _starts(side, tile, tile - overlap)
            borders = {place * cell - 1 for start in starts for place in (start, start + tile)}
            for k in range(overlap * cell - 1, (side - overlap) * cell):
                (at if k in borders else elsewhere).append(float(changes[k]))
        return max(at), max(elsewhere)

    at, elsewhere = steps()
    assert at <= elsewhere and elsewhere > 1e-3  # the tiles do disagree
    monkeypatch.setattr(
        sys.modules["sfumato.decode.tiled"], "_ramp", lambda start, tile, *_: torch.ones(tile)
    )
    assert steps()[0] > 2 * at  # without ramps there are seams: the measure detects them


@pytest.mark.parametrize("length", [1, 7, 12, 13, 29, 64, 100])
@pytest.mark.parametrize(("tile", "overlap"), [(12, 4), (12, 11), (13, 5), (8, 1), (2, 1)])
def test_weights_are_a_partition_of_unity(length: int, tile: int, overlap: int) -> None:
    """Everywhere positive in sum, so that the division is safe; two tiles that share exactly
    `overlap` sum to 1 by themselves.
    """
    starts = _starts(length, tile, tile - overlap)
    assert starts[0] == 0 and all(b - a <= tile - overlap for a, b in pairwise(starts))
    assert max(starts) + min(tile, length) == length  # the edge is reached, and not passed
    f, total = 4, torch.zeros(4 * length)
    for begin in starts:
        size = min(tile, length) * f
        weight = _ramp(begin * f, size, length * f, overlap * f)
        assert weight.min() >= 0 and weight.max() <= 1 and weight.shape == (size,)
        total[begin * f : begin * f + size] += weight
    assert total.min() > 0.25
    if len(starts) == 1 or (2 * overlap <= tile and (length - tile) % (tile - overlap) == 0):
        torch.testing.assert_close(total, torch.ones_like(total))


def test_constant_images_stay_constant() -> None:
    """The division by the sum of weights leaves no trace of the tiles."""
    autoencoder = Averaging().requires_grad_(False)
    image = tiled(autoencoder, torch.zeros(1, 3, 50, 31), tile=9, overlap=5)
    assert (image - image[0, 0, 0, 0]).abs().max() < 1e-6


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 8), (8, 9), (4, -1)])
def test_impossible_tiles_are_refused(tile: int, overlap: int) -> None:
    with pytest.raises(
        UserError, match=rf"tile={tile}, overlap={overlap}: expected 0 < overlap < tile"
    ):
        tiled(Linear(), torch.zeros(1, 3, 16, 16), tile=tile, overlap=overlap)


# ---- whole ---------------------------------------------------------------------------------------


@pytest.mark.invariance
def test_whole_does_not_depend_on_the_batch_and_limits_the_range() -> None:
    autoencoder, z = Linear().requires_grad_(False), normal(5, 3, 6, 4)
    assert torch.allclose(whole(autoencoder, z, batch=2), whole(autoencoder, z), atol=1e-6)
    assert whole(autoencoder, z[:0]).shape == (0, 3, 12, 8)
    loud = whole(autoencoder, 100 * z)
    assert loud.min() == -1 and loud.max() == 1
    bf16 = whole(Linear().requires_grad_(False).bfloat16(), z)
    assert bf16.dtype == torch.float32 and torch.allclose(bf16, whole(autoencoder, z), atol=0.05)


@pytest.mark.parametrize("decode", [whole, tiled])
def test_latents_of_another_space_are_refused(decode: Any) -> None:
    with pytest.raises(
        UserError,
        match=r"latent is torch.float32 of shape \(1, 4, 8, 8\): expected .* \(B, 3, h, w\)",
    ):
        decode(Linear(), torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", ["whole", "tiles", "preview", "weights"])
def test_a_number_that_is_not_finite_never_becomes_a_picture(value: float, way: str) -> None:
    autoencoder, z = Linear().requires_grad_(False), normal(2, 3, 20, 20)
    if way == "weights":
        autoencoder.second.weight[0, 0, 0, 0] = value
    else:
        z[1, 2, 17, 3] = value
    with pytest.raises(NumericalError, match="NaN or infinite"):
        if way == "tiles":
            tiled(autoencoder, z, tile=8, overlap=4)
        elif way == "preview":
            Preview(torch.ones(3, 3), torch.zeros(3))(z)
        else:
            whole(autoencoder, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sentence_names_the_dtype(dtype: torch.dtype) -> None:
    autoencoder = Linear().requires_grad_(False).to(dtype)
    with pytest.raises(
        NumericalError,
        match=rf"after decode \({str(dtype).removeprefix('torch.')}\): nothing was written",
    ):
        whole(autoencoder, torch.full((1, 3, 4, 4), math.nan))


# ---- previews ------------------------------------------------------------------------------------


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("factor", [1, 2, 8])
def test_a_preview_recovers_a_linear_decoder(colours: int, factor: int) -> None:
    weight, bias = 0.1 * normal(colours, 4, seed=1), 0.1 * normal(colours, seed=2)
    z = normal(6, 4, 16, 16)
    small = torch.einsum("oc,bchw->bohw", weight, z) + bias[:, None, None]
    image = small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    image = image + 0.5 * _zero_mean(image.shape, factor)  # detail inside a cell averages away
    fitted = Preview.fit(z, image)
    assert torch.allclose(fitted.weight, weight, atol=1e-5) and torch.allclose(
        fitted.bias, bias, atol=1e-5
    )
    assert torch.allclose(fitted(z), small.clamp(-1, 1), atol=1e-4)
    assert fitted(100 * z).abs().max() == 1


def _zero_mean(shape: torch.Size, factor: int) -> Tensor:
    noise = normal(*shape, seed=3)
    return noise - F.interpolate(
        F.avg_pool2d(noise, factor), scale_factor=float(factor), mode="nearest"
    )


# ---- coordinates of the latent -------------------------------------------------------------------


def test_standardise_and_restore_are_inverses() -> None:
    space = LatentSpace(3, 8, (0.5, -2.0, 10.0), (0.1, 1.0, 30.0))
    raw = (
        normal(4, 3, 5, 6) * torch.tensor(space.std)[:, None, None]
        + torch.tensor(space.mean)[:, None, None]
    )
    z = space.standardise(raw)
    assert torch.allclose(space.restore(z), raw, rtol=1e-5, atol=1e-5)
    assert torch.allclose(z, normal(4, 3, 5, 6), atol=1e-5)
    assert space.standardise(raw.double()).dtype == torch.float64


def test_measured_statistics_make_z_standard() -> None:
    autoencoder = kl(in_channels=1, out_channels=1)
    images = normal(32, 1, 16, 16).clamp(-1, 1)
    raw = autoencoder.posterior(images).mean
    autoencoder.set_statistics(
        tuple(raw.mean((0, 2, 3)).tolist()), tuple(raw.std((0, 2, 3)).tolist())
    )
    z = autoencoder.encode(images)
    assert z.mean((0, 2, 3)).abs().max() < 1e-4 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-4
    assert torch.allclose(autoencoder.decode(z), autoencoder.reconstruct(raw), atol=1e-4)
    again = KLConfig.from_dict(autoencoder.to_config())
    assert again.space == autoencoder.space


def test_one_scaling_factor_and_shift_are_a_special_case() -> None:
    """Stable Diffusion's z = raw * scaling_factor, SD3's z = (raw - shift_factor) * scaling_factor;
    measured statistics come first.
    """
    raw = normal(2, 3, 4, 4)
    plain = KLConfig(latent_channels=3, scaling_factor=0.18215).space
    assert torch.allclose(plain.standardise(raw), raw * 0.18215) and plain.factor == 8
    shifted = KLConfig(latent_channels=3, scaling_factor=1.5305, shift_factor=0.0609).space
    assert torch.allclose(shifted.standardise(raw), (raw - 0.0609) * 1.5305, atol=1e-6)
    measured = KLConfig(
        latent_channels=1, scaling_factor=0.5, latents_mean=(3.0,), latents_std=(2.0,)
    ).space
    assert (measured.mean, measured.std) == ((3.0,), (2.0,))


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.0,), (1.0, 1.0)), ((0.0, 0.0), (1.0, 0.0)), ((0.0, 0.0), (1.0, -1.0)), ((), ())],
)
def test_impossible_statistics_are_refused(mean: tuple, std: tuple) -> None:
    with pytest.raises(ValueError, match="as many means and positive stds"):
        LatentSpace(2, 8, mean, std)


def test_kl_of_a_posterior_is_the_closed_form() -> None:
    """Against torch.distributions; 0 for the standard normal itself."""
    mean, std = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1).exp()
    gaussian = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(gaussian(mean, std), gaussian(0.0, 1.0)).sum(
        (1, 2, 3)
    )
    torch.testing.assert_close(Posterior(mean, std).kl(), expected)
    assert Posterior(torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)).kl() == 0
    assert torch.equal(Posterior(mean, std).sample(torch.zeros_like(mean)), mean)
    assert torch.allclose(Posterior(mean, std).sample(torch.ones_like(mean)), mean + std)
