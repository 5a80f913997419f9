"""Lock-step: two executors run two copies of a hart, and stop at the first difference.

Device accesses and firmware calls are answered by the host once, for both. What the two harts must
share is the clock: both count time in retired instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vmlab.engine.accel.stopping import Points
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.csr import CSRS
from vmlab.engine.cpu.exits import Exit, Reason
from vmlab.engine.cpu.hart import Hart

# What Hart.architectural names, as it lies in the state block.
_VISIBLE = (
    slice(1, 32),
    slice(layout.FLOATING, layout.FLOATING + 32),
    slice(layout.ARCHITECTURAL[0].index, layout.ARCHITECTURAL[-1].index + 1),
)
_CSR_NAMES = {number: csr.name for number, csr in CSRS.items()}


class Executor(Protocol):
    """Who executes a hart."""

    hart: Hart

    @property
    def name(self) -> str:
        """What to call it."""

    def run(self, budget: int) -> Exit:
        """Execute until there is something for the host to do."""

    def step(self, *, masked: bool = False) -> Exit:
        """Execute one instruction, or take one trap; if `masked`, no interrupt."""

    def stop_at(self, points: Points) -> None:
        """Stop at these points, and no others, from now on."""


class Divergence(Exception):
    """The two executors differ.

    Args:
        pc: of the last instruction before which they agreed.
        instruction: what it is, disassembled.
        differences: what differs: name, and the values of the first and of the second.
    """

    def __init__(
        self, pc: int, instruction: str, differences: dict[str, tuple[object, object]]
    ) -> None:
        self.pc = pc
        self.instruction = instruction
        self.differences = differences
        lines = [
            f"  {name}: {_shown(first)} and {_shown(second)}"
            for name, (first, second) in differences.items()
        ]
        super().__init__("\n".join([f"after {pc:#x}: {instruction}", *lines]))


def _shown(value: object) -> str:
    return f"{value:#x}" if isinstance(value, int) else repr(value)


class Lockstep:
    """Two executors of two harts in the same state, whose memories have the same content.

    Args:
        first: one of them.
        second: the other one.
        single: step by instructions, not from one poll point to the next.
        stride: or from the first poll point after so many instructions to the next: faster, and
            a difference is only known to be among them.
    """

    def __init__(
        self, first: Executor, second: Executor, *, single: bool = False, stride: int = 1
    ) -> None:
        self.first = first
        self.second = second
        self.single = single
        self.stride = stride
        for hart in (first.hart, second.hart):
            if not hart[layout.TIME_DIVISOR]:
                raise ValueError("time must be counted in instructions (TIME_DIVISOR)")

    def run(
        self, budget: int, host: Callable[[Exit, Hart], None], *, compared: int | None = None
    ) -> int:
        """Run both until so many instructions retired.

        Args:
            budget: instructions.
            host: does what an exit asks for, given the exit and a hart; called for each hart.
            compared: compare them so often at most, however little retires; None: without limit.

        Returns: the instructions that retired.

        Raises:
            Divergence: the two are not in the same state any more.
        """
        start = self.first.hart.retired
        while self.first.hart.retired - start < budget and compared != 0:
            compared = compared - 1 if compared is not None else None
            pc = self.first.hart.pc
            word = self._word(pc)  # now: the instruction may write over itself
            if self.single:
                exits = self.first.step(), self.second.step()
            else:
                exits = self.first.run(self.stride), self.second.run(self.stride)
            if exits[0] != exits[1] or not self._alike():
                self._compare(pc, word, *exits)
            if exits[0].reason is not Reason.BUDGET:
                host(exits[0], self.first.hart)
                host(exits[1], self.second.hart)
            if exits[0].reason in (Reason.WAIT, Reason.TRAP_LOOP):
                break
        return self.first.hart.retired - start

    def _word(self, pc: int) -> int | None:
        """The 32 bits at an address, if it is one of RAM."""
        ram = self.first.hart.ram
        return int.from_bytes(ram.read(pc, 4), "little") if ram.contains(pc, 4) else None

    def _alike(self) -> bool:
        """Whether the words of both state blocks that a guest can see are the same."""
        ours, theirs = self.first.hart.words, self.second.hart.words
        return all(bytes(ours[part]) == bytes(theirs[part]) for part in _VISIBLE)

    def _compare(self, pc: int, word: int | None, first: Exit, second: Exit) -> None:
        differences: dict[str, tuple[object, object]] = {}
        if first != second:
            differences["exit"] = first, second
        ours, theirs = self.first.hart.architectural(), self.second.hart.architectural()
        for name, value in ours.items():
            if value != theirs[name]:
                differences[name] = value, theirs[name]
        where = f"at a virtual address, {pc:#x}"
        # Engines know executors by this module, and start without all instructions' meanings.
        from vmlab.engine.isa.disassembler import disassemble

        instruction = where if word is None else disassemble(word, pc, _CSR_NAMES)
        raise Divergence(pc, instruction, differences)
