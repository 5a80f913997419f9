"""The virtual clock jumps, keeps order, and does not outrun what is real."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

from vmlab.hypervisors.simulated.clock import Stalled, VirtualClockLoop


def on_virtual_time(coroutine):
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(coroutine)


def test_a_year_of_sleep_passes_at_once_and_exactly():
    async def body() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(365):
            await asyncio.sleep(86_400)
        return loop.time() - began

    assert on_virtual_time(body()) == pytest.approx(365 * 86_400, abs=1e-3)


def test_timers_fire_in_the_order_of_their_times():
    async def body() -> list[int]:
        order: list[int] = []

        async def wait(seconds: int) -> None:
            await asyncio.sleep(seconds)
            order.append(seconds)

        await asyncio.gather(*map(wait, (30, 10, 20, 5)))
        return order

    assert on_virtual_time(body()) == [5, 10, 20, 30]


def test_a_deadline_ends_what_takes_longer_at_its_moment():
    async def body() -> float:
        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(7):
                await asyncio.sleep(8)
        return loop.time()

    assert on_virtual_time(body()) == pytest.approx(7)


def test_time_stands_still_while_something_is_ready():
    async def body() -> float:
        for _ in range(1000):
            await asyncio.sleep(0)
        return asyncio.get_running_loop().time()

    assert on_virtual_time(body()) == 0


def test_what_is_ready_on_a_socket_comes_before_the_next_timer():
    async def body() -> tuple[bytes, float]:
        loop = asyncio.get_running_loop()
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            there.send(b"x")
            async with asyncio.timeout(1000):
                data = await loop.sock_recv(here, 1)
            return data, loop.time()

    assert on_virtual_time(body()) == (b"x", 0)


def test_without_a_timer_it_waits_for_real_input():
    async def body() -> bytes:
        loop = asyncio.get_running_loop()
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            thread = loop.run_in_executor(None, lambda: (time.sleep(0.05), there.send(b"y")))
            data = await loop.sock_recv(here, 1)
            await thread
            return data

    assert on_virtual_time(body()) == b"y"


def test_a_deadline_does_not_outrun_a_thread():
    """A thousand virtual seconds are as many real ones while a thread works."""

    async def body() -> float:
        async with asyncio.timeout(1000):
            await asyncio.to_thread(time.sleep, 0.05)
        return asyncio.get_running_loop().time()

    assert 0.03 < on_virtual_time(body()) < 900


def test_a_timer_fires_while_a_thread_works():
    async def body() -> float:
        end = threading.Event()
        slow = asyncio.get_running_loop().run_in_executor(None, end.wait, 250)
        await asyncio.sleep(0.02)
        early = slow.done()
        end.set()
        await slow
        return early

    assert on_virtual_time(body()) is False


def test_tasks_that_wait_for_each_other_are_an_error_that_names_them() -> None:
    async def waits_for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    with (
        asyncio.Runner(loop_factory=lambda: VirtualClockLoop(patience=0.01)) as runner,
        pytest.raises(Stalled, match="waits_for_ever") as raised,
    ):
        runner.run(waits_for_ever())
    assert "test_clock.py" in str(raised.value)


def test_what_comes_from_outside_is_waited_for() -> None:
    async def body() -> str:
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        threading.Timer(0.05, loop.call_soon_threadsafe, (answer.set_result, "late")).start()
        return await answer

    assert on_virtual_time(body()) == "late"
