"""Frames of a NIC that are lost or late: QEMU hands them to a process beside it, which does that.

QEMU's netdevs pass all frames or none. While there is a fault, a filter-redirector on each side of
the NIC has them go through that process (docs/interop/qemu-qmp-ref, "FilterRedirectorProperties").
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from vmlab.hypervisors.monitored import device_faults
from vmlab.hypervisors.monitored.names import nic_backend, nic_device
from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.qemu.companion import Companion
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qmp import QmpError, QmpLost
from vmlab.machine.faults import FaultKind
from vmlab.machine.spec import MachineSpec

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner

Clear = Callable[[], Awaitable[None]]

MODULE: Final = "vmlab.hypervisors.qemu.wire_server"
COUNTED: Final = frozenset({FaultKind.NET_LOSS, FaultKind.NET_DELAY})
"""Kinds that such a process knows, and whose occasions it counts."""
_ORDER: Final = {"rx": ("back", "out"), "tx": ("out", "back")}
"""The redirectors of each direction in the order in which they are added: what comes back is handed
to those behind, which in the direction of what the guest sends are those that were added before
(netfilter_next in QEMU's net/filter.c). So nothing goes out twice."""
_QUEUES: Final = tuple(_ORDER)
_ENDS: Final = {"out": "outdev", "back": "indev"}


@dataclass
class _Detour:
    """The way that a NIC's frames take while they are struck."""

    companion: Companion
    faults: set[str] = field(default_factory=set)


class Wires:
    """The NICs of one QEMU process whose frames are struck.

    Args:
        emulator: The process.
        owner: Whose it is.
        machine: Id of the machine.
    """

    def __init__(self, emulator: Emulator, owner: Owner, machine: str) -> None:
        self.emulator = emulator
        self._owner = owner
        self._machine = machine
        self._detours: dict[str, _Detour] = {}
        self._numbers = itertools.count(1)

    async def strike(
        self, spec: MachineSpec, identity: str, fault: device_faults.FrameFault
    ) -> Clear:
        """Have frames of a NIC struck; what is returned mends that."""
        nic = fault.nic
        if nic not in self._detours:
            self._detours[nic] = await self._redirect(nic)
        detour = self._detours[nic]
        command = device_faults.net_fault(fault, nic_device(nic), identity, spec.seed)
        try:
            await detour.companion.tell(spec.name, *command)
        except BaseException:
            if not detour.faults:
                await uninterrupted(self._straighten(nic))
            raise
        detour.faults.add(identity)

        async def mend() -> None:
            detour.faults.discard(identity)
            if detour.faults:
                await detour.companion.tell(spec.name, *device_faults.ending(identity))
            else:
                await uninterrupted(self._straighten(nic))

        return mend

    async def _redirect(self, nic: str) -> _Detour:
        """Have a NIC's frames go through a process; nothing is left if that fails."""
        name = f"wire{next(self._numbers)}"
        purpose = "loses and delays packets"
        companion = Companion(MODULE, purpose, name, self.emulator.directory)
        sockets = [[f"{name}-{queue}-{way}.sock" for way in ("out", "back")] for queue in _QUEUES]
        process = await companion.start(sockets, owner=self._owner, machine=self._machine)
        # It ends with its QEMU.
        self.emulator.daemons.processes.append(process)
        detour = _Detour(companion)
        try:
            for queue in _QUEUES:
                for way in ("out", "back"):
                    await self.emulator.execute("chardev-add", _chardev(f"{name}-{queue}-{way}"))
            for queue, ways in _ORDER.items():
                for way in ways:
                    redirector = {
                        "qom-type": "filter-redirector",
                        "id": f"{name}-{queue}-{way}",
                        "netdev": nic_backend(nic),
                        "queue": queue,
                        _ENDS[way]: f"{name}-{queue}-{way}",
                    }
                    await self.emulator.execute("object-add", redirector)
        except BaseException:
            await uninterrupted(self._remove(detour))
            process.kill()
            await uninterrupted(process.wait())
            raise
        return detour

    async def _straighten(self, nic: str) -> None:
        """Have a NIC's frames go their own way again."""
        detour = self._detours.pop(nic, None)
        if detour is not None:
            await self._remove(detour)

    async def _remove(self, detour: _Detour) -> None:
        name = detour.companion.name
        for way in ("out", "back"):
            for queue in _QUEUES:
                await self._away("object-del", f"{name}-{queue}-{way}")
        for way in ("out", "back"):
            for queue in _QUEUES:
                await self._away("chardev-remove", f"{name}-{queue}-{way}")

    async def _away(self, command: str, name: str) -> None:
        """Remove something that may not have come about, or have gone with its NIC."""
        if self.emulator.running:
            with suppress(QmpError, QmpLost):
                await self.emulator.execute(command, {"id": name})


def _chardev(name: str) -> dict[str, Any]:
    """A stream to the process, as `chardev-add` takes it."""
    address = {"type": "unix", "data": {"path": f"{name}.sock"}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    return {"id": name, "backend": backend}
