"""From a machine that exists to a guest that answers: start, wait, mount, or tell why not.

What a guest printed last belongs to every error here: nobody can look at a machine that is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from vmlab.guests.guest import CONNECT_TIMEOUT, Guest
from vmlab.guests.shares import mount_shares
from vmlab.hypervisors.base import Machine
from vmlab.lab.boot import Bootable
from vmlab.lab.console_scanner import ConsoleScanner, Finding
from vmlab.lab.incident import IncidentKind
from vmlab.lab.patience import wait_for_any
from vmlab.lab.timeline import Timeline
from vmlab.lab.ways import channel_into
from vmlab.machine.errors import MachineCrashed, VmlabError
from vmlab.machine.spec import Share

PATIENCE: Final = 30 * 86400.0
"""Seconds that somebody at a debugger has before the guest answers."""

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
    guest = await reached(machine, timeline, PATIENCE if wanted.debugged else CONNECT_TIMEOUT)
    try:
        await shared(guest, (*machine.spec.shares, *wanted.copies.shares), timeline)
        yield guest
    finally:
        await guest.close()


async def reached(
    machine: Machine, timeline: Timeline, patience: float = CONNECT_TIMEOUT, step: str = "boot"
) -> Guest:
    """The guest of a machine that runs, once it answers.

    Args:
        machine: The machine.
        timeline: Where to note how long it took.
        patience: Seconds that the guest has.
        step: What the wait is called there.

    Raises:
        VmlabError: it does not answer; with its console's last lines.
    """
    guest = Guest(machine, channel_into(machine))
    with timeline.step(step):
        try:
            await _answers(machine, guest, patience)
        except BaseException as error:
            await guest.close()
            if isinstance(error, VmlabError):
                error.message = f"{error.message}\n{await last_words(machine)}"
            raise
    return guest


async def shared(guest: Guest, shares: Sequence[Share], timeline: Timeline) -> None:
    """Bring shares to their places in a guest, if there are any."""
    if shares:
        with timeline.step("shares"):
            await mount_shares(guest, shares)


async def _answers(machine: Machine, guest: Guest, timeout: float) -> None:
    """Wait until the guest answers.

    Raises:
        DeadlineExceeded: it does not within `timeout` seconds.
        ChannelClosed: the machine ended.
        MachineCrashed: its kernel panicked; one that restarts itself would go on like this.
    """
    connecting = asyncio.ensure_future(guest.connect(timeout=timeout))
    seen = asyncio.Event()
    panicking = asyncio.ensure_future(_panicked(machine, seen))
    seeing = asyncio.ensure_future(seen.wait())
    try:
        await asyncio.wait({connecting, panicking}, return_when=asyncio.FIRST_COMPLETED)
        answered = connecting.done() and connecting.exception() is None
        if not answered:
            # Its machine may have ended by the panic; its console says so a moment later.
            await wait_for_any({panicking, seeing}, _REST_OF_PANIC)
            if seen.is_set():
                # However late it began, the rest of it has its time.
                await asyncio.wait({panicking})
        if not answered and _tells(panicking):
            raise MachineCrashed(
                "the guest's kernel panicked while it booted",
                hint="the lines above say why; has the kernel drivers for what it boots from?",
                machine=machine.name,
                operation="start",
            )
        await connecting
    finally:
        for task in (connecting, panicking, seeing):
            task.cancel()
        await asyncio.wait({connecting, panicking, seeing})


def _tells(panicking: asyncio.Future[bool]) -> bool:
    """Whether a panic was seen; a console that cannot be read tells of none."""
    return panicking.done() and panicking.exception() is None and panicking.result()


async def _panicked(machine: Machine, seen: asyncio.Event) -> bool:
    """Wait for a panic on the kernel's console; False if the console ends, or there is none.

    `seen` is set when one has begun; it is over soon then.
    """
    if not machine.spec.consoles:
        return False
    scanner = ConsoleScanner()
    async with await machine.console(machine.spec.consoles[0].name) as console:
        while scanner.under_way is not IncidentKind.PANIC:
            data = await console.read()
            if not data:
                return False
            if _tell_of_panic(scanner.feed(data)):
                return True
        seen.set()
        try:
            async with asyncio.timeout(_REST_OF_PANIC):
                while scanner.busy and (data := await console.read()):
                    scanner.feed(data)
        except TimeoutError:
            # It restarts, or hangs in the middle: what there is has to do.
            return True
    return True


def _tell_of_panic(findings: Iterable[Finding]) -> bool:
    return any(finding.kind is IncidentKind.PANIC for finding in findings)


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
    scanner = ConsoleScanner()
    findings = scanner.feed("\n".join(printed).encode()) + scanner.flush()
    panics = [found.excerpt for found in findings if found.kind is IncidentKind.PANIC]
    kept = panics[-1].splitlines()[: 2 * lines] if panics else printed[-lines:]
    return "the console's last lines:\n" + "\n".join(f"  {line}" for line in kept)
