"""The platform-level interrupt controller (RISC-V PLIC specification 1.0.0).

Sources are level-triggered: the gateway of a source forwards a high level once, and again only
after a hart has completed what it claimed. Contexts are laid out as on QEMU's "virt" board: M of
hart 0, S of hart 0, M of hart 1, ...

All state lies in arrays of 32-bit words that are never resized, so that native code may do claim
and complete on the same words; the lock is for whoever changes them from Python.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

SIZE: Final = 0x60_0000
SOURCES: Final = 96
"""Interrupt sources 1 to 96, as the board's device tree says (`riscv,ndev`)."""
_WORDS: Final = SOURCES // 32 + 1
_PRIORITY_MASK: Final = 7
"""Priorities 0 (never) to 7."""

_PENDING: Final = 0x1000
_ENABLE: Final = 0x2000
_ENABLE_STRIDE: Final = 0x80
_CONTEXT: Final = 0x20_0000
_CONTEXT_STRIDE: Final = 0x1000

SEIP: Final = 9
MEIP: Final = 11
"""Bits of `mip` (privileged specification 3.1.9)."""


def _words(count: int) -> array[int]:
    return array("I", bytes(4 * count))


@dataclass
class PlicState:
    """Everything that a snapshot must hold. `enable` has `_WORDS` words per context."""

    contexts: int
    priority: array[int] = field(default_factory=lambda: _words(SOURCES + 1))
    pending: array[int] = field(default_factory=lambda: _words(_WORDS))
    level: array[int] = field(default_factory=lambda: _words(_WORDS))
    in_service: array[int] = field(default_factory=lambda: _words(_WORDS))
    enable: array[int] = field(default_factory=lambda: _words(0))
    threshold: array[int] = field(default_factory=lambda: _words(0))

    def __post_init__(self) -> None:
        if not self.enable:
            self.enable = _words(_WORDS * self.contexts)
        if not self.threshold:
            self.threshold = _words(self.contexts)


class Plic:
    """The controller of a board with `harts` harts.

    Args:
        harts: Number of harts; each has a context for M and one for S mode.
        set_pending: Called with (hart, bit of mip, level) whenever a context's line may have
            changed.
    """

    def __init__(self, harts: int, set_pending: Callable[[int, int, bool], None]) -> None:
        self.state = PlicState(contexts=2 * harts)
        self._set_pending = set_pending
        self._lock = threading.Lock()
        self._driven = [False] * (2 * harts)

    def line(self, source: int) -> Callable[[bool], None]:
        """The interrupt line of a source (1 to 96)."""
        if not 1 <= source <= SOURCES:
            raise ValueError(f"the PLIC has sources 1 to {SOURCES}, not {source}")

        def set_level(level: bool) -> None:
            self.set_level(source, level)

        return set_level

    def set_level(self, source: int, level: bool) -> None:
        """Drive the line of `source`."""
        word, bit = source >> 5, 1 << (source & 31)
        state = self.state
        with self._lock:
            if bool(state.level[word] & bit) == level:
                return
            if level:
                state.level[word] |= bit
                if not state.in_service[word] & bit:
                    state.pending[word] |= bit
            else:
                # The gateway has sent its request already; a level that falls does not recall it.
                state.level[word] &= ~bit & 0xFFFF_FFFF
            self._update()

    def reset(self) -> None:
        """As at power-on; the levels of the lines stay what their devices drive."""
        with self._lock:
            level = self.state.level
            self.state = PlicState(contexts=self.state.contexts, level=level)
            self.state.pending[:] = level
            self._update()

    def refresh(self) -> None:
        """Drive every context's line anew, after the state was replaced."""
        with self._lock:
            self._driven = [not level for level in self._driven]
            self._update()

    def best(self, context: int) -> int:
        """The source that `context` would claim now, 0 for none."""
        state = self.state
        best, best_priority = 0, 0
        for word in range(_WORDS):
            candidates = state.pending[word] & state.enable[context * _WORDS + word]
            while candidates:
                low = candidates & -candidates
                candidates ^= low
                source = (word << 5) + low.bit_length() - 1
                if state.priority[source] > best_priority:
                    best, best_priority = source, state.priority[source]
        return best

    def _update(self) -> None:
        state = self.state
        for context in range(state.contexts):
            best = self.best(context)
            level = best != 0 and state.priority[best] > state.threshold[context]
            if level != self._driven[context]:
                self._driven[context] = level
                self._set_pending(context >> 1, SEIP if context & 1 else MEIP, level)

    def claim(self, context: int) -> int:
        """Take the best pending source; 0 if there is none (the threshold does not matter)."""
        with self._lock:
            source = self.best(context)
            if source:
                word, bit = source >> 5, 1 << (source & 31)
                self.state.pending[word] &= ~bit & 0xFFFF_FFFF
                self.state.in_service[word] |= bit
                self._update()
            return source

    def complete(self, context: int, source: int) -> None:
        """The handler of `source` is through; ignored unless `context` has it enabled."""
        if not 1 <= source <= SOURCES:
            return
        word, bit = source >> 5, 1 << (source & 31)
        state = self.state
        with self._lock:
            if not state.enable[context * _WORDS + word] & bit:
                return
            state.in_service[word] &= ~bit & 0xFFFF_FFFF
            if state.level[word] & bit:
                state.pending[word] |= bit
            self._update()

    def read(self, offset: int, size: int) -> int:
        """Registers are 32 bits wide; what is not there reads as zero."""
        state = self.state
        if offset < 4 * (SOURCES + 1):
            return state.priority[offset >> 2]
        if _PENDING <= offset < _PENDING + 4 * _WORDS:
            return state.pending[(offset - _PENDING) >> 2]
        if _ENABLE <= offset < _ENABLE + _ENABLE_STRIDE * state.contexts:
            context, rest = divmod(offset - _ENABLE, _ENABLE_STRIDE)
            return state.enable[context * _WORDS + (rest >> 2)] if rest < 4 * _WORDS else 0
        if _CONTEXT <= offset < _CONTEXT + _CONTEXT_STRIDE * state.contexts:
            context, rest = divmod(offset - _CONTEXT, _CONTEXT_STRIDE)
            if rest == 0:
                return state.threshold[context]
            if rest == 4:
                return self.claim(context)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Registers are 32 bits wide; what is not there is not written."""
        state = self.state
        if offset < 4 * (SOURCES + 1):
            if offset:
                with self._lock:
                    state.priority[offset >> 2] = value & _PRIORITY_MASK
                    self._update()
        elif _ENABLE <= offset < _ENABLE + _ENABLE_STRIDE * state.contexts:
            context, rest = divmod(offset - _ENABLE, _ENABLE_STRIDE)
            if rest < 4 * _WORDS:
                with self._lock:
                    state.enable[context * _WORDS + (rest >> 2)] = value & _real_sources(rest >> 2)
                    self._update()
        elif _CONTEXT <= offset < _CONTEXT + _CONTEXT_STRIDE * state.contexts:
            context, rest = divmod(offset - _CONTEXT, _CONTEXT_STRIDE)
            if rest == 0:
                with self._lock:
                    state.threshold[context] = value & _PRIORITY_MASK
                    self._update()
            elif rest == 4:
                self.complete(context, value)


def _real_sources(word: int) -> int:
    """The bits of a word of 32 sources that stand for one; source 0 does not exist."""
    mask = 0
    for bit in range(32):
        if 1 <= word * 32 + bit <= SOURCES:
            mask |= 1 << bit
    return mask
