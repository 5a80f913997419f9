"""How the thread of a hart that sleeps is woken by native code: it waits on a word (futex(2)).

The word is SHARED_ASLEEP of the hart's shared words. Its thread sets it to WAITS, looks once more
for what it would wake for, and waits while it is that; whoever has something for the hart writes
that first, then finds WAITS, takes it away, and calls the host's kernel. The kernel is not called
for a hart that is awake, nor by two who come at once. A host without futexes is no host for this:
there harts leave native code to have another one woken.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Final

_NUMBERS: Final = {"x86_64": 202, "aarch64": 98}
NUMBER: Final = _NUMBERS.get(platform.machine(), 0) if sys.platform == "linux" else 0
"""The system call's; 0 where there is none."""
_WAIT: Final = 0 | 128  # private to the process
WAKE: Final = 1 | 128


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc: Final = ctypes.CDLL(None) if NUMBER else None


def system_call_address() -> int:
    """The address of the C library's `syscall`, for native code; 0 where there is no NUMBER."""
    if _libc is None:
        return 0
    address = ctypes.cast(_libc.syscall, ctypes.c_void_p).value
    assert address is not None
    return address


def wait(address: int, expected: int, seconds: float | None) -> None:
    """Wait while the word at an address is as expected, at most so long; may return early."""
    assert _libc is not None, "the caller knows that there are futexes"
    limit = None
    if seconds is not None:
        nanoseconds = max(0, int(seconds * 1e9))
        limit = ctypes.byref(_Timespec(*divmod(nanoseconds, 1_000_000_000)))
    _libc.syscall(
        NUMBER, ctypes.c_void_p(address), _WAIT, ctypes.c_uint32(expected), limit, None, 0
    )


def wake(address: int) -> None:
    """Let a thread go on that waits there."""
    assert _libc is not None, "the caller knows that there are futexes"
    _libc.syscall(NUMBER, ctypes.c_void_p(address), WAKE, 1, None, None, 0)
