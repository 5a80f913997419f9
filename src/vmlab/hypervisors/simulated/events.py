"""The event log of a simulated hypervisor, in which events can get lost.

A lost event has had its number, so that a reader sees the gap and knows that it missed something.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from pydantic import JsonValue

from vmlab.hypervisors.eventlog import EventLog
from vmlab.hypervisors.simulated.trace import Trace
from vmlab.machine.events import Event, EventType


class LossyEventLog(EventLog):
    """An event log that puts all events into a trace and forgets some.

    Args:
        hypervisor: Name that the events carry.
        now: Clock of the hypervisor.
        trace: Gets every event, the lost ones marked.
        loses: Whether to lose an event, by its type and the machine's id.
    """

    def __init__(
        self,
        hypervisor: str,
        now: Callable[[], float],
        trace: Trace,
        loses: Callable[[EventType, str | None], bool],
    ) -> None:
        super().__init__(hypervisor, now)
        self._trace = trace
        self._loses = loses
        self._lost: set[int] = set()

    def emit(
        self,
        type_: EventType,
        *,
        machine: str | None = None,
        name: str | None = None,
        operation: str | None = None,
        **data: JsonValue,
    ) -> Event:
        """Record an event, or lose it."""
        lost = self._loses(type_, machine)
        if lost:
            # Before it is recorded, since recording wakes the readers.
            self._lost.add(self._last + 1)
        event = super().emit(type_, machine=machine, name=name, operation=operation, **data)
        facts: dict[str, JsonValue] = {"sequence": event.sequence, "type": type_.value}
        if name is not None:
            facts["machine"] = name
        if operation is not None:
            facts["operation"] = operation
        if data:
            facts["data"] = {key: value for key, value in data.items() if key != "owner"}
        if lost:
            facts["lost"] = True
        self._trace.add(event.time, "event", facts)
        return event

    def since(self, sequence: int) -> list[Event]:
        """The events after number `sequence` that were not lost, oldest first."""
        events = super().since(sequence)
        if not self._lost:
            return events
        return [event for event in events if event.sequence not in self._lost]

    async def _follow(self, cursor: int) -> AsyncIterator[Event]:
        while True:
            events, cursor = self.since(cursor), self._last
            for event in events:
                yield event
            if cursor < self._last:
                continue
            if self._closed:
                return
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                await waiter
            finally:
                self._waiting.discard(waiter)
