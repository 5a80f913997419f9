"""A store's machines outlive the hypervisor object that made them, with all that they hold."""

from __future__ import annotations

import asyncio
import json

import pytest

from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.simulated import provider
from vmlab.machine.errors import HypervisorUnavailable
from vmlab.machine.events import EventType
from vmlab.machine.spec import Disk
from vmlab.machine.states import MachineState


@pytest.fixture
def store(tmp_path):
    """Runs bodies one after the other on hypervisors of the same store."""
    owner = Owner("store", "s", tmp_path)

    def run(*bodies, **options):
        for body in bodies:
            hypervisor = provider.open(owner, {"seed": "1", **options})

            async def whole(hv=hypervisor, body=body):
                try:
                    await body(hv)
                finally:
                    await hv.close()

            with asyncio.Runner(loop_factory=hypervisor.loop_factory()) as runner:
                runner.run(whole())

    run.directory = tmp_path / "simulated"
    return run


def test_everything_comes_back(store, spec, probe):
    seen = {}

    async def first(hv):
        machine = await hv.create(
            spec(nics=[{"name": "net", "forwards": [{"guest": 22, "host": 9022}]}])
        )
        await machine.start()
        ask = await probe.of(machine)
        await ask("write_memory", offset=0, data="aa")
        await ask("write_disk", disk="data", offset=0, data="bb")
        await machine.snapshot("s")
        await ask("write_disk", disk="data", offset=1, data="cc")
        await machine.plug_disk(Disk(name="more", size=4096))
        console = await machine.console()
        await console.write(b"typed")
        seen["ticks"] = await ask("ticks")
        seen["entropy"] = await ask("entropy")
        await ask("ignore_powerdown", on=True)
        seen["info"] = await machine.info()
        seen["log"] = await console.log()
        seen["now"] = hv.now()

    async def second(hv):
        (machine,) = await hv.list()
        assert machine.state is MachineState.RUNNING
        assert (await hv.events())[0].type is EventType.ADOPTED
        assert hv.now() >= seen["now"] - 1
        assert await machine.info() == seen["info"]
        ask = await probe.of(machine)
        assert await ask("read_memory", offset=0, length=1) == "aa"
        assert await ask("read_disk", disk="data", offset=0, length=2) == "bbcc"
        assert await ask("ticks") >= seen["ticks"] - 1000
        assert await ask("typed") == "typed"
        assert await ask("entropy") != seen["entropy"]
        assert await (await machine.console()).log() == seen["log"]
        assert len(hv.world.ports) == 1
        with pytest.raises(TimeoutError):
            await machine.stop(kill=False, timeout=5)
        await machine.restore("s")
        assert [disk["name"] for disk in await ask("disks")] == ["data"]
        assert await ask("read_disk", disk="data", offset=0, length=2) == "bb00"
        other = await hv.create(spec("other"))
        assert other.id != machine.id
        await other.start()
        await other.pause()
        await machine.delete(force=True)

    async def third(hv):
        (other,) = await hv.list()
        assert (other.name, other.state) == ("other", MachineState.PAUSED)
        await other.delete(force=True)

    async def fourth(hv):
        assert await hv.list() == []

    store(first, second, third, fourth)
    assert [path.name for path in store.directory.iterdir()] == ["lock"]


def test_writes_that_were_not_flushed_are_still_unflushed(store, spec, probe):
    from vmlab.machine.faults import PowerCut

    async def first(hv):
        machine = await hv.create(spec())
        await machine.start()
        await (await probe.of(machine))("write_disk", disk="data", offset=0, data="bb")

    async def second(hv):
        machine = await hv.get("vm")
        ask = await probe.of(machine)
        assert await ask("read_disk", disk="data", offset=0, length=1) == "bb"
        await machine.inject(PowerCut())
        await machine.start()
        ask = await probe.of(machine)
        assert await ask("read_disk", disk="data", offset=0, length=1) == "00"

    store(first, second)


def test_states_at_rest_come_back_as_they_were(store, spec, probe):
    async def first(hv):
        await hv.create(spec("created"))
        for name in ("stopped", "dead"):
            machine = await hv.create(spec(name))
            await machine.start()
        await (await hv.get("stopped")).stop()
        await (await probe.of(await hv.get("dead"))).send("panic")

    async def second(hv):
        states = {machine.name: machine.state for machine in await hv.list()}
        assert states == {
            "created": MachineState.CREATED,
            "stopped": MachineState.STOPPED,
            "dead": MachineState.FAILED,
        }
        fresh = await hv.create_from(await (await hv.get("created")).snapshot("s"), "fresh")
        assert fresh.id not in [(await hv.get(name)).id for name in states]

    store(first, second)


def test_what_was_restored_or_copied_and_never_started_is_still_off(store, spec, probe):
    async def first(hv):
        restored = await hv.create(spec("restored"))
        kept = await restored.snapshot("s")
        await restored.restore("s")
        await hv.create_from(kept, "copied")
        await hv.create(spec("untouched"))

    async def second(hv):
        states = {machine.name: machine.state for machine in await hv.list()}
        assert states == {
            "restored": MachineState.STOPPED,
            "copied": MachineState.STOPPED,
            "untouched": MachineState.CREATED,
        }

    store(first, second)


def test_a_guest_goes_on_while_nobody_looks_on_the_wall_clock(store, spec, probe):
    ticks = []

    async def body(hv):
        machines = await hv.list() or [await hv.create(spec())]
        if machines[0].state is MachineState.CREATED:
            await machines[0].start()
        ticks.append(await (await probe.of(machines[0]))("ticks"))

    profile = store.directory.parent / "quick.toml"
    profile.write_text("[latency]\nstart = 0.01\nstatus = 0\ncreate = 0\n")
    store(body, body, clock="wall", profile=str(profile))
    assert ticks[1] >= ticks[0]


def test_one_process_at_a_time(store, spec, tmp_path):
    async def body(hv):
        await hv.create(spec())
        other = provider.open(Owner("store", "s", tmp_path))
        with pytest.raises(HypervisorUnavailable, match="in use"):
            await other.list()
        await other.close()

    store(body)


def test_a_damaged_file_is_named(store, spec):
    async def first(hv):
        await hv.create(spec())

    async def second(hv):
        with pytest.raises(HypervisorUnavailable, match=r"machine\.json is damaged"):
            await hv.list()

    store(first)
    (file,) = store.directory.glob("*.machine.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"power": "sideways"}))
    store(second)


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "simulated").write_text("a file")
    hypervisor = provider.open(Owner("store", "s", tmp_path))

    async def body():
        with pytest.raises(HypervisorUnavailable, match="cannot be written"):
            await hypervisor.list()

    with asyncio.Runner(loop_factory=hypervisor.loop_factory()) as runner:
        runner.run(body())
