"""Logging in on the console of a guest of any slowness: a scripted one, on a virtual clock.

The terminal is a queue of lines, as a real one is for a guest that is not reading yet; getty(8),
login(1) and the shell wait as long as the test says before each thing they do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from itertools import chain, repeat
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmlab.guests.console import ConsoleChannel, _Printed
from vmlab.guests.console_login import LOOP_HERE, Asked, Dialogue
from vmlab.guests.marks import MarkedStream
from vmlab.hypervisors.base import Console
from vmlab.hypervisors.simulated.clock import VirtualClockLoop
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded, OperationFailed

KERNEL = b"[   12.345678] random: crng init done\r\n"


class SlowGuest(Console):
    """A console with a guest behind it; `waits` are the seconds before each of its steps."""

    name = "serial"

    def __init__(self, waits: Iterable[float] = (), *, otherwise: float = 0.0) -> None:
        self.logins: list[tuple[str, str]] = []
        self.lines: list[str] = []
        self._waits = chain(waits, repeat(otherwise))
        self._typed: asyncio.Queue[str] = asyncio.Queue()
        self._shown: asyncio.Queue[bytes] = asyncio.Queue()

    async def read(self, size: int = 65536) -> bytes:
        return await self._shown.get()

    async def write(self, data: bytes) -> None:
        for line in data.decode().splitlines():
            self._typed.put_nowait(line)

    async def log(self) -> bytes:
        return b""

    async def close(self) -> None:
        """Nothing is held."""

    async def step(self) -> None:
        await asyncio.sleep(next(self._waits))

    async def show(self, text: bytes) -> None:
        await self.step()
        self._shown.put_nowait(text)

    async def line(self) -> str:
        line = await self._typed.get()
        await self.step()
        return line

    def flush(self) -> None:
        while not self._typed.empty():
            self._typed.get_nowait()

    async def getty(self, *, flushes: bool, kernel: bool = False) -> None:
        """getty(8) and login(1): the password is "secret", and asked for during a minute."""
        await self.step()
        if flushes:
            self.flush()
        while True:
            await self.show(b"Debian 12 vm ttyS0\r\n\r\nvm login: ")
            if kernel:
                self._shown.put_nowait(KERNEL)
            if not (user := await self.line()):
                continue
            await self.show(b"Password: ")
            await self.step()
            if flushes:
                self.flush()
            try:
                async with asyncio.timeout(60):
                    password = await self._typed.get()
            except TimeoutError:
                await self.show(b"\r\nLogin timed out after 60 seconds.\r\n")
                continue
            await self.step()
            self.logins.append((user, password))
            if (user, password) == ("root", "secret"):
                break
            await self.show(b"\r\nLogin incorrect\r\n")
        await self.show(b"\r\nLinux vm\r\nLast login: Sat Nov 21 05:00:00\r\n")
        await self.shell()

    async def shell(self) -> None:
        await self.step()
        while True:
            await self.show(b"\x1b[?2004h\x1b]0;root@vm: ~\x07\x1b[01mroot@vm\x1b[0m:~# \x1b[6n")
            self.lines.append(line := await self.line())
            if line == "say":
                await self.show(b"say\r\nmark here\r\n")

    async def loop(self) -> None:
        while True:
            self.lines.append(line := await self.line())
            await self.show(LOOP_HERE + b"\n" if not line else b"mark loop\n")


def drive(
    guest: Callable[[], tuple[SlowGuest, Coroutine[Any, Any, None]]],
    body: Callable[[Dialogue], Coroutine[Any, Any, None]],
    *,
    password: str | None = "secret",
) -> SlowGuest:
    """Run `body` with a dialogue with the guest, for at most an hour of the guest's time."""

    async def main() -> SlowGuest:
        console, program = guest()
        task = asyncio.ensure_future(program)
        try:
            async with asyncio.timeout(3600):
                await body(Dialogue(console, user="root", password=password))
        finally:
            task.cancel()
            await asyncio.wait({task})
        return console

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main())


