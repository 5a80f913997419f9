"""Private networks: who has which address, and how a guest is told of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from vmlab.lab.networks import Address, Networks, hosts_script, interface_script, link_script
from vmlab.machine.errors import InvalidSpec, ResourceExhausted


def test_addresses_are_given_once_and_given_back() -> None:
    network = Networks().make(subnet="10.0.0.0/29")
    assert [str(network.join(name)) for name in ("a", "b", "a")] == [
        "10.0.0.1/29", "10.0.0.2/29", "10.0.0.1/29",
    ]  # fmt: skip
    network.leave("a")
    network.leave("a")
    assert network.join("c").ip == "10.0.0.1"
    assert network.segment == "segment:net0"
    assert "net0" in repr(network) and "c" in repr(network)


def test_a_network_that_is_full_says_so() -> None:
    network = Networks().make(subnet="10.0.0.0/30")
    network.join("a")
    network.join("b")
    with pytest.raises(ResourceExhausted, match=r"no address left in 10\.0\.0\.0/30"):
        network.join("c")


def test_networks_do_not_overlap() -> None:
    networks = Networks()
    first = networks.make()
    networks.make(subnet="10.213.1.0/24")
    third = networks.make()
    assert (str(first.subnet), str(third.subnet)) == ("10.213.0.0/24", "10.213.2.0/24")


def test_a_name_is_free_when_nobody_is_on_its_network() -> None:
    networks = Networks()
    network = networks.get("lan")
    assert networks.get("lan") is network
    network.join("a")
    networks.release(network)
    assert networks.get("lan") is network
    network.leave("a")
    networks.release(network)
    networks.release(network)
    assert networks.get("lan") is not network


@pytest.mark.parametrize(
    ("name", "subnet", "field"),
    [("a b", None, "name"), (None, "10.0.0.1/24", "subnet"), (None, "wide", "subnet")],
)
def test_what_is_no_network_is_refused(name: str | None, subnet: str | None, field: str) -> None:
    with pytest.raises(InvalidSpec, match=field):
        Networks().make(name, subnet)


def test_a_name_twice_is_refused() -> None:
    networks = Networks()
    networks.make("lan")
    with pytest.raises(InvalidSpec, match="no network of the lab has"):
        networks.make("lan")


def shell(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("sh") or "sh", "-c", script], capture_output=True, text=True, check=False
    )


def test_names_of_ours_are_replaced_and_others_stay(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.0.0.9 mine\n")
    for names in ({"a": "10.0.0.1"}, {"b": "10.0.0.2", "c": "10.0.0.3"}):
        done = shell(hosts_script(names).replace("/etc/hosts", str(hosts)))
        assert done.returncode == 0, done.stderr
    assert hosts.read_text() == (
        "127.0.0.1 localhost\n10.0.0.9 mine\n10.0.0.2 b # vmlab\n10.0.0.3 c # vmlab\n"
    )


def test_names_are_written_where_there_are_none_yet(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    assert shell(hosts_script({"a": "10.0.0.1"}).replace("/etc/hosts", str(hosts))).returncode == 0
    assert hosts.read_text().split() == ["10.0.0.1", "a", "#", "vmlab"]


def test_an_interface_that_is_not_there_is_told(tmp_path: Path) -> None:
    interface = tmp_path / "net" / "eth0"
    interface.mkdir(parents=True)
    (interface / "address").write_text("52:54:00:00:00:01\n")
    for script in (
        interface_script("52:54:00:00:00:02", Address("10.0.0.1", 24), tries=2),
        link_script("52:54:00:00:00:02"),
    ):
        done = shell(script.replace("/sys/class/net", str(tmp_path / "net")))
        assert done.returncode == 1
        assert "no interface has the address 52:54:00:00:00:02" in done.stderr


def test_a_link_is_waited_for(tmp_path: Path) -> None:
    interface = tmp_path / "net" / "eth0"
    interface.mkdir(parents=True)
    (interface / "address").write_text("52:54:00:00:00:01\n")
    (interface / "carrier").write_text("1\n")
    script = link_script("52:54:00:00:00:01").replace("/sys/class/net", str(tmp_path / "net"))
    assert shell(script).returncode == 0
