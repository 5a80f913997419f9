"""A trace: one line for each instruction that a hart executes, and what it changes.

The hart is stepped, so it is some thousand times as slow meanwhile. Interrupts are taken before
any instruction, which is earlier than without a trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmlab.engine.accel.lockstep import Executor
from vmlab.engine.accel.reference import ReferenceCore
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.csr import CSRS
from vmlab.engine.cpu.exits import Exit, Reason
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.cpu.traps import interrupt_to_take, take_trap
from vmlab.engine.debug.kallsyms import SymbolTable
from vmlab.engine.debug.view import read_memory
from vmlab.engine.isa.disassembler import FLOATING_NAMES, INTEGER_NAMES, disassemble
from vmlab.engine.isa.values import Value
from vmlab.machine.errors import VmlabError

_CSR_NAMES: Final = {number: csr.name for number, csr in CSRS.items()}
_MODES: Final = {0: "U", 1: "S", 3: "M"}
_UNSHOWN: Final = {"pc", "privilege", "retired"}
_NAMES: Final = {
    **{number: name for number, name in enumerate(INTEGER_NAMES) if number},
    **{layout.FLOATING + number: name for number, name in enumerate(FLOATING_NAMES)},
    **{field.index: field.name for field in layout.ARCHITECTURAL if field.name not in _UNSHOWN},
}
"""Of the words of the state block that are shown when they change, the names."""
_WORDS: Final = max(_NAMES) + 1


@dataclass(frozen=True)
class Span:
    """What of a hart's execution is traced.

    Attributes:
        count: Instructions at most; 0 for no limit.
        start: The address at which it begins, or None for at once.
        stop: The address before which it ends, or None.
    """

    count: int = 0
    start: int | None = None
    stop: int | None = None


class FileTracer:
    """Writes a hart's trace to a file.

    Args:
        path: Of the file, which is written anew.
        span: What of the execution.
        symbols: Names for addresses.
        ended: Called on the hart's thread when it is complete.

    Raises:
        VmlabError: the file cannot be written.
    """

    def __init__(
        self, path: Path, span: Span, symbols: SymbolTable, ended: Callable[[], None]
    ) -> None:
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise VmlabError(
                f"the trace {str(path)!r} cannot be written: {error.strerror}",
                hint="name a file in a folder that is there",
            ) from None
        self.path = path
        self.span = span
        self.written = 0
        """Instructions."""
        self._symbols = symbols
        self._ended = ended
        self._tracing = span.start is None
        self._line = ""
        self._before: list[int] = []

    @property
    def tracing(self) -> bool:
        """Whether it has begun, and not ended."""
        return self._tracing

    def met(self, address: int) -> None:
        """The hart has come to a breakpoint: the trace may begin there."""
        if address == self.span.start and not self._file.closed:
            self._tracing = True

    def step(self, executor: Executor, *, masked: bool) -> Exit:
        """Execute one instruction, or take one trap, and write it down."""
        hart = executor.hart
        self._complete(hart)
        if hart.pc == self.span.stop or (self.span.count and self.written >= self.span.count):
            self.close()
            self._ended()
            return Exit(Reason.BUDGET)
        if not masked:
            self._take_interrupt(hart)
        pc, retired = hart.pc, hart.retired
        line = self._described(hart)
        before = hart.words[:_WORDS].tolist()
        left = executor.step(masked=True)
        if left.reason is Reason.REQUEST and (hart.pc, hart.retired) == (pc, retired):
            return left  # it has not come to it
        # A device may still have to answer: what changes is known at the next instruction.
        self._line, self._before = line, before
        if hart.retired != retired:
            self.written += 1
        return left

    def _take_interrupt(self, hart: Hart) -> None:
        core = ReferenceCore(hart)
        cause = interrupt_to_take(core)
        if cause.number:
            pc = hart.pc
            hart.pc = take_trap(core, cause, Value(0, 64), Value(pc, 64)).number
            self._write(f"# interrupt {cause.number & 63} at {pc:#x}\n")

    def _described(self, hart: Hart) -> str:
        mode = _MODES[hart[layout.PRIVILEGE]]
        code = read_memory(hart, hart.pc, 2)
        if len(code) == 2 and code[0] & 3 == 3:
            code += read_memory(hart, hart.pc + 2, 2)
        word = int.from_bytes(code, "little")
        text = disassemble(word, hart.pc, _CSR_NAMES) if len(code) in (2, 4) else "?"
        where = self._symbols.shown(hart.pc)
        shown = f"{hart.retired:>12} {mode} {hart.pc:016x} {code[::-1].hex():>8}  {text}"
        return f"{shown:<72} {f'<{where}>' if where else ''}".rstrip()

    def _complete(self, hart: Hart) -> None:
        """Write down the last instruction, with what it has changed."""
        if not self._line:
            return
        after = hart.words[:_WORDS].tolist()
        changes = [
            f"{name}={after[index]:#x}"
            for index, name in _NAMES.items()
            if after[index] != self._before[index]
        ]
        line, self._line = self._line, ""
        self._write(" ".join([line, *([";"] if changes else []), *changes]) + "\n")

    def _write(self, text: str) -> None:
        if not self._file.closed:
            self._file.write(text)

    def finish(self, hart: Hart) -> None:
        """End it, wherever it is; the harts stand."""
        self._complete(hart)
        self.close()

    def close(self) -> None:
        """Nothing more is written."""
        self._tracing = False
        self._file.close()
