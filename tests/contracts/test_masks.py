"""Masks of every kind: what they draw anew, which latent cells they cover, which are refused.

Inpainted images keep the transparency and the colours of their original.
"""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from helpers.images import pixels
from helpers.models import tiny_model
from helpers.profiles import DISPLAY_P3, grey_profile, matrix_profile
from sfumato.errors import UserError
from sfumato.images import to_tensor
from sfumato.io.image_files import losses, open_image, to_srgb
from sfumato.model import LatentDiffusion
from sfumato.sampling import Plan, Request
from sfumato.tasks import enlarge, image_to_image, inpaint, outpaint, variations
from sfumato.tasks._masks import latent_mask, read_mask

HOLE = np.zeros((16, 16), np.uint8)
HOLE[4:10, 6:14] = 255
GREY = np.random.default_rng(2).integers(0, 256, (16, 16), np.uint8)
REQUEST = Request("bag", steps=3, seed=1)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_model(channels=3)


def bands(*values: np.ndarray | int) -> Image.Image:
    """An image of 2 to 4 bands: LA, RGB or RGBA."""
    parts = [Image.fromarray(np.broadcast_to(np.uint8(v), HOLE.shape).copy()) for v in values]
    return Image.merge(("LA", "RGB", "RGBA")[len(parts) - 2], parts)


def reread(image: Image.Image, kind: str = "png", **options: object) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return open_image(stream.getvalue())


def with_orientation(image: Image.Image) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    return reread(image.transpose(Image.Transpose.ROTATE_180), exif=exif)


