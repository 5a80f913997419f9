"""Guests of QEMU's on the manager's networks: they ask for their addresses as any computer does.

One manager in a namespace of the test's own does it all, because booting is what takes time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from tests.needs import need
from tests.store import IMAGE_STORE

from vmlab.guests.guest import Guest
from vmlab.hypervisors import processes
from vmlab.hypervisors.ownership import Home
from vmlab.manager.documents import MachineDocument
from vmlab.manager.manager import Manager
from vmlab.manager.networks import links, nat
from vmlab.manager.operator import wiring
from vmlab.manager.requests import (
    CloneMachine,
    CreateMachine,
    CreateNetwork,
    DeleteMachine,
    DeleteNetwork,
    MachinePolicy,
    Metadata,
    NewNic,
    PauseMachine,
    RestoreMachine,
    ResumeMachine,
    SnapshotMachine,
    StartMachine,
    StopMachine,
)
from vmlab.manager.settings import HostSetting, Settings
from vmlab.manager.store.queries import find_machine, list_addresses, machine_document
from vmlab.manager.store.tables import AddressRow, NetworkRow

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(1800)]

WAIT = 600.0
# The guest asks for ten seconds when it boots, and a host may stand still for longer.
ADDRESS = """
until ip -4 -o addr show dev {0} | grep -q inet; do
    udhcpc -q -n -t 10 -T 1 -s /etc/udhcpc/default.script -i {0} >/dev/null 2>&1
done
ip -4 -o addr show dev {0} | awk '{{print $4}}'
"""
PING = "(for try in $(seq {1}); do ping -c 1 -W 2 {0} && exit; done; exit 1)"


class Office:
    """A manager with QEMU as its host, and what is done with it."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager

    async def did(self, request: Any) -> dict[str, Any]:
        operation = await self.manager.operator.submit(request)
        operation = await self.manager.operator.wait(operation.id, WAIT)
        assert operation.state == "succeeded", operation.error or operation
        if isinstance(request, CloneMachine | RestoreMachine):
            # Nothing of it was tried in vain.
            assert {step.state for step in operation.steps} == {"done"}, operation.steps
        return operation.result or {}

    async def machine(self, name: str) -> MachineDocument:
        return await self.manager.database.read(
            lambda s: machine_document(s, find_machine(s, name))
        )

    async def boot(self, name: str, *networks: str, **fields: Any) -> Guest:
        """A machine that runs, with a NIC on each of those networks."""
        nics = tuple(NewNic(network=network) for network in networks)
        fields = {"image": "debian-12-amd64-tiny", "memory": 192 << 20, **fields}
        await self.did(CreateMachine(name=name, nics=nics, start=True, **fields))
        return await self.guest(name)

    async def guest(self, name: str) -> Guest:
        """The guest of a machine that runs."""
        return await self.manager.guests.get((await self.machine(name)).id, timeout=WAIT)

    @staticmethod
    def keep(session: Session, addresses: list[str]) -> None:
        """Have addresses be taken, by nobody that is known, that were somebody's."""
        for network in session.scalars(select(NetworkRow)).all():
            for address in addresses:
                if ip_address(address) in ip_network(str(network.subnet)):
                    session.add(AddressRow(network_id=network.id, address=address))

    async def is_itself(self, name: str, *names: str) -> Guest:
        """A guest has the addresses of its machine and no others, on interfaces of those names."""
        machine, guest = await self.machine(name), await self.guest(name)
        assert (await guest.succeed("cat /proc/sys/kernel/hostname")).stdout == f"{name}\n"
        for interface, nic in zip(names, machine.nics, strict=True):
            mac = f"/sys/class/net/{interface}/address"
            assert (await guest.succeed(["cat", mac])).stdout.strip() == nic.mac
            assert await global_addresses(guest, interface) == set(nic.addresses)
        return guest

    async def addresses(self) -> set[tuple[str, str | None, str]]:
        """Who has what, by network."""
        page = await self.manager.database.read(list_addresses)
        return {(each.network, each.machine, each.address) for each in page.items}


