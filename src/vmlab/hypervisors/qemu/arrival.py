"""What a machine that arrives from elsewhere has to be given: its files, and names of its own.

A migrated machine gets the files of the one that it was, by hard links where both are on one file
system; a copy gets MAC addresses of its own inside the state that it takes over.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmlab.hypervisors.monitored.streams import console_log
from vmlab.hypervisors.qemu.memory import copy_sparse

if TYPE_CHECKING:
    from vmlab.hypervisors.qemu.machine import QemuMachine

_SECTION: Final = re.compile(rb"\x04.{4}.(?:[0-9a-f:./-]{4,80}/)?virtio-net\0\0\0", re.DOTALL)
"""The head of a NIC's section in a stream: QEMU_VM_SECTION_FULL, the section's number, the length
of its name, the name, the instance (QEMU's migration/savevm.c, save_section_header)."""
_SECTION_LENGTH: Final = 16 << 10
"""Bytes that hold a NIC's configuration and state, a table of 4096 VLANs included."""


def rename_macs(
    source: Path,
    target: Path,
    before: Mapping[str, str],
    after: Mapping[str, str],
    *,
    begin: int = 0,
) -> int:
    """Copy a stream with other MAC addresses in the state of its NICs.

    The guest goes on using the old ones until it is told: see `vmlab.guests`.

    Args:
        source: The stream.
        target: The copy.
        before: MAC address of each NIC in the stream.
        after: MAC address of each NIC in the copy.
        begin: Bytes at its beginning that have no devices in them.

    Returns:
        How many addresses were replaced.
    """
    data = bytearray(source.read_bytes())
    changes = {
        bytes.fromhex(old.replace(":", "")): bytes.fromhex(after[nic].replace(":", ""))
        for nic, old in before.items()
    }
    count = 0
    heads = [match.start() for match in _SECTION.finditer(data, begin)]
    for start, end in pairwise([*heads, len(data)]):
        end = min(end, start + _SECTION_LENGTH)
        for old, new in changes.items():
            position = data.find(old, start, end)
            while position >= 0:
                data[position : position + len(old)] = new
                count += 1
                position = data.find(old, position + len(new), end)
    target.write_bytes(data)
    return count


def move_files(
    machine: QemuMachine, arrival: QemuMachine, check: Callable[[], None]
) -> dict[Path, Path]:
    """Give `arrival` the files of `machine`, which keeps them until the end.

    Returns:
        Images that are not the same file in both places, and have to be copied once more when the
        machine stands still: from where, to where.
    """
    arrival.make_directories()
    late: dict[Path, Path] = {}
    for disk in machine.disks.values():
        if not disk.made:
            arrival.disks[disk.name] = disk
            continue
        target = arrival.disk_directory / disk.path.name
        if not _share(disk.path, target, check):
            late[disk.path] = target
        arrival.disks[disk.name] = disk.at(target)
    for console in machine.spec.consoles:
        log = machine.directory / console_log(console)
        if log.exists():
            _share(log, arrival.directory / log.name, check)
    for source in _files(machine.snapshot_directory):
        target = arrival.snapshot_directory / source.relative_to(machine.snapshot_directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        _share(source, target, check)
    arrival.layout = machine.layout
    arrival.cut = set(machine.cut)
    # A number that no image of the machine has.
    arrival.launches = machine.launches
    return late


def _files(directory: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(directory):
        for name in names:
            yield Path(folder) / name


def _share(source: Path, target: Path, check: Callable[[], None]) -> bool:
    """Make `target` the same file as `source`, or else a copy; whether it is the same."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP}:
            raise
        copy_sparse(source, target, check)
        return False
    return True


def copy_late(files: Mapping[Path, Path], check: Callable[[], None]) -> None:
    """Copy images whose machine stands still, into the files that are open already."""
    for source, target in files.items():
        copy_sparse(source, target, check)
