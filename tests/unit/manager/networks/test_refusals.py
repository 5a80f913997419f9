"""What is told where the host lacks something, or refuses it: no rights are needed to see that."""

from __future__ import annotations

import asyncio
import errno
import subprocess
from pathlib import Path
from typing import Any

import pyroute2
import pytest
from pyroute2.netlink.exceptions import NetlinkError

from vmlab.hypervisors import processes
from vmlab.hypervisors.monitored.networks import segment_group
from vmlab.hypervisors.ownership import Owner
from vmlab.machine.errors import OperationFailed
from vmlab.manager.networks import links, nat, segment_server
from vmlab.manager.networks.daemons import Daemon
from vmlab.manager.networks.host import HostNetworks
from vmlab.manager.networks.layout import Layout
from vmlab.manager.networks.switch import Switch
from vmlab.manager.store.tables import NetworkRow


def program(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def bridged() -> Layout:
    row = NetworkRow(
        id="a" * 32, name="a", mode="bridged", subnet="10.9.0.0/24", dns=[], ranges=[],
        reserved=[], dhcp=True, data={},
    )  # fmt: skip
    return Layout.of(row, "0" * 16)


def test_a_host_without_nft_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OperationFailed, match="nft is not installed") as caught:
        nat.apply(bridged())
    assert caught.value.hint == "install nftables"


def test_what_nft_says_against_rules_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program(tmp_path, "nft", "echo 'Operation not permitted' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OperationFailed, match=r"cannot filter its packets.*not permitted"):
        nat.apply(bridged())


def test_who_has_no_rights_is_told_which_networks_need_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refusing(pyroute2.IPRoute):
        def link(self, *_: object, **__: object) -> None:
            raise NetlinkError(errno.EPERM)

    monkeypatch.setattr(pyroute2, "IPRoute", Refusing)
    with pytest.raises(OperationFailed, match="cannot make the bridge br-x: ") as caught:
        links.make_bridge("br-x", "nobody's")
    assert "isolated and user ones do not" in (caught.value.hint or "")


def test_a_missing_interface_is_no_traceback() -> None:
    with pytest.raises(OperationFailed, match="No such device"):
        links.set_alias("vmlnothing", "nobody's")
    assert links.remove("vmlnothing") is False


def test_a_host_without_open_vswitch_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    switch = Switch(tmp_path / "switch")
    with pytest.raises(OperationFailed, match="need ovsdb-tool") as caught:
        asyncio.run(switch.up())
    assert caught.value.hint == "install openvswitch-switch"
    assert not switch.directory.exists()
    assert asyncio.run(switch.bridges()) == []


@pytest.fixture
def daemon(tmp_path: Path) -> Any:
    (tmp_path / "bin").mkdir()
    made = Daemon(tmp_path, "server")
    yield made
    asyncio.run(made.end())
    processes.wait_for_dead_children()


def told(daemon: Daemon, text: str, script: str, **options: Any) -> bool:
    """Have it told; whether it was started anew."""
    name = daemon.directory / "bin" / "server"
    program(name.parent, name.name, script)
    return asyncio.run(daemon.keep(text, lambda path: [name, path], ready="ready", **options))


SERVES = 'echo ready; exec sleep 600 # "$1"'


def test_a_program_that_ends_is_told_with_what_it_said(daemon: Daemon) -> None:
    with pytest.raises(OperationFailed, match="server ended: no room") as caught:
        told(daemon, "a", "echo no room >&2; exit 3")
    assert str(daemon.log) in (caught.value.hint or "")
    assert daemon.running() is None


def test_a_program_that_is_not_there_leaves_nothing(daemon: Daemon) -> None:
    nowhere = daemon.directory / "nowhere"
    with pytest.raises(OperationFailed, match="cannot start"):
        asyncio.run(daemon.keep("a", lambda path: [nowhere, path], ready="ready"))
    assert daemon.pids() == []


def test_a_program_is_started_anew_when_it_is_told_something_else(daemon: Daemon) -> None:
    assert told(daemon, "a", SERVES)
    first = daemon.pids()
    assert not told(daemon, "a", SERVES)
    assert daemon.pids() == first
    assert told(daemon, "b", SERVES)
    assert daemon.pids() != first
    assert [path.read_text() for path in daemon.directory.glob("server-*")] == ["b"]
    asyncio.run(daemon.end())
    assert daemon.pids() == []
    assert not list(daemon.directory.glob("server-*"))


def test_a_program_that_rereads_is_told_by_its_file_alone(daemon: Daemon) -> None:
    assert told(daemon, "a", SERVES, rereads=True)
    first = daemon.pids()
    assert not told(daemon, "b", SERVES, rereads=True)
    assert daemon.pids() == first
    assert [path.read_text() for path in daemon.directory.glob("server-*")] == ["b"]


def test_a_segment_s_server_whose_home_is_gone_ends_by_itself(tmp_path: Path) -> None:
    row = NetworkRow(
        id="c" * 32, name="c", mode="isolated", subnet="10.9.0.0/24", dns=[], ranges=[],
        reserved=[], dhcp=True, data={},
    )  # fmt: skip
    path = tmp_path / "segment-told.conf"
    group = segment_group(Owner("store", "manager", tmp_path), "c")
    path.write_text(segment_server.configuration(Layout.of(row, "0" * 16), [], group))
    with subprocess.Popen(segment_server.command(path), stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith(b"serving ")
        path.unlink()
        assert server.wait(120) == 0


def test_a_network_without_an_interface_needs_no_host(tmp_path: Path) -> None:
    host = HostNetworks(tmp_path, Owner("store", "manager", tmp_path))
    row = NetworkRow(
        id="b" * 32, name="b", mode="isolated", dns=[], ranges=[], reserved=[], dhcp=True, data={}
    )
    made = asyncio.run(host.ensure(Layout.of(row, host.home)))
    # Without addresses there is nobody to serve.
    assert asyncio.run(host.missing(made)) == []
    assert asyncio.run(host.remove(made.network)) == []
    assert list(tmp_path.iterdir()) == []
