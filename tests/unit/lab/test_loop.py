"""Coroutines are run from outside their loop: their results, errors, limits and interruptions."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from vmlab.hypervisors.simulated.clock import Stalled, VirtualClockLoop
from vmlab.lab import loop as loops
from vmlab.lab.loop import LoopThread
from vmlab.machine.errors import DeadlineExceeded, OperationFailed


@pytest.fixture(params=[asyncio.new_event_loop, VirtualClockLoop], ids=["real", "virtual"])
def loop(request: pytest.FixtureRequest) -> Iterator[LoopThread]:
    made = LoopThread(request.param)
    yield made
    made.close()


async def _sum(one: int, two: int) -> int:
    await asyncio.sleep(0.001)
    return one + two


def test_results_and_errors_come_back(loop: LoopThread) -> None:
    assert loop.run(_sum(1, 2)) == 3
    with pytest.raises(TypeError):
        loop.run(_sum(1, "2"))  # type: ignore[arg-type]  # the error is what is wanted
    assert loop.run(_sum(3, 4)) == 7


def test_calls_of_several_threads_are_served_at_the_same_time(loop: LoopThread) -> None:
    met = asyncio.Event()
    results: list[str] = []

    async def wait() -> str:
        await met.wait()
        return "met"

    async def meet() -> None:
        met.set()

    thread = threading.Thread(target=lambda: results.append(loop.run(wait())))
    thread.start()
    loop.run(meet())
    thread.join(60)
    assert results == ["met"]


def test_a_limit_is_told_with_its_seconds(loop: LoopThread) -> None:
    async def for_ever() -> None:
        await asyncio.sleep(3600)

    with pytest.raises(DeadlineExceeded, match=r"0\.01 s"):
        loop.run(for_ever(), timeout=0.01)


def test_a_time_limit_of_the_coroutines_own_is_its_own(loop: LoopThread) -> None:
    async def limited() -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        loop.run(limited(), timeout=60)


def test_an_interruption_cancels_the_coroutine_and_waits_for_it(loop: LoopThread) -> None:
    begun, cleared = threading.Event(), threading.Event()

    async def work() -> None:
        begun.set()
        try:
            # Not a sleep, which takes no time on a virtual clock.
            await asyncio.to_thread(cleared.wait, 60)
        except asyncio.CancelledError:
            cleared.set()
            raise

    def interrupt() -> None:
        begun.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        loop.run(work())
    thread.join()
    assert cleared.is_set()
    assert loop.run(_sum(1, 1)) == 2


def test_a_call_from_the_loop_itself_is_refused_instead_of_waiting_for_ever(
    loop: LoopThread,
) -> None:
    async def back() -> None:
        loop.run(_sum(1, 2))

    with pytest.raises(OperationFailed, match="wait for itself"):
        loop.run(back())


def test_a_closed_loop_refuses_work_and_has_cancelled_what_ran(loop: LoopThread) -> None:
    ended: list[str] = []

    async def background() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    tasks: list[asyncio.Task[None]] = []

    async def begin() -> None:
        tasks.append(asyncio.ensure_future(background()))
        await asyncio.sleep(0)

    loop.run(begin())
    loop.close()
    loop.close()
    assert ended == ["cancelled"]
    with pytest.raises(OperationFailed, match="closed"):
        loop.run(_sum(1, 2))


def test_real_time_goes_on_between_calls() -> None:
    loop = LoopThread()
    done = threading.Event()

    async def begin() -> None:
        asyncio.get_running_loop().call_later(0.001, done.set)

    loop.run(begin())
    assert done.wait(60)
    loop.close()


def test_virtual_time_stands_still_between_calls() -> None:
    loop = LoopThread(VirtualClockLoop)
    ticks = []

    async def tick() -> None:
        while True:
            await asyncio.sleep(1)
            ticks.append(asyncio.get_running_loop().time())

    tasks = []

    async def begin() -> None:
        tasks.append(asyncio.ensure_future(tick()))

    async def pass_time(seconds: float) -> None:
        await asyncio.sleep(seconds)

    began = time.monotonic()
    loop.run(begin())
    loop.run(pass_time(1000))
    counted = len(ticks)
    assert 990 <= counted <= 1001
    # It has ended its turn, and nobody asks it for another one.
    assert loop.run(_sum(1, 1)) == 2
    assert len(ticks) <= counted + 1
    assert time.monotonic() - began < 1000
    loop.close()


def test_a_loop_that_stalls_tells_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_PATIENCE", 0.01)
    loop = LoopThread(VirtualClockLoop)

    async def for_ever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stalled, match="for_ever"):
        loop.run(for_ever())
    with pytest.raises(OperationFailed, match="closed"):
        loop.run(_sum(1, 2))
    loop.close()


def test_the_loop_of_a_process_is_one() -> None:
    assert LoopThread.shared() is LoopThread.shared()
    assert LoopThread.shared().run(_sum(2, 2)) == 4
