"""The process beside a QEMU that serves its breakable disks, and breaks them when it is told to.

QEMU reads and writes them by NBD; what is to befall them is told over QMP, with the commands of the
embedded engine (vmlab.engine.fault_commands). It ends when QEMU has let go of all disks.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from vmlab.engine.devices.storage.faulty import FaultyDisk
from vmlab.engine.devices.storage.nbd import NbdExport
from vmlab.engine.devices.storage.overlay import open_disk
from vmlab.engine.fault_commands import DiskFaultCommands
from vmlab.engine.monitor.commands import Commands
from vmlab.hypervisors.qemu import told_process
from vmlab.hypervisors.qemu.told_process import ToldProcess


def serve(name: str, described: list[dict[str, Any]]) -> None:
    """Serve disks until all were let go.

    Args:
        name: Begins the names of its files.
        described: Of each disk its node, file, format, whether it is read-only, and its socket.

    Raises:
        VmlabError: one cannot be opened.
    """
    disks: dict[str, FaultyDisk] = {}
    for disk in described:
        below = open_disk(Path(disk["file"]), disk["format"], read_only=disk["read-only"])
        disks[disk["node"]] = FaultyDisk(below, time.monotonic_ns)
    commands = Commands()
    faults = DiskFaultCommands(commands, lambda: disks)
    commands.add("x-fault-end", faults.fault_end)
    commands.add("x-power-cut", faults.lose_power)
    process, used = ToldProcess(), set(disks)

    def let_go(node: str) -> None:
        process.later(lambda: used.discard(node))

    for disk in described:
        left = partial(let_go, disk["node"])
        NbdExport(disks[disk["node"]], Path(disk["socket"]), left).begin()
    # When this socket is there, so are the others.
    process.run_until(lambda: not used, Path(f"{name}-qmp.sock"), commands)
    for opened in disks.values():
        opened.close()


def main(arguments: list[str]) -> int:
    """Serve what the file that is named describes; the status to end with."""
    return told_process.main(arguments, serve)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
