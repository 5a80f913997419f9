"""QEMU's processes: found again, killed, many at once. Their machines have no guest: quick."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.unit.engine.process import programs

from vmlab.hypervisors import processes
from vmlab.hypervisors.ownership import Home, Store
from vmlab.hypervisors.qemu import hotplug, provider
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qmp import QmpLost, QmpTimeout, connect_socket
from vmlab.machine.errors import (
    DeadlineExceeded,
    InvalidSpec,
    InvalidState,
    MachineCrashed,
    MachineNotFound,
    MigrationFailed,
    OperationAborted,
    OperationFailed,
    SnapshotNotFound,
    UnsupportedOperation,
    VmlabError,
)
from vmlab.machine.events import EventType
from vmlab.machine.faults import DiskSlow
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import Disk, MachineSpec, Nic
from vmlab.machine.states import MachineState

DISK = {"name": "data", "size": "1M"}


async def settled(machine: Any, timeout: float = 100) -> MachineState:
    deadline = asyncio.get_running_loop().time() + timeout
    while not machine.state.is_stable or machine.state is MachineState.RUNNING:
        assert asyncio.get_running_loop().time() < deadline, machine.state
        await asyncio.sleep(0.005)
    return machine.state


def listed(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.exists() else []


def qemu_processes(bench: Any) -> list[psutil.Process]:
    """Those of the test's run: other tests' machines may live in this process as well."""
    run = str(bench.lease.directory)
    found = []
    for process in psutil.Process().children(recursive=True):
        # Any of them may end just now.
        with suppress(psutil.NoSuchProcess):
            if "qemu-system" in process.name() and any(run in word for word in process.cmdline()):
                found.append(process)
    return found


async def until_dead(pid: int) -> None:
    """Wait until a process that was killed, and may be nobody's child here, has ended."""
    async with asyncio.timeout(100):
        with suppress(psutil.NoSuchProcess):
            while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.01)


def test_life_of_a_machine_leaves_its_logs_and_then_nothing(bench: Any, make_spec: Any) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(make_spec(disks=[DISK], nics=[{"name": "n"}]))
        at_rest = await machine.info()
        assert (at_rest.pid, at_rest.nics[0].link, at_rest.disks[0].size) == (None, True, MIB)
        with pytest.raises(InvalidState):
            await machine.metrics()
        await machine.start()
        info = await machine.info()
        assert info.nics[0].mac == at_rest.nics[0].mac
        launch = Path(info.extra["launch"])
        assert "qemu-system-x86_64" in (launch / "command-line").read_text()
        assert "query-status" in (launch / "qmp.log").read_text()
        await machine.pause()
        assert (await machine.status()).state is MachineState.PAUSED
        await machine.resume()
        await machine.restart(graceful=False)
        await machine.stop(graceful=False)
        left = {path.name for path in listed(launch)}
        assert left == {"command-line", "qemu.log", "qmp.log"}
        for _ in range(6):
            await machine.start()
            await machine.kill()
        assert listed(launch) == []
        await machine.delete()
        await machine.delete()
        assert not machine.directory.exists()
        assert qemu_processes(bench) == []

    bench.run(test())


def test_machine_at_rest_is_changed_saved_and_brought_back(bench: Any, make_spec: Any) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(make_spec(disks=[DISK]))
        await machine.snapshot("empty")
        await machine.plug_disk(Disk(name="more", size=MIB, bus="scsi"))
        await machine.plug_nic(Nic(name="n", network="none"))
        await machine.resize_disk("data", 2 * MIB)
        resized = await machine.resize(vcpus=2, memory=64 * MIB)
        assert (resized.vcpus, resized.memory) == (2, 64 * MIB)
        await machine.pin({0: (0,)})
        at_rest = await machine.info()
        await machine.start()
        live = await machine.info()
        for info in (at_rest, live):
            assert (info.vcpus, info.memory) == (2, 64 * MIB)
            assert [(disk.name, disk.size, disk.bus) for disk in info.disks] == [
                ("data", 2 * MIB, "virtio"),
                ("more", MIB, "scsi"),
            ]
            assert not info.nics[0].link
        assert live.nics[0].mac == at_rest.nics[0].mac
        await machine.kill()
        await machine.unplug_disk("more")
        await machine.unplug_nic("n")
        await machine.restore("empty")
        assert machine.state is MachineState.STOPPED
        assert [disk.size for disk in (await machine.info()).disks] == [MIB]
        copy = await bench.qemu.create_from((await machine.snapshots())[0], "copy")
        assert copy.state is MachineState.STOPPED
        await copy.start()
        await machine.delete()
        with pytest.raises(SnapshotNotFound):
            await bench.qemu.create_from(await _snapshot_of(copy), "other")

    async def _snapshot_of(machine: Any) -> Any:
        taken = await machine.snapshot("gone", memory=False)
        await machine.delete_snapshot("gone")
        return taken

    bench.run(test())


