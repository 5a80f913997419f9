"""Copies of machines have addresses and seeds of their own on the networks of the first; what a
guest is told is what the store says when it starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors.monitored.networks import segment_group
from vmlab.hypervisors.ownership import Store
from vmlab.machine.errors import OperationFailed
from vmlab.manager.guests import Guests
from vmlab.manager.operator import clones
from vmlab.manager.requests import (
    CloneMachine,
    CreateNetwork,
    DeleteMachine,
    DeleteNetwork,
    Metadata,
    NewNic,
    PauseMachine,
    RestartMachine,
    RestoreMachine,
    ResumeMachine,
    SnapshotMachine,
    StartMachine,
    StopMachine,
    UpdateMachine,
)

Tell = Callable[..., None]


async def on_a_network(asking: Any, **fields: Any) -> None:
    """A machine on a network of the manager's, whose guest is told something."""
    await asking.do(CreateNetwork(name="lan", subnet=IPv4Network("10.77.0.0/24")))
    spec = {"memory": "64M", "disks": [{"name": "root", "size": "16M"}]}
    metadata = Metadata(user_data="#cloud-config\n")
    nics = (NewNic(network="lan"),)
    await asking.create("one", spec=spec, nics=nics, metadata=metadata, **fields)


async def seed_of(asking: Any, name: str) -> Path:
    """The disk for cloud-init that a machine has at its hypervisor, which the store knows."""
    machine = await asking.machine(name)
    (path,) = [Path(d["source"]) for d in machine.spec["disks"] if d["name"] == "cidata"]
    held = (await asking.manager.machine(machine.id)).spec.disk("cidata")
    assert held is not None
    assert held.source == path
    return path


async def told_to(asking: Any, name: str) -> dict[str, Any]:
    """What a machine's guest is told: the metadata of its seed, and its NICs by MAC address."""
    files = json.loads((await seed_of(asking, name)).with_suffix(".json").read_text())
    ethernets = json.loads(files["network-config"])["ethernets"].values()
    macs = [each["match"]["macaddress"] for each in ethernets]
    return {**json.loads(files["meta-data"]), "user-data": files["user-data"], "macs": macs}


async def off_the_network(asking: Any, *names: str) -> None:
    """Nothing of it outlives the test: what serves a network outlives its manager."""
    for name in names:
        await asking.do(DeleteMachine(machine=name, force=True))
    await asking.do(DeleteNetwork(network="lan"))


