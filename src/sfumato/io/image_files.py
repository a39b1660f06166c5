"""Image files as 8-bit sRGB: opened, upright, in colours whose meaning is certain.

    file -> image of any mode -> L, LA, RGB or RGBA in sRGB -> L or RGB over white

Depth. 16-bit grey is divided by 257; of 16-bit colours Pillow reads the upper 8 bits. 32-bit
integers and floating-point numbers are refused, where the file does not say which number is white.

Colour. An ICC profile (ICC.1:2022) is converted to sRGB by LittleCMS, relative colorimetric with
black-point compensation. Pixels stay as they are without a profile, with a broken one, with one of
another colour space than the pixels, and with one that is sRGB to within `SRGB_TOLERANCE`.
"""

import io
import logging
import re
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError, features

from sfumato.errors import UserError
from sfumato.io.signatures import first_words, kind_of

LARGEST = 1 << 28
"""Most pixels of an image, 268 megapixels: above phone cameras' 200, 0.8 GB in memory."""

SRGB_TOLERANCE = 2
"""Levels of 255 by which a profile may differ from sRGB and count as sRGB."""

PILLOW_LIMIT = 1024**3 // 4 // 3
"""Pillow's own limit of pixels, where no program has changed it."""

PROFILE_LIMIT = 1 << 24
"""Most bytes of a profile: the largest of printers have a few million."""

SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
"""Colour space of a profile that fits an image mode."""

DEEP = "sfumato:deep"
"""Key of `Image.info`: True where the file has 16 bits a channel, of which 8 are read."""

_FRAMED = (b"GIF8", b"II*\0", b"MM\0*", b"RIFF", b"\x89PNG")
"""First bytes of formats whose files may have frames or pages."""

Stream = io.BytesIO | io.BufferedReader

logger = logging.getLogger(__name__)
_limit = threading.Lock()


# ---- files ---------------------------------------------------------------------------------------


def open_image(source: str | Path | bytes, keep: str | None = None) -> Image.Image:
    """Read an image file; of several frames the first.

    Args:
        source: A path, or the bytes of a file.
        keep: Keyword of a PNG's text to keep where other text is too large for Pillow.

    Returns:
        The image in its file's mode, with its pixels loaded.

    Raises:
        UserError: For a file that is no image, is damaged or too large, or whose white is unknown.
            The message has the reason and not the name, which the caller adds.
        FileNotFoundError: For a path without a file.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), keep)
    if Path(source).is_dir():
        raise UserError("it is a folder: expected one image file")
    try:
        with Path(source).open("rb") as stream:
            return _decode(stream, keep)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror or error}") from error


def _decode(stream: Stream, keep: str | None) -> Image.Image:
    head = stream.read(HEAD)
    if not head:
        raise UserError("the file is empty")
    stream.seek(0)
    try:
        try:
            image = _load(stream)
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
            stream.seek(0)
            data, profile = without_text(stream.read(), keep)
            image = _load(io.BytesIO(data))
            if profile:
                image.info["icc_profile"] = profile
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(foreign_kind(head)) from error
    except Image.DecompressionBombError as error:
        # of some formats Pillow decodes a part, or all, by its own limit
        raise _too_large(*_numbers(error)) from error
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise UserError(_damage(error)) from error
    white_level(image)
    return image


def _damage(error: Exception) -> str:
    reason = str(error) or type(error).__name__
    if "loader" in reason or "cannot load" in reason:
        return f"Pillow names this format and does not read it ({reason}): convert it to PNG"
    if "truncated" in reason.lower():
        return f"it is truncated ({reason}): copy or download it again"
    return f"it is damaged or of a kind that Pillow does not read ({reason})"


def _load(stream: Stream) -> Image.Image:
    image = _open(stream)
    _scale_transparent_colour(image)
    deep = _is_deep(image)
    image.load()
    if deep:
        image.info[DEEP] = True
    return image


def _open(stream: Stream) -> ImageFile.ImageFile:
    """Read the header of an image; `UserError` for more pixels than `LARGEST`."""
    with _limit:  # Pillow has one limit for the whole program
        before = Image.MAX_IMAGE_PIXELS
        unchanged = before == PILLOW_LIMIT
        if unchanged:
            Image.MAX_IMAGE_PIXELS = 2 * LARGEST
        try:
            image = Image.open(stream)
        except Image.DecompressionBombError as error:
            if unchanged:
                raise _too_large(_numbers(error)[0], LARGEST) from error
            raise
        finally:
            Image.MAX_IMAGE_PIXELS = before
    pixels = image.width * image.height
    if pixels > LARGEST and unchanged:
        raise _too_large(pixels, LARGEST)
    return image


def _numbers(error: Image.DecompressionBombError) -> tuple[int, int]:
    """Pixels of an image, and the limit that it exceeds, by Pillow's message."""
    pixels, limit = map(int, re.findall(r"\d+", str(error)))
    return pixels, limit


