"""`vmlab simulate` as a real process: kill -9 of either side, and what becomes of the machines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.simulated import provider
from vmlab.machine.errors import HypervisorUnavailable, MachineNotFound
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

SPEC = MachineSpec.of(
    name="vm", memory="64M", disks=[{"name": "d", "size": "1M"}], channels=["vmlab.probe"]
)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmlab-t-") as name:
        yield Path(name)


@contextmanager
def simulate(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, object]]]:
    """A running `vmlab simulate` and what it said of itself; it is gone afterwards."""
    command = [sys.executable, "-m", "vmlab", "simulate", "--json", "--clock", "virtual"]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            said = ""
            while not said.endswith("}\n"):
                line = server.stdout.readline()
                if not line:
                    raise RuntimeError(f"it ended at once: {server.wait()}")
                said += line
            yield server, json.loads(said)
        finally:
            if server.poll() is None:
                server.terminate()
                server.wait(120)


def client(path: Path, kind="run", owner="r"):
    return provider.open(Owner(kind, owner, Path("/nonexistent")), {"socket": str(path)})


async def ask(machine, do, **arguments):
    async with await machine.channel("vmlab.probe") as channel:
        await channel.write(json.dumps({"id": 1, "do": do, **arguments}).encode() + b"\n")
        return json.loads(await channel.read())["result"]


def test_a_server_killed_with_a_store_comes_back_with_its_machines(folder):
    path, arguments = folder / "s", ("--socket", str(folder / "s"), "--store", str(folder / "st"))

    async def first(server):
        hv = client(path, "store", "s")
        machine = await hv.create(SPEC)
        await machine.start()
        await ask(machine, "write_disk", disk="d", offset=0, data="bb")
        await ask(machine, "write_memory", offset=0, data="aa")
        await machine.snapshot("s")
        run = client(path)
        await run.create(SPEC)
        server.kill()
        server.wait()
        with pytest.raises(HypervisorUnavailable):
            await machine.status()
        assert machine.state is MachineState.UNKNOWN
        await run.close()
        return hv, machine

    async def second():
        hv = client(path, "store", "s")
        (machine,) = await hv.list()
        assert machine.state is MachineState.RUNNING
        assert await ask(machine, "read_disk", disk="d", offset=0, length=1) == "bb"
        assert await ask(machine, "read_memory", offset=0, length=1) == "aa"
        assert [kept.name for kept in await machine.snapshots()] == ["s"]
        run = client(path)
        assert await run.list() == [], "a run's machines died with the server"
        await run.close()
        await machine.delete(force=True)
        await hv.close()

    async def whole():
        with simulate(*arguments) as (server, _):
            hv, machine = await first(server)
        assert path.exists(), "nobody could remove the socket of a server that was killed"
        with simulate(*arguments):
            # The same client, and the same machine object, go on with the new server.
            assert (await machine.status()).state is MachineState.RUNNING
            await hv.close()
            await second()
        assert not path.exists()

    asyncio.run(whole())
    assert [item.name for item in (folder / "st" / "store-s").iterdir()] == ["lock"]


def test_a_server_killed_without_a_store_comes_back_honestly_empty(folder):
    path = folder / "s"

    async def whole():
        with simulate("--socket", str(path)) as (server, _):
            hv = client(path, "store", "s")
            machine = await hv.create(SPEC)
            server.kill()
            server.wait()
            # A call before the client has heard of it would fail, as it should.
            await asyncio.sleep(0.2)
        with simulate("--socket", str(path)):
            assert await hv.list() == []
            with pytest.raises(MachineNotFound):
                await machine.status()
            await hv.close()

    asyncio.run(whole())


CLIENT = """
import asyncio, sys
from pathlib import Path
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.simulated import provider
from vmlab.machine.spec import MachineSpec

