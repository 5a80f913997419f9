"""Random programs leave the same registers and memory as in unicorn (QEMU's RISC-V).

Unicorn lacks the bit-manipulation extensions, and is of a QEMU that knew no NaN boxing: single
precision is left to the vectors of softfloat and to tests/integration/engine.
"""

from __future__ import annotations

import random

import pytest
import unicorn
from unicorn import riscv_const

from vmlab.engine.accel.reference import ReferenceExecutor
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.exits import Reason
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.isa.programs import POINTERS, ProgramMaker, random_number
from vmlab.engine.isa.riscv64 import RISCV64
from vmlab.engine.memory.ram import Ram

BASE, SIZE = 0x8000_0000, 1 << 20
DATA = BASE + SIZE // 2
WFI = (0x10500073).to_bytes(4, "little")
FLOATING_ON = 3 << 13
X0, F0 = riscv_const.UC_RISCV_REG_X0, riscv_const.UC_RISCV_REG_F0


def in_unicorn(code: bytes, memory: bytes, x: list[int], f: list[int]) -> unicorn.Uc:
    machine = unicorn.Uc(unicorn.UC_ARCH_RISCV, unicorn.UC_MODE_RISCV64)
    machine.mem_map(BASE, SIZE)
    machine.mem_write(BASE, code)
    machine.mem_write(DATA - len(memory) // 2, memory)
    machine.reg_write(riscv_const.UC_RISCV_REG_MSTATUS, FLOATING_ON)
    for number in range(1, 32):
        machine.reg_write(X0 + number, x[number])
    for number in range(32):
        machine.reg_write(F0 + number, f[number])
    machine.emu_start(BASE, BASE + len(code))
    return machine


@pytest.mark.parametrize(
    ("extensions", "seed"),
    [("I", 1), ("I M", 2), ("I C", 3), ("I A", 4), ("I M A C", 5), ("I M A C", 6)],
)
def test_integer_programs_end_as_in_unicorn(extensions: str, seed: int) -> None:
    # A store-conditional of another size than the load may succeed or fail, and does so there.
    reservations = ("lr.w", "lr.d", "sc.w", "sc.d")
    maker = ProgramMaker(RISCV64, extensions.split(), seed, without=reservations)
    source = random.Random(seed)
    ram = Ram(SIZE, BASE)
    hart = Hart(ram)
    for _ in range(12):
        program = maker.program(150)
        x = [random_number(source) for _ in range(32)]
        f = [random_number(source) for _ in range(32)]
        for pointer in POINTERS:
            x[pointer] = DATA
        memory = source.randbytes(8192)
        theirs = in_unicorn(program.code, memory, x, f)
        hart.reset(BASE)
        hart[layout.MSTATUS] = FLOATING_ON
        ram.write(BASE, program.code + WFI)
        ram.write(DATA - len(memory) // 2, memory)
        for number in range(32):
            hart.set_x(number, x[number])
            hart.set_f(number, f[number])
        assert ReferenceExecutor(hart).run(1 << 20).reason is Reason.WAIT
        listing = program.code.hex()
        for number in range(1, 32):
            assert hart.x(number) == theirs.reg_read(X0 + number), (number, listing)
        start = DATA - len(memory) // 2
        assert ram.read(start, len(memory)) == bytes(theirs.mem_read(start, len(memory)))
    ram.close()
