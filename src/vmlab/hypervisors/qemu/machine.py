"""What is done with a machine beyond running it: save, restore, fork, migrate, change, look."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vmlab.hypervisors.base import DiskInfo, MachineInfo, NicInfo, NodeInfo, Progress, Snapshot
from vmlab.hypervisors.monitored import readback
from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.monitored.names import disk_device, made_mac, nic_device
from vmlab.hypervisors.operated_machine import OperatedMachine
from vmlab.hypervisors.operation import UNDO_TIMEOUT, Operation
from vmlab.hypervisors.qemu import arrival as arriving
from vmlab.hypervisors.qemu import (
    breakable,
    faults,
    growth,
    hotplug,
    memory,
    migration,
    parcels,
    snapshots,
    timers,
    virtiofs,
)
from vmlab.hypervisors.qemu import readback as qemu_readback
from vmlab.hypervisors.qemu.disks import grow_image
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qemu.layout import Layout, effective_bus
from vmlab.hypervisors.qemu.live import LiveMachine
from vmlab.hypervisors.qemu.networks import backend
from vmlab.hypervisors.qemu.wires import Wires
from vmlab.hypervisors.threads import done_in_thread, in_thread
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import (
    CorruptSnapshot,
    InvalidState,
    OperationFailed,
    UnsupportedOperation,
)
from vmlab.machine.faults import At, DiskError, Fault, NetDelay, NetLoss, PowerCut
from vmlab.machine.metrics import MachineMetrics
from vmlab.machine.spec import Disk, MachineSpec, Nic
from vmlab.machine.states import OPERATIONS, MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.qemu.hypervisor import QemuHypervisor

Step = Callable[[], Awaitable[None]]


class QemuMachine(LiveMachine):
    """A machine that QEMU runs."""

    def __init__(
        self,
        hypervisor: QemuHypervisor,
        id_: str,
        spec: MachineSpec,
        state: MachineState = MachineState.CREATED,
    ) -> None:
        super().__init__(hypervisor, id_, spec, state)
        self._wires: Wires | None = None

    # Standing still for a moment.

    async def hold(self, emulator: Emulator) -> Step:
        """Stop the vCPUs for a while; returns what lets them run on, if they ran.

        Until that was called, a failure of the operation lets them run on as well.
        """
        if not (await emulator.execute("query-status"))["running"]:
            return _nothing

        async def resume() -> None:
            if resume in self._steps:
                self._steps.remove(resume)
            if emulator.running and self.emulator is emulator:
                await emulator.execute("cont")

        self.on_failure(resume)
        await emulator.execute("stop")
        return resume

    # Snapshots.

    async def _do_snapshots(self) -> list[Snapshot]:
        return await done_in_thread(snapshots.all_in, self.snapshot_directory)

    def _require_loading(self, capability: Capability, hint: str) -> None:
        """Refuse what another process would have to load, where guests do not survive that."""
        accelerator = self._spec.accelerator or self.qemu.accelerator(self._spec.architecture)
        if not self.qemu.loads(self._spec.architecture, accelerator):
            raise UnsupportedOperation(
                capability.value,
                hypervisor="qemu",
                machine=self.name,
                hint=f"{timers.WHY_NOT}: {hint}",
            )

    async def _require_savable(self, capability: Capability, hint: str) -> None:
        """Refuse to save or send the state of devices that have some which QEMU cannot save.

        Raises:
            UnsupportedOperation: a share is served by virtiofs.
            OperationFailed: the guest has a share mounted by 9p.
        """
        if tags := self.layout.virtiofs:
            kept = f"{virtiofs.WHY_UNSAVED} ({', '.join(map(repr, tags))})"
            raise UnsupportedOperation(
                capability.value,
                hypervisor="qemu",
                machine=self.name,
                hint=f'{kept}: give it the kind "9p" and unmount it first, or {hint}',
            )
        if self.emulator is not None:
            found = await self.emulator.execute("query-migrate")
            if reasons := found.get("blocked-reasons"):
                raise OperationFailed(
                    f"the state of machine {self.name!r} cannot be saved: {'; '.join(reasons)}",
                    hint=f"unmount the shares in the guest first, or {hint}",
                    machine=self.name,
                    hypervisor="qemu",
                )

    async def _do_snapshot(self, operation: Operation, name: str, memory_too: bool) -> Snapshot:
        self.begin()
        if memory_too:
            self._require_loading(Capability.MEMORY_SNAPSHOT, "take it with memory=False")
            await self._require_savable(Capability.MEMORY_SNAPSHOT, "take it with memory=False")
        part = self.snapshot_directory / f".{name}.part"
        self.on_failure(lambda: done_in_thread(snapshots.remove, part))
        await done_in_thread(part.mkdir)
        whole = False
        emulator = self.emulator
        resume = await self.hold(emulator) if emulator is not None else _nothing
        if emulator is not None and memory_too:
            captured = await memory.capture(emulator, part, self.blocks)
            whole = captured.whole
            await in_thread(lambda check: _copy_memory(captured, part, check))
        disks = await in_thread(
            lambda check: snapshots.copy_disks(
                tuple(self.disks.values()), lambda disk: part / f"disk-{disk.name}.qcow2", check
            )
        )
        await resume()
        snapshot = await in_thread(
            lambda check: snapshots.describe(
                part,
                name=name,
                machine=self.id,
                spec=self._spec,
                state=operation.before,
                memory=memory_too,
                time=self.qemu.now(),
                layout=self.layout,
                disks=disks,
                whole=whole,
                check=check,
            )
        )
        directory = self.snapshot_directory / name
        await done_in_thread(part.rename, directory)
        return snapshot.model_copy(update={"directory": directory})

    async def _do_delete_snapshot(self, operation: Operation, snapshot: Snapshot) -> None:
        self.begin()
        # Out of sight first, so that one that is half removed is none.
        gone = self.snapshot_directory / f".{snapshot.name}.gone"
        await done_in_thread((self.snapshot_directory / snapshot.name).rename, gone)
        await operation.conclude(done_in_thread(snapshots.remove, gone), grace=UNDO_TIMEOUT)

    async def serve_debugger(self, socket: Path) -> None:
        """Let a debugger connect to the machine at a Unix socket, while it lives.

        Raises:
            OperationFailed: QEMU does not listen there.
        """
        line = f"gdbserver unix:{socket},server=on,wait=off"
        said = await self.need().execute("human-monitor-command", {"command-line": line})
        if not await done_in_thread(socket.exists):
            raise OperationFailed(
                f"no debugger can connect at {socket}: {str(said).strip()}",
                machine=self.name,
                hypervisor="qemu",
            )

    async def export_snapshot(self, name: str, target: Path) -> None:
        """Pack a snapshot into one file, which outlives the machine and its owner.

        Raises:
            SnapshotNotFound: there is none of that name.
            OSError: `target` exists or cannot be written.
        """
        saved = await done_in_thread(snapshots.load, self.snapshot_directory / name)
        await in_thread(lambda check: parcels.pack(saved.directory, target, check))

    async def _verified(self, directory: Path) -> snapshots.Saved:
        """The snapshot in `directory`, all of it as it was written."""
        saved = await done_in_thread(snapshots.load, directory)
        await in_thread(saved.verify)
        return saved

    async def _do_restore(self, operation: Operation, snapshot: Snapshot) -> None:
        self.begin()
        saved = await self._verified(self.snapshot_directory / snapshot.name)
        number, old = self.launches + 1, self.emulator

        def place(disk: DiskFile) -> Path:
            return self.disk_path(disk.name, number)

        self.on_failure(lambda: done_in_thread(_unlink_all, map(place, saved.disks)))
        disks = await in_thread(lambda check: snapshots.copy_disks(saved.disks, place, check))
        if not snapshot.memory:
            self.launches += 1
            await operation.conclude(self._take_over(saved, disks, None), grace=UNDO_TIMEOUT)
            return
        if old is not None and _claims_host(self._spec):
            # Both processes cannot have the same ports and taps of the host.
            await self.discard(old)
        # Its own from now on, and as good as fresh: forks and snapshots can take it as it is.
        frozen = await memory.copied(saved.memory, seal=False)
        try:
            emulator = await self.launch(
                spec=saved.snapshot.spec,
                disks=tuple(disks),
                layout=saved.layout,
                memory=frozen.paths,
                incoming=True,
            )
            await memory.load_stream(emulator, saved.stream, whole=saved.whole)
        finally:
            frozen.close()
        await operation.conclude(self._take_over(saved, disks, emulator), grace=UNDO_TIMEOUT)

    async def _take_over(
        self, saved: snapshots.Saved, disks: list[DiskFile], emulator: Emulator | None
    ) -> None:
        """Be what was saved: with its disks, and with the process that has its memory."""
        self.begin()
        if self.emulator is not None:
            old = self.emulator
            await old.end()
            await self.detach()
        replaced = [disk.path for disk in self.disks.values() if disk.made]
        self._spec = saved.snapshot.spec
        self.layout = saved.layout
        self.disks = {disk.name: disk for disk in disks}
        self.cut.clear()
        self.save()
        await done_in_thread(_unlink_all, replaced)
        if emulator is not None:
            self.on_failure(lambda: self.discard(emulator))
            await self._wake(emulator, saved.snapshot.state)

    async def _wake(self, emulator: Emulator, state: MachineState) -> None:
        """Make a process that has its state the machine's, and let it run if it is to."""
        await timers.rearm(emulator, self._spec.architecture)
        await self.attach(emulator)
        await self.connect_networks(emulator)
        await self.apply_pinning(self._spec.cpus.pinning)
        if state is MachineState.RUNNING:
            await self.let_run(emulator)

    async def _do_create_from(self, operation: Operation, snapshot: Snapshot) -> None:
        self.begin()
        origin = self.qemu.records.directory(snapshot.machine) / "snapshots" / snapshot.name
        if snapshot.directory is not None and not await done_in_thread(origin.exists):
            # Of another owner's machine, or of one that is gone.
            origin = snapshot.directory
        saved = await self._verified(origin)
        if saved.snapshot.digest != snapshot.digest:
            raise CorruptSnapshot(
                f"snapshot {snapshot.name!r} is another one now",
                hint="ask for the snapshots anew",
                machine=self.name,
                hypervisor="qemu",
                operation="create_from",
            )
        await self._make_copy(saved.layout, saved.disks)
        if not snapshot.memory:
            self.recorded = True
            self.save()
            return
        stream = self.directory / memory.STREAM
        await done_in_thread(
            arriving.rename_macs, saved.stream, stream, saved.layout.macs, self.layout.macs
        )
        frozen = await self.qemu.frozen(saved)
        if not saved.whole:
            self.blocks = await memory.blocks_in(stream, self._spec.architecture)
        await self._wake_copy(frozen, stream, saved.whole, snapshot.state)

    # Copies.

    async def _make_copy(self, layout: Layout, disks: tuple[DiskFile, ...]) -> None:
        """Make the files of a machine that is a copy of another one."""
        self.on_failure(self.remove_directory)
        await done_in_thread(self.make_directories)
        copies = await in_thread(
            lambda check: snapshots.copy_disks(
                disks, lambda disk: self.disk_path(disk.name, 0), check
            )
        )
        self.disks = {disk.name: disk for disk in copies}
        taken = set(layout.macs.values())
        macs = {nic: made_mac(self._spec, nic, taken) for nic in layout.macs}
        self.layout = layout.with_macs(macs)

    async def _wake_copy(
        self, frozen: memory.Frozen, stream: Path, whole: bool, state: MachineState
    ) -> None:
        """Start the process of a copy, out of memory and a stream."""
        emulator = await self.launch(memory=frozen.paths, private=not whole, incoming=True)
        await memory.load_stream(emulator, stream, whole=whole)
        await done_in_thread(stream.unlink)
        await self._wake(emulator, state)
        self.recorded = True
        self.save()

    async def _do_fork(self, operation: Operation, child: OperatedMachine) -> None:
        assert isinstance(child, QemuMachine)
        self.begin()
        self._require_loading(Capability.FORK, "make a machine out of a snapshot of its disks")
        await self._require_savable(
            Capability.FORK, "make a machine out of a snapshot of its disks"
        )
        child.begin()
        emulator = self.need()
        resume = await self.hold(emulator)
        try:
            if self._template is None:
                self._template = await memory.freeze(
                    emulator, self.directory, self.blocks, self._spec.architecture
                )
            template = self._template
            await child._make_copy(self.layout, tuple(self.disks.values()))
            child.cut = set(self.cut)
            stream = child.directory / memory.STREAM
            renamed = partial(arriving.rename_macs, begin=template.before_devices)
            await done_in_thread(
                renamed, template.stream, stream, self.layout.macs, child.layout.macs
            )
            await resume()
            child.blocks = template.blocks
            await child._wake_copy(template.memory, stream, template.whole, operation.before)
        finally:
            if resume is not _nothing:
                # It runs on: the next fork is of another moment.
                self.drop_template()

    # Migration.

    async def _do_migrate(
        self, operation: Operation, arrival: OperatedMachine, live: bool, progress: Progress
    ) -> None:
        assert isinstance(arrival, QemuMachine)
        self.begin()
        if live:
            self._refuse_breakable(Capability.LIVE_MIGRATION, *self.disks.values())
            self._require_loading(Capability.LIVE_MIGRATION, "stop it first")
            await self._require_savable(Capability.LIVE_MIGRATION, "stop it first")
        arrival.begin()
        arrival.on_failure(arrival.remove_directory)
        late = await in_thread(lambda check: arriving.move_files(self, arrival, check))
        if live:
            await self._send_to(operation, arrival, late, progress)
        else:
            await in_thread(lambda check: arriving.copy_late(late, check))
            size = sum(disk.size for disk in self.disks.values())
            progress(size, size)
        arrival.recorded = True
        arrival.save()

    async def _send_to(
        self,
        operation: Operation,
        arrival: QemuMachine,
        late: dict[Path, Path],
        progress: Progress,
    ) -> None:
        """Send memory and vCPUs to a process of the arrival's, which stands still."""
        emulator = self.need()
        self.drop_template()

        async def stay() -> None:
            await migration.cancel(emulator)
            if emulator.running and operation.before is MachineState.RUNNING:
                await emulator.execute("cont")

        self.on_failure(stay)
        target = await arrival.launch(incoming=True)
        uri = await migration.listen(target)
        if await qemu_readback.accelerator(emulator) == "tcg":
            # What its vCPUs write while memory is sent is lost now and then (decision 0058).
            await emulator.execute("stop")
        with target.qmp.listen("MIGRATION", match=memory.is_final) as arrived:
            await migration.send(
                emulator,
                uri,
                progress=progress,
                at_switchover=(lambda: in_thread(lambda check: arriving.copy_late(late, check)))
                if late
                else None,
            )
            await memory.until_arrived(target, arrived)
        await timers.rearm(target, arrival.spec.architecture)
        await arrival.attach(target)
        await arrival.connect_networks(target)
        await arrival.apply_pinning(arrival.spec.cpus.pinning)

    async def _do_hand_over(self, operation: Operation, arrival: OperatedMachine) -> None:
        assert isinstance(arrival, QemuMachine)
        if self.emulator is not None:
            await self.discard(self.emulator)
        if arrival.emulator is not None and operation.before is MachineState.RUNNING:
            await arrival.let_run(arrival.emulator)
        for line in self._lines.values():
            line.end()
        await self.remove_directory()
        arrival.begin()
        self.begin()

    # Devices.

    async def _do_plug_disk(self, operation: Operation, disk: Disk) -> DiskInfo:
        self.begin()
        self.drop_template()
        path = self.disk_path(disk.name, self.launches)
        self.on_failure(lambda: done_in_thread(_unlink_all, (path,)))
        made = await self.make_disk(disk, path)
        if self.emulator is not None:
            self._refuse_breakable(Capability.HOTPLUG_DISK, made)
        bus = effective_bus(disk, self.board, live=self.emulator is not None)
        if self.emulator is not None:
            emulator = self.emulator
            layout = self.layout.with_disk(disk.name, bus)
            self.on_failure(lambda: hotplug.take_back(emulator, made))
            await hotplug.add_disk(emulator, layout, self.board, made)
            self.layout = layout
        self.disks[disk.name] = made
        return DiskInfo(
            name=disk.name, size=made.size, bus=bus, readonly=made.readonly, path=made.path
        )

    async def _do_unplug_disk(self, operation: Operation, disk: Disk) -> None:
        self.begin()
        self.drop_template()
        made = self.disks[disk.name]
        if self.emulator is not None:
            self._refuse_breakable(Capability.HOTPLUG_DISK, made)
            if self.board.hotplug == "scsi" and self.layout.buses[disk.name] != "scsi":
                raise self._unpluggable(Capability.HOTPLUG_DISK, "put it on the bus scsi")
            if self.layout.buses[disk.name] != "scsi":
                self._refuse_paused(operation)
            await hotplug.remove_disk(self.emulator, made)
        self.layout = self.layout.without(disk_device(disk.name))
        del self.disks[disk.name]
        if made.made:
            await done_in_thread(_unlink_all, (made.path,))

    def _refuse_breakable(self, capability: Capability, *disks: DiskFile) -> None:
        """Refuse what cannot be done with a disk that another process serves."""
        if names := [disk.name for disk in disks if disk.breakable]:
            raise UnsupportedOperation(
                capability.value,
                hypervisor="qemu",
                machine=self.name,
                hint=f"stop the machine first: {', '.join(names)} is breakable, and stays as it "
                "is while the machine runs",
            )

    def _refuse_paused(
        self, operation: Operation, why: str = "its guest has to let go of the device"
    ) -> None:
        """Refuse what a guest has to agree to and cannot, because it stands still."""
        if operation.before is MachineState.PAUSED:
            fitting = OPERATIONS[operation.name] - {MachineState.PAUSED}
            raise InvalidState(
                operation.name,
                expected=tuple(sorted(state.value for state in fitting)),
                actual=MachineState.PAUSED.value,
                machine=self.name,
                hypervisor="qemu",
                hint=f"resume it first: {why}",
            )

    def _unpluggable(self, capability: Capability, hint: str) -> UnsupportedOperation:
        return UnsupportedOperation(
            capability.value,
            hypervisor="qemu",
            machine=self.name,
            hint=f"{self._spec.architecture.value} guests have no PCI hot-plug: {hint}",
        )

    async def _do_resize_disk(self, operation: Operation, disk: Disk, size: int) -> DiskInfo:
        self.begin()
        made = self.growing_disk(disk.name)
        if self.emulator is not None:
            self._refuse_breakable(Capability.RESIZE_DISK, made)
            self.drop_template()
            await self.emulator.execute("block_resize", {"node-name": made.node, "size": size})
        else:
            await grow_image(made, size)
        self.disks[disk.name] = made.grown(size)
        return next(found for found in (await self._do_info()).disks if found.name == disk.name)

    async def _do_plug_nic(self, operation: Operation, nic: Nic) -> NicInfo:
        self.begin()
        self.drop_template()
        mac = nic.mac or made_mac(self._spec, nic.name, self.layout.macs.values())
        if self.emulator is None:
            self.layout = self.layout.with_nic(nic.name, mac)
            return NicInfo(name=nic.name, network=nic.network, mac=mac, link=nic.network != "none")
        if self.board.hotplug == "scsi":
            raise self._unpluggable(Capability.HOTPLUG_NIC, "stop the machine first")
        layout, emulator = self.layout.with_nic(nic.name, mac), self.emulator
        netdev = backend(nic, self.qemu.owner, self.id)
        self.on_failure(lambda: hotplug.take_back_nic(emulator, nic.name))
        await hotplug.add_nic(emulator, layout, self.board, nic.name, netdev)
        await self.connect_network(emulator, nic.name, nic.network)
        found = await qemu_readback.nics(emulator, (nic,), lambda _: nic.network != "none")
        self.layout = layout
        return found[0]

    async def _do_unplug_nic(self, operation: Operation, nic: Nic) -> None:
        self.begin()
        self.drop_template()
        if self.emulator is not None:
            if self.board.hotplug == "scsi":
                raise self._unpluggable(Capability.HOTPLUG_NIC, "stop the machine first")
            self._refuse_paused(operation)
            if self.traffic is not None:
                await self.traffic.forget(self.emulator, nic.name)
            await hotplug.remove_nic(self.emulator, nic.name)
        self.layout = self.layout.without(nic_device(nic.name))
        self.cut.discard(nic.name)

    async def _do_resize(self, operation: Operation, vcpus: int | None, memory: int | None) -> None:
        self.begin()
        if self.emulator is not None:
            return await self._grow(operation, self.emulator, vcpus, memory)
        cpus, ram = self._spec.cpus, self._spec.memory
        if vcpus is not None:
            topology = {"count": vcpus, "sockets": None, "cores": None, "threads": None}
            cpus = cpus.model_copy(update=topology)
        if memory is not None:
            ram = ram.model_copy(update={"size": memory})
        # At rest a machine is its specification.
        self._spec = self._spec.model_copy(update={"cpus": cpus, "memory": ram})
        return None

    async def _grow(
        self, operation: Operation, emulator: Emulator, vcpus: int | None, memory: int | None
    ) -> None:
        """Add vCPUs and memory under a guest that runs."""
        if not self.board.grows:
            missing = Capability.HOTPLUG_VCPU if vcpus is not None else Capability.HOTPLUG_MEMORY
            raise UnsupportedOperation(
                missing.value,
                hypervisor="qemu",
                machine=self.name,
                operation=operation.name,
                hint=f"{self._spec.architecture.value} guests are resized at rest: stop it first",
            )
        self._refuse_paused(operation, "its guest has to take part")
        self.drop_template()
        if vcpus is not None:
            await self._add_vcpus(emulator, vcpus)
        if memory is not None and memory != self._spec.memory.size:
            await self._add_memory(emulator, memory)

    async def _add_vcpus(self, emulator: Emulator, vcpus: int) -> None:
        came = list(self.layout.vcpus)
        at_start = self._spec.cpus.count - len(came)
        try:
            await growth.add_vcpus(emulator, vcpus, came)
        finally:
            # Also as far as it got.
            self.layout = self.layout.with_vcpus(came)
            cpus = self._spec.cpus.model_copy(update={"count": at_start + len(came)})
            self._spec = self._spec.model_copy(update={"cpus": cpus})
        await self.apply_pinning(self._spec.cpus.pinning)

    async def _add_memory(self, emulator: Emulator, memory: int) -> None:
        before = self._spec.memory
        if memory < before.size:
            raise OperationFailed(
                f"the memory of machine {self.name!r} cannot shrink while it runs",
                hint="stop it first, or inject the fault memory-pressure, which balloons",
                machine=self.name,
                hypervisor="qemu",
                operation="resize",
            )
        number = max(1, len(before.nodes)) + len(self.layout.modules)
        grown = self.layout.with_module(memory - before.size)
        after = self._spec.model_copy(update={"memory": before.model_copy(update={"size": memory})})
        # The small blocks of a template do not tell of it.
        self.blocks = None

        async def take_back() -> None:
            if not await growth.take_memory_back(emulator, number):
                self.layout, self._spec = grown, after

        self.on_failure(take_back)
        await growth.add_memory(emulator, number, memory - before.size)
        self._steps.remove(take_back)
        self.layout, self._spec = grown, after

    async def _do_pin(self, operation: Operation, pinning: Mapping[int, tuple[int, ...]]) -> None:
        self.begin()
        if self.emulator is not None:
            before = self._spec.cpus.pinning
            self.on_failure(lambda: self.apply_pinning(before))
            await self.apply_pinning(pinning)

    async def break_device(
        self, emulator: Emulator, identity: str, fault: Fault
    ) -> Callable[[], Awaitable[None]] | None:
        """Break a disk or a wire, or take the power of all disks; what is returned mends it."""
        if isinstance(fault, NetLoss | NetDelay):
            if self._wires is None or self._wires.emulator is not emulator:
                self._wires = Wires(emulator, self.qemu.owner, self.id)
            return await self._wires.strike(self._spec, identity, fault)
        disk = None if isinstance(fault, PowerCut) else self.disks[getattr(fault, "disk", "")]
        if not isinstance(fault, DiskError) or not isinstance(fault.when, At):
            breakable.check(self._spec, self.disks.values(), fault)
        if disk is None or disk.breakable:
            return await breakable.break_disk(emulator.directory, self._spec, disk, identity, fault)
        assert isinstance(fault, DiskError), "others were refused"
        return await faults.fail_disk(emulator, disk, self.layout.buses[fault.disk], fault)

    # What it is.

    async def _do_info(self) -> MachineInfo:
        emulator = self.emulator
        if emulator is None or not emulator.running:
            return self._info_at_rest()
        cpus = await readback.vcpus(emulator)
        order = list(self.disks)
        disks = [
            # Its process knows of a breakable one only who serves it.
            disk.model_copy(update={"path": self.disks[disk.name].path})
            for disk in await readback.disks(emulator)
        ]
        spec = self._spec
        return MachineInfo(
            id=self.id,
            name=await readback.name(emulator),
            architecture=await readback.architecture(emulator),
            vcpus=len(cpus),
            memory=await readback.memory_size(emulator),
            disks=tuple(sorted(disks, key=lambda disk: order.index(disk.name))),
            nics=tuple(await qemu_readback.nics(emulator, spec.nics, self._linked)),
            nodes=tuple(await qemu_readback.nodes(emulator, cpus, len(self.layout.modules))),
            pinning=qemu_readback.pinning(emulator.process.pid, cpus),
            consoles=await readback.labels(emulator, "con"),
            channels=await readback.labels(emulator, "chan"),
            accelerator=await qemu_readback.accelerator(emulator),
            pid=emulator.process.pid,
            directory=self.directory,
            owner=str(self.qemu.owner),
            extra={"launch": str(emulator.directory)},
        )

    def _linked(self, nic: str) -> bool:
        specified = self._spec.nic(nic)
        return nic not in self.cut and specified is not None and specified.network != "none"

    def _info_at_rest(self) -> MachineInfo:
        """What it will be made of when it is started: its files and its specification."""
        spec = self._spec
        nodes = [NodeInfo(memory=node.memory, cpus=node.cpus) for node in spec.memory.nodes]
        everything = NodeInfo(memory=spec.memory.size, cpus=tuple(range(spec.cpus.count)))
        return MachineInfo(
            id=self.id,
            name=self.name,
            architecture=spec.architecture,
            vcpus=spec.cpus.count,
            memory=spec.memory.size,
            disks=tuple(
                DiskInfo(
                    name=disk.name,
                    size=disk.size,
                    bus=self.layout.buses.get(disk.name) or _bus(spec, disk.name),
                    readonly=disk.readonly,
                    path=disk.path,
                )
                for disk in self.disks.values()
            ),
            nics=tuple(
                NicInfo(
                    name=nic.name,
                    network=nic.network,
                    mac=self.layout.macs.get(nic.name) or nic.mac or made_mac(spec, nic.name),
                    link=self._linked(nic.name),
                )
                for nic in spec.nics
            ),
            nodes=tuple(nodes or [everything]),
            pinning=dict(spec.cpus.pinning),
            consoles=tuple(console.name for console in spec.consoles),
            channels=spec.channels,
            accelerator=spec.accelerator or self.qemu.accelerator(spec.architecture),
            directory=self.directory,
            owner=str(self.qemu.owner),
        )

    async def _do_metrics(self) -> MachineMetrics:
        used = await readback.metrics(self.need(), self.qemu.now())
        traffic = self.traffic
        if traffic is None:
            return used
        names = [nic.name for nic in self._spec.nics]
        counts = await done_in_thread(lambda: tuple(map(traffic.metrics, names)))
        return used.model_copy(update={"nics": counts})


def _bus(spec: MachineSpec, disk: str) -> str:
    specified = spec.disk(disk)
    return specified.bus if specified is not None else "virtio"


async def _nothing() -> None:
    """It stood still already: nothing to let run on."""


def _copy_memory(captured: memory.Captured, directory: Path, check: Callable[[], None]) -> None:
    for number in range(len(captured.sources)):
        with (directory / snapshots.memory_file(number)).open("xb") as file:
            captured.copy(number, file.fileno(), check)


def _unlink_all(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _claims_host(spec: MachineSpec) -> bool:
    """Whether its networks need something of the host's that there is only one of."""
    return any(
        nic.network.startswith(("tap:", "bridge:")) or any(forward.host for forward in nic.forwards)
        for nic in spec.nics
    )
