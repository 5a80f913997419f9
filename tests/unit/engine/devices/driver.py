"""A small virtio driver, written from the text of virtio 1.2, that tests drive devices with.

It knows a machine only as registers, memory and interrupt lines, so the same driver runs on the
engine's devices and, through qtest, on QEMU's: what it does wrong, QEMU's devices would tell.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from typing import Protocol

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
INDIRECT, EVENT_IDX, VERSION_1, PACKED = 28, 29, 32, 34

NEXT, WRITE, INDIRECT_FLAG = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15


class Machine(Protocol):
    """What the driver stands on."""

    def read(self, address: int, size: int) -> int: ...
    def write(self, address: int, size: int, value: int) -> None: ...
    def peek(self, address: int, size: int) -> bytes: ...
    def poke(self, address: int, data: bytes) -> None: ...
    def level(self, source: int) -> bool | None: ...


class Memory:
    """Hands out guest memory and never takes it back."""

    def __init__(self, start: int, end: int) -> None:
        self.next, self.end = start, end

    def take(self, size: int, alignment: int = 16) -> int:
        address = (self.next + alignment - 1) & -alignment
        self.next = address + size
        assert self.next <= self.end
        return address


@dataclass
class Buffer:
    """What was made available: where its parts lie."""

    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]
    count: int
    written: int = -1
    flags: int = 0
    """Packed: the flags of the used descriptor."""


class Ring:
    """The driver's side of one queue."""

    def __init__(self, machine: Machine, memory: Memory, size: int, features: int) -> None:
        self.machine, self.memory, self.size = machine, memory, size
        self.indirect = bool(features >> INDIRECT & 1)
        self.event_idx = bool(features >> EVENT_IDX & 1)
        self.outstanding: dict[int, Buffer] = {}

    def buffer(self, out: list[bytes], room: list[int]) -> Buffer:
        readable = []
        for data in out:
            readable.append((self.memory.take(max(len(data), 1)), len(data)))
            self.machine.poke(readable[-1][0], data)
        writable = [(self.memory.take(max(size, 1)), size) for size in room]
        return Buffer(readable, writable, len(out) + len(room))

    def data(self, buffer: Buffer) -> bytes:
        """What the device wrote, up to the length that it told."""
        return b"".join(self.machine.peek(a, n) for a, n in buffer.writable)[: buffer.written]

    def word(self, address: int) -> int:
        return int.from_bytes(self.machine.peek(address, 2), "little")

    def set_word(self, address: int, value: int) -> None:
        self.machine.poke(address, value.to_bytes(2, "little"))

    def _segments(self, buffer: Buffer) -> list[tuple[int, int, int]]:
        return [(a, n, 0) for a, n in buffer.readable] + [(a, n, WRITE) for a, n in buffer.writable]


