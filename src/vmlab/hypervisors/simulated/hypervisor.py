"""The simulated hypervisor: the contract on top of a simulated host, with its own clock and luck.

It can crash and come back; the machines run on in the host meanwhile, and are found again.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Literal, TypeVar

from vmlab import __version__
from vmlab.hypervisors.base import Probe, ProbeItem, Snapshot
from vmlab.hypervisors.operated_hypervisor import OperatedHypervisor
from vmlab.hypervisors.operated_machine import OperatedMachine
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.simulated.chances import Chances
from vmlab.hypervisors.simulated.clock import VIRTUAL_EPOCH, VirtualClockLoop
from vmlab.hypervisors.simulated.conduct import Conductor
from vmlab.hypervisors.simulated.events import LossyEventLog
from vmlab.hypervisors.simulated.faults import ALL_KINDS, FaultBox
from vmlab.hypervisors.simulated.hardware import Hardware
from vmlab.hypervisors.simulated.journal import Journal
from vmlab.hypervisors.simulated.machine import SimulatedMachine
from vmlab.hypervisors.simulated.profile import NEVER, SimulationProfile
from vmlab.hypervisors.simulated.readings import state_of
from vmlab.hypervisors.simulated.trace import Trace
from vmlab.hypervisors.simulated.world import World
from vmlab.machine.capabilities import Capabilities, Capability
from vmlab.machine.errors import (
    HypervisorUnavailable,
    SnapshotNotFound,
)
from vmlab.machine.events import EventType
from vmlab.machine.faults import FaultKind
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner
    from vmlab.hypervisors.serialised_machine import SerialisedMachine

T = TypeVar("T")
ClockKind = Literal["virtual", "wall"]

_NOTICES: Final = {
    "guest-shutdown": (EventType.GUEST_SHUTDOWN, MachineState.STOPPED),
    "guest-panic": (EventType.GUEST_PANIC, MachineState.FAILED),
    "guest-reset": (EventType.GUEST_RESET, None),
    "crashed": (EventType.CRASHED, MachineState.FAILED),
    "paused": (EventType.FAULT_INJECTED, MachineState.PAUSED),
    "resumed": (EventType.FAULT_CLEARED, MachineState.RUNNING),
}


def _nothing() -> None:
    """The effect of a question."""


class SimulatedHypervisor(OperatedHypervisor):
    """A hypervisor whose host, machines and guests are simulated in this process.

    Args:
        owner: Whose machines these are.
        profile: What it is like.
        seed: Source of all its randomness; None draws one, which `seed` tells.
        clock: "virtual", whose calls need the loop of `loop_factory`, or "wall".
        store: Directory for the machines of a store, which outlive the process; None keeps them
            in memory alone.
    """

    name: ClassVar[str] = "simulated"

    def __init__(
        self,
        owner: Owner,
        profile: SimulationProfile,
        *,
        seed: int | None = None,
        clock: ClockKind = "virtual",
        store: Path | None = None,
    ) -> None:
        self.profile = profile
        self.seed = secrets.randbits(32) if seed is None else seed
        self.clock = clock
        self.down = False
        self.closing = False
        self.epoch = 0
        self.chances = Chances(self.seed)
        self.record = Trace(self.seed)
        self._base = 0.0
        self._opened: float | None = None
        self._ids: Counter[str] = Counter()
        self._lost_events: Counter[str] = Counter()
        self._stale_answers: Counter[str] = Counter()
        self._unfinished: list[tuple[SimulatedMachine, Operation]] = []
        self._comeback: asyncio.TimerHandle | None = None
        self.world = World(self.now, self.chances, profile.effective_limits)
        self.world.faults = FaultBox(self.world, self.chances, self._crash_soon)
        self.world.on_notice = self._noticed
        self._journal = Journal(store) if store is not None else None
        super().__init__(owner)
        self.log = LossyEventLog(self.name, self.now, self.record, self._loses)
        self._conductor = Conductor(self)
        missing = {
            **dict.fromkeys(sorted(profile.without), f"profile {profile.name!r} is without it"),
            **NEVER,
        }
        if clock == "wall":
            missing[Capability.DETERMINISTIC] = "the wall clock does not come from the seed"
        kinds = ALL_KINDS if Capability.FAULTS not in profile.without else frozenset[FaultKind]()
        self._capabilities = Capabilities(
            hypervisor=self.name,
            version=__version__,
            supported=frozenset(Capability) - set(missing),
            unsupported=missing,
            architectures=profile.architectures,
            accelerators=("simulated",),
            faults=kinds,
            counted=kinds,
            limits=profile.effective_limits,
        )

    # Time, and the trace.

    def loop_factory(self) -> Callable[[], asyncio.AbstractEventLoop]:
        return VirtualClockLoop if self.clock == "virtual" else asyncio.new_event_loop

    def now(self) -> float:
        """Seconds on its clock; virtual time begins at `VIRTUAL_EPOCH`."""
        if self.clock == "wall":
            return time.time()
        try:
            passed = asyncio.get_running_loop().time()
        except RuntimeError:
            return VIRTUAL_EPOCH + self._base
        return VIRTUAL_EPOCH + self._base + passed

    @property
    def age(self) -> float:
        """Seconds since it was first used."""
        return self.now() - self._opened if self._opened is not None else 0.0

    def trace(self) -> str:
        """Operations, drawn latencies, faults and events as JSON lines; the seed is in the first.

        The same seed and the same calls on the virtual clock give the same text.
        """
        return self.record.render()

    def blame(self, what: str) -> str:
        """A hint that says where an injected misfortune came from."""
        return (
            f"{what} of the simulation: profile {self.profile.name!r}, seed {self.seed}; "
            "the same seed and calls bring it again"
        )

    # What the machinery asks for.

    def new_machine(self, id_: str, spec: MachineSpec, state: MachineState) -> SimulatedMachine:
        return SimulatedMachine(self, id_, spec, state)

    async def make(
        self,
        operation: Operation,
        spec: MachineSpec,
        build: Callable[[OperatedMachine], Awaitable[None]],
        *,
        state: MachineState = MachineState.CREATED,
        id_: str | None = None,
    ) -> OperatedMachine:
        self.require_up()
        self._ids[spec.name] += 1
        if id_ is None:
            # From the name and not from a count of all, so that machines that are made at the
            # same time have the same ids whichever comes first.
            id_ = self.chances.raw(16, "machine", spec.name, self._ids[spec.name]).hex()
        return await super().make(operation, spec, build, state=state, id_=id_)

    async def _prepare(self) -> None:
        self.require_up()
        if self._opened is None:
            if self._journal is not None:
                self._journal.open()
                self._find_machines(self._journal)
            self._opened = self.now()
            schedule = self.profile.faults
            self.world.faults.schedule(schedule.faults, schedule.seed)

    async def conduct(
        self,
        name: str,
        machine: SimulatedMachine,
        operation: Operation | None = None,
        effect: Callable[[], T] = _nothing,  # type: ignore[assignment]  # T is None without one
        *,
        before: Callable[[], object] | None = None,
    ) -> T:
        """One operation: what the seed has in store for it, the wait, and the effect."""
        return await self._conductor.conduct(name, machine, operation, effect, before)

    @property
    def conductor(self) -> Conductor:
        """For operations that take several steps."""
        return self._conductor

    def undo(self, machine: SimulatedMachine, operation: Operation) -> None:
        """Put right what an operation has half done; while it is down, when it is back.

        Raises:
            HypervisorUnavailable: it is down.
        """
        if self.down:
            self._unfinished.append((machine, operation))
            self.require_up()
        machine.go_back(operation)

    def snapshot_source(self, snapshot: Snapshot) -> Hardware:
        """The machine that holds a snapshot.

        Raises:
            SnapshotNotFound: there is none, or it has no such snapshot.
        """
        hardware = self.world.machines.get(snapshot.machine)
        if hardware is None or snapshot.name not in hardware.snapshots:
            raise SnapshotNotFound(
                f"there is no snapshot {snapshot.name!r} of machine {snapshot.machine!r}",
                hint="a machine's snapshots are deleted with it",
                hypervisor=self.name,
                operation="create_from",
            )
        return hardware

    def stale_by(self, machine: SimulatedMachine) -> float | None:
        """How many seconds old the answer to a status query is, if it is not fresh."""
        if self.closing:
            return None
        luck = self.profile.luck
        self._stale_answers[machine.name] += 1
        count = self._stale_answers[machine.name]
        hardware = self.world.machines.get(machine.id)
        by_fault = self.world.faults.stale(hardware) if hardware is not None else None
        if by_fault is None and not (
            luck.stale_status > 0
            and self.chances.unit("stale", machine.name, count) < luck.stale_status
        ):
            return None
        age = by_fault if by_fault is not None else luck.stale_seconds
        self.record.add(self.now(), "stale-status", {"machine": machine.name, "age": age})
        return age

    # Machines that outlive the process.

    def _find_machines(self, journal: Journal) -> None:
        """Take over what the journal has, and write into it from now on."""
        records = list(journal.load())
        latest = max((record.time for record in records), default=0.0)
        if self.clock == "virtual" and latest > self.now():
            self._base += latest - self.now()
        for record in records:
            hardware = record.build(self.world)
            self._ids[hardware.name] += 1
            self.adopt(self.new_machine(hardware.id, record.spec, state_of(hardware)))
        self.world.on_change = self._changed

    def _changed(self, hardware: Hardware) -> None:
        """Keep what has become of a machine, before anybody is told."""
        assert self._journal is not None, "without a journal nobody asks"
        machine = self._machines.get(hardware.id)
        if machine is None:
            self._journal.remove(hardware.id)
            return
        if hardware.id in self.world.machines:
            self._journal.save(hardware)
        else:
            self._journal.remove(hardware.id)

    def _keep(self, machine: SerialisedMachine) -> None:
        hardware = self.world.machines.get(machine.id)
        if hardware is not None:
            hardware.spec = machine.spec
            self.world.changed(hardware)

    def announce_end(self, operation: Operation, machine: SerialisedMachine) -> None:
        self._keep(machine)
        super().announce_end(operation, machine)

    def announce_failure(
        self, operation: Operation, machine: SerialisedMachine, failure: BaseException
    ) -> None:
        self._keep(machine)
        super().announce_failure(operation, machine, failure)

    def enlist(self, operation: Operation, machine: OperatedMachine) -> None:
        super().enlist(operation, machine)
        self._keep(machine)

    # What happens by itself.

    def _noticed(self, hardware: Hardware, event: str, reason: str) -> None:
        machine = self._machines.get(hardware.id)
        if self.down or not isinstance(machine, SimulatedMachine):
            return
        type_, state = _NOTICES[event]
        if self._loses(type_, hardware.id):
            self.record.add(
                self.now(), "lost-notice", {"type": type_.value, "machine": hardware.name}
            )
            return
        machine.noticed(type_, state, reason)

    def _loses(self, type_: EventType, machine: str | None) -> bool:
        if self.closing:
            return False
        rate = self.profile.luck.lost_events
        if rate > 0:
            key = f"{type_.value}/{machine}"
            self._lost_events[key] += 1
            if self.chances.unit("event", key, self._lost_events[key]) < rate:
                return True
        if not len(self.world.faults):
            return False
        hardware = self.world.machines.get(machine) if machine is not None else None
        return self.world.faults.event_lost(type_.value, hardware)

    # Crash and comeback.

    def require_up(self) -> None:
        """Refuse while it is down (HypervisorUnavailable)."""
        if self.down:
            raise HypervisorUnavailable(
                "the simulated hypervisor is down: it crashed",
                hint=self.blame("a crash") + "; `restart()` brings it back",
                hypervisor=self.name,
            )

    def crash(self, reason: str = "crashed", *, restart_after: float | None = None) -> None:
        """Die at once: calls fail, operations under way end, the machines run on unwatched.

        Args:
            reason: For the events.
            restart_after: Seconds until it is back by itself; None is not before `restart`.
        """
        if self.down:
            return
        self.down = True
        self.epoch += 1
        self.log.emit(EventType.HYPERVISOR_LOST, reason=reason)
        for machine in self._own():
            machine.lost_hypervisor(reason)
        if restart_after is not None:
            self._comeback = asyncio.get_running_loop().call_later(restart_after, self.restart)

    def _crash_soon(self, restart_after: float | None) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: self.crash("crashed by a fault", restart_after=restart_after))

    def restart(self) -> None:
        """Come back: finish undoing what the crash interrupted, and find the machines again."""
        if not self.down:
            return
        if self._comeback is not None:
            self._comeback.cancel()
            self._comeback = None
        self.down = False
        for machine, operation in self._unfinished:
            machine.go_back(operation)
        self._unfinished.clear()
        self.log.emit(EventType.HYPERVISOR_BACK)
        for machine in self._own():
            machine.found_again()

    def _own(self) -> list[SimulatedMachine]:
        return [
            machine
            for machine in tuple(self._machines.values())
            if isinstance(machine, SimulatedMachine)
        ]

    # The contract.

    async def probe(self) -> Probe:
        self.require_up()
        return Probe(
            hypervisor=self.name,
            available=True,
            version=__version__,
            items=(
                ProbeItem(name="profile", works=True, detail=self.profile.name),
                ProbeItem(name="clock", works=True, detail=self.clock),
                ProbeItem(name="seed", works=True, detail=str(self.seed)),
            ),
        )

    async def capabilities(self) -> Capabilities:
        self.require_up()
        return self._capabilities

    async def close(self) -> None:
        """Let go of it: a run's machines are gone, whatever state they are in."""
        self.closing = True
        self.restart()
        try:
            await super().close()
        finally:
            self.world.faults.clear_all()
            if self._journal is not None:
                self._journal.close()
