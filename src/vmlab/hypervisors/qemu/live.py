"""A machine and its QEMU process: boot, pause, shut down, kill; and what happens by itself.

`machine` adds what is done with a machine beyond that: snapshots, forks, migration, hot-plug.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmlab.hypervisors import processes
from vmlab.hypervisors.base import Channel, Console
from vmlab.hypervisors.operated_machine import OperatedMachine
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.picture import Picture
from vmlab.hypervisors.qemu import display, networks, readback
from vmlab.hypervisors.qemu.boards import BOARDS, Board
from vmlab.hypervisors.qemu.command_line import (
    Launch,
    arguments,
    channel_socket,
    console_log,
    console_socket,
)
from vmlab.hypervisors.qemu.disks import DiskFile, make_disk
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qemu.layout import Layout, nic_device
from vmlab.hypervisors.qemu.memory import Template
from vmlab.hypervisors.qemu.private_memory import SmallBlocks
from vmlab.hypervisors.qemu.streams import ConsoleLine, SocketChannel
from vmlab.hypervisors.qemu.threads import done_in_thread
from vmlab.hypervisors.qemu.traffic import Traffic
from vmlab.hypervisors.qmp import QmpEvent, QmpLost, QmpTimeout
from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import (
    MachineCrashed,
    OperationFailed,
    ResourceNotFound,
    UnsupportedOperation,
    VmlabError,
)
from vmlab.machine.events import EventType
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.qemu.hypervisor import QemuHypervisor

HANGS_WITH_NODES: Final[Mapping[Architecture, str]] = {
    Architecture.RISCV64: "Linux 6.12 hangs at boot with an interrupt controller for each node"
}
"""Architectures whose guests do not boot with several NUMA nodes, and why."""
_ASK_AGAIN_S: Final = 2.0
"""Seconds after which a guest that has not begun to power down is asked again: it was booting."""

_STATES: Final[Mapping[str, MachineState]] = {
    "running": MachineState.RUNNING,
    "shutdown": MachineState.STOPPED,
    "guest-panicked": MachineState.FAILED,
    "internal-error": MachineState.FAILED,
}
"""QEMU's RunState (run-state.json) as our states; in all others the vCPUs stand still."""


