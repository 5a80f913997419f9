"""The platform-level interrupt controller (RISC-V PLIC specification 1.0.0), as devices see it.

Sources are level-triggered: the gateway of a source forwards a high level once, and again only
after a hart has completed what it claimed. Contexts are laid out as on QEMU's "virt" board: M of
hart 0, S of hart 0, M of hart 1, ...

Its rules, and its state, which harts claim from and complete without coming here, are in
vmlab.engine.cpu.interrupts. Here are the inputs, the registers for whoever has no hart, and who is
to be woken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vmlab.engine.cpu import interrupts
from vmlab.engine.cpu.interrupts import (
    CONTEXT,
    CONTEXT_WORDS,
    MEIP,
    SEIP,
    SIZE,
    SOURCES,
    WORDS,
    BlockCore,
    InterruptBlock,
    context_line,
    drive_source,
    host_store_register,
    load_register,
)
from vmlab.engine.isa.values import Value

__all__ = ["SIZE", "SOURCES", "Plic", "PlicState"]

_SOURCE_WORDS: Final = (
    *range(interrupts.PENDING, interrupts.PENDING + WORDS),
    *range(interrupts.SERVICE, interrupts.SERVICE + WORDS),
    *range(interrupts.PRIORITY, interrupts.PRIORITY + SOURCES + 1),
)


@dataclass(frozen=True)
class PlicState:
    """The words of the sources, 32 sources in each."""

    pending: memoryview
    level: memoryview
    in_service: memoryview


class Plic:
    """The controller of a board with `harts` harts.

    Args:
        harts: Number of harts; each has a context for M and one for S mode.
        set_pending: Called with (hart, bit of mip, level) when a context's line may have become
            high, and when it is seen to have become low. Harts that have the block find out the
            level themselves.

    Attributes:
        block: The state.
    """

    def __init__(self, harts: int, set_pending: Callable[[int, int, bool], None]) -> None:
        self.block = InterruptBlock(harts)
        self._core = BlockCore(self.block)
        self._set_pending = set_pending
        self._lock = threading.Lock()  # of who comes from Python; harts do not
        self._driven = [False] * self.block.contexts

    @property
    def state(self) -> PlicState:
        """Its sources, to be looked at."""
        words = self.block.words
        starts = (interrupts.PENDING, interrupts.LEVEL, interrupts.SERVICE)
        return PlicState(*(words[start : start + WORDS] for start in starts))

    def line(self, source: int) -> Callable[[bool], None]:
        """The interrupt line of a source (1 to 96)."""
        if not 1 <= source <= SOURCES:
            raise ValueError(f"the PLIC has sources 1 to {SOURCES}, not {source}")

        def set_level(level: bool) -> None:
            self.set_level(source, level)

        return set_level

    def set_level(self, source: int, level: bool) -> None:
        """Drive the line of `source`."""
        with self._lock:
            if self.block.perform(drive_source, source, int(level)):
                self._tell()

    def reset(self) -> None:
        """As at power-on, while the harts stand; the lines stay what their devices drive."""
        with self._lock:
            # What else is in the block is others': where harts' words are, the UART's status.
            words = self.block.words
            for index in _SOURCE_WORDS:
                words[index] = 0
            for context in range(self.block.contexts):
                enable = CONTEXT + CONTEXT_WORDS * context
                for index in range(enable, enable + interrupts.THRESHOLD + 1):
                    words[index] = 0
            state = self.state
            state.pending[:] = state.level
            self._tell()

    def refresh(self) -> None:
        """Tell every context's line anew, after the state was replaced; the harts stand."""
        with self._lock:
            # In a copy of the process, whoever held it is not there.
            self.block.words[interrupts.LOCK] = 0
            self._driven = [True] * self.block.contexts
            self._tell()

    def answer_at(self, base: int | None) -> None:
        """Where harts find the registers themselves; None: every access is to come by the bus."""
        self.block.words[interrupts.BASE] = interrupts.NOWHERE if base is None else base

    def show_status(self, address: int | None, status: int | None) -> None:
        """Where harts find the UART's line status themselves, if anywhere, and what it is."""
        words = self.block.words
        words[interrupts.STATUS] = interrupts.UNKNOWN if status is None else status
        words[interrupts.STATUS_ADDRESS] = interrupts.NOWHERE if address is None else address

    def _tell(self) -> None:
        words = self.block.words
        pending = self.state.pending
        for context in range(self.block.contexts):
            enable = CONTEXT + CONTEXT_WORDS * context
            some = any(pending[word] & words[enable + word] for word in range(WORDS))
            level = some and bool(context_line(self._core, Value(context)))
            # A line that harts made low without telling is told to be high again.
            if level or self._driven[context]:
                self._driven[context] = level
                self._set_pending(context >> 1, SEIP if context & 1 else MEIP, level)

    def read(self, offset: int, size: int) -> int:
        """Registers are 32 bits wide; what is not there reads as zero. A claim is a read."""
        with self._lock:
            value = self.block.perform(load_register, offset)
            self._tell()
            return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Registers are 32 bits wide; what is not there is not written."""
        with self._lock:
            self.block.perform(host_store_register, offset, value)
            self._tell()