def test_numa_nodes_topology_display_and_virtio_console_are_built(
    bench: Any, make_spec: Any
) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(
            make_spec(
                cpus={"count": 4, "sockets": 2, "cores": 2},
                memory={
                    "size": "64M",
                    "nodes": [
                        {"memory": "48M", "cpus": [0, 1]},
                        {"memory": "16M", "cpus": [2, 3]},
                    ],
                },
                consoles=[{"name": "a"}, {"name": "b"}, {"name": "c", "kind": "virtio"}],
                channels=["x", "y"],
                display=True,
            )
        )
        await machine.start()
        info = await machine.info()
        assert [(node.memory, node.cpus) for node in info.nodes] == [
            (48 * MIB, (0, 1)),
            (16 * MIB, (2, 3)),
        ]
        assert (info.consoles, info.channels) == (("a", "b", "c"), ("x", "y"))
        await machine.snapshot("one")
        fork = await machine.fork("fork")
        assert (await fork.info()).nodes == info.nodes
        await machine.restore("one")
        assert (await machine.info()).nodes == info.nodes

    bench.run(test())


def test_paused_machine_is_forked_from_one_template_and_whole_states_work(
    bench: Any, make_spec: Any
) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(make_spec(disks=[DISK]))
        await machine.start()
        await machine.pause()
        forks = [await machine.fork(f"fork{number}") for number in range(3)]
        assert {fork.state for fork in forks} == {MachineState.PAUSED}
        assert len(list(machine.directory.glob("state"))) == 1
        # A fork's memory is mapped privately: its own state has all of it.
        again = await forks[0].fork("again")
        assert (await again.status()).state is MachineState.PAUSED
        await again.resume()
        taken = await forks[1].snapshot("whole")
        assert taken.memory
        await forks[1].restore("whole")
        assert (await forks[1].status()).state is MachineState.PAUSED
        await machine.resume()
        assert not list(machine.directory.glob("state"))

    bench.run(test())


def test_wrong_specifications_are_refused_before_anything_is_made(
    bench: Any, make_spec: Any, tmp_path: Path
) -> None:
    async def test() -> None:
        with pytest.raises(InvalidSpec, match=r"boot\.image"):
            await bench.qemu.create(make_spec(boot="some-image"))
        with pytest.raises(InvalidSpec, match="at most 4 serial ones"):
            await bench.qemu.create(make_spec(consoles=[{"name": f"c{n}"} for n in range(5)]))
        with pytest.raises(InvalidSpec, match="an image that can be read"):
            await bench.qemu.create(
                make_spec(disks=[DISK, {"name": "b", "source": tmp_path / "none"}])
            )
        assert bench.qemu.records.ids() == []
        assert await bench.qemu.list() == []

    bench.run(test())


def test_qemu_that_does_not_start_says_why_and_the_machine_failed(
    bench: Any, make_spec: Any
) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(make_spec(cpus={"count": 1, "model": "no-such-cpu"}))
        with pytest.raises(OperationFailed, match="no-such-cpu") as caught:
            await machine.start()
        assert "command-line" in str(caught.value.hint)
        assert machine.state is MachineState.FAILED
        assert qemu_processes(bench) == []
        broken = await bench.qemu.create(
            make_spec("tap", nics=[{"name": "n", "network": "bridge:no-such-bridge"}])
        )
        with pytest.raises(OperationFailed):
            await broken.start()
        assert broken.state is MachineState.FAILED

    bench.run(test())


