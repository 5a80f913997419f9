"""Whether there is room: quotas of the manager, limits of hosts, and what this host has.

What is in use follows from the store: vCPUs and memory of machines that are live, or of which
nothing is known; all machines that are there; sizes of all disks. Beside that stand reservations:
what an operation was promised when it was taken down, until its machine has it or it has ended. So
whatever ends an operation or a machine gives back what it had, and nothing is given twice.

A live machine that moves is one machine: by the manager's quotas it counts once. Where it is and
where it is to be it counts on either host, and twice on this computer, which has both of its
memories until it has arrived.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from vmlab.hypervisors.host_memory import host_memory
from vmlab.machine.errors import ResourceExhausted
from vmlab.machine.sizes import MIB, format_size
from vmlab.machine.states import LIVE, MachineState
from vmlab.manager.settings import Settings
from vmlab.manager.store.tables import (
    DiskRow,
    HostRow,
    MachineRow,
    OperationRow,
    ReservationRow,
)

__all__ = ["Need", "drop_reservation", "in_use", "reserve"]

_HOLDING: Final = tuple(sorted(state.value for state in LIVE | {MachineState.UNKNOWN}))
"""States in which a machine may have its memory."""
_VCPUS_PER_CPU: Final = 16
"""vCPUs of live machines for each CPU of this host (Nova's cpu_allocation_ratio)."""
_MARGIN: Final = 512 * MIB
"""Memory of this host that no machine gets, or a sixteenth of it if that is less."""
_SIMULATED: Final = "simulated"
"""The hypervisor whose machines take up nothing of this host."""


@dataclass(frozen=True, slots=True)
class Need:
    """What something takes up; `memory` and `disk` are bytes."""

    machines: int = 0
    vcpus: int = 0
    memory: int = 0
    disk: int = 0

    def __add__(self, other: Need) -> Need:
        return Need(
            self.machines + other.machines,
            self.vcpus + other.vcpus,
            self.memory + other.memory,
            self.disk + other.disk,
        )


def in_use(
    session: Session, *, host: str | None = None, real: bool = False, besides: str | None = None
) -> Need:
    """What is taken up and promised.

    Args:
        session: Of a transaction.
        host: By machines on that host alone.
        real: By machines alone that take up something of this host.
        besides: Id of an operation whose own reservations do not count.
    """
    live = MachineRow.state.in_(_HOLDING)
    machines = select(
        func.count(MachineRow.id),
        func.sum(MachineRow.vcpus).filter(live),
        func.sum(MachineRow.memory).filter(live),
    )
    promised = select(
        func.sum(ReservationRow.machines),
        func.sum(ReservationRow.vcpus),
        func.sum(ReservationRow.memory),
        func.sum(ReservationRow.disk),
    )
    if host is not None:
        machines = machines.where(MachineRow.host == host)
        promised = promised.where(ReservationRow.host == host)
    elif not real:
        # What moves is counted where it still is.
        moving = select(OperationRow.id).where(
            OperationRow.id == ReservationRow.operation_id,
            OperationRow.kind == "machine.migrate",
            MachineRow.id == ReservationRow.machine_id,
            MachineRow.host != ReservationRow.host,
            live,
        )
        promised = promised.where(~moving.exists())
    if real:
        machines = machines.where(MachineRow.hypervisor != _SIMULATED)
        promised = promised.where(
            ReservationRow.host.not_in(select(HostRow.name).where(HostRow.hypervisor == _SIMULATED))
        )
    if besides is not None:
        promised = promised.where(ReservationRow.operation_id != besides)
    disks = 0 if host is not None else session.scalar(select(func.sum(DiskRow.size))) or 0
    count, vcpus, memory = session.execute(machines).one()
    more = [int(value or 0) for value in session.execute(promised).one()]
    return Need(int(count), int(vcpus or 0), int(memory or 0), int(disks)) + Need(*more)


def reserve(
    session: Session,
    settings: Settings,
    need: Need,
    *,
    operation: str,
    host: str | None = None,
    machine: str | None = None,
    moves: bool = False,
    what: str,
    keep: bool = True,
) -> None:
    """Promise an operation what it needs, if there is room for that; again does nothing.

    Args:
        session: A transaction that writes.
        settings: With the manager's quotas.
        need: What it is.
        operation: Id of the operation.
        host: Where it is needed.
        machine: Id of the machine that is to have it, if its row is there.
        moves: Whether that machine has it elsewhere now, and so within the manager's quotas.
        what: What it is for, in words, such as "start 'web'".
        keep: Whether the promise is to last; otherwise there is only to be room now.

    Raises:
        ResourceExhausted: naming each limit that it would pass.
    """
    session.flush()
    excess = list[str]()
    limits = settings.limits.model_dump()
    # What has no limit is not counted: there may be ten thousand machines.
    if not moves and _limited(need, limits):
        excess += _excess(in_use(session, besides=operation), need, limits, "of the manager")
    row = session.get(HostRow, host) if host is not None else None
    if row is not None and _limited(need, row.limits):
        used = in_use(session, host=row.name, besides=operation)
        excess += _excess(used, need, row.limits, f"of host {row.name!r}")
    if row is not None and row.hypervisor != _SIMULATED and (need.vcpus or need.memory):
        used = in_use(session, real=True, besides=operation)
        excess += _excess(used, need, _of_this_host(), "of this computer")
    if excess:
        raise ResourceExhausted(
            f"there is no room to {what}: " + "; ".join(excess),
            hint="stop or delete other machines first, or ask for less",
        )
    if keep:
        drop_reservation(session, operation, machine=machine)
        session.add(
            ReservationRow(
                operation_id=operation,
                machine_id=machine,
                host=host,
                vcpus=need.vcpus,
                memory=need.memory,
                disk=need.disk,
                machines=need.machines,
            )
        )
        session.flush()


def drop_reservation(session: Session, operation: str, *, machine: str | None = None) -> None:
    """Take back what an operation was promised, for one machine or (None) for all."""
    query = delete(ReservationRow).where(ReservationRow.operation_id == operation)
    if machine is not None:
        query = query.where(ReservationRow.machine_id == machine)
    session.execute(query)


def _limited(need: Need, limits: Mapping[str, int | None]) -> bool:
    """Whether there is a limit for something that is needed."""
    return any(
        limits.get(each.name) is not None and getattr(need, each.name) for each in fields(need)
    )


def _excess(used: Need, need: Need, limits: Mapping[str, int | None], whose: str) -> list[str]:
    """Where `need` beside what is in use would pass a limit, in words."""
    found = []
    for field, noun in (
        ("machines", "machines"),
        ("vcpus", "vCPUs"),
        ("memory", "memory"),
        ("disk", "disk space"),
    ):
        limit, asked, taken = limits.get(field), getattr(need, field), getattr(used, field)
        if limit is None or not asked or taken + asked <= limit:
            continue
        written = format_size if field in {"memory", "disk"} else str
        found.append(
            f"{written(asked)} of {noun} more would make {written(taken + asked)} "
            f"of the {written(limit)} {whose}"
        )
    return found


def _of_this_host() -> dict[str, int | None]:
    memory = host_memory()
    total = memory.total if memory.limit is None else min(memory.total, memory.limit)
    return {
        "vcpus": _VCPUS_PER_CPU * (os.cpu_count() or 1),
        "memory": total - min(_MARGIN, total // 16),
    }
