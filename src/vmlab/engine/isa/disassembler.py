"""The disassembler: instructions as GNU's objdump writes them, ABI names and pseudo-instructions.

Operands come from the patterns. What is written down here is how they look, and the
pseudo-instructions of the "RISC-V Assembly Programmer's Manual". A compressed instruction is
written as the one that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from vmlab.engine.isa.encoding import Decoded
from vmlab.engine.isa.riscv64 import RISCV64

INTEGER_NAMES = [
    *("zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1"),
    *(f"a{number}" for number in range(8)),
    *(f"s{number}" for number in range(2, 12)),
    *(f"t{number}" for number in range(3, 7)),
]
FLOATING_NAMES = [
    *(f"ft{number}" for number in range(8)),
    *("fs0", "fs1"),
    *(f"fa{number}" for number in range(8)),
    *(f"fs{number}" for number in range(2, 12)),
    *(f"ft{number}" for number in range(8, 12)),
]
_ROUNDING = ("rne", "rtz", "rdn", "rup", "rmm", "unknown", "unknown", "dyn")
# fcvt to a format that holds every number of the source rounds nothing, and shows no mode of 0.
_NEVER_ROUNDS = {"fcvt.d.s", "fcvt.d.w", "fcvt.d.wu"}

Names = Mapping[int, str]
_NO_NAMES: Names = MappingProxyType({})


def disassemble(word: int, pc: int, csr_names: Names = _NO_NAMES) -> str:
    """The instruction at the start of 32 bits: mnemonic, a space, operands.

    Args:
        word: what is in memory there, little-endian.
        pc: its address, for the targets of branches.
        csr_names: names of CSRs by number; others are written as numbers.
    """
    decoded = RISCV64.decode(word)
    if decoded is None:
        return f".4byte {word:#x}" if word & 3 == 3 else f".2byte {word & 0xFFFF:#x}"
    for pseudo, applies, assembly in _PSEUDO.get(decoded.instruction.name, ()):
        if applies(decoded):
            return _written(decoded, pseudo, assembly, pc, csr_names)
    name = decoded.instruction.name
    if decoded.instruction.extension == "A":
        name += ("", ".rl", ".aq", ".aqrl")[decoded.word >> 25 & 3]
    return _written(decoded, name, decoded.instruction.assembly, pc, csr_names)


def _written(decoded: Decoded, name: str, assembly: str, pc: int, csr_names: Names) -> str:
    parts = [_operand(decoded, part, pc, csr_names) for part in assembly.split(",") if part]
    return " ".join([name, ",".join(part for part in parts if part)]).strip()


def _operand(decoded: Decoded, operand: str, pc: int, csr_names: Names) -> str:
    name = decoded.instruction.name
    match operand:
        case "rd" | "rs1" | "rs2":
            return INTEGER_NAMES[_number(decoded, operand)]
        case "fd" | "fs1" | "fs2" | "fs3":
            return FLOATING_NAMES[_number(decoded, "r" + operand[1:])]
        case "(rs1)":
            return f"({INTEGER_NAMES[decoded.rs1]})"
        case "imm(rs1)":
            return f"{decoded.imm}({INTEGER_NAMES[decoded.rs1]})"
        case "target":
            return f"{(pc + decoded.imm) & (1 << 64) - 1:#x}"
        case "csr":
            return csr_names.get(decoded.imm, f"{decoded.imm:#x}")
        case "uimm":
            return str(decoded.rs1)
        case "rm":
            hidden = decoded.imm == 7 or (name in _NEVER_ROUNDS and decoded.imm == 0)
            return "" if hidden else _ROUNDING[decoded.imm]
        case "order":
            return ",".join(
                "".join(
                    letter
                    for place, letter in zip((3, 2, 1, 0), "iorw", strict=True)
                    if bits >> place & 1
                )
                or "unknown"
                for bits in (decoded.word >> 24 & 15, decoded.word >> 20 & 15)
            )
        case "imm" if name in {"lui", "auipc"}:
            return f"{decoded.imm >> 12 & 0xFFFFF:#x}"
        case "imm" if not decoded.instruction.pattern.operands["imm"].signed:
            return f"{decoded.imm:#x}"
        case "imm":
            return str(decoded.imm)
    raise ValueError(f"{name} has an operand {operand!r} that nobody knows to write")


def _number(decoded: Decoded, operand: str) -> int:
    number: int = getattr(decoded, operand)
    return number


_Pseudo = tuple[str, Callable[[Decoded], bool], str]


def _always(_: Decoded) -> bool:
    return True


def _all_zero(*operands: str) -> Callable[[Decoded], bool]:
    return lambda decoded: not any(getattr(decoded, operand) for operand in operands)


def _immediate(value: int) -> Callable[[Decoded], bool]:
    return lambda decoded: decoded.imm == value


def _same_sources(decoded: Decoded) -> bool:
    return decoded.rs1 == decoded.rs2


def _csr(number: int, *zero: str) -> Callable[[Decoded], bool]:
    rest = _all_zero(*zero)
    return lambda decoded: decoded.imm == number and rest(decoded)


def _links(decoded: Decoded) -> bool:
    return decoded.rd == 1


def _word(value: int) -> Callable[[Decoded], bool]:
    return lambda decoded: decoded.word == value


_PSEUDO: Mapping[str, tuple[_Pseudo, ...]] = MappingProxyType(
    {
        "addi": (
            ("nop", _all_zero("rd", "rs1", "imm"), ""),
            ("li", _all_zero("rs1"), "rd,imm"),
            ("mv", _all_zero("imm"), "rd,rs1"),
        ),
        "add": (("mv", lambda d: d.source.name == "c.mv", "rd,rs2"),),
        "addiw": (("sext.w", _all_zero("imm"), "rd,rs1"),),
        "add.uw": (("zext.w", _all_zero("rs2"), "rd,rs1"),),
        "andi": (("zext.b", _immediate(255), "rd,rs1"),),
        "xori": (("not", _immediate(-1), "rd,rs1"),),
        "sub": (("neg", _all_zero("rs1"), "rd,rs2"),),
        "subw": (("negw", _all_zero("rs1"), "rd,rs2"),),
        "sltiu": (("seqz", _immediate(1), "rd,rs1"),),
        "sltu": (("snez", _all_zero("rs1"), "rd,rs2"),),
        "slt": (
            ("sltz", _all_zero("rs2"), "rd,rs1"),
            ("sgtz", _all_zero("rs1"), "rd,rs2"),
        ),
        "beq": (("beqz", _all_zero("rs2"), "rs1,target"),),
        "bne": (("bnez", _all_zero("rs2"), "rs1,target"),),
        "blt": (
            ("bltz", _all_zero("rs2"), "rs1,target"),
            ("bgtz", _all_zero("rs1"), "rs2,target"),
        ),
        "bge": (
            ("bgez", _all_zero("rs2"), "rs1,target"),
            ("blez", _all_zero("rs1"), "rs2,target"),
        ),
        "jal": (("j", _all_zero("rd"), "target"), ("jal", _links, "target")),
        "jalr": (
            ("ret", lambda d: d.rd == d.imm == 0 and d.rs1 == 1, ""),
            ("jr", _all_zero("rd", "imm"), "rs1"),
            ("jr", _all_zero("rd"), "imm(rs1)"),
            ("jalr", lambda d: _links(d) and not d.imm, "rs1"),
            ("jalr", _links, "imm(rs1)"),
            ("jalr", _all_zero("imm"), "rd,rs1"),
        ),
        "fence": (
            ("pause", _word(0x0100000F), ""),
            ("fence.tso", _word(0x8330000F), ""),
            ("fence", _word(0x0FF0000F), ""),
            ("fence", _always, "order"),
        ),
        "csrrs": (
            ("rdcycle", _csr(0xC00, "rs1"), "rd"),
            ("rdtime", _csr(0xC01, "rs1"), "rd"),
            ("rdinstret", _csr(0xC02, "rs1"), "rd"),
            ("frflags", _csr(1, "rs1"), "rd"),
            ("frrm", _csr(2, "rs1"), "rd"),
            ("frcsr", _csr(3, "rs1"), "rd"),
            ("csrr", _all_zero("rs1"), "rd,csr"),
            ("csrs", _all_zero("rd"), "csr,rs1"),
        ),
        "csrrw": (
            ("fsflags", _csr(1, "rd"), "rs1"),
            ("fsrm", _csr(2, "rd"), "rs1"),
            ("fscsr", _csr(3, "rd"), "rs1"),
            ("fsflags", _csr(1), "rd,rs1"),
            ("fsrm", _csr(2), "rd,rs1"),
            ("fscsr", _csr(3), "rd,rs1"),
            ("csrw", _all_zero("rd"), "csr,rs1"),
        ),
        "csrrc": (("csrc", _all_zero("rd"), "csr,rs1"),),
        "csrrwi": (
            ("fsflagsi", _csr(1, "rd"), "uimm"),
            ("fsrmi", _csr(2, "rd"), "uimm"),
            ("fsflagsi", _csr(1), "rd,uimm"),
            ("fsrmi", _csr(2), "rd,uimm"),
            ("csrwi", _all_zero("rd"), "csr,uimm"),
        ),
        "csrrsi": (("csrsi", _all_zero("rd"), "csr,uimm"),),
        "csrrci": (("csrci", _all_zero("rd"), "csr,uimm"),),
        "sfence.vma": (
            ("sfence.vma", _all_zero("rs1", "rs2"), ""),
            ("sfence.vma", _all_zero("rs2"), "rs1"),
        ),
    }
    | {
        f"{name}.{letter}": ((f"{pseudo}.{letter}", _same_sources, "fd,fs1"),)
        for letter in "sd"
        for name, pseudo in (("fsgnj", "fmv"), ("fsgnjn", "fneg"), ("fsgnjx", "fabs"))
    }
)
