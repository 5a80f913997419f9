"""Commands by the standard QEMU guest agent, for images that have only that.

The agent keeps at most 16 MiB of a command's output and tells of it at the end only, so output goes
through files in the guest, which are read while they grow; a guest needs room for them. That agent
tells nothing by itself: the end of a command is polled for. Not vmlab's own agent (`agent.py`),
which is ten times faster; the protocol is in `qga_protocol.py`.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from base64 import b64encode
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import cache
from typing import Any, ClassVar, Final

from vmlab.guests import agent
from vmlab.guests.agent import OpenChannel
from vmlab.guests.command import AgentRestarted, Command, CommandChannel, Sink
from vmlab.guests.qga_protocol import (
    ASK_AGAIN,
    QgaPort,
    decoded,
    field,
    mapping,
    number,
    strange,
)
from vmlab.hypervisors.operation import uninterrupted
from vmlab.machine.errors import (
    ChannelClosed,
    DeadlineExceeded,
    OperationFailed,
    VmlabError,
)

PORT: Final = "org.qemu.guest_agent.0"
"""The channel that a machine needs for it, named as qemu-ga looks for it."""

_NEEDED: Final = (
    "guest-exec",
    "guest-exec-status",
    "guest-file-open",
    "guest-file-read",
    "guest-file-write",
    "guest-file-close",
)
_READ: Final = 512 << 10
_INPUT_AT_ONCE: Final = 1 << 20
_INPUT_PIECE: Final = 512 << 10
_PIECES_AHEAD: Final = 8
_SHORT_OUTPUT: Final = 65536
"""Bytes of output up to which a command's end brings it along."""

_END_WITHIN: Final = 60.0
_FIRST_PAUSE: Final = 0.004
_LONGEST_PAUSE: Final = 0.1

# Runs $1 with its output in files of directory $2. What it printed comes along at the end if it is
# short, after a "T". Signals go to all that descends from this shell, which outlives them to tell.
_RUN: Final = """trap : HUP INT QUIT USR1 USR2 ALRM TERM PIPE
d=$2
mkdir -m 700 "$d" || exit 125
: >"$d/err"
: >"$d/out"
case $3 in
    none) sh -c "$1" </dev/null >>"$d/out" 2>>"$d/err" ;;
    given) sh -c "$1" >>"$d/out" 2>>"$d/err" ;;
    fed)
        mkfifo "$d/in"
        (
            n=0
            while :; do
                until [ -e "$d/in.$((n + 1))" ] || [ -e "$d/end" ]; do sleep 0.02; done
                [ -e "$d/in.$n" ] || exit 0
                cat "$d/in.$n" && rm "$d/in.$n" || exit
                n=$((n + 1))
            done
        ) >"$d/in" 2>/dev/null &
        sh -c "$1" <"$d/in" >>"$d/out" 2>>"$d/err"
        s=$?
        kill "$!" 2>/dev/null
        (exit "$s")
        ;;
esac
s=$?
if [ "$(wc -c <"$d/out")" -le SHORT ] && [ "$(wc -c <"$d/err")" -le SHORT ]; then
    printf T
    cat "$d/out"
    cat "$d/err" >&2
    rm -rf "$d"
fi
exit "$s"
""".replace("SHORT", str(_SHORT_OUTPUT))

# Waits until none of some processes runs, for five seconds at most for each.
_GONE: Final = """gone() {
    for p; do
        n=0
        while [ $n -lt 50 ] && read -r s 2>/dev/null <"/proc/$p/stat"; do
            case ${s##*) } in Z*) break ;; esac
            sleep 0.1
            n=$((n + 1))
        done
    done
}"""

_FIND_ROOM: Final = """for d in /tmp /var/tmp /run /dev/shm; do
    if [ -d "$d" ] && [ -w "$d" ]; then
        echo "$d"
        exit
    fi
done
exit 1
"""


