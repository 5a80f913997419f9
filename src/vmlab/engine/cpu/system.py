"""The routines that instructions ask for by name (`Cpu.system_call`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from vmlab.engine.cpu import layout
from vmlab.engine.cpu.core import Core, routine
from vmlab.engine.cpu.csr import FLOATING_STATE, read_csr, stored_csr, write_csr
from vmlab.engine.cpu.fences import fence_harts
from vmlab.engine.cpu.floating import FLOATING, rounding_mode
from vmlab.engine.cpu.interrupts import are_harts, send_software_interrupts
from vmlab.engine.cpu.layout import FIRMWARE_CALLS, MENVCFG, MSTATUS, PRIVILEGE, SENVCFG
from vmlab.engine.cpu.traps import (
    TVM,
    must_wait,
    return_from_machine_trap,
    return_from_supervisor_trap,
)
from vmlab.engine.isa.cpu import Cause, Illegal, Trap
from vmlab.engine.isa.values import Value

SEND_IPI = 0x735049  # the extension of SBI 1.0, chapter 7; its function 0
REMOTE_FENCE = 0x52464E43  # that of chapter 8; functions 0 to 2, fence.i, sfence.vma, and by ASID
_FIRST, _SECOND, _FUNCTION, _EXTENSION = (layout.INTEGER[number] for number in (10, 11, 16, 17))


class FirmwareCall(Exception):
    """The guest calls firmware that the host provides; the instruction retires."""


def environment_call(core: Core) -> Value:
    """`ecall`: an exception, or from S mode a call of firmware that the host provides.

    Interrupts for other harts, and fences, are sent here, unless the host has to wake one of them.
    """
    privilege = core[PRIVILEGE]
    if core[FIRMWARE_CALLS].ne(0) & privilege.eq(1):
        if _sent(core, core[_FIRST], core[_SECOND]).ne(0):
            core[_FIRST] = core[_SECOND] = 0
            return Value(0, 64)
        raise FirmwareCall
    raise Trap(privilege + Cause.CALL_FROM_USER.value)


@routine()
def _sent(core: Core, harts: Value, first: Value) -> Value:
    """1 where a call of firmware was for other harts, and they have what it is about."""
    extension, function = core[_EXTENSION], core[_FUNCTION]
    if extension.eq(SEND_IPI) & function.eq(0):
        return send_software_interrupts(core, harts, first)
    if extension.eq(REMOTE_FENCE) & function.below(3):
        # What is stored to code is executed by all harts anyway.
        if function.eq(0):
            return are_harts(core, harts, first)
        return fence_harts(core, harts, first)
    return Value(0, 64)


def check_supervisor(core: Core) -> Value:
    """Refuse U mode."""
    if core[PRIVILEGE].eq(0):
        raise Illegal
    return Value(0, 64)


def check_fence_allowed(core: Core) -> Value:
    """Refuse U mode, and S mode where M mode wants to know of it (TVM)."""
    privilege = core[PRIVILEGE]
    if privilege.eq(0) | (privilege.eq(1) & core[MSTATUS].bit(TVM)):
        raise Illegal
    return Value(0, 64)


def flush_translations(
    core: Core, by_address: Value, address: Value, by_space: Value, space: Value
) -> Value:
    """`sfence.vma` and `sinval.vma`."""
    core.flush_translations(by_address, address, by_space, space)
    return Value(0, 64)


def _environment_allows(core: Core, bits: int) -> Value:
    """One bit: menvcfg, and in U mode senvcfg, have one of these bits set."""
    privilege = core[PRIVILEGE]
    machine = privilege.eq(3) | (core[MENVCFG] & bits).ne(0)
    return machine & (privilege.ne(0) | (core[SENVCFG] & bits).ne(0))


def check_block_management(core: Core, invalidate: Value) -> Value:
    """Refuse `cbo.inval` (1), `cbo.clean` and `cbo.flush` (0) where an environment forbids them."""
    if invalidate:
        allowed = _environment_allows(core, 3 << 4)
    else:
        allowed = _environment_allows(core, 1 << 6)
    if not allowed:
        raise Illegal
    return Value(0, 64)


def check_floating(core: Core) -> Value:
    """Refuse floating-point instructions where FS is off."""
    if core.hurried:
        core.expect((core[MSTATUS] & FLOATING_STATE).ne(0))
    elif (core[MSTATUS] & FLOATING_STATE).eq(0):
        raise Illegal
    return Value(0, 64)


def use_floating(core: Core) -> Value:
    """The same, and FS becomes dirty."""
    if core.hurried:
        core.expect((core[MSTATUS] & FLOATING_STATE).eq(FLOATING_STATE))
        return Value(0, 64)
    check_floating(core)
    core[MSTATUS] = core[MSTATUS] | FLOATING_STATE
    return Value(0, 64)


def check_block_zero(core: Core) -> Value:
    """Refuse `cbo.zero` where an environment forbids it."""
    if not _environment_allows(core, 1 << 7):
        raise Illegal
    return Value(0, 64)


SYSTEM: Mapping[str, Callable[..., Value]] = MappingProxyType(
    {
        function.__name__: function
        for function in (
            check_block_management,
            check_block_zero,
            check_fence_allowed,
            check_floating,
            check_supervisor,
            environment_call,
            flush_translations,
            must_wait,
            read_csr,
            rounding_mode,
            return_from_machine_trap,
            return_from_supervisor_trap,
            stored_csr,
            use_floating,
            write_csr,
        )
    }
    | FLOATING
)
