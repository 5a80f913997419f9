"""Fetching files over http, https or from a directory: resumed, retried, bounded.

Not a cache, and no judge of contents: what was fetched is checked by whoever asked for it.
Follows RFC 9110 (14, range requests).
"""

from __future__ import annotations

import base64
import http.client
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from vmlab import __version__
from vmlab.images.debian.apt import AptConfiguration
from vmlab.images.debian.mirrors import proxy_for, without_password
from vmlab.images.errors import MirrorError, OutOfStep, PackageGone
from vmlab.images.progress import Progress, ProgressEvent, silent
from vmlab.images.store.disk import storing

T = TypeVar("T")

_CHUNK = 1 << 18
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
# A connection that dies again and again, but each time a little later, is resumed this often.
_CONNECTIONS_AT_MOST = 40


class _Interrupted(Exception):
    """A transfer that may succeed when it is tried again."""


@dataclass(frozen=True)
class Downloader:
    """How files are fetched.

    Args:
        apt: Returns the host's apt configuration, for its proxies; called when it is needed.
        timeout_seconds: How long the other side may be silent.
        attempts: Tries in a row that bring nothing new before giving up.
        pause_seconds: The pause before the second try; it doubles with each one.
    """

    apt: Callable[[], AptConfiguration] = field(default=AptConfiguration, repr=False)
    timeout_seconds: float = 30.0
    attempts: int = 4
    pause_seconds: float = 0.5

    def read(self, url: str, *, limit: int) -> bytes:
        """The contents of a small file.

        Raises:
            PackageGone: the mirror does not have it.
            MirrorError: it cannot be reached, or the file has more than `limit` bytes.
        """

        def once() -> bytes:
            with closing(self._open(url, 0)) as answer:
                return self._receive(answer, limit + 1, url)

        data = self._persistently(url, once, lambda: 0)
        if len(data) > limit:
            raise MirrorError(f"{without_password(url)} has more than {limit} bytes")
        return data

    def fetch(
        self, url: str, partial: Path, *, size: int, step: str, progress: Progress = silent
    ) -> None:
        """Complete `partial`, a file of which some bytes may be there from before.

        Args:
            url: Where the file is.
            partial: Where its bytes are collected; whatever stands there is taken as its beginning.
            size: Its size in bytes.
            step: What progress events call this.
            progress: Told of every chunk.

        Raises:
            PackageGone: the mirror does not have it.
            MirrorError: it cannot be reached, dies every time, or has a file of another size.
            StoreError: the bytes cannot be written.
        """

        def have() -> int:
            return partial.stat().st_size if partial.exists() else 0

        def once() -> None:
            start = have()
            if start > size:
                partial.unlink()
                start = 0
            if start < size:
                self._append(url, partial, (start, size), step=step, progress=progress)

        self._persistently(url, once, have)
        progress(ProgressEvent(step, size, size, finished=True))

    def _append(
        self, url: str, partial: Path, span: tuple[int, int], *, step: str, progress: Progress
    ) -> None:
        """Append the bytes from span[0] up to span[1], the end of the file, to `partial`."""
        start, size = span
        with closing(self._open(url, start)) as answer:
            offset = _offset(answer, start, size, url)
            while offset < start:  # a server without ranges: skip what is there already
                skipped = self._receive(answer, min(_CHUNK, start - offset), url)
                if not skipped:
                    raise _Interrupted("the connection ended early")
                offset += len(skipped)
            with storing(partial), partial.open("ab") as file:
                while start < size:
                    chunk = self._receive(answer, min(_CHUNK, size - start), url, some=True)
                    if not chunk:
                        raise _Interrupted(f"the connection ended {size - start} bytes too early")
                    file.write(chunk)
                    start += len(chunk)
                    progress(ProgressEvent(step, start, size))

    def _persistently(self, url: str, once: Callable[[], T], have: Callable[[], int]) -> T:
        """Do `once` until it succeeds, as long as trying brings anything."""
        fruitless = 0
        reason = ""
        for _ in range(_CONNECTIONS_AT_MOST):
            before = have()
            try:
                return once()
            except _Interrupted as error:
                fruitless = fruitless + 1 if have() <= before else 0
                reason = str(error)
            if fruitless >= self.attempts:
                break
            time.sleep(min(self.pause_seconds * 2**fruitless, 10.0))
        raise MirrorError(
            f"{without_password(url)} could not be fetched: {reason} "
            f"(the last of {self.attempts} tries in a row)",
            hint="check the network, the proxy and the mirror, then run the same command again: "
            "it goes on where it stopped",
        )

    def _open(self, url: str, start: int) -> IO[bytes]:
        shown = without_password(url)
        request = urllib.request.Request(_plain(url), headers=_headers(url, start))
        proxy = proxy_for(url, apt=self.apt())
        proxies = {urlsplit(url).scheme: proxy} if proxy else {}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
        try:
            answer: IO[bytes] = opener.open(request, timeout=self.timeout_seconds)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in _TRANSIENT_STATUS:
                raise _Interrupted(f"the server answered {error.code} {error.reason}") from error
            if error.code in (404, 410):
                raise PackageGone(f"{shown} is not there (HTTP {error.code})") from error
            raise MirrorError(f"{shown}: the server answered {error.code} {error.reason}") from None
        except urllib.error.URLError as error:
            raise _of_reason(error.reason, shown) from error
        except (http.client.HTTPException, OSError) as error:
            raise _of_reason(error, shown) from error
        except ValueError as error:
            raise MirrorError(f"{shown} is not a URL that can be fetched: {error}") from error
        return answer

    def _receive(self, answer: IO[bytes], count: int, url: str, *, some: bool = False) -> bytes:
        """Up to `count` bytes; with `some`, as soon as there are any."""
        try:
            reader = getattr(answer, "read1", None) if some else None
            return bytes(reader(count) if reader is not None else answer.read(count))
        except (http.client.HTTPException, OSError) as error:
            raise _of_reason(error, without_password(url)) from error


