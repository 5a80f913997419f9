"""The host's side of vmlab's guest agent, whose other half is `agent.sh` in the guest.

Each slot is a pair of virtio-serial ports, `vmlab.N` and `vmlab.N.err`; a slot runs one command at
a time, and `vmlab.agent` carries signals. To the guest go shell lines (`\\x01run TOKEN 'COMMAND'`)
and input in counted blocks; from it come the output itself, as it is, between two marks that carry
the command's random token: `\\x01pid TOKEN PID\\n` (on the error port `\\x01begin TOKEN\\n`) and
`\\x01end TOKEN STATUS\\n`, or `STATUS held` if a process that the command left behind has the ports
open still: such a slot is used when no other is free. A command that `takes` its input is started
by `fill` and reads the port itself; "-1 0" in place of a block tells it to give up, and when it has
failed "0 TOKEN" tells where its input ends. Everything before the first mark is left over from
others and dropped. Nothing is polled: the host waits for bytes. A slot whose port nobody has opened
stops itself in the guest until the control port wakes it.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import signal
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any, ClassVar, Final

from vmlab.guests.command import AgentRestarted, Command, CommandChannel, Sink, quote
from vmlab.hypervisors.base import Channel
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded, VmlabError

SLOTS: Final = 8
CONTROL: Final = "vmlab.agent"
CHANNELS: Final = (
    *(name for slot in range(SLOTS) for name in (f"vmlab.{slot}", f"vmlab.{slot}.err")),
    CONTROL,
)
"""The channels that a machine with the agent needs; the control port has to be the last one."""

INPUT_BLOCK: Final = 65536
_PIECE: Final = 4 << 20
_READ: Final = 1 << 20
_LONG_LINE: Final = 400
"""Bytes from which on starting a program that reads them is cheaper than a shell reading each."""

_ANSWER_WITHIN: Final = 1.0
"""Seconds after which an agent that answers elsewhere is taken to be busy here."""

_ASK_AGAIN_AFTER: Final = 5.0
_ASK_AGAIN_AT_MOST: Final = 60.0
"""Seconds without an answer after which a question is asked again, first and later."""

_OWN_PROCESS = re.compile(r"\$(\$|\{\$|PPID|\{PPID)")
"""What tells a fork of the agent's shell from a shell of its own."""

_KILL_AFTER: Final = 5.0
_GIVE_UP_AFTER: Final = 30.0
"""Seconds that a guest has to read what is on its way: the rest of a piece of input, or a call."""

_GREETING: Final = b"\x01hello 1 "
_HELLO = re.compile(rb"\x01hello 1 [0-9]+\n\Z")

OpenChannel = Callable[[str], Awaitable[Channel]]


def script() -> bytes:
    """The guest's half, to be put into an image as an executable file."""
    return files("vmlab.guests").joinpath("agent.sh").read_bytes()


def shell_line(*words: str) -> bytes:
    """`words` as one line that the agent's `eval` takes apart again; $NL holds a newline there."""
    quoted = (
        "'" + word.replace("'", "'\\''").replace("\n", "'\"$NL\"'") + "'" for word in words[1:]
    )
    return b"\x01" + " ".join([words[0], *quoted]).encode("utf-8", "surrogateescape") + b"\n"


def command_line(verb: str, token: str, text: str) -> bytes:
    """What starts a command: one line, or one that announces a long text after it."""
    if _OWN_PROCESS.search(text):
        text = f"exec sh -c {quote(text)}"
    line = shell_line(verb, token, text)
    if len(line) < _LONG_LINE:
        return line
    data = text.encode("utf-8", "surrogateescape")
    return shell_line("text", verb, token, str(len(data))) + data


