"""Disks that are files of somebody else's: what is refused, and what is kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors.embedded.images import EngineImages
from vmlab.hypervisors.monitored.disks import DiskFile, make_disk
from vmlab.machine.errors import InvalidSpec, OperationFailed
from vmlab.machine.spec import Disk, MachineSpec

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "data.img"
    path.write_bytes(bytes(MIB))
    return path


def made(disk: Disk, tmp_path: Path) -> DiskFile:
    return asyncio.run(make_disk(disk, tmp_path / "own.img", EngineImages(), "embedded"))


def test_file_is_the_disk_and_nothing_is_made(image: Path, tmp_path: Path) -> None:
    found = made(Disk(name="data", file=image, format="raw"), tmp_path)
    assert (found.path, found.size, found.made, found.readonly) == (image, MIB, False, False)
    assert not (tmp_path / "own.img").exists()


def test_raw_file_that_looks_like_another_format_stays_raw(image: Path, tmp_path: Path) -> None:
    # Its guest may have written that.
    with image.open("r+b") as file:
        file.write(b"QFI\xfb")
    assert made(Disk(name="data", file=image, format="raw"), tmp_path).format == "raw"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"file": "nosuch.img", "format": "raw"}, "an image that can be written to"),
        ({"file": "nosuch.img", "format": "raw", "readonly": True}, "an image that can be read"),
        ({"file": "data.img", "format": "qcow2"}, "no image in qcow2"),
        ({"file": "data.img", "format": "raw", "size": "2M"}, "the 1048576 that its file has"),
        ({"file": "odd.img", "format": "raw"}, "positive multiple of 512 bytes: it has 1000"),
        ({"file": "empty.img", "format": "raw"}, "it has 0"),
        ({"file": ".", "format": "raw"}, "an image that can be written to"),
    ],
)
def test_file_that_is_no_disk_is_refused(
    image: Path, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    (tmp_path / "odd.img").write_bytes(bytes(1000))
    (tmp_path / "empty.img").touch()
    disk = Disk(**{"name": "data", **fields, "file": tmp_path / fields["file"]})
    with pytest.raises(InvalidSpec, match=said):
        made(disk, tmp_path)


def test_image_that_is_damaged_is_no_disk(tmp_path: Path) -> None:
    path = tmp_path / "broken.qcow2"
    path.write_bytes(b"QFI\xfb" + bytes(508))
    with pytest.raises(OperationFailed):
        made(Disk(name="data", file=path, format="qcow2"), tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"file": "/a"}, "format"),
        ({"file": "/a", "format": "raw", "source": "/b"}, "nothing beside file"),
        ({"file": "/a", "format": "vmdk"}, "format"),
    ],
)
def test_specification_of_such_a_disk_says_all_of_it(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSpec, match=said):
        MachineSpec.of(name="a", disks=[{"name": "data", **fields}])


def test_one_file_is_one_disk() -> None:
    disk = {"file": "/a", "format": "raw"}
    with pytest.raises(InvalidSpec, match="file"):
        MachineSpec.of(name="a", disks=[{"name": "one", **disk}, {"name": "two", **disk}])


def test_only_what_is_written_to_is_in_place() -> None:
    assert Disk(name="a", file=Path("/a"), format="raw").in_place
    assert not Disk(name="a", file=Path("/a"), format="raw", readonly=True).in_place
    assert not Disk(name="a", size=512).in_place
