from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy.orm import Session
from tests.unit.manager.store.rows import add_machine, add_network, add_nic

from vmlab.machine.errors import InvalidSpec, ResourceExhausted
from vmlab.manager.networks import addresses
from vmlab.manager.networks.layout import Lease
from vmlab.manager.store.changes import Conflict
from vmlab.manager.store.database import Database
from vmlab.manager.store.queries import list_addresses, list_events
from vmlab.manager.store.tables import AddressRow, MachineRow, NetworkRow

SUBNETS = {"subnet": "10.9.0.0/29", "subnet6": "fd00:9::/64"}


def machine_on(s: Session, name: str, network: NetworkRow, **nic: Any) -> MachineRow:
    row = add_machine(s, name)
    made = add_nic(s, row, network)
    for column, value in nic.items():
        setattr(made, column, value)
    return row


def taken(s: Session, machine: MachineRow) -> list[str]:
    return [row.address for row in addresses.take(s, machine)]


def test_each_nic_gets_the_first_free_address_of_each_subnet_and_keeps_it(
    database: Database,
) -> None:
    def work(s: Session) -> None:
        lan = add_network(s, "lan", **SUBNETS)
        one, two = machine_on(s, "one", lan), machine_on(s, "two", lan)
        add_nic(s, one)  # on no network of the store's
        assert taken(s, one) == ["10.9.0.2", "fd00:9::2"]
        assert taken(s, two) == ["10.9.0.3", "fd00:9::3"]
        assert taken(s, one) == []

    database.write_now(work)
    page = database.read_now(list_addresses)
    assert {(each.address, each.machine) for each in page.items} == {
        ("10.9.0.2", "one"),
        ("fd00:9::2", "one"),
        ("10.9.0.3", "two"),
        ("fd00:9::3", "two"),
    }
    kinds = [event.kind for event in database.read_now(list_events).items]
    assert kinds.count("address.taken") == 4


def test_an_address_that_is_given_back_is_the_next_one_s(database: Database) -> None:
    def work(s: Session) -> None:
        lan = add_network(s, "lan", **SUBNETS)
        one, two = machine_on(s, "one", lan), machine_on(s, "two", lan)
        taken(s, one)
        assert addresses.release(s, one.id) == ["10.9.0.2", "fd00:9::2"]
        assert addresses.release(s, one.id) == []
        s.flush()
        assert taken(s, two) == ["10.9.0.2", "fd00:9::2"]

    database.write_now(work)
    events = database.read_now(lambda s: list_events(s, kind="address.released")).items
    assert [event.data["address"] for event in events] == ["10.9.0.2", "fd00:9::2"]
    assert {event.data["machine_name"] for event in events} == {"one"}


@pytest.mark.parametrize(
    ("policy", "when", "released"),
    [
        ("stop", "stop", True),
        ("delete", "stop", False),
        ("delete", "delete", True),
        ("stop", "delete", True),
        ("delete", None, True),
    ],
)
def test_addresses_are_given_back_when_the_policy_says_so(
    database: Database, policy: str, when: str | None, released: bool
) -> None:
    def work(s: Session) -> None:
        lan = add_network(s, "lan", subnet="10.9.0.0/24")
        one = machine_on(s, "one", lan)
        one.policy = {"release_addresses": policy}
        taken(s, one)
        assert bool(addresses.release(s, one.id, when=when)) is released

    database.write_now(work)


def test_a_machine_gets_the_address_that_it_asks_for_or_nothing(database: Database) -> None:
    def work(s: Session) -> None:
        lan = add_network(s, "lan", reserved=["10.9.0.4"], **SUBNETS)
        one = machine_on(s, "one", lan, requested_address="10.9.0.5")
        assert taken(s, one) == ["10.9.0.5", "fd00:9::2"]
        for number, address in enumerate(["10.9.0.1", "10.9.0.4", "10.9.1.1"]):
            with pytest.raises(InvalidSpec, match=r"nics\.address"):
                taken(s, machine_on(s, f"wrong{number}", lan, requested_address=address))
        with pytest.raises(Conflict, match="belongs to machine 'one'"):
            taken(s, machine_on(s, "late", lan, requested_address="10.9.0.5"))

    database.write_now(work)


