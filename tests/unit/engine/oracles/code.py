"""Programs for an outside oracle, put together from the instruction set's own table.

A program is an ELF file that a Linux kernel could start: it computes, writes a block of memory to
standard output and exits. `in_qemu` runs it in qemu-riscv64, `on_hart` on a bare hart of the
engine's, where the call that writes is the end.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from vmlab.engine.accel.lockstep import Executor
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.exits import Reason
from vmlab.engine.isa.encoding import Instruction
from vmlab.engine.isa.riscv64 import RISCV64

BASE = 0x8000_0000
DATA = BASE + (16 << 20)
RAM_SIZE = 64 << 20
_HANDLER = BASE + RAM_SIZE - 4096
_WFI = 0x1050_0073
_FLOATING_ON = 3 << 13
_WRITE, _EXIT = 64, 93  # Linux's numbers of system calls
FFLAGS, FRM, FCSR = 1, 2, 3

QEMU = shutil.which("qemu-riscv64-static") or shutil.which("qemu-riscv64")
needs_qemu = pytest.mark.skipif(QEMU is None, reason="needs Debian's qemu-user-static")


class Code:
    """Code that begins at BASE, and what it is made of."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self.used: Counter[str] = Counter()
        """How often each instruction is there."""

    @property
    def here(self) -> int:
        """The address of the next instruction."""
        return BASE + len(self.bytes)

    def put(self, name: str, **operands: int) -> None:
        """Append an instruction; operands that are not given are 0."""
        instruction = RISCV64[name]
        self.word(instruction.encode(**operands), instruction)

    def word(self, word: int, instruction: Instruction) -> None:
        """Append an instruction that is encoded already."""
        self.used[instruction.name] += 1
        self.bytes += word.to_bytes(instruction.pattern.length, "little")

    def address(self, register: int, place: int) -> None:
        """Put an address into a register."""
        distance = place - self.here
        low = (distance & 0xFFF) - ((distance & 0x800) << 1)
        self.put("auipc", rd=register, imm=distance - low)
        self.put("addi", rd=register, rs1=register, imm=low)

    def number(self, register: int, value: int) -> None:
        """Put a number below 2**31 into a register."""
        low = (value & 0xFFF) - ((value & 0x800) << 1)
        self.put("lui", rd=register, imm=value - low)
        self.put("addiw", rd=register, rs1=register, imm=low)

    def finish(self, place: int, size: int) -> None:
        """Write a block of memory to standard output, and exit."""
        self.number(10, 1)
        self.address(11, place)
        self.number(12, size)
        self.number(17, _WRITE)
        self.put("ecall")
        self.number(10, 0)
        self.number(17, _EXIT)
        self.put("ecall")


def in_qemu(code: Code, data: bytes, folder: Path, size: int) -> bytes:
    """What a program writes in qemu-riscv64, `data` being at DATA and zeros up to `size`."""
    assert QEMU is not None
    assert BASE + len(code.bytes) <= DATA
    header, table = 64, 56
    start = 4096
    ident = b"\x7fELF\2\1\1" + bytes(9)
    head = ident + struct.pack(
        "<HHIQQQIHHHHHH", 2, 243, 1, BASE, header, 0, 5, 64, table, 2, 0, 0, 0
    )
    second = -(-(start + len(code.bytes)) // 4096) * 4096
    head += struct.pack("<IIQQQQQQ", 1, 5, start, BASE, BASE, *[len(code.bytes)] * 2, 4096)
    head += struct.pack(
        "<IIQQQQQQ", 1, 6, second, DATA, DATA, len(data), max(size, len(data)), 4096
    )
    path = folder / "program"
    path.write_bytes((head.ljust(start, b"\0") + code.bytes).ljust(second, b"\0") + data)
    path.chmod(0o755)
    done = subprocess.run([QEMU, "-cpu", "rv64", path], capture_output=True, check=False)
    assert done.returncode == 0, f"qemu-riscv64: {done.returncode} {done.stderr.decode()}"
    return done.stdout


def on_hart(executor: Executor, code: Code, data: bytes, size: int) -> bytes:
    """What the same program writes on a hart whose RAM is RAM_SIZE large."""
    hart = executor.hart
    hart.reset(BASE)
    hart[layout.TIME_DIVISOR] = 10
    hart[layout.MSTATUS] = _FLOATING_ON
    hart[layout.MTVEC] = _HANDLER
    hart.ram.write(_HANDLER, _WFI.to_bytes(4, "little"))
    hart.ram.write(BASE, bytes(code.bytes))
    hart.ram.write(DATA, data.ljust(size, b"\0"))
    left = executor.run(1 << 40)
    assert left.reason is Reason.WAIT, left
    found = hart[layout.MCAUSE], hart.x(17)
    assert found == (11, _WRITE), f"trap {found[0]} at {hart[layout.MEPC]:#x}"
    return hart.ram.read(hart.x(11), hart.x(12))
