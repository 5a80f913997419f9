"""The QEMU guest agent's channel against a server that answers as a test says, or the right way.

The right way runs the commands on this host: a stand-in for qemu-ga, which the tests in a real
guest have the real one for.
"""

# ruff: noqa: ASYNC240 (the guest is this host: its files are looked at directly)

from __future__ import annotations

import asyncio
import json
import subprocess
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmlab.guests import qga as qga_module
from vmlab.guests import qga_protocol
from vmlab.guests.command import AgentRestarted, Command, CommandResult
from vmlab.guests.qga import PORT, QgaChannel
from vmlab.hypervisors.base import Channel
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded, OperationFailed

# More than any of this takes on a slow host.
PATIENCE = 300.0
pytestmark = pytest.mark.timeout(PATIENCE + 60)

Answers = Callable[[dict[str, Any]], list[bytes] | None]
"""The lines that a request is answered with; None ends the channel."""


class Wire(Channel):
    """A channel to a server; sentinels and syncs are answered as qemu-ga does."""

    name = PORT

    def __init__(self, answers: Answers, *, deaf: int = 0) -> None:
        self._answers = answers
        self._deaf = deaf
        self._queue = asyncio.Queue[bytes]()
        self.requests: list[dict[str, Any]] = []

    async def write(self, data: bytes) -> None:
        for line in data.split(b"\n"):
            if not line:
                continue
            if self._deaf:
                self._deaf -= 1
                continue
            if line.startswith(b"\xff"):
                self._queue.put_nowait(b'{"error": {"desc": "JSON parse error, stray"}}\n')
                line = line.lstrip(b"\xff")
            request = json.loads(line)
            self.requests.append(request)
            if request["execute"] == "guest-sync-delimited":
                answer: list[bytes] | None = [
                    b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode()
                ]
            else:
                answer = self._answers(request)
            for reply in answer if answer is not None else [b""]:
                self._queue.put_nowait(reply + b"\n" if answer is not None else b"")

    async def read(self, size: int = 65536) -> bytes:
        return await self._queue.get()

    async def close(self) -> None:
        """Nothing to close."""


