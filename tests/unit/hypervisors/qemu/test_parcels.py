"""A snapshot travels as one file: what comes out is what went in; nothing else is taken for one."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from vmlab.hypervisors.base import Snapshot
from vmlab.hypervisors.qemu import parcels, snapshots
from vmlab.hypervisors.qemu.layout import Layout
from vmlab.machine.errors import CorruptSnapshot
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState


def nothing() -> None:
    """Nobody stops it."""


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A snapshot's directory, with memory that has holes."""
    directory = tmp_path / "s"
    directory.mkdir()
    with (directory / "memory-0").open("xb") as file:
        file.seek(3 << 20)
        file.write(b"something")
        file.truncate(8 << 20)
    (directory / "vmstate").write_bytes(b"state")
    described(directory)
    return directory


def described(directory: Path) -> Snapshot:
    return snapshots.describe(
        directory,
        name="s",
        machine="m-1",
        spec=MachineSpec.of(name="vm"),
        state=MachineState.RUNNING,
        memory=True,
        time=1.0,
        layout=Layout(),
        disks=(),
        whole=False,
        check=nothing,
    )


def test_what_comes_out_is_what_went_in(snapshot: Path, tmp_path: Path) -> None:
    parcel = tmp_path / "p.tar.gz"
    size = parcels.pack(snapshot, parcel, nothing)
    assert size == parcel.stat().st_size < 1 << 20
    place = tmp_path / "a" / "b"
    found = parcels.unpack(parcel, place, nothing)
    packed = snapshots.load(snapshot).snapshot
    assert (found.digest, found.spec, found.state) == (packed.digest, packed.spec, packed.state)
    for path in snapshot.iterdir():
        assert (place / path.name).read_bytes() == path.read_bytes()
    # The holes are holes again.
    assert (place / "memory-0").stat().st_blocks * 512 < 4 << 20
    snapshots.load(place).verify(nothing)


def test_a_parcel_that_is_there_is_not_written_over(snapshot: Path, tmp_path: Path) -> None:
    parcel = tmp_path / "p"
    parcel.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        parcels.pack(snapshot, parcel, nothing)
    assert parcel.read_bytes() == b"mine"


def test_packing_that_is_stopped_leaves_nothing(snapshot: Path, tmp_path: Path) -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        parcels.pack(snapshot, tmp_path / "p", stop)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("cut", [0, 1, 100, 2000])
def test_what_was_cut_off_is_told(snapshot: Path, tmp_path: Path, cut: int) -> None:
    parcel = tmp_path / "p"
    parcels.pack(snapshot, parcel, nothing)
    parcel.write_bytes(parcel.read_bytes()[:cut])
    with pytest.raises(CorruptSnapshot, match="no snapshot that can be unpacked") as caught:
        parcels.unpack(parcel, tmp_path / "place", nothing)
    assert caught.value.hint


def test_what_was_changed_on_the_way_is_told(snapshot: Path, tmp_path: Path) -> None:
    parcel = tmp_path / "p"
    parcels.pack(snapshot, parcel, nothing)
    data = bytearray(parcel.read_bytes())
    data[30:60] = bytes(30)
    parcel.write_bytes(data)
    with pytest.raises(CorruptSnapshot):
        parcels.unpack(parcel, tmp_path / "place", nothing)


def tar(path: Path, *names: str, kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.type = kind
            archive.addfile(member, io.BytesIO())
    return path


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", ".hidden"])
def test_a_parcel_that_would_write_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorruptSnapshot, match="is no file of a snapshot"):
        parcels.unpack(tar(tmp_path / "p", name), tmp_path / "place", nothing)
    assert list((tmp_path / "place").iterdir()) == []


def test_links_and_too_many_files_are_refused(tmp_path: Path) -> None:
    links = tar(tmp_path / "links", "link", kind=tarfile.SYMTYPE)
    with pytest.raises(CorruptSnapshot, match="is no file"):
        parcels.unpack(links, tmp_path / "a", nothing)
    many = tar(tmp_path / "many", *(f"f{number}" for number in range(300)))
    with pytest.raises(CorruptSnapshot, match="more than 256 files"):
        parcels.unpack(many, tmp_path / "b", nothing)
