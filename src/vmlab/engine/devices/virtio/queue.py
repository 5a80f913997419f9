"""Virtqueues, the device's side: split rings (virtio 1.2, 2.7) and packed rings (2.8).

The driver owns the memory of a ring and may change it at any moment, so every field is read once,
checked, and used from that copy. What cannot be served raises `QueueBroken`; the device is then
marked as needing a reset and the machine lives on. No lock is taken here: the device has one.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Final

from vmlab.engine.memory.ram import BadAddress, Ram, full_barrier

INDIRECT_DESC: Final = 28
EVENT_IDX: Final = 29
VERSION_1: Final = 32
RING_PACKED: Final = 34
"""Feature bits of the rings (6)."""

_NEXT: Final = 1
_WRITE: Final = 2
_INDIRECT: Final = 4
_AVAIL: Final = 1 << 7
_USED: Final = 1 << 15

MAX_CHAIN: Final = 1024
"""Descriptors of one chain at most, indirect ones counted."""
_MAX_LENGTH: Final = (1 << 32) - 1
"""Bytes of one chain at most (2.6: a length is 32 bits)."""

_DESCRIPTOR: Final = struct.Struct("<QIHH")
_USED_ELEMENT: Final = struct.Struct("<II")
_ID_AND_LENGTH: Final = struct.Struct("<IH")

_EVENTS_ENABLE: Final = 0
_EVENTS_DISABLE: Final = 1
_EVENTS_DESCRIPTOR: Final = 2


class QueueBroken(Exception):
    """The driver broke the rules of the ring; the text says which."""


@dataclass
class Chain:
    """A buffer that the driver made available: what the device may read, and may write.

    `readable` and `writable` are (physical address, bytes), checked to lie in RAM. It is plain
    data, so that a request in flight can be saved and issued again.
    """

    identity: int
    """Split: index of the head descriptor. Packed: the buffer id."""
    count: int
    """Packed: how many descriptors of the ring it took."""
    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)
    serial: int = 0
    """A number that no other chain of this queue has, since the driver may repeat identities."""

    @property
    def readable_bytes(self) -> int:
        """Bytes that the device may read."""
        return sum(size for _, size in self.readable)

    @property
    def writable_bytes(self) -> int:
        """Bytes that the device may write."""
        return sum(size for _, size in self.writable)

    def add(self, ram: Ram, address: int, size: int, flags: int) -> None:
        """Append a descriptor's buffer, once it is checked."""
        if not ram.contains(address, size):
            raise QueueBroken(f"a descriptor names {size} bytes at {address:#x}, outside RAM")
        if flags & _WRITE:
            self.writable.append((address, size))
        elif self.writable:
            raise QueueBroken("a descriptor to read follows one to write")
        else:
            self.readable.append((address, size))


@dataclass
class QueueState:
    """Everything about a queue that a snapshot must hold."""

    size_max: int
    size: int = 0
    ready: bool = False
    descriptors: int = 0
    driver: int = 0
    device: int = 0
    next_avail: int = 0
    """Split: a free-running 16-bit count. Packed: a place in the ring."""
    next_used: int = 0
    avail_wrap: bool = True
    used_wrap: bool = True
    signalled_used: int | None = None
    """`next_used` when an interrupt was last considered; None if every one is due."""
    serial: int = 0
    in_flight: dict[int, Chain] = field(default_factory=dict)
    """Chains taken and not yet given back, by serial."""
    reissue: list[Chain] = field(default_factory=list)
    """Chains that were in flight when the state was saved: taken again before any other."""


