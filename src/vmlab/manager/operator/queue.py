"""Who may go next: operations in line for the things that they change, and for a worker.

Each key has a line; an operation is ready once it is the first in the lines of all its keys.
Nothing is known here of what operations do or where they are kept.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Entry", "Queue"]


@dataclass(slots=True, eq=False)
class Entry:
    """An operation that is not ended.

    Attributes:
        number: Its place: lower ones go first.
        immediate: Whether it waits for no worker.
        running: Whether it is carried out now.
        postponed: Whether it waits for its next try; it keeps its place in its lines.
        ended: Set when it has ended.
    """

    id: str
    kind: str
    number: int
    keys: frozenset[str]
    immediate: bool = False
    running: bool = False
    postponed: bool = False
    queued: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Queue:
    """The lines of operations.

    Args:
        workers: How many may be carried out at once, beside those that wait for none.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._lines: dict[str, deque[Entry]] = {}
        self._entries: dict[str, Entry] = {}
        self._ready: list[tuple[bool, int, str]] = []
        self._busy = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def get(self, id_: str) -> Entry | None:
        """The operation of that id, if it is not ended."""
        return self._entries.get(id_)

    def waiting_for(self, key: str) -> list[Entry]:
        """The operations in the line of that key, the first of which may be carried out now."""
        return list(self._lines.get(key, ()))

    def add(self, entry: Entry) -> None:
        """Put an operation into the lines of its keys, before those with higher numbers."""
        self._entries[entry.id] = entry
        for key in entry.keys:
            line = self._lines.setdefault(key, deque())
            place = len(line)
            while place and line[place - 1].number > entry.number and not line[place - 1].running:
                place -= 1
            line.insert(place, entry)
        self._offer(entry)

    def remove(self, entry: Entry) -> None:
        """An operation has ended: those behind it move up."""
        if self._entries.pop(entry.id, None) is None:
            return
        self.pause(entry)
        for key in entry.keys:
            line = self._lines[key]
            line.remove(entry)
            if line:
                self._offer(line[0])
            else:
                del self._lines[key]
        entry.ended.set()

    def pause(self, entry: Entry) -> None:
        """It is not carried out any more, and keeps its lines."""
        if entry.running:
            entry.running = False
            self._busy -= not entry.immediate

    def offer_again(self, entry: Entry) -> None:
        """It may be tried again now."""
        entry.postponed = False
        self._offer(entry)

    def next(self) -> Entry | None:
        """The one that is to be carried out now, marked as running; None if there is none."""
        while self._ready:
            later, _, id_ = self._ready[0]
            entry = self._entries.get(id_)
            if entry is None or entry.running or entry.postponed or not self._first(entry):
                heapq.heappop(self._ready)
                if entry is not None:
                    entry.queued = False
                continue
            if later and self._busy >= self._workers:
                return None
            heapq.heappop(self._ready)
            entry.queued = False
            entry.running = True
            self._busy += not entry.immediate
            return entry
        return None

    def _first(self, entry: Entry) -> bool:
        return all(self._lines[key][0] is entry for key in entry.keys)

    def _offer(self, entry: Entry) -> None:
        if entry.queued or entry.running or entry.postponed or not self._first(entry):
            return
        entry.queued = True
        heapq.heappush(self._ready, (not entry.immediate, entry.number, entry.id))
