"""After a load each timer of a riscv64 guest is written once more, through QEMU's gdbstub.

The stub here is a stand-in that keeps registers and memory; the real one is in
tests/integration/qemu.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors.qemu import gdbstub as stubs
from vmlab.hypervisors.qemu.gdbstub import gdbstub
from vmlab.hypervisors.qemu.timers import rearm
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import OperationFailed

FIRST = 65
"""The stub's number of CSR 0, as QEMU 7.2 has it."""
CSRS = (
    '<feature name="org.gnu.gdb.riscv.csr">'
    f'<reg name="fflags" bitsize="64" regnum="{FIRST + 1}"/>'
    f'<reg name="mstatus" bitsize="64" regnum="{FIRST + 0x300}"/>' + " " * 3000 + "</feature>"
)


class Stub:
    """A process whose stub answers; `harts` are their CSRs, `memory` its words."""

    machine = "vm"
    running = True

    def __init__(self, directory: Path, *, nodes: tuple[int | None, ...] = (None,)) -> None:
        self.directory = directory
        self.nodes = nodes
        self.accelerator = "tcg"
        self.harts: list[dict[int, int]] = [{0x14D: 1000 + n} for n in range(len(nodes))]
        self.memory: dict[int, int] = {}
        self.written: list[tuple[str, int, int]] = []
        self.answers: dict[str, str] = {}
        self.served: list[str] = []
        self._hart = 0
        self._physical = False
        self.ended = asyncio.Event()
        self._served_one = False
        self._server: asyncio.Server | None = None

    @property
    def process(self) -> Any:
        class Process:
            argv = ("qemu", "-accel", self.accelerator)

        return Process

    async def execute(self, command: str, arguments: Any = None) -> Any:
        if command == "query-kvm":
            return {"enabled": False}
        if command == "query-cpus-fast":
            return [
                {"cpu-index": n, "thread-id": n, "props": {} if node is None else {"node-id": node}}
                for n, node in enumerate(self.nodes)
            ]
        assert command == "human-monitor-command"
        device = arguments["command-line"].removeprefix("gdbserver ")
        self.served.append(device)
        if device == "none":
            assert self._server is not None
            self._server.close()
            if self._served_one:
                await self.ended.wait()
            return "Disabled gdbserver\r\n"
        assert device == "unix:gdb.sock,server=on,wait=off"
        if "refused" in self.answers:
            return "Could not open gdbserver"
        path = self.directory / "gdb.sock"
        self._server = await asyncio.start_unix_server(self._serve, path)
        return "Waiting for gdb connection"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._served_one = True
        try:
            while True:
                await reader.readuntil(b"$")
                packet = (await reader.readuntil(b"#"))[:-1]
                assert int(await reader.readexactly(2), 16) == sum(packet) % 256
                answer = self._answer(packet.decode()).encode()
                writer.write(b"+$%s#%02x" % (answer, sum(answer) % 256))
                assert await reader.readexactly(1) == b"+"
        except asyncio.IncompleteReadError:
            """It hung up."""
        finally:
            writer.close()
            self.ended.set()

    def _answer(self, packet: str) -> str:
        for start, answer in self.answers.items():
            if packet.startswith(start):
                return answer
        name, _, rest = packet.partition(":")
        if name == "qXfer":
            assert rest.startswith("features:read:riscv-csr.xml:")
            offset, length = (int(part, 16) for part in rest.rpartition(":")[2].split(","))
            part = CSRS[offset : offset + length]
            return ("l" if offset + length >= len(CSRS) else "m") + part
        if name == "qfThreadInfo":
            return "m01"
        if name == "qsThreadInfo":
            # The other harts one after another.
            self._hart += 1
            return f"m{self._hart + 1:02x}" if self._hart < len(self.harts) else "l"
        if name == "Qqemu.PhyMemMode":
            self._physical = rest == "1"
            return "OK"
        if packet.startswith("Hg"):
            self._hart = int(packet[2:], 16) - 1
            return "OK"
        return self._access(packet)

    def _access(self, packet: str) -> str:
        kind, rest = packet[0], packet[1:]
        csrs = self.harts[self._hart] if self._hart < len(self.harts) else {}
        if kind == "p":
            value = csrs.get(int(rest, 16) - FIRST)
            return "E14" if value is None else value.to_bytes(8, "little").hex()
        if kind == "P":
            number, _, value = rest.partition("=")
            new = int.from_bytes(bytes.fromhex(value), "little")
            self.written.append((f"hart {self._hart}", int(number, 16) - FIRST, new))
            return "OK"
        assert self._physical, "the addresses are the machine's"
        where, _, value = rest.partition(":")
        address, length = (int(part, 16) for part in where.split(","))
        assert length == 8
        if kind == "m":
            return self.memory.get(address, 0).to_bytes(8, "little").hex()
        assert kind == "M"
        new = int.from_bytes(bytes.fromhex(value), "little")
        self.written.append(("memory", address, new))
        return "OK"


