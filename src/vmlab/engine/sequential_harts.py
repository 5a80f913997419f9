"""Harts that take turns on one thread, and time that is a count of the instructions they retire.

With the same machine file and the same seed everything that the guest executes is the same, on
every host and under every executor, as long as nothing comes from outside. Where turns end and
devices answer depends on the count alone, so it does not matter where a machine was paused
meanwhile. What does come from outside (typing, channels, networks, the monitor) is seen at the next
poll point; when that is depends on the host.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from vmlab.engine.accel.lockstep import Executor
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.devices.bus import Bus
from vmlab.engine.devices.clock import TIMEBASE_HZ
from vmlab.engine.harts import Harts, Order, Seat
from vmlab.engine.instruction_clock import InstructionClock

TURN: Final = 1 << 14
"""Instructions of a turn while another hart has something to do."""
LONG_TURN: Final = 1 << 24
"""Instructions of a turn while none has."""


class SequentialHarts(Harts):
    """Harts on one thread, one after another.

    Args:
        harts: All of them, numbered from 0.
        executors: Who executes each.
        clock: The machine's time.
        bus: Answers what is not RAM.
        failed: Called when a hart cannot go on, with the reason; the machine is to be ended.
        skip_idle: Whether time goes on to the next event at once when all harts wait; otherwise
            it does so after as much of the host's time.
    """

    def __init__(
        self,
        harts: list[Hart],
        executors: list[Executor],
        clock: InstructionClock,
        bus: Bus,
        failed: Callable[[str], None],
        *,
        skip_idle: bool = True,
    ) -> None:
        super().__init__(harts, executors, clock, bus, failed)
        self._clock = clock
        self._skip_idle = skip_idle
        self._changed = threading.Condition(self._lock)
        self._parked = True
        self._thread: threading.Thread | None = None
        self._running: Seat | None = None
        self._stirred = False  # something came from another thread
        self._turn = 0  # whose turn it is ...
        self._turn_began = 0  # ... since when
        clock.arranged = self._stir

    def thread_ids(self) -> list[int]:
        """The host's thread that all harts run on, as often as there are harts; or 0."""
        thread = self._thread
        return [(thread.native_id or 0) if thread is not None else 0] * len(self)

    # ------------------------------------------------------------------------ from any thread

    def _wake(self, seat: Seat) -> None:
        self._stir()

    def _stir(self) -> None:
        """What the thread goes by has changed, and perhaps not by what it does itself."""
        if threading.current_thread() is self._thread:
            return
        with self._lock:
            self._stirred = True
            if self._running is not None:
                self._running.hart.request_exit()
            self._changed.notify_all()

    def ask_to_pause(self) -> None:
        """Let all harts stand soon, the calling one before its next instruction."""
        with self._lock:
            self._paused = True
            self._stir()

    def pause(self) -> None:
        """Bring all harts to stand between two instructions; on return they do.

        Not for the harts' own thread.
        """
        with self._lock:
            self.ask_to_pause()
            while not self._parked:
                self._all_parked.wait()

    def resume(self) -> None:
        """Let the harts run."""
        with self._lock:
            self._paused = False
            self._leaving = False
            if self._thread is None:
                self._parked = False
                self._thread = threading.Thread(target=self._serve, name="vmlab-harts", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def join(self) -> None:
        """Pause, and end the harts' thread; `resume` makes a new one."""
        self.pause()
        with self._lock:
            self._leaving = True
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None:
            thread.join()

    def reset(self) -> None:
        """All harts as after power-on, stopped; they stand still meanwhile."""
        super().reset()
        self._turn, self._turn_began = 0, self._clock.instructions

    # ------------------------------------------------------------------------ the harts' own thread

    def _serve(self) -> None:
        while self._may_run():
            seat = self._seats[self._turn]
            try:
                self._clock.make_calls()
                chosen = self._choose()
                if chosen is None:
                    self._pass_time()
                else:
                    seat = chosen
                    self._run(seat)
            except Exception as error:
                self._mistaken(seat, error)

    def _may_run(self) -> bool:
        """Wait until the harts may run; whether they ever will on this thread."""
        with self._lock:
            while self._paused and not self._leaving:
                self._parked = True
                self._all_parked.notify_all()
                self._changed.wait()
            self._parked = self._leaving
            self._stirred = False
            return not self._leaving

    def _choose(self) -> Seat | None:
        """Whose turn it is, or None if all wait."""
        now, seats = self._clock.instructions, self._seats
        if self._ready(seats[self._turn]) and now < self._turn_ends():
            return seats[self._turn]
        for step in range(1, len(seats) + 1):
            number = (self._turn + step) % len(seats)
            if self._ready(seats[number]):
                self._turn, self._turn_began = number, now
                return seats[number]
        return None

    def _turn_ends(self) -> int:
        # All are looked at each time: one that an interrupt wakes is awake from then on, even if
        # another hart claims the interrupt before it comes to its turn.
        others = [
            self._ready(seat) for number, seat in enumerate(self._seats) if number != self._turn
        ]
        return self._turn_began + (TURN if any(others) else LONG_TURN)

    def _ready(self, seat: Seat) -> bool:
        """Whether a hart has something to do."""
        if seat.stopped or seat.order is Order.HOLD:
            return False
        if seat.waiting:
            pending, _ = self._pending(seat.hart)
            if not pending & seat.hart[layout.MIE]:
                return False
        seat.waiting = seat.suspended = False
        seat.hart.shared[layout.SHARED_ASLEEP] = 0
        return True

    def _next_event(self) -> int | None:
        """When the earliest of the calls and of the timers of harts that wait is due."""
        events = [self._clock.next_event()]
        for seat in self._seats:
            if seat.waiting and not seat.stopped:
                _, tick = self._pending(seat.hart)
                events.append(None if tick is None else self._clock.at_tick(tick))
        return min((event for event in events if event is not None), default=None)

    def _run(self, seat: Seat) -> None:
        """Let a hart run until it leaves for something, something is due, or its turn ends."""
        hart, clock = seat.hart, self._clock
        event, until = self._next_event(), self._turn_ends()
        if event is not None:
            until = min(until, event)
        retired = hart.retired
        hart[layout.TIME_DIVISOR] = clock.per_tick
        hart[layout.TIME_OFFSET] = clock.instructions - retired
        with self._lock:
            if self._stirred or self._paused:
                return
            self._running = seat
        left = self._execute(seat, until - clock.instructions)
        with self._lock:
            self._running = None
        clock.instructions += hart.retired - retired
        self._handle(seat, left)

    def _sleep(self, seat: Seat) -> None:
        seat.waiting = True
        # Who interrupts it ends a long turn.
        seat.hart.shared[layout.SHARED_ASLEEP] = layout.ASLEEP_TOLD

    def _pass_time(self) -> None:
        """All harts wait: go to the next event, or wait for somebody outside."""
        clock = self._clock
        with self._lock:
            if self._stirred or self._paused:
                return
            event = self._next_event()
            if event is None:
                self._changed.wait()
            elif self._skip_idle:
                clock.instructions = max(clock.instructions, event)
            else:
                self._wait_for(event)

    def _wait_for(self, event: int) -> None:
        """Let the host's time pass up to an event, or until something comes from outside."""
        clock = self._clock
        per_second = clock.per_tick * TIMEBASE_HZ
        ahead = event - clock.instructions
        begun = time.monotonic()
        while not self._paused:
            passed = int((time.monotonic() - begun) * per_second)
            if self._stirred or passed >= ahead:
                clock.instructions += max(0, min(passed, ahead))
                return
            self._changed.wait((ahead - passed) / per_second)
