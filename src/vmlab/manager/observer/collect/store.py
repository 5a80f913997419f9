"""What the store says now, read in one transaction with a query for each table.

Columns and not objects: 10,000 machines are read in a fraction of a second, and nobody writes here.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal

from sqlalchemy import Executable, Text, cast, or_, select
from sqlalchemy.orm import Session

from vmlab.machine.states import MachineState
from vmlab.manager.documents import UNDER_WAY
from vmlab.manager.networks.layout import bridge_of
from vmlab.manager.observer.known import (
    Known,
    KnownAddress,
    KnownDisk,
    KnownMachine,
    KnownNetwork,
    KnownNic,
    KnownReservation,
)
from vmlab.manager.store.tables import (
    AddressRow,
    DiskRow,
    EventRow,
    HostRow,
    MachineRow,
    NetworkRow,
    NicRow,
    OperationRow,
    ReservationRow,
)

__all__ = ["PlaceOf", "known_now", "stirred_since", "under_way"]

PlaceOf = Callable[[str, str], Path]
"""Where the file of a disk is: by its id and format."""

_AT_ONCE: Final = 200
"""Rows that are read at a stretch: some milliseconds of work."""
_PAUSE_S: Final = 0.008
"""Between two stretches: longer than one takes, so that most of the time is others'."""
_COARSE: Final = timedelta(seconds=2)
"""How much older than it is something may seem: proc(5) has the moment of the boot, from which
processes count, in whole seconds, and files have the time of the kernel's last tick."""
_MODES: Final[Mapping[str, Literal["isolated", "user", "bridged"]]] = {
    "isolated": "isolated",
    "user": "user",
    "bridged": "bridged",
}


def known_now(
    session: Session,
    name_at: Callable[[str], str],
    place: PlaceOf,
    only: Collection[str] | None = None,
) -> Known:
    """All of the store that can be compared with the world.

    Args:
        session: A transaction that reads.
        name_at: What a machine of that id is called at its hypervisor.
        place: Where a disk's file is.
        only: Ids of machines: no others, and nothing that is not theirs, is read then.
    """
    busy, since = under_way(session)
    event = session.scalar(select(EventRow.id).order_by(EventRow.id.desc()).limit(1)) or 0
    machines = tuple(_machines(session, name_at, only))
    disks = tuple(_disks(session, place, only))
    hosts = frozenset(session.scalars(select(HostRow.name).where(HostRow.available)))
    if only is not None:
        return Known(machines, disks, hosts=hosts, busy=busy, event=event)
    return Known(
        machines=machines,
        disks=disks,
        networks=tuple(_networks(session)),
        addresses=tuple(
            KnownAddress(*row)
            for row in _slowly(
                session,
                select(
                    AddressRow.id,
                    AddressRow.network_id,
                    AddressRow.address,
                    AddressRow.nic_id,
                    AddressRow.machine_id,
                    AddressRow.mac,
                ),
            )
        ),
        reservations=tuple(_reservations(session)),
        hosts=hosts,
        busy=busy,
        since=since - _COARSE if since is not None else None,
        event=event,
    )


def _slowly(session: Session, query: Executable) -> Iterator[Any]:
    """Rows, with a pause after some: thousands of them, and whoever asks the manager goes first."""
    rows = session.execute(query, execution_options={"yield_per": _AT_ONCE})
    for number, row in enumerate(rows, 1):
        yield row
        if number % _AT_ONCE == 0:
            time.sleep(_PAUSE_S)


def _machines(
    session: Session, name_at: Callable[[str], str], only: Collection[str] | None
) -> Iterable[KnownMachine]:
    nics = defaultdict(list)
    of_nics = select(NicRow.machine_id, NicRow.id, NicRow.name, NicRow.network_id, NicRow.mac)
    if only is not None:
        of_nics = of_nics.where(NicRow.machine_id.in_(only))
    for machine, nic, name, network, mac in _slowly(session, of_nics):
        nics[machine].append(KnownNic(nic, name, network, mac))
    of_machines = select(
        MachineRow.id,
        MachineRow.name,
        MachineRow.host,
        MachineRow.hypervisor,
        MachineRow.state,
        MachineRow.wanted,
        MachineRow.started,
        MachineRow.image,
        cast(MachineRow.policy, Text),
    )
    if only is not None:
        of_machines = of_machines.where(MachineRow.id.in_(only))
    # Thousands of machines have a few policies: each is read once.
    policies: dict[str, dict[str, Any]] = {}
    rows = _slowly(session, of_machines)
    for id_, name, host, hypervisor, state, wanted, started, image, text in rows:
        policy = policies.get(text)
        if policy is None:
            policy = policies[text] = json.loads(text)
        yield KnownMachine(
            id=id_,
            name=name,
            host=host,
            at=name_at(id_),
            state=MachineState(state),
            wanted=wanted,
            started=started,
            answers=image is not None or hypervisor == "simulated",
            simulated=hypervisor == "simulated",
            releases=policy.get("release_addresses", "delete"),
            nics=tuple(nics.get(id_, ())),
            policies=policy.get("findings", {}),
        )


