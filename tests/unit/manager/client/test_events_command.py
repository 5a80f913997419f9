"""``vmlab events``: what it asks the manager for, and where what it follows begins."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from vmlab.cli.manager import happenings
from vmlab.manager.documents import EventDocument
from vmlab.manager.store.tables import now


class Manager:
    """Has had so many events, every third of which is of a kind of its own; two more come."""

    def __init__(self, count: int) -> None:
        kinds = ["disk.created", "machine.state", "machine.state"]
        self.happened = [
            EventDocument(id=n, kind=kinds[n % 3], at=now(), data={}) for n in range(1, count + 1)
        ]
        self.followed: int | None = None

    async def past_events(
        self,
        after: int | None = None,
        *,
        before: int | None = None,
        latest: bool = False,
        limit: int,
        kind: str | None = None,
        subject: str | None = None,
    ) -> tuple[EventDocument, ...]:
        assert 1 <= limit <= 1000
        found = [
            event
            for event in self.happened
            if event.id > (after or 0)
            and (before is None or event.id < before)
            and kind in {None, event.kind}
        ]
        return tuple(found[-limit:] if latest else found[:limit])

    async def events(self, after: int, **filters: Any) -> AsyncIterator[EventDocument]:
        self.followed = after
        for more in (1, 2):
            yield EventDocument(id=after + more, kind="machine.state", at=now(), data={})


@pytest.mark.parametrize(
    ("options", "told", "followed"),
    [
        ({}, range(1, 2501), None),
        ({"after": 2400}, range(2401, 2501), None),
        ({"tail": 0}, (), None),
        ({"tail": 2}, (2499, 2500), None),
        ({"tail": 2100}, range(401, 2501), None),
        ({"tail": 9999}, range(1, 2501), None),
        ({"tail": 9, "after": 2498}, (2499, 2500), None),
        ({"tail": 2, "kind": "disk.created"}, (2496, 2499), None),
        ({"follow": True}, range(2491, 2501), 2500),
        ({"follow": True, "tail": 0}, (), 2500),
        ({"follow": True, "tail": 1, "kind": "disk.created"}, (2499,), 2500),
        ({"follow": True, "after": 2400}, range(2401, 2501), 2500),
        ({"follow": True, "after": 2500}, (), 2500),
    ],
    ids=[
        *("all", "after", "none", "two", "pages", "more", "after-two", "kind"),
        *("follow", "from-now", "follow-kind", "follow-after", "follow-last"),
    ],
)
def test_events_are_told_from_where_they_are_asked_for(
    options: dict[str, Any],
    told: Any,
    followed: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manager = Manager(2500)
    monkeypatch.setattr(happenings, "ask", lambda body: asyncio.run(body(manager)))
    happenings.events(**{"kind": None, "subject": None, **options}, as_json=True)
    numbers = [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()]
    coming = [] if followed is None else [followed + 1, followed + 2]
    assert numbers == [*told, *coming]
    assert manager.followed == followed


def test_a_manager_to_which_nothing_happened_is_followed_from_the_first_event(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = Manager(0)
    monkeypatch.setattr(happenings, "ask", lambda body: asyncio.run(body(manager)))
    happenings.events(follow=True)
    assert manager.followed == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
