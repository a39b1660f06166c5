"""Sets built from packages: small packages of the same layout, written by the test."""

import io
import json
import lzma
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from sfumato.cli import main
from sfumato.data import open_images, packages
from sfumato.data.packages import Package, download, members
from sfumato.data.sets import icons
from sfumato.data.sets.icons import is_held_out, rendered
from sfumato.errors import UserError
from sfumato.registry import find, names

pytest.importorskip("resvg_py", reason="draws SVGs: pip install resvg-py")

RED, WHITE = '<rect width="8" height="8" fill="red"/>', '<path d="M1 1h6v6z" fill="#fefefe"/>'
CLIP = """<svg xmlns="http://www.w3.org/2000/svg" width="90" height="60"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:cc="http://web.resource.org/cc/"
 xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><rdf:RDF><cc:Work>
 <dc:title>{title}</dc:title><dc:subject><rdf:Bag><rdf:li>{word}</rdf:li><rdf:li></rdf:li></rdf:Bag>
 </dc:subject><dc:creator><cc:Agent><dc:title>Ada</dc:title></cc:Agent></dc:creator>
 <cc:license rdf:resource="{licence}"/></cc:Work></rdf:RDF></metadata>
 <circle cx="20" cy="20" r="{radius}" fill="{colour}"/></svg>"""
FREE = "http://web.resource.org/cc/PublicDomain"


def circle(colour: str) -> str:
    return f'<circle cx="4" cy="4" r="3" fill="{colour}"/>'


def squares(number: int) -> str:
    """Squares in a row, black where the number has a bit."""
    return "".join(
        f'<rect x="{x}" width="1" height="3" fill="{"black" if number >> x & 1 else "orange"}"/>'
        for x in range(8)
    )


