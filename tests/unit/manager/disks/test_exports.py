"""Machines written to archives and made of them again; archives that lie are refused."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tests.unit.manager.disks.conftest import simulated_hosts, told

from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.sizes import MIB
from vmlab.manager import machine_archive
from vmlab.manager.lending import passing_name
from vmlab.manager.operator.exports import export_path, exports_directory, parts_directory
from vmlab.manager.requests import (
    AttachDisk,
    CreateDisk,
    DeleteMachine,
    ExportMachine,
    ImportMachine,
    StartMachine,
    StopMachine,
)
from vmlab.manager.settings import Limits, Settings
from vmlab.manager.store import queries
from vmlab.manager.store.tables import new_id

Tell = Callable[..., None]

SPEC = {
    "memory": "64M",
    "cpus": 2,
    "boot": {"cmdline": "quiet"},
    "labels": {"vmlab.channels": "agent"},
    "nics": [{"name": "net0", "network": "user"}],
}


def left(asking: Any) -> list[str]:
    """What is among the exports and disks."""
    directory = asking.manager.settings.directory
    found = [*directory.glob("exports/*"), *directory.glob("disks/*"), *directory.glob("boot/*")]
    return sorted(path.name for path in found)


async def exported(asking: Any, name: str = "one") -> Path:
    """A machine with a disk of the store that has something in it, as an archive."""
    await asking.create(name, spec=SPEC, labels={"kind": "web"})
    await asking.do(CreateDisk(name="data", size=2 * MIB, mount_point="/srv"))
    await asking.do(AttachDisk(disk="data", machine=name, bus="scsi"))
    await asking.do(StartMachine(machine=name))
    disk = await asking.disk("data")
    (await asking.guest(name)).write_disk(disk.device, MIB, b"contents")
    error = await asking.refuse(ExportMachine(machine=name, path="one.tar"))
    assert "running" in error.message
    await asking.do(StopMachine(machine=name))
    result = await asking.do(ExportMachine(machine=name, path="one.tar"))
    path = Path(result["path"])
    content = await done_in_thread(path.read_bytes)
    assert result["sha256"] == hashlib.sha256(content).hexdigest()
    assert result["size"] == len(content) < MIB
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The archive of such a machine."""
    settings = simulated_hosts(tmp_path_factory.mktemp("exported"))
    kept: list[bytes] = []

    async def story(asking: Any) -> None:
        kept.append((await exported(asking)).read_bytes())

    told(story, settings)
    return kept[0]


def placed(asking: Any, content: bytes) -> Path:
    """The archive, among the exports of a manager that knows nothing of it."""
    path = export_path(asking.manager.settings, "one.tar")
    path.write_bytes(content)
    return path


