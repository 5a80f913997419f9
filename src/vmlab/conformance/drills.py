"""One call of each operation of the contract, ready to be made from a given state.

The checks of states, cancellation, deadlines and crashes go through all operations alike; here is
what each needs to be possible: a snapshot to restore, a disk to unplug, somewhere to migrate to.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from vmlab.conformance.bench import Bench
from vmlab.hypervisors.base import Machine
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import UnsupportedOperation
from vmlab.machine.faults import At, Fault, KillFault, NetPartition, PauseFault
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import Disk, Nic
from vmlab.machine.states import OFF, OPERATIONS, MachineState

C = Capability
S = MachineState

REACHABLE: Final = (S.CREATED, S.RUNNING, S.PAUSED, S.STOPPED, S.FAILED, S.DELETED)
"""The lasting states that a machine can be brought into on purpose."""


@dataclass
class Stage:
    """A machine with what the operations need, and the names of those things."""

    machine: Machine
    snapshot: str = "none"
    snapshot_state: MachineState = S.STOPPED
    disk: str = "none"
    nic: str = "none"
    fault: str = "none"
    made: list[str] = field(default_factory=list)


GUEST_AGREES: Final = frozenset({"unplug_disk", "unplug_nic", "resize"})
"""What a guest may have to take part in, so that it can be refused of one that stands still."""

Call = Callable[[Bench, Stage], Awaitable[object]]
Needs = Callable[[MachineState], tuple[Capability, ...]]


@dataclass(frozen=True, slots=True)
class Drill:
    """One operation: how it is called, what it needs in each state, and where it lands."""

    operation: str
    call: Call
    needs: Needs
    lands: Callable[[Stage, MachineState], MachineState]


async def stage(bench: Bench, state: MachineState) -> Stage:
    """A machine in `state` with a snapshot, a spare disk and NIC, and a fault to clear, if it can.

    Raises:
        Skipped: machines cannot be crashed here, and `state` is failed.
    """
    machine = await bench.create(
        disks=[*bench.profile.spec.disks, Disk(name="spare", size=16 * MIB, bus=bench.profile.bus)],
        nics=[*bench.profile.spec.nics, Nic(name="sparenic", network="none")],
    )
    ready = Stage(machine, disk="spare", nic="sparenic")
    if bench.has(C.SNAPSHOT, C.RESTORE):
        await machine.snapshot("before")
        ready.snapshot = "before"
    await bring(bench, ready, state)
    return ready


async def bring(bench: Bench, ready: Stage, state: MachineState) -> None:
    """Bring the machine, which is not deleted, into `state`."""
    machine = ready.machine
    if machine.state is state:
        return
    if machine.state is S.PAUSED:
        await (machine.resume() if bench.has(C.RESUME) else machine.kill())
    if state in {S.RUNNING, S.PAUSED, S.FAILED} and machine.state in OFF:
        await machine.start()
    if state in {S.RUNNING, S.PAUSED} and bench.has(C.FAULTS) and ready.fault == "none":
        fault = harmless_fault(bench)
        if fault is not None:
            ready.fault = await machine.inject(fault)
    match state:
        case S.PAUSED:
            await machine.pause()
        case S.STOPPED:
            if machine.state in OFF:
                await machine.start()
            await machine.kill()
        case S.FAILED:
            await bench.crashed(machine)
        case S.DELETED:
            await machine.delete(force=True)
    if (
        state in {S.RUNNING, S.PAUSED}
        and ready.snapshot_state is not state
        and bench.has(C.MEMORY_SNAPSHOT, C.RESTORE)
    ):
        name = f"live-{len(ready.made)}"
        ready.made.append(name)
        await machine.snapshot(name)
        ready.snapshot, ready.snapshot_state = name, state


def harmless_fault(bench: Bench) -> Fault | None:
    """A fault that does nothing for the time of a check, of the first kind that is declared."""
    later = At(seconds=10_000_000)
    for fault in (
        PauseFault(when=later),
        KillFault(when=later),
        NetPartition(nic="sparenic", when=later),
    ):
        if fault.kind in bench.capabilities.faults:
            return fault
    return None


def _always(*needed: Capability) -> Needs:
    return lambda state: needed


def _if_live(*needed: Capability) -> Needs:
    return lambda state: needed if state.is_live else ()


def _stays(ready: Stage, before: MachineState) -> MachineState:
    return before


def _goes(to: MachineState) -> Callable[[Stage, MachineState], MachineState]:
    return lambda ready, before: to


def _restored(ready: Stage, before: MachineState) -> MachineState:
    return ready.snapshot_state


async def _migrate(bench: Bench, ready: Stage) -> None:
    target = bench.another() if len(bench.opened) < 2 else bench.opened[1]
    bench.keep(await ready.machine.migrate(target))


async def _snapshot(bench: Bench, ready: Stage) -> None:
    ready.made.append(f"made-{len(ready.made)}")
    await ready.machine.snapshot(ready.made[-1])


async def _fork(bench: Bench, ready: Stage) -> None:
    bench.keep(await ready.machine.fork(bench.name()))


async def _plug_disk(bench: Bench, ready: Stage) -> None:
    ready.made.append(f"disk-{len(ready.made)}")
    await ready.machine.plug_disk(Disk(name=ready.made[-1], size=16 * MIB))


async def _plug_nic(bench: Bench, ready: Stage) -> None:
    ready.made.append(f"nic-{len(ready.made)}")
    await ready.machine.plug_nic(Nic(name=ready.made[-1], network="none"))


async def _resize(bench: Bench, ready: Stage) -> None:
    # To what it has: every hypervisor has room for that.
    await ready.machine.resize(vcpus=ready.machine.spec.cpus.count)


async def _inject(bench: Bench, ready: Stage) -> None:
    fault = harmless_fault(bench)
    if fault is not None:
        await ready.machine.inject(fault)


async def _channel(bench: Bench, ready: Stage) -> None:
    channel = await ready.machine.channel(next(iter(ready.machine.spec.channels), "none"))
    await channel.close()


async def _console(bench: Bench, ready: Stage) -> None:
    console = await ready.machine.console(
        next((console.name for console in ready.machine.spec.consoles), "none")
    )
    await console.close()


async def _screenshot(bench: Bench, ready: Stage) -> None:
    await _on_display(bench, ready, ready.machine.screenshot())


async def _send_keys(bench: Bench, ready: Stage) -> None:
    await _on_display(bench, ready, ready.machine.send_keys(["a"]))


async def _on_display(bench: Bench, ready: Stage, call: Awaitable[object]) -> None:
    try:
        await call
    except UnsupportedOperation:
        # Where there could be a display and this machine has none, that is the right answer.
        if ready.machine.spec.display or C.DISPLAY not in bench.capabilities:
            raise


_DRILLS = (
    Drill("start", lambda b, r: r.machine.start(), _always(), _goes(S.RUNNING)),
    Drill("stop", lambda b, r: r.machine.stop(), _always(), _goes(S.STOPPED)),
    Drill("kill", lambda b, r: r.machine.kill(), _always(), _goes(S.STOPPED)),
    Drill("pause", lambda b, r: r.machine.pause(), _always(C.PAUSE), _goes(S.PAUSED)),
    Drill("resume", lambda b, r: r.machine.resume(), _always(C.RESUME), _goes(S.RUNNING)),
    Drill("restart", lambda b, r: r.machine.restart(), _always(), _goes(S.RUNNING)),
    Drill("snapshot", _snapshot, _always(C.SNAPSHOT), _stays),
    Drill(
        "restore",
        lambda b, r: r.machine.restore(r.snapshot),
        lambda state: (C.SNAPSHOT, C.RESTORE, *((C.MEMORY_SNAPSHOT,) if state.is_live else ())),
        _restored,
    ),
    Drill(
        "delete_snapshot",
        lambda b, r: r.machine.delete_snapshot(r.snapshot),
        _always(C.SNAPSHOT, C.RESTORE),
        _stays,
    ),
    Drill("fork", _fork, _always(C.FORK), _stays),
    Drill(
        "migrate",
        _migrate,
        lambda state: (C.LIVE_MIGRATION if state.is_live else C.COLD_MIGRATION,),
        _goes(S.DELETED),
    ),
    Drill("plug_disk", _plug_disk, _if_live(C.HOTPLUG_DISK), _stays),
    Drill(
        "resize_disk",
        lambda b, r: r.machine.resize_disk(r.disk, 16 * MIB),
        _always(C.RESIZE_DISK),
        _stays,
    ),
    Drill(
        "unplug_disk",
        lambda b, r: r.machine.unplug_disk(r.disk),
        _if_live(C.HOTPLUG_DISK),
        _stays,
    ),
    Drill("plug_nic", _plug_nic, _if_live(C.HOTPLUG_NIC), _stays),
    Drill("unplug_nic", lambda b, r: r.machine.unplug_nic(r.nic), _if_live(C.HOTPLUG_NIC), _stays),
    Drill(
        "resize",
        _resize,
        lambda state: (C.HOTPLUG_VCPU if state.is_live else C.RESIZE,),
        _stays,
    ),
    Drill("pin", lambda b, r: r.machine.pin({0: (0,)}), _always(C.PINNING), _stays),
    Drill("inject", _inject, _always(C.FAULTS), _stays),
    Drill(
        "clear_fault",
        lambda b, r: r.machine.clear_fault(r.fault),
        _always(C.FAULTS),
        _stays,
    ),
    Drill("channel", _channel, _always(C.GUEST_CHANNELS), _stays),
    Drill("screenshot", _screenshot, _always(C.DISPLAY), _stays),
    Drill("send_keys", _send_keys, _always(C.DISPLAY), _stays),
    Drill("delete", lambda b, r: r.machine.delete(), _always(), _goes(S.DELETED)),
    Drill("info", lambda b, r: r.machine.info(), _always(), _stays),
    Drill("console", _console, _always(C.CONSOLE), _stays),
    Drill("metrics", lambda b, r: r.machine.metrics(), _always(), _stays),
)
DRILLS: Final[Mapping[str, Drill]] = MappingProxyType({drill.operation: drill for drill in _DRILLS})
"""Every operation that has a rule of states, by its name."""


def allowed(operation: str, state: MachineState) -> bool:
    """Whether the contract allows the operation to begin in that state."""
    return state in OPERATIONS[operation]
