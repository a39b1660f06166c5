"""Images in and out: tensors, 8-bit images, grids, PNG files with parameters.

    byte = round(127.5 * (image + 1)), limited to 0..255        image = byte / 127.5 - 1

so that tensor -> image -> tensor is the identity on the 256 levels. A PNG has two text chunks
(PNG specification, 3rd edition, 11.3.3): `sfumato`, JSON to draw the image again, and
`parameters`, the same for people, in the layout that other image tools show.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image as pil
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from sfumato.errors import NumericalError, UserError
from sfumato.io.atomic import atomic_file
from sfumato.io.image_files import flatten, open_image, put_back
from sfumato.validate import positive_int, whole_number

KEY = "sfumato"
"""The keyword of the text chunk that holds the parameters as JSON."""


def to_pil(image: Float[Tensor, "B C H W"]) -> list[pil.Image]:
    """Convert pixels in [-1, 1] to PIL images: mode L for one channel, RGB for three.

    Raises:
        NumericalError: For values that are not finite: a black image would hide them.
        UserError: For other numbers of channels.
    """
    if image.shape[1] not in (1, 3):
        raise UserError(
            f"an image needs 1 or 3 channels, got {image.shape[1]} in a tensor "
            f"of shape {tuple(image.shape)}: decode the latent first"
        )
    bad = (~image.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise NumericalError(
            f"decode: image {', '.join(map(str, bad))} of {len(image)} has NaN or infinite pixels "
            f"({image.dtype}); nothing was written"
        )
    levels = ((image.detach().to("cpu", torch.float32) + 1) * 127.5).round().clamp(0, 255)
    arrays = levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return [pil.fromarray(a[:, :, 0] if a.shape[2] == 1 else a) for a in arrays]


def to_tensor(image: pil.Image | Sequence[pil.Image]) -> Float[Tensor, "B C H W"]:
    """Convert PIL images of one size to pixels in [-1, 1], float32.

    Grey gives C = 1, everything else C = 3.

    The camera's orientation tag is applied, colours become sRGB by the image's ICC profile, 16 bits
    become 8, and transparency is composited over white.

    Raises:
        UserError: For no images, different sizes, and 32-bit or floating-point images, whose
            white is not known.
    """
    images = [image] if isinstance(image, pil.Image) else list(image)
    if not images:
        raise UserError("no images were given: expected at least one")
    arrays = [np.asarray(flatten(p)) for p in images]
    if len({a.shape for a in arrays}) > 1:
        shapes = ", ".join(sorted({str(a.shape) for a in arrays}))
        raise UserError(
            f"images of one batch must have one size and one kind, got shapes {shapes}: "
            "resize them first"
        )
    levels = torch.from_numpy(np.stack([a if a.ndim == 3 else a[:, :, None] for a in arrays]))
    return levels.permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1).contiguous()


def composite(
    image: Float[Tensor, "B c H W"],
    original: Float[Tensor, "N c H W"],
    mask: Float[Tensor, "M _ H W"],
) -> Float[Tensor, "B c H W"]:
    """Composite an image over an original by a mask.

    Args:
        image: (B, c, H, W) in [-1, 1].
        original: As many, or one.
        mask: (B or 1, 1, H, W) in [0, 1].

    Returns:
        The image where the mask is 1, the original bit for bit where it is 0, a blend in between.

    Raises:
        UserError: For other sizes.
    """
    if (
        original.shape[1:] != image.shape[1:]
        or mask.shape[1:] != (1, *image.shape[2:])
        or {len(original), len(mask)} - {1, len(image)}
    ):
        raise UserError(
            f"an original of shape {tuple(original.shape)} and a mask of shape "
            f"{tuple(mask.shape)} for images of shape {tuple(image.shape)}: "
            "expected as many, or one, of the same size"
        )
    original, mask = original.to(image), mask.to(image)
    return torch.where(mask == 0, original, mask * image + (1 - mask) * original)


def put_back_originals(
    images: Sequence[pil.Image],
    originals: Sequence[pil.Image],
    mask: Float[Tensor, "M _ H W"],
) -> list[pil.Image]:
    """Give composited images the transparency and the ICC profile of their originals.

    Args:
        images: B images, mode L or RGB, in sRGB, composited over the originals over white.
        originals: B or 1, as `io.image_files.with_own_colours` returns them.
        mask: (B or 1, 1, H, W) in [0, 1], as for `composite`.

    Returns:
        The originals bit for bit where the mask is 0, the images, opaque, where it is 1.
    """
    masks = mask[:, 0].to("cpu", torch.float64).numpy()
    return [
        put_back(image, originals[min(k, len(originals) - 1)], masks[min(k, len(masks) - 1)])
        for k, image in enumerate(images)
    ]


def grid(images: Sequence[pil.Image], columns: int | None = None, pad: int = 2) -> pil.Image:
    """Arrange images of one size in a grid, row by row.

    Args:
        images: At least one, all of one size.
        columns: By default the smallest number that makes the grid no taller than wide.
        pad: White pixels between images, none around.

    Returns:
        One image in sRGB, opaque, mode L if all are, else RGB; empty cells are white.

    Raises:
        UserError: For no images, different sizes, or impossible numbers.
    """
    if not images:
        raise UserError("a grid needs at least one image, got none")
    whole_number("pad", pad, 0, unit="pixels")
    if columns is not None:
        positive_int("columns", columns)
    across = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    return contact_sheet([images[k : k + across] for k in range(0, len(images), across)], pad)


def contact_sheet(rows: Sequence[Sequence[pil.Image]], pad: int = 2) -> pil.Image:
    """Rows of images of one size, `pad` white pixels apart; short rows end in white.

    Raises:
        UserError: For different sizes.
    """
    rows = [list(map(flatten, row)) for row in rows]
    sizes = sorted({f"{image.width}x{image.height}" for row in rows for image in row})
    if len(sizes) > 1:
        raise UserError(f"the images of a grid must have one size, got {', '.join(sizes)}")
    width, height = rows[0][0].size
    across = max(map(len, rows))
    mode = "L" if all(image.mode == "L" for row in rows for image in row) else "RGB"
    sheet = pil.new(mode, (across * (width + pad) - pad, len(rows) * (height + pad) - pad), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image, (j * (width + pad), i * (height + pad)))
    return sheet


def write_png(
    path: str | Path,
    image: pil.Image,
    parameters: Mapping[str, Any] | None = None,
    replace: bool = True,
) -> Path:
    """Write a PNG atomically, with `parameters` (values that JSON can hold) inside.

    Args:
        path: The file.
        image: The image.
        parameters: For `read_parameters`, and for people.
        replace: False leaves an older file of that name as it is.

    Returns:
        The path.

    Raises:
        FileExistsError: There is a file of that name, and `replace` is False.
    """
    chunks = PngInfo()
    if parameters is not None:
        chunks.add_text(KEY, json.dumps(dict(parameters), allow_nan=False))  # ASCII: a tEXt chunk
        readable = readable_parameters(parameters)
        add = chunks.add_text if readable.isascii() else chunks.add_itxt
        add("parameters", readable)
    with atomic_file(path, replace) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)
    return Path(path)


def read_parameters(path: str | Path) -> dict[str, Any]:
    """The parameters that `write_png` put into a PNG.

    Raises:
        UserError: For a file without them, and other files than PNG.
    """
    try:
        image = open_image(path, keep=KEY)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: expected a PNG made by sfumato") from error
    except UserError as error:
        raise UserError(f"{path} could not be read as a PNG ({error})") from error
    if not isinstance(image, PngImageFile):
        raise UserError(
            f"{path} is a {image.format} image: "
            "the parameters of an image are kept in PNG files only"
        )
    text = image.text.get(KEY)  # also of text behind the pixels, where some tools move it
    if text is None:
        raise UserError(
            f"{path} holds no parameters of sfumato: it was made by another program, "
            "or they were stripped when it was edited or uploaded"
        )
    try:
        parameters = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"the parameters in {path} are not valid JSON ({error}): "
            "the file was changed after it was made"
        ) from error
    if not isinstance(parameters, dict):
        raise UserError(
            f"the parameters in {path} are {type(parameters).__name__}, expected a table: "
            "the file was changed after it was made"
        )
    return parameters


_LABELS = {
    "steps": "Steps",
    "sampler": "Sampler",
    "spacing": "Schedule type",
    "guidance": "CFG scale",
    "seed": "Seed",
    "model": "Model",
    "model_hash": "Model hash",
    "variation_seed": "Variation seed",
    "variation_strength": "Variation seed strength",
    "strength": "Denoising strength",
    "distilled_guidance": "Distilled CFG Scale",
}
"""Parameters, and the names that other programs have for them."""


def readable_parameters(parameters: Mapping[str, Any]) -> str:
    """The parameters as lines for people: prompt, negative prompt, then `Name: value` pairs.

    The layout is that of AUTOMATIC1111's web UI: its readers end a value at a comma, and decode
    values in quotation marks as JSON.
    """
    lines = [_prompt_lines(str(parameters.get("prompt") or ""))]
    if parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {_prompt_lines(str(parameters['negative_prompt']))}")
    shown = {**parameters, **_own_seed(parameters)}
    guidance = shown.get("guidance")
    if isinstance(guidance, Mapping):
        shown["guidance"] = guidance.get("scale")
    pairs = {
        label: shown[key] for key, label in _LABELS.items() if shown.get(key) not in (None, "")
    }
    if isinstance(guidance, Mapping):  # more than a scale: the words for the rest
        rest = [f"{key} {value}" for key, value in guidance.items() if key != "scale"]
        pairs["Guidance"] = " ".join(rest)
    if parameters.get("width") and parameters.get("height"):
        pairs["Size"] = f"{parameters['width']}x{parameters['height']}"
    pairs["Version"] = f"sfumato {parameters.get('version', 'unknown')}"
    lines.append(", ".join(f"{label}: {_quoted(str(value))}" for label, value in pairs.items()))
    # file names may hold bytes that are no text
    return "\n".join(lines).encode(errors="replace").decode()


def _own_seed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The seed of image `index` of a request, where it is not the first image's."""
    index = parameters.get("index")
    name = "seed" if parameters.get("variation_strength") is None else "variation_seed"
    seed = parameters.get(name)
    if parameters.get("task") == "interpolate":  # all images have the noise of one seed
        return {}
    if not isinstance(index, int) or not isinstance(seed, int):
        return {}
    return {name: seed + index}


_HEADINGS = re.compile(r"^(\s*)(Negative prompt:|Steps:)", re.MULTILINE)
"""Lines of a prompt that readers would take for the negative prompt or the settings."""
_SPECIAL = re.compile(r'[,:"\x00-\x1f\x7f-\x9f\u2028\u2029]')
"""Characters that readers take for the end of a value, a quotation or the end of the line."""


def _prompt_lines(prompt: str) -> str:
    """A prompt as its readers find it again: headings inside begin with a small letter."""
    return _HEADINGS.sub(lambda match: match[1] + match[2][0].lower() + match[2][1:], prompt)


def _quoted(value: str) -> str:
    """A value as it is, or as JSON where readers would end it early or strip it."""
    if value == value.strip() and not _SPECIAL.search(value):
        return value
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)
