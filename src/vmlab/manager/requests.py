"""What the manager can be asked to change: one model for each kind of operation.

Every change of anything goes through one of these, whoever asks: the REST service, the command
line, the web page, the observer's repairs and the schedules. Fields are checked here as far as that
needs no look at the store; what does is checked where the request is submitted.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from vmlab.machine.fields import Flag, Name, Whole
from vmlab.machine.sizes import Size
from vmlab.machine.spec import MOST_VCPUS

Policy = Literal["report", "adopt", "reconcile", "quarantine"]
"""What the observer does about a finding."""

FindingCode = Literal[
    "machine-state-mismatch",
    "orphan-process",
    "orphan-machine",
    "missing-disk",
    "orphan-disk",
    "disk-attachment-mismatch",
    "disk-size-mismatch",
    "address-conflict",
    "leaked-address",
    "lost-interface",
    "stale-lock",
    "guest-agent-unreachable",
    "clock-drift",
    "storage-low",
]
"""What the observer can find: `vmlab.manager.observer.difference.CODES` says what each means."""


def _of_a_year(moment: datetime) -> datetime:
    """A time that is one in UTC as well; one without a zone is refused elsewhere, if at all."""
    try:
        return moment if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("in UTC it is not of the years 1 to 9999") from None


Moment = Annotated[datetime, AfterValidator(_of_a_year)]
"""A time that somebody names."""


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Metadata(_Request):
    """What cloud-init, or the guest that asks the metadata service, is told."""

    hostname: Name | None = Field(None, description="the guest's name; the machine's if left out")
    user_data: str | None = Field(None, max_length=1 << 16, description="cloud-init's user-data")
    ssh_keys: tuple[str, ...] = Field((), description="public keys that may log in")
    instance: Whole = Field(
        0,
        ge=0,
        le=1 << 31,
        description="part of the instance id: with a higher one cloud-init begins anew at the next "
        "start; raised by one where `user_data` or `ssh_keys` change",
    )


class NewNic(_Request):
    """One network interface of a machine that is to be."""

    network: str = Field("user", description='name or id of a network, "user" or "none"')
    name: Name | None = Field(None, description='name of the NIC; "net0", "net1", ... if left out')
    mac: str | None = Field(None, description="MAC address; an own one if left out")
    address: str | None = Field(None, description="address; the first free one if left out")


class MachinePolicy(_Request):
    """How the manager looks after a machine."""

    autostart: Flag = Field(
        False,
        description="whether the manager starts it again when it begins, unless it was stopped",
    )
    fallback: tuple[str, ...] = Field(
        (), description="hypervisor hosts to try when its own cannot take it"
    )
    release_addresses: Literal["stop", "delete"] = Field(
        "delete", description="when its addresses are free again"
    )
    findings: dict[FindingCode, Policy] = Field(
        default_factory=dict, description="what to do about findings of this machine, by code"
    )
    snapshot_every: timedelta | None = Field(
        None,
        ge=timedelta(seconds=1),
        le=timedelta(days=3650),
        description="interval of scheduled snapshots, up to ten years; none if left out",
    )
    snapshot_keep: Whole = Field(3, ge=1, description="scheduled snapshots that are kept")


class _OnMachine(_Request):
    machine: str = Field(min_length=1, description="name or id of the machine")


class CreateMachine(_Request):
    """Make a machine from a template, an image or a whole specification."""

    kind: Literal["machine.create"] = "machine.create"
    name: Name | None = Field(None, description="name; an own one if left out")
    template: str | None = Field(None, description="template to start from")
    image: str | None = Field(None, description="image to boot, by name")
    spec: dict[str, Any] | None = Field(None, description="a whole machine specification")
    host: str | None = Field(None, description="hypervisor host; the preferred one if left out")
    vcpus: Whole | None = Field(None, ge=1, le=MOST_VCPUS, description="number of vCPUs")
    memory: Size | None = Field(None, description="memory")
    disks: tuple[str, ...] = Field((), description="disks to attach, by name or id")
    nics: tuple[NewNic, ...] = Field((), description="network interfaces")
    labels: dict[str, str] = Field(default_factory=dict, description="what to find it by")
    policy: MachinePolicy = Field(default_factory=MachinePolicy, description="how it is kept")
    metadata: Metadata = Field(default_factory=Metadata, description="what its guest is told")
    start: Flag = Field(False, description="start it, too")


class UpdateMachine(_OnMachine):
    """Change what is known of a machine: its name, labels, policy or metadata."""

    kind: Literal["machine.update"] = "machine.update"
    name: Name | None = None
    labels: dict[str, str] | None = None
    policy: MachinePolicy | None = None
    metadata: Metadata | None = None


class StartMachine(_OnMachine):
    """Boot it."""

    kind: Literal["machine.start"] = "machine.start"


class StopMachine(_OnMachine):
    """Shut it down: power button, then an end to its process, then kill; each step is told."""

    kind: Literal["machine.stop"] = "machine.stop"
    graceful: Flag = Field(True, description="ask the guest first")
    timeout: float = Field(30.0, gt=0, le=3600, description="seconds that the guest is given")


class RestartMachine(_OnMachine):
    """Boot it again."""

    kind: Literal["machine.restart"] = "machine.restart"
    graceful: Flag = True


class PauseMachine(_OnMachine):
    """Stop its vCPUs."""

    kind: Literal["machine.pause"] = "machine.pause"


class ResumeMachine(_OnMachine):
    """Let its vCPUs run on."""

    kind: Literal["machine.resume"] = "machine.resume"


class ResizeMachine(_OnMachine):
    """Change its vCPUs and memory."""

    kind: Literal["machine.resize"] = "machine.resize"
    vcpus: Whole | None = Field(None, ge=1, le=MOST_VCPUS)
    memory: Size | None = None


class DeleteMachine(_OnMachine):
    """Remove it with the storage that is its own; disks of the store are detached and stay."""

    kind: Literal["machine.delete"] = "machine.delete"
    force: Flag = Field(False, description="kill it first if it is live")


class SnapshotMachine(_OnMachine):
    """Save its disks, and its memory if it is live and its hypervisor can."""

    kind: Literal["machine.snapshot"] = "machine.snapshot"
    name: Name
    memory: Flag | None = None
    expires: Moment | None = Field(None, description="when it may be removed")
    scheduled: Flag = Field(False, description="taken by the machine's own schedule")


class DeleteSnapshot(_OnMachine):
    """Remove a snapshot."""

    kind: Literal["snapshot.delete"] = "snapshot.delete"
    name: Name


class RestoreMachine(_OnMachine):
    """Bring a snapshot back."""

    kind: Literal["machine.restore"] = "machine.restore"
    snapshot: Name


class CloneMachine(_OnMachine):
    """Make a second one of it: from a snapshot, or as it is now."""

    kind: Literal["machine.clone"] = "machine.clone"
    name: Name | None = None
    snapshot: Name | None = None


class MigrateMachine(_OnMachine):
    """Move it to another host of the same hypervisor."""

    kind: Literal["machine.migrate"] = "machine.migrate"
    host: str
    live: Flag | None = None


class ExportMachine(_OnMachine):
    """Write a machine at rest, with its disks, to one file (tar)."""

    kind: Literal["machine.export"] = "machine.export"
    path: Name = Field(
        description="name of the new file, in the manager's directory of exports; "
        'one of "once-" and 16 hexadecimal digits is removed a week after it was written'
    )


class ImportMachine(_Request):
    """Make a machine of an exported file."""

    kind: Literal["machine.import"] = "machine.import"
    path: Name = Field(description="name of the file, in the manager's directory of exports")
    name: Name | None = None


class EmergencyStop(_Request):
    """Kill every live machine of a host, of a label or all, and say what was done."""

    kind: Literal["emergency.stop"] = "emergency.stop"
    host: str | None = None
    label: str | None = Field(None, description='"key" or "key=value"')


class CreateDisk(_Request):
    """Make a disk of the store's own."""

    kind: Literal["disk.create"] = "disk.create"
    name: Name
    size: Size | None = Field(None, description="size; that of `source` if left out")
    source: str | None = Field(None, description="disk of the store that it is a copy of")
    format: Literal["raw", "qcow2"] = "raw"
    mount_point: str | None = Field(
        None, max_length=4096, description="where a guest is expected to have it"
    )


