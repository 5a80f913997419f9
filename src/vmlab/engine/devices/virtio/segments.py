"""Networks between machines: sockets as QEMU's `-netdev stream`, `dgram` and `socket,mcast`; taps.

A stream carries each frame behind its length in four bytes, big-endian (QEMU's net/stream.c); a
datagram is a frame. So a machine here and one on QEMU can share a segment.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Final

from vmlab.engine.devices.channel import listen
from vmlab.engine.devices.reactor import HasFileno, Reactor, Watch
from vmlab.engine.devices.virtio.net import MAX_FRAME, VirtioNet
from vmlab.machine.errors import ResourceNotFound, VmlabError

_LENGTH: Final = struct.Struct(">I")
_PIECE: Final = 1 << 17
_BUFFER: Final = 1 << 20
"""Bytes on their way out before the guest has to wait."""
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000


class StreamSegment:
    """Frames over a stream, of which `serve`, `connect` and `over` make one.

    The link is up while somebody is at the other end.
    """

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._device: VirtioNet | None = None
        self._lock = threading.RLock()
        self._peer: socket.socket | None = None
        self._watch: Watch | None = None
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._refused = False
        self._server: socket.socket | None = None
        self._server_watch: Watch | None = None

    @classmethod
    def serve(cls, reactor: Reactor, path: Path) -> StreamSegment:
        """Make a unix socket, at which the other machine is waited for.

        Raises:
            VmlabError: the socket cannot be made.
        """
        made = cls(reactor)
        made._server = listen(path)
        made._server_watch = reactor.watch(made._server, made._accept)
        return made

    @classmethod
    def connect(cls, reactor: Reactor, path: Path) -> StreamSegment:
        """Go to the unix socket of the other machine.

        Raises:
            ResourceNotFound: nobody listens there.
        """
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.connect(str(path))
        except OSError as error:
            peer.close()
            raise ResourceNotFound(
                f"nobody listens at the network segment {str(path)!r}: {error.strerror}",
                hint="start the machine that is the segment's server first",
            ) from None
        return cls.over(reactor, peer)

    @classmethod
    def over(cls, reactor: Reactor, peer: socket.socket) -> StreamSegment:
        """Take over a stream that leads to the other end."""
        made = cls(reactor)
        made._join(peer)
        return made

    def _join(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        self._peer = peer
        self._incoming.clear()
        self._outgoing.clear()
        self._watch = self._reactor.watch(peer, self._readable, self._writable)

    def _accept(self) -> None:
        with self._lock:
            if self._server is None or self._server_watch is None:
                return
            try:
                peer, _ = self._server.accept()
            except OSError:  # it has left already
                return
            self._join(peer)
            self._server_watch.want(reading=False)
        if self._device is not None:
            self._device.set_link(True)

    def attach(self, device: VirtioNet) -> None:
        """The device on this end."""
        self._device = device
        device.own.link_up = self._peer is not None

    @property
    def connected(self) -> bool:
        """Whether somebody is at the other end."""
        return self._peer is not None

    def send(self, frame: bytes) -> bool:
        """Put a frame on the wire; nobody there: it is lost, as on a real one."""
        with self._lock:
            if self._peer is None:
                return True
            if len(self._outgoing) > _BUFFER:
                self._refused = True
                return False
            self._outgoing += _LENGTH.pack(len(frame)) + frame
            self._flush()
            return True

    def _flush(self) -> None:
        if self._peer is None or self._watch is None:
            return
        try:
            while self._outgoing:
                del self._outgoing[: self._peer.send(self._outgoing[:_PIECE])]
        except BlockingIOError:
            pass
        except OSError:
            self._outgoing.clear()  # gone; reading will notice
        self._watch.want(writing=bool(self._outgoing))

    def _writable(self) -> None:
        with self._lock:
            self._flush()
            resume = self._refused and len(self._outgoing) <= _BUFFER // 2
            self._refused = self._refused and not resume
        if resume and self._device is not None:
            self._device.resume()

    def _readable(self) -> None:
        with self._lock:
            if self._peer is None:
                return
            try:
                data = self._peer.recv(_PIECE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            self._incoming += data
        if not data or not self._hand_over():
            self._leave()

    def _hand_over(self) -> bool:
        """Give whole frames to the device as long as it takes them; False: that is no frame."""
        while self._device is not None:
            with self._lock:
                if len(self._incoming) < _LENGTH.size:
                    break
                (size,) = _LENGTH.unpack_from(self._incoming)
                if size > MAX_FRAME:
                    return False
                if len(self._incoming) < _LENGTH.size + size:
                    break
                if self._device.full and self._device.running:
                    if self._watch is not None:
                        self._watch.want(reading=False)
                    return True
                frame = bytes(self._incoming[_LENGTH.size : _LENGTH.size + size])
                del self._incoming[: _LENGTH.size + size]
            self._device.arrived(frame)
        return True

    def resume(self) -> None:
        """The device takes frames again."""
        if not self._hand_over():
            self._leave()
        elif self._watch is not None and self._device is not None and not self._device.full:
            self._watch.want(reading=True)

    def _leave(self) -> None:
        with self._lock:
            peer, watch = self._peer, self._watch
            self._peer = self._watch = None
            if peer is None or watch is None:
                return
            watch.close()
            peer.close()
            resume, self._refused = self._refused, False
            if self._server_watch is not None:
                self._server_watch.want(reading=True)
        if self._device is not None:
            self._device.set_link(False)
            if resume:
                self._device.resume()

    def close(self) -> None:
        """Leave the segment, and remove its socket if it was made here."""
        with self._lock:
            self._device = None
            self._leave()
            if self._server is not None and self._server_watch is not None:
                path = self._server.getsockname()
                self._server_watch.close()
                self._server.close()
                self._server = None
                with suppress(FileNotFoundError):
                    Path(path).unlink()


class _MessageSegment(ABC):
    """A segment on which each message is a frame, and nobody waits: what is too much is lost."""

    def __init__(self) -> None:
        self._device: VirtioNet | None = None
        self._watch: Watch | None = None

    def _open(self, reactor: Reactor, file: HasFileno) -> None:
        """Take frames from now on."""
        self._watch = reactor.watch(file, self._readable)

    def attach(self, device: VirtioNet) -> None:
        """The device on this end."""
        self._device = device

    def send(self, frame: bytes) -> bool:
        """Put a frame on the wire; where nobody takes it, it is lost, as on a real one."""
        with suppress(OSError):
            self._put(frame)
        return True

    def _readable(self) -> None:
        try:
            frame = self._take()
        except OSError:
            return
        if self._device is not None and frame is not None:
            self._device.arrived(frame)

    def resume(self) -> None:  # noqa: B027 -- there is nothing to do, for any of them
        """Nothing has waited."""

    def close(self) -> None:
        """Leave the segment."""
        self._device = None
        if self._watch is not None:
            self._watch.close()
        self._leave()

    @abstractmethod
    def _put(self, frame: bytes) -> None:
        """Put a frame on the wire; OSError: it does not take it."""

    @abstractmethod
    def _take(self) -> bytes | None:
        """The frame that has come; None: it is this device's own. OSError: there is none."""

    @abstractmethod
    def _leave(self) -> None:
        """Close what the frames went through."""


