"""The bench that a check works on: machines, their guests, and ways to state what has to be so.

A check gets one `Bench`. Whatever it makes on it is deleted when the check has ended; the first
statement that does not hold ends the check.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from vmlab.conformance.probe import GuestCannotTell, GuestProbe
from vmlab.conformance.profiles import ConformanceProfile
from vmlab.conformance.registry import Means
from vmlab.conformance.results import Expectation
from vmlab.hypervisors.base import Hypervisor, Machine, MachineInfo
from vmlab.hypervisors.ownership import Owner
from vmlab.machine.capabilities import Capabilities, Capability
from vmlab.machine.errors import VmlabError
from vmlab.machine.events import Event, EventType
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

OWN: Final = "own"
"""The directory of the check's own files, which no hypervisor has to clear away."""

Opener = Callable[[Owner, dict[str, str]], Hypervisor]


class CheckFailed(AssertionError):
    """Something that the contract promises is not so."""

    def __init__(self, what: str, expected: object = None, actual: object = None) -> None:
        self.what = what
        self.expected = None if expected is None else str(expected)
        self.actual = None if actual is None else str(actual)
        tail = f": expected {expected}, got {actual}" if expected is not None else ""
        super().__init__(f"{what}{tail}")


class Skipped(Exception):
    """The check cannot be made here; the message says why."""


