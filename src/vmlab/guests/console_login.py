"""From a serial console to a shell at its prompt: press Enter, log in where that is asked for.

Correct however slow the guest is, so nothing is typed while an answer is outstanding; what was
typed early all the same (Enter, into a guest that was not listening yet) may be taken for a user or
a password, so a refusal counts only where nothing of that kind can explain it. Not a terminal
emulator: it knows the questions of getty(8), login(1) and shells by their last line.
"""

from __future__ import annotations

import asyncio
import re
from enum import Enum
from typing import Final

from vmlab.hypervisors.base import Console
from vmlab.machine.errors import ChannelClosed, OperationFailed

LOOP_HERE: Final = b"vmlab-loop-here"
"""What the loop of `vmlab.guests.console` answers to an empty line."""

_ENTER_AFTER: Final = 2.0
_ENTER_AT_MOST: Final = 10.0
"""Seconds of silence after which Enter is pressed again; twice as many each time, up to these."""

_CHATTER: Final = 30.0
"""Seconds after which Enter is pressed into a console that prints all the time but asks nothing."""

_ANSWER: Final = 70.0
"""Seconds that a user or a password may go without an answer. login(1) gives up after 60 and asks
anew by itself (LOGIN_TIMEOUT in login.defs(5)); until then only patience is right."""

_LINE: Final = 30.0
"""Seconds that a shell has to answer a line. One that is slower is found by Enter afterwards."""

_SETTLE: Final = 0.25
_SETTLE_AT_MOST: Final = 16.0
"""Seconds of silence after which a question is one that waits; four times as many after each
confusion, until nothing typed early can be on its way any more. login(1) throws away what is typed
until it has turned the echo off, just after it asked."""

_REFUSALS: Final = 2
_KEPT: Final = 8192

# Colours, questions to the terminal and titles (ECMA-48 CSI and OSC), put around prompts; and lines
# of the kernel (printk.time), which land behind them.
_NOISE: Final = re.compile(
    rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\[ *\d+\.\d{6}\] [^\n]*\r?\n"
)
_REFUSED: Final = re.compile(rb"[Ll]ogin incorrect")
_STRAY: Final = re.compile(rb"(?<![Ll]ast )login: |[Pp]assword: ")


class Asked(Enum):
    """What the last line on a console waits for."""

    LOGIN = re.compile(rb"login: ?\Z")
    PASSWORD = re.compile(rb"[Pp]assword: ?\Z")
    ENTER = re.compile(rb"press Enter to activate this console\. ?\Z")  # init of busybox
    LOOP = re.compile(LOOP_HERE + rb"\r?\n\Z")
    SHELL = re.compile(rb"[#$>%] ?\Z")


class _Typed(Enum):
    NOTHING = 0
    ENTER = 1
    USER = 2
    PASSWORD = 3
    LINE = 4


async def more(console: Console) -> bytes:
    """The next bytes of a console.

    Raises:
        ChannelClosed: there will be none.
    """
    data = await console.read()
    if not data:
        raise ChannelClosed(
            "the console ended: the guest died or was stopped",
            hint="its log tells what happened last",
        )
    return data


