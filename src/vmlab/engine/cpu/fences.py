"""Fences that harts ask each other for (SBI 2.0, chapter 8), without leaving to the host.

A hart that is asked finds a count that is ahead of what it has done, at its next poll or before it
executes anything again, and forgets all its translations. Who asks goes on when that is done, or
when the other one is not where it could access anything by a translation: it sees the count before
it is there again. Meanwhile it fences for others itself, so that two may ask each other.

It does not wait for long: a thread that does not run, or is asked to stand itself, leaves the rest
to the host.
"""

from __future__ import annotations

from vmlab.engine.cpu.core import Core, routine
from vmlab.engine.cpu.interrupts import are_harts
from vmlab.engine.cpu.layout import (
    SHARED_FENCED,
    SHARED_FENCES,
    SHARED_INSIDE,
    SHARED_REQUESTS,
)
from vmlab.engine.isa.values import Value

_PATIENCE = 2000  # ticks of 100 ns: some slices between polls


def serve_fences(core: Core) -> None:
    """Do what this hart was asked for."""
    asked = core.shared(SHARED_FENCES)
    if asked.ne(core.shared(SHARED_FENCED)):
        zero = Value(0, 64)
        core.flush_translations(zero, zero, zero, zero)
        core.set_shared(SHARED_FENCED, asked)


@routine()
def ask_for_fences(core: Core, harts: Value, first: Value) -> Value:
    """Ask harts, a bit for each from `first` on."""
    if harts.eq(0):
        return harts
    core.count_up(harts.count_trailing_zeros() + first, SHARED_FENCES)
    return ask_for_fences(core, harts & (harts - 1), first)


@routine()
def await_fences(core: Core, harts: Value, first: Value, deadline: Value) -> Value:
    """1 when all of them have fenced; 0 where the host has to see to it."""
    if harts.eq(0):
        return Value(1, 64)
    hart = harts.count_trailing_zeros() + first
    inside = core.shared_of(hart, SHARED_INSIDE).ne(0)
    fenced = core.shared_of(hart, SHARED_FENCED)
    # Read last: it is not behind what was asked for here.
    if ~inside | fenced.eq(core.shared_of(hart, SHARED_FENCES)):
        return await_fences(core, harts & (harts - 1), first, deadline)
    if core.shared(SHARED_REQUESTS).ne(0) | deadline.below(core.host_time()):
        return Value(0, 64)
    fence_for_others(core)
    return await_fences(core, harts, first, deadline)


@routine()
def fence_for_others(core: Core) -> Value:
    """`serve_fences`."""
    serve_fences(core)
    return Value(0, 64)


@routine()
def fence_harts(core: Core, harts: Value, first: Value) -> Value:
    """1 where that was all of a remote `sfence.vma`; 0 where the host has to do it, from anew."""
    if are_harts(core, harts, first).eq(0):
        return Value(0, 64)
    ask_for_fences(core, harts, first)
    fence_for_others(core)
    return await_fences(core, harts, first, core.host_time() + _PATIENCE)
