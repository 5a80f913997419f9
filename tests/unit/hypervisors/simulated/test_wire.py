"""The contract over a socket: the same results, errors and ends as in one process."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import socket as sockets
import stat
import tempfile
from pathlib import Path

import pytest

from vmlab.hypervisors.base import Hypervisor, Machine
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.simulated import provider
from vmlab.hypervisors.simulated.client import (
    RemoteConsole,
    RemoteMachine,
    RemoteSimulatedHypervisor,
)
from vmlab.hypervisors.simulated.profile import SimulationProfile
from vmlab.hypervisors.simulated.server import SimulationServer, listen
from vmlab.hypervisors.simulated.wire import HYPERVISOR_METHODS, MACHINE_METHODS, decode, plain
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import (
    ChannelClosed,
    HypervisorUnavailable,
    InvalidSpec,
    InvalidState,
    MachineExists,
    MachineNotFound,
    ResourceNotFound,
    SnapshotNotFound,
    UnsupportedOperation,
    VmlabError,
)
from vmlab.machine.events import EventType
from vmlab.machine.faults import KillFault
from vmlab.machine.spec import Disk, Nic
from vmlab.machine.states import MachineState


@pytest.fixture
def served(profile):
    """Runs a body beside a server in the same process, on the wall clock.

    Latencies are zero but for what a test gives; the body gets a function that opens clients.
    """

    def run(body, *, store=None, **latency):
        nothing = dict.fromkeys(SimulationProfile().latency.model_dump(), 0.0)
        server = SimulationServer(
            profile(latency={**nothing, **latency}), seed=1, clock="wall", store=store
        )

        async def whole():
            with tempfile.TemporaryDirectory(prefix="vmlab-t-") as folder:
                path = Path(folder) / "s"
                ready = asyncio.Event()
                serving = asyncio.ensure_future(server.serve(path, ready.set))
                await asyncio.wait((serving, asyncio.ensure_future(ready.wait())),
                                   return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
                opened = []

                def client(kind="run", owner="r"):
                    hv = provider.open(Owner(kind, owner, Path("/nonexistent")),
                                       {"socket": str(path)})  # fmt: skip
                    opened.append(hv)
                    return hv

                client.path, client.server, client.serving = path, server, serving
                try:
                    async with asyncio.timeout(250):
                        await body(client)
                finally:
                    for hv in opened:
                        await hv.close()
                    serving.cancel()
                    await asyncio.gather(serving, return_exceptions=True)
                assert not path.exists()
                assert server._tenants == {} and server._sessions == set()

        asyncio.run(whole())

    return run


def test_every_method_of_the_contract_travels():
    def methods(owner):
        return {
            name
            for name, member in inspect.getmembers(owner, inspect.iscoroutinefunction)
            if not name.startswith("_")
        }

    assert set(MACHINE_METHODS) == methods(Machine)
    assert set(HYPERVISOR_METHODS) == methods(Hypervisor) - {"close"}


def test_a_whole_life_over_the_socket(served, spec, probe):
    async def body(client):
        hv = client()
        assert (await hv.probe()).available
        assert Capability.FORK in (await hv.capabilities()).supported
        machine = await hv.create(spec())
        assert isinstance(machine, RemoteMachine) and machine.hypervisor is hv
        assert machine.state is MachineState.CREATED
        await machine.start()
        assert machine.state is MachineState.RUNNING
        ask = await probe.of(machine)
        await ask("write_memory", offset=0, data="aa")
        await machine.pause()
        await machine.resume()
        taken = await machine.snapshot("s", memory=True)
        assert taken == (await machine.snapshots())[0]
        assert taken.state is MachineState.RUNNING
        await ask("write_memory", offset=0, data="bb")
        await machine.restore("s")
        assert await ask("read_memory", offset=0, length=1) == "aa"
        assert (await machine.plug_disk(Disk(name="new", size=4096))).size == 4096
        assert (await machine.resize_disk("new", 8192)).size == 8192
        assert [disk.name for disk in machine.spec.disks] == ["data", "new"]
        await machine.unplug_disk("new")
        assert (await machine.plug_nic(Nic(name="late"))).name == "late"
        await machine.unplug_nic("late")
        await machine.pin({0: (1, 2)})
        info = await machine.info()
        assert info.pinning == {0: (1, 2)}
        assert (await machine.metrics()).cpu.per_vcpu_seconds
        fork = await machine.fork("fork")
        fresh = await hv.create_from(taken, "fresh")
        assert {one.name for one in await hv.list()} == {"vm", "fork", "fresh"}
        assert await hv.get("fork") is fork
        await fresh.restart(graceful=False)
        await fork.stop(graceful=False)
        assert (await fork.resize(vcpus=1)).vcpus == 1
        await machine.delete_snapshot("s")
        identity = await fresh.inject(KillFault())
        assert fresh.state is MachineState.FAILED
        await fresh.start()
        await fresh.clear_fault(identity)
        await machine.kill()
        await machine.delete()
        assert machine.state is MachineState.DELETED
        assert (await machine.status()).state is MachineState.DELETED
        assert "operation" in await hv.trace()

    served(body)


def test_errors_arrive_as_they_were_raised(served, spec):
    async def body(client):
        hv = client()
        machine = await hv.create(spec())
        with pytest.raises(InvalidState) as caught:
            await machine.pause()
        assert (caught.value.actual, caught.value.expected) == ("created", ("running",))
        assert caught.value.hint and caught.value.machine == "vm"
        with pytest.raises(MachineExists):
            await hv.create(spec())
        with pytest.raises(MachineNotFound):
            await hv.get("nobody")
        with pytest.raises(SnapshotNotFound):
            await machine.restore("none")
        with pytest.raises(InvalidSpec, match="a MachineSpec"):
            await hv.create({"name": "x"})
        for timeout in (-1, "5", float("nan"), object()):
            with pytest.raises(InvalidSpec) as wrong:
                await machine.start(timeout=timeout)
            assert wrong.value.problems[0].field == "timeout"
        with pytest.raises(InvalidSpec):
            await machine.plug_disk(Path("/x"))
        with pytest.raises(InvalidSpec, match="another hypervisor"):
            await machine.migrate(hv)
        with pytest.raises(TimeoutError):
            await machine.start(timeout=0)

    served(body, start=3600.0)


def test_consoles_and_channels_stream(served, spec, probe):
    async def body(client):
        hv = client()
        machine = await hv.create(spec())
        async with await machine.console() as console:
            await machine.start()
            text = b""
            while b"login: " not in text:
                text += await console.read()
            await console.write(b"root")
            assert await console.read() == b"root"
            assert await console.log() == text + b"root"
            async with await machine.console() as later:
                await console.write(b"more")
                assert await later.history(2) == b"ot"
                assert await later.history(1 << 40) == text + b"root"
                assert await later.read() == b"more"
            assert await console.read() == b"more"
        assert await console.read() == b""
        await console.close()
        with pytest.raises(ResourceNotFound):
            await machine.console("none")
        ask = await probe.of(machine)
        await ask.send("panic")
        assert await ask.channel.read() == b""
        with pytest.raises(ChannelClosed):
            await ask.channel.write(b"x")
        # It is told without being asked.
        while machine.state is not MachineState.FAILED:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.001)

    served(body)


def test_events_are_followed_without_a_gap(served, spec):
    async def body(client):
        hv = client()
        late = hv.subscribe(0)
        machine = await hv.create(spec())
        now = hv.subscribe()
        await machine.start()
        first = await anext(now)
        assert first.type is EventType.OPERATION_STARTED
        assert first.operation.startswith("start")
        numbers = [(await anext(late)).sequence for _ in range(3)]
        assert numbers == [1, 2, 3]
        assert (await hv.events(1))[0].sequence == 2
        await late.aclose()
        await now.aclose()
        with pytest.raises(InvalidSpec):
            await anext(hv.subscribe("x"))

    served(body)


def test_a_cancellation_is_passed_on_and_waited_for(served, spec):
    async def body(client):
        hv = client()
        machine = await hv.create(spec())
        starting = asyncio.ensure_future(machine.start())
        while not (await machine.status()).operation:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.001)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert machine.state is MachineState.CREATED
        # One that is cancelled at once, before the server has taken its first step.
        for delay in (0, 0, 0.001):
            task = asyncio.ensure_future(machine.start())
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (await machine.status()).state is MachineState.CREATED

    served(body, start=3600.0)


def test_a_machine_that_was_made_before_the_cancellation_came_is_deleted(served, spec):
    async def body(client):
        hv = client()
        await hv.list()
        for turns in range(2, 40):
            making = asyncio.ensure_future(hv.create(spec(f"vm{turns}")))
            for _ in range(turns):
                await asyncio.sleep(0)
            if making.done():
                await (await making).delete()
                continue
            making.cancel()
            with pytest.raises(asyncio.CancelledError):
                await making
        assert await hv.list() == []

    served(body)


def test_machines_move_between_owners_of_one_server(served, spec, probe):
    async def body(client):
        here, there = client(), client("store", "s")
        machine = await here.create(spec())
        await machine.start()
        await (await probe.of(machine))("write_memory", offset=0, data="aa")
        sent = []
        moved = await machine.migrate(there, progress=lambda *done: sent.append(done))
        assert moved.hypervisor is there and sent[-1][0] == sent[-1][1]
        assert (await machine.status()).state is MachineState.DELETED
        assert await (await probe.of(moved))("read_memory", offset=0, length=1) == "aa"
        await moved.delete(force=True)

    served(body)


def test_a_runs_machines_die_with_its_last_connection_and_a_stores_do_not(served, spec):
    async def body(client):
        run, same, store = client(), client(), client("store", "s")
        await run.create(spec())
        await store.create(spec("kept"))
        assert [machine.name for machine in await same.list()] == ["vm"]
        await run.close()
        assert [machine.name for machine in await same.list()] == ["vm"]
        await same.close()
        await store.close()
        assert await client().list() == []
        assert [machine.name for machine in await client("store", "s").list()] == ["kept"]
        with pytest.raises(HypervisorUnavailable, match="closed"):
            await run.list()

    served(body)


def test_a_connection_that_breaks_off_takes_its_runs_machines(served, spec):
    async def body(client):
        hv = client()
        machine = await hv.create(spec())
        starting = asyncio.ensure_future(machine.start())
        reading = await machine.console()
        events = hv.subscribe()
        while not (await machine.status()).operation:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.001)
        next(
            iter(next(iter(client.server._tenants.values())).sessions)
        )._line._writer.transport.abort()
        with pytest.raises(HypervisorUnavailable, match="lost"):
            await starting
        assert machine.state is MachineState.UNKNOWN
        assert await reading.read() == b""
        await reading.close()
        with pytest.raises(HypervisorUnavailable):
            while True:
                await anext(events)
        # The next call connects anew; what was a run's is gone.
        with pytest.raises(MachineNotFound):
            await hv.get("vm")

    served(body, start=3600.0)


def test_a_crash_of_the_simulated_hypervisor_is_seen_by_its_clients(served, spec):
    async def body(client):
        hv = client()
        machine = await hv.create(spec())
        await hv.crash()
        with pytest.raises(HypervisorUnavailable):
            await machine.start()
        assert machine.state is MachineState.UNKNOWN
        await hv.restart()
        await machine.start()

    served(body)


def test_a_store_of_the_server_is_kept_in_its_directory(served, spec, tmp_path):
    async def first(client):
        await client("store", "s").create(spec())

    async def second(client):
        assert [machine.name for machine in await client("store", "s").list()] == ["vm"]

    served(first, store=tmp_path)
    served(second, store=tmp_path)


def test_the_socket_is_its_users_alone_and_a_stale_one_is_replaced(served, spec, profile):
    async def body(client):
        assert stat.S_IMODE(client.path.stat().st_mode) == 0o600
        assert await client().list() == []
        # Somebody listens: it is not taken over.
        with pytest.raises(HypervisorUnavailable, match="another process listens"):
            listen(client.path)

    served(body)
    with tempfile.TemporaryDirectory(prefix="vmlab-t-") as folder:
        path = Path(folder) / "s"
        listener, _ = listen(path)
        listener.close()
        assert path.exists(), "this one is stale now"
        listener, inode = listen(path)
        assert path.stat().st_ino == inode
        listener.close()


def test_a_socket_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidSpec, match="nothing else stands"):
        listen(tmp_path / "file")
    with pytest.raises(InvalidSpec, match="107 bytes"):
        listen(Path("/" + "x" * 120))
    with pytest.raises(HypervisorUnavailable, match="cannot listen"):
        listen(Path("/nonexistent/s"))


def test_a_socket_that_another_one_replaced_is_not_removed(served):
    async def body(client):
        await client().list()
        client.path.unlink()
        client.path.write_text("somebody else's")
        client.serving.cancel()
        await asyncio.gather(client.serving, return_exceptions=True)
        assert client.path.read_text() == "somebody else's"
        client.path.unlink()

    served(body)


def test_nobody_there_and_somebody_else_there(tmp_path):
    owner = Owner("run", "r", tmp_path)

    async def nobody():
        with pytest.raises(HypervisorUnavailable, match="nobody answers"):
            await RemoteSimulatedHypervisor(owner, Path("/nonexistent/s")).list()
        await RemoteSimulatedHypervisor(owner, Path("/nonexistent/s")).close()

    asyncio.run(nobody())

    async def other(answer):
        async def speak(reader, writer):
            await reader.readline()
            writer.write(answer)
            await writer.drain()
            writer.close()

        with tempfile.TemporaryDirectory(prefix="vmlab-t-") as folder:
            path = Path(folder) / "s"
            async with await asyncio.start_unix_server(speak, path):
                hv = RemoteSimulatedHypervisor(owner, path)
                with pytest.raises(HypervisorUnavailable) as caught:
                    await hv.list()
                await hv.close()
                return str(caught.value)

    for answer in (b"", b"HTTP/1.1 400\n", b"[]\n", b"{}\n"):
        assert "protocol" in asyncio.run(other(answer))
    welcome = {"version": 1, "server": "x", "pid": 1, "profile": "p", "seed": 1, "clock": "wall"}
    told = json.dumps({"welcome": welcome}).encode() + b"\n"
    assert "protocol" in asyncio.run(other(told + b'{"what": 1}\n'))


def test_a_client_that_speaks_nonsense_is_told_and_let_go(served):
    async def body(client):
        hello = {"version": 1, "kind": "store", "owner": "s"}
        for first, second in (
            ({"hello": {}}, None),
            ({"hello": hello | {"version": 99}}, None),
            ({"hello": hello}, {"neither": 1}),
        ):
            reader, writer = await asyncio.open_unix_connection(client.path)
            writer.write(json.dumps(first).encode() + b"\n")
            if second is not None:
                assert b"welcome" in await reader.readline()
                writer.write(json.dumps(second).encode() + b"\n")
            answer = json.loads(await reader.readline())
            assert answer["error"]["kind"] == "HypervisorUnavailable"
            assert await reader.readline() == b""
            writer.close()
            await writer.wait_closed()
        # One that says nothing at all.
        _, writer = await asyncio.open_unix_connection(client.path)
        writer.close()
        await writer.wait_closed()

    served(body)


def test_calls_that_there_are_not_are_refused_one_by_one(served, spec):
    async def body(client):
        hv = client()
        machine = await hv.create(spec())
        link = await hv.link()
        for call, of in (
            ("nothing", None),
            ("__class__", None),
            ("_operate", {"machine": machine.id}),
            ("write", {"stream": 99}),
        ):
            with pytest.raises(VmlabError):
                await link.call(call, of)
        console = await machine.console()
        with pytest.raises(InvalidSpec):
            await link.call("nothing", console._of)
        channel_less = {"stream": 99}
        assert await link.call("close", channel_less) is None
        with pytest.raises(HypervisorUnavailable):
            await link.call("write", console._of, {"data": "%%%"})
        with pytest.raises(InvalidSpec, match="tomorrow"):
            await link.call("start", {"machine": machine.id}, {"tomorrow": 1})
        await machine.start()

    served(body)


def test_a_mistake_of_the_servers_is_an_answer_too(served, spec, monkeypatch, capsys):
    from vmlab.hypervisors.simulated.hypervisor import SimulatedHypervisor

    async def body(client):
        hv = client()
        await hv.list()
        monkeypatch.setattr(SimulatedHypervisor, "trace", lambda self: 1 / 0)
        with pytest.raises(VmlabError, match="made a mistake: ZeroDivisionError"):
            await hv.trace()
        assert await hv.list() == []
        assert "ZeroDivisionError" in capsys.readouterr().err

    served(body)


def test_a_migration_to_another_server_is_not_supported(served, spec):
    async def body(client):
        here, there = client(), client("store", "s")
        machine = await here.create(spec())
        await there.list()
        there._welcome = there._welcome.model_copy(update={"server": "another"})
        with pytest.raises(UnsupportedOperation, match="between servers"):
            await machine.migrate(there)

    served(body)


def test_what_has_no_json_form_goes_as_its_text():
    assert plain({1: (Path("/x"), {2}, None, 1.5)}) == {"1": ["/x", [2], None, 1.5]}
    assert "object" in plain(object())
    with pytest.raises(HypervisorUnavailable):
        decode(None)


def test_a_socket_file_that_may_not_be_opened(tmp_path, monkeypatch):
    def refuse(self, address):
        raise PermissionError(13, os.strerror(13))

    with tempfile.TemporaryDirectory(prefix="vmlab-t-") as folder:
        path = Path(folder) / "s"
        listener, _ = listen(path)
        monkeypatch.setattr(sockets.socket, "connect", refuse)
        with pytest.raises(HypervisorUnavailable, match="cannot tell"):
            listen(path)
        listener.close()


def test_what_was_opened_on_a_lost_connection_has_ended(served, spec):
    async def body(client):
        hv = client()
        machine = await hv.create(spec())
        link = await hv.link()
        following = hv.subscribe()
        opened = await link.call("console", {"machine": machine.id}, {"name": "serial"})
        await link._line.close()
        while link.lost is None:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.001)
        assert await RemoteConsole(link, opened).read() == b""
        with pytest.raises(HypervisorUnavailable):
            await anext(following)
        with pytest.raises(HypervisorUnavailable, match="lost"):
            link.begin("list")

    served(body)


def test_a_reader_that_is_too_slow_is_told_over_the_socket_too(served, spec):
    async def body(client):
        hv = client()
        await hv.create(spec())
        log = client.server.tenant("run", "r").hypervisor.log
        log._events.popleft()
        with pytest.raises(ResourceNotFound, match="no longer kept"):
            await anext(hv.subscribe(0))

    served(body)


def test_a_message_without_an_end_is_refused(served, monkeypatch):
    monkeypatch.setattr("vmlab.hypervisors.simulated.server.LIMIT", 1000)

    async def body(client):
        _, writer = await asyncio.open_unix_connection(client.path)
        writer.write(b"x" * 5000)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert await client().list() == []

    served(body)


def test_owners_of_one_server_have_luck_of_their_own(profile):
    server = SimulationServer(profile(), seed=1)
    seeds = [server.tenant("run", name).hypervisor.seed for name in "abc"]
    assert seeds[0] == 1 and len(set(seeds)) == 3
    again = SimulationServer(profile(), seed=1)
    assert [again.tenant("run", name).hypervisor.seed for name in "xyz"] == seeds
    assert again.tenant("run", "own", 77).hypervisor.seed == 77
    assert SimulationServer(profile()).seed != SimulationServer(profile()).seed
    virtual = SimulationServer(profile(), clock="virtual").loop_factory()()
    assert virtual.time() == 0
    virtual.close()
