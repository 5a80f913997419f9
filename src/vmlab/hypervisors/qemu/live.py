"""A machine and its QEMU process: what the process is started with, and what only QEMU needs.

`machine` adds what is done with a machine beyond that: snapshots, forks, migration, hot-plug.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from vmlab.hypervisors import processes
from vmlab.hypervisors.monitored import readback
from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.monitored.machine import MonitoredMachine
from vmlab.hypervisors.monitored.names import nic_device
from vmlab.hypervisors.monitored.networks import bridge_port, join_bridge
from vmlab.hypervisors.operation import Operation, uninterrupted
from vmlab.hypervisors.picture import Picture
from vmlab.hypervisors.processes import OwnedProcess
from vmlab.hypervisors.qemu import breakable, display, networks, virtiofs
from vmlab.hypervisors.qemu.boards import BOARDS, Board
from vmlab.hypervisors.qemu.command_line import Launch, arguments
from vmlab.hypervisors.qemu.disks import make_disk
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qemu.layout import Layout
from vmlab.hypervisors.qemu.memory import Template
from vmlab.hypervisors.qemu.private_memory import SmallBlocks
from vmlab.hypervisors.qemu.traffic import Traffic
from vmlab.hypervisors.qemu.virtiofs import Daemons
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import OperationFailed, UnsupportedOperation
from vmlab.machine.spec import Disk, MachineSpec
from vmlab.machine.states import MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.qemu.hypervisor import QemuHypervisor

HANGS_WITH_NODES: Final[Mapping[Architecture, str]] = {
    Architecture.RISCV64: "Linux 6.12 hangs at boot with an interrupt controller for each node"
}
"""Architectures whose guests do not boot with several NUMA nodes, and why."""


class LiveMachine(MonitoredMachine[Emulator]):
    """A machine with its QEMU process, if it has one."""

    emulator_class: ClassVar[type[Emulator]] = Emulator

    def __init__(
        self,
        hypervisor: QemuHypervisor,
        id_: str,
        spec: MachineSpec,
        state: MachineState = MachineState.CREATED,
    ) -> None:
        # Set first: the record that a change of state writes is made of these.
        self.qemu = hypervisor
        self.layout = Layout()
        self.traffic: Traffic | None = None
        self.blocks: SmallBlocks | None = None
        self._template: Template | None = None
        super().__init__(hypervisor, id_, spec, state)

    # Records and files.

    @property
    def board(self) -> Board:
        """The machine type of its architecture."""
        return BOARDS[self._spec.architecture]

    def to_record(self) -> dict[str, Any]:
        """What the next process needs to find the machine again."""
        return {**super().to_record(), "layout": self.layout.to_record()}

    def from_record(self, record: Mapping[str, Any]) -> None:
        """Be the machine that `to_record` described."""
        self.drop_template()
        self.blocks = None
        self.layout = Layout.from_record(record["layout"])
        super().from_record(record)

    @property
    def snapshot_directory(self) -> Path:
        """Where its snapshots are."""
        return self.directory / "snapshots"

    def make_directories(self) -> None:
        """Make the machine's directory, with a place for snapshots."""
        super().make_directories()
        self.snapshot_directory.mkdir(mode=0o700)

    async def make_disk(self, disk: Disk, path: Path) -> DiskFile:
        """Make a disk of the machine's by qemu-img."""
        return await make_disk(disk, path)

    async def _do_create(self, operation: Operation) -> None:
        self.check_launch()
        self.layout = self.fresh_layout()
        await super()._do_create(operation)

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

    def fresh_layout(self) -> Layout:
        """Where its devices are when it starts anew."""
        return Layout.of(self._spec, self.board, virtiofs.by_virtiofs(self._spec))

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
        accelerator = spec.accelerator or self.qemu.accelerator(spec.architecture)
        return Launch(
            id=self.id,
            spec=spec,
            accelerator=accelerator,
            layout=layout,
            disks=disks,
            netdevs=tuple(networks.backend(nic, self.qemu.owner, self.id) for nic in spec.nics),
            logs=self.directory,
            program=self.qemu.program_for(spec.architecture),
            memory=memory,
            private=private,
            incoming=incoming,
            debugger=None if incoming else self.qemu.debugger,
            ticks_khz=self.qemu.ticks_khz(spec.architecture, accelerator),
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
        number = self.next_launch()
        spec, layout = spec or self._spec, layout or self.layout
        disks = tuple(self.disks.values()) if disks is None else disks
        line = arguments(
            self._launch_of(
                spec,
                disks,
                layout,
                memory,
                private=private,
                incoming=incoming,
            )
        )
        directory, owner = self.launch_directory(number), self.qemu.owner
        shares = [(n, share) for n, share in enumerate(spec.shares) if share.tag in layout.virtiofs]
        daemons = await Daemons.start(shares, directory, owner=owner, machine=self.id)
        try:
            daemons.disks = await breakable.start(disks, directory, owner=owner, machine=self.id)
            if daemons.disks is not None:
                daemons.processes.append(daemons.disks)
            emulator = await Emulator.start(
                line,
                directory,
                owner=owner,
                machine=self.name,
                id_=self.id,
                on_event=self.watcher(number),
            )
        except BaseException as error:
            blamed = await uninterrupted(daemons.give_up())
            if blamed and isinstance(error, OperationFailed):
                error.message = f"{error.message}; virtiofsd said: {blamed}"
            raise
        emulator.daemons = daemons
        self.on_failure(lambda: self.discard(emulator))
        return emulator

    async def attach(self, emulator: Emulator) -> None:
        """Make `emulator` the machine's process."""
        self.traffic = Traffic(emulator.directory)
        await super().attach(emulator)

    async def detach(self) -> None:
        """The machine's process has ended: let go of what led to it."""
        self.traffic = None
        self.blocks = None
        self.drop_template()
        await super().detach()
        if self.qemu.debugger is not None:
            self.qemu.debugger.unlink(missing_ok=True)

    def drop_template(self) -> None:
        """The machine is no longer as it was frozen for forks."""
        if self._template is not None:
            self._template.close()
            self._template = None

    def _was_reset(self) -> None:
        # Firmware runs again, and writes to its blocks.
        self.blocks = None

    # Life.

    async def _do_start(self, operation: Operation) -> None:
        self.begin()
        self._template = None
        self.layout = _kept_macs(self.fresh_layout(), self.layout)
        self.cut.clear()
        emulator = await self.launch()
        await self.attach(emulator)
        await self.connect_networks(emulator)
        await self.apply_pinning(self._spec.cpus.pinning)
        if self.qemu.debugger is None:
            # Otherwise it is for the debugger to do.
            await self.let_run(emulator)

    async def connect_networks(self, emulator: Emulator) -> None:
        """What of the networks cannot be said on the command line."""
        for nic in self._spec.nics:
            await self.connect_network(emulator, nic.name, nic.network)

    async def connect_network(self, emulator: Emulator, nic: str, network: str) -> None:
        """The same for one NIC."""
        kind, _, name = network.partition(":")
        if kind == "bridge":
            await join_bridge(bridge_port(self.qemu.owner, self.id, nic), name)
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

    async def press_power_button(self, emulator: Emulator) -> None:
        """Ask the guest to power down."""
        await super().press_power_button(emulator)
        if self.board.power_key:
            # This board has no power button; a keyboard may have one.
            power = {"type": "qcode", "data": "power"}
            await emulator.execute("send-key", {"keys": [power]})

    async def _do_reset(self, operation: Operation) -> None:
        self.drop_template()
        await super()._do_reset(operation)

    async def _do_resume(self, operation: Operation) -> None:
        self.drop_template()
        await super()._do_resume(operation)

    async def release(self) -> None:
        """Let go of the machine and leave it running."""
        await super().release()
        self.drop_template()

    def is_machine(self, argv: tuple[str, ...]) -> bool:
        """Whether a process of the machine's with that command line is the machine itself."""
        return "-qmp" in argv

    async def adopt_emulator(self, process: OwnedProcess, number: int) -> Emulator:
        """Talk to a QEMU that somebody else started."""
        emulator = await Emulator.adopt(
            process,
            self.launch_directory(number),
            machine=self.name,
            on_event=self.watcher(number),
        )
        found = await done_in_thread(processes.adopt, self.qemu.owner, self.id)
        serving = [other for other in found if not self.is_machine(other.argv)]
        emulator.daemons = Daemons(emulator.directory, serving)
        served = (one for one in serving if breakable.MODULE in one.argv)
        emulator.daemons.disks = next(served, None)
        return emulator

    @property
    def _helpers(self) -> int:
        """How many processes run beside its QEMU."""
        served = any(disk.breakable for disk in self.disks.values())
        return len(self.layout.virtiofs) + served

    async def find_process(self, kept: MachineState, *, alone: bool) -> MachineState:
        """Find the machine's process again; one that lost a share's daemon meanwhile has failed."""
        state = await super().find_process(kept, alone=alone)
        emulator = self.emulator
        if emulator is None or not alone or len(emulator.daemons.processes) >= self._helpers:
            return state
        await self.discard(emulator)
        return MachineState.FAILED

    async def _do_screenshot(self) -> Picture:
        return await display.screenshot(self.need())

    async def _do_send_keys(self, keys: Sequence[tuple[str, ...]]) -> None:
        await display.send_keys(self.need(), keys)


def _kept_macs(fresh: Layout, before: Layout) -> Layout:
    """`fresh` with the MAC addresses that the machine had before."""
    macs = {nic: before.macs.get(nic, mac) for nic, mac in fresh.macs.items()}
    return fresh.with_macs(macs)
