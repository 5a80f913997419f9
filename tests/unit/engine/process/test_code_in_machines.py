"""Code of a machine: changed by another hart; and its own, never writable and executable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.unit.engine.process import programs
from tests.unit.engine.process.conftest import Build

from vmlab.engine import sequential_harts
from vmlab.engine.configuration import Execution, Time, TimeMode
from vmlab.engine.machine import Happening

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")


@pytest.mark.parametrize("mode", list(TimeMode), ids=lambda mode: mode.value)
def test_a_hart_executes_what_another_one_wrote(
    build: Build, execution: Execution, mode: TimeMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential_harts, "TURN", 500)  # waiting for the other takes as long
    built = build(programs.CHANGES_ANOTHER, execution=execution, harts=2, time=Time(mode))
    built.machine.resume()
    assert built.outcome()[0] is Happening.POWEROFF


# Builds and runs a machine in a process that may not make memory executable that could be written.
MACHINE = """
import ctypes, queue, sys
from pathlib import Path
if sys.argv[2] == "mdwe":
    PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
    if ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) != 0:
        sys.exit(77)
from vmlab.engine.configuration import Boot, Configuration
from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.machine import Machine
told = queue.SimpleQueue()
made = Configuration("vm", 8 << 20, "q", harts=2, boot=Boot(sys.argv[1]))
machine = Machine(made, Reactor(told.put), lambda *what: told.put(what))
machine.resume()
while not all(hart.retired for hart in machine.harts) and told.empty():
    pass
maps = Path("/proc/self/maps").read_text().splitlines() if sys.argv[2] == "maps" else []
print(*(row for row in maps if "w" in row.split()[1] and "x" in row.split()[1]), sep="\\n")
print(any("vmlab-code" in row for row in maps), "llvmlite" in sys.modules)
if sys.argv[2] == "mdwe":
    print(told.get()[0].value)
machine.close()
"""


def machine(tmp_path: Path, code: bytes, how: str) -> str:
    (tmp_path / "kernel").write_bytes(code)
    command = [sys.executable, "-c", MACHINE, tmp_path / "kernel", how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("needs PR_SET_MDWE: Linux 6.3")
    assert done.returncode == 0, done.stderr
    return done.stdout


@LINUX
def test_nothing_in_a_running_machine_is_writable_and_executable(tmp_path: Path) -> None:
    both = (
        programs.call(0x48_534D, 0, 1, programs.START, 0)  # the second one is told: it has begun
        + programs.SPIN
    )
    assert machine(tmp_path, both, "maps") == "\nTrue False\n"


@LINUX
def test_a_machine_boots_where_memory_may_not_become_executable(tmp_path: Path) -> None:
    assert machine(tmp_path, programs.STARTS_ANOTHER, "mdwe") == "\nFalse False\npoweroff\n"