def _too_large(pixels: int, limit: int) -> UserError:
    return UserError(
        f"it has {_millions(pixels)} megapixels, more than the {_millions(limit)} that are opened "
        "(larger ones may be decompression bombs): reduce it first"
    )


def _millions(number: int) -> str:
    return f"{number / 1e6:.0f}" if number >= 1e7 else f"{number / 1e6:.3g}"


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """True for colours of 16 bits a channel, of which Pillow keeps 8."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return False
    decoder, _, _, arguments = image.tile[0]
    raw_mode, *rest = arguments if isinstance(arguments, tuple) else (arguments,)
    if decoder in ("ppm", "ppm_plain"):
        return rest[0] > 255  # the largest level
    # BGR;16, of BMP files, has 16 bits for three colours
    return decoder == "SGI16" or re.search(";16[BLN]", str(raw_mode)) is not None


def _scale_transparent_colour(image: ImageFile.ImageFile) -> None:
    """Bring the transparent colour of a PNG (tRNS) to the levels of the decoded pixels.

    Pillow scales pixels of 2, 4 and 16 bits to 8, and leaves this colour as the file has it.
    """
    value = image.info.get("transparency")
    if not isinstance(image, ImageFile.ImageFile) or image.format != "PNG":
        return
    if value is None or not image.tile:
        return
    raw_mode = str(image.tile[0][3])
    if raw_mode == "RGB;16B":
        raise UserError(
            "it is a 16-bit PNG with a transparent colour (tRNS), which Pillow reads in 8 bits: "
            "save it with an alpha channel, or with 8 bits a channel"
        )
    if isinstance(value, int) and raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = value * (85 if raw_mode == "L;2" else 17)


# ---- PNG chunks ----------------------------------------------------------------------------------

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end) of each chunk of a PNG; its length precedes the start."""
    place = len(PNG_SIGNATURE)
    while place + 8 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8], place + 4, min(place + 8 + length, len(data))
        place += 12 + length


def without_text(data: bytes, keep: str | None = None) -> tuple[bytes, bytes]:
    """Leave the text out of a PNG.

    Pillow reads at most 1 MiB of each text and of the profile. Programs write more: whole workflows
    in JSON. The text has no part in the pixels.

    Args:
        data: The bytes of a PNG.
        keep: Keyword of text that stays, if it is not compressed.

    Returns:
        The PNG without text and profile, and the profile of at most `PROFILE_LIMIT` bytes.
    """
    parts, profile = [data[: len(PNG_SIGNATURE)]], b""
    for kind, start, end in png_chunks(data):
        content = data[start + 4 : end]
        if kind == b"iCCP":
            # a name of at most 79 bytes, a zero, the method of compression, which is always 0
            packed = content.partition(b"\0")[2][1:]
            try:
                profile = zlib.decompressobj().decompress(packed, PROFILE_LIMIT)
            except zlib.error:
                profile = b""
        elif kind not in TEXT_CHUNKS or (
            keep is not None and kind == b"tEXt" and content.startswith(keep.encode() + b"\0")
        ):
            parts.append(data[start - 4 : end + 4])
    return b"".join(parts), profile


# ---- files that are no images --------------------------------------------------------------------

HEAD = 2048
"""Bytes by which the kind of a file is told."""

_BRANDS = {
    **dict.fromkeys(("heic", "heix", "hevc", "hevx", "heim", "heis", "mif1", "msf1"), "HEIC"),
    **dict.fromkeys(("avif", "avis"), "AVIF"),
    "crx ": "camera raw",
}
_JPEG_XL = (b"\xff\x0a", b"\0\0\0\x0cJXL ")
_MATROSKA = b"\x1aE\xdf\xa3"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"IIU\0", b"IIRO", b"FUJIFILMCCD-RAW")
_IMAGES = (PNG_SIGNATURE, b"\xff\xd8\xff", b"GIF8", b"BM", *_TIFF)


