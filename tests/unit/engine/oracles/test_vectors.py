"""What no outside oracle has, against vectors written by hand."""

from __future__ import annotations

import pytest
from tests.unit.engine.oracles.vectors import (
    ACCESSES,
    BLOCK,
    COUNT_TRAILING_ZEROS,
    GATES,
    ILLEGAL,
    MACHINE,
    NOWHERE,
    OFFSETS,
    STORE_ACCESS,
    SUPERVISOR,
    Access,
    Gate,
)

from vmlab.engine.accel.lockstep import Executor
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.isa.riscv64 import RISCV64

BASE = 0x8000_0000
HANDLER, DATA, ROOT = BASE + 0x1000, BASE + 0x2000, BASE + 0x4000
VIRTUAL = 0x40_0000
SV39 = 8 << 60
OPEN_PMP = (1 << 54) - 1
POINTER = 10


@pytest.fixture(params=["reference", "interpreter"])
def executor(request: pytest.FixtureRequest) -> Executor:
    made: Executor = request.getfixturevalue(request.param)
    return made


def execute(executor: Executor, name: str, **operands: int) -> int | None:
    """Execute an instruction where the hart is; the cause of the trap, if it is one."""
    hart = executor.hart
    word = RISCV64[name].encode(**operands)
    hart.ram.write(BASE, word.to_bytes(4, "little"))
    hart.executor = None
    executor.step()
    trapped = hart.pc == HANDLER
    assert trapped or hart.pc in (BASE + 4, VIRTUAL + 4)
    return hart[layout.MCAUSE] if trapped else None


def prepared(hart: Hart, privilege: int) -> Hart:
    hart.reset(BASE)
    hart[layout.TIME_DIVISOR] = 1
    hart[layout.MTVEC] = HANDLER
    hart[layout.PMPADDR[0]] = OPEN_PMP
    hart[layout.PMPCFG0] = 0x1F
    hart[layout.PMP_OPEN] = 1
    hart[layout.PRIVILEGE] = privilege
    hart.set_x(POINTER, DATA)
    return hart


@pytest.mark.parametrize(("operand", "result"), COUNT_TRAILING_ZEROS)
def test_trailing_zeros_of_a_word_are_at_most_32(
    executor: Executor, operand: int, result: int
) -> None:
    hart = prepared(executor.hart, MACHINE)
    hart.set_x(5, operand)
    assert execute(executor, "ctzw", rd=6, rs1=5) is None
    assert hart.x(6) == result


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_environments_say_who_manages_cache_blocks(executor: Executor, gate: Gate) -> None:
    hart = prepared(executor.hart, gate.privilege)
    hart[layout.MENVCFG], hart[layout.SENVCFG] = gate.menvcfg, gate.senvcfg
    cause = execute(executor, gate.name, rs1=POINTER)
    assert cause == (None if gate.allowed else ILLEGAL)
    if cause is not None:
        assert hart[layout.MTVAL] == RISCV64[gate.name].encode(rs1=POINTER)


@pytest.mark.parametrize("access", ACCESSES, ids=str)
def test_pages_say_what_may_be_managed(executor: Executor, access: Access) -> None:
    hart = prepared(executor.hart, SUPERVISOR)
    hart[layout.MENVCFG] = 0xF0
    # A gigabyte of tables: the code's page and another one, both in one table.
    tables = {ROOT: (ROOT + 0x1000, 1), ROOT + 0x1000 + 8 * 2: (ROOT + 0x2000, 1)}
    tables[ROOT + 0x2000] = (BASE, 0b1011)
    tables[ROOT + 0x2000 + 8] = (DATA, access.flags)
    for place, (physical, flags) in tables.items():
        hart.ram.write(place, (physical >> 12 << 10 | flags).to_bytes(8, "little"))
    hart[layout.SATP] = SV39 | ROOT >> 12
    hart.pc = VIRTUAL
    hart.set_x(POINTER, VIRTUAL + 4096 + 72)
    hart.ram.write(DATA, b"\xff" * 4096)
    assert execute(executor, access.name, rs1=POINTER) == access.cause
    if access.cause is not None:
        assert hart[layout.MTVAL] == VIRTUAL + 4096 + 72
    zeroed = BLOCK if access.name == "cbo.zero" and access.cause is None else 0
    assert hart.ram.read(DATA, 4096).count(0) == zeroed


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_block_that_holds_the_address_becomes_zeros(executor: Executor, offset: int) -> None:
    hart = prepared(executor.hart, MACHINE)
    hart.ram.write(DATA, b"\xff" * 256)
    hart.set_x(POINTER, DATA + BLOCK + offset)
    assert execute(executor, "cbo.zero", rs1=POINTER) is None
    assert hart.ram.read(DATA, 256) == b"\xff" * BLOCK + bytes(BLOCK) + b"\xff" * 2 * BLOCK


def test_zeros_need_memory(executor: Executor) -> None:
    hart = prepared(executor.hart, MACHINE)
    hart.set_x(POINTER, NOWHERE)
    assert execute(executor, "cbo.zero", rs1=POINTER) == STORE_ACCESS
    assert hart[layout.MTVAL] == NOWHERE
