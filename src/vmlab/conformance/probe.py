"""The guest's own view of its machine, which the suite compares with what the hypervisor says.

A `GuestProbe` is how one kind of guest is asked. `ChannelProbe` speaks the protocol of the probe
that simulated guests run on the channel "vmlab.probe": one JSON object a line,
`{"id": n, "do": NAME, ...}` answered by `{"id": n, "result": X}` or `{"id": n, "error": TEXT}`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from vmlab.hypervisors.base import Machine
from vmlab.machine.errors import ChannelClosed, OperationFailed

PROBE_CHANNEL: Final = "vmlab.probe"


@dataclass(frozen=True, slots=True)
class GuestDisk:
    """A disk as the guest sees it; `size` in bytes."""

    name: str
    size: int
    readonly: bool = False


@dataclass(frozen=True, slots=True)
class GuestNic:
    """A network interface as the guest sees it."""

    name: str
    mac: str
    link: bool = True


@dataclass(frozen=True, slots=True)
class GuestNode:
    """A NUMA node as the guest sees it; `memory` in bytes."""

    memory: int
    cpus: tuple[int, ...]


class GuestProbe(Protocol):
    """What the suite asks of a guest; each question is answered by the guest itself.

    A guest that cannot answer one raises GuestCannotTell, and the check that needs it is skipped.
    A guest that is dead raises ChannelClosed.
    """

    async def vcpus(self) -> int:
        """vCPUs that the guest uses."""

    async def memory(self) -> int:
        """Bytes of memory that the guest was given."""

    async def memory_left(self) -> int:
        """Bytes of memory that the guest can use now; less than it was given under pressure."""

    async def architecture(self) -> str:
        """What `uname -m` says."""

    async def hostname(self) -> str:
        """The name of the machine."""

    async def disks(self) -> Sequence[GuestDisk]:
        """Its disks."""

    async def nics(self) -> Sequence[GuestNic]:
        """Its network interfaces."""

    async def nodes(self) -> Sequence[GuestNode]:
        """Its NUMA nodes."""

    async def pinning(self) -> Mapping[int, tuple[int, ...]]:
        """vCPU -> the CPUs of the host that it really runs on, where that can be seen."""

    async def read_memory(self, offset: int, length: int) -> bytes:
        """Bytes of the guest's memory that only the suite writes."""

    async def write_memory(self, offset: int, data: bytes) -> None:
        """Write there."""

    async def read_disk(self, disk: str, offset: int, length: int) -> bytes:
        """Bytes of a disk."""

    async def write_disk(self, disk: str, offset: int, data: bytes) -> None:
        """Write to a disk, without a flush."""

    async def flush(self, disk: str) -> None:
        """Make what was written to a disk durable."""

    async def ticks(self) -> int:
        """Milliseconds that the guest has run since it was booted."""

    async def clock(self) -> float:
        """The guest's idea of Unix time, in seconds."""

    async def entropy(self) -> bytes:
        """The next 16 bytes of the guest's random numbers."""

    async def print(self, text: str) -> None:
        """Print a line of its own on the serial console."""

    async def typed(self) -> bytes:
        """What was written into the serial console since this was asked for the first time."""

    async def show(self, text: str) -> None:
        """Show a text on the display, instead of what is there."""

    async def pressed(self) -> Sequence[str]:
        """The keys that were pressed since this was asked for the first time.

        Those held together are joined by a dash.
        """

    async def read_file(self, path: str) -> bytes:
        """The contents of a file in the guest."""

    async def mount_shares(self) -> None:
        """Have the machine's shares at their places, where the guest does not do so by itself."""

    async def panic(self, message: str) -> None:
        """Die, as a kernel does, with the message on the console."""

    async def poweroff(self) -> None:
        """Power down by itself."""

    async def ignore_powerdown(self, on: bool) -> None:
        """Whether to ignore the request to power down."""

    async def send(self, nic: str, data: bytes) -> None:
        """Send a packet to all others on the NIC's segment."""

    async def received(self, nic: str) -> Sequence[bytes]:
        """The packets that the NIC received since this was last asked; none at first."""

    async def echo(self, channel: str) -> None:
        """Send back what comes on a channel, where the guest does not do so by itself."""

    async def become(self, origin: Machine) -> None:
        """Be told that it is a copy of `origin`'s guest, or that itself, and what time it is.

        A guest that finds out by itself is told nothing.

        From then on it has the name and the addresses of its own machine, and its own random
        numbers.
        """


class GuestCannotTell(Exception):
    """The probe of this kind of guest does not know the question."""


