"""What a watchdog tells of: an incident is something that happened to a machine, with its evidence.

Which kinds there are is fixed here; which of them fail a test is said by `Rules`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final


class IncidentKind(StrEnum):
    """What happened to a machine."""

    PANIC = "panic"
    OOPS = "oops"
    BUG = "bug"
    WARN = "warn"
    SOFT_LOCKUP = "soft-lockup"
    HARD_LOCKUP = "hard-lockup"
    RCU_STALL = "rcu-stall"
    HUNG_TASK = "hung-task"
    OOM_KILL = "oom-kill"
    SANITIZER = "sanitizer"  # KASAN, KFENCE, KCSAN, KMSAN, UBSAN
    LOCKDEP = "lockdep"
    PATTERN = "pattern"  # a rule of the user's own
    SILENCE = "silence"
    UNEXPECTED_REBOOT = "unexpected-reboot"
    UNEXPECTED_EXIT = "unexpected-exit"
    UNEXPECTED_PAUSE = "unexpected-pause"  # its hypervisor stopped it: a full or broken host disk
    HYPERVISOR_LOST = "hypervisor-lost"


FATAL = frozenset(
    {
        IncidentKind.PANIC,
        IncidentKind.SILENCE,
        IncidentKind.UNEXPECTED_EXIT,
        IncidentKind.UNEXPECTED_PAUSE,
        IncidentKind.HYPERVISOR_LOST,
    }
)
"""Kinds after which the machine is of no use to anybody."""

STALLS = frozenset({IncidentKind.SOFT_LOCKUP, IncidentKind.RCU_STALL, IncidentKind.HUNG_TASK})
"""Kinds that a host which stood still can cause in a guest that is well."""


@dataclass(frozen=True, slots=True)
class Incident:
    """One thing that happened to a machine.

    Attributes:
        kind: What it was.
        machine: Name of the machine.
        message: It in a line: the kernel's own words, or what the hypervisor said.
        excerpt: The whole report of the kernel's from its console; empty if there is none.
        at: When it was noticed.
        fatal: Whether the machine is of no use any more.
        rule: Name of the user's own rule that found it, if one did.
        host_stall_s: Seconds for which this host stood still shortly before.
    """

    kind: IncidentKind
    machine: str
    message: str
    excerpt: str = ""
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    fatal: bool = False
    rule: str = ""
    host_stall_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.machine}: {self.kind.value}: {self.message}"


_TIMES: Final = re.compile(r"stuck for (\d+)s|for more than (\d+) seconds")
_SOONEST_S: Final = 20.0
"""Seconds after which a kernel complains at the earliest (2 x watchdog_thresh of 10)."""


def stall_that_explains(incident: Incident) -> bool:
    """Whether the host stood still for so long that the guest cannot help what it complains of.

    Half of the time that the guest complains of is enough: its own limit is never reached by the
    other half alone.
    """
    match = _TIMES.search(incident.message)
    told = float(match[1] or match[2]) if match else 0.0
    return incident.host_stall_s >= max(told, _SOONEST_S) / 2
