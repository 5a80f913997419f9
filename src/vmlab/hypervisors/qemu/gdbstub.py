"""QEMU's gdbstub as a way to a guest's registers and physical memory, while its vCPUs stand still.

Only what `timers` needs of the GDB remote serial protocol (GDB manual, appendix "Remote Protocol";
QEMU's docs/system/gdb.rst has the packets of its own). Not a debugger: nothing here lets a guest
run, and the stub is gone when the conversation is over.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qmp import COMMAND_TIMEOUT, connect_socket
from vmlab.machine.errors import OperationFailed

_SOCKET: Final = "gdb.sock"
_PART: Final = 0x800
"""Bytes of a description that are asked for at once; QEMU's packets have 4096."""
_REGISTER: Final = re.compile(r'<reg name="(\w+)"[^>]*\bregnum="(\d+)"')


class GdbStub:
    """A conversation with the stub of one QEMU process; made by `gdbstub`.

    Args:
        machine: Name of the machine, for errors.
        reader: What the stub says.
        writer: What is said to it.
    """

    def __init__(
        self, machine: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._machine = machine
        self._reader = reader
        self._writer = writer

    async def ask(self, packet: str) -> str:
        """The answer to a packet.

        Raises:
            OperationFailed: the stub hung up, did not answer in time, or does not know the packet.
        """
        data = packet.encode("ascii")
        self._writer.write(b"$%s#%02x" % (data, sum(data) % 256))
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT):
                await self._reader.readuntil(b"$")
                answer = (await self._reader.readuntil(b"#"))[:-1]
                await self._reader.readexactly(2)
        except (OSError, EOFError) as error:
            # A timeout is an OSError, too.
            raise self._failed(packet, f"{type(error).__name__} {error}".strip()) from error
        self._writer.write(b"+")
        if not answer:
            raise self._failed(packet, "it does not know that")
        return answer.decode("latin-1")

    async def _ok(self, packet: str) -> None:
        answer = await self.ask(packet)
        if answer != "OK":
            raise self._failed(packet, answer)

    def _failed(self, packet: str, why: str) -> OperationFailed:
        return OperationFailed(
            f"QEMU's gdbstub did not do {packet[:40]!r}: {why}",
            machine=self._machine,
            hypervisor="qemu",
        )

    async def threads(self) -> list[str]:
        """The stub's names of the vCPUs, in their order."""
        found: list[str] = []
        answer = await self.ask("qfThreadInfo")
        while answer.startswith("m"):
            found += answer[1:].split(",")
            answer = await self.ask("qsThreadInfo")
        return found

    async def describe(self, feature: str) -> dict[str, int]:
        """The numbers of the registers in a part of the target's description, by name."""
        text = ""
        while True:
            part = await self.ask(f"qXfer:features:read:{feature}:{len(text):x},{_PART:x}")
            if part[0] not in "ml":
                raise self._failed(feature, part)
            text += part[1:]
            if part[0] == "l":
                return {name: int(number) for name, number in _REGISTER.findall(text)}

    async def choose(self, thread: str) -> None:
        """Have registers mean those of one vCPU."""
        await self._ok(f"Hg{thread}")

    async def read_register(self, number: int) -> int | None:
        """A register's value; None if the vCPU does not have it now."""
        answer = await self.ask(f"p{number:x}")
        return None if answer.startswith("E") else int.from_bytes(bytes.fromhex(answer), "little")

    async def write_register(self, number: int, value: int) -> None:
        """Write a register of 64 bits."""
        await self._ok(f"P{number:x}={value.to_bytes(8, 'little').hex()}")

    async def physical(self, on: bool) -> None:
        """Whether addresses are those of the machine, and not those of the vCPU's program."""
        await self._ok(f"Qqemu.PhyMemMode:{int(on)}")

    async def read_word(self, address: int) -> int:
        """The 64 bits at an address."""
        answer = await self.ask(f"m{address:x},8")
        if answer.startswith("E"):
            raise self._failed(f"m{address:x}", answer)
        return int.from_bytes(bytes.fromhex(answer), "little")

    async def write_word(self, address: int, value: int) -> None:
        """Write 64 bits to an address, at once."""
        await self._ok(f"M{address:x},8:{value.to_bytes(8, 'little').hex()}")


@asynccontextmanager
async def gdbstub(emulator: Emulator) -> AsyncIterator[GdbStub]:
    """Start the stub of a process whose vCPUs stand still, and end it afterwards.

    Its socket is in the process's own directory, which is its owner's alone, and has one client.

    Raises:
        OperationFailed: QEMU does not start it.
    """

    async def server(device: str) -> str:
        return str(
            await emulator.execute("human-monitor-command", {"command-line": f"gdbserver {device}"})
        ).strip()

    try:
        said = await server(f"unix:{_SOCKET},server=on,wait=off")
        try:
            stream = connect_socket(emulator.directory / _SOCKET)
        except OSError as error:
            raise OperationFailed(
                f"QEMU's gdbstub cannot be reached: {error.strerror}: {said}",
                machine=emulator.machine,
                hypervisor="qemu",
            ) from error
        reader, writer = await asyncio.open_connection(sock=stream, limit=1 << 16)
        try:
            yield GdbStub(emulator.machine, reader, writer)
        finally:
            # Hung up, not detached: detaching would let the guest run.
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
    finally:
        if emulator.running:
            await uninterrupted(server("none"))