async def address_of(guest: Guest, interface: str) -> str:
    """The address that a guest has, which asks by DHCP when it boots."""
    return (await guest.succeed(ADDRESS.format(interface), timeout=WAIT)).stdout.strip()


async def global_addresses(guest: Guest, interface: str) -> set[str]:
    """All that a guest has there, of both versions of IP, but for those of the link."""
    said = (await guest.succeed(["ip", "-o", "addr", "show", "dev", interface])).stdout
    words = [line.split() for line in said.splitlines()]
    return {each[3].partition("/")[0] for each in words if not each[3].startswith("fe80:")}


async def reaches(guest: Guest, address: str, *, tries: int = 60) -> bool:
    """Whether somebody answers there to a ping, each try of which takes two seconds."""
    return (await guest.execute(PING.format(address, tries), timeout=WAIT)).status == 0


@pytest.fixture
def office(
    namespace: None, home: Home, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Office], Any]], None]:
    """Runs a test with a manager."""
    need("qemu-system-x86_64")
    monkeypatch.setenv("VMLAB_IMAGE_STORE", str(IMAGE_STORE))
    monkeypatch.setattr(wiring, "_GUEST_ANSWERS_S", WAIT)

    async def work(test: Callable[[Office], Any]) -> None:
        settings = Settings(home=home, hosts=(HostSetting(name="qemu", hypervisor="qemu"),))
        manager = await Manager.open(settings)
        async with manager:
            try:
                await test(Office(manager))
            finally:
                for machine in await (await manager.hosts.get("qemu")).list():
                    await machine.delete(force=True)
                await manager.networks.host.sweep([])

    def run(test: Callable[[Office], Any]) -> None:
        asyncio.run(work(test))
        processes.wait_for_dead_children()

    return run


def test_guests_get_the_store_s_addresses_and_reach_whom_they_should(
    office: Callable[[Callable[[Office], Any]], None],
    client: Callable[[], Any],
    sh: Callable[..., str],
) -> None:
    outside = client()
    outside.run("ip", "addr", "add", "203.0.113.9/24", "dev", "eth0")
    sh("ip", "addr", "add", "203.0.113.1/24", "dev", outside.port)
    before = set(links.links())

    async def test(office: Office) -> None:
        await office.did(CreateNetwork(name="lan", subnet="10.9.0.0/24"))
        for name, tag in (("red", 10), ("green", 20)):
            subnet = f"10.9.{tag}.0/24"
            await office.did(CreateNetwork(name=name, mode="bridged", vlan=tag, subnet=subnet))
        policy = MachinePolicy(release_addresses="stop")
        one, two, other = await asyncio.gather(
            office.boot(
                "one", "red", "lan", policy=policy, metadata=Metadata(user_data="#cloud-config\n")
            ),
            office.boot("two", "red", "lan"),
            office.boot("other", "green"),
        )
        taken = await office.addresses()
        assert {(network, machine) for network, machine, _ in taken} == {
            ("red", "one"), ("lan", "one"), ("red", "two"), ("lan", "two"), ("green", "other"),
        }  # fmt: skip
        found = set()
        for name, guest, networks in (
            ("one", one, ("red", "lan")),
            ("two", two, ("red", "lan")),
            ("other", other, ("green",)),
        ):
            for number, network in enumerate(networks):
                given = await address_of(guest, f"eth{number}")
                assert given.endswith("/24"), (name, network, given)
                found.add((network, name, given.removesuffix("/24")))
        assert found == taken
        at = {(network, name): address for network, name, address in taken}
        # Without rights and by tag, machines of one network reach each other, and the outside.
        assert await reaches(one, at["lan", "two"])
        assert await reaches(one, at["red", "two"])
        assert await reaches(one, "203.0.113.9")
        assert await reaches(other, "203.0.113.9")
        assert not await reaches(other, at["red", "one"], tries=3)
        # Not by the address of the other tag either.
        await other.succeed("ip addr add 10.9.10.99/24 dev eth0")
        assert not await reaches(other, at["red", "one"], tries=3)
        # A megabyte by TCP through a bridge, with checksums that are left to the NICs.
        # (What listens ends when its own input does, so that has none.)
        await two.succeed("(tail -f /dev/null | nc -l -p 9 | wc -c >/tmp/got) >/dev/null 2>&1 &")
        await one.succeed(
            f"head -c 1048576 /dev/zero >/tmp/sent; until nc {at['red', 'two']} 9 </tmp/sent; "
            "do sleep 0.2; done",
            timeout=WAIT,
        )
        assert (await two.succeed("until [ -s /tmp/got ]; do sleep 0.1; done; cat /tmp/got")
        ).stdout.strip() == "1048576"  # fmt: skip
        # The metadata service knows who asks.
        wanted = f"i-{(await office.machine('one')).id[:17]}"
        fetch = "wget -q -O - http://169.254.169.254/latest/"
        assert (await one.succeed(fetch + "meta-data/instance-id")).stdout == wanted
        assert (await one.succeed(fetch + "user-data")).stdout == "#cloud-config\n"
        assert (await two.succeed(fetch + "meta-data/local-hostname")).stdout == "two"
        # The seed says the same.
        await one.succeed(
            "mkdir -p /tmp/seed; mount -r LABEL=cidata /tmp/seed 2>/dev/null || "
            "for disk in /dev/vd? /dev/sd?; do mount -r -t iso9660 $disk /tmp/seed && break; done"
        )
        assert wanted in (await one.succeed("cat /tmp/seed/meta-data")).stdout

        await office.did(StopMachine(machine="one", graceful=False))
        await office.did(StopMachine(machine="two", graceful=False))
        assert {machine for _, machine, _ in await office.addresses()} == {"two", "other"}
        for name in ("one", "two", "other"):
            await office.did(DeleteMachine(machine=name, force=True))
        assert await office.addresses() == set()
        for name in ("lan", "red", "green"):
            await office.did(DeleteNetwork(network=name))
        assert set(await asyncio.to_thread(links.links)) == before
        assert nat.tables() == frozenset()
        assert list(office.manager.networks.host.directory.iterdir()) == []

    office(test)


