"""Traps, interrupts, and returns from them (RISC-V privileged 1.12, 3.1.6 to 3.1.9, 3.3, 4.1)."""

from __future__ import annotations

from vmlab.engine.cpu.core import Core, routine
from vmlab.engine.cpu.interrupts import controlled_lines, note_software_interrupt
from vmlab.engine.cpu.layout import (
    MCAUSE,
    MEDELEG,
    MENVCFG,
    MEPC,
    MIDELEG,
    MIE,
    MIP,
    MSTATUS,
    MTVAL,
    MTVEC,
    PRIVILEGE,
    RETIRED,
    SCAUSE,
    SEPC,
    SHARED_LINES,
    SHARED_MTIMECMP,
    STEP_MASKED,
    STEPPING,
    STIMECMP,
    STVAL,
    STVEC,
    TIME_DIVISOR,
    TIME_OFFSET,
    TRAP_RETIRED,
    TRAPS_IN_A_ROW,
)
from vmlab.engine.cpu.mmu import FETCH, MPP_SHIFT, MPRV, access_fault, in_ram, translate
from vmlab.engine.isa.cpu import Cause, Illegal, Trap
from vmlab.engine.isa.values import Value

# Bits of mstatus.
SIE, MIE_BIT, SPIE, MPIE, SPP = 1, 3, 5, 7, 8
TVM, TW, TSR = 20, 21, 22

# Interrupts, as bits of mip and as causes.
SSIP, MSIP, STIP, MTIP, SEIP, MEIP = 1, 3, 5, 7, 9, 11
_BY_PRIORITY = (MEIP, MSIP, MTIP, SEIP, SSIP, STIP)
INTERRUPT = 1 << 63

STCE = 63  # bit of menvcfg: stimecmp is there (Sstc)


@routine()
def read_time(core: Core) -> Value:
    """The CSR `time` in ticks: of the host's clock, or of so many retired instructions each."""
    divisor, offset = core[TIME_DIVISOR], core[TIME_OFFSET]
    if divisor.eq(0):
        return core.host_time() + offset
    return (core[RETIRED] + offset).divide_unsigned(divisor)


@routine()
def pending_interrupts(core: Core) -> Value:
    """All bits of mip: what software set, the lines, and the timers' comparisons."""
    note_software_interrupt(core)
    time = read_time(core)
    machine = ~time.below(core.shared(SHARED_MTIMECMP))
    supervisor = core[MENVCFG].bit(STCE) & ~time.below(core[STIMECMP])
    timers = (machine.zero_extend(64) << MTIP) | (supervisor.zero_extend(64) << STIP)
    return core[MIP] | core.shared(SHARED_LINES) | controlled_lines(core) | timers


@routine()
def interrupt_to_take(core: Core) -> Value:
    """The cause of the interrupt that is to be taken now, or 0."""
    pending = pending_interrupts(core) & core[MIE]
    if pending.eq(0):
        return Value(0, 64)
    status, privilege, delegated = core[MSTATUS], core[PRIVILEGE], core[MIDELEG]
    machine_on = privilege.below(3) | status.bit(MIE_BIT)
    supervisor_on = privilege.eq(0) | (privilege.eq(1) & status.bit(SIE))
    for_machine = machine_on.select(pending & ~delegated, 0)
    for_supervisor = supervisor_on.select(pending & delegated, 0)
    ready = for_machine.ne(0).select(for_machine, for_supervisor)
    cause = Value(0, 64)
    for bit in reversed(_BY_PRIORITY):
        cause = ready.bit(bit).select(Value(INTERRUPT | bit), cause)
    return (core[STEPPING] & STEP_MASKED).ne(0).select(Value(0, 64), cause)


