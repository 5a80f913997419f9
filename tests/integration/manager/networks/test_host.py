"""Networks on a host: made, served, kept apart and removed; each test in a namespace of its own."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors import processes
from vmlab.hypervisors.monitored.networks import join_bridge
from vmlab.hypervisors.ownership import Home, Owner, Store
from vmlab.machine.errors import OperationFailed
from vmlab.manager.networks import daemons, links, names, nat, switch
from vmlab.manager.networks.host import HostNetworks
from vmlab.manager.networks.layout import Layout, Lease
from vmlab.manager.store.tables import NetworkRow

pytestmark = pytest.mark.timeout(600)


def layout(bench: Any, id_: str = "a", home: str = "", **fields: Any) -> Layout:
    base: dict[str, Any] = {
        "mode": "bridged",
        "subnet": "10.9.0.0/24",
        "dns": [],
        "ranges": [],
        "reserved": [],
        "dhcp": True,
        "data": {},
    }
    return Layout.of(NetworkRow(id=id_ * 32, name=id_, **(base | fields)), home or bench.host.home)


def lease(client: Any, *addresses: str, name: str = "guest") -> Lease:
    return Lease(client.mac, name, addresses)


def there() -> set[str]:
    """The interfaces, but for the loopback and the tests' wires."""
    return {name for name in links.links() if name != "lo" and not name.startswith("wire")}


def test_a_bridged_network_is_made_and_removed_without_a_trace(bench: Any) -> None:
    made = bench.run(bench.host.ensure(layout(bench, subnet6="fd00:9::/64")))
    assert there() == {made.bridge}
    assert {str(address) for name, address in links.addresses() if name == made.bridge} >= {
        "10.9.0.1/24",
        "fd00:9::1/64",
        "169.254.169.254/32",
    }
    assert nat.tables() == {made.table}
    assert nat.FORWARDING.read_text().strip() == "1"
    assert bench.run(bench.host.missing(made)) == []
    removed = bench.run(bench.host.remove(made.network))
    assert [each.partition(" ")[0] for each in removed] == ["process", "packet", "bridge"]
    assert there() == set()
    assert nat.tables() == frozenset()
    assert nat.FORWARDING.read_text().strip() == "0"
    assert list(bench.directory.iterdir()) == []
    assert bench.run(bench.host.remove(made.network)) == []


def test_what_is_there_stays_until_somebody_else_is_to_be_told(bench: Any) -> None:
    wanted = layout(bench)
    bench.run(bench.host.ensure(wanted))
    [path] = bench.directory.glob("*/processes/*")
    before = path.read_text()
    bench.run(bench.host.ensure(wanted))
    assert path.read_text() == before
    bench.run(bench.host.ensure(wanted, [Lease("52:54:00:00:00:01", "one", ("10.9.0.2",))]))
    [path] = bench.directory.glob("*/processes/*")
    assert path.read_text() != before


def test_the_host_forwards_until_the_last_network_is_gone_and_then_as_before(bench: Any) -> None:
    one, two = layout(bench), layout(bench, "b", subnet="10.10.0.0/24")
    nat.FORWARDING.write_text("1")
    bench.run(bench.host.ensure(one))
    bench.run(bench.host.remove(one.network))
    assert nat.FORWARDING.read_text().strip() == "1"
    nat.FORWARDING.write_text("0")
    for each in (one, two):
        bench.run(bench.host.ensure(each))
    three = layout(bench, "c", subnet=None, subnet6="fd00:9::/64")
    assert nat.FORWARDING6.read_text().strip() == "0"
    bench.run(bench.host.ensure(three))
    assert nat.FORWARDING6.read_text().strip() == "1"
    bench.run(bench.host.remove(one.network))
    assert nat.FORWARDING.read_text().strip() == "1"
    bench.run(bench.host.remove(two.network))
    bench.run(bench.another().remove(three.network))
    assert nat.FORWARDING.read_text().strip() == "0"
    assert nat.FORWARDING6.read_text().strip() == "0"


