"""A panic of the guest's kernel, as its consoles tell it.

Debian's riscv64 kernel has no driver that tells of one otherwise (pvpanic), and when it restarts
because of one it asks firmware as for any other restart (Linux, kernel/panic.c).
"""

from __future__ import annotations

from typing import Final

_BEGUN: Final = b"Kernel panic - not syncing: "
_ENDED: Final = b"---[ end Kernel panic"
_LONGEST: Final = 1024
"""Bytes of a line that are looked at."""


class PanicWatch:
    """Reads along what the guest prints on one of them.

    Attributes:
        reason: What the kernel said of its panic; empty as long as there was none.
        stands: Whether the kernel stands still after it, and will not restart.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.stands = False
        self._line = bytearray()

    def feed(self, data: bytes) -> None:
        """The next bytes that the guest prints."""
        head, *rest = data.split(b"\n")
        self._add(head)
        for part in rest:
            self._look()
            self._line.clear()
            self._add(part)

    def reset(self) -> None:
        """The guest begins anew."""
        self.reason = ""
        self.stands = False
        self._line.clear()

    def _add(self, part: bytes) -> None:
        self._line += part[: _LONGEST - len(self._line)]

    def _look(self) -> None:
        line = bytes(self._line)
        # A line of the kernel's begins with its time, if with anything.
        before, mark, said = line.partition(_BEGUN)
        if mark and _is_stamp(before):
            self.reason = said.decode("utf-8", "replace").strip()
        before, mark, _ = line.partition(_ENDED)
        if mark and self.reason and _is_stamp(before):
            self.stands = True


def _is_stamp(text: bytes) -> bool:
    """Whether that is nothing, or a time such as "[   12.345678] "."""
    inside = text.strip(b" \r")
    if not inside:
        return True
    return inside.startswith(b"[") and inside.endswith(b"]") and set(inside[1:-1]) <= _STAMP


_STAMP: Final = frozenset(b" 0123456789.][TC")
"""What a time is made of, and the thread or CPU behind it (CONFIG_PRINTK_CALLER)."""