def test_a_qemu_that_does_not_answer_is_told_with_what_it_is_at(bench: Any, make_spec: Any) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(make_spec())
        await machine.start()
        process = machine.emulator.process
        assert process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)  # noqa: ASYNC222 (on purpose)
        stopped = rf"no answer within 0.2 s; process {process.pid}: qemu-system-x86 is stopped"
        with pytest.raises(QmpTimeout, match=stopped):
            await machine.emulator.execute("query-status", timeout=0.2)
        assert process.send_signal(signal.SIGCONT)

    bench.run(test())


def test_riscv_machines_refuse_what_their_guests_cannot_do(bench: Any, make_spec: Any) -> None:
    async def test() -> None:
        spec = make_spec(architecture="riscv64", memory="64M", disks=[DISK], nics=[{"name": "n"}])
        machine = await bench.qemu.create(spec)
        await machine.start()
        assert (await machine.info()).architecture.value == "riscv64"
        plugged = await machine.plug_disk(Disk(name="hot", size=MIB))
        assert plugged.bus == "scsi"
        await machine.unplug_disk("hot")
        with pytest.raises(UnsupportedOperation, match="hotplug-disk"):
            await machine.unplug_disk("data")
        for call in (machine.plug_nic(Nic(name="m")), machine.unplug_nic("n")):
            with pytest.raises(UnsupportedOperation, match="hotplug-nic"):
                await call
        with pytest.raises(UnsupportedOperation):
            await machine.inject(DiskSlow(disk="data", delay=1))
        with pytest.raises(DeadlineExceeded):
            await machine.stop(kill=False, timeout=2.3)
        assert machine.state is MachineState.RUNNING

    bench.run(test())


def test_unplugging_waits_for_the_guest_and_gives_up_in_time(bench: Any, make_spec: Any) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(make_spec(disks=[DISK]))
        await machine.start()
        await machine.plug_disk(Disk(name="hot", size=MIB))
        await machine.pause()
        with pytest.raises(InvalidState, match="has to be created or running or stopped"):
            await machine.unplug_disk("hot")
        await machine.resume()
        # Nobody runs in the guest who could let go of it.
        with pytest.raises(DeadlineExceeded):
            await machine.unplug_disk("hot", timeout=5.5)
        assert len((await machine.info()).disks) == 2

    bench.run(test())


def test_nodes_that_hang_a_guest_are_refused_before_anything_is_made(
    bench: Any, make_spec: Any
) -> None:
    nodes = [{"memory": 128 * MIB, "cpus": (0,)}, {"memory": 128 * MIB, "cpus": (1,)}]
    memory = {"size": 256 * MIB, "nodes": nodes}
    spec = make_spec(architecture="riscv64", cpus=2, memory=memory)
    with pytest.raises(UnsupportedOperation, match="numa"):
        bench.run(bench.qemu.create(spec))
    assert bench.run(bench.qemu.list()) == []


def test_machine_that_is_said_to_have_failed_can_be_started_at_once(
    bench: Any, make_spec: Any
) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(make_spec())
        for crashes in (1, 2):
            await machine.start()
            pid = (await machine.info()).pid
            os.kill(pid, signal.SIGKILL)
            # It has ended, and nothing here could notice that yet.
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 (on purpose)
            assert (await machine.status()).state is MachineState.FAILED
            told = [event.type for event in await bench.qemu.events()]
            assert told.count(EventType.CRASHED) == crashes
        await machine.start()
        assert machine.state is MachineState.RUNNING

    bench.run(test())