class _Port:
    """One virtio-serial port: bytes in, with a buffer to look for marks in."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._buffer = b""

    async def send(self, data: bytes) -> None:
        await self._channel.write(data)

    async def more(self) -> bytes:
        """The buffered bytes, or the next ones.

        Raises:
            ChannelClosed: there are none to come.
        """
        if self._buffer:
            data, self._buffer = self._buffer, b""
            return data
        data = await self._channel.read(_READ)
        if not data:
            raise ChannelClosed(
                f"channel {self._channel.name!r} ended: the guest died or was stopped",
                hint="the console tells what happened last",
            )
        return data

    def keep(self, data: bytes) -> None:
        """Put bytes back that belong to what follows."""
        self._buffer = data + self._buffer

    async def skip_to(self, marks: tuple[bytes, ...]) -> tuple[bytes, bytes]:
        """Drop everything up to one of `marks`; returns it and the rest of its line."""
        held = b""
        while True:
            held += await self.more()
            found = [(held.find(mark), mark) for mark in marks if mark in held]
            if found:
                position, mark = min(found)
                line, newline, rest = held[position + len(mark) :].partition(b"\n")
                if newline:
                    self.keep(rest)
                    return mark, line
                held = held[position:]
            else:
                held = held[-max(len(mark) for mark in marks) :]

    async def copy_to(
        self,
        marks: tuple[bytes, ...],
        sink: Sink,
        greeted: Callable[[], Awaitable[None]] | None = None,
    ) -> tuple[bytes, bytes]:
        """Give everything up to one of `marks` to `sink`; returns it and the rest of its line.

        `greeted` is called when the bytes so far end like the greeting of an agent, which is then
        held back until more comes.
        """
        held = b""
        asked = False
        while True:
            held += await self.more()
            found = [(held.find(mark), mark) for mark in marks if mark in held]
            if found:
                position, mark = min(found)
                line, newline, rest = held[position + len(mark) :].partition(b"\n")
                before = held[:position]
                if b"pong" in mark and asked:
                    before = _HELLO.sub(b"", before)
                if before:
                    await sink(before)
                if newline:
                    self.keep(rest)
                    return mark, line
                held = held[position:]
                continue
            safe = min(safe_length(held, mark) for mark in marks)
            if greeted is not None and (greeting := _HELLO.search(held)):
                safe = min(safe, greeting.start())
                if not asked:
                    asked = True
                    await greeted()
            else:
                asked = False
            if safe:
                await sink(held[:safe])
                held = held[safe:]

    async def close(self) -> None:
        await self._channel.close()


def safe_length(held: bytes, mark: bytes) -> int:
    """How many bytes of `held` cannot be the beginning of `mark`."""
    start = held.rfind(mark[:1], max(0, len(held) - len(mark)))
    while start >= 0:
        if mark.startswith(held[start:]):
            return start
        start = held.rfind(mark[:1], max(0, len(held) - len(mark)), start)
    return len(held)


class _Slot:
    """A pair of ports, in step with the agent's process behind it.

    `held` is whether a process that an earlier command left behind may write into its output.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.held = False
        self.out: _Port | None = None
        self.err: _Port | None = None

    async def drop(self) -> None:
        """Close the ports; the next use opens them anew."""
        out, err, self.out, self.err, self.held = self.out, self.err, None, None, False
        for port in (out, err):
            if port is not None:
                await port.close()


