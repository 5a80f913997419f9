"""A day in the simulated data centre is the same for the same seed, and sees a wrong byte."""

from __future__ import annotations

import dataclasses

from vmlab.hypervisors.simulated.datacentre import DataCentre
from vmlab.hypervisors.simulated.disk import SimulatedDisk


def day_of(seed, **options):
    return DataCentre(hosts=2, machines=10, seed=seed, **options).run(40_000)


def test_the_same_seed_gives_the_same_day():
    first, second, other = day_of(1), day_of(1), day_of(2)
    assert dataclasses.asdict(first) == dataclasses.asdict(second) != dataclasses.asdict(other)


def test_a_day_has_all_that_it_promises():
    shares: list[float] = []
    day = day_of(3, on_progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0
    done = sum((machine.done for machine in day.machines[1:]), start=day.machines[0].done)
    for action in ("snapshot", "restore", "migrate", "restart", "pause", "kill", "power-cut"):
        assert done[action] > 0
    assert all(machine.runs_at_end and machine.mixed_up == 0 for machine in day.machines)
    assert all(0.5 < machine.availability <= 1 for machine in day.machines)
    assert sum(host.machines for host in day.hosts) == 10
    arrivals = sum(host.arrivals for host in day.hosts)
    assert arrivals == sum(host.departures for host in day.hosts) == done["migrate"]
    assert day.events > 1000


def test_a_disk_that_forgets_on_the_way_is_seen(monkeypatch):
    real = SimulatedDisk.contents

    def forgetful(disk):
        contents = real(disk)
        contents.pages.clear()
        return contents

    monkeypatch.setattr(SimulatedDisk, "contents", forgetful)
    assert sum(machine.mixed_up for machine in day_of(3).machines) > 0
