"""Promises of autoencoders beyond parity.

They are exact codes, straight-through gradients, packing, bits that do not depend on the batch, and
the real weights of FLUX.2's tiny autoencoder against its published layers and the reference's PSNR.
The last needs the folder `shared` (weights/taef2_*.safetensors, data/clothing-256-train.parquet) in
the checkout, beside it, or in SFUMATO_SHARED.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.batch_invariance import batch_dependent
from helpers.models import randomised
from helpers.tensors import normal
from sfumato.checkpoints.families.taesd import load_taesd, save_taesd
from sfumato.compress.base import Autoencoder
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.compress.kl_flux2 import AutoencoderKLFlux2, KLFlux2Config
from sfumato.compress.tiny import AutoencoderTiny, TinyConfig
from sfumato.compress.vq import VQConfig, VQModel
from sfumato.decode.tiled import tiled
from sfumato.decode.whole import whole
from sfumato.errors import UserError


@pytest.fixture(autouse=True)
def weights() -> None:
    """Layers draw their weights from torch's own generator: the same ones in every run, whatever
    ran before.
    """
    torch.manual_seed(0)


SOME = (2, 3, 7)
SMALL: dict[str, Any] = {"layers_per_block": 1, "norm_num_groups": 2}
FAR: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
WIDTHS: dict[str, Any] = {
    "encoder_block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
}
KINDS: dict[str, Callable[[], Autoencoder]] = {
    "kl with attention": lambda: AutoencoderKL(
        KLConfig(block_out_channels=(4, 8), latent_channels=3, **SMALL, **FAR)
    ),
    "flux2": lambda: AutoencoderKLFlux2(
        KLFlux2Config(block_out_channels=(4, 8), latent_channels=3, **SMALL)
    ),
    "tiny": lambda: AutoencoderTiny(TinyConfig(**WIDTHS)),
    "tiny with the branch": lambda: AutoencoderTiny(
        TinyConfig(**WIDTHS, latent_channels=5, use_midblock_gn=True)
    ),
    "vq": lambda: VQModel(VQConfig(block_out_channels=(4, 8), num_vq_embeddings=19, **SMALL)),
    "vq with wide codes": lambda: VQModel(
        VQConfig(block_out_channels=(4, 8), num_vq_embeddings=64, vq_embed_dim=16, **SMALL, **FAR)
    ),
}


@pytest.mark.invariance
@pytest.mark.parametrize("size", [(32, 16), (16, 48)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_an_image_has_the_bits_that_it_has_alone(kind: str, size: tuple[int, int]) -> None:
    autoencoder = randomised(KINDS[kind]())
    image = normal(8, 3, *size).tanh()
    f = autoencoder.space.factor
    z = normal(8, autoencoder.space.channels, size[0] // f, size[1] // f, seed=1)
    assert not batch_dependent(lambda rows: autoencoder.encode(image[rows]), SOME)
    assert not batch_dependent(lambda rows: whole(autoencoder, z[rows]), SOME)
    if isinstance(autoencoder, VQModel):
        assert not batch_dependent(lambda rows: autoencoder.codes(image[rows]), SOME)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_an_autoencoder(kind: str) -> None:
    """Latents that do not fit are refused, z is standardised, tiles that cover all are the whole,
    and gradients reach the whole encoder.
    """
    autoencoder = randomised(KINDS[kind]())
    space = autoencoder.space
    if isinstance(autoencoder, AutoencoderKLFlux2):
        autoencoder.set_statistics(
            tuple(range(space.channels)), tuple(0.5 + k / 7 for k in range(space.channels))
        )
    image = normal(2, 3, 32, 48)
    posterior = autoencoder.posterior(image)
    assert posterior.mean.shape == (2, space.channels, 32 // space.factor, 48 // space.factor)
    assert bool((posterior.std > 0).all()) == isinstance(
        autoencoder, (AutoencoderKL, AutoencoderKLFlux2)
    )
    z = autoencoder.encode(image)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (autoencoder.space.mean, autoencoder.space.std)
    )
    torch.testing.assert_close(z * std + mean, posterior.mean)
    assert torch.equal(tiled(autoencoder, z, tile=24, overlap=4), whole(autoencoder, z))
    for bad in (image[:, :, :31], image[:, :, :, : 48 - space.factor // 2], image[:, :1]):
        with pytest.raises(
            UserError, match=f"takes 3 channels and sides that are multiples of {space.factor}"
        ):
            autoencoder.posterior(bad)
    autoencoder.requires_grad_(True)
    reconstruction, _, _ = autoencoder(image, normal(*posterior.mean.shape))
    (reconstruction - image).square().mean().backward()
    silent = {k for k, p in autoencoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent <= {"quantize.embedding.weight"}, "the codebook is moved by losses of its own"


# ---- VQ ------------------------------------------------------------------------------------------


def test_the_nearest_code_by_counting() -> None:
    """Against every distance in float64; cells that are codes are their own; the first of equal
    codes is taken.
    """
    book = VQModel(
        VQConfig(block_out_channels=(4, 8), num_vq_embeddings=300, vq_embed_dim=5, **SMALL)
    ).quantize
    torch.nn.init.normal_(book.embedding.weight, generator=torch.Generator().manual_seed(3))
    h = normal(2, 5, 70, 40)  # more cells than are compared at a time
    codes = book.embedding.weight.detach()
    distances = (h.movedim(1, -1)[..., None, :].double() - codes.double()).square().sum(-1)
    indices = book.nearest(h)
    chosen = distances.gather(-1, indices[..., None])[..., 0]
    assert torch.allclose(chosen, distances.min(-1).values, rtol=0, atol=1e-5)
    assert (indices == distances.argmin(-1)).double().mean() > 0.999
    expected = torch.arange(300).reshape(1, 15, 20)
    assert torch.equal(book.nearest(book.look_up(expected)), expected)
    with torch.no_grad():
        book.embedding.weight[7] = book.embedding.weight[200]
    assert book.nearest(book.look_up(torch.tensor([[[200]]]))).item() == 7


@pytest.mark.invariance
@torch.inference_mode()
def test_cells_between_two_codes_take_the_same_one_in_any_batch() -> None:
    """Each cell is as far from e as from -e, so that the last bit of a product decides."""
    book = randomised(
        VQModel(VQConfig(block_out_channels=(4, 8), num_vq_embeddings=2, vq_embed_dim=61, **SMALL))
    ).quantize
    e = F.normalize(normal(61), dim=0)
    book.embedding.weight.copy_(torch.stack([e, -e]))
    h = normal(18, 61, 3, 3, seed=1)
    h = h - torch.einsum("c,bchw,d->bdhw", e, h, e)
    assert len(book.nearest(h).unique()) == 2
    assert not batch_dependent(lambda rows: book.nearest(h[rows]), (2, 3, 5, 7, 11, 16, 17))


def test_gradients_pass_straight_through() -> None:
    """d quantise(h) / d h = 1 to the bit, the value is the code's to the bit, and the codes get
    nothing.
    """
    book = VQModel(
        VQConfig(block_out_channels=(4, 8), num_vq_embeddings=11, vq_embed_dim=4, **SMALL)
    ).quantize
    h, weight = normal(2, 4, 3, 5).requires_grad_(), normal(2, 4, 3, 5, seed=1)
    quantised = book(h)
    assert torch.equal(quantised, book.look_up(book.nearest(h))) and not torch.equal(quantised, h)
    (quantised * weight).sum().backward()
    assert h.grad is not None and torch.equal(h.grad, weight) and book.embedding.weight.grad is None


def test_codes_that_are_not_there() -> None:
    model = randomised(VQModel(VQConfig(block_out_channels=(4, 8), num_vq_embeddings=11, **SMALL)))
    image = normal(1, 3, 8, 8)
    assert torch.equal(
        model.from_codes(model.codes(image)), model.reconstruct(model.posterior(image).mean)
    )
    assert model.from_codes(torch.zeros(0, 4, 4, dtype=torch.long)).shape == (0, 3, 8, 8)
    for bad in (-1, 11):
        with pytest.raises(UserError, match="expected 0 to 10"):
            model.from_codes(torch.full((1, 4, 4), bad))


# ---- FLUX.2 --------------------------------------------------------------------------------------


@torch.inference_mode()
def test_packing_by_counting() -> None:
    """packed[4c + 2i + j, y, x] = cell[c, 2y + i, 2x + j], in both directions, whatever is
    between.
    """
    config = KLFlux2Config(block_out_channels=(4, 8), latent_channels=3, **SMALL)
    model: Any = randomised(AutoencoderKLFlux2(config))
    plain: Any = AutoencoderKL(KLConfig(block_out_channels=(4, 8), latent_channels=3, **SMALL))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("bn.")})
    image = normal(1, 3, 16, 24)
    cells, packed = plain.eval().posterior(image), model.posterior(image)
    for c, i, j in ((c, i, j) for c in range(3) for i in range(2) for j in range(2)):
        assert torch.equal(packed.mean[:, 4 * c + 2 * i + j], cells.mean[:, c, i::2, j::2])
        assert torch.equal(packed.std[:, 4 * c + 2 * i + j], cells.std[:, c, i::2, j::2])
    assert torch.equal(model.reconstruct(packed.mean), plain.reconstruct(cells.mean))


def test_statistics_that_a_batch_norm_cannot_hold() -> None:
    model = AutoencoderKLFlux2(
        KLFlux2Config(block_out_channels=(4, 8), latent_channels=1, batch_norm_eps=0.04, **SMALL)
    )
    model.set_statistics((1.0, 2.0, 3.0, 4.0), (0.2, 0.5, 1.0, 2.0))
    assert model.space.std == pytest.approx((0.2, 0.5, 1.0, 2.0)) and model.space.mean == (
        1.0,
        2.0,
        3.0,
        4.0,
    )
    for mean, std in (
        ((0.0,) * 4, (0.1, 1.0, 1.0, 1.0)),
        ((0.0,) * 3, (1.0,) * 3),
        ((0.0,) * 4, (1.0,) * 3),
        ((), ()),
    ):
        with pytest.raises(UserError, match=r"expected 4 of each, and stds of at least 0\.2"):
            model.set_statistics(mean, std)


# ---- the real weights of taef2 -------------------------------------------------------------------


def shared(name: str) -> Path:
    """A file of the folder that holds real weights and pictures; skips where it is absent."""
    checkout = Path(__file__).resolve().parents[2]
    for folder in (
        os.environ.get("SFUMATO_SHARED", ""),
        checkout / "shared",
        checkout.parent / "shared",
    ):
        if str(folder) and (Path(folder) / name).exists():
            return Path(folder) / name
    pytest.skip(f"{name} is in no folder `shared` of the checkout, beside it, or in SFUMATO_SHARED")


def photographs(count: int) -> Tensor:
    """The first photographs (their shorter side is 256 pixels), each the 256x256 at its top left:
    (count, 3, 256, 256) in [-1, 1].
    """
    import io

    import pyarrow.parquet as parquet
    from PIL import Image

    from sfumato.images import to_tensor

    rows = (
        parquet.read_table(shared("data/clothing-256-train.parquet"), columns=["image"])["image"]
        .slice(0, count)
        .to_pylist()
    )
    pictures = [
        Image.open(io.BytesIO(row["bytes"])).convert("RGB").crop((0, 0, 256, 256)) for row in rows
    ]
    return to_tensor(pictures)


def published_block(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """One block of taef2 in plain torch functions, from the original file's keys."""
    if f"{name}.pool.0.weight" in w:
        y = F.group_norm(
            F.conv2d(x, w[f"{name}.pool.0.weight"]),
            4,
            w[f"{name}.pool.1.weight"],
            w[f"{name}.pool.1.bias"],
        )
        x = x + F.conv2d(F.relu(y), w[f"{name}.pool.3.weight"])
    y = x
    for k in (0, 2, 4):
        y = F.conv2d(
            F.relu(y) if k else y,
            w[f"{name}.conv.{k}.weight"],
            w[f"{name}.conv.{k}.bias"],
            padding=1,
        )
    return F.relu(x + y)


