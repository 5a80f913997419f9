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
from pathlib import Path

from vmlab.images.debian.archive import Archive
from vmlab.images.debian.index import PackageIndex
from vmlab.images.debian.release import Release
from vmlab.images.progress import Progress
from vmlab.machine.errors import VmlabError


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
        self, archive: Archive, release: Release, files: dict[str, Path], *, progress: Progress
    ) -> None:
        self.archive = archive
        self.release = release
        self.files = files
        self.indexes: list[PackageIndex] = []
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
        found = (index.by_filename(name) for index in self.indexes)
        package = next((package for package in found if package is not None), None)
        if package is None:
            return None
        with self._one_at_a_time:
            return self.archive.package(package, progress=self.progress)


@contextmanager
def serving(
    archive: Archive,
    release: Release,
    *,
    components: tuple[str, ...],
    architecture: str,
    progress: Progress,
) -> Iterator[tuple[str, list[VmlabError]]]:
    """Serve a snapshot while the block runs.

    Args:
        archive: The suite.
        release: The snapshot.
        components: Those of its components that are served.
        architecture: Debian's name of the one architecture that is served.
        progress: Told of what is fetched; called from other threads.

    Yields:
        The mirror's URL, and a list that collects why packages could not be fetched.
    """
    suite = f"dists/{archive.suite}"
    files = {f"{suite}/InRelease": archive.file_of(release)}
    indexes = []
    for component in components:
        found = archive.index_file(release, component=component, architecture=architecture)
        path = archive.fetch_index(release, found, progress=progress)
        folder = found.path.rpartition("/")[0]
        files[f"{suite}/{found.path}"] = path
        files[f"{suite}/{folder}/by-hash/SHA256/{found.sha256}"] = path
        indexes.append(archive.index(release, component=component, architecture=architecture))
    server = _Mirror(archive, release, files, progress=progress)
    server.indexes = indexes
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.failures
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
