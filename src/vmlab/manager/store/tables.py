"""The tables of the store, as SQLAlchemy classes; columns mirror `vmlab.manager.documents`.

No rules are here but those that the database itself keeps: what is unique, what refers to what, and
which values a column may have. Every change of these classes needs a migration (`migrations/`);
`tests/integration/manager/store` compares the two. Times are UTC, sizes are bytes, ids are 32
hexadecimal digits.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any, ClassVar, get_args

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.ext.mutable import MutableDict, MutableList
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    declared_attr,
    mapped_column,
    relationship,
    validates,
)

from vmlab.machine.states import MachineState
from vmlab.manager.documents import DiskState

__all__ = [
    "AddressRow",
    "Base",
    "CounterRow",
    "DiskRow",
    "EventRow",
    "FindingRow",
    "HostRow",
    "MachineRow",
    "NetworkRow",
    "NicRow",
    "OperationRow",
    "ReservationRow",
    "SnapshotRow",
    "StepRow",
    "TemplateRow",
    "TokenRow",
    "UserRow",
    "new_id",
    "now",
]


def new_id() -> str:
    """An id: 32 hexadecimal digits at random."""
    return uuid.uuid4().hex


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


class Moment(TypeDecorator[datetime]):
    """A time with its zone, kept as UTC; SQLite has no zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    @property
    def python_type(self) -> type[datetime]:
        """What the program has: cursors are read by it."""
        return datetime

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """As the database has it."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """As the program has it."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# Changes inside of them are seen by the session, one level deep.
_Dict = MutableDict.as_mutable(JSON(none_as_null=True))
_List = MutableList.as_mutable(JSON(none_as_null=True))


