"""What a copy is told of its addresses, carried out where nothing but the wire is a machine's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vmlab.manager.networks.in_guest import addresses_script
from vmlab.manager.networks.seed import SeedNic

pytestmark = pytest.mark.timeout(300)

NEW = ("10.9.0.3/24", "fd00:9::3/64")


def tell(computer: Any, *addresses: str) -> None:
    """Have a computer told, in a mount namespace with its own interfaces in /sys."""
    script = addresses_script([SeedNic("net0", computer.mac, frozenset({4, 6}), addresses)])
    inside = f"mount -t sysfs sys /sys && mount -t proc proc /proc\n{script}"
    computer.run("unshare", "--mount", "sh", "-c", inside)


def addresses(computer: Any) -> set[str]:
    """What it has on its wire, but for the addresses of the link."""
    said = computer.run("ip", "-o", "addr", "show", "dev", "eth0")
    return {text for line in said.splitlines() if "fe80:" not in (text := line.split()[3])}


def test_the_addresses_of_the_first_one_go_and_its_own_are_set(client: Callable[[], Any]) -> None:
    one = client()
    for address in ("10.9.0.2/24", "10.9.0.77/24", "fd00:9::2/64"):
        one.run("ip", "addr", "add", address, "dev", "eth0")
    one.run("ip", "route", "add", "default", "via", "10.9.0.1", "src", "10.9.0.2", "metric", "7")
    tell(one, *NEW)
    assert addresses(one) == set(NEW)
    assert one.run("ip", "-4", "route", "show", "default").split() == [
        *("default", "via", "10.9.0.1", "dev", "eth0", "metric", "7"),
    ]  # fmt: skip
    # Again changes nothing.
    tell(one, *NEW)
    assert addresses(one) == set(NEW)
    assert one.run("ip", "-4", "route", "show", "default").count("default") == 1


def test_an_interface_that_is_down_is_left_alone(client: Callable[[], Any]) -> None:
    one = client()
    one.run("ip", "link", "set", "eth0", "down")
    one.run("ip", "addr", "add", "10.9.0.2/24", "dev", "eth0")
    tell(one, *NEW)
    assert addresses(one) == {"10.9.0.2/24"}


def test_a_guest_without_that_interface_says_so(client: Callable[[], Any]) -> None:
    one = client()
    one.mac = "52:54:00:00:00:99"
    with pytest.raises(AssertionError, match="no interface has the address 52:54:00:00:00:99"):
        tell(one, *NEW)


def test_a_machine_behind_nat_is_told_nothing() -> None:
    assert addresses_script([SeedNic("net0", "52:54:00:00:00:01", frozenset({4}))]) == ""
