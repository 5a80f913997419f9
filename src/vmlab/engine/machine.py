"""A machine: memory, harts, the board with its devices, and firmware, under one roof.

All methods are for the thread that controls the machine, its owner; what devices and harts have to
say comes to the owner through `happened`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import ExitStack, suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Literal

from vmlab.engine import boot
from vmlab.engine.accel.interpreter import CodePages, InterpreterExecutor, native_code
from vmlab.engine.accel.lockstep import Executor
from vmlab.engine.accel.reference import ReferenceExecutor
from vmlab.engine.board import QEMU_SLOTS, Board, Chosen
from vmlab.engine.configuration import (
    Configuration,
    DiskBus,
    DiskFile,
    Execution,
    Idle,
    Nic,
    SegmentKind,
    SocketPort,
    TimeMode,
    mac_address,
)
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.devices.channel import SocketChannel, UartChannel
from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.devices.storage.faulty import FaultyDisk
from vmlab.engine.devices.storage.metered import MeteredDisk
from vmlab.engine.devices.storage.overlay import open_disk
from vmlab.engine.devices.virtio.balloon import VirtioBalloon
from vmlab.engine.devices.virtio.block import VirtioBlock
from vmlab.engine.devices.virtio.console import Port, VirtioConsole
from vmlab.engine.devices.virtio.device import VirtioDevice
from vmlab.engine.devices.virtio.keyboard import VirtioKeyboard
from vmlab.engine.devices.virtio.net import Segment, VirtioNet
from vmlab.engine.devices.virtio.rng import VirtioRng
from vmlab.engine.devices.virtio.scsi import VirtioScsi
from vmlab.engine.devices.virtio.segments import (
    DatagramSegment,
    MulticastSegment,
    StreamSegment,
    TapSegment,
)
from vmlab.engine.devices.workers import TimedWorkers, WorkerThreads
from vmlab.engine.firmware import Firmware
from vmlab.engine.harts import Harts
from vmlab.engine.host_clock import HostClock
from vmlab.engine.instruction_clock import InstructionClock
from vmlab.engine.memory.ram import Ram
from vmlab.engine.panic import PanicWatch
from vmlab.engine.parallel_harts import ParallelHarts
from vmlab.engine.sequential_harts import SequentialHarts
from vmlab.machine.errors import ResourceNotFound, VmlabError

if TYPE_CHECKING:
    from vmlab.engine.devices.virtio.user_network import PortForward

_WORKERS: Final = 4
_DRAIN_SECONDS: Final = 10.0
_SEED_BYTES: Final = 64
_LATENCY: Final = 20_000
"""Nanoseconds from a doorbell to its device's work, where time is deterministic."""


class Happening(Enum):
    """What a machine tells its owner."""

    POWEROFF = "poweroff"
    REBOOT = "reboot"
    FAILED = "failed"
    """It cannot go on: the guest reported a failure, traps without end, or vmlab has a mistake."""


class _Unplugged:
    """A segment with nobody on it."""

    def attach(self, device: VirtioNet) -> None:
        """The cable is not plugged in."""
        device.own.link_up = False

    def send(self, frame: bytes) -> bool:
        """It is lost."""
        return True

    def resume(self) -> None:
        """There is nothing to resume."""

    def close(self) -> None:
        """There is nothing to close."""


