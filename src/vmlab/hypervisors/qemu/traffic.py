"""What goes over a NIC: packets and bytes, counted out of QEMU's packet dumps.

QEMU 7.2 counts nothing itself. A filter-dump on each side of a NIC writes the head of every packet
into a file in the pcap format (pcap-savefile(5)), 17 bytes for each, which is read as it grows.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmlab.hypervisors.monitored.names import nic_backend
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qmp import QmpError
from vmlab.machine.metrics import NicMetrics

_HEADER: Final = 24
"""Bytes at the beginning of a file."""
_RECORD: Final = struct.Struct("=IIII")
"""Before each packet: time (two fields), bytes that are in the file, bytes that the packet had."""
_KEPT: Final = 1
"""Bytes of each packet that are written; none is not possible."""

# The queue of QEMU's side of the wire: what the guest sends, that side receives.
_QUEUES: Final = {"sent": "rx", "received": "tx"}


@dataclass(slots=True)
class _Count:
    """Packets and bytes in one direction, and how far the file was read."""

    packets: int = 0
    bytes: int = 0
    position: int = _HEADER

    def read(self, path: Path) -> None:
        """Count what was written since."""
        with path.open("rb") as file:
            file.seek(self.position)
            data = file.read()
        step = _RECORD.size + _KEPT
        whole = len(data) - len(data) % step
        for offset in range(0, whole, step):
            self.bytes += _RECORD.unpack_from(data, offset)[3]
        self.packets += whole // step
        self.position += whole


class Traffic:
    """The counts of a process's NICs, since it was started."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._counts: dict[tuple[str, str], _Count] = {}

    def _file(self, nic: str, direction: str) -> Path:
        return self._directory / f"traffic-{nic}-{direction}.pcap"

    async def watch(self, emulator: Emulator, nic: str) -> None:
        """Count what goes over a NIC from now on."""
        for direction, queue in _QUEUES.items():
            await emulator.execute("object-add", self._dump(nic, direction, queue))
            self._counts[nic, direction] = _Count()

    def _dump(self, nic: str, direction: str, queue: str) -> dict[str, Any]:
        return {
            "qom-type": "filter-dump",
            "id": f"traffic-{nic}-{direction}",
            "netdev": nic_backend(nic),
            "queue": queue,
            "file": str(self._file(nic, direction)),
            "maxlen": _KEPT,
        }

    async def forget(self, emulator: Emulator, nic: str) -> None:
        """Stop counting what goes over a NIC that is about to go."""
        for direction in _QUEUES:
            if self._counts.pop((nic, direction), None) is not None:
                try:
                    await emulator.execute("object-del", {"id": f"traffic-{nic}-{direction}"})
                except QmpError:
                    # It went with the NIC's side of the wire.
                    continue
                self._file(nic, direction).unlink(missing_ok=True)

    def metrics(self, nic: str) -> NicMetrics:
        """What went over a NIC."""
        sent, received = (self._counts.setdefault((nic, way), _Count()) for way in _QUEUES)
        for direction, count in (("sent", sent), ("received", received)):
            if self._file(nic, direction).exists():
                count.read(self._file(nic, direction))
        return NicMetrics(
            name=nic,
            received_bytes=received.bytes,
            sent_bytes=sent.bytes,
            received_packets=received.packets,
            sent_packets=sent.packets,
        )
