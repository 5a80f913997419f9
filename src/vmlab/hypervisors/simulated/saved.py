"""Saved states: what a snapshot, a fork and a migration take of a machine, with a checksum.

Pages are shared with the machine that was saved until either side writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from vmlab.hypervisors.simulated.disk import SimulatedDisk
from vmlab.hypervisors.simulated.guest import Guest, GuestState
from vmlab.hypervisors.simulated.hardware import Hardware, Power
from vmlab.hypervisors.simulated.sparse import Sparse
from vmlab.machine.errors import MigrationFailed
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState


@dataclass(slots=True)
class SavedMemory:
    """Memory and processors of a live machine."""

    ram: Sparse
    guest: GuestState
    guest_seconds: float


@dataclass(slots=True)
class SavedState:
    """Contents of a machine at one moment."""

    name: str
    machine: str
    spec: MachineSpec
    state: MachineState
    time: float
    disks: dict[str, Sparse]
    memory: SavedMemory | None
    digest: str = ""

    @property
    def size(self) -> int:
        """Bytes that are held."""
        held = sum(disk.allocated for disk in self.disks.values())
        return held + (self.memory.ram.allocated if self.memory is not None else 0)

    def contents_digest(self) -> str:
        """The checksum of what is held now; it differs from `digest` where that was damaged."""
        total = blake2b(digest_size=16)
        for name in sorted(self.disks):
            total.update(name.encode() + b"\0" + self.disks[name].digest())
        if self.memory is not None:
            guest = self.memory.guest
            total.update(b"memory\0" + self.memory.ram.digest())
            total.update(repr((guest.hostname, bytes(guest.typed), guest.files)).encode())
        return total.hexdigest()

    def damage(self) -> None:
        """Change one byte of the contents, as a failing disk of the host would."""
        victims = [*self.disks.values(), *([self.memory.ram] if self.memory is not None else [])]
        victim = victims[0]
        victim.write(0, bytes([victim.read(0, 1)[0] ^ 0xFF]))


def save(hardware: Hardware, name: str, state: MachineState, *, memory: bool) -> SavedState:
    """The contents of a machine now, under a name."""
    saved = SavedState(
        name=name,
        machine=hardware.id,
        spec=hardware.spec,
        state=state,
        time=hardware.now(),
        disks={disk.name: disk.contents() for disk in hardware.disks.values()},
        memory=save_memory(hardware) if memory else None,
    )
    saved.digest = saved.contents_digest()
    return saved


def save_memory(hardware: Hardware) -> SavedMemory:
    """Memory and processors of a machine that is on."""
    return SavedMemory(
        ram=hardware.ram.copy(),
        guest=hardware.guest.state.copy(),
        guest_seconds=hardware.guest_time.seconds,
    )


def bring_back(hardware: Hardware, saved: SavedState) -> None:
    """Give disks, and memory if it is in it, to hardware that is built like what was saved."""
    for name, contents in saved.disks.items():
        old = hardware.disks[name]
        hardware.disks[name] = SimulatedDisk(
            name, contents.copy(), bus=old.bus, readonly=old.readonly
        )
    hardware.restored = True
    if saved.memory is None:
        hardware.turn_off()
        return
    run_from(hardware, saved.memory, saved.state)


def run_from(hardware: Hardware, memory: SavedMemory, state: MachineState) -> None:
    """Let hardware go on from saved memory, running or paused.

    Random numbers are no part of that: those of the past are not drawn again.
    """
    hardware.drop_requests()
    if not hardware.has_power:
        hardware.boots += 1
        hardware.booted_at = hardware.now()
        hardware.cpu_time.set(0.0)
    hardware.pause()
    hardware.ram = memory.ram.copy()
    hardware.guest = Guest(hardware, memory.guest.copy())
    hardware.guest_time.set(memory.guest_seconds)
    hardware.power, hardware.cause = Power.PAUSED, ""
    if state is not MachineState.PAUSED:
        hardware.resume()


class Before:
    """A machine's contents before a restore, to go back to if that does not succeed."""

    def __init__(self, hardware: Hardware) -> None:
        self._power, self._cause = hardware.power, hardware.cause
        self._restored = hardware.restored
        self._disks = dict(hardware.disks)
        self._nics = dict(hardware.nics)
        self._shape = (hardware.vcpus, hardware.pinning)
        self._ram = hardware.ram.copy()
        self._memory = save_memory(hardware) if hardware.has_power else None

    def bring_back(self, hardware: Hardware) -> None:
        """Make the machine what it was."""
        ports = hardware.world.ports
        for nic in hardware.nics.values():
            if nic not in self._nics.values():
                hardware.world.free_nic(nic)
        for nic in self._nics.values():
            if nic not in hardware.nics.values():
                for protocol, port, _guest in nic.forwards:
                    ports.take(protocol, port, hardware.name)
        hardware.nics = self._nics
        hardware.disks = self._disks
        hardware.vcpus, hardware.pinning = self._shape
        hardware.restored = self._restored
        if self._memory is not None:
            paused = self._power is Power.PAUSED
            state = MachineState.PAUSED if paused else MachineState.RUNNING
            run_from(hardware, self._memory, state)
        else:
            hardware.turn_off()
            hardware.ram = self._ram
            hardware.power, hardware.cause = self._power, self._cause


def transfer(source: Hardware, arrival: Hardware) -> None:
    """Make `arrival`, which was built from the same specification, what `source` is.

    A live machine stands still in both afterwards.

    Raises:
        MigrationFailed: what arrived is not what was sent.
    """
    sent = save(source, "migration", MachineState.PAUSED, memory=source.has_power)
    arrival.world.rebuild_like(arrival, source.spec)
    arrival.boots, arrival.booted_at = source.boots, source.booted_at
    arrival.restored = source.restored
    arrival.cpu_time.set(source.cpu_time.seconds)
    arrival.generation, arrival.draws = source.generation, source.draws
    arrival.snapshots = source.snapshots
    arrival.consoles = {name: bytearray(text) for name, text in source.consoles.items()}
    arrival.stalled_seconds = dict(source.stalled_seconds)
    for name, nic in source.nics.items():
        there = arrival.nics[name]
        there.mac, there.link, there.inbox = nic.mac, nic.link, nic.inbox.copy()
        there.set_counters(nic.counters())
    for name, disk in source.disks.items():
        arrival.disks[name] = disk.copy()
        arrival.disks[name].set_counters(disk.counters())
    if sent.memory is not None:
        arrival.ram = sent.memory.ram.copy()
        arrival.guest = Guest(arrival, sent.memory.guest.copy())
        arrival.guest_time.set(sent.memory.guest_seconds)
        arrival.power = Power.PAUSED
    arrived = save(arrival, "migration", MachineState.PAUSED, memory=source.has_power)
    if arrived.digest != sent.digest:
        raise MigrationFailed(
            "what arrived is not what was sent: the checksums differ",
            hint="this is a mistake of the simulator's: please report it with the seed",
            machine=source.name,
        )