MOUNT_SEED = (
    "mkdir -p /tmp/own; for disk in /dev/vd? /dev/sd?; do "
    "mount -r -t iso9660 $disk /tmp/own && break; done 2>/dev/null; cat /tmp/own/meta-data"
)


def test_copies_of_a_machine_that_runs_take_addresses_of_their_own(
    office: Callable[[Callable[[Office], Any]], None],
) -> None:
    async def test(office: Office) -> None:
        await office.did(CreateNetwork(name="lan", subnet="10.9.0.0/24"))
        await office.did(CreateNetwork(name="red", mode="bridged", subnet="10.9.10.0/24"))
        told = Metadata(user_data="#cloud-config\n")
        policy = MachinePolicy(release_addresses="stop")
        await office.boot("one", "red", "lan", metadata=told, policy=policy)
        await office.did(SnapshotMachine(machine="one", name="good", memory=True))
        await office.did(CloneMachine(machine="one", name="forked"))
        await office.did(CloneMachine(machine="one", name="revived", snapshot="good"))
        at = {}
        for name in ("one", "forked", "revived"):
            guest = await office.is_itself(name, "eth0", "eth1")
            at[name] = [nic.addresses[0] for nic in (await office.machine(name)).nics]
            # What it was reached by, and reaches others by, it has still.
            assert "default via 10.9.10.1" in (await guest.succeed("ip route")).stdout
            assert await reaches(guest, "10.9.10.1")
        assert len({address for each in at.values() for address in each}) == 6
        for name, others in (("forked", ("one", "revived")), ("revived", ("one", "forked"))):
            for other in others:
                for address in at[other]:
                    assert await reaches(await office.guest(name), address), (name, other, address)
        # A copy that stood still is told when it is resumed.
        await office.did(PauseMachine(machine="one"))
        still = await office.manager.operator.submit(CloneMachine(machine="one", name="still"))
        assert (await office.manager.operator.wait(still.id, WAIT)).state == "succeeded"
        for name in ("one", "still"):
            await office.did(ResumeMachine(machine=name))
            guest = await office.is_itself(name, "eth0", "eth1")
            assert await reaches(guest, at["forked"][0])
        await office.did(DeleteMachine(machine="still", force=True))
        # Its disk for cloud-init is another one, now and after its next start.
        machine = await office.machine("forked")
        wanted = f"i-{machine.id[:17]}"
        assert wanted in (await (await office.guest("forked")).succeed(MOUNT_SEED)).stdout
        # Somebody else has the first one's addresses by the time that it is brought back.
        await office.did(StopMachine(machine="one", graceful=False))
        await office.manager.database.write(office.keep, at["one"])
        await office.did(RestoreMachine(machine="one", snapshot="good"))
        restored = await office.is_itself("one", "eth0", "eth1")
        assert {nic.addresses[0] for nic in (await office.machine("one")).nics}.isdisjoint(
            at["one"]
        )
        assert abs(float((await restored.succeed("date +%s")).stdout) - time.time()) < 60
        assert await reaches(restored, at["forked"][0])
        await office.did(DeleteMachine(machine="one", force=True))
        await office.did(StopMachine(machine="forked", graceful=False))
        await office.did(StartMachine(machine="forked"))
        guest = await office.guest("forked")
        assert wanted in (await guest.succeed(MOUNT_SEED)).stdout
        assert await reaches(guest, at["revived"][1])

    office(test)


