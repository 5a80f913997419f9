"""A QMP conversation: connect, execute with a deadline, wait for events without missing one.

For everything that speaks QMP: QEMU and the embedded engine alike; what is one program's own does
not belong here. The protocol is QEMU's docs/interop/qmp-spec; the `qemu.qmp` library speaks it,
and this module adds deadlines, typed errors, a log of the whole conversation, and one place that
notices when the other side is gone.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from vmlab.hypervisors.operation import uninterrupted
from vmlab.machine.errors import OperationFailed, ResourceNotFound

if TYPE_CHECKING:
    from qemu.qmp import Message, QMPClient

COMMAND_TIMEOUT: Final = 60.0
"""Seconds that a command has when its caller names no deadline."""

_FIRST_RETRY: Final = 0.002
_LAST_RETRY: Final = 0.05
"""Seconds between attempts to connect: the first pause, and what doubling it does not pass."""


class QmpError(OperationFailed):
    """The other side refused a command; `command` and QMP's `error_class` say which and how."""

    _fields = ("command", "error_class")

    def __init__(
        self,
        message: str,
        *,
        command: str,
        error_class: str = "GenericError",
        machine: str | None = None,
        hypervisor: str | None = None,
    ) -> None:
        self.command = command
        self.error_class = error_class
        super().__init__(
            f"QMP command {command} failed: {message}",
            machine=machine,
            hypervisor=hypervisor,
            operation=command,
        )


class QmpCommandNotFound(QmpError):
    """The other side does not know the command: it is of another version, or another program."""


class QmpDeviceNotFound(QmpError, ResourceNotFound):
    """The command names a device that is not there."""


class QmpDeviceNotActive(QmpError):
    """The device has not been made ready by the guest."""


class QmpTimeout(OperationFailed, TimeoutError):
    """No answer within the deadline; whether a command took effect is not known."""


class QmpLost(OperationFailed):
    """The other side is gone, or what it sent was no QMP."""


_ERROR_CLASSES: Mapping[str, type[QmpError]] = {
    "CommandNotFound": QmpCommandNotFound,
    "DeviceNotFound": QmpDeviceNotFound,
    "DeviceNotActive": QmpDeviceNotActive,
}


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """Something that the other side told: its name, its data, and Unix time in seconds."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)
    time: float = 0.0


def _event(message: Mapping[str, Any]) -> QmpEvent:
    """The event in a message; what is malformed of it is left empty."""
    data, stamp = message.get("data"), message.get("timestamp")
    seconds = 0.0
    if isinstance(stamp, dict):
        parts = (stamp.get("seconds"), stamp.get("microseconds", 0))
        if all(isinstance(part, int) for part in parts):
            seconds = parts[0] + parts[1] / 1e6
    return QmpEvent(str(message.get("event")), data if isinstance(data, dict) else {}, seconds)


Match = Callable[[QmpEvent], bool]


class EventListener:
    """The events of some names since listening began, in order; none is missed."""

    def __init__(self, connection: QmpConnection, names: tuple[str, ...], match: Match) -> None:
        self._connection = connection
        self._names = names
        self._match = match
        self._events: asyncio.Queue[QmpEvent | None] = asyncio.Queue()

    def offer(self, event: QmpEvent) -> None:
        """Keep `event` if it is one of those listened for."""
        if (not self._names or event.name in self._names) and self._match(event):
            self._events.put_nowait(event)

    def end(self) -> None:
        """Nothing more will come: the connection is lost."""
        self._events.put_nowait(None)

    async def wait(self, timeout: float | None = None) -> QmpEvent:
        """The next of the events, one that came before the call included.

        Raises:
            QmpTimeout: none came within `timeout` seconds.
            QmpLost: the connection ended first.
        """
        what = " or ".join(self._names) or "any event"
        try:
            async with asyncio.timeout(timeout):
                event = await self._events.get()
        except TimeoutError:
            raise self._connection.failure(
                QmpTimeout, f"no {what} came within {timeout:g} s"
            ) from None
        if event is None:
            self._events.put_nowait(None)
            raise self._connection.failure(
                QmpLost, f"waiting for {what} ended: {self._connection.lost}"
            )
        return event


class _Transcript:
    """The log of a conversation: one line for each message, with Unix time and direction."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("ab", buffering=0) if path is not None else None

    def add(self, direction: str, message: object) -> None:
        if self._file is None:
            return
        line = f"{time.time():.6f} {direction} {json.dumps(message)}\n"
        try:
            self._file.write(line.encode())
        except OSError:
            # A full disk must not end the machine that the log is about.
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def connect_socket(path: Path) -> socket.socket:
    """A stream connected to the Unix socket at `path`, however long the path is.

    `sockaddr_un` holds 107 bytes, so the way leads through a descriptor of the directory.

    Raises:
        OSError: nobody listens there.
    """
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.setblocking(False)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            short = Path(f"/proc/self/fd/{directory}")
            stream.connect(str(short / path.name if short.exists() else path))
        finally:
            os.close(directory)
    except BaseException:
        stream.close()
        raise
    return stream