@routine()
def take_trap(core: Core, cause: Value, value: Value, pc: Value) -> Value:
    """Enter the handler of an exception or an interrupt.

    Args:
        core: who takes it.
        cause: as in mcause.
        value: for mtval; an illegal instruction's bits are looked up here.
        pc: of the instruction that did not retire.

    Returns: the address of the handler.
    """
    retired = core[RETIRED]
    again = core[TRAP_RETIRED].eq(retired)
    core[TRAPS_IN_A_ROW] = again.select(core[TRAPS_IN_A_ROW] + 1, 0)
    core[TRAP_RETIRED] = retired
    if cause.eq(Cause.ILLEGAL.value) & value.eq(0):
        value = instruction_bits(core, pc)
    privilege, status = core[PRIVILEGE], core[MSTATUS]
    is_interrupt = cause.bit(63)
    delegation = is_interrupt.select(core[MIDELEG], core[MEDELEG])
    number = cause & 63
    if privilege.below(3) & (delegation >> number).low(1):
        core[SCAUSE], core[SEPC], core[STVAL] = cause, pc, value
        kept = status & ~(1 << SPIE | 1 << SIE | 1 << SPP)
        previous = ((status >> SIE) & 1) << SPIE
        core[MSTATUS] = kept | previous | ((privilege & 1) << SPP)
        core[PRIVILEGE] = 1
        vector = core[STVEC]
    else:
        core[MCAUSE], core[MEPC], core[MTVAL] = cause, pc, value
        kept = status & ~(1 << MPIE | 1 << MIE_BIT | 3 << MPP_SHIFT)
        previous = ((status >> MIE_BIT) & 1) << MPIE
        core[MSTATUS] = kept | previous | (privilege << MPP_SHIFT)
        core[PRIVILEGE] = 3
        vector = core[MTVEC]
    core.select_translations()
    vectored = is_interrupt & vector.bit(0)
    return (vector & ~3) + vectored.select(number << 2, 0)


@routine()
def instruction_bits(core: Core, pc: Value) -> Value:
    """The 16 or 32 bits of the instruction at an address, or 0 where it is gone."""
    try:
        first = core.physical_read(fetchable(core, pc), 2)
        if (first & 3).ne(3):
            return first
        return first | (core.physical_read(fetchable(core, pc + 2), 2) << 16)
    except Trap:
        return Value(0, 64)


@routine(traps=True)
def fetchable(core: Core, address: Value) -> Value:
    """The physical address of two bytes of code.

    Raises:
        Trap: they cannot be fetched, or are not in RAM.
    """
    physical = translate(core, address, Value(2), Value(FETCH))
    if not in_ram(core, physical, 2):
        raise access_fault(Value(FETCH), address)
    return physical


def return_from_machine_trap(core: Core) -> Value:
    """`mret`: the privilege and the interrupt enable as they were; the address to go to."""
    if core[PRIVILEGE].ne(3):
        raise Illegal
    status = core[MSTATUS]
    privilege = (status >> MPP_SHIFT) & 3
    kept = status & ~(1 << MIE_BIT | 1 << MPIE | 3 << MPP_SHIFT)
    enabled = ((status >> MPIE) & 1) << MIE_BIT
    _leave(core, kept | enabled | (1 << MPIE), privilege)
    return core[MEPC]


def return_from_supervisor_trap(core: Core) -> Value:
    """`sret`: the same from S mode."""
    status = core[MSTATUS]
    if core[PRIVILEGE].eq(0) | (core[PRIVILEGE].eq(1) & status.bit(TSR)):
        raise Illegal
    privilege = (status >> SPP) & 1
    kept = status & ~(1 << SIE | 1 << SPIE | 1 << SPP)
    enabled = ((status >> SPIE) & 1) << SIE
    _leave(core, kept | enabled | (1 << SPIE), privilege)
    return core[SEPC]


def _leave(core: Core, status: Value, privilege: Value) -> None:
    # Whoever returns to less than M mode no longer borrows a privilege (3.1.6.3).
    core[MSTATUS] = privilege.eq(3).select(status, status & ~(1 << MPRV))
    core[PRIVILEGE] = privilege
    core.select_translations()


def must_wait(core: Core) -> Value:
    """`wfi`: one bit, no interrupt that is enabled is pending."""
    privilege = core[PRIVILEGE]
    if privilege.eq(0) | (privilege.eq(1) & core[MSTATUS].bit(TW)):
        raise Illegal
    return (pending_interrupts(core) & core[MIE]).eq(0)