class Bench:
    """Where one check works.

    Args:
        topic: Begins the names of the machines.
        profile: What is known of the kind of back end.
        opener: Opens another hypervisor of that kind for an owner.
        directory: A directory for the owners' files.
        seed: Source of everything random about the check.
    """

    def __init__(
        self,
        topic: str,
        profile: ConformanceProfile,
        opener: Opener,
        directory: Path,
        seed: int,
    ) -> None:
        self.profile = profile
        self.seed = seed
        self.random = random.Random(f"{seed}/{topic}")
        self.expectations: list[Expectation] = []
        self.notes: list[str] = []
        self.used: set[Capability] = set()
        self.undeclared_working: set[Capability] = set()
        self.opened: list[Hypervisor] = []
        self.closed: list[Hypervisor] = []
        # Those that were made to lose events, which are no use to the audits then.
        self.lossy: list[Hypervisor] = []
        self.machines: list[Machine] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.capabilities: Capabilities
        self._topic = topic
        self._opener = opener
        self._directory = directory
        self._names = 0

    # Hypervisors.

    @property
    def hypervisor(self) -> Hypervisor:
        """The hypervisor under test."""
        return self.opened[0]

    def another(self, **options: str) -> Hypervisor:
        """Another hypervisor of the same kind, for an owner of its own."""
        return self._open(self._owner("run"), **options)

    def store(self) -> Hypervisor:
        """A hypervisor of the same kind for a store, whose machines outlive it."""
        return self._open(self._owner("store"))

    async def reopened(self, hypervisor: Hypervisor) -> Hypervisor:
        """Close a hypervisor and open one for the same owner, as the next process would."""
        await self.close(hypervisor)
        return self._open(hypervisor.owner)

    def _owner(self, kind: Literal["run", "store"]) -> Owner:
        number = len(self.opened)
        directory = self._directory / f"o{number}"
        directory.mkdir(parents=True)
        return Owner(kind, f"conformance-{number}", directory)

    def _open(self, owner: Owner, **options: str) -> Hypervisor:
        hypervisor = self._opener(owner, {**self.profile.options, **options})
        self.opened.append(hypervisor)
        return hypervisor

    async def close(self, hypervisor: Hypervisor) -> None:
        """Close one of them before the end of the check."""
        self.closed.append(hypervisor)
        await hypervisor.close()

    def directory(self, name: str) -> Path:
        """A directory of the host's for the check's own files."""
        made = self._directory / OWN / name
        made.mkdir(parents=True)
        return made

    def has(self, *capabilities: Capability) -> bool:
        """Whether all of `capabilities` are declared; the check goes on to use them then."""
        declared = all(capability in self.capabilities for capability in capabilities)
        if declared:
            self.used |= set(capabilities)
        return declared

    # Machines.

    def name(self) -> str:
        """A name that no machine of this check has."""
        self._names += 1
        return f"{self._topic}-{self._names}"

    def spec(self, **changes: Any) -> MachineSpec:
        """The profile's specification under a new name, with some fields replaced."""
        return self.profile.spec.with_changes(**{"name": self.name(), **changes})

    async def create(self, on: Hypervisor | None = None, /, **changes: Any) -> Machine:
        """A new machine, at rest."""
        machine = await (on or self.hypervisor).create(self.spec(**changes))
        self.machines.append(machine)
        return machine

    async def run(self, on: Hypervisor | None = None, /, **changes: Any) -> Machine:
        """A new machine that runs."""
        machine = await self.create(on, **changes)
        await machine.start()
        return machine

    def keep(self, machine: Machine) -> Machine:
        """Have a machine that was made otherwise (a fork, an arrival) looked after as well."""
        self.machines.append(machine)
        return machine

    def guest(self, machine: Machine) -> GuestProbe:
        """The probe of the machine's guest."""
        if self.profile.probe is None:
            raise Skipped(Means.GUEST.value)
        return self.profile.probe(machine)

    async def crash(self, machine: Machine, after: float = 0.0) -> None:
        """Make the running machine die by itself, `after` seconds from now."""
        crash = self.profile.crasher(self.capabilities.faults)
        if crash is None:
            raise Skipped(Means.CRASH.value)
        await crash(machine, after)

    async def crashed(self, machine: Machine) -> None:
        """Crash the running machine and wait until its hypervisor knows."""
        await self.crash(machine)
        await self.until(
            lambda: self.status_is(machine, MachineState.FAILED), "a crashed machine is failed"
        )

    async def status_is(self, machine: Machine, state: MachineState) -> bool:
        """Whether the hypervisor says that the machine is in `state`."""
        return (await machine.status()).state is state

    @property
    def scratch(self) -> Sequence[str]:
        """Names of the disks that guests may write to; the check is skipped without any."""
        if not self.profile.scratch:
            raise Skipped("a disk that the guest may write to (the profile names none)")
        return self.profile.scratch

    @property
    def nic(self) -> str:
        """The name of the first NIC of the machines; the check is skipped without one."""
        if not self.profile.spec.nics:
            raise Skipped("a NIC in the specification (the profile's has none)")
        return self.profile.spec.nics[0].name

    # Time and chance.

    def now(self) -> float:
        """Seconds on the clock that the hypervisor's loop keeps."""
        return asyncio.get_running_loop().time()

    async def wait(self, seconds: float | None = None) -> None:
        """Let `seconds` pass (None: as long as it takes to see that something moves)."""
        await asyncio.sleep(self.profile.settle if seconds is None else seconds)

    async def until(self, condition: Callable[[], Awaitable[bool]], what: str) -> None:
        """Wait for `condition`, which has to hold within the profile's slack."""
        end = self.now() + self.profile.slack
        while not await condition():
            if self.now() > end:
                self._record(what, False, f"so within {self.profile.slack:g} s", "not so")
            await asyncio.sleep(0.1)
        self._record(what, True)

    async def within(self, work: Awaitable[T], what: str) -> T:
        """What `work` gives, which has to come within the profile's slack."""
        limit = asyncio.timeout(self.profile.slack)
        try:
            async with limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
        self._record(what, False, f"so within {self.profile.slack:g} s", "not so")
        raise AssertionError("a failed statement ends the check")

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something beside the check; it is cancelled when the check ends."""
        task = asyncio.ensure_future(work)
        self.tasks.append(task)
        return task

    async def interrupt(self, work: Coroutine[Any, Any, T], after: float, what: str) -> list[T]:
        """Cancel `work` after some seconds and state that it raises CancelledError.

        Returns:
            Nothing; or, where it was faster than that, the one answer that it gave.
        """
        task = self.spawn(work)
        # At the earliest when it has begun.
        await asyncio.sleep(after)
        if task.done():
            self.note(f"{what}: it was faster")
            return [task.result()]
        task.cancel()
        await self.refuses(asyncio.CancelledError, task, what)
        return []

    def bytes(self, length: int = 512) -> bytes:
        """Bytes that no other call gives."""
        return self.random.randbytes(length)

    # Statements.

    def _record(
        self, what: str, passed: bool, expected: object = None, actual: object = None
    ) -> None:
        words = [None if value is None else _words(value) for value in (expected, actual)]
        self.expectations.append(Expectation(what, passed, *words))
        if not passed:
            raise CheckFailed(what, *words)

    def true(self, condition: bool, what: str) -> None:
        """State that `condition` holds."""
        self._record(what, bool(condition), "so" if not condition else None, "not so")

    def equal(self, actual: object, expected: object, what: str) -> None:
        """State that two values are the same."""
        self._record(what, actual == expected, expected, actual)

    async def refuses(self, kind: type[E], call: Awaitable[object], what: str) -> E:
        """State that `call` raises an error of `kind`, which is returned."""
        try:
            answer = await call
        except kind as error:
            self._record(what, True, kind.__name__, type(error).__name__)
            return error
        except VmlabError as error:
            self._record(what, False, kind.__name__, f"{type(error).__name__}: {error}")
        else:
            self._record(what, False, kind.__name__, f"an answer: {answer!r}")
        raise AssertionError("a failed statement ends the check")

    async def is_in(self, machine: Machine, state: MachineState, what: str) -> None:
        """State that the machine is in `state`, by its own word and its hypervisor's."""
        self.equal(machine.state.value, state.value, f"{what}: state")
        self.equal((await machine.status()).state.value, state.value, f"{what}: status")

    async def answers(self, machine: Machine, what: str) -> None:
        """State that the machine's guest runs, by its own word; nothing where it has no probe."""
        if self.profile.probe is not None:
            await self.guest(machine).ticks()
            self._record(f"{what}: the guest answers", True)

    async def told(self, answer: Awaitable[T], what: str) -> T | None:
        """What the guest answers; None, with a note, if its probe does not know the question."""
        try:
            return await answer
        except GuestCannotTell as reason:
            self.note(f"the guest's probe cannot tell {what}: {reason}")
            return None

    def note(self, text: str) -> None:
        """Say something in the report that is neither right nor wrong."""
        self.notes.append(text)


async def names(hypervisor: Hypervisor) -> list[str]:
    """Names of the machines that the hypervisor lists."""
    return [machine.name for machine in await hypervisor.list()]


async def of_type(hypervisor: Hypervisor, kind: EventType, machine: Machine) -> list[Event]:
    """The events of one kind of one machine."""
    return [
        event
        for event in await hypervisor.events()
        if event.type is kind and event.machine == machine.id
    ]


def shape(info: MachineInfo) -> dict[str, object]:
    """What a machine is made of, without what changes by itself and where its files are."""
    made_of = info.model_dump(
        mode="json", include={"name", "vcpus", "memory", "disks", "nics", "nodes", "pinning"}
    )
    for disk in made_of["disks"]:
        del disk["path"]
    return made_of


def _words(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 400 else f"{text[:400]}... ({len(text)} characters)"
