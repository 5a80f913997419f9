"""How fast the counter runs that x86_64 guests have for a clock where nothing accelerates them.

TCG gives a guest the host's own counter (QEMU's `cpu_get_ticks`), and no way to learn how fast it
is. A kernel measures it while it boots; on a busy host, which takes the processor away in the
middle, it measures wrongly, and its clock runs fast or slow from then on. So it is told
(`tsc_early_khz`, in the kernel's admin-guide/kernel-parameters).
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vmlab.hypervisors.remembered import remembered

_RDTSC: Final = bytes.fromhex("0f31 48c1e220 4809d0 c3")
"""rdtsc; shl rdx, 32; or rax, rdx; ret"""
_ANY: Final = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_INTERVAL: Final = 0.05
_TRIES: Final = 20


def host_ticks_khz() -> int | None:
    """Thousands of the counter's ticks a second; None where the host has no such counter for us."""
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return None
    try:
        boot = _BOOT_ID.read_text(encoding="ascii")
    except OSError:
        return None
    found = remembered("the host's ticks", [boot], measured_khz)
    return found if isinstance(found, int) else None


def measured_khz() -> int | None:
    """The same, measured now, which takes 50 ms; None where memory must not be executed."""
    try:
        memory = mmap.mmap(
            -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        )
    except OSError:
        return None
    memory.write(_RDTSC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    counter: Callable[[], int] = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    first_time, first_ticks = _sample(counter)
    time.sleep(_INTERVAL)
    second_time, second_ticks = _sample(counter)
    return round((second_ticks - first_ticks) * 1_000_000 / (second_time - first_time))


def _sample(counter: Callable[[], int]) -> tuple[int, int]:
    """A moment in nanoseconds and the counter at it: the tightest of several tries."""
    tries = []
    for _ in range(_TRIES):
        before = time.monotonic_ns()
        ticks = counter()
        after = time.monotonic_ns()
        tries.append((after - before, before, ticks))
    took, before, ticks = min(tries)
    return before + took // 2, ticks
