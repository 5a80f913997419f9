"""Lists of documents, filtered, a page at a time.

A page costs the same few queries however many items it has, and however far it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session, joinedload

from vmlab.machine.fields import LARGEST
from vmlab.machine.states import MachineState
from vmlab.manager.documents import (
    AddressDocument,
    DiskDocument,
    EventDocument,
    FindingDocument,
    HostDocument,
    MachineDocument,
    NetworkDocument,
    OperationDocument,
    OperationState,
    Page,
    Severity,
    SnapshotDocument,
    TemplateDocument,
)
from vmlab.manager.store.lookup import find_machine, find_network
from vmlab.manager.store.pages import refuse, take_page, text
from vmlab.manager.store.tables import (
    AddressRow,
    DiskRow,
    EventRow,
    FindingRow,
    HostRow,
    MachineRow,
    NetworkRow,
    OperationRow,
    SnapshotRow,
    TemplateRow,
)
from vmlab.manager.store.told import (
    MACHINE_COLUMNS,
    OPERATION_COLUMNS,
    address_document,
    disk_document,
    event_document,
    finding_document,
    host_documents,
    machine_documents,
    network_documents,
    operation_documents,
    snapshot_document,
    template_documents,
)
from vmlab.manager.store.words import pattern

__all__ = [
    "list_addresses",
    "list_disks",
    "list_events",
    "list_findings",
    "list_hosts",
    "list_machines",
    "list_networks",
    "list_operations",
    "list_snapshots",
    "list_templates",
]


def list_machines(
    s: Session,
    *,
    state: str | Iterable[str] | None = None,
    label: str | None = None,
    host: str | None = None,
    name: str | None = None,
    template: str | None = None,
    limit: int = 100,
    cursor: str | None = None,
    count: bool = False,
) -> Page[MachineDocument]:
    """Machines, by name.

    Args:
        s: The session.
        state: Only those in that state, or in one of those.
        label: Only those with that label: "key" or "key=value".
        host: Only those of that host.
        name: Only those whose name is like that; * and ? stand for any characters.
        template: Only those made of the template of that name.
        limit: How many at most.
        cursor: `next` of the page before.
        count: Count them all, too.

    Raises:
        InvalidSpec: an argument is none.
    """
    query = select(*MACHINE_COLUMNS)
    if state is not None:
        query = query.where(MachineRow.state.in_(_states(state)))
    if label is not None:
        query = query.where(_labelled(s, label))
    if host is not None:
        query = query.where(MachineRow.host == text("host", host))
    if name is not None:
        query = query.where(MachineRow.name.like(pattern(text("name", name)), escape="\\"))
    if template is not None:
        query = query.join(MachineRow.template).where(
            TemplateRow.name == text("template", template)
        )
    return take_page(
        s,
        query,
        key=(MachineRow.name,),
        document=machine_documents,
        limit=limit,
        cursor=cursor,
        count=count,
    )


def _states(state: str | Iterable[str]) -> list[str]:
    known = [one.value for one in MachineState]
    wanted = [state] if isinstance(state, str) else list(state)
    for one in wanted:
        if one not in known:
            raise refuse("state", one, f"one of {', '.join(known)}")
    return [str(one) for one in wanted]


def _labelled(s: Session, label: str) -> Any:
    """Whether a machine's labels have that key, and that value if there is one."""
    key, equals, value = text("label", label).partition("=")
    unfold = func.json_each if s.get_bind().dialect.name == "sqlite" else func.json_each_text
    labels = unfold(MachineRow.labels).table_valued("key", "value")
    found = select(1).select_from(labels).where(labels.c.key == key)
    if equals:
        found = found.where(labels.c.value == value)
    return found.exists()


