"""Hypervisors that get the life of a machine wrong: states, start, stop, crash, delete."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, ClassVar

from mutants.base import BrokenHypervisor, BrokenMachine, mutant, wipe
from vmlab.hypervisors.base import MachineStatus
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.simulated.profile import SimulationProfile
from vmlab.machine.errors import DeadlineExceeded, InvalidState, OperationFailed, VmlabError
from vmlab.machine.events import EventType
from vmlab.machine.states import MachineState

S = MachineState


@mutant("states.legal")
class KeepsSnapshotsOfTheFailed(BrokenMachine):
    """Refuses to delete snapshots of a machine that has failed."""

    async def delete_snapshot(self, name: str, **options: Any) -> None:
        if self.state is S.FAILED:
            raise InvalidState("delete_snapshot", expected=("stopped",), actual="failed")
        await super().delete_snapshot(name, **options)


@mutant("states.illegal")
class PinsTheFailed(BrokenMachine):
    """Takes an order to pin the vCPUs of a machine that has failed, and does nothing."""

    async def pin(self, *arguments: Any, **options: Any) -> None:
        if self.state is not S.FAILED:
            await super().pin(*arguments, **options)


@mutant("states.illegal", only=False)
class ResumesTheRunning(BrokenMachine):
    """Takes an order to resume a machine that runs, and does nothing."""

    async def resume(self, **options: Any) -> None:
        if self.state is not S.RUNNING:
            await super().resume(**options)


@mutant("lifecycle.round-trip")
class AnotherStatus(BrokenMachine):
    """Answers status with the name where the id belongs."""

    async def status(self, *, timeout: float | None = None) -> MachineStatus:
        return (await super().status(timeout=timeout)).model_copy(update={"id": self.name})


@mutant("lifecycle.round-trip", only=False)
class RunsWhenDead(BrokenMachine):
    """Says that a machine runs although it is dead."""

    async def status(self, *, timeout: float | None = None) -> MachineStatus:
        status = await super().status(timeout=timeout)
        dead = status.state in {S.STOPPED, S.FAILED}
        return status.model_copy(update={"state": S.RUNNING}) if dead else status


@mutant("lifecycle.restart")
class ResetsNothing(BrokenMachine):
    """Says that it has reset a machine, and has done nothing."""

    async def _do_reset(self, operation: Operation) -> None:
        await asyncio.sleep(0.1)


@mutant("lifecycle.disks-stay")
class KillsDisks(BrokenMachine):
    """Loses what was flushed to the last disk when a machine is killed."""

    async def _do_kill(self, operation: Operation) -> None:
        await super()._do_kill(operation)
        for disk in list(self.hardware.disks.values())[1:]:
            wipe(disk)


@mutant("stop.paused")
class CutsPaused(BrokenMachine):
    """Cuts the power of a paused machine that is to be shut down."""

    async def stop(self, *, graceful: bool = True, kill: bool = True, **options: Any) -> None:
        if graceful and kill and self.state is S.PAUSED:
            for disk in self.hardware.disks.values():
                disk.lose_power()
            graceful = False
        await super().stop(graceful=graceful, kill=kill, **options)


@mutant("stop.then-kill")
class Impatient(BrokenMachine):
    """Gives a guest a tenth of its time to shut down."""

    async def stop(self, *, kill: bool = True, timeout: float | None = None, **rest: Any) -> None:
        if kill and timeout is not None:
            timeout /= 10
        await super().stop(kill=kill, timeout=timeout, **rest)


@mutant("stop.without-kill")
class ForgetsThatItWasPaused(BrokenMachine):
    """Leaves a paused machine running that did not shut down in time."""

    async def stop(self, *, kill: bool = True, **options: Any) -> None:
        try:
            await super().stop(kill=kill, **options)
        except DeadlineExceeded:
            if self.state is S.PAUSED:
                await self.resume()
            raise


@mutant("stop.ungraceful")
class AsksAnyway(BrokenMachine):
    """Asks the guest to shut down although it was told not to."""

    async def stop(self, *, graceful: bool = True, **options: Any) -> None:
        await super().stop(graceful=True, **options)


@mutant("stop.kill-interrupts")
class KillWaits(BrokenMachine):
    """Lets a stop that is under way have its time before it kills."""

    async def kill(self, **options: Any) -> None:
        waited = self.state is S.STOPPING
        while self.state is S.STOPPING:  # noqa: ASYNC110  # waiting is what is wrong with it
            await asyncio.sleep(1)
        if not waited or self.state.is_live:
            await super().kill(**options)


@mutant("stop.by-guest")
class TakesShutdownForCrash(BrokenMachine):
    """Takes a guest that powers down by itself for one that crashed."""

    def noticed(self, event: EventType, state: MachineState | None, reason: str) -> None:
        super().noticed(event, S.FAILED if event is EventType.GUEST_SHUTDOWN else state, reason)


@mutant("crash.panic")
class PanicsTwice(BrokenMachine):
    """Tells twice that a guest panicked."""

    def noticed(self, event: EventType, state: MachineState | None, reason: str) -> None:
        if event is EventType.GUEST_PANIC:
            self._emit(event, reason=reason)
        super().noticed(event, state, reason)


@mutant("crash.idle")
class DiesWithoutReason(BrokenMachine):
    """Does not say why a machine died."""

    def noticed(self, event: EventType, state: MachineState | None, reason: str) -> None:
        super().noticed(event, state, "" if event is EventType.CRASHED else reason)


@mutant("crash.idle", only=False)
class NoticesNoDeath(BrokenMachine):
    """Learns that a machine died only when it is asked."""

    def noticed(self, event: EventType, state: MachineState | None, reason: str) -> None:
        if event is not EventType.CRASHED or self._current is not None:
            super().noticed(event, state, reason)


class _DiesForGood(BrokenMachine):
    under: ClassVar[str]
    dead_for_good = False

    def _happened(self, state: MachineState, event: EventType, reason: str) -> None:
        if self._current is not None and self._current.name == self.under and state is S.FAILED:
            self.dead_for_good = True
        super()._happened(state, event, reason)

    async def start(self, **options: Any) -> None:
        if self.dead_for_good:
            raise OperationFailed(f"it died under {self.under}", machine=self.name)
        await super().start(**options)


@mutant("crash.under-operation")
class DiesForGoodUnderRestore(_DiesForGood):
    """Cannot start a machine again that died while it was restored."""

    under = "restore"


@mutant("migration.crash")
class DiesForGoodUnderMigration(_DiesForGood):
    """Cannot start a machine again that died while it was moved."""

    under = "migrate"


@mutant("delete.idempotent")
class DeletesTwice(BrokenMachine):
    """Tells of each of several deletes of one machine."""

    async def delete(self, *, force: bool = False, timeout: float | None = None) -> None:
        await super().delete(force=force, timeout=timeout)
        if not force:
            self._emit(EventType.DELETED)


@mutant("delete.cancelled")
class HalfDeleted(BrokenMachine):
    """Cannot delete a machine again whose deletion was cancelled, but for a third time."""

    half = False

    async def delete(self, **options: Any) -> None:
        if self.half:
            self.half = False
            raise OperationFailed("half of it is gone", machine=self.name)
        try:
            await super().delete(**options)
        except asyncio.CancelledError:
            self.half = True
            raise


@mutant("delete.force")
class TakesOthersAlong(BrokenMachine):
    """Kills the other machines too when a paused one is deleted by force."""

    async def delete(self, *, force: bool = False, **options: Any) -> None:
        others = await self._hypervisor.list() if force and self.state is S.PAUSED else []
        await super().delete(force=force, **options)
        for other in others:
            with suppress(VmlabError):
                if other is not self and not self._hypervisor.closing:
                    await other.kill()


@mutant("delete.contents")
class InheritsLog(BrokenMachine):
    """Gives a new machine the console log of the one that had its name before."""

    logs: ClassVar[dict[tuple[int, str], dict[str, bytearray]]] = {}

    @property
    def _key(self) -> tuple[int, str]:
        return id(self._hypervisor), self.name

    async def _do_create(self, operation: Operation) -> None:
        await super()._do_create(operation)
        for name, text in self.logs.pop(self._key, {}).items():
            self.hardware.consoles[name][:0] = text

    async def _do_delete(self, operation: Operation) -> None:
        self.logs[self._key] = self.hardware.consoles
        await super()._do_delete(operation)


@mutant("cancel.operation")
class SwallowsCancel(BrokenMachine):
    """Goes on as if nothing was when the pinning of vCPUs is cancelled."""

    async def pin(self, *arguments: Any, **options: Any) -> None:
        with suppress(asyncio.CancelledError):
            await super().pin(*arguments, **options)


@mutant("cancel.operation", only=False)
class LeavesHalfSnapshot(BrokenMachine):
    """Keeps a snapshot whose making was cancelled."""

    async def snapshot(self, name: str, **options: Any) -> Any:
        try:
            return await super().snapshot(name, **options)
        except asyncio.CancelledError:
            await super().snapshot(name, **options)
            raise


@mutant("cancel.deadline")
class IgnoresDeadline(BrokenMachine):
    """Takes the time it wants to resume a machine."""

    async def resume(self, *, timeout: float | None = None) -> None:
        await super().resume()


@mutant("cancel.making")
class ReservesForEver(BrokenHypervisor):
    """Keeps the name of a machine whose creation was cancelled."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.taken: set[str] = set()

    async def create(self, spec: Any, **options: Any) -> Any:
        if getattr(spec, "name", None) in self.taken:
            raise OperationFailed(f"the name {spec.name!r} is still being made")
        try:
            return await super().create(spec, **options)
        except asyncio.CancelledError:
            self.taken.add(spec.name)
            raise


