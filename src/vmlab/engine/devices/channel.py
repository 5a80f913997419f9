"""Byte channels to the outside of the machine: a unix socket that one client at a time may use.

What a UART and the ports of a virtio console are joined to. With a log, everything that the guest
sends is written there too, whether somebody is connected or not.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from vmlab.engine.devices.reactor import Reactor, Watch
from vmlab.engine.devices.uart import Uart
from vmlab.machine.errors import VmlabError

_BUFFER: Final = 1 << 20
"""Bytes on the way in either direction before the other side has to wait."""
_PIECE: Final = 65536
_LONGEST_PATH: Final = 107


class Listener(Protocol):
    """Who wants to know what happens to a channel; called from the reactor's thread."""

    def arrived(self) -> None:
        """`receive` has bytes."""

    def resume(self) -> None:
        """`send` takes bytes again."""

    def connection_changed(self) -> None:
        """`connected` is different now."""


def listen(path: Path) -> socket.socket:
    """A listening unix socket at `path` that only this user may connect to.

    Raises:
        VmlabError: the path cannot be bound.
    """
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.setblocking(False)
        _bind(server, path)
        path.chmod(0o600)
        server.listen(4)
    except OSError as error:
        server.close()
        raise VmlabError(
            f"the socket {str(path)!r} cannot be opened: {error.strerror or error}",
            hint="a socket's path is new, and in a folder that can be written",
        ) from None
    return server


def _bind(server: socket.socket, path: Path) -> None:
    """Bind to a path of any length.

    `sockaddr_un` holds 107 bytes: the way to a longer one leads through a descriptor of its folder.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = Path(f"/proc/self/fd/{folder}")
        long = len(os.fsencode(path)) > _LONGEST_PATH and short.exists()
        server.bind(str(short / path.name if long else path))
    finally:
        os.close(folder)


class SocketChannel:
    """A listening socket; the first client is served, further ones wait for it to leave.

    Args:
        reactor: Who waits for the sockets.
        path: Where the socket is made.
        log: Where everything that the guest sends is written as well; it stays its owner's. When
            it cannot be written, `log_error` says why and the channel goes on without it.
        heard: Called with everything that the guest sends.

    Raises:
        VmlabError: the socket cannot be made.
    """

    def __init__(
        self,
        reactor: Reactor,
        path: Path,
        log: BinaryIO | None = None,
        heard: Callable[[bytes], None] = lambda data: None,
    ) -> None:
        self.path = path
        self._reactor = reactor
        self._log = log
        self._heard = heard
        self.log_error = ""
        self._lock = threading.RLock()
        self._listener: Listener | None = None
        self._client: socket.socket | None = None
        self._number = 0
        self._client_watch: Watch | None = None
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._refused = False
        self._server = listen(path)
        self._server_watch = reactor.watch(self._server, self._accept)

    def attach(self, listener: Listener) -> None:
        """Tell `listener` what happens from now on."""
        self._listener = listener

    @property
    def connected(self) -> bool:
        """Whether there is a client."""
        return self._client is not None

    @property
    def number(self) -> int:
        """How many clients there have been: the number of the one that is there, or was last."""
        return self._number

    def send(self, data: bytes, number: int | None = None) -> int:
        """Bytes for the client; how many were taken. Nobody there: all, and they are dropped.

        With a number they are for that client alone: to another one nobody is there.
        """
        with self._lock:
            gone = number not in (None, self._number)
            if gone or self._client is None or self._client_watch is None:
                taken = len(data)
            else:
                taken = min(len(data), _BUFFER - len(self._outgoing))
                self._outgoing += data[:taken]
                self._refused = taken < len(data)
                self._flush()
            if self._log is not None:
                try:
                    self._log.write(data[:taken])
                    self._log.flush()
                except OSError as error:  # the guest must not feel that the host's disk is full
                    self._log = None
                    self.log_error = f"the log ends here: {error}"
            self._heard(data[:taken])
            return taken

    def receive(self, size: int, number: int | None = None) -> bytes:
        """Up to `size` bytes that the client sent; with a number, if it is that client's."""
        with self._lock:
            if number not in (None, self._number):
                return b""
            data = bytes(self._incoming[:size])
            del self._incoming[: len(data)]
            if self._client_watch is not None and len(self._incoming) < _BUFFER:
                self._client_watch.want(reading=True)
            return data

    def _accept(self) -> None:
        with self._lock:
            try:
                client, _ = self._server.accept()
            except OSError:  # it has left already
                return
            client.setblocking(False)
            self._client = client
            self._number += 1
            self._incoming.clear()
            self._outgoing.clear()
            self._client_watch = self._reactor.watch(client, self._readable, self._writable)
            self._server_watch.want(reading=False)
        if self._listener is not None:
            self._listener.connection_changed()

    def _readable(self) -> None:
        with self._lock:
            if self._client is None or self._client_watch is None:
                return
            try:
                data = self._client.recv(_PIECE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if data:
                self._incoming += data
                if len(self._incoming) >= _BUFFER:
                    self._client_watch.want(reading=False)
        if not data:
            self._leave()
        elif self._listener is not None:
            self._listener.arrived()

    def _flush(self) -> None:
        if self._client is None or self._client_watch is None:
            return
        try:
            while self._outgoing:
                del self._outgoing[: self._client.send(self._outgoing[:_PIECE])]
        except BlockingIOError:
            pass
        except OSError:
            self._outgoing.clear()  # gone; reading will notice
        self._client_watch.want(writing=bool(self._outgoing))

    def _writable(self) -> None:
        with self._lock:
            self._flush()
            resume = self._refused and len(self._outgoing) <= _BUFFER // 2
            if resume:
                self._refused = False
        if resume and self._listener is not None:
            self._listener.resume()

    def _leave(self) -> None:
        with self._lock:
            client, watch = self._client, self._client_watch
            self._client = self._client_watch = None
            if client is None or watch is None:
                return
            watch.close()
            client.close()
            self._outgoing.clear()
            resume, self._refused = self._refused, False
            self._server_watch.want(reading=True)
        if self._listener is not None:
            self._listener.connection_changed()
            if resume:
                self._listener.resume()

    def close(self) -> None:
        """Send the client away and remove the socket."""
        with self._lock:
            self._listener = None
            self._flush()
            self._leave()
            self._server_watch.close()
            self._server.close()
        with suppress(FileNotFoundError):
            self.path.unlink()


class UartChannel:
    """Joins a UART to a channel.

    The guest's transmitter never waits: what a client does not take fast enough beyond the
    channel's buffer is dropped, and counted.
    """

    def __init__(self, uart: Uart, channel: SocketChannel) -> None:
        self.dropped = 0
        self._uart = uart
        self._channel = channel
        channel.attach(self)
        uart.send = self.transmit
        uart.wanted = self.arrived

    def transmit(self, data: bytes) -> None:
        """What the guest sends: the UART's `send`."""
        self.dropped += len(data) - self._channel.send(data)

    def arrived(self) -> None:
        """Hand over as much as the UART takes."""
        while room := self._uart.room:
            data = self._channel.receive(room)
            if not data:
                return
            self._uart.receive(data)

    def resume(self) -> None:
        """There is room for the transmitter again, which never waited."""

    def connection_changed(self) -> None:
        """A UART does not know who is at the other end of its line."""
