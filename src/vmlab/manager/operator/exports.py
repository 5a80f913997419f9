"""Machines as files: one at rest is written to an archive; `imports` makes one of it again.

An archive is a file of the manager's directory of exports, named by the request, and nothing that
is there is ever overwritten. What is in it is in `vmlab.manager.machine_archive`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence, Set
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.hypervisors.base import Machine
from vmlab.hypervisors.monitored.disks import image_format
from vmlab.hypervisors.threads import done_in_thread, in_thread
from vmlab.machine.errors import InvalidSpec, OperationFailed, SpecProblem
from vmlab.machine.fields import is_name
from vmlab.machine.spec import Disk, MachineSpec
from vmlab.machine.states import OPERATIONS
from vmlab.manager import machine_archive
from vmlab.manager.documents import UNDER_WAY
from vmlab.manager.lending import forget_lent, forget_passing, is_lent
from vmlab.manager.machine_archive import DiskMember, FileMember, Manifest, NicPart
from vmlab.manager.operator.definition import json_of
from vmlab.manager.operator.handler import Handler, PlannedStep, Target, key, register
from vmlab.manager.operator.journal import Step, Work
from vmlab.manager.operator.placement import look, refuse_unless
from vmlab.manager.operator.wiring import SEED_DISK
from vmlab.manager.requests import ExportMachine, Metadata
from vmlab.manager.settings import Settings
from vmlab.manager.storage import file_error
from vmlab.manager.store.changes import Conflict
from vmlab.manager.store.queries import find_machine
from vmlab.manager.store.tables import DiskRow, MachineRow, OperationRow

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = [
    "LEFT_OUT",
    "ExportHandler",
    "clear_exports",
    "export_path",
    "exports_directory",
    "forget_parts",
    "fresh_parts",
    "keep_archive",
    "parts_directory",
]

_PART: Final = re.compile(r"\.([0-9a-f]{32})\.part")
_REST: Final = OPERATIONS["start"]
LEFT_OUT: Final = ("shares", "host_devices")
"""What of a specification belongs to the host that the machine was on."""


def exports_directory(settings: Settings) -> Path:
    """Where archives are; made if it is missing."""
    directory = settings.directory / "exports"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def export_path(settings: Settings, name: str) -> Path:
    """The archive of that name.

    Raises:
        ValueError: it is no name; requests were checked before.
    """
    if not is_name(name):
        raise ValueError(f"{name!r} is no name of a file")
    return exports_directory(settings) / name


def parts_directory(settings: Settings, operation: str) -> Path:
    """What an operation or an upload has not finished; no archive can have such a name."""
    return exports_directory(settings) / f".{operation}.part"


async def clear_exports(manager: Manager) -> None:
    """Remove what commands, operations and uploads that were killed have left among the exports."""
    unfinished, wanted = await manager.database.read(_wanted)
    await done_in_thread(_clear, exports_directory(manager.settings), unfinished, wanted)


def _wanted(session: Session) -> tuple[set[str], set[str]]:
    """Ids of the operations that are not ended, and what imports among them have yet to read."""
    rows = session.execute(
        select(OperationRow.id, OperationRow.kind, OperationRow.request).where(
            OperationRow.state.in_(UNDER_WAY)
        )
    ).all()
    imports = {str(row.request["path"]) for row in rows if row.kind == "machine.import"}
    return {row.id for row in rows}, imports


def _clear(directory: Path, unfinished: Set[str], wanted: Set[str]) -> None:
    forget_lent(directory, wanted)
    forget_passing(directory, wanted)
    for path in directory.iterdir():
        part = _PART.fullmatch(path.name)
        if part is not None and part[1] not in unfinished:
            shutil.rmtree(path, ignore_errors=True)


async def forget_parts(directory: Path) -> None:
    """Remove it, if it is there."""
    await done_in_thread(partial(shutil.rmtree, directory, ignore_errors=True))


async def fresh_parts(directory: Path) -> None:
    """Make it, with nothing in it."""
    await forget_parts(directory)
    await done_in_thread(partial(directory.mkdir, mode=0o700))


# ------------------------------------------------------------------------ export


@register
class ExportHandler(Handler[ExportMachine]):
    """Writes a machine at rest to an archive."""

    kind = "machine.export"
    seconds = 6 * 3600.0

    async def prepare(self, request: ExportMachine) -> ExportMachine:
        """Have it known what the machine does."""
        await look(self.manager, request.machine)
        return request

    def check(self, session: Session, request: ExportMachine) -> Target:
        """Refuse a machine that is not at rest, and a file that is there."""
        row = find_machine(session, request.machine)
        refuse_unless(self.manager, row, "export", _REST)
        path = export_path(self.manager.settings, request.path)
        if is_lent(request.path):
            expected = 'another name: those that begin with "import-" are of files that are lent'
            raise InvalidSpec([SpecProblem("path", request.path, expected)], what=self.kind)
        if path.exists():
            raise Conflict(
                f"there is a file {request.path!r} among the exports already",
                hint=f"choose another name, or remove {path}",
            )
        return Target(row.id, row.name, frozenset({key("machine", row.id)}), row.version)

    def plan(self, session: Session, request: ExportMachine) -> Sequence[PlannedStep]:
        """Pack, keep."""
        row = find_machine(session, request.machine)
        return [
            PlannedStep("pack", f"read the disks of machine {row.name!r}, and write an archive"),
            PlannedStep("keep", f"call it {request.path!r}"),
        ]

    async def run(self, work: Work[ExportMachine]) -> dict[str, Any]:
        """Write it under another name first; a file of its name is whole."""
        settings = self.manager.settings
        target = export_path(settings, work.request.path)
        directory = parts_directory(settings, work.operation_id)
        archive = directory / "archive"
        async with work.step("pack", "read its disks, and write an archive") as packing:
            work.on_undo(packing, lambda: forget_parts(directory))
            if not packing.done_before:
                try:
                    await fresh_parts(directory)
                    await self._pack(work, directory, archive, packing)
                except OSError as error:
                    raise file_error(error, Path(error.filename or target)) from error
        async with work.step("keep", f"call it {work.request.path!r}") as step:
            if not step.done_before:
                await done_in_thread(keep_archive, archive, target)
        await forget_parts(directory)
        return {"path": str(target), "machine": work.target_id, **packing.data}

    async def _pack(
        self, work: Work[ExportMachine], directory: Path, archive: Path, step: Step
    ) -> None:
        machine = await self.manager.machine(work.target_id)
        state = (await machine.status()).state
        if state not in _REST:
            raise OperationFailed(
                f"the machine is {state.value}, and only one at rest is exported",
                hint="stop it first",
                machine=machine.name,
            )
        told = await work.database.read(_described, machine.spec, work.target_id)
        disks, members = await self._disks(work, machine, told.stored, directory)
        files = []
        for purpose in ("kernel", "initrd", "firmware"):
            source = getattr(machine.spec.boot, purpose)
            if source is not None:
                size, digest = await in_thread(partial(machine_archive.hash_file, source))
                member = f"boot/{purpose}"
                files.append(FileMember(field=purpose, member=member, size=size, sha256=digest))
                members[member] = source
        manifest = told.manifest.model_copy(update={"disks": tuple(disks), "files": tuple(files)})
        digest = await in_thread(
            lambda check: machine_archive.write_archive(archive, manifest, members, check)
        )
        step.data |= {
            "sha256": digest,
            "size": (await done_in_thread(archive.stat)).st_size,
            "left_out": told.left_out,
        }

    async def _disks(
        self,
        work: Work[ExportMachine],
        machine: Machine,
        stored: dict[str, dict[str, Any]],
        directory: Path,
    ) -> tuple[list[DiskMember], dict[str, Path]]:
        """Compress each disk; the description of each, and the file of each member."""
        found, members = list[DiskMember](), dict[str, Path]()
        # What cloud-init is told is made anew for each machine.
        there = [disk for disk in (await machine.info()).disks if disk.name != SEED_DISK]
        for number, disk in enumerate(there):
            await work.progress(number / max(len(there), 1), f"disk {disk.name}")
            if disk.path is None:
                raise OperationFailed(
                    f"the hypervisor {machine.hypervisor.name!r} keeps the contents of disk "
                    f"{disk.name!r} to itself",
                    hint="machines whose disks are files can be exported, and disks of the store",
                    machine=machine.name,
                )
            path, form = disk.path, await _format_of(machine.spec.disk(disk.name), disk.path)
            packed = directory / f"{number}.gz"
            compress = partial(machine_archive.compress_disk, path, form, packed)
            size, digest = await in_thread(compress)
            specified = machine.spec.disk(disk.name)
            member = f"disks/{number}.gz"
            told = stored.get(disk.name, {"name": disk.name, "own": True})
            found.append(
                DiskMember(
                    size=size,
                    bus=specified.bus if specified is not None else "virtio",
                    readonly=disk.readonly,
                    member=member,
                    packed=(await done_in_thread(packed.stat)).st_size,
                    sha256=digest,
                    **told,
                )
            )
            members[member] = packed
        return found, members


def keep_archive(archive: Path, target: Path) -> None:
    """Give a whole archive its name; again does nothing.

    Raises:
        Conflict: something else has that name.
    """
    try:
        target.hardlink_to(archive)
    except FileExistsError:
        if not (archive.exists() and target.samefile(archive)):
            raise Conflict(
                f"there is a file {target.name!r} among the exports now",
                hint="choose another name",
            ) from None
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


async def _format_of(disk: Disk | None, path: Path) -> str:
    """The format of a disk's image: what was said of a file that its guest may write to."""
    if disk is not None and disk.file is not None and disk.format is not None:
        return disk.format
    return await done_in_thread(image_format, path)


