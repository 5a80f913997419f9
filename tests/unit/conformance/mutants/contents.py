"""Hypervisors that lose or mix up contents: snapshots, forks, migration, changes of a machine."""

from __future__ import annotations

import asyncio
import os
from typing import Any, ClassVar

from mutants.base import BrokenHypervisor, BrokenMachine, mutant, wipe
from vmlab.hypervisors.base import DiskInfo, NicInfo, Snapshot
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.simulated.disk import SimulatedDisk
from vmlab.hypervisors.simulated.sparse import InPlace
from vmlab.machine.errors import DeadlineExceeded
from vmlab.machine.events import Event, EventType
from vmlab.machine.spec import Disk, Nic
from vmlab.machine.states import OPERATIONS, MachineState

S = MachineState


@mutant("snapshot.disks-return")
class ForgetsDisk(BrokenMachine):
    """Forgets the last disk when it restores a snapshot without memory."""

    async def _do_restore(self, operation: Operation, snapshot: Snapshot) -> None:
        kept = dict(self.hardware.disks)
        await super()._do_restore(operation, snapshot)
        if not snapshot.memory:
            last = list(self.hardware.disks)[-1]
            self.hardware.disks[last] = kept[last]


@mutant("snapshot.memory-returns")
class ForgetsMemoryOfStopped(BrokenMachine):
    """Restores a stopped machine without its memory."""

    async def _do_restore(self, operation: Operation, snapshot: Snapshot) -> None:
        stopped = not self.hardware.has_power
        await super()._do_restore(operation, snapshot)
        if stopped:
            self.hardware.ram.pages.clear()


@mutant("snapshot.memory-returns", only=False)
class ForgetsMemory(BrokenMachine):
    """Restores a machine without its memory."""

    async def _do_restore(self, operation: Operation, snapshot: Snapshot) -> None:
        await super()._do_restore(operation, snapshot)
        self.hardware.ram.pages.clear()


@mutant("snapshot.paused")
class TakesPausedForRunning(BrokenMachine):
    """Notes that a machine was running which was paused when the snapshot was taken."""

    async def snapshot(self, name: str, **options: Any) -> Snapshot:
        paused = self.state is S.PAUSED
        taken = await super().snapshot(name, **options)
        return taken.model_copy(update={"state": S.RUNNING}) if paused else taken


@mutant("snapshot.leaves-guest")
class SnapshotDropsCache(BrokenMachine):
    """Drops what the guest has not flushed when a snapshot is taken."""

    async def _do_snapshot(self, operation: Operation, name: str, memory: bool) -> Snapshot:
        taken = await super()._do_snapshot(operation, name, memory)
        for disk in self.hardware.disks.values():
            disk.lose_power()
        return taken


@mutant("snapshot.fresh-machine")
class SameAddress(BrokenMachine):
    """Gives a machine made of a snapshot the MAC addresses of the first one."""

    async def _do_create_from(self, operation: Operation, snapshot: Snapshot) -> None:
        await super()._do_create_from(operation, snapshot)
        first = self._hypervisor.world.machines[snapshot.machine]
        for name, nic in self.hardware.nics.items():
            nic.mac = first.nics[name].mac


@mutant("snapshot.list")
class NewestFirst(BrokenMachine):
    """Lists the newest snapshot first."""

    async def snapshots(self, *, timeout: float | None = None) -> list[Snapshot]:
        return (await super().snapshots(timeout=timeout))[::-1]


@mutant("snapshot.refusals")
class Overwrites(BrokenMachine):
    """Writes over a snapshot whose name is taken."""

    async def snapshot(self, name: str, **options: Any) -> Snapshot:
        allowed = self.state in OPERATIONS["snapshot"]
        if allowed and any(kept.name == name for kept in await self.snapshots()):
            await self.delete_snapshot(name)
        return await super().snapshot(name, **options)


@mutant("snapshot.corrupt")
class Trusts(BrokenMachine):
    """Restores a snapshot without a look at its checksum."""

    def _intact(self, hardware: Any, snapshot: Snapshot) -> Any:
        saved = hardware.snapshots[snapshot.name]
        saved.digest = saved.contents_digest()
        return super()._intact(hardware, snapshot.model_copy(update={"digest": saved.digest}))


