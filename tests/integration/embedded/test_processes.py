"""The engine's processes: their life and end, found again, killed, changed while they run."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.unit.engine.process import programs

from vmlab.hypervisors import processes
from vmlab.hypervisors.embedded import provider
from vmlab.hypervisors.embedded.machine import EngineProcess
from vmlab.hypervisors.ownership import Store
from vmlab.machine.errors import (
    InvalidSpec,
    InvalidState,
    MachineCrashed,
    OperationAborted,
    OperationFailed,
    ResourceNotFound,
    UnsupportedOperation,
)
from vmlab.machine.events import EventType
from vmlab.machine.faults import At, DiskError, KillFault, MemoryPressure, NetPartition, PauseFault
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import Disk, Nic
from vmlab.machine.states import MachineState

pytestmark = pytest.mark.timeout(1800)

DISK = {"name": "data", "size": "1M"}
UNTIL_TYPED = (
    programs.number(programs.T0, 0x1000_0000)
    + programs.word("lbu", rd=programs.T1, rs1=programs.T0, imm=5)
    + programs.word("andi", rd=programs.T1, rs1=programs.T1, imm=1)
    + programs.word("beq", rs1=programs.T1, rs2=0, imm=-8)
)
"""What comes after it is done when a character is typed."""


def engines() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        # Of those that are ending nothing is known any more.
        with suppress(psutil.NoSuchProcess):
            if "vmlab.engine" in process.cmdline():
                found.append(process)
    return found


def listed(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.exists() else set()


async def until(machine: Any, *states: MachineState) -> MachineState:
    async with asyncio.timeout(300):
        while machine.state not in states:  # noqa: ASYNC110 (a state tells nobody)
            await asyncio.sleep(0.005)
    return machine.state


def test_life_of_a_machine_leaves_its_logs_and_then_nothing(bench: Any, make_spec: Any) -> None:
    async def test() -> None:
        machine = await bench.embedded.create(
            make_spec(code=programs.SPIN, disks=[DISK], nics=[{"name": "n", "network": "none"}])
        )
        at_rest = await machine.info()
        assert (at_rest.pid, at_rest.nics[0].link, at_rest.disks[0].size) == (None, False, MIB)
        with pytest.raises(InvalidState):
            await machine.metrics()
        await machine.start()
        info = await machine.info()
        for field in ("name", "architecture", "vcpus", "memory", "disks", "nics", "consoles"):
            assert getattr(info, field) == getattr(at_rest, field), field
        assert info.nodes == at_rest.nodes
        assert info.accelerator == at_rest.accelerator == "interpreter"
        launch = Path(info.extra["launch"])
        assert "vmlab.engine" in (launch / "command-line").read_text()
        assert "harts = 1" in (launch / "machine.toml").read_text()
        assert "query-status" in (launch / "qmp.log").read_text()
        before = await machine.metrics()
        await machine.pause()
        assert (await machine.status()).state is MachineState.PAUSED
        still = await machine.metrics()
        assert still.cpu.instructions == (await machine.metrics()).cpu.instructions
        await machine.resume()
        await machine.restart(graceful=False)
        after = await machine.metrics()
        assert (before.cpu.instructions or 0) <= (still.cpu.instructions or 0)
        assert (still.cpu.instructions or 0) <= (after.cpu.instructions or 0)
        assert before.cpu.seconds <= after.cpu.seconds
        assert (after.memory.total_bytes, after.memory.balloon_bytes) == (8 * MIB, 8 * MIB)
        assert after.disks[0].reads == 0 and after.nics[0].sent_packets == 0
        await machine.stop(graceful=False)
        left = listed(launch)
        assert left == {"command-line", "engine.log", "machine.toml", "qmp.log"}
        for _ in range(4):
            await machine.start()
            await machine.kill()
        assert listed(launch) == set()
        await machine.delete()
        await machine.delete()
        assert not machine.directory.exists()
        assert engines() == []

    bench.run(test())


ENDS = pytest.mark.parametrize(
    ("code", "state", "event"),
    [
        (programs.end(programs.POWEROFF), MachineState.STOPPED, EventType.GUEST_SHUTDOWN),
        (programs.end(programs.FAIL), MachineState.FAILED, EventType.GUEST_PANIC),
        # An illegal instruction, whose handler is one as well.
        (bytes(4), MachineState.FAILED, EventType.GUEST_PANIC),
    ],
    ids=["poweroff", "fail", "trap-loop"],
)


@ENDS
def test_a_guest_that_ends_by_itself_is_told(
    bench: Any, make_spec: Any, code: bytes, state: MachineState, event: EventType
) -> None:
    async def test() -> None:
        machine = await bench.embedded.create(make_spec(code=UNTIL_TYPED + code))
        await machine.start()
        async with await machine.console() as console:
            await console.write(b"x")
        await until(machine, state)
        assert event in {each.type for each in await bench.embedded.events()}
        assert engines() == []
        assert (await machine.status()).state is state
        await machine.delete()

    bench.run(test())


@ENDS
def test_a_guest_that_ends_before_start_returns_spoils_the_start(
    bench: Any,
    make_spec: Any,
    monkeypatch: pytest.MonkeyPatch,
    code: bytes,
    state: MachineState,
    event: EventType,
) -> None:
    let = EngineProcess.execute

    async def slowly(self: EngineProcess, command: str, *rest: Any, **named: Any) -> Any:
        """Let the vCPUs run, and learn of that only when the guest has ended."""
        if command != "cont":
            return await let(self, command, *rest, **named)
        with self.qmp.listen("SHUTDOWN", "GUEST_PANICKED") as ended:
            found = await let(self, command, *rest, **named)
            await ended.wait(300)
        return found

    monkeypatch.setattr(EngineProcess, "execute", slowly)

    async def test() -> None:
        machine = await bench.embedded.create(make_spec(code=code))
        error = OperationAborted if state is MachineState.STOPPED else MachineCrashed
        with pytest.raises(error, match="start failed") as failed:
            await machine.start()
        assert type(failed.value) is error
        assert machine.state is state
        assert event in {each.type for each in await bench.embedded.events()}
        assert engines() == []
        assert (await machine.status()).state is state
        await machine.delete()

    bench.run(test())


def test_a_guest_that_restarts_is_told_and_runs_on(bench: Any, make_spec: Any) -> None:
    async def test() -> None:
        machine = await bench.embedded.create(make_spec(code=programs.end(programs.REBOOT)))
        await machine.start()
        async with asyncio.timeout(300):
            async for event in bench.embedded.subscribe(0):
                if event.type is EventType.GUEST_RESET:
                    break
        assert (await machine.status()).state is MachineState.RUNNING
        await machine.kill()

    bench.run(test())


def test_a_process_that_is_killed_leaves_a_failed_machine_that_starts_again(
    bench: Any, make_spec: Any
) -> None:
    async def test() -> None:
        machine = await bench.embedded.create(make_spec())
        for _ in range(2):
            await machine.start()
            os.kill((await machine.info()).pid, signal.SIGKILL)
            await until(machine, MachineState.FAILED)
            assert "signal 9" in (await machine.status()).reason
        await machine.inject(KillFault(when=At(seconds=0))) if machine.state.is_live else None
        await machine.delete()

    bench.run(test())


def test_the_console_is_read_and_written_and_kept(bench: Any, make_spec: Any) -> None:
    async def test() -> None:
        machine = await bench.embedded.create(make_spec(code=programs.ECHO, channels=["org.x.0"]))
        with pytest.raises(InvalidState):
            await machine.channel("org.x.0")
        await machine.start()
        async with asyncio.timeout(300), await machine.console() as console:
            await console.write(b"hello")
            seen = b""
            while seen != b"hello":
                seen += await console.read()
            assert await console.log() == b"hello"
        with pytest.raises(ResourceNotFound, match="no console 'other'"):
            await machine.console("other")
        channel = await machine.channel("org.x.0")
        with pytest.raises(OperationFailed, match="is open already"):
            await machine.channel("org.x.0")
        with pytest.raises(ResourceNotFound, match=r"no channel 'org\.y\.0'"):
            await machine.channel("org.y.0")
        await machine.kill()
        assert await channel.read() == b""
        await channel.close()
        await machine.start()
        async with await machine.console() as console:
            assert await console.log() == b"hello"

    bench.run(test())


def test_disks_come_and_go_grow_and_fail(bench: Any, make_spec: Any, tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(b"s" * 8192)

    async def test() -> None:
        machine = await bench.embedded.create(
            make_spec(disks=[DISK, {"name": "base", "source": source, "size": "2M"}])
        )
        await machine.plug_disk(Disk(name="later", size=MIB))
        await machine.plug_nic(Nic(name="n", network="segment:lan"))
        await machine.resize(vcpus=2, memory=16 * MIB)
        await machine.resize_disk("base", 4 * MIB)
        at_rest = await machine.info()
        await machine.start()
        info = await machine.info()
        assert (info.disks, info.nics) == (at_rest.disks, at_rest.nics)
        assert [(disk.name, disk.size) for disk in info.disks] == [
            ("data", MIB), ("base", 4 * MIB), ("later", MIB),
        ]  # fmt: skip
        assert (info.vcpus, info.memory, info.nics[0].link) == (2, 16 * MIB, True)
        plugged = await machine.plug_disk(Disk(name="hot", source=source, readonly=True))
        assert (plugged.bus, plugged.size, plugged.path) == ("scsi", 8192, source)
        with pytest.raises(InvalidSpec):
            await machine.plug_disk(Disk(name="none", source=tmp_path / "none"))
        with pytest.raises(OperationFailed, match="is an image that is only read"):
            await machine.resize_disk("hot", MIB)
        with pytest.raises(UnsupportedOperation, match="hotplug-disk"):
            await machine.unplug_disk("data")
        grown = await machine.resize_disk("base", 8 * MIB)
        assert grown.size == 8 * MIB
        assert {each.name for each in (await machine.metrics()).disks} == {
            "data", "base", "later", "hot",
        }  # fmt: skip
        fault = await machine.inject(DiskError(disk="data", operation="any", errno="ENOSPC"))
        log = (Path(info.extra["launch"]) / "qmp.log").read_text()
        assert '"errno": 28' in log
        await machine.clear_fault(fault)
        await machine.inject(NetPartition(nic="n"))
        assert not (await machine.info()).nics[0].link
        await machine.inject(MemoryPressure(leave=4 * MIB))
        await machine.inject(PauseFault())
        assert machine.state is MachineState.PAUSED
        await machine.unplug_disk("hot")
        assert source.exists()
        await machine.kill()
        await machine.unplug_disk("base")
        assert listed(machine.disk_directory) == {
            "data.0.img", "later.0.img",
        }  # fmt: skip
        with pytest.raises(UnsupportedOperation, match="hotplug-nic"):
            await machine.start()
            await machine.plug_nic(Nic(name="m"))

    bench.run(test())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"boot": {}}, "boot.kernel"),
        ({"boot": {"image": "debian"}}, "boot.image"),
        ({"cpus": {"count": 4, "model": "max"}}, "cpus.model"),
        ({"cpus": {"count": 4, "cores": 2, "sockets": 2, "threads": 1}}, "cpus.sockets"),
        ({"consoles": [{"name": "a"}, {"name": "b"}]}, "consoles"),
        ({"memory": 8 * MIB + 512}, "memory.size"),
        ({"nics": [{"name": f"n{n}", "network": "none"} for n in range(24)]}, "nics|disks"),
        ({"architecture": "x86_64"}, "architecture"),
    ],
)
def test_what_the_engine_does_not_have_is_refused_before_anything_is_made(
    bench: Any, make_spec: Any, fields: dict[str, Any], named: str
) -> None:
    async def test() -> None:
        with pytest.raises((InvalidSpec, Exception), match=named):
            await bench.embedded.create(make_spec(**fields))
        assert await bench.embedded.list() == []

    bench.run(test())
    assert not (bench.lease.owner.directory / "machines").exists()


def test_a_guest_that_cannot_be_loaded_says_so(bench: Any, make_spec: Any, tmp_path: Path) -> None:
    async def test() -> None:
        spec = make_spec()
        machine = await bench.embedded.create(spec)
        assert spec.boot.kernel is not None
        spec.boot.kernel.unlink()
        with pytest.raises(OperationFailed, match=r"the engine did not start: .*status 2"):
            await machine.start()
        assert machine.state is MachineState.FAILED
        assert engines() == []

    bench.run(test())


@contextmanager
def another(store: Store, spec: Any) -> Iterator[int]:
    """A process that makes the store's machine and is killed; yields the machine's pid."""
    code = (
        "import asyncio, json, os, sys\n"
        "from pathlib import Path\n"
        "from vmlab.hypervisors.embedded import provider\n"
        "from vmlab.hypervisors.ownership import Home, Store\n"
        "from vmlab.machine.spec import MachineSpec\n"
        "async def main():\n"
        "    owner = Store.open(Home.open(Path(sys.argv[1]))).owner\n"
        "    hypervisor = provider.open(owner)\n"
        "    spec = MachineSpec.model_validate(json.loads(sys.argv[2]))\n"
        "    machine = await hypervisor.create(spec)\n"
        "    await machine.start()\n"
        "    print((await machine.info()).pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    home = store.owner.directory.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(home), json.dumps(spec.model_dump(mode="json"))],
        capture_output=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == -9, done.stderr.decode()
    pid = int(done.stdout)
    try:
        yield pid
    finally:
        for process in processes.adopt(store.owner):
            process.kill()


def test_a_stores_machine_is_found_again_by_another_process(store: Store, make_spec: Any) -> None:
    async def test(pid: int) -> None:
        async with provider.open(store.owner) as first, provider.open(store.owner) as second:
            (machine,), (seen,) = await first.list(), await second.list()
            assert machine.state is seen.state is MachineState.RUNNING
            assert (await machine.info()).pid == (await seen.info()).pid == pid
            async with asyncio.timeout(300), await machine.console() as console:
                await console.write(b"x")
                while b"x" not in await console.log():
                    await console.read()
            await seen.pause()
            assert (await machine.status()).state is MachineState.PAUSED
            await machine.resume()
            await machine.stop(graceful=False)
            # It saw the process end as well, and by whose doing it tells the record.
            told = await seen.status()
            assert (told.state, told.reason) == (MachineState.STOPPED, "stop")
        async with provider.open(store.owner) as third:
            (machine,) = await third.list()
            assert machine.state is MachineState.STOPPED
            await machine.delete()
            assert processes.adopt(store.owner) == []

    with another(store, make_spec(code=programs.ECHO)) as pid:
        asyncio.run(asyncio.wait_for(test(pid), 800))


def test_a_stores_machine_that_went_off_unseen_is_stopped(store: Store, make_spec: Any) -> None:
    # The character is typed by somebody who is not vmlab.
    code = UNTIL_TYPED + programs.end(programs.POWEROFF)

    async def test() -> None:
        async with provider.open(store.owner) as first:
            machine = await first.create(make_spec(code=code))
            await machine.start()
            launch = Path((await machine.info()).extra["launch"])
        from vmlab.hypervisors.qmp import QmpConnection, connect_socket

        with connect_socket(launch / "console-serial.sock") as console:
            console.send(b"x")
            async with await QmpConnection.open(launch / "qmp.sock") as qmp, asyncio.timeout(300):
                with qmp.listen("SHUTDOWN") as off:
                    if (await qmp.execute("query-status"))["status"] != "shutdown":
                        await off.wait()
        async with provider.open(store.owner) as second:
            (machine,) = await second.list()
            assert machine.state is MachineState.STOPPED
            await machine.delete()
        assert processes.adopt(store.owner) == []

    asyncio.run(asyncio.wait_for(test(), 800))
