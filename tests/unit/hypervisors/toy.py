"""A back end that exists in a dictionary, for tests of the machinery that runs operations.

Every hook awaits once before and once after each thing it does, so that a test can cancel between
any two of them, and does what `Script` says at its gates: wait, hang, fail, or report that
something happened. What exists is a set of names (`things`), so that anything left behind is seen.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from vmlab.hypervisors.base import (
    Channel,
    Console,
    DiskInfo,
    MachineInfo,
    NicInfo,
    Probe,
    Progress,
    Snapshot,
)
from vmlab.hypervisors.operated_hypervisor import OperatedHypervisor
from vmlab.hypervisors.operated_machine import OperatedMachine
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.picture import Picture
from vmlab.hypervisors.simulated.clock import VirtualClockLoop
from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Capabilities, Capability, Limits
from vmlab.machine.errors import CorruptSnapshot, OperationFailed, ResourceNotFound
from vmlab.machine.events import Event, EventType
from vmlab.machine.faults import Fault, FaultKind
from vmlab.machine.metrics import CpuMetrics, MachineMetrics, MemoryMetrics
from vmlab.machine.spec import Disk, MachineSpec, Nic
from vmlab.machine.states import TRANSITIONS, MachineState

RUNNING, PAUSED = MachineState.RUNNING, MachineState.PAUSED
STOPPED, FAILED = MachineState.STOPPED, MachineState.FAILED

Step = Callable[["ToyMachine"], Awaitable[None]]


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test in an event loop of its own, whose time no busy host can hold up."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
            runner.run(test(*arguments, **named))

    return run


class Gate:
    """A place in a hook where it waits for the test."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self, machine: ToyMachine) -> None:
        self.reached.set()
        await self.open.wait()


async def hang(machine: ToyMachine) -> None:
    """Wait for ever, unless cancelled."""
    await asyncio.Event().wait()


def fail(error: BaseException) -> Step:
    """Raise `error` in the hook."""

    async def step(machine: ToyMachine) -> None:
        raise error

    return step


def happen(state: MachineState, event: EventType, reason: str) -> Step:
    """Have something happen to the machine by itself in the middle of the hook."""

    async def step(machine: ToyMachine) -> None:
        machine.befall(state, event, reason)

    return step


class ToyHypervisor(OperatedHypervisor):
    """Machines in a dictionary.

    Attributes:
        before, after: What happens at the gates of a hook, by its name.
        things: Names of all that exists.
        hooks: Hooks that were entered, as "machine-name:hook".
        undone: What `_undo` was called for, in order, as "machine-name:operation".
        overlaps: Pairs of hooks that were on one machine at the same time.
    """

    name = "toy"

    def __init__(
        self, owner: Owner | None = None, *, lacks: tuple[Capability, ...] = (), **limits: Any
    ) -> None:
        self.time = 1000.0
        super().__init__(owner or Owner("run", "r1", Path("nowhere")))
        self.before: dict[str, Step] = {}
        self.after: dict[str, Step] = {}
        self.things: set[str] = set()
        self.hooks: list[str] = []
        self.undone: list[str] = []
        self.overlaps: list[tuple[str, str]] = []
        self._next = 0
        self._can = Capabilities(
            hypervisor=self.name,
            supported=frozenset(Capability) - set(lacks),
            architectures=frozenset(Architecture),
            faults=frozenset({FaultKind.DISK_ERROR}),
            limits=Limits(**limits),
        )

    def new_machine(self, id_: str, spec: MachineSpec, state: MachineState) -> ToyMachine:
        return ToyMachine(self, id_, spec, state)

    def new_id(self) -> str:
        self._next += 1
        return f"{self.owner.id}-m{self._next}"

    def now(self) -> float:
        return self.time

    async def probe(self) -> Probe:
        return Probe(hypervisor=self.name, available=True)

    async def capabilities(self) -> Capabilities:
        return self._can

    # For tests.

    async def machine(
        self, state: MachineState = MachineState.CREATED, name: str = "a", **fields: Any
    ) -> ToyMachine:
        """A machine in a stable state."""
        fields.setdefault("disks", [{"name": "root", "size": "1M"}])
        machine = await self.create(MachineSpec.of(name=name, **fields))
        assert isinstance(machine, ToyMachine)
        if state in {RUNNING, PAUSED, STOPPED}:
            await machine.start()
        if state is PAUSED:
            await machine.pause()
        if state is STOPPED:
            await machine.stop()
        if state is FAILED:
            await machine.start()
            machine.befall(FAILED, EventType.CRASHED, "it died")
        if state is MachineState.UNKNOWN:
            machine._settle(MachineState.UNKNOWN, "nobody knows")
        assert machine.state is state
        self.undone.clear()
        self.hooks.clear()
        return machine

    def check(self) -> None:
        """What holds whenever no operation is under way.

        States last and are true, every machine has its record and nothing else is there, events
        have no gaps and follow the table, and each operation that began has ended once.
        """
        assert len(set(self.undone)) == len(self.undone), "an operation was undone twice"
        assert not self.overlaps, "two hooks were on one machine at the same time"
        expected: set[str] = set()
        for machine in self._machines.values():
            assert isinstance(machine, ToyMachine)
            assert machine.state.is_stable, f"{machine.name} is left {machine.state.value}"
            assert not machine._lock.locked()
            assert not machine._pending
            expected.add(f"machine {machine.id}")
            expected |= {f"snapshot {machine.id}/{name}" for name in machine.saved}
            if machine.guest in {RUNNING, PAUSED}:
                expected.add(f"process {machine.id}")
            if machine.state is not MachineState.UNKNOWN:
                at_rest = {MachineState.CREATED, STOPPED}
                seen = machine.state if machine.state not in at_rest else STOPPED
                assert machine.guest is seen or (seen is FAILED and machine.guest is STOPPED)
        assert self.things == expected, "what exists is not what there should be"
        assert set(self._names.values()) == set(self._machines.values())
        assert not self._reserved
        assert not self._making
        check_events(list(self.log.since(0)))