@mutant("fork.copies")
class ForkDropsCache(BrokenMachine):
    """Forks a machine without what its guest has not flushed."""

    async def _do_fork(self, operation: Operation, child: Any) -> None:
        await super()._do_fork(operation, child)
        for disk in child.hardware.disks.values():
            disk.lose_power()


@mutant("fork.independent")
class SharesMemory(BrokenMachine):
    """Lets a machine and its fork write to the same memory."""

    async def _do_fork(self, operation: Operation, child: Any) -> None:
        await super()._do_fork(operation, child)
        child.hardware.ram = self.hardware.ram


@mutant("fork.identity")
class ForkKeepsName(BrokenMachine):
    """Leaves a fork's guest in the belief that it is the first machine."""

    async def _do_fork(self, operation: Operation, child: Any) -> None:
        await super()._do_fork(operation, child)
        child.hardware.guest.state.hostname = self.name


@mutant("fork.identity", only=False)
class SameEntropy(BrokenMachine):
    """Gives all machines the same random numbers."""

    async def _do_fork(self, operation: Operation, child: Any) -> None:
        await super()._do_fork(operation, child)
        self.hardware.entropy = child.hardware.entropy = lambda length: b"4" * length


@mutant("migration.live")
class ArrivesEmpty(BrokenMachine):
    """Moves a running machine without its memory."""

    async def _do_migrate(self, operation: Operation, arrival: Any, live: bool, told: Any) -> None:
        await super()._do_migrate(operation, arrival, live, told)
        arrival.hardware.ram.pages.clear()


@mutant("migration.cold")
class ArrivesWithoutDisks(BrokenMachine):
    """Moves a machine at rest with empty disks."""

    async def _do_migrate(self, operation: Operation, arrival: Any, live: bool, told: Any) -> None:
        await super()._do_migrate(operation, arrival, live, told)
        for disk in arrival.hardware.disks.values() if not live else ():
            wipe(disk)


@mutant("migration.progress")
class NeverArrivesQuite(BrokenMachine):
    """Does not tell that all of a machine has been sent."""

    async def _do_migrate(self, operation: Operation, arrival: Any, live: bool, told: Any) -> None:
        def most(sent: int, total: int) -> None:
            if sent < total:
                told(sent, total)

        await super()._do_migrate(operation, arrival, live, most)


@mutant("migration.interrupted")
class LeavesNameThere(BrokenMachine):
    """Leaves the name of a machine at the target whose migration was cancelled."""

    async def migrate(self, target: Any, **options: Any) -> Any:
        try:
            return await super().migrate(target, **options)
        except (asyncio.CancelledError, DeadlineExceeded):
            target._names[self.name] = self
            raise


@mutant("migration.interrupted")
class ArrivesHoweverLate(BrokenMachine):
    """Moves a machine however long that takes."""

    async def migrate(self, target: Any, *, timeout: float | None = None, **options: Any) -> Any:
        return await super().migrate(target, **options)


@mutant("migration.refused")
class MovesAnyway(BrokenMachine):
    """Moves a running machine although it was asked to move it at rest."""

    async def migrate(self, target: Any, *, live: bool | None = None, **options: Any) -> Any:
        return await super().migrate(target, **options)


@mutant("change.hotplug-disk")
class OldContents(BrokenMachine):
    """Gives a new disk the contents of the last one of its name."""

    async def _do_unplug_disk(self, operation: Operation, disk: Disk) -> None:
        self.old = {**getattr(self, "old", {}), disk.name: self.hardware.disks[disk.name]}
        await super()._do_unplug_disk(operation, disk)

    async def _do_plug_disk(self, operation: Operation, disk: Disk) -> DiskInfo:
        plugged = await super()._do_plug_disk(operation, disk)
        if disk.name in getattr(self, "old", {}):
            self.hardware.disks[disk.name] = self.old[disk.name]
        return plugged


