"""What the driver tells an engine to break, and what it refuses; the engine is a script."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmlab.hypervisors.embedded import EmbeddedHypervisor, faults
from vmlab.hypervisors.embedded.machine import EmbeddedMachine
from vmlab.hypervisors.monitored.emulator import Emulator
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.ownership import Owner
from vmlab.machine.errors import ResourceNotFound, UnsupportedOperation
from vmlab.machine.faults import (
    Chance,
    ConsoleText,
    CpuStall,
    DiskCorrupt,
    DiskError,
    DiskSlow,
    Fault,
    FaultKind,
    NetDelay,
    NetLoss,
    NetPartition,
    Nth,
    PauseFault,
    PowerCut,
)
from vmlab.machine.spec import MachineSpec


class Engine:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        self.told.append((command, arguments or {}))
        return {"running": True}


def spec(**changes: Any) -> MachineSpec:
    fields = {
        "name": "vm",
        "memory": "64M",
        "architecture": "riscv64",
        "disks": [{"name": "d", "size": "1M"}],
        "nics": [{"name": "n", "network": "none"}],
    }
    return MachineSpec.of(**fields | changes)


def broken(fault: Fault, **changes: Any) -> list[tuple[str, dict[str, Any]]]:
    """What an engine is told of a fault, and of its end."""
    engine = Engine()

    async def work() -> None:
        emulator = cast("Emulator", engine)
        mend = await faults.break_device(emulator, spec(**changes), "f", fault)
        if mend is not None:
            await mend()

    asyncio.run(work())
    return engine.told


def test_each_kind_has_its_command_and_its_end() -> None:
    begun, ended = broken(DiskError(disk="d", operation="read", when=Nth(n=2), seed=1))
    assert begun[0] == "x-disk-fault"
    assert begun[1]["node-name"] == "d-d"
    assert begun[1]["fault"]["when"] == {"seed": 1, "nth": 2, "every": False, "duration": 0.0}
    assert ended == ("x-fault-end", {"id": "f"})
    assert [command for command, _ in broken(NetLoss(nic="n"))] == ["x-net-fault", "x-fault-end"]
    assert broken(NetDelay(nic="n", delay=1))[0][1]["name"] == "nic-n"
    assert broken(CpuStall(vcpu=0)) == [
        ("x-hart-stall", {"hart": 0, "on": True}),
        ("x-hart-stall", {"hart": 0, "on": False}),
    ]
    corrupt = {"node-name": "d-d", "offset": 5, "length": 2}
    assert broken(DiskCorrupt(disk="d", offset=5, length=2)) == [("x-disk-corrupt", corrupt)]
    assert broken(PowerCut()) == [("x-power-cut", {})]


def test_a_disk_is_not_slow_where_no_host_s_time_passes() -> None:
    with pytest.raises(UnsupportedOperation, match="fault disk-slow") as caught:
        broken(DiskSlow(disk="d", delay=1), deterministic=True)
    assert caught.value.hint == "where time is deterministic, a request takes none of it"
    assert broken(DiskSlow(disk="d", delay=1))[0][0] == "x-disk-fault"


def test_what_is_declared_can_be_told_and_what_is_counted_is_declared() -> None:
    assert faults.COUNTED < faults.FAULTS
    assert FaultKind.HYPERVISOR_CRASH not in faults.FAULTS


def machine() -> EmbeddedMachine:
    made = EmbeddedMachine(
        EmbeddedHypervisor(Owner("run", "test", Path("/nonexistent"))), "1", spec()
    )
    made.emulator = cast("Any", SimpleNamespace(execute=Engine().execute, process=None))
    return made


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (DiskSlow(disk="x", delay=1), "disk 'x'"),
        (NetPartition(nic="x"), "NIC 'x'"),
        (NetLoss(nic="x"), "NIC 'x'"),
        (CpuStall(vcpu=1), "vCPU 1"),
    ],
)
def test_a_fault_of_what_is_not_there_is_refused(fault: Fault, kind: str) -> None:
    with pytest.raises(ResourceNotFound, match=f"has no {kind}"):
        asyncio.run(machine().faults.inject(fault))


@pytest.mark.parametrize(
    ("fault", "trigger"),
    [
        (PauseFault(when=Nth(n=2)), "nth"),
        (DiskCorrupt(disk="d", when=Chance(probability=0.5)), "chance"),
        (DiskError(disk="d", when=ConsoleText(text="x")), "console"),
    ],
)
def test_a_trigger_that_nobody_waits_for_is_refused_by_its_name(fault: Fault, trigger: str) -> None:
    with pytest.raises(UnsupportedOperation) as caught:
        asyncio.run(machine().faults.inject(fault))
    assert caught.value.capability == f"fault trigger {trigger}"
    assert str(caught.value.hint).startswith("it begins at a time")


def test_what_is_counted_lasts_as_its_counter_says_and_the_rest_as_the_driver_does() -> None:
    async def work() -> None:
        made = machine()
        counted = DiskError(disk="d", when=Nth(n=1), duration=3600)
        one = await made.faults.inject(counted)
        other = await made.faults.inject(CpuStall(vcpu=0, duration=3600))
        waiting = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
        assert len(waiting) == 1
        await made.faults.clear(one)
        await made.faults.clear(other)
        assert all(task.cancelled() for task in waiting)
        with pytest.raises(ResourceNotFound, match="never had a fault"):
            await made.faults.clear("nothing")

    asyncio.run(work())


def test_an_injection_that_is_cut_short_is_undone_as_far_as_it_got() -> None:
    async def test() -> None:
        told: list[Any] = []
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def execute(command: str, arguments: Any = None) -> Any:
            told.append((command, arguments["up"]))
            if not arguments["up"]:
                begun.set()
                await go_on.wait()
            return {}

        made = machine()
        made.emulator = cast("Any", SimpleNamespace(execute=execute, process=None))
        injecting = asyncio.create_task(made.faults.inject(NetPartition(nic="n", id="f")))
        await begun.wait()
        injecting.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await injecting
        await made._undo(Operation("inject", 1, None))
        assert told == [("set_link", False), ("set_link", True)]
        assert made.cut == set()
        with pytest.raises(ResourceNotFound, match="never had a fault 'f'"):
            await made.faults.clear("f")

    asyncio.run(asyncio.wait_for(test(), 60))