class QgaChannel(CommandChannel):
    """Commands by the QEMU guest agent, several at once.

    Args:
        open_channel: Opens a guest channel by name, as `Machine.channel` does.
        port: The channel's name.
    """

    name: ClassVar[str] = "qga"

    def __init__(self, open_channel: OpenChannel, port: str = PORT) -> None:
        self._port = QgaPort(open_channel, port)
        self._room: str | None = None

    async def connect(self, *, timeout: float) -> None:
        """Wait until the agent answers.

        Raises:
            DeadlineExceeded: it does not within `timeout` seconds.
            OperationFailed: it is there, but may not run commands.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._port.open()
                await self._look_what_it_may_do()
                self._room = (await self._capture(_FIND_ROOM)).decode().strip() or "/tmp"
        except TimeoutError:
            raise DeadlineExceeded(
                "waiting for the QEMU guest agent",
                seconds=timeout,
                hint="look at the console: did the guest boot, and does its image run qemu-ga?",
            ) from None

    async def _look_what_it_may_do(self) -> None:
        info = mapping(await self.call("guest-info"), "guest-info")
        known = {
            command.get("name"): command.get("enabled")
            for command in field(info, "supported_commands", list, "guest-info")
            if isinstance(command, dict)
        }
        missing = [name for name in _NEEDED if not known.get(name)]
        if missing:
            raise OperationFailed(
                f"the guest's qemu-ga does not do {', '.join(missing)}",
                hint="some distributions forbid it: look at its options --blacklist, --block-rpcs "
                "or --allow-rpcs in the guest",
                operation="connect",
            )

    async def call(self, name: str, **arguments: Any) -> Any:
        """Have the agent do one of its commands, as `QgaPort.call` does."""
        return await self._port.call(name, **arguments)

    async def ping(self) -> None:
        """Have the agent answer once."""
        await self.call("guest-ping")

    async def close(self) -> None:
        await self._port.close()

    async def run(
        self,
        command: Command,
        *,
        stdout: Sink,
        stderr: Sink,
        started: Callable[[int], None] | None = None,
    ) -> int:
        text = command.script()
        data = text.encode("utf-8", "surrogateescape")
        if self._room is None:
            self._room = (await self._capture(_FIND_ROOM)).decode().strip() or "/tmp"
        run = _Run(self, f"{self._room}/.vmlab-{secrets.token_hex(8)}", stdout, stderr)
        given = command.input
        kind = "none"
        if given is not None:
            kind = "given"
            if not isinstance(given, bytes) or len(given) > _INPUT_AT_ONCE:
                kind = "fed"
        arguments = ["-c", _RUN, "vmlab", _as_text(data), run.directory, kind]
        once = given if kind == "given" and isinstance(given, bytes) else None
        beginning = asyncio.ensure_future(self.begin(arguments, once))
        try:
            pid = await asyncio.shield(beginning)
            if started is not None:
                started(pid)
            if kind == "fed" and given is not None:
                return await run.fed(pid, given)
            return await run.to_its_end(pid)
        except BaseException as error:
            if isinstance(error, AgentRestarted | ChannelClosed):
                raise
            await uninterrupted(self._end(beginning, run.directory))
            raise

    async def begin(self, arguments: list[str], given: bytes | None = None) -> int:
        """Start /bin/sh with arguments and perhaps all of its input; returns its process id."""
        more = {} if given is None else {"input_data": b64encode(given).decode()}
        answer = await self.call(
            "guest-exec", path="/bin/sh", arg=arguments, capture_output=True, **more
        )
        return int(field(mapping(answer, "guest-exec"), "pid", int, "guest-exec"))

    async def status(self, pid: int) -> Mapping[str, Any]:
        """What guest-exec-status says of a process.

        Raises:
            AgentRestarted: the agent does not know it (any more).
        """
        try:
            answer = await self.call("guest-exec-status", pid=pid)
        except OperationFailed as error:
            raise AgentRestarted(
                f"the guest's qemu-ga no longer knows process {pid}: {error.message}",
                hint="it began anew, or its guest was restored; what became of the command is "
                "unknown",
            ) from error
        return mapping(answer, "guest-exec-status")

    async def _capture(self, script: str, *words: str) -> bytes:
        """Run a short script to its end; returns what it printed."""
        pid = await self.begin(["-c", script, "vmlab", *words])
        pause = _FIRST_PAUSE
        while not field(status := await self.status(pid), "exited", bool, "guest-exec-status"):
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
        return decoded(status.get("out-data", ""), "guest-exec-status")

    async def signal(self, process: int, number: int) -> None:
        await self._capture(f"{_signal()}\nsignal {int(number)} {int(process)}")

    async def _end(self, beginning: asyncio.Future[int], directory: str) -> None:
        """SIGTERM, then SIGKILL, and remove the command's files."""
        with suppress(VmlabError, TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(_END_WITHIN):
                pid = await beginning
                await self._capture(
                    f"{_signal()}\n{_GONE}\n"
                    'signal 15 "$1"; gone "$1"; signal 9 "$1"; gone $MEMBERS; rm -rf "$2"',
                    str(pid),
                    directory,
                )
        beginning.cancel()


class _Run:
    """One command that was started: its files in the guest."""

    def __init__(self, qga: QgaChannel, directory: str, stdout: Sink, stderr: Sink) -> None:
        self._qga = qga
        self.directory = directory
        self._sinks = {"out": stdout, "err": stderr}
        self._handles: dict[str, int] = {}
        self._seen = {"out": 0, "err": 0}
        self._ended = asyncio.Event()

    async def to_its_end(self, pid: int) -> int:
        """Give out its output as it comes; returns its status as a shell has it."""
        pause = _FIRST_PAUSE
        asked = 0
        try:
            while True:
                status = await self._qga.status(pid)
                if field(status, "exited", bool, "guest-exec-status"):
                    break
                asked += 1
                # Most commands are at their end before their files are worth a look.
                if asked > 3 and await self._read_more():
                    pause = _FIRST_PAUSE
                else:
                    await asyncio.sleep(pause)
                    pause = min(1.5 * pause, _LONGEST_PAUSE)
            self._ended.set()
            await self._finish(status)
        finally:
            self._ended.set()
            await uninterrupted(self._close(self._handles))
        if "signal" in status:
            return 128 + int(field(status, "signal", int, "guest-exec-status"))
        return int(field(status, "exitcode", int, "guest-exec-status"))

    async def _finish(self, status: Mapping[str, Any]) -> None:
        out = decoded(status.get("out-data", ""), "guest-exec-status")
        if out.startswith(b"T"):
            whole = {"out": out[1:], "err": decoded(status.get("err-data", ""), "err-data")}
            for name, data in whole.items():
                if rest := data[self._seen[name] :]:
                    await self._sinks[name](rest)
            return
        while await self._read_more():
            continue
        await self._qga._capture('rm -rf "$1"', self.directory)

    async def _read_more(self) -> bool:
        """Give out what is new in the files; whether there was something."""
        news = False
        for name, sink in self._sinks.items():
            if name not in self._handles:
                try:
                    await self._open(name, "r", self._handles)
                except OperationFailed:
                    continue  # it has not come so far, or could not
            answer = await self._qga.call(
                "guest-file-read", handle=self._handles[name], count=_READ
            )
            read = mapping(answer, "guest-file-read")
            if data := decoded(read.get("buf-b64", ""), "guest-file-read"):
                self._seen[name] += len(data)
                news = True
                await sink(data)
        return news

    async def _open(self, name: str, mode: str, handles: dict[str, int]) -> None:
        """Open a file beside the command's and note its handle, even if cancelled meanwhile."""
        opening = asyncio.ensure_future(
            self._qga.call("guest-file-open", path=f"{self.directory}/{name}", mode=mode)
        )
        try:
            await asyncio.wait({opening})
        except asyncio.CancelledError:
            await asyncio.wait({opening}, timeout=ASK_AGAIN)
            if opening.done() and opening.exception() is None:
                handles[name] = number(opening.result(), "guest-file-open")
            opening.cancel()
            raise
        handles[name] = number(opening.result(), "guest-file-open")

    async def _close(self, handles: dict[str, int]) -> None:
        with suppress(VmlabError, TimeoutError):
            async with asyncio.timeout(_END_WITHIN):
                while handles:
                    await self._qga.call("guest-file-close", handle=handles.popitem()[1])

    @asynccontextmanager
    async def _file(self, name: str, mode: str) -> AsyncIterator[int]:
        handles: dict[str, int] = {}
        try:
            await self._open(name, mode, handles)
            yield handles[name]
        finally:
            await uninterrupted(self._close(handles))

    async def fed(self, pid: int, given: bytes | AsyncIterable[bytes]) -> int:
        """The same with input in pieces, which are files that the guest removes when read."""
        ending = asyncio.ensure_future(self.to_its_end(pid))
        feeding = asyncio.ensure_future(self._feed(given))
        try:
            await asyncio.wait({ending, feeding}, return_when=asyncio.FIRST_COMPLETED)
            if feeding.done() and (error := feeding.exception()) is not None:
                # Before the command could take the end of what there is for the end of all.
                raise error
            return await ending
        finally:
            for task in (feeding, ending):
                task.cancel()
            await asyncio.wait({feeding, ending})

    async def _feed(self, given: bytes | AsyncIterable[bytes]) -> None:
        await self._until_there()
        number = 0
        async for data in _pieces(given):
            before = f"in.{number - _PIECES_AHEAD}"
            while number >= _PIECES_AHEAD and await self._is_there(before):  # noqa: ASYNC110 (it is in the guest)
                await asyncio.sleep(_LONGEST_PAUSE)
            if not await self._put(f"in.{number}", data):
                return
            number += 1
        await self._put("end", b"")

    async def _until_there(self) -> None:
        while not self._ended.is_set() and not await self._is_there("out"):  # noqa: ASYNC110 (it is in the guest)
            await asyncio.sleep(_FIRST_PAUSE)

    async def _is_there(self, name: str) -> bool:
        try:
            async with self._file(name, "r"):
                return True
        except OperationFailed:
            return False

    async def _put(self, name: str, data: bytes) -> bool:
        """Write a file beside the command's; False if the command has ended meanwhile."""
        try:
            async with self._file(name, "w") as handle:
                view = memoryview(data)
                while view:
                    answer = await self._qga.call(
                        "guest-file-write", handle=handle, buf_b64=b64encode(view).decode()
                    )
                    count = field(mapping(answer, "guest-file-write"), "count", int, "its answer")
                    if not 0 < count <= len(view):
                        raise strange(answer, "guest-file-write")
                    view = view[count:]
        except OperationFailed:
            if self._ended.is_set() or not await self._is_there("out"):
                return False
            raise
        return True


async def _pieces(given: bytes | AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    if isinstance(given, bytes):
        for offset in range(0, len(given), _INPUT_PIECE):
            yield given[offset : offset + _INPUT_PIECE]
        return
    async for data in given:
        for offset in range(0, len(data), _INPUT_PIECE):
            yield data[offset : offset + _INPUT_PIECE]


@cache
def _signal() -> str:
    """The functions of the agent's script that signal a process and all that descends from it."""
    script = agent.script().decode()
    found = re.findall(r"^(?:members|signal)\(\) \{.*?^\}$", script, re.DOTALL | re.MULTILINE)
    return "\n".join(found)


def _as_text(data: bytes) -> str:
    """A command as JSON can carry it: text, or a text that makes the bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        octal = "".join(f"\\0{byte:03o}" for byte in data)
        return f"eval \"$(printf %b '{octal}')\""
