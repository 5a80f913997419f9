"""Vectors written by hand, for instructions that no oracle here has or has right.

Each says which line of which specification it is from. The cache-management instructions came to
QEMU with 8.0, and unicorn has neither them nor bit manipulation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

MACHINE, SUPERVISOR, USER = 3, 1, 0
ILLEGAL, STORE_ACCESS, STORE_PAGE = 2, 7, 15

# Count trailing zeros of a word (bitmanip 1.0.0, 2.11): operand, result.
COUNT_TRAILING_ZEROS: tuple[tuple[int, int], ...] = (
    (0, 32),
    (1, 0),
    (2, 1),
    (0x8000_0000, 31),
    (1 << 32, 32),
    (1 << 33, 32),
    (0xFFFF_FFFF_0000_0000, 32),
    (0xFFFF_FFFF_8000_0000, 31),
    (0xFFFF_FFFF_FFFF_FFFF, 0),
    (0x0000_0001_0001_0000, 16),
    (0x1234_5678, 3),
)

CBIE_FLUSH, CBIE_INVALIDATE, CBCFE, CBZE = 1 << 4, 3 << 4, 1 << 6, 1 << 7


@dataclass(frozen=True)
class Gate:
    """Who may manage cache blocks (cache management 1.0, 2.3: menvcfg, and in U mode senvcfg)."""

    name: str
    privilege: int
    menvcfg: int
    senvcfg: int
    allowed: bool


def _gates() -> tuple[Gate, ...]:
    made = []
    bits = {"cbo.zero": (CBZE,), "cbo.clean": (CBCFE,), "cbo.flush": (CBCFE,)}
    bits["cbo.inval"] = (CBIE_FLUSH, CBIE_INVALIDATE)
    every = CBIE_INVALIDATE | CBCFE | CBZE
    for name, needed in bits.items():
        others = every & ~needed[-1]
        made.append(Gate(name, MACHINE, 0, 0, True))
        made.append(Gate(name, SUPERVISOR, others, every, False))
        made.append(Gate(name, USER, others, every, False))
        made.append(Gate(name, USER, every, others, False))
        for bit in needed:
            made.append(Gate(name, SUPERVISOR, bit, 0, True))
            made.append(Gate(name, USER, bit, 0, False))
            made.append(Gate(name, USER, bit, bit, True))
    return tuple(made)


GATES = _gates()


@dataclass(frozen=True)
class Access:
    """What an address does to them, under Sv39 in S mode (cache management 1.0, 2.5.2 and 2.5.3).

    Attributes:
        flags: of the page, X 8, W 4, R 2, V 1.
        cause: the trap's, or None.
    """

    name: str
    flags: int
    cause: int | None


ACCESSES: tuple[Access, ...] = (
    # Zeros are a store.
    Access("cbo.zero", 0b0111, None),
    Access("cbo.zero", 0b0011, STORE_PAGE),
    Access("cbo.zero", 0b1001, STORE_PAGE),
    Access("cbo.zero", 0b0000, STORE_PAGE),
    # Management needs a page that can be read or written, and faults as a store does.
    *(
        Access(name, flags, cause)
        for name in ("cbo.inval", "cbo.clean", "cbo.flush")
        for flags, cause in (
            (0b0111, None),
            (0b0011, None),
            (0b1011, None),
            (0b1001, STORE_PAGE),
            (0b0000, STORE_PAGE),
        )
    ),
)

BLOCK = 64
OFFSETS = (0, 1, 7, 8, 31, 32, 63)
"""Where in a block its address may point (cache management 1.0, 2.4: the block that holds it)."""
NOWHERE = 0x3000_0000
"""An address of neither memory nor a device."""


def counted() -> Counter[str]:
    """How many vectors there are of each instruction."""
    count = Counter({"ctzw": len(COUNT_TRAILING_ZEROS)})
    count.update(gate.name for gate in GATES)
    count.update(access.name for access in ACCESSES)
    count["cbo.zero"] += len(OFFSETS) + 1
    return count