def foreign_kind(head: bytes) -> str:
    """Name the kind of a file that Pillow does not open, by its first bytes.

    Args:
        head: The first `HEAD` bytes, or all.

    Returns:
        "it is a web page, not the file: download the image itself" and the like.
    """
    if head[4:8] == b"ftyp":
        kind = _BRANDS.get(head[8:12].decode("latin-1"), "a video")
        if kind == "a video":
            return "it is a video: export one frame as PNG"
        if kind == "AVIF" and features.check("avif"):
            return "it is AVIF, and its header is truncated or damaged: copy or download it again"
        return f"it is {kind}, which Pillow does not read here: convert it to PNG or JPEG"
    if head.startswith(_JPEG_XL):
        return "it is a JPEG XL image, which Pillow does not read: convert it to PNG or JPEG"
    if head.startswith(_MATROSKA) or (head[:4] == b"RIFF" and head[8:12] == b"AVI "):
        return "it is a video: export one frame as PNG"
    if _is_svg(first_words(head)):
        return "it is an SVG drawing: export it as PNG"
    if head.startswith(_TIFF):
        return (
            "it is a TIFF or a camera's raw file of a kind that Pillow does not read: "
            "convert it to PNG or JPEG"
        )
    if head.startswith(_IMAGES):
        return "its header is truncated or damaged: copy or download it again"
    return kind_of(head, "image") or "it is not an image file that Pillow can open"


def _is_svg(words: bytes) -> bool:
    """Return True for a drawing; a web page may have one inside."""
    if words.startswith(b"<?xml"):
        return b"<svg" in words.partition(b"<html")[0]
    return words.startswith((b"<svg", b"<!doctype svg"))


# ---- depth, colour, transparency -----------------------------------------------------------------


def white_level(image: Image.Image) -> int | None:
    """White of an image whose pixels have more than 8 bits; None: they have 8.

    Raises:
        UserError: Where the file does not say it.
    """
    if image.mode == "F":
        raise UserError(
            "its pixels are floating-point numbers of unknown range: "
            "expected 8 bits a channel, or 16"
        )
    # Pillow scales grey of more than 8 bits in PGM files to 65535
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise UserError(
            "its pixels are 32-bit integers of unknown range: expected 8 bits a channel, or 16"
        )
    if not image.mode.startswith("I"):
        return None
    return 4095 if _tag(image, 258) == 12 else 65535  # BitsPerSample


def _tag(image: Image.Image, number: int) -> int | None:
    """First value of a TIFF's tag."""
    if image.format != "TIFF":
        return None
    value = image.getexif().get(number)
    return value[0] if isinstance(value, tuple) else value


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit sRGB.

    Returns:
        The image upright, mode L, LA, RGB or RGBA, without a profile.

    Raises:
        UserError: For pixels whose white is unknown.
    """
    base, alpha = split_alpha(image)
    profile = profile_of(image, base.mode)
    if profile is not None:
        base = profile.decode(base)
    elif base.mode == "CMYK":
        base = base.convert("RGB")
    return _merge(base, alpha)


def flatten(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit sRGB over white: mode L or RGB.

    Raises:
        UserError: For pixels whose white is unknown.
    """
    return over_white(to_srgb(image))


