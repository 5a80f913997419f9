"""Snapshots of a machine: a directory each, with a description, disks, memory and state.

A snapshot is complete once it has its name: it is written under another one and renamed. Every file
is described with its digest, which is checked before anything is restored.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from vmlab.hypervisors.base import Snapshot
from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.qemu.layout import Layout
from vmlab.hypervisors.qemu.memory import STREAM, copy_sparse, digest_of
from vmlab.machine.errors import CorruptSnapshot, SnapshotNotFound
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

_DESCRIPTION: Final = "snapshot.json"
_BLOCK: Final = 512
"""Unit of st_blocks (stat(2))."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A snapshot as it is on disk.

    Attributes:
        snapshot: What the contract tells of it.
        directory: Where its files are.
        layout: Where the machine's devices were.
        disks: Its disks; the files of those that were made are in `directory`.
        whole: Whether the stream has the memory in it.
        files: Digest of each file, by name.
    """

    snapshot: Snapshot
    directory: Path
    layout: Layout
    disks: tuple[DiskFile, ...]
    whole: bool
    files: dict[str, str]

    @property
    def stream(self) -> Path:
        """The file with the state of vCPUs and devices."""
        return self.directory / STREAM

    @property
    def memory(self) -> tuple[Path, ...]:
        """The files with the memory; none if it is in the stream."""
        names = sorted(name for name in self.files if name.startswith("memory-"))
        return tuple(self.directory / name for name in names)

    def verify(self, check: Callable[[], None]) -> None:
        """Read all files and compare.

        Raises:
            CorruptSnapshot: naming the first file that is not what was written.
        """
        for name, digest in self.files.items():
            try:
                found = digest_of(self.directory / name, check)
            except OSError as error:
                raise self._corrupt(f"{name} cannot be read: {error.strerror}") from error
            if found != digest:
                raise self._corrupt(f"{name} is not what was written")
        for disk in self.disks:
            if not disk.made and not disk.path.exists():
                raise self._corrupt(f"the image {disk.path} under its disk {disk.name!r} is gone")

    def _corrupt(self, what: str) -> CorruptSnapshot:
        return CorruptSnapshot(
            f"snapshot {self.snapshot.name!r} is damaged: {what}",
            hint="delete it; nothing was changed",
            machine=self.snapshot.spec.name,
            hypervisor="qemu",
            operation="restore",
        )


def memory_file(number: int) -> str:
    """The file of the memory object of that number."""
    return f"memory-{number}"


def copy_disks(
    disks: Sequence[DiskFile],
    path: Callable[[DiskFile], Path],
    check: Callable[[], None],
) -> list[DiskFile]:
    """Copies of the files that were made for a machine; the others are used where they are."""
    copies = []
    for disk in disks:
        if disk.made:
            target = path(disk)
            copy_sparse(disk.path, target, check)
            copies.append(disk.at(target))
        else:
            copies.append(disk)
    return copies


def describe(
    directory: Path,
    *,
    name: str,
    machine: str,
    spec: MachineSpec,
    state: MachineState,
    memory: bool,
    time: float,
    layout: Layout,
    disks: Sequence[DiskFile],
    whole: bool,
    check: Callable[[], None],
) -> Snapshot:
    """Write the description of the files in `directory`, which make up a snapshot."""
    files = {path.name: digest_of(path, check) for path in sorted(directory.iterdir())}
    size = sum(path.stat().st_blocks * _BLOCK for path in directory.iterdir())
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    snapshot = Snapshot(
        name=name,
        machine=machine,
        spec=spec,
        state=state,
        memory=memory,
        time=time,
        size=size,
        digest=digest,
    )
    record = {
        "snapshot": snapshot.model_dump(mode="json"),
        "layout": layout.to_record(),
        "disks": [disk.to_record() | {"path": _relative(disk, directory)} for disk in disks],
        "whole": whole,
        "files": files,
    }
    (directory / _DESCRIPTION).write_text(json.dumps(record, indent=1), "utf-8")
    return snapshot


def _relative(disk: DiskFile, directory: Path) -> str:
    """A disk's path in a description: a snapshot moves with its machine."""
    return disk.path.name if disk.path.parent == directory else str(disk.path)


def load(directory: Path) -> Saved:
    """The snapshot in `directory`.

    Raises:
        SnapshotNotFound: there is none.
        CorruptSnapshot: its description is damaged.
    """
    path = directory / _DESCRIPTION
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        disks = [DiskFile.from_record(disk) for disk in record["disks"]]
        return Saved(
            Snapshot.model_validate({**record["snapshot"], "directory": directory}),
            directory,
            Layout.from_record(record["layout"]),
            # A relative path is one in the snapshot; an absolute one stays as it is.
            tuple(disk.at(directory / disk.path) for disk in disks),
            bool(record["whole"]),
            dict(record["files"]),
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SnapshotNotFound(
            f"there is no snapshot {directory.name!r}",
            hint="it went when it was deleted, or with its machine",
            hypervisor="qemu",
        ) from error
    except (OSError, ValueError, LookupError, TypeError, ValidationError) as error:
        raise CorruptSnapshot(
            f"the description of snapshot {directory.name!r} is damaged: {path}",
            hint="delete it; nothing was changed",
            hypervisor="qemu",
        ) from error


def all_in(directory: Path) -> list[Snapshot]:
    """The snapshots below `directory`, the oldest first; damaged descriptions are left out."""
    found = []
    if directory.is_dir():
        for entry in directory.iterdir():
            try:
                if not entry.name.startswith("."):
                    found.append(load(entry).snapshot)
            except (CorruptSnapshot, SnapshotNotFound):
                continue
    return sorted(found, key=lambda snapshot: (snapshot.time, snapshot.name))


def remove(directory: Path) -> None:
    """Remove a snapshot, whole or half made; again does nothing."""
    if directory.exists():
        shutil.rmtree(directory)
