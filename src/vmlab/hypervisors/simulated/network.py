"""The simulated wires: NICs on named networks that carry frames, and the host's ports.

Every NIC of a network gets what another one of it sends, as on a hub. "user" has no peers: what is
sent there leaves the host and only counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from vmlab.machine.errors import ResourceExhausted

if TYPE_CHECKING:
    from vmlab.hypervisors.simulated.hardware import Hardware

QUEUE: Final = 1024
"""Frames that a NIC holds for its guest; more are dropped."""
FIRST_PORT: Final = 20_000
"""The first port that is given where a forward asks for any."""


_COUNTERS: Final = (
    "received_bytes", "sent_bytes", "received_packets", "sent_packets", "dropped_packets",
)  # fmt: skip


class SimulatedNic:
    """One network interface of one machine."""

    __slots__ = (
        "dropped_packets",
        "forwards",
        "inbox",
        "link",
        "mac",
        "name",
        "network",
        "received_bytes",
        "received_packets",
        "sent_bytes",
        "sent_packets",
    )

    def __init__(self, name: str, network: str, mac: str) -> None:
        self.name = name
        self.network = network
        self.mac = mac
        self.link = network != "none"
        self.forwards: list[tuple[str, int, int]] = []
        self.inbox: deque[bytes] = deque()
        self.reset_counters()

    def reset_counters(self) -> None:
        """Begin to count traffic anew, as at power-on."""
        self.received_bytes = self.sent_bytes = 0
        self.received_packets = self.sent_packets = self.dropped_packets = 0

    def counters(self) -> dict[str, int]:
        """What was counted so far, by name."""
        return {counter: getattr(self, counter) for counter in _COUNTERS}

    def set_counters(self, counters: dict[str, int]) -> None:
        """Go on counting from there."""
        for counter in _COUNTERS:
            setattr(self, counter, counters.get(counter, 0))

    def deliver(self, frame: bytes) -> None:
        """A frame arrives; it is dropped where the link is down or the queue is full."""
        if not self.link or len(self.inbox) >= QUEUE:
            self.dropped_packets += 1
            return
        self.inbox.append(frame)
        self.received_bytes += len(frame)
        self.received_packets += 1


class Ports:
    """The host's ports that forwards use."""

    __slots__ = ("_limit", "_taken")

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._taken: dict[tuple[str, int], str] = {}

    def take(self, protocol: str, port: int, machine: str, *, or_any: bool = False) -> int:
        """Port `port` for `machine`; 0 is any, and with `or_any` so is one that is taken.

        Raises:
            ResourceExhausted: it is taken, or none is left.
        """
        if self._limit is not None and len(self._taken) >= self._limit:
            raise ResourceExhausted(
                f"all {self._limit} ports of the host are in use",
                hint="remove forwards of other machines",
                machine=machine,
            )
        holder = self._taken.get((protocol, port))
        if holder is not None and not or_any:
            raise ResourceExhausted(
                f"port {port}/{protocol} of the host is used by machine {holder!r}",
                hint="leave the host's port out to get any free one",
                machine=machine,
            )
        if port == 0 or holder is not None:
            port = next(
                free for free in range(FIRST_PORT, 65536) if (protocol, free) not in self._taken
            )
        self._taken[protocol, port] = machine
        return port

    def free(self, protocol: str, port: int) -> None:
        """Give a port back."""
        self._taken.pop((protocol, port), None)

    def __len__(self) -> int:
        return len(self._taken)


def peers(
    machines: Callable[[], Iterator[Hardware]], sender: Hardware, nic: SimulatedNic
) -> list[tuple[Hardware, SimulatedNic]]:
    """The NICs that hear what `nic` of `sender` sends, in the order of the machines."""
    if nic.network in {"user", "none"}:
        return []
    return [
        (machine, other)
        for machine in machines()
        if machine.has_power
        for other in machine.nics.values()
        if other.network == nic.network and (machine is not sender or other is not nic)
    ]
