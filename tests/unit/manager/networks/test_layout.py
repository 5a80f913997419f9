from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmlab.manager.networks import dnsmasq, nat, segment_server
from vmlab.manager.networks.layout import RECORD, Layout, Lease, Record
from vmlab.manager.store.tables import NetworkRow

HOME = "0" * 16
LEASE = Lease("52:54:00:00:00:01", "one", ("10.9.0.2", "fd00:9::2"))


def layout(id_: str = "a", **columns: Any) -> Layout:
    base: dict[str, Any] = {
        "mode": "bridged", "subnet": "10.9.0.0/24", "subnet6": "fd00:9::/64", "dns": [],
        "ranges": [], "reserved": [], "dhcp": True, "data": {},
    }  # fmt: skip
    return Layout.of(NetworkRow(id=id_ * 32, name=id_, **(base | columns)), HOME)


def test_networks_with_tags_share_a_switch_and_have_bridges_of_their_own() -> None:
    red, green = layout(vlan=10), layout("b", vlan=20)
    assert red.switch == green.switch != ""
    assert len({red.bridge, green.bridge, red.port, green.port, red.switch}) == 5
    named = layout(vlan=10, bridge="trunk")
    assert (named.switch, named.bridge) == ("trunk", red.bridge)
    plain = layout(bridge="br-lab")
    assert (plain.bridge, plain.switch, plain.port) == ("br-lab", "", "")


def test_a_record_says_what_there_may_be_and_a_damaged_one_nothing(tmp_path: Path) -> None:
    record = Record.now(layout(vlan=10, dns=["10.9.0.53"]))
    record.write(tmp_path)
    assert Record.read(tmp_path) == record
    assert record.here
    assert not replace(record, boot="another").here
    assert not replace(record, namespace=0).here
    (tmp_path / RECORD).write_text("{")
    assert Record.read(tmp_path) is None
    assert Record.read(tmp_path / "nowhere") is None


def test_dnsmasq_gives_the_store_s_addresses_and_no_other(tmp_path: Path) -> None:
    text = dnsmasq.configuration(layout(), [LEASE], index=7, directory=tmp_path).splitlines()
    assert "dhcp-range=10.9.0.0,static,255.255.255.0,12h" in text
    assert "dhcp-range=fd00:9::,static,64,12h" in text
    assert "dhcp-ignore=tag:!known" in text
    assert "dhcp-host=52:54:00:00:00:01,10.9.0.2,[fd00:9::2],one" in text
    assert "host-record=one,10.9.0.2,fd00:9::2" in text
    assert "dhcp-option=option:dns-server,10.9.0.1" in text
    assert "dhcp-option=option6:dns-server,[fd00:9::1]" in text


def test_dnsmasq_without_dhcp_knows_names_alone(tmp_path: Path) -> None:
    text = dnsmasq.configuration(layout(dhcp=False), [LEASE], index=7, directory=tmp_path)
    assert "dhcp-range" not in text
    assert "dhcp-host" not in text
    assert "host-record=one,10.9.0.2,fd00:9::2" in text


def test_machines_are_told_the_network_s_own_servers(tmp_path: Path) -> None:
    named = layout(dns=["9.9.9.9", "2620:fe::fe"])
    text = dnsmasq.configuration(named, [], index=7, directory=tmp_path)
    assert "dhcp-option=option:dns-server,9.9.9.9\n" in text
    assert "dhcp-option=option6:dns-server,[2620:fe::fe]\n" in text


def test_another_bridge_of_the_same_name_needs_another_dnsmasq(tmp_path: Path) -> None:
    one, two = (
        dnsmasq.configuration(layout(), [], index=index, directory=tmp_path) for index in (7, 8)
    )
    assert one != two


def test_both_versions_of_ip_go_out_by_nat() -> None:
    made = layout()
    rules = nat.rules(made)
    assert f'ip saddr 10.9.0.0/24 oifname != "{made.bridge}" masquerade' in rules
    assert f'ip6 saddr fd00:9::/64 oifname != "{made.bridge}" masquerade' in rules
    assert "ip saddr" not in nat.rules(layout(subnet=None))


@pytest.mark.parametrize(
    "columns", [{"dhcp": False}, {"subnet": None, "subnet6": None}], ids=["no-dhcp", "no-subnet"]
)
def test_a_segment_that_nobody_is_told_anything_of_has_no_server(columns: dict[str, Any]) -> None:
    made = layout(mode="isolated", **columns)
    assert segment_server.configuration(made, [LEASE], ("239.1.2.3", 4)) == ""