class _Described:
    """What the store says of a machine that is to be written down."""

    def __init__(
        self, manifest: Manifest, stored: dict[str, dict[str, Any]], left_out: list[str]
    ) -> None:
        self.manifest = manifest
        self.stored = stored
        self.left_out = left_out


def _described(session: Session, spec: MachineSpec, machine_id: str) -> _Described:
    row = session.get_one(MachineRow, machine_id)
    data = json_of(spec)
    boot = {name: value for name, value in data.get("boot", {}).items() if name == "cmdline"}
    gone = {"name", "disks", "nics", "boot", *LEFT_OUT}
    kept = {name: value for name, value in data.items() if name not in gone}
    kept |= {"architecture": spec.architecture.value, "boot": boot}
    nics = [
        NicPart(name=nic.name, network=nic.network.name if nic.network else nic.mode)
        for nic in row.nics
    ]
    disks = session.scalars(select(DiskRow).where(DiskRow.machine_id == machine_id))
    stored = {
        str(disk.device): {
            "name": disk.name,
            "own": False,
            "format": disk.format,
            "mount_point": disk.mount_point,
        }
        for disk in disks
    }
    manifest = Manifest(
        name=row.name,
        hypervisor=row.hypervisor,
        image=row.image,
        spec=kept,
        labels=dict(row.labels),
        metadata=Metadata.model_validate(row.metadata_),
        nics=tuple(nics),
    )
    return _Described(manifest, stored, [name for name in LEFT_OUT if data.get(name)])
