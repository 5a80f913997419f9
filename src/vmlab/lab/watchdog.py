"""A watchdog sees what becomes of a machine and tells of it at once, with the kernel's own report.

Three things are watched: the console (`console_scanner`), the hypervisor's events (here), and
whether the guest gives a sign of life (`heartbeat`). What vmlab itself was asked to do (stop,
restart, restore, a fault) is no incident; what a test does to its guest on purpose is announced
with `expect`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from vmlab.hypervisors.base import Console, Machine
from vmlab.lab.console_rules import DEFAULT, Rules
from vmlab.lab.console_scanner import ConsoleScanner, Finding
from vmlab.lab.heartbeat import Heartbeat, Pulse
from vmlab.lab.incident import FATAL, STALLS, Incident, IncidentKind, stall_that_explains
from vmlab.lab.patience import PIECES
from vmlab.machine.errors import ResourceNotFound, UnsupportedOperation
from vmlab.machine.events import Event, EventType
from vmlab.machine.states import MachineState

MOST_INCIDENTS: Final = 200
"""Incidents of one machine that are told; a kernel can warn for ever."""
_QUIET: Final = 2.0
"""Seconds without a line after which a report that nothing marks the end of is over."""
_QUIET_INSIDE: Final = 10.0
"""The same of a report whose last line is yet to come; a kernel that hangs prints none."""
_CATCH_UP: Final = 0.02
"""Seconds that the loop is given to hand over what has arrived already."""

_ASKED_FOR: Final = frozenset(
    {"start", "stop", "kill", "restart", "restore", "delete", "migrate", "inject", "clear_fault"}
)
"""Operations by which a guest may end, stand still or begin anew."""
_AT_END: Final = frozenset({MachineState.STOPPED, MachineState.FAILED, MachineState.UNKNOWN})
_BY_FAULT: Final = "fault"
"""Part of the reason of a machine that a fault stopped."""


class Expectation:
    """What a test does to its guest on purpose, while this is entered; made by `Watchdog.expect`.

    Works with `with`, in any thread, and with `async with`. What happened until it is left belongs
    to it, also if that is noticed later.

    Attributes:
        met: The incidents that were expected, as far as they have come.
    """

    def __init__(self, watchdog: Watchdog, kinds: frozenset[IncidentKind]) -> None:
        self.kinds = kinds
        self.met: list[Incident] = []
        self._watchdog = watchdog

    def __enter__(self) -> Self:
        self._watchdog._expectations.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watchdog._leave_soon(self)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._watchdog.settle()
        self._watchdog._expectations.remove(self)


class Watchdog:
    """Watches one machine while it is entered, in the event loop that it was entered in.

    Args:
        machine: Whose watchdog.
        rules: What counts.
        on_incident: Told each incident that fails a test, in the event loop, at once.
        heartbeat: Asks the guest for a sign of life and returns when it has given one, as
            `Guest.ping` does; None is not to ask, and a deterministic machine is not asked.
        stamped: Whether the kernel's lines begin with a time, where that is known, as of the
            machine that this one was forked from.

    Attributes:
        incidents: Those that were told.
        noted: Those that fail nothing: tolerated by the rules, or the host's doing.
        expected: Those that were announced.
        untold: How many there were beyond the first `MOST_INCIDENTS`.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        rules: Rules = DEFAULT,
        on_incident: Callable[[Incident], None],
        heartbeat: Callable[[], Awaitable[object]] | None = None,
        stamped: bool | None = None,
    ) -> None:
        self.machine = machine
        self.rules = rules
        self.incidents: list[Incident] = []
        self.noted: list[Incident] = []
        self.expected: list[Incident] = []
        self.untold = 0
        self._on_incident = on_incident
        self._scanner = ConsoleScanner(rules, stamped=stamped)
        self._expectations: list[Expectation] = []
        self._pulse = Pulse()
        self._heartbeat = (
            Heartbeat(machine, heartbeat, self._pulse, rules.silence, self._tell)
            # What the host asks when it likes is input that no seed gives again.
            if heartbeat is not None and rules.silence and not machine.spec.deterministic
            else None
        )
        self._console: Console | None = None
        self._reading: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        # How many pieces of the console and how many events were looked at.
        self._seen = 0
        # Of the present boot: whether its end was told already.
        self._panicked = False
        self._over = False

    @property
    def stamped(self) -> bool | None:
        """Whether the kernel's lines begin with a time, as far as that is known."""
        return self._scanner.stamped

    def expect(self, *kinds: IncidentKind | str) -> Expectation:
        """Announce incidents of these kinds: entered, they fail nothing.

        Raises:
            ValueError: there is no such kind.
        """
        return Expectation(self, frozenset(map(IncidentKind, kinds)))

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        # From now on, which is when this is called.
        follow = self._follow(self.machine.hypervisor.subscribe())
        consoles = self.machine.spec.consoles
        if consoles:
            with suppress(UnsupportedOperation):
                self._console = await self.machine.console(consoles[0].name)
        self._tasks.append(asyncio.create_task(follow, name=f"events of {self.machine.name}"))
        if self._console is not None:
            reading = self._read(self._console)
            self._reading = asyncio.create_task(reading, name=f"console {self.machine.name}")
            self._tasks.append(self._reading)
        if self._heartbeat is not None:
            beating = self._heartbeat.run()
            self._tasks.append(asyncio.create_task(beating, name=f"pulse of {self.machine.name}"))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None or not issubclass(kind, asyncio.CancelledError):
                await self.settle()
        finally:
            tasks = [*self._tasks, *self._leaving]
            self._tasks.clear()
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            if self._console is not None:
                await self._console.close()
            for task in tasks:
                # A mistake of the watchdog's own is not to be lost with it.
                if not task.cancelled() and (failure := task.exception()) is not None:
                    raise failure

    async def settle(self) -> None:
        """Wait until all that has happened until now was looked at, reports that have begun too."""
        clock = asyncio.get_running_loop().time
        began, seen = clock(), -1
        # A kernel that reports for ever is not waited for.
        while clock() < began + 2 * _QUIET_INSIDE:
            if seen == self._seen and not self._scanner.busy:
                return
            if all(task.done() for task in self._tasks):
                return
            seen = self._seen
            await asyncio.sleep(_CATCH_UP)
            await self._console_read()

    def _leave_soon(self, expectation: Expectation) -> None:
        loop = self._loop
        if loop is None or loop.is_closed():
            self._expectations.remove(expectation)
            return

        async def leave() -> None:
            try:
                await self.settle()
            finally:
                self._expectations.remove(expectation)

        def begin() -> None:
            task = asyncio.ensure_future(leave())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

        loop.call_soon_threadsafe(begin)

    # The console.

    async def _read(self, console: Console) -> None:
        pieces = 0  # as in `patience`
        while True:
            quiet = _QUIET_INSIDE if self._scanner.awaits_end else _QUIET
            try:
                async with asyncio.timeout(quiet / PIECES if self._scanner.busy else None):
                    data = await console.read()
            except TimeoutError:
                pieces += 1
                if pieces >= PIECES:
                    pieces = 0
                    self._found(self._scanner.settle())
                continue
            pieces = 0
            if not data:
                self._found(self._scanner.flush())
                return
            self._seen += 1
            self._pulse.sign_of_life()
            self._found(self._scanner.feed(data))

    def _found(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            if finding.kind is IncidentKind.PANIC:
                if self._panicked:
                    continue
                self._panicked = True
            self._tell(finding.kind, finding.message, finding.excerpt, finding.rule)

    # Events.

    async def _follow(self, events: AsyncIterator[Event]) -> None:
        while True:
            try:
                async for event in events:
                    if event.machine in {None, self.machine.id}:
                        await self._happened(event)
                    self._seen += 1
                    if event.type is EventType.DELETED and event.machine == self.machine.id:
                        return
                return
            except ResourceNotFound:
                # Some went by unread: what the machine is now is all that is left of them.
                events = self.machine.hypervisor.subscribe()
                state = self.machine.state
                if state in _AT_END and not self._over:
                    await self._moved(state, "its events were missed", asked=False)

    async def _happened(self, event: Event) -> None:
        kind, reason = event.type, str(event.data.get("reason", ""))
        operation = (event.operation or "").rpartition("-")[0]
        asked = operation in _ASKED_FOR or _BY_FAULT in reason
        if kind is EventType.HYPERVISOR_LOST:
            # What else it takes along, and that nothing is known of the machine, follows from this.
            self._over = True
            if not asked:
                self._tell(IncidentKind.HYPERVISOR_LOST, reason or "the hypervisor is gone")
        elif kind is EventType.GUEST_RESET:
            await self._console_caught_up()
            self._found(self._scanner.restarted())
            if not asked and not self._panicked:
                said = f"the guest was reset ({reason})" if reason else "the guest was reset"
                self._tell(IncidentKind.UNEXPECTED_REBOOT, said)
            self._panicked = False
        elif kind is EventType.GUEST_PANIC:
            await self._ended(IncidentKind.PANIC, reason, asked=False)
        elif kind is EventType.GUEST_SHUTDOWN:
            said = f"the guest shut down ({reason})" if reason else "the guest shut down"
            await self._ended(IncidentKind.UNEXPECTED_EXIT, said, asked=asked)
        elif kind is EventType.CRASHED:
            await self._ended(IncidentKind.UNEXPECTED_EXIT, reason, asked=asked)
        elif kind is EventType.STATE:
            to = MachineState(str(event.data["to"]))
            # Whatever is under way may pause it for a while.
            asked = asked or (to is MachineState.PAUSED and bool(operation))
            await self._moved(to, reason, asked=asked)

    async def _moved(self, to: MachineState, reason: str, *, asked: bool) -> None:
        if to is MachineState.STARTING or to is MachineState.RESTARTING:
            self._found(self._scanner.restarted())
            self._panicked = self._over = False
        elif to is MachineState.RUNNING:
            self._over = False
            self._pulse.sign_of_life()
        elif to in _AT_END:
            said = f"it is {to.value} now, unasked" + (f": {reason}" if reason else "")
            await self._ended(IncidentKind.UNEXPECTED_EXIT, said, asked=asked)
        elif to is MachineState.PAUSED and not asked:
            said = "its hypervisor stopped it" + (f": {reason}" if reason else "")
            self._tell(IncidentKind.UNEXPECTED_PAUSE, said)

    async def _ended(self, kind: IncidentKind, said: str, *, asked: bool) -> None:
        """The machine ended; its console has said all that it ever will."""
        await self._console_caught_up()
        self._found(self._scanner.flush())
        if self._over:
            return
        self._over = True
        if asked or self._panicked:
            # A kernel that panicked may power the machine down, or be ended for it.
            return
        self._panicked = kind is IncidentKind.PANIC
        self._tell(kind, said)

    async def _console_caught_up(self) -> None:
        """Let the reader of the console take what has arrived."""
        await self._console_read()
        # Events are looked at one after the other, so that only the console moves meanwhile.
        seen = -1
        while seen != self._seen:
            seen = self._seen
            await asyncio.sleep(_CATCH_UP)

    async def _console_read(self) -> None:
        """Wait until the reader of the console has taken what was printed before this call."""
        console, reading = self._console, self._reading
        if console is None or reading is None or reading.done():
            return
        catching_up = asyncio.ensure_future(console.catch_up())
        try:
            await asyncio.wait({catching_up, reading}, return_when=asyncio.FIRST_COMPLETED)
            if catching_up.done():
                catching_up.result()
        finally:
            catching_up.cancel()

    # Telling.

    def _tell(self, kind: IncidentKind, message: str, excerpt: str = "", rule: str = "") -> None:
        message = message or kind.value
        if not excerpt and self.rules.ignores(message, ""):
            return
        incident = Incident(
            kind,
            self.machine.name,
            message,
            excerpt,
            fatal=kind in FATAL,
            rule=rule,
            host_stall_s=self._pulse.recent_stall(),
        )
        for expectation in self._expectations:
            if kind in expectation.kinds:
                expectation.met.append(incident)
                self.expected.append(incident)
                return
        if not self.rules.fails(kind) or (kind in STALLS and stall_that_explains(incident)):
            if len(self.noted) < MOST_INCIDENTS:
                self.noted.append(incident)
        elif len(self.incidents) < MOST_INCIDENTS:
            self.incidents.append(incident)
            self._on_incident(incident)
        else:
            self.untold += 1
