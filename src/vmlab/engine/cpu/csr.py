"""Control and status registers: who may access them, what they read as, what they keep of a write.

RISC-V privileged 1.12, chapters 2 to 4; Sstc 1.0; unprivileged 20191213, chapters 10 and 11.2.
One table says it all; `read_csr` and `write_csr` are made from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmlab.engine.cpu import layout, pmp
from vmlab.engine.cpu.core import Core, routine
from vmlab.engine.cpu.layout import Field
from vmlab.engine.cpu.mmu import MPP_SHIFT, MPRV, MXR, SUM
from vmlab.engine.cpu.traps import (
    MEIP,
    MIE_BIT,
    MPIE,
    MSIP,
    MTIP,
    SEIP,
    SIE,
    SPIE,
    SPP,
    SSIP,
    STCE,
    STIP,
    TSR,
    TVM,
    TW,
    pending_interrupts,
    read_time,
)
from vmlab.engine.isa.cpu import Illegal
from vmlab.engine.isa.values import Value

Reader = Callable[[Core], Value]
Writer = Callable[[Core, Value], None]


@dataclass(frozen=True)
class Csr:
    """A register: its number, name, and how it is read and written; `check` may refuse both."""

    number: int
    name: str
    read: Reader
    write: Writer
    check: Callable[[Core], Value] | None = None  # one bit: accessible


CSRS: dict[int, Csr] = {}

FLOATING_STATE = 3 << 13  # FS in mstatus
_WRITABLE_STATUS = (
    1 << SIE | 1 << MIE_BIT | 1 << SPIE | 1 << MPIE | 1 << SPP | 3 << MPP_SHIFT | FLOATING_STATE
    | 1 << MPRV | 1 << SUM | 1 << MXR | 1 << TVM | 1 << TW | 1 << TSR
)  # fmt: skip
_SUPERVISOR_STATUS = 1 << SIE | 1 << SPIE | 1 << SPP | FLOATING_STATE | 1 << SUM | 1 << MXR
_UXL, _SXL = 2 << 32, 2 << 34  # 64 bits in all modes
_SUPERVISOR_INTERRUPTS = 1 << SSIP | 1 << STIP | 1 << SEIP
_INTERRUPTS = _SUPERVISOR_INTERRUPTS | 1 << MSIP | 1 << MTIP | 1 << MEIP
# All exceptions but a call from M mode and those whose numbers are reserved.
_DELEGABLE = 0b1011_0011_1111_1111
MISA = 2 << 62 | sum(1 << (ord(letter) - ord("A")) for letter in "ACDFIMSU")
_COUNTERS = 0b111  # cycle, time, instret
_CBIE, _CBCFE, _CBZE = 3 << 4, 1 << 6, 1 << 7
_ENVIRONMENT = 1 | _CBIE | _CBCFE | _CBZE


def _define(
    number: int,
    name: str,
    read: Reader,
    write: Writer,
    check: Callable[[Core], Value] | None = None,
) -> None:
    assert number not in CSRS, name
    CSRS[number] = Csr(number, name, read, write, check)


def _stored(number: int, field: Field, kept: int = (1 << 64) - 1) -> None:
    """A register that keeps the bits `kept` of what is written."""

    def write(core: Core, value: Value) -> None:
        core[field] = value & kept

    _define(number, field.name, lambda core: core[field], write)


def _fixed(number: int, name: str, bits: int = 0) -> None:
    """A register that reads as always, whatever is written."""
    _define(number, name, lambda _core: Value(bits), lambda _core, _value: None)


# ----------------------------------------------------------------------------------- floating point


def _floating_on(core: Core) -> Value:
    return (core[layout.MSTATUS] & FLOATING_STATE).ne(0)


def mark_floating_dirty(core: Core) -> None:
    """The floating-point state was written: FS becomes dirty."""
    core[layout.MSTATUS] = core[layout.MSTATUS] | FLOATING_STATE


def _write_flags(core: Core, value: Value) -> None:
    core[layout.FFLAGS] = value & 31
    mark_floating_dirty(core)


def _write_rounding(core: Core, value: Value) -> None:
    core[layout.FRM] = value & 7
    mark_floating_dirty(core)


def _write_fcsr(core: Core, value: Value) -> None:
    _write_flags(core, value)
    _write_rounding(core, value >> 5)


_define(0x001, "fflags", lambda core: core[layout.FFLAGS], _write_flags, _floating_on)
_define(0x002, "frm", lambda core: core[layout.FRM], _write_rounding, _floating_on)
_define(
    0x003,
    "fcsr",
    lambda core: core[layout.FFLAGS] | (core[layout.FRM] << 5),
    _write_fcsr,
    _floating_on,
)

# ----------------------------------------------------------------------------------------- counters


def _counter_allowed(bit: int) -> Callable[[Core], Value]:
    def check(core: Core) -> Value:
        privilege = core[layout.PRIVILEGE]
        by_machine = core[layout.MCOUNTEREN].bit(bit) | privilege.eq(3)
        return by_machine & (core[layout.SCOUNTEREN].bit(bit) | privilege.ne(0))

    return check


def _instructions(core: Core) -> Value:
    return core[layout.RETIRED] + core[layout.MINSTRET_OFFSET]


def _cycles(core: Core) -> Value:
    # A cycle is an instruction: what a guest computes from the two is at least the same each time.
    return core[layout.RETIRED] + core[layout.MCYCLE_OFFSET]


def _write_instructions(core: Core, value: Value) -> None:
    # The instruction after the write reads what was written (3.1.11).
    core[layout.MINSTRET_OFFSET] = value - core[layout.RETIRED] - 1


def _write_cycles(core: Core, value: Value) -> None:
    core[layout.MCYCLE_OFFSET] = value - core[layout.RETIRED] - 1


def _nothing(_core: Core, _value: Value) -> None:
    """Writes are refused by the number or change nothing."""


_define(0xC00, "cycle", _cycles, _nothing, _counter_allowed(0))
_define(0xC01, "time", read_time, _nothing, _counter_allowed(1))
_define(0xC02, "instret", _instructions, _nothing, _counter_allowed(2))
_define(0xB00, "mcycle", _cycles, _write_cycles)
_define(0xB02, "minstret", _instructions, _write_instructions)
for _index in range(3, 32):
    _fixed(0xB00 + _index, f"mhpmcounter{_index}")
    _fixed(0x320 + _index, f"mhpmevent{_index}")
_fixed(0x320, "mcountinhibit")

# --------------------------------------------------------------------------------- supervisor level


def _read_status(core: Core) -> Value:
    status = core[layout.MSTATUS]
    dirty = (status & FLOATING_STATE).eq(FLOATING_STATE).zero_extend(64)
    return status | (_UXL | _SXL) | (dirty << 63)


def _write_sstatus(core: Core, value: Value) -> None:
    kept = core[layout.MSTATUS] & ~_SUPERVISOR_STATUS
    core[layout.MSTATUS] = kept | (value & _SUPERVISOR_STATUS)
    core.select_translations()


def _write_mstatus(core: Core, value: Value) -> None:
    # A privilege of 2 does not exist: MPP stays as it is.
    old = core[layout.MSTATUS]
    reserved = ((value >> MPP_SHIFT) & 3).eq(2)
    value = reserved.select((value & ~(3 << MPP_SHIFT)) | (old & (3 << MPP_SHIFT)), value)
    core[layout.MSTATUS] = (old & ~_WRITABLE_STATUS) | (value & _WRITABLE_STATUS)
    core.select_translations()


def _write_sie(core: Core, value: Value) -> None:
    delegated = core[layout.MIDELEG]
    core[layout.MIE] = (core[layout.MIE] & ~delegated) | (value & delegated)


def _write_sip(core: Core, value: Value) -> None:
    writable = core[layout.MIDELEG] & (1 << SSIP)
    core[layout.MIP] = (core[layout.MIP] & ~writable) | (value & writable)


def _write_mip(core: Core, value: Value) -> None:
    # With Sstc the timer's bit is the comparison, and nobody's to write.
    timer = core[layout.MENVCFG].bit(STCE).select(Value(0), 1 << STIP)
    writable = timer | (1 << SSIP | 1 << SEIP)
    core[layout.MIP] = (core[layout.MIP] & ~writable) | (value & writable)


def _write_tvec(field: Field) -> Writer:
    def write(core: Core, value: Value) -> None:
        core[field] = value.bit(1).select(core[field], value)

    return write


def _satp_allowed(core: Core) -> Value:
    return core[layout.PRIVILEGE].ne(1) | ~core[layout.MSTATUS].bit(TVM)


def _write_satp(core: Core, value: Value) -> None:
    mode = value >> 60
    supported = mode.eq(0) | mode.eq(8) | mode.eq(9)
    core[layout.SATP] = supported.select(value, core[layout.SATP])
    core.select_translations()


def _stimecmp_allowed(core: Core) -> Value:
    lent = core[layout.MENVCFG].bit(STCE) & core[layout.MCOUNTEREN].bit(1)
    return core[layout.PRIVILEGE].eq(3) | lent


def _write_word(field: Field) -> Writer:
    def write(core: Core, value: Value) -> None:
        core[field] = value

    return write


_supervisor_view = (_SUPERVISOR_STATUS | _UXL) | 1 << 63
_define(0x100, "sstatus", lambda core: _read_status(core) & _supervisor_view, _write_sstatus)
_define(0x104, "sie", lambda core: core[layout.MIE] & core[layout.MIDELEG], _write_sie)
_define(0x105, "stvec", lambda core: core[layout.STVEC], _write_tvec(layout.STVEC))
_stored(0x106, layout.SCOUNTEREN, _COUNTERS)
_stored(0x10A, layout.SENVCFG, _ENVIRONMENT)
_stored(0x140, layout.SSCRATCH)
_stored(0x141, layout.SEPC, ~1)
_stored(0x142, layout.SCAUSE)
_stored(0x143, layout.STVAL)
_define(
    0x144,
    "sip",
    lambda core: pending_interrupts(core) & core[layout.MIDELEG],
    _write_sip,
)
_define(
    0x14D,
    "stimecmp",
    lambda core: core[layout.STIMECMP],
    _write_word(layout.STIMECMP),
    _stimecmp_allowed,
)
_define(0x180, "satp", lambda core: core[layout.SATP], _write_satp, _satp_allowed)

# ------------------------------------------------------------------------------------ machine level

_fixed(0xF11, "mvendorid")
_fixed(0xF12, "marchid")
_fixed(0xF13, "mimpid")
_define(0xF14, "mhartid", lambda core: core[layout.HARTID], _nothing)
_fixed(0xF15, "mconfigptr")
_define(0x300, "mstatus", _read_status, _write_mstatus)
_fixed(0x301, "misa", MISA)
_stored(0x302, layout.MEDELEG, _DELEGABLE)
_stored(0x303, layout.MIDELEG, _SUPERVISOR_INTERRUPTS)
_stored(0x304, layout.MIE, _INTERRUPTS)
_define(0x305, "mtvec", lambda core: core[layout.MTVEC], _write_tvec(layout.MTVEC))
_stored(0x306, layout.MCOUNTEREN, _COUNTERS)
_stored(0x30A, layout.MENVCFG, _ENVIRONMENT | 1 << STCE)
_stored(0x340, layout.MSCRATCH)
_stored(0x341, layout.MEPC, ~1)
_stored(0x342, layout.MCAUSE)
_stored(0x343, layout.MTVAL)
_define(0x344, "mip", pending_interrupts, _write_mip)


def _pmp_configuration(field: Field) -> Writer:
    return lambda core, value: pmp.write_configuration(core, field, value)


def _pmp_address(index: int) -> Writer:
    return lambda core, value: pmp.write_address(core, index, value)


def _reader(field: Field) -> Reader:
    return lambda core: core[field]


for _number, _field in ((0x3A0, layout.PMPCFG0), (0x3A2, layout.PMPCFG2)):
    _define(_number, _field.name, _reader(_field), _pmp_configuration(_field))
for _index, _field in enumerate(layout.PMPADDR):
    _define(0x3B0 + _index, _field.name, _reader(_field), _pmp_address(_index))

# ------------------------------------------------------------------------------------------- access


def _check_privilege(core: Core, number: Value, writes: Value) -> None:
    too_low = core[layout.PRIVILEGE].below((number >> 8) & 3)
    read_only = (number >> 10).eq(3) & writes.ne(0)
    if too_low | read_only:
        raise Illegal


@routine(traps=True)
def read_csr(core: Core, number: Value, writes: Value) -> Value:
    """The value of a register; `writes` is 1 where the instruction goes on to write it.

    Raises:
        Illegal: there is no such register, or not for this privilege, or it is read-only.
    """
    number = number & 0xFFF
    _check_privilege(core, number, writes)
    for csr in CSRS.values():
        if number.eq(csr.number):
            if csr.check is not None and not csr.check(core):
                raise Illegal
            return csr.read(core)
    raise Illegal


@routine(traps=True)
def write_csr(core: Core, number: Value, value: Value) -> Value:
    """Write a register that `read_csr` let the instruction read; 0.

    Raises:
        Illegal: there is no such register.
    """
    number = number & 0xFFF
    for csr in CSRS.values():
        if number.eq(csr.number):
            csr.write(core, value)
            return Value(0, 64)
    raise Illegal


@routine()
def stored_csr(core: Core, number: Value, value: Value) -> Value:
    """What a set or clear of bits starts from: `value`, but for mip the bits that are stored.

    SEIP reads as the OR with the interrupt controller's line (privileged 1.12, 3.1.9).
    """
    number = number & 0xFFF
    if number.eq(0x344) | number.eq(0x144):
        return core[layout.MIP]
    return value
