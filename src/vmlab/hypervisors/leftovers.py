"""What a run leaves on the host, and how it is removed: processes, mounts, sockets, files.

Used by a run that ends and by the reaper of those that could not. Nothing is removed through a
mount: while one stands below a directory, the directory stays.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from vmlab.hypervisors.processes import (
    MACHINE_VARIABLE,
    RUN_VARIABLE,
    STORE_VARIABLE,
    ProcessIdentity,
    collect,
    recorded,
    send_signal,
)
from vmlab.hypervisors.records import LOCK, read_document, runtime_name

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner

__all__ = ["ReapItem", "clear_run", "kill_machine", "marked"]

_ROUNDS = 10
"""How often processes are looked for: one that forks while it is killed leaves another."""

_MNT_DETACH = 2  # sys/mount.h
_UMOUNT_NOFOLLOW = 8
_VARIABLE = re.compile(rb"(?:^|\0)(VMLAB_(?:RUN|STORE|MACHINE))=([^\0]*)")


@dataclass(frozen=True, slots=True)
class ReapItem:
    """One thing that a run left, and what became of it.

    `run` is the run's id; `path` and `pid` tell where it is, as far as it has such; `error` is
    why `action` did not succeed, None if it did.
    """

    run: str
    kind: Literal["process", "mount", "socket", "directory"]
    action: Literal["kill", "unmount", "remove"]
    path: str | None = None
    pid: int | None = None
    error: str | None = None

    @property
    def subject(self) -> str:
        """What it is, in a word: its path, or its pid."""
        return self.path if self.path is not None else str(self.pid)


# ------------------------------------------------------------------- processes


def _environment(pid: int) -> bytes:
    """The environment that a process began with, entries ended by NUL; empty if not to be read."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return b""
    except OSError:
        return b""
    with suppress(psutil.Error):
        variables = psutil.Process(pid).environ()
        return b"\0".join(f"{name}={value}".encode() for name, value in variables.items())
    return b""


def marked() -> Iterator[tuple[ProcessIdentity, dict[str, str]]]:
    """All processes of this host that carry an owner in their environment, with those variables.

    Only the caller's own processes can be seen, unless it is root.
    """
    for pid in psutil.pids():
        variables = {
            name.decode(): value.decode("utf-8", "replace")
            for name, value in _VARIABLE.findall(_environment(pid))
        }
        if RUN_VARIABLE not in variables and STORE_VARIABLE not in variables:
            continue
        if (process := ProcessIdentity.of(pid)) is not None:
            yield process, variables


def _processes_of(
    kind: str, id_: str, directory: Path, machine: str | None = None
) -> set[ProcessIdentity]:
    """The living processes of an owner or its machine: those recorded and those that say so."""
    variable = RUN_VARIABLE if kind == "run" else STORE_VARIABLE
    found = {
        record.identity
        for record in recorded(directory)
        if record.alive and machine in {None, record.machine}
    }
    found |= {
        process
        for process, variables in marked()
        if variables.get(variable) == id_ and machine in {None, variables.get(MACHINE_VARIABLE)}
    }
    return {process for process in found if process.pid != os.getpid()}


def _kill(processes: Iterable[ProcessIdentity], run: str) -> dict[ProcessIdentity, ReapItem]:
    """End those processes and wait for it."""
    items = {}
    for process in processes:
        error = None
        try:
            send_signal(process, signal.SIGKILL)
        except OSError as refused:
            error = refused.strerror
        items[process] = ReapItem(run, "process", "kill", pid=process.pid, error=error)
    for process in collect(key for key, item in items.items() if item.error is None):
        items[process] = ReapItem(
            run, "process", "kill", pid=process.pid, error="it was killed but does not end"
        )
    return items


def _kill_all(find: Callable[[], set[ProcessIdentity]], run: str) -> list[ReapItem]:
    """End all processes that `find` finds, until it finds no new ones."""
    items: dict[ProcessIdentity, ReapItem] = {}
    for _ in range(_ROUNDS):
        new = find() - items.keys()
        if not new:
            break
        items |= _kill(new, run)
    return list(items.values())


def kill_machine(owner: Owner, machine: str) -> list[ReapItem]:
    """End all processes of one machine, also descendants that went their own way.

    Returns:
        What was killed, or could not be.
    """
    return _kill_all(
        lambda: _processes_of(owner.kind, owner.id, owner.directory, machine), owner.id
    )


# ------------------------------------------------------------------- mounts


