"""What the manager tells: machines, disks, networks, operations, events and findings, as documents.

These are the replies of the REST service and what the Python client returns; they are made from the
store's rows and hold nothing that is not kept there. `version` is what `If-Match` compares.
Times are UTC, sizes are bytes.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from vmlab.machine.states import MachineState
from vmlab.manager.requests import MachinePolicy, Metadata

D = TypeVar("D", bound=BaseModel)

OperationState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
UNDER_WAY: tuple[OperationState, ...] = ("queued", "running")
ENDED: frozenset[OperationState] = frozenset({"succeeded", "failed", "cancelled"})
DiskState = Literal[
    "creating", "available", "attaching", "attached", "detaching", "deleting", "failed"
]
Severity = Literal["info", "warning", "error", "critical"]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class NicDocument(_Document):
    """One network interface of a machine."""

    name: str
    network: str = Field(description='name of its network, "user" or "none"')
    mac: str
    addresses: tuple[str, ...] = ()


class AttachedDisk(_Document):
    """A disk of the store's that a machine has."""

    id: str
    name: str
    device: str = Field(description="name of the disk in the machine's specification")
    size: int


class MachineDocument(_Document):
    """A machine: what is wanted of it and what it is known to do."""

    id: str
    name: str
    state: MachineState
    wanted: Literal["running", "paused", "stopped"] = Field(
        description="what it was last told to be"
    )
    reason: str = Field("", description="why it failed, if it did")
    host: str
    hypervisor: str
    template: str | None = None
    image: str | None = None
    architecture: str
    vcpus: int
    memory: int
    spec: dict[str, Any]
    labels: dict[str, str] = Field(default_factory=dict)
    policy: MachinePolicy
    metadata: Metadata
    disks: tuple[AttachedDisk, ...] = ()
    nics: tuple[NicDocument, ...] = ()
    operation: str | None = Field(None, description="operation under way, if any")
    version: int
    created: datetime
    updated: datetime
    started: datetime | None = None


class DiskDocument(_Document):
    """A disk of the store's."""

    id: str
    name: str
    size: int
    format: Literal["raw", "qcow2"]
    state: DiskState
    machine: str | None = Field(None, description="name of the machine that has it")
    machine_id: str | None = None
    device: str | None = None
    mount_point: str | None = None
    version: int
    created: datetime
    updated: datetime


class NetworkDocument(_Document):
    """A network, with how many of its addresses are taken."""

    id: str
    name: str
    mode: Literal["isolated", "user", "bridged"]
    vlan: int | None = None
    bridge: str | None = None
    subnet: str | None = None
    subnet6: str | None = None
    gateway: str | None = None
    dns: tuple[str, ...] = ()
    ranges: tuple[str, ...] = ()
    reserved: tuple[str, ...] = ()
    dhcp: bool = True
    used: int = 0
    free: int | None = None
    version: int
    created: datetime


class AddressDocument(_Document):
    """An address that is taken."""

    network: str
    address: str
    machine: str | None = None
    nic: str | None = None
    mac: str | None = None
    since: datetime


class SnapshotDocument(_Document):
    """A snapshot of a machine."""

    machine: str
    name: str
    memory: bool
    size: int | None = None
    scheduled: bool = False
    expires: datetime | None = None
    created: datetime


class TemplateDocument(_Document):
    """What machines are made of."""

    name: str
    image: str | None
    vcpus: int
    memory: int
    spec: dict[str, Any] | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    machines: int = Field(0, description="machines made of it that are there")
    version: int
    created: datetime


class StepDocument(_Document):
    """One step of an operation, as its journal has it."""

    name: str
    state: Literal["planned", "running", "done", "undone", "failed", "skipped"]
    text: str = Field("", description="what it does, for a person")
    started: datetime | None = None
    ended: datetime | None = None
    data: dict[str, Any] = Field(default_factory=dict)


class OperationDocument(_Document):
    """One change: what was asked, how far it is, how it ended."""

    id: str
    kind: str
    state: OperationState
    dry_run: bool = False
    target: str | None = Field(None, description="id of what it changes")
    target_name: str | None = None
    request: dict[str, Any]
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = Field(None, description="`VmlabError.to_record`")
    steps: tuple[StepDocument, ...] = ()
    progress: float = Field(0.0, ge=0, le=1)
    message: str = ""
    attempts: int = 0
    cancelling: bool = False
    actor: str = ""
    request_id: str | None = None
    undo_of: str | None = Field(None, description="operation that it undoes")
    created: datetime
    started: datetime | None = None
    ended: datetime | None = None
    deadline: datetime | None = None


class EventDocument(_Document):
    """Something that happened, numbered without a gap."""

    id: int
    at: datetime
    kind: str = Field(description='such as "machine.state" or "operation.ended"')
    subject: str | None = Field(None, description="id of what it happened to")
    name: str | None = None
    operation: str | None = None
    request_id: str | None = None
    data: dict[str, Any] = Field(default_factory=dict)


class FindingDocument(_Document):
    """A difference between the store and the world."""

    id: str
    code: str
    severity: Severity
    subject: str
    name: str | None = None
    message: str
    hint: str = ""
    evidence: dict[str, Any] = Field(default_factory=dict)
    policy: str = "report"
    actions: tuple[str, ...] = Field((), description="repairs that are possible")
    first_seen: datetime
    last_seen: datetime
    resolved: datetime | None = None
    operation: str | None = Field(None, description="its repair, if there was one")


class HostDocument(_Document):
    """Where machines run: a hypervisor with its options, and what of it is taken."""

    name: str
    hypervisor: str
    options: dict[str, str] = Field(default_factory=dict)
    available: bool
    reason: str = ""
    breaker: Literal["closed", "open", "half-open"] = "closed"
    failures: int = 0
    machines: int = 0
    live: int = 0
    vcpus: int = 0
    memory: int = 0
    limits: dict[str, int | None] = Field(default_factory=dict)


class Page(_Document, Generic[D]):
    """Some of many, and where the rest is."""

    items: tuple[D, ...]
    next: str | None = Field(None, description="cursor of the next page")
    total: int | None = None