def over_white(image: Image.Image) -> Image.Image:
    """Lay an image of mode LA or RGBA over white; L and RGB stay."""
    if image.mode not in ("LA", "RGBA"):
        return image
    white = Image.new(image.mode[:-1], image.size, "white")
    white.paste(image.convert(white.mode), mask=image.getchannel("A"))
    return white


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Separate the colours of an image of any mode from its transparency.

    Returns:
        Colours, upright and by the image's own numbers, in mode L, RGB or CMYK; alpha in mode L, or
        None for an image without transparency.

    Raises:
        UserError: For pixels whose white is unknown.
    """
    white, min_is_white = white_level(image), _tag(image, 262) == 0  # PhotometricInterpretation
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # of a damaged EXIF block, as many as there are readers in Pillow
        image = image.copy()
    if white is not None:
        values = np.asarray(image).astype(np.int64)
        transparent = image.info.get("transparency")
        alpha = None
        if isinstance(transparent, int):
            alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        levels = eight_bits(values.clip(0, white), white)
        return Image.fromarray(255 - levels if min_is_white else levels), alpha
    if image.mode == "La":
        image = image.convert("LA")
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("LA" if grey else "RGBA")
        return image.convert("L" if grey else "RGB"), image.getchannel("A")
    if image.mode != "CMYK":
        image = image.convert("L" if grey else "RGB")
    return image, None


def _merge(base: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """Colours, which no one else holds, and alpha in one image, without metadata."""
    if alpha is not None:
        return Image.merge(f"{base.mode}A", (*base.split(), alpha))
    base.info = {}
    return base


def eight_bits(values: np.ndarray, white: int = 65535) -> np.ndarray:
    """Scale 0..white to 0..255, rounded to the nearest level."""
    return ((values.astype(np.int64) * 510 + white) // (2 * white)).astype(np.uint8)


# ---- profiles ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """An ICC profile, for images of one mode.

    Attributes:
        name: Its description.
        data: Its bytes.
        mode: Mode of the images: L, RGB or CMYK.
        to_srgb: Transform to mode RGB.
        from_srgb: Transform of mode RGB to `mode`; None: the profile has but one direction, as a
            scanner's, or PNG has no such mode.
        is_srgb: True for sRGB to within `SRGB_TOLERANCE`.
    """

    name: str
    data: bytes
    mode: str
    to_srgb: ImageCms.ImageCmsTransform
    from_srgb: ImageCms.ImageCmsTransform | None = None
    is_srgb: bool = False

    def decode(self, image: Image.Image) -> Image.Image:
        """Convert an image of `mode` to sRGB: L stays L, others become RGB."""
        colours = self.to_srgb.apply(image)
        return colours.getchannel("G") if self.mode == "L" else colours

    def encode(self, image: Image.Image) -> Image.Image:
        """Convert an image in sRGB, L or RGB, to `mode`."""
        assert self.from_srgb is not None
        return self.from_srgb.apply(image.convert("RGB"))


def profile_of(image: Image.Image, mode: str) -> Profile | None:
    """The profile by which an image's colours differ from sRGB.

    Args:
        image: The image as opened.
        mode: Mode of its colours: L, RGB or CMYK.

    Returns:
        None for an image without a profile, with one that is broken or of another colour space,
        and with one of sRGB. LAB images need none: their colours are absolute.
    """
    data = image.info.get("icc_profile")
    if not isinstance(data, bytes) or not data or image.mode == "LAB":
        return None
    profile = _read_profile(data, mode)
    return None if profile is None or profile.is_srgb else profile


@lru_cache(maxsize=16)
def _read_profile(data: bytes, mode: str) -> Profile | None:
    """Return the profile of these bytes; None: it is broken, or of another colour space."""
    if not features.check("littlecms2"):
        logger.warning(
            "Pillow was built without LittleCMS: colour profiles are ignored; "
            "install Pillow's wheel to have them converted"
        )
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(data))
        if data[16:20].decode("latin-1").strip() != SPACES[mode]:  # of the profile's header
            return None
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        forward = _transform(opened, srgb, mode, "RGB")
        name = ImageCms.getProfileDescription(opened).strip() or "unnamed"
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    profile = Profile(name, data, mode, forward)
    if mode == "CMYK":
        return profile
    samples = _samples(mode)
    difference = np.subtract(
        np.asarray(profile.decode(samples)), np.asarray(samples), dtype=np.int64
    )
    if np.abs(difference).max() <= SRGB_TOLERANCE:
        return replace(profile, is_srgb=True)
    try:
        backward = _transform(srgb, opened, "RGB", mode)
    except ImageCms.PyCMSError:
        return profile
    return replace(profile, from_srgb=backward)


def _transform(
    source: ImageCms.ImageCmsProfile, target: ImageCms.ImageCmsProfile, mode: str, target_mode: str
) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        source,
        target,
        mode,
        target_mode,
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _samples(mode: str) -> Image.Image:
    """An image of all grey levels, or of colours in steps of 15 levels."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1)
    return Image.fromarray(colours.reshape(len(steps), -1, 3))


# ---- the rest of an image ------------------------------------------------------------------------


def with_own_colours(image: Image.Image) -> Image.Image | None:
    """The parts of an image that opaque 8-bit sRGB lacks: transparency and a profile.

    Returns:
        The image upright, with the numbers of its file, mode L, LA, RGB or RGBA, and its profile in
        `info`; None for an image that is opaque and in sRGB, or comes to be so without a loss that
        a PNG could avoid.
    """
    base, alpha = split_alpha(image)
    if alpha is not None and alpha.getextrema() == (255, 255):
        alpha = None
    profile = profile_of(image, base.mode)
    if profile is None or profile.from_srgb is None:
        return None if alpha is None else to_srgb(image)
    own = _merge(base, alpha)
    own.info["icc_profile"] = profile.data
    return own


