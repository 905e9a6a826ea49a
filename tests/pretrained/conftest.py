"""A checkpoint of VMamba-Tiny's published layout, and a web server on loopback with switches for what goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nnunetv2_lightnets.files import CACHE_VARIABLE
from nnunetv2_lightnets.pretrained.vmamba import vmamba_tiny_shapes


def _numbered(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.full((), 1.0 + i).expand(shape) for i, (name, shape) in enumerate(shapes.items())}


@pytest.fixture(scope="session")
def numbered() -> Callable[[Mapping[str, tuple[int, ...]]], dict[str, Tensor]]:
    """Every tensor holds one number of its own, stored once: a file of them is small, whatever the shapes."""
    return _numbered


@pytest.fixture(scope="session")
def short_layout() -> dict[str, tuple[int, ...]]:
    """Stem and first stage of the published layout, which are converted in no time."""
    far = ("layers.1.", "layers.2.", "layers.3.", "head.")
    return {name: shape for name, shape in vmamba_tiny_shapes().items() if not name.startswith(far)}


@pytest.fixture
def state(short_layout: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return _numbered(short_layout)


@pytest.fixture(scope="session")
def checkpoint_bytes(tmp_path_factory: pytest.TempPathFactory, short_layout: dict[str, tuple[int, ...]]) -> bytes:
    """A ``.pth`` of the short layout, as VMamba saves it, with what else its training writes; some 200 kB."""
    path = tmp_path_factory.mktemp("published") / "checkpoint.pth"
    others = {"max_accuracy": 82.2, "epoch": 292, "filler": torch.rand(50_000)}
    torch.save({"model": _numbered(short_layout)} | others, path)
    return path.read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache of weights"  # with spaces, as users have them
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@dataclass
class Site:
    """What the server has, and how it misbehaves."""

    url: str = ""
    content: dict[str, bytes] = field(default_factory=dict)  # path -> file
    redirects: dict[str, str] = field(default_factory=dict)  # path -> path
    cut_after: list[int] = field(default_factory=list)  # bytes after which each next answer breaks off
    statuses: list[int] = field(default_factory=list)  # errors to answer with, one after the other, before the file
    pause: float = 0.0  # seconds between blocks of 16 kB
    requests: list[str] = field(default_factory=list)  # paths
    sent: int = 0  # bytes of files


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def empty(self, status: int, **headers: str) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": "0"} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()

        def do_GET(self) -> None:
            site.requests.append(self.path)
            if self.path in site.redirects:
                return self.empty(302, Location=site.redirects[self.path])
            if self.path not in site.content:
                return self.empty(404)
            if site.statuses:
                return self.empty(site.statuses.pop(0))
            content = site.content[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            end = site.cut_after.pop(0) if site.cut_after else len(content)
            for position in range(0, min(end, len(content)), 1 << 14):
                block = content[position : min(end, position + (1 << 14))]
                try:
                    self.wfile.write(block)
                except OSError:  # the client went away
                    break
                site.sent += len(block)
                time.sleep(site.pause)
            if end < len(content):
                self.close_connection = True
            return None

    return Handler


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(site))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield site
    server.shutdown()
    server.server_close()


@pytest.fixture
def save_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Saver of a checkpoint, as VMamba packs it, to a file of the given name."""

    def save(state: dict[str, Tensor], name: str = "checkpoint.pth", **others: object) -> Path:
        path = tmp_path / name
        torch.save({"model": state, **others}, path)
        return path

    return save
