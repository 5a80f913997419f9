"""The goldfish real-time clock: wall-clock time in nanoseconds, and an alarm.

Registers as in QEMU's docs and Linux's drivers/rtc/rtc-goldfish.c. Reading TIME_LOW latches the
upper half for TIME_HIGH. The guest may set the time; the host's is not touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vmlab.engine.devices.clock import Clock, Timer

SIZE: Final = 0x1000
_TIME_LOW: Final = 0x00
_TIME_HIGH: Final = 0x04
_ALARM_LOW: Final = 0x08
_ALARM_HIGH: Final = 0x0C
_IRQ_ENABLED: Final = 0x10
_CLEAR_ALARM: Final = 0x14
_ALARM_STATUS: Final = 0x18
_CLEAR_INTERRUPT: Final = 0x1C
_MASK_64: Final = (1 << 64) - 1


@dataclass
class RtcState:
    """Everything that a snapshot must hold. Times are nanoseconds since 1970-01-01 UTC."""

    offset: int = 0
    """What the guest's time is ahead of the clock's."""
    time_high: int = 0
    alarm: int = 0
    alarm_high: int = 0
    alarm_running: bool = False
    irq_pending: bool = False
    irq_enabled: bool = False


class GoldfishRtc:
    """The clock chip; `line` is its interrupt."""

    def __init__(self, clock: Clock, line: Callable[[bool], None]) -> None:
        self.state = RtcState()
        self._clock = clock
        self._line = line
        self._timer: Timer | None = None
        self._lock = threading.RLock()

    def reset(self) -> None:
        """The alarm is off; the time that the guest has set stays, as with a battery."""
        with self._lock:
            self.state = RtcState(offset=self.state.offset)
            self.refresh()

    def refresh(self) -> None:
        """Drive the line and arrange for the alarm anew, after the state was replaced."""
        self._update()
        self._arm()

    def now(self) -> int:
        """The guest's wall-clock time in nanoseconds."""
        return (self._clock.wall_nanoseconds() + self.state.offset) & _MASK_64

    def _update(self) -> None:
        self._line(self.state.irq_pending and self.state.irq_enabled)

    def _arm(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        if not self.state.alarm_running:
            return
        left = self.state.alarm - self.now()
        if left <= 0:
            self._ring()
        else:
            self._timer = self._clock.call_at(self._clock.nanoseconds() + left, self._due)

    def _due(self) -> None:
        with self._lock:
            if self.state.alarm_running:
                self._arm()

    def _ring(self) -> None:
        self.state.alarm_running = False
        self.state.irq_pending = True
        self._update()

    def read(self, offset: int, size: int) -> int:
        """32-bit registers; what is not there reads as zero."""
        state = self.state
        with self._lock:
            if offset == _TIME_LOW:
                now = self.now()
                state.time_high = now >> 32
                return now & 0xFFFF_FFFF
            if offset == _TIME_HIGH:
                return state.time_high
            if offset == _ALARM_LOW:
                return state.alarm & 0xFFFF_FFFF
            if offset == _ALARM_HIGH:
                return state.alarm >> 32
            if offset == _IRQ_ENABLED:
                return int(state.irq_enabled)
            if offset == _ALARM_STATUS:
                return int(state.alarm_running)
            return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """32-bit registers; what is not there is not written."""
        state = self.state
        with self._lock:
            if offset == _TIME_LOW:
                self._set_time((self.now() & ~0xFFFF_FFFF) | value)
            elif offset == _TIME_HIGH:
                self._set_time(value << 32 | self.now() & 0xFFFF_FFFF)
            elif offset == _ALARM_HIGH:
                state.alarm_high = value
            elif offset == _ALARM_LOW:
                state.alarm = state.alarm_high << 32 | value
                state.alarm_running = True
                self._arm()
            elif offset == _IRQ_ENABLED:
                state.irq_enabled = bool(value & 1)
                self._update()
            elif offset == _CLEAR_ALARM:
                state.alarm_running = False
                self._arm()
            elif offset == _CLEAR_INTERRUPT:
                state.irq_pending = False
                self._update()

    def _set_time(self, nanoseconds: int) -> None:
        self.state.offset = nanoseconds - self._clock.wall_nanoseconds()
        self._arm()
