"""What this process and the host hold that a check may have left behind.

Descriptors, sockets, child processes, threads, and processes that escaped: every descendant
inherits `MARK` in its environment, so that one that made itself an orphan is found by it. Linux
tells all of this in /proc (proc(5)); elsewhere psutil does, without what escaped.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MARK: Final = "VMLAB_CONFORMANCE_CHECK"
"""Environment variable whose value tells which check a process was started under."""

LASTING_THREADS: Final = frozenset({"vmlab-spawner"})
"""Threads that serve the whole process from their first use on (`vmlab.hypervisors.processes`)."""

_PROC: Final = Path("/proc")
_LINUX: Final = sys.platform == "linux"


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process holds at one moment."""

    descriptors: dict[int, str]
    children: frozenset[int]
    threads: frozenset[int]

    @classmethod
    def now(cls) -> Holdings:
        """What this process holds now."""
        return cls(
            dict(_descriptors()),
            frozenset(_children()),
            frozenset(thread.ident for thread in threading.enumerate() if thread.ident is not None),
        )

    def more_than(self, before: Holdings) -> dict[str, list[str]]:
        """What is held now and was not before: audit -> what it is."""
        new = {
            number: target
            for number, target in self.descriptors.items()
            if before.descriptors.get(number) != target
        }
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return {
            "audit.sockets": [
                _socket(target) for target in new.values() if target.startswith("socket:")
            ],
            "audit.descriptors": [
                target for target in new.values() if not target.startswith("socket:")
            ],
            "audit.processes": [
                describe_process(pid) for pid in sorted(self.children - before.children)
            ],
            "audit.threads": [
                str(names.get(ident, ident))
                for ident in sorted(self.threads - before.threads)
                if names.get(ident) not in LASTING_THREADS
            ],
        }


def _descriptors() -> Iterator[tuple[int, str]]:
    folder = "/proc/self/fd" if _LINUX else "/dev/fd"
    for name in os.listdir(folder):  # noqa: PTH208 (a Path for each descriptor is slow)
        # The descriptor of the listing itself is gone by now.
        with suppress(OSError):
            path = f"{folder}/{name}"
            # As above: no Path for each.
            target = os.readlink(path) if _LINUX else str(os.fstat(int(name)).st_ino)  # noqa: PTH115
            yield int(name), target


def _children() -> Iterator[int]:
    if not _LINUX:
        import psutil

        yield from (child.pid for child in psutil.Process().children(recursive=True))
        return
    for task in (_PROC / "self" / "task").iterdir():
        with suppress(OSError):
            yield from map(int, (task / "children").read_text().split())


def _socket(target: str) -> str:
    """The socket with its local address, where it is of the internet."""
    inode = target.removeprefix("socket:[").removesuffix("]")
    # The column of the inode and that of the local address, by table (proc(5)).
    for table, number, where in (
        *((name, 9, 1) for name in ("tcp", "tcp6", "udp", "udp6")),
        ("unix", 6, -1),
    ):
        with suppress(OSError):
            for line in (_PROC / "self" / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[number] == inode:
                    return f"{table} socket {fields[where]}"
    return target


def describe_process(pid: int) -> str:
    """A process by its number and command line."""
    try:
        line = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (OSError, UnicodeDecodeError):
        line = ""
    return f"process {pid} ({line or 'no command line: a zombie, or gone'})"


def marked_processes(mark: str) -> list[int]:
    """Processes other than this one that were started while `MARK` was `mark`."""
    if not _LINUX:
        return []
    entry = f"{MARK}={mark}".encode()
    found = []
    for name in os.listdir(_PROC):  # noqa: PTH208 (called after every check: no Path for each)
        if name.isdigit() and int(name) != os.getpid():
            # As above: no Path for each.
            with suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:  # noqa: PTH123
                if entry in file.read().split(b"\0"):
                    found.append(int(name))
    return found


@contextmanager
def marking(mark: str) -> Iterator[None]:
    """Let every process that is started meanwhile carry `mark`."""
    before = os.environ.get(MARK)
    os.environ[MARK] = mark
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(MARK, None)
        else:
            os.environ[MARK] = before


def files_under(directory: Path) -> list[str]:
    """The files under `directory`, relative to it; sockets, pipes and links are files too."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )
