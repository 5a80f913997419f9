"""Networks made and removed by the manager's operations, as far as that needs no rights."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import InvalidSpec, OperationFailed, VmlabError
from vmlab.manager.documents import NetworkDocument, OperationDocument
from vmlab.manager.manager import Manager
from vmlab.manager.networks import handlers, links
from vmlab.manager.requests import (
    CreateMachine,
    CreateNetwork,
    DeleteNetwork,
    NewNic,
    StartMachine,
)
from vmlab.manager.settings import HostSetting, Settings
from vmlab.manager.store.changes import Conflict
from vmlab.manager.store.queries import find_machine, find_network, list_events, list_networks
from vmlab.manager.store.tables import NetworkRow

WAIT = 120.0

TestOfManager = Callable[[Manager], Coroutine[Any, Any, None]]


def settings_of(home: Home) -> Settings:
    return Settings(home=home, hosts=(HostSetting(name="simulated", hypervisor="simulated"),))


@asynccontextmanager
async def _manager(home: Home) -> AsyncIterator[Manager]:
    manager = await Manager.open(settings_of(home))
    async with manager:
        try:
            yield manager
        finally:
            # What serves a network lives on without a manager, but not without its home.
            await manager.networks.host.sweep([])


async def do(manager: Manager, request: Any, **options: Any) -> OperationDocument:
    operation = await manager.operator.submit(request, **options)
    return await manager.operator.wait(operation.id, WAIT)


async def networks_of(manager: Manager) -> list[NetworkDocument]:
    return list((await manager.database.read(list_networks)).items)


@pytest.fixture
def with_manager(
    tmp_path: Path,
) -> Callable[[Callable[[Manager], Coroutine[Any, Any, None]]], None]:
    """Runs a test with a manager."""

    def run(test: TestOfManager) -> None:
        async def work() -> None:
            async with _manager(Home.open(tmp_path / "home")) as manager:
                await test(manager)

        asyncio.run(work())

    return run


def test_an_isolated_network_is_made_served_and_removed(with_manager: Any) -> None:
    async def test(manager: Manager) -> None:
        made = await do(manager, CreateNetwork(name="lan"))
        assert (made.state, [step.name for step in made.steps]) == ("succeeded", ["keep", "host"])
        [network] = await networks_of(manager)
        assert (network.subnet, network.gateway) == ("10.214.0.0/24", "10.214.0.1")
        assert (network.used, network.free) == (0, 253)
        assert await manager.networks.missing(network.id) == []
        assert set(manager.networks.host.recorded()) == {network.id}
        # The next one gets another subnet.
        await do(manager, CreateNetwork(name="lan2", dhcp=False))
        assert (await networks_of(manager))[1].subnet == "10.214.1.0/24"
        gone = await do(manager, DeleteNetwork(network="lan"))
        assert gone.state == "succeeded"
        assert gone.result is not None
        assert [each.split()[0] for each in gone.result["removed"]] == ["process"]
        assert [each.name for each in await networks_of(manager)] == ["lan2"]
        assert network.id not in manager.networks.host.recorded()
        kinds = [each.kind for each in (await manager.database.read(list_events)).items]
        assert [kind for kind in kinds if kind.startswith("network.")] == [
            "network.created",
            "network.created",
            "network.deleted",
        ]

    with_manager(test)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"mode": "user", "subnet": "10.9.0.0/24", "vlan": 3}, ["vlan", "subnet"]),
        ({"mode": "isolated", "bridge": "br0"}, ["bridge"]),
        ({"name": "user"}, ["name"]),
        ({"mode": "bridged", "bridge": "vmlb0"}, ["bridge"]),
        ({"mode": "bridged", "bridge": "-br"}, ["bridge"]),
        ({"dns": ["9.9.9.9", "nine"]}, ["dns"]),
        ({"dns": ["fd00::1%a\ndhcp-script=b"]}, ["dns"]),
        ({"subnet6": "fd00::%a/64"}, ["subnet6"]),
        ({"subnet6": "fd00::/64", "gateway": "fd00::9%a"}, ["gateway"]),
        ({"subnet": "10.9.0.0/24", "gateway": "10.8.0.1"}, ["gateway"]),
        ({"subnet": "10.9.0.0/24", "ranges": ["10.9.0.9"], "reserved": ["10.9.0"]}, ["reserved"]),
    ],
)
def test_what_does_not_go_together_is_refused_by_field(
    with_manager: Any, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], wrong: list[str]
) -> None:
    monkeypatch.setattr(handlers, "_check_host", lambda request: None)

    async def test(manager: Manager) -> None:
        with pytest.raises(InvalidSpec) as caught:
            await manager.operator.submit(CreateNetwork(**({"name": "lan"} | fields)))
        assert [problem.field for problem in caught.value.problems] == wrong
        assert await networks_of(manager) == []

    with_manager(test)


def other(**columns: Any) -> NetworkRow:
    base = {"name": "there", "mode": "bridged", "dns": [], "ranges": [], "reserved": []}
    return NetworkRow(**(base | {"data": {}} | columns))


@pytest.mark.parametrize(
    ("there", "asked", "said"),
    [
        ({"bridge": "br-x"}, {"bridge": "br-x"}, "is on br-x already"),
        ({"bridge": "br-x"}, {"bridge": "br-x", "vlan": 5}, "without tags"),
        ({"bridge": "br-x", "vlan": 5}, {"bridge": "br-x"}, "with tags"),
        ({"vlan": 5}, {"vlan": 5}, "is on the switch with tag 5 already"),
        ({"subnet": "10.9.0.0/16"}, {"subnet": "10.9.3.0/24"}, "overlaps 10.9.0.0/16"),
        ({"subnet6": "fd00::/48"}, {"subnet6": "fd00:0:0:1::/64"}, "overlaps fd00::/48"),
    ],
)
def test_a_bridged_network_that_another_is_in_the_way_of_is_refused(
    with_manager: Any,
    monkeypatch: pytest.MonkeyPatch,
    there: dict[str, Any],
    asked: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr(handlers, "_check_host", lambda request: None)

    async def test(manager: Manager) -> None:
        await manager.database.write(lambda s: s.add(other(**there)))
        with pytest.raises(Conflict, match=said):
            await manager.operator.submit(CreateNetwork(name="new", mode="bridged", **asked))

    with_manager(test)


def test_networks_with_tags_of_their_own_share_a_bridge(
    with_manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "_check_host", lambda request: None)

    async def test(manager: Manager) -> None:
        await manager.database.write(lambda s: s.add(other(bridge="br-x", vlan=5)))
        request = CreateNetwork(name="new", mode="bridged", bridge="br-x", vlan=6)
        dry = await manager.operator.submit(request, dry_run=True)
        assert [step.name for step in dry.steps] == ["keep", "host"]
        assert "tag 6" in dry.steps[1].text
        assert [each.name for each in await networks_of(manager)] == ["there"]

    with_manager(test)


@pytest.mark.parametrize(
    ("may", "missing", "said"),
    [
        (False, (), "need root"),
        (True, ("nft", "dnsmasq"), "need nft, dnsmasq, which are not installed"),
        (True, ("ovs-vswitchd",), "need ovs-vswitchd, which is not installed"),
    ],
)
def test_a_bridged_network_is_refused_where_the_host_cannot_have_one(
    with_manager: Any,
    monkeypatch: pytest.MonkeyPatch,
    may: bool,
    missing: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.setattr(links, "may_administer", lambda: may)
    monkeypatch.setattr(
        shutil, "which", lambda program, **_: None if program in missing else f"/{program}"
    )

    async def test(manager: Manager) -> None:
        with pytest.raises(OperationFailed, match=said) as caught:
            await manager.operator.submit(CreateNetwork(name="n", mode="bridged", vlan=3))
        assert caught.value.hint

    with_manager(test)


def test_a_network_that_cannot_be_made_leaves_nothing(
    with_manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(manager: Manager) -> None:
        async def refuse(*_: object) -> None:
            raise VmlabError("the host has no room", hint="make some")

        monkeypatch.setattr(manager.networks.host, "ensure", refuse)
        made = await do(manager, CreateNetwork(name="lan"))
        assert made.state == "failed"
        assert made.error is not None
        assert "no room" in made.error["message"]
        assert await networks_of(manager) == []
        monkeypatch.undo()
        # The name is free again.
        assert (await do(manager, CreateNetwork(name="lan"))).state == "succeeded"

    with_manager(test)


def test_a_network_that_cannot_be_made_stays_with_a_machine_that_was_put_on_it_meanwhile(
    with_manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(manager: Manager) -> None:
        put: list[OperationDocument] = []
        torn_down: list[str] = []

        async def refuse(*_: object) -> None:
            machine = CreateMachine(
                name="one", host="simulated", spec={"memory": "64M"}, nics=(NewNic(network="lan"),)
            )
            put.append(await manager.operator.submit(machine))
            raise VmlabError("the host has no room", hint="make some")

        async def remove(network: str) -> None:
            torn_down.append(network)

        monkeypatch.setattr(manager.networks.host, "ensure", refuse)
        monkeypatch.setattr(manager.networks, "teardown", remove)
        made = await do(manager, CreateNetwork(name="lan"))
        assert made.state == "failed"
        assert made.error is not None
        assert made.error["message"] == "the host has no room"
        assert "could not be undone" not in str(made.error)
        assert torn_down == []
        monkeypatch.undo()
        assert (await manager.operator.wait(put[0].id, WAIT)).state == "succeeded"
        assert (await do(manager, StartMachine(machine="one"))).state == "succeeded"
        [network] = await networks_of(manager)
        assert network.used == 1

    with_manager(test)


def test_a_network_with_machines_on_it_is_not_removed(with_manager: Any) -> None:
    async def test(manager: Manager) -> None:
        await do(manager, CreateNetwork(name="lan"))
        machine = await do(
            manager,
            CreateMachine(
                name="one",
                host="simulated",
                spec={"memory": "64M"},
                nics=(NewNic(network="lan", address="10.214.0.9"),),
                start=True,
            ),
        )
        assert machine.state == "succeeded", machine.error
        [network] = await networks_of(manager)
        assert (network.used, network.free) == (1, 252)
        with pytest.raises(Conflict, match="1 machine on it: one"):
            await manager.operator.submit(DeleteNetwork(network="lan"))
        spec = await manager.database.read(lambda s: find_machine(s, "one").spec)
        assert spec["nics"][0]["network"] == f"segment:net-{network.id[:12]}"

    with_manager(test)


def test_a_network_of_the_mode_user_needs_nothing_of_the_host(with_manager: Any) -> None:
    async def test(manager: Manager) -> None:
        made = await do(manager, CreateNetwork(name="out", mode="user"))
        assert [step.name for step in made.steps] == ["keep"]
        [network] = await networks_of(manager)
        assert (network.subnet, network.free) == (None, None)
        assert (await manager.networks.ensure(network.id)).mode == "user"
        assert manager.networks.host.recorded() == {}

    with_manager(test)


def test_what_a_manager_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")

    async def begin() -> str:
        manager = await Manager.open(settings_of(home))
        async with manager:
            await do(manager, CreateNetwork(name="lan"))
            row = await manager.database.read(lambda s: find_network(s, "lan").id)
            # As if it had been killed between the two steps of a delete.
            await manager.database.write(lambda s: s.delete(find_network(s, "lan")))
        return row

    async def next_one(network: str) -> None:
        manager = await Manager.open(settings_of(home))
        assert network in manager.networks.host.recorded()
        async with manager:
            assert manager.networks.host.recorded() == {}

    asyncio.run(next_one(asyncio.run(begin())))
