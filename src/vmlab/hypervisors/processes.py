"""Processes that belong to a run or a store: started, recorded, watched, ended.

A run's process dies with the run (prctl(2), PR_SET_PDEATHSIG); a store's lives on and is found
again by its record. Each is recorded before its program begins, carries its owner in its
environment, and is the leader of a session of its own.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.process_identity import (
    ProcessIdentity,
    boot_id,
    open_pidfd,
    send_signal,
)
from vmlab.machine.errors import OperationFailed

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner

__all__ = [
    "MACHINE_VARIABLE",
    "RUN_VARIABLE",
    "STORE_VARIABLE",
    "OwnedProcess",
    "ProcessIdentity",
    "adopt",
    "boot_id",
    "collect",
    "die_with_parent",
    "recorded",
    "send_signal",
    "spawn",
    "start",
    "wait_for_dead_children",
]

RUN_VARIABLE: Final = "VMLAB_RUN"
STORE_VARIABLE: Final = "VMLAB_STORE"
MACHINE_VARIABLE: Final = "VMLAB_MACHINE"
"""Variables in the environment of owned processes: the ids of their owner and machine."""

_RECORDS = "processes"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_UNFINISHED_S = 60.0
"""Age of an empty record that nobody is going to write any more."""

_POLL_S = 0.01
"""How often a process is looked at where it has no pidfd."""


# ------------------------------------------------------------------- records


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """What is written down of an owned process before its program begins."""

    path: Path
    identity: ProcessIdentity
    boot: str
    machine: str | None
    argv: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> ProcessRecord | None:
        """The record in that file; None if it was never finished: no program ran for it."""
        try:
            who, _, what = path.read_text("utf-8").partition("\n")
            pid, start = who.split()
            data = json.loads(what)
            return cls(
                path,
                ProcessIdentity(int(pid), int(start)),
                data["boot"],
                data["machine"],
                tuple(data["argv"]),
            )
        except (OSError, ValueError, LookupError, TypeError):
            return None

    @property
    def alive(self) -> bool:
        """Whether the process runs, in this boot of the host."""
        return self.boot == boot_id() and self.identity.alive


def recorded(directory: Path) -> list[ProcessRecord]:
    """The records in the directory of an owner, of living processes and dead ones."""
    try:
        paths = sorted((directory / _RECORDS).iterdir())
    except OSError:
        return []
    return [record for path in paths if (record := ProcessRecord.read(path)) is not None]


# ------------------------------------------------------------------- starting


def _prctl() -> Callable[[int, int, int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).prctl
    function.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    checked: Callable[[int, int, int, int, int], int] = function
    return checked


_PRCTL = _prctl()


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that forked it ends.

    For a process between fork and exec, and for one that forked itself. Does nothing where there
    is no prctl(2): what is left then is found by its record and its environment.

    Args:
        parent: The parent's pid, as it was before the fork; if it has died since, so does this
            process, at once.
    """
    if _PRCTL is None:
        return
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class _Child(subprocess.Popen[bytes]):
    """A child that may outlive this process without Python complaining of it."""

    def __del__(self) -> None:
        """Not Popen's, which warns of children that still run; `_children` keeps ours."""


_children: dict[ProcessIdentity, _Child] = {}
"""Children of this process that nobody has waited for yet."""


class _Spawner:
    """The thread that forks: it lives as long as the process, so the death signal means that."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        thread = threading.Thread(target=self._run, name="vmlab-spawner", daemon=True)
        thread.start()

    def _run(self) -> None:
        while True:
            self._work.get()()

    def submit(self, make: Callable[[], OwnedProcess]) -> Future[OwnedProcess]:
        """Call `make` in the thread."""
        future: Future[OwnedProcess] = Future()

        def work() -> None:
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)

        self._work.put(work)
        return future


_spawner: _Spawner | None = None
_spawner_lock = threading.Lock()


def _the_spawner() -> _Spawner:
    global _spawner
    with _spawner_lock:
        if _spawner is None:
            _spawner = _Spawner()
        return _spawner


def _forget_after_fork() -> None:
    """A forked process has neither its parent's thread nor its children."""
    global _spawner, _spawner_lock
    _spawner = None
    _spawner_lock = threading.Lock()
    _children.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


