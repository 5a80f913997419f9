"""The process beside a QEMU that one NIC's frames go through: told to, it loses or delays them.

QEMU's filter-redirector hands frames out of a socket and takes them back at another one, a pair for
each direction; each frame stands behind its length in four bytes, big-endian (QEMU's
net/filter-mirror.c). It ends when QEMU has closed them.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from vmlab.engine.devices.channel import listen
from vmlab.engine.devices.virtio.wire_faults import WireFault, WireFaults
from vmlab.engine.fault_commands import check_wire
from vmlab.engine.host_clock import HostClock
from vmlab.engine.monitor.commands import Commands
from vmlab.hypervisors.qemu import told_process
from vmlab.hypervisors.qemu.told_process import ToldProcess

_LENGTH: Final = struct.Struct(">I")
_LONGEST: Final = 1 << 20
"""Bytes of a frame; what says it has more is none."""


class Direction:
    """The frames of one direction.

    Args:
        faults: What befalls them.
        out: Socket at which QEMU hands them out; it must not exist.
        back: Socket at which QEMU takes them back; the same.
        left: Called when QEMU has left, from a thread of the direction's own.
    """

    def __init__(self, faults: WireFaults, out: Path, back: Path, left: Callable[[], None]) -> None:
        self._faults = faults
        self._left = left
        self._lock = threading.Lock()
        self._listeners = [listen(out), listen(back)]

    def begin(self) -> None:
        """Let QEMU come."""
        threading.Thread(target=self._serve, name="vmlab-wire", daemon=True).start()

    def _serve(self) -> None:
        try:
            for listener in self._listeners:
                listener.setblocking(True)
            (out, _), (self._back, _) = [listener.accept() for listener in self._listeners]
            with out, self._back:
                self._pass(out)
        except OSError:
            # It has left, however it did.
            return
        finally:
            for listener in self._listeners:
                listener.close()
            self._left()

    def _pass(self, out: socket.socket) -> None:
        """Pass frames on until there are no more."""
        with out.makefile("rb") as frames:
            while len(head := frames.read(_LENGTH.size)) == _LENGTH.size:
                (size,) = _LENGTH.unpack(head)
                if size > _LONGEST or len(frame := frames.read(size)) < size:
                    return
                self._hand_on(head + frame)

    def _hand_on(self, frame: bytes) -> None:
        if not self._faults.take(lambda: self._give_back(frame)):
            self._give_back(frame)

    def _give_back(self, frame: bytes) -> None:
        # Who is late may find nobody there any more.
        with self._lock, suppress(OSError):
            self._back.sendall(frame)


def serve(name: str, described: list[tuple[str, str]]) -> None:
    """Pass frames of a NIC on until QEMU has left.

    Args:
        name: Begins the names of its files.
        described: The names of the sockets of each direction: out, and back.

    Raises:
        VmlabError: one cannot be made.
    """
    clock = HostClock()
    clock.run()
    faults = WireFaults(clock)
    commands = Commands()

    def net_fault(id_: str, name: str, fault: WireFault) -> None:
        """Have frames of the NIC struck, until the fault is ended by its id."""
        check_wire(fault)
        faults.add(id_, fault)

    def fault_end(id_: str) -> None:
        """End a fault; one that has ended is none."""
        faults.remove(id_)

    commands.add("x-net-fault", net_fault)
    commands.add("x-fault-end", fault_end)
    process, used = ToldProcess(), set(range(len(described)))

    def let_go(number: int) -> None:
        process.later(lambda: used.discard(number))

    for number, (out, back) in enumerate(described):
        Direction(faults, Path(out), Path(back), partial(let_go, number)).begin()
    process.run_until(lambda: not used, Path(f"{name}-qmp.sock"), commands)
    clock.halt()


def main(arguments: list[str]) -> int:
    """Serve what the file that is named describes; the status to end with."""
    return told_process.main(arguments, serve)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
