"""What the store is asked: rows by name or id for those who change them, documents for the rest.

Each function takes the session of a transaction first. A list costs the same few queries however
many items it has. What is not found is told with the names that come close.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from ipaddress import IPv4Address, ip_network
from typing import Any, Final, TypeVar, get_args

from sqlalchemy import case, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session, joinedload, selectinload

from vmlab.machine.errors import MachineNotFound, ResourceNotFound, SnapshotNotFound
from vmlab.machine.fields import LARGEST
from vmlab.machine.states import LIVE, MachineState
from vmlab.manager.documents import (
    AddressDocument,
    AttachedDisk,
    DiskDocument,
    EventDocument,
    FindingDocument,
    HostDocument,
    MachineDocument,
    NetworkDocument,
    NicDocument,
    OperationDocument,
    OperationState,
    Page,
    Severity,
    SnapshotDocument,
    StepDocument,
    TemplateDocument,
)
from vmlab.manager.networks.ipam import Subnet, pools
from vmlab.manager.requests import MachinePolicy, Metadata
from vmlab.manager.store.pages import refuse, take_page
from vmlab.manager.store.tables import (
    AddressRow,
    DiskRow,
    EventRow,
    FindingRow,
    HostRow,
    MachineRow,
    NetworkRow,
    NicRow,
    OperationRow,
    SnapshotRow,
    TemplateRow,
)

__all__ = [
    "address_document",
    "disk_document",
    "event_document",
    "find_disk",
    "find_finding",
    "find_host",
    "find_machine",
    "find_network",
    "find_operation",
    "find_snapshot",
    "find_template",
    "finding_document",
    "host_document",
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
    "machine_document",
    "network_document",
    "operation_document",
    "snapshot_document",
    "template_document",
]

_LIVE: Final = sorted(state.value for state in LIVE)
Named = TypeVar("Named", MachineRow, DiskRow, NetworkRow, TemplateRow)

# ------------------------------------------------------------------------ one, by name or id


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
    row = s.get(HostRow, name) if _is_text(name) else None
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
    if _is_text(name):
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
    if _is_text(key):
        row = s.get(table, key) if _is_id(key) else None
        if row is None:
            row = s.scalar(select(table).where(table.name == key))
    if row is None:
        raise _missing(s, table.__tablename__.removesuffix("s"), table.name, key, error)
    return row


Numbered = TypeVar("Numbered", OperationRow, FindingRow)


def _find_by_id(s: Session, table: type[Numbered], key: str, noun: str, command: str) -> Numbered:
    rows: Sequence[Numbered] = ()
    if _is_id(key):
        rows = [row] if (row := s.get(table, key)) is not None else []
    elif _is_id(key.ljust(32, "0")) and len(key) >= 8:
        rows = s.scalars(select(table).where(table.id.like(f"{key}%")).limit(2)).all()
    if len(rows) == 1:
        return rows[0]
    problem = f"more than one {noun} has an id like" if rows else f"there is no {noun}"
    raise ResourceNotFound(f"{problem} {key!r}", hint=f"`{command}` lists them")


def _is_id(text: str) -> bool:
    return len(text) == 32 and all(digit in "0123456789abcdef" for digit in text)


def _is_text(text: str) -> bool:
    """Whether a database can have such text at all: PostgreSQL's has no NUL, UTF-8 no surrogate."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _missing(
    s: Session,
    noun: str,
    column: InstrumentedAttribute[str],
    name: str,
    error: type[ResourceNotFound],
) -> ResourceNotFound:
    """The error for a name that nothing has. Among many names, those that begin like it."""
    names = s.scalars(select(column).order_by(column).limit(1_000)).all()
    if len(names) == 1_000 and name and _is_text(name):
        beginning = _pattern(name[0], whole=False)
        names = s.scalars(
            select(column).where(column.like(beginning, escape="\\")).limit(1_000)
        ).all()
    return error(f"there is no {noun} {name!r}", hint=_close(name, names, f"vmlab {noun}"))


def _close(name: str, names: Sequence[str], command: str | None = None) -> str:
    if not names:
        return "there is none yet"
    close = get_close_matches(name[:63], names, n=3, cutoff=0.5) or sorted(names)[:3]
    return f"there is {', '.join(close)}" + (", and more" if len(names) > len(close) else "")


def _pattern(text: str, *, whole: bool = True) -> str:
    r"""LIKE's pattern, with the escape "\", of a text in which * and ? stand for any."""
    for special in ("\\", "%", "_"):
        text = text.replace(special, "\\" + special)
    if not whole:
        return text + "%"
    return text.replace("*", "%").replace("?", "_")


# ------------------------------------------------------------------------ machines

