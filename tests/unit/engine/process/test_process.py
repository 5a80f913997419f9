"""`python -m vmlab.engine`: a machine in a process of its own, driven over QMP."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.engine.monitor.wire import Wire
from tests.unit.engine.process import programs

from vmlab.engine.configuration import Boot, Configuration
from vmlab.engine.process import Process
from vmlab.engine.qapi import Cause

MIB = 1 << 20
PATIENCE = 250.0


class Running:
    """An engine process."""

    def __init__(self, folder: Path, text: str) -> None:
        file = folder / "machine.toml"
        file.write_text(text)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vmlab.engine", file], stderr=subprocess.PIPE, text=True
        )
        self.socket = folder / "q.sock"
        self.wires: list[Wire] = []

    def connect(self) -> Wire:
        while True:
            assert self.process.poll() is None, self.process.communicate()[1]
            try:
                self.wires.append(Wire(self.socket))
            except (FileNotFoundError, ConnectionRefusedError):
                threading.Event().wait(0.01)
            else:
                return self.wires[-1]

    def ended(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=PATIENCE)
        assert not self.socket.exists()
        return self.process.returncode, said

    def close(self) -> None:
        for wire in self.wires:
            wire.close()
        self.process.kill()
        self.process.communicate()


Run = Callable[..., Running]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Run a guest's code, before whose first instruction the machine stands."""
    made: list[Running] = []

    def start(code: bytes, more: str = "") -> Running:
        (tmp_path / "kernel").write_bytes(code)
        text = f'name = "vm"\nmemory = {8 * MIB}\nqmp = "q.sock"\npaused = true\n{more}\n'
        made.append(Running(tmp_path, text + '[boot]\nkernel = "kernel"\n'))
        return made[-1]

    yield start
    for each in made:
        each.close()


def until(wire: Wire, event: str) -> Any:
    """The data of the next event of that name; events and answers before it are passed over."""
    while (message := wire.read()).get("event") != event:
        assert "error" not in message, message
    return message.get("data")


