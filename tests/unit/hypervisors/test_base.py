"""The contract: what its answers look like and what it leaves to back ends."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from tests.unit.hypervisors.toy import RUNNING, ToyHypervisor, in_loop

from vmlab.hypervisors import base
from vmlab.hypervisors.base import Channel, Hypervisor, Machine, MachineInfo, MachineStatus
from vmlab.hypervisors.operation import DEFAULT_TIMEOUTS
from vmlab.machine.states import OPERATIONS, MachineState


def calls(kind: type) -> dict[str, Callable[..., Any]]:
    return {
        name: member
        for name, member in vars(kind).items()
        if inspect.iscoroutinefunction(member) and not name.startswith("_")
    }


def test_every_operation_of_a_machine_is_in_the_table_and_takes_a_deadline() -> None:
    operations = calls(Machine)
    assert set(operations) - {"status", "snapshots"} == set(OPERATIONS)
    assert set(operations) <= set(DEFAULT_TIMEOUTS)
    for operation in [*operations.values(), Hypervisor.create, Hypervisor.create_from]:
        timeout = inspect.signature(operation).parameters["timeout"]
        assert timeout.default is None
        assert timeout.kind is inspect.Parameter.KEYWORD_ONLY


def test_everything_of_the_contract_says_what_it_does() -> None:
    for kind in (Machine, Hypervisor, Channel, base.Console, base.HypervisorProvider):
        for name, member in vars(kind).items():
            if not name.startswith("_") and (inspect.isfunction(member) or name in {"spec"}):
                assert member.__doc__, f"{kind.__name__}.{name}"


@pytest.mark.parametrize(
    "kind",
    [
        one
        for one in vars(base).values()
        if isinstance(one, type)
        and issubclass(one, BaseModel)
        and one.__module__ == base.__name__
        and not one.__name__.startswith("_")
    ],
    ids=lambda kind: kind.__name__,
)
def test_answers_do_not_change_and_have_no_unknown_fields(kind: type[BaseModel]) -> None:
    assert kind.model_config["frozen"]
    assert kind.model_config["extra"] == "forbid"
    assert kind.__doc__


def test_answers_are_the_same_in_another_process() -> None:
    status = MachineStatus(id="i", name="a", state=MachineState.RUNNING, time=1.5)
    assert MachineStatus.model_validate_json(status.model_dump_json()) == status
    info = MachineInfo(
        id="i", name="a", architecture="riscv64", vcpus=1, memory=1, pinning={0: (1, 2)}
    )
    assert MachineInfo.model_validate_json(info.model_dump_json()) == info
    with pytest.raises(ValidationError):
        MachineInfo(id="i", name="a", architecture="riscv64", vcpus=0, memory=1)


@in_loop
async def test_a_snapshot_is_the_same_in_another_process() -> None:
    machine = await ToyHypervisor().machine(RUNNING)
    taken = await machine.snapshot("s")
    assert base.Snapshot.model_validate_json(taken.model_dump_json()) == taken


class Letters(Channel):
    name = "letters"

    def __init__(self) -> None:
        self.closed = 0

    async def read(self, size: int = 65536) -> bytes:
        return b""

    async def write(self, data: bytes) -> None:
        return None

    async def close(self) -> None:
        self.closed += 1


@in_loop
async def test_a_channel_is_closed_when_its_block_ends() -> None:
    with pytest.raises(KeyError):
        async with Letters() as channel:
            raise KeyError
    assert channel.closed == 1


@in_loop
async def test_a_hypervisor_is_closed_when_its_block_ends() -> None:
    async with ToyHypervisor() as toy:
        await toy.machine(RUNNING)
        assert (await toy.probe()).available
    assert toy.things == set()


def test_calls_run_on_the_usual_event_loop_unless_told_otherwise() -> None:
    loop = ToyHypervisor().loop_factory()()
    assert isinstance(loop, asyncio.AbstractEventLoop)
    loop.close()
