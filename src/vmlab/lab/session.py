"""A session: one machine that exists while somebody uses it, ready to be talked to.

Owned by this process's run, so that it goes with it whatever happens, or kept in the store.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from vmlab.guests.guest import Guest
from vmlab.hypervisors import registry
from vmlab.hypervisors.base import Hypervisor, HypervisorProvider, Machine
from vmlab.hypervisors.ownership import Owner, Run, Store
from vmlab.lab.boot import Bootable
from vmlab.lab.bringup import booted, last_words
from vmlab.lab.debugger import gdb_command
from vmlab.lab.preference import holder
from vmlab.lab.timeline import Timeline
from vmlab.lab.ways import channel_into
from vmlab.machine.errors import InvalidSpec, MachineCrashed, UnsupportedOperation, VmlabError

T = TypeVar("T")

_ANSWER_TIMEOUT = 30.0
"""Seconds that the guest of a machine that has run for long is given to answer."""

# What is started, what is missing, how long it takes: agent included.
_UPTIMES = (
    "read -r up rest </proc/uptime; read -r stat </proc/$PPID/stat; "
    "set -- ${stat##*) }; shift 19; "
    "init=$(dmesg 2>/dev/null | sed -n 's/^.*\\[ *\\([0-9.]*\\)\\] Run .* as init process.*/\\1/p' "
    '| head -n 1); echo "$up $1 ${init:-0}"'
)


@dataclass
class Session:
    """A machine in use: the machine, its inside, and where the time went.

    `kept` is whether it stays when this process goes, however that goes.
    """

    machine: Machine
    guest: Guest
    timeline: Timeline = field(default_factory=Timeline)
    kept: bool = False


class Interrupted(BaseException):
    """The user or the system ended the session; `number` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP while a session lives: they end it, or go where `to` says."""

    def __init__(self) -> None:
        self.to: Callable[[int], Awaitable[None]] | None = None
        self.number: int | None = None
        self._task: asyncio.Task[object] | None = None
        self._passing: set[asyncio.Future[None]] = set()

    def install(self, task: asyncio.Task[object]) -> None:
        """From now on they are caught."""
        self._task = task
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._arrived, number)

    def _arrived(self, number: int) -> None:
        if number == signal.SIGINT and self.to is not None:
            passing = asyncio.ensure_future(self.to(number))
            self._passing.add(passing)
            passing.add_done_callback(self._passing.discard)
        else:
            self.end(number)

    def end(self, number: int) -> None:
        """End the session as signal `number` does."""
        if self.number is None and self._task is not None:
            self.number = number
            self._task.cancel()


def run_session(
    wanted: Bootable,
    body: Callable[[Session, Interrupts], Awaitable[T]],
    *,
    hypervisor: str,
    keep: bool = False,
    timeline: Timeline | None = None,
    tell: Callable[[str], None] | None = None,
) -> T:
    """Boot a machine, call `body` with it, and clear it away; the machinery of `vmlab run`.

    Args:
        wanted: The machine.
        body: What to do with it.
        hypervisor: The name of the one that runs it.
        keep: Leave it running, in the default store.
        timeline: Where to note how long each step took.
        tell: Takes what the user has to know while the machine waits: how to debug it.

    Raises:
        UnsupportedOperation: a debugger is wanted, and the hypervisor has no place for one.
        VmlabError: it does not boot, or what `body` raised.
        Interrupted: a signal ended it; everything is cleared away.
    """
    timeline = timeline or Timeline()
    provider = registry.provider(hypervisor)
    owned: AbstractContextManager[Run | Store] = nullcontext(Store.open()) if keep else Run.begin()
    with wanted.image.hold(), owned as owner:
        started = None
        options: dict[str, str] = {}
        if wanted.debugged:
            socket = owner.owner.socket(f"gdb-{wanted.spec.name}.sock")
            options["gdb"] = str(socket)
            command = gdb_command(wanted.spec.architecture, socket, wanted.symbols)

            started = partial(_tell_of_gdb, tell, wanted.spec.name, command)

        opened = _opened(provider, owner.owner, options)
        return drive(
            opened,
            lambda interrupts: _with_machine(
                opened,
                wanted,
                body,
                keep=keep,
                timeline=timeline,
                interrupts=interrupts,
                started=started,
            ),
        )


def _tell_of_gdb(tell: Callable[[str], None] | None, machine: str, command: str) -> None:
    if tell is not None:
        tell(f"{machine} waits for gdb, and runs when you say `continue` there:\n  {command}")


def _opened(provider: HypervisorProvider, owner: Owner, options: Mapping[str, str]) -> Hypervisor:
    try:
        return provider.open(owner, options)
    except InvalidSpec as error:
        if "gdb" not in options:
            raise
        raise UnsupportedOperation(
            "gdb", hypervisor=provider.name, operation="start", hint="--hypervisor qemu has it"
        ) from error


def with_kept(
    name: str,
    body: Callable[[Machine], Awaitable[T]],
    *,
    hypervisor: str | None = None,
) -> T:
    """Call `body` with a machine of the default store, whatever its state.

    Without a `hypervisor` it is looked for on all of them.

    Raises:
        MachineNotFound: there is none of that name.
        VmlabError: what `body` raised.
        Interrupted: a signal ended it.
    """
    owner = Store.open().owner
    opened = registry.provider(holder(name, owner, hypervisor)).open(owner)

    async def found(interrupts: Interrupts) -> T:
        return await body(await opened.get(name))

    return drive(opened, found)


def attach_session(
    name: str,
    body: Callable[[Session, Interrupts], Awaitable[T]],
    *,
    hypervisor: str | None = None,
) -> T:
    """Call `body` with the inside of a machine that runs in the default store.

    Without a `hypervisor` it is looked for on all of them.

    Raises:
        MachineNotFound: there is none of that name.
        VmlabError: it does not answer, or what `body` raised.
        Interrupted: a signal ended it.
    """
    owner = Store.open().owner
    opened = registry.provider(holder(name, owner, hypervisor)).open(owner)

    async def attached(interrupts: Interrupts) -> T:
        machine = await opened.get(name)
        guest = Guest(machine, channel_into(machine))
        try:
            await guest.connect(timeout=_ANSWER_TIMEOUT)
            return await body(Session(machine, guest, kept=True), interrupts)
        finally:
            await guest.close()

    return drive(opened, attached)


def drive(opened: Hypervisor, work: Callable[[Interrupts], Awaitable[T]]) -> T:
    """Run `work` on the hypervisor's loop; signals become `Interrupted`."""
    interrupts = Interrupts()

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        interrupts.install(task)
        async with opened:
            return await work(interrupts)

    try:
        with asyncio.Runner(loop_factory=opened.loop_factory()) as runner:
            return runner.run(main())
    except asyncio.CancelledError:
        if interrupts.number is None:
            raise
        raise Interrupted(interrupts.number) from None