class Dialogue:
    """What is typed into a console, and what it says to that.

    Args:
        console: The console.
        user: Who logs in, where a login is asked for.
        password: Their password; None if none is asked for.
    """

    def __init__(self, console: Console, *, user: str, password: str | None) -> None:
        self.refused = False
        """Whether a login was refused, for whatever reason."""
        self._refusals = 0
        self._console = console
        self._user = user
        self._password = password
        self._seen = b""
        self._typed = _Typed.NOTHING
        self._clean = False
        """Whether the exchange under way is user, password and nothing else."""
        self._synced = True
        """Whether nothing typed earlier can be on its way to the guest when it asks."""
        self._settle = _SETTLE

    async def shell(self) -> Asked:
        """Press Enter and answer what is asked, until a shell or the loop stands there.

        Returns:
            `Asked.SHELL` or `Asked.LOOP`.

        Raises:
            OperationFailed: the login is refused.
            ChannelClosed: the machine ended.
        """
        silence = _ENTER_AFTER
        if self._typed is _Typed.NOTHING:
            await self._type(b"", _Typed.ENTER)
        while True:
            asked = await self._question(silence)
            self._judge(asked)
            if asked in (Asked.SHELL, Asked.LOOP):
                return asked
            if asked is Asked.LOGIN:
                self._synced = self._synced or self._settle >= _SETTLE_AT_MOST
                self._clean = self._synced
                await self._type(self._user.encode(), _Typed.USER)
            elif asked is Asked.PASSWORD and self._typed in (_Typed.USER, _Typed.PASSWORD):
                await self._type((self._password or "").encode(), _Typed.PASSWORD)
            else:
                # Also a password that was asked for before we came: not one of our user's.
                self._clean = self._synced = False
                silence = silence if asked else min(2 * silence, _ENTER_AT_MOST)
                await self._type(b"", _Typed.ENTER)

    async def ask(self, line: str, mark: bytes) -> bytes | None:
        """Type a line for a shell; returns what follows `mark` in its answer's line.

        None if there is no answer: it was no shell, or one too slow. `shell` finds out.
        """
        answer = re.compile(re.escape(mark) + rb"([^\n]*)\n")
        await self._type(line.encode(), _Typed.LINE)
        self._clean = False
        asked = await self._question(_LINE, answer)
        found = answer.search(self._seen)
        if found is None and asked is not None:
            self._confused()
        return found[1].strip() if found is not None else None

    async def _type(self, line: bytes, what: _Typed) -> None:
        self._seen = b""
        self._typed = what
        await self._console.write(line + b"\n")

    async def _question(
        self, silence: float, answer: re.Pattern[bytes] | None = None
    ) -> Asked | None:
        """What is asked, or None if nothing is and Enter, or giving up, seems right.

        With `answer` it ends when that has come, and a shell's prompt is no question.
        """
        clock = asyncio.get_running_loop()
        waits = self._typed in (_Typed.USER, _Typed.PASSWORD)
        last = clock.time() + (_ANSWER if waits else _CHATTER)
        if waits:
            silence = _ANSWER
        while answer is None or not answer.search(self._seen):
            asked = self._standing()
            if answer is not None and asked in (Asked.SHELL, Asked.LOOP):
                asked = None
            # A question stands when nothing has come after it for a while.
            until = clock.time() + (self._settle if asked else silence)
            try:
                async with asyncio.timeout_at(until if asked else min(until, last)):
                    data = await more(self._console)
            except TimeoutError:
                return asked
            self._seen = (self._seen + data)[-_KEPT:]
        return None

    def _standing(self) -> Asked | None:
        shown = _NOISE.sub(b"", self._seen)
        return next((asked for asked in Asked if asked.value.search(shown)), None)

    def _judge(self, asked: Asked | None) -> None:
        """Whether the login was refused, and whether that was because of what we meant to type."""
        if self._typed not in (_Typed.USER, _Typed.PASSWORD) or asked in (Asked.SHELL, Asked.LOOP):
            return
        shown = _NOISE.sub(b"", self._seen)
        refused = _REFUSED.search(shown)
        strays = _STRAY.findall(shown[: refused.start()] if refused else shown)
        if refused:
            self.refused = True
        if self._typed is _Typed.USER and asked is Asked.PASSWORD and not refused:
            # Nothing else is asked between user and password.
            if len(strays) > 1:
                self._confused()
        elif self._typed is _Typed.PASSWORD and refused and not strays and self._clean:
            self._refusals += 1
            if self._refusals >= _REFUSALS:
                raise OperationFailed(
                    f"the console refuses the login of {self._user!r}",
                    hint="check the user and the password that the image declares",
                    operation="connect",
                )
        else:
            self._confused()

    def _confused(self) -> None:
        """Something else was typed than we meant: be slower from here on."""
        self._clean = self._synced = False
        self._settle = min(4 * self._settle, _SETTLE_AT_MOST)