def list_disks(
    s: Session,
    *,
    state: str | None = None,
    machine: str | None = None,
    name: str | None = None,
    limit: int = 100,
    cursor: str | None = None,
    count: bool = False,
) -> Page[DiskDocument]:
    """Disks, by name; `machine` is the name or id of the machine that has them.

    Raises:
        InvalidSpec: an argument is none.
        MachineNotFound: there is no such machine.
    """
    query = select(DiskRow).options(joinedload(DiskRow.machine))
    if state is not None:
        query = query.where(DiskRow.state == text("state", state))
    if machine is not None:
        query = query.where(DiskRow.machine_id == find_machine(s, machine).id)
    if name is not None:
        query = query.where(DiskRow.name.like(pattern(text("name", name)), escape="\\"))
    return take_page(
        s,
        query,
        key=(DiskRow.name,),
        document=lambda s, rows: [disk_document(s, row) for row in rows],
        limit=limit,
        cursor=cursor,
        count=count,
    )


def list_networks(
    s: Session,
    *,
    name: str | None = None,
    mode: str | None = None,
    limit: int = 100,
    cursor: str | None = None,
    count: bool = False,
) -> Page[NetworkDocument]:
    """Networks, by name.

    Raises:
        InvalidSpec: an argument is none.
    """
    query = select(NetworkRow)
    if mode is not None:
        query = query.where(NetworkRow.mode == text("mode", mode))
    if name is not None:
        query = query.where(NetworkRow.name.like(pattern(text("name", name)), escape="\\"))
    return take_page(
        s,
        query,
        key=(NetworkRow.name,),
        document=network_documents,
        limit=limit,
        cursor=cursor,
        count=count,
    )


def list_addresses(
    s: Session,
    *,
    network: str | None = None,
    machine: str | None = None,
    limit: int = 100,
    cursor: str | None = None,
    count: bool = False,
) -> Page[AddressDocument]:
    """Addresses that are taken, in their order in each network; `network`, `machine`: name or id.

    Raises:
        InvalidSpec: an argument is none.
        ResourceNotFound: there is no such network or machine.
    """
    query = select(AddressRow).options(
        joinedload(AddressRow.network),
        joinedload(AddressRow.machine),
        joinedload(AddressRow.nic),
    )
    if network is not None:
        query = query.where(AddressRow.network_id == find_network(s, network).id)
    if machine is not None:
        query = query.where(AddressRow.machine_id == find_machine(s, machine).id)
    return take_page(
        s,
        query,
        key=(AddressRow.network_id, AddressRow.number),
        document=lambda s, rows: [address_document(s, row) for row in rows],
        limit=limit,
        cursor=cursor,
        count=count,
    )


def list_templates(
    s: Session,
    *,
    name: str | None = None,
    limit: int = 100,
    cursor: str | None = None,
    count: bool = False,
) -> Page[TemplateDocument]:
    """Templates, by name.

    Raises:
        InvalidSpec: an argument is none.
    """
    query = select(TemplateRow)
    if name is not None:
        query = query.where(TemplateRow.name.like(pattern(text("name", name)), escape="\\"))
    return take_page(
        s,
        query,
        key=(TemplateRow.name,),
        document=template_documents,
        limit=limit,
        cursor=cursor,
        count=count,
    )


def list_snapshots(
    s: Session,
    *,
    machine: str | None = None,
    limit: int = 100,
    cursor: str | None = None,
    count: bool = False,
) -> Page[SnapshotDocument]:
    """Snapshots, the oldest first; `machine` is the name or id of the machine they are of.

    Raises:
        InvalidSpec: an argument is none.
        MachineNotFound: there is no such machine.
    """
    query = select(SnapshotRow).options(joinedload(SnapshotRow.machine))
    if machine is not None:
        query = query.where(SnapshotRow.machine_id == find_machine(s, machine).id)
    return take_page(
        s,
        query,
        key=(SnapshotRow.created, SnapshotRow.id),
        document=lambda s, rows: [snapshot_document(s, row) for row in rows],
        limit=limit,
        cursor=cursor,
        count=count,
    )


