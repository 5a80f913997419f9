"""What is kept of a machine whose test failed: all that can still be had, and why the rest cannot.

Each piece has a deadline and a size of its own, so that neither a guest that is dead nor one that
never stops talking holds anything up. Whatever goes wrong here is told among the evidence, and is
nobody's failure.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from vmlab.guests.guest import Guest
from vmlab.hypervisors.base import Machine
from vmlab.lab.console_scanner import ConsoleScanner
from vmlab.lab.patience import wait_for_any
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import VmlabError
from vmlab.machine.states import MachineState

MEMORY_SNAPSHOT: Final = "memory-snapshot.tar.gz"
"""Name of the piece that `vmlab debug` opens."""
SUMMARY: Final = "evidence.txt"
"""Name of the piece that tells what there is, and why the rest is missing."""

TEXT_LIMIT: Final = 2 << 20
"""Bytes of one text; a quarter of them from its beginning, the rest from its end."""
_EVENTS: Final = 1000
_FULL: Final = 4 << 20
"""Bytes that a host's disk has left when guests' writes fail for want of room."""
_PROCESS_FILES: Final = 16

_QUICK_S: Final = 15.0
"""Seconds for what a hypervisor that is well answers at once."""
_ALIVE_S: Final = 15.0
"""Seconds that a guest has to give a sign of life before it is asked for more."""
_GUEST_S: Final = 30.0
"""Seconds for a command in the guest."""
_MEMORY_S: Final = 180.0
"""Seconds to save memory and pack it."""
_LET_GO_S: Final = 10.0
"""Seconds that a piece has to give up after its deadline; then nobody waits for it any more."""

_DMESG: Final = "dmesg"
_JOURNAL: Final = (
    "if command -v journalctl >/dev/null; "
    "then journalctl --boot --no-pager --output=short-precise --lines=20000; else exit 127; fi"
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One piece of evidence.

    Attributes:
        name: What it is, as a file's name.
        content: Its bytes, or the file that has them; that file is the caller's from now on.
        media_type: What kind of bytes they are.
    """

    name: str
    content: bytes | Path
    media_type: str


@runtime_checkable
class _Exporting(Protocol):
    """A machine whose snapshots can be packed into a file."""

    async def export_snapshot(self, name: str, target: Path) -> None:
        """Pack it."""


class _Missing(Exception):
    """Why a piece cannot be had; no failure."""


async def collect_evidence(
    machine: Machine,
    guest: Guest | None,
    *,
    run_directory: Path,
    memory: bool = True,
) -> list[Evidence]:
    """All that can be had of a machine, whatever state it is in.

    Nothing is raised but a cancellation. What is missing, and why, is in the piece `evidence.txt`.

    Args:
        machine: Whose evidence.
        guest: Its inside, if it was reached; it is asked only if it gives a sign of life.
        run_directory: Where files that are too large for memory are put.
        memory: Whether a snapshot of its memory is wanted; the machine stands still meanwhile.
    """
    collection = _Collection(machine, guest, run_directory)
    await asyncio.gather(
        collection.piece("consoles", collection.consoles, _QUICK_S),
        collection.piece("spec", collection.specification, _QUICK_S),
        collection.piece("state", collection.state, _QUICK_S),
        collection.piece("events", collection.events, _QUICK_S),
        collection.piece("process", collection.process, _QUICK_S),
        collection.piece("screen", collection.screen, _QUICK_S),
        collection.inside(),
    )
    if memory:
        await collection.piece("memory", collection.memory, _MEMORY_S)
    else:
        collection.told.append("memory: none, it was not asked for")
    return collection.all()


def bounded(text: bytes, limit: int = TEXT_LIMIT) -> bytes:
    """The beginning and the end of a text that is longer than `limit` bytes, all of a shorter."""
    if len(text) <= limit:
        return text
    head = limit // 4
    mark = f"\n[... {len(text) - limit} bytes left out ...]\n".encode()
    return text[:head] + mark + text[len(text) - (limit - head) :]


