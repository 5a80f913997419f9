"""The store's networks and the host's, kept in step by a manager that comes and goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy.orm import Session
from tests.unit.manager.store.rows import add_machine, add_network, add_nic

from vmlab.hypervisors import processes
from vmlab.hypervisors.ownership import Home
from vmlab.manager.networks import addresses, links
from vmlab.manager.networks.networks import Networks
from vmlab.manager.settings import Settings
from vmlab.manager.store.database import Database
from vmlab.manager.store.queries import find_machine, find_network, list_addresses, list_events

pytestmark = pytest.mark.timeout(600)


FETCH = """
    import http.client
    service = http.client.HTTPConnection("169.254.169.254", timeout=120)
    try:
        service.request("GET", "/latest/meta-data/mac")
        print(service.getresponse().read().decode(), end="")
    except ConnectionRefusedError:
        print("nobody", end="")
"""


class Bench:
    """A store with a machine that runs on a bridged network, and a loop for its networks."""

    def __init__(self, home: Home) -> None:
        self.settings = Settings(home=home)
        self.database = Database.open(self.settings)
        self.runner = asyncio.Runner()
        self.networks = Networks(self.settings, self.database)
        self.network, self.machine = self.database.write_now(self._fill)

    @staticmethod
    def _fill(s: Session) -> tuple[str, str]:
        network = add_network(s, "office", mode="bridged", subnet="10.9.0.0/24")
        policy = {"release_addresses": "stop"}
        machine = add_machine(s, "one", state="running", hypervisor="qemu", policy=policy)
        add_nic(s, machine, network)
        s.refresh(machine)
        addresses.take(s, machine)
        return network.id, machine.id

    def run(self, work: Any) -> Any:
        return self.runner.run(asyncio.wait_for(work, 280))

    def state(self, state: str) -> None:
        def write(s: Session) -> None:
            find_machine(s, "one").state = state

        self.database.write_now(write)

    @property
    def taken(self) -> list[str]:
        return [each.address for each in self.database.read_now(list_addresses).items]

    def close(self) -> None:
        self.run(self.networks.close())
        self.run(self.networks.host.sweep([]))
        self.database.close()
        self.runner.close()
        processes.wait_for_dead_children()


@pytest.fixture
def bench(namespace: None, home: Home) -> Iterator[Bench]:
    made = Bench(home)
    yield made
    made.close()


def there() -> set[str]:
    return {name for name in links.links() if name != "lo" and not name.startswith("wire")}


def test_a_manager_that_begins_makes_what_live_machines_need_and_clears_the_rest(
    bench: Bench, sh: Callable[..., str]
) -> None:
    bench.run(bench.networks.start())
    [bridge] = there()
    assert bench.run(bench.networks.missing(bench.network)) == []
    sh("ip", "link", "del", bridge)
    assert bench.run(bench.networks.missing(bench.network)) == [f"bridge {bridge}"]
    assert bench.run(bench.networks.reconcile()) == []
    assert there() == {bridge}
    # A machine that was off before its manager could let go of its address.
    bench.state("stopped")
    assert bench.run(bench.networks.reconcile()) == ["address 10.9.0.2"]
    assert bench.taken == []
    events = bench.database.read_now(list_events, kind="address.released").items
    assert [event.data["address"] for event in events] == ["10.9.0.2"]

    # A network that is gone from the store.
    def forget(s: Session) -> None:
        s.delete(find_machine(s, "one"))
        s.flush()
        s.delete(find_network(s, "office"))

    bench.database.write_now(forget)
    removed = bench.run(bench.networks.reconcile())
    assert [each.split()[0] for each in removed] == ["process", "packet", "bridge"]
    assert there() == set()


def test_a_dry_run_makes_and_clears_nothing(bench: Bench) -> None:
    dry = Networks(bench.settings.model_copy(update={"dry_run": True}), bench.database)
    bench.run(dry.start())
    assert there() == set()


def test_a_network_that_cannot_be_repaired_is_told_and_keeps_nobody_back(
    bench: Bench, sh: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    sh("ip", "addr", "add", "10.9.0.77/24", "dev", "lo")
    with caplog.at_level(logging.WARNING):
        bench.run(bench.networks.start())
    assert "overlaps 10.9.0.77/24" in caplog.text
    assert there() == set()


def test_a_machine_s_stop_and_end_give_its_address_back_and_tell_who_serves_it(
    bench: Bench,
) -> None:
    bench.run(bench.networks.machine_starting(bench.machine))
    [told] = bench.networks.host.directory.glob("*/dnsmasq-*.conf")
    assert "10.9.0.2" in told.read_text()
    bench.run(bench.networks.machine_stopped(bench.machine))
    assert bench.taken == []
    [told] = bench.networks.host.directory.glob("*/dnsmasq-*.conf")
    assert "10.9.0.2" not in told.read_text()


def test_guests_on_a_bridge_read_about_themselves_while_a_manager_runs(
    bench: Bench, client: Callable[[], Any]
) -> None:
    computer = client()

    def its_mac(s: Session) -> None:
        [nic] = find_machine(s, "one").nics
        nic.mac = nic.addresses[0].mac = computer.mac

    bench.database.write_now(its_mac)
    bench.run(bench.networks.start())
    computer.plug(*there())
    assert computer.ask()["ip"] == "10.9.0.2"

    async def fetched() -> str:
        return await asyncio.to_thread(computer.script, FETCH)

    assert bench.run(fetched()) == computer.mac
    bench.run(bench.networks.close())
    assert bench.run(fetched()) == "nobody"