class AgentChannel(CommandChannel):
    """Commands by vmlab's agent, several at once.

    Args:
        open_channel: Opens a guest channel by name, as `Machine.channel` does.
    """

    name: ClassVar[str] = "agent"

    def __init__(self, open_channel: OpenChannel) -> None:
        self._open = open_channel
        self._free = [_Slot(number) for number in reversed(range(SLOTS))]
        self._all = tuple(self._free)
        self._available = asyncio.Semaphore(SLOTS)
        self._control: _Port | None = None
        self._control_lock = asyncio.Lock()

    async def connect(self, *, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout), self._slot() as slot:
                # Asked anew: the agent that answered before may have gone with its guest.
                await slot.drop()
                async with self._control_lock:
                    await self._drop_control()
                await self.open_slot(slot)
        except TimeoutError:
            raise DeadlineExceeded(
                "waiting for the guest's agent",
                seconds=timeout,
                hint="look at the console: did the guest boot, and does its image have the agent?",
            ) from None

    async def run(
        self,
        command: Command,
        *,
        stdout: Sink,
        stderr: Sink,
        started: Callable[[int], None] | None = None,
    ) -> int:
        text = command.script(own_take=True)
        async with self._slot() as slot:
            return await _Run(self, slot, command, text).go(stdout, stderr, started)

    async def signal(self, process: int, number: int) -> None:
        await self.control("signal", str(int(number)), str(int(process)))

    async def ping(self) -> None:
        await self._agent_answers()

    async def control(self, *words: str) -> None:
        """Call something on the control port."""
        async with self._control_lock:
            if self._control is None:
                self._control = _Port(await self._open(CONTROL))
            try:
                await self._control.send(b"\n" + shell_line(*words))
            except BaseException:
                await self._drop_control()
                raise

    async def _drop_control(self) -> None:
        control, self._control = self._control, None
        if control is not None:
            await control.close()

    async def _agent_answers(self) -> None:
        """Wait until the control port answers: from then on the slots are there."""
        async with self._control_lock:
            if self._control is None:
                self._control = _Port(await self._open(CONTROL))
            try:
                await _answer(self._control)
            except Exception:
                await self._drop_control()
                raise

    async def close(self) -> None:
        for slot in self._all:
            await slot.drop()
        await self._drop_control()

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[_Slot]:
        """A slot that nobody else uses, the lowest free one."""
        async with self._available:
            slot = self._free.pop()
            try:
                yield slot
            except BaseException:
                # What it is in the middle of is unknown: begin anew next time.
                await slot.drop()
                raise
            finally:
                self._free.append(slot)
                # The last one is taken next.
                self._free.sort(key=lambda free: (free.held, free.number), reverse=True)

    async def open_slot(self, slot: _Slot) -> tuple[_Port, _Port]:
        """The ports of `slot`, in step with the agent."""
        if slot.out is not None and slot.err is not None:
            return slot.out, slot.err
        opened: list[_Port] = []
        try:
            for name in (f"vmlab.{slot.number}", f"vmlab.{slot.number}.err"):
                opened.append(_Port(await self._open(name)))
            await self._get_in_step(slot.number, opened[0])
        except BaseException:
            for port in opened:
                await port.close()
            raise
        slot.out, slot.err, slot.held = opened[0], opened[1], False
        return slot.out, slot.err

    async def _get_in_step(self, slot: int, out: _Port) -> None:
        """Wait until the agent answers on a slot.

        One that does not while the control port does is asleep, since nobody had the port open, or
        busy with a command of a host that has died, which is ended.
        """
        answered = asyncio.ensure_future(_answer(out))
        woken = asyncio.ensure_future(self.control("wake"))
        try:
            await asyncio.wait({answered}, timeout=_ANSWER_WITHIN)
            if not answered.done():
                alive = asyncio.ensure_future(self._agent_answers())
                try:
                    await asyncio.wait({answered, alive}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    await _cancelled(alive)
            patience = _ANSWER_WITHIN
            while not answered.done():
                await self.control("wake")
                await asyncio.wait({answered}, timeout=patience)
                if answered.done():
                    break
                await _cancelled(answered)
                await self.control("reset", str(slot))
                # It takes one call after the other: this answer means that the reset is over.
                await self._agent_answers()
                answered = asyncio.ensure_future(_answer(out))
                patience *= 2
            answered.result()
        finally:
            await _cancelled(answered)
            await _cancelled(woken)


class _Run:
    """One command on one slot."""

    def __init__(self, agent: AgentChannel, slot: _Slot, command: Command, text: str) -> None:
        self._agent = agent
        self._slot = slot
        self._command = command
        self._text = text
        self._token = secrets.token_hex(8)
        self._process: int | None = None
        self._input_done = command.input is None
        self._input_error: Exception | None = None
        self._begun = asyncio.Event()
        self._ended = asyncio.Event()
        self._given_up = asyncio.Event()

    async def go(self, stdout: Sink, stderr: Sink, started: Callable[[int], None] | None) -> int:
        """Run it; when cancelled, end it in the guest and leave the slot in step."""
        out, err = await self._agent.open_slot(self._slot)
        if self._command.takes:
            verb = "fill"
        else:
            verb = "run" if self._command.input is None else "pipe"
        await out.send(command_line(verb, self._token, self._text))
        work = asyncio.ensure_future(self._exchange(out, err, stdout, stderr, started))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            if not work.done():
                await self._end_in_guest(work)
            raise

    async def _exchange(
        self,
        out: _Port,
        err: _Port,
        stdout: Sink,
        stderr: Sink,
        started: Callable[[int], None] | None,
    ) -> int:
        token = self._token.encode()
        end = b"\x01end " + token + b" "

        async def output() -> int:
            mark, line = await out.skip_to((b"\x01pid " + token + b" ", end, _GREETING))
            if mark == end:
                return self._end(line)
            if mark == _GREETING:
                raise self._restarted()
            self._begun.set()
            # A guest that is shutting down has no /proc any more, which tells the number.
            if line.isdigit():
                self._process = int(line)
                if started is not None:
                    started(self._process)
            pong = b"\x01pong " + token
            mark, line = await out.copy_to((end, pong), stdout, lambda: self._question(out))
            if mark == pong:
                raise self._restarted()
            return self._end(line)

        async def errors() -> int:
            await err.skip_to((b"\x01begin " + token,))
            return int((await err.copy_to((end,), stderr))[1])

        parts = [output(), errors()]
        if self._command.input is not None:
            parts.append(self._send_input(out))
        status = (await _together(*parts))[0]
        if self._command.takes and status != 0:
            await out.send(f"0 {self._token}\n".encode())
        if self._input_error is not None:
            raise self._input_error
        return status

    def _restarted(self) -> AgentRestarted:
        self._begun.set()
        self._ended.set()
        return AgentRestarted(
            f"the guest's agent died while {self._command.text!r} ran",
            hint="what became of the command is unknown",
        )

    def _end(self, line: bytes) -> int:
        """The status in an end mark."""
        self._begun.set()
        self._ended.set()
        status, _, held = line.partition(b" ")
        self._slot.held = held == b"held"
        return int(status)

    async def _send_input(self, out: _Port) -> int:
        """Send all input and its end; a source that fails ends the command in the guest."""
        source = self._command.input
        end = b"0 0\n"
        try:
            if isinstance(source, bytes):
                for offset in range(0, len(source), _PIECE):
                    if self._given_up.is_set() or (self._command.takes and self._ended.is_set()):
                        break
                    await _send_block(out, source[offset : offset + _PIECE])
            elif source is not None:
                async for data in self._until_ended(source):
                    await _send_block(out, data)
        except (VmlabError, OSError) as error:
            # Before it could take the end of what there is for the end of all.
            self._input_error = error
            if self._command.takes:
                end = b"-1 0\n"
            else:
                await self._begun.wait()
                for number in (signal.SIGTERM, signal.SIGKILL):
                    if self._process is not None and not self._ended.is_set():
                        await self._agent.signal(self._process, number)
                        with suppress(TimeoutError):
                            await asyncio.wait_for(self._ended.wait(), _KILL_AFTER)
        if self._command.takes and self._given_up.is_set():
            end = b"-1 0\n"
        await out.send(end)
        self._input_done = True
        return 0

    async def _until_ended(self, source: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        """What `source` yields, until the command has ended: it may never yield again."""
        stops = (self._ended, self._given_up)
        ends = [asyncio.ensure_future(stop.wait()) for stop in stops]
        iterator = aiter(source)
        try:
            while not any(stop.is_set() for stop in stops):
                piece = asyncio.ensure_future(anext(iterator, None))
                try:
                    await asyncio.wait({piece, *ends}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not piece.done():
                        piece.cancel()
                        await asyncio.wait({piece})
                if piece.cancelled() or (data := piece.result()) is None:
                    return
                yield data
        finally:
            for end in ends:
                end.cancel()

    async def _question(self, out: _Port) -> None:
        """The output ends like an agent's greeting: ask whether it really began anew.

        One that still runs the command answers after it, when nobody listens any more.
        """
        if self._input_done:
            await out.send(shell_line("ping", self._token))

    async def _end_in_guest(self, work: asyncio.Future[int]) -> None:
        """SIGTERM, then SIGKILL, then have the slot begin anew.

        A command that takes its input is told by that instead, and the slot stays in step.
        """
        try:
            if self._command.takes:
                self._given_up.set()
                done, _ = await asyncio.wait({work}, timeout=_GIVE_UP_AFTER)
                if done:
                    return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._begun.wait(), _KILL_AFTER)
            for number in (signal.SIGTERM, signal.SIGKILL):
                if self._process is not None:
                    await self._agent.signal(self._process, number)
                done, _ = await asyncio.wait({work}, timeout=_KILL_AFTER)
                if done:
                    return
            await self._agent.control("reset", str(self._slot.number))
            # It takes one call after the other: the answer means that nothing of it runs any more.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._agent.ping(), _GIVE_UP_AFTER)
        finally:
            work.cancel()
            await asyncio.wait({work})


async def _answer(port: _Port) -> None:
    """Ask something on a port, until there is the answer to that.

    A question is lost when what has read it ends: an agent that is started anew, or a guest that
    reboots. Asking it again does no harm: answers that are left over are dropped.
    """
    token = secrets.token_hex(8)
    answer = asyncio.ensure_future(port.skip_to((b"\x01pong " + token.encode(),)))
    patience = _ASK_AGAIN_AFTER
    try:
        while not answer.done():
            # The newline ends what an earlier host, or half a question, may have left unfinished.
            await port.send(b"\n" + shell_line("ping", token))
            await asyncio.wait({answer}, timeout=patience)
            patience = min(2 * patience, _ASK_AGAIN_AT_MOST)
        answer.result()
    finally:
        await _cancelled(answer)


async def _cancelled(task: asyncio.Future[Any]) -> None:
    """End a task; whether it fails meanwhile is nobody's concern any more."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _send_block(out: _Port, data: bytes) -> None:
    """One piece of input: whole blocks first, what is left after them."""
    count, rest = divmod(len(data), INPUT_BLOCK)
    if count:
        await out.send(f"{count} {INPUT_BLOCK}\n".encode() + data[: count * INPUT_BLOCK])
    if rest:
        await out.send(f"1 {rest}\n".encode() + data[count * INPUT_BLOCK :])


async def _together(*parts: Coroutine[Any, Any, int]) -> list[int]:
    """All results; when one part fails the others are cancelled and its error is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failed = [task for task in tasks if task.done() and task.exception() is not None]
        return [task.result() for task in failed or tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
