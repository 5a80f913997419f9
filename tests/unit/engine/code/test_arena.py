"""Executable memory that is never writable and executable at once."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from vmlab.engine.code.arena import Arena, ArenaFull


def test_what_is_written_is_seen_where_it_is_executed() -> None:
    arena = Arena(1 << 20)
    offset = arena.reserve(5, 16)
    arena.write(offset, b"12345")
    assert ctypes.string_at(arena.address + offset, 5) == b"12345"
    assert arena.reserve(1, 64) == 64
    arena.close()


def test_a_full_arena_says_so() -> None:
    arena = Arena(1 << 16)
    arena.reserve(1 << 15, 16)
    with pytest.raises(ArenaFull, match="do not fit"):
        arena.reserve((1 << 15) + 1, 16)
    arena.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's PR_SET_MDWE")
def test_no_page_is_writable_and_executable() -> None:
    arena = Arena(1 << 20)
    rows = Path("/proc/self/maps").read_text().splitlines()
    ours = [row.split()[1] for row in rows if "vmlab-code" in row]
    assert set(ours) == {"r-xs", "rw-s"}
    arena.close()


# A machine of its own that forbids itself memory which becomes executable, and then runs a guest.
UNDER_MDWE = """
import ctypes, errno, sys
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
if libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) != 0:
    sys.exit(77)
from vmlab.engine.accel.interpreter import InterpreterExecutor
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.memory.ram import Ram
ram = Ram(1 << 20)
ram.write(ram.base, bytes.fromhex("13052500" "73005010"))  # addi a0,a0,2; wfi
hart = Hart(ram)
left = InterpreterExecutor(hart).run(100)
assert left.reason.name == "WAIT", left
assert hart.x(10) == 2
assert "llvmlite" not in sys.modules
print("ran")
"""


def test_a_guest_runs_where_memory_may_not_become_executable() -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNDER_MDWE], capture_output=True, text=True, check=False
    )
    if done.returncode == 77:
        pytest.skip("needs PR_SET_MDWE: Linux 6.3")
    assert (done.stdout, done.returncode) == ("ran\n", 0), done.stderr