def tar(files: dict[str, bytes], mode: Literal["w:", "w:gz"]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("./usr/share/openclipart/svg/a/link.svg")
        link.type, link.linkname = tarfile.SYMTYPE, "tree.svg"
        archive.addfile(link)
    return stream.getvalue()


def deb(files: dict[str, bytes]) -> bytes:
    """An `ar` archive with a member of odd length before the data."""
    data = b"!<arch>\n"
    for name, content in (
        ("debian-binary", b"2.0"),
        ("data.tar.xz", lzma.compress(tar(files, "w:"))),
    ):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        data += header.encode() + content + b"\n" * (len(content) % 2)
    return data


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three packages, whose hashes the set expects."""
    slugs = {f"fruit-{chr(97 + k)}": squares(k + 1) for k in range(26)}
    slugs |= {"red-box": RED, "ghost": WHITE, "hand-light-skin-tone": circle("tan"), "7": RED}
    boxes = {slug: {"body": body} for slug, body in slugs.items()}
    webp = io.BytesIO()
    Image.new("RGBA", (64, 32), "blue").save(webp, "WEBP")
    noto = {
        "package/icons.json": {"icons": boxes, "width": 8, "height": 8},
        "package/chars.json": {"1f34e-fe0f": "red-box", "37-20e3": "7"},
        "package/metadata.json": {"categories": {"Food & Drink": ["fruit-a"]}},
    }
    clip = {
        "tree.svg": ("BigTree_01", "plant", FREE, 9, "green"),
        "a/name_ada_01.svg": ("untitled", "x", FREE, 5, "olive"),
        "a/again.svg": ("green ball", "toy", FREE, 18, "green"),
        "a/gpl.svg": ("program", "x", "http://gnu.org/gpl", 9, "navy"),
        "special/pattern.svg": ("dots", "x", FREE, 9, "pink"),
        "a/broken.svg": None,
    }
    svgs = {
        f"./usr/share/openclipart/svg/{file}": b"<svg"
        if row is None
        else CLIP.format(
            **dict(zip(("title", "word", "licence", "radius", "colour"), row, strict=True))
        ).encode()
        for file, row in clip.items()
    }
    files = {
        "NOTO": tar({k: json.dumps(v).encode() for k, v in noto.items()}, "w:gz"),
        "FLUENT": tar(
            {f"package/assets/{n}.webp": webp.getvalue() for n in ("1f34e", "1f44d-1f3fb", "99")},
            "w:gz",
        ),
        "OPENCLIPART": deb(svgs),
    }
    for name, data in files.items():
        package: Package = getattr(icons, name)
        (tmp_path / package.file_name).write_bytes(data)
        digest = packages._hash(tmp_path / package.file_name)
        monkeypatch.setattr(icons, name, replace(package, sha256=digest))
    return tmp_path


def test_each_file_of_the_folder_is_a_set() -> None:
    assert "icons" in names("data.sets")
    for name in names("data.sets"):
        assert callable(find("data.sets", name))


def test_icons(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    words = ["data", "icons", "--out", str(out), "--size", "32", "--packages", str(folder)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    train, test = (open_images(out, split=s, size=32) for s in ("train", "test"))
    assert train.captions is not None and test.captions is not None
    for reason in ("another licence", "unreadable", "no drawing of its own", "white on white"):
        assert f"1  left out, {reason}" in printed
    texts = [*train.captions, *test.captions]
    assert {"red box", "green ball", "name"} <= set(texts)
    assert not {"hand light skin tone", "7", "ghost", "program", "dots"} & set(texts)
    # the fluent drawing of the same character has the same name
    assert texts.count("red box") == 2
    # a circle is the same drawing at any size: the captions of both are kept
    choices = [*(train.caption_choices or []), *(test.caption_choices or [])]
    ball = next(c for c in choices if c[0] == "green ball")
    assert ball[:3] == ("green ball", "green ball, clip art", "green ball, toy")
    assert ball[3:] == ("big tree", "big tree, clip art", "big tree, plant")
    assert all(not is_held_out(text) for text in train.captions)
    assert all(is_held_out(text) for text in test.captions) and len(test) > 0
    assert "copyright Microsoft" in (out / "README.md").read_text()
    assert main(words) == 2, "a set is not replaced"
    assert main([*words, "--overwrite"]) == 0


def test_drawing_is_cropped_and_centred_on_white() -> None:
    image = rendered(
        CLIP.format(title="", word="", licence="", radius=9, colour="red").encode(), 64
    )
    assert isinstance(image, Image.Image)
    pixels = np.asarray(image)
    assert (pixels[0] == 255).all() and (pixels[32, 32] == (255, 0, 0)).all()
    drawn = np.nonzero((pixels < 200).any(2).any(0))[0]
    assert drawn[0] in (4, 5) and drawn[-1] in (58, 59), "margins of 6 %"


def test_transparent_pixels_do_not_darken_an_outline() -> None:
    stream = io.BytesIO()
    image = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    image.paste((255, 220, 0, 255), (40, 40, 216, 216))
    image.save(stream, "PNG")
    square = rendered(stream.getvalue(), 32)
    assert isinstance(square, Image.Image)
    assert np.asarray(square)[..., 0].min() == 255, "red is full in yellow and in white"


def test_damaged_and_wrong_packages_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / icons.NOTO.file_name
    path.write_bytes(path.read_bytes()[:-30])
    offline = replace(icons.NOTO, urls=(f"file://{folder}/absent/{path.name}",))
    with pytest.raises(UserError, match="connect to the network, or put noto-1"):
        download(offline, folder)
    with pytest.raises(UserError, match="damaged package"):
        list(members(path, lambda name: True))
    (folder / "x.deb").write_bytes(b"!<arch>\n")
    with pytest.raises(UserError, match=r"no data\.tar"):
        list(members(folder / "x.deb", lambda name: True))


def test_downloads_are_verified(folder: Path, tmp_path: Path) -> None:
    path = folder / icons.NOTO.file_name
    package = replace(icons.NOTO, urls=(f"file://{path}",))
    assert download(package, tmp_path / "cache").read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="the package was changed"):
        download(replace(package, sha256="0" * 64), tmp_path / "other")
    assert not (tmp_path / "other" / path.name).exists()