_WITH_PARTS: Final = (
    joinedload(MachineRow.template),
    selectinload(MachineRow.disks),
    selectinload(MachineRow.nics).options(
        joinedload(NicRow.network), selectinload(NicRow.addresses)
    ),
)


def machine_document(s: Session, row: MachineRow) -> MachineDocument:
    """A machine, as it is told."""
    return MachineDocument(
        id=row.id,
        name=row.name,
        state=MachineState(row.state),
        wanted=row.wanted,
        reason=row.reason,
        host=row.host,
        hypervisor=row.hypervisor,
        template=row.template.name if row.template else None,
        image=row.image,
        architecture=row.architecture,
        vcpus=row.vcpus,
        memory=row.memory,
        spec=dict(row.spec),
        labels=dict(row.labels),
        policy=MachinePolicy.model_validate(row.policy),
        metadata=Metadata.model_validate(row.metadata_),
        disks=tuple(
            AttachedDisk(id=disk.id, name=disk.name, device=disk.device or "", size=disk.size)
            for disk in row.disks
        ),
        nics=tuple(
            NicDocument(
                name=nic.name,
                network=nic.network.name if nic.network else nic.mode,
                mac=nic.mac,
                addresses=tuple(taken.address for taken in nic.addresses),
            )
            for nic in row.nics
        ),
        operation=row.operation_id,
        version=row.version,
        created=row.created,
        updated=row.updated,
        started=row.started,
    )


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
    query = select(MachineRow).options(*_WITH_PARTS)
    if state is not None:
        query = query.where(MachineRow.state.in_(_states(state)))
    if label is not None:
        query = query.where(_labelled(s, label))
    if host is not None:
        query = query.where(MachineRow.host == _text("host", host))
    if name is not None:
        query = query.where(MachineRow.name.like(_pattern(_text("name", name)), escape="\\"))
    if template is not None:
        query = query.join(MachineRow.template).where(
            TemplateRow.name == _text("template", template)
        )
    return take_page(
        s,
        query,
        key=(MachineRow.name,),
        document=lambda s, rows: [machine_document(s, row) for row in rows],
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


def _text(field: str, value: str) -> str:
    if not _is_text(value):
        raise refuse(field, value, "text without NUL and lone surrogates")
    return value


def _labelled(s: Session, label: str) -> Any:
    """Whether a machine's labels have that key, and that value if there is one."""
    key, equals, value = _text("label", label).partition("=")
    unfold = func.json_each if s.get_bind().dialect.name == "sqlite" else func.json_each_text
    labels = unfold(MachineRow.labels).table_valued("key", "value")
    found = select(1).select_from(labels).where(labels.c.key == key)
    if equals:
        found = found.where(labels.c.value == value)
    return found.exists()


# ------------------------------------------------------------------------ disks


def disk_document(s: Session, row: DiskRow) -> DiskDocument:
    """A disk, as it is told."""
    return DiskDocument(
        id=row.id,
        name=row.name,
        size=row.size,
        format=row.format,
        state=row.state,
        machine=row.machine.name if row.machine else None,
        machine_id=row.machine_id,
        device=row.device,
        mount_point=row.mount_point,
        version=row.version,
        created=row.created,
        updated=row.updated,
    )


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
        query = query.where(DiskRow.state == _text("state", state))
    if machine is not None:
        query = query.where(DiskRow.machine_id == find_machine(s, machine).id)
    if name is not None:
        query = query.where(DiskRow.name.like(_pattern(_text("name", name)), escape="\\"))
    return take_page(
        s,
        query,
        key=(DiskRow.name,),
        document=lambda s, rows: [disk_document(s, row) for row in rows],
        limit=limit,
        cursor=cursor,
        count=count,
    )


# ------------------------------------------------------------------------ networks


def network_document(s: Session, row: NetworkRow) -> NetworkDocument:
    """A network, as it is told."""
    return _network_documents(s, [row])[0]


def _network_documents(s: Session, rows: Sequence[NetworkRow]) -> list[NetworkDocument]:
    return [
        NetworkDocument(
            id=row.id,
            name=row.name,
            mode=row.mode,
            vlan=row.vlan,
            bridge=row.bridge,
            subnet=row.subnet,
            subnet6=row.subnet6,
            gateway=row.gateway,
            dns=tuple(row.dns),
            ranges=tuple(row.ranges),
            reserved=tuple(row.reserved),
            dhcp=row.dhcp,
            used=used,
            free=free,
            version=row.version,
            created=row.created,
        )
        for row, (used, free) in zip(rows, _use(s, rows), strict=True)
    ]


def _use(s: Session, rows: Sequence[NetworkRow]) -> list[tuple[int, int | None]]:
    """How many addresses of each network are taken, and how many of its IPv4 addresses are free."""
    taken: dict[tuple[str, str], int] = {}
    version = func.substr(AddressRow.number, 1, 1)
    counts = (
        select(AddressRow.network_id, version, func.count())
        .where(AddressRow.network_id.in_([row.id for row in rows]))
        .group_by(AddressRow.network_id, version)
    )
    for network, ip_version, number in s.execute(counts):
        taken[network, ip_version] = number
    # Where only some addresses are given by themselves, others may have been asked for.
    given: dict[str, list[IPv4Address]] = {row.id: [] for row in rows if row.ranges}
    for network, address in s.execute(
        select(AddressRow.network_id, AddressRow.address).where(
            AddressRow.network_id.in_(given), version == "4"
        )
    ):
        given[network].append(IPv4Address(address))
    found: list[tuple[int, int | None]] = []
    for row in rows:
        used = taken.get((row.id, "4"), 0)
        free = None
        if row.subnet is not None:
            subnets: list[Subnet] = [ip_network(row.subnet)]
            if row.subnet6 is not None:
                subnets.append(ip_network(row.subnet6))
            pool = pools(subnets, gateway=row.gateway, ranges=row.ranges, reserved=row.reserved)[0]
            free = pool.free(given[row.id]) if row.id in given else pool.size - used
        found.append((used + taken.get((row.id, "6"), 0), free))
    return found


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
        query = query.where(NetworkRow.mode == _text("mode", mode))
    if name is not None:
        query = query.where(NetworkRow.name.like(_pattern(_text("name", name)), escape="\\"))
    return take_page(
        s,
        query,
        key=(NetworkRow.name,),
        document=_network_documents,
        limit=limit,
        cursor=cursor,
        count=count,
    )


def address_document(s: Session, row: AddressRow) -> AddressDocument:
    """An address that is taken, as it is told."""
    return AddressDocument(
        network=row.network.name,
        address=row.address,
        machine=row.machine.name if row.machine else None,
        nic=row.nic.name if row.nic else None,
        mac=row.mac,
        since=row.since,
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


# ------------------------------------------------------------------------ templates, snapshots


def template_document(s: Session, row: TemplateRow) -> TemplateDocument:
    """A template, as it is told."""
    return _template_documents(s, [row])[0]


def _template_documents(s: Session, rows: Sequence[TemplateRow]) -> list[TemplateDocument]:
    machines: dict[str | None, int] = {
        row.template_id: row.number
        for row in s.execute(
            select(MachineRow.template_id, func.count().label("number"))
            .where(MachineRow.template_id.in_([row.id for row in rows]))
            .group_by(MachineRow.template_id)
        )
    }
    return [
        TemplateDocument(
            name=row.name,
            image=row.image,
            vcpus=row.vcpus,
            memory=row.memory,
            spec=dict(row.spec) if row.spec is not None else None,
            labels=dict(row.labels),
            machines=machines.get(row.id, 0),
            version=row.version,
            created=row.created,
        )
        for row in rows
    ]


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
        query = query.where(TemplateRow.name.like(_pattern(_text("name", name)), escape="\\"))
    return take_page(
        s,
        query,
        key=(TemplateRow.name,),
        document=_template_documents,
        limit=limit,
        cursor=cursor,
        count=count,
    )


def snapshot_document(s: Session, row: SnapshotRow) -> SnapshotDocument:
    """A snapshot, as it is told."""
    return SnapshotDocument(
        machine=row.machine.name,
        name=row.name,
        memory=row.memory,
        size=row.size,
        scheduled=row.scheduled,
        expires=row.expires,
        created=row.created,
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


# ------------------------------------------------------------------------ operations


def operation_document(s: Session, row: OperationRow) -> OperationDocument:
    """An operation with its journal, as it is told."""
    return OperationDocument(
        id=row.id,
        kind=row.kind,
        state=row.state,
        dry_run=row.dry_run,
        target=row.target,
        target_name=row.target_name,
        request=dict(row.request),
        result=dict(row.result) if row.result is not None else None,
        error=dict(row.error) if row.error is not None else None,
        steps=tuple(
            StepDocument(
                name=step.name,
                state=step.state,
                text=step.text,
                started=step.started,
                ended=step.ended,
                data=dict(step.data),
            )
            for step in row.steps
        ),
        progress=row.progress,
        message=row.message,
        attempts=row.attempts,
        cancelling=row.cancelling,
        actor=row.actor,
        request_id=row.request_id,
        undo_of=row.undo_of,
        created=row.created,
        started=row.started,
        ended=row.ended,
        deadline=row.deadline,
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
    query = select(OperationRow).options(selectinload(OperationRow.steps))
    if state is not None:
        states = [state] if isinstance(state, str) else list(state)
        known = get_args(OperationState)
        for one in states:
            if one not in known:
                raise refuse("state", one, f"one of {', '.join(known)}")
        query = query.where(OperationRow.state.in_(states))
    if kind is not None:
        query = query.where(OperationRow.kind.like(_pattern(_text("kind", kind)), escape="\\"))
    if target is not None:
        target = _text("target", target)
        query = query.where(or_(OperationRow.target == target, OperationRow.target_name == target))
    return take_page(
        s,
        query,
        key=(OperationRow.number,),
        document=lambda s, rows: [operation_document(s, row) for row in rows],
        limit=limit,
        cursor=cursor,
        descending=True,
        count=count,
    )


# ------------------------------------------------------------------------ events, findings, hosts


def event_document(s: Session, row: EventRow) -> EventDocument:
    """An event, as it is told."""
    return EventDocument(
        id=row.id,
        at=row.at,
        kind=row.kind,
        subject=row.subject,
        name=row.name,
        operation=row.operation,
        request_id=row.request_id,
        data=dict(row.data),
    )


def list_events(
    s: Session,
    *,
    after: int = 0,
    limit: int = 100,
    kind: str | None = None,
    subject: str | None = None,
) -> Page[EventDocument]:
    """Events after that one, in their order; `Page.next` is the number to go on after.

    Args:
        s: The session.
        after: Number of the event before the first.
        limit: How many at most.
        kind: Only those of that kind; * and ? stand for any characters: "machine.*".
        subject: Only those of what has that id, or had that name then.

    Raises:
        InvalidSpec: an argument is none.
    """
    if abs(after) > LARGEST:
        raise refuse("after", after, "the number of an event")
    query = select(EventRow).where(EventRow.id > after)
    if kind is not None:
        query = query.where(EventRow.kind.like(_pattern(_text("kind", kind)), escape="\\"))
    if subject is not None:
        subject = _text("subject", subject)
        query = query.where(or_(EventRow.subject == subject, EventRow.name == subject))
    page: Page[EventDocument] = take_page(
        s,
        query,
        key=(EventRow.id,),
        document=lambda s, rows: [event_document(s, row) for row in rows],
        limit=limit,
        cursor=None,
    )
    following = str(page.items[-1].id) if page.next is not None else None
    return page.model_copy(update={"next": following})


def finding_document(s: Session, row: FindingRow) -> FindingDocument:
    """A finding, as it is told."""
    return FindingDocument(
        id=row.id,
        code=row.code,
        severity=row.severity,
        subject=row.subject,
        name=row.name,
        message=row.message,
        hint=row.hint,
        evidence=dict(row.evidence),
        policy=row.policy,
        actions=tuple(row.actions),
        first_seen=row.first_seen,
        last_seen=row.last_seen,
        resolved=row.resolved,
        operation=row.operation_id,
    )


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
        query = query.where(FindingRow.code == _text("code", code))
    if severity is not None:
        if severity not in (known := get_args(Severity)):
            raise refuse("severity", severity, f"one of {', '.join(known)}")
        query = query.where(FindingRow.severity == severity)
    if resolved is not None:
        query = query.where(
            FindingRow.resolved.is_not(None) if resolved else FindingRow.resolved.is_(None)
        )
    if subject is not None:
        subject = _text("subject", subject)
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


def host_document(s: Session, row: HostRow) -> HostDocument:
    """A host, as it is told."""
    return _host_documents(s, [row])[0]


def _host_documents(s: Session, rows: Sequence[HostRow]) -> list[HostDocument]:
    live = MachineRow.state.in_(_LIVE)
    taken = {
        host: numbers
        for host, *numbers in s.execute(
            select(
                MachineRow.host,
                func.count(),
                func.sum(case((live, 1), else_=0)),
                func.sum(case((live, MachineRow.vcpus), else_=0)),
                func.sum(case((live, MachineRow.memory), else_=0)),
            )
            .where(MachineRow.host.in_([row.name for row in rows]))
            .group_by(MachineRow.host)
        )
    }
    documents = []
    for row in rows:
        machines, running, vcpus, memory = map(int, taken.get(row.name, (0, 0, 0, 0)))
        documents.append(
            HostDocument(
                name=row.name,
                hypervisor=row.hypervisor,
                options=dict(row.options),
                available=row.available,
                reason=row.reason,
                breaker=row.breaker,
                failures=row.failures,
                machines=machines,
                live=running,
                vcpus=vcpus,
                memory=memory,
                limits=dict(row.limits),
            )
        )
    return documents


def list_hosts(s: Session) -> Page[HostDocument]:
    """All hosts, by name: those are few."""
    rows = s.scalars(select(HostRow).order_by(HostRow.name)).all()
    return Page(items=tuple(_host_documents(s, rows)))
