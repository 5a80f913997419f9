"""When a manager in the background may leave: nobody asks, nothing is under way, nobody needs it.

Machines live on without it. What needs a manager are operations, machines that are to be looked
after (snapshots by a schedule, repairs by policy), and networks of the manager's with machines on
them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sqlalchemy import exists, or_, select

from vmlab.machine.states import LIVE
from vmlab.manager.documents import ENDED
from vmlab.manager.store.tables import MachineRow, NicRow, OperationRow

if TYPE_CHECKING:
    from sqlalchemy.orm import Session
    from starlette.types import ASGIApp, Receive, Scope, Send

    from vmlab.manager.store.database import Database

_FIRST: Final = 60.0
"""Seconds that whoever started a manager has to ask it the first time: hosts may be slow."""

__all__ = ["Activity", "needed", "until_idle"]


class Activity:
    """Counts what an application answers: event streams and consoles for as long as they are open.

    Args:
        app: The application.
        connected: Whether anybody is connected, who may ask in a moment.
    """

    def __init__(self, app: ASGIApp, connected: Callable[[], bool] = lambda: False) -> None:
        self._app = app
        self._connected = connected
        self._open = 0
        self._last: float | None = None
        self._begun = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the application answer."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1
            self._last = time.monotonic()

    @property
    def idle(self) -> float:
        """Seconds since the last answer; none while there is one under way, or somebody there.

        Before the first question a while does not count: whoever started it is about to ask.
        """
        if self._open or self._connected():
            self._last = time.monotonic()
            return 0.0
        since = self._begun + _FIRST if self._last is None else self._last
        return max(0.0, time.monotonic() - since)


def needed(session: Session) -> str:
    """Why a manager has to run, in words; empty if nothing needs one."""
    under_way = session.scalar(
        select(OperationRow.kind).where(OperationRow.state.not_in(ENDED)).limit(1)
    )
    if under_way is not None:
        return f"an operation is under way: {under_way}"
    on_network = exists().where(NicRow.machine_id == MachineRow.id, NicRow.mode == "network")
    living = or_(
        MachineRow.state.in_([state.value for state in LIVE]), MachineRow.wanted != "stopped"
    )
    rows = session.execute(select(MachineRow.name, MachineRow.policy, on_network).where(living))
    for name, policy, networked in rows:
        if networked:
            return f"machine {name} is on a network of the manager's"
        if policy.get("snapshot_every") is not None:
            return f"machine {name} has snapshots by a schedule"
        if any(action != "report" for action in (policy.get("findings") or {}).values()):
            return f"machine {name} is repaired by policy"
    return ""


async def until_idle(activity: Activity, database: Database, linger: float) -> None:
    """Return when nobody has asked anything for `linger` seconds and nothing needs a manager."""
    while True:
        await asyncio.sleep(max(linger - activity.idle, linger / 10))
        if activity.idle < linger:
            continue
        if not await database.read(needed) and activity.idle >= linger:
            return