def test_a_guest_that_powers_off_ends_the_process(run: Run) -> None:
    running = run(programs.end(programs.POWEROFF))
    wire = running.connect()
    status = wire.ask("query-status")["return"]
    assert status == {"running": False, "status": "prelaunch"}
    wire.socket.sendall(b'{"execute": "cont"}')
    assert until(wire, "SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}
    assert running.ended() == (0, "poweroff: the guest wrote to the system controller\n")


def test_a_guest_that_fails_is_kept_to_be_looked_at(run: Run) -> None:
    running = run(programs.end(programs.FAIL | 3 << 16))
    wire = running.connect()
    wire.socket.sendall(b'{"execute": "cont"}')
    assert until(wire, "GUEST_PANICKED")["info"] == "the guest reports a failure, code 3"
    until(wire, "STOP")
    assert wire.ask("query-status")["return"]["status"] == "internal-error"
    assert wire.error("cont")[1] == "Resetting the Virtual Machine is required"
    wire.socket.sendall(b'{"execute": "quit"}')
    assert wire.read() == {"return": {}}
    assert running.ended()[0] == 1


def test_a_process_that_is_to_stay_is_there_when_its_guest_is_off(run: Run) -> None:
    running = run(programs.end(programs.POWEROFF), "no-shutdown = true")
    wire = running.connect()
    wire.socket.sendall(b'{"execute": "cont"}')
    assert until(wire, "SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}
    until(wire, "STOP")
    assert wire.ask("query-status")["return"] == {"running": False, "status": "shutdown"}
    wire.socket.sendall(b'{"execute": "quit"}')
    assert wire.read() == {"return": {}}
    assert running.ended()[0] == 0


PANIC = b"[    1.5] Kernel panic - not syncing: no init\r\n"


@pytest.mark.parametrize(
    "say", [programs.say, programs.say_by_firmware, programs.say_in_an_emergency]
)
@pytest.mark.parametrize("stands", [False, True], ids=["restarts", "stands"])
def test_a_kernel_that_panics_is_kept_to_be_looked_at(
    run: Run, say: Callable[[bytes], bytes], stands: bool
) -> None:
    """Whichever console it tells that on."""
    if stands:
        code = say(PANIC + b"[    1.6] ---[ end Kernel panic - not syncing: no init ]---\n")
        code += programs.SPIN
    else:
        code = say(PANIC) + programs.end(programs.REBOOT)
    running = run(code, "[[consoles]]\nsocket = 'hvc.sock'")
    wire = running.connect()
    wire.socket.sendall(b'{"execute": "cont"}')
    assert until(wire, "GUEST_PANICKED")["info"] == "the guest's kernel panicked: no init"
    until(wire, "STOP")
    assert wire.ask("query-status")["return"]["status"] == "internal-error"
    wire.socket.sendall(b'{"execute": "quit"}')
    assert wire.read() == {"return": {}}
    assert running.ended()[0] == 1


def test_a_panic_that_was_only_quoted_is_none(run: Run) -> None:
    quoted = b"it said: Kernel panic - not syncing: no init\n"
    wire = run(programs.say(quoted) + programs.end(programs.REBOOT)).connect()
    wire.socket.sendall(b'{"execute": "cont"}')
    assert until(wire, "RESET") == {"guest": True, "reason": "guest-reset"}


def test_a_guest_that_restarts_begins_anew(run: Run) -> None:
    running = run(programs.end(programs.REBOOT))
    wire = running.connect()
    wire.socket.sendall(b'{"execute": "cont"}')
    for _ in range(2):
        assert until(wire, "RESET") == {"guest": True, "reason": "guest-reset"}
    running.process.send_signal(signal.SIGTERM)
    assert running.ended()[0] == 0


def test_a_restart_that_is_not_wanted_ends_the_process(run: Run) -> None:
    running = run(programs.end(programs.REBOOT), "no-reboot = true")
    wire = running.connect()
    wire.socket.sendall(b'{"execute": "cont"}')
    assert until(wire, "SHUTDOWN") == {"guest": True, "reason": "guest-reset"}
    assert running.ended()[0] == 0


@pytest.mark.parametrize("end", [programs.POWEROFF, programs.FAIL, programs.REBOOT])
def test_an_end_is_told_although_a_device_is_still_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: int
) -> None:
    (tmp_path / "kernel").write_bytes(programs.end(end))
    boot = Boot(str(tmp_path / "kernel"))
    process = Process(Configuration("vm", 8 * MIB, str(tmp_path / "q.sock"), boot=boot))
    told: list[str] = []
    emit = process._monitor.emit

    def tell(name: str, data: object | None = None) -> None:
        told.append(name)
        emit(name, data)
        if name in ("GUEST_PANICKED", "RESET"):
            process._quit(Cause.HOST_QMP_QUIT)

    monkeypatch.setattr(process._control, "emit", tell)
    monkeypatch.setattr(process._machine.workers, "drain", lambda seconds: ["disk.0"])
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        status = process.run()
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
        gc.unfreeze()
    expected = {
        programs.POWEROFF: (0, ["RESUME"]),
        programs.FAIL: (1, ["RESUME", "GUEST_PANICKED", "STOP"]),
        programs.REBOOT: (0, ["RESUME", "RESET"]),
    }
    assert (status, told) == expected[end]


def test_it_is_stopped_and_goes_on_and_begins_anew(run: Run) -> None:
    running = run(programs.SPIN, "harts = 2")
    wire = running.connect()

    def order(name: str) -> list[str]:
        wire.socket.sendall(b'{"execute": "%s"}' % name.encode())
        told = []
        while "return" not in (message := wire.read()):
            told.append(message["event"])
        return told

    assert order("cont") == ["RESUME"]
    assert order("cont") == []
    assert order("stop") == ["STOP"]
    assert order("stop") == []
    first, second = wire.ask("x-query-harts")["return"]
    assert (second["retired"], second["pc"]) == (0, programs.RAM_BASE)
    assert first["retired"] == wire.ask("x-query-harts")["return"][0]["retired"]
    assert {each["reason"] for each in first["exits"]} >= {"budget", "wait", "read"}
    assert order("system_reset") == ["RESET"]
    assert wire.ask("x-query-harts")["return"][0]["retired"] == 0
    assert order("system_powerdown") == ["POWERDOWN"]
    assert order("cont") == ["RESUME"]
    assert order("system_reset") == ["RESET"]
    assert wire.ask("query-status")["return"] == {"running": True, "status": "running"}
    cpus = wire.ask("query-cpus-fast")["return"]
    assert [each["cpu-index"] for each in cpus] == [0, 1]
    threads = {int(path.name) for path in Path(f"/proc/{running.process.pid}/task").iterdir()}
    assert {each["thread-id"] for each in cpus} <= threads
    assert wire.ask("query-name")["return"] == {"name": "vm"}
    assert wire.ask("query-memory-size-summary")["return"]["base-memory"] == 8 * MIB
    assert wire.ask("query-version")["return"]["package"] == "vmlab"
    assert wire.ask("query-kvm")["return"] == {"enabled": False, "present": False}
    assert wire.ask("query-balloon")["return"] == {"actual": 8 * MIB}


def test_disks_are_plugged_in_and_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(MIB))
    wire = run(programs.IDLE).connect()
    file = {"driver": "file", "filename": str(tmp_path / "a.raw")}
    node = {"node-name": "n", "driver": "raw", "file": file}
    assert (
        "no disk image"
        in wire.error("blockdev-add", **{**node, "file": {**file, "filename": "/nonexistent"}})[1]
    )
    assert wire.ask("blockdev-add", arguments=node) == {"return": {}}
    assert "Duplicate nodes" in wire.error("blockdev-add", **node)[1]
    disk = {"driver": "scsi-hd", "id": "d", "drive": "n"}
    assert "can't find value 'x'" in wire.error("device_add", **{**disk, "drive": "x"})[1]
    assert wire.ask("device_add", arguments=disk) == {"return": {}}
    assert "Duplicate device" in wire.error("device_add", **disk)[1]
    (found,) = wire.ask("query-block")["return"]
    assert (found["qdev"], found["inserted"]["node-name"]) == ("d", "n")
    assert found["inserted"]["image"]["virtual-size"] == MIB
    (stats,) = wire.ask("query-blockstats")["return"]
    assert (stats["qdev"], stats["stats"]["wr_operations"]) == ("d", 0)
    assert wire.ask("block_resize", arguments={"node-name": "n", "size": 2 * MIB}) == {"return": {}}
    (found,) = wire.ask("query-block")["return"]
    assert found["inserted"]["image"]["virtual-size"] == 2 * MIB
    assert (tmp_path / "a.raw").stat().st_size == 2 * MIB
    assert "Failed to find node" in wire.error("block_resize", **{"node-name": "x", "size": 1})[1]
    assert "in use" in wire.error("blockdev-del", **{"node-name": "n"})[1]
    wire.socket.sendall(b'{"execute": "device_del", "arguments": {"id": "d"}}')
    assert until(wire, "DEVICE_DELETED")["device"] == "d"
    assert wire.read() == {"return": {}}
    assert wire.error("device_del", id="d")[0] == "DeviceNotFound"
    assert wire.ask("blockdev-del", arguments={"node-name": "n"}) == {"return": {}}
    assert "Failed to find node" in wire.error("blockdev-del", **{"node-name": "n"})[1]
    assert wire.ask("query-block")["return"] == []
    (tmp_path / "a.raw").unlink()


