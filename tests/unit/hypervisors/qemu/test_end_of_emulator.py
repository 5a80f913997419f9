"""A QEMU process that outlives its kill is killed again, and not waited for without end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vmlab.hypervisors.monitored import emulator


class Stubborn:
    """A process on which the first signals have no effect."""

    def __init__(self, lives: int) -> None:
        self.lives = lives
        self.kills = 0

    def kill(self) -> bool:
        self.kills += 1
        return True

    async def wait(self, timeout: float | None = None) -> int:
        if self.kills < self.lives:
            async with asyncio.timeout(timeout):
                await asyncio.Event().wait()
        return -9


@pytest.mark.parametrize("lives", [1, 3])
def test_a_process_is_killed_until_it_has_ended(
    monkeypatch: pytest.MonkeyPatch, lives: int
) -> None:
    monkeypatch.setattr(emulator, "_KILL_AGAIN", 0.01)
    process: Any = Stubborn(lives)
    asyncio.run(asyncio.wait_for(emulator._put_away(process), 60))
    assert process.kills == lives