@mutant("concurrency.one-machine")
class JumpsTheQueue(BrokenMachine):
    """Lets a start wait while what was called later goes before it."""

    async def start(self, **options: Any) -> None:
        for _turn in range(5):
            await asyncio.sleep(0)
        await super().start(**options)


@mutant("concurrency.three")
class PausesIntoSnapshot(BrokenMachine):
    """Spoils the memory of a machine of which a snapshot is taken while another is paused."""

    async def _do_pause(self, operation: Operation) -> None:
        await super()._do_pause(operation)
        for other in self._hypervisor._machines.values():
            if other is not self and other.state is S.SNAPSHOTTING:
                other.hardware.ram.write(0, bytes(4096))


@mutant("concurrency.many")
class MixesUpMany(BrokenMachine):
    """Gives machines beyond the tenth the memory of another."""

    async def _do_start(self, operation: Operation) -> None:
        await super()._do_start(operation)
        live = [each for each in self._hypervisor._machines.values() if each.state is S.RUNNING]
        if len(live) > 10:
            self.hardware.ram = live[0].hardware.ram


@mutant("owner.isolation")
class FindsEverybodys(BrokenHypervisor):
    """Finds machines of other owners by their id."""

    everybody: ClassVar[dict[str, Any]] = {}

    def _add(self, machine: Any) -> None:
        super()._add(machine)
        self.everybody[machine.id] = machine

    def forget(self, machine: Any) -> None:
        super().forget(machine)
        self.everybody.pop(machine.id, None)

    async def get(self, name: str) -> Any:
        return self.everybody.get(name) or await super().get(name)


@mutant("owner.close")
class LeavesPaused(BrokenHypervisor):
    """Leaves paused machines alone when it is closed."""

    async def close(self) -> None:
        for machine in [each for each in self._machines.values() if each.state is S.PAUSED]:
            super().forget(machine)
        await super().close()


@mutant("owner.store")
class ForgetsItsStore(BrokenHypervisor):
    """Keeps the machines of a store in memory alone."""

    def __init__(self, owner: Owner, profile: SimulationProfile, **options: Any) -> None:
        super().__init__(owner, profile, **{**options, "store": None})


@mutant("pause.stands-still")
class TimePasses(BrokenMachine):
    """Lets a guest's time go on while the machine is paused."""

    async def _do_pause(self, operation: Operation) -> None:
        await super()._do_pause(operation)
        self.hardware.guest_time.run()


@mutant("together.alike")
class OrdersOtherwise(BrokenMachine):
    """Names the states that would allow a stop in another order than others do."""

    async def stop(self, **options: Any) -> None:
        try:
            await super().stop(**options)
        except InvalidState as error:
            error.expected = tuple(reversed(error.expected))
            raise
