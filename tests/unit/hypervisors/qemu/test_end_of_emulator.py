"""A QEMU process that outlives its kill is killed again, and not waited for without end."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest

from vmlab.hypervisors.monitored import emulator
from vmlab.hypervisors.monitored.emulator import Emulator
from vmlab.hypervisors.qemu import emulator as qemu_emulator
from vmlab.hypervisors.qemu.emulator import Emulator as QemuEmulator
from vmlab.machine.errors import OperationFailed


class Stubborn:
    """A process on which the first signals have no effect."""

    pid = os.getpid()

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
    asyncio.run(asyncio.wait_for(emulator.put_away(process), 60))
    assert process.kills == lives


def test_a_process_that_cannot_be_killed_is_given_up_with_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(emulator, "_KILL_AGAIN", 0.001)
    process: Any = Stubborn(1000)
    with pytest.raises(OperationFailed, match=r"lives on after SIGKILL \(status: [A-Z] .*wchan: "):
        asyncio.run(asyncio.wait_for(emulator.put_away(process), 60))
    assert process.kills == emulator._KILLS
    process.pid = 0
    with pytest.raises(OperationFailed, match="No such file"):
        asyncio.run(asyncio.wait_for(emulator.put_away(process), 60))


@pytest.mark.parametrize("lives", [1, 1000])
def test_the_conversation_with_a_process_ends_whether_it_does_or_not(
    monkeypatch: pytest.MonkeyPatch, lives: int
) -> None:
    monkeypatch.setattr(emulator, "_KILL_AGAIN", 0.001)
    monkeypatch.setattr(Emulator, "running", property(lambda self: lives > 1))
    closed: list[bool] = []

    async def close() -> None:
        closed.append(True)

    async def notice() -> None:
        if lives > 1:
            await asyncio.Event().wait()

    async def test() -> None:
        made = Emulator.__new__(Emulator)
        watch = asyncio.ensure_future(notice())
        parts = {"process": Stubborn(lives), "qmp": SimpleNamespace(close=close), "_watch": watch}
        made.__dict__.update(parts)
        try:
            await asyncio.wait_for(made.end(), 60)
        finally:
            assert watch.done()

    if lives > 1:
        with pytest.raises(OperationFailed, match="lives on"):
            asyncio.run(test())
    else:
        asyncio.run(test())
    assert closed == [True]


@pytest.mark.parametrize("hung_up", [True, False])
def test_a_daemon_that_is_seen_to_end_before_its_qemu_is_not_to_blame(
    monkeypatch: pytest.MonkeyPatch, hung_up: bool
) -> None:
    monkeypatch.setattr(qemu_emulator, "_LAST_MOMENTS", 0.001)
    told: list[str] = []

    async def one_ended() -> None:
        return None

    async def test() -> None:
        over = asyncio.Event()
        monkeypatch.setattr(QemuEmulator, "running", property(lambda self: not over.is_set()))
        made = QemuEmulator.__new__(QemuEmulator)
        parts = {
            "process": SimpleNamespace(wait=over.wait),
            "qmp": SimpleNamespace(lost="the other side hung up" if hung_up else None),
            "daemons": SimpleNamespace(one_ended=one_ended, last_words=lambda: "a daemon"),
            "last_words": lambda: "QEMU",
            "ending": False,
        }
        made.__dict__.update(parts)
        noticing = asyncio.ensure_future(made._notice(told.append))
        if hung_up:
            # It takes its time, on a busy host.
            await asyncio.wait({noticing}, timeout=0.05)
            assert told == []
            over.set()
        await asyncio.wait_for(noticing, 60)

    asyncio.run(test())
    assert told == ["QEMU" if hung_up else "a daemon"]
