"""Debian's kernel on the embedded engine: it boots, answers, sees what is done to its machine."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from qemu.qmp import QMPError
from tests.integration.engine.guest import PATIENCE, Guest, start

pytestmark = [pytest.mark.boots, pytest.mark.timeout(3 * PATIENCE)]

_OPENSBI = "/usr/share/qemu/opensbi-riscv64-generic-fw_dynamic.bin"


Boot = Callable[..., Guest]


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Boot]:
    """Boot the tiny image with so many harts, more lines of the machine's file, and firmware."""
    made: list[Guest] = []

    def begin(harts: int, more: str = "", firmware: str = "") -> Guest:
        made.append(start(tmp_path, harts, more, firmware))
        return made[-1]

    yield begin
    for each in made:
        each.close()


def test_debian_runs_on_two_harts_and_sees_what_is_done_to_its_machine(
    boot: Boot, tmp_path: Path
) -> None:
    (tmp_path / "d.raw").write_bytes(bytes(4 << 20))
    guest = boot(2, "[[disks]]\nname = 'data'\nfile = 'd.raw'\n")
    assert guest.run("uname -sm") == "Linux riscv64\n"
    assert guest.run("grep -c ^processor /proc/cpuinfo") == "2\n"
    assert "zba_zbb_zbs_sstc" in guest.run("grep -m 1 isa /proc/cpuinfo")
    assert guest.run("seq 100000 | md5sum") == f"{_sequence_digest(100_000)}  -\n"

    # What the guest wrote is in the file.
    fill = "dd if=/dev/urandom of=/dev/vda bs=64k count=64 2>/dev/null; sync; md5sum < /dev/vda"
    digest = guest.run(fill).split()[0]
    assert hashlib.md5((tmp_path / "d.raw").read_bytes()).hexdigest() == digest

    # A disk comes and goes.
    (tmp_path / "h.raw").write_bytes(bytes(2 << 20))
    file = {"driver": "file", "filename": str(tmp_path / "h.raw")}
    guest.order("blockdev-add", **{"node-name": "h", "driver": "raw", "file": file})
    guest.order("device_add", driver="scsi-hd", id="h", drive="h")
    guest.run("until [ -b /dev/sda ]; do sleep 0.1; done")
    assert guest.run("cat /sys/block/sda/size") == f"{(2 << 20) // 512}\n"
    guest.order("device_del", id="h")
    guest.run("while [ -b /dev/sda ]; do sleep 0.1; done")
    guest.order("blockdev-del", **{"node-name": "h"})

    # No time passes in a guest that stands.
    guest.order("stop")
    before = [hart["retired"] for hart in guest.order("x-query-harts")]
    threading.Event().wait(0.2)
    assert [hart["retired"] for hart in guest.order("x-query-harts")] == before
    guest.order("cont")
    assert guest.run("echo on") == "on\n"

    # The power button, until somebody has heard it.
    while guest.process.poll() is None:
        with suppress(QMPError, EOFError, ConnectionError, subprocess.TimeoutExpired):
            guest.order("system_powerdown")
            guest.process.wait(5)
    assert guest.process.returncode == 0
    assert "reboot: Power down" in (tmp_path / "s.log").read_text(errors="replace")


def test_debian_runs_under_opensbi_and_reaches_the_host_by_its_user_network(boot: Boot) -> None:
    nic = 'name = "net"\nmac = "52:54:00:12:34:56"\nsegment = "user"\nforwards = [{ guest = 5000 }]'
    guest = boot(2, f"[[nics]]\n{nic}\n", _OPENSBI)
    assert "SBI implementation ID=0x1 " in guest.run("dmesg"), "OpenSBI's number"
    assert guest.run("grep -c ^processor /proc/cpuinfo") == "2\n"
    # Harts interrupt each other by MSWI without leaving; only what OpenSBI begins with is left.
    devices = [
        {each["reason"]: each["count"] for each in hart["devices"]}
        for hart in guest.order("x-query-exits")
    ]
    assert sum(each.get("aclint", 0) for each in devices) < 10

    # As often as it takes: the host may be slow to answer.
    guest.run("ip link set eth0 up && udhcpc -q -n -t 100 -s /etc/udhcpc/default.script -i eth0")
    assert "10.0.2.15/24" in guest.run("ip -4 addr show dev eth0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE)
        guest.run(f"echo out | nc 10.0.2.2 {server.getsockname()[1]} >/dev/null &")
        assert _all_of(server.accept()[0]) == b"out\n"

    ((forward,),) = [each["forwards"] for each in guest.order("x-query-networks")]
    assert forward["guest"] == 5000
    # Input that does not end: at its end nc does.
    guest.run("mkfifo /run/f; (nc -l -p 5000 <>/run/f >/run/got) >/dev/null 2>&1 &")
    guest.run("until netstat -ltn | grep -q :5000; do sleep 0.1; done")
    with socket.create_connection(("127.0.0.1", forward["host"]), PATIENCE) as client:
        client.sendall(b"in\n")
    assert guest.run("until [ -s /run/got ]; do sleep 0.1; done; cat /run/got") == "in\n"
    (counted,) = guest.order("x-query-networks")
    assert counted["received"] > 0
    assert counted["sent-bytes"] > 0


def _all_of(stream: socket.socket) -> bytes:
    stream.settimeout(PATIENCE)
    with stream, stream.makefile("rb") as file:
        return file.read()


def _sequence_digest(last: int) -> str:
    text = "".join(f"{number}\n" for number in range(1, last + 1))
    return hashlib.md5(text.encode()).hexdigest()
