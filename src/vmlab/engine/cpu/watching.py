"""Watchpoints: accesses that a debugger wants to see, by virtual address.

An access of a watched byte leaves before it is made; whoever executes the hart then makes it in a
step of its own. Pages with watched bytes never come into the TLB, so that only what takes the slow
path anyway is compared.
"""

from __future__ import annotations

from vmlab.engine.cpu.core import Core, routine
from vmlab.engine.cpu.layout import STEP_UNWATCHED, STEPPING, WATCHED, WATCHING, WATCHPOINTS
from vmlab.engine.cpu.mmu import PAGE
from vmlab.engine.isa.values import Value


def _overlaps(core: Core, address: Value, size: Value, kinds: Value) -> Value:
    """One bit: some of these bytes are watched for one of these kinds of access."""
    found = Value(0, 1)
    for index in range(WATCHPOINTS):
        first, length, watched = (core[WATCHED[3 * index + place]] for place in range(3))
        # Either begins within the other, also where addresses wrap around.
        overlap = (address - first).below(length) | (first - address).below(size)
        found = found | (overlap & (kinds & watched).ne(0))
    return found


@routine()
def is_watched(core: Core, address: Value, size: Value, kinds: Value) -> Value:
    """1 if an access must be shown to the debugger, else 0.

    Args:
        core: the hart.
        address: virtual.
        size: in bytes.
        kinds: WATCH_READS, WATCH_WRITES or both.
    """
    if core[WATCHING].eq(0):
        return Value(0, 64)
    if (core[STEPPING] & STEP_UNWATCHED).ne(0):
        return Value(0, 64)
    return _overlaps(core, address, size, kinds).zero_extend(64)


@routine()
def is_page_watched(core: Core, address: Value) -> Value:
    """1 if something in the page of a virtual address is watched, else 0."""
    if core[WATCHING].eq(0):
        return Value(0, 64)
    whole = Value(PAGE, 64)
    return _overlaps(core, address & -PAGE, whole, Value(-1, 64)).zero_extend(64)
