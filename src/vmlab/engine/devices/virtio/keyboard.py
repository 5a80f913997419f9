"""A keyboard (virtio 1.2, 5.8), which has the power button that the "virt" board lacks.

Event types and key codes are Linux's (include/uapi/linux/input-event-codes.h).
"""

from __future__ import annotations

import struct
from collections import deque
from typing import ClassVar, Final

from vmlab.engine.devices.virtio.device import Request, VirtioDevice
from vmlab.engine.devices.workers import Workers
from vmlab.engine.memory.ram import Ram

KEY_POWER: Final = 116
KEYS: Final = 128
"""Codes from 1 up to this one are the keys that it has."""

_EVENTS: Final = 0
_EVENT: Final = struct.Struct("<HHI")
_EV_SYN: Final = 0
_EV_KEY: Final = 1
_ID_NAME: Final = 1
_ID_DEVIDS: Final = 3
_EV_BITS: Final = 0x11
_NAME: Final = b"vmlab keyboard"
_DEVICE_IDS: Final = struct.pack("<4H", 0x06, 0x1AF4, 0x1052, 1)  # BUS_VIRTUAL, as virtio's own
_MOST_WAITING: Final = 64


class VirtioKeyboard(VirtioDevice):
    """The device."""

    device_id: ClassVar[int] = 18

    def __init__(self, name: str, ram: Ram, workers: Workers) -> None:
        self._select = self._subselect = 0
        self._waiting: deque[bytes] = deque()
        super().__init__(name, ram, workers, [64, 64], 0)

    def config(self) -> bytes:
        """struct virtio_input_config (5.8.4), as what was selected."""
        data = b""
        if self._subselect == 0 and self._select == _ID_NAME:
            data = _NAME
        elif self._subselect == 0 and self._select == _ID_DEVIDS:
            data = _DEVICE_IDS
        elif self._select == _EV_BITS and self._subselect == _EV_KEY:
            bits = ((1 << (KEYS + 1)) - 1) & ~1
            data = bits.to_bytes(KEYS // 8 + 1, "little")
        head = bytes((self._select, self._subselect, len(data), 0, 0, 0, 0, 0))
        return head + data.ljust(128, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver selects what it wants to read."""
        for place, value in enumerate(data, offset):
            if place == 0:
                self._select = value
            elif place == 1:
                self._subselect = value

    def on_reset(self) -> None:
        """Keys of the driver's time are forgotten."""
        self._select = self._subselect = 0
        self._waiting.clear()

    def press(self, key: int) -> bool:
        """Press a key and let it go; False: nobody listens, or too much waits already."""
        with self.lock:
            if not self.running or len(self._waiting) >= _MOST_WAITING:
                return False
            for value in (1, 0):
                self._waiting.append(_EVENT.pack(_EV_KEY, key, value))
                self._waiting.append(_EVENT.pack(_EV_SYN, 0, 0))
        self.kick(_EVENTS)
        return True

    def process(self, index: int) -> None:
        """Fill buffers with events; what the driver sends (LEDs) is taken and means nothing."""
        if index != _EVENTS:
            super().process(index)
            return
        while True:
            with self.lock:
                if not self._waiting:
                    return
                request = self.take(_EVENTS)
                if request is None:
                    return
                request.write(self._waiting.popleft())
                request.done()

    def handle(self, request: Request) -> None:
        """An LED of a keyboard that has none."""
        request.done()
