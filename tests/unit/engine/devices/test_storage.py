"""Raw images and overlays; qemu-img is the judge of what overlays are."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from vmlab.engine.devices.storage.disk import Disk, RawDisk
from vmlab.engine.devices.storage.faulty import DiskFault, DiskMishap, FaultyDisk
from vmlab.engine.devices.storage.metered import DiskCounters, MeteredDisk
from vmlab.engine.devices.storage.overlay import Overlay, create_overlay, open_disk
from vmlab.machine.errors import VmlabError

CLUSTER = 65536
SIZE = 40 * CLUSTER + 1024


def qemu_img(*arguments: object) -> str:
    if shutil.which("qemu-img") is None:
        pytest.skip("needs Debian's qemu-utils")
    result = subprocess.run(
        ["qemu-img", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def overlay_of(base: Path, size: int = SIZE) -> Path:
    path = base.parent / "overlay.qcow2"
    create_overlay(path, Path(base.name), "raw", size)
    return path


class Shadow:
    """A disk and the bytes that it should hold; discarded clusters may hold anything."""

    def __init__(self, disk: Disk, content: bytes) -> None:
        self.disk = disk
        self.content = bytearray(content)

    def step(self, noise: random.Random) -> None:
        offset = 512 * noise.randrange(len(self.content) // 512)
        size = min(512 * noise.choice([1, 3, 8, 128, 300]), len(self.content) - offset)
        what = noise.randrange(6)
        if what <= 2:
            data = noise.randbytes(size)
            self.disk.write(offset, data)
            self.content[offset : offset + size] = data
        elif what == 3:
            self.disk.write_zeroes(offset, size, unmap=noise.random() < 0.5)
            self.content[offset : offset + size] = bytes(size)
        elif what == 4:
            self.disk.discard(offset, size)
            self.content[offset : offset + size] = self.disk.read(offset, size)
        assert self.disk.read(offset, size) == self.content[offset : offset + size]


@pytest.mark.parametrize("seed", range(4))
def test_an_overlay_reads_what_was_written_and_qemu_agrees(base: Path, seed: int) -> None:
    path = overlay_of(base)
    before = base.read_bytes()
    noise = random.Random(seed)
    content = bytearray(before)
    for _ in range(3):  # closed and opened again in between
        disk = Overlay(path)
        shadow = Shadow(disk, bytes(content))
        for _ in range(60):
            shadow.step(noise)
        content = shadow.content
        disk.flush()
        disk.close()
        assert "No errors" in qemu_img("check", path)
    assert base.read_bytes() == before, "the base is only read"
    flat = path.with_suffix(".flat")
    qemu_img("convert", "-O", "raw", path, flat)
    assert flat.read_bytes() == content


def test_qemus_overlay_is_read_and_written_here(base: Path) -> None:
    path = base.parent / "theirs.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path)
    disk = Overlay(path)
    shadow = Shadow(disk, base.read_bytes())
    noise = random.Random(9)
    for _ in range(40):
        shadow.step(noise)
    assert disk.read(0, SIZE) == shadow.content
    disk.close()
    assert "No errors" in qemu_img("check", path)


def test_qemu_knows_the_overlay_for_what_it_is(base: Path) -> None:
    path = overlay_of(base, SIZE + CLUSTER)
    info = json.loads(qemu_img("info", "--output=json", path))
    assert info["format"] == "qcow2"
    assert info["virtual-size"] == SIZE + CLUSTER
    assert info["backing-filename"] == base.name
    assert info["backing-filename-format"] == "raw"


def test_behind_the_end_of_its_base_an_overlay_has_zeros(base: Path) -> None:
    path = overlay_of(base, SIZE + 3 * CLUSTER)
    disk = Overlay(path)
    assert disk.read(SIZE - 512, 1024) == base.read_bytes()[-512:] + bytes(512)
    disk.write(SIZE + 512, b"x" * 512)
    assert disk.read(SIZE - 512, 1536) == base.read_bytes()[-512:] + bytes(512) + b"x" * 512
    disk.close()
    assert "No errors" in qemu_img("check", path)


def test_an_overlay_on_an_overlay(base: Path) -> None:
    lower = overlay_of(base)
    disk = Overlay(lower)
    disk.write(0, b"L" * 512)
    disk.write(CLUSTER, b"L" * 512)
    disk.close()
    upper = base.parent / "upper.qcow2"
    create_overlay(upper, lower, "qcow2", SIZE)
    disk = Overlay(upper)
    disk.write(0, b"U" * 512)
    assert disk.read(0, 1024) == b"U" * 512 + base.read_bytes()[512:1024]
    assert disk.read(CLUSTER, 512) == b"L" * 512
    disk.close()
    assert "No errors" in qemu_img("check", upper)


def test_a_discard_gives_the_space_back_and_uses_it_again(base: Path) -> None:
    path = overlay_of(base)
    disk = Overlay(path)
    disk.write(0, b"a" * 8 * CLUSTER)
    used = path.stat().st_blocks
    length = path.stat().st_size
    disk.discard(0, 8 * CLUSTER)
    assert disk.read(0, 8 * CLUSTER) == bytes(8 * CLUSTER)
    assert path.stat().st_blocks < used - 7 * CLUSTER // 512
    disk.write(8 * CLUSTER, b"b" * 8 * CLUSTER)
    assert path.stat().st_size == length, "the same clusters were taken again"
    disk.close()
    assert "No errors" in qemu_img("check", path)


def test_many_clusters_need_a_second_block_of_counts(tmp_path: Path) -> None:
    base = tmp_path / "small.img"
    base.write_bytes(bytes(1024))
    path = tmp_path / "big.qcow2"
    # Clusters of 512 bytes: a block counts 256 of them, so a few hundred writes go through many.
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "4M")
    disk = Overlay(path)
    for n in range(0, 3 << 20, 1536):
        disk.write(n, n.to_bytes(4, "big") * 128)
    assert all(disk.read(n, 4) == n.to_bytes(4, "big") for n in range(0, 3 << 20, 1536))
    disk.close()
    assert "No errors" in qemu_img("check", path)


def test_images_with_features_that_are_not_here_are_refused(base: Path) -> None:
    path = overlay_of(base)
    qemu_img("snapshot", "-c", "one", path)
    with pytest.raises(VmlabError, match="snapshots") as caught:
        Overlay(path)
    assert "qemu-img" in (caught.value.hint or "")


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_overlay_is_refused_or_fails_as_a_disk_does(base: Path, seed: int) -> None:
    path = overlay_of(base)
    disk = Overlay(path)
    disk.write(0, b"x" * CLUSTER)
    disk.close()
    noise = random.Random(seed)
    data = bytearray(path.read_bytes())
    for _ in range(6):
        data[noise.randrange(0, 112 if seed % 2 else len(data))] = noise.randrange(256)
    path.write_bytes(data)
    try:
        disk = Overlay(path)
    except VmlabError as error:
        assert error.hint
        return
    for offset in range(0, min(disk.size, SIZE) - 512, CLUSTER):
        try:
            assert len(disk.read(offset, 512)) == 512
            disk.write(offset, bytes(512))
        except OSError:
            continue
    disk.close()


def test_an_overlay_that_is_its_own_base_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "self.qcow2"
    create_overlay(path, path, "qcow2", CLUSTER)
    with pytest.raises(VmlabError, match="bases"):
        Overlay(path, read_only=True)


def test_an_overlay_is_not_made_over_a_file(base: Path) -> None:
    path = overlay_of(base)
    with pytest.raises(VmlabError, match="already"):
        create_overlay(path, base, "raw", SIZE)
    with pytest.raises(VmlabError, match="cannot be made"):
        create_overlay(base.parent / "none" / "x", base, "raw", SIZE)
    with pytest.raises(VmlabError, match="cannot be made"):
        create_overlay(base.parent / "odd", base, "raw", 100)


def test_a_raw_image_reads_what_was_written(base: Path) -> None:
    disk = RawDisk(base)
    shadow = Shadow(disk, base.read_bytes())
    noise = random.Random(3)
    for _ in range(100):
        shadow.step(noise)
    disk.flush()
    disk.close()
    assert base.read_bytes() == shadow.content


def test_a_raw_images_tail_is_padded_to_a_sector(tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(b"x" * 700)
    disk = RawDisk(path)
    assert disk.size == 1024
    assert disk.read(512, 512) == b"x" * 188 + bytes(324)
    disk.resize(4096)
    assert disk.size == 4096
    disk.close()


def test_an_image_that_is_written_is_nobody_elses(base: Path) -> None:
    writer = RawDisk(base)
    with pytest.raises(VmlabError, match="in use") as caught:
        RawDisk(base)
    assert caught.value.hint
    with pytest.raises(VmlabError, match="in use"):
        RawDisk(base, read_only=True)
    writer.close()
    one, two = RawDisk(base, read_only=True), Overlay(overlay_of(base))
    with pytest.raises(VmlabError, match="in use"):
        RawDisk(base)
    one.close()
    two.close()
    RawDisk(base).close()


def test_files_that_cannot_be_used_are_named(tmp_path: Path, base: Path) -> None:
    with pytest.raises(VmlabError, match="no disk image"):
        RawDisk(tmp_path / "none")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(VmlabError, match="neither a file"):
        RawDisk(tmp_path / "fifo")
    with pytest.raises(VmlabError, match="is no qcow2"):
        open_disk(base, "qcow2")
    with pytest.raises(VmlabError, match="'vmdk' is not known"):
        open_disk(base, "vmdk")
    assert open_disk(base, "raw").size == SIZE


def test_an_overlay_grows_into_zeros_and_qemu_agrees(base: Path) -> None:
    size = 3 << 30
    overlay = Overlay(overlay_of(base))
    overlay.resize(size)
    overlay.write(size - 512, b"e" * 512)
    assert overlay.size == size
    assert overlay.read(0, SIZE) == base.read_bytes()
    assert overlay.read(SIZE, CLUSTER) == bytes(CLUSTER)
    overlay.close()
    assert "No errors" in qemu_img("check", overlay.path)
    described = json.loads(qemu_img("info", "--output=json", overlay.path))
    assert described["virtual-size"] == size
    again = Overlay(overlay.path)
    assert again.read(size - 512, 512) == b"e" * 512
    again.close()


def test_what_an_overlay_did_not_show_of_its_base_stays_unseen(base: Path) -> None:
    overlay = Overlay(overlay_of(base, 3 * CLUSTER + 512))
    overlay.resize(SIZE + 512)
    assert overlay.read(0, 3 * CLUSTER + 512) == base.read_bytes()[: 3 * CLUSTER + 512]
    behind = 3 * CLUSTER + 512
    assert overlay.read(behind, SIZE - behind) == bytes(SIZE - behind)
    overlay.close()


@pytest.mark.parametrize("size", [SIZE - 512, SIZE + 1, 1 << 52])
def test_a_size_that_an_overlay_cannot_have_is_refused(base: Path, size: int) -> None:
    overlay = Overlay(overlay_of(base))
    with pytest.raises(VmlabError, match=f"cannot have {size}") as caught:
        overlay.resize(size)
    assert f"{8192 * (512 << 20)} bytes" in (caught.value.hint or "")
    assert overlay.size == SIZE
    overlay.close()


def test_a_raw_image_that_cannot_grow_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(4096))
    disk = RawDisk(path)
    disk.resize(8192)
    assert (disk.size, path.stat().st_size) == (8192, 8192)
    with pytest.raises(VmlabError, match="cannot be"):
        disk.resize(1 << 63 - 1)
    assert disk.size == 8192
    disk.close()


def test_a_metered_disk_counts_what_goes_through_and_what_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(1 << 16))
    below = FaultyDisk(RawDisk(path), lambda: 0)
    disk = MeteredDisk(below)
    disk.write(0, b"x" * 512)
    disk.write_zeroes(4096, 1024, unmap=True)
    disk.discard(8192, 4096)
    assert disk.read(0, 1024) == b"x" * 512 + bytes(512)
    disk.flush()
    assert disk.counters == DiskCounters(
        read_bytes=1024, written_bytes=1536, reads=1, writes=2, flushes=1
    )
    below.add("full", DiskFault(DiskMishap.ERROR, errno=errno.ENOSPC))
    for work in (
        lambda: disk.read(0, 512),
        lambda: disk.write(0, bytes(512)),
        lambda: disk.write_zeroes(0, 512, unmap=False),
        lambda: disk.discard(0, 512),
        disk.flush,
    ):
        with pytest.raises(OSError, match="No space"):
            work()
    counters = disk.counters
    failed = (counters.failed_reads, counters.failed_writes, counters.failed_flushes)
    assert failed == (1, 2, 1)
    below.remove("full")
    assert disk.read(0, 512) == b"x" * 512
    disk.close()
