"""The poll: what a hart does between instructions when it may have been asked for something.

Poll points are architectural and the same in every executor, or one of them would take an interrupt
where another does not: after a taken branch or jump and at the end of a page, if the budget is
used up; after a trap and after an instruction that changes what interrupts or address spaces may
do, always.

The budget is given out in slices, at whose ends the requests of other threads and the timers are
looked at. Slices end where RETIRED is a multiple of their size, not counted from where a run began:
a run that was left for a request and taken up again polls where it would have polled anyway.
"""

from __future__ import annotations

from vmlab.engine.cpu.core import Core, routine
from vmlab.engine.cpu.exits import Reason
from vmlab.engine.cpu.fences import serve_fences
from vmlab.engine.cpu.layout import (
    BUDGET_LEFT,
    NOTED,
    PC,
    REASON,
    RETIRED,
    SHARED_REQUESTS,
    SLICE_END,
    TRAPS_IN_A_ROW,
)
from vmlab.engine.cpu.traps import interrupt_to_take, take_trap
from vmlab.engine.isa.values import Value

SLICE = 16384  # instructions, a power of two: some 30 microseconds
TRAPS_BEFORE_GIVING_UP = 10_000


@routine()
def poll(core: Core, pc: Value, budget: Value) -> Value:
    """Look at requests, interrupts and the budget.

    Args:
        core: the hart.
        pc: the next instruction's address.
        budget: instructions left of the slice; 0 or negative where it is used up.

    Returns: the budget to go on with at PC, or 0 to leave for REASON.
    """
    core[RETIRED] = core[SLICE_END] - budget
    core[PC] = pc
    serve_fences(core)
    if core[NOTED].ne(0):
        core[REASON] = Reason.NOTES.value
        return Value(0, 64)
    if Value(TRAPS_BEFORE_GIVING_UP).below(core[TRAPS_IN_A_ROW]):
        core[TRAPS_IN_A_ROW] = 0
        core[REASON] = Reason.TRAP_LOOP.value
        return Value(0, 64)
    cause = interrupt_to_take(core)
    if cause.ne(0):
        core[PC] = take_trap(core, cause, Value(0, 64), pc)
    # After the interrupt: whoever asked may let another hart go on first, and the interrupt would
    # be another one by then.
    if core.shared(SHARED_REQUESTS).ne(0):
        core[REASON] = Reason.REQUEST.value
        return Value(0, 64)
    if Value(0, 64).less(budget):
        return budget
    left = core[BUDGET_LEFT]
    to_end = Value(SLICE, 64) - (core[SLICE_END] & (SLICE - 1))
    piece = left.below(to_end).select(left, to_end)
    core[BUDGET_LEFT] = left - piece
    core[SLICE_END] = core[SLICE_END] + piece
    budget = budget + piece
    if Value(0, 64).less(budget):
        return budget
    core[REASON] = Reason.BUDGET.value
    return Value(0, 64)