def test_an_interface_that_goes_meanwhile_keeps_no_network_from_being_made(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, forwarding = nat.SETTINGS / "ipv6/conf/gone0/accept_ra", nat.forwarding
    monkeypatch.setattr(nat, "forwarding", lambda layout: {gone: "2"} | forwarding(layout))
    nat.FORWARDING.write_text("0")
    made = bench.run(bench.host.ensure(layout(bench)))
    assert nat.FORWARDING.read_text().strip() == "1"
    bench.run(bench.host.remove(made.network))
    assert nat.FORWARDING.read_text().strip() == "0"


def test_the_host_forwards_as_long_as_a_network_of_another_home_needs_it(
    bench: Any, tmp_path: Path
) -> None:
    other = HostNetworks(tmp_path, Store.open(Home.open(tmp_path / "home"), "manager").owner)
    mine = layout(bench)
    theirs = layout(bench, "b", subnet="10.10.0.0/24", home=other.home)
    nat.FORWARDING.write_text("0")
    bench.run(bench.host.ensure(mine))
    bench.run(other.ensure(theirs))
    bench.run(bench.host.remove(mine.network))
    assert nat.FORWARDING.read_text().strip() == "1"
    bench.run(other.remove(theirs.network))
    # Who changed it sets it back.
    bench.run(bench.another().sweep([]))
    assert nat.FORWARDING.read_text().strip() == "0"


def test_what_is_lost_is_told_and_comes_again(bench: Any, sh: Callable[..., str]) -> None:
    wanted = bench.run(bench.host.ensure(layout(bench)))
    tagged = bench.run(bench.host.ensure(layout(bench, "b", vlan=7, subnet="10.10.0.0/24")))
    isolated = bench.run(bench.host.ensure(layout(bench, "c", mode="isolated")))
    sh("ip", "link", "del", wanted.bridge)
    sh("nft", "delete", "table", "inet", wanted.table)
    for process in bench.host.switch.processes():
        process.kill()
        bench.run(process.wait())
    for record in bench.directory.glob("*/processes/*"):
        process = os.pidfd_open(int(record.read_text().split()[0]))
        signal.pidfd_send_signal(process, signal.SIGKILL)
        assert select.select([process], [], [], 120)[0], "it ends"
        os.close(process)
    host = bench.another()
    assert bench.run(host.missing(wanted)) == [
        f"bridge {wanted.bridge}",
        f"packet filter {wanted.table}",
        "dnsmasq",
    ]
    assert bench.run(host.missing(isolated)) == ["DHCP server"]
    assert bench.run(host.missing(tagged)) == ["switch", "dnsmasq"]
    for each in (wanted, tagged, isolated):
        bench.run(host.ensure(each))
        assert bench.run(host.missing(each)) == []


@pytest.mark.parametrize("how", ["of the switch", "of the host", "off its bridge", "down"])
def test_a_port_of_the_switch_that_is_lost_comes_again(
    bench: Any, client: Callable[[], Any], sh: Callable[..., str], how: str
) -> None:
    red, beside = layout(bench, vlan=7), layout(bench, "b", vlan=8, subnet="10.10.0.0/24")
    for each in (red, beside):
        bench.run(bench.host.ensure(each))
    if how == "of the switch":
        bench.run(bench.host.switch.control("del-port", red.port))
    elif how == "of the host":
        sh("ip", "link", "del", red.port)
    else:
        sh("ip", "link", "set", red.port, *(["nomaster"] if how == "off its bridge" else ["down"]))
    host = bench.another()
    assert bench.run(host.missing(red)) == [f"port {red.port}"]
    assert bench.run(host.missing(beside)) == []
    bench.run(host.ensure(red))
    assert bench.run(host.missing(red)) == []
    # It is a port of the switch again, with its tag: with that of the other, both are reached.
    one, other = client(), client()
    for number, (computer, network) in enumerate(((one, red), (other, beside)), 2):
        computer.run("ip", "addr", "add", f"10.99.0.{number}/24", "dev", "eth0")
        computer.plug(network.bridge)
    for each in (red, beside):
        nat.remove(each.table)
    assert not one.reaches("10.99.0.3", tries=2)
    bench.run(bench.host.switch.add_port(beside.switch, beside.port, 7))
    assert one.reaches("10.99.0.3")


def test_machines_on_a_bridge_that_was_lost_are_on_the_one_that_comes_again(
    bench: Any, sh: Callable[..., str]
) -> None:
    made = bench.run(bench.host.ensure(layout(bench)))
    for tap in ("tap-in", "tap-other"):
        sh("ip", "tuntap", "add", tap, "mode", "tap")
    bench.run(join_bridge("tap-in", made.bridge))
    assert bench.run(bench.host.missing(made)) == []
    sh("ip", "link", "del", made.bridge)
    assert bench.run(bench.host.missing(made)) == [f"bridge {made.bridge}", "tap tap-in"]
    bench.run(bench.another().ensure(made))
    assert bench.run(bench.host.missing(made)) == []
    there = links.links()
    assert there["tap-in"].master == there[made.bridge].index
    assert there["tap-other"].master is None
    for tap in ("tap-in", "tap-other"):
        sh("ip", "link", "del", tap)


def test_a_bridge_of_the_host_s_own_gets_nothing_and_stays(
    bench: Any, sh: Callable[..., str]
) -> None:
    sh("ip", "link", "add", "br-own", "type", "bridge")
    made = bench.run(bench.host.ensure(layout(bench, bridge="br-own")))
    assert made.foreign
    assert not [address for name, address in links.addresses() if name == "br-own"]
    assert nat.tables() == frozenset()
    # Also for who comes later.
    assert bench.run(bench.another().ensure(layout(bench, bridge="br-own"))).foreign
    bench.run(bench.host.remove(made.network))
    assert there() == {"br-own"}


def test_a_bridge_that_a_network_names_and_nobody_has_is_made_and_removed(bench: Any) -> None:
    made = bench.run(bench.host.ensure(layout(bench, bridge="br-lab")))
    assert not made.foreign
    assert there() == {"br-lab"}
    bench.run(bench.another().ensure(layout(bench, bridge="br-lab")))
    bench.run(bench.host.remove(made.network))
    assert there() == set()


@pytest.mark.parametrize(
    ("setup", "fields", "said"),
    [
        ("ip link add br-own type veth", {"bridge": "br-own"}, "no bridge"),
        ("ip link add br-own type bridge", {"bridge": "br-own", "vlan": 5}, "already"),
        ("ip addr add 10.9.0.77/16 dev lo", {}, "overlaps 10.9.0.77/16"),
    ],
)
def test_what_the_host_has_already_is_not_taken_over(
    bench: Any, sh: Callable[..., str], setup: str, fields: dict[str, Any], said: str
) -> None:
    sh(*setup.split())
    before = there()
    with pytest.raises(OperationFailed, match=said):
        bench.run(bench.host.ensure(layout(bench, **fields)))
    assert there() == before
    assert list(bench.directory.iterdir()) == []


def test_machines_get_the_addresses_of_the_store_by_dhcp_and_others_none(
    bench: Any, client: Callable[[], Any]
) -> None:
    known, stranger = client(), client()
    leases = [lease(known, "10.9.0.7", "fd00:9::7", name="known")]
    made = bench.run(bench.host.ensure(layout(bench, subnet6="fd00:9::/64"), leases))
    known.plug(made.bridge)
    stranger.plug(made.bridge)
    told = known.ask()
    assert (told["ip"], told["mask"], told["router"]) == ("10.9.0.7", "24", "10.9.0.1")
    assert told["dns"] == "10.9.0.1"
    assert told["hostname"] == "known"
    assert known.reaches("10.9.0.1")
    assert stranger.ask(tries=3) == {}
    # Names are answered on the network.
    assert "10.9.0.7" in known.address_of("known", "10.9.0.1")


SOLICIT = """
    import socket, sys, time
    # RFC 8415: SOLICIT (8.), with a client identifier of type 3 (11.4) and an IA_NA (21.4).
    mac = bytes.fromhex(sys.argv[1].replace(":", ""))
    def option(code, data):
        return code.to_bytes(2) + len(data).to_bytes(2) + data
    ask = b"\\x01\\x01\\x02\\x03" + option(1, b"\\0\\3\\0\\1" + mac)
    ask += option(3, b"\\0\\0\\0\\1" + bytes(8)) + option(8, b"\\0\\0")
    wire = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    wire.bind(("::", 546))
    wire.settimeout(2)
    target = ("ff02::1:2", 547, 0, socket.if_nametoindex("eth0"))
    for _ in range(60):
        try:
            wire.sendto(ask, target)
            said = wire.recv(4096)
        except TimeoutError:
            continue
        except OSError:  # its own address is not settled yet
            time.sleep(0.5)
            continue
        if said[0] == 2:
            at = said.index(b"\\0\\5\\0\\x18")
            print(socket.inet_ntop(socket.AF_INET6, said[at + 4 : at + 20]))
            break
"""


def test_machines_get_their_addresses_of_ipv6_by_dhcp(
    bench: Any, client: Callable[[], Any]
) -> None:
    known = client()
    leases = [lease(known, "fd00:9::7")]
    made = bench.run(bench.host.ensure(layout(bench, subnet=None, subnet6="fd00:9::/64"), leases))
    known.plug(made.bridge)
    assert known.script(SOLICIT, known.mac) == "fd00:9::7\n"


def test_machines_of_an_isolated_network_get_their_addresses_without_rights(bench: Any) -> None:
    from vmlab.hypervisors.monitored.networks import segment_group
    from vmlab.manager.networks.segment_server import join

    wanted = layout(bench, mode="isolated")
    mac = "52:54:00:00:00:01"
    group, port = segment_group(bench.machines, names.segment(wanted.network))
    hardware = bytes.fromhex(mac.replace(":", ""))
    bootp = bytes([1, 1, 6, 0]) + b"1234" + bytes(20) + hardware.ljust(16, b"\0") + bytes(192)
    bootp += b"\x63\x82\x53\x63\x35\x01\x01\xff"
    udp = b"\0\x44\0\x43" + (8 + len(bootp)).to_bytes(2) + b"\0\0" + bootp
    ip = b"\x45\0" + (20 + len(udp)).to_bytes(2) + bytes(4) + b"\x40\x11\0\0" + bytes(4)
    frame = b"\xff" * 6 + hardware + b"\x08\0" + ip + b"\xff" * 4 + udp
    seen = set()
    for number in (2, 9):
        bench.run(bench.host.ensure(wanted, [Lease(mac, "one", (f"10.9.0.{number}",))]))
        [record] = bench.directory.glob("*/processes/*")
        seen.add(record.read_text())
        with join(group, port) as wire:
            wire.settimeout(120)
            wire.sendto(frame, (group, port))
            answer = next(data for data in iter(lambda: wire.recv(65536), b"") if data != frame)
        assert answer[14 + 20 + 8 + 16 :][:4] == bytes([10, 9, 0, number])
    # It was told of the other address without being started anew.
    assert len(seen) == 1


SENDER = """
    import socket, sys, time
    for _ in range(800):
        try:
            wire = socket.create_connection((sys.argv[1], 4000), 60)
        except ConnectionRefusedError:  # it does not listen yet
            time.sleep(0.25)
            continue
        wire.sendall(b"x" * (1 << 20))
        break
"""
LISTENER = """
    import socket
    with socket.create_server(("", 4000)) as server:
        server.settimeout(120)
        wire, _ = server.accept()
        print(sum(len(data) for data in iter(lambda: wire.recv(65536), b"")))
"""


def send(one: Any, two: Any, address: str) -> int:
    """Bytes that arrive of a megabyte sent by TCP."""
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(two.script, LISTENER)
        one.script(SENDER, address)
        return int(got.result())


@pytest.fixture
def outside(client: Callable[[], Any], sh: Callable[..., str]) -> Any:
    """A computer beyond the host, which has no way back into its networks."""
    made = client()
    made.run("ip", "addr", "add", "203.0.113.9/24", "dev", "eth0")
    sh("ip", "addr", "add", "203.0.113.1/24", "dev", made.port)
    return made


def test_machines_reach_the_outside_and_neither_other_networks_nor_the_host_s_other_side(
    bench: Any, client: Callable[[], Any], outside: Any, sh: Callable[..., str]
) -> None:
    one, two = client(), client()
    first = bench.run(bench.host.ensure(layout(bench), [lease(one, "10.9.0.2")]))
    second = layout(bench, "b", subnet="10.10.0.0/24")
    bench.run(bench.host.ensure(second, [lease(two, "10.10.0.2")]))
    for computer, network in ((one, first), (two, second)):
        computer.plug(network.bridge)
        assert computer.ask()
        # The way there, by NAT: the outside knows no way back to the machines' addresses.
        assert computer.reaches("203.0.113.9")
    for address in ("10.10.0.2", "10.10.0.1", "203.0.113.1"):
        assert not one.reaches(address, tries=2), address
    outside.run("ip", "route", "add", "10.9.0.0/24", "via", "203.0.113.1")
    assert not outside.reaches("10.9.0.2", tries=2)
    # It is the packet filter that is in the way.
    sh("nft", "delete", "table", "inet", first.table)
    sh("nft", "delete", "table", "inet", second.table)
    assert outside.reaches("10.9.0.2")
    assert one.reaches("10.10.0.2")


ADVERTISE = """
    import socket, time
    # RFC 4861, 4.2: a router for 1800 s. The kernel fills in the checksum (RFC 3542, 3.1).
    wire = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    wire.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
    target = ("ff02::1", 0, 0, socket.if_nametoindex("eth0"))
    for _ in range(240):
        try:
            wire.sendto(b"\\x86\\0\\0\\0\\x40\\0\\x07\\x08" + bytes(8), target)
        except OSError:  # its own address is not settled yet
            time.sleep(0.25)
            continue
        break
"""


def test_machines_reach_the_outside_by_ipv6_and_the_host_still_hears_its_routers(
    bench: Any, client: Callable[[], Any], sh: Callable[..., str]
) -> None:
    outside, one = client(), client()
    outside.run("ip", "addr", "add", "2001:db8::9/64", "dev", "eth0", "nodad")
    sh("ip", "addr", "add", "2001:db8::1/64", "dev", outside.port, "nodad")
    hears = nat.SETTINGS / f"ipv6/conf/{outside.port}/accept_ra"
    assert (hears.read_text(), nat.FORWARDING6.read_text()) == ("1\n", "0\n")
    wanted = layout(bench, subnet6="fd00:9::/64")
    made = bench.run(bench.host.ensure(wanted, [lease(one, "10.9.0.7", "fd00:9::7")]))
    one.plug(made.bridge)
    # Its interface comes up once there is somebody to ask for a router.
    one.run("ip", "link", "set", "eth0", "down")
    one.run("ip", "link", "set", "eth0", "up")
    assert one.script(SOLICIT, one.mac) == "fd00:9::7\n"
    one.run("ip", "addr", "add", "fd00:9::7/64", "dev", "eth0", "nodad")
    while "default" not in one.run("ip", "-6", "route"):
        pass  # until the router that it asked for has answered
    # The outside knows no way to it.
    assert one.reaches("2001:db8::9")
    assert one.reaches("fd00:9::1")
    assert not one.reaches("2001:db8::1", tries=2)
    outside.run("ip", "route", "add", "fd00:9::/64", "via", "2001:db8::1")
    assert not outside.reaches("fd00:9::7", tries=2)
    # Who was a router of the host's may go on.
    while f"dev {outside.port}" not in sh("ip", "-6", "route", "show", "default"):
        outside.script(ADVERTISE)
    bench.run(bench.host.remove(made.network))
    assert (hears.read_text(), nat.FORWARDING6.read_text()) == ("1\n", "0\n")
    assert list(bench.directory.iterdir()) == []


def test_a_machine_is_no_router_of_the_host_s_whatever_it_says(
    bench: Any, client: Callable[[], Any], outside: Any, sh: Callable[..., str]
) -> None:
    one = client()
    made = bench.run(bench.host.ensure(layout(bench)))
    one.plug(made.bridge)
    while f"dev {outside.port}" not in (routes := sh("ip", "-6", "route", "show", "default")):
        one.script(ADVERTISE)
        outside.script(ADVERTISE)
    assert made.bridge not in routes


def test_machines_with_one_tag_reach_each_other_and_those_with_another_do_not(
    bench: Any, client: Callable[[], Any]
) -> None:
    red, green = layout(bench, vlan=10), layout(bench, "b", vlan=20, subnet="10.10.0.0/24")
    one, two, other = client(), client(), client()
    leases = [lease(one, "10.9.0.2"), lease(two, "10.9.0.3")]
    bench.run(bench.host.ensure(red, leases))
    bench.run(bench.host.ensure(green, [lease(other, "10.10.0.2")]))
    assert red.switch == green.switch
    for computer, network in ((one, red), (two, red), (other, green)):
        computer.plug(network.bridge)
    assert one.ask()["ip"] == "10.9.0.2"
    assert two.ask()["ip"] == "10.9.0.3"
    assert other.ask()["ip"] == "10.10.0.2"
    assert one.reaches("10.9.0.3")
    # Also where it says that it is one of them.
    other.run("ip", "addr", "add", "10.9.0.4/24", "dev", "eth0")
    for network in (red, green):
        nat.remove(network.table)
    assert not other.reaches("10.9.0.2", tries=2)
    assert not other.reaches("10.9.0.1", tries=2)
    # Only the tag keeps it away: a megabyte goes through the switch with another one.
    bench.run(bench.host.switch.add_port(green.switch, green.port, 10))
    assert other.reaches("10.9.0.2")
    assert send(other, one, "10.9.0.2") == 1 << 20
    bench.run(bench.host.remove(red.network))
    assert bench.host.switch.processes()
    bench.run(bench.host.remove(green.network))
    assert not bench.host.switch.processes()
    assert there() == set()


def test_networks_that_are_removed_at_once_take_what_they_share_with_them(bench: Any) -> None:
    tagged = [
        layout(bench, id_, vlan=tag, subnet=f"10.{tag}.0.0/24") for id_, tag in (("a", 7), ("b", 8))
    ]

    async def life() -> None:
        await asyncio.gather(*(bench.host.ensure(each) for each in tagged))
        await asyncio.gather(*(bench.host.remove(each.network) for each in tagged))

    bench.run(life())
    assert there() == set()
    assert not bench.host.switch.processes()
    assert list(bench.directory.iterdir()) == []
    assert nat.FORWARDING.read_text().strip() == "0"


def test_a_switch_that_somebody_else_has_is_not_shared(bench: Any, tmp_path: Path) -> None:
    other = type(bench.host)(tmp_path, bench.machines)
    theirs = NetworkRow(
        id="b" * 32, name="b", mode="bridged", vlan=5, subnet="10.10.0.0/24", dns=[], ranges=[],
        reserved=[], dhcp=True, data={},
    )  # fmt: skip
    bench.run(other.ensure(Layout.of(theirs, other.home)))
    before = there()
    with pytest.raises(OperationFailed, match="another Open vSwitch"):
        bench.run(bench.host.ensure(layout(bench, vlan=5)))
    bench.run(bench.host.remove("a" * 32))
    assert there() == before
    bench.run(other.sweep([]))
    bench.run(bench.host.ensure(layout(bench, vlan=5)))


def test_two_homes_on_one_host_do_not_touch_each_other_s_networks(
    bench: Any, tmp_path: Path
) -> None:
    other = type(bench.host)(tmp_path, bench.machines)
    mine = bench.run(bench.host.ensure(layout(bench)))
    theirs = Layout.of(
        NetworkRow(
            id="b" * 32, name="b", mode="bridged", subnet="10.10.0.0/24", dns=[], ranges=[],
            reserved=[], dhcp=True, data={},
        ),
        other.home,
    )  # fmt: skip
    bench.run(other.ensure(theirs))
    assert bench.run(bench.host.sweep([mine.network])) == []
    bench.run(other.sweep([]))
    assert there() == {mine.bridge}
    assert nat.tables() == {mine.table}


def test_interfaces_that_no_record_tells_of_are_found_by_what_they_say(
    bench: Any, sh: Callable[..., str]
) -> None:
    made = bench.run(bench.host.ensure(layout(bench)))
    bench.run(bench.host._end_daemons(made.network))
    (bench.directory / made.network / "network.json").unlink()
    host = bench.another()
    assert host.leftovers([]) == {made.network: [f"interface {made.bridge}"]}
    assert host.leftovers([made.network]) == {}
    sh("ip", "link", "add", "br-own", "type", "bridge")
    bench.run(host.sweep([]))
    assert there() == {"br-own"}
    assert nat.tables() == frozenset()


def _killed_before(directory: Path, left: int) -> None:
    """In a process of its own: make networks and remove them, and die before a change."""

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    # Every call that changes the host, before it does.
    for name in ("make_bridge", "join", "add_addresses", "set_alias", "remove"):
        setattr(links, name, counted(getattr(links, name)))
    for name in ("apply", "hear_no_routers", "remove", "set_back", "set_kernel"):
        setattr(nat, name, counted(getattr(nat, name)))
    daemons.spawn = switch.spawn = counted(processes.spawn)
    switch.Switch.control = counted(switch.Switch.control)

    async def life() -> None:
        host = HostNetworks(directory, Owner("store", "manager", directory))
        for id_, vlan, subnet in (("a", None, "10.9.0.0/24"), ("b", 7, "10.10.0.0/24")):
            row = NetworkRow(
                id=id_ * 32, name=id_, mode="bridged", vlan=vlan, subnet=subnet, dns=[],
                subnet6=f"fd00:{id_}::/64", ranges=[], reserved=[], dhcp=True, data={},
            )  # fmt: skip
            await host.ensure(Layout.of(row, host.home))
        for id_ in "ab":
            await host.remove(id_ * 32)

    asyncio.run(life())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.soak)])
