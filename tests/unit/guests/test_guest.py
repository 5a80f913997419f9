"""What one does with a guest, with the agent's real script over pseudo-terminals.

The shell is busybox: its tar writes an archive to a terminal, which GNU tar refuses.
"""

# ruff: noqa: ASYNC110, ASYNC240 (the guest is this host: its files are looked at directly)

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
import stat
import tarfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.unit.guests.ports import HostedAgent

from vmlab.guests import agent as agent_module
from vmlab.guests import guest as guest_module
from vmlab.guests import trees
from vmlab.guests.agent import AgentChannel
from vmlab.guests.command import Command
from vmlab.guests.guest import CommandFailed, Guest
from vmlab.hypervisors.base import Machine
from vmlab.machine.errors import (
    DeadlineExceeded,
    OperationFailed,
    ResourceNotFound,
)

# More than any of this takes on a slow host.
PATIENCE = 300.0
pytestmark = pytest.mark.timeout(PATIENCE + 60)

Body = Callable[[Guest], Awaitable[None]]
Drive = Callable[[Body], None]


@pytest.fixture
def drive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drive]:
    hosted = HostedAgent(tmp_path_factory.mktemp("agent"), ["/bin/busybox", "sh"])

    def run(body: Body) -> None:
        async def main() -> None:
            machine = cast("Machine", SimpleNamespace(name="vm"))  # only its name is used
            guest = Guest(machine, AgentChannel(hosted.open))
            try:
                async with asyncio.timeout(PATIENCE):
                    await guest.connect(timeout=PATIENCE)
                    await body(guest)
            finally:
                await guest.close()

        asyncio.run(main())

    yield run
    hosted.stop()


def tree_of(path: Path) -> dict[str, tuple[int, str]]:
    """What is below `path`: mode, and contents or link."""
    found = {}
    for entry in [path, *path.rglob("*")]:
        info = entry.lstat()
        if entry.is_symlink():
            contents = str(entry.readlink())
        elif entry.is_file():
            contents = hashlib.sha256(entry.read_bytes()).hexdigest()
        else:
            contents = "directory"
        found[str(entry.relative_to(path))] = (
            0 if entry.is_symlink() else stat.S_IMODE(info.st_mode),
            contents,
        )
    return found


def runs(pid_file: Path) -> bool:
    """Whether the process runs whose number is in a file; a zombie does not."""
    try:
        return ") Z " not in Path(f"/proc/{int(pid_file.read_text())}/stat").read_text()
    except FileNotFoundError:
        return False


def make_tree(base: Path) -> Path:
    tree = base / "tree"
    (tree / "empty").mkdir(parents=True)
    (tree / "deep" / ("n" * 200) / ("m" * 120)).mkdir(parents=True)
    (tree / "deep" / ("n" * 200) / ("m" * 120) / "leaf").write_text("leaf")
    (tree / "script").write_text("#!/bin/sh\n")
    (tree / "script").chmod(0o755)
    (tree / "secret").write_bytes(bytes(range(256)))
    (tree / "secret").chmod(0o600)
    (tree / "link").symlink_to("script")
    (tree / "dangling").symlink_to("/nowhere/at all")
    os.link(tree / "secret", tree / "hard")
    for name in ("a b", "-n", "ü\n'\"$(x)\\", os.fsdecode(b"\xff\xfe")):
        (tree / name).write_text(name, errors="surrogateescape")
    (tree / "shut").mkdir(mode=0o555)
    (tree / "large").write_bytes(os.urandom(9 << 20))
    return tree


def test_execute_returns_status_and_output_and_takes_words(drive: Drive) -> None:
    async def body(guest: Guest) -> None:
        result = await guest.execute(["printf", "%s|", "a b", "$HOME", "it's"])
        assert (result.status, result.stdout) == (0, "a b|$HOME|it's|")
        begun = time.monotonic()
        result = await guest.execute("cat; echo $V; pwd", input="in\n",
                                     environment={"V": "v"}, directory="/usr")  # fmt: skip
        assert result.stdout == "in\nv\n/usr\n"
        assert 0 < result.seconds <= time.monotonic() - begun

    drive(body)