class QmpConnection:
    """A connection to a QMP server; made by `open`.

    `lost` is why it ended, None while it stands.
    """

    def __init__(
        self,
        *,
        machine: str | None,
        hypervisor: str | None,
        log: Path | None,
        on_event: Callable[[QmpEvent], None] | None,
        on_lost: Callable[[str], None] | None,
    ) -> None:
        self.machine = machine
        self.hypervisor = hypervisor
        self.lost: str | None = None
        self._transcript = _Transcript(log)
        self._on_event = on_event
        self._on_lost = on_lost
        self._listeners: list[EventListener] = []
        self._closing = False
        self._ending = False
        self._client: QMPClient = _make_client(self._transcript, self._dispatch)
        self._watch: asyncio.Task[None] | None = None

    # Connecting and letting go.

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        machine: str | None = None,
        hypervisor: str | None = None,
        log: Path | None = None,
        ended: Callable[[], str | None] = lambda: None,
        timeout: float = COMMAND_TIMEOUT,
        on_event: Callable[[QmpEvent], None] | None = None,
        on_lost: Callable[[str], None] | None = None,
    ) -> Self:
        """Connect to the Unix socket at `path` and agree on capabilities.

        While nobody listens there yet, this tries again until somebody does.

        Args:
            path: The socket; its path may be of any length.
            machine: Name of the machine, for errors.
            hypervisor: Name of the hypervisor, for errors.
            log: File that every message is appended to.
            ended: Says why nobody will ever listen (the process died), or None.
            timeout: Seconds for all of it.
            on_event: Called with every event, before those who wait for one.
            on_lost: Called once when the connection ends and nobody has closed it.

        Raises:
            QmpTimeout: no QMP server answered in time.
            QmpLost: `ended` gave a reason, or what answers does not speak QMP.
        """
        connection = cls(
            machine=machine, hypervisor=hypervisor, log=log, on_event=on_event, on_lost=on_lost
        )
        try:
            async with asyncio.timeout(timeout):
                await connection._connect(path, ended)
        except BaseException as error:
            connection._transcript.close()
            if isinstance(error, TimeoutError) and not isinstance(error, OperationFailed):
                raise connection.failure(
                    QmpTimeout, f"no QMP server answered at {path} within {timeout:g} s"
                ) from None
            raise
        return connection

    async def _reach(self, path: Path, ended: Callable[[], str | None]) -> socket.socket:
        """Connect as soon as somebody listens."""
        pause = _FIRST_RETRY
        while True:
            try:
                return connect_socket(path)
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                if (reason := ended()) is not None:
                    raise self.failure(QmpLost, f"nobody answers QMP: {reason}") from None
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_RETRY)

    async def _connect(self, path: Path, ended: Callable[[], str | None]) -> None:
        from qemu.qmp import ConnectError

        stream = await self._reach(path, ended)
        try:
            await self._client.connect(stream)
        except ConnectError as error:
            reason = ended() or _describe(error.exc)
            raise self.failure(QmpLost, f"no QMP conversation came about: {reason}") from error
        finally:
            if self._client.runstate.name != "RUNNING":
                stream.close()
        self._watch = asyncio.create_task(self._notice_end())

    async def _notice_end(self) -> None:
        """Wait until the connection has ended by itself, and tell everybody who waits for it."""
        from qemu.qmp import Runstate

        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        self._ending = True
        await self._finish()
        if self._on_lost is not None and self.lost is not None and not self._closing:
            self._on_lost(self.lost)

    async def _finish(self) -> None:
        """Take the library's end of the connection down; `lost` is why, if it is not set yet."""
        reason = "the connection was closed"
        try:
            await self._client.disconnect()
        except Exception as error:
            # Whatever ended the library's tasks is the reason, and no failure of this one.
            reason = _describe(error)
        if self.lost is None:
            self.lost = reason
        for listener in self._listeners:
            listener.end()
        self._transcript.add("!", self.lost)
        self._transcript.close()

    async def close(self) -> None:
        """Let go of the connection; closing it again does nothing."""
        self._closing = True
        if self._watch is not None:
            watch, self._watch = self._watch, None
            await uninterrupted(self._close(watch))

    async def _close(self, watch: asyncio.Task[None]) -> None:
        if self._ending:
            await watch
            return
        # The library does not like to be taken down by two at once.
        watch.cancel()
        await asyncio.wait([watch])
        self.lost = "it was closed here"
        await self._finish()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    # Commands.

    @property
    def greeting(self) -> Mapping[str, Any]:
        """What the server said of itself: {"version": {...}, "capabilities": [...]}."""
        greeting = self._client.greeting
        if greeting is None:
            return {}
        return {"version": greeting.QMP.version, "capabilities": greeting.QMP.capabilities}

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = COMMAND_TIMEOUT,
        oob: bool = False,
    ) -> Any:
        """Run a command and return what it returns.

        Args:
            command: Its name.
            arguments: Its arguments, as JSON has them.
            timeout: Seconds; None waits for as long as the connection stands.
            oob: Out of band: overtakes commands under way, where the server can do that.

        Raises:
            QmpError: the server refused it; a subclass where QMP has an error class for it.
            QmpTimeout: no answer in time.
            QmpLost: the connection ended before the answer came.
        """
        from qemu.qmp import ExecuteError, QMPError

        if self.lost is not None:
            raise self.failure(QmpLost, f"QMP command {command} was not sent: {self.lost}")
        waiting = asyncio.timeout(timeout)
        try:
            async with waiting:
                return await self._client.execute(command, arguments, oob=oob)
        except ExecuteError as error:
            kind = _ERROR_CLASSES.get(error.error_class, QmpError)
            raise kind(
                str(error),
                command=command,
                error_class=error.error_class,
                machine=self.machine,
                hypervisor=self.hypervisor,
            ) from None
        except QMPError as error:
            raise self.failure(
                QmpLost, f"QMP command {command} got no answer: {_describe(error)}"
            ) from error
        except TimeoutError:
            if not waiting.expired():
                raise
            raise self.failure(
                QmpTimeout, f"QMP command {command} got no answer within {timeout:g} s"
            ) from None

    # Events.

    @contextmanager
    def listen(self, *names: str, match: Match = lambda event: True) -> Iterator[EventListener]:
        """Collect the events of these names (none: of all names) that `match`, from now on.

        Begin to listen before the command that causes the event, and none can be missed:

            with qmp.listen("DEVICE_DELETED") as deleted:
                await qmp.execute("device_del", {"id": "disk0"})
                await deleted.wait(timeout=10)
        """
        listener = EventListener(self, names, match)
        if self.lost is not None:
            listener.end()
        self._listeners.append(listener)
        try:
            yield listener
        finally:
            self._listeners.remove(listener)

    def _dispatch(self, message: Mapping[str, Any]) -> None:
        event = _event(message)
        if self._on_event is not None:
            self._on_event(event)
        for listener in self._listeners:
            listener.offer(event)

    def failure(self, kind: type[OperationFailed], message: str) -> OperationFailed:
        """An error of that kind, with the names of machine and hypervisor."""
        return kind(message, machine=self.machine, hypervisor=self.hypervisor)


def _describe(error: BaseException) -> str:
    """Why a conversation ended, in a few words."""
    if isinstance(error, EOFError):
        return "the other side hung up"
    if isinstance(error, OSError) and error.errno in {errno.ECONNRESET, errno.EPIPE}:
        return "the other side hung up"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _make_client(
    transcript: _Transcript, dispatch: Callable[[Mapping[str, Any]], None]
) -> QMPClient:
    """The library's client, with its hooks for messages and events led here."""
    from qemu.qmp import QMPClient

    class Client(QMPClient):
        """Logs each message, and hands events on instead of keeping them for ever."""

        def _cb_outbound(self, msg: Message) -> Message:
            transcript.add(">", dict(msg))
            return msg

        def _cb_inbound(self, msg: Message) -> Message:
            transcript.add("<", dict(msg))
            return msg

        async def _event_dispatch(self, msg: Message) -> None:
            dispatch(msg)

    return Client()