@pytest.mark.parametrize("moment", range(10))
def test_killed_at_any_moment_leaves_a_failed_machine_and_nothing_else(
    bench: Any, make_spec: Any, moment: int
) -> None:
    operations: tuple[Callable[[Any], Any], ...] = (
        lambda m: m.start(),
        lambda m: m.pause(),
        lambda m: m.snapshot("one"),
        lambda m: m.fork("fork"),
        lambda m: m.plug_disk(Disk(name="hot", size=MIB)),
        lambda m: m.unplug_disk("data"),
        lambda m: m.restore("zero"),
        lambda m: m.restart(graceful=False),
        lambda m: m.resize_disk("data", 2 * MIB),
        lambda m: asyncio.sleep(0),
    )

    async def killer(machine: Any) -> None:
        """Kill the first process that the operation has, once QMP was spoken to it."""
        async with asyncio.timeout(100):
            while True:
                for process in processes.adopt(bench.lease.owner, machine.id):
                    listens = machine.launch_directory(machine.launches) / "qmp.sock"
                    if listens.exists() and process.kill():
                        await process.wait()
                        return
                await asyncio.sleep(0.0005)

    async def test() -> None:
        machine = await bench.qemu.create(make_spec(disks=[DISK]))
        if moment:
            await machine.start()
        if moment == 6:
            await machine.snapshot("zero", memory=True)
        doing = asyncio.create_task(operations[moment](machine))
        if moment:
            await asyncio.sleep(0.002 * moment)
        await killer(machine)
        try:
            await doing
        except VmlabError as error:
            assert error.message
        state = (await machine.status()).state
        assert state in {MachineState.FAILED, MachineState.RUNNING, MachineState.STOPPED}
        left = qemu_processes(bench)
        assert len(left) == len(
            [other for other in await bench.qemu.list() if other.state is MachineState.RUNNING]
        )
        if state is MachineState.RUNNING:
            assert moment in {3, 6}, "only what has another process can live on"
        names = {path.name for path in machine.snapshot_directory.iterdir()}
        assert names <= {"one", "zero"}
        await machine.delete(force=True)

    bench.run(test())


def test_operations_cancelled_at_any_moment_leave_the_machine_as_it_was(
    bench: Any, make_spec: Any
) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(make_spec(disks=[DISK]))
        await machine.start()
        zero = await machine.snapshot("zero")
        for make in (
            lambda: machine.snapshot("one"),
            lambda: machine.fork("fork"),
            lambda: machine.restore("zero"),
            lambda: bench.qemu.create_from(zero, "copy"),
        ):
            for delay in (0.0, 0.01, 0.03, 0.06):
                doing = asyncio.create_task(make())
                await asyncio.sleep(delay)
                doing.cancel()
                await asyncio.wait([doing])
                assert machine.state is MachineState.RUNNING
                assert (await machine.status()).state is MachineState.RUNNING
                for other in await bench.qemu.list():
                    if other is not machine:
                        await other.delete(force=True)
                if len(await machine.snapshots()) > 1:
                    await machine.delete_snapshot("one")
                assert [p.name for p in machine.snapshot_directory.iterdir()] == ["zero"]
                assert len(qemu_processes(bench)) == 1
                assert len(list(machine.disk_directory.iterdir())) == 1

    bench.run(test())


def test_eight_machines_start_at_once(bench: Any, make_spec: Any) -> None:
    async def test() -> None:
        machines = await asyncio.gather(
            *(bench.qemu.create(make_spec(f"m{number}")) for number in range(8))
        )
        await asyncio.gather(*(machine.start() for machine in machines))
        infos = await asyncio.gather(*(machine.info() for machine in machines))
        assert len({info.pid for info in infos}) == 8
        assert [info.name for info in infos] == [f"m{number}" for number in range(8)]

    bench.run(test())
    assert len(qemu_processes(bench)) == 8


def test_two_runs_with_the_same_names_do_not_meet(new_bench: Any, make_spec: Any) -> None:
    first, second = new_bench(), new_bench()
    spec = make_spec(disks=[DISK], nics=[{"name": "n", "network": "segment:lan"}])
    try:
        one = first.run(first.qemu.create(spec))
        two = second.run(second.qemu.create(spec))
        first.run(one.start())
        second.run(two.start())
        assert one.directory != two.directory
        with pytest.raises(MachineNotFound):
            second.run(second.qemu.get(one.id))
        first.close()
        assert second.run(two.status()).state is MachineState.RUNNING
    finally:
        second.close()


# ------------------------------------------------------------------- stores


@pytest.fixture
def store() -> Iterator[Store]:
    directory = Path(tempfile.mkdtemp(prefix="vmlab-s-"))
    store = Store.open(Home.open(directory))
    yield store
    for process in processes.adopt(store.owner):
        process.kill()
        asyncio.run(process.wait())
    shutil.rmtree(directory)