# What systemd-networkd has of DHCP (sd-dhcp-lease.c), and the addresses of both versions of IP.
LEASED = """
for i in {interfaces}; do
    four=$(cat /tmp/want-$i-4) six=$(cat /tmp/want-$i-6)
    lease=/run/systemd/netif/leases/$(cat /sys/class/net/$i/ifindex)
    until grep -q "^ADDRESS=$four$" $lease && ip -6 addr show dev $i | grep -q " $six/"; do
        sleep 0.2
    done
done
"""


def test_guests_with_systemd_get_addresses_of_both_versions_of_ip_and_so_do_their_copies(
    office: Callable[[Callable[[Office], Any]], None],
) -> None:
    async def told(office: Office, name: str, *interfaces: str) -> None:
        """Wait until its DHCP client has what the store has; then nothing else is there."""
        guest, machine = await office.guest(name), await office.machine(name)
        for interface, nic in zip(interfaces, machine.nics, strict=True):
            for address in nic.addresses:
                version = 6 if ":" in address else 4
                await guest.succeed(f"echo {address} >/tmp/want-{interface}-{version}")
        await guest.succeed(LEASED.format(interfaces=" ".join(interfaces)), timeout=WAIT)
        await office.is_itself(name, *interfaces)

    async def test(office: Office) -> None:
        await office.did(CreateNetwork(name="lan", subnet="10.9.0.0/24", subnet6="fd00:9::/64"))
        await office.did(
            CreateNetwork(name="red", mode="bridged", subnet="10.9.10.0/24", subnet6="fd00:10::/64")
        )
        guest = await office.boot("one", "red", "lan", image="debian-12-amd64", memory=768 << 20)
        found = (await guest.succeed("ls /sys/class/net")).stdout.split()
        interfaces = sorted(each for each in found if each != "lo")
        await told(office, "one", *interfaces)
        # By the advertisements of the router on the bridge; on the segment there is none.
        await guest.succeed(
            "until ip -6 route show default | grep -q default; do sleep 0.2; done", timeout=WAIT
        )
        routes = (await guest.succeed("ip -6 route show default")).stdout
        assert routes.count("default") == 1
        assert interfaces[0] in routes
        await office.did(CloneMachine(machine="one", name="two"))
        await told(office, "two", *interfaces)
        await told(office, "one", *interfaces)
        two = await office.guest("two")
        for nic in (await office.machine("one")).nics:
            for address in nic.addresses:
                assert await reaches(two, address), address

    office(test)
