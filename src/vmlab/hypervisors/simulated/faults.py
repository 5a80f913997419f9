"""Faults at work on a simulated host: when each strikes, what it does, and how it ends.

A fault whose trigger is a time or a text holds from then on for its duration, or until it is
cleared; one that is triggered by the nth occasion or by chance strikes that occasion alone unless
it has a duration. The occasion of a disk fault is a request, of a network fault a frame, of an
operation, event or status fault one of those, and of any other fault an operation on its machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from vmlab.hypervisors.simulated.chances import Chances
from vmlab.hypervisors.simulated.hardware import Hardware, Power
from vmlab.hypervisors.simulated.world import World
from vmlab.machine.errors import InvalidSpec, ResourceNotFound, SpecProblem
from vmlab.machine.faults import (
    At,
    Chance,
    ClockJump,
    ConsoleText,
    CpuStall,
    DiskCorrupt,
    DiskError,
    DiskSlow,
    DiskTornWrite,
    Fault,
    FaultKind,
    HypervisorCrash,
    KillFault,
    LostEvent,
    MemoryPressure,
    NetDelay,
    NetLoss,
    NetPartition,
    Nth,
    OperationFailure,
    OperationHang,
    OperationPartial,
    PauseFault,
    PowerCut,
    StaleStatus,
)

OPERATION_FAULTS: Final = (OperationFailure, OperationHang, OperationPartial)
_AT_OCCASIONS: Final = (
    DiskError, DiskSlow, DiskTornWrite, NetLoss, NetDelay, LostEvent, StaleStatus,
    *OPERATION_FAULTS,
)  # fmt: skip
"""Faults that change what happens at an occasion; all others change a machine once."""
_ONE_DISK: Final = (DiskError, DiskSlow, DiskTornWrite, DiskCorrupt)
_ONE_NIC: Final = (NetLoss, NetDelay, NetPartition)


@dataclass(slots=True)
class DiskMishap:
    """What becomes of one request to a disk."""

    errno: str | None = None
    delay: float = 0.0
    keep: int | None = None


@dataclass(slots=True)
class PacketMishap:
    """What becomes of one frame."""

    lost: bool = False
    delay: float = 0.0


class Armed:
    """A fault that waits for its moment, holds, or is over."""

    def __init__(self, box: FaultBox, fault: Fault, id_: str, machine: str | None) -> None:
        self.fault = fault
        self.id = id_
        self.machine = machine
        self.holds = False
        self.over = False
        self.timer: asyncio.TimerHandle | None = None
        self.touched: list[tuple[Hardware, Callable[[], None]]] = []
        self._box = box
        self._occasions = 0
        self._draws = 0
        self._tail = ""
        self._own = Chances(fault.seed) if fault.seed is not None else None

    def concerns(self, hardware: Hardware) -> bool:
        """Whether it is meant for this machine: by id where injected, by name in a schedule."""
        if self.machine is not None:
            return self.machine == hardware.id
        return self.fault.machine in (None, hardware.name)

    def begin(self) -> None:
        """Start to wait."""
        when = self.fault.when
        if isinstance(when, At):
            if when.seconds == 0:
                self.strike()
            else:
                self._after(when.seconds, self.strike)

    def occasion(self, hardware: Hardware | None = None) -> bool:
        """Whether it strikes at this matching occasion."""
        if self.over:
            return False
        if self.holds:
            return True
        self._occasions += 1
        when = self.fault.when
        if isinstance(when, Nth):
            count = self._occasions
            strikes = count % when.n == 0 if when.every else count == when.n
        elif isinstance(when, Chance):
            strikes = self.draw() < when.probability
        else:
            return False
        if strikes and (
            self.fault.duration is not None or not isinstance(self.fault, _AT_OCCASIONS)
        ):
            self.strike(hardware)
        return strikes

    def draw(self) -> float:
        """A random number of this fault's own."""
        self._draws += 1
        if self._own is not None:
            return self._own.unit("fault", self._draws)
        return self._box.draw(self.id, self._draws)

    def text(self, hardware: Hardware, text: str) -> None:
        """A machine that it concerns printed something."""
        when = self.fault.when
        if not isinstance(when, ConsoleText) or self.holds or self.over:
            return
        self._tail += text
        if when.text in self._tail:
            self.strike(hardware)
        self._tail = self._tail[-len(when.text) :]

    def strike(self, hardware: Hardware | None = None) -> None:
        """It happens: to one machine, or to all that it concerns."""
        if self.over:
            return
        fault = self.fault
        if isinstance(fault, _AT_OCCASIONS):
            self.holds = True
        else:
            for victim in [hardware] if hardware is not None else self._box.victims(self):
                undo = self._box.apply(fault, victim)
                if undo is not None:
                    self.touched.append((victim, undo))
            if isinstance(fault, HypervisorCrash):
                self._box.crash(fault.restart_after)
        if fault.duration is not None:
            self._after(fault.duration, self._lapse)

    def _lapse(self) -> None:
        """Its duration is over; one that repeats waits for its next occasion."""
        self._undo()
        self.holds = False
        when = self.fault.when
        if not (isinstance(when, Chance) or (isinstance(when, Nth) and when.every)):
            self.over = True

    def clear(self) -> None:
        """End it for good."""
        if self.timer is not None:
            self.timer.cancel()
        self._undo()
        self.holds, self.over = False, True

    def forget(self, hardware: Hardware) -> None:
        """A machine is gone: nothing of it has to be put right any more."""
        self.touched = [(victim, undo) for victim, undo in self.touched if victim is not hardware]

    def _undo(self) -> None:
        for _victim, undo in self.touched:
            undo()
        self.touched.clear()

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = asyncio.get_running_loop().call_later(seconds, action)