class Machine:
    """A machine that stands; `resume` lets it run.

    Args:
        configuration: What it is made of.
        reactor: Serves its sockets.
        happened: Called from any thread with what happened and a sentence about it.

    Raises:
        VmlabError: something that it needs is not there, or not as it has to be.
    """

    def __init__(
        self,
        configuration: Configuration,
        reactor: Reactor,
        happened: Callable[[Happening, str], None],
    ) -> None:
        self.configuration = configuration
        self.running = False
        self._retired_before = 0
        self._happened = happened
        self._reactor = reactor
        self._stack = ExitStack()
        try:
            self._build(configuration)
            self._boot()
        except BaseException:
            self._stack.close()
            raise

    def _build(self, made: Configuration) -> None:
        self.ram = Ram(made.memory)
        self.clock: HostClock | InstructionClock = HostClock()
        self.workers: WorkerThreads | TimedWorkers = WorkerThreads(_WORKERS, self._worker_failed)
        self._entropy: Callable[[int], bytes] = os.urandom
        if (seed := made.seed) is not None:
            self._entropy = random.Random(seed).randbytes
        if made.time.mode is TimeMode.DETERMINISTIC:
            self.clock = InstructionClock(made.time.instructions_per_tick, made.time.epoch)
            self.workers = TimedWorkers(self.clock, _LATENCY)
            self._entropy = random.Random(seed or 0).randbytes
        self._stack.callback(self.workers.close)
        blocks = sum(disk.bus is DiskBus.VIRTIO for disk in made.disks)
        wanted = 4 + made.scsi + len(made.nics) + blocks
        self.board = Board(
            self.ram,
            made.harts,
            self.clock,
            self._set_pending,
            self._ended_by_board,
            slots=max(QEMU_SLOTS, wanted),
            set_compare=self._set_compare,
            line_changed=self._line_changed,
        )
        harts = [Hart(self.ram, number, self.board.plic.block) for number in range(made.harts)]
        self.harts = self._at_work(harts, self._executors(harts))
        self._stack.callback(self.clock.halt)
        self._stack.callback(self.harts.join)
        self.firmware = Firmware(self.ram, self.harts, self._ended_by_firmware, self._debug_console)
        self.harts.call = self.firmware.call
        self.disks: dict[str, MeteredDisk] = {}
        self.faulty_disks: dict[str, FaultyDisk] = {}
        self._nodes: dict[str, DiskFile] = {}
        self.nics: dict[str, VirtioNet] = {}
        self.forwards: dict[str, list[PortForward]] = {}
        self._add_devices(made)

    def _at_work(self, harts: list[Hart], executors: list[Executor]) -> Harts:
        bus = self.board.bus
        if isinstance(self.clock, HostClock):
            return ParallelHarts(harts, executors, self.clock, bus, self._failed)
        skip = self.configuration.time.idle is Idle.SKIP
        return SequentialHarts(harts, executors, self.clock, bus, self._failed, skip_idle=skip)

    def _executors(self, harts: list[Hart]) -> list[Executor]:
        if self.configuration.execution is Execution.REFERENCE:
            return [ReferenceExecutor(hart) for hart in harts]
        pages = CodePages(self.ram, native_code())
        return [InterpreterExecutor(hart, pages) for hart in harts]

    # ------------------------------------------------------------------------------- devices

    def _add_devices(self, made: Configuration) -> None:
        if made.serial is not None:
            UartChannel(self.board.uart, self._channel(made.serial))
        self._panics: list[PanicWatch] = []
        send, heard = self.board.uart.send, self._listener()

        def printed(data: bytes) -> None:
            send(data)
            heard(data)

        self.board.uart.send = printed
        ports = [
            Port("", self._channel(one, self._listener()), console=True) for one in made.consoles
        ]
        ports += [Port(one.name, self._channel(one)) for one in made.channels]
        if ports:
            self._plug(VirtioConsole("console", self.ram, self.workers, ports))
        self._plug(VirtioRng("rng", self.ram, self.workers, self._entropy))
        self.balloon = VirtioBalloon("balloon", self.ram, self.workers)
        self._plug(self.balloon)
        self.keyboard = VirtioKeyboard("keyboard", self.ram, self.workers)
        self._plug(self.keyboard)
        for nic in made.nics:
            self.nics[nic.name] = VirtioNet(
                nic.name, self.ram, self.workers, mac_address(nic), self._segment(nic)
            )
            self._plug(self.nics[nic.name])
        self._blocks: dict[str, VirtioBlock] = {}
        for disk in made.disks:
            self.open_disk(disk)
            if disk.bus is DiskBus.VIRTIO:
                opened = self.disks[disk.name]
                serial = disk.serial or disk.name
                block = VirtioBlock(disk.name, self.ram, self.workers, opened, serial=serial)
                self._blocks[disk.name] = block
                self._plug(block)
        self.scsi: VirtioScsi | None = None
        self._targets: dict[str, int] = {}
        if made.scsi:
            self.scsi = VirtioScsi("scsi", self.ram, self.workers)
            self._plug(self.scsi)
        for disk in made.disks:
            if disk.bus is DiskBus.SCSI:
                self.plug_disk(disk.name, disk.serial)

    def _plug(self, device: VirtioDevice) -> None:
        self.board.plug(device)

    def _channel(
        self, port: SocketPort, heard: Callable[[bytes], None] = lambda data: None
    ) -> SocketChannel:
        log = port.log and self._stack.enter_context(_log(Path(port.log)))
        channel = SocketChannel(self._reactor, Path(port.socket), log or None, heard)
        self._stack.callback(channel.close)
        return channel

    def _segment(self, nic: Nic) -> Segment:
        made: Segment
        match nic.segment:
            case SegmentKind.STREAM_SERVER:
                made = StreamSegment.serve(self._reactor, Path(nic.path))
            case SegmentKind.STREAM_CLIENT:
                made = StreamSegment.connect(self._reactor, Path(nic.path))
            case SegmentKind.MULTICAST:
                made = MulticastSegment(self._reactor, nic.path)
            case SegmentKind.DATAGRAM:
                made = DatagramSegment(self._reactor, Path(nic.path), Path(nic.peer))
            case SegmentKind.TAP:
                made = TapSegment(self._reactor, nic.path)
            case SegmentKind.USER:
                # It starts a process, which takes libraries that no other machine needs.
                from vmlab.engine.devices.virtio.user_network import PortForward, UserSegment

                forwards = [
                    PortForward(one.guest, one.host, one.address, one.protocol)
                    for one in nic.forwards
                ]
                made = user = UserSegment(self._reactor, mac_address(nic), forwards)
                self.forwards[nic.name] = user.forwards
            case _:
                made = _Unplugged()
        self._stack.callback(made.close)
        return made

    def open_disk(self, disk: DiskFile) -> None:
        """Open a disk's file, for a device.

        Raises:
            VmlabError: the name is taken, or the file is not to be used.
        """
        if disk.name in self.disks:
            raise VmlabError(
                f"there are two disks of the name {disk.name!r}", hint="name them apart"
            )
        opened = open_disk(Path(disk.file), disk.format.value, read_only=disk.read_only)
        faulty = FaultyDisk(opened, self.clock.nanoseconds)
        self.faulty_disks[disk.name] = faulty
        self.disks[disk.name] = MeteredDisk(faulty)
        self._nodes[disk.name] = disk
        self._stack.callback(faulty.close)

    def close_disk(self, name: str) -> None:
        """Close the file of a disk that is not plugged in."""
        del self._nodes[name], self.faulty_disks[name]
        self.disks.pop(name).close()

    def plug_disk(self, name: str, serial: str = "") -> None:
        """Plug a disk that was opened into the SCSI host, also while the guest runs.

        Raises:
            VmlabError: there is no SCSI host, or it has no place left.
        """
        if self.scsi is None:
            raise VmlabError("the machine has no SCSI host", hint="set `scsi` in its file")
        self._targets[name] = self.scsi.plug(self.disks[name], serial or name)

    def unplug_disk(self, name: str) -> None:
        """Take a disk off the SCSI host, which closes it when its last command is through.

        Raises:
            ResourceNotFound: there is none of that name.
        """
        if self.scsi is None or name not in self._targets:
            raise ResourceNotFound(
                f"there is no disk {name!r} that can be unplugged",
                hint="those on the SCSI host can",
            )
        self.scsi.unplug(self._targets.pop(name))

    def resize_disk(self, name: str, size: int) -> None:
        """Give a disk another size in bytes, and tell the guest.

        Raises:
            VmlabError: it cannot have that size.
        """
        self.disks[name].resize(size)
        if name in self._blocks:
            self._blocks[name].resized()
        elif self.scsi is not None and name in self._targets:
            self.scsi.resized(self._targets[name])

    def disk_files(self) -> list[DiskFile]:
        """The disks that are there."""
        return list(self._nodes.values())

    # ------------------------------------------------------------------------------- running

    def _boot(self) -> None:
        """Load the guest and put its first hart where it begins."""
        made = self.configuration.boot
        kernel, initrd, firmware = map(_content, (made.kernel, made.initrd, made.firmware))
        seed = self._entropy(_SEED_BYTES)

        def tree(where: tuple[int, int] | None) -> bytes:
            return self.board.device_tree(Chosen(made.cmdline, where, seed))

        self.harts.reset()
        first = boot.place(self.ram, tree, kernel=kernel, initrd=initrd or b"", firmware=firmware)
        if first.machine_mode:
            self.harts.start_machine_mode(first.entry, first.device_tree, first.firmware_info)
        else:
            self.firmware.boot(self.harts.first, first.entry, first.device_tree)

    def resume(self) -> None:
        """Let it run; nothing happens if it does."""
        if not self.running:
            self.workers.resume()
            self.clock.run()
            self.harts.resume()
            self.running = True

    def pause(self) -> None:
        """Let it stand, with no request of a device under way.

        Raises:
            VmlabError: a device does not come to an end; the machine stands all the same.
        """
        if self.running:
            self.harts.pause()
            self.clock.halt()
            self.running = False
            if stuck := self.workers.drain(_DRAIN_SECONDS):
                raise VmlabError(
                    f"the devices {', '.join(stuck)} are still at work after {_DRAIN_SECONDS:g} s",
                    hint="look at the files behind them",
                )

    def reset(self) -> None:
        """Begin anew, as after power-on.

        What a device is still at was asked for by the machine that there was: it is not waited for.
        """
        was_running = self.running
        with suppress(VmlabError):
            self.pause()
        self._retired_before = self.retired
        self.board.reset()
        for watch in self._panics:
            watch.reset()
        self._boot()
        if was_running:
            self.resume()

    def stand_to_fork(self) -> None:
        """Stand, with no thread but the caller's at work and RAM that a fork does not share.

        The process may then fork; both sides `resume`. What the machine has of sockets and files is
        still one for both, and the reactor of the child's has to be a new one.

        Raises:
            VmlabError: a device does not come to an end; there is still a thread of it.
        """
        self.pause()
        self.harts.join()
        self._reactor.stop()
        self.ram.make_private()

    def close(self) -> None:
        """End it and release all that it holds."""
        self.harts.join()
        self.clock.halt()
        self.running = False
        for device in self.board.devices():
            device.close()
        self._stack.close()

    @property
    def retired(self) -> int:
        """Instructions of all harts since the machine was made; a reset forgets none."""
        return self._retired_before + sum(hart.retired for hart in self.harts)

    # ------------------------------------------------------- from harts and devices, any thread

    def _set_pending(self, hart: int, bit: int, level: bool) -> None:
        self.harts.set_pending(hart, bit, level)

    def _line_changed(self, hart: int, bit: int, level: bool) -> None:
        self.harts.line_changed(hart, bit, level)

    def _set_compare(self, hart: int, ticks: int) -> None:
        self.harts.set_compare(hart, ticks)

    def _ended_by_board(self, what: Literal["poweroff", "reboot", "fail"], code: int) -> None:
        if what == "fail":
            self._tell(Happening.FAILED, f"the guest reports a failure, code {code}")
        elif not self._restarts(what):
            self._tell(Happening(what), "the guest wrote to the system controller")

    def _ended_by_firmware(self, what: Literal["poweroff", "reboot"], reason: int) -> None:
        if self._restarts(what):
            return
        why = "for a failure" if reason else "without a reason"
        self._tell(Happening(what), f"the guest asked firmware, {why}")

    def _listener(self) -> Callable[[bytes], None]:
        """Somebody who listens to what the guest's kernel says on one of its consoles."""
        watch = PanicWatch()
        self._panics.append(watch)

        def listen(data: bytes) -> None:
            known = any(each.stands for each in self._panics)
            watch.feed(data)
            if watch.stands and not known:
                self._tell(Happening.FAILED, f"the guest's kernel panicked: {watch.reason}")

        return listen

    def _restarts(self, what: str) -> bool:
        """Whether the guest restarts for a panic, which is told instead."""
        reasons = [watch.reason for watch in self._panics if watch.reason]
        panicked = what == "reboot" and reasons != []
        if panicked:
            self._tell(Happening.FAILED, f"the guest's kernel panicked: {reasons[0]}")
        return panicked

    def _debug_console(self, data: bytes) -> int:
        """What S mode writes by firmware goes the way of the UART's output."""
        self.board.uart.send(data)
        return len(data)

    def _failed(self, reason: str) -> None:
        self._tell(Happening.FAILED, reason)

    def _worker_failed(self, name: str, error: BaseException) -> None:
        self._tell(
            Happening.FAILED, f"internal error in device {name}: {type(error).__name__}: {error}"
        )

    def _tell(self, what: Happening, reason: str) -> None:
        # Nothing of the guest's is executed any more; the owner says what becomes of it.
        self.harts.ask_to_pause()
        self._happened(what, reason)


def _log(path: Path) -> BinaryIO:
    try:
        return path.open("ab")
    except OSError as error:
        raise VmlabError(
            f"the log {path} cannot be written: {error.strerror}", hint="check its folder"
        ) from None


def _content(path: str | None) -> bytes | None:
    """The bytes of a file that the guest begins with."""
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise VmlabError(
            f"{path} cannot be read: {error.strerror}", hint="check the paths under `boot`"
        ) from None