class Base(DeclarativeBase):
    """What all tables are in. Constraints have names, for migrations and for error messages."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: Moment,
        dict[str, Any]: _Dict,
        dict[str, str]: _Dict,
        list[str]: _List,
        int: BigInteger,
    }


def _one_of(column: str, values: Iterable[str]) -> str:
    """The condition that a column has one of those values."""
    listed = ", ".join(f"'{value}'" for value in values)
    return f"{column} IN ({listed})"


class Versioned:
    """A row that counts its changes: one that is based on an older version is refused."""

    version: Mapped[int] = mapped_column(nullable=False)

    @declared_attr.directive
    def __mapper_args__(cls) -> dict[str, Any]:
        return {"version_id_col": cls.version}


class CounterRow(Base):
    """Numbers that are given out without a gap, as sequences of a database are not."""

    __tablename__ = "counters"
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    value: Mapped[int] = mapped_column(default=0)


class HostRow(Versioned, Base):
    """A hypervisor with its options, under a name."""

    __tablename__ = "hosts"
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    hypervisor: Mapped[str] = mapped_column(String(63))
    options: Mapped[dict[str, str]] = mapped_column(default=dict)
    available: Mapped[bool] = mapped_column(default=True)
    reason: Mapped[str] = mapped_column(Text, default="")
    breaker: Mapped[str] = mapped_column(String(16), default="closed")
    failures: Mapped[int] = mapped_column(default=0)
    limits: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created: Mapped[datetime] = mapped_column(default=now)

    __table_args__ = (
        CheckConstraint("breaker IN ('closed', 'open', 'half-open')", name="breaker"),
    )


class TemplateRow(Versioned, Base):
    """What machines are made of."""

    __tablename__ = "templates"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    image: Mapped[str | None] = mapped_column(String(255))
    vcpus: Mapped[int] = mapped_column(default=1)
    memory: Mapped[int]
    spec: Mapped[dict[str, Any] | None] = mapped_column(_Dict)
    labels: Mapped[dict[str, str]] = mapped_column(default=dict)
    created: Mapped[datetime] = mapped_column(default=now)


class MachineRow(Versioned, Base):
    """A machine. `host` is the name of the host it is on; `operation_id` is what is under way."""

    __tablename__ = "machines"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    state: Mapped[str] = mapped_column(String(16), default="created")
    wanted: Mapped[str] = mapped_column(String(16), default="stopped")
    reason: Mapped[str] = mapped_column(Text, default="")
    host: Mapped[str] = mapped_column(ForeignKey("hosts.name"))
    hypervisor: Mapped[str] = mapped_column(String(63))
    template_id: Mapped[str | None] = mapped_column(ForeignKey("templates.id"), index=True)
    image: Mapped[str | None] = mapped_column(String(255))
    architecture: Mapped[str] = mapped_column(String(16))
    vcpus: Mapped[int]
    memory: Mapped[int]
    spec: Mapped[dict[str, Any]]
    labels: Mapped[dict[str, str]] = mapped_column(default=dict)
    policy: Mapped[dict[str, Any]] = mapped_column(default=dict)
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    operation_id: Mapped[str | None] = mapped_column(ForeignKey("operations.id"), index=True)
    created: Mapped[datetime] = mapped_column(default=now)
    updated: Mapped[datetime] = mapped_column(default=now, onupdate=now)
    started: Mapped[datetime | None]

    template: Mapped[TemplateRow | None] = relationship()
    nics: Mapped[list[NicRow]] = relationship(
        back_populates="machine",
        order_by="NicRow.position",
        cascade="all, delete-orphan",
        passive_deletes=True,
    )
    disks: Mapped[list[DiskRow]] = relationship(back_populates="machine", order_by="DiskRow.name")
    snapshots: Mapped[list[SnapshotRow]] = relationship(
        back_populates="machine",
        order_by="SnapshotRow.created",
        cascade="all, delete-orphan",
        passive_deletes=True,
    )

    __table_args__ = (
        CheckConstraint("wanted IN ('running', 'paused', 'stopped')", name="wanted"),
        CheckConstraint(_one_of("state", [state.value for state in MachineState]), name="state"),
        # A page of those in one state, in its order.
        Index(None, "state", "name"),
        # What is taken of a host, without a look at its machines.
        Index(None, "host", "state", "vcpus", "memory"),
    )


class NetworkRow(Versioned, Base):
    """A network. `data` is what its mode keeps of it: names of interfaces, ports."""

    __tablename__ = "networks"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    mode: Mapped[str] = mapped_column(String(16))
    vlan: Mapped[int | None]
    bridge: Mapped[str | None] = mapped_column(String(15))
    subnet: Mapped[str | None] = mapped_column(String(49))
    subnet6: Mapped[str | None] = mapped_column(String(49))
    gateway: Mapped[str | None] = mapped_column(String(45))
    dns: Mapped[list[str]] = mapped_column(default=list)
    ranges: Mapped[list[str]] = mapped_column(default=list)
    reserved: Mapped[list[str]] = mapped_column(default=list)
    dhcp: Mapped[bool] = mapped_column(default=True)
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created: Mapped[datetime] = mapped_column(default=now)
    updated: Mapped[datetime] = mapped_column(default=now, onupdate=now)

    __table_args__ = (
        CheckConstraint("mode IN ('isolated', 'user', 'bridged')", name="mode"),
        CheckConstraint("vlan BETWEEN 1 AND 4094", name="vlan"),
    )


class NicRow(Base):
    """A NIC of a machine. Without a `network_id` its `mode` says what it is on: "user", "none".

    `data` has "remembered" as long as the guest runs, or stands still, that is still to be told of
    the NIC: the MAC address that it remembers.
    """

    __tablename__ = "nics"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    machine_id: Mapped[str] = mapped_column(ForeignKey("machines.id", ondelete="CASCADE"))
    position: Mapped[int] = mapped_column(default=0)
    name: Mapped[str] = mapped_column(String(63))
    mode: Mapped[str] = mapped_column(String(16), default="network")
    network_id: Mapped[str | None] = mapped_column(ForeignKey("networks.id"), index=True)
    mac: Mapped[str] = mapped_column(String(17), unique=True)
    requested_address: Mapped[str | None] = mapped_column(String(45))
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)

    machine: Mapped[MachineRow] = relationship(back_populates="nics")
    network: Mapped[NetworkRow | None] = relationship()
    addresses: Mapped[list[AddressRow]] = relationship(
        back_populates="nic", order_by="AddressRow.number", passive_deletes=True
    )

    __table_args__ = (
        UniqueConstraint("machine_id", "name"),
        CheckConstraint("mode IN ('network', 'user', 'none')", name="mode"),
        CheckConstraint("(mode = 'network') = (network_id IS NOT NULL)", name="network"),
    )


class AddressRow(Base):
    """An address that is taken. `number` orders them, IPv4 before IPv6, and follows `address`."""

    __tablename__ = "addresses"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    network_id: Mapped[str] = mapped_column(ForeignKey("networks.id", ondelete="CASCADE"))
    address: Mapped[str] = mapped_column(String(45))
    number: Mapped[str] = mapped_column(String(33))
    machine_id: Mapped[str | None] = mapped_column(
        ForeignKey("machines.id", ondelete="CASCADE"), index=True
    )
    nic_id: Mapped[str | None] = mapped_column(
        ForeignKey("nics.id", ondelete="CASCADE"), index=True
    )
    mac: Mapped[str | None] = mapped_column(String(17))
    since: Mapped[datetime] = mapped_column(default=now)

    network: Mapped[NetworkRow] = relationship()
    machine: Mapped[MachineRow | None] = relationship()
    nic: Mapped[NicRow | None] = relationship(back_populates="addresses")

    __table_args__ = (
        UniqueConstraint("network_id", "address"),
        Index(None, "network_id", "number"),
    )

    @validates("address")
    def _canonical(self, _: str, value: str) -> str:
        # One address has one spelling: the constraint compares text.
        address = ip_address(value)
        self.number = f"{address.version}{int(address):032x}"
        return address.compressed


class DiskRow(Versioned, Base):
    """A disk of the store's. Its file is `Storage.path(id, format)`, never a path that is kept."""

    __tablename__ = "disks"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    size: Mapped[int]
    format: Mapped[str] = mapped_column(String(8), default="raw")
    state: Mapped[str] = mapped_column(String(16), default="creating")
    reason: Mapped[str] = mapped_column(Text, default="")
    machine_id: Mapped[str | None] = mapped_column(ForeignKey("machines.id"), index=True)
    device: Mapped[str | None] = mapped_column(String(63))
    bus: Mapped[str | None] = mapped_column(String(8))
    readonly: Mapped[bool] = mapped_column(default=False)
    mount_point: Mapped[str | None] = mapped_column(Text)
    created: Mapped[datetime] = mapped_column(default=now)
    updated: Mapped[datetime] = mapped_column(default=now, onupdate=now)

    machine: Mapped[MachineRow | None] = relationship(back_populates="disks")

    __table_args__ = (
        UniqueConstraint("machine_id", "device"),
        CheckConstraint(_one_of("state", get_args(DiskState)), name="state"),
        CheckConstraint("format IN ('raw', 'qcow2')", name="format"),
        CheckConstraint("size >= 0", name="size"),
    )


