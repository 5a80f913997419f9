"""The files of disks: nothing is made, changed or removed but what an id of the store's names."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from vmlab.machine.errors import OperationFailed, ResourceExhausted, ResourceNotFound
from vmlab.manager import storage as module
from vmlab.manager.storage import BootFiles, Storage

T = TypeVar("T")
MIB = 1 << 20
ID = "105055d5e43945a8a0e2e9236975cb05"
needs_qemu_img = pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="needs qemu-img (Debian package qemu-utils)"
)
HOSTILE = ["", "../x", "/etc/passwd", "a" * 31, "A" * 32, "g" * 32, ID + "\n", f"{ID}/..", "." * 32]


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    made = Storage(tmp_path / "disks")
    run(made.start())
    return made


def names(storage: Storage) -> list[str]:
    return sorted(path.name for path in storage.directory.iterdir())


@pytest.mark.parametrize("id_", HOSTILE)
def test_path_is_made_of_an_id_and_nothing_else(storage: Storage, id_: str) -> None:
    for work in (
        lambda: storage.create(id_, "raw", MIB),
        lambda: storage.remove(id_, "raw"),
        lambda: storage.resize(id_, "raw", MIB),
        lambda: storage.size(id_, "raw"),
        lambda: storage.copy(storage.directory, "raw", id_, "raw"),
    ):
        with pytest.raises(ValueError, match="no id of a disk"):
            run(work())
    with pytest.raises(ValueError, match="no id of a machine"):
        BootFiles(storage.directory).path(id_, "kernel")
    assert names(storage) == []


@pytest.mark.parametrize("form", ["", "vmdk", "../raw", "raw.part"])
def test_format_is_one_of_two(storage: Storage, form: str) -> None:
    with pytest.raises(ValueError, match="no format of a disk"):
        storage.path(ID, form)


def test_raw_disk_is_sparse_and_its_users_alone(storage: Storage) -> None:
    path = run(storage.create(ID, "raw", 1 << 40))
    told = path.stat()
    assert (told.st_size, told.st_blocks) == (1 << 40, 0)
    assert told.st_mode & 0o777 == 0o600
    assert storage.directory.stat().st_mode & 0o777 == 0o700
    assert run(storage.size(ID, "raw")) == 1 << 40
    usage = run(storage.usage())
    assert (usage.allocated, [file.disk for file in usage.files]) == (0, [ID])


def test_what_was_made_already_stays_as_it_is(storage: Storage) -> None:
    path = run(storage.create(ID, "raw", MIB))
    path.write_bytes(b"contents".ljust(MIB, b"\0"))
    run(storage.create(ID, "raw", MIB))
    assert path.read_bytes()[:8] == b"contents"


def test_what_was_half_made_is_made_anew(storage: Storage) -> None:
    part = storage.directory / f"{ID}.raw.part"
    part.write_bytes(b"half")
    assert [file.part for file in run(storage.usage()).files] == [True]
    path = run(storage.create(ID, "raw", MIB))
    assert path.read_bytes() == bytes(MIB)
    assert names(storage) == [f"{ID}.raw"]
    part.touch()
    run(storage.remove(ID, "raw"))
    run(storage.remove(ID, "raw"))
    assert names(storage) == []


def test_copy_has_the_contents_and_the_holes(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source.img"
    with source.open("wb") as file:
        file.seek(64 * MIB)
        file.write(b"end")
        file.truncate(128 * MIB)
    path = run(storage.copy(source, "raw", ID, "raw"))
    assert path.stat().st_blocks <= source.stat().st_blocks
    with path.open("rb") as file:
        file.seek(64 * MIB)
        assert file.read(4) == b"end\0"
    with pytest.raises(ResourceNotFound, match="is gone"):
        run(storage.copy(tmp_path / "nosuch", "raw", uuid.uuid4().hex, "raw"))
    assert names(storage) == [f"{ID}.raw"]


@needs_qemu_img
def test_qcow2_is_made_copied_and_grown(storage: Storage) -> None:
    storage.check_format("qcow2")
    path = run(storage.create(ID, "qcow2", MIB))
    assert path.read_bytes()[:4] == b"QFI\xfb"
    run(storage.resize(ID, "qcow2", 2 * MIB))
    assert run(storage.size(ID, "qcow2")) == 2 * MIB
    other = uuid.uuid4().hex
    copied = run(storage.copy(path, "qcow2", other, "raw"))
    assert copied.stat().st_size == 2 * MIB
    with pytest.raises(OperationFailed, match="cannot be"):
        run(storage.resize(ID, "qcow2", MIB))
    path.write_bytes(b"no image")
    with pytest.raises(OperationFailed, match="qemu-img"):
        run(storage.size(ID, "qcow2"))
    with pytest.raises(OperationFailed, match="qemu-img"):
        run(storage.copy(path, "qcow2", uuid.uuid4().hex, "raw"))
    assert names(storage) == sorted([f"{ID}.qcow2", f"{other}.raw"])


def test_disk_grows_and_never_shrinks(storage: Storage) -> None:
    path = run(storage.create(ID, "raw", MIB))
    for _ in range(2):
        run(storage.resize(ID, "raw", 2 * MIB))
    assert path.stat().st_size == 2 * MIB
    with pytest.raises(OperationFailed, match="cannot be 1M"):
        run(storage.resize(ID, "raw", MIB))
    path.unlink()
    with pytest.raises(ResourceNotFound, match="is gone"):
        run(storage.resize(ID, "raw", 4 * MIB))


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, ResourceExhausted), (errno.EACCES, OperationFailed)]
)
def test_what_the_file_system_refuses_is_told(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    path = run(storage.create(ID, "raw", MIB))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), "x")

    monkeypatch.setattr(module, "_make_holes", refuse)
    with pytest.raises(kind):
        run(storage.create(uuid.uuid4().hex, "raw", MIB))
    monkeypatch.setattr(module.os, "truncate", refuse)
    with pytest.raises(kind):
        run(storage.resize(ID, "raw", 2 * MIB))
    monkeypatch.setattr(module.Path, "unlink", refuse)
    with pytest.raises(kind):
        run(storage.remove(ID, "raw"))
    monkeypatch.undo()
    assert names(storage) == [path.name]


def test_files_of_other_names_are_told_and_left_alone(storage: Storage) -> None:
    for name in ("notes.txt", "x" * 32 + ".raw", f"{ID}.raw.old"):
        (storage.directory / name).write_text("theirs")
    run(storage.create(ID, "raw", MIB))
    run(storage.remove(ID, "raw"))
    usage = run(storage.usage())
    assert {file.disk for file in usage.files} == {None}
    assert len(usage.files) == 3
    assert 0 < usage.free <= usage.total


def test_boot_files_are_kept_for_a_machine_and_go_with_it(tmp_path: Path) -> None:
    files, other = BootFiles(tmp_path / "boot"), uuid.uuid4().hex
    source = tmp_path / "vmlinuz"
    source.write_bytes(b"kernel")
    for machine in (ID, other):
        for _ in range(2):
            kept = run(files.keep(machine, "kernel", source))
        assert kept.read_bytes() == b"kernel"
    run(files.remove(ID))
    run(files.remove(ID))
    assert [path.name for path in files.directory.iterdir()] == [other]
    with pytest.raises(OperationFailed, match="No such file"):
        run(files.keep(ID, "initrd", tmp_path / "nosuch"))


def test_boot_files_that_cannot_be_removed_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module.shutil, "rmtree", refuse)
    with pytest.raises(OperationFailed, match="Permission denied"):
        run(BootFiles(tmp_path).remove(ID))
