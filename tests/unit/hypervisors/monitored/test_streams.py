"""A console: read from its log until somebody types, and from then on from its socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from vmlab.hypervisors.monitored import streams
from vmlab.hypervisors.monitored.streams import ConsoleLine, MachineConsole
from vmlab.machine.errors import ChannelClosed


class Process:
    """The other end of a console: what QEMU does with it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "console.sock"
        self.log = directory / "console.log"
        self.line = ConsoleLine("serial", "vm", self.log)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self.path))
        self._server.listen(1)
        self._server.setblocking(False)
        self._client: socket.socket | None = None

    def prints(self, text: bytes) -> None:
        """What the guest prints goes to the client first, if there is one."""
        if self._client is not None:
            self._client.sendall(text)
        self.logs(text)

    def sends(self, text: bytes) -> None:
        """The log lags behind."""
        assert self._client is not None
        self._client.sendall(text)

    async def pours(self, text: bytes) -> None:
        """The same, with a client that may be slow."""
        assert self._client is not None
        await asyncio.get_running_loop().sock_sendall(self._client, text)

    def logs(self, text: bytes) -> None:
        """The log alone."""
        with self.log.open("ab") as log:
            log.write(text)

    async def is_typed_at(self, reader: MachineConsole, text: bytes) -> None:
        """Somebody types; the process takes the client and what it has typed."""
        await reader.write(text)
        if self._client is None:
            self._client, _ = self._server.accept()
            self._client.setblocking(False)
        assert await self.takes() == text

    async def takes(self) -> bytes:
        """Some of what was typed."""
        assert self._client is not None
        return await asyncio.get_running_loop().sock_recv(self._client, 1 << 16)

    async def counts(self) -> None:
        """Wait until the console is read from the socket."""
        while not self.line.by_socket:  # noqa: ASYNC110 (it tells nobody)
            await asyncio.sleep(0.001)

    @property
    def has_client(self) -> bool:
        """Whether anybody wants to be served."""
        try:
            self._client, _ = self._server.accept()
        except BlockingIOError:
            return False
        return True

    def ends(self) -> None:
        """It is killed."""
        if self._client is not None:
            self._client.close()
            self._client = None

    async def close(self) -> None:
        await self.line.disconnect()
        self.ends()
        self._server.close()


def with_process(tmp_path: Path, test: Callable[[Process], Awaitable[None]]) -> None:
    async def run() -> None:
        process = Process(tmp_path)
        try:
            await test(process)
        finally:
            await process.close()

    asyncio.run(asyncio.wait_for(run(), 250))


async def exactly(reader: MachineConsole, expected: bytes) -> None:
    """That is what comes next, however it is cut."""
    got = b""
    while len(got) < len(expected):
        got += await reader.read()
    assert got == expected


def test_who_only_reads_is_no_client_and_holds_nobody_up(tmp_path: Path) -> None:
    async def test(process: Process) -> None:
        process.prints(b"before\n")
        await process.line.connect(process.path)
        first, second = process.line.reader(), process.line.reader()
        process.prints(b"boot\n")
        await exactly(first, b"boot\n")
        process.prints(b"ready\n")
        await exactly(first, b"ready\n")
        third = process.line.reader()
        process.prints(b"more\n")
        await exactly(second, b"boot\nready\nmore\n")
        await exactly(third, b"more\n")
        assert await first.log() == b"before\nboot\nready\nmore\n"
        assert not process.has_client

    with_process(tmp_path, test)


@pytest.mark.parametrize("typed", [False, True], ids=["by-log", "by-socket"])
def test_what_was_printed_before_ends_where_a_reader_begins(tmp_path: Path, typed: bool) -> None:
    async def test(process: Process) -> None:
        process.logs(b"an earlier boot\n")
        await process.line.connect(process.path)
        first = process.line.reader()
        if typed:
            await process.is_typed_at(first, b"root\n")
            process.prints(b"answer\n")
            await process.counts()
        process.prints(b"before\n")
        await exactly(first, b"answer\n" * typed + b"before\n")
        reader = process.line.reader()
        process.prints(b"after\n")
        assert await reader.history(7) == b"before\n"
        process.prints(b"more\n")
        whole = b"an earlier boot\n" + b"answer\n" * typed + b"before\n"
        assert await reader.history(1 << 40) == whole
        assert await reader.history(0) == b""
        await exactly(reader, b"after\nmore\n")
        await process.line.disconnect()
        assert await reader.history(7) == b"before\n"
        # The next manager knows of no process.
        late = ConsoleLine("serial", "vm", process.log).reader()
        assert await late.history(5) == b"more\n"

    with_process(tmp_path, test)