def test_machine_and_its_disks_come_back_from_an_archive(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await exported(asking)
        operation = await asking.ask(ImportMachine(path="one.tar", name="two"), dry_run=True)
        assert [step.name for step in operation.steps] == ["unpack", "disks", "define"]
        await asking.do(ImportMachine(path="one.tar", name="two"))
        one, two = await asking.machine("one"), await asking.machine("two")
        assert two.id != one.id and two.nics[0].mac != one.nics[0].mac
        assert (two.vcpus, two.memory, two.labels) == (2, 64 * MIB, {"kind": "web"})
        assert two.spec["boot"] == {"cmdline": "quiet"}
        (disk,) = two.disks
        assert disk.name.startswith("data-")
        kept = await asking.disk(disk.name)
        assert (kept.state, kept.mount_point, kept.size) == ("attached", "/srv", 2 * MIB)
        await asking.do(StartMachine(machine="two"))
        hardware = await asking.guest("two")
        assert hardware.read_disk(disk.device, MIB, 8) == b"contents"
        assert hardware.disks[disk.device].bus == "scsi"
        # Neither is the other's.
        hardware.write_disk(disk.device, MIB, b"changed!")
        await asking.do(StartMachine(machine="one"))
        first = await asking.disk("data")
        assert (await asking.guest("one")).read_disk(first.device, MIB, 8) == b"contents"
        await asking.do(DeleteMachine(machine="two", force=True))
        assert "one.tar" in left(asking)

    tell(story)


def test_what_was_left_by_commands_and_uploads_that_were_killed_goes(tmp_path: Path) -> None:
    settings = simulated_hosts(tmp_path)
    directory = exports_directory(settings)
    (directory / passing_name()).write_bytes(b"archive")
    (directory / "one.tar").write_bytes(b"archive")
    for path in directory.iterdir():
        os.utime(path, (0, 0))
    upload = parts_directory(settings, new_id())
    upload.mkdir()
    (upload / "file").write_bytes(b"half of an archi")

    async def story(asking: Any) -> None:
        assert [path.name for path in directory.iterdir()] == ["one.tar"]

    told(story, settings)


def test_archive_is_never_overwritten(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        path = await exported(asking)
        before = path.read_bytes()
        error = await asking.refuse(ExportMachine(machine="one", path="one.tar"))
        assert "there is a file 'one.tar'" in error.message
        operation = await asking.ask(ExportMachine(machine="one", path="b.tar"), dry_run=True)
        assert [step.name for step in operation.steps] == ["pack", "keep"]
        assert path.read_bytes() == before

    tell(story)


def test_an_export_for_which_there_is_no_room_leaves_nothing(
    tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(machine_archive, "write_archive", full)

    async def story(asking: Any) -> None:
        await asking.create("one", spec=SPEC)
        said = await asking.fail(ExportMachine(machine="one", path="one.tar"))
        assert "there is no room for one.tar" in said
        directory = exports_directory(asking.manager.settings)
        assert list(directory.iterdir()) == []

    tell(story)


def test_machine_whose_disks_no_file_holds_is_not_exported(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        said = await asking.fail(ExportMachine(machine="one", path="one.tar"))
        assert "keeps the contents of disk 'root' to itself" in said
        assert left(asking) == []
        assert not list(asking.manager.settings.directory.glob("exports/.*"))

    tell(story)


@pytest.mark.parametrize("name", ["../one.tar", "/tmp/one.tar", ".hidden", "", "a/b", "x\0"])
def test_archives_have_names_and_no_paths(name: str, settings: Any) -> None:
    with pytest.raises(ValidationError):
        ExportMachine(machine="one", path=name)
    with pytest.raises(ValidationError):
        ImportMachine(path=name)
    with pytest.raises(ValueError, match="no name of a file"):
        export_path(settings, name)


def rewritten(
    path: Path,
    *,
    manifest: Callable[[dict[str, Any]], None] = lambda manifest: None,
    members: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None] = lambda members: None,
) -> None:
    """Change an archive."""
    found: list[tuple[tarfile.TarInfo, bytes]] = []
    with tarfile.open(path) as archive:
        for entry in archive:
            file = archive.extractfile(entry)
            found.append((entry, file.read() if file is not None else b""))
    described = json.loads(found[0][1])
    manifest(described)
    found[0] = (found[0][0], json.dumps(described).encode())
    members(found)
    with tarfile.open(path, "w") as archive:
        for entry, content in found:
            entry.size = len(content) if entry.isreg() else 0
            archive.addfile(entry, io.BytesIO(content))


def packed(content: bytes) -> bytes:
    return gzip.compress(content)


def _set(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.update(fields)


def _disk(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["disks"][0].update(fields)


def _spec(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["spec"].update(fields)


LIES: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_set(format="vmlab-machine/2"), "format"),
    (_set(name="../x"), "name"),
    (_set(more=1), "more"),
    (_disk(member="../../etc/passwd"), "member"),
    (_disk(member="/etc/passwd"), "member"),
    (_disk(member="disks/0.gz/../../x"), "member"),
    (_disk(name="a/b"), "name"),
    (_disk(size=-512), "size"),
    (_disk(size=1000), "size"),
    (_disk(size=1 << 60), "size"),
    (_disk(format="vmdk"), "format"),
    (lambda manifest: manifest["disks"].append(manifest["disks"][0]), "one member"),
    (
        lambda manifest: manifest["disks"].append({**manifest["disks"][0], "member": "disks/1.gz"}),
        "one name",
    ),
    (_spec(disks=[{"name": "x", "file": "/etc/shadow", "format": "raw"}]), "disks"),
    (_spec(shares=[{"tag": "a", "source": "/", "target": "/x"}]), "shares"),
    (_spec(host_devices=[]), "host_devices"),
    (_spec(boot={"kernel": "/etc/shadow"}), "boot"),
    (_spec(boot=["x"]), "boot"),
    (_spec(memory="none"), "memory"),
    (_spec(surprise=True), "surprise"),
]


def test_description_that_lies_is_refused_at_once(tell: Tell, archive: bytes) -> None:
    async def story(asking: Any) -> None:
        for change, said in LIES:
            path = placed(asking, archive)
            rewritten(path, manifest=change)
            error = await asking.refuse(ImportMachine(path="one.tar", name="two"))
            assert said in error.message
            assert left(asking) == ["one.tar"]

    tell(story)


def _swap(content: bytes) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[1] = (members[1][0], content)

    return change


def _link(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    link = tarfile.TarInfo("disks/0.gz")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members[1] = (link, b"")


def _more(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members.append((tarfile.TarInfo("disks/9.gz"), b"more"))


def _climbing(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members.append((tarfile.TarInfo("../../../etc/cron.d/x"), b"more"))


def _twice(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members.append((tarfile.TarInfo("disks/0.gz"), members[1][1]))


WHOLE = bytearray(2 * MIB)
WHOLE[MIB : MIB + 8] = b"contents"
OTHER = packed(bytes(2 * MIB))
BOMB = packed(bytes(64 * MIB))
SHORT = packed(bytes(MIB))


DAMAGES: list[tuple[Callable[[Any], None], Callable[[Any], object], str]] = [
    (_disk(packed=len(OTHER)), _swap(OTHER), "its digest differs"),
    (_disk(packed=len(BOMB)), _swap(BOMB), "unpacks to more than"),
    (_disk(packed=len(SHORT)), _swap(SHORT), "has 1048576 bytes, not 2097152"),
    (_disk(packed=7), _swap(b"no gzip"), "disks/0.gz"),
    (_disk(), _swap(packed(bytes(WHOLE)) + b"x"), "bytes, not"),
    (_disk(), _link, "not in its description"),
    (_disk(), _more, "'disks/9.gz' is not in its description"),
    (_disk(), _climbing, "unsafe path"),
    (_disk(), _twice, "'disks/0.gz' is not in its description"),
    (_disk(), lambda members: members.pop(), "disks/0.gz is missing"),
]


def test_archive_that_is_not_what_it_says_leaves_nothing(tell: Tell, archive: bytes) -> None:
    async def story(asking: Any) -> None:
        for manifest, members, said in DAMAGES:
            path = placed(asking, archive)
            rewritten(path, manifest=manifest, members=members)
            assert said in await asking.fail(ImportMachine(path="one.tar", name="two"))
            assert left(asking) == ["one.tar"]
            assert await (await asking.manager.hosts.get("simulated")).list() == []
        error = await asking.refuse(StartMachine(machine="two"))
        assert "there is no machine 'two'" in error.message

    tell(story)


def test_file_that_is_no_archive_is_refused(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        for content in (b"", b"no archive", bytes(10240)):
            placed(asking, content)
            error = await asking.refuse(ImportMachine(path="one.tar"))
            assert "no machine that was exported by vmlab" in error.message
        error = await asking.refuse(ImportMachine(path="nosuch.tar"))
        assert "cannot be read" in error.message

    tell(story)


def test_archive_that_is_cut_short_leaves_nothing(tell: Tell, archive: bytes) -> None:
    async def story(asking: Any) -> None:
        path = placed(asking, archive)
        # Tar pads with blocks of zeros: cut within the disk.
        with tarfile.open(path) as opened:
            last = opened.getmembers()[-1]
        content = path.read_bytes()
        path.write_bytes(content[: last.offset_data + last.size // 2])
        before = left(asking)
        said = await asking.fail(ImportMachine(path="one.tar", name="two"))
        assert "no machine that was exported by vmlab" in said
        assert left(asking) == before

    tell(story)


def test_archive_that_changes_between_asking_and_doing_is_refused(
    tell: Tell, archive: bytes
) -> None:
    async def story(asking: Any) -> None:
        path = placed(asking, archive)
        operator = asking.manager.operator
        handler = operator._handlers["machine.import"]
        prepare = handler.prepare

        async def prepared(request: Any) -> Any:
            found = await prepare(request)
            rewritten(path, manifest=_spec(memory=128 * MIB))
            return found

        handler.prepare = prepared
        said = await asking.fail(ImportMachine(path="one.tar", name="two"))
        assert "another one than when its import was asked for" in said

    tell(story)


def test_import_needs_room_for_its_disks(tell: Tell, archive: bytes) -> None:
    async def story(asking: Any) -> None:
        placed(asking, archive)
        error = await asking.refuse(ImportMachine(path="one.tar"))
        assert "no room" in error.message

    tell(story, limits=Limits(disk=MIB))


def test_name_that_is_taken_is_refused(tell: Tell, archive: bytes) -> None:
    async def story(asking: Any) -> None:
        placed(asking, archive)
        await asking.create("one")
        error = await asking.refuse(ImportMachine(path="one.tar"))
        assert "names are unique" in error.message

    tell(story)


def test_what_was_left_among_the_exports_is_gone_when_the_next_manager_begins(
    settings: Settings, tell: Tell
) -> None:
    async def first(asking: Any) -> None:
        await exported(asking)

    tell(first)
    exports = settings.directory / "exports"
    (exports / "import-0123456789abcdef").write_bytes(b"of a command that was killed")
    part = parts_directory(settings, "0" * 32)
    part.mkdir()
    (part / "archive").write_bytes(b"of an operation that is no more")

    async def second(asking: Any) -> None:
        assert [path.name for path in exports.iterdir()] == ["one.tar"]
        await asking.do(ImportMachine(path="one.tar", name="again"))
        reserved = ExportMachine(machine="again", path="import-0123456789abcdef")
        assert "another name" in (await asking.refuse(reserved)).message

    tell(second)


def test_what_an_import_has_yet_to_read_is_still_there_for_the_next_manager(
    settings: Settings, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent = "import-0123456789abcdef"

    async def first(asking: Any) -> None:
        (await exported(asking)).rename(settings.directory / "exports" / lent)
        # It is closed before a worker has begun.
        monkeypatch.setattr(asking.manager.operator, "_pump", lambda: None)
        await asking.manager.operator.submit(ImportMachine(path=lent, name="again"))

    tell(first)

    async def second(asking: Any) -> None:
        (operation,) = (
            await asking.manager.database.read(queries.list_operations, kind="machine.import")
        ).items
        ended = await asking.manager.operator.wait(operation.id, 120)
        assert ended.state == "succeeded", ended.error

    tell(second)
    tell(_nothing_lent)


async def _nothing_lent(asking: Any) -> None:
    exports = asking.manager.settings.directory / "exports"
    assert list(exports.iterdir()) == []
