"""Why an executor returned to its host, after KVM's kvm_run."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Reason(IntEnum):
    """What the host is to do."""

    BUDGET = 1  # nothing: as many instructions retired as it asked for
    REQUEST = 2  # what it wanted when it asked the hart to stop
    WAIT = 3  # sleep until an interrupt is pending
    READ = 4  # let a device answer a load
    WRITE = 5  # let a device take a store
    FIRMWARE_CALL = 6  # answer a call from S mode
    BREAKPOINT = 7  # a breakpoint's instruction is next
    TRAP_LOOP = 8  # the guest traps without end and retires nothing
    # Within an executor:
    CODE = 9  # a page has no decode records
    NOTES = 10  # pages that somebody watches were written
    # For a debugger again:
    WATCHPOINT = 11  # an instruction has accessed what is watched


class Exit(NamedTuple):
    """A return from `run`.

    For READ and WRITE: the physical address, the size in bytes, and for WRITE the data. The
    instruction has retired; a READ is completed with `Hart.complete_read`, once, before the next
    `run`. For WATCHPOINT: the virtual address, the size, and the kinds of access (WATCH_READS,
    WATCH_WRITES); the instruction has retired.
    """

    reason: Reason
    address: int = 0
    size: int = 0
    data: int = 0
