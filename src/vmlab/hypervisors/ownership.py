"""Who a machine belongs to, and where its files are.

A run's machines die with the process that made them: its directory carries a lock that the kernel
drops with the process, whatever kills it, and `vmlab.hypervisors.reaper` clears what lies in a
directory whose lock is free. A store's machines outlive any process and are found again by their
records. A Unix socket's path is limited by `struct sockaddr_un` (unix(7)).
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import stat
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, Self

import platformdirs

from vmlab.hypervisors.locks import FileLock, locked_now
from vmlab.hypervisors.processes import ProcessIdentity, boot_id, wait_for_dead_children
from vmlab.hypervisors.records import FILE_NAME, LOCK, read_document, runtime_name, write_document
from vmlab.machine.errors import OperationFailed, VmlabError
from vmlab.report import write_atomically

if TYPE_CHECKING:
    from vmlab.hypervisors.leftovers import ReapItem

__all__ = ["SOCKET_PATH_LIMIT", "Home", "Owner", "Run", "Store"]

SOCKET_PATH_LIMIT: Final = 107 if sys.platform == "linux" else 103
"""Bytes of a Unix socket's path: sun_path without the NUL at its end."""

_SOCKET_NAME_ROOM = 48
"""Bytes that names of sockets below an owner's directory are left, the slash included."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A run or a store: its kind, its id, and the directory that holds its machines' files.

    `runtime` is where its sockets are, if `directory` is too long a path for those. `segments` is
    whose segments its machines are on, if they share those of another owner's machines.
    """

    kind: Literal["run", "store"]
    id: str
    directory: Path
    runtime: Path | None = None
    segments: Owner | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.kind}:{self.id}"

    def socket(self, name: str) -> Path:
        """The path of a Unix socket of that name, short enough to be bound; nothing is made.

        Raises:
            OperationFailed: it would be too long; the directory has to be a shorter one.
        """
        path = (self.runtime or self.directory) / name
        if (length := len(os.fsencode(path))) > SOCKET_PATH_LIMIT:
            raise OperationFailed(
                f"the socket {path} would have a path of {length} bytes; "
                f"{SOCKET_PATH_LIMIT} are possible",
                hint="set VMLAB_HOME or XDG_RUNTIME_DIR to a directory with a shorter path",
            )
        return path


# ------------------------------------------------------------------- the home


class Home:
    """The directory that runs and stores live in; nobody else may write there.

    `runs` and `stores` are its two rooms.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runs = directory / "runs"
        self.stores = directory / "stores"

    def __repr__(self) -> str:
        return f"Home({str(self.directory)!r})"

    @staticmethod
    def path() -> Path:
        """Where the home is: VMLAB_HOME, or what the platform has for a program's data."""
        named = os.environ.get("VMLAB_HOME")
        if named:
            return Path(named).expanduser().absolute()
        return platformdirs.user_data_path("vmlab", appauthor=False)

    @classmethod
    def open(cls, directory: Path | None = None) -> Home:
        """The home in `directory` (None: where `path` says), made if it is not there.

        Raises:
            VmlabError: it cannot be made, is not ours, or others can write to it.
        """
        directory = (directory or cls.path()).absolute()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory = directory.resolve()
            _refuse_shared(directory)
            for room in ("runs", "stores"):
                (directory / room).mkdir(mode=0o700, exist_ok=True)
                _refuse_shared(directory / room)
        except OSError as error:
            raise VmlabError(
                f"{directory} cannot hold vmlab's machines: {error.strerror or error}",
                hint="set VMLAB_HOME to a directory that you can write to",
            ) from error
        return cls(directory)


