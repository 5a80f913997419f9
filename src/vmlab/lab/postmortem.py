"""The machine of a failed test, alive again: out of the memory snapshot among its evidence.

The machine is a new one of a run of its own, and goes with it; the evidence stays as it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar, runtime_checkable

from vmlab.guests.guest import Guest
from vmlab.hypervisors import registry
from vmlab.hypervisors.base import Machine, Snapshot
from vmlab.hypervisors.ownership import Run
from vmlab.lab.bringup import last_words
from vmlab.lab.debugger import gdb_command
from vmlab.lab.evidence import MEMORY_SNAPSHOT, SUMMARY
from vmlab.lab.session import Interrupts, Session, drive
from vmlab.lab.ways import channel_into
from vmlab.machine.errors import (
    DeadlineExceeded,
    InvalidSpec,
    ResourceNotFound,
    SpecProblem,
    UnsupportedOperation,
    VmlabError,
)
from vmlab.machine.states import MachineState
from vmlab.report import Attempt, Outcome, Test, read_run

T = TypeVar("T")

_ANSWER_S: Final = 60.0
"""Seconds that the guest has to answer; it was alive when it was saved, or it was not."""


@dataclass(frozen=True, slots=True)
class Remains:
    """A machine that a test left.

    Attributes:
        test: "suite::name" of the test.
        hypervisor: What ran it.
        machine: Its name.
        path: The file with its memory.
    """

    test: str
    hypervisor: str
    machine: str
    path: Path


@runtime_checkable
class _Importing(Protocol):
    """A hypervisor that takes in packed snapshots."""

    async def import_snapshot(self, parcel: Path, name: str) -> Snapshot:
        """Unpack it."""


@runtime_checkable
class _Debugged(Protocol):
    """A machine that a debugger can connect to."""

    async def serve_debugger(self, socket: Path) -> None:
        """Listen there."""


def find_remains(result: Path, test: str | None = None, machine: str | None = None) -> Remains:
    """The one machine that a run's failed test left, or that of `test`.

    Args:
        result: A run's directory, or its report.json.
        test: Its name, or a part of that.
        machine: Name of the machine, where a test had several.

    Raises:
        ResourceNotFound: there is no such test, or it left no memory; what can be done instead.
        InvalidSpec: several fit; they are listed.
        VmlabError: there is no report there.
    """
    run = read_run(result)
    root = result if result.is_dir() else result.parent
    tests = [each for each in run.tests() if test is None or test in _name(each)]
    exact = [each for each in tests if test in {each.name, _name(each)}]
    tests = exact or tests
    if not tests:
        raise ResourceNotFound(
            f"{result} tells of no test {test!r}",
            hint=f"`vmlab report show {result}` lists them",
            operation="debug",
        )
    found = [
        each
        for one in tests
        for each in _remains_of(one, root)
        if machine is None or each.machine == machine
    ]
    if not found:
        raise _nothing(result, tests, root)
    if len(found) > 1:
        listed = ", ".join(f"{each.test} ({each.machine})" for each in found)
        raise InvalidSpec(
            [SpecProblem("TEST", test, f"one of {listed}")],
            what="command line",
            operation="debug",
            hint="name the test, and with --machine the machine if it had several",
        )
    return found[0]


def _name(test: Test) -> str:
    return f"{test.suite}::{test.name}"


def _remains_of(test: Test, root: Path) -> Iterator[Remains]:
    for attempt in test.attempts[-1:]:
        for artifact in attempt.artifacts:
            if artifact.name.endswith(MEMORY_SNAPSHOT):
                machine = artifact.name.removesuffix(MEMORY_SNAPSHOT).rstrip("-_./")
                yield Remains(
                    _name(test), _hypervisor(test, attempt, machine), machine, root / artifact.path
                )


def _hypervisor(test: Test, attempt: Attempt, machine: str) -> str:
    """What ran a machine; the test's own hypervisor where nothing tells of the machine."""
    told = {record.name: record.hypervisor for record in attempt.machines}
    return told.get(machine) or test.hypervisor or "qemu"


