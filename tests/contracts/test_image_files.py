"""Image files of every mode: colours by their ICC profile, depth, transparency, limits, damage.

Oracles of colours are the published formulas of sRGB and of the profiles' primaries.
"""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.images import pixels
from helpers.profiles import (
    ADOBE_GAMMA,
    ADOBE_RGB,
    DISPLAY_P3,
    SRGB,
    cmyk_profile,
    grey_profile,
    in_srgb,
    matrix_profile,
    srgb_encoded,
)
from sfumato.data import Transform, open_images
from sfumato.errors import UserError
from sfumato.images import grid, read_parameters, to_tensor, write_png
from sfumato.io import image_files
from sfumato.io.atomic import NotWritten, atomic_folder
from sfumato.io.image_files import (
    flatten,
    frame_count,
    losses,
    open_image,
    over_white,
    put_back,
    to_srgb,
    with_own_colours,
)
from sfumato.predict.conditioners.class_labels import ClassLabels
from sfumato.predict.conditioners.class_names import ClassNames

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
P3, ADOBE = matrix_profile(DISPLAY_P3), matrix_profile(ADOBE_RGB, ADOBE_GAMMA)


def saved(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(bits: int, colour: int, rows: bytes, size: tuple[int, int], extra: bytes = b"") -> bytes:
    """A PNG of one row, or of rows that have their filter bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0))
    parts = (header, extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


# ---- profiles ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("primaries", "gamma"), [(DISPLAY_P3, None), (ADOBE_RGB, ADOBE_GAMMA)], ids=["P3", "Adobe"]
)
def test_colours_become_srgb_by_their_profile(
    primaries: tuple, gamma: float | None, tmp_path: Path
) -> None:
    expected = in_srgb(COLOURS, primaries, gamma)
    assert np.abs(expected - COLOURS).max() > 10
    image, profile = Image.fromarray(COLOURS), matrix_profile(primaries, gamma)
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "a.png"
    image.save(path, icc_profile=profile)
    opened = open_image(path)
    results = {
        "tasks": to_tensor(opened)[0].add(1).mul(127.5).permute(1, 2, 0).round().numpy(),
        "training": Transform().to_pixels(path).transpose(1, 2, 0).astype(float),
        "bytes of a table": Transform().to_pixels(path.read_bytes()).transpose(1, 2, 0) * 1.0,
        "folder": open_images(tmp_path / "a").batch([0])["image"][0].permute(1, 2, 0).numpy()
        * 127.5
        + 127.5,
    }
    for name, result in results.items():
        assert np.abs(result - expected).max() <= 2, name
        assert np.abs(result - expected).mean() < 0.6, name
    with_alpha = image.convert("RGBA")
    with_alpha.putalpha(128)
    decoded = to_srgb(open_image(saved(with_alpha, icc_profile=profile)))
    assert decoded.mode == "RGBA" and decoded.getchannel("A").getextrema() == (128, 128)
    assert np.array_equal(np.asarray(decoded)[:, :, :3], np.asarray(flatten(opened)))
    few = image.quantize(8)
    result = flatten(open_image(saved(few, icc_profile=profile)))
    assert np.abs(pixels(result) - in_srgb(pixels(few.convert("RGB")), primaries, gamma)).max() <= 2


@pytest.mark.parametrize(
    "profile",
    [
        matrix_profile(SRGB),
        b"no profile at all",
        P3[:200],
        P3[:132] + bytes(len(P3) - 132),
        grey_profile(1.8),
        cmyk_profile(np.zeros((2, 2, 2, 2, 3))),
    ],
    ids=["sRGB", "text", "cut", "zeros", "of grey", "of ink"],
)
def test_pixels_stay_where_a_profile_is_srgb_or_broken(profile: bytes) -> None:
    data = saved(Image.fromarray(COLOURS), icc_profile=profile)
    assert np.array_equal(np.asarray(flatten(open_image(data))), COLOURS)
    assert np.array_equal(Transform().to_pixels(data).transpose(1, 2, 0), COLOURS)


def test_grey_has_profiles_too() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for kind in ("png", "jpeg", "tiff"):
        data = saved(Image.fromarray(levels), kind, icc_profile=grey_profile(1.8), quality=100)
        stored = pixels(Image.open(io.BytesIO(data)))
        result = flatten(open_image(data))
        assert result.mode == "L"
        assert np.abs(pixels(result) - srgb_encoded((stored / 255) ** 1.8) * 255).max() <= 2, kind
    # PNG allows no profile of RGB for grey, and readers ignore it
    colour = saved(Image.fromarray(levels), icc_profile=ADOBE)
    assert np.array_equal(np.asarray(flatten(open_image(colour))), levels)


def test_ink_becomes_srgb_by_its_profile() -> None:
    corners = np.zeros((2, 2, 2, 2, 3))
    corners[..., 0] = 50
    corners[0, 0, 0, 0], corners[1, 1, 1, 1] = (100, 0, 0), (0, 0, 0)
    corners[1, 0, 0, 0], corners[0, 1, 0, 0] = (62, -31, -38), (52, 66, -2)
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0]]], np.uint8)
    image = Image.fromarray(inks, "CMYK")
    # sRGB of the three Lab colours, by the CIE's formulas from D50
    expected = [[[255, 255, 255], [0, 168, 217], [222, 54, 127]]]
    for kind in ("tiff", "jpeg"):
        data = saved(
            image.resize((48, 16), 0), kind, icc_profile=cmyk_profile(corners), quality=100
        )
        result = pixels(flatten(open_image(data)))[8:9, 8::16]
        assert np.abs(result - expected).max() <= 4, kind
        plain = pixels(flatten(open_image(saved(image.resize((48, 16), 0), kind, quality=100))))
        assert np.abs(plain[8, 8::16] - (255 - inks[0, :, :3])).max() <= 3, kind


def test_a_build_without_littlecms_leaves_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files.features, "check", lambda name: False)
    image_files._read_profile.cache_clear()
    try:
        data = saved(Image.fromarray(COLOURS), icc_profile=P3)
        assert np.array_equal(np.asarray(flatten(open_image(data))), COLOURS)
    finally:
        image_files._read_profile.cache_clear()


# ---- modes ---------------------------------------------------------------------------------------

SHOWN = {
    "1": ((1,), (255,)),
    "L": ((70,), (70,)),
    "LA": ((70, 102), (181,)),
    "La": ((28, 102), (181,)),
    "P": ((3,), (3, 3, 3)),
    "PA": ((3, 0), (255, 255, 255)),
    "RGB": ((10, 20, 30), (10, 20, 30)),
    "RGBX": ((10, 20, 30, 0), (10, 20, 30)),
    "RGBA": ((10, 20, 30, 51), (206, 208, 210)),
    "RGBa": ((2, 4, 6, 51), (206, 208, 210)),
    "CMYK": ((255, 0, 0, 0), (0, 255, 255)),
    "YCbCr": ((76, 85, 255), (254, 0, 0)),
    "LAB": ((255, 128, 128), (255, 255, 255)),
    "HSV": ((0, 255, 255), (255, 0, 0)),
    "I;16": ((257 * 70 + 128,), (70,)),
    "I;16B": ((257 * 70 - 128,), (70,)),
}


@pytest.mark.parametrize("mode", SHOWN)
def test_every_mode_is_shown_as_it_is_meant(mode: str) -> None:
    pixel, expected = SHOWN[mode]
    if mode == "LAB":
        image = Image.merge(mode, [Image.new("L", (2, 2), value) for value in pixel])
    elif len(pixel) > 1:
        image = Image.frombytes(mode, (2, 2), bytes(pixel) * 4)
    else:
        image = Image.new(mode, (2, 2), pixel[0])
    if mode.startswith("P"):
        image.putpalette([value for k in range(256) for value in (k, k, k)])
    result = np.asarray(flatten(image)).reshape(4, -1)
    assert np.abs(result[0].astype(int) - expected).max() <= 1, result[0]
    assert np.array_equal(Transform().to_pixels(image).reshape(-1, 4).T, result)


def test_transparent_colours_of_png_at_every_depth() -> None:
    """tRNS names a level of the file, which Pillow compares with levels scaled to 8 bits."""
    trns = chunk(b"tRNS", struct.pack(">H", 2))
    for bits, row, expected in (
        (1, 0b01000000, None),
        (2, 0b00011011, [0, 85, 255, 255]),
        (4, 0x02, [0, 255]),
    ):
        extra = chunk(b"tRNS", struct.pack(">H", 0)) if bits == 1 else trns
        width = 2 if bits == 1 else 8 // bits
        data = png(bits, 0, bytes([0, row]), (width, 1), extra)
        assert pixels(flatten(open_image(data)))[0].tolist() == (expected or [255, 255]), bits
    deep = png(16, 0, b"\0" + struct.pack(">3H", 0, 2, 65535), (3, 1), trns)
    assert pixels(flatten(open_image(deep)))[0].tolist() == [0, 255, 255]
    assert np.asarray(to_srgb(open_image(deep)))[0, :, 1].tolist() == [255, 0, 255]
    colour = png(
        8, 2, bytes([0, 9, 8, 7, 9, 8, 6]), (2, 1), chunk(b"tRNS", bytes([0, 9, 0, 8, 0, 7]))
    )
    assert pixels(flatten(open_image(colour)))[0].tolist() == [[255] * 3, [9, 8, 6]]
    row = b"\0" + struct.pack(">3H", 1, 2, 3)
    with pytest.raises(UserError, match="16-bit PNG with a transparent colour"):
        open_image(png(16, 2, row, (1, 1), chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))))
    assert pixels(flatten(open_image(png(16, 2, row, (1, 1)))))[0].tolist() == [[0, 0, 0]]


def tiff(values: bytes, bits: int, photometric: int, kind: int = 1, order: str = "<") -> bytes:
    """A TIFF of one row of 4 grey pixels."""
    entries = [(256, 4), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 200)]
    entries += [(277, 1), (278, 1), (279, len(values)), (339, kind)]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    for tag, value in entries:
        long = tag in (273, 279)
        number = struct.pack(order + ("I" if long else "HH"), *((value,) if long else (value, 0)))
        head += struct.pack(order + "HHI", tag, 4 if long else 3, 1) + number
    return (head + bytes(4)).ljust(200, b"\0") + values


def test_deep_grey_is_scaled_by_the_white_of_its_file() -> None:
    for order in "<>":
        data = tiff(struct.pack(order + "4H", 0, 257, 25700, 65535), 16, 1, order=order)
        assert pixels(flatten(open_image(data))).tolist() == [[0, 1, 100, 255]], order
    inverted = tiff(struct.pack("<4H", 0, 257, 25700, 65535), 16, 0)
    assert pixels(flatten(open_image(inverted))).tolist() == [[255, 254, 155, 0]]
    twelve = tiff(bytes([0x00, 0x00, 0x10, 0x80, 0x0F, 0xFF]), 12, 1)
    assert pixels(flatten(open_image(twelve))).tolist() == [[0, 1, 128, 255]]
    portable = b"P5 2 1 1000\n" + struct.pack(">2H", 500, 1000)
    assert np.abs(pixels(flatten(open_image(portable))) - [127.5, 255]).max() <= 0.5


@pytest.mark.parametrize(
    "data",
    [
        tiff(struct.pack("<4f", 0, 0.5, 1, 2), 32, 1, 3),
        tiff(struct.pack("<4I", 0, 5, 255, 9), 32, 1),
        tiff(struct.pack("<4h", -9, 5, 255, 9), 16, 1, 2),
        b"Pf 1 1 -1.0\n" + struct.pack("<f", 0.5),
    ],
    ids=["float", "32 bits", "signed", "PFM"],
)
def test_numbers_of_unknown_range_are_refused(data: bytes) -> None:
    with pytest.raises(UserError, match="of unknown range: expected 8 bits a channel, or 16"):
        open_image(data)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_orientation_does_not_hide_the_image() -> None:
    image = Image.fromarray(COLOURS)
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense"):
        assert np.array_equal(np.asarray(flatten(open_image(saved(image, exif=exif)))), COLOURS)


# ---- limits and damage ---------------------------------------------------------------------------


def test_text_of_any_length_does_not_hide_the_image(tmp_path: Path) -> None:
    """Pillow reads 1 MiB of each text and of a profile; workflows and large profiles have more."""
    image = Image.fromarray(COLOURS)
    plain = saved(image)
    place = plain.index(b"IDAT") - 4
    long, workflow = b"{" + b" " * (2 << 20) + b"}", b"workflow\0"
    profile = matrix_profile(DISPLAY_P3, padding=2 << 20)
    texts = {
        "zTXt": chunk(b"zTXt", workflow + b"\0" + zlib.compress(long)),
        "iTXt": chunk(b"iTXt", workflow + b"\1\0\0\0" + zlib.compress(long)),
        "many": chunk(b"tEXt", workflow + long * 11) * 3,
    }
    for name, text in texts.items():
        for data in (plain[:place] + text + plain[place:], plain[:-12] + text + plain[-12:]):
            assert np.array_equal(np.asarray(flatten(open_image(data))), COLOURS), name
            assert np.array_equal(Transform().to_pixels(data).transpose(1, 2, 0), COLOURS), name
    packed = chunk(b"iCCP", b"p3\0\0" + zlib.compress(profile))
    coloured = flatten(open_image(plain[:33] + packed + plain[33:]))
    assert np.array_equal(
        np.asarray(coloured), np.asarray(flatten(open_image(saved(image, icc_profile=P3))))
    )
    path = write_png(tmp_path / "a.png", image, {"seed": 3})
    data = path.read_bytes()
    path.write_bytes(data[:33] + texts["zTXt"] + data[33:])
    assert read_parameters(path) == {"seed": 3}


def test_large_images_open_and_larger_ones_are_refused_by_their_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match="has 400 megapixels, more than the 268 "):
        open_image(png(8, 0, b"", (20_000, 20_000)))
    with pytest.raises(UserError, match="has 10000 megapixels, more than the 268 "):
        open_image(png(8, 0, b"", (100_000, 100_000)))
    data = saved(Image.new("L", (30, 30), 7))
    monkeypatch.setattr(image_files, "PILLOW_LIMIT", 100)
    monkeypatch.setattr(image_files, "LARGEST", 900)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert open_image(data).size == (30, 30)
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr(image_files, "LARGEST", 899)
    with pytest.raises(UserError, match="decompression bombs"):
        open_image(data)
    # a limit that the program has set stays
    monkeypatch.setattr(image_files, "LARGEST", 900)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(UserError, match=r"has 0\.0009 megapixels, more than the 0\.0001 "):
        open_image(data)


def test_the_limit_of_the_message_is_the_one_that_was_exceeded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of some formats Pillow checks parts later, while another thread may open an image."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)

    def load(stream: io.BytesIO) -> None:
        try:
            Image._decompression_bomb_check((30, 30))
        finally:
            Image.MAX_IMAGE_PIXELS = 900

    monkeypatch.setattr(image_files, "_load", load)
    with pytest.raises(UserError, match=r"has 0\.0009 megapixels, more than the 0\.0001 "):
        open_image(b"any")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"/annex/objects/SHA256E-s1--1.png\n", "git-annex"),
        (bytes(900), "begins with zeros alone"),
        (b"\xfd7zXZ\0" + bytes(9), "an xz archive: unpack it first"),
        (b"a" * 5 + bytes(252) + b"ustar", "a tar archive: unpack it first"),
        (b"\x7fELF", "not an image file that Pillow can open"),
        (b"\x93NUMPY\1\0", "a NumPy array: give an image such as PNG or JPEG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"\n <!DOCTYPE html>\n<html lang='en'>", "a web page, .*: download the image itself"),
        (b"<html><body>429</body></html>", "a web page"),
        (b"<!doctype html><title>x</title><svg width='1'></svg>", "a web page"),
        (b"<?xml version='1.0'?><!DOCTYPE html><html><svg/></html>", "a web page"),
        (b"<?xml version='1.0'?>\n<svg width='1'/>", "an SVG drawing"),
        (b"<!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1//EN'><svg/>", "an SVG drawing"),
        (b"\n<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"<Error><Code>AccessDenied</Code></Error>", "a web page"),
        (b'{"error": "not found"}', 'it is a text that begins \'{"error": "not found"}\''),
        ("notes über ein Bild".encode(), "it is a text that begins 'notes über ein Bild'"),
        (struct.pack("<Q", 20) + b'{"a": {"dtype": ""}}', "safetensors"),
        (b"\x80\x02}q\0.", "a pickle"),
        (b"PK\x03\x04" + bytes(140), "a zip archive"),
        (b"GGUF\3\0\0\0", "GGUF"),
        (b"\0\0\0\x18ftypheic" + bytes(12), "HEIC, which Pillow does not read here"),
        (b"\0\0\0\x18ftypisom" + bytes(12), "a video"),
        (b"%PDF-1.7", "a PDF document"),
        (b"\xff\x0a" + bytes(9), "JPEG XL"),
        (b"II*\0\x08\0\0\0" + bytes(9), "a camera's raw file"),
        (b"\x89PNG\r\n\x1a\n\0\0", "header is truncated or damaged"),
        (b"\xff\xd8\xff\xe0", "header is truncated or damaged"),
        (bytes(range(200, 256)), "not an image file that Pillow can open"),
    ],
)
def test_files_that_are_no_images_are_named_by_their_first_bytes(
    data: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        with pytest.raises(UserError, match=reason):
            open_image(source)
    with pytest.raises(UserError, match=reason):
        Transform().to_pixels(data)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff", "bmp", "gif"])
def test_cut_files_are_named(kind: str) -> None:
    data = saved(Image.effect_noise((64, 64), 80).convert("RGB"), kind)
    with pytest.raises(UserError, match=r"truncated|damaged"):
        open_image(data[: len(data) // 2])


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is a folder"):
        open_image(tmp_path)
    with pytest.raises(UserError, match="it is a folder"):
        Transform().to_pixels(tmp_path)


# ---- the parts that a network does not draw ------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("profile", [None, "own"])
def test_the_original_is_put_back_bit_for_bit(mode: str, profile: str | None) -> None:
    numbers = np.random.default_rng(1)
    own = numbers.integers(0, 256, (6, 8, len(mode)), np.uint8)
    own[..., -1] |= 1
    image = Image.fromarray(own[:, :, 0] if mode == "L" else own, mode)
    icc = (grey_profile(1.8) if "L" in mode else P3) if profile else None
    opened = open_image(saved(image, icc_profile=icc))
    original = with_own_colours(opened)
    if profile is None and "A" not in mode:
        assert original is None
        return
    assert original is not None and original.mode == mode
    mask = np.zeros((6, 8))
    mask[:, 3:], mask[2] = 1, 0.5
    drawn = flatten(opened)  # equal to the original everywhere
    result = put_back(drawn, original, mask)
    assert result.mode == mode and np.array_equal(
        pixels(result)[mask == 0], pixels(image)[mask == 0]
    )
    assert result.info.get("icc_profile") == icc
    again = open_image(saved(result))
    assert np.abs(pixels(flatten(again)) - pixels(drawn))[mask == 1].max() <= 2
    assert np.abs(pixels(over_white(to_srgb(again))) - pixels(drawn)).max() <= 5
    if "A" in mode:
        alpha = pixels(result)[..., -1]
        assert (alpha[mask == 1] == 255).all()
        halfway = (pixels(image)[..., -1] + 255) / 2
        assert np.abs(alpha - halfway)[mask == 0.5].max() <= 1


def test_opaque_images_in_srgb_have_nothing_to_put_back() -> None:
    for image in (
        Image.fromarray(COLOURS),
        Image.fromarray(COLOURS).convert("RGBA"),
        Image.new("CMYK", (4, 4)),
        open_image(saved(Image.fromarray(COLOURS), icc_profile=matrix_profile(SRGB))),
    ):
        assert with_own_colours(image) is None


def test_losses_are_named() -> None:
    photo = Image.fromarray(COLOURS)
    clear = photo.convert("RGBA")
    clear.putalpha(9)
    p3, broken = (open_image(saved(photo, icc_profile=p)) for p in (P3, b"broken"))
    grey = open_image(saved(photo.convert("L"), icc_profile=grey_profile(1.8)))
    in_grey, by_profile = (
        "its colours become grey, as the model draws",
        "its colours become sRGB, by its profile 'test colours'",
    )
    for image, options, expected in (
        (photo, {}, []),
        (clear, {}, ["its transparency is laid over white"]),
        (clear, {"keeps": True}, []),
        (p3, {}, [by_profile]),
        (p3, {"keeps": True}, []),
        (grey, {}, [by_profile]),
        (grey, {"keeps": True}, [by_profile]),  # the model draws colours
        (grey, {"keeps": True, "grey": True}, []),
        (p3, {"keeps": True, "grey": True}, [by_profile, in_grey]),
        (broken, {}, ["its colour profile is damaged or of another colour space, and is ignored"]),
        (photo, {"grey": True}, [in_grey]),
        (photo.convert("L").convert("RGB"), {"grey": True}, []),
        (photo.convert("LAB"), {"keeps": True}, ["its LAB colours become sRGB"]),
        (Image.new("I;16", (2, 2)), {}, ["its 16 bits a channel become 8"]),
    ):
        assert losses(image, **options) == expected


def colour_tiff(values: bytes, bits: int, compression: int = 1) -> bytes:
    """A TIFF of one pixel in RGB, big-endian."""
    entries = [(256, 1), (257, 1), (258, 160), (259, compression), (262, 2), (273, 200)]
    entries += [(277, 3), (278, 1), (279, len(values))]
    head = b"MM\0*" + struct.pack(">IH", 8, len(entries))
    for tag, value in entries:
        kind, count = (4, 1) if tag in (273, 279) else (3, 3 if tag == 258 else 1)
        number = struct.pack(">HH", value, 0) if kind == 3 and count == 1 else None
        head += struct.pack(">HHI", tag, kind, count) + (number or struct.pack(">I", value))
    return (head.ljust(160, b"\0") + struct.pack(">3H", *[bits] * 3)).ljust(200, b"\0") + values


def bitmap_of_16_bits() -> bytes:
    """A BMP of one pixel with 5 bits of red and blue and 6 of green."""
    head = struct.pack("<IiiHHIIiiII", 40, 1, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    return b"BM" + struct.pack("<I4xI", 70, 66) + head + masks + bytes([0, 248, 0, 0])


def test_the_depth_of_colours_is_named() -> None:
    """Pillow reads 8 of 16 bits a channel without a word."""
    lost = ["its 16 bits a channel become 8"]
    row = struct.pack(">4H", 1000, 2000, 3000, 65535)
    for data in (
        png(16, 2, b"\0" + row[:6], (1, 1)),
        png(16, 4, b"\0" + row[:4], (1, 1)),
        png(16, 6, b"\0" + row, (1, 1)),
        colour_tiff(row[:6], 16),
        colour_tiff(zlib.compress(row[:6]), 16, compression=8),
        b"P6 1 1 65535\n" + row[:6],
        b"P3 1 1 1000\n1 2 1000",
    ):
        image = open_image(data)
        assert losses(image, keeps=True) == lost
        again = open_image(saved(flatten(image)))
        assert losses(again) == []
    text = chunk(b"iTXt", b"workflow\0\0\0\0\0" + b" " * (2 << 20))
    assert losses(open_image(png(16, 2, b"\0" + row[:6], (1, 1), text))) == lost
    for data in (
        colour_tiff(row[:3], 8),
        png(8, 2, b"\0" + row[:3], (1, 1)),
        b"P6 1 1 255\n" + row[:3],
        b"P6 1 1 100\n" + bytes(3),
        bitmap_of_16_bits(),
    ):
        assert losses(open_image(data)) == []


def psd(layers: int) -> bytes:
    """A drawing of Photoshop: 2 x 2 pixels, and empty layers."""
    layer = bytes(16) + bytes(2) + b"8BIMnorm" + bytes(4) + bytes(4)
    content = struct.pack(">h", layers) + layer * layers
    section = struct.pack(">I", len(content)) + content
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 2, 2, 8, 3) + bytes(8)
    return head + struct.pack(">I", len(section)) + section + bytes(2) + bytes(12)


def test_frames_are_counted_and_layers_are_not(tmp_path: Path) -> None:
    path, photo = tmp_path / "a", Image.fromarray(COLOURS)
    path.write_bytes(psd(3))
    assert Image.open(path).n_frames == 3  # pyright: ignore[reportAttributeAccessIssue]
    assert frame_count(path) == 1 and open_image(path).size == (2, 2)
    photo.save(path, "gif", save_all=True, append_images=[photo.rotate(90), photo.rotate(180)])
    assert frame_count(path) == 3


@pytest.mark.parametrize("name", ["a/b.png", "a/b/c.png", "link/b.png"])
def test_a_file_in_the_place_of_a_folder_is_no_name_that_is_taken(
    name: str, tmp_path: Path
) -> None:
    """`FileExistsError` would be, which asks for another number in the name."""
    (tmp_path / "a").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("nowhere")
    for replace in (False, True):
        with pytest.raises(NotWritten, match=r"Not a directory|is not a folder"):
            write_png(tmp_path / name, Image.fromarray(COLOURS), replace=replace)
    with pytest.raises(NotWritten), atomic_folder(tmp_path / name):
        raise AssertionError
    assert (tmp_path / "a").read_bytes() == b"mine"


def test_a_grid_compares_sizes_of_upright_images() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    photo = Image.fromarray(COLOURS)
    turned = open_image(saved(photo.transpose(Image.Transpose.ROTATE_90), exif=exif))
    assert turned.size != photo.size
    assert np.array_equal(pixels(grid([turned, photo], pad=0)), np.hstack([COLOURS] * 2))
    upright = open_image(saved(photo, exif=exif))
    with pytest.raises(UserError, match="must have one size, got 6x8, 8x6"):
        grid([upright, photo])


def test_a_grid_is_opaque_and_in_srgb() -> None:
    p3 = open_image(saved(Image.fromarray(COLOURS), icc_profile=P3))
    clear = Image.new("RGBA", p3.size, (0, 0, 0, 0))
    sheet = grid([p3, clear], pad=0)
    assert np.array_equal(
        np.asarray(sheet), np.hstack([pixels(flatten(p3)), pixels(flatten(clear))])
    )
    assert torch.equal(to_tensor(sheet)[:, :, :, 8:], torch.ones(1, 3, 6, 8))


# ---- names ---------------------------------------------------------------------------------------

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_names_of_classes_are_compared_composed(tmp_path: Path) -> None:
    """File systems of macOS decompose names of folders; prompts are typed composed."""
    for folder in (DECOMPOSED, COMPOSED, "bag"):
        (tmp_path / folder).mkdir()
        Image.fromarray(COLOURS).save(tmp_path / folder / "a.png")
    images = open_images(tmp_path)
    assert images.class_names == ("bag", COMPOSED)
    assert images.labels is not None and images.labels.tolist() == [0, 1, 1]
    for name, prompt in ((COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)):
        assert ClassNames(("bag", name)).label(prompt) == 1
        assert ClassNames(("bag", name)).label(prompt.upper()) == 1
        assert ClassLabels(("bag", f"{name}, x")).label(prompt) == 1


@pytest.mark.parametrize("stored", [COMPOSED, DECOMPOSED])
def test_names_of_files_are_compared_composed(stored: str, tmp_path: Path) -> None:
    written = {COMPOSED: DECOMPOSED, DECOMPOSED: COMPOSED}[stored]
    for kind in ("rows", "texts"):
        (tmp_path / kind).mkdir()
        Image.fromarray(COLOURS).save(tmp_path / kind / f"{stored}.png")
    row = {"file_name": f"{written}.png", "text": "a cup"}
    (tmp_path / "rows" / "metadata.jsonl").write_text(json.dumps(row))
    (tmp_path / "texts" / f"{written}.txt").write_text("a cup")
    for kind in ("rows", "texts"):
        assert open_images(tmp_path / kind).captions == ["a cup"]