@torch.inference_mode()
def test_taef2_is_its_published_layers(tmp_path: Path) -> None:
    """Both halves against plain torch functions in float64 over the original files; the pair
    written again is the pair, bit for bit.
    """
    from safetensors.torch import load_file

    files = [shared(f"weights/taef2_{half}.safetensors") for half in ("encoder", "decoder")]
    autoencoder = load_taesd(files[0], files[1])
    encoder, decoder = ({k: v.double() for k, v in load_file(f).items()} for f in files)
    image = normal(1, 3, 64, 40).tanh()
    x = F.conv2d((image.double() + 1) / 2, encoder["0.weight"], encoder["0.bias"], padding=1)
    for n in range(1, 14):
        strided = f"{n}.weight" in encoder
        x = (
            F.conv2d(x, encoder[f"{n}.weight"], stride=2, padding=1)
            if strided
            else published_block(x, encoder, str(n))
        )
    raw = F.conv2d(x, encoder["14.weight"], encoder["14.bias"], padding=1)
    torch.testing.assert_close(autoencoder.encode(image).double(), raw, rtol=1e-4, atol=3e-5)
    x = F.relu(F.conv2d((raw / 3).tanh() * 3, decoder["1.weight"], decoder["1.bias"], padding=1))
    for n in (3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15, 17, 18):
        doubled = f"{n}.weight" in decoder
        x = (
            F.conv2d(
                x.repeat_interleave(2, 2).repeat_interleave(2, 3), decoder[f"{n}.weight"], padding=1
            )
            if doubled
            else published_block(x, decoder, str(n))
        )
    expected = F.conv2d(x, decoder["19.weight"], decoder["19.bias"], padding=1) * 2 - 1
    torch.testing.assert_close(
        autoencoder.decode(raw.float()).double(), expected, rtol=1e-4, atol=3e-5
    )
    again = save_taesd(tmp_path / "again", autoencoder)
    for before, after in zip(files, again, strict=True):
        first, second = load_file(before), load_file(after)
        assert first.keys() == second.keys() and all(
            torch.equal(first[k], second[k]) for k in first
        )
    assert (
        autoencoder.config == load_taesd(tmp_path).config and autoencoder.space.std == (1.0,) * 32
    )


@torch.inference_mode()
def quality(count: int) -> tuple[float, float]:
    """(mean PSNR in dB of pictures limited to [-1, 1], mean std of latents) over photographs."""
    autoencoder = load_taesd(
        shared("weights/taef2_encoder.safetensors"), shared("weights/taef2_decoder.safetensors")
    )
    result, spread = [], []
    for image in photographs(count).split(1):
        z = autoencoder.encode(image)
        result.append(-10 * (((whole(autoencoder, z) - image) / 2).square().mean()).log10())
        spread.append(z.std())
    return float(torch.stack(result).mean()), float(torch.stack(spread).mean())


def test_taef2_reconstructs_a_photograph() -> None:
    psnr, spread = quality(1)
    assert psnr > 25 and 0.6 < spread < 1.1


@pytest.mark.slow
def test_taef2_reconstructs_photographs_as_the_reference_does() -> None:
    """The reference's 31.9 dB over 24 photographs, latents of std 0.82 (measured here: 31.85 dB, on
    x86-64 with PyTorch 2.13).
    """
    psnr, spread = quality(24)
    assert psnr == pytest.approx(31.9, abs=0.1) and spread == pytest.approx(0.82, abs=0.01)