class SplitRing(Ring):
    """2.7: descriptor table, available ring, used ring."""

    def __init__(self, machine: Machine, memory: Memory, size: int, features: int) -> None:
        super().__init__(machine, memory, size, features)
        self.descriptors = memory.take(16 * size, 16)
        self.driver = memory.take(6 + 2 * size, 2)
        self.device = memory.take(6 + 8 * size, 4)
        for address, length in (
            (self.descriptors, 16 * size),
            (self.driver, 6 + 2 * size),
            (self.device, 6 + 8 * size),
        ):
            machine.poke(address, bytes(length))
        self.free = list(range(size))
        self.added = 0
        self.used = 0
        self.chains: dict[int, list[int]] = {}

    def add(self, out: list[bytes], room: list[int], indirect: bool = False) -> Buffer:
        buffer = self.buffer(out, room)
        segments = self._segments(buffer)
        if indirect:
            table = b"".join(
                struct.pack("<QIHH", a, n, f | (NEXT if i + 1 < len(segments) else 0), i + 1)
                for i, (a, n, f) in enumerate(segments)
            )
            at = self.memory.take(len(table))
            self.machine.poke(at, table)
            chain = [self.free.pop(0)]
            self.write(chain[0], at, len(table), INDIRECT_FLAG, 0)
        else:
            chain = [self.free.pop(0) for _ in segments]
            for place, (a, n, f) in enumerate(segments):
                last = place + 1 == len(segments)
                self.write(chain[place], a, n, f | (0 if last else NEXT),
                           0 if last else chain[place + 1])  # fmt: skip
        self.chains[chain[0]] = chain
        self.outstanding[chain[0]] = buffer
        self.publish(chain[0])
        return buffer

    def write(self, index: int, address: int, size: int, flags: int, following: int) -> None:
        self.machine.poke(
            self.descriptors + 16 * index, struct.pack("<QIHH", address, size, flags, following)
        )

    def publish(self, head: int) -> None:
        self.set_word(self.driver + 4 + 2 * (self.added % self.size), head)
        self.added = (self.added + 1) & 0xFFFF
        self.set_word(self.driver + 2, self.added)

    def wants_kick(self, before: int) -> bool:
        """2.7.10: whether the device wants the doorbell for what was added since `before`."""
        if not self.event_idx:
            return not self.word(self.device) & 1
        event = self.word(self.device + 4 + 8 * self.size)
        return ((self.added - event - 1) & 0xFFFF) < ((self.added - before) & 0xFFFF)

    def want_interrupts(self, wanted: bool) -> None:
        if self.event_idx:
            self.set_word(self.driver + 4 + 2 * self.size, self.used if wanted else self.used - 1)
        self.set_word(self.driver, 0 if wanted else 1)

    def poll(self) -> list[Buffer]:
        done = []
        while self.used != self.word(self.device + 2):
            place = self.device + 4 + 8 * (self.used % self.size)
            head, written = struct.unpack("<II", self.machine.peek(place, 8))
            self.used = (self.used + 1) & 0xFFFF
            buffer = self.outstanding.pop(head)
            buffer.written = written
            self.free += self.chains.pop(head)
            done.append(buffer)
        return done


class PackedRing(Ring):
    """2.8: one ring of descriptors and two event suppression structures."""

    def __init__(self, machine: Machine, memory: Memory, size: int, features: int) -> None:
        super().__init__(machine, memory, size, features)
        self.descriptors = memory.take(16 * size, 16)
        self.driver = memory.take(4, 4)
        self.device = memory.take(4, 4)
        for address, length in ((self.descriptors, 16 * size), (self.driver, 4), (self.device, 4)):
            machine.poke(address, bytes(length))
        self.place, self.wrap = 0, 1
        self.used_place, self.used_wrap = 0, 1
        self.free_ids = list(range(size))
        self.added = 0

    def add(self, out: list[bytes], room: list[int], indirect: bool = False) -> Buffer:
        buffer = self.buffer(out, room)
        segments = self._segments(buffer)
        identity = self.free_ids.pop(0)
        if indirect:
            table = b"".join(struct.pack("<QIHH", a, n, 0, f) for a, n, f in segments)
            at = self.memory.take(len(table))
            self.machine.poke(at, table)
            segments = [(at, len(table), INDIRECT_FLAG)]
            buffer.count = 1
        first = None
        for number, (a, n, f) in enumerate(segments):
            flags = f | (NEXT if number + 1 < len(segments) else 0)
            flags |= (AVAIL if self.wrap else 0) | (0 if self.wrap else USED)
            at = self.descriptors + 16 * self.place
            self.machine.poke(at, struct.pack("<QIH", a, n, identity))
            if first is None:
                first = (at, flags)  # 2.8.21: the head's flags are written last
            else:
                self.set_word(at + 14, flags)
            self.place += 1
            if self.place == self.size:
                self.place, self.wrap = 0, 1 - self.wrap
        assert first is not None
        self.set_word(first[0] + 14, first[1])
        self.outstanding[identity] = buffer
        self.added += 1
        return buffer

    def wants_kick(self, before: int) -> bool:
        flags = self.word(self.device + 2) & 3
        if flags == 2:
            # The device names the descriptor whose availability it wants to hear of (2.8.14);
            # tests that ask add one chain after the device has seen all others.
            event = self.word(self.device)
            return (event & 0x7FFF, event >> 15) == getattr(self, "before", None)
        return flags == 0

    def remember(self) -> None:
        self.before = (self.place, self.wrap)

    def want_interrupts(self, wanted: bool) -> None:
        if wanted and self.event_idx:
            self.set_word(self.driver, self.used_place | self.used_wrap << 15)
            self.set_word(self.driver + 2, 2)
        else:
            self.set_word(self.driver + 2, 0 if wanted else 1)

    def poll(self) -> list[Buffer]:
        done = []
        while True:
            at = self.descriptors + 16 * self.used_place
            flags = self.word(at + 14)
            if bool(flags & AVAIL) != bool(self.used_wrap) or bool(flags & USED) != bool(
                self.used_wrap
            ):
                return done
            written, identity = struct.unpack("<IH", self.machine.peek(at + 8, 6))
            buffer = self.outstanding.pop(identity)
            buffer.written, buffer.flags = written, flags
            self.free_ids.append(identity)
            self.used_place += buffer.count
            if self.used_place >= self.size:
                self.used_place -= self.size
                self.used_wrap = 1 - self.used_wrap
            done.append(buffer)


