"""A shell on a console: a real one on a pseudo-terminal, behind a login that is a script's."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from tests.unit.guests.ports import PtyChannel

from vmlab.guests import console as console_module
from vmlab.guests.command import Command, quote
from vmlab.guests.console import ConsoleChannel
from vmlab.hypervisors.base import Console
from vmlab.machine.errors import DeadlineExceeded, OperationFailed

# More than any of this takes on a slow host.
TIMEOUT = 300.0
pytestmark = pytest.mark.timeout(TIMEOUT + 60)

# A stand-in for login(1); the shell after it is the real thing.
LOGIN = (
    'while $nap; printf "vm login: "; do read -r u; $nap; [ "$u" ] || continue; '
    'printf "Password: "; $nap; read -r p; $nap; [ "$u$p" = rootsecret ] && break; '
    'echo "Login incorrect"; done; $nap; '
)
SHELL = "PS1='vm:~# ' exec /bin/dash -i"


class PtyConsole(PtyChannel, Console):
    async def log(self) -> bytes:
        return b""


Drive = Callable[[str, Callable[[ConsoleChannel], Awaitable[None]]], None]


@pytest.fixture
def drive() -> Iterator[Drive]:
    processes = []

    def run(program: str, body: Callable[[ConsoleChannel], Awaitable[None]]) -> None:
        master, slave = os.openpty()
        processes.append(
            subprocess.Popen(
                ["setsid", "-c", "/bin/dash", "-c", program],
                stdin=slave,
                stdout=slave,
                stderr=slave,
            )
        )
        os.close(slave)

        async def main() -> None:
            async def opened() -> Console:
                return PtyConsole("serial", master)

            channel = ConsoleChannel(opened, password="secret")
            try:
                async with asyncio.timeout(TIMEOUT):
                    await body(channel)
            finally:
                await channel.close()

        try:
            asyncio.run(main())
        finally:
            os.close(master)

    yield run
    for process in processes:
        process.kill()
        process.wait()


async def run(channel: ConsoleChannel, command: Command | str) -> tuple[int, bytes, bytes]:
    out, err = bytearray(), bytearray()

    async def take_out(data: bytes) -> None:
        out.extend(data)

    async def take_err(data: bytes) -> None:
        err.extend(data)

    given = Command(command) if isinstance(command, str) else command
    status = await channel.run(given, stdout=take_out, stderr=take_err)
    return status, bytes(out), bytes(err)


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)


def ended(process: int) -> bool:
    try:
        return not Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return True


PROGRAMS = {
    "dash": SHELL,
    "busybox": "PS1='~ # ' exec /bin/busybox sh -i",
    "bash": "PS1='root@vm:~# ' exec /bin/bash --norc --noprofile -i",
    "login": LOGIN + SHELL,
    "slow login": 'nap="sleep 0.4"; ' + LOGIN + SHELL,
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_commands_run_with_status_and_nothing_of_echo_or_prompt(drive: Drive, program: str) -> None:
    async def body(channel: ConsoleChannel) -> None:
        await channel.connect(timeout=TIMEOUT)
        assert await run(channel, 'echo a; echo "it\'s" >&2; exit 3') == (3, b"a\n", b"it's\n")
        assert await run(channel, "printf 'no newline'") == (0, b"no newline", b"")
        assert await run(channel, "echo a\necho b\n") == (0, b"a\nb\n", b"")
        assert (await run(channel, "seq 20000 | tail -n 1; cat"))[1] == b"20000\n"
        placed = Command("pwd; echo $X", environment={"X": "'"}, directory="/")
        assert (await run(channel, placed))[1] == b"/\n'\n"
        text = "\u00e9'" * 1500
        assert (await run(channel, f"printf %s {quote(text)}"))[1] == text.encode()

    drive(program, body)


def test_a_command_that_ends_while_the_next_line_is_typed_loses_nothing_of_it(
    drive: Drive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """busybox's read forgets what it has when a child ends."""
    write = PtyConsole.write

    async def haltingly(self: PtyConsole, data: bytes) -> None:
        for start in range(0, len(data), 7):
            await write(self, data[start : start + 7])
            await asyncio.sleep(0.004)

    async def body(channel: ConsoleChannel) -> None:
        await channel.connect(timeout=TIMEOUT)
        monkeypatch.setattr(PtyConsole, "write", haltingly)
        assert channel._console is not None
        await channel._do(channel._console, b"for t in 1 2 3 4 5 6 7 8 9; do sleep 0.$t & done")
        assert (await run(channel, "echo whole"))[1] == b"whole\n"

    (tmp_path / "sh").symlink_to("/bin/busybox")
    drive(f"PATH={tmp_path}:$PATH; {PROGRAMS['busybox']}", body)


# A guest that has these programs and no others.
FEW = "mkdir $T/bin; for p in sh stty cat rm; do ln -s $(command -v $p) $T/bin; done; PATH=$T/bin; "