def test_it_tells_what_it_is_made_of(run: Run, tmp_path: Path) -> None:
    for name in ("a.raw", "b.raw"):
        (tmp_path / name).write_bytes(bytes(MIB))
    more = """
        [serial]
        socket = "con.sock"
        [[channels]]
        name = "org.example.0"
        socket = "chan.sock"
        [[disks]]
        name = "n0"
        device = "first"
        file = "a.raw"
        [[disks]]
        name = "n1"
        bus = "scsi"
        file = "b.raw"
        read-only = true
    """
    wire = run(programs.IDLE, more).connect()
    assert wire.ask("query-target")["return"] == {"arch": "riscv64"}
    chardevs = {each["label"]: each["filename"] for each in wire.ask("query-chardev")["return"]}
    assert chardevs == {
        "org.example.0": f"unix:{tmp_path}/chan.sock",
        "serial": f"unix:{tmp_path}/con.sock",
    }
    blocks = {each["qdev"]: each["inserted"] for each in wire.ask("query-block")["return"]}
    assert set(blocks) == {"/machine/peripheral/first/virtio-backend", "n1"}
    assert blocks["n1"]["ro"] is True
    assert blocks["n1"]["image"]["filename"] == f"{tmp_path}/b.raw"
    # What the file put on the SCSI host can go as well.
    wire.socket.sendall(b'{"execute": "device_del", "arguments": {"id": "n1"}}')
    assert until(wire, "DEVICE_DELETED")["device"] == "n1"
    assert wire.read() == {"return": {}}
    assert len(wire.ask("query-block")["return"]) == 1


