"""Machines of archives: unpacked, compared byte by byte with what is said of them, and made.

The disks that were the machine's own are the new machine's own; disks of the store become disks of
the store. Of an archive that is not what it says nothing is left.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.engine.devices.storage.overlay import open_disk
from vmlab.hypervisors.base import Machine
from vmlab.hypervisors.monitored.disks import image_format
from vmlab.hypervisors.threads import done_in_thread, in_thread
from vmlab.machine.errors import (
    CorruptSnapshot,
    HypervisorUnavailable,
    OperationFailed,
    VmlabError,
)
from vmlab.machine.fit import check_fit
from vmlab.machine.spec import Boot, Disk, MachineSpec, Nic
from vmlab.manager import machine_archive
from vmlab.manager.machine_archive import DiskMember, Manifest, NicPart
from vmlab.manager.operator.admission import Need, reserve
from vmlab.manager.operator.creation import undefine
from vmlab.manager.operator.definition import SIMULATED, json_of, new_mac, spec_of
from vmlab.manager.operator.disk_rows import all_attached, device_of, disk_part
from vmlab.manager.operator.exports import (
    LEFT_OUT,
    export_path,
    forget_parts,
    fresh_parts,
    parts_directory,
)
from vmlab.manager.operator.handler import (
    Handler,
    PlannedStep,
    Target,
    key,
    operation_of,
    register,
)
from vmlab.manager.operator.hosts import machine_name
from vmlab.manager.operator.journal import Step, Work
from vmlab.manager.operator.placement import defined, placed
from vmlab.manager.operator.wiring import ended, wired, write_spec
from vmlab.manager.requests import ImportMachine
from vmlab.manager.store.changes import add_event
from vmlab.manager.store.tables import DiskRow, HostRow, MachineRow, NetworkRow, NicRow, new_id

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["ImportHandler"]

_CHUNK: Final = 1 << 20


class PreparedImport(ImportMachine):
    """A request to import a machine, with what its archive says and the host that can take it."""

    host: str = ""
    manifest: Manifest | None = Field(None)


@register
class ImportHandler(Handler[ImportMachine]):
    """Makes a machine of an archive."""

    kind = "machine.import"
    seconds = 6 * 3600.0

    async def prepare(self, request: ImportMachine) -> ImportMachine:
        """Read the description, and find a host that can have such a machine."""
        path = export_path(self.manager.settings, request.path)
        manifest = await done_in_thread(machine_archive.read_manifest, path)
        spec = _specification(manifest, "import", None)
        host = await self._host_for(manifest, spec)
        fields = {**request.model_dump(), "name": request.name or manifest.name}
        return PreparedImport(**fields, host=host, manifest=manifest)

    async def _host_for(self, manifest: Manifest, spec: MachineSpec) -> str:
        """A host that can take the machine, of the hypervisor that it comes from if one can."""
        hosts = self.manager.hosts
        same = manifest.hypervisor
        fitting = [
            name
            for name in hosts.names
            if (hosts.setting(name).hypervisor == SIMULATED) is (same == SIMULATED)
        ]
        fitting.sort(key=lambda name: hosts.setting(name).hypervisor != same)
        refusal: VmlabError | None = None
        for name in fitting:
            try:
                check_fit(spec, await hosts.capabilities(name))
            except VmlabError as error:
                refusal = refusal or error
            else:
                return name
        raise refusal or HypervisorUnavailable(
            f"no host of this manager is of the hypervisor {same!r}, or of one like it",
            hint="`vmlab hypervisors` lists what works here",
        )

    def check(self, session: Session, request: ImportMachine) -> Target:
        """Refuse a name that is taken and what there is no room for; make the rows."""
        assert isinstance(request, PreparedImport), "`prepare` has made it one"
        manifest = request.manifest
        assert manifest is not None, "`prepare` has read it"
        machine_id = new_id()
        spec = _specification(manifest, machine_name(machine_id), None)
        stored = [disk for disk in manifest.disks if not disk.own]
        reserve(
            session,
            self.manager.settings,
            Need(machines=1, disk=sum(disk.size for disk in stored)),
            operation=operation_of(session),
            host=request.host,
            what=f"import {request.name!r}",
            keep=False,
        )
        for disk in stored:
            self.manager.storage.check_format(disk.format)
        row = MachineRow(
            id=machine_id,
            name=request.name,
            host=request.host,
            hypervisor=session.get_one(HostRow, request.host).hypervisor,
            image=manifest.image,
            architecture=spec.architecture.value,
            vcpus=spec.cpus.count,
            memory=spec.memory.size,
            spec=json_of(spec),
            labels=dict(manifest.labels),
            policy={},
            metadata_=manifest.metadata.model_dump(mode="json"),
        )
        session.add(row)
        session.flush()
        for position, nic in enumerate(manifest.nics):
            session.add(_nic_row(session, machine_id, position, nic))
        for disk in stored:
            session.add(_disk_row(session, machine_id, disk))
        session.flush()
        return Target(machine_id, row.name, frozenset({key("machine", machine_id)}))

    def plan(self, session: Session, request: ImportMachine) -> Sequence[PlannedStep]:
        """Unpack, define, enter."""
        return [
            PlannedStep("unpack", f"unpack {request.path!r}, and compare all of it"),
            PlannedStep("disks", "have its disks among those of the store"),
            PlannedStep("define", f"make machine {request.name!r}, and fill its own disks"),
        ]

    def withdrawn(self, session: Session, request: ImportMachine, target: str | None) -> None:
        """It never came about."""
        if target is not None:
            _forget(session, target)

    async def run(self, work: Work[ImportMachine]) -> dict[str, Any]:
        """Unpack, compare, make; nothing is left of one that fails."""
        settings, machine_id = self.manager.settings, work.target_id
        directory = parts_directory(settings, work.operation_id)
        path = export_path(settings, work.request.path)

        async def forget() -> None:
            await work.database.write(_forget, machine_id)
            await forget_parts(directory)

        async with work.step("unpack", f"unpack {path.name!r}, and compare all of it") as step:
            work.on_undo(step, forget)
            if not step.done_before:
                await fresh_parts(directory)
                await self._unpack(work, path, directory, step)
        data = step.data
        manifest = Manifest.model_validate(data["manifest"])
        files = {member: directory / str(name) for member, name in data["files"].items()}
        await self._store_disks(work, manifest, files)
        await self._define(work, manifest, files)
        async with work.step("keep", "enter it") as step:
            if not step.done_before:
                step.also(_entered, machine_id, work.operation_id)
        await forget_parts(directory)
        return {"machine": machine_id}

    async def _unpack(
        self, work: Work[ImportMachine], path: Path, directory: Path, step: Step
    ) -> None:
        manifest = await done_in_thread(machine_archive.read_manifest, path)
        expected = await work.database.read(
            lambda s: dict(s.get_one(MachineRow, work.target_id).spec)
        )
        if json_of(_specification(manifest, machine_name(work.target_id), None)) != expected:
            raise CorruptSnapshot(
                f"{path} is another one than when its import was asked for",
                hint="ask for it again",
                operation=self.kind,
            )
        contents = await in_thread(
            lambda check: machine_archive.unpack(path, directory, manifest, check)
        )
        step.data["manifest"] = manifest.model_dump(mode="json")
        step.data["files"] = {member: file.name for member, file in contents.files.items()}

    async def _store_disks(
        self, work: Work[ImportMachine], manifest: Manifest, files: dict[str, Path]
    ) -> None:
        storage = self.manager.storage
        stored = [
            (disk, _disk_id(work.target_id, disk.member)) for disk in manifest.disks if not disk.own
        ]

        async def undo() -> None:
            for disk, disk_id in stored:
                await storage.remove(disk_id, disk.format)

        async with work.step("disks", "have its disks among those of the store") as step:
            work.on_undo(step, undo)
            if not step.done_before:
                for disk, disk_id in stored:
                    await storage.copy(files[disk.member], "raw", disk_id, disk.format)

    async def _define(
        self, work: Work[ImportMachine], manifest: Manifest, files: dict[str, Path]
    ) -> None:
        machine_id, boot_files = work.target_id, self.manager.boot_files

        async def undo() -> None:
            await undefine(work, machine_id)
            await ended(self.manager, machine_id, deleted=True)
            await boot_files.remove(machine_id)

        async with work.step("define", "make it, and fill its own disks") as step:
            work.on_undo(step, undo)
            if step.done_before:
                return
            boot: dict[str, Path] = {
                part.field: await boot_files.keep(machine_id, part.field, files[part.member])
                for part in manifest.files
            }
            spec = await work.database.read(_whole, self.manager, machine_id, manifest, boot)
            spec = await wired(self.manager, machine_id, spec)
            machine = await work.database.read(placed, machine_id)
            async with self.manager.hosts.guarded(machine.host):
                hypervisor = await self.manager.hosts.get(machine.host)
                made = await defined(hypervisor, machine, spec)
            await self._fill(work, made, manifest, files)
            step.also(write_spec, machine_id, made.spec)

    async def _fill(
        self,
        work: Work[ImportMachine],
        machine: Machine,
        manifest: Manifest,
        files: dict[str, Path],
    ) -> None:
        """Write the contents of its own disks, which nobody uses yet."""
        own = [disk for disk in manifest.disks if disk.own]
        there = {disk.name: disk for disk in (await machine.info()).disks}
        for number, disk in enumerate(own):
            await work.progress(number / max(len(own), 1), f"disk {disk.name}")
            path = there[disk.name].path
            if path is None:
                raise OperationFailed(
                    f"the hypervisor {machine.hypervisor.name!r} keeps the contents of disk "
                    f"{disk.name!r} to itself",
                    hint="import it to a host whose machines have files as disks",
                    machine=machine.name,
                )
            await in_thread(partial(_filled, path, files[disk.member]))


def _filled(path: Path, source: Path, check: Callable[[], None]) -> None:
    """Write the parts of a raw image that are not zero into the disk in another image."""
    with closing(open_disk(path, image_format(path))) as disk:
        for offset, data in _parts(source):
            check()
            disk.write(offset, data)
        disk.flush()


def _parts(source: Path) -> Iterator[tuple[int, bytes]]:
    with source.open("rb") as file:
        size, offset = os.fstat(file.fileno()).st_size, 0
        while offset < size:
            try:
                offset = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:
                # ENXIO: there are only holes from here on.
                return
            end = min(size, os.lseek(file.fileno(), offset, os.SEEK_HOLE))
            while offset < end:
                data = os.pread(file.fileno(), min(_CHUNK, end - offset), offset)
                yield offset, data
                offset += len(data)


def _specification(manifest: Manifest, name: str, boot: dict[str, Path] | None) -> MachineSpec:
    """The machine of an archive, with its own disks empty.

    Args:
        manifest: The archive's description.
        name: What the machine is called at its hypervisor.
        boot: The files that it boots from; None where they are not there yet.

    Raises:
        InvalidSpec: it is no specification, or one that refers to a host's files.
    """
    spec = dict(manifest.spec)
    forbidden = sorted({"name", "disks", "nics", *LEFT_OUT} & spec.keys())
    given = spec.pop("boot", {})
    if forbidden or not isinstance(given, dict) or set(given) - {"cmdline"}:
        what = ", ".join(forbidden) or "boot"
        raise CorruptSnapshot(
            f"the archive's specification has {what}, which none that vmlab writes has",
            hint="nothing was made; export the machine anew",
            operation="machine.import",
        )
    parsed = spec_of({**spec, "name": name})
    disks = tuple(
        Disk(name=disk.name, size=disk.size, bus=disk.bus, readonly=disk.readonly)
        for disk in manifest.disks
        if disk.own
    )
    nics = tuple(
        Nic(name=nic.name, network=nic.network if nic.network in {"user", "none"} else "none")
        for nic in manifest.nics
    )
    return parsed.with_changes(
        boot=Boot(**given, **(boot or {})).model_dump(), disks=disks, nics=nics
    )


def _whole(
    session: Session,
    manager: Manager,
    machine_id: str,
    manifest: Manifest,
    boot: dict[str, Path],
) -> MachineSpec:
    """The machine with what it boots from, its MAC addresses and disks of the store."""
    row = session.get_one(MachineRow, machine_id)
    macs = {nic.name: nic.mac for nic in row.nics}
    spec = _specification(manifest, machine_name(machine_id), boot)
    nics = tuple(nic.model_copy(update={"mac": macs[nic.name]}) for nic in spec.nics)
    stored = [disk_part(manager.storage, disk) for disk in row.disks]
    return spec.with_changes(nics=nics, disks=[*spec.disks, *stored])


def _nic_row(session: Session, machine_id: str, position: int, nic: NicPart) -> NicRow:
    """A NIC on the network of that name, if this store has one; otherwise on none."""
    mode, network = "none", None
    if nic.network in {"user", "none"}:
        mode = nic.network
    else:
        network = session.scalar(select(NetworkRow.id).where(NetworkRow.name == nic.network))
        mode = "network" if network is not None else "none"
    return NicRow(
        machine_id=machine_id,
        position=position,
        name=nic.name,
        mode=mode,
        network_id=network,
        mac=new_mac(),
    )


def _disk_row(session: Session, machine_id: str, disk: DiskMember) -> DiskRow:
    """A disk of the store; another one of its name has it called otherwise."""
    name, disk_id = disk.name, _disk_id(machine_id, disk.member)
    if session.scalar(select(DiskRow.id).where(DiskRow.name == name)) is not None:
        name = f"{name[:56]}-{secrets.token_hex(3)}"
    return DiskRow(
        id=disk_id,
        name=name,
        size=disk.size,
        format=disk.format,
        state="attaching",
        machine_id=machine_id,
        device=device_of(disk_id),
        bus=disk.bus,
        readonly=disk.readonly,
        mount_point=disk.mount_point,
    )


def _disk_id(machine_id: str, member: str) -> str:
    """The id of a disk that is made of a member of an archive: the same one each time."""
    return hashlib.sha256(f"{machine_id}/{member}".encode()).hexdigest()[:32]


def _entered(session: Session, machine_id: str, operation: str) -> None:
    row = session.get_one(MachineRow, machine_id)
    add_event(
        session,
        "machine.created",
        subject=row.id,
        name=row.name,
        operation=operation,
        data={"host": row.host, "image": row.image},
    )
    all_attached(session, machine_id, operation)


def _forget(session: Session, machine_id: str) -> None:
    row = session.get(MachineRow, machine_id)
    if row is None:
        return
    for disk in list(row.disks):
        session.delete(disk)
    session.flush()
    session.expire(row, ["disks"])
    session.delete(row)
