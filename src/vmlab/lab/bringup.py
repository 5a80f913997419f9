"""From a machine that exists to a guest that answers: start, wait, mount, or tell why not.

What a guest printed last belongs to every error here: nobody can look at a machine that is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from vmlab.guests.guest import CONNECT_TIMEOUT, Guest
from vmlab.guests.shares import mount_shares
from vmlab.hypervisors.base import Console, Machine
from vmlab.lab.boot import Bootable
from vmlab.lab.timeline import Timeline
from vmlab.lab.ways import channel_into
from vmlab.machine.errors import MachineCrashed, VmlabError

PATIENCE: Final = 30 * 86400.0
"""Seconds that somebody at a debugger has before the guest answers."""

_PANIC: Final = b"Kernel panic - not syncing"
_PANIC_OVER: Final = b"---[ end Kernel panic"
"""The first and the last line of panic() in Linux's kernel/panic.c."""
_REST_OF_PANIC: Final = 2.0
"""Seconds for the lines between; a kernel that restarts at once prints no last line."""


@asynccontextmanager
async def booted(
    machine: Machine,
    wanted: Bootable,
    timeline: Timeline,
    started: Callable[[], None] | None = None,
) -> AsyncIterator[Guest]:
    """Start a machine and wait until its guest answers and has its shares.

    Args:
        machine: The machine, at rest.
        wanted: What it was made of.
        timeline: Where to note how long each step took.
        started: Called when it runs, or waits for its debugger.

    Raises:
        VmlabError: it does not start, or its guest does not answer; with its console's last lines.
    """
    with timeline.step("start"):
        await machine.start()
    if started is not None:
        started()
    guest = Guest(machine, channel_into(machine))
    try:
        with timeline.step("boot"):
            try:
                await _answers(machine, guest, PATIENCE if wanted.debugged else CONNECT_TIMEOUT)
            except VmlabError as error:
                error.message = f"{error.message}\n{await last_words(machine)}"
                raise
        shares = (*machine.spec.shares, *wanted.copies.shares)
        if shares:
            with timeline.step("shares"):
                await mount_shares(guest, shares)
        yield guest
    finally:
        await guest.close()


async def _answers(machine: Machine, guest: Guest, timeout: float) -> None:
    """Wait until the guest answers.

    Raises:
        DeadlineExceeded: it does not within `timeout` seconds.
        ChannelClosed: the machine ended.
        MachineCrashed: its kernel panicked; one that restarts itself would go on like this.
    """
    connecting = asyncio.ensure_future(guest.connect(timeout=timeout))
    panicking = asyncio.ensure_future(_panicked(machine))
    try:
        await asyncio.wait({connecting, panicking}, return_when=asyncio.FIRST_COMPLETED)
        if not connecting.done() and panicking.result():
            raise MachineCrashed(
                "the guest's kernel panicked while it booted",
                hint="the lines above say why; has the kernel drivers for what it boots from?",
                machine=machine.name,
                operation="start",
            )
        await connecting
    finally:
        for task in (connecting, panicking):
            task.cancel()
        await asyncio.wait({connecting, panicking})


async def _panicked(machine: Machine) -> bool:
    """Wait for a panic on the kernel's console; False if the console ends, or there is none."""
    if not machine.spec.consoles:
        return False
    async with await machine.console(machine.spec.consoles[0].name) as console:
        if not await _printed(console, _PANIC):
            return False
        try:
            async with asyncio.timeout(_REST_OF_PANIC):
                await _printed(console, _PANIC_OVER)
        except TimeoutError:
            # It restarts, or hangs in the middle: what there is has to do.
            return True
    return True


async def _printed(console: Console, text: bytes) -> bool:
    """Wait until a console prints `text`; False if it ends before."""
    seen = b""
    while text not in seen:
        data = await console.read()
        if not data:
            return False
        seen = seen[-len(text) :] + data
    return True


async def last_words(machine: Machine, lines: int = 25) -> str:
    """The end of what the machine printed on its console, from its kernel's panic on if it did."""
    try:
        async with await machine.console() as console:
            text = (await console.log()).decode("utf-8", "replace")
    except VmlabError as error:
        return f"its console cannot be read: {error}"
    printed = [line.rstrip() for line in text.splitlines() if line.strip()]
    if not printed:
        return "it printed nothing on its console"
    panics = [
        number
        for number, line in enumerate(printed)
        if _PANIC.decode() in line and _PANIC_OVER.decode() not in line
    ]
    kept = printed[panics[-1] :][: 2 * lines] if panics else printed[-lines:]
    return "the console's last lines:\n" + "\n".join(f"  {line}" for line in kept)