class SnapshotRow(Base):
    """A snapshot of a machine."""

    __tablename__ = "snapshots"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    machine_id: Mapped[str] = mapped_column(ForeignKey("machines.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(63))
    memory: Mapped[bool] = mapped_column(default=False)
    size: Mapped[int | None]
    scheduled: Mapped[bool] = mapped_column(default=False)
    expires: Mapped[datetime | None]
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created: Mapped[datetime] = mapped_column(default=now)

    machine: Mapped[MachineRow] = relationship(back_populates="snapshots")

    __table_args__ = (UniqueConstraint("machine_id", "name"),)


class OperationRow(Versioned, Base):
    """One change, and how far it is; `number` is its place in the queue.

    `request_hash` is of the request that came with `idempotency_key`: the same key with another
    request is refused. `not_before` is when it is tried again.
    """

    __tablename__ = "operations"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    number: Mapped[int] = mapped_column(unique=True)
    kind: Mapped[str] = mapped_column(String(32))
    state: Mapped[str] = mapped_column(String(16), default="queued")
    dry_run: Mapped[bool] = mapped_column(default=False)
    target: Mapped[str | None] = mapped_column(String(63), index=True)
    target_name: Mapped[str | None] = mapped_column(String(255))
    lock_keys: Mapped[list[str]] = mapped_column(default=list)
    request: Mapped[dict[str, Any]]
    result: Mapped[dict[str, Any] | None] = mapped_column(_Dict)
    error: Mapped[dict[str, Any] | None] = mapped_column(_Dict)
    progress: Mapped[float] = mapped_column(default=0.0)
    message: Mapped[str] = mapped_column(Text, default="")
    attempts: Mapped[int] = mapped_column(default=0)
    cancelling: Mapped[bool] = mapped_column(default=False)
    actor: Mapped[str] = mapped_column(String(255), default="")
    request_id: Mapped[str | None] = mapped_column(String(255))
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    request_hash: Mapped[str | None] = mapped_column(String(64))
    undo_of: Mapped[str | None] = mapped_column(ForeignKey("operations.id"), index=True)
    created: Mapped[datetime] = mapped_column(default=now)
    started: Mapped[datetime | None]
    ended: Mapped[datetime | None]
    deadline: Mapped[datetime | None]
    not_before: Mapped[datetime | None]

    steps: Mapped[list[StepRow]] = relationship(
        order_by="StepRow.position", cascade="all, delete-orphan", passive_deletes=True
    )

    __table_args__ = (
        UniqueConstraint("actor", "idempotency_key"),
        Index(None, "state", "number"),
        CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state"
        ),
    )


class StepRow(Base):
    """One step of an operation's journal: written before it is done, and after."""

    __tablename__ = "steps"
    operation_id: Mapped[str] = mapped_column(
        ForeignKey("operations.id", ondelete="CASCADE"), primary_key=True
    )
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    position: Mapped[int] = mapped_column(default=0)
    state: Mapped[str] = mapped_column(String(16), default="planned")
    text: Mapped[str] = mapped_column(Text, default="")
    started: Mapped[datetime | None]
    ended: Mapped[datetime | None]
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)

    __table_args__ = (
        CheckConstraint(
            "state IN ('planned', 'running', 'done', 'undone', 'failed', 'skipped')", name="state"
        ),
    )


