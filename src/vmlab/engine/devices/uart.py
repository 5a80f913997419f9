"""A 16550A UART with its FIFOs (National Semiconductor PC16550D, sections 8.0 to 8.9).

The line is infinitely fast: a byte written is sent at once, and the transmitter is always empty.
So the character timeout of the receiver has no duration either: bytes below the trigger level
raise it at once. Bytes from outside wait in a backlog and enter the FIFO as there is room, so
that nothing is lost and no overrun is seen; whoever feeds it reads less while the backlog is full.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

SIZE: Final = 0x100
LINE_STATUS: Final = 5
_FIFO: Final = 16
BACKLOG: Final = 4096
"""Bytes from outside that are kept for the guest before the sender has to wait."""

_IER_RECEIVED: Final = 0x01
_IER_THR_EMPTY: Final = 0x02
_IER_LINE: Final = 0x04
_IER_MODEM: Final = 0x08

_IIR_NONE: Final = 0x01
_IIR_MODEM: Final = 0x00
_IIR_THR_EMPTY: Final = 0x02
_IIR_RECEIVED: Final = 0x04
_IIR_LINE: Final = 0x06
_IIR_TIMEOUT: Final = 0x0C
_IIR_FIFOS: Final = 0xC0

_LCR_DIVISOR: Final = 0x80
_MCR_LOOP: Final = 0x10
_LSR_DATA: Final = 0x01
_LSR_ERRORS: Final = 0x1E
_LSR_BREAK: Final = 0x10
_LSR_EMPTY: Final = 0x60
_MSR_IDLE: Final = 0xB0
"""Carrier, data set ready, clear to send: somebody is always connected."""
_TRIGGER: Final = (1, 4, 8, 14)


@dataclass
class UartState:
    """Everything that a snapshot must hold."""

    ier: int = 0
    fcr: int = 0
    lcr: int = 0
    mcr: int = 0x08
    line_errors: int = 0
    msr: int = _MSR_IDLE
    scratch: int = 0
    divisor: int = 0x0C
    thr_empty_pending: bool = False
    received: bytearray = field(default_factory=bytearray)
    backlog: deque[int] = field(default_factory=deque)
    """Bytes from outside that have no room in the FIFO yet."""


class Uart:
    """The UART.

    Args:
        line: The interrupt line.

    Attributes:
        send: Called with every byte that the guest transmits.
        wanted: Called when there is room again after the backlog was full.
        publish: Called with what the line status reads as, whenever that changes; None while
            reading it changes something.
    """

    def __init__(self, line: Callable[[bool], None]) -> None:
        self.state = UartState()
        self.send: Callable[[bytes], object] = lambda data: None
        self.wanted: Callable[[], None] = lambda: None
        self.publish: Callable[[int | None], None] = lambda status: None
        self._published: int | None = None
        self._line = line
        self._was_full = False
        self._lock = threading.RLock()
        self._level = False

    def reset(self) -> None:
        """As at power-on; what waits outside stays."""
        with self._lock:
            self.state = UartState(backlog=self.state.backlog)
            self._update()

    def refresh(self) -> None:
        """Drive the line anew, after the state was replaced."""
        with self._lock:
            self._level = not self._level
            self._update()

    @property
    def room(self) -> int:
        """Bytes that `receive` takes now; `wanted` is called when there are some again."""
        return BACKLOG - len(self.state.backlog)

    def receive(self, data: bytes) -> int:
        """Bytes from outside; how many were taken."""
        with self._lock:
            taken = min(len(data), self.room)
            self.state.backlog.extend(data[:taken])
            self._was_full = self._was_full or not self.room
            self._refill()
            self._update()
            return taken

    def break_(self) -> None:
        """The other side holds the line in a break condition."""
        with self._lock:
            if self.state.mcr & _MCR_LOOP:
                return
            self.state.line_errors |= _LSR_BREAK
            self.state.received.append(0)
            self._update()

    def _refill(self) -> None:
        if self.state.mcr & _MCR_LOOP:
            return
        room = (_FIFO if self.state.fcr & 1 else 1) - len(self.state.received)
        while room > 0 and self.state.backlog:
            self.state.received.append(self.state.backlog.popleft())
            room -= 1
        if self._was_full and len(self.state.backlog) <= BACKLOG // 2:
            self._was_full = False
            self.wanted()

    def _cause(self) -> int:
        """The interrupt identification, highest priority first (table IV of the data sheet)."""
        state = self.state
        if state.ier & _IER_LINE and state.line_errors:
            return _IIR_LINE
        if state.ier & _IER_RECEIVED and state.received:
            if not state.fcr & 1 or len(state.received) >= _TRIGGER[state.fcr >> 6]:
                return _IIR_RECEIVED
            return _IIR_TIMEOUT
        if state.ier & _IER_THR_EMPTY and state.thr_empty_pending:
            return _IIR_THR_EMPTY
        if state.ier & _IER_MODEM and state.msr & 0x0F:
            return _IIR_MODEM
        return _IIR_NONE

    def tell_status(self) -> None:
        """Publish the line status, to whom it was not before."""
        with self._lock:
            self._published = self._status_without_effect()
            self.publish(self._published)

    def _status(self) -> int:
        state = self.state
        return _LSR_EMPTY | state.line_errors | (_LSR_DATA if state.received else 0)

    def _status_without_effect(self) -> int | None:
        """The line status, but where reading it clears errors."""
        return None if self.state.line_errors else self._status()

    def _update(self) -> None:
        status = self._status_without_effect()
        if status != self._published:
            self._published = status
            self.publish(status)
        level = self._cause() != _IIR_NONE
        if level != self._level:
            self._level = level
            self._line(level)

    def read(self, offset: int, size: int) -> int:
        """One byte; registers repeat nowhere, what is not there reads as zero."""
        with self._lock:
            value = self._read(offset)
            self._update()
            return value

    def _read(self, offset: int) -> int:
        state = self.state
        if offset == 0:
            if state.lcr & _LCR_DIVISOR:
                return state.divisor & 0xFF
            value = state.received.pop(0) if state.received else 0
            self._refill()
            return value
        if offset == 1:
            return state.divisor >> 8 if state.lcr & _LCR_DIVISOR else state.ier
        if offset == 2:
            cause = self._cause()
            if cause == _IIR_THR_EMPTY:
                state.thr_empty_pending = False
            return cause | (_IIR_FIFOS if state.fcr & 1 else 0)
        if offset == 3:
            return state.lcr
        if offset == 4:
            return state.mcr
        if offset == LINE_STATUS:
            value = self._status()
            state.line_errors = 0
            return value
        if offset == 6:
            if state.mcr & _MCR_LOOP:
                # DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD.
                mcr = state.mcr
                return (mcr & 0x01) << 5 | (mcr & 0x02) << 3 | (mcr & 0x04) << 4 | (mcr & 0x08) << 4
            value = state.msr
            state.msr &= 0xF0
            return value
        return state.scratch if offset == 7 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """One byte; what is not there is not written."""
        with self._lock:
            self._write(offset, value & 0xFF)
            self._update()

    def _write(self, offset: int, value: int) -> None:
        state = self.state
        if offset == 0:
            if state.lcr & _LCR_DIVISOR:
                state.divisor = (state.divisor & 0xFF00) | value
            else:
                self._transmit(value)
        elif offset == 1:
            if state.lcr & _LCR_DIVISOR:
                state.divisor = (state.divisor & 0xFF) | value << 8
            else:
                # Enabling the interrupt of an empty transmitter raises it (8.4, and Linux's
                # probe of the 8250 depends on it).
                if value & _IER_THR_EMPTY and not state.ier & _IER_THR_EMPTY:
                    state.thr_empty_pending = True
                elif not value & _IER_THR_EMPTY:
                    state.thr_empty_pending = False
                state.ier = value & 0x0F
        elif offset == 2:
            # Bits other than 0 are taken only together with it; a change of it clears both FIFOs.
            if (value ^ state.fcr) & 1 or value & 0x02:
                state.received.clear()
                state.line_errors &= ~_LSR_BREAK
            state.fcr = value & 0xC9 if value & 1 else 0
            self._refill()
        elif offset == 3:
            state.lcr = value
        elif offset == 4:
            state.mcr = value & 0x1F
            self._refill()
        elif offset == 7:
            state.scratch = value

    def _transmit(self, value: int) -> None:
        state = self.state
        state.thr_empty_pending = True
        if not state.mcr & _MCR_LOOP:
            self.send(bytes((value,)))
        elif len(state.received) < (_FIFO if state.fcr & 1 else 1):
            state.received.append(value)
        else:
            state.line_errors |= 0x02  # overrun: what does not fit is lost