class Queue(ABC):
    """One ring. Made when the driver says that the queue is ready."""

    def __init__(self, ram: Ram, state: QueueState, features: int) -> None:
        self.ram = ram
        self.state = state
        self.indirect = bool(features >> INDIRECT_DESC & 1)
        self.event_idx = bool(features >> EVENT_IDX & 1)
        for what, address, size, alignment in self._parts():
            if address % alignment or not ram.contains(address, size):
                raise QueueBroken(f"the {what} of {size} bytes at {address:#x} cannot be used")

    @abstractmethod
    def _parts(self) -> list[tuple[str, int, int, int]]:
        """(name, address, bytes, alignment) of the ring's parts."""

    @abstractmethod
    def _take(self) -> Chain | None:
        """The next available chain, parsed and checked."""

    @abstractmethod
    def _give(self, chain: Chain, written: int) -> None:
        """Mark a chain as used."""

    @abstractmethod
    def available(self) -> bool:
        """Whether the driver has made something available that was not taken."""

    @abstractmethod
    def enable_notifications(self, wanted: bool) -> None:
        """Tell the driver whether it need ring the doorbell for what it adds from now on."""

    @abstractmethod
    def interrupt_due(self) -> bool:
        """Whether the driver wants an interrupt for what was used since this was last asked."""

    def pop(self) -> Chain | None:
        """Take the next chain, or None if there is none.

        Raises:
            QueueBroken: the ring holds something that cannot be served.
        """
        try:
            chain = self.state.reissue.pop(0) if self.state.reissue else self._take()
        except BadAddress as error:
            raise QueueBroken(str(error)) from None
        if chain is not None:
            self.state.serial += 1
            chain.serial = self.state.serial
            self.state.in_flight[chain.serial] = chain
        return chain

    def push(self, chain: Chain, written: int) -> None:
        """Give a chain back; `written` bytes of its writable part hold data."""
        del self.state.in_flight[chain.serial]
        self._give(chain, written)

    def unpop(self, chain: Chain) -> None:
        """Put a chain back that could not be served yet: it is the next to be taken."""
        del self.state.in_flight[chain.serial]
        self.state.reissue.insert(0, chain)

    def _indirect(self, chain: Chain, address: int, size: int) -> bytes:
        """The table of an indirect descriptor (2.7.5.3, 2.8.8), in one copy."""
        if not self.indirect:
            raise QueueBroken("an indirect descriptor, which was not negotiated")
        if size == 0 or size % 16:
            raise QueueBroken(f"an indirect table of {size} bytes")
        if size > 16 * MAX_CHAIN:
            raise QueueBroken(f"a chain of {size // 16} descriptors")
        if not self.ram.contains(address, size):
            raise QueueBroken(f"an indirect table at {address:#x}, outside RAM")
        return self.ram.read(address, size)


def _checked_length(chain: Chain) -> Chain:
    if chain.readable_bytes + chain.writable_bytes > _MAX_LENGTH:
        raise QueueBroken("a chain of more than 2^32-1 bytes")
    return chain


def _need_event(event: int, new: int, old: int) -> bool:
    """Whether `event` was passed on the way from `old` to `new` (2.7.10)."""
    return ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)


class SplitQueue(Queue):
    """A split virtqueue: descriptor table, available ring, used ring."""

    def _parts(self) -> list[tuple[str, int, int, int]]:
        state = self.state
        if state.size & (state.size - 1):
            raise QueueBroken(f"a split ring of {state.size} entries, not a power of two")
        return [
            ("descriptor table", state.descriptors, 16 * state.size, 16),
            ("available ring", state.driver, 6 + 2 * state.size, 2),
            ("used ring", state.device, 6 + 8 * state.size, 4),
        ]

    def available(self) -> bool:
        """Whether the driver's index has moved on."""
        state = self.state
        return bool(state.reissue) or self.ram.load16(state.driver + 2) != state.next_avail

    def _take(self) -> Chain | None:
        state = self.state
        waiting = (self.ram.load16(state.driver + 2) - state.next_avail) & 0xFFFF
        if not waiting:
            return None
        if waiting > state.size:
            raise QueueBroken(f"{waiting} chains made available in a ring of {state.size}")
        full_barrier()
        head = self.ram.load16(state.driver + 4 + 2 * (state.next_avail % state.size))
        chain = self._walk(head)
        state.next_avail = (state.next_avail + 1) & 0xFFFF
        return _checked_length(chain)

    def _walk(self, head: int) -> Chain:
        ram, state = self.ram, self.state
        chain = Chain(identity=head, count=1)
        table = b""  # the ring's own, descriptor by descriptor, until an indirect one
        base, size, index = state.descriptors, state.size, head
        for _ in range(MAX_CHAIN):
            if index >= size:
                raise QueueBroken(f"descriptor {index} of a table of {size}")
            raw = table[16 * index : 16 * index + 16] if table else ram.read(base + 16 * index, 16)
            address, length, flags, following = _DESCRIPTOR.unpack(raw)
            if flags & _INDIRECT:
                if table or flags & _NEXT:
                    raise QueueBroken("an indirect descriptor inside a table or with a successor")
                table = self._indirect(chain, address, length)
                size, index = length // 16, 0
                continue
            chain.add(ram, address, length, flags)
            if not flags & _NEXT:
                return chain
            index = following
        raise QueueBroken(f"a chain of more than {MAX_CHAIN} descriptors, or a loop of them")

    def _give(self, chain: Chain, written: int) -> None:
        state = self.state
        element = state.device + 4 + 8 * (state.next_used % state.size)
        self.ram.write(element, _USED_ELEMENT.pack(chain.identity, written))
        full_barrier()
        state.next_used = (state.next_used + 1) & 0xFFFF
        self.ram.store16(state.device + 2, state.next_used)

    def enable_notifications(self, wanted: bool) -> None:
        """With the event index, its value; without, the flag of the used ring."""
        state = self.state
        if self.event_idx:
            if wanted:
                self.ram.store16(state.device + 4 + 8 * state.size, state.next_avail)
        else:
            self.ram.store16(state.device, 0 if wanted else 1)
        full_barrier()

    def interrupt_due(self) -> bool:
        """`used_event`, or the flag of the available ring."""
        state = self.state
        full_barrier()
        old, state.signalled_used = state.signalled_used, state.next_used
        if not self.event_idx:
            return not self.ram.load16(state.driver) & 1
        if old is None:
            return True
        event = self.ram.load16(state.driver + 4 + 2 * state.size)
        return _need_event(event, state.next_used, old)


