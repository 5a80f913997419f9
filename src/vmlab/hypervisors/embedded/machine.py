"""A machine of the embedded engine: what its process is started with, and how it is changed.

Snapshots, forks and migration are not here; capabilities refuse them before anything is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, cast

from vmlab.hypervisors.base import DiskInfo, MachineInfo, NicInfo, NodeInfo, Progress, Snapshot
from vmlab.hypervisors.embedded import faults, images, readings
from vmlab.hypervisors.embedded.machine_file import (
    MACHINE_FILE,
    Launch,
    check,
    configuration,
)
from vmlab.hypervisors.monitored import disks, readback
from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.monitored.emulator import Emulator
from vmlab.hypervisors.monitored.hotplug import remove_device
from vmlab.hypervisors.monitored.machine import MonitoredMachine
from vmlab.hypervisors.monitored.names import disk_device, made_mac
from vmlab.hypervisors.monitored.networks import bridge_port, join_bridge
from vmlab.hypervisors.operated_machine import OperatedMachine
from vmlab.hypervisors.operation import Operation, uninterrupted
from vmlab.hypervisors.picture import Picture
from vmlab.hypervisors.processes import OwnedProcess
from vmlab.hypervisors.qmp import QmpError
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import UnsupportedOperation
from vmlab.machine.faults import Fault
from vmlab.machine.metrics import MachineMetrics
from vmlab.machine.spec import Disk, MachineSpec, Nic
from vmlab.machine.states import MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.embedded.hypervisor import EmbeddedHypervisor

MODULE: Final = "vmlab.engine"


class EngineProcess(Emulator):
    """A running engine; made by `start` or `adopt`."""

    program: ClassVar[str] = "the engine"
    hypervisor: ClassVar[str] = "embedded"
    messages: ClassVar[str] = "engine.log"


class EmbeddedMachine(MonitoredMachine[EngineProcess]):
    """A machine that the embedded engine runs."""

    emulator_class: ClassVar[type[EngineProcess]] = EngineProcess

    def __init__(
        self,
        hypervisor: EmbeddedHypervisor,
        id_: str,
        spec: MachineSpec,
        state: MachineState = MachineState.CREATED,
    ) -> None:
        super().__init__(hypervisor, id_, spec, state)

    # What it is started with.

    def check_launch(self) -> None:
        """Refuse what the engine's machines do not have, before anything is made."""
        check(self._spec)

    async def make_disk(self, disk: Disk, path: Path) -> DiskFile:
        """Make a disk of the machine's by the engine's own means."""
        return await disks.make_disk(disk, path, images.EngineImages(), "embedded")

    def disk_path(self, disk: str, number: int) -> Path:
        """The file of a disk."""
        return self.disk_directory / f"{disk}.{number}.img"

    @property
    def macs(self) -> dict[str, str]:
        """The address of each NIC: its own, or one out of the seed and the names."""
        found: dict[str, str] = {}
        for nic in self._spec.nics:
            found[nic.name] = nic.mac or made_mac(self._spec, nic.name, found.values())
        return found

    def _launch(self) -> Launch:
        return Launch(
            id=self.id,
            spec=self._spec,
            disks=tuple(self.disks.values()),
            macs=self.macs,
            logs=self.directory,
            owner=self.monitored.owner,
            debugger=self.embedded.debugger,
        )

    @property
    def embedded(self) -> EmbeddedHypervisor:
        """The hypervisor that it is of."""
        return cast("EmbeddedHypervisor", self.monitored)

    async def detach(self) -> None:
        """The machine's process has ended: let go of what led to it."""
        await super().detach()
        if self.embedded.debugger is not None:
            self.embedded.debugger.unlink(missing_ok=True)

    async def _do_start(self, operation: Operation) -> None:
        from vmlab.engine.configuration import text_of

        self.begin()
        self.cut.clear()
        text = text_of(configuration(self._launch()))
        number = self.next_launch()
        # The directory that it is started in is no place for modules of anybody's.
        line = [sys.executable, "-P", "-m", MODULE, MACHINE_FILE]
        emulator = await EngineProcess.start(
            line,
            self.launch_directory(number),
            owner=self.monitored.owner,
            machine=self.name,
            id_=self.id,
            on_event=self.watcher(number),
            files={MACHINE_FILE: text},
        )
        self.on_failure(lambda: self.discard(emulator))
        await self.attach(emulator)
        for nic in self._spec.nics:
            kind, _, name = nic.network.partition(":")
            if kind == "bridge":
                await join_bridge(bridge_port(self.monitored.owner, self.id, nic.name), name)
        if self.embedded.debugger is None:
            # Otherwise it is for the debugger to do.
            await self.let_run(emulator)

    def is_machine(self, argv: tuple[str, ...]) -> bool:
        """Whether a process of the machine's with that command line is the machine itself."""
        return MODULE in argv

    async def adopt_emulator(self, process: OwnedProcess, number: int) -> EngineProcess:
        """Talk to an engine that somebody else started."""
        return await EngineProcess.adopt(
            process,
            self.launch_directory(number),
            machine=self.name,
            on_event=self.watcher(number),
        )

    # Devices.

    async def _do_plug_disk(self, operation: Operation, disk: Disk) -> DiskInfo:
        self.begin()
        path = self.disk_path(disk.name, self.launches)
        self.on_failure(lambda: done_in_thread(_unlink, path))
        made = await self.make_disk(disk, path)
        bus = disk.bus
        if self.emulator is not None:
            emulator, bus = self.emulator, "scsi"
            self.on_failure(lambda: _take_back(emulator, made))
            await _add_disk(emulator, made)
        self.disks[disk.name] = made
        return _disk_info(made, bus)

    async def _do_unplug_disk(self, operation: Operation, disk: Disk) -> None:
        self.begin()
        made = self.disks[disk.name]
        if self.emulator is not None:
            found = {each.name: each.bus for each in await readback.disks(self.emulator)}
            if found[disk.name] != "scsi":
                raise UnsupportedOperation(
                    Capability.HOTPLUG_DISK.value,
                    hypervisor="embedded",
                    machine=self.name,
                    hint="disks on the bus virtio stay while the machine runs: put it on scsi",
                )
            await remove_device(self.emulator, disk_device(disk.name))
            await uninterrupted(_drop_node(self.emulator, made))
        del self.disks[disk.name]
        if made.made:
            await done_in_thread(_unlink, made.path)

    async def _do_resize_disk(self, operation: Operation, disk: Disk, size: int) -> DiskInfo:
        self.begin()
        made = self.growing_disk(disk.name)
        if self.emulator is not None:
            await self.emulator.execute("block_resize", {"node-name": made.node, "size": size})
        else:
            await done_in_thread(images.grow, made, size)
        self.disks[disk.name] = made.grown(size)
        return next(found for found in (await self._do_info()).disks if found.name == disk.name)

    async def _do_plug_nic(self, operation: Operation, nic: Nic) -> NicInfo:
        self.begin()
        self._need_rest(Capability.HOTPLUG_NIC)
        mac = nic.mac or made_mac(self._spec, nic.name, self.macs.values())
        return NicInfo(name=nic.name, network=nic.network, mac=mac, link=nic.network != "none")

    async def _do_unplug_nic(self, operation: Operation, nic: Nic) -> None:
        self.begin()
        self._need_rest(Capability.HOTPLUG_NIC)
        self.cut.discard(nic.name)

    async def _do_resize(self, operation: Operation, vcpus: int | None, memory: int | None) -> None:
        self.begin()
        self._need_rest(Capability.RESIZE)
        cpus, ram = self._spec.cpus, self._spec.memory
        if vcpus is not None:
            topology = {"count": vcpus, "sockets": None, "cores": None, "threads": None}
            cpus = cpus.model_copy(update=topology)
        if memory is not None:
            ram = ram.model_copy(update={"size": memory})
        changed = self._spec.model_copy(update={"cpus": cpus, "memory": ram})
        check(changed)
        # At rest a machine is its specification.
        self._spec = changed

    def _need_rest(self, capability: Capability) -> None:
        if self.emulator is not None:
            raise self._refusal(capability, "stop the machine first")

    async def break_device(
        self, emulator: EngineProcess, identity: str, fault: Fault
    ) -> Callable[[], Awaitable[None]] | None:
        """Break a disk, a wire, a hart, or all of it; what is returned mends it."""
        return await faults.break_device(emulator, self._spec, identity, fault)

    # What it is.

    async def _do_info(self) -> MachineInfo:
        emulator = self.emulator
        if emulator is None or not emulator.running:
            return self._info_at_rest()
        cpus = await readback.vcpus(emulator)
        order = list(self.disks)
        found = await readback.disks(emulator)
        memory = await readback.memory_size(emulator)
        consoles, channels = await readings.streams(emulator)
        return MachineInfo(
            id=self.id,
            name=await readback.name(emulator),
            architecture=await readback.architecture(emulator),
            vcpus=len(cpus),
            memory=memory,
            disks=tuple(sorted(found, key=lambda disk: order.index(disk.name))),
            nics=tuple(await readings.nics(emulator, self._spec.nics)),
            nodes=(NodeInfo(memory=memory, cpus=tuple(cpu.number for cpu in cpus)),),
            consoles=consoles,
            channels=channels,
            accelerator=await readings.executor(emulator),
            pid=emulator.process.pid,
            directory=self.directory,
            owner=str(self.monitored.owner),
            extra={"launch": str(emulator.directory)},
        )

    def _info_at_rest(self) -> MachineInfo:
        """What it will be made of when it is started: its files and its specification."""
        spec, macs = self._spec, self.macs
        everything = NodeInfo(memory=spec.memory.size, cpus=tuple(range(spec.cpus.count)))
        return MachineInfo(
            id=self.id,
            name=self.name,
            architecture=spec.architecture,
            vcpus=spec.cpus.count,
            memory=spec.memory.size,
            disks=tuple(_disk_info(disk, _bus(spec, disk.name)) for disk in self.disks.values()),
            nics=tuple(
                NicInfo(
                    name=nic.name,
                    network=nic.network,
                    mac=macs[nic.name],
                    link=nic.network != "none",
                )
                for nic in spec.nics
            ),
            nodes=(everything,),
            consoles=tuple(console.name for console in spec.consoles),
            channels=spec.channels,
            accelerator=configuration(self._launch()).execution.value,
            directory=self.directory,
            owner=str(self.monitored.owner),
        )

    async def _do_metrics(self) -> MachineMetrics:
        return await readings.metrics(self.need(), self.monitored.now())

    # What it cannot do.

    def _refusal(self, capability: Capability, hint: str | None = None) -> UnsupportedOperation:
        return UnsupportedOperation(
            capability.value, hypervisor="embedded", machine=self.name, hint=hint
        )

    async def _do_snapshots(self) -> list[Snapshot]:
        return []

    async def _do_snapshot(self, operation: Operation, name: str, memory: bool) -> Snapshot:
        raise self._refusal(Capability.SNAPSHOT)

    async def _do_delete_snapshot(self, operation: Operation, snapshot: Snapshot) -> None:
        raise self._refusal(Capability.SNAPSHOT)

    async def _do_restore(self, operation: Operation, snapshot: Snapshot) -> None:
        raise self._refusal(Capability.RESTORE)

    async def _do_create_from(self, operation: Operation, snapshot: Snapshot) -> None:
        raise self._refusal(Capability.RESTORE)

    async def _do_fork(self, operation: Operation, child: OperatedMachine) -> None:
        raise self._refusal(Capability.FORK)

    async def _do_migrate(
        self, operation: Operation, arrival: OperatedMachine, live: bool, progress: Progress
    ) -> None:
        raise self._refusal(Capability.LIVE_MIGRATION if live else Capability.COLD_MIGRATION)

    async def _do_hand_over(self, operation: Operation, arrival: OperatedMachine) -> None:
        raise self._refusal(Capability.COLD_MIGRATION)

    async def _do_pin(self, operation: Operation, pinning: Mapping[int, tuple[int, ...]]) -> None:
        raise self._refusal(Capability.PINNING)

    async def _do_screenshot(self) -> Picture:
        raise self._refusal(Capability.DISPLAY)

    async def _do_send_keys(self, keys: Sequence[tuple[str, ...]]) -> None:
        raise self._refusal(Capability.DISPLAY)