def list_operations(
    s: Session,
    *,
    state: str | Iterable[str] | None = None,
    kind: str | None = None,
    target: str | None = None,
    limit: int = 100,
    cursor: str | None = None,
    count: bool = False,
) -> Page[OperationDocument]:
    """Operations, the newest first.

    Args:
        s: The session.
        state: Only those in that state, or in one of those.
        kind: Only those of that kind; * and ? stand for any characters.
        target: Only those of what has that id or, at that time, name.
        limit: How many at most.
        cursor: `next` of the page before.
        count: Count them all, too.

    Raises:
        InvalidSpec: an argument is none.
    """
    query = select(*OPERATION_COLUMNS)
    if state is not None:
        states = [state] if isinstance(state, str) else list(state)
        known = get_args(OperationState)
        for one in states:
            if one not in known:
                raise refuse("state", one, f"one of {', '.join(known)}")
        query = query.where(OperationRow.state.in_(states))
    if kind is not None:
        query = query.where(OperationRow.kind.like(pattern(text("kind", kind)), escape="\\"))
    if target is not None:
        target = text("target", target)
        query = query.where(or_(OperationRow.target == target, OperationRow.target_name == target))
    return take_page(
        s,
        query,
        key=(OperationRow.number,),
        document=operation_documents,
        limit=limit,
        cursor=cursor,
        descending=True,
        count=count,
    )


def list_events(
    s: Session,
    *,
    after: int = 0,
    before: int | None = None,
    latest: bool = False,
    limit: int = 100,
    kind: str | None = None,
    subject: str | None = None,
) -> Page[EventDocument]:
    """Events after that one, in their order; `Page.next` is the number to go on after.

    Args:
        s: The session.
        after: Number of the event before the first.
        before: Number of the event after the last.
        latest: The last ones if there are more than `limit`; `Page.next` is the number to go on
            before, then.
        limit: How many at most.
        kind: Only those of that kind; * and ? stand for any characters: "machine.*".
        subject: Only those of what has that id, or had that name then.

    Raises:
        InvalidSpec: an argument is none.
    """
    for name, number in (("after", after), ("before", before)):
        if number is not None and abs(number) > LARGEST:
            raise refuse(name, number, "the number of an event")
    query = select(EventRow).where(EventRow.id > after)
    if before is not None:
        query = query.where(EventRow.id < before)
    if kind is not None:
        query = query.where(EventRow.kind.like(pattern(text("kind", kind)), escape="\\"))
    if subject is not None:
        subject = text("subject", subject)
        query = query.where(or_(EventRow.subject == subject, EventRow.name == subject))
    page: Page[EventDocument] = take_page(
        s,
        query,
        key=(EventRow.id,),
        document=lambda s, rows: [event_document(s, row) for row in rows],
        limit=limit,
        cursor=None,
        descending=latest,
    )
    following = str(page.items[-1].id) if page.next is not None else None
    items = page.items[::-1] if latest else page.items
    return page.model_copy(update={"items": items, "next": following})


def list_findings(
    s: Session,
    *,
    code: str | None = None,
    severity: str | None = None,
    resolved: bool | None = None,
    subject: str | None = None,
    limit: int = 100,
    cursor: str | None = None,
    count: bool = False,
) -> Page[FindingDocument]:
    """Findings, the newest first.

    Args:
        s: The session.
        code: Only those of that code.
        severity: Only those of that severity.
        resolved: Only those that are resolved, or only those that are not; both if None.
        subject: Only those of what has that id or name.
        limit: How many at most.
        cursor: `next` of the page before.
        count: Count them all, too.

    Raises:
        InvalidSpec: an argument is none.
    """
    query = select(FindingRow)
    if code is not None:
        query = query.where(FindingRow.code == text("code", code))
    if severity is not None:
        if severity not in (known := get_args(Severity)):
            raise refuse("severity", severity, f"one of {', '.join(known)}")
        query = query.where(FindingRow.severity == severity)
    if resolved is not None:
        query = query.where(
            FindingRow.resolved.is_not(None) if resolved else FindingRow.resolved.is_(None)
        )
    if subject is not None:
        subject = text("subject", subject)
        query = query.where(or_(FindingRow.subject == subject, FindingRow.name == subject))
    return take_page(
        s,
        query,
        key=(FindingRow.first_seen, FindingRow.id),
        document=lambda s, rows: [finding_document(s, row) for row in rows],
        limit=limit,
        cursor=cursor,
        descending=True,
        count=count,
    )


def list_hosts(s: Session) -> Page[HostDocument]:
    """All hosts, by name: those are few."""
    rows = s.scalars(select(HostRow).order_by(HostRow.name)).all()
    return Page(items=tuple(host_documents(s, rows)))
