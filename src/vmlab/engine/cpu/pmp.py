"""Physical memory protection: 16 entries, granularity 4 bytes (RISC-V privileged 1.12, 3.7)."""

from __future__ import annotations

from vmlab.engine.cpu.core import Core, routine
from vmlab.engine.cpu.layout import PMP_OPEN, PMPADDR, PMPCFG0, PMPCFG2, Field
from vmlab.engine.isa.values import Value

ENTRIES = 16
ADDRESS_MASK = (1 << 54) - 1

# Values of PMP_OPEN: what is known without looking at the entries.
OPEN = 1  # entry 0 lets everybody do everything everywhere
UNUSED = 2  # no entry is on: M mode may do everything, the others nothing

# Fields of an entry's configuration byte.
_READ, _WRITE, _EXECUTE, _LOCKED = 0, 1, 2, 7
_TOR, _NA4, _NAPOT = 1, 2, 3
_ALL_MODES = 0x1818_1818_1818_1818  # of eight entries
_EVERYTHING = 0b00011111  # NAPOT, not locked, read, write, execute


def _configuration(core: Core, index: int) -> Value:
    word = core[PMPCFG0 if index < 8 else PMPCFG2]
    return word.bits_from(8 * (index % 8), 8)


def _mode(configuration: Value) -> Value:
    return configuration.bits_from(3, 2)


@routine()
def pmp_allows(core: Core, address: Value, size: Value, access: Value, privilege: Value) -> Value:
    """1 if `size` bytes (at least 1) from `address` on may be accessed so, else 0.

    The access is 0 to fetch, 1 to read, 2 to write.
    """
    last = address + size - 1
    allowed = privilege.eq(3)  # where no entry matches
    decided = Value(0, 1)
    below = Value(0, 64)
    for index in range(ENTRIES):
        configuration = _configuration(core, index)
        mode = _mode(configuration)
        encoded = core[PMPADDR[index]]
        top = encoded << 2
        # NAPOT: the bits up to and with the lowest 0 give the size; NA4 is four bytes.
        spread = mode.eq(_NAPOT).select((encoded ^ (encoded + 1)) << 2, Value(0)) | 3
        tor = mode.eq(_TOR)
        first = tor.select(below, top & ~spread)
        # TOR ends before its top; a top that is not above its start matches nothing.
        final = tor.select(top - 1, top | spread)
        empty = mode.eq(0) | (tor & ~below.below(top))
        touches = ~empty & ~last.below(first) & ~final.below(address)
        covers = ~address.below(first) & ~final.below(last)
        may = access.eq(0).select(
            configuration.bit(_EXECUTE),
            access.eq(1).select(configuration.bit(_READ), configuration.bit(_WRITE)),
        )
        may = may | (privilege.eq(3) & ~configuration.bit(_LOCKED))
        allowed = (~decided & touches).select(covers & may, allowed)
        decided = decided | touches
        below = top
    return allowed.zero_extend(64)


def allows(core: Core, address: Value, size: Value, access: Value, privilege: Value) -> Value:
    """`pmp_allows` as one bit, quickly where everything is allowed."""
    how = core[PMP_OPEN]
    if how.eq(OPEN):
        return Value(1, 1)
    if how.eq(UNUSED):
        return privilege.eq(3)
    return pmp_allows(core, address, size, access, privilege).low(1)


def write_configuration(core: Core, field: Field, new: Value) -> None:
    """Write eight entries' configurations; a locked one and a reserved value stay as they are."""
    old = core[field]
    result = Value(0, 64)
    for index in range(8):
        before, after = old.bits_from(8 * index, 8), new.bits_from(8 * index, 8) & 0x9F
        reserved = after.bit(_WRITE) & ~after.bit(_READ)
        kept = (before.bit(_LOCKED) | reserved).select(before, after)
        result = result | (kept.zero_extend(64) << (8 * index))
    core[field] = result
    _changed(core)


def write_address(core: Core, index: int, new: Value) -> None:
    """Write an entry's address, unless it or the one that begins where it ends is locked."""
    locked = _configuration(core, index).bit(_LOCKED)
    if index + 1 < ENTRIES:
        following = _configuration(core, index + 1)
        locked = locked | (following.bit(_LOCKED) & _mode(following).eq(_TOR))
    field = PMPADDR[index]
    core[field] = locked.select(core[field], new & ADDRESS_MASK)
    _changed(core)


def _changed(core: Core) -> None:
    first = core[PMPADDR[0]]
    # All 54 bits ones, or all but the highest: 2^56 bytes or more, which is all there are.
    everywhere = (first | (1 << 53)).eq(ADDRESS_MASK)
    unused = ((core[PMPCFG0] | core[PMPCFG2]) & _ALL_MODES).eq(0)
    is_open = _configuration(core, 0).eq(_EVERYTHING) & everywhere
    core[PMP_OPEN] = is_open.select(Value(OPEN), unused.select(Value(UNUSED), 0))
    everything = Value(0, 64)
    core.flush_translations(everything, everything, everything, everything)
