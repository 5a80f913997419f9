"""A guest's memory as its debugger sees it: by the hart's translation, and nothing is disturbed.

The page walk is the one that the guest's own accesses take, over a core on which it leaves no
trace: no A or D bit is set, nothing is counted, and what only the kernel may see is seen as well.
Devices are not memory: reading them would change them.
"""

from __future__ import annotations

from vmlab.engine.accel.reference import ReferenceCore
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.cpu.layout import Field
from vmlab.engine.cpu.mmu import MPRV, MXR, PAGE, READ, SUM, translate
from vmlab.engine.cpu.pmp import OPEN
from vmlab.engine.isa.cpu import Trap
from vmlab.engine.isa.values import Value

_MACHINE = 3


class _Onlooker(ReferenceCore):
    """A core that may read everything and changes nothing."""

    def __getitem__(self, field: Field) -> Value:
        if field is layout.PRIVILEGE:
            return Value(_MACHINE if self.hart[field] == _MACHINE else 1, 64)
        if field is layout.MSTATUS:
            return Value((self.hart[field] | 1 << SUM | 1 << MXR) & ~(1 << MPRV), 64)
        if field is layout.PMP_OPEN:
            return Value(OPEN, 64)
        return super().__getitem__(field)

    def __setitem__(self, field: Field, value: Value | int) -> None:
        """It stays as it is."""

    def physical_compare_exchange(self, address: Value, expected: Value, new: Value) -> Value:
        return Value(1, 1)


def physical_address(hart: Hart, address: int) -> int | None:
    """Where a virtual address lies, also outside of RAM; None if it is not mapped."""
    try:
        core = _Onlooker(hart)
        return translate(core, Value(address, 64), Value(1, 64), Value(READ, 64)).number
    except Trap:
        return None


def _pieces(hart: Hart, address: int, size: int, physical: bool) -> list[tuple[int, int]]:
    """The places in RAM of as many bytes as there are from an address on."""
    found = []
    while size > 0:
        part = min(size, PAGE - address % PAGE)
        place = address if physical else physical_address(hart, address & layout.WORD)
        if place is None or not hart.ram.contains(place, part):
            break
        found.append((place, part))
        address, size = address + part, size - part
    return found


def read_memory(hart: Hart, address: int, size: int, *, physical: bool = False) -> bytes:
    """Up to `size` bytes; fewer where the memory ends."""
    return hart.ram.gather(_pieces(hart, address, size, physical))


def write_memory(hart: Hart, address: int, data: bytes, *, physical: bool = False) -> bool:
    """Write to memory as a device would; whether all of it is there. Otherwise nothing is done."""
    pieces = _pieces(hart, address, len(data), physical)
    if sum(size for _, size in pieces) < len(data):
        return False
    hart.ram.scatter(pieces, data)
    return True
