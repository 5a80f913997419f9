"""Fetching: through proxies, with passwords, and what a server's odd answers end in."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmlab.images.debian.apt import AptConfiguration
from vmlab.images.debian.download import Downloader
from vmlab.images.errors import MirrorError, PackageGone, StoreError

Answer = tuple[int, dict[str, str], bytes]


class Server(http.server.ThreadingHTTPServer):
    answer: Callable[[str, dict[str, str]], Answer]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        status, headers, body = self.server.answer(self.path, dict(self.headers))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def url(server: Server, path: str = "/file", user: str = "") -> str:
    return f"http://{user}127.0.0.1:{server.server_address[1]}{path}"


def downloader(**settings: str) -> Downloader:
    return Downloader(
        apt=lambda: AptConfiguration(settings), timeout_seconds=300, attempts=2, pause_seconds=0
    )


def test_proxy_of_apt_is_asked_for_the_whole_url(server: Server) -> None:
    asked = []

    def answer(path: str, headers: dict[str, str]) -> Answer:
        asked.append(path)
        return 200, {"Content-Length": "2"}, b"ok"

    server.answer = answer
    proxied = downloader(**{"acquire::http::proxy": url(server, "/")})
    assert proxied.read("http://mirror.invalid/dists/x", limit=10) == b"ok"
    assert asked == ["http://mirror.invalid/dists/x"]


def test_user_and_password_travel_in_a_header(server: Server) -> None:
    seen = []

    def answer(path: str, headers: dict[str, str]) -> Answer:
        seen.append((path, headers.get("Authorization")))
        return 200, {"Content-Length": "2"}, b"ok"

    server.answer = answer
    assert downloader().read(url(server, user="me:p%40ss@"), limit=10) == b"ok"
    assert seen == [("/file", "Basic bWU6cEBzcw==")]


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (404, PackageGone, "not there"),
        (403, MirrorError, "answered 403"),
        (503, MirrorError, "answered 503"),
    ],
)
def test_status_decides_between_gone_refused_and_busy(
    server: Server, status: int, kind: type[MirrorError], message: str
) -> None:
    asked = []

    def answer(path: str, headers: dict[str, str]) -> Answer:
        asked.append(path)
        return status, {"Content-Length": "0"}, b""

    server.answer = answer
    with pytest.raises(kind, match=message) as caught:
        downloader().read(url(server, user="me:secret@"), limit=10)
    assert "secret" not in str(caught.value)
    assert len(asked) == (2 if status == 503 else 1)


def test_file_larger_than_allowed_is_refused(server: Server) -> None:
    server.answer = lambda path, headers: (200, {"Content-Length": "100"}, bytes(100))
    with pytest.raises(MirrorError, match="more than 99 bytes"):
        downloader().read(url(server), limit=99)


@pytest.mark.parametrize(
    "headers",
    [{"Content-Range": "bytes 9-9/10"}, {"Content-Range": "bytes 4-9/11"}, {"Content-Range": "x"}],
)
def test_range_that_was_not_asked_for_is_refused(
    server: Server, tmp_path: Path, headers: dict[str, str]
) -> None:
    server.answer = lambda path, _: (206, {**headers, "Content-Length": "6"}, bytes(6))
    partial = tmp_path / "partial"
    partial.write_bytes(bytes(4))
    with pytest.raises(MirrorError, match="the index promises 10"):
        downloader().fetch(url(server), partial, size=10, step="x")


def test_partial_file_that_is_too_long_is_begun_again(server: Server, tmp_path: Path) -> None:
    server.answer = lambda path, _: (200, {"Content-Length": "4"}, b"good")
    partial = tmp_path / "partial"
    partial.write_bytes(b"far too long")
    downloader().fetch(url(server), partial, size=4, step="x")
    assert partial.read_bytes() == b"good"


def test_answer_without_a_length_is_read_to_its_end(server: Server, tmp_path: Path) -> None:
    server.answer = lambda path, _: (200, {}, b"good")
    downloader().fetch(url(server), tmp_path / "partial", size=4, step="x")
    assert (tmp_path / "partial").read_bytes() == b"good"


def test_nobody_listening_and_unknown_hosts_are_errors(tmp_path: Path) -> None:
    for wrong in ("http://127.0.0.1:9/x", "http://host.invalid/x", "http://127.0.0.1:0/x"):
        with pytest.raises(MirrorError):
            downloader().read(wrong, limit=10)
    with pytest.raises(PackageGone):
        downloader().read((tmp_path / "none").as_uri(), limit=10)


def test_place_that_cannot_be_written_is_a_store_error(server: Server, tmp_path: Path) -> None:
    server.answer = lambda path, _: (200, {"Content-Length": "4"}, b"good")
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs Linux, for /dev/full")
    link = tmp_path / "partial"
    link.symlink_to(full)
    with pytest.raises(StoreError, match=r"cannot be written: No space left on device .* free"):
        downloader().fetch(url(server), link, size=4, step="x")