def losses(image: Image.Image, keeps: bool = False, grey: bool = False) -> list[str]:
    """Name the parts of an image that a result lacks, as clauses for people.

    Args:
        image: The image as opened.
        keeps: The result has its transparency by `put_back`, and its profile where it can.
        grey: The result is grey.
    """
    base, alpha = split_alpha(image)
    keeps_profile = keeps and base.mode == ("L" if grey else "RGB")
    profile, data = profile_of(image, base.mode), image.info.get("icc_profile")
    lost: list[str] = []
    if white_level(image) is not None or image.info.get(DEEP) is True:
        lost.append("its 16 bits a channel become 8")
    if profile is not None and not (keeps_profile and profile.from_srgb):
        lost.append(f"its colours become sRGB, by its profile {profile.name!r}")
    elif base.mode == "CMYK":
        lost.append("its CMYK colours become sRGB without a profile, and may differ from print")
    elif image.mode == "LAB":
        lost.append("its LAB colours become sRGB")
    elif data and _read_profile(data, base.mode) is None:
        lost.append("its colour profile is damaged or of another colour space, and is ignored")
    if alpha is not None and not keeps and alpha.getextrema() != (255, 255):
        lost.append("its transparency is laid over white")
    if grey and base.mode != "L" and not _is_grey(base):
        lost.append("its colours become grey, as the model draws")
    return lost


def frame_count(path: str | Path) -> int:
    """Number of frames or pages of an image file; views of one scene and layers count as one."""
    try:
        with Path(path).open("rb") as stream:
            image = _open(stream)
            return 1 if image.format in ("MPO", "PSD") else getattr(image, "n_frames", 1)
    except Exception:  # Pillow's limit of text, which `open_image` lifts
        return 1


def has_frames(source: str | Path | bytes | Image.Image) -> bool:
    """True for an image file with more than one frame or page, by its header.

    Args:
        source: A path, the bytes of a file, or an image; a file of another format is not opened.
    """
    if isinstance(source, Image.Image):
        return False
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as stream:
            if not stream.read(12).startswith(_FRAMED):
                return False
            stream.seek(0)
            return bool(getattr(_open(stream), "is_animated", False))
    except Exception:  # `open_image` says why it cannot be read
        return False


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = image.convert("RGB").split()
    return red.tobytes() == green.tobytes() == blue.tobytes()


def put_back(drawn: Image.Image, original: Image.Image, mask: np.ndarray) -> Image.Image:
    """Give a drawn image the transparency and the profile of the original.

    Args:
        drawn: Mode L or RGB, in sRGB: the original over white where the mask is 0.
        original: Of the same size, as `with_own_colours` returns it.
        mask: (H, W) in [0, 1].

    Returns:
        The original, bit for bit, where the mask is 0; drawn and opaque where it is 1. In between,
        alpha is blended too. A coloured original becomes sRGB where grey is drawn, and a grey one
        where colours are drawn.
    """
    bands = 1 if drawn.mode == "L" else 3
    if len(original.mode.removesuffix("A")) != bands:
        # a coloured original in grey, or a grey one in colour
        original = to_srgb(original)
        original = original.convert(drawn.mode + "A" * original.mode.endswith("A"))
    profile = profile_of(original, drawn.mode)
    own = np.asarray(original).reshape(*mask.shape, -1)
    colours = np.asarray(drawn).reshape(*mask.shape, bands)
    opacity = np.empty((*mask.shape, 0), np.uint8)
    if own.shape[2] > bands:
        alpha = mask + (1 - mask) * (own[:, :, -1] / 255)
        opacity = (alpha * 255).round().astype(np.uint8)[:, :, None]
        # what is drawn lies over white: alpha c + (1 - alpha) white
        straight = 255 - (255 - colours.astype(np.float64)) / np.maximum(alpha, 1 / 255)[..., None]
        colours = straight.round().clip(0, 255).astype(np.uint8)
    if profile is not None:
        converted = profile.encode(_from_array(colours))
        colours = np.asarray(converted).reshape(*mask.shape, bands)
    numbers = np.concatenate([colours, opacity], 2)
    result = _from_array(np.where((mask == 0)[:, :, None], own, numbers))
    if profile is not None:
        result.info["icc_profile"] = profile.data
    return result


def _from_array(numbers: np.ndarray) -> Image.Image:
    """Image of 1 to 4 bands: L, LA, RGB or RGBA."""
    bands = (numbers[:, :, k] for k in range(numbers.shape[2]))
    parts = [Image.fromarray(np.ascontiguousarray(band)) for band in bands]
    if len(parts) == 1:
        return parts[0]
    return Image.merge(("LA", "RGB", "RGBA")[len(parts) - 2], parts)
