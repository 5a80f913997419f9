"""SSH: a real asyncssh server on this host's loopback, whose sessions are real shells."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from vmlab.guests import ssh as ssh_module
from vmlab.guests.command import Command
from vmlab.guests.ssh import SshChannel
from vmlab.guests.ssh_keys import MachineKeys, authorize
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded, OperationFailed

# More than any of this takes on a slow host.
TIMEOUT = 300.0
pytestmark = pytest.mark.timeout(TIMEOUT + 60)


class Server(asyncssh.SSHServer):
    """Lets root in by the password "secret", or by a key in a home's authorized_keys."""

    def __init__(self, home: Path | None) -> None:
        self._home = home

    def password_auth_supported(self) -> bool:
        return self._home is None

    def public_key_auth_supported(self) -> bool:
        return self._home is not None

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == ("root", "secret")

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        assert self._home is not None
        file = self._home / ".ssh" / "authorized_keys"
        lines = file.read_text().splitlines() if file.exists() else []
        return any(asyncssh.import_public_key(line) == key for line in lines)


async def session(process: Any) -> None:
    """What sshd does: a shell that leads a group of its own, on a terminal if one is asked for."""
    terminal = process.get_terminal_type()
    if terminal is not None:
        await on_terminal(process, terminal)
        return
    shell = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        process.command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    shown = [
        asyncio.ensure_future(pump(shell.stdout, process.stdout)),
        asyncio.ensure_future(pump(shell.stderr, process.stderr)),
    ]
    given = asyncio.ensure_future(pump(process.stdin, shell.stdin))
    gone = asyncio.ensure_future(process.wait_closed())
    try:
        # The output of a process that was left behind ends when nobody listens to it any more.
        over = asyncio.gather(shell.wait(), *shown, return_exceptions=True)
        await asyncio.wait([over, gone], return_when=asyncio.FIRST_COMPLETED)
        if over.done() and shell.returncode is not None:
            if shell.returncode < 0:
                process.exit_with_signal("TERM" if shell.returncode == -15 else "KILL")
            else:
                process.exit(shell.returncode)
    finally:
        for task in (*shown, given, gone):
            task.cancel()
        await asyncio.wait([*shown, given, gone])
        shell._transport.close()  # nothing else closes its pipes
        await shell.wait()


async def pump(source: Any, target: Any) -> None:
    with suppress(OSError, asyncssh.Error):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
        if target.can_write_eof() and not isinstance(target, asyncssh.SSHWriter):
            target.write_eof()


async def on_terminal(process: Any, terminal: str) -> None:
    master, slave = os.openpty()
    os.set_blocking(master, False)
    import fcntl
    import struct
    import termios

    def resize(width: int, height: int) -> None:
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    resize(*process.get_terminal_size()[:2])
    shell = await asyncio.create_subprocess_exec(
        "setsid", "-c", "/bin/sh", "-c", process.command,
        stdin=slave, stdout=slave, stderr=slave,
        env={**os.environ, "TERM": terminal},
    )  # fmt: skip
    os.close(slave)
    loop = asyncio.get_running_loop()
    over = asyncio.Event()

    def shown() -> None:
        try:
            process.stdout.write(os.read(master, 65536))
        except OSError:
            loop.remove_reader(master)
            over.set()

    async def typed() -> None:
        while True:
            try:
                data = await process.stdin.read(1024)
            except asyncssh.TerminalSizeChanged as change:
                resize(change.width, change.height)
                continue
            if not data:
                return
            os.write(master, data)

    loop.add_reader(master, shown)
    typing = asyncio.ensure_future(typed())
    status = await shell.wait()
    await over.wait()
    typing.cancel()
    await asyncio.wait({typing})
    os.close(master)
    process.exit(status)


Body = Callable[[SshChannel, Any], Awaitable[None]]


def with_server(
    body: Body,
    *,
    password: str = "secret",
    keys: MachineKeys | None = None,
    home: Path | None = None,
) -> None:
    async def main() -> None:
        server = await serve(home)
        channel = SshChannel(("127.0.0.1", server.get_port()), password=password, keys=keys)
        try:
            async with asyncio.timeout(TIMEOUT):
                await body(channel, server)
        finally:
            await channel.close()
            server.close()
            await server.wait_closed()
            if sessions:
                await asyncio.wait(sessions)

    sessions: set[asyncio.Future[None]] = set()
    SESSIONS.set(sessions)
    asyncio.run(main())


SESSIONS: ContextVar[set[asyncio.Future[None]]] = ContextVar("sessions")


