"""A program for test_forks: a machine with Debian in this process, which forks at several moments.

    python forking.py KERNEL INITRD CMDLINE HARTS

Each side of each fork has its guest do something of its own and prints what came of it, a line of
JSON. No sockets: those would be one for both sides.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading

from vmlab.engine.configuration import Boot, Configuration
from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.machine import Machine

PATIENCE = 900
LONG_COMMAND = "seq 40000 | md5sum"


class Console:
    """The guest's serial console."""

    def __init__(self, machine: Machine) -> None:
        self._uart = machine.board.uart
        self._uart.send = self._sent
        self._said = bytearray()
        self._more = threading.Condition()

    def _sent(self, data: bytes) -> None:
        with self._more:
            self._said += data
            self._more.notify_all()

    def until(self, mark: bytes) -> bytes:
        """What the guest says up to a mark."""
        with self._more:
            if not self._more.wait_for(lambda: mark in self._said, PATIENCE):
                raise TimeoutError(f"no {mark!r} in {bytes(self._said[-2000:])!r}")
            before, _, self._said = self._said.partition(mark)
            return bytes(before)

    def type(self, text: str) -> None:
        """Type a line."""
        self._uart.receive(text.encode() + b"\n")

    def run(self, command: str) -> str:
        """What a command prints."""
        # The marks are not what the echo of the line has in it.
        self.type(f"echo be''gin; {command}; echo e''nd")
        self.until(b"begin\r\n")
        return self.until(b"end\r\n").decode()


def told(side: str, console: Console) -> None:
    """Have the guest write, compute and read, and tell."""
    answer = console.run(f"echo {side} >/tmp/side; seq 20000 | md5sum; cat /tmp/side")
    line = json.dumps({"side": side, "answer": answer.split()}) + "\n"
    os.write(1, line.encode())


def fork(machine: Machine) -> int:
    """Fork the machine; the child's number, or 0 in the child."""
    machine.stand_to_fork()
    threads = [thread.name for thread in threading.enumerate()]
    assert threads == ["MainThread"], f"{threads} would not be in the child"
    child = os.fork()
    machine.resume()
    return child


def in_child(machine: Machine, console: Console, side: str, *, started: bool) -> None:
    """What a child does with its machine, until its end."""
    status = 1
    try:
        if not started:
            begin(console)
        elif side == "computing":
            console.until(b"-\r\n")
        told(f"{side}-child", console)
        machine.harts.join()
        status = 0
    finally:
        os._exit(status)


def begin(console: Console) -> None:
    """Wait until the guest is up, and log in."""
    console.until(b"Please press Enter")
    console.type("")
    # The kernel may find a slow host remarkable, in the middle of an answer.
    console.run("stty cols 1000; dmesg -n 1")


def main() -> None:
    kernel, initrd, cmdline, harts = sys.argv[1:]
    mistakes: queue.SimpleQueue[object] = queue.SimpleQueue()
    made = Configuration(
        "vm",
        192 << 20,
        qmp="",
        harts=int(harts),
        boot=Boot(kernel, initrd, f"{cmdline} console=ttyS0 vmlab.agent=off"),
    )
    machine = Machine(made, Reactor(mistakes.put), lambda what, why: mistakes.put((what, why)))
    console = Console(machine)
    children = []

    def split(side: str, *, started: bool) -> None:
        if (child := fork(machine)) == 0:
            in_child(machine, console, side, started=started)
        children.append(child)

    machine.resume()
    while sum(hart.retired for hart in machine.harts) < 1_500_000_000:
        threading.Event().wait(0.005)
    split("booting", started=False)
    begin(console)
    split("idle", started=True)
    console.type(LONG_COMMAND)
    console.until(b"md5sum")
    split("computing", started=True)
    console.until(b"-\r\n")
    told("parent", console)
    machine.close()
    for child in children:
        assert os.waitpid(child, 0)[1] == 0, "a child ended badly"
    assert mistakes.empty(), mistakes.get()


if __name__ == "__main__":
    main()
