"""A simulated machine as plain data: what the journal of a store keeps, and what travels.

Everything that a machine is and holds is in its record, contents included; what is open (channels,
consoles that are read, requests under way, faults) is not.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from vmlab.hypervisors.simulated.disk import SimulatedDisk
from vmlab.hypervisors.simulated.guest import Guest, GuestState
from vmlab.hypervisors.simulated.hardware import Hardware, Power
from vmlab.hypervisors.simulated.network import SimulatedNic
from vmlab.hypervisors.simulated.saved import SavedMemory, SavedState
from vmlab.hypervisors.simulated.sparse import Base, InPlace, Sparse
from vmlab.hypervisors.simulated.world import World
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

FORMAT: Literal[1] = 1


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64"
    )


class ContentsRecord(_Record):
    """Sparse contents: the pages that differ from the base, or the file that they are."""

    size: int
    base: tuple[Path, int] | None = None
    file: Path | None = None
    pages: dict[int, bytes] = {}

    @classmethod
    def of(cls, contents: Sparse) -> ContentsRecord:
        base = contents.base
        under = (base.path, base.size) if isinstance(base, Base) else None
        file = contents.path if isinstance(contents, InPlace) else None
        return cls(size=contents.size, base=under, file=file, pages=contents.pages)

    def build(self) -> Sparse:
        """The contents again."""
        if self.file is not None:
            return InPlace(self.file, self.size)
        base = Base(*self.base) if self.base is not None else None
        return Sparse(self.size, dict(self.pages), base)


class DiskRecord(_Record):
    """One disk: what is stable, and what is only in its write cache."""

    name: str
    bus: Literal["virtio", "scsi"]
    readonly: bool
    stable: ContentsRecord
    cache: dict[int, bytes] = {}
    counters: dict[str, int] = {}

    @classmethod
    def of(cls, disk: SimulatedDisk) -> DiskRecord:
        return cls(
            name=disk.name,
            bus=disk.bus,
            readonly=disk.readonly,
            stable=ContentsRecord.of(disk.stable),
            cache=disk.cache.pages,
            counters=disk.counters(),
        )

    def build(self) -> SimulatedDisk:
        """The disk again."""
        disk = SimulatedDisk(self.name, self.stable.build(), bus=self.bus, readonly=self.readonly)
        disk.cache.pages.update(self.cache)
        disk.set_counters(self.counters)
        return disk


class NicRecord(_Record):
    """One NIC, with the frames that wait for its guest."""

    name: str
    network: str
    mac: str
    link: bool
    forwards: tuple[tuple[str, int, int], ...]
    inbox: tuple[bytes, ...] = ()
    counters: dict[str, int] = {}

    @classmethod
    def of(cls, nic: SimulatedNic) -> NicRecord:
        return cls(
            name=nic.name,
            network=nic.network,
            mac=nic.mac,
            link=nic.link,
            forwards=tuple(nic.forwards),
            inbox=tuple(nic.inbox),
            counters=nic.counters(),
        )

    def build(self, world: World, machine: str) -> SimulatedNic:
        """The NIC again, with its ports of the host; one that is in use there is any other."""
        nic = SimulatedNic(self.name, self.network, self.mac)
        nic.link = self.link
        nic.inbox = deque(self.inbox)
        nic.set_counters(self.counters)
        for protocol, port, guest in self.forwards:
            taken = world.ports.take(protocol, port, machine, or_any=True)
            nic.forwards.append((protocol, taken, guest))
        return nic


class GuestRecord(_Record):
    """What the guest's software remembers."""

    hostname: str
    ignores_powerdown: bool = False
    typed: bytes = b""
    screen: str = ""
    pressed: tuple[str, ...] = ()
    clock_offset: float = 0.0
    files: dict[str, bytes] = {}

    @classmethod
    def of(cls, state: GuestState) -> GuestRecord:
        return cls(
            hostname=state.hostname,
            ignores_powerdown=state.ignores_powerdown,
            typed=bytes(state.typed),
            screen=state.screen,
            pressed=tuple(state.pressed),
            clock_offset=state.clock_offset,
            files=state.files,
        )

    def build(self) -> GuestState:
        """The state again."""
        return GuestState(
            hostname=self.hostname,
            ignores_powerdown=self.ignores_powerdown,
            typed=bytearray(self.typed),
            screen=self.screen,
            pressed=list(self.pressed),
            clock_offset=self.clock_offset,
            files=dict(self.files),
        )


