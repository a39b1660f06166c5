"""A Hub on this machine: the few addresses of its service that a download asks for."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """A repository of the service.

    Attributes:
        folder: its files.
        revisions: names of branches and tags, beside the commit's.
        gated: True where files are for accounts that accepted the licence.
        commit: the newest.
        earlier: folders of older commits, which are served, too.
    """

    folder: Path
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    commit: str = COMMIT
    earlier: dict[str, Path] = field(default_factory=dict)


@dataclass
class Hub:
    """The service: repositories by name, and the files that were downloaded."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)

    def weights(self) -> list[str]:
        """The downloaded files of weights, sorted."""
        return sorted({n for n in self.downloads if not n.endswith((".json", ".txt"))})


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub ask this service."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


@contextmanager
def serve(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run the service, and point huggingface_hub to it with an empty cache."""
    from huggingface_hub import constants

    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            """Silence."""

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            status, headers, content = self._find(unquote(urlsplit(self.path).path), body)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def _find(self, path: str, body: bool) -> tuple[int, dict[str, str], bytes]:
            words = path.strip("/").split("/")
            api = words[:2] == ["api", "models"]
            words = words[2:] if api else words
            repository = hub.repositories.get("/".join(words[:2]))
            if repository is None:
                return 404, {"X-Error-Code": "RepoNotFound"}, b""
            kind, rest = (words[2], words[3:]) if len(words) > 2 else ("revision", ["main"])
            revisions = (*repository.revisions, repository.commit, *repository.earlier)
            joined = "/".join(rest)
            revision = next(
                (r for r in revisions if joined == r or joined.startswith(f"{r}/")), None
            )
            if revision is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            old = repository.earlier.get(revision)
            folder = old or repository.folder
            commit = revision if old else repository.commit
            names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
            if kind == "revision":
                listed = [{"rfilename": name} for name in names]
                answer = {"id": "/".join(words[:2]), "sha": commit, "siblings": listed}
                return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
            if kind == "tree":
                tree = [
                    {
                        "type": "file",
                        "path": name,
                        "size": (folder / name).stat().st_size,
                        "oid": hashlib.sha1(name.encode()).hexdigest(),
                    }
                    for name in names
                ]
                return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
            if repository.gated:
                return 403, {"X-Error-Code": "GatedRepo"}, b""
            name = joined.removeprefix(f"{revision}/")
            if name not in names:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            content = (folder / name).read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            span = self.headers["Range"]
            if body and span:
                start, end = map(int, span.removeprefix("bytes=").split("-"))
                return 206, {"X-Repo-Commit": commit}, content[start : end + 1]
            if body:
                hub.downloads.append(name)
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, content

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    point_to(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