async def reaches_a_shell(dialogue: Dialogue) -> None:
    while (answer := await reached(dialogue)) is None:
        """The shell was slower than it is given; it is looked for again."""
    assert answer == b"here"


async def reached(dialogue: Dialogue) -> bytes | None:
    assert await dialogue.shell() is Asked.SHELL
    return await dialogue.ask("say", b"mark")


async def is_refused(dialogue: Dialogue) -> None:
    with pytest.raises(OperationFailed, match="refuses the login of 'root'"):
        await dialogue.shell()


# Of anything between two lines that were typed: below the silence in which nothing is on its way.
PAUSES = st.sampled_from([0.0, 0.1, 0.3, 1.0, 2.1, 5.0])
BOOTS = st.sampled_from([0.0, 1.0, 2.5, 7.0, 35.0, 200.0])


@given(boot=BOOTS, waits=st.lists(PAUSES, max_size=12), otherwise=PAUSES, flushes=st.booleans())
def test_the_right_password_is_never_refused_however_slow_the_guest(
    boot: float, waits: list[float], otherwise: float, flushes: bool
) -> None:
    def guest() -> tuple[SlowGuest, Coroutine[Any, Any, None]]:
        console = SlowGuest([boot, *waits], otherwise=otherwise)
        return console, console.getty(flushes=flushes)

    drive(guest, reaches_a_shell)


@given(boot=BOOTS, waits=st.lists(PAUSES, max_size=12), otherwise=PAUSES, flushes=st.booleans())
def test_a_wrong_password_is_refused_after_it_was_tried_twice(
    boot: float, waits: list[float], otherwise: float, flushes: bool
) -> None:
    def guest() -> tuple[SlowGuest, Coroutine[Any, Any, None]]:
        console = SlowGuest([boot, *waits], otherwise=otherwise)
        return console, console.getty(flushes=flushes)

    console = drive(guest, is_refused, password="wrong")
    assert console.logins.count(("root", "wrong")) >= 2


@pytest.mark.parametrize("stall", [10.0, 30.0, 55.0])
@pytest.mark.parametrize("step", range(8))
def test_a_guest_that_stalls_for_long_gets_nothing_typed_meanwhile(step: int, stall: float) -> None:
    """A question that was answered once is not answered again while the guest thinks."""

    def guest() -> tuple[SlowGuest, Coroutine[Any, Any, None]]:
        console = SlowGuest([*[0.0] * step, stall])
        return console, console.getty(flushes=False)

    console = drive(guest, reaches_a_shell)
    # The first Enter is an empty user; stalls before the prompt make more of these, and no more.
    assert console.logins == [("root", "secret")]


def test_a_password_that_login_threw_away_is_typed_again_when_it_asks_again() -> None:
    def guest() -> tuple[SlowGuest, Coroutine[Any, Any, None]]:
        # Between "Password: " and turning off the echo: a second.
        console = SlowGuest([0, 0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0])
        return console, console.getty(flushes=True)

    assert drive(guest, reaches_a_shell).logins == [("root", "secret")]


def test_the_kernel_s_messages_do_not_hide_a_question() -> None:
    def guest() -> tuple[SlowGuest, Coroutine[Any, Any, None]]:
        console = SlowGuest()
        return console, console.getty(flushes=False, kernel=True)

    async def body(dialogue: Dialogue) -> None:
        before = asyncio.get_running_loop().time()
        await reaches_a_shell(dialogue)
        assert asyncio.get_running_loop().time() - before < 2

    drive(guest, body)


def test_a_password_left_open_by_others_is_not_given_ours() -> None:
    async def program(console: SlowGuest) -> None:
        console.logins.append(("somebody", await console.line()))
        await console.show(b"\r\nPassword: ")
        console.logins.append(("somebody", await console.line()))
        await console.show(b"\r\nLogin incorrect\r\n")
        await console.getty(flushes=False)

    def guest() -> tuple[SlowGuest, Coroutine[Any, Any, None]]:
        console = SlowGuest()
        return console, program(console)

    console = drive(guest, reaches_a_shell)
    assert console.logins == [("somebody", ""), ("somebody", ""), ("root", "secret")]


