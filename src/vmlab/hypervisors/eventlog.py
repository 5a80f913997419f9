"""The events of one hypervisor: numbered without gaps, kept for a while, followed live."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import islice

from pydantic import JsonValue

from vmlab.machine.errors import ResourceNotFound
from vmlab.machine.events import Event, EventType

_ALL_FIELDS = set(Event.model_fields)
"""Which fields of an event were given: one set for all, where each would have its own."""


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
        self._time = float("-inf")
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
        # The host's clock may be set back meanwhile.
        self._time = max(self._time, self._now())
        # Not validated: this is the busiest line of a simulation, and its values are vmlab's own.
        event = Event.model_construct(
            _ALL_FIELDS,
            sequence=self._last,
            time=self._time,
            type=type_,
            hypervisor=self._hypervisor,
            machine=machine,
            name=name,
            operation=operation,
            data=data,
        )
        self._events.append(event)
        if self._waiting:
            self._wake()
        return event

    def since(self, sequence: int) -> list[Event]:
        """The events after number `sequence` (0 or less is all there were), oldest first.

        Raises:
            ResourceNotFound: some of them are no longer kept.
        """
        wanted = self._last - max(0, sequence)
        if wanted <= 0:
            return []
        if wanted > len(self._events):
            raise ResourceNotFound(
                f"events {self._last - wanted + 1} to {self._last - len(self._events)} of "
                f"{self._hypervisor!r} are no longer kept",
                hint="list the machines anew and follow the events from there",
                hypervisor=self._hypervisor,
            )
        # From the right: a deque's middle is far from its ends, and who follows wants the newest.
        return list(islice(reversed(self._events), wanted))[::-1]

    def follow(self, since: int | None = None) -> AsyncIterator[Event]:
        """Events as they happen, after number `since` (None: from now on), until `close`.

        Iterating raises ResourceNotFound for a reader who is so slow that events are no longer
        kept when it comes for them.
        """
        # "Now" is when this is called, not when the first event is waited for.
        return self._follow(self._last if since is None else since)

    async def _follow(self, cursor: int) -> AsyncIterator[Event]:
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
