"""What runs between handlers: polling, finding code, taking traps, what is no instruction.

Of each function `%p` is the next instruction's address where its `%r` means nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from vmlab.engine.compile.dispatch import (
    RECORD_IMMEDIATE,
    SIGNATURE,
    dispatch,
    leave,
    note_trap,
    pc_of_record,
    remaining,
    tail_call,
)
from vmlab.engine.compile.emitter import FunctionEmitter
from vmlab.engine.compile.native import (
    ATTRIBUTES,
    PAGE_MASK,
    UNUSED,
    ModuleEmitter,
    NativeCore,
    remember_large,
)
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.exits import Reason
from vmlab.engine.cpu.mmu import FETCH
from vmlab.engine.cpu.pmp import allows
from vmlab.engine.cpu.polling import poll
from vmlab.engine.cpu.traps import fetchable, take_trap
from vmlab.engine.isa.cpu import Cause, Trap
from vmlab.engine.isa.values import Value

_PAGE_END = "page_end"


def write_glue(module: ModuleEmitter, names: list[str]) -> None:
    """Write all of it.

    Args:
        module: where it goes.
        names: of the handlers that records may name, by number; those in here are added.
    """

    def add(name: str, body: Callable[[NativeCore], None], linkage: str = "internal") -> None:
        function = FunctionEmitter()
        core = NativeCore(module, function)
        function.explore(lambda: body(core))
        header = f'define {linkage} tailcc void @"{name}"({SIGNATURE}) {ATTRIBUTES}'
        module.add(name, function.text(header))

    for name, body in _HANDLERS.items():
        add(f"h.{len(names)}.{name}", body, "hidden")
        names.append(name)
    add(f"c.{names.index(_PAGE_END)}.{_PAGE_END}", _page_end_counted, "hidden")
    for name, body in _FUNCTIONS.items():
        add(name, body)


def _pc_argument(core: NativeCore) -> Value:
    return Value("%p", 64, core.function)


def _poll_at(core: NativeCore) -> None:
    function = core.function
    left = poll(core, _pc_argument(core), remaining(function))
    if function.unlikely(left.eq(0)):
        function.effect("ret void")
        return
    tlb = core.pointer(core[layout.TLB])
    tail_call(function, "@find", base=core[layout.PC], budget=left, tlb=tlb)


def _poll_near(core: NativeCore) -> None:
    tail_call(core.function, "@poll_at", base=pc_of_record(core.function))


def _lookup(core: NativeCore, *, counted: bool = False) -> None:
    if core.function.unlikely(remaining(core.function).less(1)):
        tail_call(core.function, "@poll_at")
        return
    _find(core, counted=counted)


def _dispatch_at(core: NativeCore, records: Value, pc: Value) -> None:
    """Go on with the instruction at `pc`, whose page's first record is at `records`."""
    function = core.function
    record = core.element(core.pointer(records), (pc & 4095) << 3)
    base = (pc & PAGE_MASK) - (records >> 3)
    dispatch(function, record, base=base)


def _find(core: NativeCore, *, counted: bool = False) -> None:
    function = core.function
    pc = _pc_argument(core)
    entry = core.entry("%t", layout.TLB_CODE, pc)
    page = function.value(f"load i64, ptr {entry}")
    if function.likely(page.eq(pc & PAGE_MASK)):
        if counted:
            core.count("%t", layout.CODE_HITS)
        records = function.value(f"load i64, ptr {core.element(entry, 8)}")
        _dispatch_at(core, records, pc)
    else:
        tail_call(function, "@find_slowly")


def _find_slowly(core: NativeCore) -> None:
    function = core.function
    pc = _pc_argument(core)
    try:
        physical = fetchable(core, pc)
    except Trap as trap:
        note_trap(core, trap)
        tail_call(function, "@trap_at")
        return
    if core[layout.STEPPING].ne(0):
        tail_call(function, "@single")
        return
    # Protection that differs within a page is looked at for each instruction.
    whole = allows(core, physical & PAGE_MASK, Value(4096), Value(FETCH), core[layout.PRIVILEGE])
    core[layout.EXIT_DATA] = whole.zero_extend(64)
    if function.unlikely((core[layout.BREAK_PAGES] >> ((pc >> 12) & 63)).low(1)):
        if core[layout.OFFERED_PAGE].eq(pc & PAGE_MASK):
            core[layout.OFFERED_PAGE] = layout.NO_OFFER
            if whole:
                _enter_page(core, core[layout.OFFERED_RECORDS], pc)
            else:
                tail_call(function, "@single")
        else:
            core[layout.EXIT_ADDRESS] = physical
            leave(core, pc, remaining(function), Reason.CODE)
        return
    if ~whole:
        tail_call(function, "@single")
        return
    page = (physical - core[layout.RAM_BASE]) >> 12
    slot = core.element(core.pointer(core[layout.CODE_MAP]), page << 3)
    records = function.value(f"load atomic i64, ptr {slot} acquire, align 8")
    if records.eq(0):
        core[layout.EXIT_ADDRESS] = physical
        leave(core, pc, remaining(function), Reason.CODE)
        return
    _enter_page(core, records, pc)