def test_a_network_without_addresses_gives_none_and_takes_no_wish(database: Database) -> None:
    def work(s: Session) -> None:
        plain = add_network(s, "plain", mode="user")
        assert taken(s, machine_on(s, "one", plain)) == []
        with pytest.raises(InvalidSpec, match="an address of the network 'plain'"):
            addresses.check_request(s, plain, "10.9.0.5")

    database.write_now(work)


def test_a_network_that_is_full_says_so_and_gives_nothing(database: Database) -> None:
    def fill(s: Session) -> None:
        lan = add_network(s, "lan", subnet="10.9.0.0/29")
        for number in range(5):
            taken(s, machine_on(s, f"m{number}", lan))

    database.write_now(fill)

    def one_more(s: Session) -> None:
        lan = s.query(NetworkRow).one()
        taken(s, machine_on(s, "more", lan))

    with pytest.raises(
        ResourceExhausted, match=r"'lan' has no address left of 5 in 10\.9\.0\.0/29"
    ):
        database.write_now(one_more)
    assert database.read_now(lambda s: s.query(MachineRow).count()) == 5


def test_the_database_keeps_an_address_from_having_two_owners(database: Database) -> None:
    def work(s: Session) -> None:
        lan = add_network(s, "lan", subnet="10.9.0.0/24")
        for name in ("one", "two"):
            row = machine_on(s, name, lan)
            s.add(AddressRow(network_id=lan.id, address="10.9.0.7", machine_id=row.id))

    with pytest.raises(Conflict, match="address of the network is taken"):
        database.write_now(work)


def test_machines_that_start_at_once_get_addresses_of_their_own(database: Database) -> None:
    def make(s: Session) -> list[str]:
        lan = add_network(s, "lan", subnet="10.9.0.0/24")
        return [machine_on(s, f"m{number}", lan).id for number in range(20)]

    def start(s: Session, machine: str) -> str:
        return taken(s, s.get_one(MachineRow, machine))[0]

    machines = database.write_now(make)

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(database.write(start, each) for each in machines))

    given = asyncio.run(all_at_once())
    assert sorted(given) == sorted(f"10.9.0.{number}" for number in range(2, 22))


def test_who_serves_a_network_is_told_of_all_who_are_on_it(database: Database) -> None:
    def work(s: Session) -> None:
        lan, other = add_network(s, "lan", **SUBNETS), add_network(s, "o", subnet="10.8.0.0/24")
        one = machine_on(s, "web_1.example", lan, mac="52:54:00:ff:00:02")
        two = machine_on(s, "two", lan, mac="52:54:00:ff:00:01")
        two.metadata_ = {"hostname": "db"}
        for machine in (one, two, machine_on(s, "three", other)):
            taken(s, machine)
        assert addresses.leases(s, lan.id) == [
            Lease("52:54:00:ff:00:01", "db", ("10.9.0.3", "fd00:9::3")),
            Lease("52:54:00:ff:00:02", "web-1-example", ("10.9.0.2", "fd00:9::2")),
        ]
        found = addresses.machine_at(s, lan.id, "fd00:9:0::3")
        assert found is not None
        assert (found[0].name, found[1].mac) == ("two", "52:54:00:ff:00:01")
        assert addresses.machine_at(s, other.id, "10.9.0.3") is None

    database.write_now(work)


@pytest.mark.parametrize(
    ("name", "host"),
    [("one", "one"), ("a_b..c", "a-b-c"), ("x" * 63, "x" * 63), ("-_-", "m-0123456789ab")],
)
def test_the_guest_s_name_is_one_that_hosts_can_have(name: str, host: str) -> None:
    row = MachineRow(id="0123456789ab" + "0" * 20, name=name, metadata_={})
    assert addresses.host_name(row) == host