class _Bounded:
    """Takes output of any length, and keeps its beginning and its end."""

    def __init__(self, limit: int = TEXT_LIMIT) -> None:
        self._head = bytearray()
        self._head_limit = limit // 4
        self._tail_limit = limit - self._head_limit
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self._dropped = 0

    async def __call__(self, data: bytes) -> None:
        room = self._head_limit - len(self._head)
        self._head += data[:room] if room > 0 else b""
        rest = data[room:] if room > 0 else data
        if rest:
            self._tail.append(bytes(rest))
            self._tail_size += len(rest)
        while self._tail and self._tail_size - len(self._tail[0]) >= self._tail_limit:
            gone = len(self._tail.popleft())
            self._tail_size -= gone
            self._dropped += gone

    def text(self) -> bytes:
        mark = f"\n[... {self._dropped} bytes left out ...]\n".encode() if self._dropped else b""
        return bytes(self._head) + mark + b"".join(self._tail)


@dataclass
class _Collection:
    """Evidence of one machine, while it is collected."""

    machine: Machine
    guest: Guest | None
    directory: Path
    _found: list[Evidence] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def all(self) -> list[Evidence]:
        """All pieces, what is told of them first."""
        lines = [f"{each.name}: {_size(each.content)} bytes" for each in self._found]
        text = "\n".join([*lines, *self.told]) + "\n"
        return [_text(SUMMARY, text), *self._found]

    async def piece(
        self, what: str, collect: Callable[[], Coroutine[Any, Any, None]], seconds: float
    ) -> bool:
        """Collect something, or tell why it cannot be had; returns whether it was."""
        task = asyncio.create_task(collect(), name=f"evidence: {what} of {self.machine.name}")
        try:
            done = await wait_for_any({task}, seconds)
        finally:
            task.cancel()
        if not done:
            self.told.append(f"{what}: missing, it was not there within {seconds:g} s")
            # Letting go may take its time as well; what does not is left to itself.
            await asyncio.wait({task}, timeout=_LET_GO_S)
            task.add_done_callback(_seen)
            return False
        try:
            task.result()
            return True
        except _Missing as why:
            self.told.append(f"{what}: none, {why}")
        except VmlabError as error:
            self.told.append(f"{what}: missing, {error}")
        except Exception as error:  # a mistake here must not hide why the test failed
            self.told.append(f"{what}: missing, {type(error).__name__}: {error}")
        return False

    # What the hypervisor has.

    async def consoles(self) -> None:
        """What was printed on each console, and the kernel's reports in the first."""
        names = [console.name for console in self.machine.spec.consoles]
        if not names:
            raise _Missing("it has no console")
        for position, name in enumerate(names):
            async with await self.machine.console(name) as console:
                log = await console.log()
            self._found.append(_text(f"console-{name}.log", bounded(log)))
            if position == 0:
                reports = await asyncio.to_thread(_reports, log)
                if reports:
                    self._found.append(_text("kernel-reports.txt", reports))

    async def specification(self) -> None:
        """What the machine is to be."""
        document = self.machine.spec.model_dump_json(indent=1, exclude_defaults=True)
        self._found.append(_json("machine-spec.json", document))

    async def state(self) -> None:
        """What it is doing, what it is made of and what it uses."""
        told: dict[str, Any] = {"hypervisor": self.machine.hypervisor.name}
        for what, ask in (
            ("status", self.machine.status),
            ("info", self.machine.info),
            ("metrics", self.machine.metrics),
        ):
            try:
                told[what] = (await ask()).model_dump(mode="json")
            except VmlabError as error:
                told[what] = str(error)
        self._found.append(_json("machine-state.json", json.dumps(told, indent=1)))

    async def events(self) -> None:
        """What happened to it, by its hypervisor: its timeline."""
        events = await self.machine.hypervisor.events()
        mine = [event for event in events if event.machine in {None, self.machine.id}]
        lines = [event.model_dump_json() for event in mine[-_EVENTS:]]
        self._found.append(
            Evidence("events.jsonl", "\n".join(lines).encode(), "application/x-ndjson")
        )

    async def process(self) -> None:
        """The files of its last process: command line, what it said, the conversation with it."""
        directory = (await self.machine.info()).directory
        if directory is None:
            raise _Missing("it is no process of this host's")
        free = (await asyncio.to_thread(shutil.disk_usage, directory)).free
        full = ": the host's disk is full" if free < _FULL else ""
        self.told.append(f"host: {free} bytes are free where its disks are{full}")
        files = await asyncio.to_thread(_process_files, directory)
        if not files:
            raise _Missing("it was never started")
        self._found += [_text(f"process-{name}", data) for name, data in files]

    async def screen(self) -> None:
        """What its display shows."""
        if not self.machine.spec.display:
            raise _Missing("it has no display")
        if self.machine.state not in {MachineState.RUNNING, MachineState.PAUSED}:
            raise _Missing(f"it is {self.machine.state.value}")
        picture = await self.machine.screenshot()
        self._found.append(Evidence("screen.png", picture, "image/png"))

    # What the guest has.

    async def inside(self) -> None:
        """The kernel's log and the journal, if the guest answers."""
        guest = self.guest
        if guest is None or self.machine.state is not MachineState.RUNNING:
            why = "nobody talks to its guest" if guest is None else self.machine.state.value
            self.told.append(f"dmesg, journal: none, {why}")
            return
        if not await self.piece("dmesg, journal", guest.ping, _ALIVE_S):
            return
        await self.piece("dmesg", lambda: self._said(guest, "dmesg.txt", _DMESG), _GUEST_S)
        await self.piece("journal", lambda: self._said(guest, "journal.txt", _JOURNAL), _GUEST_S)

    async def _said(self, guest: Guest, name: str, command: str) -> None:
        """What a command in the guest prints, as far as it came."""
        out = _Bounded()
        try:
            result = await guest.execute(command, stdout=out, timeout=_GUEST_S - _LET_GO_S)
        except (VmlabError, asyncio.CancelledError):
            # Also of a command that was too slow, or would not end.
            if text := out.text():
                self._found.append(_text(name, text))
            raise
        if result.status == 127:
            raise _Missing("the guest has none")
        self._found.append(_text(name, out.text()))

    # Its memory.

    async def memory(self) -> None:
        """A snapshot of its memory, vCPUs, devices and disks, in a file of its own."""
        if self.machine.state not in {MachineState.RUNNING, MachineState.PAUSED}:
            raise _Missing(f"it is {self.machine.state.value}, and its memory is gone")
        capabilities = await self.machine.hypervisor.capabilities()
        if Capability.MEMORY_SNAPSHOT not in capabilities:
            why = capabilities.unsupported.get(Capability.MEMORY_SNAPSHOT, "")
            name = self.machine.hypervisor.name
            raise _Missing(f"{name} cannot save memory{': ' if why else ''}{why}")
        if not isinstance(self.machine, _Exporting):
            raise _Missing(f"snapshots of {self.machine.hypervisor.name} do not outlive the run")
        name = f"evidence-{secrets.token_hex(4)}"
        target = self.directory / f"{name}.tar.gz"
        await self.machine.snapshot(name, memory=True)
        try:
            await self.machine.export_snapshot(name, target)
        finally:
            await self.machine.delete_snapshot(name)
        self._found.append(Evidence(MEMORY_SNAPSHOT, target, "application/gzip"))


