"""Clients of the monitor: they are greeted, negotiate, and their commands run one after another.

A client sees its answers in the order of its commands, and events between them (QMP specification,
2.2 to 2.5). Any number of clients may be there at once. One that does not read what it is sent is
let go before it fills the memory.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from vmlab.engine.devices.channel import listen
from vmlab.engine.devices.reactor import Reactor, Watch
from vmlab.engine.monitor.commands import CommandError, Commands
from vmlab.engine.monitor.messages import Malformed, MessageReader, written

_PIECE: Final = 65536
_UNREAD: Final = 4 << 20
"""Bytes that a client may leave unread."""
_WAITING: Final = 64
"""Commands that a client may have sent ahead; what is beyond them is read later."""

Place = Callable[[Callable[[], None]], None]
"""Calls a function where commands run: soon, in any thread, but one after another."""


def at_once(work: Callable[[], None]) -> None:
    """The place of a monitor whose commands run in the reactor's own thread."""
    work()


class Monitor:
    """A listening socket, its clients, and what they may ask.

    Args:
        path: Of the socket, which must not exist.
        reactor: Serves the sockets.
        commands: What clients may ask.
        version: Of the engine: three numbers.
        place: Where commands run.

    Raises:
        VmlabError: the socket cannot be made.
    """

    def __init__(
        self,
        path: Path,
        reactor: Reactor,
        commands: Commands,
        version: tuple[int, int, int],
        place: Place = at_once,
    ) -> None:
        self.path = path
        self.commands = commands
        self.reactor = reactor
        self.place = place
        self.greeting = {
            "QMP": {
                "version": {
                    "qemu": dict(zip(("major", "minor", "micro"), version, strict=True)),
                    "package": "vmlab",
                },
                "capabilities": [],
            }
        }
        self._lock = threading.Lock()
        self._clients: set[Client] = set()
        self._listener = listen(path)
        self._watch = reactor.watch(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it went away again
        connection.setblocking(False)
        client = Client(self, connection)
        with self._lock:
            self._clients.add(client)
        client.send(self.greeting)

    def emit(self, name: str, data: object | None = None) -> None:
        """Tell an event to all clients that have negotiated; from any thread."""
        now = time.time_ns()
        stamp = {"seconds": now // 10**9, "microseconds": now % 10**9 // 1000}
        message = {"timestamp": stamp, **self.commands.event(name, data)}
        with self._lock:
            clients = [client for client in self._clients if client.negotiated]
        for client in clients:
            client.send(message)

    def forget(self, client: Client) -> None:
        """A client is gone."""
        with self._lock:
            self._clients.discard(client)

    def close(self) -> None:
        """Let all clients go, with what they were sent, and remove the socket."""
        self._watch.close()
        self._listener.close()
        with suppress(FileNotFoundError):
            self.path.unlink()
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            client.close(flush=True)


class Client:
    """One connection."""

    def __init__(self, monitor: Monitor, connection: socket.socket) -> None:
        self.negotiated = False
        self._monitor = monitor
        self._socket = connection
        self._reader = MessageReader()
        self._lock = threading.RLock()
        self._unsent = bytearray()
        self._waiting: deque[dict[str, Any] | Malformed] = deque()
        self._busy = False
        self._beginning = False
        self._closed = False
        self._watch: Watch = monitor.reactor.watch(connection, self._readable, self._flush)

    # Sending, from any thread.

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, or keep what the socket does not take."""
        with self._lock:
            if self._closed:
                return
            self._unsent += written(message)
            self._flush()
            if len(self._unsent) > _UNREAD:
                self.close()

    def _flush(self) -> None:
        with self._lock:
            if self._closed:
                return
            try:
                while self._unsent:
                    del self._unsent[: self._socket.send(self._unsent)]
            except BlockingIOError:
                pass  # the rest is sent when there is room
            except OSError:
                self.close()
                return
            self._watch.want(writing=bool(self._unsent))

    def close(self, *, flush: bool = False) -> None:
        """Let the client go."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._watch.close()
            if flush:
                with suppress(OSError):
                    self._socket.setblocking(True)
                    self._socket.settimeout(1)
                    self._socket.sendall(self._unsent)
                    # What is left unread would be a connection reset to the client, and no end.
                    self._socket.setblocking(False)
                    for _ in range(_WAITING):
                        if not self._socket.recv(_PIECE):
                            break
            self._socket.close()
        self._monitor.forget(self)

    # Receiving, in the reactor's thread.

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        with self._lock:
            self._waiting.extend(self._reader.feed(data))
            if len(self._waiting) > _WAITING:
                self._watch.want(reading=False)
        self._next()

    def _next(self) -> None:
        """Begin the next command, unless one runs; and those after it that end at once."""
        with self._lock:
            if self._beginning:
                return  # whoever is in the loop below takes it
            self._beginning = True
        while True:
            with self._lock:
                if self._busy or self._closed or not self._waiting:
                    self._beginning = False
                    return
                self._busy = True
                message = self._waiting.popleft()
            try:
                self._monitor.place(partial(self._answer, message))
            except BaseException:
                self._beginning = False
                self._next()
                raise

    def _answer(self, message: dict[str, Any] | Malformed) -> None:
        try:
            answer = self._outcome(message)
        except Exception as error:
            # A mistake of vmlab's own: the client is told, and so is whoever runs commands.
            self.send(_error(CommandError(f"internal error: {type(error).__name__}: {error}")))
            raise
        else:
            self.send(answer)
        finally:
            self._ready()

    def _ready(self) -> None:
        """A command has been answered."""
        with self._lock:
            self._busy = False
            if not self._closed and len(self._waiting) <= _WAITING:
                self._watch.want(reading=True)
        self._next()

    def _outcome(self, message: dict[str, Any] | Malformed) -> dict[str, Any]:
        """The answer to a message."""
        if isinstance(message, Malformed):
            return _error(CommandError(message.reason))
        identity = {"id": message["id"]} if "id" in message else {}
        try:
            answer = {"return": self._run(message)}
        except CommandError as error:
            answer = _error(error)
        return {**answer, **identity}

    def _run(self, message: dict[str, Any]) -> Any:
        for key in message:
            if key not in ("execute", "arguments", "id"):
                raise CommandError(f"QMP input member '{key}' is unexpected")
        name = message.get("execute")
        arguments = message.get("arguments", {})
        if name is None:
            raise CommandError("QMP input lacks member 'execute'")
        if not isinstance(name, str):
            raise CommandError("QMP input member 'execute' must be a string")
        if not isinstance(arguments, dict):
            raise CommandError("QMP input member 'arguments' must be an object")
        if name == "qmp_capabilities" and not self.negotiated:
            return self._negotiate(arguments)
        if not self.negotiated:
            raise CommandError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        return self._monitor.commands.find(name).call(arguments)

    def _negotiate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if set(arguments) - {"enable"}:
            raise CommandError(f"Parameter '{min(set(arguments) - {'enable'})}' is unexpected")
        if arguments.get("enable", []) != []:
            raise CommandError("This monitor has no capability to enable")
        self.negotiated = True
        return {}


def _error(error: CommandError) -> dict[str, Any]:
    return {"error": {"class": error.kind, "desc": str(error)}}
