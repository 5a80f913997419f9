"""A machine of the simulated hypervisor: the hooks of the contract, done to simulated hardware.

Each hook draws what the seed has in store for the operation (a latency, a failure, a hang), waits
on the hypervisor's clock, and changes the hardware at one moment. What it changed is noted with
the way back, which `_undo` walks when the operation does not succeed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from vmlab.hypervisors.base import (
    Channel,
    Console,
    DiskInfo,
    MachineInfo,
    NicInfo,
    Progress,
    Snapshot,
)
from vmlab.hypervisors.operated_machine import OperatedMachine
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.picture import Picture
from vmlab.hypervisors.serialised_machine import Action, Needs, Plan
from vmlab.hypervisors.simulated.channels import SimulatedConsole
from vmlab.hypervisors.simulated.display import picture_of
from vmlab.hypervisors.simulated.hardware import Hardware, Power
from vmlab.hypervisors.simulated.readings import (
    SEEN,
    disk_info,
    info_of,
    metrics_of,
    nic_info,
    snapshot_of,
    state_of,
)
from vmlab.hypervisors.simulated.saved import (
    Before,
    SavedState,
    bring_back,
    run_from,
    save,
    save_memory,
    transfer,
)
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import (
    CorruptSnapshot,
    HypervisorUnavailable,
    MachineCrashed,
    MachineNotFound,
    OperationFailed,
    ResourceNotFound,
)
from vmlab.machine.events import EventType
from vmlab.machine.faults import Fault
from vmlab.machine.metrics import (
    MachineMetrics,
)
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import Disk, MachineSpec, Nic
from vmlab.machine.states import MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.simulated.hypervisor import SimulatedHypervisor

T = TypeVar("T")

_ROUNDS: Final = 16
"""Parts in which a migration is sent, each with its progress."""
_HISTORY: Final = 16
"""States that are remembered for stale answers."""


class SimulatedMachine(OperatedMachine):
    """One machine; what it is made of is in its hardware, which may outlive this object."""

    _hypervisor: SimulatedHypervisor

    def __init__(
        self,
        hypervisor: SimulatedHypervisor,
        id_: str,
        spec: MachineSpec,
        state: MachineState = MachineState.CREATED,
    ) -> None:
        super().__init__(hypervisor, id_, spec, state)
        self.history: list[tuple[float, MachineState]] = [(hypervisor.now(), state)]
        self._steps: list[Callable[[], object]] = []
        self._steps_of: Operation | None = None

    @property
    def hardware(self) -> Hardware:
        """What it stands on.

        Raises:
            MachineNotFound: it is not in the host.
        """
        found = self._hypervisor.world.machines.get(self.id)
        if found is None:
            raise MachineNotFound(
                f"machine {self.name!r} is not on its host any more",
                hint="delete it and create it again",
                machine=self.name,
                hypervisor=self._hypervisor.name,
            )
        return found

    def way_back(self, operation: Operation, step: Callable[[], object]) -> None:
        """Note how to put right what `operation` has just changed."""
        if self._steps_of is not operation:
            self._steps.clear()
            self._steps_of = operation
        self._steps.append(step)

    def go_back(self, operation: Operation) -> None:
        """Put right what `operation` changed, the last change first; again does nothing."""
        if self._steps_of is operation:
            while self._steps:
                self._steps.pop()()

    def noticed(self, event: EventType, state: MachineState | None, reason: str) -> None:
        """Something happened to the hardware by itself."""
        if state is None:
            self._emit(event, reason=reason)
        elif self._current is not None and self._current.name in ("inject", "clear_fault"):
            # It is what the operation under way wanted.
            self._emit(event, reason=reason)
            self._settle(state, reason)
        else:
            self._happened(state, event, reason)

    def lost_hypervisor(self, reason: str) -> None:
        """The hypervisor crashed: nobody knows what the machine does."""
        if self._current is None:
            self._lifecycle.move(MachineState.UNKNOWN, reason)
            return
        self._current.abort(
            HypervisorUnavailable(
                f"the simulated hypervisor crashed during {self._current.name}",
                hint=self._hypervisor.blame("a crash"),
                machine=self.name,
                hypervisor=self._hypervisor.name,
                operation=self._current.name,
            )
        )

    def found_again(self) -> None:
        """The hypervisor is back: believe the hardware, unless an operation is about to look."""
        if self._current is not None:
            return
        if self.id not in self._hypervisor.world.machines:
            # The crash came between its removal and the record of that.
            self._settle(MachineState.DELETING, "found gone")
            self._emit(EventType.DELETED)
            self._lifecycle.move(MachineState.DELETED, "found gone")
            self._hypervisor.forget(self)
            return
        self._settle(state_of(self.hardware), "found again")
        self._emit(EventType.ADOPTED, owner=str(self._hypervisor.owner))

    async def _admitted(
        self,
        operation: Operation,
        action: Action[T] | None,
        plan: Plan[T] | None,
        needs: Needs | None,
        allowed: frozenset[MachineState] | None,
    ) -> Action[T]:
        # Whatever the state is: nobody is there who could do it.
        self._hypervisor.require_up()
        return await super()._admitted(operation, action, plan, needs, allowed)

    async def _query(
        self,
        name: str,
        question: Callable[[], Awaitable[T]],
        timeout: float | None,
        *,
        needs: Sequence[Capability] = (),
        rule: str | None = "",
    ) -> T:
        self._hypervisor.require_up()
        return await super()._query(name, question, timeout, needs=needs, rule=rule)

    @property
    def seen(self) -> MachineState:
        """What the hardware does; unknown where it is gone (a delete that failed half-way)."""
        hardware = self._hypervisor.world.machines.get(self.id)
        return SEEN[hardware.power] if hardware is not None else MachineState.UNKNOWN

    def _state_changed(self, old: MachineState, new: MachineState, reason: str) -> None:
        super()._state_changed(old, new, reason)
        self.history.append((self._changed, new))
        del self.history[:-_HISTORY]

    # Looking and putting right.

    async def _observe(self) -> MachineState:
        self._hypervisor.require_up()
        return self.seen

    async def _undo(self, operation: Operation) -> None:
        self._hypervisor.undo(self, operation)

    async def _do_status(self) -> tuple[MachineState, float]:
        hypervisor = self._hypervisor
        await hypervisor.conduct("status", self)
        now = hypervisor.now()
        age = hypervisor.stale_by(self)
        if age is None:
            return self.seen, now
        then = now - age
        known = [state for time, state in self.history if time <= then]
        return known[-1] if known else self.history[0][1], then

    # Life.

    async def _do_create(self, operation: Operation) -> None:
        await self._hypervisor.conduct("create", self, operation, before=self._place(operation))

    def _place(self, operation: Operation, *, copy: bool = False) -> Callable[[], None]:
        """Puts the hardware into the host."""

        def place() -> None:
            self.way_back(operation, lambda: self._hypervisor.world.remove(self.id))
            self._hypervisor.world.build(self.id, self._spec, copy=copy)

        return place

    async def _do_start(self, operation: Operation) -> None:
        hardware = self.hardware
        files = hardware.require_shares_read()

        def boot() -> None:
            self._hypervisor.world.require_power(hardware, hardware.vcpus, hardware.ram.size)
            self._hypervisor.world.require_file(hardware, *hardware.disks.values())
            before = (hardware.power, hardware.cause)

            def back() -> None:
                hardware.turn_off()
                hardware.power, hardware.cause = before

            self.way_back(operation, back)
            hardware.boot(files)

        await self._hypervisor.conduct("start", self, operation, boot)

    async def _do_shutdown(self, operation: Operation) -> None:
        hardware = self.hardware
        self.way_back(operation, hardware.withdraw_power_down)
        await self._hypervisor.conduct("stop", self, operation, hardware.ask_power_down)
        await hardware.until_off()
        hardware.turn_off()

    async def _do_kill(self, operation: Operation) -> None:
        def turn_off() -> None:
            hardware = self._hypervisor.world.machines.get(self.id)
            if hardware is not None:
                hardware.turn_off()

        await self._hypervisor.conduct("kill", self, operation, turn_off)

    async def _do_reset(self, operation: Operation) -> None:
        hardware = self.hardware
        files = hardware.require_shares_read()

        def reset() -> None:
            self._require_power("restart")
            hardware.turn_off()
            hardware.boot(files)

        await self._hypervisor.conduct("restart", self, operation, reset)

    async def _do_pause(self, operation: Operation) -> None:
        def pause() -> None:
            hardware = self._require_power("pause")
            self.way_back(operation, hardware.resume)
            hardware.pause()

        await self._hypervisor.conduct("pause", self, operation, pause)

    async def _do_resume(self, operation: Operation) -> None:
        def resume() -> None:
            hardware = self._require_power("resume")
            self.way_back(operation, hardware.pause)
            hardware.resume()

        await self._hypervisor.conduct("resume", self, operation, resume)

    async def _do_delete(self, operation: Operation) -> None:
        world = self._hypervisor.world
        await self._hypervisor.conduct("delete", self, operation, lambda: world.remove(self.id))

    def _require_power(self, operation: str) -> Hardware:
        """The hardware, which has to be on: word of its end may have been lost."""
        hardware = self.hardware
        if hardware.has_power:
            return hardware
        kind = MachineCrashed if hardware.power is Power.DEAD else OperationFailed
        raise kind(
            f"{operation} failed: {hardware.cause or 'the machine is off'}",
            hint="`status` tells what became of it",
            machine=self.name,
            hypervisor=self._hypervisor.name,
            operation=operation,
        )

    # Looking in.

    async def _do_info(self) -> MachineInfo:
        await self._hypervisor.conduct("info", self)
        extra = {"seed": str(self._hypervisor.seed)}
        return info_of(self.hardware, owner=str(self._hypervisor.owner), extra=extra)

    async def _do_metrics(self) -> MachineMetrics:
        await self._hypervisor.conduct("metrics", self)
        return metrics_of(self.hardware)

    async def _do_console(self, name: str) -> Console:
        await self._hypervisor.conduct("console", self)
        hardware = self.hardware
        if name not in hardware.consoles:
            raise self._missing("console", name, hardware.consoles)
        return SimulatedConsole(name, hardware)

    async def _do_channel(self, name: str) -> Channel:
        await self._hypervisor.conduct("channel", self)
        hardware = self.hardware
        if name not in hardware.channels:
            raise self._missing("channel", name, hardware.channels)
        if not hardware.has_power:
            raise OperationFailed(
                f"machine {self.name!r} went off before channel {name!r} was open",
                machine=self.name,
                hypervisor=self._hypervisor.name,
                operation="channel",
            )
        return hardware.open_channel(name)

    async def _do_screenshot(self) -> Picture:
        await self._hypervisor.conduct("screenshot", self)
        return picture_of(self._require_power("screenshot").guest.state.screen)

    async def _do_send_keys(self, keys: Sequence[tuple[str, ...]]) -> None:
        await self._hypervisor.conduct("send_keys", self)
        self._require_power("send_keys").press(keys)

    def _missing(self, kind: str, name: str, known: object) -> ResourceNotFound:
        names = ", ".join(map(str, known)) if isinstance(known, dict | tuple) else ""
        return ResourceNotFound(
            f"machine {self.name!r} has no {kind} {name!r}",
            hint=f"it has {names or 'none'}",
            machine=self.name,
            hypervisor=self._hypervisor.name,
            operation=kind,
        )

    # Snapshots, forks, migration.

    async def _do_snapshots(self) -> list[Snapshot]:
        self._hypervisor.require_up()
        return [snapshot_of(saved) for saved in self.hardware.snapshots.values()]

    async def _do_snapshot(self, operation: Operation, name: str, memory: bool) -> Snapshot:
        hardware = self.hardware

        def take() -> Snapshot:
            if memory:
                self._require_power("snapshot")
            self.way_back(operation, lambda: hardware.snapshots.pop(name, None))
            saved = save(hardware, name, operation.before, memory=memory)
            saved.spec = self._spec
            hardware.snapshots[name] = saved
            return snapshot_of(saved)

        return await self._hypervisor.conduct("snapshot", self, operation, take)

    async def _do_delete_snapshot(self, operation: Operation, snapshot: Snapshot) -> None:
        hardware = self.hardware

        def drop() -> None:
            kept = dict(hardware.snapshots)

            def back() -> None:
                hardware.snapshots = kept

            self.way_back(operation, back)
            hardware.snapshots.pop(snapshot.name, None)

        await self._hypervisor.conduct("delete_snapshot", self, operation, drop)

    async def _do_restore(self, operation: Operation, snapshot: Snapshot) -> None:
        hardware = self.hardware
        saved = self._intact(hardware, snapshot)

        def restore() -> None:
            world = self._hypervisor.world
            if saved.memory is not None and not hardware.has_power:
                world.require_power(hardware, saved.spec.cpus.count, saved.spec.memory.size)
            before, spec = Before(hardware), self._spec

            def back() -> None:
                before.bring_back(hardware)
                self._spec = hardware.spec = spec

            self.way_back(operation, back)
            world.rebuild_like(hardware, saved.spec)
            self._spec = hardware.spec = saved.spec
            bring_back(hardware, saved)

        await self._hypervisor.conduct("restore", self, operation, restore)

    def _intact(self, hardware: Hardware, snapshot: Snapshot) -> SavedState:
        """What a snapshot holds, checked."""
        saved = hardware.snapshots[snapshot.name]
        if saved.contents_digest() != saved.digest or snapshot.digest != saved.digest:
            raise CorruptSnapshot(
                f"snapshot {snapshot.name!r} is damaged: its contents are not what was saved",
                hint="delete it, and restore an older one",
                machine=hardware.name,
                hypervisor=self._hypervisor.name,
            )
        return saved

    async def _do_create_from(self, operation: Operation, snapshot: Snapshot) -> None:
        hypervisor = self._hypervisor
        source = hypervisor.snapshot_source(snapshot)
        saved = self._intact(source, snapshot)

        def build() -> None:
            self._place(operation, copy=True)()
            hardware = self.hardware
            if saved.memory is not None:
                hypervisor.world.require_power(hardware, hardware.vcpus, hardware.ram.size)
            bring_back(hardware, saved)
            hardware.become_itself()

        await hypervisor.conduct("create_from", self, operation, build)

    async def _do_fork(self, operation: Operation, child: OperatedMachine) -> None:
        assert isinstance(child, SimulatedMachine)
        hypervisor = self._hypervisor

        def copy() -> None:
            child._place(operation, copy=True)()
            source, hardware = self._require_power("fork"), child.hardware
            hypervisor.world.require_power(hardware, source.vcpus, source.ram.size)
            hypervisor.world.rebuild_like(hardware, child.spec)
            hardware.disks = {disk.name: disk.copy() for disk in source.disks.values()}
            run_from(hardware, save_memory(source), operation.before)
            hardware.become_itself()

        await hypervisor.conduct("fork", self, operation, copy)

    async def _do_migrate(
        self, operation: Operation, arrival: OperatedMachine, live: bool, progress: Progress
    ) -> None:
        assert isinstance(arrival, SimulatedMachine)
        here, there = self._hypervisor, arrival._hypervisor
        there.require_up()
        source = self.hardware

        def reserve() -> None:
            arrival._place(operation, copy=True)()
            if live:
                there.world.require_power(source, source.vcpus, source.ram.size)

        held = sum(disk.contents().allocated for disk in source.disks.values())
        total = max(MIB, held + (source.ram.size if live else 0))
        conductor = here.conductor
        fortune = conductor.begin("migrate", self, operation)
        reserve()
        seconds = fortune.factor * here.profile.latency.migration * total / MIB
        for part in range(1, _ROUNDS + 1):
            await conductor.wait(fortune, seconds / _ROUNDS)
            there.require_up()
            progress(total * part // _ROUNDS, total)
        conductor.fail_if_due(fortune)
        # The last of it is sent while the guest stands still, so that nothing is left behind.
        if live and self._require_power("migrate").power is Power.RUNNING:
            self.way_back(operation, source.resume)
            source.pause()
        transfer(source, arrival.hardware)
        conductor.fail_if_partial(fortune)

    async def _do_hand_over(self, operation: Operation, arrival: OperatedMachine) -> None:
        assert isinstance(arrival, SimulatedMachine)
        if operation.before is MachineState.RUNNING:
            arrival.hardware.resume()
        self._hypervisor.world.remove(self.id)

    # Changes of the hardware.

    async def _do_plug_disk(self, operation: Operation, disk: Disk) -> DiskInfo:
        hardware = self.hardware

        def plug() -> DiskInfo:
            built = self._hypervisor.world.build_disk(hardware, disk)
            if hardware.has_power:
                self._hypervisor.world.require_file(hardware, built)
            self.way_back(operation, lambda: hardware.disks.pop(disk.name, None))
            hardware.disks[disk.name] = built
            return disk_info(built)

        return await self._hypervisor.conduct("plug_disk", self, operation, plug)

    async def _do_unplug_disk(self, operation: Operation, disk: Disk) -> None:
        hardware = self.hardware

        def unplug() -> None:
            kept = dict(hardware.disks)

            def back() -> None:
                hardware.disks = kept

            self.way_back(operation, back)
            hardware.disks.pop(disk.name).flush_quietly()

        await self._hypervisor.conduct("unplug_disk", self, operation, unplug)

    async def _do_resize_disk(self, operation: Operation, disk: Disk, size: int) -> DiskInfo:
        held = self.hardware.disks[disk.name]

        def grow() -> DiskInfo:
            before = held.size
            self._hypervisor.world.require_disk_space(self.name, size - before)
            self.way_back(operation, lambda: held.grow(before))
            held.grow(size)
            return disk_info(held)

        return await self._hypervisor.conduct("resize_disk", self, operation, grow)

    async def _do_plug_nic(self, operation: Operation, nic: Nic) -> NicInfo:
        hardware, world = self.hardware, self._hypervisor.world

        def plug() -> NicInfo:
            built = world.build_nic(hardware, nic)

            def back() -> None:
                world.free_nic(built)
                hardware.nics.pop(nic.name, None)

            self.way_back(operation, back)
            hardware.nics[nic.name] = built
            return nic_info(built)

        return await self._hypervisor.conduct("plug_nic", self, operation, plug)

    async def _do_unplug_nic(self, operation: Operation, nic: Nic) -> None:
        hardware, world = self.hardware, self._hypervisor.world

        def unplug() -> None:
            kept = dict(hardware.nics)
            gone = hardware.nics.pop(nic.name)
            world.free_nic(gone)

            def back() -> None:
                for protocol, port, _guest in gone.forwards:
                    world.ports.take(protocol, port, self.name)
                hardware.nics = kept

            self.way_back(operation, back)

        await self._hypervisor.conduct("unplug_nic", self, operation, unplug)

    async def _do_resize(self, operation: Operation, vcpus: int | None, memory: int | None) -> None:
        hardware = self.hardware

        def resize() -> None:
            more_vcpus = vcpus - hardware.vcpus if vcpus is not None else 0
            more_memory = memory - hardware.ram.size if memory is not None else 0
            if hardware.has_power:
                self._hypervisor.world.require_power(hardware, more_vcpus, more_memory)
            had = (hardware.vcpus, hardware.ram)

            def back() -> None:
                hardware.vcpus, hardware.ram = had

            self.way_back(operation, back)
            if vcpus is not None:
                hardware.vcpus = vcpus
            if memory is not None:
                hardware.ram = hardware.ram.resized(memory)

        await self._hypervisor.conduct("resize", self, operation, resize)

    async def _do_pin(self, operation: Operation, pinning: Mapping[int, tuple[int, ...]]) -> None:
        hardware = self.hardware

        def pin() -> None:
            had = hardware.pinning

            def back() -> None:
                hardware.pinning = had

            self.way_back(operation, back)
            hardware.pinning = dict(pinning)

        await self._hypervisor.conduct("pin", self, operation, pin)

    async def _do_inject(self, operation: Operation, fault: Fault) -> str:
        box, hardware = self._hypervisor.world.faults, self.hardware

        def inject() -> str:
            identity = box.inject(fault, hardware)
            self.way_back(operation, lambda: box.clear(identity, hardware))
            return identity

        return await self._hypervisor.conduct("inject", self, operation, inject)

    async def _do_clear_fault(self, operation: Operation, fault: str) -> None:
        box, hardware = self._hypervisor.world.faults, self.hardware
        await self._hypervisor.conduct(
            "clear_fault", self, operation, lambda: box.clear(fault, hardware)
        )