async def main():
    hv = provider.open(Owner(sys.argv[2], "x", Path("/nonexistent")), {"socket": sys.argv[1]})
    machine = await hv.create(MachineSpec.of(name="left", memory="64M"))
    await machine.start()
    print("running", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@contextmanager
def begun_client(path: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """Another process with a machine that runs."""
    command = [sys.executable, "-c", CLIENT, str(path), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "running\n"
        yield other


@pytest.mark.parametrize(("kind", "survives"), [("run", False), ("store", True)])
def test_a_client_that_is_killed_leaves_a_stores_machines_and_no_runs(folder, kind, survives):
    path = folder / "s"

    async def whole():
        with simulate("--socket", str(path)):
            with begun_client(path, kind) as other:
                hv = client(path, kind, "x") if survives else client(path, "run", "watcher")
                await hv.list()
                other.kill()
                other.wait()
            if survives:
                assert [machine.name for machine in await hv.list()] == ["left"]
                assert (await hv.get("left")).state is MachineState.RUNNING
            else:
                again = client(path, "run", "x")
                async with asyncio.timeout(100):
                    # The server learns of the death by the end of the connection.
                    while await again.list():
                        await again.close()
                        again = client(path, "run", "x")
                        await asyncio.sleep(0.05)
                await again.close()
            await hv.close()

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_it_ends_cleanly_and_takes_its_own_directory_along(number, status):
    with simulate("--seed", "5", "--profile", "performance") as (server, said):
        path = Path(str(said["socket"]))
        assert path.exists()
        assert (said["seed"], said["profile"], said["clock"]) == (5, "performance", "virtual")
        server.send_signal(number)
        assert server.wait(120) == status
        assert not path.parent.exists()


def test_two_servers_do_not_share_a_socket_or_a_store(folder):
    path = folder / "s"
    with simulate("--socket", str(path), "--store", str(folder / "st")):
        done = subprocess.run(
            [sys.executable, "-m", "vmlab", "simulate", "--socket", str(path)],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 4
        assert "another process listens" in done.stderr and "hint:" in done.stderr

        async def same_store():
            one = client(path, "store", "s")
            await one.create(SPEC)
            with simulate("--socket", str(folder / "t"), "--store", str(folder / "st")):
                other = client(folder / "t", "store", "s")
                with pytest.raises(HypervisorUnavailable, match="in use"):
                    await other.list()
                await other.close()
            await one.close()

        asyncio.run(same_store())


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--profile", "standart"], 2, "one of standard, performance, unreliable"),
        (["--clock", "moon"], 2, "moon"),
        (["--socket", "/nonexistent/dir/s"], 4, "cannot listen"),
    ],
)
def test_a_users_mistake_is_told_without_a_traceback(arguments, status, told):
    done = subprocess.run(
        [sys.executable, "-m", "vmlab", "simulate", *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == status
    assert told in done.stderr
    assert "Traceback" not in done.stderr


RUN = """
import asyncio, sys
from pathlib import Path
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.simulated import provider
from vmlab.machine.errors import VmlabError
from vmlab.machine.spec import MachineSpec

async def life(hv, name):
    try:
        machine = await hv.create(MachineSpec.of(name=name, memory="64M", labels={"a": "b"}))
        await machine.start()
        fork = await machine.fork(name + "-fork")
        await asyncio.gather(machine.restart(), fork.kill())
        await machine.delete(force=True)
    except VmlabError as error:
        print(error, error.hint)

async def main(hv):
    await asyncio.gather(*(life(hv, f"vm{number}") for number in range(30)))
    print(hv.trace())
    await hv.close()

owner = Owner("run", sys.argv[1], Path("/nonexistent"))
hv = provider.open(owner, {"profile": "unreliable", "seed": "12"})
with asyncio.Runner(loop_factory=hv.loop_factory()) as runner:
    runner.run(main(hv))
"""


def test_two_fresh_processes_give_the_same_trace_byte_for_byte():
    outputs = []
    for hash_seed, owner in (("1", "one"), ("2", "another")):
        # Unbuffered, Python drops the rest of what a pipe takes in part, interrupted by the host.
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(RUN), owner],
            capture_output=True, env=environment, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert b"seed 12" in outputs[0], "a failure tells the seed"
    assert outputs[0].count(b"\n") > 500