@mutant("change.hotplug-disk", only=False)
class PlugsNothing(BrokenMachine):
    """Reports a hot-plug that the guest never saw."""

    async def _do_plug_disk(self, operation: Operation, disk: Disk) -> DiskInfo:
        return DiskInfo(name=disk.name, size=disk.size or 0, bus=disk.bus)


@mutant("change.hotplug-nic")
class AnotherAddress(BrokenMachine):
    """Answers a hot-plug of a NIC with an address that the guest does not have."""

    async def plug_nic(self, nic: Nic, **options: Any) -> NicInfo:
        plugged = await super().plug_nic(nic, **options)
        return plugged.model_copy(update={"mac": "52:54:00:00:00:01"})


@mutant("change.hotplug-vcpu")
class OneTooFew(BrokenMachine):
    """Adds one vCPU less than was asked for to a running machine."""

    async def _do_resize(self, operation: Operation, vcpus: int | None, memory: int | None) -> None:
        if self.hardware.has_power and vcpus is not None and vcpus > self.hardware.vcpus:
            vcpus -= 1
        await super()._do_resize(operation, vcpus, memory)


@mutant("change.hotplug-memory")
class MemoryGrowsEmpty(BrokenMachine):
    """Loses what was in memory when some is added."""

    async def _do_resize(self, operation: Operation, vcpus: int | None, memory: int | None) -> None:
        await super()._do_resize(operation, vcpus, memory)
        if memory is not None and self.hardware.has_power:
            self.hardware.ram.pages.clear()


@mutant("change.resize-at-rest")
class NeverShrinks(BrokenMachine):
    """Does not take memory from a machine at rest."""

    async def _do_resize(self, operation: Operation, vcpus: int | None, memory: int | None) -> None:
        less = memory is not None and memory < self.hardware.ram.size
        await super()._do_resize(operation, vcpus, None if less else memory)


@mutant("change.resize-disk")
class GrowsEmpty(BrokenMachine):
    """Empties a disk that grows while its machine is at rest."""

    async def _do_resize_disk(self, operation: Operation, disk: Disk, size: int) -> DiskInfo:
        grown = await super()._do_resize_disk(operation, disk, size)
        if not self.hardware.has_power:
            wipe(self.hardware.disks[disk.name])
        return grown


@mutant("change.disk-in-place")
class LeavesFileAlone(BrokenMachine):
    """Uses a copy of the file that a disk is to be."""

    async def _do_create(self, operation: Operation) -> None:
        await super()._do_create(operation)
        for name, disk in self.hardware.disks.items():
            if isinstance(disk.stable, InPlace):
                self.hardware.disks[name] = SimulatedDisk(name, disk.stable.copy())


@mutant("change.at-rest")
class LosesPlugged(BrokenMachine):
    """Starts a machine without the disks that were added at rest."""

    async def _do_plug_disk(self, operation: Operation, disk: Disk) -> DiskInfo:
        if not self.hardware.has_power:
            self.added = {*getattr(self, "added", ()), disk.name}
        return await super()._do_plug_disk(operation, disk)

    async def _do_start(self, operation: Operation) -> None:
        for name in getattr(self, "added", ()):
            self.hardware.disks.pop(name, None)
        await super()._do_start(operation)


@mutant("change.events")
class TellsNoSize(BrokenHypervisor):
    """Tells that a disk was resized, but not the size that it has now."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        emit = self.log.emit

        def vague(type_: EventType, **facts: Any) -> Event:
            if type_ is EventType.DISK_RESIZED:
                facts["size"] = 0
            return emit(type_, **facts)

        self.log.emit = vague


@mutant("deterministic.same-seed")
class TrulyRandom(BrokenMachine):
    """Gives guests random numbers that no seed brings again."""

    async def _do_create(self, operation: Operation) -> None:
        await super()._do_create(operation)
        self.hardware.entropy = os.urandom


@mutant("deterministic.same-seed", only=False)
class Jitters(BrokenHypervisor):
    """Takes times that no seed brings again."""

    count: ClassVar[int] = 0

    async def conduct(self, *arguments: Any, **options: Any) -> Any:
        Jitters.count += 1
        await asyncio.sleep(Jitters.count * 0.001)
        return await super().conduct(*arguments, **options)