SCRIPT = """
import asyncio, sys
from pathlib import Path
from vmlab.hypervisors.ownership import Home, Store
from vmlab.hypervisors.qemu import hotplug, provider
from vmlab.machine.spec import MachineSpec

async def main():
    qemu = provider.open(Store.open(Home.open(Path(sys.argv[1]))).owner)
    for name in ("on", "paused", "off", "killed"):
        machine = await qemu.create(MachineSpec.of(
            name=name, architecture="x86_64", memory="32M", disks=[{"name": "d", "size": "1M"}]))
        if name != "off":
            await machine.start()
        if name == "paused":
            await machine.pause()
        print((await machine.info()).pid, flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


def test_machines_of_a_store_outlive_a_killed_process_and_are_found_again(store: Store) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(store.home.directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert starter.stdout is not None
    pids = [starter.stdout.readline().decode().strip() for _ in range(4)]
    starter.kill()
    starter.communicate()
    os.kill(int(pids[3]), signal.SIGKILL)

    async def test() -> None:
        await until_dead(int(pids[3]))
        async with provider.open(store.owner) as qemu:
            machines = {machine.name: machine for machine in await qemu.list()}
            assert {name: machine.state.value for name, machine in machines.items()} == {
                "on": "running",
                "paused": "paused",
                "off": "created",
                "killed": "failed",
            }
            assert (await machines["on"].info()).pid == int(pids[0])
            adopted = [e for e in await qemu.events() if e.type is EventType.ADOPTED]
            assert len(adopted) == 4
            await machines["paused"].resume()
            await machines["on"].snapshot("one")
            os.kill(int(pids[0]), signal.SIGKILL)
            assert await settled(machines["on"]) is MachineState.FAILED
            await machines["killed"].delete()
        assert psutil.pid_exists(int(pids[1]))
        async with provider.open(store.owner) as qemu:
            assert [machine.name for machine in await qemu.list()] == ["off", "on", "paused"]
            await (await qemu.get("on")).restore("one")
            for machine in await qemu.list():
                await machine.delete(force=True)

    asyncio.run(asyncio.wait_for(test(), 250))


def test_store_that_another_process_talks_to_and_a_damaged_record_are_told(store: Store) -> None:
    from vmlab.hypervisors.monitored import emulator

    async def test() -> None:
        async with provider.open(store.owner) as first:
            machine = await first.create(_bare("busy"))
            await machine.start()
            async with provider.open(store.owner) as second:
                (seen,) = await second.list()
                # It is there for both, and what one does the other sees.
                assert seen.state is MachineState.RUNNING
                await seen.pause()
                assert (await machine.status()).state is MachineState.PAUSED
                assert (await seen.info()).pid == (await machine.info()).pid
                await machine.resume()
                assert (await seen.status()).state is MachineState.RUNNING
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(emulator, "_ADOPTION_TIMEOUT", 0.5)
                    async with provider.open(store.owner) as third:
                        (unseen,) = await third.list()
                        assert unseen.state is MachineState.UNKNOWN
                        assert "two other processes use the machine" in unseen.reason
                # It saw the process end as well, and by whose doing it tells the record.
                await machine.kill()
                told = await seen.status()
                assert (told.state, told.reason) == (MachineState.STOPPED, "kill")
                await machine.start()
            # A process that has let go of it makes room for the next one.
            async with provider.open(store.owner) as fourth:
                assert [each.state for each in await fourth.list()] == [MachineState.RUNNING]
            await machine.delete(force=True)
        broken = machine.qemu.records.create("0" * 32)
        (broken / "machine.json").write_text('{"spec": {"name": "x"}}')
        async with provider.open(store.owner) as third:
            with pytest.raises(OperationFailed, match="is damaged"):
                await third.list()

    asyncio.run(asyncio.wait_for(test(), 250))


READY = b"\x07"
"""What no firmware prints."""
UNTIL_TYPED = (
    programs.number(programs.T0, 0x1000_0000)
    # Firmware's last character may be on its way.
    + programs.word("lbu", rd=programs.T1, rs1=programs.T0, imm=5)
    + programs.word("andi", rd=programs.T1, rs1=programs.T1, imm=0x20)
    + programs.word("beq", rs1=programs.T1, rs2=0, imm=-8)
    + programs.number(programs.T1, READY[0])
    + programs.word("sb", rs1=programs.T0, rs2=programs.T1)
    + programs.word("lbu", rd=programs.T1, rs1=programs.T0, imm=5)
    + programs.word("andi", rd=programs.T1, rs1=programs.T1, imm=1)
    + programs.word("beq", rs1=programs.T1, rs2=0, imm=-8)
)
"""What comes after it is done when a character is typed: this board has its UART and its system
controller where the engine's board has them."""
ENDS = pytest.mark.parametrize(
    ("code", "state", "event"),
    [
        (programs.end(programs.POWEROFF), MachineState.STOPPED, EventType.GUEST_SHUTDOWN),
        (programs.end(programs.FAIL | 1 << 16), MachineState.FAILED, EventType.CRASHED),
    ],
    ids=["poweroff", "fail"],
)


