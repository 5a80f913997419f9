"""What the store refuses: relations that would break, versions that are no more, events gone."""

from __future__ import annotations

from vmlab.machine.errors import VmlabError

__all__ = ["Conflict", "EventsGone", "PreconditionFailed", "StoreUnavailable"]


class Conflict(VmlabError):
    """It cannot be, beside what the store holds: a name that is taken, a relation that stands."""


class PreconditionFailed(VmlabError):
    """It was changed since whoever wants to change it has read it.

    `expected` is the version that was read, `actual` the one that is there.
    """

    _fields = ("expected", "actual")

    def __init__(self, what: str, *, expected: int, actual: int) -> None:
        self.expected = expected
        self.actual = actual
        super().__init__(
            f"{what} is at version {actual}, not {expected}: it was changed meanwhile",
            hint="read it again, and decide again",
        )


class EventsGone(VmlabError):
    """Events that were asked for are not kept any more, or never were in this store.

    `oldest` is the first that can be had, `latest` the last.
    """

    _fields = ("oldest", "latest")

    def __init__(self, after: int, *, oldest: int, latest: int) -> None:
        self.oldest = oldest
        self.latest = latest
        super().__init__(
            f"events after {after} cannot be told without a gap: there are {oldest} to {latest}",
            hint="read everything anew, and go on from the latest event",
        )


class StoreUnavailable(VmlabError):
    """The database cannot be opened or does not answer."""

    exit_code = 4