@pytest.mark.parametrize("program", [SHELL, FEW + SHELL], ids=["base64", "printf"])
def test_input_of_any_bytes_arrives(drive: Drive, program: str, tmp_path: Path) -> None:
    payload = bytes(range(256)) * 40

    async def pieces() -> AsyncIterator[bytes]:
        yield payload[:100]
        yield payload[100:]

    async def body(channel: ConsoleChannel) -> None:
        await channel.connect(timeout=TIMEOUT)
        assert (await run(channel, Command("cat", input=payload)))[1] == payload
        assert (await run(channel, Command("cat", input=pieces())))[1] == payload
        assert (await run(channel, Command("cat", input=b"")))[1] == b""

    drive(program.replace("$T", str(tmp_path)), body)


def test_a_command_too_long_is_refused_with_advice(drive: Drive) -> None:
    async def body(channel: ConsoleChannel) -> None:
        await channel.connect(timeout=TIMEOUT)
        with pytest.raises(OperationFailed, match="at most") as caught:
            await run(channel, "x" * 200_000)
        assert "file" in (caught.value.hint or "")

    drive(SHELL, body)


@pytest.mark.parametrize("trap", ["", "trap '' TERM; "], ids=["term", "kill"])
def test_a_cancelled_command_is_ended_and_the_next_one_works(
    drive: Drive, trap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_module, "_KILL_AFTER", 1.0)
    number = tmp_path / "pid"

    async def body(channel: ConsoleChannel) -> None:
        await channel.connect(timeout=TIMEOUT)
        task = asyncio.ensure_future(
            run(channel, f"{trap}echo $$ >{number}.new; mv {number}.new {number}; sleep 1000; :")
        )
        await asyncio.to_thread(wait_until, number.exists)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_until, lambda: ended(int(number.read_text())))
        assert (await run(channel, "echo next"))[1] == b"next\n"

    drive(SHELL, body)


def test_a_command_cancelled_before_it_began_signals_nothing_of_the_one_before(
    drive: Drive,
) -> None:
    async def endless(first: asyncio.Event) -> AsyncIterator[bytes]:
        yield b"begun"
        first.set()
        await asyncio.Event().wait()

    async def body(channel: ConsoleChannel) -> None:
        await channel.connect(timeout=TIMEOUT)
        left = int((await run(channel, "sleep 1000 >/dev/null 2>&1 & echo $!"))[1])
        try:
            waiting = asyncio.Event()
            task = asyncio.ensure_future(run(channel, Command("cat", input=endless(waiting))))
            await waiting.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await run(channel, "echo next"))[1] == b"next\n"
            assert not ended(left)
        finally:
            os.kill(left, 9)

    drive(SHELL, body)


def test_a_signal_reaches_the_command(drive: Drive) -> None:
    async def body(channel: ConsoleChannel) -> None:
        await channel.connect(timeout=TIMEOUT)
        begun: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        ready = asyncio.Event()
        seen = bytearray()

        async def take(data: bytes) -> None:
            seen.extend(data)
            if b"ready" in seen:
                ready.set()

        work = asyncio.ensure_future(
            channel.run(
                Command("trap 'echo caught; exit 7' INT; echo ready; while :; do sleep 0.1; done"),
                stdout=take,
                stderr=take,
                started=begun.set_result,
            )
        )
        await ready.wait()
        await channel.signal(await begun, 2)
        assert await work == 7
        assert bytes(seen) == b"ready\ncaught\n"

    drive(SHELL, body)


def test_a_console_is_left_at_its_prompt_and_found_again(drive: Drive) -> None:
    async def body(channel: ConsoleChannel) -> None:
        for _ in range(2):
            await channel.connect(timeout=TIMEOUT)
            assert (await run(channel, "echo hello"))[1] == b"hello\n"
            await channel.close()

    drive(SHELL, body)


def test_a_loop_that_runs_already_is_taken_over(drive: Drive) -> None:
    async def body(channel: ConsoleChannel) -> None:
        for _ in range(2):
            # Connecting again lets go of the console without leaving the loop.
            await channel.connect(timeout=TIMEOUT)
            assert (await run(channel, "echo hello"))[1] == b"hello\n"

    drive(SHELL, body)


def test_a_refused_login_is_told(drive: Drive) -> None:
    async def body(channel: ConsoleChannel) -> None:
        with pytest.raises(OperationFailed, match="refuses the login of 'root'"):
            await channel.connect(timeout=TIMEOUT)

    drive(LOGIN.replace("secret", "another") + SHELL, body)


def test_a_console_without_a_shell_is_a_deadline_with_advice(drive: Drive) -> None:
    async def body(channel: ConsoleChannel) -> None:
        with pytest.raises(DeadlineExceeded, match="shell on the console"):
            await channel.connect(timeout=0.5)

    drive("exec sleep 1000", body)