class PackedQueue(Queue):
    """A packed virtqueue: one ring of descriptors, and two event suppression structures."""

    def _parts(self) -> list[tuple[str, int, int, int]]:
        state = self.state
        return [
            ("descriptor ring", state.descriptors, 16 * state.size, 16),
            ("driver event suppression", state.driver, 4, 4),
            ("device event suppression", state.device, 4, 4),
        ]

    def _is_available(self, flags: int) -> bool:
        wrap = self.state.avail_wrap
        return bool(flags & _AVAIL) == wrap and bool(flags & _USED) != wrap

    def available(self) -> bool:
        """Whether the next descriptor carries the driver's mark."""
        state = self.state
        if state.reissue:
            return True
        return self._is_available(self.ram.load16(state.descriptors + 16 * state.next_avail + 14))

    def _take(self) -> Chain | None:
        ram, state = self.ram, self.state
        place, wrap = state.next_avail, state.avail_wrap
        if not self._is_available(ram.load16(state.descriptors + 16 * place + 14)):
            return None
        full_barrier()
        chain = Chain(identity=0, count=0)
        while True:
            if chain.count == state.size:
                raise QueueBroken("a chain longer than the ring")
            raw = ram.read(state.descriptors + 16 * place, 16)
            address, length, identity, flags = _DESCRIPTOR.unpack(raw)
            chain.count += 1
            place += 1
            if place == state.size:
                place, wrap = 0, not wrap
            if flags & _INDIRECT:
                if chain.count > 1 or flags & _NEXT:
                    raise QueueBroken("an indirect descriptor within a chain")
                table = self._indirect(chain, address, length)
                for inner_address, inner_length, _, inner in _DESCRIPTOR.iter_unpack(table):
                    # Only WRITE counts in a table (2.8.8).
                    chain.add(ram, inner_address, inner_length, inner & _WRITE)
                break
            chain.add(ram, address, length, flags)
            if not flags & _NEXT:
                break
        chain.identity = identity
        state.next_avail, state.avail_wrap = place, wrap
        return _checked_length(chain)

    def _give(self, chain: Chain, written: int) -> None:
        state = self.state
        place = state.descriptors + 16 * state.next_used
        self.ram.write(place + 8, _ID_AND_LENGTH.pack(written, chain.identity))
        full_barrier()
        flags = (_AVAIL | _USED if state.used_wrap else 0) | (_WRITE if written else 0)
        self.ram.store16(place + 14, flags)
        state.next_used += chain.count
        if state.next_used >= state.size:
            state.next_used -= state.size
            state.used_wrap = not state.used_wrap
            if state.signalled_used is not None:
                state.signalled_used -= state.size

    def enable_notifications(self, wanted: bool) -> None:
        """The device's event suppression structure (2.8.14)."""
        state = self.state
        if not wanted:
            flags = _EVENTS_DISABLE
        elif self.event_idx:
            self.ram.store16(state.device, state.next_avail | int(state.avail_wrap) << 15)
            full_barrier()
            flags = _EVENTS_DESCRIPTOR
        else:
            flags = _EVENTS_ENABLE
        self.ram.store16(state.device + 2, flags)
        full_barrier()

    def interrupt_due(self) -> bool:
        """The driver's event suppression structure (2.8.14)."""
        state = self.state
        full_barrier()
        old, state.signalled_used = state.signalled_used, state.next_used
        flags = self.ram.load16(state.driver + 2) & 3
        if flags == _EVENTS_DISABLE:
            return False
        if flags != _EVENTS_DESCRIPTOR or not self.event_idx or old is None:
            return True
        full_barrier()
        wanted = self.ram.load16(state.driver)
        event = wanted & 0x7FFF
        if bool(wanted >> 15) != state.used_wrap:
            event -= state.size
        return _need_event(event, state.next_used, old)


def make_queue(ram: Ram, state: QueueState, features: int) -> Queue:
    """The ring that the negotiated features ask for.

    Raises:
        QueueBroken: its size or its addresses are of no use.
    """
    if not 0 < state.size <= state.size_max:
        raise QueueBroken(f"a ring of {state.size} entries, where 1 to {state.size_max} may be")
    kind = PackedQueue if features >> RING_PACKED & 1 else SplitQueue
    return kind(ram, state, features)
