"""The daemons of virtiofs shares: they end with QEMU, are found again with it, and leave nothing.

Their machines have no guest: quick.
"""

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

from vmlab.hypervisors import processes
from vmlab.hypervisors.ownership import Home, Store
from vmlab.hypervisors.qemu import provider, virtiofs
from vmlab.hypervisors.reaper import reap_dead_runs
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import OperationFailed, UnsupportedOperation
from vmlab.machine.events import EventType
from vmlab.machine.spec import MachineSpec, ShareKind
from vmlab.machine.states import MachineState

pytestmark = pytest.mark.skipif(
    virtiofs.why_not() is not None, reason=f"needs virtiofs: {virtiofs.why_not()}"
)


def shares_of(source: Path, *kinds: str) -> list[dict[str, Any]]:
    """A share of each kind, the first one writable."""
    return [
        {"tag": f"s{number}", "source": source, "target": f"/{number}", "readonly": number > 0}
        | {"kind": kind}
        for number, kind in enumerate(kinds)
    ]


def daemons_of(source: Path) -> list[psutil.Process]:
    """The processes that serve a directory, of whosever."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        serving = any(word.startswith("source=") and str(source) in word for word in words)
        if serving and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def parents(daemons: list[psutil.Process]) -> set[int]:
    """The pids of their parents; each may end just now."""
    found = set()
    for daemon in daemons:
        with suppress(psutil.NoSuchProcess):
            found.add(daemon.ppid())
    return found


async def becomes(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(150):
        while not is_so():  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)


def dead(pid: int) -> bool:
    """Whether a process that is nobody's child here has ended."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def left_in_run() -> set[str]:
    """What the daemon in C leaves where it is given a path instead of a socket."""
    directory = Path("/run/virtiofsd")
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()


def test_each_share_has_a_daemon_that_lives_as_long_as_its_machine_runs(
    bench: Any, make_spec: Any, tmp_path: Path
) -> None:
    before = left_in_run()

    async def test() -> None:
        kinds = ("virtiofs", "auto", "9p", "copy")
        machine = await bench.qemu.create(make_spec(shares=shares_of(tmp_path, *kinds[:3])))
        assert daemons_of(tmp_path) == []
        for _ in range(2):
            await machine.start()
            served = parents(daemons_of(tmp_path))
            assert len(served & {process.pid for process in machine.need().daemons.processes}) == 2
            await machine.restart(graceful=False)
            await machine.pause()
            await machine.resume()
            assert len(daemons_of(tmp_path)) >= 2
            await machine.stop(graceful=False)
            assert daemons_of(tmp_path) == []
            assert not list(machine.directory.rglob("*.sock"))
        await machine.start()
        await machine.delete(force=True)
        assert daemons_of(tmp_path) == []

    bench.run(test())
    assert left_in_run() == before


def test_what_cannot_be_saved_is_refused_by_name_and_the_rest_works(
    bench: Any, make_spec: Any, new_bench: Any, tmp_path: Path
) -> None:
    there = new_bench()

    async def test() -> None:
        machine = await bench.qemu.create(make_spec(shares=shares_of(tmp_path, "virtiofs")))
        await machine.start()
        for capability, call in (
            (Capability.MEMORY_SNAPSHOT, machine.snapshot("one")),
            (Capability.FORK, machine.fork("fork")),
            (Capability.LIVE_MIGRATION, machine.migrate(there.qemu)),
        ):
            with pytest.raises(UnsupportedOperation, match=capability.value) as refused:
                await call
            assert "('s0')" in str(refused.value.hint)
            assert 'the kind "9p"' in str(refused.value.hint)
        assert (await machine.status()).state is MachineState.RUNNING
        assert [other.name for other in await bench.qemu.list()] == [machine.name]
        taken = await machine.snapshot("disks", memory=False)
        copy = await bench.qemu.create_from(taken, "copy")
        await copy.start()
        await machine.kill()
        await machine.restore("disks")
        await machine.start()
        assert len(parents(daemons_of(tmp_path))) >= 2

    bench.run(test())
    bench.run(bench.qemu.close())
    assert daemons_of(tmp_path) == []


@pytest.mark.parametrize("part", ["leader", "server"])
def test_a_machine_that_loses_its_daemon_has_failed_and_says_why(
    bench: Any, make_spec: Any, tmp_path: Path, part: str
) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(make_spec(shares=shares_of(tmp_path, "virtiofs")))
        await machine.start()
        (leader,) = machine.need().daemons.processes
        await becomes(lambda: len(daemons_of(tmp_path)) == 2 or virtiofs.find_daemon().rust)
        others = [process.pid for process in daemons_of(tmp_path) if process.pid != leader.pid]
        os.kill(leader.pid if part == "leader" else [*others, leader.pid][0], signal.SIGKILL)
        await becomes(lambda: machine.state is MachineState.FAILED)
        assert "virtiofsd has ended" in machine.reason
        crashes = [e for e in await bench.qemu.events() if e.type is EventType.CRASHED]
        assert len(crashes) == 1
        await becomes(lambda: daemons_of(tmp_path) == [])
        await machine.start()
        assert (await machine.status()).state is MachineState.RUNNING

    bench.run(test())