class _OnDisk(_Request):
    disk: str = Field(min_length=1, description="name or id of the disk")


class AttachDisk(_OnDisk):
    """Give it to a machine, running or at rest."""

    kind: Literal["disk.attach"] = "disk.attach"
    machine: str
    bus: Literal["virtio", "scsi"] | None = Field(
        None, description="bus; one that a running machine lets go of if left out"
    )
    readonly: Flag = False
    mount_point: str | None = Field(None, description="where its guest is expected to have it")


class DetachDisk(_OnDisk):
    """Take it from its machine."""

    kind: Literal["disk.detach"] = "disk.detach"


class ResizeDisk(_OnDisk):
    """Grow it."""

    kind: Literal["disk.resize"] = "disk.resize"
    size: Size


class DeleteDisk(_OnDisk):
    """Remove it: refused while a live machine has it, detached first from one at rest."""

    kind: Literal["disk.delete"] = "disk.delete"


class CreateNetwork(_Request):
    """Make a network."""

    kind: Literal["network.create"] = "network.create"
    name: Name
    mode: Literal["isolated", "user", "bridged"] = "isolated"
    vlan: Whole | None = Field(None, ge=1, le=4094, description="VLAN tag (IEEE 802.1Q)")
    bridge: str | None = Field(None, pattern=r"^[a-zA-Z0-9_.-]{1,15}$", description="bridge")
    subnet: IPv4Network | None = Field(None, description="IPv4 addresses of the network")
    subnet6: IPv6Network | None = Field(None, description="IPv6 addresses of the network")
    gateway: str | None = Field(None, description="gateway; the first address if left out")
    dns: tuple[str, ...] = Field(
        (), max_length=16, description="DNS servers that machines are told"
    )
    ranges: tuple[str, ...] = Field((), description='"FIRST-LAST" that addresses are taken from')
    reserved: tuple[str, ...] = Field((), description="addresses that are never given")
    dhcp: Flag = Field(True, description="whether machines get their addresses by DHCP")