class FaultBox:
    """All faults of one host.

    Args:
        world: The host.
        chances: Source of what faults leave to chance.
        crash: Crashes the hypervisor; it is given the seconds until it is back, or None.
    """

    def __init__(
        self, world: World, chances: Chances, crash: Callable[[float | None], None]
    ) -> None:
        self.crash = crash
        self._world = world
        self._chances = chances
        self._armed: dict[str, Armed] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._armed)

    def schedule(self, faults: tuple[Fault, ...], seed: int) -> None:
        """Arm a whole schedule now."""
        for fault in faults:
            armed = Armed(self, fault, f"{fault.id}/{seed}", None)
            self._armed[armed.id] = armed
            armed.begin()

    def inject(self, fault: Fault, hardware: Hardware) -> str:
        """Arm one fault for one machine; returns its id.

        Raises:
            InvalidSpec: it names a disk, NIC or vCPU that the machine does not have, or its id is
                in use.
        """
        _check(fault, hardware)
        self._count += 1
        identity = fault.id or f"{fault.kind.value}-{self._count}"
        if identity in self._armed:
            problem = SpecProblem("id", identity, "an id that no fault had before")
            raise InvalidSpec([problem], machine=hardware.name)
        armed = Armed(self, fault, identity, hardware.id)
        self._armed[identity] = armed
        armed.begin()
        return identity

    def clear(self, identity: str, hardware: Hardware) -> None:
        """End a fault that was injected into a machine.

        Raises:
            ResourceNotFound: there never was one of that id.
        """
        armed = self._armed.get(identity)
        if armed is None or armed.machine != hardware.id:
            raise ResourceNotFound(
                f"machine {hardware.name!r} never had a fault {identity!r}",
                hint="`inject` returns the id of the fault",
                machine=hardware.name,
                operation="clear_fault",
            )
        armed.clear()

    def clear_all(self) -> None:
        """End all faults and timers."""
        for armed in self._armed.values():
            armed.clear()
        self._armed.clear()

    def machine_gone(self, hardware: Hardware) -> None:
        """A machine was removed; its faults go with it."""
        for identity, armed in list(self._armed.items()):
            armed.forget(hardware)
            if armed.machine == hardware.id:
                armed.clear()
                del self._armed[identity]

    def draw(self, *name: str | int) -> float:
        """A random number by name."""
        return self._chances.unit("fault", *name)

    def victims(self, armed: Armed) -> list[Hardware]:
        """The machines that are on and that a fault concerns."""
        return [machine for machine in self._world.powered() if armed.concerns(machine)]

    # Occasions.

    def disk_request(self, hardware: Hardware, disk: str, operation: str) -> DiskMishap:
        """What faults make of one request to a disk."""
        mishap = DiskMishap()
        for armed in self._for(hardware):
            fault = armed.fault
            if not isinstance(fault, DiskError | DiskSlow | DiskTornWrite) or fault.disk != disk:
                continue
            if isinstance(fault, DiskError):
                if fault.operation in (operation, "any") and armed.occasion():
                    mishap.errno = fault.errno
            elif isinstance(fault, DiskSlow):
                mishap.delay += fault.delay if armed.occasion() else 0.0
            elif operation == "write" and armed.occasion():
                mishap.keep = fault.keep
        return mishap

    def packet(self, hardware: Hardware, nic: str) -> PacketMishap:
        """What faults make of one frame that a NIC sends or is about to receive."""
        mishap = PacketMishap()
        for armed in self._for(hardware):
            fault = armed.fault
            if isinstance(fault, NetLoss) and fault.nic == nic and armed.occasion():
                mishap.lost |= armed.draw() < fault.ratio
            elif isinstance(fault, NetDelay) and fault.nic == nic and armed.occasion():
                mishap.delay += fault.delay + armed.draw() * fault.jitter
        return mishap

    def operation(self, name: str, hardware: Hardware | None, machine: str) -> list[Fault]:
        """The operation faults that strike an operation which begins; others may strike too."""
        if not self._armed:
            return []
        struck: list[Fault] = []
        for armed in list(self._armed.values()):
            fault = armed.fault
            concerned = (
                armed.concerns(hardware)
                if hardware is not None
                else armed.machine is None and fault.machine in (None, machine)
            )
            if not concerned:
                continue
            if isinstance(fault, OPERATION_FAULTS):
                if fault.operation in (name, "any") and armed.occasion():
                    struck.append(fault)
            elif (
                hardware is not None and not isinstance(fault, _AT_OCCASIONS) and not armed.touched
            ):
                armed.occasion(hardware)
        return struck

    def event_lost(self, event: str, hardware: Hardware | None) -> bool:
        """Whether a fault loses an event."""
        return any(
            armed.fault.event in (event, "any") and armed.occasion()
            for armed in self._kind(LostEvent, hardware)
            if isinstance(armed.fault, LostEvent)
        )

    def stale(self, hardware: Hardware) -> float | None:
        """How many seconds old a status answer is, if a fault makes it old."""
        ages = [
            armed.fault.age
            for armed in self._kind(StaleStatus, hardware)
            if isinstance(armed.fault, StaleStatus) and armed.occasion()
        ]
        return max(ages, default=None)

    def printed(self, hardware: Hardware, text: str) -> None:
        """A guest printed something: triggers may wait for it."""
        if self._armed:
            for armed in list(self._for(hardware)):
                armed.text(hardware, text)

    def _for(self, hardware: Hardware) -> Iterator[Armed]:
        return (armed for armed in self._armed.values() if armed.concerns(hardware))

    def _kind(self, kind: type[object], hardware: Hardware | None) -> Iterator[Armed]:
        return (
            armed
            for armed in self._armed.values()
            if isinstance(armed.fault, kind) and (hardware is None or armed.concerns(hardware))
        )

    # What faults do to a machine.

    def apply(self, fault: Fault, hardware: Hardware) -> Callable[[], None] | None:
        """Do it; returns what puts it right again, where anything can."""
        undo: Callable[[], None] | None = None
        if isinstance(fault, KillFault):
            hardware.die("crashed", "killed by a fault")
        elif isinstance(fault, PowerCut):
            hardware.cut_power(restart=fault.restart)
        elif isinstance(fault, ClockJump):
            hardware.guest.state.clock_offset += fault.seconds
        elif isinstance(fault, DiskCorrupt):
            if fault.disk in hardware.disks:
                disk = hardware.disks[fault.disk]
                disk.corrupt(min(fault.offset, disk.size), _clip(fault, disk.size))
        elif isinstance(fault, MemoryPressure):
            hardware.balloon = fault.leave

            def undo() -> None:
                hardware.balloon = None
        elif isinstance(fault, CpuStall):
            vcpu = fault.vcpu
            hardware.stall(vcpu)

            def undo() -> None:
                hardware.unstall(vcpu)
        elif isinstance(fault, NetPartition):
            nic = hardware.nics.get(fault.nic)
            if nic is not None:
                before, nic.link = nic.link, False

                def undo() -> None:
                    nic.link = before
        elif isinstance(fault, PauseFault) and hardware.power is Power.RUNNING:
            hardware.pause()
            self._world.notice(hardware, "paused", "paused by a fault")

            def undo() -> None:
                if hardware.power is Power.PAUSED:
                    hardware.resume()
                    self._world.notice(hardware, "resumed", "a fault that paused it ended")

        self._world.changed(hardware)
        return undo