def _networks(session: Session) -> Iterable[KnownNetwork]:
    for id_, name, mode, bridge, vlan in session.execute(
        select(NetworkRow.id, NetworkRow.name, NetworkRow.mode, NetworkRow.bridge, NetworkRow.vlan)
    ):
        yield KnownNetwork(id_, name, _MODES[mode], bridge_of(id_, mode, bridge, vlan), vlan)


def _disks(session: Session, place: PlaceOf, only: Collection[str] | None) -> Iterable[KnownDisk]:
    of_disks = select(
        DiskRow.id,
        DiskRow.name,
        DiskRow.state,
        DiskRow.size,
        DiskRow.format,
        DiskRow.machine_id,
        DiskRow.device,
    )
    if only is not None:
        of_disks = of_disks.where(DiskRow.machine_id.in_(only))
    for id_, name, state, size, format_, machine, device in session.execute(of_disks):
        yield KnownDisk(id_, name, state, size, place(id_, format_), machine, device)


def _reservations(session: Session) -> Iterable[KnownReservation]:
    rows: Any = session.execute(
        select(ReservationRow, OperationRow.state).join(
            OperationRow, OperationRow.id == ReservationRow.operation_id
        )
    )
    for row, state in rows:
        amounts = {
            "vCPUs": row.vcpus,
            "bytes of memory": row.memory,
            "bytes of disk": row.disk,
            "machines": row.machines,
        }
        what = ", ".join(f"{amount} {noun}" for noun, amount in amounts.items() if amount)
        yield KnownReservation(row.id, row.operation_id, what or "nothing", state not in UNDER_WAY)


def under_way(session: Session) -> tuple[frozenset[str], datetime | None]:
    """Ids of all that operations are under way on or wait for, and when the oldest one began."""
    busy: set[str] = set()
    since: datetime | None = None
    for id_, target, keys, started in session.execute(
        select(
            OperationRow.id, OperationRow.target, OperationRow.lock_keys, OperationRow.started
        ).where(OperationRow.state.in_(UNDER_WAY), OperationRow.dry_run.is_(False))
    ):
        busy |= _ids(id_, target, keys)
        if started is not None and (since is None or started < since):
            since = started
    return frozenset(busy), since


def stirred_since(session: Session, event: int) -> frozenset[str]:
    """Ids of all that changed after event number `event`, or that operations ended on since.

    Who asks for it may be the one that writes: it costs as much as there were events since, and
    not as there are events or operations in the store.
    """
    found: set[str] = set()
    operations: set[str] = set()
    # Nothing but the number is a condition: databases would look for the others first.
    for kind, subject, operation in session.execute(
        select(EventRow.kind, EventRow.subject, EventRow.operation).where(EventRow.id > event)
    ):
        if subject is not None and not kind.startswith("finding."):
            found.add(subject)
        if operation is not None:
            operations.add(operation)
    for id_, target, keys in session.execute(
        select(OperationRow.id, OperationRow.target, OperationRow.lock_keys).where(
            or_(OperationRow.id.in_(operations), OperationRow.state.in_(UNDER_WAY)),
            OperationRow.dry_run.is_(False),
        )
    ):
        found |= _ids(id_, target, keys)
    return frozenset(found)


def _ids(operation: str, target: str | None, keys: Iterable[str]) -> set[str]:
    """What an operation is about: its locks are named "NOUN:ID"."""
    found = {operation, *(key.partition(":")[2] or key for key in keys)}
    return found | {target} if target is not None else found
