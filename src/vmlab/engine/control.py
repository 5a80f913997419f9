"""What an engine process can be told over QMP, and what it tells.

Names, arguments and events are QEMU's where QEMU has them (qapi/*.json), so that one client drives
both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from vmlab.engine.configuration import DiskBus, DiskFile, ImageFormat
from vmlab.engine.devices.virtio.keyboard import KEY_POWER
from vmlab.engine.harts import Stop
from vmlab.engine.machine import Machine
from vmlab.engine.memory.ram import PAGE_SHIFT
from vmlab.engine.monitor.commands import CommandError, Commands
from vmlab.engine.qapi import (
    BalloonInfo,
    BlockDeviceInfo,
    BlockDeviceStats,
    BlockInfo,
    BlockStats,
    Cause,
    ChardevInfo,
    CpuInfo,
    Deleted,
    DeviceDriver,
    ExecutionInfo,
    ExitCount,
    FileOptions,
    ForwardInfo,
    HartInfo,
    ImageInfo,
    KvmInfo,
    MemoryInfo,
    NameInfo,
    NicInfo,
    Panicked,
    RunState,
    Shutdown,
    StatusInfo,
    TargetInfo,
    VersionInfo,
    VersionTriple,
)
from vmlab.machine.errors import VmlabError

VERSION = (0, 1, 0)


class Control:
    """The commands of one machine. They run one after another on the thread that owns it.

    Args:
        machine: Whose they are.
        quit_: Ends the process.
    """

    def __init__(self, machine: Machine, quit_: Callable[[Cause], None]) -> None:
        self.machine = machine
        self._status = RunState.PRELAUNCH
        self.changed: list[Callable[[RunState], None]] = []
        self.reason: Stop | None = None  # why it stands for its debugger
        self.late: list[Stop] = []  # what else happened meanwhile
        self.emit: Callable[[str, object | None], None] = lambda name, data: None
        self._quit = quit_
        self._nodes: dict[str, DiskFile] = {}
        self._plugged: dict[str, str] = {}
        for disk in machine.disk_files():
            if disk.bus is DiskBus.SCSI:
                self._nodes[disk.name] = disk
                self._plugged[disk.device or disk.name] = disk.name
        self.commands = Commands()
        add = self.commands.add
        add("query-status", self.query_status)
        add("query-version", self.query_version)
        add("query-name", self.query_name)
        add("query-kvm", self.query_kvm)
        add("query-cpus-fast", self.query_cpus_fast)
        add("query-memory-size-summary", self.query_memory_size_summary)
        add("query-target", self.query_target)
        add("query-chardev", self.query_chardev)
        add("query-block", self.query_block)
        add("query-blockstats", self.query_blockstats)
        add("query-balloon", self.query_balloon)
        add("x-query-execution", self.query_execution)
        add("x-query-harts", self.query_harts)
        add("x-query-networks", self.query_networks)
        add("stop", self.stop)
        add("cont", self.cont)
        add("system_reset", self.system_reset)
        add("system_powerdown", self.system_powerdown)
        add("quit", self.quit)
        add("balloon", self.balloon)
        add("set_link", self.set_link)
        add("blockdev-add", self.blockdev_add)
        add("blockdev-del", self.blockdev_del)
        add("device_add", self.device_add)
        add("device_del", self.device_del)
        add("block_resize", self.block_resize)
        for name, data in (
            ("STOP", None),
            ("RESUME", None),
            ("SHUTDOWN", Shutdown),
            ("RESET", Shutdown),
            ("POWERDOWN", None),
            ("GUEST_PANICKED", Panicked),
            ("DEVICE_DELETED", Deleted),
        ):
            self.commands.add_event(name, data)

    @property
    def status(self) -> RunState:
        """What the machine is doing; whoever is in `changed` is told of changes."""
        return self._status

    @status.setter
    def status(self, status: RunState) -> None:
        self._status = status
        for tell in self.changed:
            tell(status)

    # ------------------------------------------------------------------------------ questions

    def query_status(self) -> StatusInfo:
        """What the machine is doing."""
        return StatusInfo(self.status is RunState.RUNNING, self.status)

    def query_version(self) -> VersionInfo:
        """The engine's version."""
        return VersionInfo(VersionTriple(*VERSION), "vmlab")

    def query_name(self) -> NameInfo:
        """The machine's name."""
        return NameInfo(self.machine.configuration.name)

    def query_kvm(self) -> KvmInfo:
        """There is none in here."""
        return KvmInfo(enabled=False, present=False)

    def query_cpus_fast(self) -> list[CpuInfo]:
        """The harts and the host's threads that they run on; 0 where there is none now."""
        threads = self.machine.harts.thread_ids()
        return [CpuInfo(number, thread) for number, thread in enumerate(threads)]

    def query_memory_size_summary(self) -> MemoryInfo:
        """How much memory the machine has."""
        return MemoryInfo(self.machine.ram.size)

    def query_target(self) -> TargetInfo:
        """What kind of machine it is."""
        return TargetInfo("riscv64")

    def query_block(self) -> list[BlockInfo]:
        """The disks that the guest sees."""
        found = []
        for disk, qdev in self._devices():
            opened = self.machine.disks[disk.name]
            image = ImageInfo(disk.file, disk.format.value, opened.size)
            node = BlockDeviceInfo(disk.file, disk.name, disk.format.value, opened.read_only, image)
            found.append(BlockInfo("", qdev, "unknown", False, False, node))
        return found

    def query_blockstats(self) -> list[BlockStats]:
        """What went through the disks that the guest sees."""
        found = []
        for disk, qdev in self._devices():
            seen = self.machine.disks[disk.name].counters
            stats = BlockDeviceStats(
                seen.read_bytes,
                seen.written_bytes,
                seen.reads,
                seen.writes,
                seen.flushes,
                seen.failed_reads,
                seen.failed_writes,
                seen.failed_flushes,
            )
            found.append(BlockStats("", qdev, disk.name, stats))
        return found

    def _devices(self) -> Iterator[tuple[DiskFile, str]]:
        """The disks that are in a device, and the device's id or path, as QEMU has them."""
        plugged = {node: device for device, node in self._plugged.items()}
        for disk in self.machine.disk_files():
            if disk.name in plugged:
                yield disk, plugged[disk.name]
            elif disk.name not in self._nodes:
                yield disk, f"/machine/peripheral/{disk.device or disk.name}/virtio-backend"

    def query_chardev(self) -> list[ChardevInfo]:
        """The consoles and channels, and their sockets."""
        made = self.machine.configuration
        ports = [(one.name or f"console{number}", one) for number, one in enumerate(made.consoles)]
        ports += [(one.name, one) for one in made.channels]
        if made.serial is not None:
            ports.append((made.serial.name or "serial", made.serial))
        return [ChardevInfo(label, f"unix:{one.socket}", True) for label, one in ports]

    def query_balloon(self) -> BalloonInfo:
        """How much memory the guest has left."""
        machine = self.machine
        return BalloonInfo(machine.ram.size - machine.balloon.own.actual * 4096)

    def query_networks(self) -> list[NicInfo]:
        """The NICs, what went through them, and which ports lead to them."""
        return [
            NicInfo(
                name,
                nic.mac.hex(":"),
                nic.own.link_up,
                nic.counters.received,
                nic.counters.received_bytes,
                nic.counters.sent,
                nic.counters.sent_bytes,
                nic.counters.dropped,
                [
                    ForwardInfo(one.protocol, one.host, one.host_port, one.guest_port)
                    for one in self.machine.forwards.get(name, [])
                ],
            )
            for name, nic in self.machine.nics.items()
        ]

    def query_execution(self) -> ExecutionInfo:
        """Who executes the guest, and how far it is."""
        return ExecutionInfo(self.machine.configuration.execution.value, self.machine.retired)

    def query_harts(self) -> list[HartInfo]:
        """What each hart did."""
        found = []
        for number, hart in enumerate(self.machine.harts):
            counts = self.machine.harts.exits(number).items()
            found.append(
                HartInfo(
                    number,
                    hart.pc,
                    hart.retired,
                    *self.machine.harts.translations(number),
                    [ExitCount(reason, count) for reason, count in counts],
                )
            )
        return found

    # --------------------------------------------------------------------------------- orders

    def stop(self) -> None:
        """Let the machine stand.

        Raises:
            CommandError: a device is still at work; the machine stands all the same.
        """
        if self.status is RunState.RUNNING:
            try:
                self._do(self.machine.pause)
            finally:
                self.status = RunState.PAUSED
                self.emit("STOP", None)

    def cont(self) -> None:
        """Let the machine run."""
        if self.status in (RunState.SHUTDOWN, RunState.INTERNAL_ERROR):
            raise CommandError("Resetting the Virtual Machine is required")
        if self.status is not RunState.RUNNING:
            if not self.late:
                self.machine.resume()
            self.status = RunState.RUNNING
            self.emit("RESUME", None)
            if self.late:
                self.trapped(self.late.pop(0))

    def stand(self) -> None:
        """Bring the machine to stand for what happened in it: a device at work is only told of."""
        try:
            self.machine.pause()
        except VmlabError as error:
            print(f"{error}; {error.hint}", file=sys.stderr, flush=True)

    def trapped(self, stop: Stop) -> None:
        """A hart has met what a debugger waits for, and all of them stand or are about to."""
        if self.status is not RunState.RUNNING:
            # Another one came first. What has not been executed is met again.
            if not self.machine.harts.meet_again(stop):
                self.late.append(stop)
            return
        self.reason = stop
        self.stand()
        self.status = RunState.DEBUG
        self.emit("STOP", None)

    def system_reset(self) -> None:
        """Begin anew."""
        self.reset(Shutdown(guest=False, reason=Cause.HOST_QMP_SYSTEM_RESET))

    def reset(self, why: Shutdown) -> None:
        """Begin anew, and tell why."""
        self._do(self.machine.reset)
        if self.status in (RunState.SHUTDOWN, RunState.INTERNAL_ERROR):
            self.status = RunState.PAUSED
        self.emit("RESET", why)

    def system_powerdown(self) -> None:
        """Press the power button."""
        self.machine.keyboard.press(KEY_POWER)
        self.emit("POWERDOWN", None)

    def quit(self) -> None:
        """End the process."""
        self._quit(Cause.HOST_QMP_QUIT)

    def balloon(self, value: int) -> None:
        """Ask the guest to live with `value` bytes of memory."""
        size = self.machine.ram.size
        if not 0 < value <= size:
            raise CommandError(f"Parameter 'value' expects a size from 1 to {size} bytes")
        self.machine.balloon.set_target((size - value) >> PAGE_SHIFT)

    def set_link(self, name: str, up: bool) -> None:
        """Plug a NIC's cable in, or pull it out."""
        nic = self.machine.nics.get(name)
        if nic is None:
            raise CommandError(f"Device '{name}' not found", "DeviceNotFound")
        nic.set_link(up)

    # ---------------------------------------------------------------------------------- disks

    def blockdev_add(
        self,
        node_name: str,
        driver: ImageFormat,
        file: FileOptions,
        read_only: bool = False,
    ) -> None:
        """Name a disk's file, for a device to be plugged in."""
        if node_name in self._nodes:
            raise CommandError(f"Duplicate nodes with node-name='{node_name}'")
        made = DiskFile(node_name, file.filename, driver, read_only)
        self._do(lambda: self.machine.open_disk(made))
        self._nodes[node_name] = made

    def blockdev_del(self, node_name: str) -> None:
        """Let a disk's file go."""
        if node_name not in self._nodes:
            raise CommandError(f"Failed to find node with node-name='{node_name}'")
        if node_name in self._plugged.values():
            raise CommandError(f"Node {node_name} is in use")
        del self._nodes[node_name]
        self.machine.close_disk(node_name)

    def device_add(self, driver: DeviceDriver, id_: str, drive: str, serial: str = "") -> None:
        """Plug a disk in."""
        if drive not in self._nodes:
            raise CommandError(f"Property '{driver.value}.drive' can't find value '{drive}'")
        if id_ in self._plugged or drive in self._plugged.values():
            raise CommandError(f"Duplicate device ID '{id_}', or the drive is in use")
        self._do(lambda: self.machine.plug_disk(drive, serial))
        self._plugged[id_] = drive

    def device_del(self, id_: str) -> None:
        """Pull a disk out."""
        if id_ not in self._plugged:
            raise CommandError(f"Device '{id_}' not found", "DeviceNotFound")
        drive = self._plugged.pop(id_)
        self._do(lambda: self.machine.unplug_disk(drive))
        self.emit("DEVICE_DELETED", Deleted(id_, f"/machine/peripheral/{id_}"))

    def block_resize(self, node_name: str, size: int) -> None:
        """Give a disk another size, in bytes."""
        self._known(node_name)
        if size < 0:
            raise CommandError("Parameter 'size' expects a size of 0 or more bytes")
        self._do(lambda: self.machine.resize_disk(node_name, size))

    def _known(self, node_name: str) -> str:
        if node_name not in self.machine.disks:
            raise CommandError(f"Failed to find node with node-name='{node_name}'")
        return node_name

    def _do(self, work: Callable[[], object]) -> None:
        """Have the machine do something; what it refuses is the client's to know."""
        try:
            work()
        except VmlabError as error:
            hint = f" ({error.hint})" if error.hint else ""
            raise CommandError(f"{error}{hint}") from error
