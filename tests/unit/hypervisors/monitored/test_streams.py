"""A console's log, which its process writes after it has sent, and not always to the letter."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from vmlab.hypervisors.monitored import streams
from vmlab.hypervisors.monitored.streams import ConsoleLine


class Process:
    """The other end of a console."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "console.sock"
        self.log = directory / "console.log"
        self.line = ConsoleLine("serial", "vm", self.log)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self.path))
        self._server.listen(1)

    async def connect(self) -> None:
        await self.line.connect(self.path)
        self._client, _ = self._server.accept()

    def send_now(self, data: bytes) -> None:
        """Send, and do not wait until it was received."""
        self._client.sendall(data)

    async def send(self, data: bytes) -> None:
        """Send, and wait until it was received."""
        async with self.line.reader() as reader:
            self._client.sendall(data)
            got = b""
            while len(got) < len(data):
                got += await reader.read()

    async def close(self) -> None:
        await self.line.disconnect()
        self._client.close()
        self._server.close()


@pytest.mark.parametrize(
    ("early", "late"),
    [
        (b"boot\n", b"boot\nready\n"),
        # Longer than what was sent before the last of it is there.
        (b"bbooootttt\n", b"bbooootttt\nready\n"),
        (b"", b"earlier\nboot\nreaddy\n"),
    ],
    ids=["it lags", "it is longer than what was sent", "it doubles what is looked for"],
)
def test_what_a_reader_was_given_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: bytes, late: bytes
) -> None:
    monkeypatch.setattr(streams, "_LOG_LAG", 60)

    async def test() -> None:
        process = Process(tmp_path)
        process.log.write_bytes(early)
        await process.connect()
        await process.send(b"boot\nready\n")
        asking = asyncio.create_task(process.line.log())
        for _ in range(3):
            await asyncio.sleep(0.01)
        assert not asking.done()
        process.log.write_bytes(late)
        assert await asking == late
        await process.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_log_that_never_comes_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_LOG_LAG", 0.01)

    async def test() -> None:
        process = Process(tmp_path)
        await process.connect()
        assert await process.line.log() == b""
        await process.send(b"boot\n")
        assert await process.line.log() == b""
        await process.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_panic_is_known_however_much_of_it_was_not_read_yet(tmp_path: Path) -> None:
    async def test() -> None:
        process = Process(tmp_path)
        await process.connect()
        assert await process.line.panicked() == ""
        before = b"[    1.0] a line of the kernel's\r\n" * 2000
        process.send_now(
            before + b"[    1.5] Kernel panic - not syncing: why\r\n[    1.6] trace\r\n"
        )
        assert await process.line.panicked() == "why"
        # It was of the kernel before.
        assert await process.line.panicked() == ""
        process.send_now(b"somebody wrote: Kernel panic - not syncing: not so\r\n")
        assert await process.line.panicked() == ""
        process.send_now(b"[    9.0] Kernel panic - not syncing: of the process before\r\n")
        await process.close()
        assert await process.line.panicked() == ""

    asyncio.run(asyncio.wait_for(test(), 60))
