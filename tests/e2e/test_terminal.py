"""A shell in a guest on a terminal of ours: full-screen programs, sizes that change, Ctrl-C."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.e2e.conftest import AMD64, Vmlab

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(600)]


class Terminal:
    """A terminal with somebody at it: types, and waits for what is shown."""

    def __init__(self, rows: int, columns: int) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (rows, columns))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def shows(self, wanted: str, seconds: float = 180) -> str:
        """What is shown up to `wanted`, that included."""
        seen = b""
        deadline = time.monotonic() + seconds
        while wanted.encode() not in seen:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self.master], [], [], left)
            assert ready, f"{wanted!r} is not among {seen!r}"
            # A byte at a time: what comes after it is for the next one who waits.
            seen += os.read(self.master, 1)
        return seen.decode(errors="replace")

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


@contextmanager
def shell_on(terminal: Terminal, vmlab: Vmlab) -> Iterator[subprocess.Popen[bytes]]:
    shell = vmlab.start(
        "shell", *AMD64,
        stdin=terminal.slave, stdout=terminal.slave, stderr=terminal.slave, start_new_session=True,
    )  # fmt: skip
    try:
        yield shell
    finally:
        shell.kill()
        shell.wait()
        terminal.close()


def test_a_shell_has_a_terminal_like_one_here(vmlab: Vmlab) -> None:
    terminal = Terminal(33, 101)
    before = termios.tcgetattr(terminal.slave)
    with shell_on(terminal, vmlab) as shell:
        terminal.shows(":/# ")
        terminal.type("stty size; tty; echo $TERM-do''ne\r")
        shown = terminal.shows(f"{os.environ.get('TERM', '')}-done")
        assert "33 101\r\n/dev/hvc0\r\n" in shown

        # An editor draws its last row where this terminal has it, and follows when that moves.
        terminal.type("vi /root/letter\r")
        terminal.shows("\x1b[33;1H")
        termios.tcsetwinsize(terminal.slave, (20, 90))
        shell.send_signal(signal.SIGWINCH)
        terminal.shows("\x1b[20;1H")
        terminal.type("ihello from vi")
        terminal.shows("hello from vi")
        terminal.type("\x1b")
        terminal.shows("\x1b[1;13H")  # the cursor is on the last letter, not behind it
        terminal.type(":wq\r")
        terminal.shows(":/# ")
        terminal.type("cat /root/letter; stty size\r")
        assert "hello from vi\r\n20 90\r\n" in terminal.shows(":/# ")

        # A pager stops after a screen; a key goes to it and not to the shell.
        terminal.type("seq 1 100 | less\r")
        assert "19\r\n" in terminal.shows("standard input")
        terminal.type("q")
        assert "20\r\n" not in terminal.shows(":/# ")

        # Ctrl-C is the program's, not vmlab's.
        terminal.type("sh -c 'echo be''gun; exec sleep 1000'\r")
        terminal.shows("begun\r\n")
        terminal.type("\x03")
        terminal.shows(":/# ")
        terminal.type("echo status $?\r")
        terminal.shows("status 130\r\n")

        terminal.type("exit 6\r")
        assert shell.wait(timeout=120) == 6
        assert termios.tcgetattr(terminal.slave) == before
    assert not vmlab.processes() and not vmlab.files() and not vmlab.runs
