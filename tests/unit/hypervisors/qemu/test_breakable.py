"""The process that serves breakable disks, and what the driver says to it."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.unit.engine.monitor.wire import Wire

from vmlab.hypervisors.monitored import device_faults
from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.ownership import Home, Owner, Run
from vmlab.hypervisors.qemu import breakable, disk_server
from vmlab.hypervisors.qemu.disks import device_options
from vmlab.hypervisors.qmp import QmpError
from vmlab.machine.errors import OperationFailed, UnsupportedOperation
from vmlab.machine.faults import (
    Chance,
    DiskCorrupt,
    DiskError,
    DiskSlow,
    DiskTornWrite,
    NetDelay,
    NetLoss,
    Nth,
    PowerCut,
)
from vmlab.machine.spec import MachineSpec

T = TypeVar("T")
SIZE = 1 << 20
SPEC = MachineSpec.of(name="vm", memory="64M")


def disk(path: Path, name: str = "data", **changes: Any) -> DiskFile:
    fields = {"readonly": False, "made": True, "breakable": True} | changes
    return DiskFile(name, path, "raw", SIZE, **fields)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "data.raw"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    run = Run.begin(Home.open(tmp_path / "home"))
    yield run.owner
    run.close()


def within(work: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(120):
            return await work

    return asyncio.run(limited())


def qemu_io(directory: Path, served: DiskFile, *commands: str) -> str:
    if shutil.which("qemu-io") is None:
        pytest.skip("needs qemu-io, of the Debian package qemu-utils")
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "raw", *words, f"nbd+unix:///?socket={directory / served.socket}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr


def test_a_disk_is_served_broken_and_let_go(tmp_path: Path, image: Path, owner: Owner) -> None:
    served, directory = disk(image), tmp_path / "launch"

    async def work() -> None:
        process = await breakable.start([served], directory, owner=owner, machine="1")
        assert process is not None
        fault = DiskError(disk="data", operation="write", when=Nth(n=2))
        mend = await breakable.break_disk(directory, SPEC, served, "second", fault)
        assert mend is not None
        await mend()
        await mend()
        await breakable.break_disk(directory, SPEC, served, "second", fault)
        corrupt = DiskCorrupt(disk="data", offset=0, length=2)
        assert await breakable.break_disk(directory, SPEC, served, "rot", corrupt) is None
        writes = [f"write -P {byte} {byte * 512} 512" for byte in (1, 2, 3)]
        told = await asyncio.to_thread(qemu_io, directory, served, *writes)
        assert told.count("Input/output error") == 1
        assert await process.wait() == 0

    within(work())
    content = image.read_bytes()
    assert content[:2] == b"\xff\xff"
    assert content[512:1024] == b"\x01" * 512
    assert content[1024:1536] == bytes(512)
    assert content[1536:2048] == b"\x03" * 512


def test_nothing_is_started_for_disks_that_are_not_breakable(
    tmp_path: Path, image: Path, owner: Owner
) -> None:
    plain = disk(image, breakable=False)
    started = breakable.start([plain], tmp_path / "launch", owner=owner, machine="1")
    assert within(started) is None
    assert not (tmp_path / "launch").exists()


def test_one_that_cannot_be_opened_is_named(tmp_path: Path, owner: Owner) -> None:
    missing = disk(tmp_path / "missing.raw")
    with pytest.raises(OperationFailed, match="there is no disk image") as caught:
        within(breakable.start([missing], tmp_path / "launch", owner=owner, machine="1"))
    assert caught.value.hint == f"its messages are in {tmp_path / 'launch' / 'disks.log'}"
    assert breakable.companion(tmp_path / "nowhere").said() == ""


def test_a_cancelled_start_leaves_no_process(tmp_path: Path, image: Path, owner: Owner) -> None:
    async def work() -> None:
        start = breakable.start([disk(image)], tmp_path / "launch", owner=owner, machine="1")
        task = asyncio.create_task(start)
        # There is a process from now on, which does not answer yet.
        while not (tmp_path / "launch" / "disks.log").exists():
            assert not task.done()
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    within(work())


class Serving:
    """The server in a thread of this process, and who talks to it."""

    def __init__(self, directory: Path, disks: list[DiskFile]) -> None:
        described = [
            {
                "node": one.node,
                "file": str(one.path),
                "format": one.format,
                "read-only": one.readonly,
                "socket": one.socket,
            }
            for one in disks
        ]
        (directory / "disks.json").write_text(json.dumps(described))
        self.status: list[int] = []
        self.thread = threading.Thread(target=self._serve)
        self.directory = directory
        self.thread.start()

    def _serve(self) -> None:
        self.status.append(disk_server.main(["disks.json"]))

    def wire(self) -> Wire:
        while True:
            try:
                return Wire(self.directory / "disks-qmp.sock")
            except (FileNotFoundError, ConnectionRefusedError):
                assert self.thread.is_alive(), self.status
                threading.Event().wait(0.01)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Serving]]:
    monkeypatch.chdir(tmp_path)
    made: list[Serving] = []

    def start(*disks: DiskFile) -> Serving:
        made.append(Serving(tmp_path, list(disks)))
        return made[-1]

    yield start
    for serving in made:
        serving.thread.join(60)
        assert not serving.thread.is_alive()


def test_power_takes_what_no_flush_has_covered(
    serve: Callable[..., Serving], image: Path, tmp_path: Path
) -> None:
    served = disk(image)
    serving = serve(served)
    wire = serving.wire()
    assert wire.error("x-disk-corrupt", node_name="x")[1].startswith("Parameter")
    commands = {each["name"] for each in wire.ask("query-commands")["return"]}
    assert {"x-disk-fault", "x-disk-corrupt", "x-fault-end", "x-power-cut"} <= commands
    assert wire.ask("x-power-cut") == {"return": [{"node-name": served.node, "lost": 0}]}
    wire.close()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / served.socket))
    serving.thread.join(60)
    assert serving.status == [0]


def test_a_server_without_its_image_says_so(
    serve: Callable[..., Serving], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serving = serve(disk(tmp_path / "missing.raw"))
    serving.thread.join(60)
    assert serving.status == [3]
    assert "there is no disk image" in capsys.readouterr().err


def test_a_command_that_is_refused_is_an_error(tmp_path: Path, image: Path, owner: Owner) -> None:
    served, directory = disk(image), tmp_path / "launch"

    async def work() -> None:
        process = await breakable.start([served], directory, owner=owner, machine="1")
        assert process is not None
        with pytest.raises(QmpError, match="Failed to find node"):
            place = {"node-name": "x", "offset": 0, "length": 1}
            await breakable.companion(directory).tell("vm", "x-disk-corrupt", place)
        assert await breakable.break_disk(directory, SPEC, None, "cut", PowerCut()) is None
        process.kill()
        await process.wait()

    within(work())


def test_what_strikes_only_breakable_disks_is_refused_for_others(image: Path) -> None:
    plain, broken = disk(image, "plain", breakable=False), disk(image, "broken")
    only_read = disk(image, "iso", breakable=False, readonly=True)
    disks = [plain, broken, only_read]
    breakable.check(SPEC, disks, DiskSlow(disk="broken", delay=1))
    breakable.check(SPEC, [broken, only_read], PowerCut())
    with pytest.raises(UnsupportedOperation, match="fault disk-slow") as caught:
        breakable.check(SPEC, disks, DiskSlow(disk="plain", delay=1))
    assert caught.value.hint == "give plain of its specification `breakable = true`"
    with pytest.raises(UnsupportedOperation, match="fault power-cut"):
        breakable.check(SPEC, disks, PowerCut())


def test_a_breakable_disk_is_one_over_nbd_whose_errors_its_guest_sees(image: Path) -> None:
    served = disk(image)
    assert served.block_node() == {
        "driver": "nbd",
        "node-name": "d-data",
        "read-only": False,
        "discard": "unmap",
        "server": {"type": "unix", "path": "d-data.nbd.sock"},
    }
    assert device_options(served, "virtio")["werror"] == "report"
    assert "werror" not in device_options(disk(image, breakable=False), "virtio")
    assert DiskFile.from_record(served.to_record()) == served


def test_faults_are_told_in_the_commands_of_who_serves() -> None:
    fault = DiskError(disk="d", operation="any", errno="ENOSPC", seed=5)
    assert device_faults.disk_fault(fault, "n", "full", 1) == (
        "x-disk-fault",
        {
            "id": "full",
            "node-name": "n",
            "fault": {
                "mishap": "error",
                "operations": ["read", "write", "flush"],
                "errno": errno.ENOSPC,
                "when": {"seed": 5},
            },
        },
    )
    torn = DiskTornWrite(disk="d", keep=100, seed=1, when=Nth(n=2, every=True), duration=3)
    assert device_faults.disk_fault(torn, "n", "t", 1)[1]["fault"] == {
        "mishap": "torn",
        "operations": ["write"],
        "keep": 100,
        "when": {"seed": 1, "nth": 2, "every": True, "duration": 3.0},
    }
    slow = DiskSlow(disk="d", delay=0.5, seed=1, when=Chance(probability=0.25))
    assert device_faults.disk_fault(slow, "n", "s", 1)[1]["fault"] == {
        "mishap": "slow",
        "delay": 0.5,
        "when": {"seed": 1, "probability": 0.25, "duration": 0.0},
    }
    loss = device_faults.net_fault(NetLoss(nic="n", ratio=0.5, seed=1), "nic-n", "l", 1)
    assert loss == (
        "x-net-fault",
        {"id": "l", "name": "nic-n", "fault": {"when": {"seed": 1}, "ratio": 0.5}},
    )
    late = device_faults.net_fault(NetDelay(nic="n", delay=1, jitter=0.5, seed=1), "nic-n", "l", 1)
    assert late[1]["fault"] == {"when": {"seed": 1}, "delay": 1.0, "jitter": 0.5}


def test_a_fault_without_a_seed_draws_from_the_machine_s_and_its_own_id() -> None:
    fault = NetLoss(nic="n")
    seeds = [device_faults.trigger(fault, *of)["seed"] for of in ((1, "a"), (1, "b"), (2, "a"))]
    assert len(set(seeds)) == 3
    assert device_faults.trigger(fault, 1, "a")["seed"] == seeds[0]
