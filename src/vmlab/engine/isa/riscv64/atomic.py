"""A, atomic memory operations and LR/SC (RISC-V unprivileged 20191213, chapter 8).

`aq` and `rl` change nothing: every one of them is sequentially consistent here.
"""

from __future__ import annotations

from vmlab.engine.isa.cpu import AtomicOperation, Cpu
from vmlab.engine.isa.encoding import Body, Group

atomic = Group("A")


def _load_reserved(size: int) -> Body:
    def body(cpu: Cpu) -> None:
        cpu.rd = cpu.load_reserved(cpu.rs1, size).sign_extend(64)

    return body


def _store_conditional(size: int) -> Body:
    def body(cpu: Cpu) -> None:
        cpu.rd = cpu.store_conditional(cpu.rs1, size, cpu.rs2.low(8 * size))

    return body


def _read_modify_write(operation: AtomicOperation, size: int) -> Body:
    def body(cpu: Cpu) -> None:
        old = cpu.atomic(operation, cpu.rs1, size, cpu.rs2.low(8 * size))
        cpu.rd = old.sign_extend(64)

    return body


_OPERATIONS = {
    "amoswap": ("00001", AtomicOperation.EXCHANGE),
    "amoadd": ("00000", AtomicOperation.ADD),
    "amoxor": ("00100", AtomicOperation.XOR),
    "amoand": ("01100", AtomicOperation.AND),
    "amoor": ("01000", AtomicOperation.OR),
    "amomin": ("10000", AtomicOperation.MIN),
    "amomax": ("10100", AtomicOperation.MAX),
    "amominu": ("11000", AtomicOperation.MIN_UNSIGNED),
    "amomaxu": ("11100", AtomicOperation.MAX_UNSIGNED),
}
for _letter, _funct3, _size in (("w", "010", 4), ("d", "011", 8)):
    atomic.add(
        f"lr.{_letter}",
        f"00010 aq rl 00000 rs1 {_funct3} rd 0101111",
        _load_reserved(_size),
        "rd,(rs1)",
    )
    atomic.add(
        f"sc.{_letter}",
        f"00011 aq rl rs2 rs1 {_funct3} rd 0101111",
        _store_conditional(_size),
        "rd,rs2,(rs1)",
    )
    for _name, (_funct5, _operation) in _OPERATIONS.items():
        atomic.add(
            f"{_name}.{_letter}",
            f"{_funct5} aq rl rs2 rs1 {_funct3} rd 0101111",
            _read_modify_write(_operation, _size),
            "rd,rs2,(rs1)",
        )
