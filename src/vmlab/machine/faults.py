"""What can be broken, when and how, as data.

The same fault goes to the simulator, to the embedded engine's devices and to a real QEMU; each
declares in its capabilities which kinds it can inject. A schedule is a list of faults with a
seed: the same schedule and seed break the same things at the same moments.
"""

from __future__ import annotations

import random
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from vmlab.machine.documents import parse_document, read_document
from vmlab.machine.events import EventType
from vmlab.machine.fields import Flag, Name, Number, Whole, Wrong, one_of
from vmlab.machine.sizes import Size
from vmlab.machine.states import OPERATIONS


class FaultKind(StrEnum):
    """The kinds of fault, by the names that schedules and capabilities use."""

    DISK_ERROR = "disk-error"
    DISK_SLOW = "disk-slow"
    DISK_TORN_WRITE = "disk-torn-write"
    DISK_CORRUPT = "disk-corrupt"
    POWER_CUT = "power-cut"
    NET_LOSS = "net-loss"
    NET_DELAY = "net-delay"
    NET_PARTITION = "net-partition"
    PAUSE = "pause"
    KILL = "kill"
    MEMORY_PRESSURE = "memory-pressure"
    CLOCK_JUMP = "clock-jump"
    CPU_STALL = "cpu-stall"
    OPERATION_FAILURE = "operation-failure"
    OPERATION_HANG = "operation-hang"
    OPERATION_PARTIAL = "operation-partial"
    LOST_EVENT = "lost-event"
    STALE_STATUS = "stale-status"
    HYPERVISOR_CRASH = "hypervisor-crash"


class _Model(BaseModel):
    # Built when it is first used: that takes as long as importing all the rest of this package.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


def _known(*names: str) -> tuple[BeforeValidator, WithJsonSchema]:
    """Text that is one of `names`."""
    return BeforeValidator(one_of(names)), WithJsonSchema({"type": "string", "enum": [*names]})


_Operation = Annotated[str, *_known("any", "create", "create_from", "status", *OPERATIONS)]
_Event = Annotated[str, *_known("any", *(event.value for event in EventType))]


class At(_Model):
    """Once, `seconds` after the schedule was armed."""

    on: Literal["time"] = Field("time", description="which trigger this is")
    seconds: Number = Field(ge=0, description="seconds after arming")


class Nth(_Model):
    """At the nth matching occasion (the nth write, the nth start), counted from 1."""

    on: Literal["nth"] = Field("nth", description="which trigger this is")
    n: Whole = Field(ge=1, description="which occasion, counted from 1")
    every: Flag = Field(False, description="at every nth occasion, not only at the first")


class Chance(_Model):
    """At each matching occasion with a probability, drawn from the schedule's seed."""

    on: Literal["chance"] = Field("chance", description="which trigger this is")
    probability: Number = Field(ge=0, le=1, description="0 is never, 1 is always")


class ConsoleText(_Model):
    """When the console has printed a text."""

    on: Literal["console"] = Field("console", description="which trigger this is")
    text: str = Field(min_length=1, description="text that the console has printed")


COUNTED = (Nth, Chance)
"""The triggers that need somebody who counts the occasions."""

Trigger = Annotated[At | Nth | Chance | ConsoleText, Field(discriminator="on")]


class _Fault(_Model):
    id: str = Field("", description="name in the report; made from kind and position if empty")
    machine: Name | None = Field(None, description="name of the machine; None is any")
    when: Trigger = Field(
        default_factory=lambda: At(seconds=0), description="when it happens; at once if left out"
    )
    duration: Number | None = Field(
        None, gt=0, description="seconds that it lasts; None is until it is cleared"
    )
    seed: Whole | None = Field(
        None, ge=0, lt=1 << 64, description="source of its own chances; None leaves that open"
    )


class DiskError(_Fault):
    """Requests to a disk fail with an I/O error."""

    kind: Literal[FaultKind.DISK_ERROR] = FaultKind.DISK_ERROR
    disk: Name = Field(description="name of the disk")
    operation: Literal["read", "write", "flush", "any"] = Field(
        "any", description="requests that fail"
    )
    errno: Literal["EIO", "ENOSPC"] = Field("EIO", description="the error that the guest sees")


class DiskSlow(_Fault):
    """Requests to a disk take longer."""

    kind: Literal[FaultKind.DISK_SLOW] = FaultKind.DISK_SLOW
    disk: Name = Field(description="name of the disk")
    delay: Number = Field(gt=0, description="seconds added to each request")


class DiskTornWrite(_Fault):
    """Only the first bytes of a write reach the disk, which reports success."""

    kind: Literal[FaultKind.DISK_TORN_WRITE] = FaultKind.DISK_TORN_WRITE
    disk: Name = Field(description="name of the disk")
    keep: Size = Field(512, description="bytes that are written")


class DiskCorrupt(_Fault):
    """Bytes of a disk change silently."""

    kind: Literal[FaultKind.DISK_CORRUPT] = FaultKind.DISK_CORRUPT
    disk: Name = Field(description="name of the disk")
    offset: Size = Field(0, description="first byte that changes")
    length: Size = Field(1, ge=1, description="bytes that change")


class PowerCut(_Fault):
    """The machine loses power: every write without a completed flush is dropped."""

    kind: Literal[FaultKind.POWER_CUT] = FaultKind.POWER_CUT
    restart: Flag = Field(False, description="start the machine again at once")


