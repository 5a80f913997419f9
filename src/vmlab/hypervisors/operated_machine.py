"""The operations of the contract, each in terms of the hooks that a back end fills in.

Which states an operation leads through, which capabilities it needs, what refuses it before it
begins and what is announced after it stands here; how operations are ordered, bounded and undone
is `serialised_machine`'s. A back end derives from `OperatedMachine` and fills in `hooks`.

Long because the contract is: one method after the other, none of which knows another.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

from vmlab.hypervisors.base import (
    Channel,
    Console,
    DiskInfo,
    Hypervisor,
    Machine,
    MachineInfo,
    MachineStatus,
    NicInfo,
    Progress,
    Snapshot,
)
from vmlab.hypervisors.operation import (
    DEFAULT_TIMEOUTS,
    HOST_ERRORS,
    UNDO_TIMEOUT,
    Operation,
    seconds_allowed,
)
from vmlab.hypervisors.serialised_machine import Action, Needs, NothingToDo, SerialisedMachine
from vmlab.machine.capabilities import Capabilities, Capability
from vmlab.machine.documents import build
from vmlab.machine.errors import (
    InvalidSpec,
    InvalidState,
    MachineCrashed,
    MigrationFailed,
    OperationAborted,
    OperationFailed,
    ResourceNotFound,
    SnapshotNotFound,
    SpecProblem,
    UnsupportedOperation,
    VmlabError,
)
from vmlab.machine.events import EventType
from vmlab.machine.faults import Fault
from vmlab.machine.fit import check_fit
from vmlab.machine.keys import KEYS, KEYS_RULE
from vmlab.machine.metrics import MachineMetrics
from vmlab.machine.spec import NAME_RULE, Disk, Nic, is_name
from vmlab.machine.states import LIVE, OFF, OPERATIONS, MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.operated_hypervisor import OperatedHypervisor

P = TypeVar("P")

_AT_REST: Final = frozenset({MachineState.CREATED, MachineState.STOPPED, MachineState.DELETED})
_KILLABLE: Final = LIVE | {MachineState.UNKNOWN}
"""States in which something of the machine may run."""


class OperatedMachine(SerialisedMachine):
    """A machine that fulfils the contract by its hooks; back ends add those."""

    # The contract: life.

    async def start(self, *, timeout: float | None = None) -> None:
        await self._operate(
            "start",
            self._do_start,
            timeout=timeout,
            via=MachineState.STARTING,
            to=MachineState.RUNNING,
        )

    async def stop(
        self, *, graceful: bool = True, kill: bool = True, timeout: float | None = None
    ) -> None:
        grace = seconds_allowed("stop", timeout)
        in_all = grace + DEFAULT_TIMEOUTS["kill"] if kill else grace

        async def ask(operation: Operation) -> None:
            if operation.before is MachineState.PAUSED:
                operation.repause = True
                await self._do_resume(operation)
            await self._do_shutdown(operation)

        async def action(operation: Operation) -> None:
            if graceful and operation.before is not MachineState.UNKNOWN:
                if kill:
                    # The guest has its grace from now on, however long this waited for its turn.
                    operation.allow(in_all)
                waiting = asyncio.timeout(grace if kill and grace < math.inf else None)
                try:
                    async with waiting:
                        return await ask(operation)
                except (VmlabError, *HOST_ERRORS):
                    # A guest that ended by itself could not be asked, but what is left of it goes.
                    if not waiting.expired() and self._fate is None:
                        raise
            return await self._do_kill(operation)

        await self._operate(
            "stop",
            action,
            timeout=in_all,
            via=MachineState.STOPPING,
            to=MachineState.STOPPED,
            ending=True,
        )

    async def kill(self, *, timeout: float | None = None) -> None:
        seconds_allowed("kill", timeout)
        self._lifecycle.require("kill")
        self._end_pending("killed")
        # What was under way may have ended with the machine at rest.
        with suppress(NothingToDo):
            await self._operate(
                "kill",
                self._do_kill,
                timeout=timeout,
                via=MachineState.STOPPING,
                to=MachineState.STOPPED,
                ending=True,
                forced=True,
                already=_AT_REST,
            )

    async def pause(self, *, timeout: float | None = None) -> None:
        await self._operate(
            "pause",
            self._do_pause,
            timeout=timeout,
            via=MachineState.PAUSING,
            to=MachineState.PAUSED,
            needs=_always(Capability.PAUSE),
        )

    async def resume(self, *, timeout: float | None = None) -> None:
        await self._operate(
            "resume",
            self._do_resume,
            timeout=timeout,
            via=MachineState.RESUMING,
            to=MachineState.RUNNING,
            needs=_always(Capability.RESUME),
        )

    async def restart(self, *, graceful: bool = True, timeout: float | None = None) -> None:
        async def action(operation: Operation) -> None:
            if not graceful:
                return await self._do_reset(operation)
            # That the guest goes down is wanted, until it is to come up again.
            operation.ending = True
            await self._do_shutdown(operation)
            operation.ending = False
            return await self._do_start(operation)

        await self._operate(
            "restart",
            action,
            timeout=timeout,
            via=MachineState.RESTARTING,
            to=MachineState.RUNNING,
        )

    async def delete(self, *, force: bool = False, timeout: float | None = None) -> None:
        seconds_allowed("delete", timeout)
        if self._deleted:
            return
        if force and self.state in _KILLABLE:
            self._end_pending("deleted")

        async def removal(operation: Operation) -> None:
            await self._do_delete(operation)
            self._emit(EventType.DELETED)
            self._lifecycle.move(MachineState.DELETED, "delete")
            self._hypervisor.forget(self)

        async def action(operation: Operation) -> None:
            if force and operation.before in _KILLABLE:
                self._lifecycle.move(MachineState.STOPPING, "delete")
                await self._do_kill(operation)
                self._lifecycle.move(MachineState.STOPPED, "delete")
            self._lifecycle.move(MachineState.DELETING, "delete")
            await operation.conclude(removal(operation))

        # Somebody else may have deleted it while this call waited for its turn.
        with suppress(NothingToDo):
            await self._operate(
                "delete",
                action,
                timeout=timeout,
                to=MachineState.DELETED,
                ending=True,
                forced=force,
                already=frozenset({MachineState.DELETED}),
                allowed=OPERATIONS["delete"] | OPERATIONS["kill"] if force else None,
            )

    # Questions.

    async def _do_status(self) -> tuple[MachineState, float]:
        return await self._observe(), self._hypervisor.now()

    async def status(self, *, timeout: float | None = None) -> MachineStatus:
        seconds_allowed("status", timeout)
        state, time = self.state, self._hypervisor.now()
        if self._current is None and state is not MachineState.DELETED:
            changes = self._changes
            try:
                seen, when = await self._query("status", self._do_status, timeout, rule=None)
            except VmlabError:
                # A machine that was deleted meanwhile cannot answer; that is the answer.
                if not self._deleted:
                    raise
            else:
                if self._changes == changes and self._current is None:
                    state, time = self._agree(seen, when), when
            if self._changes != changes or self._current is not None:
                # What happened while the hypervisor was asked is newer than what it says.
                state, time = self.state, self._hypervisor.now()
        return MachineStatus(
            id=self.id,
            name=self.name,
            state=state,
            reason=self.reason,
            operation=self._current.id if self._current is not None else None,
            time=time,
        )

    async def info(self, *, timeout: float | None = None) -> MachineInfo:
        return await self._query("info", self._do_info, timeout)

    async def metrics(self, *, timeout: float | None = None) -> MachineMetrics:
        return await self._query("metrics", self._do_metrics, timeout)

    async def console(self, name: str = "serial", *, timeout: float | None = None) -> Console:
        return await self._query(
            "console", lambda: self._do_console(name), timeout, needs=(Capability.CONSOLE,)
        )

    async def channel(self, name: str, *, timeout: float | None = None) -> Channel:
        return await self._query(
            "channel", lambda: self._do_channel(name), timeout, needs=(Capability.GUEST_CHANNELS,)
        )

    async def screenshot(self, *, timeout: float | None = None) -> bytes:
        async def look() -> bytes:
            self._require_display("screenshot")
            return (await self._do_screenshot()).png()

        return await self._query("screenshot", look, timeout, needs=(Capability.DISPLAY,))

    async def send_keys(self, keys: Sequence[str], *, timeout: float | None = None) -> None:
        async def press() -> None:
            self._require_display("send_keys")
            await self._do_send_keys(chords)

        chords = check_keys(keys)
        await self._query("send_keys", press, timeout, needs=(Capability.DISPLAY,))

    def _require_display(self, operation: str) -> None:
        if not self._spec.display:
            raise UnsupportedOperation(
                Capability.DISPLAY.value,
                hypervisor=self._hypervisor.name,
                machine=self.name,
                operation=operation,
                hint="its specification has no display: create it with display = true",
            )

    async def snapshots(self, *, timeout: float | None = None) -> list[Snapshot]:
        return await self._query("snapshots", self._do_snapshots, timeout, rule="info")

    # Snapshots and copies.

    async def snapshot(
        self, name: str, *, memory: bool | None = None, timeout: float | None = None
    ) -> Snapshot:
        check_part_name("snapshot", name, operation="snapshot")

        def needs(state: MachineState) -> Sequence[Capability]:
            # What was asked for by name comes first: that is what the refusal is to name.
            return (*((Capability.MEMORY_SNAPSHOT,) if memory else ()), Capability.SNAPSHOT)

        async def plan(state: MachineState, capabilities: Capabilities) -> Action[Snapshot]:
            if memory and not state.is_live:
                raise InvalidState(
                    "snapshot",
                    expected=(MachineState.RUNNING.value, MachineState.PAUSED.value),
                    actual=state.value,
                    machine=self.name,
                    hypervisor=self._hypervisor.name,
                    hint="a machine at rest has no memory to save: leave `memory` out",
                )
            if any(kept.name == name for kept in await self._do_snapshots()):
                raise OperationFailed(
                    f"there is a snapshot {name!r} already",
                    hint="choose another name, or delete that one first",
                    machine=self.name,
                    hypervisor=self._hypervisor.name,
                    operation="snapshot",
                )
            self._require_own_disks("snapshot")
            with_memory = state.is_live and Capability.MEMORY_SNAPSHOT in capabilities
            if memory is not None:
                with_memory = memory
            return lambda operation: self._do_snapshot(operation, name, with_memory)

        return await self._operate(
            "snapshot",
            plan=plan,
            timeout=timeout,
            via=MachineState.SNAPSHOTTING,
            needs=needs,
            event=(EventType.SNAPSHOT_TAKEN, lambda taken: {"snapshot": taken.name}),
        )

    def _require_own_disks(self, operation: str) -> None:
        """Refuse to copy a machine whose guest writes to files that are not the machine's.

        Raises:
            OperationFailed: naming the disks.
        """
        if names := [disk.name for disk in self._spec.disks if disk.in_place]:
            raise OperationFailed(
                f"machine {self.name!r} writes to files that are no part of it: its disks "
                f"{', '.join(names)}",
                hint="unplug them first; what they hold is not copied",
                machine=self.name,
                hypervisor=self._hypervisor.name,
                operation=operation,
            )

    async def _named_snapshot(self, name: str) -> Snapshot:
        for kept in await self._do_snapshots():
            if kept.name == name:
                return kept
        raise SnapshotNotFound(
            f"machine {self.name!r} has no snapshot {name!r}",
            hint="`snapshots` lists those that there are",
            machine=self.name,
            hypervisor=self._hypervisor.name,
        )

    async def delete_snapshot(self, name: str, *, timeout: float | None = None) -> None:
        async def plan(state: MachineState, capabilities: Capabilities) -> Action[None]:
            kept = await self._named_snapshot(name)
            return lambda operation: self._do_delete_snapshot(operation, kept)

        await self._operate(
            "delete_snapshot",
            plan=plan,
            timeout=timeout,
            needs=_always(Capability.SNAPSHOT),
            event=(EventType.SNAPSHOT_DELETED, lambda _: {"snapshot": name}),
        )

    async def restore(self, name: str, *, timeout: float | None = None) -> None:
        async def plan(state: MachineState, capabilities: Capabilities) -> Action[MachineState]:
            kept = await self._named_snapshot(name)
            if not kept.memory and state not in OFF:
                raise InvalidState(
                    "restore",
                    expected=tuple(state.value for state in MachineState if state in OFF),
                    actual=state.value,
                    machine=self.name,
                    hypervisor=self._hypervisor.name,
                    hint="the snapshot has no memory in it: stop the machine first",
                )

            async def act(operation: Operation) -> MachineState:
                await self._do_restore(operation, kept)
                return kept.state if kept.memory else MachineState.STOPPED

            return act

        await self._operate(
            "restore",
            plan=plan,
            timeout=timeout,
            via=MachineState.RESTORING,
            to=lambda brought_back: brought_back,
            needs=_always(Capability.RESTORE),
            event=(EventType.RESTORED, lambda _: {"snapshot": name}),
        )

    async def fork(self, name: str, *, timeout: float | None = None) -> Machine:
        async def plan(state: MachineState, capabilities: Capabilities) -> Action[OperatedMachine]:
            spec = self._spec.renamed(name)
            self._hypervisor.require_free(name, operation="fork")
            self._require_own_disks("fork")
            return lambda operation: self._hypervisor.make(
                operation, spec, lambda child: self._do_fork(operation, child), state=state
            )

        return await self._operate(
            "fork",
            plan=plan,
            timeout=timeout,
            via=MachineState.SNAPSHOTTING,
            needs=_always(Capability.FORK),
            event=(EventType.FORKED, lambda child: {"into": child.name}),
        )

    async def migrate(
        self,
        target: Hypervisor,
        *,
        live: bool | None = None,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Machine:
        here = self._hypervisor
        if not isinstance(target, type(here)) or target is here:
            expected = f"another hypervisor of the kind {here.name!r}"
            raise InvalidSpec(
                [SpecProblem("target", getattr(target, "name", target), expected)],
                machine=self.name,
                hypervisor=here.name,
                operation="migrate",
                what="migrate",
                hint="open a second one, for another owner or on another host",
            )
        there: OperatedHypervisor = target

        def needs(state: MachineState) -> Sequence[Capability]:
            return (Capability.LIVE_MIGRATION if state.is_live else Capability.COLD_MIGRATION,)

        async def plan(state: MachineState, capabilities: Capabilities) -> Action[OperatedMachine]:
            if live is not None and live is not state.is_live:
                fitting = OPERATIONS["migrate"]
                raise InvalidState(
                    "migrate",
                    expected=tuple(
                        state.value
                        for state in MachineState
                        if state in fitting and state.is_live is live
                    ),
                    actual=state.value,
                    machine=self.name,
                    hypervisor=here.name,
                )
            await there._prepare()
            theirs = await there.capabilities()
            theirs.require(*needs(state), machine=self.name, operation="migrate")
            check_fit(self._spec, theirs)
            there.require_free(self.name, operation="migrate")
            return lambda operation: self._move(operation, there, progress)

        try:
            return await self._operate(
                "migrate",
                plan=plan,
                timeout=timeout,
                via=MachineState.MIGRATING,
                to=MachineState.DELETED,
                needs=needs,
            )
        except (MachineCrashed, OperationAborted, MigrationFailed):
            raise
        except OperationFailed as error:
            raise MigrationFailed(
                f"migration failed: {error.message}",
                hint=error.hint,
                machine=self.name,
                hypervisor=here.name,
                operation="migrate",
            ) from error

    async def _move(
        self, operation: Operation, there: OperatedHypervisor, progress: Progress | None
    ) -> OperatedMachine:
        """Make this machine anew at `there` and delete it here: all of it or nothing."""
        here = self._hypervisor

        def report(transferred: int, total: int) -> None:
            self._emit(
                EventType.MIGRATION_PROGRESS, transferred_bytes=transferred, total_bytes=total
            )
            if progress is not None:
                progress(transferred, total)

        async def arrive(arrival: OperatedMachine) -> None:
            await self._do_migrate(operation, arrival, operation.before.is_live, report)
            await operation.conclude(hand_over(arrival), grace=UNDO_TIMEOUT)

        async def hand_over(arrival: OperatedMachine) -> None:
            await self._do_hand_over(operation, arrival)
            # Nothing awaits from here on: the machine is never at both places, nor at neither.
            there.enlist(operation, arrival)
            self._emit(EventType.MIGRATED, to=str(there.owner))
            self._lifecycle.move(MachineState.DELETING, "migrated")
            self._emit(EventType.DELETED)
            self._lifecycle.move(MachineState.DELETED, "migrated")
            here.forget(self)

        return await there.make(operation, self._spec, arrive, state=operation.before, id_=self.id)

    # Devices.

    async def plug_disk(self, disk: Disk, *, timeout: float | None = None) -> DiskInfo:
        async def plan(state: MachineState, capabilities: Capabilities) -> Action[DiskInfo]:
            changed = self._spec.with_changes(disks=[*self._spec.disks, disk])
            check_fit(changed, capabilities)

            async def act(operation: Operation) -> DiskInfo:
                plugged = await self._do_plug_disk(operation, disk)
                self._spec = changed
                return plugged

            return act

        return await self._operate(
            "plug_disk",
            plan=plan,
            timeout=timeout,
            needs=_if_live(Capability.HOTPLUG_DISK),
            event=(EventType.DISK_PLUGGED, lambda _: {"disk": disk.name}),
        )

    async def unplug_disk(self, name: str, *, timeout: float | None = None) -> None:
        async def plan(state: MachineState, capabilities: Capabilities) -> Action[None]:
            disk = self._named("disk", name, self._spec.disk(name))

            async def act(operation: Operation) -> None:
                await self._do_unplug_disk(operation, disk)
                kept = tuple(other for other in self._spec.disks if other.name != name)
                self._spec = self._spec.model_copy(update={"disks": kept})

            return act

        await self._operate(
            "unplug_disk",
            plan=plan,
            timeout=timeout,
            needs=_if_live(Capability.HOTPLUG_DISK),
            event=(EventType.DISK_UNPLUGGED, lambda _: {"disk": name}),
        )

    async def resize_disk(self, name: str, size: int, *, timeout: float | None = None) -> DiskInfo:
        async def plan(state: MachineState, capabilities: Capabilities) -> Action[DiskInfo]:
            disk = self._named("disk", name, self._spec.disk(name))
            if disk.file is not None and disk.readonly:
                raise OperationFailed(
                    f"disk {name!r} is an image that is only read",
                    hint="plug it without readonly to have it grow",
                    machine=self.name,
                    hypervisor=self._hypervisor.name,
                    operation="resize_disk",
                )
            grown = build(Disk, {**disk.model_dump(), "size": size})
            changed = self._spec.with_changes(
                disks=[grown if other.name == name else other for other in self._spec.disks]
            )
            check_fit(changed, capabilities)
            present = next(
                (had.size for had in (await self._do_info()).disks if had.name == name), 0
            )
            bytes_ = grown.size or 0
            if bytes_ < present:
                raise InvalidSpec(
                    [SpecProblem("size", size, f"at least its present {present} bytes")],
                    machine=self.name,
                    hypervisor=self._hypervisor.name,
                    operation="resize_disk",
                    what=f"disk {name!r}",
                    hint="a disk can only grow",
                )

            async def act(operation: Operation) -> DiskInfo:
                resized = await self._do_resize_disk(operation, disk, bytes_)
                self._spec = changed
                return resized

            return act

        return await self._operate(
            "resize_disk",
            plan=plan,
            timeout=timeout,
            needs=_always(Capability.RESIZE_DISK),
            event=(EventType.DISK_RESIZED, lambda disk: {"disk": disk.name, "size": disk.size}),
        )

    async def plug_nic(self, nic: Nic, *, timeout: float | None = None) -> NicInfo:
        async def plan(state: MachineState, capabilities: Capabilities) -> Action[NicInfo]:
            changed = self._spec.with_changes(nics=[*self._spec.nics, nic])
            check_fit(changed, capabilities)

            async def act(operation: Operation) -> NicInfo:
                plugged = await self._do_plug_nic(operation, nic)
                self._spec = changed
                return plugged

            return act

        return await self._operate(
            "plug_nic",
            plan=plan,
            timeout=timeout,
            needs=_if_live(Capability.HOTPLUG_NIC),
            event=(EventType.NIC_PLUGGED, lambda _: {"nic": nic.name}),
        )

    async def unplug_nic(self, name: str, *, timeout: float | None = None) -> None:
        async def plan(state: MachineState, capabilities: Capabilities) -> Action[None]:
            nic = self._named("nic", name, self._spec.nic(name))

            async def act(operation: Operation) -> None:
                await self._do_unplug_nic(operation, nic)
                kept = tuple(other for other in self._spec.nics if other.name != name)
                self._spec = self._spec.model_copy(update={"nics": kept})

            return act

        await self._operate(
            "unplug_nic",
            plan=plan,
            timeout=timeout,
            needs=_if_live(Capability.HOTPLUG_NIC),
            event=(EventType.NIC_UNPLUGGED, lambda _: {"nic": name}),
        )

    async def resize(
        self,
        *,
        vcpus: int | None = None,
        memory: int | None = None,
        timeout: float | None = None,
    ) -> MachineInfo:
        def needs(state: MachineState) -> Sequence[Capability]:
            if not state.is_live:
                return (Capability.RESIZE,)
            return (
                *((Capability.HOTPLUG_VCPU,) if vcpus is not None else ()),
                *((Capability.HOTPLUG_MEMORY,) if memory is not None else ()),
            )

        async def plan(state: MachineState, capabilities: Capabilities) -> Action[MachineInfo]:
            if vcpus is None and memory is None:
                raise InvalidSpec(
                    [SpecProblem("vcpus", None, "vcpus or memory has to be given")],
                    machine=self.name,
                    hypervisor=self._hypervisor.name,
                    operation="resize",
                    what="resize",
                )
            cpus, ram = self._spec.cpus.model_dump(), self._spec.memory.model_dump()
            if vcpus is not None:
                cpus |= {"count": vcpus, "sockets": None, "cores": None, "threads": None}
            if memory is not None:
                ram |= {"size": memory}
            changed = self._spec.with_changes(cpus=cpus, memory=ram)
            check_fit(changed, capabilities)

            async def act(operation: Operation) -> MachineInfo:
                await self._do_resize(operation, vcpus, memory)
                resized = await self._do_info()
                self._spec = changed
                return resized

            return act

        return await self._operate(
            "resize",
            plan=plan,
            timeout=timeout,
            needs=needs,
            event=(EventType.RESIZED, lambda has: {"vcpus": has.vcpus, "memory": has.memory}),
        )

    async def pin(
        self, pinning: Mapping[int, tuple[int, ...]], *, timeout: float | None = None
    ) -> None:
        async def plan(state: MachineState, capabilities: Capabilities) -> Action[None]:
            cpus = self._spec.cpus.model_dump() | {"pinning": dict(pinning)}
            changed = self._spec.with_changes(cpus=cpus)

            async def act(operation: Operation) -> None:
                await self._do_pin(operation, changed.cpus.pinning)
                self._spec = changed

            return act

        await self._operate(
            "pin",
            plan=plan,
            timeout=timeout,
            needs=_always(Capability.PINNING),
            event=(
                EventType.PINNED,
                lambda _: {"pinning": {str(cpu): list(to) for cpu, to in pinning.items()}},
            ),
        )

    async def inject(self, fault: Fault, *, timeout: float | None = None) -> str:
        async def plan(state: MachineState, capabilities: Capabilities) -> Action[str]:
            if fault.kind not in capabilities.faults:
                raise UnsupportedOperation(
                    f"fault {fault.kind.value}",
                    hypervisor=self._hypervisor.name,
                    machine=self.name,
                    operation="inject",
                )
            return lambda operation: self._do_inject(operation, fault)

        return await self._operate(
            "inject",
            plan=plan,
            timeout=timeout,
            needs=_always(Capability.FAULTS),
            disturbs=True,
            event=(
                EventType.FAULT_INJECTED,
                lambda id_: {"fault": id_, "kind": fault.kind.value},
            ),
        )

    async def clear_fault(self, fault: str, *, timeout: float | None = None) -> None:
        async def action(operation: Operation) -> None:
            await self._do_clear_fault(operation, fault)

        await self._operate(
            "clear_fault",
            action,
            timeout=timeout,
            needs=_always(Capability.FAULTS),
            disturbs=True,
            event=(EventType.FAULT_CLEARED, lambda _: {"fault": fault}),
        )

    def _named(self, kind: str, name: str, part: P | None) -> P:
        """`part`, which was looked for by name."""
        if part is None:
            raise ResourceNotFound(
                f"machine {self.name!r} has no {kind} {name!r}",
                hint=f"`info` lists its {kind}s",
                machine=self.name,
                hypervisor=self._hypervisor.name,
            )
        return part


def check_part_name(field: str, name: str, *, operation: str = "create") -> None:
    """Refuse a name that is not safe as a file name.

    Raises:
        InvalidSpec: naming the field and what would be right.
    """
    if not is_name(name):
        raise InvalidSpec(
            [SpecProblem(field, name, NAME_RULE)],
            operation=operation,
            what=operation,
            hint="choose another name",
        )


def check_keys(keys: Sequence[str]) -> list[tuple[str, ...]]:
    """The keys of each item, which are pressed together.

    Raises:
        InvalidSpec: naming the first that there is not.
    """
    if isinstance(keys, str):
        raise _no_keys("keys", keys, 'a list of keys such as ["l", "s", "ret"]')
    chords = []
    for position, item in enumerate(keys):
        chord = tuple(item.split("-"))
        if not set(chord) <= KEYS:
            raise _no_keys(f"keys.{position}", item, KEYS_RULE)
        chords.append(chord)
    return chords


def _no_keys(field: str, value: str, expected: str) -> InvalidSpec:
    return InvalidSpec(
        [SpecProblem(field, value, expected)],
        operation="send_keys",
        what="send_keys",
        hint="`vmlab.machine.keys.KEYS` has all of them",
    )


def _always(*capabilities: Capability) -> Needs:
    return lambda state: capabilities


def _if_live(*capabilities: Capability) -> Needs:
    return lambda state: capabilities if state.is_live else ()
