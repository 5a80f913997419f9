"""How much one client may ask for at once: requests in a second, bytes in a request, streams."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from vmlab.machine.sizes import GIB, MIB
from vmlab.manager.api.problems import TooFast

_MOST_CLIENTS: Final = 4096
"""Clients that are kept account of; one that was not seen for longest is forgotten first."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is taken of one client.

    Args:
        body: Bytes of a request's body that is a document.
        upload: Bytes of one that is a file or a tree.
        download: Bytes of a file or a tree that is read from a guest.
        streams: Event streams, consoles and commands that are open at once.
        failures: Wrong tokens in a second, of one address.
    """

    body: int = 2 * MIB
    upload: int = 64 * GIB
    download: int = 64 * GIB
    streams: int = 512
    failures: float = 5.0


class TokenBucket:
    """So many requests in a second of one client, and twice as many at once.

    Args:
        rate: Requests per second.
        clock: Seconds that never go back.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self.burst = max(1.0, 2 * rate)
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> None:
        """Count one request.

        Raises:
            TooFast: it is one too many now.
        """
        now = self._clock()
        left, seen = self._left.pop(client, (self.burst, now))
        left = min(self.burst, left + (now - seen) * self.rate)
        if left < 1:
            self._left[client] = left, now
            raise TooFast(
                f"more than {self.rate:g} requests a second",
                seconds=(1 - left) / self.rate,
                hint="wait as long as Retry-After says",
            )
        self._left[client] = left - 1, now
        if len(self._left) > _MOST_CLIENTS:
            self._left.popitem(last=False)


class Places:
    """So many things at once, and no more."""

    def __init__(self, most: int, what: str) -> None:
        self._most = most
        self._what = what
        self.taken = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of them.

        Raises:
            TooFast: all are taken.
        """
        if self.taken >= self._most:
            raise TooFast(
                f"there are {self.taken} {self._what} already; {self._most} are possible",
                seconds=5,
                hint="close some of them",
            )
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
