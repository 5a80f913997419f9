"""How operations run on every machine: order, deadlines, cancellation, states and events.

A back end derives from `OperatedMachine` and fills in the hooks of `hooks`. When an operation
fails, times out or is cancelled, its `_undo` hook removes what was half done, and `_observe` tells
what the machine is doing now.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

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
from vmlab.machine.capabilities import Capability
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
from vmlab.machine.metrics import MachineMetrics
from vmlab.machine.spec import NAME, NAME_RULE, Disk, MachineSpec, Nic
from vmlab.machine.states import OFF, OPERATIONS, TRANSITIONS, Lifecycle, MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.operated_hypervisor import OperatedHypervisor

from vmlab.hypervisors.hooks import MachineHooks
from vmlab.hypervisors.operation import DEFAULT_TIMEOUTS, UNDO_TIMEOUT, Operation, uninterrupted

T = TypeVar("T")
P = TypeVar("P")

_ENDING: Final = frozenset({"stop", "kill", "delete"})
"""Operations that want the machine to end, so that its end does not spoil them."""


class OperatedMachine(MachineHooks):
    """A machine whose operations are ordered, bounded and undone here; back ends add the hooks."""

    def __init__(
        self,
        hypervisor: OperatedHypervisor,
        id_: str,
        spec: MachineSpec,
        state: MachineState = MachineState.CREATED,
    ) -> None:
        self.id = id_
        self.name = spec.name
        self._hypervisor = hypervisor
        self._spec = spec
        self._lock = asyncio.Lock()
        self._current: Operation | None = None
        self._crash: str | None = None
        self._changed = hypervisor.now()
        self._lifecycle = Lifecycle(spec.name, hypervisor.name, state, self._state_changed)

    # What back ends call when something happens by itself.

    def _happened(self, state: MachineState, event: EventType, reason: str) -> None:
        """The machine went to `state` by itself: a crash, a shutdown by the guest, a pause.

        An operation under way that this spoils is ended; one that wanted it is left alone.
        """
        self._emit(event, reason=reason)
        crashed = state is MachineState.FAILED
        operation = self._current
        if operation is None:
            self._lifecycle.move(state, reason)
            return
        if crashed:
            self._crash = reason
        if operation.name in _ENDING:
            return
        kind = MachineCrashed if crashed else OperationAborted
        operation.abort(
            kind(
                f"{operation.name} failed: {reason}",
                machine=self.name,
                hypervisor=self._hypervisor.name,
                operation=operation.name,
            )
        )

    def _emit(self, event: EventType, **data: Any) -> None:
        operation = self._current.id if self._current is not None else None
        self._hypervisor.log.emit(
            event, machine=self.id, name=self.name, operation=operation, **data
        )

    def _state_changed(self, old: MachineState, new: MachineState, reason: str) -> None:
        self._changed = self._hypervisor.now()
        self._emit(EventType.STATE, **{"from": old.value, "to": new.value, "reason": reason})

    # The machinery.

    async def _operate(
        self,
        name: str,
        action: Callable[[Operation], Awaitable[T]],
        *,
        timeout: float | None,
        via: MachineState | None = None,
        to: MachineState | Callable[[Operation], MachineState] | None = None,
        needs: Callable[[MachineState], Sequence[Capability]] | None = None,
        event: tuple[EventType, Callable[[T], dict[str, Any]]] | None = None,
    ) -> T:
        """Run one operation: in turn, allowed, bounded, announced, and undone if it fails."""
        operation = Operation(name, self._hypervisor.next_operation(), timeout)

        async def work() -> T:
            await self._lock.acquire()
            # From here on `recover` finds the lock held and releases it.
            self._current = operation
            self._lifecycle.require(name)
            if needs is not None:
                capabilities = await self._hypervisor.capabilities()
                capabilities.require(
                    *needs(self._lifecycle.state), machine=self.name, operation=name
                )
            operation.before = self._lifecycle.state
            operation.started = self._hypervisor.now()
            operation.begun = True
            self._crash = None
            self._emit(EventType.OPERATION_STARTED, timeout=operation.timeout)
            if via is not None:
                self._lifecycle.move(via, name)
            result = await action(operation)
            if event is not None:
                self._emit(event[0], **event[1](result))
            target = to(operation) if callable(to) else to
            if target is None and via is not None:
                target = operation.before
            if target is not None:
                self._lifecycle.move(target, name)
            self._emit(EventType.OPERATION_FINISHED, seconds=self._elapsed(operation))
            self._release()
            return result

        async def recover(error: BaseException) -> None:
            if self._current is not operation:
                return
            try:
                if operation.begun and self.state is not MachineState.DELETED:
                    await self._restore_order(operation, error)
            finally:
                self._release()

        return await operation.run(
            work, recover, machine=self.name, hypervisor=self._hypervisor.name
        )

    def _release(self) -> None:
        self._current = None
        self._lock.release()

    def _elapsed(self, operation: Operation) -> float:
        return round(self._hypervisor.now() - operation.started, 6)

    async def _restore_order(self, operation: Operation, error: BaseException) -> None:
        """After a failure: undo, look, and settle in a state that lasts."""
        failure = operation.aborted_by or error
        reason = f"{operation.name} {_describe(failure)}"
        try:
            async with asyncio.timeout(UNDO_TIMEOUT):
                await self._undo(operation)
                after = await self._observe()
        except TimeoutError:
            after, reason = MachineState.UNKNOWN, f"{reason}; undoing it did not end either"
        except (VmlabError, OSError, ValueError, LookupError, RuntimeError) as second:
            after, reason = MachineState.UNKNOWN, f"{reason}; undoing it failed too: {second}"
        if after is MachineState.STOPPED and operation.before in OFF:
            after = operation.before
        if self._crash is not None and after is not MachineState.UNKNOWN:
            after, reason = MachineState.FAILED, self._crash
        elif (
            operation.name == "start"
            and after in OFF
            and isinstance(failure, OperationFailed)
            and not isinstance(failure, OperationAborted)
        ):
            # A cancelled or late start never was; one that failed by itself is remembered.
            after = MachineState.FAILED
        self._lifecycle.move(after, reason)
        self._emit(
            EventType.OPERATION_FAILED,
            error=type(failure).__name__,
            message=str(failure),
            seconds=self._elapsed(operation),
        )

    async def _query(
        self,
        name: str,
        question: Callable[[], Awaitable[T]],
        timeout: float | None,
        *,
        needs: Sequence[Capability] = (),
        rule: str | None = "",
    ) -> T:
        """Ask something that changes nothing; it does not wait for operations under way.

        `rule` names the operation whose states apply: its own unless given, None for no rule.
        """
        if needs:
            capabilities = await self._hypervisor.capabilities()
            capabilities.require(*needs, machine=self.name, operation=name)
        if rule is not None:
            self._lifecycle.require(rule or name)
        query = Operation(name, 0, timeout)

        async def nothing(error: BaseException) -> None:
            """A question leaves nothing to undo."""

        return await query.run(
            question, nothing, machine=self.name, hypervisor=self._hypervisor.name
        )

    # The contract.

    @property
    def spec(self) -> MachineSpec:
        return self._spec

    @property
    def state(self) -> MachineState:
        return self._lifecycle.state

    @property
    def hypervisor(self) -> OperatedHypervisor:
        return self._hypervisor

    @property
    def _deleted(self) -> bool:
        return self.state is MachineState.DELETED

    @property
    def reason(self) -> str:
        """Why the machine is in its state."""
        return self._lifecycle.reason

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
        grace = DEFAULT_TIMEOUTS["stop"] if timeout is None else timeout

        async def ask(operation: Operation) -> None:
            resumed = False
            try:
                if operation.before is MachineState.PAUSED:
                    await self._do_resume(operation)
                    resumed = True
                await self._do_shutdown(operation)
            except BaseException:
                if resumed and await uninterrupted(self._observe()) is MachineState.RUNNING:
                    await uninterrupted(self._do_pause(operation))
                raise

        async def action(operation: Operation) -> None:
            if graceful and operation.before is not MachineState.UNKNOWN:
                if not kill:
                    return await ask(operation)
                waiting = asyncio.timeout(grace)
                try:
                    async with waiting:
                        return await ask(operation)
                except TimeoutError:
                    if not waiting.expired():
                        raise
            return await self._do_kill(operation)

        await self._operate(
            "stop",
            action,
            timeout=grace + DEFAULT_TIMEOUTS["kill"] if kill else grace,
            via=MachineState.STOPPING,
            to=MachineState.STOPPED,
        )

    async def kill(self, *, timeout: float | None = None) -> None:
        self._lifecycle.require("kill")
        if self._current is not None:
            self._current.abort(
                OperationAborted(
                    f"{self._current.name} was ended because the machine was killed",
                    machine=self.name,
                    hypervisor=self._hypervisor.name,
                    operation=self._current.name,
                )
            )

        async def action(operation: Operation) -> None:
            await self._do_kill(operation)

        try:
            await self._operate(
                "kill",
                action,
                timeout=timeout,
                via=MachineState.STOPPING,
                to=MachineState.STOPPED,
            )
        except InvalidState:
            # What was under way ended with the machine at rest: nothing is left to kill.
            if self.state.is_live or self.state is MachineState.UNKNOWN:
                raise

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
            if graceful:
                await self._do_shutdown(operation)
                await self._do_start(operation)
            else:
                await self._do_reset(operation)

        await self._operate(
            "restart",
            action,
            timeout=timeout,
            via=MachineState.RESTARTING,
            to=MachineState.RUNNING,
        )

    async def delete(self, *, force: bool = False, timeout: float | None = None) -> None:
        if self._deleted:
            return
        if force and self.state.is_live:
            await self.kill(timeout=timeout)

        async def removal(operation: Operation) -> None:
            await self._do_delete(operation)
            self._emit(EventType.DELETED)
            self._lifecycle.move(MachineState.DELETED, "delete")
            self._hypervisor.forget(self)

        async def action(operation: Operation) -> None:
            operation.commit()
            await uninterrupted(removal(operation))

        try:
            await self._operate(
                "delete",
                action,
                timeout=timeout,
                via=MachineState.DELETING,
                to=MachineState.DELETED,
            )
        except InvalidState:
            # Somebody else deleted it while this call waited for its turn.
            if not self._deleted:
                raise

    async def _do_status(self) -> tuple[MachineState, float]:
        return await self._observe(), self._hypervisor.now()

    async def status(self, *, timeout: float | None = None) -> MachineStatus:
        state, asked = self.state, self._hypervisor.now()
        if self._current is None and state is not MachineState.DELETED:
            state, asked = await self._query("status", self._do_status, timeout, rule=None)
            state = self._agree(state, asked)
        return MachineStatus(
            id=self.id,
            name=self.name,
            state=state,
            reason=self.reason,
            operation=self._current.id if self._current is not None else None,
            time=asked,
        )

    def _agree(self, seen: MachineState, when: float) -> MachineState:
        """Take over what the hypervisor said at `when`, unless something newer is known."""
        state = self.state
        if seen is state or (seen is MachineState.STOPPED and state in OFF):
            return state
        if self._current is not None or when < self._changed:
            return seen
        if seen not in TRANSITIONS[state]:
            self._lifecycle.move(MachineState.UNKNOWN, "changed behind vmlab's back")
        self._lifecycle.move(seen, "the hypervisor says so")
        return seen

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

    async def snapshots(self, *, timeout: float | None = None) -> list[Snapshot]:
        return await self._query("snapshots", self._do_snapshots, timeout, rule="info")

    async def snapshot(
        self, name: str, *, memory: bool | None = None, timeout: float | None = None
    ) -> Snapshot:
        check_part_name("snapshot", name)

        async def action(operation: Operation) -> Snapshot:
            if any(kept.name == name for kept in await self._do_snapshots()):
                raise OperationFailed(
                    f"there is a snapshot {name!r} already",
                    hint="choose another name, or delete that one first",
                    machine=self.name,
                    hypervisor=self._hypervisor.name,
                    operation="snapshot",
                )
            capabilities = await self._hypervisor.capabilities()
            live = operation.before.is_live
            with_memory = memory
            if with_memory is None:
                with_memory = live and Capability.MEMORY_SNAPSHOT in capabilities
            if with_memory and not live:
                raise InvalidState(
                    "snapshot",
                    expected=(MachineState.RUNNING.value, MachineState.PAUSED.value),
                    actual=operation.before.value,
                    machine=self.name,
                    hypervisor=self._hypervisor.name,
                    hint="a machine at rest has no memory to save: leave `memory` out",
                )
            return await self._do_snapshot(operation, name, with_memory)

        def needs(state: MachineState) -> Sequence[Capability]:
            return (Capability.SNAPSHOT, *((Capability.MEMORY_SNAPSHOT,) if memory else ()))

        return await self._operate(
            "snapshot",
            action,
            timeout=timeout,
            via=MachineState.SNAPSHOTTING,
            needs=needs,
            event=(EventType.SNAPSHOT_TAKEN, lambda taken: {"snapshot": taken.name}),
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
        async def action(operation: Operation) -> None:
            await self._do_delete_snapshot(operation, await self._named_snapshot(name))

        await self._operate(
            "delete_snapshot",
            action,
            timeout=timeout,
            needs=_always(Capability.SNAPSHOT),
            event=(EventType.SNAPSHOT_DELETED, lambda _: {"snapshot": name}),
        )

    async def restore(self, name: str, *, timeout: float | None = None) -> None:
        brought_back: list[MachineState] = []

        async def action(operation: Operation) -> None:
            kept = await self._named_snapshot(name)
            if not kept.memory and operation.before not in OFF:
                raise InvalidState(
                    "restore",
                    expected=tuple(state.value for state in MachineState if state in OFF),
                    actual=operation.before.value,
                    machine=self.name,
                    hypervisor=self._hypervisor.name,
                    hint="the snapshot has no memory in it: stop the machine first",
                )
            await self._do_restore(operation, kept)
            brought_back.append(kept.state if kept.memory else MachineState.STOPPED)

        await self._operate(
            "restore",
            action,
            timeout=timeout,
            via=MachineState.RESTORING,
            to=lambda _: brought_back[0],
            needs=_always(Capability.RESTORE),
            event=(EventType.RESTORED, lambda _: {"snapshot": name}),
        )

    async def fork(self, name: str, *, timeout: float | None = None) -> Machine:
        async def action(operation: Operation) -> OperatedMachine:
            spec = self._spec.with_changes(
                name=name,
                nics=[nic.model_copy(update={"mac": None}) for nic in self._spec.nics],
            )
            return await self._hypervisor.make(
                operation,
                spec,
                lambda child: self._do_fork(operation, child),
                state=operation.before,
            )

        return await self._operate(
            "fork",
            action,
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
            )
        there: OperatedHypervisor = target

        async def action(operation: Operation) -> OperatedMachine:
            going_live = operation.before.is_live
            if live is not None and live is not going_live:
                fitting = OPERATIONS["migrate"]
                raise InvalidState(
                    "migrate",
                    expected=tuple(
                        state.value
                        for state in MachineState
                        if state in fitting and state.is_live is live
                    ),
                    actual=operation.before.value,
                    machine=self.name,
                    hypervisor=here.name,
                )
            check_fit(self._spec, await there.capabilities())

            def report(transferred: int, total: int) -> None:
                self._emit(
                    EventType.MIGRATION_PROGRESS, transferred_bytes=transferred, total_bytes=total
                )
                if progress is not None:
                    progress(transferred, total)

            async def arrive(arrival: OperatedMachine) -> None:
                await self._do_migrate(operation, arrival, going_live, report)
                operation.commit()
                await uninterrupted(hand_over(operation, arrival))

            return await there.make(
                operation, self._spec, arrive, state=operation.before, id_=self.id
            )

        async def hand_over(operation: Operation, arrival: OperatedMachine) -> None:
            await self._do_hand_over(operation, arrival)
            self._emit(EventType.MIGRATED, to=str(there.owner))
            self._lifecycle.move(MachineState.DELETING, "migrated")
            self._emit(EventType.DELETED)
            self._lifecycle.move(MachineState.DELETED, "migrated")
            here.forget(self)

        def needs(state: MachineState) -> Sequence[Capability]:
            return (Capability.LIVE_MIGRATION if state.is_live else Capability.COLD_MIGRATION,)

        try:
            return await self._operate(
                "migrate",
                action,
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

    async def plug_disk(self, disk: Disk, *, timeout: float | None = None) -> DiskInfo:
        async def action(operation: Operation) -> DiskInfo:
            changed = self._spec.with_changes(disks=[*self._spec.disks, disk])
            check_fit(changed, await self._hypervisor.capabilities())
            plugged = await self._do_plug_disk(operation, disk)
            self._spec = changed
            return plugged

        return await self._operate(
            "plug_disk",
            action,
            timeout=timeout,
            needs=_if_live(Capability.HOTPLUG_DISK),
            event=(EventType.DISK_PLUGGED, lambda _: {"disk": disk.name}),
        )

    async def unplug_disk(self, name: str, *, timeout: float | None = None) -> None:
        async def action(operation: Operation) -> None:
            disk = self._named("disk", name, self._spec.disk(name))
            await self._do_unplug_disk(operation, disk)
            kept = tuple(other for other in self._spec.disks if other.name != name)
            self._spec = self._spec.model_copy(update={"disks": kept})

        await self._operate(
            "unplug_disk",
            action,
            timeout=timeout,
            needs=_if_live(Capability.HOTPLUG_DISK),
            event=(EventType.DISK_UNPLUGGED, lambda _: {"disk": name}),
        )

    async def resize_disk(self, name: str, size: int, *, timeout: float | None = None) -> DiskInfo:
        async def action(operation: Operation) -> DiskInfo:
            disk = self._named("disk", name, self._spec.disk(name))
            present = next(
                (had.size for had in (await self._do_info()).disks if had.name == name), 0
            )
            if size < present:
                raise InvalidSpec(
                    [SpecProblem("size", size, f"at least its present {present} bytes")],
                    machine=self.name,
                    hypervisor=self._hypervisor.name,
                    hint="a disk can only grow",
                )
            grown = disk.model_copy(update={"size": size})
            changed = self._spec.with_changes(
                disks=[grown if other.name == name else other for other in self._spec.disks]
            )
            check_fit(changed, await self._hypervisor.capabilities())
            resized = await self._do_resize_disk(operation, disk, size)
            self._spec = changed
            return resized

        return await self._operate(
            "resize_disk",
            action,
            timeout=timeout,
            needs=_always(Capability.RESIZE_DISK),
            event=(EventType.DISK_RESIZED, lambda disk: {"disk": disk.name, "size": disk.size}),
        )

    async def plug_nic(self, nic: Nic, *, timeout: float | None = None) -> NicInfo:
        async def action(operation: Operation) -> NicInfo:
            changed = self._spec.with_changes(nics=[*self._spec.nics, nic])
            check_fit(changed, await self._hypervisor.capabilities())
            plugged = await self._do_plug_nic(operation, nic)
            self._spec = changed
            return plugged

        return await self._operate(
            "plug_nic",
            action,
            timeout=timeout,
            needs=_if_live(Capability.HOTPLUG_NIC),
            event=(EventType.NIC_PLUGGED, lambda _: {"nic": nic.name}),
        )

    async def unplug_nic(self, name: str, *, timeout: float | None = None) -> None:
        async def action(operation: Operation) -> None:
            nic = self._named("nic", name, self._spec.nic(name))
            await self._do_unplug_nic(operation, nic)
            kept = tuple(other for other in self._spec.nics if other.name != name)
            self._spec = self._spec.model_copy(update={"nics": kept})

        await self._operate(
            "unplug_nic",
            action,
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

        async def action(operation: Operation) -> MachineInfo:
            cpus, ram = self._spec.cpus.model_dump(), self._spec.memory.model_dump()
            if vcpus is not None:
                cpus |= {"count": vcpus, "sockets": None, "cores": None, "threads": None}
            if memory is not None:
                ram |= {"size": memory}
            changed = self._spec.with_changes(cpus=cpus, memory=ram)
            check_fit(changed, await self._hypervisor.capabilities())
            await self._do_resize(operation, vcpus, memory)
            self._spec = changed
            return await self._do_info()

        return await self._operate(
            "resize",
            action,
            timeout=timeout,
            needs=needs,
            event=(EventType.RESIZED, lambda has: {"vcpus": has.vcpus, "memory": has.memory}),
        )

    async def pin(
        self, pinning: Mapping[int, tuple[int, ...]], *, timeout: float | None = None
    ) -> None:
        async def action(operation: Operation) -> None:
            cpus = self._spec.cpus.model_dump() | {"pinning": dict(pinning)}
            changed = self._spec.with_changes(cpus=cpus)
            await self._do_pin(operation, changed.cpus.pinning)
            self._spec = changed

        await self._operate(
            "pin",
            action,
            timeout=timeout,
            needs=_always(Capability.PINNING),
            event=(
                EventType.PINNED,
                lambda _: {"pinning": {str(cpu): list(to) for cpu, to in pinning.items()}},
            ),
        )

    async def inject(self, fault: Fault, *, timeout: float | None = None) -> str:
        async def action(operation: Operation) -> str:
            capabilities = await self._hypervisor.capabilities()
            if fault.kind not in capabilities.faults:
                raise UnsupportedOperation(
                    f"fault {fault.kind.value}",
                    hypervisor=self._hypervisor.name,
                    machine=self.name,
                    operation="inject",
                )
            return await self._do_inject(operation, fault)

        return await self._operate(
            "inject",
            action,
            timeout=timeout,
            needs=_always(Capability.FAULTS),
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


def check_part_name(field: str, name: str) -> None:
    """Refuse a name that is not safe as a file name.

    Raises:
        InvalidSpec: naming the field and what would be right.
    """
    if not NAME.fullmatch(name):
        raise InvalidSpec([SpecProblem(field, name, NAME_RULE)])


def _always(*capabilities: Capability) -> Callable[[MachineState], Sequence[Capability]]:
    return lambda state: capabilities


def _if_live(*capabilities: Capability) -> Callable[[MachineState], Sequence[Capability]]:
    return lambda state: capabilities if state.is_live else ()


def _describe(failure: BaseException) -> str:
    """How an operation ended, as part of a sentence."""
    if isinstance(failure, asyncio.CancelledError):
        return "was cancelled"
    if isinstance(failure, TimeoutError):
        return "took too long"
    return f"failed: {failure}"