def _clip(fault: DiskCorrupt, size: int) -> int:
    return max(0, min(fault.length, size - fault.offset))


def _check(fault: Fault, hardware: Hardware) -> None:
    """Refuse a fault of something that the machine does not have (InvalidSpec)."""
    problem = None
    if isinstance(fault, _ONE_DISK) and fault.disk not in hardware.disks:
        known = ", ".join(hardware.disks) or "none"
        problem = SpecProblem("disk", fault.disk, f"one of the machine's disks: {known}")
    elif isinstance(fault, _ONE_NIC) and fault.nic not in hardware.nics:
        known = ", ".join(hardware.nics) or "none"
        problem = SpecProblem("nic", fault.nic, f"one of the machine's NICs: {known}")
    elif isinstance(fault, CpuStall) and fault.vcpu >= hardware.vcpus:
        problem = SpecProblem("vcpu", fault.vcpu, f"0 to {hardware.vcpus - 1}")
    elif fault.machine not in (None, hardware.name):
        problem = SpecProblem("machine", fault.machine, f"{hardware.name!r}, or nothing")
    if problem is not None:
        raise InvalidSpec(
            [problem], machine=hardware.name, hint="`info` lists what the machine has"
        )


ALL_KINDS: Final = frozenset(FaultKind)
"""Every kind of fault can be injected here."""