class Driver:
    """The initialisation of 3.1 over the registers of 4.2.2."""

    def __init__(self, machine: Machine, slot: int, memory: Memory) -> None:
        self.machine, self.memory = machine, memory
        self.base = 0x1000_1000 + 0x1000 * slot
        self.source = 1 + slot if slot < 8 else 12 + slot - 8
        self.rings: dict[int, SplitRing | PackedRing] = {}
        self.features = 0

    def read(self, register: int) -> int:
        return self.machine.read(self.base + register, 4)

    def write(self, register: int, value: int) -> None:
        self.machine.write(self.base + register, 4, value)

    @property
    def status(self) -> int:
        return self.read(0x070)

    def offered(self) -> int:
        self.write(0x014, 0)
        low = self.read(0x010)
        self.write(0x014, 1)
        return low | self.read(0x010) << 32

    def negotiate(self, *features: int) -> None:
        """Reset, and take VERSION_1 and these features, which the device must offer."""
        assert self.read(0x000) == 0x74726976
        assert self.read(0x004) == 2
        self.write(0x070, 0)
        assert self.status == 0
        self.write(0x070, ACKNOWLEDGE)
        self.write(0x070, ACKNOWLEDGE | DRIVER)
        self.features = 1 << VERSION_1
        for feature in features:
            self.features |= 1 << feature
        missing = self.features & ~self.offered()
        assert not missing, f"not offered: {missing:#x}"
        for half in (0, 1):
            self.write(0x024, half)
            self.write(0x020, self.features >> (32 * half) & 0xFFFF_FFFF)
        self.write(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert self.status & FEATURES_OK

    def queue(self, index: int, size: int = 16) -> SplitRing | PackedRing:
        kind = PackedRing if self.features >> PACKED & 1 else SplitRing
        ring = kind(self.machine, self.memory, size, self.features)
        self.write(0x030, index)
        assert self.read(0x044) == 0
        assert self.read(0x034) >= size
        self.write(0x038, size)
        for register, address in (
            (0x080, ring.descriptors),
            (0x090, ring.driver),
            (0x0A0, ring.device),
        ):
            self.write(register, address & 0xFFFF_FFFF)
            self.write(register + 4, address >> 32)
        self.write(0x044, 1)
        assert self.read(0x044) == 1
        self.rings[index] = ring
        return ring

    def go(self) -> None:
        self.write(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    def kick(self, index: int) -> None:
        self.write(0x050, index)

    def wait(self, index: int, count: int = 1) -> list[Buffer]:
        """Buffers that come back, once there are `count` of them."""
        until = time.monotonic() + 250
        done: list[Buffer] = []
        while len(done) < count and time.monotonic() < until:
            done += self.rings[index].poll()
        assert len(done) >= count, f"{len(done)} of {count} buffers came back"
        return done

    def interrupt(self) -> int:
        """The interrupt status, acknowledged; the line, where it can be seen, agrees with it."""
        status = self.read(0x060)
        assert self.machine.level(self.source) in {bool(status), None}
        self.write(0x064, status)
        assert not self.machine.level(self.source)
        return status

    def config(self, offset: int, size: int) -> bytes:
        return bytes(self.machine.read(self.base + 0x100 + offset + i, 1) for i in range(size))