def mounts_below(directory: Path) -> list[tuple[Path, str]]:
    """What is mounted at `directory` and below, with its file system type; the last one first."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []  # not Linux: nothing of ours mounts anything there
    top = os.fsencode(directory.resolve())
    found = []
    for line in lines:
        before, _, after = line.partition(b" - ")
        # proc_pid_mountinfo(5): space, tab, newline and backslash are written in octal.
        point = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), before.split(b" ")[4])
        if point == top or point.startswith(top + b"/"):
            found.append((Path(os.fsdecode(point)), after.split(b" ")[0].decode()))
    return found[::-1]


def _unmount(point: Path, kind: str) -> str | None:
    """Take a mount away, at once if it is not busy and lazily if it is; what went wrong."""
    libc = ctypes.CDLL(None, use_errno=True)
    failure = 0
    for flags in (_UMOUNT_NOFOLLOW, _UMOUNT_NOFOLLOW | _MNT_DETACH):
        if libc.umount2(os.fsencode(point), flags) == 0:
            return None
        failure = ctypes.get_errno()
    helper = shutil.which("fusermount3") or shutil.which("fusermount")
    if kind.startswith("fuse") and helper is not None:
        done = subprocess.run(
            [helper, "-u", "-z", "--", point], capture_output=True, text=True, check=False
        )
        return None if done.returncode == 0 else done.stderr.strip()
    return os.strerror(failure)


# ------------------------------------------------------------------- files


def _remove(directory: Path, run: str, *, dry_run: bool) -> list[ReapItem]:
    """Take the mounts below a directory away, then its sockets and itself, its lock last."""
    items = []
    for point, kind in mounts_below(directory):
        error = None if dry_run else _unmount(point, kind)
        items.append(ReapItem(run, "mount", "unmount", str(point), error=error))
    sockets = _sockets_below(directory)
    error = None
    if not dry_run:
        if left := mounts_below(directory):
            # Removing files now could remove somebody's, through the mount.
            error = f"{left[0][0]} is still mounted"
        else:
            error = _remove_tree(directory)
    for path in sockets:
        left_by = error if path.is_socket() else None
        items.append(ReapItem(run, "socket", "remove", str(path), error=left_by))
    return [*items, ReapItem(run, "directory", "remove", str(directory), error=error)]


def _sockets_below(directory: Path) -> list[Path]:
    """The sockets below a directory."""
    found = []
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            if path.is_socket() and not path.is_symlink():
                found.append(path)
    return found


def _remove_tree(directory: Path) -> str | None:
    """Remove a directory with all in it; what went wrong. What another removes is no error."""
    lock = directory / LOCK
    try:
        for folder, names, _ in os.walk(directory):
            for name in names:
                path = Path(folder, name)
                if not path.is_symlink() and path.lstat().st_mode & 0o700 != 0o700:
                    path.chmod(0o700)
        for entry in directory.iterdir():
            if entry == lock:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
        directory.rmdir()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ENOTEMPTY and _is_next_ones(directory):
            return None
        return f"{error.strerror}: {error.filename}"
    return None


def _is_next_ones(directory: Path) -> bool:
    """Whether a directory that was emptied here has at most a lock in it.

    Without its lock it looked like another dead run to the next reaper, who made the lock anew to
    have it, and removes the directory; by now that may be done, or half done.
    """
    try:
        return {entry.name for entry in directory.iterdir()} <= {LOCK}
    except FileNotFoundError:
        return True


def clear_run(directory: Path, *, dry_run: bool = False) -> list[ReapItem]:
    """End and remove all that belongs to the run with that directory, whose lock the caller holds.

    Args:
        directory: The run's own; its name is the run's id.
        dry_run: Only tell what would be done.

    Returns:
        What was done, or could not be.
    """
    run = directory.name
    if dry_run:
        items = [
            ReapItem(run, "process", "kill", pid=process.pid)
            for process in sorted(_processes_of("run", run, directory), key=lambda one: one.pid)
        ]
    else:
        items = _kill_all(lambda: _processes_of("run", run, directory), run)
    if any(item.error for item in items):
        # What still runs may still write; its record is needed to find it again.
        return [
            *items,
            ReapItem(run, "directory", "remove", str(directory), error="processes still run"),
        ]
    runtime = _runtime_of(directory)
    if runtime is not None:
        items += _remove(runtime, run, dry_run=dry_run)
        if items[-1].error is not None:
            return items
    return items + _remove(directory, run, dry_run=dry_run)


def _runtime_of(directory: Path) -> Path | None:
    """The run's directory of sockets, if it has one of its own and that is there."""
    try:
        named = read_document(directory / "run.json")["runtime"]
    except (OSError, ValueError, LookupError):
        return None  # the run died before it had written that: it has made none
    # Whatever the record says, only a directory that bears this very run's id is the run's.
    if not isinstance(named, str) or Path(named).name != runtime_name(directory.name):
        return None
    path = Path(named)
    try:
        found = path.lstat()
    except OSError:
        return None
    return path if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() else None