async def serve(home: Path | None = None) -> Any:
    sessions = SESSIONS.get()
    return await asyncssh.create_server(
        lambda: Server(home),
        "127.0.0.1",
        0,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        process_factory=lambda process: sessions.add(asyncio.ensure_future(session(process))),
        encoding=None,
    )


async def run(channel: Any, command: Command | str) -> tuple[int, bytes, bytes]:
    out, err = bytearray(), bytearray()

    async def take_out(data: bytes) -> None:
        out.extend(data)

    async def take_err(data: bytes) -> None:
        err.extend(data)

    given = Command(command) if isinstance(command, str) else command
    status = await channel.run(given, stdout=take_out, stderr=take_err)
    return status, bytes(out), bytes(err)


async def nothing(data: bytes) -> None:
    raise AssertionError(f"there is output: {data!r}")


def test_output_error_output_and_status_come_apart_and_several_run_at_once() -> None:
    async def body(channel: SshChannel, server: Any) -> None:
        await channel.connect(timeout=TIMEOUT)
        results = await asyncio.gather(
            *(run(channel, f"echo o{n}; printf e >&2; exit {n}") for n in range(3))
        )
        assert results == [(n, f"o{n}\n".encode(), b"e") for n in range(3)]
        assert (await run(channel, "cat; echo end"))[1] == b"end\n"
        placed = Command('pwd; printf %s "$X"', environment={"X": "'\n"}, directory="/")
        assert (await run(channel, placed))[1] == b"/\n'\n"

    with_server(body)


def test_any_bytes_go_in_and_come_out_unchanged() -> None:
    payload = bytes(range(256)) * 2000

    async def pieces() -> AsyncIterator[bytes]:
        yield payload[:1000]
        yield payload[1000:]

    async def body(channel: SshChannel, server: Any) -> None:
        await channel.connect(timeout=TIMEOUT)
        assert (await run(channel, Command("cat", input=payload)))[1] == payload
        assert (await run(channel, Command("cat", input=pieces())))[1] == payload
        # A command need not read its input.
        assert (await run(channel, Command("echo done", input=payload)))[1] == b"done\n"

    with_server(body)


def test_input_that_fails_fails_the_command_and_ends_it() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"begun"
        raise OSError("the disk is gone")

    async def body(channel: SshChannel, server: Any) -> None:
        await channel.connect(timeout=TIMEOUT)
        with pytest.raises((OSError, ChannelClosed), match="the disk is gone"):
            await run(channel, Command("cat >/dev/null; sleep 1000", input=broken()))

    with_server(body)


def test_a_process_left_behind_holds_nothing_up() -> None:
    async def body(channel: SshChannel, server: Any) -> None:
        await channel.connect(timeout=TIMEOUT)
        status, out, _ = await run(channel, "sleep 1000 & echo $!")
        assert status == 0
        os.kill(int(out), 9)

    with_server(body)


@pytest.mark.parametrize("trap", ["", "trap '' TERM; "], ids=["term", "kill"])
def test_a_cancelled_command_is_ended_in_the_guest(trap: str) -> None:
    async def body(channel: SshChannel, server: Any) -> None:
        await channel.connect(timeout=TIMEOUT)
        begun: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        work = channel.run(
            Command(f"{trap}sleep 1000; :"), stdout=nothing, stderr=nothing,
            started=begun.set_result,
        )  # fmt: skip
        task = asyncio.ensure_future(work)
        number = await begun
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Killed is not yet waited for by its parent.
        await run(channel, f"while kill -0 -{number} 2>/dev/null; do sleep 0.05; done")

    with_server(body)


def test_a_signal_reaches_the_command_and_death_by_one_is_a_status() -> None:
    async def body(channel: SshChannel, server: Any) -> None:
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
        assert (await run(channel, "kill -15 $$"))[0] == 143
        # Of all its processes nobody is left to tell of it but the server.
        assert (await run(channel, "kill -9 0"))[0] == 137

    with_server(body)


def test_a_terminal_has_a_size_that_is_followed() -> None:
    async def body(channel: SshChannel, server: Any) -> None:
        await channel.connect(timeout=TIMEOUT)
        command = "echo $TERM; stty size; read x; stty size; exit 5"
        terminal = await channel.terminal(command, columns=100, rows=30, term="vt100")
        seen = b""
        while b"30 100" not in seen:
            seen += await terminal.read()
        assert b"vt100" in seen
        terminal.resize(132, 43)
        await terminal.write(b"go on\n")
        while b"43 132" not in seen:
            data = await terminal.read()
            assert data
            seen += data
        assert await terminal.wait() == 5
        await terminal.close()

    with_server(body)


