"""What a test does with a machine, in a real guest: one fork for all that leaves it as it was."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from vmlab.guests.guest import CommandFailed
from vmlab.hypervisors.ownership import Home
from vmlab.lab.admission import OVERHEAD, used_by
from vmlab.lab.laboratory import Lab
from vmlab.machine.errors import InvalidState
from vmlab.machine.sizes import MIB
from vmlab.machine.states import MachineState

pytestmark = [pytest.mark.boots, pytest.mark.timeout(900)]

MEMORY = "256M"


def test_commands_files_and_ports(lab: Lab, tmp_path: Path) -> None:
    vm = lab.vm(memory=MEMORY, networks=["lan"])
    assert vm.image is not None and vm.image.name == "debian-12-amd64-tiny"
    assert vm.execute(["sh", "-c", "exit 3"]).status == 3
    assert vm.execute("cat; echo $A; pwd", input="in", environment={"A": "b"},
                      directory="/tmp").stdout == "inb\n/tmp\n"  # fmt: skip
    with pytest.raises(CommandFailed):
        vm.succeed("false")
    vm.fail("false")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("there")
    vm.copy_in(tmp_path / "tree", "/root/tree")
    vm.copy_out("/root/tree/file", tmp_path / "back")
    assert (tmp_path / "back").read_text() == "there"
    vm.write("/root/one", "1")
    assert vm.read("/root/one") == b"1"
    vm.execute("(sleep 1; touch /root/later) >/dev/null 2>&1 &")
    vm.wait_for_file("/root/later", timeout=300)
    assert vm.wait_until_succeeds("cat /root/later && echo yes", timeout=300).stdout == "yes\n"
    vm.wait_until_fails("test -e /root/never", timeout=300)
    vm.execute("nc -l -p 77 -e echo hello >/dev/null 2>&1 &")
    vm.wait_for_open_port(77, timeout=300)
    with socket.create_connection(("127.0.0.1", vm.forward_port(77)), 300) as connection:
        assert connection.recv(100) == b"hello\n"
    vm.wait_for_closed_port(77, timeout=300)
    vm.block()
    assert not vm.info().nics[0].link
    vm.unblock()
    assert vm.info().nics[0].link


def test_a_guest_is_itself_again_after_every_boot(lab: Lab) -> None:
    vm = lab.vm(memory=MEMORY, networks=["lan"])
    boot = vm.read("/proc/sys/kernel/random/boot_id")
    for again in (
        lambda: vm.reboot(timeout=600),
        lambda: vm.restart(graceful=False),
        lambda: (vm.kill(), vm.start()),
    ):
        again()
        now = vm.read("/proc/sys/kernel/random/boot_id")
        assert now != boot
        boot = now
        assert vm.read("/etc/machine-id").decode().strip() == vm.machine_id
        assert vm.addresses["lan"] in vm.succeed("ip -4 addr; cat /etc/hosts").stdout
    vm.crash()
    vm.wait_for_console_text("Kernel panic", timeout=300)
    vm.kill()
    assert vm.state is MachineState.STOPPED
    with pytest.raises(InvalidState, match="guest connected") as caught:
        vm.succeed("true")
    assert "start()" in str(caught.value.hint)


def test_devices_come_while_it_runs(lab: Lab) -> None:
    vm, other = (lab.vm(memory=MEMORY, networks=["lan"]) for _ in range(2))
    disk = vm.plug_disk("8M")
    vm.wait_until_succeeds("test -b /dev/vda", timeout=300, every=0.1)
    assert vm.succeed("cat /sys/block/vda/size").stdout.strip() == str(8 * MIB // 512)
    vm.unplug_disk(disk)
    side = lab.network("side")
    for each in (vm, other):
        each.plug_nic(side)
    assert vm.addresses["side"] != other.addresses["side"]
    # What is sent to a guest that the host lets stand still for some seconds is lost.
    vm.wait_until_succeeds(f"ping -c 1 {other.addresses['side']}", timeout=300)
    vm.unplug_nic("net0")
    assert "side" not in vm.addresses


def test_a_machine_s_memory_is_in_the_ledger_while_it_is_there(lab: Lab) -> None:
    vm = lab.vm(memory=MEMORY, networks=["lan"])
    ledger = Home.path() / "admission" / "ledger.json"

    def lines() -> list[dict[str, Any]]:
        holders = json.loads(ledger.read_text())["holders"]
        return [line for line in holders if line["name"] == vm.name]

    (mine,) = lines()
    assert mine["machine"] == vm.info().pid and mine["forked"]
    assert 0 < used_by(mine["machine"], forked=True) < mine["size"]
    vm.delete()
    assert lines() == []


def test_a_machine_that_grows_is_promised_more_first(lab: Lab) -> None:
    vm = lab.vm(memory=MEMORY, boot=False)
    ledger = Home.path() / "admission" / "ledger.json"

    def sizes() -> list[int]:
        holders = json.loads(ledger.read_text())["holders"]
        return [line["size"] for line in holders if line["name"].startswith(vm.name)]

    assert sizes() == [256 * MIB + OVERHEAD]
    assert vm.resize(memory="384M").memory == 384 * MIB
    assert sizes() == [256 * MIB + OVERHEAD, 128 * MIB]
    vm.delete()
    assert sizes() == []