def _nothing(result: Path, tests: list[Test], root: Path) -> ResourceNotFound:
    """Why there is nothing to open, and what to do instead."""
    failed = [each for each in tests if each.outcome in {Outcome.FAIL, Outcome.ERROR}]
    if not failed:
        return ResourceNotFound(
            f"no test of {result} failed, and nothing was kept of those that passed",
            hint="name another result",
            operation="debug",
        )
    why = next(filter(None, (_said(each, root) for each in failed)), "")
    return ResourceNotFound(
        f"no memory was kept of {', '.join(map(_name, failed[:3]))}"
        + (" and others" if len(failed) > 3 else "")
        + (f": {why}" if why else ""),
        hint="run it again with --vm-sit (a shell in the guest at the failure) or "
        "--vm-keep=failed (`vmlab shell` opens what is kept); QEMU's x86_64 and aarch64 guests "
        f"are saved while they run; `vmlab report show {result}` has the other evidence",
        operation="debug",
    )


def _said(test: Test, root: Path) -> str:
    """What the evidence tells of the memory."""
    for attempt in test.attempts[-1:]:
        for artifact in attempt.artifacts:
            if artifact.name.endswith(SUMMARY):
                try:
                    lines = (root / artifact.path).read_text("utf-8", "replace").splitlines()
                except OSError:
                    return ""
                told = (line for line in lines if line.startswith("memory: "))
                return next(told, "").removeprefix("memory: ")
    return ""


def with_remains(
    remains: Remains,
    body: Callable[[Session, Interrupts], Awaitable[T]],
) -> T:
    """Call `body` with the inside of a machine as it was when its test failed.

    Raises:
        VmlabError: it cannot be brought back, or does not answer, with what can be done.
        Interrupted: a signal ended it.
    """

    async def work(machine: Machine, interrupts: Interrupts, run: Run) -> T:
        if machine.state is MachineState.PAUSED:
            await machine.resume()
        guest = Guest(machine, channel_into(machine))
        try:
            try:
                await guest.connect(timeout=_ANSWER_S)
            except DeadlineExceeded as error:
                error.message = f"{error.message}\n{await last_words(machine)}"
                error.hint = "it did not answer when it was saved either: --gdb looks into it"
                raise
            return await body(Session(machine, guest), interrupts)
        finally:
            await guest.close()

    return _revived(remains, work)


def with_console(remains: Remains, body: Callable[[Machine], Awaitable[T]]) -> T:
    """Call `body` with a machine as it was when its test failed, which runs on."""

    async def work(machine: Machine, interrupts: Interrupts, run: Run) -> T:
        if machine.state is MachineState.PAUSED:
            await machine.resume()
        return await body(machine)

    return _revived(remains, work)


def with_debugger(remains: Remains, body: Callable[[str], Awaitable[T]]) -> T:
    """Call `body` with the command line of a gdb that sees a machine as it was, standing still.

    Raises:
        UnsupportedOperation: its hypervisor lets no debugger in.
    """

    async def work(machine: Machine, interrupts: Interrupts, run: Run) -> T:
        if not isinstance(machine, _Debugged):
            raise _no(remains, "gdb")
        if machine.state is MachineState.RUNNING:
            await machine.pause()
        socket = run.owner.socket("gdb.sock")
        await machine.serve_debugger(socket)
        return await body(gdb_command(machine.spec.architecture, socket))

    return _revived(remains, work)


def _no(remains: Remains, what: str) -> UnsupportedOperation:
    return UnsupportedOperation(
        what,
        hypervisor=remains.hypervisor,
        machine=remains.machine,
        operation="debug",
        hint="leave the option out" if what == "gdb" else "its evidence was made by another one",
    )


def _revived(remains: Remains, work: Callable[[Machine, Interrupts, Run], Awaitable[T]]) -> T:
    if not remains.path.is_file():
        raise ResourceNotFound(
            f"the memory of {remains.machine!r} is not at {remains.path} any more",
            hint="was the result's directory moved without its files?",
            operation="debug",
        )
    with Run.begin() as run:
        opened = registry.provider(remains.hypervisor).open(run.owner)

        async def whole(interrupts: Interrupts) -> T:
            if not isinstance(opened, _Importing):
                raise _no(remains, "memory-snapshot")
            try:
                snapshot = await opened.import_snapshot(remains.path, "failed")
            except OSError as error:
                raise VmlabError(
                    f"{remains.path} cannot be unpacked: {error.strerror or error}",
                    hint="it needs room for the machine's memory and disks",
                ) from error
            machine = await opened.create_from(snapshot, snapshot.spec.name)
            try:
                return await work(machine, interrupts, run)
            finally:
                await machine.delete(force=True)

        return drive(opened, whole)
