"""Ports of a guest on this host: real connections through the real relays, on this host alone."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import ClassVar

import pytest

from vmlab.guests.command import Command, CommandChannel, Sink
from vmlab.guests.forwarding import relay
from vmlab.guests.marks import blocks
from vmlab.machine.errors import OperationFailed

pytestmark = pytest.mark.timeout(300)


class Here(CommandChannel):
    """A guest that is this host, with the programs of one directory."""

    name: ClassVar[str] = "here"

    def __init__(self, programs: Path) -> None:
        self._programs = programs

    async def connect(self, *, timeout: float) -> None:
        """It is always there."""

    async def run(
        self,
        command: Command,
        *,
        stdout: Sink,
        stderr: Sink,
        started: Callable[[int], None] | None = None,
    ) -> int:
        pipe = asyncio.subprocess.PIPE
        shell = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", command.script(), stdin=pipe, stdout=pipe, stderr=pipe,
            env={"PATH": str(self._programs)}, start_new_session=True,
        )  # fmt: skip
        assert shell.stdin is not None and shell.stdout is not None and shell.stderr is not None

        async def pump(source: asyncio.StreamReader, sink: Sink) -> None:
            while data := await source.read(65536):
                await sink(data)

        async def give(target: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                async for data in blocks(command.input):
                    target.write(data)
                    await target.drain()
                target.close()

        giving = asyncio.ensure_future(give(shell.stdin))
        try:
            await asyncio.gather(pump(shell.stdout, stdout), pump(shell.stderr, stderr))
            return await shell.wait()
        finally:
            giving.cancel()
            await asyncio.wait({giving})
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            await shell.wait()
            shell._transport.close()  # nothing else closes its pipes

    async def signal(self, process: int, number: int) -> None:
        raise AssertionError("nobody signals a relay")

    async def close(self) -> None:
        """Nothing is held."""


def guest(directory: Path, *programs: str) -> Here:
    for name in programs:
        # Not a wrapper that looks for the real one in the path.
        found = os.path.realpath(sys.executable) if name == "python3" else shutil.which(name)
        assert found is not None, f"{name} is not installed"
        (directory / name).symlink_to(found)
    return Here(directory)


@asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """A server that answers each line, and says what it got when the client has ended."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        total = 0
        with suppress(OSError):
            while line := await reader.readline():
                total += len(line)
                writer.write(line.upper())
                await writer.drain()
            writer.write(b"%d in all\n" % total)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize(
    "programs", [["busybox"], ["python3"], ["bash", "cat"]], ids=lambda p: p[0]
)
def test_connections_reach_the_guest_s_port(programs: list[str], tmp_path: Path) -> None:
    async def main() -> None:
        async with echo() as port, await relay(guest(tmp_path, *programs), port) as forward:
            for _ in range(2):
                reader, writer = await asyncio.open_connection(forward.host, forward.port)
                writer.write(b"hello\n")
                assert await reader.readline() == b"HELLO\n"
                payload = (b"x" * 999 + b"\n") * 300
                writer.write(payload)
                assert await reader.readexactly(len(payload)) == payload.upper()
                if programs[0] != "bash":  # which cannot end one direction alone
                    writer.write_eof()
                    assert await reader.read() == b"300006 in all\n"
                writer.close()
                await writer.wait_closed()

    asyncio.run(main())


def test_several_connections_at_once_do_not_mix(tmp_path: Path) -> None:
    async def talk(port: int, word: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(word + b"\n")
        answer = await reader.readline()
        writer.close()
        await writer.wait_closed()
        return answer

    async def main() -> None:
        async with echo() as port, await relay(guest(tmp_path, "busybox"), port) as forward:
            words = [b"a", b"b", b"c"]
            answers = await asyncio.gather(*(talk(forward.port, word) for word in words))
            assert answers == [b"A\n", b"B\n", b"C\n"]

    asyncio.run(main())


def test_a_port_that_nobody_listens_on_in_the_guest_ends_the_connection_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))  # nobody else listens there meanwhile
            port = deaf.getsockname()[1]
            async with await relay(guest(tmp_path, "busybox"), port) as forward:
                reader, writer = await asyncio.open_connection(forward.host, forward.port)
                assert await reader.read() == b""
                writer.close()
                await writer.wait_closed()

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert any("was not taken in the guest" in record.message for record in caplog.records)


def test_closing_a_forward_ends_its_connections_and_frees_its_port(tmp_path: Path) -> None:
    async def main() -> None:
        async with echo() as port:
            forward = await relay(guest(tmp_path, "busybox"), port)
            reader, writer = await asyncio.open_connection(forward.host, forward.port)
            writer.write(b"hello\n")
            assert await reader.readline() == b"HELLO\n"
            await forward.close()
            assert await reader.read() == b""
            writer.close()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(forward.host, forward.port)

    asyncio.run(main())


def test_a_port_of_the_host_that_is_taken_is_refused_with_advice(tmp_path: Path) -> None:
    async def main() -> None:
        async with echo() as taken:
            with pytest.raises(OperationFailed, match=f"port {taken} of this host") as caught:
                await relay(guest(tmp_path, "busybox"), 80, host_port=taken)
            assert "free" in (caught.value.hint or "")

    asyncio.run(main())