def test_nothing_is_lost_or_comes_twice_when_somebody_begins_to_type(tmp_path: Path) -> None:
    async def test(process: Process) -> None:
        await process.line.connect(process.path)
        reader, watcher = process.line.reader(), process.line.reader()
        process.prints(b"login: ")
        await process.is_typed_at(reader, b"root\n")
        # Nobody has looked at the log since.
        process.prints(b"root\r\n")
        process.prints(b"Password: ")
        await exactly(reader, b"login: root\r\nPassword: ")
        await process.counts()
        # QEMU logs a character twice: who reads does not see it.
        process.sends(b"Welcome")
        process.logs(b"WWelcome")
        await exactly(reader, b"Welcome")
        await process.is_typed_at(watcher, b"ls\n")
        process.prints(b"ls\r\n")
        await exactly(reader, b"ls\r\n")
        await exactly(watcher, b"login: root\r\nPassword: Welcomels\r\n")

    with_process(tmp_path, test)


def test_what_is_logged_long_after_it_was_sent_is_not_lost_when_somebody_begins_to_type(
    tmp_path: Path,
) -> None:
    async def test(process: Process) -> None:
        await process.line.connect(process.path)
        reader = process.line.reader()
        process.prints(b"# \r")
        await process.is_typed_at(reader, b"\n")
        for part in (b"\r", b"\n", b"#"):
            process.sends(part)
            # The host has no time for the process: log and socket stand still.
            await asyncio.sleep(0.1)
            assert not process.line.by_socket
        process.logs(b"\r\n#")
        await process.counts()
        process.prints(b" ")
        await exactly(reader, b"# \r\r\n# ")

    with_process(tmp_path, test)


def test_what_is_logged_before_it_is_sent_does_not_come_twice(tmp_path: Path) -> None:
    async def test(process: Process) -> None:
        await process.line.connect(process.path)
        reader = process.line.reader()
        await process.is_typed_at(reader, b"x")
        # As by an engine whose socket takes no more for a while.
        process.sends(b"one ")
        process.logs(b"one two three ")
        await exactly(reader, b"one two three ")
        await process.counts()
        for text in (b"two th", b"ree fo", b"ur"):
            process.sends(text)
            await asyncio.sleep(0.01)
        await exactly(reader, b"four")

    with_process(tmp_path, test)


def test_what_the_log_never_has_does_not_hold_up_who_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_LOG_LAG", 0.01)

    async def test(process: Process) -> None:
        await process.line.connect(process.path)
        reader = process.line.reader()
        await process.is_typed_at(reader, b"x")
        process.sends(b"nowhere")
        await process.counts()
        process.prints(b"here")
        await exactly(reader, b"here")

    with_process(tmp_path, test)


def test_a_key_that_is_not_answered_changes_nothing(tmp_path: Path) -> None:
    async def test(process: Process) -> None:
        await process.line.connect(process.path)
        reader = process.line.reader()
        await process.is_typed_at(reader, b"x")
        process.logs(b"of another client's")
        await exactly(reader, b"of another client's")

    with_process(tmp_path, test)


def test_what_two_type_at_once_arrives_whole(tmp_path: Path) -> None:
    async def test(process: Process) -> None:
        await process.line.connect(process.path)
        one, other = process.line.reader(), process.line.reader()
        await process.is_typed_at(one, b"x")
        # More than the socket takes at once.
        texts = [b"1" * 1_000_000, b"2" * 1_000_000]
        typing = asyncio.gather(one.write(texts[0]), other.write(texts[1]))
        got = b""
        while len(got) < 2_000_000:
            got += await process.takes()
        await typing
        assert got in {texts[0] + texts[1], texts[1] + texts[0]}

    with_process(tmp_path, test)


def test_who_types_to_a_guest_that_takes_nothing_learns_that_it_is_off(tmp_path: Path) -> None:
    async def test(process: Process) -> None:
        await process.line.connect(process.path)
        one, other = process.line.reader(), process.line.reader()
        await process.is_typed_at(one, b"x")
        typing = [asyncio.ensure_future(who.write(b"1" * 1_000_000)) for who in (one, other)]
        await process.takes()
        await process.line.disconnect()
        assert [type(end) for end in await asyncio.gather(*typing, return_exceptions=True)] == [
            ChannelClosed,
            ChannelClosed,
        ]
        process.ends()
        await process.line.connect(process.path)
        await process.is_typed_at(other, b"y")

    with_process(tmp_path, test)


@pytest.mark.parametrize("lags", [False, True], ids=["at once", "the log lags"])
def test_a_guest_that_goes_on_printing_is_changed_over_too(tmp_path: Path, lags: bool) -> None:
    async def test(process: Process) -> None:
        await process.line.connect(process.path)
        reader = process.line.reader()
        await process.is_typed_at(reader, b"x")
        lines = [b"%d\n" % number for number in range(2000)]

        async def floods() -> None:
            for line in lines:
                await process.pours(line)
                if lags:
                    await asyncio.sleep(0)
                process.logs(line)
                await asyncio.sleep(0)

        flooding = asyncio.create_task(floods())
        await exactly(reader, b"".join(lines))
        await flooding
        assert process.line.by_socket

    with_process(tmp_path, test)


