"""Fault schedules applied to machines: what happens when, and who is told of it.

Moments, durations and texts on the console are kept here, on the clock of the event loop, so that
they are the same for every hypervisor. Occasions (the nth write, each frame by chance) only the
hypervisor can count: such a fault goes to it with its trigger and the seed of its chances. What a
hypervisor cannot do is refused by name before anything starts.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from vmlab.machine.capabilities import Capabilities, Capability
from vmlab.machine.errors import InvalidSpec, SpecProblem, UnsupportedOperation, VmlabError
from vmlab.machine.faults import (
    COUNTED,
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
    FaultSchedule,
    NetDelay,
    NetLoss,
    NetPartition,
    Nth,
    PowerCut,
)

if TYPE_CHECKING:
    from vmlab.guests.guest import Guest
    from vmlab.hypervisors.base import Console, Machine
    from vmlab.machine.spec import MachineSpec

Action = Literal["injected", "cleared", "refused"]

_AT_ONCE: Final = At(seconds=0)
_OVER_AT_ONCE: Final = frozenset(
    {
        FaultKind.DISK_CORRUPT,
        FaultKind.POWER_CUT,
        FaultKind.KILL,
        FaultKind.CLOCK_JUMP,
        FaultKind.HYPERVISOR_CRASH,
    }
)
"""Kinds that happen and are over: there is nothing of them that could be cleared."""
_ONE_DISK: Final = (DiskError, DiskSlow, DiskTornWrite, DiskCorrupt)
_ONE_NIC: Final = (NetLoss, NetDelay, NetPartition)
_SEED_BITS: Final = 63
"""As many as an integer of TOML may have without its sign."""


@dataclass(frozen=True, slots=True)
class FaultEvent:
    """What became of a fault.

    Attributes:
        id: The fault's name in its schedule.
        kind: Its kind, such as "disk-error".
        machine: Name of the machine.
        action: Whether it was injected, has been cleared, or was refused.
        at_s: When, in seconds since the schedule was armed.
        reason: Why it was refused; of one that waits for its occasion, what that is.
    """

    id: str
    kind: str
    machine: str
    action: Action
    at_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A fault that a hypervisor cannot inject, and why not."""

    id: str
    kind: FaultKind
    reason: str

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


def refusals(
    capabilities: Capabilities,
    schedule: FaultSchedule,
    spec: MachineSpec | None = None,
    *,
    inside: bool = False,
) -> list[Refusal]:
    """The faults of a schedule that a hypervisor cannot inject, in their order.

    Args:
        capabilities: What it can do.
        schedule: What is to be broken.
        spec: The machine, if it is known: some faults strike only disks that are breakable.
        inside: Whether somebody sets the guest's clock from inside where the hypervisor cannot.
    """
    found = []
    able = capabilities.faults if Capability.FAULTS in capabilities else frozenset[FaultKind]()
    for fault in schedule.faults:
        if inside and isinstance(fault, ClockJump) and not isinstance(fault.when, COUNTED):
            continue
        if fault.kind not in able:
            reason = f"{capabilities.hypervisor} cannot inject the fault {fault.kind.value}"
        elif isinstance(fault.when, COUNTED) and fault.kind not in capabilities.counted:
            reason = (
                f"{capabilities.hypervisor} cannot trigger the fault {fault.kind.value} "
                f"by {fault.when.on}: it does not count its occasions"
            )
        elif spec is not None and (kept := _unbreakable(capabilities, fault, spec)):
            reason = (
                f"{capabilities.hypervisor} can inject the fault {fault.kind.value} only where "
                f"disks are `breakable`: {', '.join(kept)} is not"
            )
        else:
            continue
        found.append(Refusal(fault.id, fault.kind, reason))
    return found


def _unbreakable(capabilities: Capabilities, fault: Fault, spec: MachineSpec) -> list[str]:
    """The disks that a fault would have to strike and cannot."""
    counted = isinstance(fault, DiskError) and isinstance(fault.when, COUNTED)
    if not (fault.kind in capabilities.breakable or (counted and capabilities.breakable)):
        return []
    struck = [
        disk
        for disk in spec.disks
        if (not disk.readonly if isinstance(fault, PowerCut) else disk.name == _disk_of(fault))
    ]
    return [disk.name for disk in struck if not disk.breakable]


def _disk_of(fault: Fault) -> str | None:
    return fault.disk if isinstance(fault, _ONE_DISK) else None


def refuse(
    capabilities: Capabilities, schedule: FaultSchedule, spec: MachineSpec | None = None
) -> None:
    """Refuse a schedule of which a hypervisor cannot do all.

    Args:
        capabilities: What it can do.
        schedule: What is to be broken.
        spec: The machine, if it is known.

    Raises:
        UnsupportedOperation: naming every fault that it cannot inject.
    """
    found = refusals(capabilities, schedule, spec)
    if found:
        raise _unsupported(capabilities.hypervisor, found)


