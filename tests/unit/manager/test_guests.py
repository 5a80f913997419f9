"""Guests are connected to when somebody needs them, once each, and tell what disks they have."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from vmlab.guests.command import CommandResult
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded
from vmlab.manager import guests as module
from vmlab.manager.guests import Guests, SeenDisk, disks_seen


class FakeGuest:
    """A guest that answers until it is told not to."""

    made: list[FakeGuest] = []

    def __init__(self, machine: Any, channel: Any) -> None:
        self.machine = machine
        self.answers, self.hangs, self.closed = True, False, False
        FakeGuest.made.append(self)

    async def connect(self, *, timeout: float) -> None:
        self.machine.asked.set()
        if self.machine.silent:
            await asyncio.Event().wait()
        # Long enough for others to come meanwhile.
        for _ in range(20):
            await asyncio.sleep(0)
        if not self.machine.boots:
            raise DeadlineExceeded("the guest", seconds=timeout)

    async def ping(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if not self.answers:
            raise ChannelClosed("it died")

    async def close(self) -> None:
        self.closed = True


class FakeMachine:
    def __init__(self) -> None:
        self.boots, self.silent = True, False
        self.asked = asyncio.Event()


class FakeManager:
    """One machine of each id."""

    def __init__(self) -> None:
        self.machines: dict[str, FakeMachine] = {}

    async def machine(self, machine_id: str) -> FakeMachine:
        return self.machines.setdefault(machine_id, FakeMachine())


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> Guests:
    FakeGuest.made = []
    monkeypatch.setattr(module, "Guest", FakeGuest)
    monkeypatch.setattr(module, "channel_into", lambda machine: None)
    monkeypatch.setattr(module, "_PING_S", 0.05)
    return Guests(FakeManager())  # type: ignore[arg-type]  # as far as it is asked


def test_guest_is_connected_to_once(guests: Guests) -> None:
    async def story() -> None:
        await guests.start()
        first, second = await asyncio.gather(guests.get("a"), guests.get("a"))
        assert first is second
        assert await guests.get("b") is not first
        assert len(FakeGuest.made) == 2
        await guests.close()
        assert all(guest.closed for guest in FakeGuest.made)

    asyncio.run(story())


def test_who_waits_while_a_guest_is_forgotten_and_who_comes_then_have_one_guest(
    guests: Guests,
) -> None:
    async def story() -> None:
        await guests.get("a")
        closing, closed = asyncio.Event(), asyncio.Event()

        async def close() -> None:
            closing.set()
            await closed.wait()

        FakeGuest.made[0].close = close  # type: ignore[method-assign]  # it takes its time
        forgetting = asyncio.ensure_future(guests.forget("a"))
        await closing.wait()
        waiting = asyncio.ensure_future(guests.get("a"))
        await asyncio.sleep(0)
        closed.set()
        await forgetting
        found = await asyncio.gather(waiting, guests.get("a"))
        assert found[0] is found[1] is FakeGuest.made[1]
        assert len(FakeGuest.made) == 2
        await guests.close()

    asyncio.run(story())


@pytest.mark.parametrize("ends", [{"answers": False}, {"hangs": True}])
def test_guest_that_is_gone_is_connected_to_anew(guests: Guests, ends: dict[str, bool]) -> None:
    async def story() -> None:
        first: Any = await guests.get("a")
        for name, value in ends.items():
            setattr(first, name, value)
        assert await guests.get("a") is not first
        assert first.closed

    asyncio.run(story())


def test_guest_that_does_not_answer_while_all_stands_still_is_kept(
    guests: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STOOD_STILL_S", 0.1)
    asked = []

    async def story() -> None:
        first: Any = await guests.get("a")

        async def ping() -> None:
            asked.append(first)
            if len(asked) == 1:
                # Nothing runs here, and the answer is not there yet.
                time.sleep(0.5)  # noqa: ASYNC251  # that is the point
                await asyncio.Event().wait()

        first.ping = ping
        assert await guests.get("a") is first
        assert len(asked) == 2
        assert not first.closed

    asyncio.run(story())


def test_guest_that_never_answers_is_let_go_of(guests: Guests) -> None:
    async def story() -> None:
        (await guests._manager.machine("a")).boots = False  # type: ignore[attr-defined]  # a fake
        with pytest.raises(DeadlineExceeded):
            await guests.get("a", timeout=1)
        assert [guest.closed for guest in FakeGuest.made] == [True]

    asyncio.run(story())


def test_guest_is_forgotten(guests: Guests) -> None:
    async def story() -> None:
        first: Any = await guests.get("a")
        await guests.forget("a")
        await guests.forget("a")
        assert first.closed
        assert await guests.get("a") is not first

    asyncio.run(story())


def test_forgetting_a_guest_ends_the_wait_for_it_and_not_that_of_who_comes_then(
    guests: Guests,
) -> None:
    async def story() -> None:
        machine: Any = await guests._manager.machine("a")
        machine.silent = True
        asking = asyncio.ensure_future(guests.get("a"))
        await machine.asked.wait()
        waiting = asyncio.ensure_future(guests.get("a"))
        await asyncio.sleep(0)
        machine.silent = False
        await asyncio.gather(guests.forget("a"), guests.forget("a"))
        with pytest.raises(ChannelClosed, match="let go of"):
            await asking
        assert await waiting is FakeGuest.made[1]
        assert [guest.closed for guest in FakeGuest.made] == [True, False]

    asyncio.run(story())


def test_who_waits_for_a_guest_can_be_cancelled(guests: Guests) -> None:
    async def story() -> None:
        machine: Any = await guests._manager.machine("a")
        machine.silent = True
        asking = asyncio.ensure_future(guests.get("a"))
        await machine.asked.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert [guest.closed for guest in FakeGuest.made] == [True]

    asyncio.run(story())


def test_nobody_waits_for_a_guest_of_a_manager_that_closes(guests: Guests) -> None:
    async def story() -> None:
        machine: Any = await guests._manager.machine("a")
        machine.silent = True
        asking = asyncio.ensure_future(guests.get("a"))
        await machine.asked.wait()
        await guests.close()
        with pytest.raises(ChannelClosed):
            await asking

    asyncio.run(story())


SAID = """disk data vda 32768
disk root sda 65536
disk vdc 8
disk long-serial-number-x sdb 16
mount vda /mnt/data
mount sda1 /
mount sda12 /var
mount sdaa /elsewhere
mount tmpfs
"""


def test_disks_are_told_by_their_serial_numbers_with_what_is_mounted(
    seen_by: Callable[[str], dict[str, SeenDisk]],
) -> None:
    assert seen_by(SAID) == {
        "data": SeenDisk("/dev/vda", 16 << 20, ("/mnt/data",)),
        "root": SeenDisk("/dev/sda", 32 << 20, ("/", "/var")),
        "long-serial-number-x": SeenDisk("/dev/sdb", 8192, ()),
    }


@pytest.fixture
def seen_by() -> Callable[[str], dict[str, SeenDisk]]:
    """What a guest that prints a text has."""

    class Printing:
        def __init__(self, text: str) -> None:
            self.text = text

        async def succeed(self, command: str, *, timeout: float) -> CommandResult:
            return CommandResult(command, 0, self.text.encode(), b"", 0.0)

    return lambda text: asyncio.run(disks_seen(Printing(text)))  # type: ignore[arg-type]  # as far as it is asked