def test_an_isolated_network_is_one_wire_on_all_hosts(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        groups = set()
        for host in ("simulated", "other"):
            owner = (await asking.manager.hosts.get(host)).owner
            groups.add(segment_group(owner, "net-lan"))
        # The one that its DHCP server is on.
        served = Store.open(asking.manager.settings.home, "manager").owner
        assert groups == {segment_group(served, "net-lan")}

    tell(story)


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


def test_copies_are_told_who_they_are_whether_they_run_or_not(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await on_a_network(asking, start=True)
        before = await told_to(asking, "one")
        await asking.do(CloneMachine(machine="one", name="forked"))
        await asking.do(StopMachine(machine="one", graceful=False))
        await asking.do(CloneMachine(machine="one", name="copied"))
        for name in ("forked", "copied"):
            machine, told = await asking.machine(name), await told_to(asking, name)
            assert (await seed_of(asking, name)).stem == machine.id
            assert told["instance-id"] == f"i-{machine.id[:17]}"
            assert told["local-hostname"] == name
            assert told["macs"] == [machine.nics[0].mac]
        assert await told_to(asking, "one") == before
        # What is the first one's goes with it, and leaves nothing that the others need.
        await asking.do(DeleteMachine(machine="one"))
        await asking.do(StopMachine(machine="forked", graceful=False))
        for name in ("forked", "copied"):
            await asking.do(StartMachine(machine=name))
            assert (await seed_of(asking, name)).exists()
        await off_the_network(asking, "forked", "copied")

    tell(story)


def test_disk_that_a_running_guest_keeps_is_no_reason_to_fail_and_one_at_rest_is(
    tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def kept(*_: Any) -> None:
        raise OperationFailed("the guest does not let go of it")

    async def story(asking: Any) -> None:
        await on_a_network(asking, start=True)
        with monkeypatch.context() as patched:
            patched.setattr(clones, "reseed", kept)
            forked = await asking.ask(CloneMachine(machine="one", name="two"))
            states = {step.name: step.state for step in forked.steps}
            assert (forked.state, states["seed"]) == ("succeeded", "failed")
            await asking.do(StopMachine(machine="one", graceful=False))
            said = await asking.fail(CloneMachine(machine="one", name="three"))
            assert said == "the guest does not let go of it"
        assert await asking.refuse(StartMachine(machine="three"))
        # It is told at its next start.
        await asking.do(StopMachine(machine="two", graceful=False))
        await asking.do(StartMachine(machine="two"))
        assert (await told_to(asking, "two"))["local-hostname"] == "two"
        await off_the_network(asking, "one", "two")

    tell(story)


def test_copy_that_stands_still_is_told_when_it_is_started_again(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await on_a_network(asking, start=True)
        await asking.do(PauseMachine(machine="one"))
        await asking.do(CloneMachine(machine="one", name="two"))
        assert (await seed_of(asking, "two")) == (await seed_of(asking, "one"))
        await asking.do(StopMachine(machine="two", graceful=False))
        await asking.do(StartMachine(machine="two"))
        assert (await told_to(asking, "two"))["local-hostname"] == "two"
        await off_the_network(asking, "one", "two")

    tell(story)


class Told:
    """What a guest is told, in place of a guest."""

    def __init__(self) -> None:
        self.refreshed: list[dict[str, Any]] = []
        self.scripts: list[str] = []

    async def refresh(self, **words: Any) -> None:
        self.refreshed.append(words)

    async def succeed(self, script: str, *, timeout: float) -> None:
        self.scripts.append(script)


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> dict[str, Told]:
    """The guests that were asked for, by the id of their machine."""
    found: dict[str, Told] = {}

    async def get(_: Guests, machine_id: str, *, timeout: float) -> Told:
        return found.setdefault(machine_id, Told())

    monkeypatch.setattr(Guests, "get", get)
    return found


def test_copy_that_stands_still_is_told_its_addresses_when_it_is_resumed(
    tell: Tell, guests: dict[str, Told]
) -> None:
    async def story(asking: Any) -> None:
        await on_a_network(asking, start=True)
        await asking.do(PauseMachine(machine="one"))
        await asking.do(CloneMachine(machine="one", name="two"))
        # A copy of what was not told yet remembers what that does.
        await asking.do(CloneMachine(machine="two", name="three"))
        assert guests == {}
        one = await asking.machine("one")
        for name in ("two", "three"):
            copy = await asking.machine(name)
            resumed = await asking.ask(ResumeMachine(machine=name))
            assert [step.state for step in resumed.steps] == ["done", "done"]
            told = guests[copy.id]
            assert told.refreshed == [
                {
                    "hostname": name,
                    "machine_id": copy.id,
                    "macs": {one.nics[0].mac: copy.nics[0].mac},
                }
            ]
            (script,) = told.scripts
            assert copy.nics[0].addresses[0] in script
            assert one.nics[0].addresses[0] not in script
        # Once is enough, and who stood still all the time is the same as before.
        await asking.do(PauseMachine(machine="two"))
        for name in ("one", "two"):
            resumed = await asking.ask(ResumeMachine(machine=name))
            assert [step.state for step in resumed.steps] == ["done", "skipped"]
        assert len(guests) == 2
        await off_the_network(asking, "one", "two", "three")

    tell(story)


def test_copy_that_boots_finds_its_addresses_by_itself(tell: Tell, guests: dict[str, Told]) -> None:
    async def story(asking: Any) -> None:
        await on_a_network(asking, start=True)
        await asking.do(PauseMachine(machine="one"))
        await asking.do(CloneMachine(machine="one", name="two"))
        await asking.do(StopMachine(machine="two", graceful=False))
        await asking.do(StartMachine(machine="two"))
        await asking.do(PauseMachine(machine="two"))
        await asking.do(ResumeMachine(machine="two"))
        assert guests == {}
        await off_the_network(asking, "one", "two")

    tell(story)


def test_what_is_brought_back_standing_still_is_told_the_time_when_it_is_resumed(
    tell: Tell, guests: dict[str, Told]
) -> None:
    async def story(asking: Any) -> None:
        await on_a_network(asking, start=True)
        await asking.do(PauseMachine(machine="one"))
        await asking.do(SnapshotMachine(machine="one", name="still"))
        await asking.do(StopMachine(machine="one", graceful=False))
        await asking.do(RestoreMachine(machine="one", snapshot="still"))
        assert (await asking.machine("one")).state == "paused"
        assert guests == {}
        await asking.do(ResumeMachine(machine="one"))
        (told,) = guests.values()
        # It is the same machine: its name and its id are its own.
        assert told.refreshed == [{"hostname": None, "machine_id": None, "macs": {}}]
        await off_the_network(asking, "one")

    tell(story)


def test_what_is_changed_is_told_at_the_next_start(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await on_a_network(asking, start=True)
        first = await told_to(asking, "one")
        await asking.do(UpdateMachine(machine="one", metadata=Metadata(user_data="#!/bin/sh\n")))
        assert await told_to(asking, "one") == first

        async def again() -> dict[str, Any]:
            await asking.do(StopMachine(machine="one", graceful=False))
            await asking.do(StartMachine(machine="one"))
            return await told_to(asking, "one")

        changed = await again()
        assert changed["user-data"] == "#!/bin/sh\n"
        # cloud-init begins anew.
        assert changed["instance-id"] == first["instance-id"] + "-1"
        # It sets a name at every boot: that is no reason to run all the rest again.
        metadata = Metadata(user_data="#!/bin/sh\n", hostname="other")
        await asking.do(UpdateMachine(machine="one", metadata=metadata))
        renamed = await again()
        assert renamed == {**changed, "local-hostname": "other"}
        # Also what it was told once before is new to it.
        await asking.do(
            UpdateMachine(machine="one", metadata=Metadata(user_data="#cloud-config\n"))
        )
        assert (await again())["instance-id"] == first["instance-id"] + "-2"
        # And a person can want it.
        metadata = Metadata(user_data="#cloud-config\n", instance=7)
        await asking.do(UpdateMachine(machine="one", metadata=metadata))
        assert (await again())["instance-id"] == first["instance-id"] + "-7"
        await off_the_network(asking, "one")

    tell(story)


def test_machine_has_a_seed_while_there_is_something_to_tell(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.do(StartMachine(machine="one"))
        assert [d["name"] for d in (await asking.machine("one")).spec["disks"]] == ["root"]
        key = "ssh-ed25519 AAAA me"
        await asking.do(UpdateMachine(machine="one", metadata=Metadata(ssh_keys=(key,))))
        await asking.do(RestartMachine(machine="one"))
        path = await seed_of(asking, "one")
        assert key in path.with_suffix(".json").read_text()
        await asking.do(UpdateMachine(machine="one", metadata=Metadata()))
        await asking.do(StopMachine(machine="one", graceful=False))
        await asking.do(StartMachine(machine="one"))
        assert [d["name"] for d in (await asking.machine("one")).spec["disks"]] == ["root"]
        # A disk of that name that somebody gave the machine is nobody else's.
        spec = {"memory": "64M", "disks": [{"name": "cidata", "size": "1M"}]}
        await asking.create("two", spec=spec, metadata=Metadata(ssh_keys=(key,)))
        await asking.do(StartMachine(machine="two"))
        assert (await asking.machine("two")).spec["disks"] == spec["disks"]

    tell(story)
