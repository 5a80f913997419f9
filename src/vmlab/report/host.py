"""Facts about the host that a result was found on, for a report's `environment`.

Only what helps to read a result; never environment variables, which hold people's secrets.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from pathlib import Path

__all__ = ["clock_identity", "host_facts"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_facts() -> dict[str, str | int]:
    """Host name, system, kernel, architecture, CPUs, memory in bytes, and the Python."""
    facts: dict[str, str | int] = {
        "hostname": socket.gethostname(),
        "system": platform.system(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count() or 1,
        "python": platform.python_version(),
        "python_implementation": platform.python_implementation(),
    }
    if "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return facts


def clock_identity() -> str:
    """A name for this host's monotonic clock: readings are comparable under one name only."""
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except OSError:
        # No boot id (not Linux): the time of boot to ten seconds tells one boot from another.
        return f"{socket.gethostname()}-{round((time.time() - time.monotonic()) / 10)}"
