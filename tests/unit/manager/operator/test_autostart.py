"""A machine that ought to run is started when the manager begins, if that is its policy."""

from __future__ import annotations

import asyncio

from tests.unit.manager.operator.conftest import WAIT, Place, do, machine

from vmlab.machine.states import MachineState
from vmlab.manager.requests import CreateMachine, MachinePolicy, StopMachine

SPEC = {"memory": "64M"}


def test_what_ought_to_run_is_started_and_what_somebody_stopped_is_not(place: Place) -> None:
    async def test() -> None:
        async with place.manager() as manager:
            for name, autostart in (("web", True), ("idle", True), ("plain", False)):
                policy = MachinePolicy(autostart=autostart)
                request = CreateMachine(name=name, spec=SPEC, policy=policy, start=True)
                assert (await do(manager, request)).state == "succeeded"
            await do(manager, StopMachine(machine="idle"))
            for name in ("web", "plain"):
                await (await manager.machine((await machine(manager, name)).id)).kill()
        async with place.manager() as manager:
            async with asyncio.timeout(WAIT):
                there = await manager.machine((await machine(manager, "web")).id)
                while (await there.status()).state is not MachineState.RUNNING:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            for name in ("idle", "plain"):
                there = await manager.machine((await machine(manager, name)).id)
                assert (await there.status()).state is MachineState.STOPPED

    asyncio.run(test())