def rearmed(stub: Stub, architecture: Architecture = Architecture.RISCV64) -> None:
    asyncio.run(rearm(stub, architecture))  # a stand-in


def test_every_deadline_is_written_as_it_is(tmp_path: Path) -> None:
    stub = Stub(tmp_path, nodes=(None, None))
    stub.harts[1][0x24D] = 77
    stub.memory = {0x200_4000: 5, 0x200_4008: 6}
    rearmed(stub)
    assert stub.written == [
        ("hart 0", 0x14D, 1000),
        ("hart 1", 0x14D, 1001),
        ("hart 1", 0x24D, 77),
        ("memory", 0x200_4000, 5),
        ("memory", 0x200_4008, 6),
    ]
    assert not stub._physical
    assert stub.served[-1] == "none"


def test_hart_without_supervisor_timer_has_only_the_one_of_the_board(tmp_path: Path) -> None:
    stub = Stub(tmp_path)
    stub.harts[0].clear()
    rearmed(stub)
    assert stub.written == [("memory", 0x200_4000, 0)]


def test_each_node_is_a_socket_with_timers_of_its_own(tmp_path: Path) -> None:
    stub = Stub(tmp_path, nodes=(0, 0, 1))
    rearmed(stub)
    addresses = [address for kind, address, _ in stub.written if kind == "memory"]
    assert addresses == [0x200_4000, 0x200_4008, 0x201_4000]


def test_others_are_left_alone(tmp_path: Path) -> None:
    stub = Stub(tmp_path)
    for architecture in set(Architecture) - {Architecture.RISCV64}:
        rearmed(stub, architecture)
    stub.accelerator = "qtest"
    rearmed(stub)
    assert stub.served == []


@pytest.mark.parametrize(
    ("packet", "answer", "says"),
    [
        ("Hg", "E22", "'Hg01': E22"),
        ("Qqemu", "", "PhyMemMode:1': it does not know that"),
        ("qXfer", "E00", "'riscv-csr.xml': E00"),
        ("m200", "E14", "'m2004000': E14"),
    ],
)
def test_stub_that_refuses_is_named(tmp_path: Path, packet: str, answer: str, says: str) -> None:
    stub = Stub(tmp_path)
    stub.answers[packet] = answer
    with pytest.raises(OperationFailed, match=says):
        rearmed(stub)
    assert stub.served[-1] == "none"


def test_stub_that_does_not_start_is_told(tmp_path: Path) -> None:
    stub = Stub(tmp_path)
    stub.answers["refused"] = ""

    async def no_server(reader: Any, writer: Any) -> None:
        writer.close()

    async def attempt() -> None:
        stub._server = await asyncio.start_unix_server(no_server, tmp_path / "other.sock")
        await rearm(stub, Architecture.RISCV64)  # a stand-in

    with pytest.raises(OperationFailed, match=r"cannot be reached: .*Could not open gdbserver"):
        asyncio.run(attempt())
    assert stub.served[-1] == "none"


def test_stub_that_hangs_or_hangs_up_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stubs, "COMMAND_TIMEOUT", 0.05)
    for ends, says in ((False, "TimeoutError"), (True, "IncompleteReadError")):
        stub = Stub(tmp_path)

        async def attempt(stub: Stub, ends: bool) -> None:
            released = asyncio.Event()

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.readuntil(b"#")
                if not ends:
                    await released.wait()
                writer.close()

            stub._serve = serve  # it fails on cue
            try:
                async with gdbstub(stub) as talk:  # a stand-in
                    await talk.threads()
            finally:
                released.set()

        with pytest.raises(OperationFailed, match=says):
            asyncio.run(attempt(stub, ends))


def test_stub_of_a_process_that_has_ended_is_not_ended(tmp_path: Path) -> None:
    stub = Stub(tmp_path)

    async def attempt() -> None:
        async with gdbstub(stub):  # a stand-in
            stub.running = False
        assert stub._server is not None
        stub._server.close()
        await stub.ended.wait()

    asyncio.run(attempt())
    assert stub.served == ["unix:gdb.sock,server=on,wait=off"]
