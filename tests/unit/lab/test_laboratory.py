"""Labs and their machines on the simulated hypervisor: everything but what is inside a guest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors.ownership import Run, Store
from vmlab.lab.laboratory import Lab
from vmlab.lab.vm import VM, LabDisk
from vmlab.machine.errors import (
    InvalidSpec,
    InvalidState,
    MachineNotFound,
    OperationFailed,
    UnsupportedOperation,
)
from vmlab.machine.faults import DiskError, KillFault
from vmlab.machine.sizes import GIB, MIB
from vmlab.machine.spec import Disk, Nic
from vmlab.machine.states import MachineState
from vmlab.report import Direction


class Observed:
    """An observer that remembers all that it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []

    def machine_made(self, vm: VM) -> None:
        self.told.append(("made", vm.name, vm.state.value))

    def marked(self, vm: VM, kind: str, text: str, duration_s: float | None) -> None:
        assert duration_s is None or duration_s >= 0
        self.told.append(("mark", vm.name, kind, text))

    def machine_gone(self, vm: VM) -> None:
        # It can still be looked at.
        assert vm.info().name == vm.name
        self.told.append(("gone", vm.name))


class Watching:
    """A watchdog that remembers what it is told to expect."""

    def __init__(self) -> None:
        self.expected: list[str] = []

    def expect(self, *kinds: str) -> Any:
        from contextlib import nullcontext

        self.expected += kinds
        return nullcontext()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(hypervisor="simulated", seed=7) as made:
        yield made


def test_a_machine_is_made_runs_and_goes(lab: Lab) -> None:
    vm = lab.vm(memory="64M", cpus=2)
    assert (vm.name, vm.hypervisor, vm.state, vm.alive) == (
        "vm", "simulated", MachineState.RUNNING, True,
    )  # fmt: skip
    assert (vm.info().vcpus, vm.info().memory) == (2, 64 * MIB)
    assert vm.image is None and vm.guest is None and vm.lab is lab and vm.forked is False
    assert "Linux version" in vm.console_text()
    vm.wait_for_console_text("login:", timeout=60)
    assert repr(vm) == "<VM 'vm' on simulated: running>"
    vm.delete()
    vm.delete()
    assert lab.machines == []
    with pytest.raises(MachineNotFound):
        vm.run(lab.venue("simulated").hypervisor.get("vm"))


def test_its_life_is_the_contracts(lab: Lab) -> None:
    vm = lab.vm(boot=False)
    assert vm.state is MachineState.CREATED
    vm.start()
    vm.pause()
    assert vm.state is MachineState.PAUSED
    vm.resume()
    vm.restart(graceful=False)
    assert vm.state is MachineState.RUNNING
    vm.stop()
    assert vm.state is MachineState.STOPPED
    vm.start()
    vm.kill()
    assert vm.state is MachineState.STOPPED
    vm.start()
    vm.shutdown()
    assert vm.state is MachineState.STOPPED
    with pytest.raises(InvalidState):
        vm.pause()


def test_observers_are_told_in_order(lab: Lab) -> None:
    seen = Observed()
    lab.observers.append(seen)
    vm = lab.vm(name="a", boot=False)
    vm.start()
    vm.snapshot("s")
    vm.delete()
    assert seen.told == [
        ("made", "a", "created"),
        ("mark", "a", "start", ""),
        ("mark", "a", "snapshot", "s"),
        ("gone", "a"),
    ]


def test_a_watchdog_is_told_what_is_meant(lab: Lab) -> None:
    vm = lab.vm(disks=["64M"])
    vm.watchdog = watching = Watching()
    vm.pause()
    vm.resume()
    assert watching.expected == []
    vm.stop()
    assert watching.expected == ["unexpected-exit", "unexpected-reboot"]
    vm.start()
    del watching.expected[:]
    vm.inject(DiskError(disk="disk0"))
    assert watching.expected == []
    vm.inject(KillFault())
    assert "unexpected-exit" in watching.expected


def test_names_are_free_ones_and_nobody_has_another_ones(lab: Lab) -> None:
    names = [lab.vm(boot=False).name for _ in range(3)]
    assert names == ["vm", "vm2", "vm3"]
    lab.machines[0].delete()
    assert lab.vm(boot=False).name == "vm"
    with pytest.raises(InvalidSpec, match="a name that no machine of the lab has"):
        lab.vm(name="vm2")
    with pytest.raises(InvalidSpec, match="name"):
        lab.vm(name="not a name")


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        ({"memory": "much"}, "memory"),
        ({"memory": True}, "memory"),
        ({"cpus": 0}, "cpus"),
        ({"disks": ["big"]}, "disks"),
        ({"shares": ["nothing"]}, "--share"),
        ({"shares": ["/nowhere/at/all:/src"]}, "--share"),
        ({"networks": ["a b"]}, "name"),
    ],
)
def test_a_wish_that_is_wrong_is_told_and_leaves_nothing(
    lab: Lab, wish: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidSpec, match=field):
        lab.vm(**wish)
    assert lab.machines == []


