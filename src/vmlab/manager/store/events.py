"""The stream of events: what was committed, in its order, without a gap, from any place on.

Events have numbers that are given out in the transaction that writes them, so that one that was
rolled back leaves no gap. The newest are kept in memory; whoever is further behind reads the table.
A subscriber pulls: a slow one holds nobody up and fills no memory.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Final, Self

from vmlab.manager.documents import EventDocument
from vmlab.manager.store.failures import EventsGone

__all__ = ["EventStream", "Subscription"]

_IN_MEMORY: Final = 2_000
"""Events that subscribers are served without a look at the database."""

Load = Callable[[int, int], Awaitable[Sequence[EventDocument]]]
"""Reads up to that many (second) events after that one (first) from the table."""


class EventStream:
    """What subscribers read; the database tells it of each commit, from whatever thread."""

    def __init__(self, load: Load, *, oldest: int, latest: int) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._oldest = oldest
        self._latest = latest
        self._recent: deque[EventDocument] = deque(maxlen=_IN_MEMORY)
        self._subscribers: set[Subscription] = set()
        self._closed = False

    def latest(self) -> int:
        """The number of the last event; 0 if there was none."""
        return self._latest

    def oldest(self) -> int:
        """The number of the first event that can still be told; 1 if there was none."""
        return self._oldest

    def subscribe(self, after: int | None = None) -> Subscription:
        """Events after that one, or from now on if it is None; iterate over it in a coroutine.

        It is subscribed from this call on. Iterating raises `EventsGone`, too, where a subscriber
        is so slow that events are removed before it came to them.

        Raises:
            EventsGone: some of the events after `after` are not kept any more, or there was no such
                event.
        """
        with self._lock:
            if after is None:
                after = self._latest
            self._check(after)
            subscription = Subscription(self, after)
            self._subscribers.add(subscription)
            closed = self._closed
        if closed:
            subscription.close()
        return subscription

    def publish(self, events: Sequence[EventDocument], *, oldest: int) -> None:
        """Tell subscribers what was committed; the database calls it, in the order of commits."""
        with self._lock:
            if self._recent and self._recent[-1].id + 1 != events[0].id:
                self._recent.clear()  # another process wrote some: those are in the table alone
            self._recent.extend(events)
            self._latest = events[-1].id
            self._oldest = oldest
            subscribers = list(self._subscribers)
        for subscription in subscribers:
            subscription.wake()

    def close(self) -> None:
        """End all subscriptions, once they have told what is in memory."""
        with self._lock:
            self._closed = True
            subscribers = list(self._subscribers)
        for subscription in subscribers:
            subscription.close()

    def _check(self, after: int) -> None:
        if not self._oldest - 1 <= after <= self._latest:
            raise EventsGone(after, oldest=self._oldest, latest=self._latest)

    async def _after(self, after: int, limit: int) -> Sequence[EventDocument]:
        """Up to `limit` events after that one; none if there are none yet."""
        with self._lock:
            self._check(after)
            if after == self._latest:
                return ()
            recent = self._recent
            if recent and recent[0].id <= after + 1:
                first = after + 1 - recent[0].id
                return [recent[n] for n in range(first, min(first + limit, len(recent)))]
            if self._closed:
                return ()  # the table is closed, too: it is told by whoever opens it next
        events = await self._load(after, limit)
        if not events or events[0].id != after + 1:
            # They were removed between the check and the look.
            raise EventsGone(after, oldest=self._oldest, latest=self._latest)
        return events

    def _forget(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscribers.discard(subscription)


class Subscription:
    """One reader of the stream: an asynchronous iterator of events, and a context manager.

    `position` is the number of the last event that it told.
    """

    _BATCH: Final = 200

    def __init__(self, stream: EventStream, after: int) -> None:
        self.position = after
        self._stream = stream
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news = asyncio.Event()
        self._batch: deque[EventDocument] = deque()
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EventDocument:
        self._loop = asyncio.get_running_loop()
        while not self._batch:
            self._news.clear()
            self._batch.extend(await self._stream._after(self.position, self._BATCH))
            if self._batch:
                break
            if self._closed:
                raise StopAsyncIteration
            await self._news.wait()
        event = self._batch.popleft()
        self.position = event.id
        return event

    def wake(self) -> None:
        """Have it look for news; from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._news.set)

    def close(self) -> None:
        """End it: what there is is told, and nothing after it; from any thread."""
        self._closed = True
        self._stream._forget(self)
        self.wake()

    async def aclose(self) -> None:
        """As `close`; what generators have."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
