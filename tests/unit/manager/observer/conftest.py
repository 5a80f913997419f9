"""A store and a world that agree, for tests to change one thing of."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vmlab.machine.states import MachineState
from vmlab.manager.observer.known import (
    Known,
    KnownAddress,
    KnownDisk,
    KnownMachine,
    KnownNetwork,
    KnownNic,
)
from vmlab.manager.observer.seen import (
    Seen,
    SeenDisk,
    SeenFile,
    SeenLease,
    SeenMachine,
    SeenProcess,
)

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
BEFORE = NOON - timedelta(hours=1)
DISKS = Path("/home/of/vmlab/manager/disks")
EVERYTHING = frozenset(
    {
        "host:qemu",
        "parts:one",
        "processes",
        "files",
        "locks",
        "leases",
        "interfaces",
        "volumes",
        "store",
    }
)


@pytest.fixture
def machine() -> KnownMachine:
    """A machine that runs, with a disk and a NIC."""
    return KnownMachine(
        id="one",
        name="web",
        host="qemu",
        at="m-one",
        state=MachineState.RUNNING,
        wanted="running",
        started=BEFORE,
        answers=True,
        nics=(KnownNic("nic", "net0", "lan", "52:54:00:00:00:01"),),
    )


@pytest.fixture
def disk() -> KnownDisk:
    """Its disk."""
    return KnownDisk("d" * 32, "data", "attached", 4096, DISKS / f"{'d' * 32}.raw", "one", "data")


@pytest.fixture
def known(machine: KnownMachine, disk: KnownDisk) -> Known:
    """The store."""
    return Known(
        machines=(machine,),
        disks=(disk,),
        networks=(KnownNetwork("lan", "office"),),
        addresses=(KnownAddress("address", "lan", "10.0.0.2", "nic", "one", "52:54:00:00:00:01"),),
        hosts=frozenset({"qemu"}),
    )


@pytest.fixture
def seen_machine(disk: KnownDisk) -> SeenMachine:
    """The machine at its hypervisor."""
    return SeenMachine(
        host="qemu",
        id="f" * 32,
        at="m-one",
        state=MachineState.RUNNING,
        disks=(SeenDisk("root", 1 << 30, None), SeenDisk("data", 4096, disk.path)),
        nics=(),
    )


@pytest.fixture
def seen(seen_machine: SeenMachine, disk: KnownDisk) -> Seen:
    """The world."""
    return Seen(
        at=NOON,
        looked=EVERYTHING,
        machines=(seen_machine,),
        processes=(SeenProcess(7, 70, BEFORE, ("/usr/bin/qemu-system-x86_64",), "f" * 32),),
        files=(SeenFile(disk.path, disk.id, 4096, BEFORE),),
        leases=(SeenLease("lan", "10.0.0.2", "52:54:00:00:00:01"),),
    )
