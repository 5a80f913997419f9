"""When a manager in the background may leave."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from vmlab.hypervisors.ownership import Home
from vmlab.manager.service.idle import Activity, needed, until_idle
from vmlab.manager.settings import Settings
from vmlab.manager.store.database import Database
from vmlab.manager.store.tables import HostRow, MachineRow, NetworkRow, NicRow, OperationRow


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database.open(Settings(home=Home.open(tmp_path / "home")))
    yield opened
    opened.close()


def machine(state: str = "running", **more: Any) -> MachineRow:
    fields: dict[str, Any] = {
        "name": "web", "host": "h", "hypervisor": "simulated", "architecture": "riscv64",
        "vcpus": 1, "memory": 1 << 26, "spec": {}, "state": state,
        "wanted": "running" if state == "running" else "stopped",
    }  # fmt: skip
    return MachineRow(**(fields | more))


def asked(database: Database, *rows: Any) -> str:
    def write(session: Session) -> None:
        session.add(HostRow(name="h", hypervisor="simulated"))
        session.flush()
        session.add_all(rows)

    async def told() -> str:
        await database.write(write)
        return await database.read(needed)

    return asyncio.run(told())


def operation(state: str) -> OperationRow:
    return OperationRow(kind="machine.start", state=state, request={})


def test_nothing_needs_a_manager_of_nothing(database: Database) -> None:
    assert asked(database) == ""


def test_a_machine_that_runs_lives_on_by_itself(database: Database) -> None:
    assert asked(database, machine(), operation("succeeded")) == ""


@pytest.mark.parametrize("state", ["queued", "running"])
def test_an_operation_needs_one(state: str, database: Database) -> None:
    assert asked(database, operation(state)) == "an operation is under way: machine.start"


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ({"snapshot_every": "PT6H"}, "snapshots by a schedule"),
        ({"findings": {"machine-state-mismatch": "reconcile"}}, "repaired by policy"),
    ],
)
def test_a_machine_that_is_looked_after_needs_one(
    policy: dict[str, Any], why: str, database: Database
) -> None:
    assert why in asked(database, machine(policy=policy))


@pytest.mark.parametrize(
    "policy", [{"findings": {"clock-drift": "report"}}, {"autostart": True}, {}]
)
def test_one_that_is_only_watched_does_not(policy: dict[str, Any], database: Database) -> None:
    assert asked(database, machine(policy=policy)) == ""


def test_one_at_rest_does_not(database: Database) -> None:
    assert asked(database, machine("stopped", policy={"snapshot_every": "PT6H"})) == ""


def test_one_that_died_and_is_to_be_brought_back_does(database: Database) -> None:
    policy = {"findings": {"machine-state-mismatch": "reconcile"}}
    assert asked(database, machine("failed", wanted="running", policy=policy)) != ""


def test_one_on_a_network_of_the_manager_s_does(database: Database) -> None:
    lan = NetworkRow(name="lan", mode="isolated")
    nic = NicRow(name="net0", mac="52:54:00:00:00:01", mode="network", network=lan)
    assert "network" in asked(database, lan, machine(nics=[nic]))


def test_one_with_a_network_of_its_own_does_not(database: Database) -> None:
    nic = NicRow(name="net0", mac="52:54:00:00:00:01", mode="user")
    assert asked(database, machine(nics=[nic])) == ""


def test_who_is_answered_is_somebody() -> None:
    async def story() -> None:
        going, told = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "lifespan":
                going.set()
                await told.wait()

        activity = Activity(app)
        await activity({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
        answering = asyncio.ensure_future(activity({"type": "http"}, None, None))  # type: ignore[arg-type]
        await going.wait()
        assert activity.idle == 0
        told.set()
        await answering
        await asyncio.sleep(0.001)
        assert activity.idle > 0

    asyncio.run(story())


def test_whoever_started_it_or_is_connected_is_waited_for() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        return

    async def story() -> None:
        assert Activity(app).idle == 0
        there = True
        activity = Activity(app, lambda: there)
        await activity({"type": "http"}, None, None)  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        assert activity.idle == 0
        there = False
        await asyncio.sleep(0.01)
        assert activity.idle > 0

    asyncio.run(story())


def test_it_waits_until_nobody_asks_and_nothing_needs_it(database: Database) -> None:
    async def story() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            return

        def begin(session: Session) -> None:
            session.add(operation("running"))

        def end(session: Session) -> None:
            session.query(OperationRow).one().state = "succeeded"

        await database.write(begin)
        activity = Activity(app)
        await activity({"type": "http"}, None, None)  # type: ignore[arg-type]
        waiting = asyncio.ensure_future(until_idle(activity, database, 0.02))
        # It has looked some times by then, on any host, or has not come to it: it waits either way.
        await asyncio.sleep(0.5)
        assert not waiting.done()
        await database.write(end)
        await asyncio.wait_for(waiting, 60)

    asyncio.run(story())
