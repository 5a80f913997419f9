"""RV64I, the base integer instructions (RISC-V unprivileged 20191213, chapters 2 and 5).

Hints (writes to x0) are instructions like others; the prefetches of Zicbop and `pause` of
Zihintpause are among them and mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from vmlab.engine.isa.cpu import Cause, Cpu, Extension, Trap
from vmlab.engine.isa.encoding import Body, Group
from vmlab.engine.isa.values import Value

base = Group("I")

Operation = Callable[[Value, Value], Value]


@base.instruction("lui", "imm[31:12] rd 0110111")
def lui(cpu: Cpu) -> None:
    cpu.rd = cpu.imm


@base.instruction("auipc", "imm[31:12] rd 0010111")
def auipc(cpu: Cpu) -> None:
    cpu.rd = cpu.pc + cpu.imm


@base.instruction("jal", "imm[20|10:1|11|19:12] rd 1101111", "rd,target")
def jal(cpu: Cpu) -> None:
    cpu.rd = cpu.next_pc
    cpu.jump_relative(cpu.imm)


@base.instruction("jalr", "imm[11:0] rs1 000 rd 1100111", "rd,imm(rs1)")
def jalr(cpu: Cpu) -> None:
    target = (cpu.rs1 + cpu.imm) & ~1
    cpu.rd = cpu.next_pc
    cpu.jump(target)


def _branch(name: str, funct3: str, condition: Operation) -> None:
    def body(cpu: Cpu) -> None:
        if condition(cpu.rs1, cpu.rs2):
            cpu.jump_relative(cpu.imm)

    base.add(name, f"imm[12|10:5] rs2 rs1 {funct3} imm[4:1|11] 1100011", body, "rs1,rs2,target")


_branch("beq", "000", lambda a, b: a.eq(b))
_branch("bne", "001", lambda a, b: a.ne(b))
_branch("blt", "100", lambda a, b: a.less(b))
_branch("bge", "101", lambda a, b: ~a.less(b))
_branch("bltu", "110", lambda a, b: a.below(b))
_branch("bgeu", "111", lambda a, b: ~a.below(b))


def _load(name: str, funct3: str, size: int, extension: Extension) -> None:
    def body(cpu: Cpu) -> None:
        cpu.rd = cpu.load(cpu.rs1 + cpu.imm, size, extension)

    base.add(name, f"imm[11:0] rs1 {funct3} rd 0000011", body, "rd,imm(rs1)")


_load("lb", "000", 1, Extension.SIGN)
_load("lh", "001", 2, Extension.SIGN)
_load("lw", "010", 4, Extension.SIGN)
_load("ld", "011", 8, Extension.SIGN)
_load("lbu", "100", 1, Extension.ZERO)
_load("lhu", "101", 2, Extension.ZERO)
_load("lwu", "110", 4, Extension.ZERO)


def _store(name: str, funct3: str, size: int) -> None:
    def body(cpu: Cpu) -> None:
        cpu.store(cpu.rs1 + cpu.imm, size, cpu.rs2)

    base.add(name, f"imm[11:5] rs2 rs1 {funct3} imm[4:0] 0100011", body, "rs2,imm(rs1)")


_store("sb", "000", 1)
_store("sh", "001", 2)
_store("sw", "010", 4)
_store("sd", "011", 8)


def binary(operation: Operation) -> Body:
    """The body of an instruction that combines two registers."""

    def body(cpu: Cpu) -> None:
        cpu.rd = operation(cpu.rs1, cpu.rs2)

    return body


def binary_word(operation: Operation) -> Body:
    """The same on their lower halves, with a sign-extended result."""

    def body(cpu: Cpu) -> None:
        cpu.rd = operation(cpu.rs1.low(32), cpu.rs2.low(32)).sign_extend(64)

    return body


def _with_immediate(operation: Operation) -> Body:
    def body(cpu: Cpu) -> None:
        cpu.rd = operation(cpu.rs1, cpu.imm)

    return body


def _with_immediate_word(operation: Operation) -> Body:
    def body(cpu: Cpu) -> None:
        cpu.rd = operation(cpu.rs1.low(32), cpu.imm.low(32)).sign_extend(64)

    return body


def _add(a: Value, b: Value) -> Value:
    return a + b


def _subtract(a: Value, b: Value) -> Value:
    return a - b


def shift_left(a: Value, b: Value) -> Value:
    """Shift by an amount modulo the width, as all of RISC-V's shifts are."""
    return a << (b & (a.width - 1))


def _shift_right(a: Value, b: Value) -> Value:
    return a >> (b & (a.width - 1))


def _shift_right_signed(a: Value, b: Value) -> Value:
    return a.shift_right_signed(b & (a.width - 1))


def _set_less(a: Value, b: Value) -> Value:
    return a.less(b).zero_extend(64)


def _set_below(a: Value, b: Value) -> Value:
    return a.below(b).zero_extend(64)


_OPERATIONS: tuple[tuple[str, str, Operation], ...] = (
    ("add", "000", _add),
    ("slt", "010", _set_less),
    ("sltu", "011", _set_below),
    ("xor", "100", lambda a, b: a ^ b),
    ("or", "110", lambda a, b: a | b),
    ("and", "111", lambda a, b: a & b),
)
for _name, _funct3, _operation in _OPERATIONS:
    base.add(_name, f"0000000 rs2 rs1 {_funct3} rd 0110011", binary(_operation))
    base.add(
        "sltiu" if _name == "sltu" else _name + "i",
        f"imm[11:0] rs1 {_funct3} rd 0010011",
        _with_immediate(_operation),
    )
base.add("sub", "0100000 rs2 rs1 000 rd 0110011", binary(_subtract))
base.add("addw", "0000000 rs2 rs1 000 rd 0111011", binary_word(_add))
base.add("addiw", "imm[11:0] rs1 000 rd 0011011", _with_immediate_word(_add))
base.add("subw", "0100000 rs2 rs1 000 rd 0111011", binary_word(_subtract))
for _name, _high, _funct3, _operation in (
    ("sll", "0", "001", shift_left),
    ("srl", "0", "101", _shift_right),
    ("sra", "1", "101", _shift_right_signed),
):
    base.add(_name, f"0{_high}00000 rs2 rs1 {_funct3} rd 0110011", binary(_operation))
    base.add(
        _name + "i",
        f"0{_high}0000 shamt[5:0] rs1 {_funct3} rd 0010011",
        _with_immediate(_operation),
    )
    base.add(_name + "w", f"0{_high}00000 rs2 rs1 {_funct3} rd 0111011", binary_word(_operation))
    base.add(
        _name + "iw",
        f"0{_high}00000 shamt[4:0] rs1 {_funct3} rd 0011011",
        _with_immediate_word(_operation),
    )


@base.instruction("fence", "fm pred succ rs1 000 rd 0001111", "order")
def fence(cpu: Cpu) -> None:
    cpu.fence()


@base.instruction("ecall", "000000000000 00000 000 00000 1110011", system=True)
def ecall(cpu: Cpu) -> None:
    cpu.system_call("environment_call")
    cpu.resume_at(cpu.next_pc)  # firmware was called, and has answered


@base.instruction("ebreak", "000000000001 00000 000 00000 1110011", system=True)
def ebreak(cpu: Cpu) -> None:
    raise Trap(Cause.BREAKPOINT, cpu.pc)