def test_a_killed_qemu_takes_its_daemons_along_and_is_told_as_itself(
    bench: Any, make_spec: Any, tmp_path: Path
) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(make_spec(shares=shares_of(tmp_path, "virtiofs")))
        await machine.start()
        os.kill((await machine.info()).pid, signal.SIGKILL)
        await becomes(lambda: machine.state is MachineState.FAILED)
        assert "QEMU was killed by signal 9" in machine.reason
        await becomes(lambda: daemons_of(tmp_path) == [])

    bench.run(test())


def test_a_directory_that_is_not_there_is_told_with_what_was_said(
    bench: Any, make_spec: Any, tmp_path: Path
) -> None:
    async def test() -> None:
        gone = tmp_path / "gone"
        for readonly in (True, False):
            share = shares_of(gone, "virtiofs")[0] | {"readonly": readonly}
            machine = await bench.qemu.create(make_spec(f"m{readonly}", shares=[share]))
            with pytest.raises(OperationFailed, match=r"gone.*No such file"):
                await machine.start()
            assert machine.state is MachineState.FAILED
            assert daemons_of(gone) == []

    bench.run(test())


SCRIPT = """
import asyncio, sys
from pathlib import Path
from vmlab.hypervisors.ownership import Home, Run, Store
from vmlab.hypervisors.qemu import provider
from vmlab.machine.spec import MachineSpec

async def main():
    home = Home.open(Path(sys.argv[1]))
    lease = Run.begin(home, reap=False) if sys.argv[3] == "run" else Store.open(home)
    qemu = provider.open(lease.owner)
    for name in ("on", "unserved"):
        machine = await qemu.create(MachineSpec.of(
            name=name, architecture="x86_64", memory="32M", channels=(),
            shares=[{"tag": "s", "source": sys.argv[2], "target": "/s", "kind": "virtiofs",
                     "readonly": name == "on"}]))
        await machine.start()
        print(machine.need().daemons.processes[0].pid, flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


@pytest.fixture
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="vmlab-v-"))
    yield directory
    for process in processes.adopt(Store.open(Home.open(directory / "home")).owner):
        process.kill()
        asyncio.run(process.wait())
    shutil.rmtree(directory)


def started(place: Path, owner: str) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A process with two machines, and the pids of their daemons."""
    source = place / "source"
    source.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(place / "home"), str(source), owner],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    return process, [int(process.stdout.readline()) for _ in range(2)]


def test_nothing_is_left_of_a_killed_run(place: Path) -> None:
    process, _ = started(place, "run")
    assert daemons_of(place / "source")
    process.kill()
    process.communicate()
    asyncio.run(becomes(lambda: daemons_of(place / "source") == []))
    home = Home.open(place / "home")
    reap_dead_runs(home)
    assert not list((place / "home" / "runs").iterdir())


def test_a_stores_daemons_are_found_again_and_one_that_is_gone_is_noticed(place: Path) -> None:
    process, pids = started(place, "store")
    process.kill()
    process.communicate()
    os.kill(pids[1], signal.SIGKILL)

    async def test() -> None:
        await becomes(lambda: dead(pids[1]))
        async with provider.open(Store.open(Home.open(place / "home")).owner) as qemu:
            machines = {machine.name: machine for machine in await qemu.list()}
            assert machines["on"].state is MachineState.RUNNING
            assert [one.pid for one in machines["on"].need().daemons.processes] == [pids[0]]
            assert machines["unserved"].state is MachineState.FAILED
            with pytest.raises(UnsupportedOperation, match="fork"):
                await machines["on"].fork("fork")
            await machines["on"].kill()
            await becomes(lambda: daemons_of(place / "source") == [])
            for machine in machines.values():
                await machine.delete(force=True)

    asyncio.run(asyncio.wait_for(test(), 250))


def test_a_share_that_finds_its_own_way_has_9p_only_where_virtiofs_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = MachineSpec.of(name="m", shares=shares_of(tmp_path, "auto", "virtiofs", "9p"))
    assert spec.shares[0].kind is ShareKind.AUTO
    assert virtiofs.by_virtiofs(spec) == ("s0", "s1")
    monkeypatch.setattr(virtiofs, "why_not", lambda: "because")
    assert virtiofs.by_virtiofs(spec) == ("s1",)
