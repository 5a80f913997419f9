"""The process beside a QEMU that serves its breakable disks, and breaks them when it is told to.

QEMU reads and writes them by NBD; what is to befall them is told over QMP, with the commands of the
embedded engine (vmlab.engine.fault_commands). It ends when QEMU has let go of all disks.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.devices.storage.faulty import FaultyDisk
from vmlab.engine.devices.storage.nbd import NbdExport
from vmlab.engine.devices.storage.overlay import open_disk
from vmlab.engine.fault_commands import DiskFaultCommands
from vmlab.engine.monitor.commands import Commands
from vmlab.engine.monitor.server import Monitor
from vmlab.machine.errors import VmlabError

_VERSION: Final = (0, 1, 0)
SOCKET: Final = "disks-qmp.sock"
"""Where it is told what to break, in the directory that it is started in."""


class Server:
    """Serves the disks that a file describes.

    Args:
        disks: Of each its node, file, format, whether it is read-only, and its socket.

    Raises:
        VmlabError: one cannot be opened.
    """

    def __init__(self, disks: list[dict[str, Any]]) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._left = 0
        self._reactor = Reactor(self._mistaken)
        opened: dict[str, FaultyDisk] = {}
        for disk in disks:
            below = open_disk(Path(disk["file"]), disk["format"], read_only=disk["read-only"])
            opened[disk["node"]] = FaultyDisk(below, time.monotonic_ns)
        self._count = len(opened)
        for disk in disks:
            NbdExport(opened[disk["node"]], Path(disk["socket"]), self._gone)
        self._disks = opened
        commands = Commands()
        faults = DiskFaultCommands(commands, lambda: opened)
        commands.add("x-fault-end", faults.fault_end)
        commands.add("x-power-cut", faults.lose_power)
        # When this socket is there, so are the others.
        self._monitor = Monitor(Path(SOCKET), self._reactor, commands, _VERSION, self._work.put)
        self._reactor.start()

    def run(self) -> None:
        """Serve until all disks were let go."""
        while self._left < self._count:
            self._work.get()()
        self._monitor.close()
        self._reactor.close()
        for disk in self._disks.values():
            disk.close()

    # From any thread.

    def _gone(self) -> None:
        self._work.put(self._let_go)

    def _mistaken(self, error: BaseException) -> None:
        def end() -> None:
            raise error

        self._work.put(end)

    # On the thread that runs.

    def _let_go(self) -> None:
        self._left += 1


def main(arguments: list[str]) -> int:
    """Serve what the file that is named describes; the status to end with."""
    os.umask(0o077)
    try:
        Server(json.loads(Path(arguments[0]).read_text("utf-8"))).run()
    except VmlabError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
