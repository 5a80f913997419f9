"""Workers: never twice at once, nothing forgotten, drained to the last."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import pytest

from vmlab.engine.devices import workers as workers_module
from vmlab.engine.devices.clock import ManualClock
from vmlab.engine.devices.workers import InlineWorkers, TimedWorkers, WorkerThreads


def none_fails(name: str, error: BaseException) -> None:
    raise AssertionError(name) from error


def test_work_asked_for_while_it_runs_is_run_again_and_not_beside() -> None:
    workers = WorkerThreads(4, none_fails)
    running = threading.Semaphore(1)
    runs = 0
    asked = threading.Event()
    finished = threading.Event()

    def run() -> None:
        nonlocal runs
        assert running.acquire(blocking=False), "two at once"
        runs += 1
        if runs == 1:
            asked.set()
            assert again.wait(250)
        running.release()
        if runs == 2:
            finished.set()

    again = threading.Event()
    work = workers.work("one", run)
    work.kick()
    assert asked.wait(250)
    for _ in range(5):
        work.kick()
    again.set()
    assert finished.wait(250)
    assert workers.drain(250) == []
    assert runs == 2
    workers.close()


def test_different_works_run_at_the_same_time() -> None:
    workers = WorkerThreads(2, none_fails)
    meeting = threading.Barrier(3, timeout=250)
    for name in ("one", "two"):
        workers.work(name, lambda: meeting.wait() and None).kick()
    meeting.wait()
    workers.close()


def test_a_drained_process_has_one_thread_and_may_fork() -> None:
    workers = WorkerThreads(3, none_fails)
    done = threading.Event()
    work = workers.work("one", done.set)
    before = set(threading.enumerate())
    work.kick()
    assert done.wait(250)
    assert set(threading.enumerate()) - before
    assert workers.drain(250) == []
    assert set(threading.enumerate()) <= before
    done.clear()
    work.kick()
    assert not done.is_set()
    child = os.fork()
    if child == 0:  # the workers go on in the child as well
        workers.resume()
        os._exit(0 if done.wait(250) else 1)
    workers.resume()
    assert done.wait(250)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    workers.close()


def test_what_runs_is_given_its_time_although_the_host_stood_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = WorkerThreads(1, none_fails)
    begun, gate = threading.Event(), threading.Event()
    looks = 0

    def monotonic() -> float:
        """The host stands still for a hundred seconds after the first look at the clock."""
        nonlocal looks
        looks += 1
        if looks == 2:
            threading.Timer(0.01, gate.set).start()
        return 0.0 if looks == 1 else 100.0

    def run() -> None:
        begun.set()
        gate.wait(250)

    workers.work("one", run).kick()
    assert begun.wait(250)
    monkeypatch.setattr(workers_module, "time", SimpleNamespace(monotonic=monotonic))
    assert workers.drain(10) == []
    workers.close()


def test_a_work_that_raises_is_told_and_the_others_go_on() -> None:
    failures: list[tuple[str, BaseException]] = []
    told = threading.Event()

    def failed(name: str, error: BaseException) -> None:
        failures.append((name, error))
        told.set()

    workers = WorkerThreads(1, failed)
    workers.work("bad", lambda: {}["a mistake"]).kick()
    assert told.wait(250)
    assert failures[0][0] == "bad"
    assert isinstance(failures[0][1], KeyError)
    done = threading.Event()
    workers.work("good", done.set).kick()
    assert done.wait(250)
    workers.close()


def test_inline_work_runs_within_the_kick_and_not_within_itself() -> None:
    workers = InlineWorkers()
    depth = 0
    runs = 0

    def run() -> None:
        nonlocal depth, runs
        assert depth == 0
        depth += 1
        runs += 1
        if runs < 3:
            work.kick()
        depth -= 1

    work = workers.work("one", run)
    work.kick()
    assert runs == 3
    assert workers.drain(0) == []
    work.kick()
    work.kick()
    assert runs == 3
    workers.resume()
    assert runs == 4
    workers.drain(0)
    work.kick()
    workers.close()
    workers.resume()
    assert runs == 4


@pytest.mark.parametrize("latency", [0, 50_000])
def test_timed_work_is_done_at_its_moment(latency: int) -> None:
    clock = ManualClock()
    workers = TimedWorkers(clock, latency)
    moments: list[int] = []
    work = workers.work("one", lambda: moments.append(clock.nanoseconds()))
    clock.advance(1000)
    work.kick()
    work.kick()
    assert moments == []
    clock.advance(latency + 1)
    assert moments == [1000 + latency]
    work.kick()
    assert workers.drain(0) == []
    clock.advance(latency + 1)
    assert len(moments) == 1
    workers.resume()
    assert len(moments) == 2
    workers.close()


def test_a_clock_calls_in_the_order_of_moments() -> None:
    clock = ManualClock(wall_nanoseconds=1000)
    calls: list[tuple[str, int]] = []
    clock.call_at(30, lambda: calls.append(("c", clock.nanoseconds())))
    clock.call_at(10, lambda: calls.append(("a", clock.nanoseconds())))
    cancelled = clock.call_at(15, lambda: calls.append(("x", 0)))
    clock.call_at(10, lambda: calls.append(("b", clock.nanoseconds())))
    assert clock.next_event() == 10
    cancelled.cancel()
    clock.advance(20)
    assert calls == [("a", 10), ("b", 10)]
    assert clock.next_event() == 30
    clock.advance(100)
    assert calls[2:] == [("c", 30)]
    assert clock.next_event() is None
    assert (clock.nanoseconds(), clock.wall_nanoseconds(), clock.ticks()) == (120, 1120, 1)
