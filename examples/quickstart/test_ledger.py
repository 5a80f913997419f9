"""Five tests of a small C program, each in machines of its own."""

import pytest


def test_it_runs(vm, ledger):
    assert vm.succeed(f"{ledger(vm)} version").stdout == "ledger 1.0\n"


def test_records_are_read_back(vm, ledger):
    ledger(vm)
    vm.succeed("ledger add /tmp/book first", "ledger add /tmp/book second")
    assert vm.succeed("ledger list /tmp/book").stdout == "first\nsecond\n"
    vm.record("added_s", vm.succeed("ledger add /tmp/book third").seconds, unit="s")


def test_a_full_disk_is_told(vm, ledger):
    ledger(vm)
    vm.succeed("mkdir /small && mount -t tmpfs -o size=4k none /small")
    vm.succeed("for n in 1 2 3 4 5 6 7 8; do ledger add /small/book $n || exit; done")
    failed = vm.fail("ledger add /small/book 9")
    assert "No space left on device" in failed.stderr


@pytest.mark.vm(memory="256M")
def test_what_was_added_survives_a_power_cut(vm_factory, disk_factory, ledger):
    vm = vm_factory(disks=[disk_factory("1M")])
    ledger(vm)
    vm.succeed("ledger add /dev/vda kept", "ledger add-later /dev/vda lost")
    assert vm.succeed("ledger list /dev/vda").stdout == "kept\nlost\n"
    vm.power_cut(restart=True)
    ledger(vm)
    assert vm.succeed("ledger list /dev/vda").stdout == "kept\n"


@pytest.mark.vm(memory="256M")
def test_a_ledger_is_sent_to_another_machine(vms, ledger):
    here, there = vms("here", "there")
    ledger(here), ledger(there)
    here.succeed("ledger add /tmp/book 'from here'")
    there.succeed("(nc -l -p 4000 >/tmp/book; touch /tmp/done) >/dev/null 2>&1 &")
    there.wait_for_open_port(4000)
    here.succeed("nc there 4000 </tmp/book")
    there.wait_for_file("/tmp/done", timeout=60)
    assert there.succeed("ledger list /tmp/book").stdout == "from here\n"
