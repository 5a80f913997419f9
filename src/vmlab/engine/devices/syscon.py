"""The test finisher of SiFive ("sifive,test1"): a write ends or restarts the machine.

The device tree's syscon-poweroff and syscon-reboot nodes point at it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

SIZE: Final = 0x1000
POWEROFF: Final = 0x5555
REBOOT: Final = 0x7777
FAIL: Final = 0x3333

End = Literal["poweroff", "reboot", "fail"]


class Syscon:
    """The device; `end` is called with what the guest asked for and its exit code (0 to 65535)."""

    def __init__(self, end: Callable[[End, int], None]) -> None:
        self._end = end

    def read(self, offset: int, size: int) -> int:
        """Always zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """The command in the lower half of a word at offset 0, the exit code in the upper."""
        if offset != 0:
            return
        command, code = value & 0xFFFF, (value >> 16) & 0xFFFF
        if command == POWEROFF:
            self._end("poweroff", 0)
        elif command == REBOOT:
            self._end("reboot", 0)
        elif command == FAIL:
            self._end("fail", code)
