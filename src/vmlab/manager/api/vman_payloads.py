"""VMAN's payloads, and what machines, templates, disks and findings are in them.

Its routes are `vmlab.manager.api.vman`.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from vmlab.machine.fields import NAME_PATTERN
from vmlab.machine.sizes import GIB
from vmlab.manager.documents import (
    DiskDocument,
    FindingDocument,
    MachineDocument,
    TemplateDocument,
)
from vmlab.manager.requests import Metadata
from vmlab.manager.store.tables import MachineRow

__all__ = [
    "VM",
    "ActionStatus",
    "Disk",
    "DiskAttach",
    "DiskCreate",
    "NetworkConfig",
    "NetworkConfigNotConfigured",
    "ObserverStatus",
    "State",
    "VMConsole",
    "VMCreate",
    "VMMetadata",
    "VMMetadataCreate",
    "VMTemplate",
    "disk_of",
    "issue_of",
    "metadata_of",
    "template_of",
    "vm_of",
]

_KINDS: Final = {
    "machine-state-mismatch": "vm_state_mismatch",
    "orphan-process": "orphan_process",
    "missing-disk": "missing_disk",
    "disk-attachment-mismatch": "disk_state_inconsistent",
    "orphan-disk": "orphan_disk",
}
"""The findings that VMAN has names for; others are called as here, with underscores."""

State = Literal["running", "stopped", "paused", "error"]


class _Payload(BaseModel):
    model_config = ConfigDict(frozen=True)


class VMTemplate(_Payload):
    """A size of machines."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    cpu_count: Annotated[int, Field(ge=1, le=1024, strict=True)]
    ram_amount: Annotated[
        int | float, Field(gt=0, le=1 << 20, description="GB; whole, or a fraction such as 0.5")
    ]


class VM(_Payload):
    """A machine."""

    id: str
    vm_template: VMTemplate
    state: State
    local_ip: str | None = None


class VMCreate(_Payload):
    """A machine that is to be."""

    template_name: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None


class VMConsole(_Payload):
    """The end of what a machine's console has printed."""

    vm_id: str
    console: str
    size: int
    file_size: int


class VMMetadata(_Payload):
    """What a machine's cloud-init is told; `ssh_keys` are separated by newlines."""

    vm_id: str
    hostname: str | None = None
    user_data: str | None = None
    ssh_keys: str | None = None
    created_at: str | None = None
    updated_at: str | None = None


class VMMetadataCreate(_Payload):
    """What is to be changed of it; what is left out stays."""

    hostname: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    user_data: Annotated[str, Field(max_length=1 << 16)] | None = None
    ssh_keys: Annotated[str, Field(max_length=1 << 16)] | None = None


class Disk(_Payload):
    """A disk."""

    id: str
    size: int = Field(description="GB, rounded up")
    mount_point: str | None = None
    state: Literal["available", "attached", "error"]


class DiskCreate(_Payload):
    """A disk that is to be."""

    size: Annotated[int, Field(ge=1, le=1 << 20, strict=True, description="GB")]
    mount_point: Annotated[str, Field(max_length=4096)] | None = None


class DiskAttach(_Payload):
    """Whose a disk is to be."""

    vm_id: Annotated[str, Field(min_length=1)]


class ActionStatus(_Payload):
    """What was done."""

    status: Literal["started", "stopped", "restarted", "attached", "detached"]


class Issue(_Payload):
    """A finding."""

    issue_type: str
    resource_id: str
    details: str


class ObserverStatus(_Payload):
    """The observer, and what it has found and is not resolved."""

    status: Literal["running", "stopped", "not_initialized"]
    check_interval: float
    last_issues_count: int
    last_issues: tuple[Issue, ...] = ()


class NetworkConfig(_Payload):
    """The first bridged network."""

    vlan_id: int
    bridge_name: str
    subnet: str
    gateway: str | None = None
    dns: tuple[str, ...] | None = None
    allocated_ips: tuple[str, ...] = ()
    available_ips: int


class NetworkConfigNotConfigured(_Payload):
    """There is none."""

    status: Literal["not_configured"] = "not_configured"


# ------------------------------------------------------------------- what is in them


def _gigabytes(size: int) -> int | float:
    return size // GIB if size % GIB == 0 else size / GIB


def template_of(document: TemplateDocument) -> VMTemplate:
    """A template, as VMAN tells it."""
    return VMTemplate.model_construct(
        name=document.name, cpu_count=document.vcpus, ram_amount=_gigabytes(document.memory)
    )


def _state(document: MachineDocument) -> State:
    match document.state.value:
        case "failed" | "unknown":
            return "error"
        case "paused" | "pausing":
            return "paused"
        case "created" | "stopped" | "deleting" | "deleted" | "starting":
            return "stopped"
        case "snapshotting" | "restoring" | "migrating" if document.started is None:
            return "stopped"
        case _:
            return "running"


def vm_of(document: MachineDocument, templates: Mapping[str, TemplateDocument]) -> VM:
    """A machine, as VMAN tells it; the templates by their names."""
    template = templates.get(document.template or "")
    shown = (
        template_of(template)
        if template is not None
        else VMTemplate.model_construct(
            name=document.template or document.image or "",
            cpu_count=document.vcpus,
            ram_amount=_gigabytes(document.memory),
        )
    )
    addresses = (address for nic in document.nics for address in nic.addresses)
    local = next((each for each in addresses if _is_ipv4(each)), None)
    return VM(id=document.name, vm_template=shown, state=_state(document), local_ip=local)


def _is_ipv4(address: str) -> bool:
    try:
        IPv4Address(address)
    except ValueError:
        return False
    return True


def metadata_of(row: MachineRow) -> VMMetadata:
    """What a machine's cloud-init is told, as VMAN tells it."""
    kept = Metadata.model_validate(row.metadata_)
    some = kept.hostname is not None or kept.user_data is not None or bool(kept.ssh_keys)
    return VMMetadata(
        vm_id=row.name,
        hostname=kept.hostname,
        user_data=kept.user_data,
        ssh_keys="\n".join(kept.ssh_keys) or None,
        created_at=row.created.isoformat() if some else None,
        updated_at=row.updated.isoformat() if some else None,
    )


def disk_of(document: DiskDocument) -> Disk:
    """A disk, as VMAN tells it."""
    state: Literal["available", "attached", "error"]
    match document.state:
        case "failed":
            state = "error"
        case "attached" | "attaching" | "detaching":
            state = "attached"
        case _:
            state = "available"
    return Disk(
        id=document.id,
        size=-(-document.size // GIB),
        mount_point=document.mount_point,
        state=state,
    )


def issue_of(document: FindingDocument) -> Issue:
    """A finding, as VMAN tells it."""
    return Issue(
        issue_type=_KINDS.get(document.code, document.code.replace("-", "_")),
        resource_id=document.name or document.subject,
        details=document.message,
    )
