"""What happened to machines: typed, numbered, with the machine, the operation and the time.

Numbers are per hypervisor, begin at 1 and have no gaps, so that a reader who missed one knows it.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class EventType(StrEnum):
    """What kind of thing happened; the data of each kind stands beside it."""

    STATE = "state"  # from, to, reason
    CREATED = "created"  # owner
    DELETED = "deleted"
    OPERATION_STARTED = "operation-started"  # timeout
    OPERATION_FINISHED = "operation-finished"  # seconds
    OPERATION_FAILED = "operation-failed"  # error, seconds
    SNAPSHOT_TAKEN = "snapshot-taken"  # snapshot
    SNAPSHOT_DELETED = "snapshot-deleted"  # snapshot
    RESTORED = "restored"  # snapshot
    FORKED = "forked"  # into
    MIGRATED = "migrated"  # to
    MIGRATION_PROGRESS = "migration-progress"  # transferred_bytes, total_bytes
    DISK_PLUGGED = "disk-plugged"  # disk
    DISK_UNPLUGGED = "disk-unplugged"  # disk
    DISK_RESIZED = "disk-resized"  # disk, size
    NIC_PLUGGED = "nic-plugged"  # nic
    NIC_UNPLUGGED = "nic-unplugged"  # nic
    RESIZED = "resized"  # vcpus, memory
    PINNED = "pinned"  # pinning
    GUEST_SHUTDOWN = "guest-shutdown"  # reason
    GUEST_RESET = "guest-reset"  # reason
    GUEST_PANIC = "guest-panic"  # reason
    CRASHED = "crashed"  # reason
    FAULT_INJECTED = "fault-injected"  # fault
    FAULT_CLEARED = "fault-cleared"  # fault
    ADOPTED = "adopted"  # owner
    HYPERVISOR_LOST = "hypervisor-lost"  # reason
    HYPERVISOR_BACK = "hypervisor-back"


class Event(BaseModel):
    """One thing that happened.

    `sequence` is the hypervisor's own count; `time` is seconds on the hypervisor's clock (Unix
    time, or virtual time where the clock is virtual); `operation` is the id that ties the events
    of one operation together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    sequence: int = Field(ge=1)
    time: float
    type: EventType
    hypervisor: str
    machine: str | None = Field(None, description="id of the machine")
    name: str | None = Field(None, description="name of the machine")
    operation: str | None = Field(None, description='id of the operation, such as "start-17"')
    data: dict[str, JsonValue] = Field(default_factory=dict)
