"""A mirror on the loopback interface that serves one snapshot of an archive from the store.

Package tools then see exactly the index that the image's digest is made over, and what they
fetch is checked, kept and resumed as everything else. It serves this host only, on a free port,
as long as a build runs.
"""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmlab.images.debian.index import PackageIndex
from vmlab.images.debian.suite import Snapshot, Suite
from vmlab.images.progress import Progress
from vmlab.machine.errors import VmlabError


@dataclass(frozen=True)
class ServedSource:
    """What a line of sources.list(5) says of a suite that is served: below a path of its own."""

    url: str
    suite: str
    components: tuple[str, ...]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Mirror
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the build's own progress tells what is fetched."""

    def do_GET(self) -> None:
        try:
            path = self.server.find(self.path)
        except VmlabError as error:
            self.server.failures.append(error)
            self.send_error(502)
            return
        if path is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                self.wfile.write(chunk)


class _Mirror(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(
        self,
        suite: Suite,
        files: dict[str, Path],
        indexes: dict[str, PackageIndex],
        *,
        progress: Progress,
    ) -> None:
        self.suite = suite
        self.files = files
        self.indexes = indexes
        self.failures: list[VmlabError] = []
        self.progress = progress
        self._one_at_a_time = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    def find(self, path: str) -> Path | None:
        """The file behind a request, fetched first if the store does not have it."""
        from urllib.parse import unquote

        name = unquote(path).lstrip("/")
        known = self.files.get(name)
        if known is not None:
            return known
        place, _, filename = name.partition("/")
        index = self.indexes.get(place)
        package = None if index is None else index.by_filename(filename)
        if package is None:
            return None
        with self._one_at_a_time:
            return self.suite.package(package, progress=self.progress)


@contextmanager
def serving(
    suite: Suite,
    snapshot: Snapshot,
    *,
    components: tuple[str, ...],
    architecture: str,
    progress: Progress,
) -> Iterator[tuple[list[ServedSource], list[VmlabError]]]:
    """Serve a snapshot while the block runs.

    Args:
        suite: The suite with its pockets.
        snapshot: The snapshot.
        components: Those of its components that are served.
        architecture: Debian's name of the one architecture that is served.
        progress: Told of what is fetched; called from other threads.

    Yields:
        What is served, the suite itself first, and a list that collects why packages could not be
        fetched.
    """
    indexes = suite.indexes(
        snapshot, components=components, architecture=architecture, progress=progress
    )
    files = {}
    served = []
    for name in indexes:
        archive = suite.archive(name)
        release = snapshot.main if name == suite.name else snapshot.pockets[name]
        base = f"{name}/dists/{name}"
        files[f"{base}/InRelease"] = archive.file_of(release)
        has = tuple(
            component
            for component in components
            if archive.has_index(release, component=component, architecture=architecture)
        )
        for component in has:
            found = archive.index_file(release, component=component, architecture=architecture)
            path = archive.fetch_index(release, found, progress=progress)
            folder = found.path.rpartition("/")[0]
            files[f"{base}/{found.path}"] = path
            files[f"{base}/{folder}/by-hash/SHA256/{found.sha256}"] = path
        served.append((name, has))
    server = _Mirror(suite, files, indexes, progress=progress)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield [ServedSource(f"{url}/{name}", name, has) for name, has in served], server.failures
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
