"""Interfaces of the host that belong to nothing, and those that are lacking; in a namespace."""

from __future__ import annotations

from asyncio import to_thread

import pytest
from tests.integration.manager.wires import Client
from tests.integration.manager.wires import run as shell
from tests.needs import needs

from vmlab.hypervisors.monitored.networks import bridge_port
from vmlab.manager.networks import links, names
from vmlab.manager.networks.addresses import take
from vmlab.manager.requests import CreateNetwork, DeleteMachine, NewNic
from vmlab.manager.settings import HostSetting
from vmlab.manager.store.queries import find_machine, find_network
from vmlab.manager.store.tables import NicRow


@pytest.mark.usefixtures("namespace")
def test_a_bridge_of_no_network_is_found_and_removed(run):
    async def test(watched):
        await watched.did(CreateNetwork(name="lan", mode="bridged", subnet="10.9.0.0/24"))
        name = names.interface("bridge", "f" * 32)
        await to_thread(
            links.make_bridge, name, names.alias(watched.manager.networks.host.home, "f" * 32)
        )
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


@needs("qemu-system-x86_64")
@pytest.mark.usefixtures("namespace")
def test_a_machine_whose_bridge_or_tap_is_lost_is_put_back_on_its_network(run):
    async def joined():
        there = await to_thread(links.links)
        named = {link.index: link.name for link in there.values()}
        return {name: named.get(link.master) for name, link in there.items()}

    async def test(watched):
        await watched.did(CreateNetwork(name="lan", mode="bridged", subnet="10.9.0.0/24"))
        spec = {"architecture": "x86_64", "memory": "32M", "channels": []}
        nics = (NewNic(network="lan"),)
        document = await watched.machine_of("web", host="qemu", spec=spec, nics=nics)
        await watched.nothing()
        machine = await watched.at_host("web")
        network = await watched.manager.database.read(lambda s: find_network(s, "lan").id)
        bridge = names.interface("bridge", network)
        tap = bridge_port(machine.hypervisor.owner, machine.id, document.nics[0].name)
        assert (await joined())[tap] == bridge
        # The kernel lets go of a bridge's ports when it is removed.
        await to_thread(links.remove, bridge)
        assert (await joined())[tap] is None
        finding = await watched.found("lost-interface")
        assert (finding.subject, finding.evidence["kind"]) == (bridge, "bridge")
        await watched.repaired(finding, "reconcile")
        assert (await joined())[tap] == bridge
        await watched.nothing()
        # Somebody puts it elsewhere.
        await to_thread(links.make_bridge, "somebodys", "of somebody")
        await to_thread(links.join, tap, "somebodys")
        finding = await watched.found("lost-interface")
        assert (finding.subject, finding.evidence["lacking"]) == (tap, False)
        await watched.repaired(finding, "reconcile")
        assert (await joined())[tap] == bridge
        await watched.nothing()
        # It is gone altogether, and nobody in the guest could take a new one.
        await to_thread(links.remove, tap)
        finding = await watched.found("lost-interface")
        assert (finding.subject, finding.evidence["lacking"]) == (tap, True)
        assert finding.evidence["machine"] == document.id
        await watched.did(DeleteMachine(machine="web", force=True))
        await watched.nothing()

    run(test, hosts=(HostSetting(name="qemu", hypervisor="qemu"),))


@pytest.mark.usefixtures("namespace")
def test_a_guest_that_took_another_ones_address_is_found_by_the_hosts_neighbours(run):
    async def test(watched):
        await watched.did(CreateNetwork(name="lan", mode="bridged", subnet="10.9.0.0/24"))
        for name in ("web", "db"):
            await watched.machine_of(name, nics=(NewNic(network="lan"),))

        def all_take(session):
            for name in ("web", "db"):
                take(session, find_machine(session, name))
            return find_network(session, "lan").id

        network = await watched.manager.database.write(all_take)
        await watched.manager.networks.ensure(network)
        (web,), (db,) = [(await watched.machine(name)).nics for name in ("web", "db")]
        # A simulated machine has no wire: this is what the guest of "db" does on it.
        guest = await to_thread(Client)
        try:
            words = ("ip", "link", "set", "eth0", "address", db.mac)
            await to_thread(guest.run, *words)
            await to_thread(guest.run, "ip", "addr", "add", f"{web.addresses[0]}/24", "dev", "eth0")
            await to_thread(guest.plug, names.interface("bridge", network))
            ping = ("busybox", "ping", "-c", "1", "-w", "120", web.addresses[0])
            assert "1 packets received" in await to_thread(shell, *ping)
            finding = await watched.found("address-conflict")
            assert finding.name == web.addresses[0]
            assert finding.evidence["seen_in"] == ["neighbour"]
            assert finding.evidence["used_by"] == [db.mac]
            assert finding.evidence["belongs_to"] == web.mac
            assert [each["nic"] for each in finding.evidence["intruders"]] == [db.name]
            await watched.repaired(finding, "quarantine")
            assert (await watched.at_host("db")).spec.nics == ()
            assert len((await watched.at_host("web")).spec.nics) == 1
        finally:
            await to_thread(guest.close)

    run(test)
