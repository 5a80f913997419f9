from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmlab.machine.errors import InvalidSpec
from vmlab.manager.networks.ipam import Pool, gateway_of, parse_address, pools


def pool(subnet: str = "10.9.0.0/24", **fields: object) -> Pool:
    [made] = pools([ip_network(subnet)], **fields)
    return made


def test_the_first_address_is_the_gateway_s_and_the_second_is_given_first() -> None:
    made = pool()
    assert str(gateway_of(made.subnet, None)) == "10.9.0.1"
    assert str(made.first_free([])) == "10.9.0.2"
    assert made.size == 253


def test_an_address_that_was_given_back_is_given_first() -> None:
    taken = [ip_address(f"10.9.0.{n}") for n in (2, 3, 5, 6)]
    assert str(pool().first_free(taken)) == "10.9.0.4"


def test_a_network_that_is_full_has_no_address() -> None:
    made = pool("10.9.0.0/29")
    taken = []
    while (address := made.first_free(taken)) is not None:
        taken.append(address)
    assert [str(each) for each in taken] == [f"10.9.0.{n}" for n in range(2, 7)]
    assert made.free(taken) == 0
    assert made.free(taken[1:]) == 1


def test_addresses_come_from_the_ranges_in_order_and_not_from_what_is_reserved() -> None:
    made = pool(
        ranges=["10.9.0.100-10.9.0.101", "10.9.0.10-10.9.0.11"],
        reserved=["10.9.0.10", "10.9.0.100"],
    )
    taken = []
    while (address := made.first_free(taken)) is not None:
        taken.append(address)
    assert [str(each) for each in taken] == ["10.9.0.11", "10.9.0.101"]


def test_addresses_of_ipv6_begin_after_the_routers_anycast_address() -> None:
    made = pool("fd00:9::/64")
    assert str(gateway_of(made.subnet, None)) == "fd00:9::1"
    assert str(made.first_free([])) == "fd00:9::2"
    assert str(made.first_free([ip_address("fd00:9::2")])) == "fd00:9::3"
    assert made.size == 2**64 - 2


def test_a_network_of_both_has_a_pool_of_each() -> None:
    made = pools(
        [ip_network("10.9.0.0/24"), ip_network("fd00:9::/64")],
        gateway="10.9.0.254",
        ranges=["fd00:9::100-fd00:9::1ff"],
    )
    taken = [ip_address("fd00:9::100")]
    assert [str(each.first_free(taken)) for each in made] == ["10.9.0.1", "fd00:9::101"]


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("10.9.1.1", "an address in 10.9.0.0/24"),
        ("10.9.0.0", "of 10.9.0.0/24 itself"),
        ("10.9.0.255", "of 10.9.0.0/24 itself"),
        ("10.9.0.1", "not the gateway's"),
        ("10.9.0.7", "not reserved"),
    ],
)
def test_what_nobody_is_given_cannot_be_asked_for(address: str, why: str) -> None:
    refusal = pool(reserved=["10.9.0.5-10.9.0.9"]).refusal(ip_address(address))
    assert refusal is not None
    assert why in refusal


def test_an_address_outside_of_the_ranges_can_be_asked_for() -> None:
    assert pool(ranges=["10.9.0.100-10.9.0.200"]).refusal(ip_address("10.9.0.7")) is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"gateway": "10.8.0.1"}, "gateway"),
        ({"gateway": "10.9.0.255"}, "gateway"),
        ({"gateway": "the first one"}, "gateway"),
        ({"ranges": ["10.9.0.9-10.9.0.3"]}, "ranges"),
        ({"ranges": ["10.9.0.9-10.10.0.3"]}, "ranges"),
        ({"ranges": ["10.9.0.9-fd00::1"]}, "ranges"),
        ({"reserved": ["fd00::1"]}, "reserved"),
        ({"reserved": ["10.9.0"]}, "reserved"),
    ],
)
def test_what_cannot_be_is_told_by_field(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        pool(**fields)
    assert [problem.field for problem in caught.value.problems] == [field]


def test_a_subnet_without_room_for_a_machine_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="room for a gateway and a machine"):
        pool("10.9.0.1/32")
    assert str(pool("10.9.0.0/31").first_free([])) == "10.9.0.1"


def test_what_is_no_address_is_told() -> None:
    with pytest.raises(InvalidSpec, match=r"nics\.address = '10\.9'"):
        parse_address("nics.address", "10.9")


@pytest.mark.parametrize("zone", ["eth0", "a\ndhcp-script=evil", '"; }'])
def test_an_address_has_no_zone_which_could_be_any_text(zone: str) -> None:
    with pytest.raises(InvalidSpec, match="dns"):
        parse_address("dns", f"fe80::1%{zone}")


@given(
    taken=st.sets(st.integers(0, 63)),
    kept=st.sets(st.integers(1, 62)),
    first=st.integers(1, 62),
    length=st.integers(0, 61),
)
def test_the_first_free_address_is_the_lowest_that_may_be_given(
    taken: set[int], kept: set[int], first: int, length: int
) -> None:
    last = min(first + length, 62)
    made = pool(
        "10.9.0.0/26",
        gateway="10.9.0.62",
        ranges=[f"10.9.0.{first}-10.9.0.{last}"],
        reserved=[f"10.9.0.{n}" for n in sorted(kept)],
    )
    givable = [n for n in range(first, last + 1) if n not in kept | {62}]
    free = [n for n in givable if n not in taken]
    addresses = [ip_address(f"10.9.0.{n}") for n in taken]
    found = made.first_free(addresses)
    assert (int(str(found).rpartition(".")[2]) if found is not None else None) == next(
        iter(free), None
    )
    assert made.size == len(givable)
    assert made.free(addresses) == len(free)
