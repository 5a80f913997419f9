"""Images, memory and streams as files; with qemu-img where an image is needed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmlab.hypervisors import threads
from vmlab.hypervisors.monitored import networks
from vmlab.hypervisors.monitored.streams import SocketChannel
from vmlab.hypervisors.qemu import arrival, disks, memory, vmstate
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import ChannelClosed, CorruptSnapshot, InvalidSpec, OperationFailed
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import Disk


def go_on() -> None:
    """A check that never ends the work."""


# ------------------------------------------------------------------- memory


def test_sparse_files_are_copied_with_their_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    with source.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(10 * MIB)
        file.write(b"data")
    memory.copy_sparse(source, target, go_on)
    assert target.stat().st_size == 64 * MIB
    assert target.stat().st_blocks * 512 < MIB
    with target.open("rb") as file:
        file.seek(10 * MIB)
        assert file.read(4) == b"data"
    assert memory.digest_of(source, go_on) == memory.digest_of(target, go_on)


def test_digest_is_of_the_contents_and_not_of_the_holes(tmp_path: Path) -> None:
    holes, zeros = tmp_path / "holes", tmp_path / "zeros"
    with holes.open("wb") as file:
        file.truncate(MIB)
    zeros.write_bytes(bytes(MIB))
    assert memory.digest_of(holes, go_on) == memory.digest_of(zeros, go_on)
    zeros.write_bytes(bytes(MIB - 1) + b"\1")
    assert memory.digest_of(holes, go_on) != memory.digest_of(zeros, go_on)
    zeros.write_bytes(bytes(MIB + 1))
    assert memory.digest_of(holes, go_on) != memory.digest_of(zeros, go_on)


def test_frozen_memory_cannot_be_changed_by_anybody(tmp_path: Path) -> None:
    source = tmp_path / "ram"
    source.write_bytes(b"x" * 8192)
    frozen = asyncio.run(memory.copied([source], seal=True))
    (path,) = frozen.paths
    assert path.read_bytes() == b"x" * 8192
    descriptor = os.open(path, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"y", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)
    frozen.close()
    frozen.close()
    assert not path.exists()


def test_memory_that_cannot_be_read_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileNotFoundError):
        asyncio.run(memory.copied([tmp_path / "none"], seal=True))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_template_that_is_given_up_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, source = tmp_path / "state", tmp_path / "memory"
    stream.touch()
    source.write_bytes(b"memory")

    async def capture(*_: Any) -> memory.Captured:
        return memory.Captured(stream, (source,))

    async def cancelled(*_: Any) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(memory, "capture", capture)
    monkeypatch.setattr(memory, "blocks_in", cancelled)
    process: Any = None
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(memory.freeze(process, tmp_path, None, Architecture.X86_64))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert not stream.exists()


def test_cancelled_thread_has_ended_when_the_call_returns() -> None:
    begun, ended = threading.Event(), list[bool]()

    def work(check: object) -> None:
        begun.set()
        try:
            while True:
                check()
        finally:
            ended.append(True)

    async def test() -> None:
        working = asyncio.create_task(threads.in_thread(work))
        assert await asyncio.to_thread(begun.wait, 60)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        assert ended == [True]

    asyncio.run(test())


# ------------------------------------------------------------------- saved states


def make_saved(path: Path, *options: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, "1M"], check=True)
    subprocess.run(["qemu-img", "snapshot", "-c", "state", path], check=True)


def test_image_without_a_state_is_refused(tmp_path: Path) -> None:
    image, output = tmp_path / "i.qcow2", tmp_path / "o"
    make_saved(image)
    assert vmstate.extract(image, output, "state") == 0
    with pytest.raises(CorruptSnapshot, match="it has no snapshot 'other'"):
        vmstate.extract(image, output, "other")
    (tmp_path / "raw").write_bytes(bytes(4096))
    with pytest.raises(CorruptSnapshot, match="it is no qcow2 image"):
        vmstate.extract(tmp_path / "raw", output, "state")
    (tmp_path / "short").write_bytes(b"QFI\xfb")
    with pytest.raises(CorruptSnapshot):
        vmstate.extract(tmp_path / "short", output, "state")


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(changes=st.dictionaries(st.integers(0, 400), st.integers(0, 255), max_size=12))
def test_damaged_image_is_an_error_or_some_bytes_and_never_a_hang(
    changes: dict[int, int], tmp_path: Path
) -> None:
    image = tmp_path / "i.qcow2"
    if not image.exists():
        make_saved(image)
    damaged = bytearray(image.read_bytes())
    table = int.from_bytes(damaged[64:72])
    for offset, value in changes.items():
        # The header, and the snapshot table.
        damaged[offset if offset < 112 else (table + offset - 112) % len(damaged)] = value
    (tmp_path / "d.qcow2").write_bytes(damaged)
    try:
        assert vmstate.extract(tmp_path / "d.qcow2", tmp_path / "o", "state") < 1 << 32
    except CorruptSnapshot as error:
        assert "d.qcow2" in error.message


def test_addresses_are_replaced_in_the_sections_of_nics_only(tmp_path: Path) -> None:
    old, new = bytes.fromhex("525400aabbcc"), bytes.fromhex("525400112233")
    name = b"0000:00:02.0/virtio-net"
    head = b"\x04" + (7).to_bytes(4) + bytes([len(name)]) + name + bytes(8)
    stream = b"start" + old + head + b"xx" + old + b"yy" + old + bytes(20000) + old
    source, target = tmp_path / "s", tmp_path / "t"
    source.write_bytes(stream)
    macs = ({"n": "52:54:00:aa:bb:cc"}, {"n": "52:54:00:11:22:33"})
    assert arrival.rename_macs(source, target, *macs) == 2
    changed = target.read_bytes()
    assert len(changed) == len(stream)
    assert (changed.count(new), changed.count(old)) == (2, 2)
    assert changed.startswith(b"start" + old)
    assert arrival.rename_macs(source, target, {}, {}) == 0
    assert target.read_bytes() == stream


# ------------------------------------------------------------------- images


def made(disk: Disk, path: Path) -> disks.DiskFile:
    return asyncio.run(disks.make_disk(disk, path))


def test_empty_disk_and_overlays_have_the_sizes_that_were_asked_for(tmp_path: Path) -> None:
    empty = made(Disk(name="a", size=MIB), tmp_path / "a.qcow2")
    assert (empty.size, empty.format, empty.made) == (MIB, "qcow2", True)
    source = tmp_path / "source"
    source.write_bytes(bytes(1000))
    overlay = made(Disk(name="b", source=source), tmp_path / "b.qcow2")
    assert overlay.size == 1024
    larger = made(Disk(name="c", source=overlay.path, size=MIB), tmp_path / "c.qcow2")
    assert larger.size == MIB
    info = asyncio.run(disks.image_info(larger.path, "qcow2"))
    assert info["full-backing-filename"] == str(overlay.path)
    read = made(Disk(name="d", source=overlay.path, readonly=True), tmp_path / "d.qcow2")
    assert (read.path, read.made, read.format) == (overlay.path, False, "qcow2")
    asyncio.run(disks.grow_image(larger, 2 * MIB))
    assert asyncio.run(disks.image_info(larger.path, "qcow2"))["virtual-size"] == 2 * MIB
    assert disks.DiskFile.from_record(larger.to_record()) == larger


def test_source_that_is_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(MIB))
    with pytest.raises(InvalidSpec, match="at least the 1048576 of its source"):
        made(Disk(name="a", source=tmp_path / "source", size=512), tmp_path / "a")


def test_tools_that_are_missing_or_fail_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OperationFailed, match="qemu-img create failed"):
        asyncio.run(disks.qemu_img("create", "-f", "qcow2", "/no/such/place", "1M"))
    with pytest.raises(OperationFailed, match="ip link set"):
        asyncio.run(networks.join_bridge("no-such-tap", "no-such-br"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OperationFailed, match="qemu-img is not installed"):
        asyncio.run(disks.qemu_img("info"))
    with pytest.raises(OperationFailed, match="`ip` is not installed"):
        asyncio.run(networks.join_bridge("tap", "br"))


@pytest.mark.parametrize("tool", ["qemu-img", "ip"])
def test_cancelled_tool_is_killed(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / tool).write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    async def test() -> None:
        call = disks.qemu_img("x") if tool == "qemu-img" else networks.join_bridge("t", "b")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await call

    asyncio.run(test())


# ------------------------------------------------------------------------------- channels


def test_channel_to_nobody_is_closed(tmp_path: Path) -> None:
    async def test() -> None:
        with pytest.raises(ChannelClosed, match="cannot be opened"):
            await SocketChannel.open("c", "m", tmp_path / "none.sock")

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.abort()

        server = await asyncio.start_unix_server(serve, tmp_path / "s.sock")
        channel = await SocketChannel.open("c", "m", tmp_path / "s.sock")
        assert await channel.read() == b""
        with pytest.raises(ChannelClosed, match="the guest is gone"):
            for _ in range(100):
                await channel.write(b"x" * 100_000)
        await channel.close()
        await channel.close()
        server.close()

    asyncio.run(asyncio.wait_for(test(), 100))


def test_channel_is_closed_although_nobody_takes_what_was_written(tmp_path: Path) -> None:
    async def test() -> None:
        gone = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await gone.wait()
            writer.transport.abort()

        server = await asyncio.start_unix_server(serve, tmp_path / "s.sock", limit=1)
        channel = await SocketChannel.open("c", "m", tmp_path / "s.sock")
        writing = asyncio.create_task(channel.write(b"x" * 10_000_000))
        await asyncio.sleep(0)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        await channel.close()
        gone.set()
        server.close()

    asyncio.run(asyncio.wait_for(test(), 60))
