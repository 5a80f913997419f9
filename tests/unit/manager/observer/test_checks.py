"""Each code of a finding: what shows it, what does not, and what is under way."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from vmlab.machine.states import MachineState
from vmlab.manager.networks.names import interface
from vmlab.manager.observer.checks import Thresholds, differences
from vmlab.manager.observer.difference import CODES
from vmlab.manager.observer.known import Known, KnownAddress, KnownNetwork, KnownReservation
from vmlab.manager.observer.seen import (
    Seen,
    SeenDisk,
    SeenFile,
    SeenGuest,
    SeenInterface,
    SeenLease,
    SeenLock,
    SeenMachine,
    SeenNic,
    SeenProcess,
    SeenVolume,
)

S = MachineState
MIB = 1 << 20


def only(known, seen, code, **thresholds):
    """The one difference there is, which has that code."""
    found = list(differences(known, seen, Thresholds(**thresholds)))
    assert [each.code for each in found] == [code]
    assert set(found[0].actions) <= set(CODES[code].actions)
    return found[0]


def test_a_store_and_a_world_that_agree_differ_in_nothing(known, seen):
    assert list(differences(known, seen)) == []


def test_every_difference_needs_that_its_source_was_looked_at(known):
    nothing = Seen(at=None, looked=frozenset())
    assert list(differences(known, nothing)) == []


# ------------------------------------------------------------------------ machines


@pytest.mark.parametrize(
    ("stored", "wanted", "shown"),
    [
        (S.RUNNING, "running", S.FAILED),
        (S.RUNNING, "running", S.STOPPED),
        (S.STOPPED, "stopped", S.RUNNING),
        (S.RUNNING, "running", S.PAUSED),
        (S.PAUSED, "paused", S.RUNNING),
        (S.RUNNING, "running", S.UNKNOWN),
        # Nothing is under way on it, so it cannot be in between.
        (S.STARTING, "running", S.STOPPED),
    ],
)
def test_machine_state_mismatch_is_found_both_ways(known, seen, stored, wanted, shown):
    known = replace(known, machines=(replace(known.machines[0], state=stored, wanted=wanted),))
    seen = replace(
        seen, machines=(replace(seen.machines[0], state=shown, reason="why"),), processes=()
    )
    found = only(known, seen, "machine-state-mismatch")
    assert found.subject == "one"
    assert found.evidence["stored"] == stored
    assert found.evidence["seen"] == shown
    # Of what nobody knows nothing can be made.
    assert found.actions == (() if shown is S.UNKNOWN else ("adopt", "reconcile"))
    assert "why" in found.message


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        (S.STOPPED, S.CREATED),
        (S.FAILED, S.STOPPED),
        (S.CREATED, S.STOPPED),
        (S.STOPPED, S.FAILED),
        # Somebody is at it.
        (S.STOPPED, S.STARTING),
        (S.RUNNING, S.SNAPSHOTTING),
    ],
)
def test_states_that_mean_the_same_or_pass_are_no_mismatch(known, seen, stored, shown):
    known = replace(known, machines=(replace(known.machines[0], state=stored),))
    seen = replace(seen, machines=(replace(seen.machines[0], state=shown),), processes=())
    assert list(differences(known, seen)) == []


def test_a_machine_that_its_host_lost_is_a_mismatch_and_one_being_deleted_is_not(known, seen):
    seen = replace(seen, machines=(), processes=())
    found = only(known, seen, "machine-state-mismatch")
    assert found.severity == "critical"
    assert found.actions == ("adopt",)
    for state in (S.DELETING, S.FAILED):
        known = replace(known, machines=(replace(known.machines[0], state=state),))
        assert list(differences(known, seen)) == []


def test_what_an_operation_is_under_way_on_is_no_difference(known, seen):
    seen = replace(seen, machines=(replace(seen.machines[0], state=S.FAILED),), processes=())
    assert list(differences(replace(known, busy=frozenset({"one"})), seen)) == []
    assert list(differences(replace(known, busy=frozenset({"another"})), seen)) != []


def test_orphan_machine_is_one_that_the_store_does_not_know(known, seen):
    stranger = SeenMachine("qemu", "e" * 32, "m-0123456789ab", S.RUNNING)
    seen = replace(seen, machines=(*seen.machines, stranger))
    found = only(known, seen, "orphan-machine")
    assert found.subject == f"qemu/{'e' * 32}"
    assert found.actions == ("adopt", "quarantine", "reconcile")
    moving = replace(seen, machines=(seen.machines[0], replace(stranger, state=S.MIGRATING)))
    assert list(differences(known, moving)) == []


def test_a_machine_that_an_operation_moves_to_another_host_is_no_orphan_there(known, seen):
    there = replace(seen.machines[0], host="other", id="e" * 32)
    seen = replace(seen, machines=(*seen.machines, there))
    assert only(known, seen, "orphan-machine").subject == f"other/{'e' * 32}"
    assert list(differences(replace(known, busy=frozenset({"one"})), seen)) == []


def test_an_orphan_machine_of_another_name_than_the_managers_cannot_be_adopted(known, seen):
    stranger = SeenMachine("qemu", "e" * 32, "somebodys", S.STOPPED)
    found = only(known, replace(seen, machines=(*seen.machines, stranger)), "orphan-machine")
    assert found.actions == ("quarantine", "reconcile")


def test_orphan_process_is_of_no_machine_or_of_one_at_rest(known, seen):
    lone = SeenProcess(9, 90, seen.processes[0].began, ("/usr/bin/qemu", "-x"), "a" * 32)
    found = only(known, replace(seen, processes=(*seen.processes, lone)), "orphan-process")
    assert found.subject == "process 9 of 90"
    assert found.evidence["argv"] == ["/usr/bin/qemu", "-x"]
    at_rest = replace(
        known, machines=(replace(known.machines[0], state=S.STOPPED, wanted="stopped"),)
    )
    stopped = replace(seen, machines=(replace(seen.machines[0], state=S.STOPPED),))
    assert only(at_rest, stopped, "orphan-process").touches == {"one"}


def test_a_process_of_a_network_that_is_gone_is_an_orphan(known, seen):
    def with_process(network):
        process = SeenProcess(9, 90, seen.processes[0].began, ("dnsmasq",), network=network)
        return replace(seen, processes=(*seen.processes, process))

    only(known, with_process("gone"), "orphan-process")
    assert list(differences(known, with_process("lan"))) == []
    # The switch is for all networks that have a tag.
    only(known, with_process("switch"), "orphan-process")
    tagged = replace(known, networks=(replace(known.networks[0], vlan=7),))
    assert list(differences(tagged, with_process("switch"))) == []


def test_a_process_younger_than_the_operation_under_way_may_be_its_own(known, seen):
    lone = SeenProcess(9, 90, seen.at, ("qemu",), "a" * 32)
    seen = replace(seen, processes=(*seen.processes, lone))
    busy = replace(known, since=seen.at - timedelta(seconds=1))
    assert list(differences(busy, seen)) == []
    only(replace(known, since=seen.at + timedelta(seconds=1)), seen, "orphan-process")


def test_no_process_is_an_orphan_while_a_host_does_not_answer(known, seen):
    lone = SeenProcess(9, 90, seen.processes[0].began, ("qemu",), "a" * 32)
    known = replace(known, hosts=known.hosts | {"embedded"})
    assert list(differences(known, replace(seen, processes=(lone,)))) == []


# ------------------------------------------------------------------------ disks


def test_missing_disk_is_a_file_that_is_not_there_or_no_disk(known, seen, disk):
    found = only(known, replace(seen, files=()), "missing-disk")
    assert found.subject == disk.id
    assert found.severity == "critical"
    damaged = SeenFile(disk.path, disk.id, None, seen.at, "it does not begin as a qcow2 file does")
    assert "qcow2" in only(known, replace(seen, files=(damaged,)), "missing-disk").message


@pytest.mark.parametrize("state", ["creating", "deleting", "failed"])
def test_a_disk_that_is_not_there_yet_or_any_more_is_not_missing(known, seen, disk, state):
    known = replace(known, disks=(replace(disk, state=state, machine=None),))
    seen = replace(seen, files=(), machines=(replace(seen.machines[0], disks=()),))
    assert list(differences(known, seen)) == []


def test_orphan_disk_is_a_file_of_no_disk(known, seen, disk):
    file = SeenFile(disk.path.with_name(f"{'e' * 32}.raw"), "e" * 32, 512, seen.files[0].changed)
    found = only(known, replace(seen, files=(*seen.files, file)), "orphan-disk")
    assert found.name == file.path.name
    assert found.actions == ("adopt", "quarantine", "reconcile")
    other = replace(file, path=disk.path.with_name("notes.txt"), disk=None)
    found = only(known, replace(seen, files=(*seen.files, other)), "orphan-disk")
    assert found.actions == ("quarantine", "reconcile")


def test_a_file_that_an_operation_under_way_may_be_making_is_no_orphan(known, seen, disk):
    file = SeenFile(disk.path.with_name(f"{'e' * 32}.raw.part"), "e" * 32, 512, seen.at)
    seen = replace(seen, files=(*seen.files, file))
    assert list(differences(replace(known, since=seen.at), seen)) == []
    assert list(differences(replace(known, busy=frozenset({"e" * 32})), seen)) == []


def test_disk_attachment_mismatch_when_the_machine_has_not_what_the_store_says(known, seen):
    seen = replace(seen, machines=(replace(seen.machines[0], disks=()),))
    found = only(known, seen, "disk-attachment-mismatch")
    assert found.evidence["direction"] == "store"
    assert found.touches == {"one", "d" * 32}


def test_disk_attachment_mismatch_when_the_store_says_not_what_the_machine_has(known, seen, disk):
    known = replace(known, disks=(replace(disk, machine=None, device=None, state="available"),))
    found = only(known, seen, "disk-attachment-mismatch")
    assert found.evidence["direction"] == "world"
    assert found.evidence["device"] == "data"
    assert found.actions == ("adopt", "reconcile")


def test_a_disk_that_a_second_machine_has_as_well_is_only_taken_from_it(known, seen, disk):
    other = replace(known.machines[0], id="two", name="db", at="m-two", nics=())
    known = replace(known, machines=(*known.machines, other))
    twin = replace(seen.machines[0], id="e" * 32, at="m-two", disks=(SeenDisk("x", 1, disk.path),))
    seen = replace(
        seen, machines=(*seen.machines, twin), looked=seen.looked | {"parts:two"}, processes=()
    )
    found = only(known, seen, "disk-attachment-mismatch")
    assert found.actions == ("reconcile",)
    assert found.touches == {"one", "two", disk.id}


def test_a_machine_that_was_not_asked_for_its_parts_has_no_attachment_mismatch(known, seen):
    seen = replace(seen, looked=seen.looked - {"parts:one"})
    seen = replace(seen, machines=(replace(seen.machines[0], disks=None),))
    assert list(differences(known, seen)) == []


def test_a_disk_whose_file_the_hypervisor_does_not_tell_is_known_by_its_device(known, seen):
    parts = (SeenDisk("data", 4096, None),)
    seen = replace(seen, machines=(replace(seen.machines[0], disks=parts),))
    assert list(differences(known, seen)) == []


@pytest.mark.parametrize(
    ("size", "actions", "severity"),
    [(2048, ("adopt", "reconcile"), "error"), (8192, ("adopt",), "warning")],
)
def test_disk_size_mismatch_is_never_mended_by_shrinking(
    known, seen, disk, size, actions, severity
):
    seen = replace(seen, files=(replace(seen.files[0], size=size),))
    found = only(known, seen, "disk-size-mismatch")
    assert (found.actions, found.severity) == (actions, severity)
    assert found.evidence == {"path": str(disk.path), "stored": 4096, "seen": size}


def test_storage_low_needs_a_small_share_and_few_bytes(known, seen):
    def with_free(free, size=1000 * MIB):
        return replace(seen, volumes=(SeenVolume(Path("/var"), size, free),))

    limits = {"free_share": 0.1, "free_bytes": 200 * MIB}
    found = only(known, with_free(90 * MIB), "storage-low", **limits)
    assert (found.subject, found.severity, found.actions) == ("/var", "warning", ())
    assert only(known, with_free(MIB), "storage-low", **limits).severity == "critical"
    assert list(differences(known, with_free(110 * MIB), Thresholds(**limits))) == []
    roomy = with_free(300 * MIB, size=10_000 * MIB)
    assert list(differences(known, roomy, Thresholds(**limits))) == []


# ------------------------------------------------------------------------ networks


def test_address_conflict_is_an_address_in_use_by_another_than_its_owner(known, seen):
    thief = SeenLease("lan", "10.0.0.2", "52:54:00:00:00:66", "neighbour")
    found = only(known, replace(seen, leases=(*seen.leases, thief)), "address-conflict")
    assert found.subject == "lan/10.0.0.2"
    assert found.evidence["belongs_to"] == "52:54:00:00:00:01"
    assert found.actions == ()  # nobody knows that NIC
    only(known, replace(seen, leases=(thief,)), "address-conflict")


def test_the_nic_that_has_anothers_address_can_be_taken_off(known, seen):
    nic = replace(known.machines[0].nics[0], id="nic2", mac="52:54:00:00:00:02")
    other = replace(known.machines[0], id="two", name="db", at="m-two", nics=(nic,))
    known = replace(known, machines=(*known.machines, other))
    twin = replace(seen.machines[0], id="e" * 32, at="m-two", disks=())
    seen = replace(seen, machines=(*seen.machines, twin))
    thief = SeenLease("lan", "10.0.0.2", "52:54:00:00:00:02")
    found = only(known, replace(seen, leases=(*seen.leases, thief)), "address-conflict")
    assert found.evidence["intruders"] == [{"machine": "two", "nic": "net0"}]
    assert found.actions == ("quarantine",)
    assert found.touches == {"lan", "one", "two"}


def test_two_that_use_an_address_of_nobody_are_a_conflict_and_one_is_not(known, seen):
    one = SeenLease("lan", "10.0.0.9", "52:54:00:00:00:08")
    assert list(differences(known, replace(seen, leases=(one,)))) == []
    two = replace(one, mac="52:54:00:00:00:09")
    only(known, replace(seen, leases=(one, two)), "address-conflict")


@pytest.mark.parametrize(
    "address",
    [
        KnownAddress("a", "lan", "10.0.0.7"),
        KnownAddress("a", "lan", "10.0.0.7", None, "one", None),
        KnownAddress("a", "lan", "10.0.0.7", "gone", "one", None),
    ],
)
def test_leaked_address_is_taken_by_nobody(known, seen, address):
    known = replace(known, addresses=(*known.addresses, address))
    found = only(known, seen, "leaked-address")
    assert found.name == "10.0.0.7"
    assert found.actions == ("reconcile",)


def test_a_machine_at_rest_leaks_its_address_only_if_its_policy_lets_go_then(known, seen):
    resting = replace(known.machines[0], state=S.STOPPED, wanted="stopped")
    seen = replace(seen, machines=(replace(seen.machines[0], state=S.STOPPED),), processes=())
    assert list(differences(replace(known, machines=(resting,)), seen)) == []
    letting_go = replace(resting, releases="stop")
    only(replace(known, machines=(letting_go,)), seen, "leaked-address")


def bridged(known, **changes):
    return replace(
        known,
        networks=(replace(KnownNetwork("lan", "office", "bridged", "vmlb-lan"), **changes),),
    )


def test_lost_interface_belongs_to_no_network(known, seen):
    stray = SeenInterface("vmlb0123", "bridge", "gone")
    found = only(known, replace(seen, interfaces=(stray,)), "lost-interface")
    assert (found.subject, found.evidence["network"]) == ("vmlb0123", "gone")


def test_lost_interface_is_a_bridge_that_a_running_machine_needs(known, seen):
    known = bridged(known)
    found = only(known, seen, "lost-interface")
    assert (found.subject, found.severity) == ("vmlb-lan", "error")
    there = replace(seen, every_interface=frozenset({"vmlb-lan"}))
    assert list(differences(known, there)) == []
    resting = replace(known.machines[0], state=S.STOPPED, wanted="stopped")
    at_rest = replace(seen, machines=(replace(seen.machines[0], state=S.STOPPED),), processes=())
    assert list(differences(replace(known, machines=(resting,)), at_rest)) == []


def test_lost_interface_is_the_port_of_a_tagged_network_that_is_gone(known, seen):
    known = bridged(known, vlan=7)
    bridge, port = "vmlb-lan", interface("port", "lan")
    found = only(known, replace(seen, every_interface=frozenset({bridge})), "lost-interface")
    assert (found.subject, found.actions) == (port, ("reconcile",))
    whole = replace(
        seen,
        every_interface=frozenset({bridge, port}),
        interfaces=(SeenInterface(port, "tun", "lan"), SeenInterface("vmls1", "tun", "switch")),
    )
    assert list(differences(known, whole)) == []


@pytest.mark.parametrize("there", [False, True], ids=["gone", "elsewhere"])
def test_lost_interface_is_the_tap_of_a_nic_that_is_cut_off(known, seen, seen_machine, there):
    known, bridge, tap = bridged(known), "vmlb-lan", "vml0123"
    nic = SeenNic("net0", f"bridge:{bridge}", "52:54:00:00:00:01", tap)
    machine = replace(seen_machine, nics=(nic,))
    names = frozenset({bridge, tap} if there else {bridge})
    cut_off = replace(seen, machines=(machine,), every_interface=names)
    found = only(known, cut_off, "lost-interface")
    assert (found.subject, found.source) == (tap, "parts:one")
    assert found.touches == {"one", "lan"}
    assert found.evidence["lacking"] is not there
    whole = replace(
        cut_off, every_interface=frozenset({bridge, tap}), joined=frozenset({(tap, bridge)})
    )
    assert list(differences(known, whole)) == []
    # Where the bridge itself is gone, that is what is told.
    no_bridge = replace(cut_off, every_interface=frozenset({tap}))
    assert only(known, no_bridge, "lost-interface").subject == bridge


# ------------------------------------------------------------------------ locks, guests


def test_stale_lock_is_held_by_a_stranger_or_named_by_the_dead(known, seen):
    path = Path("/s/machines/qemu/f/lock")
    held = SeenLock(path, "f" * 32, holder=66, named=66, alive=True)
    found = only(known, replace(seen, locks=(held,)), "stale-lock")
    assert (found.severity, found.actions, found.touches) == ("error", (), {"one"})
    left = SeenLock(path, "f" * 32, holder=None, named=66, alive=False)
    found = only(known, replace(seen, locks=(left,)), "stale-lock")
    assert (found.severity, found.actions) == ("info", ("reconcile",))


@pytest.mark.parametrize(
    "lock",
    [
        SeenLock(Path("/l"), None, holder=5, named=5, alive=True, ours=True),
        SeenLock(Path("/l"), None, holder=None, named=5, alive=True),
        SeenLock(Path("/l"), None, holder=None),
    ],
)
def test_a_lock_of_ours_or_of_nobody_is_not_stale(known, seen, lock):
    assert list(differences(known, replace(seen, locks=(lock,)))) == []


def test_a_reservation_of_an_operation_that_has_ended_is_stale(known, seen):
    def with_reservation(ended):
        return replace(known, reservations=(KnownReservation("r", "op", "2 vCPUs", ended),))

    found = only(with_reservation(True), seen, "stale-lock")
    assert found.subject == "reservation r"
    assert list(differences(with_reservation(False), seen)) == []


def test_guest_agent_unreachable_is_a_guest_that_was_asked_in_vain(known, seen):
    found = only(
        known,
        replace(seen, guests=(SeenGuest("one", False, "no answer"),)),
        "guest-agent-unreachable",
    )
    assert found.source == "guest:one"
    assert list(differences(known, replace(seen, guests=(SeenGuest("one", True),)))) == []
    assert list(differences(known, replace(seen, guests=(SeenGuest("gone", False),)))) == []


@pytest.mark.parametrize(("drift", "way"), [(30.0, "ahead"), (-30.0, "behind")])
def test_clock_drift_is_more_than_asking_can_explain(known, seen, drift, way):
    def with_guest(uncertainty):
        guest = SeenGuest("one", True, drift=drift, uncertainty=uncertainty)
        return replace(seen, guests=(guest,))

    assert way in only(known, with_guest(1.0), "clock-drift").message
    assert list(differences(known, with_guest(26.0))) == []


def test_the_codes_are_those_that_are_documented():
    assert list(CODES) == [
        "machine-state-mismatch",
        "orphan-process",
        "orphan-machine",
        "missing-disk",
        "orphan-disk",
        "disk-attachment-mismatch",
        "disk-size-mismatch",
        "address-conflict",
        "leaked-address",
        "lost-interface",
        "stale-lock",
        "guest-agent-unreachable",
        "clock-drift",
        "storage-low",
    ]


def test_only_what_removes_data_is_said_to():
    assert {code for code, what in CODES.items() if what.destroys} == {
        "orphan-machine",
        "orphan-disk",
    }
    assert Known().machines == ()
