"""Room for machines: quotas, limits of hosts, promises that hold, and what gives them back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import select
from tests.unit.manager.operator.conftest import INSTANT

from vmlab.machine.errors import HypervisorUnavailable, ResourceExhausted
from vmlab.manager.operator import admission
from vmlab.manager.operator.admission import Need, in_use
from vmlab.manager.requests import (
    CreateMachine,
    DeleteMachine,
    MachinePolicy,
    MigrateMachine,
    StartMachine,
    StopMachine,
)
from vmlab.manager.settings import Limits
from vmlab.manager.store.tables import ReservationRow

SPEC = {"memory": "64M"}
MIB = 1 << 20


async def used(manager: Any, **of: Any) -> Need:
    need: Need = await manager.database.read(in_use, **of)
    return need


async def promised(manager: Any) -> int:
    rows = await manager.database.read(lambda s: list(s.scalars(select(ReservationRow.id))))
    return len(rows)


def test_quotas_of_the_manager_hold_for_machines_and_for_what_is_live(
    place: Any, doing: Any
) -> None:
    async def story() -> None:
        limits = Limits(machines=3, memory=128 * MIB, vcpus=2)
        async with place.manager(limits=limits) as manager:
            for name in "abc":
                await doing.did(manager, CreateMachine(name=name, spec=SPEC))
            with pytest.raises(ResourceExhausted, match="the 3 of the manager"):
                await manager.operator.submit(CreateMachine(name="d", spec=SPEC))
            for name in "ab":
                await doing.did(manager, StartMachine(machine=name))
            assert await used(manager) == Need(machines=3, vcpus=2, memory=128 * MIB)
            with pytest.raises(ResourceExhausted, match=r"memory.*vCPUs|vCPUs.*memory"):
                await manager.operator.submit(StartMachine(machine="c"))
            await doing.did(manager, StopMachine(machine="a"))
            await doing.did(manager, StartMachine(machine="c"))
            await doing.did(manager, DeleteMachine(machine="a"))
            await doing.did(manager, CreateMachine(name="d", spec=SPEC))
            assert await used(manager) == Need(machines=3, vcpus=2, memory=128 * MIB)
            assert await promised(manager) == 0

    asyncio.run(story())


def test_what_was_promised_to_one_is_given_to_no_other(place: Any, doing: Any) -> None:
    async def story() -> None:
        # One worker: what is taken down waits, and has its promise meanwhile.
        async with place.manager(limits=Limits(memory=128 * MIB), workers=1) as manager:
            for name in "abc":
                await doing.did(manager, CreateMachine(name=name, spec=SPEC))
            results = await asyncio.gather(
                *(manager.operator.submit(StartMachine(machine=name)) for name in "abc"),
                return_exceptions=True,
            )
            refused = [each for each in results if isinstance(each, BaseException)]
            assert len(refused) == 1
            assert isinstance(refused[0], ResourceExhausted)
            for each in results:
                if not isinstance(each, BaseException):
                    ended = await manager.operator.wait(each.id, 120)
                    assert ended.state == "succeeded"
            assert (await used(manager)).memory == 128 * MIB

    asyncio.run(story())


def test_a_promise_is_given_back_by_a_start_that_fails(place: Any, doing: Any) -> None:
    place.hosts = {"simulated": "[luck]\nfailures = { start = 1.0 }"}

    async def story() -> None:
        async with place.manager(limits=Limits(memory=64 * MIB)) as manager:
            await doing.did(manager, CreateMachine(name="a", spec=SPEC))
            for _ in range(3):
                assert (await doing.do(manager, StartMachine(machine="a"))).state == "failed"
            assert (await used(manager)).memory == 0
            assert await promised(manager) == 0

    asyncio.run(story())


def test_limits_of_a_host_hold_and_another_is_taken_if_the_policy_says_so(
    place: Any, doing: Any
) -> None:
    place.hosts = {"small": "[limits]\nmachines = 1", "large": ""}

    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateMachine(name="a", spec=SPEC, host="small"))
            with pytest.raises(ResourceExhausted, match="of host 'small'"):
                await manager.operator.submit(CreateMachine(name="b", spec=SPEC, host="small"))
            policy = MachinePolicy(fallback=("large",))
            await doing.did(
                manager, CreateMachine(name="b", spec=SPEC, host="small", policy=policy)
            )
            assert (await doing.machine(manager, "b")).host == "large"

    asyncio.run(story())


def test_a_machine_that_moves_counts_once_for_the_manager_and_on_both_of_its_hosts(
    place: Any, doing: Any
) -> None:
    slow = "\n".join(line for line in INSTANT.splitlines() if not line.startswith("migration"))
    place.hosts = {"one": f"[latency]\nvariability = 0\n{slow}\nmigration = 3600", "two": ""}

    async def story() -> None:
        async with place.manager(limits=Limits(memory=128 * MIB, vcpus=2)) as manager:
            await doing.did(manager, CreateMachine(name="a", spec=SPEC, host="one", start=True))
            for name in "bc":
                await doing.did(manager, CreateMachine(name=name, spec=SPEC, host="two"))
            # Alone it takes up half of what there is; there is room for no second one of it.
            await doing.did(manager, StartMachine(machine="b"))
            moving = await manager.operator.submit(MigrateMachine(machine="a", host="two"))

            async def moves() -> bool:
                document = await manager.operator.document(moving.id)
                return any(step.state == "running" for step in document.steps)

            await doing.eventually(moves, "it moves")
            assert await used(manager) == Need(machines=3, vcpus=2, memory=128 * MIB)
            assert (await used(manager, host="one")).memory == 64 * MIB
            assert (await used(manager, host="two")).memory == 128 * MIB
            with pytest.raises(ResourceExhausted, match="of the manager"):
                await manager.operator.submit(StartMachine(machine="c"))
            await doing.did(manager, StopMachine(machine="b"))
            await doing.did(manager, StartMachine(machine="c"))
            await manager.operator.cancel(moving.id)
            assert (await manager.operator.wait(moving.id, 120)).state == "cancelled"
            assert await used(manager) == Need(machines=3, vcpus=2, memory=128 * MIB)
            assert await promised(manager) == 0

    asyncio.run(story())


def test_hosts_of_real_guests_share_the_memory_of_this_computer(
    place: Any, doing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "_SIMULATED", "nothing")
    monkeypatch.setattr(admission, "_of_this_host", lambda: {"vcpus": 100, "memory": 100 * MIB})
    place.hosts = {"one": "", "two": ""}

    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateMachine(name="a", spec=SPEC, host="one", start=True))
            with pytest.raises(ResourceExhausted, match="of this computer"):
                await manager.operator.submit(
                    CreateMachine(name="b", spec=SPEC, host="two", start=True)
                )

    asyncio.run(story())


def test_this_computer_has_memory_and_cpus() -> None:
    limits = admission._of_this_host()
    assert (limits["memory"] or 0) > 0
    assert (limits["vcpus"] or 0) >= 16


# ------------------------------------------------------------------------ breakers and fallback


def broken(place: Any) -> None:
    """Two hosts, of which one's hypervisor is never there."""
    place.hosts = {"bad": "", "good": ""}


