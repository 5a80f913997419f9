"""Harts with a thread each: they run at the same time, and time is the host's.

The thread of a hart that sleeps waits for whoever has something for it, which may be another hart
in native code. Harts that take turns, in a time of their own, are in
vmlab.engine.sequential_harts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from vmlab.engine.accel.lockstep import Executor
from vmlab.engine.cpu import layout, sleeping
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.devices.bus import Bus
from vmlab.engine.devices.clock import TIMEBASE_HZ
from vmlab.engine.harts import NEVER, Harts, Order, Seat
from vmlab.engine.host_clock import HostClock
from vmlab.engine.memory.ram import full_barrier

_BUDGET: Final = 1 << 30
"""Instructions between two looks that nobody asked for."""
_LONGEST_SLEEP: Final = 3600.0
_ASLEEP: Final = layout.ASLEEP_WAITS if sleeping.NUMBER else layout.ASLEEP_TOLD
"""How harts sleep on this host."""


class ParallelHarts(Harts):
    """Harts with a thread each, by the host's clock, which is the machine's."""

    def __init__(
        self,
        harts: list[Hart],
        executors: list[Executor],
        clock: HostClock,
        bus: Bus,
        failed: Callable[[str], None],
    ) -> None:
        super().__init__(harts, executors, clock, bus, failed)
        self._clock = clock

    def thread_ids(self) -> list[int]:
        """The host's threads that the harts run on, 0 for a hart without one."""
        threads = [seat.thread for seat in self._seats]
        return [(thread.native_id or 0) if thread is not None else 0 for thread in threads]

    # ------------------------------------------------------------------------ from any thread

    def _wake(self, seat: Seat) -> None:
        with self._lock:
            seat.woken.notify_all()
            seat.hart.rouse()

    def ask_to_pause(self) -> None:
        """Let all harts stand soon, the calling one before its next instruction."""
        with self._lock:
            self._paused = True
            for seat in self._seats:
                seat.hart.request_exit()
                self._wake(seat)

    def pause(self) -> None:
        """Bring all harts to stand between two instructions; on return they do.

        Not for a hart's own thread.
        """
        with self._lock:
            self.ask_to_pause()
            while not all(seat.parked for seat in self._seats):
                self._all_parked.wait()

    def resume(self) -> None:
        """Let the harts run."""
        with self._lock:
            for seat in self._seats:
                seat.hart[layout.TIME_OFFSET] = self._clock.tick_offset & NEVER
            self._paused = False
            self._leaving = False
            for seat in self._seats:
                if seat.thread is None:
                    seat.parked = False
                    name = f"vmlab-hart{seat.hart.hart_id}"
                    seat.thread = threading.Thread(
                        target=self._serve, args=(seat,), name=name, daemon=True
                    )
                    seat.thread.start()
                seat.woken.notify_all()

    def join(self) -> None:
        """Pause, and end the harts' threads; `resume` makes new ones."""
        self.pause()
        with self._lock:
            self._leaving = True
            threads = [seat.thread for seat in self._seats if seat.thread is not None]
            for seat in self._seats:
                seat.thread = None
                seat.woken.notify_all()
        for thread in threads:
            thread.join()

    # ------------------------------------------------------------------------- a hart's own thread

    def _serve(self, seat: Seat) -> None:
        while self._may_run(seat):
            try:
                self._handle(seat, self._execute(seat, _BUDGET))
            except Exception as error:
                self._mistaken(seat, error)

    def _may_run(self, seat: Seat) -> bool:
        """Wait until the hart may run; whether it ever will on this thread."""
        with self._lock:
            while (self._paused or seat.stopped or seat.order is Order.HOLD) and not self._leaving:
                seat.parked = True
                self._all_parked.notify_all()
                seat.woken.wait()
            if self._leaving:
                seat.parked = True
                return False
            seat.parked = False
            return True

    def _sleep(self, seat: Seat) -> None:
        """Wait for an interrupt that is enabled, or for being asked to stand."""
        hart = seat.hart
        while True:
            hart.shared[layout.SHARED_ASLEEP] = _ASLEEP
            # Who interrupts this hart now sees that it sleeps, or is seen in what is pending.
            full_barrier()
            with self._lock:
                if self._paused or self._leaving or seat.stopped:
                    break
                pending, moment = self._pending(hart)
                if pending & hart[layout.MIE]:
                    break
                seconds = None
                if moment is not None:
                    seconds = min((moment - self._clock.ticks()) / TIMEBASE_HZ, _LONGEST_SLEEP)
                if _ASLEEP == layout.ASLEEP_TOLD:
                    seat.woken.wait(seconds)
                    continue
            sleeping.wait(hart.asleep_address, _ASLEEP, seconds)
        hart.shared[layout.SHARED_ASLEEP] = 0
        seat.suspended = False
