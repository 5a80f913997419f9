"""Admission: machines wait until the host has memory for them, beside those of other processes too.

All processes of one home share a ledger of what machines may come to use, under a lock. A machine
is let in if what the host has available, less what those in the ledger have not used yet, holds
it. Who waits is served in order; all that one call asks for is given at once or not at all. What a
process that has died had is forgotten.

Who holds machines and waits for more could wait for somebody who does the same. So where everybody
who holds some waits, the first one for whom there is room goes ahead, and where there is room for
none, the last one of those who hold some is refused.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from vmlab.hypervisors.host_memory import HostMemory, host_memory
from vmlab.hypervisors.locks import locked_now
from vmlab.hypervisors.processes import ProcessIdentity, boot_id
from vmlab.hypervisors.records import read_document, write_document
from vmlab.machine.errors import ResourceExhausted
from vmlab.machine.sizes import MIB, format_size

__all__ = ["OVERHEAD", "Admission", "Claim", "Reservation"]

OVERHEAD: Final = 96 * MIB
"""What a process of a hypervisor takes beside the guest's memory: 84 MiB of QEMU 7.2 on TCG, 76 of
the engine, measured with a booted guest of 512 MiB."""

_LEDGER: Final = "ledger.json"
_LOCK: Final = "lock"
_LOCK_TIMEOUT: Final = 120.0
_MOST_MARGIN: Final = 512 * MIB
"""What is left to the host in any case, or a sixteenth of its memory if that is less."""
_POLLS: Final = (0.05, 0.5)
"""Seconds between looks at the ledger, the least and the most."""
_PATIENCE: Final = 30.0
"""Seconds that somebody waits for memory that no machine is going to give back: another program may
end."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Memory that a machine may come to use, in bytes."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """A claim that was let in; `id` is its name in the ledger."""

    id: str
    claim: Claim


@dataclass(slots=True)
class _Entry:
    """A line of the ledger: who has, or waits for, how many bytes for what."""

    id: str
    pid: int
    start: int
    thread: int
    name: str
    size: int
    machine: int | None = None
    """Pid of the machine's process, once it runs."""
    forked: bool = False
    """Whether its memory is a template's, of which it has what it wrote."""

    @property
    def owner(self) -> tuple[int, int, int]:
        return self.pid, self.start, self.thread

    @property
    def alive(self) -> bool:
        return ProcessIdentity(self.pid, self.start).alive


@dataclass(slots=True)
class _Ledger:
    holders: list[_Entry] = field(default_factory=list)
    waiters: list[_Entry] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> _Ledger:
        """The ledger in that file, without the dead; an empty one if there is none."""
        try:
            data = read_document(path)
            if data["boot"] != boot_id():
                return cls()
            read = cls(
                [_Entry(**entry) for entry in data["holders"]],
                [_Entry(**entry) for entry in data["waiters"]],
            )
        except (OSError, ValueError, LookupError, TypeError):
            # Who holds memory uses it sooner or later, which the host tells.
            return cls()
        read.holders = [entry for entry in read.holders if entry.alive]
        read.waiters = [entry for entry in read.waiters if entry.alive]
        return read

    def write(self, path: Path) -> None:
        document: dict[str, Any] = {
            "boot": boot_id(),
            "holders": [asdict(entry) for entry in self.holders],
            "waiters": [asdict(entry) for entry in self.waiters],
        }
        write_document(path, document)

    @property
    def stuck(self) -> bool:
        """Whether nobody who holds memory does anything but wait."""
        return {entry.owner for entry in self.holders} <= {entry.owner for entry in self.waiters}


def used_by(machine: int | None, forked: bool) -> int:
    """Bytes of its own that the process of a machine has now; 0 if it is none (proc(5), status)."""
    if machine is None:
        return 0
    wanted = ("RssAnon:",) if forked else ("RssAnon:", "RssShmem:")
    try:
        lines = Path(f"/proc/{machine}/status").read_text("utf-8").splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(wanted))
    except (OSError, ValueError, LookupError):
        return 0


