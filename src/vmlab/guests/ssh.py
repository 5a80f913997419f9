"""Commands by SSH, for guests that a network reaches. asyncssh does the protocol (RFC 4254).

Each command is a session of its own, so several run at once and any bytes pass; between its marks
stands what it prints, so that a process that it leaves behind holds nothing up. asyncssh is an
optional dependency, the extra `ssh`, and is imported only when a guest is connected to.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final

from vmlab.guests.command import Command, CommandChannel, Sink, quote
from vmlab.guests.marks import MarkedStream, blocks
from vmlab.guests.ssh_keys import MachineKeys
from vmlab.hypervisors.base import Channel
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded, OperationFailed

if TYPE_CHECKING:
    import asyncssh

_RETRY: Final = 0.5
_READ: Final = 65536

_LOGIN_WITHIN: Final = (15.0, 30.0, 60.0, 120.0)
"""Seconds for a connection, one attempt after the other. A forwarded port is open before its guest
is, and what was sent to it then may be lost; an emulated guest under load computes keys slowly."""

_RECONNECT: Final = 120.0
_ALIVE: Final = 30.0
"""Seconds of silence after which the guest is asked whether it is there; four times in vain and the
connection has ended."""

# The group's first process outlives what ends the command, to tell of it. Text for str.replace.
_RUNNER: Final = (
    "trap : INT TERM HUP QUIT USR1 USR2 ALRM PIPE; echo bTOKEN $$; "
    'sh -c "$1"INPUT; r=$?; echo eTOKEN >&2; echo eTOKEN $r'
)

# SIGTERM, and SIGKILL for what is still there after five seconds.
_END: Final = (
    "kill -TERM -GROUP; n=0; while kill -0 -GROUP 2>/dev/null && [ $n -lt 50 ]; "
    "do sleep 0.1; n=$((n + 1)); done; kill -KILL -GROUP"
)
_END_WITHIN: Final = 60.0

Address = tuple[str, int]


class SshChannel(CommandChannel):
    """Commands by SSH.

    Args:
        address: Host and port, or what finds them out (a forwarded port, say) at each connection.
        user: Who logs in.
        password: Their password, tried where the guest does not take the key; a lab's own images
            have an empty one.
        keys: The machine's key to log in with, and the host key that is expected; None accepts any.
    """

    name: ClassVar[str] = "ssh"

    def __init__(
        self,
        address: Address | Callable[[], Awaitable[Address]],
        *,
        user: str = "root",
        password: str = "",
        keys: MachineKeys | None = None,
    ) -> None:
        self._address = address
        self._user = user
        self._password = password
        self._keys = keys
        self._connection: asyncssh.SSHClientConnection | None = None
        self._lock = asyncio.Lock()

    async def connect(self, *, timeout: float) -> None:
        """Wait until the guest lets us in.

        Raises:
            DeadlineExceeded: it does not answer within `timeout` seconds.
            OperationFailed: it refuses the login, or asyncssh is not installed.
        """
        ssh = _asyncssh()
        last: Exception | None = None
        attempt = 0
        try:
            async with asyncio.timeout(timeout), self._lock:
                await self._drop()
                while True:
                    try:
                        within = _LOGIN_WITHIN[min(attempt, len(_LOGIN_WITHIN) - 1)]
                        self._connection = await self._login(ssh, within)
                        return
                    except (OSError, ssh.Error) as error:
                        self._check(ssh, error)
                        last = error
                    attempt += 1
                    await asyncio.sleep(_RETRY)
        except TimeoutError:
            raise DeadlineExceeded(
                f"connecting by SSH (last: {last})" if last else "connecting by SSH",
                seconds=timeout,
                hint="the guest has to run an SSH server that this host reaches",
            ) from None

    def _check(self, ssh: Any, error: Exception) -> None:
        """Raise what no waiting mends."""
        if isinstance(error, ssh.HostKeyNotVerifiable):
            raise OperationFailed(
                f"the guest has another host key than at its first login: {error}",
                hint="another machine answers, or its keys were made anew; then remove "
                f"{self._keys.pinned if self._keys else 'the pinned key'}",
                operation="connect",
            ) from error
        if isinstance(error, ssh.PermissionDenied):
            raise OperationFailed(
                f"the guest refuses the login of {self._user!r}: {error}",
                hint="check the user, password and keys that the image declares",
                operation="connect",
            ) from error

    async def _login(self, ssh: Any, within: float) -> asyncssh.SSHClientConnection:
        address = self._address
        host, port = address if isinstance(address, tuple) else await address()
        pinned, mine = None, None
        if self._keys is not None:
            self._keys.public()
            pinned, mine = self._keys.host_key(), [str(self._keys.private)]
        connection: asyncssh.SSHClientConnection = await ssh.connect(
            host,
            port,
            username=self._user,
            password=self._password,
            client_keys=mine,
            known_hosts=None if pinned is None else ([pinned], [], []),
            connect_timeout=within,
            login_timeout=within,
            keepalive_interval=_ALIVE,
            keepalive_count_max=4,
            # The user's own configuration and agent are not the guest's.
            config=None,
            agent_path=None,
        )
        if self._keys is not None and pinned is None:
            key = connection.get_server_host_key()
            if key is not None:
                self._keys.pin(key)
        return connection

    async def _connected(self) -> asyncssh.SSHClientConnection:
        """The connection; a guest that was restored has to be called again."""
        if self._connection is None or self._connection.is_closed():
            await self.connect(timeout=_RECONNECT)
        if self._connection is None:
            raise ChannelClosed("the SSH connection was closed", operation="execute")
        return self._connection

    async def run(
        self,
        command: Command,
        *,
        stdout: Sink,
        stderr: Sink,
        started: Callable[[int], None] | None = None,
    ) -> int:
        text = command.script()
        ssh = _asyncssh()
        connection = await self._connected()
        running = _Running(text, command.input, started)
        try:
            process = await connection.create_process(running.line(), encoding=None)
        except (OSError, ssh.Error) as error:
            raise _closed(error) from error
        running.attach(process)
        try:
            return await running.follow(process, stdout, stderr)
        except (OSError, ssh.Error) as error:
            raise _closed(error) from error
        except BaseException:
            await self._end(connection, running, process)
            raise
        finally:
            process.close()

    async def _end(self, connection: Any, running: _Running, process: Any) -> None:
        """SIGTERM, then SIGKILL, to a command that nobody waits for any more."""
        ssh = _asyncssh()
        with suppress(TimeoutError, OSError, ssh.Error):
            async with asyncio.timeout(_END_WITHIN):
                number = await running.begin()
                # Its next write fails: it does not wait for somebody who reads.
                process.close()
                if number is not None:
                    await connection.run(_END.replace("GROUP", str(number)))

    async def signal(self, process: int, number: int) -> None:
        ssh = _asyncssh()
        if self._connection is None:
            raise ChannelClosed("the SSH connection is closed", operation="signal")
        try:
            await self._connection.run(f"kill -{int(number)} -{int(process)}")
        except (OSError, ssh.Error) as error:
            raise _closed(error) from error

    async def terminal(
        self, command: str = "", *, columns: int = 80, rows: int = 24, term: str = "xterm-256color"
    ) -> SshTerminal:
        """Run a command, or a login shell, on a terminal of its own.

        Args:
            command: Text for the user's shell; "" is that shell itself.
            columns: Width of the terminal, in characters.
            rows: Its height.
            term: Its kind, as in TERM.

        Raises:
            ChannelClosed: the guest died.
        """
        ssh = _asyncssh()
        connection = await self._connected()
        try:
            process = await connection.create_process(
                command or None, term_type=term, term_size=(columns, rows), encoding=None
            )
        except (OSError, ssh.Error) as error:
            raise _closed(error) from error
        return SshTerminal(process)

    async def close(self) -> None:
        async with self._lock:
            await self._drop()

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # Not `close`, which waits for an answer that a dead guest never gives.
            connection.abort()
            await connection.wait_closed()


class SshTerminal(Channel):
    """A command on a terminal of its own: what is typed goes in, what is shown comes out."""

    name = "ssh"

    def __init__(self, process: asyncssh.SSHClientProcess[bytes]) -> None:
        self._process = process

    async def read(self, size: int = _READ) -> bytes:
        return await self._process.stdout.read(size)

    async def write(self, data: bytes) -> None:
        try:
            self._process.stdin.write(data)
            await self._process.stdin.drain()
        except OSError as error:
            raise _closed(error) from error

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest the terminal's size (its programs get SIGWINCH)."""
        self._process.change_terminal_size(columns, rows)

    async def wait(self) -> int:
        """The status of the command when it has ended, as a shell reports it.

        Raises:
            ChannelClosed: the guest died first.
        """
        await self._process.wait_closed()
        return _status(self._process.returncode)

    async def close(self) -> None:
        self._process.close()