def _of_reason(reason: object, shown: str) -> Exception:
    """What a failure of the connection means: gone, hopeless, or worth another try."""
    if isinstance(reason, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return PackageGone(f"{shown} is not there")
    if isinstance(reason, PermissionError):
        return MirrorError(f"{shown} may not be read: {reason.strerror}")
    if isinstance(reason, ssl.SSLCertVerificationError):
        return MirrorError(
            f"{shown}: the server's certificate is not accepted: {reason.verify_message}",
            hint="install the certificate authority of the mirror or proxy on this host",
        )
    if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
        return MirrorError(f"{shown}: the host's name is not known", hint="check the mirror's URL")
    if isinstance(reason, TimeoutError):
        return _Interrupted("the server was silent for too long")
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return _Interrupted(text)


def _offset(answer: IO[bytes], start: int, size: int, url: str) -> int:
    """Where in the file the answer's bytes begin.

    Raises:
        OutOfStep: the answer is about a file of another size.
    """
    status = getattr(answer, "status", None) or 200  # None for a file: URL
    headers = getattr(answer, "headers", None) or {}
    if status == 206:
        match = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if match is not None and int(match[1]) <= start and match[2] in ("*", str(size)):
            return int(match[1])
    length = headers.get("Content-Length")
    if status == 200 and (length is None or length == str(size)):
        return 0
    raise OutOfStep(
        f"{without_password(url)} has {length} bytes, but the index promises {size}",
        hint="the mirror is out of step with its own index; try again later, or another mirror",
    )


def _headers(url: str, start: int) -> dict[str, str]:
    headers = {"User-Agent": f"vmlab/{__version__}", "Accept-Encoding": "identity"}
    parts = urlsplit(url)
    if start and parts.scheme != "file":
        headers["Range"] = f"bytes={start}-"
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode("ascii")
    return headers


def _plain(url: str) -> str:
    """`url` without user and password, which travel in a header."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