class Admission:
    """The part of one lab in the ledger of a home.

    Args:
        directory: Where the ledger is.
        tell: Told who waits for what, in a sentence.
        memory: How much the host has.
        used: How much of its own a machine's process has.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tell: Callable[[str], None],
        memory: Callable[[], HostMemory] = host_memory,
        used: Callable[[int | None, bool], int] = used_by,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._directory = directory
        self._path = directory / _LEDGER
        self._tell = tell
        self._memory = memory
        self._used = used
        self._sleep = sleep
        self._held: set[str] = set()

    def reserve(
        self,
        claims: Sequence[Claim],
        *,
        free_up: Callable[[], object] | None = None,
    ) -> list[Reservation]:
        """Wait until there is memory for all of `claims`, and take it.

        Args:
            claims: What is needed, all of it or nothing.
            free_up: Called while it waits: gives back what this process can do without.

        Raises:
            ResourceExhausted: there is never going to be so much, as far as can be known.
        """
        if not claims:
            return []
        me = self._entry(claims)
        self._refuse_impossible(me)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        began = time.monotonic()
        pause, waited = _POLLS[0], False
        hopeless: float | None = None
        try:
            while isinstance(found := self._look(me, claims), _Wait):
                if not waited:
                    self._tell(found.why)
                    waited = True
                if free_up is not None:
                    free_up()
                now = time.monotonic()
                hopeless = (hopeless or now) if found.hopeless else None
                if hopeless is not None and now - hopeless >= _PATIENCE:
                    raise self._refused(me, found)
                self._sleep(pause)
                pause = min(2 * pause, _POLLS[1])
        except BaseException:
            with self._locked() as ledger:
                _remove(ledger.waiters, {me.id})
            raise
        if waited:
            self._tell(f"{me.name} has its memory, after {time.monotonic() - began:.0f} s")
        return found

    def began(self, reservation: Reservation, machine: int | None, *, forked: bool) -> None:
        """The machine of a reservation runs, as the process with that pid."""
        with self._locked() as ledger:
            for entry in ledger.holders:
                if entry.id == reservation.id:
                    entry.machine, entry.forked = machine, forked

    def release(self, *reservations: Reservation) -> None:
        """Give memory back; again does nothing."""
        ids = {reservation.id for reservation in reservations} & self._held
        if ids:
            with self._locked() as ledger:
                _remove(ledger.holders, ids)
            self._held -= ids

    def close(self) -> None:
        """Give back all that there is still."""
        if self._held:
            with self._locked() as ledger:
                _remove(ledger.holders, self._held)
            self._held.clear()

    # One look at the ledger.

    @contextmanager
    def _locked(self) -> Iterator[_Ledger]:
        """The ledger, to be looked at and changed while nobody else does."""
        with locked_now(self._directory / _LOCK, "the ledger of memory", _LOCK_TIMEOUT):
            ledger = _Ledger.read(self._path)
            yield ledger
            ledger.write(self._path)

    def _look(self, me: _Entry, claims: Sequence[Claim]) -> list[Reservation] | _Wait:
        """Be let in, or stay in the queue."""
        with self._locked() as ledger:
            if all(entry.id != me.id for entry in ledger.waiters):
                ledger.waiters.append(me)
            free = self._free(ledger)
            fitting = [entry.id for entry in ledger.waiters if entry.size <= free]
            first = ledger.waiters[0].id == me.id
            # Nobody is going to give memory back before one of those who wait has some.
            ahead = ledger.stuck and fitting[:1] == [me.id]
            if me.id not in fitting or not (first or ahead):
                return self._wait(me, ledger, free, fitting)
            ledger.waiters.remove(next(entry for entry in ledger.waiters if entry.id == me.id))
            admitted = []
            for claim in claims:
                entry = self._entry([claim])
                ledger.holders.append(entry)
                self._held.add(entry.id)
                admitted.append(Reservation(entry.id, claim))
            return admitted

    def _free(self, ledger: _Ledger) -> int:
        """Bytes that nobody has and nobody was promised."""
        memory = self._memory()
        promised = sum(
            max(0, entry.size - self._used(entry.machine, entry.forked)) for entry in ledger.holders
        )
        return memory.available - promised - _margin(memory)

    def _wait(self, me: _Entry, ledger: _Ledger, free: int, fitting: list[str]) -> _Wait:
        holders = {entry.owner for entry in ledger.holders}
        held = sum(entry.size for entry in ledger.holders)
        place = [entry.id for entry in ledger.waiters].index(me.id)
        before = ledger.waiters[:place]
        # Of those who hold some, the last one that came.
        refusable = [entry.owner for entry in ledger.waiters if entry.owner in holders][-1:]
        if holders:
            hopeless = ledger.stuck and not fitting and me.owner in refusable
        else:
            hopeless = not before
        names = ", ".join(entry.name for entry in ledger.holders[:4])
        more = f" and {len(ledger.holders) - 4} more" if len(ledger.holders) > 4 else ""
        have = f"{names}{more} may use {_text(held)}" if names else "no machine has any"
        queue = f"; before it: {', '.join(entry.name for entry in before)}" if before else ""
        why = (
            f"{me.name} waits for {_text(me.size)} of memory: {_text(max(0, free))} is free, "
            f"{have}{queue}"
        )
        return _Wait(why, hopeless, others=not holders)

    def _refuse_impossible(self, me: _Entry) -> None:
        memory = self._memory()
        total = memory.total if memory.limit is None else min(memory.total, memory.limit)
        most = total - _margin(memory)
        if me.size > most:
            by = f" (limited by {memory.limited_by})" if memory.limit is not None else ""
            raise ResourceExhausted(
                f"{me.name} needs {_text(me.size)} of memory, and this host has {_text(most)} "
                f"for machines{by}",
                hint="give the machines less memory, or run fewer at the same time",
            )

    def _refused(self, me: _Entry, wait: _Wait) -> ResourceExhausted:
        if wait.others:
            hint = "end other programs, give the machines less memory, or switch admission off"
        else:
            hint = (
                "who has machines and needs more asks for all of them at once (Lab.vms), deletes "
                "some first, or gives them less memory"
            )
        return ResourceExhausted(f"{wait.why}; nobody is going to give any back", hint=hint)

    def _entry(self, claims: Sequence[Claim]) -> _Entry:
        myself = ProcessIdentity.of(os.getpid())
        assert myself is not None
        return _Entry(
            id=secrets.token_hex(6),
            pid=myself.pid,
            start=myself.start,
            thread=threading.get_ident(),
            name=", ".join(claim.name for claim in claims),
            size=sum(claim.size for claim in claims),
        )


@dataclass(frozen=True, slots=True)
class _Wait:
    """Why somebody is not let in yet; `hopeless` if it is this one that has to be refused, and
    `others` if it is not a machine that has the memory."""

    why: str
    hopeless: bool
    others: bool


def _margin(memory: HostMemory) -> int:
    return min(_MOST_MARGIN, memory.total // 16)


def _remove(entries: list[_Entry], ids: Set[str]) -> None:
    entries[:] = [entry for entry in entries if entry.id not in ids]


def _text(size: int) -> str:
    """Bytes for people: whole mebibytes."""
    return format_size(size // MIB * MIB)
