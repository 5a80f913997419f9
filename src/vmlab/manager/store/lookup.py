"""One row, by name or id, for who changes it or tells it; or what comes close to the name."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import InstrumentedAttribute, Session

from vmlab.machine.errors import MachineNotFound, ResourceNotFound, SnapshotNotFound
from vmlab.manager.store.tables import (
    DiskRow,
    FindingRow,
    HostRow,
    MachineRow,
    NetworkRow,
    OperationRow,
    SnapshotRow,
    TemplateRow,
)
from vmlab.manager.store.words import is_id, is_text, pattern

__all__ = [
    "find_disk",
    "find_finding",
    "find_host",
    "find_machine",
    "find_network",
    "find_operation",
    "find_snapshot",
    "find_template",
]

Named = TypeVar("Named", MachineRow, DiskRow, NetworkRow, TemplateRow)


Numbered = TypeVar("Numbered", OperationRow, FindingRow)


def find_machine(s: Session, name_or_id: str) -> MachineRow:
    """The machine of that name or id.

    Raises:
        MachineNotFound: there is none.
    """
    return _find(s, MachineRow, name_or_id, MachineNotFound)


def find_disk(s: Session, name_or_id: str) -> DiskRow:
    """The disk of that name or id.

    Raises:
        ResourceNotFound: there is none.
    """
    return _find(s, DiskRow, name_or_id)


def find_network(s: Session, name_or_id: str) -> NetworkRow:
    """The network of that name or id.

    Raises:
        ResourceNotFound: there is none.
    """
    return _find(s, NetworkRow, name_or_id)


def find_template(s: Session, name_or_id: str) -> TemplateRow:
    """The template of that name or id.

    Raises:
        ResourceNotFound: there is none.
    """
    return _find(s, TemplateRow, name_or_id)


def find_host(s: Session, name: str) -> HostRow:
    """The host of that name.

    Raises:
        ResourceNotFound: there is none.
    """
    row = s.get(HostRow, name) if is_text(name) else None
    if row is None:
        raise _missing(s, "host", HostRow.name, name, ResourceNotFound)
    return row


def find_operation(s: Session, id_: str) -> OperationRow:
    """The operation of that id, or of an id that begins so, if it is only one: 8 digits or more.

    Raises:
        ResourceNotFound: there is none, or more than one.
    """
    return _find_by_id(s, OperationRow, id_, "operation", "vmlab operations")


def find_finding(s: Session, id_: str) -> FindingRow:
    """The finding of that id, or of an id that begins so, if it is only one: 8 digits or more.

    Raises:
        ResourceNotFound: there is none, or more than one.
    """
    return _find_by_id(s, FindingRow, id_, "finding", "vmlab findings")


def find_snapshot(s: Session, machine: MachineRow, name: str) -> SnapshotRow:
    """The machine's snapshot of that name.

    Raises:
        SnapshotNotFound: it has none of that name.
    """
    of_machine = select(SnapshotRow).where(SnapshotRow.machine_id == machine.id)
    row = None
    if is_text(name):
        row = s.scalar(of_machine.where(SnapshotRow.name == name))
    if row is None:
        names = s.scalars(
            select(SnapshotRow.name).where(SnapshotRow.machine_id == machine.id).limit(200)
        ).all()
        raise SnapshotNotFound(
            f"there is no snapshot {name!r} of machine {machine.name!r}", hint=_close(name, names)
        )
    return row


def _find(
    s: Session,
    table: type[Named],
    key: str,
    error: type[ResourceNotFound] = ResourceNotFound,
) -> Named:
    """The row of that id or name. An id is made by vmlab, so it goes before a name like it."""
    row = None
    if is_text(key):
        row = s.get(table, key) if is_id(key) else None
        if row is None:
            row = s.scalar(select(table).where(table.name == key))
    if row is None:
        raise _missing(s, table.__tablename__.removesuffix("s"), table.name, key, error)
    return row


def _find_by_id(s: Session, table: type[Numbered], key: str, noun: str, command: str) -> Numbered:
    rows: Sequence[Numbered] = ()
    if is_id(key):
        rows = [row] if (row := s.get(table, key)) is not None else []
    elif is_id(key.ljust(32, "0")) and len(key) >= 8:
        rows = s.scalars(select(table).where(table.id.like(f"{key}%")).limit(2)).all()
    if len(rows) == 1:
        return rows[0]
    problem = f"more than one {noun} has an id like" if rows else f"there is no {noun}"
    raise ResourceNotFound(f"{problem} {key!r}", hint=f"`{command}` lists them")


def _missing(
    s: Session,
    noun: str,
    column: InstrumentedAttribute[str],
    name: str,
    error: type[ResourceNotFound],
) -> ResourceNotFound:
    """The error for a name that nothing has. Among many names, those that begin like it."""
    names = s.scalars(select(column).order_by(column).limit(1_000)).all()
    if len(names) == 1_000 and name and is_text(name):
        beginning = pattern(name[0], whole=False)
        names = s.scalars(
            select(column).where(column.like(beginning, escape="\\")).limit(1_000)
        ).all()
    return error(f"there is no {noun} {name!r}", hint=_close(name, names))


def _close(name: str, names: Sequence[str]) -> str:
    if not names:
        return "there is none yet"
    close = get_close_matches(name[:63], names, n=3, cutoff=0.5) or sorted(names)[:3]
    return f"there is {', '.join(close)}" + (", and more" if len(names) > len(close) else "")