class DeleteNetwork(_Request):
    """Remove a network that no machine is on."""

    kind: Literal["network.delete"] = "network.delete"
    network: str


class CreateTemplate(_Request):
    """Keep a specification under a name, for machines to be made of."""

    kind: Literal["template.create"] = "template.create"
    name: Name
    image: str | None = None
    vcpus: Whole = Field(1, ge=1, le=MOST_VCPUS)
    memory: Size = Field(512 << 20, validate_default=True)
    spec: dict[str, Any] | None = None
    labels: dict[str, str] = Field(default_factory=dict)


class DeleteTemplate(_Request):
    """Remove a template that no machine was made of."""

    kind: Literal["template.delete"] = "template.delete"
    template: str


class RepairFinding(_Request):
    """Do something about a finding of the observer's."""

    kind: Literal["finding.repair"] = "finding.repair"
    finding: str = Field(description="id of the finding")
    action: Policy
    name: str | None = Field(
        None, description="what is to be removed, typed once more; needed where data would go"
    )
    undo: Flag = Field(False, description="put back what that repair has done, where it can be")


Request = Annotated[
    CreateMachine
    | UpdateMachine
    | StartMachine
    | StopMachine
    | RestartMachine
    | PauseMachine
    | ResumeMachine
    | ResizeMachine
    | DeleteMachine
    | SnapshotMachine
    | DeleteSnapshot
    | RestoreMachine
    | CloneMachine
    | MigrateMachine
    | ExportMachine
    | ImportMachine
    | EmergencyStop
    | CreateDisk
    | AttachDisk
    | DetachDisk
    | ResizeDisk
    | DeleteDisk
    | CreateNetwork
    | DeleteNetwork
    | CreateTemplate
    | DeleteTemplate
    | RepairFinding,
    Field(discriminator="kind"),
]

REQUEST: TypeAdapter[Request] = TypeAdapter(Request)
"""Reads and writes a request of any kind."""
