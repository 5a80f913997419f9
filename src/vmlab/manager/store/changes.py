"""How a transaction writes down what happens: events, states, numbers; and what stands against it.

Each function takes the session of a transaction that writes. Rows are changed by whoever knows why;
what has to go with a change, and what a constraint means to a person, is here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.event import listens_for
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapper, Session

from vmlab.machine.states import MachineState
from vmlab.manager.store.failures import Conflict, EventsGone, PreconditionFailed
from vmlab.manager.store.tables import (
    CounterRow,
    DiskRow,
    MachineRow,
    NetworkRow,
    OperationRow,
    TemplateRow,
    now,
)

__all__ = [
    "EVENTS",
    "Conflict",
    "EventsGone",
    "PreconditionFailed",
    "add_event",
    "check_version",
    "conflict",
    "count",
    "counted",
    "set_machine_state",
]

_COUNTERS: Final = CounterRow.metadata.tables["counters"]
_COUNT: Final = (
    update(_COUNTERS)
    .where(_COUNTERS.c.name == bindparam("counter"))
    .values(value=_COUNTERS.c.value + bindparam("by"))
    .returning(_COUNTERS.c.value)
)

EVENTS: Final = "vmlab.events"
"""Where a session keeps the events of its transaction until it commits."""


def add_event(
    s: Session,
    kind: str,
    *,
    subject: str | None = None,
    name: str | None = None,
    operation: str | None = None,
    request_id: str | None = None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Say that something happens in this transaction; it is told once that is committed.

    Args:
        s: The session.
        kind: What: "machine.created".
        subject: Id of what it happens to.
        name: Name of that.
        operation: Id of the operation that does it.
        request_id: Id of the request that asked for it.
        data: What else there is to know: JSON.
    """
    s.info.setdefault(EVENTS, []).append(
        {
            "at": now(),
            "kind": kind,
            "subject": subject,
            "name": name,
            "operation": operation,
            "request_id": request_id,
            "data": dict(data or {}),
        }
    )


def set_machine_state(
    s: Session,
    row: MachineRow,
    state: MachineState | str,
    *,
    reason: str = "",
    operation: str | None = None,
) -> None:
    """Write down what a machine does now, with the event that says so; nothing if it did already.

    `started` is set when it begins to run, and taken away when it is at rest.
    """
    state = MachineState(state)
    if row.state == state and row.reason == reason:
        return
    before = row.state
    row.state = state.value
    row.reason = reason
    if state is MachineState.RUNNING and (row.started is None or before == "starting"):
        row.started = now()
    elif not state.is_live and state is not MachineState.UNKNOWN:
        row.started = None
    data: dict[str, Any] = {"before": before, "state": state.value}
    if reason:
        data["reason"] = reason
    add_event(s, "machine.state", subject=row.id, name=row.name, operation=operation, data=data)


def check_version(
    row: MachineRow | DiskRow | NetworkRow | TemplateRow, if_match: int | None
) -> None:
    """Refuse a change that was decided upon another version than the one that is there.

    Raises:
        PreconditionFailed: `if_match` is not None and not the row's version.
    """
    if if_match is not None and row.version != if_match:
        noun = row.__tablename__.removesuffix("s")
        raise PreconditionFailed(f"{noun} {row.name!r}", expected=if_match, actual=row.version)


# ------------------------------------------------------------------------ numbers


def count(s: Session | Connection, name: str, by: int = 1) -> int:
    """Take the next `by` numbers of a counter; returns the last of them. The first one is 1."""
    connection = s.connection() if isinstance(s, Session) else s
    last = connection.execute(_COUNT, {"counter": name, "by": by}).scalar()
    if last is None:
        connection.execute(insert(_COUNTERS).values(name=name, value=by))
        last = by
    return int(last)


def counted(s: Session, name: str) -> int:
    """The last number that a counter gave; 0 if it gave none."""
    return s.scalar(select(CounterRow.value).where(CounterRow.name == name)) or 0


@listens_for(OperationRow, "before_insert")
def _number_operation(_: Mapper[Any], connection: Connection, row: OperationRow) -> None:
    row.number = count(connection, "operations")


# ------------------------------------------------------------------------ constraints

_NOUNS: Final = {
    "machines": "machine",
    "disks": "disk",
    "networks": "network",
    "templates": "template",
    "hosts": "host",
    "users": "user",
}
_SAYINGS: Final = {
    "addresses.network_id,addresses.address": "that address of the network is taken",
    "disks.machine_id,disks.device": "the machine has a disk of that device name",
    "findings.code,findings.subject": "there is an open finding of that code and subject",
    "nics.mac": "a NIC has that MAC address",
    "nics.machine_id,nics.name": "the machine has a NIC of that name",
    "operations.actor,operations.idempotency_key": "that idempotency key was used",
    "snapshots.machine_id,snapshots.name": "the machine has a snapshot of that name",
    "tokens.hash": "that token is there",
}
_POSTGRES_KEY: Final = re.compile(r"Key \((?P<columns>[^)]*)\)=\((?P<values>.*)\) ")


def conflict(error: IntegrityError) -> Conflict:
    """What a constraint that was hurt means, in the words of who asked for the change."""
    columns, values = _hurt(error)
    table = columns[0].partition(".")[0] if columns else ""
    if columns == [f"{table}.name"] and table in _NOUNS:
        which = f" {values!r}" if values else ""
        return Conflict(
            f"there is a {_NOUNS[table]}{which} already; names are unique",
            hint=f"choose another name, or delete that {_NOUNS[table]}",
        )
    key = ",".join(columns)
    if key in _SAYINGS:
        which = f" ({values})" if values else ""
        return Conflict(_SAYINGS[key] + which, hint="choose another one")
    detail = " ".join(str(error.orig).split())
    if "foreign key" in detail.lower():
        return Conflict(
            "something else in the store belongs to it, or what it refers to is gone",
            hint=f"remove first what belongs to it ({detail})",
        )
    return Conflict(f"the store refuses it: {detail}", hint="look at what is there already")


def _hurt(error: IntegrityError) -> tuple[list[str], str]:
    """The columns of the unique constraint that was hurt, and their values where they are known."""
    detail = str(error.orig)
    if detail.startswith("UNIQUE constraint failed: "):
        return detail.removeprefix("UNIQUE constraint failed: ").split(", "), ""
    diagnosis = getattr(error.orig, "diag", None)
    if diagnosis is not None and getattr(error.orig, "sqlstate", "") == "23505":
        match = _POSTGRES_KEY.match(diagnosis.message_detail or "")
        if match:
            table = diagnosis.table_name
            return [f"{table}.{c.strip()}" for c in match["columns"].split(",")], match["values"]
    return [], ""
