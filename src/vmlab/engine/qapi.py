"""The types of QMP's commands and events: what commands are given and answer, what events carry.

Names and members are QEMU's where QEMU has them (qapi/*.json); the commands are in
vmlab.engine.control.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from vmlab.engine.structures import spelled


class RunState(Enum):
    """What the machine is doing (QEMU's RunState)."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    DEBUG = "debug"
    SHUTDOWN = "shutdown"
    INTERNAL_ERROR = "internal-error"


class Cause(Enum):
    """Why a machine is shut down or reset (QEMU's ShutdownCause)."""

    HOST_QMP_QUIT = "host-qmp-quit"
    HOST_QMP_SYSTEM_RESET = "host-qmp-system-reset"
    HOST_SIGNAL = "host-signal"
    GUEST_SHUTDOWN = "guest-shutdown"
    GUEST_RESET = "guest-reset"
    GUEST_PANIC = "guest-panic"


@dataclass(frozen=True)
class StatusInfo:
    """Of query-status."""

    running: bool
    status: RunState


@dataclass(frozen=True)
class VersionTriple:
    """Three numbers."""

    major: int
    minor: int
    micro: int


@dataclass(frozen=True)
class VersionInfo:
    """Of query-version."""

    qemu: VersionTriple
    package: str


@dataclass(frozen=True)
class NameInfo:
    """Of query-name."""

    name: str


@dataclass(frozen=True)
class KvmInfo:
    """Of query-kvm."""

    enabled: bool
    present: bool


@dataclass(frozen=True)
class CpuInfo:
    """Of query-cpus-fast."""

    cpu_index: int
    thread_id: int


@dataclass(frozen=True)
class MemoryInfo:
    """Of query-memory-size-summary, in bytes."""

    base_memory: int
    plugged_memory: int = 0


@dataclass(frozen=True)
class ExecutionInfo:
    """Of x-query-execution: who executes the guest, and how many instructions it has retired."""

    executor: str
    retired: int


@dataclass(frozen=True)
class HartInfo:
    """Of x-query-harts: what a hart did since it was reset.

    Attributes:
        retired: Instructions.
        walks: Of page tables.
        fills: Of the TLB.
        flushes: Of the TLB, by sfence.vma.
        exits: How often it left native code, by reason.
    """

    hart: int
    pc: int
    retired: int
    walks: int
    fills: int
    flushes: int
    exits: list[ExitCount]


@dataclass(frozen=True)
class ForwardInfo:
    """A port of the host that leads into the guest."""

    protocol: str
    address: str
    host: int
    guest: int


@dataclass(frozen=True)
class NicInfo:
    """Of x-query-networks: a NIC, what went through it in frames and bytes, and its forwards."""

    name: str
    mac: str
    link: bool
    received: int
    received_bytes: int
    sent: int
    sent_bytes: int
    dropped: int
    forwards: list[ForwardInfo]


@dataclass(frozen=True)
class ExitCount:
    """How often something happened."""

    reason: str
    count: int


@dataclass(frozen=True)
class TargetInfo:
    """Of query-target: what kind of machine it is."""

    arch: str


@dataclass(frozen=True)
class ImageInfo:
    """An image of a block node, and the bytes of the disk in it."""

    filename: str
    format: str
    virtual_size: int


@dataclass(frozen=True)
class BlockDeviceInfo:
    """A block node that is in a device."""

    file: str
    node_name: str
    drv: str
    ro: bool
    image: ImageInfo


@dataclass(frozen=True)
class BlockInfo:
    """Of query-block: a disk that the guest sees.

    Attributes:
        device: A name that nobody gives any more.
        qdev: The device's id, or the path of what is behind it.
        type: Of no meaning either.
        removable: Whether its medium can be taken out.
        locked: Whether the guest has locked it.
        inserted: What is in it.
    """

    device: str
    qdev: str
    type: str
    removable: bool
    locked: bool
    inserted: BlockDeviceInfo


@dataclass(frozen=True)
class BlockDeviceStats:
    """What went through a disk since it was opened."""

    rd_bytes: int = spelled("rd_bytes")
    wr_bytes: int = spelled("wr_bytes")
    rd_operations: int = spelled("rd_operations")
    wr_operations: int = spelled("wr_operations")
    flush_operations: int = spelled("flush_operations")
    failed_rd_operations: int = spelled("failed_rd_operations")
    failed_wr_operations: int = spelled("failed_wr_operations")
    failed_flush_operations: int = spelled("failed_flush_operations")


@dataclass(frozen=True)
class BlockStats:
    """Of query-blockstats: a disk."""

    device: str
    qdev: str
    node_name: str
    stats: BlockDeviceStats


@dataclass(frozen=True)
class ChardevInfo:
    """Of query-chardev: a console or a channel; the label of a channel is its name in the guest."""

    label: str
    filename: str
    frontend_open: bool


@dataclass(frozen=True)
class BalloonInfo:
    """Of query-balloon: the memory that the guest has, in bytes."""

    actual: int


@dataclass(frozen=True)
class FileOptions:
    """Where a block node lies."""

    driver: FileDriver
    filename: str


class FileDriver(Enum):
    """What a block node lies in."""

    FILE = "file"


class DeviceDriver(Enum):
    """What can be plugged in while the machine runs."""

    SCSI_HD = "scsi-hd"


@dataclass(frozen=True)
class Shutdown:
    """Data of SHUTDOWN and RESET."""

    guest: bool
    reason: Cause


@dataclass(frozen=True)
class Panicked:
    """Data of GUEST_PANICKED."""

    action: str
    info: str


@dataclass(frozen=True)
class Deleted:
    """Data of DEVICE_DELETED."""

    device: str
    path: str