def test_a_machine_that_does_not_start_is_gone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: VM, timeout: float | None) -> None:
        if self.name == "b":
            raise OperationFailed("it does not start")
        await self.machine.start()

    monkeypatch.setattr(VM, "booted", refuse)
    seen = Observed()
    lab.observers.append(seen)
    with pytest.raises(OperationFailed, match="does not start"):
        lab.vms(["a", "b"])
    assert lab.machines == []
    assert [told[0] for told in seen.told if told[0] != "mark"] == ["made", "made", "gone", "gone"]
    assert lab.network().name == "net0"


def test_machines_of_a_network_have_addresses_of_their_own(lab: Lab) -> None:
    a, b = lab.vms(["a", "b_1"])
    assert a.addresses == {"net0": "10.213.0.1"}
    assert b.addresses == {"net0": "10.213.0.2"}
    assert b.hostname == "b-1"
    macs = {vm.info().nics[0].mac for vm in (a, b)}
    assert len(macs) == 2
    assert {vm.spec.nics[0].network for vm in (a, b)} == {"segment:net0"}
    c = lab.vm(name="c", networks=["net0", "other"], nics=[Nic(name="x", network="none")])
    assert c.addresses == {"net0": "10.213.0.3", "other": "10.213.1.1"}
    assert [nic.network for nic in c.spec.nics] == ["none", "segment:net0", "segment:other"]
    a.delete()
    b.delete()
    assert lab.network().name == "net1"
    c.delete()
    # The name is free again, and with it whatever was booted for it.
    assert lab.network().name == "net0"


def test_one_thing_for_all_or_one_for_each(lab: Lab) -> None:
    machines = lab.vms(2, hypervisor=["simulated", "simulated"], boot=False)
    assert [vm.name for vm in machines] == ["vm", "vm2"]
    with pytest.raises(InvalidSpec, match="one for each of 3"):
        lab.vms(3, hypervisor=["simulated"])
    with pytest.raises(InvalidSpec, match="machines"):
        lab.vms(0)


def test_disks_are_copies_by_position_or_by_name(lab: Lab) -> None:
    named = lab.disk("2M", name="data")
    vm = lab.vm(disks=["1M", named, lab.disk(4 * MIB), Disk(name="own", size=MIB)])
    assert [(disk.name, disk.size) for disk in vm.info().disks] == [
        ("disk0", MIB), ("data", 2 * MIB), ("disk2", 4 * MIB), ("own", MIB),
    ]  # fmt: skip
    assert vm.plug_disk("1M") == "disk1"
    assert vm.plug_disk("1M", name="hot") == "hot"
    vm.unplug_disk("disk1")
    assert [disk.name for disk in vm.info().disks] == ["disk0", "data", "disk2", "own", "hot"]
    with pytest.raises(InvalidSpec, match="or a source"):
        lab.disk()


def test_a_disk_of_a_source_is_that_file(lab: Lab, tmp_path: Path) -> None:
    disk = lab.disk(source=tmp_path / "x.img")
    assert isinstance(disk, LabDisk)
    assert disk.at("root").model_dump(include={"name", "source", "size"}) == {
        "name": "root", "source": tmp_path / "x.img", "size": None,
    }  # fmt: skip


def test_nics_come_and_go_with_their_addresses(lab: Lab) -> None:
    vm, network = lab.vm(), lab.network(subnet="192.168.77.0/30")
    assert vm.plug_nic(network) == "net0"
    assert vm.plug_nic("user") == "net1"
    assert vm.plug_nic(Nic(name="x", network="none")) == "x"
    assert vm.addresses == {"net0": "192.168.77.1"}
    vm.unplug_nic("net0")
    assert vm.addresses == {} and network.members == {}


def test_a_machine_grows(lab: Lab) -> None:
    vm = lab.vm(memory="64M", boot=False)
    info = vm.resize(vcpus=2, memory="128M")
    assert (info.vcpus, info.memory) == (2, 128 * MIB)


def test_snapshots_come_back(lab: Lab) -> None:
    vm = lab.vm()
    taken = vm.snapshot("clean")
    assert taken.memory and taken.directory is None
    vm.pause()
    vm.restore("clean")
    assert vm.state is MachineState.RUNNING


def test_a_fork_is_somebody_of_its_own(lab: Lab) -> None:
    origin = lab.vm(name="origin", networks=["lan"])
    fork = origin.fork()
    assert (fork.name, fork.state, fork.forked) == ("origin-fork", MachineState.RUNNING, True)
    assert origin.state is MachineState.RUNNING
    assert fork.addresses == {"lan": "10.213.0.2"}
    assert fork.machine_id != origin.machine_id
    assert fork.info().nics[0].mac != origin.info().nics[0].mac
    assert all(nic.link for nic in fork.info().nics)
    assert origin.fork(name="second").name == "second"
    fork.delete()
    assert origin.state is MachineState.RUNNING