def test_the_last_words_of_a_process_are_read_before_those_of_the_next(tmp_path: Path) -> None:
    async def test(process: Process) -> None:
        await process.line.connect(process.path)
        reader = process.line.reader()
        process.prints(b"one ")
        await process.line.drain()
        await process.line.connect(process.path)
        process.prints(b"two ")
        await process.is_typed_at(reader, b"x")
        process.prints(b"three ")
        process.ends()
        await process.line.drain()
        with pytest.raises(ChannelClosed, match="the machine is off"):
            await reader.write(b"x")
        await process.line.connect(process.path)
        process.prints(b"four ")
        await process.line.connect(process.path)
        process.prints(b"five")
        await exactly(reader, b"one two three four five")
        assert not process.has_client

    with_process(tmp_path, test)


@pytest.mark.parametrize("typed", [False, True], ids=["by the log", "by the socket"])
def test_a_reader_has_caught_up_when_it_has_taken_everything(tmp_path: Path, typed: bool) -> None:
    async def test(process: Process) -> None:
        await process.line.connect(process.path)
        reader = process.line.reader()
        if typed:
            await process.is_typed_at(reader, b"x")
            process.prints(b"x")
            await exactly(reader, b"x")
            await process.counts()
        taken: list[bytes] = []

        async def reads() -> None:
            while data := await reader.read(1000):
                # It is long about it.
                for _ in range(10):
                    await asyncio.sleep(0)
                taken.append(data)

        reading = asyncio.create_task(reads())
        for number in range(5):
            process.prints(b"%d" % number * 5000)
            await reader.catch_up()
            assert len(b"".join(taken)) == 5000 * (number + 1)
        await reader.close()
        await reader.catch_up()
        await reading

    with_process(tmp_path, test)


@pytest.mark.parametrize(
    ("early", "late"),
    [
        (b"boot\n", b"ready\n"),
        # Longer than what was sent before the last of it is there.
        (b"bbooootttt\n", b"ready\n"),
        (b"", b"earlier\nboot\nreaddy\n"),
    ],
    ids=["it lags", "it is longer than what was sent", "it doubles what is looked for"],
)
def test_what_a_reader_was_given_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: bytes, late: bytes
) -> None:
    monkeypatch.setattr(streams, "_LOG_LAG", 60)

    async def test(process: Process) -> None:
        await process.line.connect(process.path)
        reader = process.line.reader()
        await process.is_typed_at(reader, b"x")
        process.prints(b"x")
        await exactly(reader, b"x")
        await process.counts()
        process.sends(b"boot\nready\n")
        process.logs(early)
        await exactly(reader, b"boot\nready\n")
        asking = asyncio.create_task(process.line.log())
        for _ in range(3):
            await asyncio.sleep(0.01)
        assert not asking.done()
        process.logs(late)
        assert await asking == b"x" + early + late

    with_process(tmp_path, test)


def test_a_log_that_never_comes_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_LOG_LAG", 0.01)

    async def test(process: Process) -> None:
        await process.line.connect(process.path)
        reader = process.line.reader()
        assert await process.line.log() == b""
        await process.is_typed_at(reader, b"x")
        process.prints(b"x")
        await exactly(reader, b"x")
        await process.counts()
        process.sends(b"boot\n")
        await exactly(reader, b"boot\n")
        assert await process.line.log() == b"x"

    with_process(tmp_path, test)


@pytest.mark.parametrize("typed", [False, True], ids=["by the log", "by the socket"])
def test_a_panic_is_known_however_much_of_it_was_not_read_yet(tmp_path: Path, typed: bool) -> None:
    async def test(process: Process) -> None:
        await process.line.connect(process.path)
        if typed:
            reader = process.line.reader()
            await process.is_typed_at(reader, b"x")
            process.prints(b"\n")
            await exactly(reader, b"\n")
            await process.counts()
        assert await process.line.panicked() == ""
        before = b"[    1.0] a line of the kernel's\r\n" * 2000
        process.prints(before + b"[    1.5] Kernel panic - not syncing: why\r\n[    1.6] trace\r\n")
        assert await process.line.panicked() == "why"
        # It was of the kernel before.
        assert await process.line.panicked() == ""
        process.prints(b"somebody wrote: Kernel panic - not syncing: not so\r\n")
        assert await process.line.panicked() == ""
        process.prints(b"[    9.0] Kernel panic - not syncing: of the process before\r\n")
        await process.line.connect(process.path)
        assert await process.line.panicked() == ""

    with_process(tmp_path, test)


def test_a_process_that_is_gone_cannot_be_typed_at(tmp_path: Path) -> None:
    async def test(process: Process) -> None:
        await process.line.connect(process.path)
        reader = process.line.reader()
        process.path.unlink()
        with pytest.raises(ChannelClosed, match="the machine is off"):
            await reader.write(b"x")
        process.line.end()
        assert await reader.read() == b""
        with pytest.raises(ChannelClosed, match="was closed"):
            await reader.write(b"x")

    with_process(tmp_path, test)
