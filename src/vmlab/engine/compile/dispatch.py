"""How one function of the interpreter goes on with the next: tail calls, and the host's part.

All of them have one signature; what its parameters mean is in vmlab.engine.compile.interpreter.
"""

from __future__ import annotations

from vmlab.engine.compile.emitter import FunctionEmitter
from vmlab.engine.compile.native import NativeCore
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.exits import Reason
from vmlab.engine.isa.cpu import Trap
from vmlab.engine.isa.values import Value

SIGNATURE = "ptr noalias %s, ptr %r, i64 %p, i64 %b, ptr %t"
RECORD_IMMEDIATE = 8


def pc_of_record(function: FunctionEmitter) -> Value:
    """The address of the instruction whose record is `%r`."""
    record = function.value("ptrtoint ptr %r to i64")
    return Value("%p", 64, function) + (record >> 3)


def tail_call(
    function: FunctionEmitter,
    handler: str,
    *,
    record: str = "%r",
    base: Value | str = "%p",
    budget: Value | str = "%b",
    tlb: str = "%t",
) -> None:
    """Go on in another function; what is not named stays as it is."""
    base = base.text if isinstance(base, Value) else base
    budget = budget.text if isinstance(budget, Value) else budget
    function.effect(
        f"musttail call tailcc void {handler}"
        f"(ptr %s, ptr {record}, i64 {base}, i64 {budget}, ptr {tlb})"
    )
    function.effect("ret void")


def dispatch(
    function: FunctionEmitter,
    record: str,
    *,
    base: Value | str = "%p",
    budget: Value | str = "%b",
) -> None:
    """Go on with the instruction of a record."""
    handler = function.operation(f"load ptr, ptr {record}")
    tail_call(function, handler, record=record, base=base, budget=budget)


def remaining(function: FunctionEmitter) -> Value:
    """Instructions that may still be executed, this one included."""
    return Value("%b", 64, function)


def leave(core: NativeCore, pc: Value, budget: Value, reason: Reason) -> None:
    """Leave to the host with `pc` next."""
    core[layout.PC] = pc
    core[layout.RETIRED] = core[layout.SLICE_END] - budget
    core[layout.REASON] = reason.value
    core.function.effect("ret void")


def note_trap(core: NativeCore, trap: Trap) -> None:
    """Say what trap is to be taken, for the function that takes it."""
    core[layout.TRAP_CAUSE] = trap.cause
    core[layout.TRAP_VALUE] = trap.value