def test_a_machine_s_own_key_logs_in_and_the_host_key_is_pinned(tmp_path: Path) -> None:
    keys = MachineKeys(tmp_path / "keys")

    class Here:
        """A channel that runs commands on this host, with a home of its own."""

        async def run(self, command: Command, *, stdout: Any, stderr: Any) -> int:
            shell = await asyncio.create_subprocess_exec(
                "/bin/sh", "-c", command.script(), env={**os.environ, "HOME": str(tmp_path)}
            )
            return await shell.wait()

    async def body(channel: SshChannel, server: Any) -> None:
        with pytest.raises(OperationFailed, match="refuses the login of 'root'"):
            await channel.connect(timeout=TIMEOUT)
        for _ in range(2):
            await authorize(keys, Here())  # the one method it calls
        assert len((tmp_path / ".ssh" / "authorized_keys").read_text().splitlines()) == 1
        await channel.connect(timeout=TIMEOUT)
        assert (await run(channel, "echo in"))[1] == b"in\n"
        assert keys.private.stat().st_mode & 0o777 == 0o600
        other = await serve(tmp_path)
        await channel.close()
        impostor = SshChannel(("127.0.0.1", other.get_port()), keys=MachineKeys(keys.directory))
        with pytest.raises(OperationFailed, match="another host key") as caught:
            await impostor.connect(timeout=TIMEOUT)
        assert str(keys.pinned) in (caught.value.hint or "")
        other.close()
        await other.wait_closed()
        keys.pinned.write_text("nonsense")
        with pytest.raises(OperationFailed, match="holds no host key"):
            await channel.connect(timeout=TIMEOUT)

    with_server(body, keys=keys, home=tmp_path)


def test_a_refused_login_is_told_at_once() -> None:
    async def body(channel: SshChannel, server: Any) -> None:
        with pytest.raises(OperationFailed, match="refuses the login of 'root'"):
            await channel.connect(timeout=TIMEOUT)

    with_server(body, password="wrong")


def test_a_connection_that_broke_is_made_again() -> None:
    async def body(channel: SshChannel, server: Any) -> None:
        ports: list[int] = []

        async def address() -> tuple[str, int]:
            ports.append(server.get_port())
            return "127.0.0.1", server.get_port()

        again = SshChannel(address, password="secret")
        await again.connect(timeout=TIMEOUT)
        assert again._connection is not None
        again._connection.abort()
        await again._connection.wait_closed()
        assert (await run(again, "echo back"))[1] == b"back\n"
        assert len(ports) == 2
        await again.close()

    with_server(body)


def test_a_guest_that_dies_ends_its_commands() -> None:
    async def body(channel: SshChannel, server: Any) -> None:
        await channel.connect(timeout=TIMEOUT)
        begun: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        work = asyncio.ensure_future(
            channel.run(
                Command("exec sleep 1000"), stdout=nothing, stderr=nothing,
                started=begun.set_result,
            )
        )  # fmt: skip
        number = await begun
        assert channel._connection is not None
        channel._connection.abort()
        with pytest.raises(ChannelClosed):
            await work
        os.killpg(number, 9)
        with pytest.raises(ChannelClosed):
            await channel.signal(number, 15)

    with_server(body)


class TimeIsUpAfterOne:
    """asyncio, but that the time for something is up when it is about to be tried again."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        self._limit = asyncio.timeout(seconds)
        return self._limit

    async def sleep(self, seconds: float) -> None:
        self._limit.reschedule(asyncio.get_running_loop().time())
        await asyncio.Event().wait()


def test_nobody_there_is_a_deadline_that_names_what_came_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(channel: SshChannel, server: Any) -> None:
        server.close()
        await server.wait_closed()
        with pytest.raises(DeadlineExceeded, match=r"last: .*127\.0\.0\.1"):
            await channel.connect(timeout=TIMEOUT)

    monkeypatch.setattr(ssh_module, "asyncio", TimeIsUpAfterOne())

    with_server(body)


def test_a_command_too_long_is_refused_with_advice() -> None:
    async def body(channel: SshChannel, server: Any) -> None:
        with pytest.raises(OperationFailed, match="at most"):
            await run(channel, "x" * 200_000)

    with_server(body)


def test_without_asyncssh_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    with pytest.raises(OperationFailed, match="not installed") as caught:
        asyncio.run(SshChannel(("127.0.0.1", 1)).connect(timeout=1))
    assert "vmlab[ssh]" in (caught.value.hint or "")