class DatagramSegment(_MessageSegment):
    """A frame is a datagram from the socket at `local` to the one at `remote`.

    Raises:
        VmlabError: the local socket cannot be made.
    """

    def __init__(self, reactor: Reactor, local: Path, remote: Path) -> None:
        super().__init__()
        self._local = local
        self._remote = str(remote)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            self._socket.bind(str(local))
            local.chmod(0o600)
        except OSError as error:
            self._socket.close()
            raise VmlabError(
                f"the network socket {str(local)!r} cannot be opened: {error.strerror or error}",
                hint="a socket's path is new, in a folder that can be written, below 108 bytes",
            ) from None
        self._open(reactor, self._socket)

    def _put(self, frame: bytes) -> None:
        self._socket.sendto(frame, self._remote)

    def _take(self) -> bytes:
        return self._socket.recv(MAX_FRAME + 1)

    def _leave(self) -> None:
        self._socket.close()
        with suppress(FileNotFoundError):
            self._local.unlink()


class MulticastSegment(_MessageSegment):
    """A frame is a datagram to a multicast group on the loopback interface; all members get it.

    Args:
        reactor: Who waits for the sockets.
        group: "ADDRESS:PORT", an IPv4 multicast address (RFC 1112) and a UDP port.

    Raises:
        VmlabError: that is no group, or it cannot be joined.
    """

    def __init__(self, reactor: Reactor, group: str) -> None:
        super().__init__()
        self._group = _multicast_group(group)
        loopback = socket.inet_aton("127.0.0.1")
        self._members = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        # What is sent from a socket of its own is known when it comes back.
        self._own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._members.setblocking(False)
            self._own.setblocking(False)
            self._members.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._members.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            self._members.bind(self._group)
            membership = socket.inet_aton(self._group[0]) + loopback
            self._members.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
            self._own.bind(("127.0.0.1", 0))
            self._own.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, loopback)
        except OSError as error:
            self._leave()
            raise VmlabError(
                f"the network segment {group!r} cannot be joined: {error.strerror or error}",
                hint="the loopback interface has to be up; is the port taken?",
            ) from None
        self._name = self._own.getsockname()
        self._open(reactor, self._members)

    def _put(self, frame: bytes) -> None:
        self._own.sendto(frame, self._group)

    def _take(self) -> bytes | None:
        frame, sender = self._members.recvfrom(MAX_FRAME + 1)
        return frame if sender != self._name else None

    def _leave(self) -> None:
        self._members.close()
        self._own.close()


def _multicast_group(group: str) -> tuple[str, int]:
    from ipaddress import IPv4Address  # takes a while; few machines need it

    address, _, port = group.rpartition(":")
    try:
        known = IPv4Address(address).is_multicast and 0 < int(port) < 1 << 16
    except ValueError:
        known = False
    if not known:
        raise VmlabError(
            f"{group!r} is no multicast group", hint='an address and a port: "239.1.2.3:20000"'
        )
    return address, int(port)


class _Descriptor:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


class TapSegment(_MessageSegment):
    """A tap interface of the host's, which exists or which this user may make.

    Raises:
        VmlabError: it cannot be opened.
    """

    def __init__(self, reactor: Reactor, interface: str) -> None:
        super().__init__()
        name = interface.encode()
        if not 0 < len(name) < 16:
            raise VmlabError(
                f"{interface!r} is no name of a network interface", hint="1 to 15 bytes"
            )
        self._fd = -1
        try:
            self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(self._fd, _TUNSETIFF, struct.pack("16sH22x", name, _IFF_TAP | _IFF_NO_PI))
        except OSError as error:
            if self._fd >= 0:
                os.close(self._fd)
            raise VmlabError(
                f"the tap interface {interface!r} cannot be opened: {error.strerror}",
                hint=f"make it once as root: ip tuntap add {interface} mode tap user $USER",
            ) from None
        self._open(reactor, _Descriptor(self._fd))

    def _put(self, frame: bytes) -> None:
        os.write(self._fd, frame)

    def _take(self) -> bytes:
        return os.read(self._fd, MAX_FRAME + 1)

    def _leave(self) -> None:
        os.close(self._fd)
