"""Tar streams between host and guest: what arrives, and what a hostile guest cannot do."""

from __future__ import annotations

import asyncio
import io
import os
import stat
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmlab.guests import trees
from vmlab.machine.errors import OperationFailed

Fill = Callable[[tarfile.TarFile], None]


def stream(fill: Fill) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        fill(archive)
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.mode = 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def unpack(data: bytes, target: Path, piece: int = 1000) -> None:
    async def main() -> None:
        with trees.scratch(target) as scratch:
            unpacker = trees.Unpacker(scratch)
            try:
                for offset in range(0, len(data), piece):
                    await unpacker.take(data[offset : offset + piece])
            finally:
                await unpacker.finish()
            unpacker.check()
            trees.settle(scratch / "tree", target)

    asyncio.run(main())


def outside_through_a_link(archive: tarfile.TarFile) -> None:
    archive.addfile(member("tree", tarfile.DIRTYPE, mode=0o755))
    archive.addfile(member("tree/link", tarfile.SYMTYPE, linkname="../../victim"))
    archive.addfile(member("tree/link/file", size=3), io.BytesIO(b"bad"))


def a_file_over_a_link(archive: tarfile.TarFile) -> None:
    archive.addfile(member("tree", tarfile.SYMTYPE, linkname="../victim/kept"))
    archive.addfile(member("tree", tarfile.DIRTYPE))


def a_hard_link_outside(archive: tarfile.TarFile) -> None:
    archive.addfile(member("tree", tarfile.LNKTYPE, linkname="../victim/kept"))


def a_hard_link_to_a_link(archive: tarfile.TarFile) -> None:
    archive.addfile(member("a", tarfile.SYMTYPE, linkname="../victim"))
    archive.addfile(member("tree", tarfile.LNKTYPE, linkname="a/kept"))


def absolute(archive: tarfile.TarFile) -> None:
    archive.addfile(member("/tree", size=1), io.BytesIO(b"x"))


def dots(archive: tarfile.TarFile) -> None:
    archive.addfile(member("tree/../../victim/new", size=1), io.BytesIO(b"x"))


def a_device(archive: tarfile.TarFile) -> None:
    archive.addfile(member("tree", tarfile.BLKTYPE, devmajor=8, devminor=0))


def long_links(archive: tarfile.TarFile) -> None:
    """Links that are longer together than a path may be (CVE-2025-4517)."""
    place = ""
    for _ in range(17):
        name = "d" * 247
        archive.addfile(member(place + name, tarfile.DIRTYPE, mode=0o755))
        archive.addfile(member(place + "l", tarfile.SYMTYPE, linkname=name))
        place += "l/"
    archive.addfile(member(place + "out", tarfile.SYMTYPE, linkname="../" * 20))
    archive.addfile(member(place + "out/victim/new", size=1), io.BytesIO(b"x"))


@pytest.mark.parametrize(
    "fill",
    [
        outside_through_a_link,
        a_file_over_a_link,
        a_hard_link_outside,
        a_hard_link_to_a_link,
        absolute,
        dots,
        a_device,
        long_links,
    ],
)
def test_a_hostile_stream_is_refused_and_nothing_is_touched_or_left(
    fill: Fill, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").write_text("kept")
    with pytest.raises(OperationFailed, match="cannot unpack"):
        unpack(stream(fill), tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["victim"]
    assert [path.name for path in victim.iterdir()] == ["kept"]
    assert (victim / "kept").read_text() == "kept"
    assert (victim / "kept").stat().st_nlink == 1


def test_no_file_becomes_set_uid_and_owners_are_ours(tmp_path: Path) -> None:
    def fill(archive: tarfile.TarFile) -> None:
        archive.addfile(member("tree", mode=0o6755, uid=12345, gid=12345), io.BytesIO())

    unpack(stream(fill), tmp_path / "target")
    found = (tmp_path / "target").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o755, os.getuid())


def test_a_stream_without_what_was_asked_for_is_refused(tmp_path: Path) -> None:
    data = stream(lambda archive: archive.addfile(member("other"), io.BytesIO()))
    with pytest.raises(OperationFailed, match="something else than 'tree'"):
        unpack(data, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_directories_that_may_not_be_written_are_cleared_away_too(tmp_path: Path) -> None:
    def fill(archive: tarfile.TarFile) -> None:
        archive.addfile(member("other", tarfile.DIRTYPE, mode=0o000))
        archive.addfile(member("other/inner", tarfile.DIRTYPE, mode=0o000))

    with pytest.raises(OperationFailed):
        unpack(stream(fill), tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(position=st.integers(0, 3000), value=st.integers(0, 255), length=st.integers(0, 4000))
def test_a_damaged_stream_is_a_clear_error_or_harmless(
    position: int, value: int, length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def fill(archive: tarfile.TarFile) -> None:
        archive.addfile(member("tree", tarfile.DIRTYPE, mode=0o755))
        archive.addfile(member("tree/file", size=700), io.BytesIO(b"a" * 700))

    data = bytearray(stream(fill)[:length])
    if position < len(data):
        data[position] = value
    base = tmp_path_factory.mktemp("damaged")
    try:
        unpack(bytes(data), base / "target")
    except OperationFailed:
        assert list(base.iterdir()) == []
    else:
        assert [path.name for path in base.iterdir()] == ["target"]


def test_a_reader_that_stops_early_leaves_no_thread(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(os.urandom(40 << 20))

    async def main() -> None:
        pieces = trees.packed(tmp_path / "large", "large")
        assert len(await anext(aiter(pieces))) >= trees.PIECE
        await pieces.aclose()  # it is an async generator

    before = threading.active_count()
    asyncio.run(main())
    assert threading.active_count() <= before


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        async for _ in trees.packed(tmp_path / "missing", "missing"):
            pytest.fail("there is nothing to send")

    with pytest.raises(OperationFailed, match="missing: No such file"):
        asyncio.run(main())