async def _add_disk(emulator: EngineProcess, disk: DiskFile) -> None:
    """Add a disk; nothing is left of one that is refused."""
    node = {
        "node-name": disk.node,
        "driver": disk.format,
        "read-only": disk.readonly,
        "file": {"driver": "file", "filename": str(disk.path)},
    }
    device = {"driver": "scsi-hd", "id": disk_device(disk.name), "drive": disk.node}
    await emulator.execute("blockdev-add", node)
    try:
        await emulator.execute("device_add", {**device, "serial": disk.serial_number})
    except QmpError:
        await uninterrupted(_drop_node(emulator, disk))
        raise


async def _drop_node(emulator: EngineProcess, disk: DiskFile) -> None:
    if emulator.running:
        await emulator.execute("blockdev-del", {"node-name": disk.node})


async def _take_back(emulator: EngineProcess, disk: DiskFile) -> None:
    """Remove a disk whose adding was interrupted, as far as it got."""
    if emulator.running:
        await remove_device(emulator, disk_device(disk.name))
        try:
            await _drop_node(emulator, disk)
        except QmpError as error:
            # It may not have come about; one that stays in use is another matter.
            if "in use" in error.message:
                raise


def _disk_info(disk: DiskFile, bus: str) -> DiskInfo:
    return DiskInfo(name=disk.name, size=disk.size, bus=bus, readonly=disk.readonly, path=disk.path)


def _bus(spec: MachineSpec, disk: str) -> str:
    specified = spec.disk(disk)
    return specified.bus if specified is not None else "virtio"


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