FAULTY = """
    [[disks]]
    name = "d"
    file = "a.raw"
    [[nics]]
    name = "n"
    mac = "52:54:00:00:00:01"
"""


def test_it_is_broken_over_qmp(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(4096))
    wire = run(programs.IDLE, FAULTY).connect()

    def do(command: str, **arguments: Any) -> None:
        answer = wire.ask(command, arguments=arguments)
        while "event" in answer:
            answer = wire.read()
        assert answer == {"return": {}}

    fault = {"mishap": "error", "operations": ["read"], "when": {"nth": 3, "seed": 1 << 62}}
    do("x-disk-fault", id="a", fault=fault, **{"node-name": "d"})
    do("x-net-fault", id="b", name="n", fault={"ratio": 0.5, "when": {"probability": 0.5}})
    for identity in ("a", "b", "b", "never"):
        do("x-fault-end", id=identity)
    do("x-disk-corrupt", offset=4094, length=100, **{"node-name": "d"})
    do("cont")
    for on in (True, True, False):
        do("x-hart-stall", hart=0, on=on)
    do("stop")
    assert (tmp_path / "a.raw").read_bytes() == bytes(4094) + b"\xff\xff"
    cut = [{"node-name": "d", "lost": 0}]
    assert wire.ask("x-power-cut") == {"return": cut}


@pytest.mark.parametrize(
    ("command", "arguments", "told"),
    [
        ("x-disk-fault", {"id": "a", "node-name": "x", "fault": {"mishap": "torn"}}, "find node"),
        ("x-disk-fault", {"id": "a", "node-name": "d", "fault": {"mishap": "odd"}}, "not accept"),
        (
            "x-disk-fault",
            {"id": "a", "node-name": "d", "fault": {"mishap": "slow", "delay": -1}},
            "delay and keep from 0",
        ),
        (
            "x-disk-fault",
            {"id": "a", "node-name": "d", "fault": {"mishap": "torn", "when": {"nth": -1}}},
            "nth, duration and seed from 0",
        ),
        ("x-disk-corrupt", {"node-name": "d", "offset": 0, "length": 0}, "a range of the disk"),
        ("x-net-fault", {"id": "a", "name": "x", "fault": {}}, "Device 'x' not found"),
        ("x-net-fault", {"id": "a", "name": "n", "fault": {"ratio": 2.0}}, "a ratio to 1"),
        ("x-hart-stall", {"hart": 1, "on": True}, "a number below 1"),
    ],
)
def test_what_cannot_be_broken_is_said(
    run: Run, tmp_path: Path, command: str, arguments: dict[str, Any], told: str
) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(4096))
    wire = run(programs.IDLE, FAULTY).connect()
    answer = wire.ask(command, arguments=arguments)
    assert told in answer["error"]["desc"], answer