def test_nothing_is_left_of_a_manager_that_is_killed_before_any_change_of_the_host(
    bench: Any, stride: int
) -> None:
    for point in range(1, 100, stride):
        child = os.fork()
        if child == 0:
            try:
                _killed_before(bench.directory, point)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        removed = bench.run(bench.another().sweep([]))
        assert there() == set(), (point, removed)
        assert nat.tables() == frozenset(), (point, removed)
        for path in (nat.FORWARDING, nat.FORWARDING6):
            assert path.read_text().strip() == "0", (point, removed)
        assert list(bench.directory.iterdir()) == [], (point, removed)
        if status == 0:
            break
        assert os.WIFSIGNALED(status), point
        assert os.WTERMSIG(status) == signal.SIGKILL
    else:
        pytest.fail("it never got to its end")
    assert point > 15, "it was killed in many places"


def test_a_record_of_another_namespace_says_nothing_of_this_one(bench: Any) -> None:
    from vmlab.manager.networks.layout import Record

    wanted = layout(bench)
    directory = bench.host.path(wanted.network)
    directory.mkdir()
    record = Record.now(wanted)
    replace(record, namespace=record.namespace + 1).write(directory)
    assert not (Record.read(directory) or record).here
    made = bench.run(bench.host.ensure(wanted))
    assert bench.run(bench.host.missing(made)) == []
    assert (Record.read(directory) or record).here