def test_output_goes_to_sinks_as_it_comes(drive: Drive) -> None:
    async def body(guest: Guest) -> None:
        seen = bytearray()
        first = asyncio.Event()

        async def take(data: bytes) -> None:
            seen.extend(data)
            if seen == b"a\n":
                first.set()

        async def goes_on() -> AsyncIterator[bytes]:
            await first.wait()  # while the command runs
            yield b"on\n"

        result = await guest.execute("echo a; read -r x; echo b", input=goes_on(), stdout=take)
        assert bytes(seen) == b"a\nb\n"
        assert result.stdout_bytes == b""

    drive(body)


def test_succeed_and_fail_say_what_was_printed(drive: Drive) -> None:
    async def body(guest: Guest) -> None:
        assert (await guest.succeed("echo 1", "echo 2")).stdout == "2\n"
        assert (await guest.fail("exit 3")).status == 3
        with pytest.raises(CommandFailed, match="status 7, expected 0") as caught:
            await guest.succeed("echo here; echo there >&2; exit 7")
        assert (caught.value.status, caught.value.stdout) == (7, "here\n")
        assert "there" in str(caught.value)
        with pytest.raises(CommandFailed, match="expected another one than 0"):
            await guest.fail("true")

    drive(body)


class Clock:
    """asyncio, but that the time for what is under way can be declared to be up."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        self._limit = asyncio.timeout(seconds)
        return self._limit

    def is_up(self) -> None:
        self._limit.reschedule(asyncio.get_running_loop().time())


def test_a_command_that_never_ends_is_ended_and_tells_what_it_printed(
    drive: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    time_ = Clock()
    monkeypatch.setattr(guest_module, "asyncio", time_)

    async def body(guest: Guest) -> None:
        command = f"echo begun; echo $$ >{pid}.new; mv {pid}.new {pid}; sleep 1000"
        work = asyncio.ensure_future(guest.execute(command, timeout=PATIENCE))
        while not pid.exists():
            assert not work.done(), work
            await asyncio.sleep(0.01)
        # What it has printed lies in the port; it only has to be read.
        for _ in range(100):
            await asyncio.sleep(0)
        time_.is_up()
        with pytest.raises(DeadlineExceeded, match="sleep 1000") as caught:
            await work
        assert "begun" in "".join(caught.value.__notes__)
        assert not runs(pid)

    drive(body)


def test_a_hundred_megabytes_come_out_whole(drive: Drive) -> None:
    async def body(guest: Guest) -> None:
        size = 100 << 20
        count = 0

        async def take(data: bytes) -> None:
            nonlocal count
            count += len(data)

        await guest.execute(f"head -c {size} /dev/zero", stdout=take)
        assert count == size

    drive(body)


def test_waits_end_when_the_thing_comes_and_not_before(drive: Drive, tmp_path: Path) -> None:
    async def body(guest: Guest) -> None:
        flag = tmp_path / "flag"
        waiting = asyncio.ensure_future(guest.wait_for_file(str(flag)))
        succeeding = asyncio.ensure_future(
            guest.wait_until_succeeds(f"echo found; echo >&2; [ -e {flag} ]", every=0.05)
        )
        failing = asyncio.ensure_future(guest.wait_until_fails(f"[ ! -e {flag} ]", every=0.05))
        await asyncio.sleep(0.3)
        assert not (waiting.done() or succeeding.done() or failing.done())
        flag.symlink_to("nowhere")  # a link to nothing is something, too
        await waiting
        assert not succeeding.done()
        flag.unlink()
        flag.touch()
        assert (await succeeding).stdout == "found\n"
        await failing

    drive(body)


def test_a_wait_that_fails_says_for_what(drive: Drive, tmp_path: Path) -> None:
    async def body(guest: Guest) -> None:
        with pytest.raises(DeadlineExceeded, match="waiting for file /nowhere"):
            await guest.wait_for_file("/nowhere", timeout=0.2)
        with pytest.raises(DeadlineExceeded, match="'false' to succeed"):
            await guest.wait_until_succeeds("false", timeout=0.2)
        with pytest.raises(OperationFailed, match="port 70000"):
            await guest.wait_for_open_port(70000)

    drive(body)


@pytest.mark.parametrize("address", [None, "127.0.0.1"])
def test_ports_are_waited_for(drive: Drive, address: str | None) -> None:
    async def body(guest: Guest) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            await guest.wait_for_closed_port(port, address=address)
            waiting = asyncio.ensure_future(guest.wait_for_open_port(port, address=address))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            listener.listen()
            await waiting
        await guest.wait_for_closed_port(port, address=address)

    drive(body)


def test_files_are_written_and_read_with_any_bytes(drive: Drive, tmp_path: Path) -> None:
    async def body(guest: Guest) -> None:
        path = tmp_path / "new" / "dir" / "it's"
        data = bytes(range(256)) * 50
        await guest.write(str(path), data, mode=0o640)
        assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (data, 0o640)
        assert await guest.read(str(path)) == data
        await guest.write(str(path), "text")
        assert path.read_text() == "text"
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]
        with pytest.raises(ResourceNotFound, match="/nowhere"):
            await guest.read("/nowhere")

    drive(body)


def test_a_file_is_written_through_a_link_and_into_a_device(drive: Drive, tmp_path: Path) -> None:
    async def body(guest: Guest) -> None:
        (tmp_path / "real").write_text("old")
        (tmp_path / "link").symlink_to("real")
        await guest.write(str(tmp_path / "link"), "new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").read_text() == "new"
        await guest.write("/dev/null", "gone")
        assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
        with pytest.raises(CommandFailed, match="expected 0"):
            await guest.write("/proc/none", "x")

    drive(body)


def test_input_that_fails_in_the_middle_leaves_the_old_file(drive: Drive, tmp_path: Path) -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield b"half"
        raise OSError(errno.EIO, "the disk went away")

    async def body(guest: Guest) -> None:
        path = tmp_path / "file"
        path.write_text("old")
        with pytest.raises(OSError, match="the disk went away"):
            await guest.write(str(path), cast("Any", failing()))
        assert path.read_text() == "old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
        assert (await guest.execute("echo in step")).stdout == "in step\n"

    drive(body)


def test_trees_go_in_and_come_out_as_they_were(drive: Drive, tmp_path: Path) -> None:
    async def body(guest: Guest) -> None:
        tree = make_tree(tmp_path / "here")
        before = tree_of(tree)
        await guest.copy_in(tree, str(tmp_path / "there" / "x y" / "other name"))
        arrived = tmp_path / "there" / "x y" / "other name"
        assert tree_of(arrived) == before
        assert (arrived / "hard").stat().st_ino == (arrived / "secret").stat().st_ino
        await guest.copy_out(str(arrived), tmp_path / "back" / "again")
        assert tree_of(tmp_path / "back" / "again") == before
        for folder in (tmp_path / "back", arrived.parent):
            assert len(list(folder.iterdir())) == 1

    drive(body)


def test_single_files_are_copied_and_replaced(drive: Drive, tmp_path: Path) -> None:
    async def body(guest: Guest) -> None:
        source = tmp_path / "source"
        source.write_text("new")
        (tmp_path / "target").write_text("old")
        await guest.copy_in(source, str(tmp_path / "target"))
        assert (tmp_path / "target").read_text() == "new"
        await guest.copy_out(str(source), tmp_path / "out")
        assert (tmp_path / "out").read_text() == "new"

    drive(body)


def test_copies_that_cannot_be_are_refused_with_nothing_left(drive: Drive, tmp_path: Path) -> None:
    async def body(guest: Guest) -> None:
        (tmp_path / "directory").mkdir()
        (tmp_path / "file").touch()
        with pytest.raises(CommandFailed, match="exists already, and is a directory"):
            await guest.copy_in(tmp_path / "file", str(tmp_path / "directory"))
        with pytest.raises(OperationFailed, match="missing: No such file"):
            await guest.copy_in(tmp_path / "missing", str(tmp_path / "new"))
        with pytest.raises(OperationFailed, match="not an absolute path"):
            await guest.copy_in(tmp_path / "file", "relative")
        with pytest.raises(ResourceNotFound, match="nothing-here"):
            await guest.copy_out("/nothing-here", tmp_path / "new")
        with pytest.raises(OperationFailed, match="exists already"):
            await guest.copy_out(str(tmp_path / "file"), tmp_path / "directory")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["directory", "file"]

    drive(body)


def test_a_file_that_cannot_be_read_to_its_end_is_not_there_in_part(
    drive: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(guest: Guest) -> None:
        (tmp_path / "file").write_bytes(os.urandom(100_000))
        (tmp_path / "guest").mkdir()

        async def breaking(path: Path, size: int) -> AsyncIterator[bytes]:
            yield path.read_bytes()
            raise OperationFailed(f"cannot read {path}: Input/output error")

        monkeypatch.setattr(trees, "contents", breaking)
        with pytest.raises(OperationFailed, match="Input/output error"):
            await guest.copy_in(tmp_path / "file", str(tmp_path / "guest" / "file"))
        assert list((tmp_path / "guest").iterdir()) == []
        assert (await guest.succeed("echo next")).stdout == "next\n"

    drive(body)


@pytest.mark.parametrize("size", [100_000, 3 << 20, trees.PIECE * 2])
def test_a_file_that_grows_or_shrinks_while_it_is_copied_is_copied_as_it_was_or_not_at_all(
    drive: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    data = os.urandom(size)
    real = trees.plan

    async def body(guest: Guest) -> None:
        for change in (0, 1000, -1000):
            source.write_bytes(data)

            def plan(path: Path, change: int = change) -> trees.Plan:
                found = real(path)
                os.truncate(path, size + change)
                return found

            monkeypatch.setattr(trees, "plan", plan)
            copying = guest.copy_in(source, str(target))
            if size >= trees.LARGE and change < 0:
                with pytest.raises(OperationFailed, match="it became 1000 bytes shorter"):
                    await copying
                assert not target.exists()
                continue
            await copying
            # What is small is taken as it is.
            expected = data if size >= trees.LARGE else source.read_bytes()
            assert target.read_bytes() == expected
            target.unlink()
        assert list(tmp_path.iterdir()) == [source]

    drive(body)


def test_large_files_have_their_size_before_their_contents(
    drive: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, target = tmp_path / "tree", tmp_path / "guest"
    tree.mkdir()
    (tree / "inner").write_bytes(data := os.urandom(3 << 20))
    real = trees.contents

    async def sized() -> None:
        while not any(
            entry.is_file() and entry.stat().st_size == len(data) for entry in target.rglob("*")
        ):
            await asyncio.sleep(0.01)

    async def patient(path: Path, size: int) -> AsyncIterator[bytes]:
        await sized()
        async for piece in real(path, size):
            yield piece

    async def body(guest: Guest) -> None:
        monkeypatch.setattr(trees, "contents", patient)
        for source, copied in ((tree / "inner", "file"), (tree, "tree/inner")):
            await guest.copy_in(source, str(target / copied.partition("/")[0]))
            assert (target / copied).read_bytes() == data
            (target / copied).unlink()

    drive(body)


def test_large_files_are_copied_to_a_guest_without_truncate(
    drive: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").write_bytes(data := os.urandom(3 << 20))

    async def body(guest: Guest) -> None:
        run = guest.channel.run

        async def without(command: Command, **named: Any) -> int:
            text = f"truncate() {{ return 127; }}\n{command.text}"
            return await run(replace(command, text=text), **named)

        monkeypatch.setattr(guest.channel, "run", without)
        await guest.copy_in(tmp_path / "source", str(tmp_path / "copied"))
        await guest.write(str(tmp_path / "written"), data)
        assert (tmp_path / "copied").read_bytes() == data
        assert (tmp_path / "written").read_bytes() == data

    drive(body)


async def _cancel_in(part: str, guest: Guest, tree: Path, target: Path) -> None:
    """Cancel a copy after the first piece of one of its parts."""
    real = getattr(trees, part)
    middle = asyncio.Event()

    async def slow(*args: Any, **named: Any) -> AsyncIterator[bytes]:
        async for piece in real(*args, **named):
            yield piece
            middle.set()
            await asyncio.Event().wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, part, slow)
        target.mkdir()
        copying = asyncio.ensure_future(guest.copy_in(tree, str(target / "target")))
        await middle.wait()
        while not list(target.iterdir()):
            await asyncio.sleep(0.01)
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying


def test_a_copy_that_is_cancelled_in_the_middle_leaves_nothing(
    drive: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(guest: Guest) -> None:
        tree = tmp_path / "tree"
        tree.mkdir()
        for number in range(40):
            (tree / str(number)).write_bytes(os.urandom(200_000))
        (tree / "large").write_bytes(os.urandom(6 << 20))
        for part, source in (("packed", tree), ("contents", tree), ("contents", tree / "large")):
            target = tmp_path / f"{part} of {source.name}"
            await _cancel_in(part, guest, source, target)
            assert list(target.iterdir()) == []

        taken = asyncio.Event()
        take = trees.Unpacker.take

        async def slow_take(self: trees.Unpacker, data: bytes) -> None:
            await take(self, data)
            taken.set()
            await asyncio.sleep(0.05)

        monkeypatch.setattr(trees.Unpacker, "take", slow_take)
        copying = asyncio.ensure_future(guest.copy_out(str(tree), tmp_path / "host" / "target"))
        await taken.wait()
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying
        assert list((tmp_path / "host").iterdir()) == []
        assert (await guest.execute("echo in step")).stdout == "in step\n"

    drive(body)


def test_a_guest_that_lies_about_its_tar_touches_nothing(drive: Drive, tmp_path: Path) -> None:
    async def body(guest: Guest) -> None:
        with tarfile.open(tmp_path / "evil.tar", "w") as archive:
            archive.addfile(tarfile.TarInfo("../escaped"))
        execute = guest.execute

        async def with_evil_tar(command: str, **given: Any) -> Any:
            return await execute(command.replace("exec tar -c", "cat evil.tar #"), **given)

        guest.execute = with_evil_tar  # its tar lies
        with pytest.raises(OperationFailed, match="reaches outside"):
            await guest.copy_out(str(tmp_path / "asked"), tmp_path / "out" / "target")
        assert list((tmp_path / "out").iterdir()) == []
        assert not (tmp_path / "escaped").exists()

    drive(body)


def test_the_boot_id_is_the_kernel_s(drive: Drive) -> None:
    async def body(guest: Guest) -> None:
        expected = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        assert await guest.boot_id() == expected

    drive(body)


def test_a_process_left_behind_does_not_write_into_the_next_output(drive: Drive) -> None:
    async def body(guest: Guest) -> None:
        await guest.execute("(while :; do echo noise; sleep 0.01; done) &")
        try:
            for _ in range(20):
                assert (await guest.execute("sleep 0.03; echo clean")).stdout == "clean\n"
        finally:
            await guest.execute("pkill -f 'echo noise' ; kill $(ps -o pid,args | grep '[n]oise')")

    drive(body)


def test_a_host_that_vanished_in_the_middle_of_a_command_leaves_no_slot_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "_ANSWER_WITHIN", 0.3)
    hosted = HostedAgent(tmp_path, ["/bin/busybox", "sh"])

    async def vanish() -> None:
        channel = AgentChannel(hosted.open)
        await channel.connect(timeout=PATIENCE)
        (out,) = [slot.out for slot in channel._all if slot.number == 0]
        assert out is not None
        await out.send(agent_module.command_line("run", "00", f"echo $$ >{tmp_path}/pid; sleep 99"))
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            await asyncio.sleep(0.01)
        await channel.close()

    async def come_back() -> None:
        channel = AgentChannel(hosted.open)
        await channel.connect(timeout=PATIENCE)
        assert not runs(tmp_path / "pid")
        await channel.close()

    try:
        asyncio.run(vanish())
        asyncio.run(come_back())
    finally:
        hosted.stop()


def test_a_closed_guest_runs_nothing_but_can_be_connected_again(drive: Drive) -> None:
    async def body(guest: Guest) -> None:
        await guest.close()
        await guest.connect(timeout=PATIENCE)
        assert (await guest.execute("echo again")).stdout == "again\n"

    drive(body)
