"""What a guest prints is there to the letter, however slowly it is read."""

from __future__ import annotations

import asyncio
import time

import pytest

from vmlab.lab.laboratory import Lab

pytestmark = [pytest.mark.boots, pytest.mark.timeout(900)]

MEMORY = "256M"
LINES = 300
PRINTS = f"""
    echo 8 >/proc/sys/kernel/printk
    i=0
    while [ $i -lt {LINES} ]; do
        echo "line number $i, which is about as long as most of what a kernel prints" >/dev/kmsg
        i=$((i + 1))
    done
"""


def whole(text: bytes) -> list[int]:
    """The lines that are there as they were printed."""
    form = b"line number %d, which is about as long as most of what a kernel prints\r\n"
    return [number for number in range(LINES) if form % number in text]


def test_a_console_that_is_read_slowly_loses_and_doubles_nothing(lab: Lab) -> None:
    vm = lab.vm(memory=MEMORY, networks=["lan"])
    console = vm.run(vm.machine.console("serial"))
    read = bytearray()

    async def reads() -> None:
        while data := await console.read():
            read.extend(data)

    async def stalls() -> None:
        # As a process does that computes, and as one that the host gives no time to.
        while True:
            time.sleep(0.5)  # noqa: ASYNC251 (that is what it is for)
            await asyncio.sleep(0.01)

    async def begin() -> list[asyncio.Task[None]]:
        return [asyncio.create_task(reads()), asyncio.create_task(stalls())]

    async def end(tasks: list[asyncio.Task[None]]) -> None:
        tasks[1].cancel()
        await console.catch_up()
        await console.close()
        await asyncio.wait(tasks)

    tasks = vm.run(begin())
    vm.succeed(PRINTS, timeout=600)
    vm.run(end(tasks))
    assert whole(bytes(read)) == whole(vm.console_text().encode()) == list(range(LINES))
