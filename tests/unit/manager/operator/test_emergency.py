"""The emergency stop: everything that is meant is killed, whatever is under way with it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vmlab.machine.errors import ResourceNotFound
from vmlab.machine.spec import MachineSpec
from vmlab.manager.operator.emergency import EmergencyHandler
from vmlab.manager.requests import CreateMachine, EmergencyStop, StartMachine

SPEC = {"memory": "64M"}


async def fill(manager: Any, doing: Any) -> None:
    for name, host, labels in (
        ("a", "one", {"team": "blue"}),
        ("b", "one", {"team": "red"}),
        ("c", "two", {"team": "blue"}),
    ):
        await doing.did(
            manager, CreateMachine(name=name, spec=SPEC, host=host, labels=labels, start=True)
        )
    await doing.did(manager, CreateMachine(name="rest", spec=SPEC, host="one"))


@pytest.mark.parametrize(
    ("request_", "stopped"),
    [
        (EmergencyStop(), ["a", "b", "c"]),
        (EmergencyStop(host="one"), ["a", "b"]),
        (EmergencyStop(label="team=blue"), ["a", "c"]),
        (EmergencyStop(label="team"), ["a", "b", "c"]),
        (EmergencyStop(label="team", host="two"), ["c"]),
        (EmergencyStop(label="other"), []),
    ],
)
def test_it_stops_what_is_meant_and_nothing_else(
    place: Any, doing: Any, request_: EmergencyStop, stopped: list[str]
) -> None:
    place.hosts = {"one": "", "two": ""}

    async def story() -> None:
        async with place.manager() as manager:
            await fill(manager, doing)
            planned = await manager.operator.submit(request_, dry_run=True)
            assert len(planned.steps) == len(stopped)
            done = await doing.did(manager, request_)
            assert done.result is not None
            assert done.result["stopped"] == stopped
            for name in ("a", "b", "c"):
                machine = await doing.machine(manager, name)
                expected = "stopped" if name in stopped else "running"
                assert (machine.state, machine.wanted) == (expected, expected), name
            assert (await doing.machine(manager, "rest")).state == "created"
            live = [s for s in (await doing.at_hypervisors(manager)).values() if s == "running"]
            assert len(live) == 3 - len(stopped)

    asyncio.run(story())


def test_what_is_under_way_and_what_waits_is_ended_and_stays_so(place: Any, doing: Any) -> None:
    place.hosts = {"slow": "[latency]\nvariability = 0\ncreate = 0\nstart = 3600\nkill = 0"}

    async def story() -> None:
        async with place.manager(workers=1) as manager:
            starting = await manager.operator.submit(CreateMachine(name="a", spec=SPEC, start=True))

            async def boots() -> bool:
                document = await manager.operator.document(starting.id)
                return any(step.name == "boot" for step in document.steps)

            await doing.eventually(boots, "it boots")
            waits = await manager.operator.submit(CreateMachine(name="b", spec=SPEC, start=True))
            done = await doing.did(manager, EmergencyStop())
            assert done.result is not None
            assert "a" in done.result["stopped"]
            for id_ in (starting.id, waits.id):
                ended = await manager.operator.wait(id_, 120)
                assert ended.state in {"cancelled", "failed"}
            assert not [s for s in (await doing.at_hypervisors(manager)).values() if s != "created"
                        and s != "stopped" and s != "failed"]  # fmt: skip
            assert (await doing.machine(manager, "a")).state in {"created", "stopped", "failed"}
            with pytest.raises(ResourceNotFound):
                await doing.machine(manager, "b")

    asyncio.run(story())


def test_one_that_was_interrupted_waits_for_no_worker_of_the_next_manager(
    place: Any, doing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.hosts = {"slow": "[latency]\nvariability = 0\ncreate = 0\nstart = 3600\nkill = 0"}
    begun = asyncio.Event()

    async def hang(self: EmergencyHandler, work: object) -> None:
        begun.set()
        await asyncio.get_running_loop().create_future()

    async def story() -> None:
        async with place.manager(workers=1) as manager:
            await manager.operator.submit(CreateMachine(name="a", spec=SPEC, start=True))
            with monkeypatch.context() as patch:
                patch.setattr(EmergencyHandler, "_kill_all", hang)
                stop = await manager.operator.submit(EmergencyStop())
                await begun.wait()
        async with place.manager(workers=1) as manager:
            assert (await manager.operator.wait(stop.id, 120)).state == "succeeded"

    asyncio.run(story())


def test_it_stops_machines_that_the_store_does_not_know(place: Any, doing: Any) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            hypervisor = await manager.hosts.get("simulated")
            stray = await hypervisor.create(MachineSpec.of(name="stray", memory="64M"))
            await stray.start()
            done = await doing.did(manager, EmergencyStop())
            assert done.result is not None
            assert done.result["stopped"] == ["stray"]
            assert await doing.at_hypervisors(manager) == {"stray": "stopped"}

    asyncio.run(story())


def test_it_says_what_it_could_not_stop(
    place: Any, doing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            for name in "ab":
                await doing.did(manager, CreateMachine(name=name, spec=SPEC, start=True))
            at = await manager.machine((await doing.machine(manager, "a")).id)

            async def refuse(**options: object) -> None:
                from vmlab.machine.errors import OperationFailed

                raise OperationFailed("it does not end")

            monkeypatch.setattr(at, "kill", refuse)
            done = await doing.do(manager, EmergencyStop())
            assert done.state == "failed"
            assert done.error is not None
            assert "1 of 2 machines" in done.error["message"]
            assert "a: it does not end" in done.error["message"]
            assert (await doing.machine(manager, "b")).state == "stopped"
            assert (await doing.machine(manager, "a")).state == "running"

    asyncio.run(story())


def test_a_host_that_is_not_there_is_refused_and_machines_start_again_afterwards(
    place: Any, doing: Any
) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            with pytest.raises(ResourceNotFound):
                await manager.operator.submit(EmergencyStop(host="nowhere"))
            await doing.did(manager, CreateMachine(name="a", spec=SPEC, start=True))
            await doing.did(manager, EmergencyStop())
            await doing.did(manager, StartMachine(machine="a"))
            assert (await doing.machine(manager, "a")).state == "running"

    asyncio.run(story())