async def make_unavailable(manager: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hypervisor = await manager.hosts.get(name)

    async def gone(*args: object, **options: object) -> object:
        raise HypervisorUnavailable("no answer", hypervisor="simulated")

    for call in ("create", "get", "list"):
        monkeypatch.setattr(hypervisor, call, gone)


def test_a_host_that_fails_again_and_again_is_left_alone_and_tried_again_later(
    place: Any, doing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmlab.manager.operator.worker._FIRST_DELAY_S", 0.001)
    broken(place)

    async def story() -> None:
        # The observer, which tries hosts too, sweeps once and never again.
        async with place.manager(sweep_seconds=86400) as manager:

            async def swept() -> bool:
                return bool(manager.observer.sweeps)

            await doing.eventually(swept, "it has swept")
            # However long this takes, the host is not tried again meanwhile.
            breaker, clock = manager.hosts.breaker("bad"), 1000.0
            monkeypatch.setattr(breaker, "_clock", lambda: clock)
            with monkeypatch.context() as patch:
                await make_unavailable(manager, "bad", patch)
                made = await doing.do(manager, CreateMachine(name="a", spec=SPEC, host="bad"))
                assert made.state == "failed"
                assert made.error is not None
                assert made.error["kind"] == "HypervisorUnavailable"
                assert (await manager.hosts.document("bad")).breaker == "open"
                assert (await manager.hosts.document("good")).breaker == "closed"
                assert breaker.state == "open"
            clock += 1000
            await doing.did(manager, CreateMachine(name="b", spec=SPEC, host="bad"))
            assert (await manager.hosts.document("bad")).breaker == "closed"
            kinds = [
                event.kind
                for event in (await manager.database.read(_events)).items
                if event.kind.startswith("host.")
            ]
            assert "host.breaker" in kinds
            assert kinds.index("host.lost") < kinds.index("host.back")

    asyncio.run(story())


def _events(session: Any) -> Any:
    from vmlab.manager.store.queries import list_events

    return list_events(session, limit=1000)


def test_another_host_takes_a_machine_whose_own_is_gone_if_its_policy_says_so(
    place: Any, doing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmlab.manager.operator.worker._FIRST_DELAY_S", 0.001)
    broken(place)
    policy = MachinePolicy(fallback=("good",))

    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(
                manager, CreateMachine(name="before", spec=SPEC, host="bad", policy=policy)
            )
            await doing.did(manager, CreateMachine(name="loyal", spec=SPEC, host="bad"))
            await make_unavailable(manager, "bad", monkeypatch)
            await doing.did(
                manager, CreateMachine(name="a", spec=SPEC, host="bad", policy=policy, start=True)
            )
            assert (await doing.machine(manager, "a")).host == "good"
            # One that never ran has nothing that would be lost by starting it elsewhere.
            await doing.did(manager, StartMachine(machine="before"))
            assert (await doing.machine(manager, "before")).host == "good"
            assert (await doing.do(manager, StartMachine(machine="loyal"))).state == "failed"
            loyal = await doing.machine(manager, "loyal")
            assert (loyal.host, loyal.state) == ("bad", "unknown")

    asyncio.run(story())


def test_a_host_that_is_not_there_is_said_so(place: Any) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            with pytest.raises(HypervisorUnavailable, match="no host 'nowhere'"):
                await manager.operator.submit(CreateMachine(spec=SPEC, host="nowhere"))
            policy = MachinePolicy(fallback=("nowhere",))
            with pytest.raises(HypervisorUnavailable, match="no host 'nowhere'"):
                await manager.operator.submit(CreateMachine(spec=SPEC, policy=policy))

    asyncio.run(story())


def test_hosts_come_and_go_with_the_settings_but_not_those_that_have_machines(
    place: Any, doing: Any
) -> None:
    async def story() -> None:
        place.hosts = {"one": "", "two": ""}
        async with place.manager() as manager:
            await manager.hosts.probed()
            await doing.did(manager, CreateMachine(name="a", spec=SPEC, host="one"))
        place.hosts = {"three": ""}
        async with place.manager() as manager:
            await manager.hosts.probed()
            assert not (await manager.hosts.document("one")).available
            assert (await manager.hosts.document("three")).available
            from vmlab.machine.errors import ResourceNotFound

            with pytest.raises(ResourceNotFound):
                await manager.hosts.document("two")

    asyncio.run(story())