def test_a_fork_of_a_machine_that_stands_still_becomes_somebody_when_it_runs(lab: Lab) -> None:
    origin = lab.vm(networks=["lan"])
    origin.pause()
    fork = origin.fork("fork")
    assert fork.state is MachineState.PAUSED and origin.state is MachineState.PAUSED
    fork.resume()
    assert fork.state is MachineState.RUNNING
    assert "connect" not in [step.name for step in origin.timeline.steps]
    assert [step.name for step in fork.timeline.steps] == ["resume", "link"]


def test_ids_are_of_the_seed_and_of_each_machine(lab: Lab) -> None:
    def ids(seed: int) -> list[str]:
        with Lab(hypervisor="simulated", seed=seed) as other:
            made = [other.vm(name="a", boot=False) for _ in range(1)]
            made[0].delete()
            return [made[0].machine_id, other.vm(name="a", boot=False).machine_id]

    first = ids(1)
    assert ids(1) == first
    assert len({*first, *ids(2)}) == 4
    assert all(len(each) == 32 for each in first)


def test_faults_are_injected_and_cleared(lab: Lab) -> None:
    vm = lab.vm(disks=["1M"])
    fault = vm.inject(DiskError(disk="disk0"))
    vm.clear_fault(fault)
    vm.power_cut(restart=False)
    assert not vm.alive
    vm.start()
    vm.power_cut()
    assert vm.state is MachineState.RUNNING


def test_commands_need_a_guest_that_is_real(lab: Lab) -> None:
    vm = lab.vm()
    for call in (
        lambda: vm.succeed("true"),
        lambda: vm.copy_in("/etc/hostname", "/x"),
        lambda: vm.wait_for_file("/x"),
        vm.block,
        vm.crash,
        vm.reboot,
    ):
        with pytest.raises(UnsupportedOperation, match="commands in guests") as caught:
            call()
        assert "simulated" in str(caught.value.hint)


def test_measurements_go_to_who_takes_them(lab: Lab) -> None:
    taken: list[tuple[Any, ...]] = []

    class Recorder:
        def metric(
            self, name: str, value: float, unit: str = "", *, direction: Direction = Direction.NONE
        ) -> None:
            taken.append((name, value, unit, direction))

    vm = lab.vm(boot=False)
    vm.record("boot_s", 1.0, "s")
    vm.recorder = Recorder()
    vm.record("boot_s", 2.0, "s")
    assert taken == [("boot_s", 2.0, "s", Direction.NONE)]
    vm.start()
    assert vm.metrics().memory.total_bytes == GIB // 2


def test_a_screen_and_its_keys(lab: Lab) -> None:
    vm = lab.vm()
    with pytest.raises(UnsupportedOperation):
        vm.screenshot()
    with pytest.raises(UnsupportedOperation):
        vm.send_keys("ret")


def test_a_lab_ends_with_all_that_it_made() -> None:
    lab = Lab(hypervisor="simulated")
    assert lab.lease is not None
    directory = lab.lease.directory
    vm = lab.vm()
    assert directory.is_dir() and repr(lab) == f"<Lab {lab.owner}: vm>"
    lab.close()
    lab.close()
    assert not directory.exists() and lab.machines == []
    with pytest.raises(OperationFailed, match="closed"):
        lab.vm()
    with pytest.raises(OperationFailed, match="closed"):
        vm.info()


def test_a_machine_that_cannot_be_removed_keeps_no_other_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab = Lab(hypervisor="simulated")
    assert lab.lease is not None
    removed: list[str] = []
    whole = VM.removed

    async def refuse(self: VM) -> None:
        if self.name == "b":
            raise OperationFailed("it does not go")
        removed.append(self.name)
        await whole(self)

    monkeypatch.setattr(VM, "removed", refuse)
    for name in "abc":
        lab.vm(name=name, boot=False)
    with pytest.raises(OperationFailed, match="does not go"):
        lab.close()
    assert removed == ["c", "a"]
    assert not lab.lease.directory.exists()


def test_a_machine_may_stay_with_a_store() -> None:
    store = Store.open(name="kept")
    with Lab(hypervisor="simulated", owner=store.owner) as lab:
        assert lab.lease is None
        lab.leave(lab.vm(name="stays"))
        lab.vm(name="goes")
    with Lab(hypervisor="simulated", owner=store.owner) as lab:
        venue = lab.venue("simulated")
        names = [machine.name for machine in venue.loop.run(venue.hypervisor.list())]
        assert names == ["stays"]
        venue.loop.run(venue.loop.run(venue.hypervisor.get("stays")).delete(force=True))


def test_labs_of_one_run_share_it() -> None:
    with Run.begin() as run:
        with Lab(hypervisor="simulated", owner=run.owner) as lab:
            lab.vm()
        assert run.directory.exists()