def say(text: bytes) -> bytes:
    """Print, and wait for each character to be taken."""
    return b"".join(
        programs.word("lbu", rd=programs.T1, rs1=programs.T0, imm=5)
        + programs.word("andi", rd=programs.T1, rs1=programs.T1, imm=0x20)
        + programs.word("beq", rs1=programs.T1, rs2=0, imm=-8)
        + programs.number(programs.T1, character)
        + programs.word("sb", rs1=programs.T0, rs2=programs.T1)
        for character in text
    )


def riscv64(directory: Path, code: bytes) -> MachineSpec:
    """A machine whose kernel is `code`."""
    kernel = directory / "kernel.bin"
    kernel.write_bytes(code)
    return MachineSpec.of(
        name="code", architecture="riscv64", memory="64M", channels=[], boot={"kernel": kernel}
    )


async def until_ready(machine: Any) -> None:
    """Wait until what is typed comes to the guest, past its firmware."""
    async with asyncio.timeout(150), await machine.console() as console:
        while READY not in await console.log():
            await console.read()


def test_a_disk_goes_from_a_guest_in_a_loop_however_late_it_is_asked_for(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # QEMU waits for the guest by then, which it would for ever.
    monkeypatch.setattr(hotplug, "_RELEASE_S", 0.3)
    loop = (
        programs.number(programs.T0, 0x1000_0000) + say(READY) + programs.word("jal", rd=0, imm=0)
    )

    async def test() -> None:
        machine = await bench.qemu.create(riscv64(tmp_path, loop))
        await machine.start()
        await until_ready(machine)
        for _ in range(2):
            await machine.plug_disk(Disk(name="hot", size=MIB))
            await machine.unplug_disk("hot")
        assert (await machine.status()).state is MachineState.RUNNING

    bench.run(test())


@ENDS
def test_a_guest_that_ends_by_itself_is_told(
    bench: Any, tmp_path: Path, code: bytes, state: MachineState, event: EventType
) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(riscv64(tmp_path, UNTIL_TYPED + code))
        await machine.start()
        await until_ready(machine)
        async with await machine.console() as console:
            await console.write(b"x")
        assert await settled(machine) is state
        assert event in {each.type for each in await bench.qemu.events()}
        assert (await machine.status()).state is state

    bench.run(test())


@pytest.mark.parametrize(
    ("said", "event", "state"),
    [
        (
            b"\r\n[    1.5] Kernel panic - not syncing: no disk\r\n",
            EventType.GUEST_PANIC,
            MachineState.FAILED,
        ),
        (b"\r\n[    1.5] reboot: Restarting\r\n", EventType.GUEST_RESET, MachineState.RUNNING),
    ],
    ids=["after a panic", "for no such reason"],
)
def test_a_guest_that_restarts_has_failed_if_it_panicked_and_nothing_else_tells_so(
    bench: Any, tmp_path: Path, said: bytes, event: EventType, state: MachineState
) -> None:
    async def test() -> None:
        code = UNTIL_TYPED + say(said) + programs.end(programs.REBOOT)
        machine = await bench.qemu.create(riscv64(tmp_path, code))
        await machine.start()
        await until_ready(machine)
        async with await machine.console() as console:
            await console.write(b"x")
        found = None
        async for found in bench.qemu.subscribe(0):
            if found.type in {EventType.GUEST_PANIC, EventType.GUEST_RESET}:
                break
        assert found is not None
        assert found.type is event
        await machine.ended()
        assert (await machine.status()).state is state
        if state is MachineState.FAILED:
            assert machine.reason == "no disk"

    bench.run(test())


@ENDS
def test_a_guest_that_ends_before_start_returns_spoils_the_start(
    bench: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: bytes,
    state: MachineState,
    event: EventType,
) -> None:
    let = Emulator.execute

    async def slowly(self: Emulator, command: str, *rest: Any, **named: Any) -> Any:
        """Let the vCPUs run, and learn of that only when the guest has ended."""
        if command != "cont":
            return await let(self, command, *rest, **named)
        # QEMU's riscv board before 8.2 tells of no event, and ends.
        with self.qmp.listen("SHUTDOWN") as ended:
            found = await let(self, command, *rest, **named)
            with suppress(QmpLost):
                await ended.wait(150)
        return found

    monkeypatch.setattr(Emulator, "execute", slowly)

    async def test() -> None:
        machine = await bench.qemu.create(riscv64(tmp_path, code))
        error = OperationAborted if state is MachineState.STOPPED else MachineCrashed
        with pytest.raises(error, match="start failed") as failed:
            await machine.start()
        assert type(failed.value) is error
        assert machine.state is state
        assert event in {each.type for each in await bench.qemu.events()}

    bench.run(test())


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
@pytest.mark.parametrize("how", ["poweroff", "kill"])
def test_how_another_processes_child_ended_is_known(
    store: Store, tmp_path: Path, how: str, seen: bool
) -> None:
    async def test() -> None:
        async with provider.open(store.owner) as first:
            machine = await first.create(
                riscv64(tmp_path, UNTIL_TYPED + programs.end(programs.POWEROFF))
            )
            await machine.start()
            await until_ready(machine)
            info = await machine.info()
            launch = Path(info.extra["launch"])
        # From now on it is as good as somebody else's, whose status nobody here is told.
        (key,) = [key for key, child in processes._children.items() if child.pid == info.pid]
        child = processes._children.pop(key)
        async with provider.open(store.owner) as second:
            if seen:
                found = await second.get("code")
                assert found.state is MachineState.RUNNING
                if how == "poweroff":
                    async with await found.console() as console:
                        await console.write(b"x")
            elif how == "poweroff":
                with connect_socket(launch / "console-serial.sock") as line:
                    line.send(b"x")
                    await asyncio.to_thread(child.wait, 150)
            if how == "kill":
                child.kill()
            await asyncio.to_thread(child.wait, 150)
            found = await second.get("code")
            await settled(found)
            assert found.state is (MachineState.FAILED if how == "kill" else MachineState.STOPPED)
            await found.delete()

    asyncio.run(asyncio.wait_for(test(), 250))


def _bare(name: str) -> MachineSpec:
    return MachineSpec.of(name=name, architecture="x86_64", memory="32M", channels=[])


def test_cold_migration_takes_disks_and_snapshots_along(new_bench: Any, make_spec: Any) -> None:
    here, there = new_bench(), new_bench()

    async def test() -> None:
        machine = await here.qemu.create(make_spec(disks=[DISK]))
        await machine.snapshot("one")
        told: list[int] = []
        moved = await machine.migrate(there.qemu, progress=lambda sent, total: told.append(sent))
        assert told == [MIB]
        assert moved.state is MachineState.CREATED
        await moved.restore("one")
        await moved.start()
        assert await here.qemu.list() == []
        with pytest.raises(MigrationFailed):
            moved.qemu.records.create  # noqa: B018 (the directory is made below)
            here.qemu.records.create(moved.id)
            await moved.migrate(here.qemu)
        assert (await moved.status()).state is MachineState.RUNNING
        await there.qemu.close()
        await here.qemu.close()

    here.run(test())
    for bench in (here, there):
        bench.lease.close()