class ChannelProbe:
    """The probe of a guest that answers on a channel; each question opens the channel anew.

    Args:
        machine: Whose guest is asked.
        channel: Name of the channel.
    """

    def __init__(self, machine: Machine, channel: str = PROBE_CHANNEL) -> None:
        self._machine = machine
        self._channel = channel
        self._numbers = itertools.count(1)

    async def ask(self, name: str, **arguments: Any) -> Any:
        """The guest's answer to one question.

        Raises:
            ChannelClosed: the guest died before it answered.
            OperationFailed: the guest answered with an error.
        """
        number = next(self._numbers)
        question = json.dumps({"id": number, "do": name, **arguments}).encode() + b"\n"
        received = b""
        async with await self._machine.channel(self._channel) as channel:
            await channel.write(question)
            while True:
                line, newline, rest = received.partition(b"\n")
                if not newline:
                    more = await channel.read()
                    if not more:
                        raise ChannelClosed(
                            f"the guest ended before it answered {name!r}",
                            machine=self._machine.name,
                        )
                    received += more
                    continue
                received = rest
                answer = json.loads(line)
                if answer.get("id") == number:
                    break
        if "error" in answer:
            raise OperationFailed(
                f"the guest could not {name}: {answer['error']}", machine=self._machine.name
            )
        return answer["result"]

    async def vcpus(self) -> int:
        return int(await self.ask("vcpus"))

    async def memory(self) -> int:
        return int(await self.ask("memory"))

    async def memory_left(self) -> int:
        return await self.memory()

    async def architecture(self) -> str:
        return str(await self.ask("architecture"))

    async def hostname(self) -> str:
        return str(await self.ask("hostname"))

    async def disks(self) -> Sequence[GuestDisk]:
        return [
            GuestDisk(disk["name"], disk["size"], disk["readonly"])
            for disk in await self.ask("disks")
        ]

    async def nics(self) -> Sequence[GuestNic]:
        return [GuestNic(nic["name"], nic["mac"], nic["link"]) for nic in await self.ask("nics")]

    async def nodes(self) -> Sequence[GuestNode]:
        return [GuestNode(node["memory"], tuple(node["cpus"])) for node in await self.ask("nodes")]

    async def pinning(self) -> Mapping[int, tuple[int, ...]]:
        pinned = await self.ask("pinning")
        return {int(vcpu): tuple(cpus) for vcpu, cpus in pinned.items()}

    async def read_memory(self, offset: int, length: int) -> bytes:
        return bytes.fromhex(await self.ask("read_memory", offset=offset, length=length))

    async def write_memory(self, offset: int, data: bytes) -> None:
        await self.ask("write_memory", offset=offset, data=data.hex())

    async def read_disk(self, disk: str, offset: int, length: int) -> bytes:
        return bytes.fromhex(await self.ask("read_disk", disk=disk, offset=offset, length=length))

    async def write_disk(self, disk: str, offset: int, data: bytes) -> None:
        await self.ask("write_disk", disk=disk, offset=offset, data=data.hex())

    async def flush(self, disk: str) -> None:
        await self.ask("flush", disk=disk)

    async def ticks(self) -> int:
        return int(await self.ask("ticks"))

    async def clock(self) -> float:
        return float(await self.ask("clock"))

    async def entropy(self) -> bytes:
        return bytes.fromhex(await self.ask("entropy"))

    async def print(self, text: str) -> None:
        await self.ask("print", text=f"\n{text}\n")

    async def typed(self) -> bytes:
        return str(await self.ask("typed")).encode()

    async def show(self, text: str) -> None:
        await self.ask("show", text=text)

    async def pressed(self) -> Sequence[str]:
        return tuple(await self.ask("pressed"))

    async def read_file(self, path: str) -> bytes:
        return bytes.fromhex(await self.ask("read_file", path=path))

    async def mount_shares(self) -> None:
        """They are there."""

    async def panic(self, message: str) -> None:
        await self._end("panic", message=message)

    async def poweroff(self) -> None:
        await self._end("poweroff")

    async def _end(self, name: str, **arguments: Any) -> None:
        try:
            await self.ask(name, **arguments)
        except ChannelClosed:
            # The guest ended before its answer was out, which is what it was asked to do.
            return

    async def ignore_powerdown(self, on: bool) -> None:
        await self.ask("ignore_powerdown", on=on)

    async def send(self, nic: str, data: bytes) -> None:
        await self.ask("send", nic=nic, data=data.hex())

    async def received(self, nic: str) -> Sequence[bytes]:
        return [bytes.fromhex(packet) for packet in await self.ask("received", nic=nic)]

    async def echo(self, channel: str) -> None:
        """It does so by itself."""

    async def become(self, origin: Machine) -> None:
        """It finds out by itself."""
