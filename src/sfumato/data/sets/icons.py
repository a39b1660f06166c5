"""Icons: some 7,100 colour drawings with captions, free to use and to train on.

    source      package                       licence        style in captions
    noto        npm @iconify-json/noto        Apache-2.0     "emoji"
    fluent      npm @lobehub/fluent-emoji-3d  MIT            "3d emoji"
    openclipart Debian openclipart-svg        public domain  "clip art"

A drawing is cropped to its outline and set on a white square. Its captions are its name, its name
with the style, and for clip art its name with its keywords.

A twenty-fifth of all names is held out: drawings of one name, whatever their source, are either in
train.parquet or in test.parquet. So the captions of the test are new too. Drawings that differ by
less than 3 % of their difference from white, in 32 x 32 pixels, count as one with the captions of
all.
"""

import gzip
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from sfumato.data.packages import debian, download, members, npm
from sfumato.data.parquet import quiet
from sfumato.errors import UserError
from sfumato.io.atomic import atomic_folder, hash_bytes
from sfumato.io.progress import report
from sfumato.validate import whole_number

logger = logging.getLogger(__name__)

NOTO = npm(
    "@iconify-json/noto",
    "1.2.9",
    "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
)
FLUENT = npm(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
OPENCLIPART = debian(
    "pool/main/o/openclipart/openclipart-svg_0.18+dfsg-19_all.deb",
    "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    "openclipart-svg",
)
STYLES = {"noto": "emoji", "fluent": "3d emoji", "openclipart": "clip art"}
LICENCES = {"noto": "Apache-2.0", "fluent": "MIT", "openclipart": "public domain"}

HELD_OUT = 25
"""One name of so many is held out."""
_MARGIN = 0.06  # of the side, on each side of the outline
_FLAT = 4.0  # least standard deviation of the levels of a drawing on white
_NEAR = 3.0  # levels: most difference of the mean colours of drawings that look alike
_ALIKE = 0.03  # most difference of their pixels, as a share of their difference from white
_SKIN = re.compile(r"skin-tone|-tone\d|1f3f[b-f]")
_WORD = re.compile(r"[a-z]")
_NO_NAMES = {
    "drawing", "untitled", "layer", "image", "picture", "icon", "clipart", "clip art", "svg",
    "unnamed", "unknown", "unsorted", "graphic", "new document", "logo", "test",
    "object", "example", "figure",
}  # fmt: skip
_SHARED = 5  # a title of more drawings is that of their collection
_GZIP = b"\x1f\x8b"
_NO_TITLE = re.compile(r"\b(clipart by|part of|collection|svg theme|created with|gramastar)\b")
_NO_FOLDERS = (
    "unsorted/duplicates", "special/", "logos", "computer/icons/etiquette",
    "recreation/games/cards", "computer/icons/flat-theme", "computer/icons/lemon-theme",
    "shapes/stars/star_",
)  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One drawing before its rendering.

    Attributes:
        data: Bytes of an SVG or of an image file.
        name: In lower case, such as "red apple".
        keywords: Other words for it.
        source: Key of `STYLES`.
        topic: The source's own category.
        author: None where the source names none.
        file: Its name in the package.
    """

    data: bytes
    name: str
    keywords: tuple[str, ...]
    source: str
    topic: str
    author: str | None
    file: str

    @property
    def captions(self) -> list[str]:
        """Texts that describe it, the shortest first."""
        texts = [self.name, f"{self.name}, {STYLES[self.source]}"]
        if words := [k for k in self.keywords if k not in self.name]:
            texts.append(f"{self.name}, {', '.join(words[:4])}")
        return texts


def icons(
    out: Path, size: int = 128, packages: Path | None = None, limit: int | None = None
) -> dict[str, int]:
    """Build the set: out/train.parquet, out/test.parquet and out/README.md.

    Args:
        out: New folder, or one whose set is replaced.
        size: Side of the images in pixels, 32 to 512.
        packages: Folder of downloaded packages; None: the cache's.
        limit: Only so many drawings of each source; None: all.

    Returns:
        Counts by word: images of the splits, and drawings left out by their reason.

    Raises:
        UserError: For a missing library or package, and an impossible size.
    """
    whole_number("size", size, 32, 512, unit="pixels")
    _rasteriser()
    left_out: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    alike = _Alike()
    drawings = list(_limited(_drawings(packages, left_out), limit))
    for index, drawing in enumerate(drawings):
        report("drawing icons", index + 1, len(drawings))
        image = rendered(drawing.data, size)
        if isinstance(image, str):
            left_out[image] += 1
            continue
        place = alike.find(image)
        if place is None:
            rows.append(_row(drawing, image))
            continue
        left_out["like another"] += 1
        first = rows[place]
        first["text"] = list(dict.fromkeys([*first["text"], *drawing.captions]))
    test = [r for r in rows if is_held_out(r["name"])]
    train = [r for r in rows if not is_held_out(r["name"])]
    if not train or not test:
        raise UserError(f"{len(rows)} drawings: too few for training and test; raise --limit")
    with atomic_folder(out) as folder:
        _write(train, folder / "train.parquet")
        _write(test, folder / "test.parquet")
        (folder / "README.md").write_text(_readme(rows, size), encoding="utf-8")
    counts = {"train": len(train), "test": len(test)}
    return counts | {f"left out, {reason}": n for reason, n in left_out.most_common()}


def is_held_out(name: str) -> bool:
    """True for a name of the test: decided by the hash of its words alone."""
    words = " ".join(sorted(re.findall(r"[a-z0-9]+", name)))
    return int(hash_bytes(words)[:8], 16) % HELD_OUT == 0


# ---- rendering -----------------------------------------------------------------------------------


def _rasteriser() -> Any:
    """The module that draws SVGs."""
    try:
        import resvg_py
    except ImportError:
        raise UserError(
            "icons are drawn by resvg-py, which is missing: pip install 'sfumato[icons]'"
        ) from None
    return resvg_py


def rendered(data: bytes, size: int) -> Image.Image | str:
    """A drawing on a white square of so many pixels, or the reason why it cannot be.

    Args:
        data: Bytes of an SVG, plain or compressed, or of an image file.
        size: Side in pixels.
    """
    inner = size - 2 * round(_MARGIN * size)
    try:
        image = _image(data, 2 * size)
        box = _outline(image)
        box = _outline(image)
        if box is None:
            return "empty"
        if (small := 2 * inner / max(box[2] - box[0], box[3] - box[1])) > 1:
            image = _image(data, min(8 * size, round(2 * size * small)))  # fills part of its page
            box = _outline(image)
    except (ValueError, OSError):
        return "unreadable"
    image = image.crop(box)
    scale = inner / max(image.size)
    sides = [max(1, round(side * scale)) for side in image.size]
    # transparent pixels have no colour: they weigh nothing when pixels are averaged
    image = image.convert("RGBa").resize((sides[0], sides[1]), Image.Resampling.LANCZOS)
    image = image.convert("RGBA")
    square = Image.new("RGBA", (size, size), "white")
    square.alpha_composite(image, ((size - sides[0]) // 2, (size - sides[1]) // 2))
    square = square.convert("RGB")
    if np.asarray(square, np.float32).std() < _FLAT:
        return "white on white"
    return square


def _outline(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The smallest box around the pixels that can be seen."""
    return image.getchannel("A").point([0] * 9 + [255] * 247).getbbox()


def _image(data: bytes, size: int) -> Image.Image:
    """The drawing in RGBA, `size` pixels wide where it is an SVG."""
    if data.startswith(_GZIP):
        data = gzip.decompress(data)
    head = data[:1000].lstrip()
    if head.startswith((b"<", b"\xef\xbb\xbf<")):
        text = data.decode("utf-8-sig")
        png = _rasteriser().svg_to_bytes(
            svg_string=text, width=size, dpi=96, skip_system_fonts=True
        )
        data = bytes(png)
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGBA")


class _Alike:
    """Drawings seen so far, in 32 x 32 pixels."""

    def __init__(self) -> None:
        self.pixels: list[np.ndarray] = []
        self.means = np.zeros((0, 3), np.float32)

    def find(self, image: Image.Image) -> int | None:
        """Index of the first drawing like this one; None: it is new, and kept as the last."""
        small = np.asarray(image.resize((32, 32), Image.Resampling.BOX))
        mean, pixels = small.mean((0, 1), dtype=np.float32), small.astype(np.int16)
        near = np.nonzero(np.abs(self.means - mean).max(1, initial=0) <= _NEAR)[0]
        most = _ALIKE * (255 - pixels).mean()
        for place in near:
            if np.abs(self.pixels[place] - pixels).mean() <= most:
                return int(place)
        self.pixels.append(small)
        self.means = np.vstack([self.means, mean])
        return None


# ---- sources -------------------------------------------------------------------------------------


def _drawings(packages: Path | None, left_out: Counter[str]) -> Iterator[Drawing]:
    noto, fluent, clip = (download(p, packages) for p in (NOTO, FLUENT, OPENCLIPART))
    names: dict[str, str] = {}
    yield from _noto(noto, names)
    yield from _fluent(fluent, names, left_out)
    yield from _openclipart(clip, left_out)


def _limited(drawings: Iterable[Drawing], limit: int | None) -> Iterator[Drawing]:
    counts: Counter[str] = Counter()
    for drawing in drawings:
        counts[drawing.source] += 1
        if limit is None or counts[drawing.source] <= limit:
            yield drawing


def _noto(path: Path, names: dict[str, str]) -> Iterator[Drawing]:
    """Noto's drawings; `names` gets the name of each character."""
    tables = {name: json.loads(data) for name, data in members(path, lambda n: n.endswith(".json"))}
    icons, characters = tables["package/icons.json"], tables["package/chars.json"]
    names.update({_key(code): slug for code, slug in characters.items()})
    categories = {
        slug: category
        for category, slugs in tables["package/metadata.json"]["categories"].items()
        for slug in slugs
    }
    for slug, icon in icons["icons"].items():
        if _SKIN.search(slug) or not _WORD.search(slug):
            continue
        width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
        category = categories.get(slug, "")
        yield Drawing(svg.encode(), _words(slug), (), "noto", category, "Google", slug)


def _key(code: str) -> str:
    """The characters of an emoji without the marks of its presentation."""
    return "-".join(part for part in code.split("-") if part != "fe0f")


def _fluent(path: Path, names: Mapping[str, str], left_out: Counter[str]) -> Iterator[Drawing]:
    for file, data in members(path, lambda n: n.endswith(".webp")):
        code = _key(Path(file).stem)
        if _SKIN.search(code):
            continue
        if code not in names or not _WORD.search(names[code]):  # flags and digits
            left_out["no name"] += 1
            continue
        name = _words(names[code])
        yield Drawing(data, name, (), "fluent", "", "Microsoft", Path(file).name)


def _openclipart(path: Path, left_out: Counter[str]) -> Iterator[Drawing]:
    root = "usr/share/openclipart/svg/"
    files = sorted(members(path, lambda n: n.startswith(root) and n.endswith((".svg", ".svgz"))))
    notes: dict[str, dict[str, Any]] = {}
    for file, data in files:
        if file.removeprefix(root).startswith(_NO_FOLDERS) or "gramastar" in file:
            left_out["no drawing of its own"] += 1
            continue
        try:
            notes[file] = _metadata(gzip.decompress(data) if data.startswith(_GZIP) else data)
        except (ElementTree.ParseError, OSError):
            left_out["unreadable"] += 1
    titles = Counter(n["title"] for n in notes.values())
    for file, data in files:
        if (note := notes.get(file)) is None:
            continue
        if note["licence"] and "publicdomain" not in note["licence"].lower():
            left_out["another licence"] += 1
            continue
        place = file.removeprefix(root)
        words = (w for w in map(_words, note["keywords"]) if _named(w))
        author, topic = note["author"] or None, str(Path(place).parent)
        keywords = tuple(dict.fromkeys(w for w in words if w not in _words(note["author"])))
        title = note["title"] if titles[note["title"]] <= _SHARED else ""
        name = _title(title, Path(place).stem) or " ".join(keywords[:2])
        if not name:
            left_out["no name"] += 1
            continue
        yield Drawing(data, name, keywords, "openclipart", topic, author, place)


def _metadata(data: bytes) -> dict[str, Any]:
    """Title, keywords, author and licence of an SVG (Dublin Core in RDF)."""
    title, author, licence, keywords = "", "", "", []
    spaces = {"dc": "http://purl.org/dc/elements/1.1/"}
    rdf = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
    root = ElementTree.fromstring(data)
    for work in root.iter():
        kind = work.tag.rsplit("}", 1)[-1]
        if kind != "Work":
            continue
        title = title or work.findtext("dc:title", "", spaces)
        author = author or "".join(
            e.text or "" for c in work.findall("dc:creator", spaces) for e in c.iter()
        )
        for subject in work.findall("dc:subject", spaces):
            keywords += [e.text or "" for e in subject.iter(f"{rdf}li")]
        for child in work:
            if child.tag.rsplit("}", 1)[-1] == "license":
                licence = licence or child.get(f"{rdf}resource", "")
    return {
        "title": title,
        "keywords": keywords,
        "author": " ".join(author.split()),
        "licence": licence,
    }


def _title(title: str, file: str) -> str | None:
    """The name of a clip art: its title, else its file's name without the author."""
    for text in (title, re.sub(r"_[a-z]+_?[a-z]*_\d+$", "", file)):
        words = _words(text)
        if _named(words):
            return words
    return None


def _named(words: str) -> bool:
    if words in _NO_NAMES or _NO_TITLE.search(words):
        return False
    return len(re.findall(r"[a-z]", words)) >= 3 and len(words) <= 60


def _words(text: str) -> str:
    """Words in lower case: "RedApple_01.svg" is "red apple"."""
    text = re.sub(r"\.(svgz?|png|jpg)$", "", unescape(text).strip(), flags=re.I)
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    text = re.sub(r"[^A-Za-z0-9'&. ]+", " ", text).lower()
    text = re.sub(r"\s+v?\d+$", "", " ".join(text.split()))
    return " ".join(text.split()).strip(" .'&")


# ---- writing -------------------------------------------------------------------------------------


def _row(drawing: Drawing, image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {
        "image": {"bytes": file.getvalue(), "path": None},
        "text": drawing.captions,
        "name": drawing.name,
        "style": STYLES[drawing.source],
        "topic": drawing.topic,
        "source": f"{drawing.source}/{drawing.file}",
        "author": drawing.author or "",
        "licence": LICENCES[drawing.source],
    }


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    import datasets

    text = datasets.Value("string")
    features = datasets.Features(
        {key: text for key in rows[0]} | {"image": datasets.Image(), "text": datasets.List(text)}
    )
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    with quiet(datasets):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))


def _readme(rows: list[dict[str, Any]], size: int) -> str:
    counts = Counter(row["source"].split("/")[0] for row in rows)
    lines = ["# Icons", "", f"{len(rows)} drawings of {size} x {size} pixels with captions.", ""]
    lines += ["| source | drawings | licence | package |", "|---|---|---|---|"]
    for source, package in (("noto", NOTO), ("fluent", FLUENT), ("openclipart", OPENCLIPART)):
        lines.append(f"| {source} | {counts[source]} | {LICENCES[source]} | {package.file_name} |")
    lines += [
        "",
        "Noto Emoji: copyright Google. Fluent Emoji: copyright Microsoft Corporation.",
        "Openclipart: dedicated to the public domain by its authors, who are named in `author`.",
        "",
    ]
    return "\n".join(lines)