class ToyMachine(OperatedMachine):
    """One machine of the toy; `guest` is what is true of it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.guest = STOPPED if self.state is MachineState.CREATED else self.state
        self.toy: ToyHypervisor = self._hypervisor  # new_machine's
        self.saved: dict[str, Snapshot] = {}
        self.pressed: list[tuple[str, ...]] = []
        self.memory = 0
        self.exists = False
        self.sizes = (self.spec.cpus.count, self.spec.memory.size)
        self.faults: set[str] = set()
        self._inside: str | None = None

    def befall(self, state: MachineState, event: EventType, reason: str) -> None:
        """Something happens to the machine by itself."""
        self._set(state)
        self._happened(state, event, reason)

    def _set(self, guest: MachineState) -> None:
        self.guest = guest
        process = f"process {self.id}"
        (self.toy.things.add if guest in {RUNNING, PAUSED} else self.toy.things.discard)(process)

    @asynccontextmanager
    async def _hook(
        self, name: str, operation: Operation | None = None, *, question: bool = False
    ) -> AsyncIterator[None]:
        """One hook's way in and out, with an await on each side and the script's steps."""
        if not question:
            if self._inside is not None:
                self.toy.overlaps.append((self._inside, name))
            self._inside = name
        self.toy.hooks.append(f"{self.name}:{name}")
        try:
            await asyncio.sleep(0)
            if step := self.toy.before.get(name):
                await step(self)
            if operation is not None and name not in {"start", "shutdown", "kill", "delete"}:
                self._require_guest(operation)
            yield
            if step := self.toy.after.get(name):
                await step(self)
            await asyncio.sleep(0)
        finally:
            if not question:
                self._inside = None

    def _require_guest(self, operation: Operation) -> None:
        """What is done to a live guest fails when there is none any more."""
        if operation.before.is_live and self.guest not in {RUNNING, PAUSED}:
            raise OperationFailed("there is no guest any more", machine=self.name)

    async def _observe(self) -> MachineState:
        async with self._hook("observe", question=True):
            return self.guest

    async def _undo(self, operation: Operation) -> None:
        async with self._hook("undo"):
            self.toy.undone.append(f"{self.name}:{operation.id}")
            if operation.name in {"create", "create_from", "fork", "migrate"} and not self._ours:
                self._set(STOPPED)
                self._remove()
            if operation.name == "start" and self.guest is RUNNING:
                self._set(STOPPED)
            for name in [name for name, kept in self.saved.items() if kept.digest == operation.id]:
                if operation.name == "snapshot":
                    self._drop(name)

    @property
    def _ours(self) -> bool:
        return self.toy._machines.get(self.id) is self

    def _remove(self) -> None:
        for name in tuple(self.saved):
            self._drop(name)
        self.toy.things.discard(f"machine {self.id}")
        self.exists = False

    def _drop(self, name: str) -> None:
        del self.saved[name]
        self.toy.things.remove(f"snapshot {self.id}/{name}")

    def _make(self) -> None:
        self.exists = True
        self.toy.things.add(f"machine {self.id}")

    async def _do_create(self, operation: Operation) -> None:
        async with self._hook("create", operation):
            self._make()

    async def _do_create_from(self, operation: Operation, snapshot: Snapshot) -> None:
        async with self._hook("create_from", operation):
            self._make()
            self._set(snapshot.state if snapshot.memory else STOPPED)

    async def _do_start(self, operation: Operation) -> None:
        async with self._hook("start", operation):
            self._set(RUNNING)

    async def _do_shutdown(self, operation: Operation) -> None:
        async with self._hook("shutdown", operation):
            self._set(STOPPED)

    async def _do_kill(self, operation: Operation) -> None:
        async with self._hook("kill", operation):
            self._set(STOPPED)

    async def _do_reset(self, operation: Operation) -> None:
        async with self._hook("reset", operation):
            self.memory = 0

    async def _do_pause(self, operation: Operation) -> None:
        async with self._hook("pause", operation):
            self._set(PAUSED)

    async def _do_resume(self, operation: Operation) -> None:
        async with self._hook("resume", operation):
            self._set(RUNNING)

    async def _do_delete(self, operation: Operation) -> None:
        async with self._hook("delete", operation):
            self._set(STOPPED)
            self._remove()

    async def _do_info(self) -> MachineInfo:
        async with self._hook("info", question=True):
            return MachineInfo(
                id=self.id,
                name=self.name,
                architecture=self.spec.architecture,
                vcpus=self.sizes[0],
                memory=self.sizes[1],
                disks=tuple(
                    DiskInfo(name=disk.name, size=disk.size or 0, bus=disk.bus)
                    for disk in self.spec.disks
                ),
            )

    async def _do_metrics(self) -> MachineMetrics:
        async with self._hook("metrics", question=True):
            return MachineMetrics(
                time=self.toy.now(),
                uptime_seconds=0,
                cpu=CpuMetrics(seconds=0),
                memory=MemoryMetrics(total_bytes=self.sizes[1]),
            )

    async def _do_console(self, name: str) -> Console:
        async with self._hook("console", question=True):
            raise ResourceNotFound(f"there is no console {name!r}", machine=self.name)

    async def _do_channel(self, name: str) -> Channel:
        async with self._hook("channel", question=True):
            raise ResourceNotFound(f"there is no channel {name!r}", machine=self.name)

    async def _do_screenshot(self) -> Picture:
        async with self._hook("screenshot", question=True):
            return Picture(1, 1, b"toy")

    async def _do_send_keys(self, keys: Sequence[tuple[str, ...]]) -> None:
        async with self._hook("send_keys", question=True):
            self.pressed += keys

    async def _do_snapshots(self) -> list[Snapshot]:
        async with self._hook("snapshots", question=True):
            return list(self.saved.values())

    async def _do_snapshot(self, operation: Operation, name: str, memory: bool) -> Snapshot:
        async with self._hook("snapshot", operation):
            self.saved[name] = Snapshot(
                name=name,
                machine=self.id,
                spec=self.spec,
                state=operation.before,
                memory=memory,
                time=self.toy.now(),
                size=0,
                digest=operation.id,
            )
            self.toy.things.add(f"snapshot {self.id}/{name}")
        return self.saved[name]

    async def _do_delete_snapshot(self, operation: Operation, snapshot: Snapshot) -> None:
        async with self._hook("delete_snapshot", operation):
            self._drop(snapshot.name)

    async def _do_restore(self, operation: Operation, snapshot: Snapshot) -> None:
        async with self._hook("restore", operation):
            if snapshot.digest == "corrupt":
                raise CorruptSnapshot("the snapshot is damaged", machine=self.name)
            self._set(snapshot.state if snapshot.memory else STOPPED)

    async def _do_fork(self, operation: Operation, child: OperatedMachine) -> None:
        assert isinstance(child, ToyMachine)
        async with self._hook("fork", operation):
            child._make()
            await asyncio.sleep(0)
            child._set(operation.before)

    async def _do_migrate(
        self, operation: Operation, arrival: OperatedMachine, live: bool, progress: Progress
    ) -> None:
        assert isinstance(arrival, ToyMachine)
        async with self._hook("migrate", operation):
            arrival._make()
            for sent in (0, 50, 100):
                progress(sent, 100)
                await asyncio.sleep(0)

    async def _do_hand_over(self, operation: Operation, arrival: OperatedMachine) -> None:
        assert isinstance(arrival, ToyMachine)
        async with self._hook("hand_over", operation):
            for name in self.saved:
                arrival.saved[name] = self.saved[name]
                arrival.toy.things.add(f"snapshot {arrival.id}/{name}")
            arrival._set(self.guest)
            self._set(STOPPED)
            await asyncio.sleep(0)
            self._remove()

    async def _do_plug_disk(self, operation: Operation, disk: Disk) -> DiskInfo:
        async with self._hook("plug_disk", operation):
            return DiskInfo(name=disk.name, size=disk.size or 0, bus=disk.bus)

    async def _do_unplug_disk(self, operation: Operation, disk: Disk) -> None:
        async with self._hook("unplug_disk", operation):
            return

    async def _do_resize_disk(self, operation: Operation, disk: Disk, size: int) -> DiskInfo:
        async with self._hook("resize_disk", operation):
            return DiskInfo(name=disk.name, size=size, bus=disk.bus)

    async def _do_plug_nic(self, operation: Operation, nic: Nic) -> NicInfo:
        async with self._hook("plug_nic", operation):
            return NicInfo(name=nic.name, network=nic.network, mac=nic.mac or "")

    async def _do_unplug_nic(self, operation: Operation, nic: Nic) -> None:
        async with self._hook("unplug_nic", operation):
            return

    async def _do_resize(self, operation: Operation, vcpus: int | None, memory: int | None) -> None:
        async with self._hook("resize", operation):
            self.sizes = (vcpus or self.sizes[0], memory or self.sizes[1])

    async def _do_pin(self, operation: Operation, pinning: Mapping[int, tuple[int, ...]]) -> None:
        async with self._hook("pin", operation):
            return

    async def _do_inject(self, operation: Operation, fault: Fault) -> str:
        async with self._hook("inject", operation):
            self.faults.add(operation.id)
        return operation.id

    async def _do_clear_fault(self, operation: Operation, fault: str) -> None:
        async with self._hook("clear_fault", operation):
            if fault not in self.faults:
                raise ResourceNotFound(f"there was no fault {fault!r}", machine=self.name)


def check_events(events: list[Event]) -> None:
    """Events are numbered without gaps, follow the table, and operations begin and end once."""
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    states: dict[str, str] = {}
    under_way: dict[str, str] = {}
    ended: set[str] = set()
    for event in events:
        machine = event.machine or ""
        if event.type in {EventType.CREATED, EventType.ADOPTED}:
            assert machine not in states or states[machine] == "deleted"
            states[machine] = str(event.data["state"])
        if event.type is EventType.STATE:
            old, new = str(event.data["from"]), str(event.data["to"])
            assert states[machine] == old
            assert MachineState(new) in TRANSITIONS[MachineState(old)]
            states[machine] = new
        if event.type is EventType.OPERATION_STARTED:
            assert machine not in under_way, "a second operation began on one machine"
            assert event.operation is not None
            assert event.operation not in ended
            under_way[machine] = event.operation
        if event.type in {EventType.OPERATION_FINISHED, EventType.OPERATION_FAILED}:
            assert under_way.pop(machine) == event.operation
            ended.add(event.operation)
            assert event.data["seconds"] is not None
    assert not under_way, "an operation began and did not end"


def of_type(hypervisor: OperatedHypervisor, *types: EventType) -> list[Event]:
    """The events of some types."""
    return [event for event in hypervisor.log.since(0) if event.type in types]
