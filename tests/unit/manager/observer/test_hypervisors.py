"""What is made of machines that answer, do not answer, or are gone while they are asked."""

from __future__ import annotations

import asyncio

import pytest

from vmlab.hypervisors.base import DiskInfo, MachineInfo, MachineStatus, NicInfo
from vmlab.machine.errors import DeadlineExceeded, MachineNotFound
from vmlab.machine.states import MachineState
from vmlab.manager.observer.collect.hypervisors import present, seen_of
from vmlab.manager.observer.eyes import Scope
from vmlab.manager.observer.findings import Open
from vmlab.manager.observer.observer import _is_over

S = MachineState


class Machine:
    """A machine that answers with what it is given, or raises that."""

    def __init__(self, name="m-one", status=S.RUNNING, info=None):
        self.id, self.name, self.state = "f" * 32, name, S.RUNNING
        self._status, self._info = status, info
        self.asked = []

    async def status(self, *, timeout):
        self.asked.append("status")
        if isinstance(self._status, Exception):
            raise self._status
        return MachineStatus(id=self.id, name=self.name, state=self._status, time=0.0)

    async def info(self, *, timeout):
        self.asked.append("info")
        if isinstance(self._info, Exception):
            raise self._info
        return MachineInfo(
            id=self.id,
            name=self.name,
            architecture="x86_64",
            vcpus=1,
            memory=1,
            disks=(DiskInfo(name="data", size=1, bus="virtio"),),
            nics=(NicInfo(name="net0", network="user", mac="52:54:00:AA:00:01"),),
        )


class Hypervisor:
    """Has those machines."""

    def __init__(self, *machines):
        self.machines = {machine.name: machine for machine in machines}

    async def list(self):
        return list(self.machines.values())

    async def get(self, name):
        if name not in self.machines:
            raise MachineNotFound(name)
        return self.machines[name]


def look(known, *machines, ask=None, others=True):
    async def at_them():
        found = await present(Hypervisor(*machines), None if others else ask)
        return await seen_of("qemu", found, known, ask)

    return asyncio.run(at_them())


def test_a_machine_of_the_stores_tells_its_state_and_its_parts(known):
    (found,), looked = look(known, Machine())
    assert looked == {"host:qemu", "parts:one"}
    assert [disk.name for disk in found.disks] == ["data"]
    assert [nic.mac for nic in found.nics] == ["52:54:00:aa:00:01"]


def test_one_that_is_not_asked_is_as_it_was_last_known(known):
    machine = Machine()
    (found,), looked = look(known, machine, ask={"m-other"})
    assert (found.state, found.disks, machine.asked) == (S.RUNNING, None, [])
    assert looked == {"host:qemu"}
    assert look(known, machine, ask={"m-other"}, others=False) == ([], {"host:qemu"})
    assert machine.asked == []


def test_thousands_are_told_of_whether_they_are_asked_or_not(known):
    machines = [Machine(f"m-{number:012x}") for number in range(1500)]
    names = {machine.name for machine in machines}
    asked = set(sorted(names)[::3])
    found, _ = look(known, *machines, ask=asked)
    assert sorted(each.at for each in found) == sorted(names)
    assert {machine.name for machine in machines if machine.asked} == asked


def test_one_that_the_store_does_not_know_is_not_asked_for_its_parts(known):
    machine = Machine("m-stranger")
    look(known, machine)
    assert machine.asked == ["status"]


@pytest.mark.parametrize("error", [DeadlineExceeded("status", seconds=1), MachineNotFound("gone")])
def test_one_that_does_not_answer_is_as_it_was_last_known(known, error):
    (found,), looked = look(known, Machine(status=error))
    assert (found.state, found.disks) == (S.RUNNING, None)
    assert "parts:one" not in looked


def test_one_that_is_deleted_meanwhile_is_not_there(known):
    assert look(known, Machine(status=S.DELETED))[0] == []
    assert look(known, Machine(info=MachineNotFound("gone")))[0] == []


def test_one_that_does_not_tell_its_parts_has_its_state(known):
    (found,), looked = look(known, Machine(info=DeadlineExceeded("info", seconds=1)))
    assert (found.state, found.disks) == (S.RUNNING, None)
    assert "parts:one" not in looked


# ------------------------------------------------------------------------ what is over


def finding(source, subject="one", code="machine-state-mismatch"):
    return Open(
        id="id",
        code=code,
        subject=subject,
        source=source,
        touches=frozenset({"one"}),
    )


def test_a_finding_is_over_only_if_its_source_was_looked_at(known, seen):
    from dataclasses import replace

    everything = Scope()
    assert _is_over(finding("host:qemu"), known, seen, everything)
    assert not _is_over(finding("host:other"), known, seen, everything)
    busy = replace(known, busy=frozenset({"one"}))
    assert not _is_over(finding("host:qemu"), busy, seen, everything)


def test_a_look_at_some_machines_says_nothing_of_others(known, seen):
    some = Scope(machines=frozenset({"one"}))
    assert _is_over(finding("host:qemu"), known, seen, some)
    assert not _is_over(finding("host:qemu", subject="two"), known, seen, some)
    assert not _is_over(finding("host:other"), known, seen, some)


def test_what_nobody_will_ask_any_more_is_over(known, seen):
    from dataclasses import replace

    everything, nobody = Scope(), replace(known, machines=())
    quiet = replace(seen, looked=frozenset())
    assert _is_over(finding("host:gone"), nobody, quiet, everything)
    assert _is_over(finding("parts:one"), nobody, quiet, everything)
    assert not _is_over(finding("parts:one"), known, quiet, everything)
    resting = replace(known, machines=(replace(known.machines[0], state=S.STOPPED),))
    assert _is_over(finding("guest:one"), resting, quiet, everything)
    assert not _is_over(finding("guest:one"), known, quiet, everything)
    assert not _is_over(finding("files", subject="x", code="orphan-disk"), known, quiet, everything)