class HostedQga:
    """What qemu-ga does with the commands that are needed, on this host."""

    def __init__(self) -> None:
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.files: dict[int, IO[bytes]] = {}

    def answer(self, request: dict[str, Any]) -> list[bytes]:
        arguments = request.get("arguments", {})
        name = request["execute"].removeprefix("guest-").replace("-", "_")
        try:
            return [json.dumps({"return": getattr(self, name)(**_named(arguments))}).encode()]
        except (OSError, KeyError) as error:
            return [json.dumps({"error": {"class": "GenericError", "desc": str(error)}}).encode()]

    def ping(self) -> dict[str, Any]:
        return {}

    def info(self) -> dict[str, Any]:
        commands = [{"name": name, "enabled": True} for name in qga_module._NEEDED]
        return {"version": "7.2.22", "supported_commands": commands}

    def exec(self, path: str, arg: list[str], capture_output: bool, input_data: str = "") -> Any:
        # As qemu-ga has it: what comes of it is kept, and told of at the end.
        process = subprocess.Popen(
            [path, *arg],
            stdin=subprocess.PIPE if input_data else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        if process.stdin is not None:
            try:
                process.stdin.write(b64decode(input_data))
                process.stdin.close()
            except BrokenPipeError:
                assert capture_output
        self.processes[process.pid] = process
        return {"pid": process.pid}

    def exec_status(self, pid: int) -> Any:
        process = self.processes[pid]
        if process.poll() is None:
            return {"exited": False}
        assert process.stdout is not None and process.stderr is not None
        with process.stdout as out, process.stderr as err:
            texts = {"out-data": b64encode(out.read()), "err-data": b64encode(err.read())}
        del self.processes[pid]
        status = {name: text.decode() for name, text in texts.items() if text}
        code = process.returncode
        return {"exited": True, **({"signal": -code} if code < 0 else {"exitcode": code}), **status}

    def file_open(self, path: str, mode: str) -> int:
        file = Path(path).open({"r": "rb", "w": "wb"}[mode])  # noqa: SIM115 (closed by request)
        self.files[file.fileno()] = file
        return file.fileno()

    def file_read(self, handle: int, count: int) -> Any:
        data = self.files[handle].read(count)
        return {"count": len(data), "buf-b64": b64encode(data).decode(), "eof": not data}

    def file_write(self, handle: int, buf_b64: str) -> Any:
        # Less than it was given, as it may.
        data = b64decode(buf_b64)[:300_000]
        return {"count": self.files[handle].write(data), "eof": False}

    def file_close(self, handle: int) -> Any:
        self.files.pop(handle).close()
        return {}

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.communicate()
        assert self.files == {}


def _named(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in arguments.items()}


async def run(channel: QgaChannel, command: Command | str) -> CommandResult:
    out, err = bytearray(), bytearray()

    async def take_out(data: bytes) -> None:
        out.extend(data)

    async def take_err(data: bytes) -> None:
        err.extend(data)

    given = Command(command) if isinstance(command, str) else command
    status = await channel.run(given, stdout=take_out, stderr=take_err)
    return CommandResult(given.text, status, bytes(out), bytes(err), 0.0)


def with_hosted(body: Callable[[QgaChannel], Awaitable[None]]) -> None:
    async def main() -> None:
        hosted = HostedQga()
        channel = _channel(Wire(hosted.answer))
        try:
            async with asyncio.timeout(PATIENCE):
                await channel.connect(timeout=PATIENCE)
                await body(channel)
        finally:
            await channel.close()
            hosted.close()

    asyncio.run(main())


def _channel(wire: Channel) -> QgaChannel:
    async def open_wire(name: str) -> Channel:
        assert name == PORT
        return wire

    return QgaChannel(open_wire)


def ended(process: int) -> bool:
    """Whether a process runs no more; it may not have been waited for yet."""
    try:
        return not Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return True


def test_output_error_output_and_status_come_apart() -> None:
    async def body(channel: QgaChannel) -> None:
        await channel.ping()
        result = await run(channel, "echo out; echo err >&2; exit 3")
        assert (result.status, result.stdout, result.stderr) == (3, "out\n", "err\n")
        assert (await run(channel, "kill -9 $$")).status == 137
        assert (await run(channel, "exec sleep 0.3; echo no")).stdout == ""

    with_hosted(body)


def test_output_comes_while_the_command_runs_and_any_bytes_of_it() -> None:
    async def body(channel: QgaChannel) -> None:
        seen = bytearray()
        first = asyncio.Event()

        async def take(data: bytes) -> None:
            seen.extend(data)
            first.set()

        async def goes_on() -> AsyncIterator[bytes]:
            await first.wait()
            yield b"on\n"

        status = await channel.run(
            Command(r"printf '\377\000\n'; read -r line; echo $line", input=goes_on()),
            stdout=take,
            stderr=take,
        )
        assert (status, bytes(seen)) == (0, b"\xff\x00\non\n")
        result = await run(channel, "head -c 3000000 /dev/zero; head -c 70000 /dev/zero >&2")
        assert (len(result.stdout_bytes), len(result.stderr_bytes)) == (3_000_000, 70_000)

    with_hosted(body)


@pytest.mark.parametrize("size", [0, 10, 3_000_000, 9_000_000])
def test_input_of_any_size_arrives_whole(size: int) -> None:
    async def body(channel: QgaChannel) -> None:
        data = bytes(index % 251 for index in range(1000)) * (size // 1000 + 1)
        result = await run(channel, Command("cat", input=data[:size]))
        assert result.stdout_bytes == data[:size]
        # Nobody reads it: the command ends all the same.
        assert (await run(channel, Command("echo x", input=data[:size]))).stdout == "x\n"

    with_hosted(body)


def test_a_source_that_fails_fails_the_command_which_takes_nothing_for_its_end() -> None:
    async def body(channel: QgaChannel) -> None:
        async def broken() -> AsyncIterator[bytes]:
            yield b"half"
            raise OperationFailed("the disk is broken")

        with pytest.raises(OperationFailed, match="disk is broken"):
            await run(channel, Command("cat >/dev/null && echo whole", input=broken()))
        assert (await run(channel, "echo next")).stdout == "next\n"

    with_hosted(body)


@pytest.mark.parametrize("text", ["sleep 100", "trap '' TERM; while :; do sleep 1; done"])
def test_a_cancelled_command_is_ended_in_the_guest_and_leaves_no_files(
    text: str, tmp_path: Path
) -> None:
    async def body(channel: QgaChannel) -> None:
        channel._room = str(tmp_path)
        begun = asyncio.Event()

        async def take(data: bytes) -> None:
            begun.set()

        work = asyncio.ensure_future(
            channel.run(Command(f"echo $$ | tee {tmp_path}/pid; {text}"), stdout=take, stderr=take)
        )
        await begun.wait()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert ended(int((tmp_path / "pid").read_text()))
        assert [entry.name for entry in tmp_path.iterdir()] == ["pid"]
        assert (await run(channel, "echo alive")).stdout == "alive\n"

    with_hosted(body)


def test_signals_reach_all_that_the_command_started_and_its_status_tells() -> None:
    async def body(channel: QgaChannel) -> None:
        begun = asyncio.Event()
        started: list[int] = []

        async def take(data: bytes) -> None:
            begun.set()

        work = asyncio.ensure_future(
            channel.run(
                Command("echo x; sleep 100; echo no"),
                stdout=take,
                stderr=take,
                started=started.append,
            )
        )
        await begun.wait()
        await channel.signal(started[0], 2)
        assert await work == 130

    with_hosted(body)


def test_text_that_is_no_unicode_arrives_as_it_is_and_too_long_a_command_is_refused() -> None:
    async def body(channel: QgaChannel) -> None:
        assert (await run(channel, "printf %s '\udcff\udc80'")).stdout_bytes == b"\xff\x80"
        with pytest.raises(OperationFailed, match="at most 120000 bytes"):
            await run(channel, "x" * 130_000)

    with_hosted(body)


def test_an_agent_that_may_not_run_commands_is_refused_with_advice() -> None:
    async def main() -> None:
        commands = [{"name": "guest-exec", "enabled": False}, {"name": "guest-exec-status"}]
        answer = json.dumps({"return": {"supported_commands": commands}}).encode()
        with pytest.raises(OperationFailed, match="does not do guest-exec, guest-exec-st") as error:
            await _channel(Wire(lambda request: [answer])).connect(timeout=PATIENCE)
        assert "--allow-rpcs" in (error.value.hint or "")

    asyncio.run(main())


def test_a_guest_without_it_is_a_deadline_with_advice_and_lost_questions_are_repeated() -> None:
    async def main() -> None:
        with pytest.raises(DeadlineExceeded, match="guest agent") as error:
            await _channel(Wire(lambda request: [], deaf=10**6)).connect(timeout=0.3)
        assert "qemu-ga" in (error.value.hint or "")
        hosted = HostedQga()
        await _channel(Wire(hosted.answer, deaf=2)).connect(timeout=PATIENCE)
        hosted.close()

    asyncio.run(main())


def test_what_an_earlier_request_left_unread_is_not_the_answer_to_the_next() -> None:
    async def main() -> None:
        hosted = HostedQga()
        late: list[bytes] = []

        def answers(request: dict[str, Any]) -> list[bytes]:
            if request["execute"] == "guest-get-time":
                late.append(b'{"return": 1}')
                return []
            return hosted.answer(request)

        wire = Wire(answers)
        channel = _channel(wire)
        await channel.connect(timeout=PATIENCE)
        call = asyncio.ensure_future(channel.call("guest-get-time"))
        while not late:
            assert not call.done(), call
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        wire._queue.put_nowait(late[0] + b"\n")
        assert await channel.call("guest-ping") == {}
        hosted.close()

    asyncio.run(main())


def test_an_agent_that_began_anew_is_told_from_one_that_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qga_protocol, "ASK_AGAIN", 0.05)

    async def main() -> None:
        wire = Wire(lambda request: [])
        channel = _channel(wire)
        with pytest.raises(AgentRestarted, match="began anew before it answered guest-ping"):
            await channel.ping()

        def slow(request: dict[str, Any]) -> list[bytes]:
            slow_wire._deaf = 10**6
            loop.call_later(0.3, slow_wire._queue.put_nowait, b'{"return": 7}\n')
            return []

        slow_wire = Wire(slow)
        loop = asyncio.get_running_loop()
        assert await _channel(slow_wire).call("guest-get-time") == 7
        monkeypatch.setattr(qga_protocol, "_ANSWER_WITHIN", 0.3)

        def silent(request: dict[str, Any]) -> list[bytes]:
            silent_wire._deaf = 10**6
            return []

        silent_wire = Wire(silent)
        with pytest.raises(AgentRestarted, match=r"not answered guest-ping for 0\.3 s"):
            await _channel(silent_wire).ping()

    asyncio.run(main())


def test_a_process_that_the_agent_no_longer_knows_is_an_agent_that_began_anew() -> None:
    async def main() -> None:
        hosted = HostedQga()

        def forgetful(request: dict[str, Any]) -> list[bytes]:
            if request["execute"] == "guest-exec":
                return [b'{"return": {"pid": 123456789}}']
            return hosted.answer(request)

        channel = _channel(Wire(forgetful))
        channel._room = "/tmp"
        with pytest.raises(AgentRestarted, match="no longer knows process 123456789"):
            await run(channel, "true")

    asyncio.run(main())


def test_a_guest_that_dies_ends_the_command() -> None:
    async def main() -> None:
        with pytest.raises(ChannelClosed, match="died or was stopped"):
            await _channel(Wire(lambda request: None)).ping()

    asyncio.run(main())


_ANSWERS = st.one_of(
    st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")),
    st.sampled_from(
        [
            b"[" * 100_000,
            b'{"return": {}}',
            b'{"return": {"pid": "x"}}',
            b'{"return": {"pid": 7}}',
            b'{"return": {"exited": 1}}',
            b'{"return": {"exited": true}}',
            b'{"return": {"exited": true, "exitcode": 0, "out-data": "!"}}',
            b'{"return": {"exited": true, "exitcode": 0, "out-data": 7}}',
            b'{"return": {"exited": true, "exitcode": "0", "out-data": "VA=="}}',
            b'{"return": {"exited": true, "signal": true, "out-data": "VA=="}}',
            b'{"return": true}',
            b'{"error": 7}',
            b'{"error": {"desc": "no"}}',
        ]
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_ANSWERS, min_size=1, max_size=8))
def test_an_answer_that_is_none_is_a_clear_error(answers: list[bytes]) -> None:
    async def main() -> None:
        left = list(answers)
        channel = _channel(Wire(lambda request: [left.pop(0)] if left else None))
        channel._room = "/tmp"
        async with asyncio.timeout(PATIENCE):
            with pytest.raises((OperationFailed, ChannelClosed, AgentRestarted)):
                await run(channel, "true")

    asyncio.run(main())


def test_an_answer_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qga_protocol, "_LONGEST_ANSWER", 1000)

    class Endless(Wire):
        async def read(self, size: int = 65536) -> bytes:
            data = await super().read(size)
            return data if b"sync" in data or b"\xff" in data else data.replace(b"\n", b"x")

    async def main() -> None:
        channel = _channel(Endless(lambda request: [b"y" * 2000]))
        with pytest.raises(OperationFailed, match="in a line"):
            await channel.ping()

    asyncio.run(main())
