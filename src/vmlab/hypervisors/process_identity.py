"""Which process is which: a pid with the time it began, signals through a pidfd, what it is at.

A pid alone is given to another process once its own has ended (pidfd_open(2), proc(5)).
"""

from __future__ import annotations

import errno
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

__all__ = ["ProcessIdentity", "activity", "boot_id", "open_pidfd", "send_signal"]

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_MOST_THREADS: Final = 12
_STATES: Final = {  # proc(5), /proc/pid/stat, field 3
    "R": "runs",
    "S": "sleeps",
    "D": "waits for the host's kernel",
    "T": "is stopped",
    "t": "is traced",
}


def boot_id() -> str:
    """A name of this boot of the host: pids and start times of another one mean nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return f"boot-{psutil.boot_time():.0f}"  # not Linux


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that cannot be mistaken: its number and when it began.

    `start` is in clock ticks since boot (proc(5), /proc/pid/stat, field 22); where there is no
    /proc, in hundredths of a second of Unix time.
    """

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """Who has that pid now; None if nobody has, or only a dead one that nobody waited for."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return cls._without_proc(pid)
        # The name of the command stands in parentheses and may hold any byte but NUL.
        fields = stat[stat.rindex(b")") + 2 :].split()
        if fields[0] in {b"Z", b"X"}:
            return None
        return cls(pid, int(fields[19]))

    @classmethod
    def _without_proc(cls, pid: int) -> ProcessIdentity | None:
        if Path("/proc/self/stat").exists():
            return None
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                return cls(pid, round(process.create_time() * 100))
        return None

    @property
    def alive(self) -> bool:
        """Whether that very process still runs (or is stopped)."""
        return ProcessIdentity.of(self.pid) == self


def open_pidfd(process: ProcessIdentity) -> int | None:
    """A descriptor that is readable once `process` has ended; None where there are no pidfds.

    Raises:
        ProcessLookupError: it has ended, or another process has its number.
    """
    try:
        descriptor = os.pidfd_open(process.pid)
    except AttributeError:
        return None
    except OSError as error:
        if error.errno in {errno.ENOSYS, errno.EPERM}:  # before Linux 5.3, or forbidden by seccomp
            return None
        raise
    # If the process is the right one now, it was when the descriptor was opened.
    if not process.alive:
        os.close(descriptor)
        raise ProcessLookupError(errno.ESRCH, "it has ended")
    return descriptor


def send_signal(process: ProcessIdentity, number: int) -> bool:
    """Send signal `number` to that process and no other; False if it has ended.

    Raises:
        PermissionError: it belongs to somebody else.
    """
    try:
        descriptor = open_pidfd(process)
        if descriptor is None:
            if not process.alive:
                return False
            os.kill(process.pid, number)
            return True
        try:
            signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)
    except ProcessLookupError:
        return False
    return True


def activity(process: ProcessIdentity) -> str:
    """What a process that does not answer is at: each thread's state and its CPU seconds so far.

    Where a thread sleeps in the host's kernel is told to those who may know (proc(5), wchan).
    """
    if not process.alive:
        return f"process {process.pid} has ended"
    threads = []
    with suppress(OSError):  # there is no /proc, or it ends meanwhile
        tasks = Path(f"/proc/{process.pid}/task").iterdir()
        for task in sorted(tasks, key=lambda path: int(path.name)):
            with suppress(OSError):
                threads.append(_thread(task))
    if threads:
        more = ["..."] if len(threads) > _MOST_THREADS else []
        return f"process {process.pid}: {'; '.join(threads[:_MOST_THREADS] + more)}"
    with suppress(psutil.Error):
        return f"process {process.pid}: {psutil.Process(process.pid).status()}"
    return f"process {process.pid} has ended"


def _thread(task: Path) -> str:
    """One thread's name, state and CPU seconds."""
    stat = (task / "stat").read_bytes()
    name = stat[stat.index(b"(") + 1 : stat.rindex(b")")].decode(errors="replace")
    fields = stat[stat.rindex(b")") + 2 :].decode("ascii").split()
    state = _STATES.get(fields[0], fields[0])
    seconds = (int(fields[11]) + int(fields[12])) / _TICKS
    place = ""
    with suppress(OSError):  # it is not told to everybody, nor by every kernel
        place = (task / "wchan").read_text("ascii").strip("\0\n")
    where = f" in {place}" if place not in {"", "0"} else ""
    return f"{name} {state}{where}, {seconds:.1f} s of CPU"
