"""The events of one hypervisor: numbered without gaps, kept for a while, followed live."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import islice

from pydantic import JsonValue

from vmlab.machine.errors import ResourceNotFound
from vmlab.machine.events import Event, EventType


class EventLog:
    """Events in the order in which they happened.

    Args:
        hypervisor: Name that the events carry.
        now: Clock of the hypervisor, in seconds.
        keep: How many of the newest events are kept.
    """

    def __init__(self, hypervisor: str, now: Callable[[], float], *, keep: int = 100_000) -> None:
        self._hypervisor = hypervisor
        self._now = now
        self._events: deque[Event] = deque(maxlen=keep)
        self._last = 0
        self._waiting: set[asyncio.Future[None]] = set()
        self._closed = False

    @property
    def last(self) -> int:
        """Number of the newest event, 0 before the first."""
        return self._last

    def emit(
        self,
        type_: EventType,
        *,
        machine: str | None = None,
        name: str | None = None,
        operation: str | None = None,
        **data: JsonValue,
    ) -> Event:
        """Record an event and wake those who follow."""
        self._last += 1
        event = Event.model_construct(
            sequence=self._last,
            time=self._now(),
            type=type_,
            hypervisor=self._hypervisor,
            machine=machine,
            name=name,
            operation=operation,
            data=data,
        )
        self._events.append(event)
        self._wake()
        return event

    def since(self, sequence: int) -> list[Event]:
        """The events after number `sequence`, oldest first.

        Raises:
            ResourceNotFound: some of them are no longer kept.
        """
        first = self._last - len(self._events) + 1
        if sequence + 1 < first:
            raise ResourceNotFound(
                f"events {sequence + 1} to {first - 1} of {self._hypervisor!r} are no longer kept",
                hint="list the machines anew and follow the events from there",
                hypervisor=self._hypervisor,
            )
        return list(islice(self._events, max(0, sequence + 1 - first), None))

    async def follow(self, since: int | None = None) -> AsyncIterator[Event]:
        """Events as they happen, after number `since` (None: from now on), until `close`."""
        cursor = self._last if since is None else since
        while True:
            for event in self.since(cursor):
                cursor = event.sequence
                yield event
            if cursor < self._last:
                continue
            if self._closed:
                return
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                await waiter
            finally:
                self._waiting.discard(waiter)

    def close(self) -> None:
        """End all who follow, after they have read what there is."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()
