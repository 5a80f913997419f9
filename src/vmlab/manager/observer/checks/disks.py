"""Disks whose files, sizes or machines are not what the store says, and files of no disk."""

from __future__ import annotations

from collections.abc import Iterator

from vmlab.machine.sizes import format_size
from vmlab.manager.observer.difference import Difference
from vmlab.manager.observer.known import Known, KnownDisk, KnownMachine
from vmlab.manager.observer.seen import Seen, SeenDisk, SeenFile
from vmlab.manager.requests import Policy

__all__ = [
    "attachment_mismatch",
    "missing_disk",
    "orphan_disk",
    "size_mismatch",
    "storage_low",
]

_UNFINISHED = frozenset({"creating", "deleting", "failed"})
"""States of a disk that may have no file."""


def _touches(disk: KnownDisk) -> frozenset[str]:
    return frozenset(filter(None, (disk.id, disk.machine)))


def missing_disk(known: Known, seen: Seen) -> Iterator[Difference]:
    """Disks of the store's whose file is not there, or cannot be read as a disk."""
    if "files" not in seen.looked:
        return
    for disk in known.disks:
        file = seen.file.get(disk.path)
        if disk.state in _UNFINISHED or (file is not None and file.size is not None):
            continue
        what = "is not there" if file is None else f"is no disk: {file.problem}"
        yield Difference(
            code="missing-disk",
            severity="critical",
            subject=disk.id,
            name=disk.name,
            message=f"the file of disk {disk.name!r} {what}",
            hint="put the file back; adopt marks the disk as failed",
            source="files",
            evidence={
                "path": str(disk.path),
                "state": disk.state,
                "problem": file.problem if file is not None else "there is no such file",
                "machine": disk.machine,
            },
            touches=_touches(disk),
            actions=("adopt",),
        )


def orphan_disk(known: Known, seen: Seen) -> Iterator[Difference]:
    """Files among the disks that belong to no disk of the store."""
    if "files" not in seen.looked:
        return
    for file in seen.files:
        if file.path in known.disk_at:
            continue
        if known.since is not None and file.changed >= known.since:
            continue  # what an operation under way may be making
        yield Difference(
            code="orphan-disk",
            severity="warning",
            subject=file.path.name,
            name=file.path.name,
            message=f"the file {file.path.name!r} among the disks belongs to no disk of the store",
            hint="adopt takes it in as a disk, quarantine moves it aside; reconcile removes it, "
            "and wants its name typed",
            source="files",
            evidence={"path": str(file.path), "disk": file.disk, "size": file.size},
            touches=frozenset({file.disk} if file.disk else ()),
            actions=_for_file(file),
        )


def _for_file(file: SeenFile) -> tuple[Policy, ...]:
    """What can be done about an orphan: only what is a disk can become one again."""
    if file.disk is not None and file.size is not None:
        return ("adopt", "quarantine", "reconcile")
    return ("quarantine", "reconcile")


def attachment_mismatch(known: Known, seen: Seen) -> Iterator[Difference]:
    """Disks that a machine has and the store says it has not, and the other way round."""
    for machine in known.machines:
        found = seen.placed.get((machine.host, machine.at))
        if found is None or found.disks is None or f"parts:{machine.id}" not in seen.looked:
            continue
        names = {disk.name: disk for disk in found.disks}
        here = {disk.path: disk for disk in found.disks if disk.path is not None}
        for disk in known.disks_of.get(machine.id, ()):
            part = names.get(disk.device) if disk.device is not None else None
            # Not every hypervisor tells which file a disk is.
            has = disk.path in here or (part is not None and part.path is None)
            if disk.state == "attached" and not has:
                yield _lacking(machine, disk)
        for path, part in here.items():
            other = known.disk_at.get(path)
            if other is not None and other.machine != machine.id:
                yield _surplus(known, machine, other, part)


def _lacking(machine: KnownMachine, disk: KnownDisk) -> Difference:
    return Difference(
        code="disk-attachment-mismatch",
        severity="error",
        subject=disk.id,
        name=disk.name,
        message=f"disk {disk.name!r} is attached to machine {machine.name!r} in the store, "
        "and the machine does not have it",
        hint="reconcile attaches it, adopt marks it as detached",
        source=f"parts:{machine.id}",
        evidence={
            "direction": "store",
            "machine": machine.id,
            "device": disk.device,
            "path": str(disk.path),
        },
        touches=frozenset({disk.id, machine.id}),
        actions=("adopt", "reconcile"),
    )


def _surplus(known: Known, machine: KnownMachine, disk: KnownDisk, part: SeenDisk) -> Difference:
    elsewhere = known.machine.get(disk.machine) if disk.machine is not None else None
    stored = f"attached to {elsewhere.name!r}" if elsewhere is not None else "detached"
    actions: tuple[Policy, ...] = ("adopt", "reconcile") if elsewhere is None else ("reconcile",)
    return Difference(
        code="disk-attachment-mismatch",
        severity="error",
        subject=disk.id,
        name=disk.name,
        message=f"machine {machine.name!r} has disk {disk.name!r}, which is {stored} in the store",
        hint="reconcile detaches it"
        + (", adopt marks it as attached" if elsewhere is None else ""),
        source=f"parts:{machine.id}",
        evidence={
            "direction": "world",
            "machine": machine.id,
            "device": part.name,
            "path": str(disk.path),
            "stored_machine": disk.machine,
        },
        touches=frozenset(filter(None, (disk.id, machine.id, disk.machine))),
        actions=actions,
    )


def size_mismatch(known: Known, seen: Seen) -> Iterator[Difference]:
    """Disks whose file has another size than the store says."""
    if "files" not in seen.looked:
        return
    for disk in known.disks:
        file = seen.file.get(disk.path)
        if disk.state in _UNFINISHED or file is None or file.size in {None, disk.size}:
            continue
        size = file.size
        assert size is not None
        smaller = size < disk.size
        yield Difference(
            code="disk-size-mismatch",
            severity="error" if smaller else "warning",
            subject=disk.id,
            name=disk.name,
            message=f"disk {disk.name!r} has {format_size(disk.size)} in the store, "
            f"and its file {format_size(size)}",
            hint="adopt writes the file's size into the store"
            + (", reconcile grows the file" if smaller else "; a disk is never shrunk"),
            source="files",
            evidence={"path": str(disk.path), "stored": disk.size, "seen": size},
            touches=_touches(disk),
            actions=("adopt", "reconcile") if smaller else ("adopt",),
        )


def storage_low(seen: Seen, *, share: float, least: int) -> Iterator[Difference]:
    """File systems with less than `share` of them free, and less than `least` bytes."""
    for volume in seen.volumes:
        if volume.free >= volume.size * share or volume.free >= least:
            continue
        yield Difference(
            code="storage-low",
            severity="critical" if volume.free < least // 10 else "warning",
            subject=str(volume.path),
            name=str(volume.path),
            message=f"{format_size(volume.free)} of {format_size(volume.size)} are free "
            f"at {volume.path}",
            hint="remove snapshots, exports or disks that nobody needs, or make it larger",
            source="volumes",
            evidence={"size": volume.size, "free": volume.free},
        )