async def _with_machine(
    hypervisor: Hypervisor,
    wanted: Bootable,
    body: Callable[[Session, Interrupts], Awaitable[T]],
    *,
    keep: bool,
    timeline: Timeline,
    interrupts: Interrupts,
    started: Callable[[], None] | None,
) -> T:
    with timeline.step("hypervisor"):
        machine = await hypervisor.create(wanted.spec)
    done = False
    try:
        async with booted(machine, wanted, timeline, started) as guest:
            result = await body(Session(machine, guest, timeline, kept=keep), interrupts)
            done = True
            return result
    finally:
        if not (keep and done):
            await machine.delete(force=True)


async def split_boot(session: Session) -> None:
    """Ask the guest where its boot's time went, and note firmware, kernel, init and agent."""
    result = await session.guest.execute(_UPTIMES)
    try:
        up, ticks, init = result.stdout.split()
        uptime, agent, kernel = float(up), int(ticks) / 100, float(init)  # USER_HZ, times(2)
    except ValueError:
        return
    boot = next(step.seconds for step in session.timeline.steps if step.name == "boot")
    parts = {"firmware": max(0.0, boot - uptime)}
    parts |= {"kernel": kernel, "init": agent - kernel} if kernel else {"kernel and init": agent}
    session.timeline.split("boot", {**parts, "agent": 0.0})


async def death(session: Session, command: str, error: VmlabError) -> VmlabError:
    """What to tell somebody whose command's channel ended: how the machine did."""
    # What the hypervisor has to tell of its end may come a moment later than the end.
    for _ in range(10):
        status = await session.machine.status()
        if not status.state.is_live:
            what = status.reason or status.state.value
            break
        await asyncio.sleep(0.1)
    else:
        what = f"{error.message}, but the machine runs: did its kernel restart?"
    return MachineCrashed(
        f"{command!r} did not end: {what}\n{await last_words(session.machine)}",
        hint="a command that takes the guest down cannot tell its exit status",
        machine=session.machine.name,
        operation="run",
    )