PLAIN = Image.fromarray(HOLE)
PALETTE = Image.fromarray(HOLE // 255, "P")
PALETTE.putpalette([0, 0, 0, 255, 255, 255])
SAME = {
    "1": PLAIN.convert("1"),
    "L": PLAIN,
    "RGB": PLAIN.convert("RGB"),
    "CMYK": PLAIN.convert("RGB").convert("CMYK"),
    "YCbCr": PLAIN.convert("YCbCr"),
    "HSV": PLAIN.convert("RGB").convert("HSV"),
    "LAB": Image.merge("LAB", [PLAIN, *[Image.new("L", PLAIN.size, 128)] * 2]),
    "I;16": Image.fromarray(HOLE.astype(np.uint16) * 257),
    "I;16B": Image.fromarray((HOLE.astype(np.uint16) * 257).astype(">u2")),
    "P": PALETTE,
    "opaque LA": bands(HOLE, 255),
    "opaque RGBA": bands(HOLE, HOLE, HOLE, 255),
    "white LA with alpha": bands(255, HOLE),
    "white RGBA with alpha": bands(255, 255, 255, HOLE),
    "white brush on black nothing": bands(HOLE, HOLE, HOLE, HOLE),
    "premultiplied": bands(HOLE, HOLE, HOLE, HOLE).convert("RGBa"),
    "P with a transparent index": reread(PALETTE, transparency=0),
    "L with a transparent level": reread(PLAIN, transparency=0),
    "RGB with a transparent colour": reread(PLAIN.convert("RGB"), transparency=(0, 0, 0)),
    "GIF": reread(PLAIN, "gif"),
    "upside down": with_orientation(PLAIN),
    "with a profile": reread(PLAIN.convert("RGB"), icc_profile=matrix_profile(DISPLAY_P3, 1.2)),
    "noise near black": Image.fromarray(HOLE | (GREY & 1)),
    "noise near white": Image.fromarray(np.where(HOLE, 255 - (GREY & 15), GREY & 15).astype("u1")),
}


@pytest.mark.parametrize("name", SAME)
def test_masks_of_every_mode_have_one_meaning(name: str) -> None:
    assert torch.equal(read_mask(SAME[name])[0, 0], torch.from_numpy(HOLE / 255).float())


def test_grey_stays_grey() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    exact = levels / np.float32(255)
    for image in (Image.fromarray(levels), bands(255, levels), bands(levels, 255)):
        mask = read_mask(image)[0, 0].numpy()
        assert np.array_equal(
            mask[(levels > 16) & (levels < 239)], exact[(levels > 16) & (levels < 239)]
        )
        assert (mask[levels <= 16] == 0).all() and (mask[levels >= 239] == 1).all()


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (bands(0, 255 - HOLE), "in OpenAI's convention: its alpha"),
        (bands(GREY, GREY, GREY, 255 - HOLE), "two readings"),
        (bands(HOLE, HOLE, HOLE, np.where(GREY > 9, 255, 0)), "two readings"),
        (bands(255, 0, 0, HOLE), "two readings"),
        (bands(255, 255, 255, 0), "transparent everywhere"),
        (bands(HOLE, 0, 0), "in colour"),
        (Image.fromarray(HOLE // 255), "brightest level of the mask is 1 of 255"),
        (Image.fromarray(HOLE.astype(np.uint16)), "brightest level of the mask is 1 of 255"),
        (Image.fromarray(HOLE.astype(np.int32)), "of unknown range"),
        (Image.fromarray(HOLE.astype(np.float32) / 255), "of unknown range"),
    ],
    ids=range(10),
)
def test_masks_of_two_readings_are_refused(mask: Image.Image, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read_mask(mask)


@pytest.mark.parametrize("paint", [0, 255, GREY])
def test_the_inverted_alpha_of_openais_masks_is_a_mask(paint: np.ndarray | int) -> None:
    foreign = bands(paint, paint, paint, 255 - HOLE)
    mask = read_mask(ImageOps.invert(foreign.getchannel("A")))
    assert torch.equal(mask[0, 0], torch.from_numpy(HOLE / 255).float())


def test_a_black_mask_is_named(model: LatentDiffusion, caplog: pytest.LogCaptureFixture) -> None:
    for mask, warnings in ((PLAIN, []), (Image.new("L", (16, 16)), ["nothing is drawn anew"])):
        caplog.clear()
        plan = inpaint(model, Image.fromarray(GREY), mask, REQUEST)
        assert [message.partition(": ")[2] for message in caplog.messages] == warnings
    assert np.array_equal(pixels(model.run(plan)[0])[..., 0], GREY)


def test_noise_and_jpeg_leave_the_latent_cells_as_they_are(model: LatentDiffusion) -> None:
    clean = read_mask(Image.fromarray(HOLE))
    cells = latent_mask(model, clean)
    assert cells.sum() == 3 * 4
    mask = torch.from_numpy(HOLE / 255).float()[None, None]
    assert torch.equal(latent_mask(model, mask.clamp(min=2 / 255)), cells)
    assert latent_mask(model, mask.clamp(min=2.001 / 255)).all()
    large = Image.new("L", (128, 96))
    ImageDraw.Draw(large).ellipse((20, 25, 90, 70), fill=255)
    sharp, lossy = (read_mask(m) for m in (large, reread(large, "jpeg", quality=85)))
    reach = torch.nn.functional.max_pool2d(sharp, 17, 1, 8)
    assert not latent_mask(model, lossy)[latent_mask(model, reach) == 0].any()
    assert (lossy[reach == 0] == 0).all()
    assert torch.equal(
        latent_mask(model, lossy).bool() | latent_mask(model, sharp).bool(),
        latent_mask(model, lossy).bool(),
    )


def test_a_white_brush_on_nothing_draws_the_hole_alone(model: LatentDiffusion) -> None:
    photo = Image.fromarray(np.stack([GREY] * 3, 2))
    expected = model.run(inpaint(model, photo, PLAIN, REQUEST))[0]
    for name in ("white RGBA with alpha", "noise near black"):
        assert np.array_equal(model.run(inpaint(model, photo, SAME[name], REQUEST))[0], expected)
    assert np.array_equal(pixels(expected)[HOLE == 0], pixels(photo)[HOLE == 0])


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P3", "RGBA P3", "CMYK", "L with a profile"])
def test_inpainting_keeps_transparency_and_profile(mode: str, model: LatentDiffusion) -> None:
    numbers = np.random.default_rng(3).integers(0, 256, (16, 16, 4), np.uint8)
    profile = matrix_profile(DISPLAY_P3)
    image = {
        "LA": Image.fromarray(numbers[:, :, :2], "LA"),
        "RGBA": Image.fromarray(numbers, "RGBA"),
        "P3": reread(Image.fromarray(numbers[:, :, :3]), icc_profile=profile),
        "RGBA P3": reread(Image.fromarray(numbers, "RGBA"), icc_profile=profile),
        "CMYK": Image.fromarray(numbers, "CMYK"),
        "L with a profile": reread(Image.fromarray(GREY), icc_profile=grey_profile(1.8)),
    }[mode]
    result = model.run(inpaint(model, image, PLAIN, REQUEST))[0]
    own = {
        "LA": image.convert("RGBA"),
        "CMYK": image.convert("RGB"),
        "L with a profile": to_srgb(image).convert("RGB"),  # a profile of grey fits no colours
    }.get(mode, image)
    kept = image.info.get("icc_profile") if "P3" in mode else None
    assert result.mode == own.mode and result.info.get("icc_profile") == kept
    by_profile = [clause for clause in losses(image, keeps=True) if "by its profile" in clause]
    assert bool(by_profile) == (mode == "L with a profile")
    assert np.array_equal(pixels(result)[HOLE == 0], pixels(own)[HOLE == 0])
    if result.mode == "RGBA":
        assert (pixels(result)[HOLE == 255][:, 3] == 255).all()
    # the network sees the image in sRGB over white, and its own colours come back in the result
    seen = model.run(inpaint(model, to_tensor(image), PLAIN, REQUEST))[0]
    drawn = to_tensor(reread(result, icc_profile=result.info.get("icc_profile")))
    difference = (drawn - to_tensor(seen))[0, :, torch.from_numpy(HOLE == 255)].abs() * 127.5
    assert difference.max() <= (6 if "P3" in mode else 0.01)
    grown = model.run(outpaint(model, image, REQUEST, left=2, top=4))[0]
    assert grown.mode == result.mode and grown.size == (18, 20)
    assert np.array_equal(pixels(grown)[4:, 2:], pixels(own))
    if result.mode == "RGBA":
        assert (pixels(grown)[:4, :, 3] == 255).all()
    without = model.run(inpaint(model, image, PLAIN, REQUEST, paste=False))[0]
    assert without.mode == "RGB" and "icc_profile" not in without.info


def test_a_grey_model_keeps_transparency() -> None:
    grey = tiny_model()
    image = Image.fromarray(np.dstack([GREY] * 3 + [GREY | 1]), "RGBA")
    result = grey.run(inpaint(grey, image, PLAIN, REQUEST))[0]
    assert result.mode == "LA"
    assert np.array_equal(pixels(result)[HOLE == 0], pixels(image)[HOLE == 0][:, [0, 3]])


def test_a_grey_model_keeps_a_profile_of_grey() -> None:
    grey, profile = tiny_model(), grey_profile(1.8)
    image = reread(Image.fromarray(GREY), icc_profile=profile)
    result = grey.run(inpaint(grey, image, PLAIN, REQUEST))[0]
    assert result.mode == "L" and result.info["icc_profile"] == profile
    assert np.array_equal(pixels(result)[HOLE == 0], GREY[HOLE == 0])
    assert losses(image, keeps=True, grey=True) == []


@pytest.mark.parametrize("task", [inpaint, outpaint])
def test_the_request_of_a_plan_keeps_no_other_image(
    task: Callable[..., Plan], model: LatentDiffusion
) -> None:
    first, second = (bands(*(np.roll(GREY, k, 1) for k in (0, 1, 2)), GREY | k) for k in (1, 2))
    settings = {"mask": PLAIN} if task is inpaint else {"left": 2}
    plan = task(model, first, request=REQUEST, **settings)
    reused = replace(plan.request, height=None, width=None, noise_offset=0)
    again = task(model, second, request=reused, **settings)
    expected = task(model, second, request=REQUEST, **settings).request.originals
    assert expected is not None and again.request.originals == expected
    opaque = task(model, second.convert("RGB"), request=reused, **settings)
    assert opaque.request.originals is None


@pytest.mark.parametrize("name", SAME)
def test_tasks_read_images_of_every_mode(name: str, model: LatentDiffusion) -> None:
    """As pixels: upright, in sRGB, over white (`test_image_files.py` has their values)."""
    image = SAME[name]
    numbers = to_tensor(image).expand(-1, 3, -1, -1)
    for task in (image_to_image, enlarge, variations):
        a, b = (task(model, one, REQUEST, strength=0.5) for one in (image, numbers))
        assert a.request.init_latent is not None and b.request.init_latent is not None
        assert torch.equal(a.request.init_latent, b.request.init_latent), task
    a, b = (inpaint(model, one, PLAIN, REQUEST) for one in (image, numbers))
    assert a.request.composite is not None and b.request.composite is not None
    assert torch.equal(a.request.composite[0], b.request.composite[0])


def test_originals_of_another_size_or_number_are_refused(model: LatentDiffusion) -> None:
    image = torch.zeros(1, 3, 16, 16)
    pair = (image, image[:, :1])
    for originals, composite, message in (
        ([Image.new("RGBA", (8, 16))], pair, "of the same size"),
        ([Image.new("RGBA", (16, 16))] * 2, pair, "2 images for 1"),
        ([], pair, "0 images for 1"),
        ([Image.new("RGBA", (16, 16))], None, "originals without composite"),
    ):
        with pytest.raises(UserError, match=message):
            model.plan(Request("bag", originals=originals, composite=composite))
