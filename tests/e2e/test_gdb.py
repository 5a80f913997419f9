"""`vmlab run --gdb`: the machine stands before its first instruction until a debugger says go."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable

import pytest
from tests.e2e.conftest import AMD64, Vmlab

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(600)]

RESET_IP = 0xFFF0  # Intel SDM volume 3, 10.1.4: the first instruction is at F000:FFF0


class Stub:
    """The least of a debugger: the GDB manual's appendix "Remote Protocol"."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(180)
        self._socket.connect(path)

    def send(self, packet: bytes) -> None:
        self._socket.sendall(b"$%s#%02x" % (packet, sum(packet) % 256))

    def ask(self, packet: bytes) -> bytes:
        self.send(packet)
        answer = b""
        while not re.search(rb"\$([^#]*)#..", answer):
            answer += self._socket.recv(4096)
        self._socket.sendall(b"+")
        found = re.search(rb"\$([^#]*)#..", answer)
        assert found is not None
        return found[1]

    def close(self) -> None:
        self._socket.close()


def attach_with_a_client_of_our_own(path: str, command: list[str]) -> str:
    stub = Stub(path)
    assert stub.ask(b"?").startswith((b"S", b"T"))
    registers = bytes.fromhex(stub.ask(b"g").decode())
    position = int.from_bytes(registers[16 * 8 :][:8], "little")  # rip follows 16 registers
    assert stub.ask(b"D") == b"OK"  # detaching lets it run
    stub.close()
    return f"{position:#x}"


def attach_with_gdb(path: str, command: list[str]) -> str:
    words = ["-nx", "-batch", "-ex", "info registers rip", "-ex", "detach"]
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert "detached" in done.stdout, done.stdout + done.stderr
    found = re.search(r"^rip +(0x[0-9a-f]+)", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return found[1]


ATTACH = [attach_with_a_client_of_our_own]
if shutil.which("gdb") is not None:
    ATTACH.append(attach_with_gdb)


@pytest.mark.parametrize("attach", ATTACH)
def test_nothing_runs_until_the_debugger_that_was_named_lets_it(
    vmlab: Vmlab, attach: Callable[[str, list[str]], str]
) -> None:
    running = vmlab.start("run", "--gdb", *AMD64, "--", "cat /proc/cmdline; exit 5")
    assert running.stderr is not None
    said = [running.stderr.readline().decode() for _ in range(2)]
    assert "waits for gdb" in said[0] and "continue" in said[0]
    command = shlex.split(said[1])
    assert command[0] == "gdb"
    path = command[-1].removeprefix("target remote ")
    log = next(vmlab.home.rglob("console-serial.log"), None)
    assert log is None or log.read_bytes() == b""
    assert int(attach(path, command), 16) == RESET_IP
    out, err = running.communicate(timeout=300)
    assert (running.returncode, err) == (5, b"")
    assert b"nokaslr" in out
    assert not vmlab.processes() and not vmlab.files() and not vmlab.runs


def test_the_engine_s_machine_waits_for_gdb_and_gives_it_the_kernel_s_symbols(
    vmlab: Vmlab,
) -> None:
    running = vmlab.start(
        "run", "--gdb", "--image", "debian-13-riscv64-tiny", "--", "cat /proc/cmdline; exit 5"
    )
    assert running.stderr is not None
    said = [running.stderr.readline().decode() for _ in range(2)]
    assert "waits for gdb" in said[0]
    command = shlex.split(said[1])
    assert command[0] == "gdb-multiarch"
    words = ["-nx", "-batch", "-ex", "print/x $pc", "-ex", "break start_kernel", "-ex", "detach"]
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert "= 0x80200000" in done.stdout, done.stdout + done.stderr
    assert "Breakpoint 1 at 0xffffffff8" in done.stdout, done.stdout + done.stderr
    out, err = running.communicate(timeout=300)
    assert (running.returncode, err) == (5, b"")
    assert b"nokaslr" in out
    assert not vmlab.processes() and not vmlab.files() and not vmlab.runs


def test_a_hypervisor_without_a_place_for_gdb_says_so(vmlab: Vmlab) -> None:
    done = vmlab.run(
        "run", "--gdb", "--hypervisor", "simulated", "--image", "debian-12-amd64-tiny", "--", "true"
    )
    assert done.returncode == 3
    assert b"does not have the capability 'gdb'" in done.stderr and b"hint:" in done.stderr
