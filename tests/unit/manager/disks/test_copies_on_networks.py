"""Copies of machines have addresses and seeds of their own on the networks of the first."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Network
from typing import Any

from vmlab.manager.requests import (
    CloneMachine,
    CreateNetwork,
    DeleteMachine,
    DeleteNetwork,
    Metadata,
    NewNic,
    RestoreMachine,
    SnapshotMachine,
    StartMachine,
    StopMachine,
)

Tell = Callable[..., None]


async def on_a_network(asking: Any, **fields: Any) -> None:
    """A machine on a network of the manager's, whose guest is told something."""
    await asking.do(CreateNetwork(name="lan", subnet=IPv4Network("10.77.0.0/24")))
    spec = {"memory": "64M", "disks": [{"name": "root", "size": "16M"}]}
    metadata = Metadata(user_data="#cloud-config\n")
    nics = (NewNic(network="lan"),)
    await asking.create("one", spec=spec, nics=nics, metadata=metadata, **fields)


async def off_the_network(asking: Any, *names: str) -> None:
    """Nothing of it outlives the test: what serves a network outlives its manager."""
    for name in names:
        await asking.do(DeleteMachine(machine=name, force=True))
    await asking.do(DeleteNetwork(network="lan"))


def test_fork_has_an_address_of_its_own(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await on_a_network(asking, start=True)
        await asking.do(CloneMachine(machine="one", name="two"))
        one, two = await asking.machine("one"), await asking.machine("two")
        assert one.nics[0].network == two.nics[0].network == "lan"
        assert len(one.nics[0].addresses) == len(two.nics[0].addresses) == 1
        assert set(one.nics[0].addresses).isdisjoint(two.nics[0].addresses)
        assert one.nics[0].mac != two.nics[0].mac
        await off_the_network(asking, "one", "two")

    tell(story)


def test_clone_at_rest_is_told_who_it_is(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await on_a_network(asking)
        await asking.do(CloneMachine(machine="one", name="two"))
        seeds = {}
        for name in ("one", "two"):
            spec = (await asking.machine(name)).spec
            (seeds[name],) = [d["source"] for d in spec["disks"] if d["name"] == "cidata"]
        assert seeds["one"] != seeds["two"]
        # What is the first one's goes with it.
        await asking.do(DeleteMachine(machine="one"))
        await asking.do(StartMachine(machine="two"))
        assert len((await asking.machine("two")).nics[0].addresses) == 1
        await off_the_network(asking, "two")

    tell(story)


def test_machine_that_is_brought_back_running_has_its_address(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await on_a_network(asking, start=True)
        before = (await asking.machine("one")).nics[0].addresses
        await asking.do(SnapshotMachine(machine="one", name="good"))
        await asking.do(StopMachine(machine="one"))
        await asking.do(RestoreMachine(machine="one", snapshot="good"))
        machine = await asking.machine("one")
        assert (machine.state, machine.nics[0].addresses) == ("running", before)
        await off_the_network(asking, "one")

    tell(story)
