"""What a running machine uses, with units: seconds, bytes, counts.

Counters never decrease while a machine lives; gauges are marked as such in `UNITS`. What a
hypervisor cannot measure is None, never zero. Names follow the Prometheus habit of carrying the
unit.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CpuMetrics(BaseModel):
    """Processor time of the vCPUs."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    seconds: float = Field(ge=0, description="CPU seconds of all vCPUs together")
    per_vcpu_seconds: tuple[float, ...] = Field((), description="CPU seconds of each vCPU")
    instructions: int | None = Field(None, ge=0, description="instructions retired, if counted")


class MemoryMetrics(BaseModel):
    """Memory, in bytes; all of these are gauges."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    total_bytes: int = Field(ge=0, description="what the guest was given")
    resident_bytes: int | None = Field(None, ge=0, description="what of it the host holds")
    balloon_bytes: int | None = Field(None, ge=0, description="what the balloon leaves the guest")


class DiskMetrics(BaseModel):
    """One disk's traffic since the machine started."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    name: str
    read_bytes: int = Field(ge=0)
    written_bytes: int = Field(ge=0)
    reads: int = Field(ge=0)
    writes: int = Field(ge=0)
    flushes: int | None = Field(None, ge=0)
    errors: int | None = Field(None, ge=0)


class NicMetrics(BaseModel):
    """One network interface's traffic since the machine started, as the guest sees it."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    name: str
    received_bytes: int = Field(ge=0)
    sent_bytes: int = Field(ge=0)
    received_packets: int = Field(ge=0)
    sent_packets: int = Field(ge=0)
    dropped_packets: int | None = Field(None, ge=0)


class MachineMetrics(BaseModel):
    """What one machine uses at one moment."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    time: float = Field(description="seconds on the hypervisor's clock when this was measured")
    uptime_seconds: float = Field(ge=0, description="seconds since the machine started")
    cpu: CpuMetrics
    memory: MemoryMetrics
    disks: tuple[DiskMetrics, ...] = ()
    nics: tuple[NicMetrics, ...] = ()


Kind = Literal["counter", "gauge"]
UNITS: dict[str, tuple[Kind, str]] = {
    "uptime_seconds": ("counter", "s"),
    "cpu.seconds": ("counter", "s"),
    "cpu.per_vcpu_seconds": ("counter", "s"),
    "cpu.instructions": ("counter", "1"),
    "memory.total_bytes": ("gauge", "By"),
    "memory.resident_bytes": ("gauge", "By"),
    "memory.balloon_bytes": ("gauge", "By"),
    "disks.read_bytes": ("counter", "By"),
    "disks.written_bytes": ("counter", "By"),
    "disks.reads": ("counter", "1"),
    "disks.writes": ("counter", "1"),
    "disks.flushes": ("counter", "1"),
    "disks.errors": ("counter", "1"),
    "nics.received_bytes": ("counter", "By"),
    "nics.sent_bytes": ("counter", "By"),
    "nics.received_packets": ("counter", "1"),
    "nics.sent_packets": ("counter", "1"),
    "nics.dropped_packets": ("counter", "1"),
}
"""Each metric's kind and its unit in UCUM spelling ("By" is bytes, "1" a plain count)."""
