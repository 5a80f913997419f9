"""Machines on a private network find each other by name, whoever runs them."""

from __future__ import annotations

import pytest

from vmlab.lab.laboratory import Lab
from vmlab.lab.vm import VM

pytestmark = [pytest.mark.boots, pytest.mark.timeout(900)]

MEMORY = "256M"


def reaches(vm: VM, name: str) -> None:
    """One machine reaches another, which may have to be waited for.

    What is sent to a guest that the host lets stand still for some seconds is lost, and so is the
    question for its address.
    """
    vm.wait_until_succeeds(f"ping -c 1 {name}", timeout=300)


def test_forks_of_one_template_find_each_other_and_do_not_collide(lab: Lab) -> None:
    one, two = lab.vms(["one", "two"], memory=MEMORY, network=lab.networks.get("lan"))
    assert len({vm.info().nics[0].mac for vm in (one, two)}) == 2
    reaches(one, "two")
    reaches(two, "one")
    three = lab.vm(name="three", memory=MEMORY, networks=[one.plugs[0].network])
    four = one.fork("four")
    for name in ("one", "two", "three", "four"):
        for vm in (one, two, three, four):
            if vm.name != name:
                reaches(vm, name)
    addresses = {vm.addresses["lan"] for vm in (one, two, three, four)}
    assert len(addresses) == 4


def test_the_embedded_engine_and_qemu_share_a_network(lab: Lab) -> None:
    ours, theirs = lab.vms(
        ["ours", "theirs"],
        network=lab.networks.get("lan"),
        memory=MEMORY,
        hypervisor=["embedded", "qemu"],
        image=["debian-13-riscv64-tiny", "debian-12-amd64-tiny"],
    )
    assert (ours.hypervisor, theirs.hypervisor) == ("embedded", "qemu")
    assert not ours.forked and theirs.forked
    reaches(theirs, "ours")
    reaches(ours, "theirs")
    assert ours.succeed("hostname").stdout.strip() == "ours"
    assert ours.read("/etc/machine-id").decode().strip() == ours.machine_id
