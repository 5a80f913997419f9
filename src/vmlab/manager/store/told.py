"""Documents of rows: what leaves the store.

Where a document tells something that is counted, the function for many rows asks once for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from ipaddress import IPv4Address, ip_network
from typing import Any, Final, NamedTuple

from sqlalchemy import BindParameter, Row, Select, bindparam, func, inspect, select
from sqlalchemy.orm import InstrumentedAttribute, Session

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
    SnapshotDocument,
    StepDocument,
    TemplateDocument,
)
from vmlab.manager.networks.ipam import Subnet, pools
from vmlab.manager.requests import MachinePolicy, Metadata
from vmlab.manager.store.tables import (
    AddressRow,
    Base,
    DiskRow,
    EventRow,
    FindingRow,
    HostRow,
    MachineRow,
    NetworkRow,
    OperationRow,
    SnapshotRow,
    StepRow,
    TemplateRow,
)

__all__ = [
    "MACHINE_COLUMNS",
    "OPERATION_COLUMNS",
    "Crowd",
    "address_document",
    "crowds",
    "disk_document",
    "event_document",
    "finding_document",
    "host_document",
    "host_documents",
    "machine_document",
    "machine_documents",
    "network_document",
    "network_documents",
    "operation_document",
    "operation_documents",
    "snapshot_document",
    "template_document",
    "template_documents",
]


def _columns_of(table: type[Base]) -> tuple[InstrumentedAttribute[Any], ...]:
    return tuple(getattr(table, attribute.key) for attribute in inspect(table).column_attrs)


MACHINE_COLUMNS: Final = _columns_of(MachineRow)
OPERATION_COLUMNS: Final = _columns_of(OperationRow)
"""What lists read: rows that nobody changes need not be objects of the session."""

# What belongs to them is read by statements that are made once, past the session's objects:
# most of what a small page costs is not the database.
_TABLES: Final = MachineRow.metadata.tables
_TEMPLATES, _DISKS, _NICS = _TABLES["templates"], _TABLES["disks"], _TABLES["nics"]
_NETWORKS, _ADDRESSES, _STEPS = _TABLES["networks"], _TABLES["addresses"], _TABLES["steps"]
_IDS: Final[BindParameter[Any]] = bindparam("ids", expanding=True)
_TEMPLATE_NAMES: Final = select(_TEMPLATES.c.id, _TEMPLATES.c.name).where(_TEMPLATES.c.id.in_(_IDS))
_DISKS_OF: Final = (
    select(*(_DISKS.c[name] for name in ("machine_id", "id", "name", "device", "size")))
    .where(_DISKS.c.machine_id.in_(_IDS))
    .order_by(_DISKS.c.name)
)
_NICS_OF: Final = (
    select(
        *(_NICS.c[name] for name in ("machine_id", "id", "name", "mode", "mac")),
        _NETWORKS.c.name.label("network"),
    )
    .outerjoin_from(_NICS, _NETWORKS, _NICS.c.network_id == _NETWORKS.c.id)
    .where(_NICS.c.machine_id.in_(_IDS))
    .order_by(_NICS.c.position, _NICS.c.name)
)
_ADDRESSES_OF: Final = (
    select(_ADDRESSES.c.nic_id, _ADDRESSES.c.address)
    .where(_ADDRESSES.c.nic_id.in_(_IDS))
    .order_by(_ADDRESSES.c.number)
)
_STEPS_OF: Final = select(_STEPS).where(_STEPS.c.operation_id.in_(_IDS)).order_by(_STEPS.c.position)


def _belonging(s: Session, statement: Select[Any], ids: Collection[str]) -> Sequence[Any]:
    """The rows that `statement` has of those ids."""
    if not ids:
        return ()
    s.flush()  # as the session's own queries do
    return s.connection().execute(statement, {"ids": list(ids)}).all()


def machine_document(s: Session, row: MachineRow) -> MachineDocument:
    """A machine, as it is told."""
    return machine_documents(s, [row])[0]


def machine_documents(
    s: Session, rows: Sequence[MachineRow] | Sequence[Row[Any]]
) -> list[MachineDocument]:
    """Machines, of rows or of `MACHINE_COLUMNS`."""
    ids = [row.id for row in rows]
    made_of = {row.template_id for row in rows if row.template_id is not None}
    templates: dict[str, str] = dict(_belonging(s, _TEMPLATE_NAMES, made_of))
    disks: defaultdict[str, list[AttachedDisk]] = defaultdict(list)
    for machine, id_, name, device, size in _belonging(s, _DISKS_OF, ids):
        disks[machine].append(AttachedDisk(id=id_, name=name, device=device or "", size=size))
    nics = _nics(s, ids)
    return [
        MachineDocument(
            id=row.id,
            name=row.name,
            state=MachineState(row.state),
            wanted=row.wanted,
            reason=row.reason,
            host=row.host,
            hypervisor=row.hypervisor,
            template=None if row.template_id is None else templates[row.template_id],
            image=row.image,
            architecture=row.architecture,
            vcpus=row.vcpus,
            memory=row.memory,
            spec=dict(row.spec),
            labels=dict(row.labels),
            policy=MachinePolicy.model_validate(row.policy),
            metadata=Metadata.model_validate(row.metadata_),
            disks=tuple(disks[row.id]),
            nics=tuple(nics[row.id]),
            operation=row.operation_id,
            version=row.version,
            created=row.created,
            updated=row.updated,
            started=row.started,
        )
        for row in rows
    ]


def _nics(s: Session, machines: Sequence[str]) -> Mapping[str, Sequence[NicDocument]]:
    """The NICs of each machine, with their addresses."""
    rows = _belonging(s, _NICS_OF, machines)
    addresses: defaultdict[str, list[str]] = defaultdict(list)
    networked = [nic.id for nic in rows if nic.network is not None]
    for nic, address in _belonging(s, _ADDRESSES_OF, networked):
        addresses[nic].append(address)
    nics: defaultdict[str, list[NicDocument]] = defaultdict(list)
    for machine, id_, name, mode, mac, network in rows:
        nics[machine].append(
            NicDocument(
                name=name, network=network or mode, mac=mac, addresses=tuple(addresses[id_])
            )
        )
    return nics


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


def network_document(s: Session, row: NetworkRow) -> NetworkDocument:
    """A network, as it is told."""
    return network_documents(s, [row])[0]


def network_documents(s: Session, rows: Sequence[NetworkRow]) -> list[NetworkDocument]:
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


def template_document(s: Session, row: TemplateRow) -> TemplateDocument:
    """A template, as it is told."""
    return template_documents(s, [row])[0]


def template_documents(s: Session, rows: Sequence[TemplateRow]) -> list[TemplateDocument]:
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


def operation_document(s: Session, row: OperationRow) -> OperationDocument:
    """An operation with its journal, as it is told."""
    return _operation_document(row, row.steps)


def operation_documents(s: Session, rows: Sequence[Row[Any]]) -> list[OperationDocument]:
    """Operations with their journals, of `OPERATION_COLUMNS`."""
    steps: defaultdict[str, list[Any]] = defaultdict(list)
    for step in _belonging(s, _STEPS_OF, [row.id for row in rows]):
        steps[step.operation_id].append(step)
    return [_operation_document(row, steps[row.id]) for row in rows]


def _operation_document(
    row: OperationRow | Row[Any], steps: Sequence[StepRow] | Sequence[Row[Any]]
) -> OperationDocument:
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
            for step in steps
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


def host_document(s: Session, row: HostRow) -> HostDocument:
    """A host, as it is told."""
    return host_documents(s, [row])[0]


def host_documents(s: Session, rows: Sequence[HostRow]) -> list[HostDocument]:
    taken = defaultdict[str, list[Crowd]](list)
    for crowd in crowds(s):
        taken[crowd.host].append(crowd)
    documents = []
    for row in rows:
        live = [crowd for crowd in taken[row.name] if crowd.state in LIVE]
        documents.append(
            HostDocument(
                name=row.name,
                hypervisor=row.hypervisor,
                options=dict(row.options),
                available=row.available,
                reason=row.reason,
                breaker=row.breaker,
                failures=row.failures,
                machines=sum(crowd.machines for crowd in taken[row.name]),
                live=sum(crowd.machines for crowd in live),
                vcpus=sum(crowd.vcpus for crowd in live),
                memory=sum(crowd.memory for crowd in live),
                limits=dict(row.limits),
            )
        )
    return documents


class Crowd(NamedTuple):
    """The machines of a host that are in the same state, and what they have together."""

    host: str
    state: MachineState
    machines: int
    vcpus: int
    memory: int


_CROWDS: Final = select(
    MachineRow.host,
    MachineRow.state,
    func.count(),
    func.sum(MachineRow.vcpus),
    func.sum(MachineRow.memory),
).group_by(MachineRow.host, MachineRow.state)


def crowds(s: Session) -> list[Crowd]:
    """All machines of the store, counted; an index has all of it."""
    return [
        Crowd(host, MachineState(state), int(machines), int(vcpus), int(memory))
        for host, state, machines, vcpus, memory in s.execute(_CROWDS)
    ]