class SnapshotRecord(_Record):
    """One saved state."""

    name: str
    machine: str
    spec: MachineSpec
    state: MachineState
    time: float
    disks: dict[str, ContentsRecord]
    memory: tuple[ContentsRecord, GuestRecord, float] | None
    digest: str

    @classmethod
    def of(cls, saved: SavedState) -> SnapshotRecord:
        memory = saved.memory
        return cls(
            name=saved.name,
            machine=saved.machine,
            spec=saved.spec,
            state=saved.state,
            time=saved.time,
            disks={name: ContentsRecord.of(disk) for name, disk in saved.disks.items()},
            memory=(
                (ContentsRecord.of(memory.ram), GuestRecord.of(memory.guest), memory.guest_seconds)
                if memory is not None
                else None
            ),
            digest=saved.digest,
        )

    def build(self) -> SavedState:
        """The saved state again."""
        memory = None
        if self.memory is not None:
            ram, guest, seconds = self.memory
            memory = SavedMemory(ram.build(), guest.build(), seconds)
        return SavedState(
            name=self.name,
            machine=self.machine,
            spec=self.spec,
            state=self.state,
            time=self.time,
            disks={name: disk.build() for name, disk in self.disks.items()},
            memory=memory,
            digest=self.digest,
        )


class MachineRecord(_Record):
    """Everything about one machine."""

    format: Literal[1] = FORMAT
    id: str
    spec: MachineSpec
    power: Power
    cause: str
    time: float
    boots: int
    booted_at: float
    restored: bool = False
    guest_seconds: float
    cpu_seconds: float
    generation: int
    balloon: int | None
    vcpus: int
    pinning: dict[int, tuple[int, ...]]
    ram: ContentsRecord
    guest: GuestRecord
    disks: tuple[DiskRecord, ...]
    nics: tuple[NicRecord, ...]
    consoles: dict[str, bytes]
    snapshots: tuple[SnapshotRecord, ...]

    @classmethod
    def of(cls, hardware: Hardware) -> MachineRecord:
        return cls(
            id=hardware.id,
            spec=hardware.spec,
            power=hardware.power,
            cause=hardware.cause,
            time=hardware.now(),
            boots=hardware.boots,
            booted_at=hardware.booted_at,
            restored=hardware.restored,
            guest_seconds=hardware.guest_time.seconds,
            cpu_seconds=hardware.cpu_time.seconds,
            generation=hardware.generation,
            balloon=hardware.balloon,
            vcpus=hardware.vcpus,
            pinning=hardware.pinning,
            ram=ContentsRecord.of(hardware.ram),
            guest=GuestRecord.of(hardware.guest.state),
            disks=tuple(map(DiskRecord.of, hardware.disks.values())),
            nics=tuple(map(NicRecord.of, hardware.nics.values())),
            consoles={name: bytes(text) for name, text in hardware.consoles.items()},
            snapshots=tuple(map(SnapshotRecord.of, hardware.snapshots.values())),
        )

    def build(self, world: World) -> Hardware:
        """The machine again, in `world`; one that ran has run on meanwhile."""
        hardware = Hardware(world, self.id, self.spec)
        hardware.boots, hardware.booted_at = self.boots, self.booted_at
        hardware.restored = self.restored
        # Random numbers that were drawn since this was recorded are not drawn again.
        hardware.generation = self.generation + 1
        hardware.balloon = self.balloon
        hardware.vcpus = self.vcpus
        hardware.pinning = dict(self.pinning)
        hardware.ram = self.ram.build()
        hardware.guest = Guest(hardware, self.guest.build())
        hardware.disks = {disk.name: disk.build() for disk in self.disks}
        hardware.nics = {nic.name: nic.build(world, self.spec.name) for nic in self.nics}
        hardware.consoles = {name: bytearray(text) for name, text in self.consoles.items()}
        hardware.snapshots = {saved.name: saved.build() for saved in self.snapshots}
        away = 0.0
        if self.power is Power.RUNNING:
            away = max(0.0, world.now() - self.time)
        hardware.guest_time.set(self.guest_seconds + away)
        hardware.cpu_time.set(self.cpu_seconds + away)
        hardware.power, hardware.cause = self.power, self.cause
        if self.power is Power.RUNNING:
            hardware.guest_time.run()
            hardware.cpu_time.run()
        world.machines[self.id] = hardware
        return hardware