class _Running:
    """One command's session: its marks, and what it takes and gives."""

    def __init__(
        self,
        text: str,
        given: bytes | AsyncIterable[bytes] | None,
        started: Callable[[int], None] | None,
    ) -> None:
        self._text = text
        self._given = given
        self._started = started
        self._token = secrets.token_hex(8)
        self._group: int | None = None

    def attach(self, process: Any) -> None:
        """Its session, now that there is one."""
        self._out = MarkedStream(lambda: process.stdout.read(_READ))
        self._err = MarkedStream(lambda: process.stderr.read(_READ))

    def line(self) -> str:
        """What the server's shell is given; each session's first process leads a group."""
        runner = _RUNNER.replace("INPUT", " </dev/null" if self._given is None else "")
        return f"exec sh -c {quote(runner.replace('TOKEN', self._token))} sh {quote(self._text)}"

    async def begin(self) -> int | None:
        """The command's process group, which SSH itself does not tell; None if it never began."""
        if self._group is None:
            number = await self._out.until(f"b{self._token}".encode())
            if number is not None:
                self._group = int(number)
                if self._started is not None:
                    self._started(self._group)
        return self._group

    async def follow(self, process: Any, stdout: Sink, stderr: Sink) -> int:
        """Pass on input and output; returns the status when the command has ended."""
        end = f"e{self._token}".encode()

        async def output() -> bytes | None:
            await self.begin()
            return await self._out.until(end, stdout)

        shown = asyncio.ensure_future(output())
        complained = asyncio.ensure_future(self._err.until(end, stderr))
        parts: list[asyncio.Future[Any]] = [shown, complained]
        parts.append(asyncio.ensure_future(self._give(process.stdin)))
        waiting = set(parts)
        try:
            while not (shown.done() and complained.done()):
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for part in done:
                    part.result()
            status = shown.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
        if status is not None:
            return int(status)
        await process.wait_closed()
        return _status(process.returncode)

    async def _give(self, stdin: Any) -> None:
        """Pass on the input; a command need not take all of it."""
        async for data in blocks(self._given):
            try:
                stdin.write(data)
                await stdin.drain()
            except OSError:
                return
        with suppress(OSError):
            stdin.write_eof()


def _status(returncode: int | None) -> int:
    """asyncssh gives the negative of a signal's number; a shell says 128 + n."""
    if returncode is None:
        raise _closed(None)
    return 128 - returncode if returncode < 0 else returncode


def _asyncssh() -> Any:
    try:
        import asyncssh
    except ImportError:
        raise OperationFailed(
            "talking to a guest by SSH needs asyncssh, which is not installed",
            hint='install it with: pip install "vmlab[ssh]"',
            operation="connect",
        ) from None
    return asyncssh


def _closed(error: Exception | None) -> ChannelClosed:
    return ChannelClosed(
        f"the SSH connection ended{f': {error}' if error else ''}",
        hint="the guest died or was stopped, or its network is down",
    )
