"""A machine runs, stands, begins anew and tells how it ended, whoever executes it."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from tests.unit.engine.process import programs
from tests.unit.engine.process.conftest import Build

from vmlab.engine import parallel_harts
from vmlab.engine.configuration import (
    DiskBus,
    DiskFile,
    Execution,
    Nic,
    SegmentKind,
    SocketPort,
)
from vmlab.engine.cpu import layout, sleeping
from vmlab.engine.firmware import IPI
from vmlab.engine.machine import Happening
from vmlab.machine.errors import ResourceNotFound, VmlabError


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (programs.end(programs.POWEROFF), (Happening.POWEROFF, "system controller")),
        (programs.end(programs.REBOOT), (Happening.REBOOT, "system controller")),
        (programs.end(programs.FAIL | 9 << 16), (Happening.FAILED, "failure, code 9")),
        (programs.call(0x5352_5354, 0, 0, 0), (Happening.POWEROFF, "asked firmware, without")),
        (programs.call(0x5352_5354, 0, 1, 1), (Happening.REBOOT, "asked firmware, for a failure")),
        (programs.TRAPS, (Happening.FAILED, "hart 0 traps without end at 0x0, cause 0x1")),
        (programs.LOADS_FROM_NOWHERE, (Happening.FAILED, "code 5")),
        (programs.STORES_NOWHERE, (Happening.FAILED, "code 7")),
        (programs.WAKES_BY_TIMER, (Happening.POWEROFF, "system controller")),
        (programs.SUSPENDS, (Happening.POWEROFF, "system controller")),
    ],
)
def test_a_guest_s_end_is_told(
    build: Build, execution: Execution, code: bytes, outcome: tuple[Happening, str]
) -> None:
    built = build(code, execution=execution)
    built.machine.resume()
    what, reason = built.outcome()
    assert what is outcome[0]
    assert outcome[1] in reason
    built.machine.pause()
    retired = built.machine.harts.first.read_csr(0xB02)
    assert retired == built.machine.harts.first.read_csr(0xB02)


def test_a_hart_starts_another_one(build: Build, execution: Execution) -> None:
    built = build(programs.STARTS_ANOTHER, execution=execution, harts=2)
    built.machine.resume()
    assert built.outcome()[0] is Happening.POWEROFF


def test_a_hart_is_suspended_until_it_wakes(build: Build, execution: Execution) -> None:
    built = build(programs.IS_SUSPENDED, execution=execution, harts=2)
    built.machine.resume()
    assert built.outcome() == (Happening.POWEROFF, "the guest wrote to the system controller")


def test_a_hart_interrupts_another_one_once(build: Build, execution: Execution) -> None:
    built = build(programs.INTERRUPTS_ANOTHER, execution=execution, harts=2)
    for _ in range(2):
        built.machine.resume()
        assert built.outcome() == (Happening.POWEROFF, "the guest wrote to the system controller")
        built.machine.reset()
        built.machine.ram.zero(programs.START + 0x1000, 0x1000)  # what it counts with
    assert all(extension != IPI for extension, _ in built.machine.harts.calls(0))


@pytest.mark.parametrize("way", [layout.ASLEEP_WAITS, layout.ASLEEP_TOLD], ids=["futex", "told"])
def test_a_hart_that_sleeps_is_woken_by_another_one(
    build: Build, monkeypatch: pytest.MonkeyPatch, way: int
) -> None:
    """Where the host has no futexes, by leaving for it."""
    if way == layout.ASLEEP_WAITS and not sleeping.NUMBER:
        pytest.skip("needs futexes, which Linux has on x86-64 and aarch64")
    monkeypatch.setattr(parallel_harts, "_ASLEEP", way)
    machine = (built := build(programs.WAKES_ANOTHER, harts=2)).machine
    machine.resume()
    _, second = machine.harts
    while second.shared[layout.SHARED_ASLEEP] != way:
        threading.Event().wait(0.001)
    machine.ram.write(programs.WAKE, b"\1")
    assert built.outcome()[0] is Happening.POWEROFF
    assert ((IPI, 0) in machine.harts.calls(0)) == (way == layout.ASLEEP_TOLD)


def test_a_paused_machine_executes_nothing_and_its_time_stands(
    build: Build, execution: Execution
) -> None:
    built = build(programs.SPIN, execution=execution, harts=2)
    machine = built.machine
    (first, second) = machine.harts
    for _ in range(3):
        before = first.x(programs.T0)
        machine.resume()
        machine.resume()
        while first.x(programs.T0) == before:
            threading.Event().wait(0.001)
        machine.pause()
        machine.pause()
        stood, time = first.x(programs.T0), machine.clock.ticks()
        threading.Event().wait(0.02)
        assert (first.x(programs.T0), machine.clock.ticks()) == (stood, time)
    assert second.retired == 0


def test_threads_are_joined_and_made_again(build: Build) -> None:
    built = build(programs.IDLE)
    for _ in range(2):
        built.machine.resume()
        assert any(thread.name == "vmlab-hart0" for thread in threading.enumerate())
        built.machine.pause()
        built.machine.harts.join()
        assert not any(thread.name.startswith("vmlab-hart") for thread in threading.enumerate())


def test_a_machine_begins_anew(build: Build, execution: Execution) -> None:
    built = build(programs.SPIN, execution=execution)
    machine = built.machine
    (hart,) = machine.harts
    machine.resume()
    while not hart.x(programs.T0):
        threading.Event().wait(0.001)
    machine.ram.write(programs.START, programs.IDLE)
    machine.pause()
    machine.reset()
    assert not machine.running
    assert (hart.x(programs.T0), hart.pc) == (0, programs.START)
    assert machine.ram.read(programs.START, 8) == programs.SPIN
    machine.resume()
    machine.reset()
    assert machine.running


def test_a_machine_begins_anew_although_a_device_is_still_at_work(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = build(programs.SPIN).machine
    machine.resume()
    monkeypatch.setattr(machine.workers, "drain", lambda seconds: ["disk.0"])
    with pytest.raises(VmlabError, match=r"disk\.0 are still at work"):
        machine.pause()
    machine.resume()
    before = machine.retired
    machine.reset()
    assert machine.running
    while machine.retired == before:
        threading.Event().wait(0.001)


def test_a_guest_that_sleeps_is_woken_by_a_byte(build: Build, tmp_path: Path) -> None:
    serial = SocketPort(str(tmp_path / "s.sock"), log=str(tmp_path / "s.log"))
    built = build(programs.ECHO, serial=serial)
    built.machine.resume()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(250)
        client.connect(serial.socket)
        client.sendall(b"hello")
        echoed = b""
        while len(echoed) < 5:
            echoed += client.recv(16)
    assert echoed == b"hello"
    built.machine.pause()
    assert (tmp_path / "s.log").read_bytes() == b"hello"


def test_devices_are_those_of_the_file(build: Build, tmp_path: Path) -> None:
    for name in ("a.raw", "b.raw"):
        (tmp_path / name).write_bytes(bytes(8192))
    disks = [
        DiskFile("a", str(tmp_path / "a.raw")),
        DiskFile("b", str(tmp_path / "b.raw"), bus=DiskBus.SCSI),
    ]
    nics = [
        Nic("n", "52:54:00:00:00:01"),
        Nic("s", "52:54:00:00:00:02", SegmentKind.STREAM_SERVER, str(tmp_path / "n.sock")),
        Nic("d", "52:54:00:00:00:03", SegmentKind.DATAGRAM, *(str(tmp_path / x) for x in "lr")),
    ]
    channels = [SocketPort(str(tmp_path / "c.sock"), "vmlab.agent.0")]
    consoles = [SocketPort(str(tmp_path / "v.sock"))]
    built = build(
        programs.IDLE, disks=disks, nics=nics, channels=channels, consoles=consoles, scsi=True
    )
    names = [device.name for device in built.machine.board.devices()]
    assert names == ["console", "rng", "balloon", "keyboard", "n", "s", "d", "a", "scsi"]
    assert [disk.name for disk in built.machine.disk_files()] == ["a", "b"]
    assert (tmp_path / "n.sock").exists()
    built.machine.unplug_disk("b")
    built.machine.close_disk("b")
    with pytest.raises(ResourceNotFound, match="no disk 'a' that can be unplugged"):
        built.machine.unplug_disk("a")
    built.machine.open_disk(disks[1])
    built.machine.plug_disk("b")
    with pytest.raises(VmlabError, match="two disks of the name 'b'"):
        built.machine.open_disk(disks[1])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"disks": [DiskFile("a", "/nonexistent/a.raw")]}, "no disk image"),
        ({"nics": [Nic("n", "01:00:00:00:00:00")]}, "no address for the NIC 'n'"),
        ({"nics": [Nic("n", "52:54")]}, "no address for the NIC 'n'"),
        ({"serial": SocketPort("/nonexistent/s.sock")}, "cannot be opened"),
        (
            {"serial": SocketPort("/nonexistent/s.sock", log="/nonexistent/s.log")},
            "cannot be written",
        ),
    ],
)
def test_a_machine_that_cannot_be_made_leaves_nothing(
    build: Build, changes: dict[str, object], told: str
) -> None:
    before = set(threading.enumerate())
    with pytest.raises(VmlabError, match=told):
        build(programs.IDLE, **changes)
    assert set(threading.enumerate()) <= before


def test_a_scsi_disk_needs_a_scsi_host(build: Build, tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(8192))
    disk = DiskFile("a", str(tmp_path / "a.raw"), bus=DiskBus.SCSI)
    with pytest.raises(VmlabError, match="no SCSI host"):
        build(programs.IDLE, disks=[disk])