class NetLoss(_Fault):
    """Packets of a NIC are dropped."""

    kind: Literal[FaultKind.NET_LOSS] = FaultKind.NET_LOSS
    nic: Name = Field(description="name of the NIC")
    ratio: Number = Field(1.0, ge=0, le=1, description="share of the packets that are lost")


class NetDelay(_Fault):
    """Packets of a NIC arrive later."""

    kind: Literal[FaultKind.NET_DELAY] = FaultKind.NET_DELAY
    nic: Name = Field(description="name of the NIC")
    delay: Number = Field(gt=0, description="seconds")
    jitter: Number = Field(0, ge=0, description="seconds more, at the most")


class NetPartition(_Fault):
    """A NIC's link is down."""

    kind: Literal[FaultKind.NET_PARTITION] = FaultKind.NET_PARTITION
    nic: Name = Field(description="name of the NIC")


class PauseFault(_Fault):
    """The machine's vCPUs stand still."""

    kind: Literal[FaultKind.PAUSE] = FaultKind.PAUSE


class KillFault(_Fault):
    """The machine dies at once, as its process would by SIGKILL."""

    kind: Literal[FaultKind.KILL] = FaultKind.KILL


class MemoryPressure(_Fault):
    """The guest is left with less memory."""

    kind: Literal[FaultKind.MEMORY_PRESSURE] = FaultKind.MEMORY_PRESSURE
    leave: Size = Field(description="bytes that the guest keeps")


class ClockJump(_Fault):
    """The guest's clock is set forward or back."""

    kind: Literal[FaultKind.CLOCK_JUMP] = FaultKind.CLOCK_JUMP
    seconds: Number = Field(description="seconds; negative is back")


class CpuStall(_Fault):
    """One vCPU stands still while the others run."""

    kind: Literal[FaultKind.CPU_STALL] = FaultKind.CPU_STALL
    vcpu: Whole = Field(0, ge=0, description="number of the vCPU, from 0")


class _OperationFault(_Fault):
    operation: _Operation = Field("any", description='an operation of the contract, or "any"')


class OperationFailure(_OperationFault):
    """An operation fails before it has any effect."""

    kind: Literal[FaultKind.OPERATION_FAILURE] = FaultKind.OPERATION_FAILURE
    message: str = Field("injected failure", description="what the error says")


class OperationHang(_OperationFault):
    """An operation never returns; its deadline ends it."""

    kind: Literal[FaultKind.OPERATION_HANG] = FaultKind.OPERATION_HANG


class OperationPartial(_OperationFault):
    """An operation fails after its side effect has happened."""

    kind: Literal[FaultKind.OPERATION_PARTIAL] = FaultKind.OPERATION_PARTIAL
    message: str = Field("injected failure after the effect", description="what the error says")


class LostEvent(_Fault):
    """An event of the hypervisor's does not arrive."""

    kind: Literal[FaultKind.LOST_EVENT] = FaultKind.LOST_EVENT
    event: _Event = Field("any", description='an event type, or "any"')


class StaleStatus(_Fault):
    """The hypervisor answers a status query with what was true before."""

    kind: Literal[FaultKind.STALE_STATUS] = FaultKind.STALE_STATUS
    age: Number = Field(1.0, gt=0, description="seconds that the answer is old")


class HypervisorCrash(_Fault):
    """The hypervisor itself dies; its machines live on, orphaned."""

    kind: Literal[FaultKind.HYPERVISOR_CRASH] = FaultKind.HYPERVISOR_CRASH
    restart_after: Number | None = Field(None, ge=0, description="seconds until it is back")


Fault = Annotated[
    DiskError
    | DiskSlow
    | DiskTornWrite
    | DiskCorrupt
    | PowerCut
    | NetLoss
    | NetDelay
    | NetPartition
    | PauseFault
    | KillFault
    | MemoryPressure
    | ClockJump
    | CpuStall
    | OperationFailure
    | OperationHang
    | OperationPartial
    | LostEvent
    | StaleStatus
    | HypervisorCrash,
    Field(discriminator="kind"),
]
"""Any fault; `kind` tells which."""


class FaultSchedule(_Model):
    """Faults and the seed that all their chances are drawn from."""

    seed: Whole = Field(0, ge=0, lt=1 << 64, description="source of all its chances")
    faults: tuple[Fault, ...] = Field((), description="what is broken")

    @model_validator(mode="after")
    def _name_faults(self) -> Self:
        """Give every fault an id of its own; ids that were given have to differ."""
        seen: set[str] = set()
        named: list[Fault] = []
        for position, fault in enumerate(self.faults, 1):
            identity = fault.id or f"{fault.kind.value}-{position}"
            if identity in seen:
                raise Wrong(f"faults.{position - 1}.id", identity, "an id that no other fault has")
            seen.add(identity)
            named.append(fault.model_copy(update={"id": identity}))
        object.__setattr__(self, "faults", tuple(named))
        return self

    def random(self, fault: str) -> random.Random:
        """The random numbers of one fault: they depend on seed and id, not on other faults."""
        return random.Random(f"{self.seed}/{fault}")

    @classmethod
    def load(cls, source: Path) -> FaultSchedule:
        """Read a schedule from a TOML or JSON file.

        Raises:
            InvalidSpec: naming file, field, value and what would be right.
        """
        return read_document(cls, source)

    @classmethod
    def parse(
        cls, text: str | bytes, *, form: str = "toml", source: str | None = None
    ) -> FaultSchedule:
        """Read a schedule from text in `form` "toml" or "json".

        Raises:
            InvalidSpec: naming field, value and what would be right.
        """
        return parse_document(cls, text, form=form, source=source)
