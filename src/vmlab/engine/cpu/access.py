"""Loads, stores and atomics on virtual memory, without the fast path of a TLB.

The reference executor uses this for every access, native code where its TLB misses. An access to
an address that is not RAM raises `DeviceAccess`: the executor leaves to the host with the whole
access, and the host completes it, once. The interrupt controllers' registers and the
UART's line status are done here.
"""

from __future__ import annotations

from vmlab.engine.cpu import interrupts
from vmlab.engine.cpu.core import Core, routine
from vmlab.engine.cpu.interrupts import (
    BUSY,
    UNKNOWN,
    line_status,
    load_register,
    register_offset,
    store_register,
    store_software,
)
from vmlab.engine.cpu.layout import (
    INTERRUPTS,
    RESERVATION_ADDRESS,
    RESERVATION_SIZE,
    RESERVATION_VALID,
    RESERVATION_VALUE,
)
from vmlab.engine.cpu.mmu import PAGE, READ, WRITE, access_fault, in_ram, translate
from vmlab.engine.isa.cpu import AtomicOperation, Cause, Trap
from vmlab.engine.isa.values import Value

BLOCK = 64  # bytes of a cache block, as the device tree says


class DeviceAccess(Exception):
    """An access that a device must answer.

    Args:
        address: the physical address.
        size: in bytes.
        data: what is written, 64 bits; None for a read.
    """

    def __init__(self, address: Value, size: int, data: Value | None) -> None:
        self.address = address
        self.size = size
        self.data = data
        super().__init__(repr(address), size)


def _crosses_page(address: Value, size: int) -> Value:
    return ~(address & (PAGE - 1)).below(PAGE - size + 1)


def load(core: Core, address: Value, size: int) -> Value:
    """Read `size` bytes into 64 bits, the upper ones zero.

    Raises:
        Trap: a page or access fault, or a misaligned access to a device.
        DeviceAccess: it is a device's address.
    """
    if size > 1 and _crosses_page(address, size):
        return load_across(core, address, Value(size))
    physical = translate(core, address, Value(size), Value(READ))
    if not in_ram(core, physical, size):
        if size > 1 and (physical & (size - 1)).ne(0):
            raise Trap(Cause.LOAD_MISALIGNED, address)
        if size == 4 and core[INTERRUPTS].ne(0):
            register = register_offset(core, physical)
            if register.below(interrupts.SIZE):
                value = load_register(core, register)
                if value.ne(BUSY):
                    return value
        if size == 1 and core[INTERRUPTS].ne(0):
            status = line_status(core, physical)
            if status.ne(UNKNOWN):
                return status
        raise DeviceAccess(physical, size, None)
    return core.physical_read(physical, size)


def store(core: Core, address: Value, size: int, value: Value) -> None:
    """Write the lowest `size` bytes of a value; raises as `load` does."""
    if size > 1 and _crosses_page(address, size):
        store_across(core, address, Value(size), value)
        return
    physical = translate(core, address, Value(size), Value(WRITE))
    if not in_ram(core, physical, size):
        if size > 1 and (physical & (size - 1)).ne(0):
            raise Trap(Cause.STORE_MISALIGNED, address)
        if size == 4 and core[INTERRUPTS].ne(0):
            register = register_offset(core, physical)
            word = value & 0xFFFF_FFFF
            if register.below(interrupts.SIZE):
                if store_register(core, register, word).ne(BUSY):
                    return
            elif store_software(core, physical, word).ne(BUSY):
                return
        raise DeviceAccess(physical, size, value)
    if core.is_observed(physical):
        raise DeviceAccess(physical, size, value)
    core.physical_write(physical, size, value)


def _both_halves(core: Core, address: Value, size: Value, access: int) -> tuple[Value, Value]:
    """The physical addresses of the two pages' parts, checked before anything is accessed."""
    second = (address + PAGE) & -PAGE
    before = second - address
    kind = Value(access)
    low = translate(core, address, before, kind)
    high = translate(core, second, size - before, kind)
    for physical, virtual in ((low, address), (high, second)):
        if not in_ram(core, physical, 1):
            raise access_fault(kind, virtual)
    return low, high


