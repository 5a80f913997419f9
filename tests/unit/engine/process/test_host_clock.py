"""The host's clock drives a machine's while it runs, and calls what was arranged."""

from __future__ import annotations

import threading
import time

from vmlab.engine.host_clock import HostClock


def test_time_passes_only_while_it_runs() -> None:
    clock = HostClock()
    assert clock.ticks() == 0
    clock.run()
    clock.run()
    while clock.ticks() < 1000:
        threading.Event().wait(0.001)
    ticks = clock.ticks()
    assert ticks <= clock.tick_offset + time.monotonic_ns() // 100
    clock.halt()
    clock.halt()
    stood = clock.nanoseconds()
    threading.Event().wait(0.01)
    assert clock.nanoseconds() == stood
    clock.run()
    assert clock.nanoseconds() >= stood
    clock.halt()


def test_calls_are_made_in_order_and_not_while_it_stands() -> None:
    others = set(threading.enumerate())  # a clock that was halted by its own thread ends later
    clock = HostClock()
    called: list[str] = []
    done = threading.Event()
    clock.call_at(2_000_000, lambda: called.append("second"))
    clock.call_at(1_000_000, lambda: called.append("first"))
    never = clock.call_at(1_500_000, lambda: called.append("never"))
    never.cancel()
    threading.Event().wait(0.01)
    assert called == []
    clock.run()
    clock.call_at(3_000_000, done.set)
    assert done.wait(250)
    assert called == ["first", "second"]
    late = threading.Event()
    clock.call_at(0, late.set)
    assert late.wait(250), "what is due already is called at once"
    clock.halt()
    assert set(threading.enumerate()) <= others


def test_a_call_may_halt_the_clock() -> None:
    clock = HostClock()
    halted = threading.Event()

    def halt() -> None:
        clock.halt()
        halted.set()

    clock.call_at(0, halt)
    clock.run()
    assert halted.wait(250)


def test_real_time_is_the_host_s() -> None:
    before = time.time_ns()
    assert before <= HostClock().wall_nanoseconds() <= time.time_ns()