def _enter_page(core: NativeCore, records: Value, pc: Value) -> None:
    """Remember where the records of a page are, and go on with the instruction at `pc` there."""
    entry = core.entry("%t", layout.TLB_CODE, pc)
    core.store_at(entry, records, 8)
    core.store_at(entry, pc & PAGE_MASK)
    remember_large(core, pc)
    core[layout.CODE_FILLS] = core[layout.CODE_FILLS] + 1
    core.count("%t", layout.CODE_MISSES)
    _dispatch_at(core, records, pc)


def _single(core: NativeCore) -> None:
    """Decode one instruction from memory and execute it from a record of its own."""
    function = core.function
    pc = _pc_argument(core)
    length = Value(2, 64)
    try:
        word = core.physical_read(fetchable(core, pc), 2)
        if (word & 3).eq(3):
            word = word | (core.physical_read(fetchable(core, pc + 2), 2) << 16)
            length = Value(4, 64)
    except Trap as trap:
        note_trap(core, trap)
        tail_call(function, "@trap_at")
        return
    # What follows is a poll point only at the end of a page, or of a step.
    near = core[layout.STEPPING].eq(0) & (((pc + length) ^ pc) & PAGE_MASK).eq(0)
    scratch = core[layout.SCRATCH] + near.select(Value(layout.NEAR_SCRATCH), 0)
    record = core.pointer(scratch)
    handlers = core.pointer(core[layout.HANDLERS])
    # An offset that is in no page: every branch goes far.
    function.effect(
        f"call fastcc void @decode(i32 {word.low(32).text}, ptr {record}, "
        f"i64 1048576, ptr {handlers})"
    )
    dispatch(function, record, base=pc - (scratch >> 3))


def _trap(core: NativeCore) -> None:
    tail_call(core.function, "@trap_at", base=pc_of_record(core.function))


def _trap_at(core: NativeCore) -> None:
    function = core.function
    core[layout.RETIRED] = core[layout.SLICE_END] - remaining(function)
    handler = take_trap(core, core[layout.TRAP_CAUSE], core[layout.TRAP_VALUE], _pc_argument(core))
    if core[layout.STEPPING].ne(0):
        leave(core, handler, remaining(function), Reason.BUDGET)
    else:
        tail_call(function, "@poll_at", base=handler)


def _page_end(core: NativeCore) -> None:
    tail_call(core.function, "@lookup", base=pc_of_record(core.function))


def _page_end_counted(core: NativeCore) -> None:
    tail_call(core.function, "@lookup.counted", base=pc_of_record(core.function))


def _near_end(core: NativeCore) -> None:
    tail_call(core.function, "@find", base=pc_of_record(core.function))


def _crossing(core: NativeCore) -> None:
    tail_call(core.function, "@single", base=pc_of_record(core.function))


def _illegal(core: NativeCore) -> None:
    pointer = core.element("%r", RECORD_IMMEDIATE)
    word = core.function.value(f"load i32, ptr {pointer}", 32).zero_extend(64)
    note_trap(core, Trap(Cause.ILLEGAL, word))
    tail_call(core.function, "@trap")


def _breakpoint(core: NativeCore) -> None:
    leave(core, pc_of_record(core.function), remaining(core.function), Reason.BREAKPOINT)


def _stale(core: NativeCore) -> None:
    pc = pc_of_record(core.function)
    core.store_at(core.entry("%t", layout.TLB_CODE, pc), Value(UNUSED, 64))
    tail_call(core.function, "@find", base=pc)


_HANDLERS: dict[str, Callable[[NativeCore], None]] = {
    _PAGE_END: _page_end,
    "near_end": _near_end,
    "crossing": _crossing,
    "illegal": _illegal,
    "breakpoint": _breakpoint,
    "stale": _stale,
}
"""Handlers that are no instruction's."""
_FUNCTIONS: dict[str, Callable[[NativeCore], None]] = {
    "poll_at": _poll_at,
    "poll_near": _poll_near,
    "lookup": _lookup,
    "lookup.counted": lambda core: _lookup(core, counted=True),
    "find": _find,
    "find_slowly": _find_slowly,
    "single": _single,
    "trap": _trap,
    "trap_at": _trap_at,
}
