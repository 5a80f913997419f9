"""The user network: NAT by `passt`, where it is installed, with forwards from ports of the host.

Addresses are those that QEMU's user network has: the guest 10.0.2.15, the gateway 10.0.2.2, which
is also the host's loopback, the name server 10.0.2.3. passt speaks frames over a stream that it is
given; it ends when that closes, so it does not outlive this process, however this process ends.
"""

from __future__ import annotations

import ipaddress
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.devices.virtio.net import VirtioNet
from vmlab.engine.devices.virtio.segments import StreamSegment
from vmlab.machine.errors import VmlabError

PROGRAM: Final = "passt"
GUEST: Final = "10.0.2.15"
GATEWAY: Final = "10.0.2.2"
_NAMES: Final = "10.0.2.3"
_NETWORK: Final = (
    *("--address", GUEST, "--netmask", "255.255.255.0", "--gateway", GATEWAY),
    *("--dns", _NAMES, "--dns-forward", _NAMES, "--ipv4-only", "--mtu", "1500"),
)
_FLAGS: Final = {"tcp": "--tcp-ports", "udp": "--udp-ports"}
_KINDS: Final = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
_ATTEMPTS: Final = 10
_PATIENCE: Final = 30.0
_LENGTH: Final = struct.Struct(">I")
_NOISE: Final = "to syslog"


@dataclass(frozen=True)
class PortForward:
    """A port of the host that leads into the guest; host port 0 is any free one."""

    guest_port: int
    host_port: int = 0
    host: str = "127.0.0.1"
    protocol: str = "tcp"


class UserSegment:
    """A NIC's user network.

    Args:
        reactor: Who waits for the sockets.
        mac: The NIC's.
        forwards: From ports of the host.

    Attributes:
        forwards: The same, with the ports that were chosen.

    Raises:
        VmlabError: passt is not installed or does not start, or a port is taken.
    """

    def __init__(self, reactor: Reactor, mac: bytes, forwards: Sequence[PortForward]) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            raise VmlabError(
                f"a user network needs {PROGRAM!r}, which is not installed",
                hint="install passt, or plug the NIC into a segment",
            )
        for forward in forwards:
            _check(forward)
        self.forwards, self._process, stream = _reached(program, mac, forwards)
        self._stream = StreamSegment.over(reactor, stream)

    def attach(self, device: VirtioNet) -> None:
        """The device on this end."""
        self._stream.attach(device)

    def send(self, frame: bytes) -> bool:
        """Put a frame on the wire."""
        return self._stream.send(frame)

    def resume(self) -> None:
        """The device takes frames again."""
        self._stream.resume()

    def close(self) -> None:
        """Leave the network, which ends it."""
        self._stream.close()
        _end(self._process)


def _check(forward: PortForward) -> None:
    """Refuse what is no forward."""
    try:
        ipaddress.IPv4Address(forward.host)
    except ValueError:
        raise VmlabError(
            f"{forward.host!r} is no IPv4 address to forward from", hint='such as "127.0.0.1"'
        ) from None
    if forward.protocol not in _FLAGS:
        raise VmlabError(
            f"{forward.protocol!r} is no protocol that is forwarded", hint="one of tcp, udp"
        )
    for port, least in ((forward.guest_port, 1), (forward.host_port, 0)):
        if not least <= port < 1 << 16:
            raise VmlabError(f"{port} is no port", hint=f"one of {least} to 65535")


def _with_port(forward: PortForward) -> PortForward:
    """The forward from a port that is free now, if it may choose."""
    if forward.host_port:
        return forward
    with socket.socket(socket.AF_INET, _KINDS[forward.protocol]) as found:
        found.bind((forward.host, 0))
        return replace(forward, host_port=found.getsockname()[1])


def _reached(
    program: str, mac: bytes, forwards: Sequence[PortForward]
) -> tuple[list[PortForward], subprocess.Popen[bytes], socket.socket]:
    """passt at work with all the forwards' ports; what `_started` tells.

    Raises:
        VmlabError: it does not start.
    """
    left = _ATTEMPTS if any(not forward.host_port for forward in forwards) else 1
    while True:
        left -= 1
        chosen = [_with_port(forward) for forward in forwards]
        try:
            return chosen, *_started(program, mac, chosen)
        except ChildProcessError as error:
            # A port that was free may be taken a moment later.
            if not left:
                raise VmlabError(
                    f"{PROGRAM} does not start: {error}",
                    hint="are the ports free that the forwards name?",
                ) from None


def _started(
    program: str, mac: bytes, forwards: Sequence[PortForward]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """passt at work, and the stream that leads to it.

    Raises:
        ChildProcessError: it ended, with what it said.
    """
    here, there = socket.socketpair()
    ports = [
        word
        for one in forwards
        for word in (_FLAGS[one.protocol], f"{one.host}/{one.host_port}:{one.guest_port}")
    ]
    with there, tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                [
                    *(program, "--foreground", "--stderr", "--quiet", "--fd", str(there.fileno())),
                    *(*_NETWORK, *ports),
                ],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
        except OSError as error:
            here.close()
            raise ChildProcessError(str(error)) from None
        there.close()
        try:
            _wait_for_answer(here, mac)
        except OSError:
            here.close()
            _end(process)
            said.seek(0)
            lines = said.read().decode(errors="replace").splitlines()
            told = [line for line in lines if line and _NOISE not in line]
            raise ChildProcessError(told[-1] if told else f"status {process.returncode}") from None
    return process, here


def _wait_for_answer(stream: socket.socket, mac: bytes) -> None:
    """Ask for the gateway's address (ARP, RFC 826): who answers is at work.

    Raises:
        OSError: nobody does.
    """
    addresses = mac + socket.inet_aton(GUEST) + bytes(6) + socket.inet_aton(GATEWAY)
    request = bytes.fromhex("0001080006040001") + addresses
    frame = b"\xff" * 6 + mac + b"\x08\x06" + request
    stream.settimeout(_PATIENCE)
    stream.sendall(_LENGTH.pack(len(frame)) + frame)
    (size,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    _exactly(stream, size)


def _exactly(stream: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = stream.recv(count - len(data))
        if not piece:
            raise ConnectionError("the stream has ended")
        data += piece
    return data


def _end(process: subprocess.Popen[bytes]) -> None:
    """See it end: its stream is closed."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE)
        return
    process.kill()
    process.wait()
