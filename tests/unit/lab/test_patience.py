"""A wait is not used up while this process stands still, and ends when its time is over."""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time

from vmlab.lab.patience import wait_for_any, wait_for_event

# Lets the process that starts it stand still for some seconds.
_STILL = "kill -STOP $PPID; sleep 2.5; kill -CONT $PPID"


def test_what_came_while_the_process_stood_still_is_found() -> None:
    async def come() -> str:
        asyncio.get_running_loop().call_soon(time.sleep, 1.5)
        await asyncio.sleep(0.01)
        # As what goes from hand to hand, a turn of the loop each.
        for _ in range(5):
            await asyncio.sleep(0)
        return "come"

    async def main() -> None:
        task = asyncio.ensure_future(come())
        assert await wait_for_any({task}, 1.0) == {task}
        assert task.result() == "come"

    asyncio.run(main())


def test_what_does_not_come_is_not_waited_for_longer() -> None:
    async def main() -> None:
        never = asyncio.get_running_loop().create_future()
        assert await wait_for_any({never}, 0.01) == set()

    asyncio.run(main())
    assert not wait_for_event(threading.Event(), 0.01)


def test_an_event_that_came_while_the_process_stood_still_is_found() -> None:
    event = threading.Event()

    def stop_and_set() -> None:
        subprocess.run(["sh", "-c", _STILL], check=True, timeout=280)
        time.sleep(0.1)
        event.set()

    thread = threading.Thread(target=stop_and_set)
    thread.start()
    try:
        assert wait_for_event(event, 2.0)
    finally:
        thread.join()