async def spawn(
    argv: Sequence[str | Path],
    *,
    owner: Owner,
    machine: str | None = None,
    stdin: int | Path | None = None,
    stdout: int | Path | None = None,
    stderr: int | Path | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> OwnedProcess:
    """Start a program for `owner`; it runs when this returns.

    A cancelled call leaves no process behind.

    Args:
        argv: The program, by path or by name in PATH, and its arguments.
        owner: With a run the process dies, however the run ends; with a store it lives on.
        machine: Id of the machine that the process is for.
        stdin: A descriptor, a file to read, or None for no input.
        stdout: A descriptor, a file to append to, or None to drop it.
        stderr: The same, or `subprocess.STDOUT`.
        cwd: Its working directory; None is the caller's.
        environment: Instead of the caller's; the owner's variables are added in any case.
        pass_fds: Descriptors that it inherits, beside the three above.

    Raises:
        OperationFailed: the program cannot be started; nothing is left of the attempt.
    """
    launch = _Launch(
        argv, owner, machine, (stdin, stdout, stderr), cwd, environment, tuple(pass_fds)
    )
    started = asyncio.wrap_future(_the_spawner().submit(launch.fork))
    try:
        return await asyncio.shield(started)
    except asyncio.CancelledError:
        await uninterrupted(_discard(started))
        raise


async def _discard(started: asyncio.Future[OwnedProcess]) -> None:
    """End a process that nobody wants any more."""
    with suppress(OperationFailed):
        process = await started
        process.kill()
        await process.wait()


def start(
    argv: Sequence[str | Path],
    *,
    owner: Owner,
    machine: str | None = None,
    stdin: int | Path | None = None,
    stdout: int | Path | None = None,
    stderr: int | Path | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> OwnedProcess:
    """The same as `spawn`, for callers without an event loop."""
    launch = _Launch(
        argv, owner, machine, (stdin, stdout, stderr), cwd, environment, tuple(pass_fds)
    )
    return _the_spawner().submit(launch.fork).result()


@dataclass(frozen=True, slots=True)
class _Launch:
    """A program that is about to be started."""

    argv: Sequence[str | Path]
    owner: Owner
    machine: str | None
    streams: tuple[int | Path | None, ...]
    cwd: Path | None
    environment: Mapping[str, str] | None
    pass_fds: tuple[int, ...]

    def __post_init__(self) -> None:
        if subprocess.PIPE in self.streams:
            raise ValueError("a pipe's other end has no reader here: give a file or a descriptor")

    def fork(self) -> OwnedProcess:
        """Start the program from this thread, whose end is to be the end of a run."""
        command = [os.fspath(part) for part in self.argv]
        environment = self._environment()
        opened: list[int] = []
        record = self.owner.directory / _RECORDS / secrets.token_hex(8)
        try:
            program = shutil.which(command[0], path=environment.get("PATH"))
            if program is None:
                raise FileNotFoundError(errno.ENOENT, "there is no such program")
            record.parent.mkdir(mode=0o700, exist_ok=True)
            record_fd = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            opened.append(record_fd)
            stdin, stdout, stderr = (
                _open_stream(stream, number, opened) for number, stream in enumerate(self.streams)
            )
            child = _Child(
                command,
                executable=program,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=self.cwd,
                env=environment,
                close_fds=True,
                pass_fds=self.pass_fds,
                start_new_session=True,
                # Not safe beside threads in general: this one makes system calls only, and the
                # thread that forks holds no lock.
                preexec_fn=self._before_exec(record_fd, command),
            )
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            record.unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise OperationFailed(
                f"cannot start {command[0]}: {reason or error}",
                hint="`vmlab doctor` tells which programs are missing and how to install them",
                machine=self.machine,
            ) from error
        finally:
            for descriptor in opened:
                os.close(descriptor)
        written = ProcessRecord.read(record)
        assert written is not None
        _children[written.identity] = child
        return OwnedProcess(written, child)

    def _environment(self) -> dict[str, str]:
        """The environment with the owner's variables, and without those of an owner of ours."""
        ours = {RUN_VARIABLE, STORE_VARIABLE, MACHINE_VARIABLE}
        inherited = os.environ if self.environment is None else self.environment
        marked = {name: value for name, value in inherited.items() if name not in ours}
        marked[RUN_VARIABLE if self.owner.kind == "run" else STORE_VARIABLE] = self.owner.id
        if self.machine is not None:
            marked[MACHINE_VARIABLE] = self.machine
        return marked

    def _before_exec(self, record_fd: int, command: list[str]) -> Callable[[], None]:
        """What the child does between fork and exec: ties itself to the run, writes its record."""
        parent = os.getpid()
        what = json.dumps({"boot": boot_id(), "machine": self.machine, "argv": command}).encode()

        def prepare() -> None:
            if self.owner.kind == "run":
                die_with_parent(parent)
            myself = ProcessIdentity.of(os.getpid())
            assert myself is not None
            os.write(record_fd, b"%d %d\n%s" % (myself.pid, myself.start, what))

        return prepare


def _open_stream(stream: int | Path | None, number: int, opened: list[int]) -> int:
    """The descriptor for standard stream `number`; what is opened for it is added to `opened`."""
    if stream is None:
        return subprocess.DEVNULL
    if isinstance(stream, int):
        return stream
    flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
    opened.append(os.open(stream, flags | os.O_CLOEXEC, 0o600))
    return opened[-1]


# ------------------------------------------------------------------- watching and ending


class OwnedProcess:
    """A process of a run's or a store's: started here, or found again by its record.

    `pid` and `identity` say who it is, `argv` what it runs, `machine` which machine it is for.
    """

    def __init__(self, record: ProcessRecord, child: _Child | None = None) -> None:
        self._record = record
        self._child = child
        self.identity = record.identity
        self.pid = record.identity.pid
        self.argv = record.argv
        self.machine = record.machine

    def __repr__(self) -> str:
        state = "running" if self.running else f"ended, returncode={self.returncode}"
        return f"<OwnedProcess {self.pid} {Path(self.argv[0]).name} {state}>"

    @property
    def running(self) -> bool:
        """Whether it still runs; one that was stopped by a signal does."""
        if self._child is not None:
            running = self._child.poll() is None
        else:
            running = self.identity.alive
        if not running:
            self._forget()
        return running

    @property
    def returncode(self) -> int | None:
        """Its exit status, -N if signal N ended it; None while it runs, and if it was adopted."""
        return self._child.poll() if self._child is not None else None

    def _forget(self) -> None:
        """Drop the record of a process that has ended."""
        self._record.path.unlink(missing_ok=True)
        _children.pop(self.identity, None)

    def send_signal(self, number: int) -> bool:
        """Send it a signal; False if it has ended already.

        Raises:
            PermissionError: it runs as another user.
        """
        # A child that nobody waited for keeps its number, so the pidfd finds it or nobody.
        return self.running and send_signal(self.identity, number)

    def terminate(self) -> bool:
        """Ask it to end (SIGTERM); False if it has ended already."""
        return self.send_signal(signal.SIGTERM)

    def kill(self) -> bool:
        """End it (SIGKILL), stopped or not; False if it has ended already."""
        return self.send_signal(signal.SIGKILL)

    async def wait(self, timeout: float | None = None) -> int | None:
        """Wait until it has ended; its exit status as in `returncode`.

        Raises:
            TimeoutError: it still runs after `timeout` seconds.
        """
        async with asyncio.timeout(timeout):
            while self.running:
                await self._some_news()
        return self.returncode

    async def _some_news(self) -> None:
        """Wait until it may have ended."""
        try:
            descriptor = open_pidfd(self.identity)
        except ProcessLookupError:
            descriptor = None  # it is about to have ended
        if descriptor is None:
            await asyncio.sleep(_POLL_S)
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    async def end(self, grace: float = 5.0) -> int | None:
        """Ask it to end, kill it after `grace` seconds, and wait; its exit status."""
        if self.terminate():
            try:
                return await self.wait(grace)
            except TimeoutError:
                self.kill()
        return await self.wait()


def adopt(owner: Owner, machine: str | None = None) -> list[OwnedProcess]:
    """The owner's processes that still run, found by their records; records of dead ones go.

    Those that this process started itself are found as well, with their exit status to come.

    Args:
        owner: Whose they are.
        machine: Of that machine only; None is all.
    """
    found = []
    _prune_unfinished(owner.directory)
    for record in recorded(owner.directory):
        if machine is not None and record.machine != machine:
            continue
        process = OwnedProcess(record, _children.get(record.identity))
        if record.boot == boot_id() and process.running:
            found.append(process)
        else:
            record.path.unlink(missing_ok=True)
    return found


def _prune_unfinished(directory: Path) -> None:
    """Drop records whose writers died before they had written: no program ran for them."""
    with suppress(OSError):
        for path in (directory / _RECORDS).iterdir():
            found = path.stat()
            # An empty one may be about to be written.
            if found.st_size == 0 and time.time() - found.st_mtime > _UNFINISHED_S:
                path.unlink()


def collect(processes: Iterable[ProcessIdentity], timeout: float = 30.0) -> list[ProcessIdentity]:
    """Wait until killed `processes` have ended, children of ours among them.

    Returns:
        Those that still run after `timeout` seconds (in an uninterruptible sleep, or not killed).
    """
    deadline = time.monotonic() + timeout
    left = list(processes)
    while left := [process for process in left if not _gone(process)]:
        if time.monotonic() >= deadline:
            break
        time.sleep(_POLL_S / 10)
    return left


def wait_for_dead_children() -> None:
    """Let go of the children that have ended and that nobody waited for."""
    for process in tuple(_children):
        _gone(process)


def _gone(process: ProcessIdentity) -> bool:
    """Whether it has ended and, if it is a child of ours, was waited for."""
    child = _children.get(process)
    if child is None:
        return not process.alive
    if child.poll() is None:
        return False
    _children.pop(process, None)
    return True
