"""gdb-multiarch debugs Debian's kernel on the embedded engine, without a file of its symbols."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.store import IMAGE_STORE
from tests.unit.engine.monitor.wire import Wire

from vmlab.images import ImageStore

pytestmark = [pytest.mark.boots, pytest.mark.timeout(2000)]

IMAGE = "debian-13-riscv64-tiny"
_PATIENCE = 900
KERNEL_START = 0x8020_0000


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[Path]:
    """The debugger's socket of a machine of two harts that has not begun."""
    image = ImageStore(IMAGE_STORE).ensure(IMAGE)
    (tmp_path / "m.toml").write_text(f"""
        name = "vm"
        memory = {256 << 20}
        harts = 2
        qmp = "q.sock"
        paused = true
        gdb = {{ socket = "gdb.sock" }}
        [boot]
        kernel = "{image.kernel}"
        initrd = "{image.initrd}"
        cmdline = "{image.cmdline} console=ttyS0 nokaslr"
    """)
    process = subprocess.Popen([sys.executable, "-m", "vmlab.engine", tmp_path / "m.toml"])
    try:
        # Its monitor answers when all of its sockets are listened at.
        while True:
            assert process.poll() is None, "the engine has ended"
            with suppress(FileNotFoundError, ConnectionRefusedError):
                Wire(tmp_path / "q.sock").close()
                break
            threading.Event().wait(0.02)
        yield tmp_path / "gdb.sock"
    finally:
        process.kill()
        process.wait()


def gdb(socket: Path, *commands: str) -> str:
    """What GDB prints; every command is preceded by a line `== command`."""
    program = shutil.which("gdb-multiarch")
    assert program is not None, "needs Debian's gdb-multiarch"
    words = [program, "-nx", "-q", "-batch", "-ex", "set pagination off"]
    # An answer may be late on a slow host: GDB waits two seconds for one.
    words += ["-ex", "set confirm off", "-ex", f"set remotetimeout {_PATIENCE}"]
    words += ["-ex", f"target remote {socket}"]
    for command in commands:
        words += ["-ex", f"echo == {command}\\n", "-ex", command]
    try:
        done = subprocess.run(
            words, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"GDB does not end: {(late.stdout or b'').decode(errors='replace')}")
    output = done.stdout.decode(errors="replace")
    assert done.returncode == 0, output
    return output


def parts(output: str) -> list[str]:
    """What the commands have printed, one after another."""
    return [part.partition("\n")[2].strip() for part in output.split("== ")[1:]]


def number(text: str) -> int:
    found = re.search(r"0x[0-9a-f]+", text)
    assert found is not None, text
    return int(found.group(), 16)


def test_gdb_debugs_the_kernel_by_its_symbols(socket: Path) -> None:
    jiffies = "*(unsigned long *) &jiffies_64"
    output = gdb(
        socket,
        "print/x $pc",
        "info threads",
        # Long before there is paging.
        "hbreak *start_kernel",
        "continue",
        "x/2i $pc",
        "backtrace",
        "stepi",
        "print/x (unsigned long) $satp >> 60",
        "x/s &linux_banner",
        "delete",
        # A system call of the first program.
        "break do_sys_openat2",
        "continue",
        "backtrace 3",
        "print $priv",
        "delete",
        # A variable that an interrupt changes.
        f"watch {jiffies}",
        "continue",
        f"print {jiffies}",
        "backtrace 1",
        "delete",
        "set var $a0 = 77",
        "print $a0",
        "monitor x-query-mmu",
        "detach",
    )
    told = iter(parts(output))

    def following() -> str:
        return next(told)

    assert number(following()) == KERNEL_START, output
    assert len(re.findall(r"Thread [12] ", following())) == 2, output
    start = number(following().partition(" at ")[2])
    assert start > 1 << 63, output
    assert "start_kernel ()" in following(), output
    assert number(following()) == start, output
    assert re.search(r"#1 .* in _start_kernel", following()), output
    assert "in start_kernel ()" in following(), output
    assert number(following()) in (8, 9), output
    assert "Linux version 6." in following(), output
    following()
    assert "Breakpoint 2 at" in following(), output
    assert "in do_sys_openat2 ()" in following(), output
    assert "do_trap_ecall_u" in following(), output
    assert following().endswith("= 1"), output
    following()
    assert following().startswith("Hardware watchpoint"), output
    values = re.findall(r"(?:Old|New) value = (\d+)", following())
    assert len(values) == 2 and int(values[0]) < int(values[1]), output
    assert following().endswith(f"= {values[1]}"), output
    assert re.match(r"#0 .* in tick_\w*|#0 .* in do_timer", following()), output
    following()
    following()
    assert following().endswith("= 77"), output
    harts = json.loads(following())
    assert [hart["hart"] for hart in harts] == [0, 1]
    assert all(hart["walks"] > 1000 for hart in harts), harts
    assert "detached" in following(), output
