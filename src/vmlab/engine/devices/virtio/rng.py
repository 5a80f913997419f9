"""The entropy device (virtio 1.2, 5.4): fills the driver's buffers with random bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import ClassVar, Final

from vmlab.engine.devices.virtio.device import Request, VirtioDevice
from vmlab.engine.devices.workers import Workers
from vmlab.engine.memory.ram import Ram

_AT_ONCE: Final = 4096
"""Bytes that one request is given at most; a driver that wants more asks again."""


class VirtioRng(VirtioDevice):
    """The device; `source(n)` returns n random bytes (a seeded one makes runs repeatable)."""

    device_id: ClassVar[int] = 4

    def __init__(
        self, name: str, ram: Ram, workers: Workers, source: Callable[[int], bytes] = os.urandom
    ) -> None:
        super().__init__(name, ram, workers, [256], 0)
        self._source = source

    def handle(self, request: Request) -> None:
        """Fill the buffer, or the first 4096 bytes of it."""
        request.write(self._source(min(request.writable, _AT_ONCE)))
        request.done()
