"""Virtual memory: the walk of Sv39 and Sv48 tables (RISC-V privileged 1.12, 4.3 to 4.5).

A and D are set by the walk itself, with a compare-and-exchange. Bits 63 to 54 of an entry (Svnapot,
Svpbmt) are reserved. Addresses are 64 bits; an access is 0 to fetch, 1 to read, 2 to write.
"""

from __future__ import annotations

from vmlab.engine.cpu.core import Core, routine
from vmlab.engine.cpu.layout import (
    MSTATUS,
    PRIVILEGE,
    RAM_BASE,
    RAM_SIZE,
    SATP,
    WALK_LEVEL,
    WALKS,
)
from vmlab.engine.cpu.pmp import allows
from vmlab.engine.isa.cpu import Cause, Trap
from vmlab.engine.isa.values import Value

FETCH, READ, WRITE = 0, 1, 2
PAGE = 4096

# Bits of mstatus.
MPP_SHIFT = 11
MPRV, SUM, MXR = 17, 18, 19

# Bits of a page table entry.
_VALID, _READABLE, _WRITABLE, _EXECUTABLE, _USER, _ACCESSED, _DIRTY = 0, 1, 2, 3, 4, 6, 7
_BARE, _SV39, _SV48 = 0, 8, 9


def in_ram(core: Core, address: Value, size: int) -> Value:
    """One bit: all `size` bytes are RAM."""
    return (address - core[RAM_BASE]).below(core[RAM_SIZE] - (size - 1))


def effective_privilege(core: Core, access: Value) -> Value:
    """As whom memory is accessed: MPRV lends loads and stores the privilege in MPP."""
    status = core[MSTATUS]
    lent = status.bit(MPRV) & access.ne(FETCH)
    return lent.select((status >> MPP_SHIFT) & 3, core[PRIVILEGE])


def page_fault(access: Value, address: Value) -> Trap:
    """The fault of an access that translation refuses."""
    cause = access.eq(FETCH).select(
        Value(Cause.FETCH_PAGE.value),
        access.eq(READ).select(Value(Cause.LOAD_PAGE.value), Cause.STORE_PAGE.value),
    )
    return Trap(cause, address)


def access_fault(access: Value, address: Value) -> Trap:
    """The fault of an access that nothing answers or PMP refuses."""
    cause = access.eq(FETCH).select(
        Value(Cause.FETCH_ACCESS.value),
        access.eq(READ).select(Value(Cause.LOAD_ACCESS.value), Cause.STORE_ACCESS.value),
    )
    return Trap(cause, address)


@routine(traps=True)
def translate(core: Core, address: Value, size: Value, access: Value) -> Value:
    """The physical address of a virtual one.

    The bytes (1 to 8, or a page) must lie in one page.

    Raises:
        Trap: a page fault, or an access fault.
    """
    privilege = effective_privilege(core, access)
    mode = core[SATP] >> 60
    if privilege.eq(3) | mode.eq(_BARE):
        core[WALK_LEVEL] = 0
        physical = address
    else:
        table = (core[SATP] & ((1 << 44) - 1)) << 12
        if mode.eq(_SV39):
            levels, unused = Value(2, 64), Value(64 - 39, 64)
        else:
            levels, unused = Value(3, 64), Value(64 - 48, 64)
        if (address << unused).shift_right_signed(unused).ne(address):
            raise page_fault(access, address)
        core[WALKS] = core[WALKS] + 1
        physical = walk(core, address, access, privilege, table, levels)
    if not allows(core, physical, size, access, privilege):
        raise access_fault(access, address)
    if in_ram(core, physical, 1) & allows(core, physical & -PAGE, Value(PAGE), access, privilege):
        core.fill_translation(access, address, physical)
    return physical


@routine(traps=True)
def walk(  # noqa: PLR0917 (a routine takes its values by place)
    core: Core, address: Value, access: Value, privilege: Value, table: Value, level: Value
) -> Value:
    """One level of the walk, and by calling itself those below it.

    Args:
        core: whose tables.
        address: what is looked for.
        access: to do what.
        privilege: the effective one.
        table: physical address of this level's table.
        level: 3 or 2 down to 0, the level of 4 KiB pages.
    """
    shift = level * 9 + 12
    entry_address = table + (((address >> shift) & 511) << 3)
    if not in_ram(core, entry_address, 8):
        raise access_fault(access, address)
    if not allows(core, entry_address, Value(8), Value(READ), Value(1)):
        raise access_fault(access, address)
    entry = core.physical_read(entry_address, 8)
    readable, writable = entry.bit(_READABLE), entry.bit(_WRITABLE)
    executable, user = entry.bit(_EXECUTABLE), entry.bit(_USER)
    invalid = ~entry.bit(_VALID) | (writable & ~readable) | (entry >> 54).ne(0)
    page = ((entry >> 10) & ((1 << 44) - 1)) << 12
    if invalid:
        raise page_fault(access, address)
    if ~(readable | executable):
        # A pointer to the next table: D, A and U are reserved in it.
        if level.eq(0) | (entry & (1 << _USER | 1 << _ACCESSED | 1 << _DIRTY)).ne(0):
            raise page_fault(access, address)
        return walk(core, address, access, privilege, page, level - 1)
    status = core[MSTATUS]
    fetching, writing = access.eq(FETCH), access.eq(WRITE)
    supervisor_may = ~user | (status.bit(SUM) & ~fetching)
    privilege_may = privilege.eq(0).select(user, supervisor_may)
    permitted = fetching.select(
        executable, writing.select(writable, readable | (status.bit(MXR) & executable))
    )
    within = (Value(1, 64) << shift) - 1
    misaligned = (page & within).ne(0)
    if ~permitted | ~privilege_may | misaligned:
        raise page_fault(access, address)
    wanted = entry | (1 << _ACCESSED) | (writing.zero_extend(64) << _DIRTY)
    if wanted.ne(entry):
        if not allows(core, entry_address, Value(8), Value(WRITE), Value(1)):
            raise access_fault(access, address)
        if not core.physical_compare_exchange(entry_address, entry, wanted):
            return walk(core, address, access, privilege, table, level)
    core[WALK_LEVEL] = level
    return page | (address & within)
