"""Interfaces of the host that belong to nothing, and those that are lacking; in a namespace."""

from __future__ import annotations

import ctypes
import os
from asyncio import to_thread
from collections.abc import Iterator

import pytest

from vmlab.hypervisors import processes
from vmlab.manager.networks import links, names
from vmlab.manager.requests import CreateNetwork
from vmlab.manager.store.queries import find_network
from vmlab.manager.store.tables import NicRow

_CLONE_NEWNET = 0x40000000  # linux/sched.h


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test is in a network namespace of its own."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for a network namespace")
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    assert libc.unshare(_CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    try:
        # Programs are started by a thread that may have been there before.
        monkeypatch.setattr(processes, "_spawner", None)
        yield
    finally:
        assert libc.setns(before, _CLONE_NEWNET) == 0
        os.close(before)


def home_of(watched):
    return names.digest(watched.manager.settings.directory / "networks")


@pytest.mark.usefixtures("namespace")
def test_a_bridge_of_no_network_is_found_and_removed(run):
    async def test(watched):
        await watched.did(CreateNetwork(name="lan", mode="bridged", subnet="10.9.0.0/24"))
        name = names.interface("bridge", "f" * 32)
        await to_thread(links.make_bridge, name, names.alias(home_of(watched), "f" * 32))
        await to_thread(links.make_bridge, "somebodys", "of somebody")
        finding = await watched.found("lost-interface")
        assert finding.subject == name
        await watched.repaired(finding, "reconcile")
        assert name not in await to_thread(links.links)
        assert "somebodys" in await to_thread(links.links)
        await watched.nothing()

    run(test)


async def network_of(watched, **fields):
    """A network in use: a machine that runs has a NIC on it."""
    await watched.did(CreateNetwork(name="lan", mode="bridged", subnet="10.9.0.0/24", **fields))
    machine = await watched.machine_of("web")

    def put_on(session):
        network = find_network(session, "lan")
        session.add(
            NicRow(
                machine_id=machine.id,
                name="net0",
                mode="network",
                network_id=network.id,
                mac="52:54:00:00:00:01",
            )
        )
        return network.id

    network = await watched.manager.database.write(put_on)
    await watched.manager.networks.ensure(network)
    await watched.nothing()
    return network


async def found_and_made_again(watched, network, name):
    """The one thing that is lost is that interface, and a repair brings all of it back."""
    finding = await watched.found("lost-interface")
    assert (finding.subject, finding.severity) == (name, "error")
    await watched.repaired(finding, "reconcile")
    assert name in await to_thread(links.links)
    assert await watched.manager.networks.missing(network) == []
    await watched.nothing()


@pytest.mark.usefixtures("namespace")
def test_a_bridge_that_a_running_machine_needs_is_found_and_made_again(run):
    async def test(watched):
        network = await network_of(watched)
        bridge = names.interface("bridge", network)
        await to_thread(links.remove, bridge)
        await found_and_made_again(watched, network, bridge)

    run(test)


@pytest.mark.usefixtures("namespace")
@pytest.mark.parametrize("lost", ["port of the switch", "port of the host", "bridge"])
def test_what_a_network_with_a_tag_lost_is_found_and_made_again(run, lost):
    async def test(watched):
        network = await network_of(watched, vlan=7)
        bridge, port = (names.interface(kind, network) for kind in ("bridge", "port"))
        if lost == "port of the switch":
            await watched.manager.networks.host.switch.control("del-port", port)
        else:
            await to_thread(links.remove, bridge if lost == "bridge" else port)
        await found_and_made_again(watched, network, bridge if lost == "bridge" else port)

    run(test)