class LiveMachine(OperatedMachine):
    """A machine with its QEMU process, if it has one."""

    def __init__(
        self,
        hypervisor: QemuHypervisor,
        id_: str,
        spec: MachineSpec,
        state: MachineState = MachineState.CREATED,
    ) -> None:
        # Set first: the record that a change of state writes is made of these.
        self.qemu = hypervisor
        self.recorded = False
        self.disks: dict[str, DiskFile] = {}
        self.layout = Layout()
        self.launches = 0
        self.active = 0
        self.cut: set[str] = set()
        self.emulator: Emulator | None = None
        self.traffic: Traffic | None = None
        self.directory: Path = hypervisor.records.directory(id_)
        self._lines: dict[str, ConsoleLine] = {}
        self._channels: dict[str, SocketChannel] = {}
        self._steps: list[Callable[[], Awaitable[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._powering_down = False
        self._template: Template | None = None
        self.blocks: SmallBlocks | None = None
        super().__init__(hypervisor, id_, spec, state)

    # Records.

    @property
    def board(self) -> Board:
        """The machine type of its architecture."""
        return BOARDS[self._spec.architecture]

    def to_record(self) -> dict[str, Any]:
        """What the next process needs to find the machine again."""
        return {
            "spec": self._spec.model_dump(mode="json"),
            "state": self.state.value,
            "reason": self.reason,
            "layout": self.layout.to_record(),
            "disks": [disk.to_record() for disk in self.disks.values()],
            "launches": self.launches,
            "active": self.active,
            "cut": sorted(self.cut),
        }

    def from_record(self, record: Mapping[str, Any]) -> None:
        """Be the machine that `to_record` described."""
        self.layout = Layout.from_record(record["layout"])
        found = [DiskFile.from_record(disk) for disk in record["disks"]]
        self.disks = {disk.name: disk for disk in found}
        self.launches = record["launches"]
        self.active = record["active"]
        self.cut = set(record["cut"])
        self.recorded = True
        self.open_lines()

    def save(self) -> None:
        """Write the record, once the machine has one."""
        if self.recorded:
            self.qemu.records.save(self.id, self.to_record())

    def _state_changed(self, old: MachineState, new: MachineState, reason: str) -> None:
        super()._state_changed(old, new, reason)
        if new.is_stable and new is not MachineState.DELETED:
            self.save()

    # Undoing.

    def on_failure(self, step: Callable[[], Awaitable[None]]) -> None:
        """Have `step` run if the operation under way does not succeed; the last one first."""
        self._steps.append(step)

    def begin(self) -> None:
        """A hook begins: what the one before has done stays."""
        self._steps.clear()

    async def _undo(self, operation: Operation) -> None:
        while self._steps:
            step = self._steps[-1]
            await step()
            if step in self._steps:
                self._steps.remove(step)

    # Files.

    @property
    def disk_directory(self) -> Path:
        """Where the images of its disks are."""
        return self.directory / "disks"

    @property
    def snapshot_directory(self) -> Path:
        """Where its snapshots are."""
        return self.directory / "snapshots"

    def launch_directory(self, number: int) -> Path:
        """The directory of its QEMU process of that number."""
        return self.directory / "launches" / str(number)

    def disk_path(self, disk: str, number: int) -> Path:
        """The file of a disk; a restored one gets another number."""
        return self.disk_directory / f"{disk}.{number}.qcow2"

    def make_directories(self) -> None:
        """Make the machine's directory, and tell the console's lines where their logs are."""
        self.qemu.records.create(self.id)
        for directory in (self.disk_directory, self.snapshot_directory):
            directory.mkdir(mode=0o700)
        self.open_lines()

    def open_lines(self) -> None:
        """Make the machine's end of each of its consoles."""
        self._lines = {
            console.name: ConsoleLine(
                console.name, self.name, self.directory / console_log(console)
            )
            for console in self._spec.consoles
        }

    async def remove_directory(self) -> None:
        """Remove everything of the machine's; again does nothing."""
        self.recorded = False
        await done_in_thread(self.qemu.records.remove, self.id)

    async def _do_create(self, operation: Operation) -> None:
        self.begin()
        self.check_launch()
        self.on_failure(self.remove_directory)
        await done_in_thread(self.make_directories)
        for disk in self._spec.disks:
            self.disks[disk.name] = await make_disk(disk, self.disk_path(disk.name, 0))
        self.layout = Layout.of(self._spec, self.board)
        self.recorded = True
        self.save()

    def check_launch(self) -> None:
        """Refuse what the command line cannot say or no guest survives, before anything is made.

        Raises:
            InvalidSpec: naming the field.
            UnsupportedOperation: guests of the architecture do not boot so.
        """
        architecture = self._spec.architecture
        if len(self._spec.memory.nodes) > 1 and architecture in HANGS_WITH_NODES:
            raise UnsupportedOperation(
                Capability.NUMA.value,
                hypervisor="qemu",
                machine=self.name,
                hint=HANGS_WITH_NODES[architecture],
            )
        cpus, memory = self._spec.cpus, self._spec.memory
        for capability, count, maximum in (
            (Capability.HOTPLUG_VCPU, cpus.count, cpus.maximum),
            (Capability.HOTPLUG_MEMORY, memory.size, memory.maximum),
        ):
            if maximum is not None and maximum > count and not self.board.grows:
                raise UnsupportedOperation(
                    capability.value,
                    hypervisor="qemu",
                    machine=self.name,
                    operation="create",
                    hint=f"{self._spec.architecture.value} guests cannot grow while they run: "
                    "leave the maximum out",
                )
        arguments(self._launch_of(self._spec, (), Layout.of(self._spec, self.board), ()))

    # The process.

    def _launch_of(
        self,
        spec: MachineSpec,
        disks: tuple[DiskFile, ...],
        layout: Layout,
        memory: tuple[Path, ...],
        *,
        private: bool = False,
        incoming: bool = False,
    ) -> Launch:
        return Launch(
            id=self.id,
            spec=spec,
            accelerator=spec.accelerator or self.qemu.accelerator(spec.architecture),
            layout=layout,
            disks=disks,
            netdevs=tuple(networks.backend(nic, self.qemu.owner, self.id) for nic in spec.nics),
            logs=self.directory,
            program=self.qemu.program(spec.architecture),
            memory=memory,
            private=private,
            incoming=incoming,
            debugger=None if incoming else self.qemu.debugger,
        )

    async def launch(
        self,
        *,
        spec: MachineSpec | None = None,
        disks: tuple[DiskFile, ...] | None = None,
        layout: Layout | None = None,
        memory: tuple[Path, ...] = (),
        private: bool = False,
        incoming: bool = False,
    ) -> Emulator:
        """Start a QEMU process, whose vCPUs stand still; it goes if the operation fails.

        Args:
            spec: The machine, if it is not to be as it is now.
            disks: Its disks, the same.
            layout: Its layout, the same.
            memory: Files that its memory is in.
            private: Leave those files as they are.
            incoming: Wait for another process's state.
        """
        self.launches += 1
        number = self.launches
        self.save()
        self._sweep_launches(number)
        line = arguments(
            self._launch_of(
                spec or self._spec,
                tuple(self.disks.values()) if disks is None else disks,
                layout or self.layout,
                memory,
                private=private,
                incoming=incoming,
            )
        )
        emulator = await Emulator.start(
            line,
            self.launch_directory(number),
            owner=self.qemu.owner,
            machine=self.name,
            id_=self.id,
            on_event=lambda event: self._on_event(number, event),
        )
        self.on_failure(lambda: self.discard(emulator))
        return emulator

    def _sweep_launches(self, number: int) -> None:
        """Keep the logs of a few processes only."""
        shutil.rmtree(self.launch_directory(number - 4), ignore_errors=True)

    async def discard(self, emulator: Emulator) -> None:
        """End a process that was started in vain, or that another one replaces."""
        await emulator.end()
        if self.emulator is emulator:
            await self.detach()
        else:
            _remove_sockets(emulator.directory)

    async def attach(self, emulator: Emulator) -> None:
        """Make `emulator` the machine's process."""
        self.emulator = emulator
        self.active = int(emulator.directory.name)
        self.traffic = Traffic(emulator.directory)
        emulator.watch(self._on_end)
        for name, line in self._lines.items():
            await line.connect(emulator.directory / console_socket(name))

    async def detach(self) -> None:
        """The machine's process has ended: let go of what led to it."""
        emulator, self.emulator = self.emulator, None
        self.traffic = None
        self.blocks = None
        self.drop_template()
        for line in self._lines.values():
            await line.drain()
        self._channels.clear()
        if emulator is not None:
            _remove_sockets(emulator.directory)
        if self.qemu.debugger is not None:
            self.qemu.debugger.unlink(missing_ok=True)

    def drop_template(self) -> None:
        """The machine is no longer as it was frozen for forks."""
        if self._template is not None:
            self._template.close()
            self._template = None

    def need(self) -> Emulator:
        """The machine's process.

        Raises:
            OperationFailed: it has none.
        """
        if self.emulator is None:
            raise OperationFailed(
                f"machine {self.name!r} has no QEMU process",
                hint="start it first",
                machine=self.name,
                hypervisor="qemu",
            )
        return self.emulator

    # What happens by itself.

    def _on_event(self, number: int, event: QmpEvent) -> None:
        emulator = self.emulator
        if emulator is None or emulator.ending:
            return
        if emulator.directory != self.launch_directory(number):
            # Of a process that is about to replace the machine's, or was.
            return
        if event.name == "SHUTDOWN" and not self._powering_down:
            reason = str(event.data.get("reason", "guest-shutdown"))
            self._in_background(self._shut_down_by_itself(emulator, reason))
        elif event.name == "GUEST_PANICKED":
            self._in_background(self._panicked(emulator))
        elif event.name == "RESET":
            # Firmware runs again, and writes to its blocks.
            self.blocks = None
            if event.data.get("guest"):
                self._emit(EventType.GUEST_RESET, reason=str(event.data.get("reason", "")))
        elif event.name == "STOP" and self._current is None:
            self._in_background(self._look_again())

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _shut_down_by_itself(self, emulator: Emulator, reason: str) -> None:
        await emulator.quit()
        await self._gone(emulator)
        self._happened(MachineState.STOPPED, EventType.GUEST_SHUTDOWN, reason)

    async def _panicked(self, emulator: Emulator) -> None:
        await emulator.end()
        await self._gone(emulator)
        self._happened(MachineState.FAILED, EventType.GUEST_PANIC, "the guest panicked")

    def _on_end(self, emulator: Emulator, reason: str) -> None:
        self._in_background(self._crashed(emulator, reason))

    async def _crashed(self, emulator: Emulator, reason: str) -> None:
        await emulator.end()
        await self._gone(emulator)
        self._happened(MachineState.FAILED, EventType.CRASHED, reason)

    async def _gone(self, emulator: Emulator) -> None:
        if self.emulator is emulator:
            await self.detach()

    async def _look_again(self) -> None:
        """QEMU stopped the vCPUs by itself, as it does when a disk is full."""
        with suppress(VmlabError):
            await self.status()

    async def _observe(self) -> MachineState:
        emulator = self.emulator
        if emulator is not None and not emulator.ending and emulator.running:
            # One that ends just now is seen to on its own.
            with suppress(MachineCrashed):
                status = (await emulator.execute("query-status"))["status"]
                return _STATES.get(status, MachineState.PAUSED)
        if emulator is not None:
            # Wait for what comes of its end: who is told of it may start the machine at once.
            await emulator.noticed()
            await self._settle_background()
        failed = self.state is MachineState.FAILED or self.emulator is not None
        return MachineState.FAILED if failed else MachineState.STOPPED

    # Life.

    async def _do_start(self, operation: Operation) -> None:
        self.begin()
        self._template = None
        self.layout = _kept_macs(Layout.of(self._spec, self.board), self.layout)
        self.cut.clear()
        emulator = await self.launch()
        await self.attach(emulator)
        await self.connect_networks(emulator)
        await self.apply_pinning(self._spec.cpus.pinning)
        if self.qemu.debugger is None:
            # Otherwise it is for the debugger to do.
            await self.let_run(emulator)

    async def let_run(self, emulator: Emulator) -> None:
        """Let the vCPUs run.

        Raises:
            OperationFailed: they do not.
        """
        await emulator.execute("cont")
        status = (await emulator.execute("query-status"))["status"]
        # A guest may be off again by now; that is told by its event.
        if status not in {"running", "shutdown", "guest-panicked"}:
            raise OperationFailed(
                f"the vCPUs do not run: QEMU is in the state {status!r}",
                machine=self.name,
                hypervisor="qemu",
            )

    async def connect_networks(self, emulator: Emulator) -> None:
        """What of the networks cannot be said on the command line."""
        for nic in self._spec.nics:
            await self.connect_network(emulator, nic.name, nic.network)

    async def connect_network(self, emulator: Emulator, nic: str, network: str) -> None:
        """The same for one NIC."""
        kind, _, name = network.partition(":")
        if kind == "bridge":
            await networks.join_bridge(networks.bridge_port(self.qemu.owner, self.id, nic), name)
        if self.traffic is not None:
            await self.traffic.watch(emulator, nic)
        if kind == "none" or nic in self.cut:
            await emulator.execute("set_link", {"name": nic_device(nic), "up": False})

    async def apply_pinning(self, pinning: Mapping[int, tuple[int, ...]]) -> None:
        """Bind the threads of the vCPUs; those not named float.

        Raises:
            OperationFailed: the host does not have such a CPU.
        """
        emulator = self.need()
        everywhere = os.sched_getaffinity(emulator.process.pid)
        for vcpu in await readback.vcpus(emulator):
            wanted = pinning.get(vcpu.number, tuple(everywhere))
            try:
                os.sched_setaffinity(vcpu.thread, wanted)
            except OSError as error:
                raise OperationFailed(
                    f"vCPU {vcpu.number} cannot be bound to the CPUs {sorted(wanted)}: "
                    f"{error.strerror}",
                    hint=f"this host lets us use the CPUs {sorted(everywhere)}",
                    machine=self.name,
                    hypervisor="qemu",
                    operation="pin",
                ) from error

    async def _do_shutdown(self, operation: Operation) -> None:
        self.begin()
        emulator = self.need()
        self._powering_down = True
        try:
            reason = await self._powered_down(emulator)
            self._emit(EventType.GUEST_SHUTDOWN, reason=reason)
            await emulator.quit()
            await self._gone(emulator)
        finally:
            self._powering_down = False

    async def _powered_down(self, emulator: Emulator) -> str:
        """Ask the guest to power down until it has; returns the reason that QEMU gives."""
        with emulator.qmp.listen("SHUTDOWN") as off:
            while True:
                try:
                    await self._press_power_button(emulator)
                    event = await off.wait(_ASK_AGAIN_S)
                    return str(event.data.get("reason", ""))
                except QmpTimeout:
                    continue
                except (QmpLost, MachineCrashed) as error:
                    # QEMU may be gone before its last event was read: status 0 is a power-off.
                    if await emulator.ended_well():
                        return "guest-shutdown"
                    if isinstance(error, QmpLost):
                        raise await emulator.crashed("stop", error) from error
                    raise

    async def _press_power_button(self, emulator: Emulator) -> None:
        await emulator.execute("system_powerdown")
        if self.board.power_key:
            # This board has no power button; a keyboard may have one.
            power = {"type": "qcode", "data": "power"}
            await emulator.execute("send-key", {"keys": [power]})

    async def _do_kill(self, operation: Operation) -> None:
        self.begin()
        if self.emulator is not None:
            await self.discard(self.emulator)
        await self._settle_background()

    async def _settle_background(self) -> None:
        """Wait for the end of what began by itself."""
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        if tasks:
            await asyncio.wait(tasks)

    async def _do_reset(self, operation: Operation) -> None:
        self.begin()
        self.drop_template()
        emulator = self.need()
        with emulator.qmp.listen("RESET") as reset:
            await emulator.execute("system_reset")
            try:
                await reset.wait()
            except QmpLost as error:
                raise await emulator.crashed("restart", error) from error

    async def _do_pause(self, operation: Operation) -> None:
        self.begin()
        await self.need().execute("stop")

    async def _do_resume(self, operation: Operation) -> None:
        self.begin()
        self.drop_template()
        await self.let_run(self.need())

    async def _do_delete(self, operation: Operation) -> None:
        self.begin()
        if self.emulator is not None:
            await self.discard(self.emulator)
        await self._settle_background()
        for line in self._lines.values():
            line.end()
        await self.remove_directory()

    async def release(self) -> None:
        """Let go of the machine and leave it running."""
        await self._settle_background()
        self.drop_template()
        for line in self._lines.values():
            await line.disconnect()
            line.end()
        for channel in self._channels.values():
            await channel.close()
        if self.emulator is not None:
            await self.emulator.release()
            self.emulator = None

    async def find_process(self) -> MachineState:
        """Find the machine's process again, of which the record tells; the state it is in."""
        kept = self.state
        found = await done_in_thread(processes.adopt, self.qemu.owner, self.id)
        programs = [process for process in found if "-qmp" in process.argv]
        if not programs:
            return MachineState.FAILED if kept.is_live else kept
        number = self.active
        emulator = await Emulator.adopt(
            programs[-1],
            self.launch_directory(number),
            machine=self.name,
            on_event=lambda event: self._on_event(number, event),
        )
        await self.attach(emulator)
        state = await self._observe()
        if state in {MachineState.STOPPED, MachineState.FAILED}:
            # The guest went off while nobody was there to see it.
            await self.discard(emulator)
        return state

    # Streams.

    async def _do_console(self, name: str) -> Console:
        if name not in self._lines:
            raise self._missing("console", name, tuple(self._lines))
        return self._lines[name].reader()

    async def _do_channel(self, name: str) -> Channel:
        if name not in self._spec.channels:
            raise self._missing("channel", name, self._spec.channels)
        present = self._channels.get(name)
        if present is not None and not present.closed:
            raise OperationFailed(
                f"channel {name!r} of machine {self.name!r} is open already",
                hint="close it first: a channel has one reader",
                machine=self.name,
                hypervisor="qemu",
                operation="channel",
            )
        path = self.need().directory / channel_socket(name)
        channel = await SocketChannel.open(name, self.name, path)
        self._channels[name] = channel
        return channel

    async def _do_screenshot(self) -> Picture:
        return await display.screenshot(self.need())

    async def _do_send_keys(self, keys: Sequence[tuple[str, ...]]) -> None:
        await display.send_keys(self.need(), keys)

    def _missing(self, kind: str, name: str, there: tuple[str, ...]) -> ResourceNotFound:
        return ResourceNotFound(
            f"machine {self.name!r} has no {kind} {name!r}",
            hint=f"it has {', '.join(there)}" if there else f"its specification has no {kind}s",
            machine=self.name,
            hypervisor="qemu",
            operation=kind,
        )


def _kept_macs(fresh: Layout, before: Layout) -> Layout:
    """`fresh` with the MAC addresses that the machine had before."""
    macs = {nic: before.macs.get(nic, mac) for nic, mac in fresh.macs.items()}
    return fresh.with_macs(macs)


def _remove_sockets(directory: Path) -> None:
    """Remove the sockets of a process that has ended; its logs stay."""
    if directory.is_dir():
        for path in (*directory.glob("*.sock"), *directory.glob("*.pcap")):
            path.unlink(missing_ok=True)
