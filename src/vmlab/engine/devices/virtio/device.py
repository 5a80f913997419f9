"""What every virtio device has: features, status, queues, requests (virtio 1.2, 2).

A device is a subclass that names its id, features and queues and serves requests; how the guest
reaches it (virtio-mmio) is the transport's. Requests are served by workers, not by the hart that
rang the doorbell. Whatever the driver does wrong ends in `DEVICE_NEEDS_RESET` (2.1.2), never in
an exception that leaves this package.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final

from vmlab.engine.devices.virtio.queue import (
    EVENT_IDX,
    INDIRECT_DESC,
    RING_PACKED,
    VERSION_1,
    Chain,
    Queue,
    QueueBroken,
    QueueState,
    make_queue,
)
from vmlab.engine.devices.workers import Work, Workers
from vmlab.engine.memory.ram import BadAddress, Ram

ACKNOWLEDGE: Final = 1
DRIVER: Final = 2
DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
NEEDS_RESET: Final = 64
FAILED: Final = 128
"""Bits of the device status (2.1)."""

USED_BUFFER: Final = 1
CONFIG_CHANGE: Final = 2
"""Bits of the interrupt status (4.2.2)."""

RING_FEATURES: Final = 1 << INDIRECT_DESC | 1 << EVENT_IDX | 1 << VERSION_1 | 1 << RING_PACKED


class Stale(Exception):
    """The device was reset while the request was served; there is nobody to answer any more."""


@dataclass
class VirtioState:
    """Everything that a snapshot must hold of the part that all devices share."""

    status: int = 0
    features: int = 0
    interrupt_status: int = 0
    config_generation: int = 0
    queues: list[QueueState] = field(default_factory=list)
    broken: str = ""
    """Why the device needs a reset."""


class Request:
    """A chain while the device serves it, with a place in what is read and what is written."""

    def __init__(self, device: VirtioDevice, index: int, queue: Queue, chain: Chain) -> None:
        self.index = index
        self.queue = queue
        self.chain = chain
        self._device = device
        self._read = 0
        self._written = 0
        self.readable = chain.readable_bytes
        self.writable = chain.writable_bytes

    @property
    def left_to_read(self) -> int:
        """Bytes that `read` has not returned yet."""
        return self.readable - self._read

    @property
    def left_to_write(self) -> int:
        """Bytes that `write` has room for."""
        return self.writable - self._written

    def read(self, size: int) -> bytes:
        """The next bytes that the driver wrote: `size`, or what is left."""
        data = self._device.ram.gather(_slice(self.chain.readable, self._read, size))
        self._read += len(data)
        return data

    def write(self, data: bytes) -> int:
        """Write into the driver's buffer after what was written before; how many bytes fitted."""
        done = self.write_at(self._written, data)
        self._written += done
        return done

    def write_at(self, offset: int, data: bytes) -> int:
        """Write at `offset` of the writable part; how many bytes fitted.

        Raises:
            Stale: the device was reset, and the memory is the driver's again.
        """
        with self._device.lock:
            if not self._device.serves(self.queue, self.index):
                raise Stale
            return self._device.ram.scatter(_slice(self.chain.writable, offset, len(data)), data)

    @property
    def written(self) -> int:
        """Bytes that `write` has written."""
        return self._written

    def done(self, written: int | None = None) -> None:
        """Give the buffer back with `written` bytes in it (None: those that `write` wrote)."""
        self._device.complete(self, self._written if written is None else written)

    def put_back(self) -> None:
        """Do not serve it now: it is the next one again."""
        self._device.put_back(self)


def _slice(segments: list[tuple[int, int]], offset: int, size: int) -> list[tuple[int, int]]:
    """The part of segments that holds `size` bytes from `offset` on, or less at the end."""
    part: list[tuple[int, int]] = []
    for address, length in segments:
        if size <= 0:
            break
        if offset >= length:
            offset -= length
            continue
        here = min(size, length - offset)
        part.append((address + offset, here))
        size -= here
        offset = 0
    return part