def _refuse_shared(directory: Path) -> None:
    """Refuse a directory that somebody else could put a file or a link into.

    Raises:
        VmlabError: saying who can, and what to do.
    """
    found = directory.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise VmlabError(f"{directory} is not a directory", hint="set VMLAB_HOME to another one")
    if found.st_uid != os.geteuid():
        raise VmlabError(
            f"{directory} belongs to user {found.st_uid}, not to user {os.geteuid()}",
            hint="set VMLAB_HOME to a directory of your own",
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise VmlabError(
            f"{directory} can be written by others (mode {stat.S_IMODE(found.st_mode):04o})",
            hint=f"chmod go-w {shlex.quote(str(directory))}",
        )


# ------------------------------------------------------------------- directories of owners


def _needs_runtime(directory: Path) -> bool:
    """Whether sockets in `directory` could get too long a path."""
    return len(os.fsencode(directory)) + _SOCKET_NAME_ROOM > SOCKET_PATH_LIMIT


def _choose_runtime(directory: Path, token: str) -> Path | None:
    """A name for a short directory of sockets that does not exist yet; None if none is needed.

    `token` is of twelve hexadecimal digits; the directory of a run's sockets bears the run's id.
    """
    if not _needs_runtime(directory):
        return None
    name = runtime_name(token)
    candidates = [os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"]
    for base in filter(None, candidates):
        path = Path(base).absolute() / name
        if not _needs_runtime(path) and os.access(base, os.W_OK | os.X_OK):
            return path
    raise VmlabError(
        f"no directory has a short enough path for sockets: {directory} has not, nor have "
        + ", ".join(filter(None, candidates)),
        hint="set VMLAB_HOME or XDG_RUNTIME_DIR to a directory with a shorter path",
    )


class Run:
    """One process's stay in a home: its machines end with it.

    `owner` is what hypervisors are opened with; `directory` holds all that belongs to the run.
    """

    def __init__(self, home: Home, owner: Owner, lock: FileLock) -> None:
        self.home = home
        self.owner = owner
        self.id = owner.id
        self.directory = owner.directory
        self._lock = lock

    @classmethod
    def begin(cls, home: Home | None = None, *, reap: bool = True) -> Run:
        """Begin a run; use it as a context manager, or call `close`.

        Args:
            home: Where (None: `Home.open()`).
            reap: Clear first what dead runs left there.

        Raises:
            VmlabError: there is no place for it.
        """
        home = home or Home.open()
        if reap:
            # The reaper stands on this module.
            from vmlab.hypervisors.reaper import reap_dead_runs

            reap_dead_runs(home)
        try:
            return cls._begin(home)
        except OSError as error:
            raise VmlabError(
                f"cannot begin a run in {home.runs}: {error.strerror or error}",
                hint="free some space there, or set VMLAB_HOME to another directory",
            ) from error

    @classmethod
    def _begin(cls, home: Home) -> Run:
        while True:
            id_ = secrets.token_hex(6)
            directory = home.runs / id_
            try:
                directory.mkdir(mode=0o700)
                # A reaper that comes by now may take the lock first: then it removes the
                # directory, and another one is tried.
                lock = FileLock.take(directory / LOCK, exclusive=True)
            except (FileExistsError, FileNotFoundError):
                continue
            if lock is not None:
                break
        run = cls(home, Owner("run", id_, directory), lock)
        try:
            run._prepare()
        except BaseException:
            run.close()
            raise
        return run

    def _prepare(self) -> None:
        """Write down who this is, and make the directory of sockets."""
        runtime = _choose_runtime(self.directory, self.id)
        myself = ProcessIdentity.of(os.getpid())
        assert myself is not None
        # Written before that directory is made, so that the reaper knows of it in any case.
        write_document(
            self.directory / "run.json",
            {
                "id": self.id,
                "pid": myself.pid,
                "start": myself.start,
                "boot": boot_id(),
                "command": sys.argv,
                "started": time.time(),
                "runtime": str(runtime) if runtime else None,
            },
        )
        if runtime is not None:
            runtime.mkdir(mode=0o700)
            self.owner = replace(self.owner, runtime=runtime)

    def close(self) -> list[ReapItem]:
        """End the run: its processes, mounts and files go. Closing it again does nothing.

        Returns:
            What could not be removed, each with its error; it stays for the reaper.
        """
        if not self._lock.held:
            return []  # closed, or this is a fork of the run's process
        from vmlab.hypervisors.leftovers import clear_run

        try:
            items = clear_run(self.directory)
            wait_for_dead_children()
        finally:
            self._lock.release()
        return [item for item in items if item.error is not None]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        left = self.close()
        if left and error is None:
            raise OperationFailed(
                f"run {self.id} left {len(left)} things behind: "
                + "; ".join(f"{item.kind} {item.subject}: {item.error}" for item in left),
                hint="`vmlab clean` tries again",
            )


class Store:
    """Machines under a name, which outlive every process and are found again by the next."""

    def __init__(self, home: Home, name: str, owner: Owner) -> None:
        self.home = home
        self.name = name
        self.owner = owner
        self.id = owner.id
        self.directory = owner.directory

    @classmethod
    def open(cls, home: Home | None = None, name: str = "default") -> Store:
        """The store of that name, made if it is not there. Any number of processes may have it.

        Raises:
            VmlabError: the name is no name, or the store's directory is not in order.
        """
        home = home or Home.open()
        if not FILE_NAME.fullmatch(name):
            raise VmlabError(
                f"{name!r} is no name for a store",
                hint="letters, digits, '.', '_' and '-', at most 64, beginning with no sign",
            )
        directory = home.stores / name
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            with locked_now(directory / LOCK, f"store {name!r}"):
                runtime = _prepare_store(directory, name)
        except OSError as error:
            raise VmlabError(
                f"cannot open the store {name!r} in {directory}: {error.strerror or error}",
                hint="set VMLAB_HOME to a directory that you can write to",
            ) from error
        return cls(home, name, Owner("store", name, directory, runtime))

    def delete(self) -> None:
        """Remove the store, which has to be empty; removing it again does nothing.

        Raises:
            OperationFailed: it has machines, or something cannot be removed.
        """
        machines = sorted(
            path.parent.name for path in self.directory.glob("machines/*/*/machine.json")
        )
        if machines:
            raise OperationFailed(
                f"the store {self.name!r} has {len(machines)} machines: {', '.join(machines[:5])}",
                hint="delete those first",
            )
        try:
            for directory in filter(None, (self.owner.runtime, self.directory)):
                with suppress(FileNotFoundError):
                    shutil.rmtree(directory)
        except OSError as error:
            raise OperationFailed(
                f"cannot remove the store {self.name!r}: {error.strerror}: {error.filename}"
            ) from error

    @classmethod
    def all(cls, home: Home | None = None) -> list[Store]:
        """The stores of a home, by name."""
        home = home or Home.open()
        names = sorted(path.name for path in home.stores.iterdir() if path.is_dir())
        return [cls.open(home, name) for name in names]


def _prepare_store(directory: Path, name: str) -> Path | None:
    """Read or write `store.json`, make the directory of sockets; returns that."""
    path = directory / "store.json"
    try:
        data = read_document(path)
        runtime = Path(data["runtime"]) if data["runtime"] else None
    except FileNotFoundError:
        runtime = _choose_runtime(directory, secrets.token_hex(6))
        data = {"id": name, "created": time.time(), "runtime": str(runtime) if runtime else None}
        write_atomically(path, json.dumps(data, indent=1).encode())
    except (ValueError, LookupError, TypeError) as error:
        raise VmlabError(
            f"{path} is damaged: {error}",
            hint="move the store's directory away, and look at what it holds",
        ) from error
    if runtime is not None:
        # Directories of sockets are emptied by a reboot; in /tmp, anybody could have made it.
        runtime.mkdir(mode=0o700, exist_ok=True)
        if runtime.is_symlink():
            raise VmlabError(
                f"{runtime} is a symbolic link, and no directory of vmlab's",
                hint="remove it: somebody put it there",
            )
        _refuse_shared(runtime)
    return runtime