class ReservationRow(Base):
    """What an operation has been promised of a host and does not have yet."""

    __tablename__ = "reservations"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    operation_id: Mapped[str] = mapped_column(
        ForeignKey("operations.id", ondelete="CASCADE"), index=True
    )
    machine_id: Mapped[str | None] = mapped_column(ForeignKey("machines.id", ondelete="CASCADE"))
    host: Mapped[str | None] = mapped_column(ForeignKey("hosts.name"))
    vcpus: Mapped[int] = mapped_column(default=0)
    memory: Mapped[int] = mapped_column(default=0)
    disk: Mapped[int] = mapped_column(default=0)
    machines: Mapped[int] = mapped_column(default=0)
    created: Mapped[datetime] = mapped_column(default=now)


class EventRow(Base):
    """Something that happened. It outlives what it happened to, so it refers to nothing."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(default=now)
    kind: Mapped[str] = mapped_column(String(63))
    subject: Mapped[str | None] = mapped_column(String(255), index=True)
    name: Mapped[str | None] = mapped_column(String(255))
    operation: Mapped[str | None] = mapped_column(String(32))
    request_id: Mapped[str | None] = mapped_column(String(255))
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)


class FindingRow(Base):
    """A difference between the store and the world; one that is open per code and subject.

    `source` is what was looked at for it, `touches` has the ids of what it is about: both are the
    observer's own, and are not told.
    """

    __tablename__ = "findings"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    code: Mapped[str] = mapped_column(String(63))
    severity: Mapped[str] = mapped_column(String(16))
    subject: Mapped[str] = mapped_column(String(255))
    name: Mapped[str | None] = mapped_column(String(255))
    message: Mapped[str] = mapped_column(Text)
    hint: Mapped[str] = mapped_column(Text, default="")
    evidence: Mapped[dict[str, Any]] = mapped_column(default=dict)
    source: Mapped[str] = mapped_column(String(255), default="", server_default="")
    touches: Mapped[list[str]] = mapped_column(default=list, server_default="[]")
    policy: Mapped[str] = mapped_column(String(16), default="report")
    actions: Mapped[list[str]] = mapped_column(default=list)
    first_seen: Mapped[datetime] = mapped_column(default=now)
    last_seen: Mapped[datetime] = mapped_column(default=now)
    resolved: Mapped[datetime | None]
    operation_id: Mapped[str | None] = mapped_column(ForeignKey("operations.id"), index=True)

    __table_args__ = (
        CheckConstraint("severity IN ('info', 'warning', 'error', 'critical')", name="severity"),
        Index(
            "uq_findings_open",
            "code",
            "subject",
            unique=True,
            sqlite_where=text("resolved IS NULL"),
            postgresql_where=text("resolved IS NULL"),
        ),
        Index(None, "first_seen", "id"),
    )


class UserRow(Base):
    """Somebody who has tokens."""

    __tablename__ = "users"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    disabled: Mapped[bool] = mapped_column(default=False)
    created: Mapped[datetime] = mapped_column(default=now)

    tokens: Mapped[list[TokenRow]] = relationship(
        back_populates="user", cascade="all, delete-orphan", passive_deletes=True
    )


class TokenRow(Base):
    """A token, by its hash; `scope` is the most that it allows."""

    __tablename__ = "tokens"
    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    name: Mapped[str] = mapped_column(String(63), default="")
    hash: Mapped[str] = mapped_column(String(128), unique=True)
    scope: Mapped[str] = mapped_column(String(16))
    created: Mapped[datetime] = mapped_column(default=now)
    expires: Mapped[datetime | None]
    last_used: Mapped[datetime | None]
    revoked: Mapped[datetime | None]

    user: Mapped[UserRow] = relationship(back_populates="tokens")

    __table_args__ = (CheckConstraint("scope IN ('read', 'operate', 'admin')", name="scope"),)