def test_memory_and_cables_are_changed(run: Run) -> None:
    nic = '[[nics]]\nname = "n"\nmac = "52:54:00:00:00:01"\n'
    running = run(programs.IDLE, nic)
    wire = running.connect()
    assert wire.ask("set_link", arguments={"name": "n", "up": True}) == {"return": {}}
    assert wire.error("set_link", name="x", up=True)[0] == "DeviceNotFound"
    assert wire.ask("balloon", arguments={"value": 4 * MIB}) == {"return": {}}
    assert "size from 1" in wire.error("balloon", value=16 * MIB)[1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name = 1", "name = 1: a value of the type string"),
        ('name = "a"\nqmp = "q"', "memory: it is needed"),
        ('name = "a"\nqmp = "q"\nmemory = 4096', "at least 1048576"),
        ('name = "a"\nqmp = "q"\nmemory = 1048577', "a multiple of 4096 bytes"),
        ('name = "a"\nqmp = "q"\nmemory = 1048576\nharts = 0', "at least 1"),
        (
            'name = "a"\nqmp = "q"\nmemory = 1048576\ncpus = 1',
            "cpus: none of that name; there are ",
        ),
        ('name = "a"\nqmp = "q"\nmemory = 8388608', "there is nothing to boot"),
        ('name = "a"\nqmp = "q"\nmemory = 8388608\n[boot]\nkernel = "k"', "k cannot be read"),
        ('name = "a"\nqmp = "q"\nmemory = 8388608\n[boot]\nkernel = ".."', "cannot be read"),
        ("name =", "valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "machine.toml"
    file.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "vmlab.engine", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["machine.toml"]


def test_without_a_file_it_says_what_it_takes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vmlab.engine"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr[:6]) == (2, "usage:")
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:6]) == (0, "usage:")
    missing = tmp_path / "x.toml"
    done = subprocess.run([*command, missing], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"file = '{missing}" in done.stderr and "No such file or directory" in done.stderr
    assert "hint: check the path" in done.stderr and "Traceback" not in done.stderr


def test_qmp_shell_drives_it(run: Run, tmp_path: Path) -> None:
    """QEMU's own shell, whose commands are words."""
    running = run(programs.IDLE)
    running.connect()  # the socket is there
    shell = [sys.executable, "-c", "from qemu.qmp.qmp_shell import main; main()", running.socket]
    done = subprocess.run(
        shell,
        input="query-status\nset_link name=none up=true\nquit\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env={**os.environ, "HOME": str(tmp_path)},  # it keeps a history
    )
    assert '"status": "prelaunch"' in done.stdout, done.stderr
    assert "Device 'none' not found" in done.stdout
    assert running.ended()[0] == 0


def test_a_socket_that_is_taken_is_not_taken_away(run: Run, tmp_path: Path) -> None:
    (tmp_path / "q.sock").write_text("mine")
    running = run(programs.IDLE)
    _, said = running.process.communicate(timeout=PATIENCE)
    assert running.process.returncode == 2
    assert "q.sock" in said
    assert "Traceback" not in said
    assert (tmp_path / "q.sock").read_text() == "mine"


def test_a_running_machine_has_no_compiler_in_it_nor_what_starts_slowly(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(programs.end(programs.POWEROFF))
    # The first machine of a host may have it compiled.
    compiling = "from vmlab.engine.accel.interpreter import prepare; prepare()"
    subprocess.run([sys.executable, "-c", compiling], check=True)
    code = f"""
import queue, sys
from vmlab.engine.configuration import Boot, Configuration
from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.machine import Machine
told = queue.SimpleQueue()
made = Configuration("vm", {8 * MIB}, "q", boot=Boot({str(tmp_path / "kernel")!r}))
machine = Machine(made, Reactor(told.put), lambda *what: told.put(what))
machine.resume()
slow = ("llvmlite", "asyncio", "subprocess", "filelock")
print(told.get()[0].value, [name for name in slow if name in sys.modules])
machine.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "poweroff []\n"