def _reports(log: bytes) -> str:
    """The kernel's reports in a console's log, one after the other."""
    scanner = ConsoleScanner()
    findings = scanner.feed(log) + scanner.flush()
    return "\n\n".join(f"{each.kind.value}: {each.message}\n{each.excerpt}" for each in findings)


def _process_files(directory: Path) -> list[tuple[str, bytes]]:
    """Names and contents of the files of a machine's last process."""
    launches = directory / "launches"
    try:
        numbers = sorted(int(path.name) for path in launches.iterdir() if path.name.isdigit())
    except FileNotFoundError:
        return []
    if not numbers:
        return []
    paths = sorted((launches / str(numbers[-1])).iterdir())
    texts = [
        path
        for path in paths
        if path.is_file() and not path.is_symlink() and path.suffix not in _NO_TEXT
    ]
    return [(path.name, _read_bounded(path)) for path in texts[:_PROCESS_FILES]]


_NO_TEXT: Final = frozenset({".sock", ".pid", ".img", ".qcow2"})


def _read_bounded(path: Path) -> bytes:
    """The beginning and the end of a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= TEXT_LIMIT:
            return file.read(TEXT_LIMIT)
        head = file.read(TEXT_LIMIT // 4)
        file.seek(size - (TEXT_LIMIT - len(head)))
        mark = f"\n[... {size - TEXT_LIMIT} bytes left out ...]\n".encode()
        return head + mark + file.read(TEXT_LIMIT - len(head))


def _text(name: str, text: str | bytes) -> Evidence:
    data = text.encode("utf-8", "replace") if isinstance(text, str) else text
    return Evidence(name, data, "text/plain")


def _json(name: str, text: str) -> Evidence:
    return Evidence(name, text.encode(), "application/json")


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _seen(task: Awaitable[None]) -> None:
    """Whatever becomes of a piece that nobody waits for any more is of no interest."""
    if isinstance(task, asyncio.Task) and not task.cancelled():
        task.exception()