@routine(traps=True)
def load_across(core: Core, address: Value, size: Value) -> Value:
    """`load` of bytes in two pages, both of RAM."""
    low, high = _both_halves(core, address, size, READ)
    result = Value(0, 64)
    in_first = Value(PAGE, 64) - (address & (PAGE - 1))
    for index in range(8):
        if Value(index, 64).eq(size):
            return result
        position = Value(index, 64)
        physical = position.below(in_first).select(low + index, high + (position - in_first))
        result = result | (core.physical_read(physical, 1) << (8 * index))
    return result


@routine(traps=True)
def store_across(core: Core, address: Value, size: Value, value: Value) -> Value:
    """`store` of bytes in two pages, both of RAM; 0."""
    low, high = _both_halves(core, address, size, WRITE)
    in_first = Value(PAGE, 64) - (address & (PAGE - 1))
    for index in range(8):
        position = Value(index, 64)
        if position.eq(size):
            return Value(0, 64)
        physical = position.below(in_first).select(low + index, high + (position - in_first))
        core.physical_write(physical, 1, value >> (8 * index))
    return Value(0, 64)


# ------------------------------------------------------------------------------------------ atomics


def atomic_address(core: Core, address: Value, size: int, access: int) -> Value:
    """The physical address of an atomic access.

    Raises:
        Trap: misaligned, a fault, or not memory.
    """
    if (address & (size - 1)).ne(0):
        raise Trap(Cause.LOAD_MISALIGNED if access == READ else Cause.STORE_MISALIGNED, address)
    kind = Value(access)
    physical = translate(core, address, Value(size), kind)
    if not in_ram(core, physical, size):
        raise access_fault(kind, address)
    return physical


def combine(operation: AtomicOperation, old: Value, operand: Value) -> Value:
    """What an atomic operation writes."""
    match operation:
        case AtomicOperation.EXCHANGE:
            return operand
        case AtomicOperation.ADD:
            return old + operand
        case AtomicOperation.AND:
            return old & operand
        case AtomicOperation.OR:
            return old | operand
        case AtomicOperation.XOR:
            return old ^ operand
        case AtomicOperation.MAX:
            return old.less(operand).select(operand, old)
        case AtomicOperation.MIN:
            return old.less(operand).select(old, operand)
        case AtomicOperation.MAX_UNSIGNED:
            return old.below(operand).select(operand, old)
        case AtomicOperation.MIN_UNSIGNED:
            return old.below(operand).select(old, operand)


def reserve(core: Core, address: Value, value: Value) -> None:
    """Remember what `lr` read where."""
    core[RESERVATION_VALID] = 1
    core[RESERVATION_ADDRESS] = address
    core[RESERVATION_SIZE] = value.width // 8
    core[RESERVATION_VALUE] = value.zero_extend(64)


def take_reservation(core: Core, address: Value, size: int) -> tuple[Value, Value]:
    """End the reservation: whether it was for this address and size, and what was read."""
    same = core[RESERVATION_ADDRESS].eq(address) & core[RESERVATION_SIZE].eq(size)
    held = core[RESERVATION_VALID].ne(0) & same
    core[RESERVATION_VALID] = 0
    return held, core[RESERVATION_VALUE].low(8 * size)


def zero_block(core: Core, address: Value) -> None:
    """Write zeros to the cache block that holds an address.

    Raises:
        Trap: a fault, with the address given; an access fault where it is not memory.
    """
    physical = translate(core, address, Value(1), Value(WRITE)) & -BLOCK
    if not in_ram(core, physical, BLOCK):
        raise access_fault(Value(WRITE), address)
    for offset in range(0, BLOCK, 8):
        core.physical_write(physical + offset, 8, Value(0, 64))


def check_block(core: Core, address: Value) -> None:
    """Trap as cache management of a block would: it needs to be readable or writable."""
    try:
        translate(core, address, Value(1), Value(READ))
    except Trap:
        translate(core, address, Value(1), Value(WRITE))