def test_init_of_busybox_gets_the_enter_it_asks_for() -> None:
    async def program(console: SlowGuest) -> None:
        await asyncio.sleep(1)
        console.flush()
        await console.show(b"\r\nPlease press Enter to activate this console. ")
        await console.line()
        await console.shell()

    def guest() -> tuple[SlowGuest, Coroutine[Any, Any, None]]:
        console = SlowGuest()
        return console, program(console)

    drive(guest, reaches_a_shell)


@pytest.mark.parametrize("otherwise", [0.0, 3.0])
def test_a_loop_is_found_by_its_answer_to_enter(otherwise: float) -> None:
    def guest() -> tuple[SlowGuest, Coroutine[Any, Any, None]]:
        console = SlowGuest(otherwise=otherwise)
        return console, console.loop()

    async def body(dialogue: Dialogue) -> None:
        assert await dialogue.shell() is Asked.LOOP
        assert await dialogue.ask("anything", b"mark") == b"loop"

    drive(guest, body)


def test_what_looks_like_a_shell_and_asks_for_a_login_is_none() -> None:
    async def program(console: SlowGuest) -> None:
        await console.show(b"Booting the kernel >")
        await asyncio.sleep(1)
        await console.getty(flushes=False)

    def guest() -> tuple[SlowGuest, Coroutine[Any, Any, None]]:
        console = SlowGuest()
        return console, program(console)

    async def body(dialogue: Dialogue) -> None:
        assert await reached(dialogue) is None
        await reaches_a_shell(dialogue)

    drive(guest, body)


def chatter() -> Iterator[bytes]:
    yield from repeat(b"still here\r\n")


def test_a_shell_is_found_behind_a_daemon_that_prints_all_the_time() -> None:
    def guest() -> tuple[SlowGuest, Coroutine[Any, Any, None]]:
        console = SlowGuest()

        async def program() -> None:
            await console.line()
            for text in chatter():
                await console.show(text)
                await asyncio.sleep(1)
                if not console._typed.empty():
                    await console.shell()

        return console, program()

    drive(guest, reaches_a_shell)


def test_a_login_refused_without_a_password_is_told_when_time_is_up() -> None:
    async def program(console: SlowGuest) -> None:
        while True:
            await console.show(b"vm login: ")
            if await console.line():
                await console.show(b"\r\nLogin incorrect\r\n")

    async def main() -> None:
        console = SlowGuest()

        async def opened() -> Console:
            return console

        task = asyncio.ensure_future(program(console))
        channel = ConsoleChannel(opened)
        with pytest.raises(DeadlineExceeded) as caught:
            await channel.connect(timeout=300)
        assert "refused the login of 'root'" in (caught.value.hint or "")
        task.cancel()
        await asyncio.wait({task})

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(main())


def test_a_console_that_ends_says_so() -> None:
    def guest() -> tuple[SlowGuest, Coroutine[Any, Any, None]]:
        console = SlowGuest()
        return console, console.show(b"")

    async def body(dialogue: Dialogue) -> None:
        with pytest.raises(ChannelClosed, match="the console ended"):
            await dialogue.shell()

    drive(guest, body)


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_panic_ends_a_command_but_a_log_that_tells_of_one_does_not(goes_on: bool) -> None:
    async def main() -> None:
        console = SlowGuest()
        printed = b"[   12.345678] Kernel panic - not syncing: sysrq triggered crash\n"
        for piece in (b"output ", printed[:30], printed[30:]):
            await console.show(piece)
        stream = MarkedStream(_Printed(console).read)
        waiting = asyncio.ensure_future(stream.until(b"mark"))
        await asyncio.sleep(5)
        if goes_on:
            await console.show(b"and more\nmark 0\n")
            assert await waiting == b"0"
            return
        with pytest.raises(ChannelClosed, match="kernel panicked"):
            await waiting

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(main())
