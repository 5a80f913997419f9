"""The registers of a hart as GDB knows them: numbers, widths, and the description of the target.

GDB manual, appendix G.5.12 ("RISC-V Features"); numbers as QEMU's stub has them, so that what
works with one works with the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vmlab.engine.accel.reference import ReferenceCore
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.csr import CSRS, read_csr, write_csr
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.isa.cpu import Trap
from vmlab.engine.isa.disassembler import FLOATING_NAMES, INTEGER_NAMES
from vmlab.engine.isa.values import Value

PC: Final = 32
GENERAL: Final = 33
"""Registers that GDB reads and writes at once: x0 to x31, and pc."""
_FLOATING: Final = 33
_CSR: Final = 65
PRIVILEGE: Final = _CSR + 4096
_OF_FLOATING_POINT: Final = (1, 2, 3)
"""CSRs that belong to GDB's feature of floating point."""
_POINTERS: Final = {"sp": "data_ptr", "gp": "data_ptr", "tp": "data_ptr", "ra": "code_ptr"}


@dataclass(frozen=True)
class Register:
    """A register of 64 bits.

    Attributes:
        read: Its value; None where the hart does not have it now.
        write: Whether it could be written.
    """

    name: str
    read: Callable[[Hart], int | None]
    write: Callable[[Hart, int], bool]


def _integer(number: int) -> Register:
    def write(hart: Hart, value: int) -> bool:
        hart.set_x(number, value)
        return True

    return Register(INTEGER_NAMES[number], lambda hart: hart.x(number), write)


def _floating(number: int) -> Register:
    def write(hart: Hart, value: int) -> bool:
        hart.set_f(number, value)
        return True

    return Register(FLOATING_NAMES[number], lambda hart: hart.f(number), write)


def _program_counter() -> Register:
    def write(hart: Hart, value: int) -> bool:
        hart.pc = value
        return True

    return Register("pc", lambda hart: hart.pc, write)


def _as_machine(hart: Hart, access: Callable[[ReferenceCore], Value]) -> int | None:
    """Access a CSR as M mode would; None if even that is refused."""
    privilege = hart[layout.PRIVILEGE]
    hart[layout.PRIVILEGE] = 3
    try:
        return access(ReferenceCore(hart)).number
    except Trap:
        return None
    finally:
        hart[layout.PRIVILEGE] = privilege


def _csr(number: int, name: str) -> Register:
    def read(hart: Hart) -> int | None:
        if number in _OF_FLOATING_POINT:  # also while the guest has switched it off
            return CSRS[number].read(ReferenceCore(hart)).number
        return _as_machine(hart, lambda core: read_csr(core, Value(number), Value(0)))

    def write(hart: Hart, value: int) -> bool:
        if number >> 10 == 3:
            return False  # read-only
        done = _as_machine(hart, lambda core: write_csr(core, Value(number), Value(value, 64)))
        hart.executor = None  # what it remembers of translations may be wrong now
        return done is not None

    return Register(name, read, write)


def _privilege() -> Register:
    def write(hart: Hart, value: int) -> bool:
        if value not in (0, 1, 3):
            return False
        hart[layout.PRIVILEGE] = value
        hart.executor = None
        return True

    return Register("priv", lambda hart: hart[layout.PRIVILEGE], write)


REGISTERS: Final[dict[int, Register]] = {
    **{number: _integer(number) for number in range(32)},
    PC: _program_counter(),
    **{_FLOATING + number: _floating(number) for number in range(32)},
    **{_CSR + number: _csr(number, csr.name) for number, csr in sorted(CSRS.items())},
    PRIVILEGE: _privilege(),
}
"""All registers by GDB's numbers."""


def _feature(name: str, lines: list[str], types: str = "") -> str:
    text = "\n".join(lines)
    return (
        '<?xml version="1.0"?>\n<!DOCTYPE feature SYSTEM "gdb-target.dtd">\n'
        f'<feature name="org.gnu.gdb.riscv.{name}">\n{types}{text}\n</feature>\n'
    )


def _line(number: int, kind: str, group: str = "") -> str:
    shown = f' group="{group}"' if group else ""
    name = REGISTERS[number].name
    return f'  <reg name="{name}" bitsize="64" type="{kind}" regnum="{number}"{shown}/>'


_DOUBLE: Final = (
    '  <union id="riscv_double">\n    <field name="float" type="ieee_single"/>\n'
    '    <field name="double" type="ieee_double"/>\n  </union>\n'
)


def target_description() -> dict[str, str]:
    """The files of the target's description, by name; `target.xml` is the first."""
    integer = [_line(number, _POINTERS.get(INTEGER_NAMES[number], "int")) for number in range(32)]
    floating = [_line(_FLOATING + number, "riscv_double") for number in range(32)]
    floating += [_line(_CSR + number, "int", "float") for number in _OF_FLOATING_POINT]
    system = [
        _line(_CSR + number, "int", "csr")
        for number in sorted(CSRS)
        if number not in _OF_FLOATING_POINT
    ]
    files = {
        "riscv-64bit-cpu.xml": _feature("cpu", [*integer, _line(PC, "code_ptr")]),
        "riscv-64bit-fpu.xml": _feature("fpu", floating, _DOUBLE),
        "riscv-csr.xml": _feature("csr", system),
        "riscv-64bit-virtual.xml": _feature("virtual", [_line(PRIVILEGE, "int")]),
    }
    included = "\n".join(f'  <xi:include href="{name}"/>' for name in files)
    top = (
        '<?xml version="1.0"?>\n<!DOCTYPE target SYSTEM "gdb-target.dtd">\n'
        '<target xmlns:xi="http://www.w3.org/2001/XInclude">\n'
        f"  <architecture>riscv:rv64</architecture>\n{included}\n</target>\n"
    )
    return {"target.xml": top, **files}
