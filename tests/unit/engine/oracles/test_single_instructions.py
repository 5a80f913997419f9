"""Each instruction of I, M, A, F, D and C, alone and in any state, does what it does in unicorn.

Registers, `fflags`, memory and the next instruction's address are compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import unicorn
from tests.unit.engine.oracles.differences import UNICORN_WITHOUT_BOXES
from tests.unit.engine.oracles.steps import BASE, CODE, DATA, SIZE, WINDOW, Step, names, steps
from unicorn import riscv_const

from vmlab.engine.accel.reference import ReferenceExecutor
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.isa.values import mask
from vmlab.engine.memory.ram import Ram

COUNT = 40
FLOATING_ON = 3 << 13
INTEGERS = [riscv_const.UC_RISCV_REG_X0 + number for number in range(32)]
FLOATS = [riscv_const.UC_RISCV_REG_F0 + number for number in range(32)]
PC, FFLAGS = riscv_const.UC_RISCV_REG_PC, riscv_const.UC_RISCV_REG_FFLAGS
FRM, MSTATUS = riscv_const.UC_RISCV_REG_FRM, riscv_const.UC_RISCV_REG_MSTATUS


class Pair:
    """A hart, and unicorn's processor."""

    def __init__(self) -> None:
        self.hart = Hart(Ram(SIZE, BASE))
        self.executor = ReferenceExecutor(self.hart)
        self.theirs = unicorn.Uc(unicorn.UC_ARCH_RISCV, unicorn.UC_MODE_RISCV64)
        self.theirs.mem_map(BASE, SIZE)
        self.theirs.reg_write(MSTATUS, FLOATING_ON)
        self.at = CODE

    def run(self, step: Step) -> None:
        self.at += 8  # unicorn remembers what it has translated
        word = step.decoded.word.to_bytes(4, "little")
        hart, theirs = self.hart, self.theirs
        hart.reset(self.at)
        hart[layout.MSTATUS] = FLOATING_ON
        hart[layout.FRM] = step.frm
        for number in range(32):
            hart.set_x(number, step.x[number])
            hart.set_f(number, step.f[number])
        hart.ram.write(self.at, word)
        hart.ram.write(DATA - WINDOW // 2, step.memory)
        self.executor.step()
        for numbers, values in ((INTEGERS, step.x), (FLOATS, step.f)):
            for number, value in zip(numbers, values, strict=True):
                theirs.reg_write(number, value)
        theirs.reg_write(FFLAGS, 0)
        theirs.reg_write(FRM, step.frm)
        theirs.mem_write(self.at, word)
        theirs.mem_write(DATA - WINDOW // 2, step.memory)
        theirs.emu_start(self.at, hart.pc, count=1)

    def differences(self, step: Step) -> dict[str, tuple[int, int]]:
        """What differs: ours and theirs."""
        hart, theirs = self.hart, self.theirs
        found = {"pc": (hart.pc, theirs.reg_read(PC))}
        found["fflags"] = hart[layout.FFLAGS], theirs.reg_read(FFLAGS)
        for number in range(32):
            found[f"x{number}"] = hart.x(number), theirs.reg_read(INTEGERS[number])
            ours, other = hart.f(number), theirs.reg_read(FLOATS[number])
            if step.single and number == step.decoded.rd:
                assert UNICORN_WITHOUT_BOXES
                ours, other = ours & mask(32), other & mask(32)
            found[f"f{number}"] = ours, other
        memories = (
            int.from_bytes(side, "little")
            for side in (
                hart.ram.read(DATA - WINDOW // 2, WINDOW),
                theirs.mem_read(DATA - WINDOW // 2, WINDOW),
            )
        )
        ours, other = memories
        found["memory"] = ours, other
        return {name: values for name, values in found.items() if values[0] != values[1]}


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.hart.ram.close()


@pytest.mark.parametrize("name", names())
def test_it_does_what_it_does_in_unicorn(pair: Pair, name: str) -> None:
    for step in steps(name, COUNT):
        pair.run(step)
        assert pair.differences(step) == {}, (step.decoded, step.x, step.f)


@pytest.mark.parametrize("size", ["w", "d"])
@pytest.mark.parametrize("between", ["nothing", "other data", "another conditional", "elsewhere"])
def test_a_store_conditional_succeeds_where_unicorn_s_does(
    pair: Pair, size: str, between: str
) -> None:
    from vmlab.engine.isa.riscv64 import RISCV64

    def word(name: str, **operands: int) -> bytes:
        return RISCV64[name].encode(**operands).to_bytes(4, "little")

    conditional = word(f"sc.{size}", rd=5, rs1=8, rs2=6)
    code = word(f"lr.{size}", rd=7, rs1=8)
    if between == "other data":
        code += word("sd", rs1=8, rs2=9)
    elif between == "another conditional":
        code += word(f"sc.{size}", rd=10, rs1=8, rs2=9)
    elif between == "elsewhere":
        conditional = word(f"sc.{size}", rd=5, rs1=11, rs2=6)
    code += conditional
    pair.at += 64
    hart, theirs = pair.hart, pair.theirs
    hart.reset(pair.at)
    for number, value in ((5, 99), (6, 1 << 63 | 5), (8, DATA), (9, 0x1_2345_6789), (11, DATA + 8)):
        hart.set_x(number, value)
        theirs.reg_write(INTEGERS[number], value)
    theirs.mem_write(pair.at, code)
    hart.ram.write(pair.at, code)
    for memory in (hart.ram.write, theirs.mem_write):
        memory(DATA, bytes(range(128, 136)) * 2)  # the same content elsewhere
    theirs.emu_start(pair.at, pair.at + len(code))
    for _ in range(len(code) // 4):
        pair.executor.step()
    assert hart.x(5) == theirs.reg_read(INTEGERS[5])
    assert hart.x(7) == theirs.reg_read(INTEGERS[7])
    assert hart.ram.read(DATA, 16) == bytes(theirs.mem_read(DATA, 16))
    assert hart.x(5) == (0 if between == "nothing" else 1)