def _unsupported(hypervisor: str, found: list[Refusal]) -> UnsupportedOperation:
    kinds = dict.fromkeys(refusal.kind.value for refusal in found)
    return UnsupportedOperation(
        f"fault {', '.join(kinds)}",
        hypervisor=hypervisor,
        operation="arm",
        hint="; ".join(dict.fromkeys(map(str, found))),
    )


@dataclass(eq=False)
class _Target:
    """One fault on one machine, and the hypervisor's id of it while it is in effect."""

    fault: Fault
    machine: Machine
    present: str | None = None


class FaultRun:
    """A schedule at work on one machine, or on several by their names.

    A fault that names no machine is for each of them. The same schedule and seed break the same
    things at the same moments and occasions.

    Args:
        machine: The machine, or all of them.
        schedule: What is broken, and when.
        console_name: The console whose texts faults may wait for.
        on_fault: Told of each fault that is injected, cleared or refused, on the event loop.
        set_clock: Has the clock of a machine's guest jump from inside, where its hypervisor
            cannot; without it such a fault is refused there.
    """

    def __init__(
        self,
        machine: Machine | Iterable[Machine],
        schedule: FaultSchedule,
        *,
        console_name: str = "serial",
        on_fault: Callable[[FaultEvent], None] = lambda event: None,
        set_clock: Callable[[Machine, ClockJump], Awaitable[None]] | None = None,
    ) -> None:
        machines = machine if isinstance(machine, Iterable) else [machine]
        self.machines = {one.name: one for one in machines}
        self.schedule = schedule
        self._console = console_name
        self._on_fault = on_fault
        self._set_clock = set_clock
        self._targets: list[_Target] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._armed = False
        self._begun = 0.0

    async def arm(self) -> None:
        """Begin: moments are counted from here on.

        Raises:
            UnsupportedOperation: naming every fault that a machine's hypervisor cannot inject;
                `on_fault` is told of each, and nothing was injected.
            InvalidSpec: a fault names a machine, disk, NIC, vCPU or console that is not there;
                nothing was injected.
            VmlabError: it is armed already.
        """
        if self._armed:
            raise VmlabError(
                "the fault schedule is armed already", hint="disarm it first, or make another run"
            )
        self._begun = asyncio.get_running_loop().time()
        targets = self._assigned()
        await self._refuse(targets)
        self._armed = True
        self._targets = targets
        try:
            await self._begin()
        except BaseException:
            await self.disarm()
            raise

    async def disarm(self) -> None:
        """End everything that is in effect or still to come; again does nothing."""
        self._armed = False
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        targets, self._targets = self._targets, []
        for target in targets:
            await self._clear(target)
        for outcome in done:
            if isinstance(outcome, Exception):
                raise outcome

    async def __aenter__(self) -> Self:
        await self.arm()
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.disarm()

    # Before it begins.

    def _assigned(self) -> list[_Target]:
        """Each fault with each machine that it is for."""
        targets, problems = [], []
        for position, fault in enumerate(self.schedule.faults):
            if fault.machine is not None and fault.machine not in self.machines:
                known = ", ".join(self.machines) or "there is none"
                field = f"faults.{position}.machine"
                problems.append(SpecProblem(field, fault.machine, f"one of the machines: {known}"))
                continue
            for place, machine in enumerate(self.machines.values()):
                if fault.machine in (None, machine.name):
                    problems += self._misplaced(position, fault, machine)
                    targets.append(_Target(self._seeded(fault, place), machine))
        if problems:
            raise InvalidSpec(
                problems,
                operation="arm",
                what="fault schedule",
                hint="`info` lists what a machine has",
            )
        return targets

    def _misplaced(self, position: int, fault: Fault, machine: Machine) -> list[SpecProblem]:
        """What a fault names that the machine does not have."""
        spec, problems = machine.spec, []

        def missing(field: str, value: object, expected: str) -> None:
            problems.append(SpecProblem(f"faults.{position}.{field}", value, expected))

        if isinstance(fault, _ONE_DISK) and spec.disk(fault.disk) is None:
            known = ", ".join(disk.name for disk in spec.disks) or "none"
            missing("disk", fault.disk, f"one of the disks of {machine.name!r}: {known}")
        if isinstance(fault, _ONE_NIC) and spec.nic(fault.nic) is None:
            known = ", ".join(nic.name for nic in spec.nics) or "none"
            missing("nic", fault.nic, f"one of the NICs of {machine.name!r}: {known}")
        if isinstance(fault, CpuStall) and fault.vcpu >= spec.cpus.count:
            missing("vcpu", fault.vcpu, f"less than the {spec.cpus.count} of {machine.name!r}")
        consoles = [console.name for console in spec.consoles]
        if isinstance(fault.when, ConsoleText) and self._console not in consoles:
            known = ", ".join(consoles) or "none"
            expected = (
                f"a trigger without {self._console!r}, which is none of its consoles: {known}"
            )
            missing("when.on", fault.when.on, expected)
        return problems

    def _seeded(self, fault: Fault, place: int) -> Fault:
        """The fault with chances of its own, by the machine's place and not by its name."""
        if fault.seed is not None:
            return fault
        source = self.schedule.random(f"{fault.id}/{place}" if place else fault.id)
        return fault.model_copy(update={"seed": source.getrandbits(_SEED_BITS)})

    async def _refuse(self, targets: list[_Target]) -> None:
        """Refuse what cannot be done, and tell of all of it."""
        found: dict[str, list[Refusal]] = {}
        for target in targets:
            capabilities = await target.machine.hypervisor.capabilities()
            schedule = FaultSchedule(faults=(target.fault,))
            inside = self._set_clock is not None
            for refusal in refusals(capabilities, schedule, target.machine.spec, inside=inside):
                found.setdefault(capabilities.hypervisor, []).append(refusal)
                self._tell(target, "refused", refusal.reason)
        for hypervisor, reasons in found.items():
            raise _unsupported(hypervisor, reasons)

    # What happens when.

    async def _begin(self) -> None:
        """Hand over what the hypervisor counts, and wait for the rest."""
        waiting: dict[str, list[_Target]] = {}
        for target in self._targets:
            when = target.fault.when
            if isinstance(when, ConsoleText):
                waiting.setdefault(target.machine.name, []).append(target)
            elif isinstance(when, At) and when.seconds > 0:
                self._spawn(self._at(target, when.seconds))
            else:
                await self._happen(target)
        for name, targets in waiting.items():
            # Opened here: what is printed from now on counts, however late the task begins.
            console = await self.machines[name].console(self._console)
            self._spawn(self._read(console, targets))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def _at(self, target: _Target, seconds: float) -> None:
        await asyncio.sleep(self._begun + seconds - asyncio.get_running_loop().time())
        await self._happen(target)

    async def _read(self, console: Console, waiting: list[_Target]) -> None:
        """Have faults happen when their texts have been printed, each once."""
        texts = {target: _text(target.fault) for target in waiting}
        longest = max(map(len, texts.values()))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        seen = ""
        async with console:
            while texts and (data := await console.read()):
                seen += decoder.decode(data)
                for target in [one for one, text in texts.items() if text in seen]:
                    del texts[target]
                    self._spawn(self._happen(target))
                seen = seen[-longest:]

    async def _happen(self, target: _Target) -> None:
        """Inject a fault, and end it when its time is over."""
        fault = target.fault
        counted = isinstance(fault.when, COUNTED)
        changes: dict[str, object] = {"id": "", "machine": None}
        if not counted:
            changes |= {"when": _AT_ONCE, "duration": None}
        try:
            target.present = await self._inject(target.machine, fault.model_copy(update=changes))
        except VmlabError as error:
            self._tell(target, "refused", str(error))
            return
        self._tell(target, "injected", _occasion(fault))
        if fault.kind in _OVER_AT_ONCE and not counted:
            target.present = None
        elif fault.duration is not None and not counted:
            self._spawn(self._until(target, fault.duration))

    async def _inject(self, machine: Machine, fault: Fault) -> str:
        if isinstance(fault, ClockJump) and self._set_clock is not None:
            capabilities = await machine.hypervisor.capabilities()
            if fault.kind not in capabilities.faults:
                await self._set_clock(machine, fault)
                return ""
        return await machine.inject(fault)

    async def _until(self, target: _Target, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._clear(target)

    async def _clear(self, target: _Target) -> None:
        """End a fault that is in effect."""
        present, target.present = target.present, None
        if present is None:
            return
        reason = ""
        try:
            await target.machine.clear_fault(present)
        except VmlabError as error:
            # With the machine, or its process, the fault has gone as well.
            reason = str(error)
        self._tell(target, "cleared", reason)

    def _tell(self, target: _Target, action: Action, reason: str) -> None:
        fault, now = target.fault, asyncio.get_running_loop().time()
        name = target.machine.name
        self._on_fault(
            FaultEvent(fault.id, fault.kind.value, name, action, now - self._begun, reason)
        )


def _text(fault: Fault) -> str:
    assert isinstance(fault.when, ConsoleText), "only these wait for the console"
    return fault.when.text


def _occasion(fault: Fault) -> str:
    """When a fault strikes whose occasions are counted; nothing for others, which have."""
    when = fault.when
    if isinstance(when, Nth):
        return f"strikes at {'every' if when.every else 'the'} {ordinal(when.n)} occasion"
    if isinstance(when, Chance):
        return f"strikes at each occasion with probability {when.probability:g}"
    return ""


def ordinal(number: int) -> str:
    """A number as a place in an order: 1st, 2nd, 3rd, 11th."""
    last = number % 10 if number % 100 not in {11, 12, 13} else 0
    return str(number) + {1: "st", 2: "nd", 3: "rd"}.get(last, "th")


async def jump_clock(guest: Guest, fault: ClockJump) -> None:
    """Have a guest's clock jump by whole seconds, as its administrator would.

    Raises:
        VmlabError: the guest does not answer, or may not.
    """
    await guest.succeed(f"date -s @$(($(date +%s) + {round(fault.seconds)})) >/dev/null")