class VirtioDevice:
    """A virtio device.

    Args:
        name: What it is called in messages; different for each device of a machine.
        ram: The guest's memory.
        workers: Who serves requests.
        queue_sizes: The largest size of each queue, in order.
        features: Bits that it offers beside those of the rings.
    """

    device_id: ClassVar[int]

    def __init__(
        self, name: str, ram: Ram, workers: Workers, queue_sizes: list[int], features: int
    ) -> None:
        self.name = name
        self.ram = ram
        self.offered = features | RING_FEATURES
        self.lock = threading.RLock()
        self.state = VirtioState(queues=[QueueState(size) for size in queue_sizes])
        self.interrupt: Callable[[bool], None] = lambda level: None
        """The interrupt line; the transport sets it."""
        self._queues: list[Queue | None] = [None] * len(queue_sizes)
        self._works: list[Work] = [
            workers.work(f"{name}.{index}", self._server(index))
            for index in range(len(queue_sizes))
        ]

    # ------------------------------------------------------------------ what a device provides

    def config(self) -> bytes:
        """The device's configuration space as it is now."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes into the configuration space; most devices have nothing to write."""

    def handle(self, request: Request) -> None:
        """Serve one request and call its `done`, or `put_back`, or keep it for later.

        Not asked of a device that provides `process` for all its queues.

        Raises:
            QueueBroken: the request is not one; the device will need a reset.
        """
        raise QueueBroken(f"{self.name} serves no requests")

    def process(self, index: int) -> None:
        """A queue was rung: take what there is. A device that fills buffers does it otherwise."""
        while (request := self.take(index)) is not None:
            self.handle(request)

    def on_features(self) -> None:
        """The features were negotiated."""

    def on_ready(self) -> None:
        """The driver is up (DRIVER_OK): what waits for it may begin."""

    def on_reset(self) -> None:
        """Forget what belongs to the driver's time."""

    def close(self) -> None:
        """Release what the device holds on the host."""

    # ---------------------------------------------------------------------------- the transport

    def has(self, feature: int) -> bool:
        """Whether the feature bit of this number was negotiated."""
        return bool(self.state.features >> feature & 1)

    @property
    def running(self) -> bool:
        """Whether the driver is up and has broken nothing."""
        wanted = DRIVER_OK | FEATURES_OK
        return self.state.status & (wanted | NEEDS_RESET) == wanted

    def set_status(self, status: int) -> None:
        """The driver writes the device status; 0 resets."""
        with self.lock:
            if status == 0:
                self.reset()
                return
            state = self.state
            if status & FEATURES_OK and not state.status & FEATURES_OK:
                if self._features_acceptable():
                    self.on_features()
                else:
                    status &= ~FEATURES_OK
            started = status & DRIVER_OK and not state.status & DRIVER_OK
            state.status = (status & 0xFF & ~NEEDS_RESET) | (state.status & NEEDS_RESET)
            if started and self.running:
                self.on_ready()
                for index in range(len(self._queues)):
                    self.notify(index)

    def _features_acceptable(self) -> bool:
        features = self.state.features
        return not features & ~self.offered and bool(features >> VERSION_1 & 1)

    def reset(self) -> None:
        """As it was before the driver came."""
        with self.lock:
            sizes = [queue.size_max for queue in self.state.queues]
            generation = self.state.config_generation
            self.state = VirtioState(
                queues=[QueueState(size) for size in sizes], config_generation=generation
            )
            self._queues = [None] * len(sizes)
            self.interrupt(False)
            self.on_reset()

    def set_ready(self, index: int, ready: bool) -> None:
        """The driver says that a queue is set up, or takes it back."""
        with self.lock:
            state = self.state.queues[index]
            if not ready:
                # Whatever is in flight belongs to a ring that is no more.
                self.state.queues[index] = QueueState(state.size_max)
                self._queues[index] = None
                return
            if state.ready:
                return
            try:
                self._queues[index] = make_queue(self.ram, state, self.state.features)
            except QueueBroken as error:
                self.break_down(f"queue {index}: {error}")
                return
            state.ready = True

    def notify(self, index: int) -> None:
        """The doorbell of a queue; nothing happens before the driver is up."""
        if index < len(self._works) and self.running and self._queues[index] is not None:
            self._works[index].kick()

    def acknowledge(self, bits: int) -> None:
        """The driver has seen these interrupts."""
        with self.lock:
            self.state.interrupt_status &= ~bits
            self.interrupt(self.state.interrupt_status != 0)

    def restore(self, state: VirtioState) -> None:
        """Go on from a saved state; what was in flight is issued again."""
        with self.lock:
            self.state = state
            for index, queue in enumerate(state.queues):
                flying = [queue.in_flight[serial] for serial in sorted(queue.in_flight)]
                queue.reissue = flying + queue.reissue
                queue.in_flight = {}
                self._queues[index] = (
                    make_queue(self.ram, queue, state.features) if queue.ready else None
                )
            self.interrupt(state.interrupt_status != 0)
            if self.running:
                for index in range(len(self._queues)):
                    self.notify(index)

    # ------------------------------------------------------------------------- inside a device

    def break_down(self, why: str) -> None:
        """The driver broke the rules: the device does nothing more until it is reset."""
        with self.lock:
            state = self.state
            if state.status & NEEDS_RESET:
                return
            state.broken = why
            state.status |= NEEDS_RESET
            if state.status & DRIVER_OK:
                self._raise(CONFIG_CHANGE)

    def config_changed(self) -> None:
        """Tell the driver that the configuration space is different now."""
        with self.lock:
            self.state.config_generation = (self.state.config_generation + 1) & 0xFFFF_FFFF
            if self.state.status & DRIVER_OK:
                self._raise(CONFIG_CHANGE)

    def _raise(self, bits: int) -> None:
        self.state.interrupt_status |= bits
        self.interrupt(True)

    def kick(self, index: int) -> None:
        """Let a queue be served although nobody rang: something has come from outside."""
        self.notify(index)

    def take(self, index: int) -> Request | None:
        """The next request of a queue, or None; the driver is then told to ring for the next."""
        with self.lock:
            queue = self._queues[index]
            if queue is None or not self.running:
                return None
            try:
                chain = queue.pop()
                if chain is None:
                    queue.enable_notifications(True)
                    # It may have added one before it could see that it should ring.
                    chain = queue.pop() if queue.available() else None
                    if chain is None:
                        return None
            except (QueueBroken, BadAddress) as error:
                self.break_down(f"queue {index}: {error}")
                return None
            return Request(self, index, queue, chain)

    def serves(self, queue: Queue, index: int) -> bool:
        """Whether this ring is still the one of queue `index`: no reset has come between."""
        return self._queues[index] is queue

    def complete(self, request: Request, written: int) -> None:
        """`request.done(written)`."""
        with self.lock:
            queue = request.queue
            if not self.serves(queue, request.index):
                return
            queue.push(request.chain, written)
            if not self.state.status & NEEDS_RESET and queue.interrupt_due():
                self._raise(USED_BUFFER)

    def put_back(self, request: Request) -> None:
        """`request.put_back()`."""
        with self.lock:
            if self.serves(request.queue, request.index):
                request.queue.unpop(request.chain)

    def _server(self, index: int) -> Callable[[], None]:
        def serve() -> None:
            try:
                self.process(index)
            except Stale:
                pass  # the reset has thrown the request away
            except (QueueBroken, BadAddress) as error:
                self.break_down(f"queue {index}: {error}")

        return serve
