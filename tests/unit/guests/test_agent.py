"""The guest agent: its real script under real shells, over pseudo-terminals in place of ports."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.guests.ports import HostedAgent

from vmlab.guests import agent as agent_module
from vmlab.guests.agent import CHANNELS, SLOTS, AgentChannel, shell_line
from vmlab.guests.command import AgentRestarted, Command, CommandResult
from vmlab.hypervisors.base import Channel
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded, OperationFailed

# More than any of this takes on a slow host.
PATIENCE = 300.0
pytestmark = pytest.mark.timeout(PATIENCE + 60)

SHELLS = [["/bin/dash"], ["/bin/busybox", "sh"]]

Body = Callable[[AgentChannel], Awaitable[None]]


@pytest.fixture(params=SHELLS, ids=["dash", "busybox"])
def hosted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HostedAgent]:
    shell = request.param
    assert shutil.which(shell[0]), f"{shell[0]} is needed: tools/debian-packages.txt lists it"
    hosted = HostedAgent(tmp_path, shell)
    yield hosted
    hosted.stop()


def with_agent(hosted: HostedAgent, body: Body) -> None:
    async def main() -> None:
        channel = AgentChannel(hosted.open)
        try:
            async with asyncio.timeout(PATIENCE):
                await channel.connect(timeout=PATIENCE)
                await body(channel)
        finally:
            await channel.close()

    asyncio.run(main())


async def run(channel: AgentChannel, command: Command | str) -> CommandResult:
    out, err = bytearray(), bytearray()

    async def take_out(data: bytes) -> None:
        out.extend(data)

    async def take_err(data: bytes) -> None:
        err.extend(data)

    given = Command(command) if isinstance(command, str) else command
    status = await channel.run(given, stdout=take_out, stderr=take_err)
    return CommandResult(given.text, status, bytes(out), bytes(err), 0.0)


def process_exists(pid_file: Path) -> bool:
    """Whether a process runs; one that has not been waited for does not."""
    try:
        return bool(Path(f"/proc/{int(pid_file.read_text())}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_output_error_output_and_status_come_apart(hosted: HostedAgent) -> None:
    async def body(channel: AgentChannel) -> None:
        result = await run(channel, "echo out; echo err >&2; exit 3")
        assert (result.status, result.stdout, result.stderr) == (3, "out\n", "err\n")
        assert not result.ok and result.signal is None

    with_agent(hosted, body)


def test_any_bytes_go_in_and_come_out_unchanged(hosted: HostedAgent) -> None:
    payload = bytes(range(256)) * 1200 + b"\x01end 00 0\n\x01hello 1 2\nrest"

    async def body(channel: AgentChannel) -> None:
        result = await run(channel, Command("cat; cat </dev/null", input=payload))
        assert result.stdout_bytes == payload

    with_agent(hosted, body)


def test_output_that_ends_like_a_greeting_is_only_output(hosted: HostedAgent) -> None:
    async def body(channel: AgentChannel) -> None:
        result = await run(channel, r"printf '\001hello 1 77\n'; sleep 0.3; echo more")
        assert result.stdout_bytes == b"\x01hello 1 77\nmore\n"
        assert (await run(channel, "echo next")).stdout == "next\n"

    with_agent(hosted, body)


def test_more_commands_than_slots_run_and_stay_apart(hosted: HostedAgent) -> None:
    async def body(channel: AgentChannel) -> None:
        results = await asyncio.gather(
            *(run(channel, f"sleep 0.0{number % 5}; echo {number}") for number in range(30))
        )
        assert [result.stdout for result in results] == [f"{number}\n" for number in range(30)]

    with_agent(hosted, body)


def test_input_arrives_while_the_command_runs(hosted: HostedAgent) -> None:
    async def body(channel: AgentChannel) -> None:
        answered = asyncio.Event()
        seen = bytearray()

        async def lines() -> AsyncIterator[bytes]:
            yield b"first\n"
            await answered.wait()
            yield b"second\n"

        async def take(data: bytes) -> None:
            seen.extend(data)
            answered.set()

        status = await channel.run(
            Command("while read -r line; do echo got $line; done", input=lines()),
            stdout=take,
            stderr=take,
        )
        assert (status, bytes(seen)) == (0, b"got first\ngot second\n")

    with_agent(hosted, body)


def test_a_command_that_reads_no_input_ends_and_the_next_one_is_in_step(
    hosted: HostedAgent,
) -> None:
    async def body(channel: AgentChannel) -> None:
        async def endless() -> AsyncIterator[bytes]:
            yield b"a"
            await asyncio.Event().wait()

        assert (await run(channel, Command("echo x", input=endless()))).stdout == "x\n"
        assert (await run(channel, Command("head -c 1", input=b"y" * 3_000_000))).stdout == "y"
        assert (await run(channel, "echo in step")).stdout == "in step\n"

    with_agent(hosted, body)


def test_input_is_taken_straight_from_the_port_and_a_failure_leaves_the_slot_in_step(
    hosted: HostedAgent, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    line = shell_line("run", "00", f"touch {tmp_path}/ran")
    payload = (
        bytes(range(256)) * 20_000
        + b"\x01end 00 0\n0 0\n"
        + line * 300
        + b"\n9 65536\n" * 300
        + b"rest"
    )

    async def pieces() -> AsyncIterator[bytes]:
        yield payload
        yield b"more"

    async def body(channel: AgentChannel) -> None:
        for source, whole in ((payload, payload), (pieces(), payload + b"more"), (b"", b"")):
            command = Command(f"take >{path} && echo taken", input=source, takes=True)
            assert (await run(channel, command)).stdout == "taken\n"
            assert path.read_bytes() == whole
        full = await run(channel, Command("take >/dev/full", input=payload, takes=True))
        assert full.status == 1 and "No space" in full.stderr
        refused = await run(channel, Command("echo no >&2; exit 9", input=payload, takes=True))
        assert (refused.status, refused.stderr) == (9, "no\n")
        assert (await run(channel, "echo in step; type take")).stdout.startswith("in step\n")
        assert (await run(channel, "take")).status == 127
        # What nobody took was not taken for commands either.
        assert not (tmp_path / "ran").exists()

    with_agent(hosted, body)


@pytest.mark.parametrize("patience", [0.5, 0.0], ids=["", "slow guest"])
@pytest.mark.parametrize("text", ["sleep 100", "trap '' TERM; while :; do sleep 1; done"])
def test_a_cancelled_command_is_ended_in_the_guest(
    hosted: HostedAgent,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    patience: float,
) -> None:
    monkeypatch.setattr(agent_module, "_KILL_AFTER", patience)

    pid = tmp_path / "pid"

    async def body(channel: AgentChannel) -> None:
        begun = f"echo $$ >{pid}.new; mv {pid}.new {pid}"
        work = asyncio.ensure_future(run(channel, f"{begun}; {text}"))
        while not pid.exists():
            assert not work.done(), work
            await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert not process_exists(pid)
        assert (await run(channel, "echo alive")).stdout == "alive\n"

    with_agent(hosted, body)


def test_a_command_whose_host_has_died_is_told_by_sighup_with_all_that_it_started(
    hosted: HostedAgent, tmp_path: Path
) -> None:
    text = (
        f"(trap 'echo child >{tmp_path}/child' HUP; : >{tmp_path}/listens; "
        f"while :; do sleep 0.1; done) & "
        f"trap 'echo itself >{tmp_path}/itself; exit' HUP; "
        f"until [ -e {tmp_path}/listens ]; do sleep 0.1; done; "
        f"echo began; while :; do sleep 0.1; done"
    )

    def told() -> bool:
        return all((tmp_path / name).exists() for name in ("itself", "child"))

    async def endless() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def body(channel: AgentChannel) -> None:
        began = asyncio.Event()

        async def took(data: bytes) -> None:
            began.set()

        work = asyncio.ensure_future(
            channel.run(Command(text, endless()), stdout=took, stderr=took)
        )
        await began.wait()
        # As the kernel does for a process that is killed.
        for slot in channel._all:
            await slot.drop()
        hosted.hang_up(0)
        while not told():  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)
        work.cancel()
        await asyncio.wait({work})

    with_agent(hosted, body)


def test_input_that_ends_is_no_reason_to_hang_up(hosted: HostedAgent, tmp_path: Path) -> None:
    async def body(channel: AgentChannel) -> None:
        text = "trap 'echo hung up' HUP; cat; sleep 0.3; echo end"
        assert (await run(channel, Command(text, b"given\n"))).stdout == "given\nend\n"

    with_agent(hosted, body)


def test_signals_reach_the_whole_process_group_and_sigint_is_not_ignored(
    hosted: HostedAgent,
) -> None:
    async def body(channel: AgentChannel) -> None:
        started: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def drop(data: bytes) -> None:
            """Nothing of the output matters."""

        work = asyncio.ensure_future(
            channel.run(
                Command("sleep 100 & sleep 100; wait"),
                stdout=drop,
                stderr=drop,
                started=started.set_result,
            )
        )
        await channel.signal(await started, 2)
        assert await work == 130

    with_agent(hosted, body)


def test_a_background_child_does_not_hold_the_command_up(hosted: HostedAgent) -> None:
    async def body(channel: AgentChannel) -> None:
        result = await run(channel, "(sleep 2; echo late) & echo now")
        assert result.stdout == "now\n"
        assert (await run(channel, "echo next")).stdout == "next\n"

    with_agent(hosted, body)


def test_directory_and_environment_apply_and_newlines_survive(hosted: HostedAgent) -> None:
    async def body(channel: AgentChannel) -> None:
        result = await run(
            channel,
            Command(
                "echo 'a\nb' \"$VALUE\"; pwd",
                environment={"VALUE": 'it\'s "1"\n$2'},
                directory="/usr",
            ),
        )
        assert result.stdout == 'a\nb it\'s "1"\n$2\n/usr\n'
        missing = await run(channel, Command("echo no", directory="/does/not/exist"))
        assert (missing.status, missing.stdout) == (126, "")

    with_agent(hosted, body)


def test_killing_the_agent_fails_the_command_and_the_next_one_works(hosted: HostedAgent) -> None:
    async def body(channel: AgentChannel) -> None:
        with pytest.raises(AgentRestarted):
            await run(channel, "kill -9 $PPID; sleep 1; echo after")
        assert (await run(channel, "echo back")).stdout == "back\n"

    with_agent(hosted, body)


def test_too_long_a_command_is_refused_with_advice(hosted: HostedAgent) -> None:
    async def body(channel: AgentChannel) -> None:
        with pytest.raises(OperationFailed, match="at most 120000 bytes") as caught:
            await run(channel, "x" * 130_000)
        assert caught.value.hint

    with_agent(hosted, body)


class _SilentChannel:
    name = "silent"

    async def read(self, size: int = 65536) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def write(self, data: bytes) -> None:
        """Nobody listens."""

    async def close(self) -> None:
        """Nothing to close."""


def test_a_guest_without_agent_is_a_deadline_with_advice() -> None:
    async def main() -> None:
        async def open_silent(name: str) -> _SilentChannel:
            return _SilentChannel()

        channel = AgentChannel(open_silent)  # a stand-in of the shape
        with pytest.raises(DeadlineExceeded, match="agent") as caught:
            await channel.connect(timeout=0.05)
        assert "console" in (caught.value.hint or "")

    asyncio.run(main())


class _ScriptedChannel(_SilentChannel):
    """Answers whatever the test says, in pieces, then ends."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def read(self, size: int = 65536) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


class _DyingChannel(_SilentChannel):
    """An agent that answers, begins the command, and dies in the middle of its output."""

    def __init__(self) -> None:
        self._answers: list[bytes] = []

    async def write(self, data: bytes) -> None:
        verb, token, *_ = data.decode().strip("\n\x01").replace("'", "").split()
        if verb == "ping":
            self._answers.append(f"\x01pong {token}\n".encode())
        else:
            self._answers.append(f"\x01pid {token} 7\nhalf of the out".encode())

    async def read(self, size: int = 65536) -> bytes:
        return self._answers.pop(0) if self._answers else b""


def test_a_guest_that_dies_ends_the_command_and_what_it_printed_is_delivered() -> None:
    async def main() -> None:
        async def open_dying(name: str) -> _SilentChannel:
            return _SilentChannel() if name.endswith(".err") else _DyingChannel()

        channel = AgentChannel(open_dying)  # a stand-in of the shape
        seen = bytearray()

        async def take(data: bytes) -> None:
            seen.extend(data)

        async with asyncio.timeout(PATIENCE):
            with pytest.raises(ChannelClosed, match="died or was stopped"):
                await channel.run(Command("cat"), stdout=take, stderr=take)
        assert bytes(seen) == b"half of the out"

    asyncio.run(main())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(max_size=40) | st.just(b"\x01pid ") | st.just(b"\x01end "), max_size=8))
def test_garbage_from_the_guest_is_a_clear_error(pieces: list[bytes]) -> None:
    async def main() -> None:
        async def open_scripted(name: str) -> _ScriptedChannel:
            return _ScriptedChannel([piece for piece in pieces if piece])

        channel = AgentChannel(open_scripted)  # a stand-in of the shape
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(ChannelClosed):
                await run(channel, "true")

    asyncio.run(main())


def test_the_control_port_comes_last_so_that_its_presence_means_all_are_there() -> None:
    assert CHANNELS[-1] == "vmlab.agent"
    assert len(set(CHANNELS)) == len(CHANNELS) <= 31  # virtio-serial's ports of one device


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), max_size=4))
def test_shell_lines_are_one_line_each(words: list[str]) -> None:
    line = shell_line("run", *words)
    assert line.endswith(b"\n") and line.count(b"\n") == 1


class Losing(Channel):
    """A port whose reader dies with the first questions that it was asked."""

    def __init__(self, channel: Channel, lost: int) -> None:
        self.name = channel.name
        self._channel = channel
        self._left = lost

    async def read(self, size: int = 65536) -> bytes:
        return await self._channel.read(size)

    async def write(self, data: bytes) -> None:
        if self._left:
            self._left -= 1
        else:
            await self._channel.write(data)

    async def close(self) -> None:
        await self._channel.close()


def test_a_question_that_died_with_whom_it_was_asked_is_asked_again(
    hosted: HostedAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "_ASK_AGAIN_AFTER", 0.05)

    async def main() -> None:
        async def opened(name: str) -> Channel:
            return Losing(await hosted.open(name), lost=3)

        channel = AgentChannel(opened)
        try:
            await channel.connect(timeout=PATIENCE)
            assert (await run(channel, "echo heard")).stdout == "heard\n"
        finally:
            await channel.close()

    asyncio.run(main())


@pytest.fixture
def load() -> Iterator[None]:
    """Three times as much to do as this host has CPUs."""
    with ExitStack() as stack:
        for _ in range(3 * (os.cpu_count() or 1)):
            busy = stack.enter_context(subprocess.Popen(["/bin/sh", "-c", "while :; do :; done"]))
            stack.callback(busy.kill)
        yield


def kill_servers(hosted: HostedAgent) -> None:
    """End what serves the first slot and the control port; their supervisors start them anew."""
    for process in psutil.Process(hosted.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.cmdline()[-1:] in (["0"], ["control"]):
                process.kill()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_five_hundred_hosts_in_turn_are_answered_under_load_and_while_the_agent_dies(
    hosted: HostedAgent, load: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "_ASK_AGAIN_AFTER", 0.5)
    random = Random(7)

    async def host(number: int) -> None:
        channel = AgentChannel(hosted.open)
        try:
            connecting = asyncio.ensure_future(channel.connect(timeout=10 * PATIENCE))
            if number % 25 == 24:
                await asyncio.sleep(random.random() * 0.005)
                kill_servers(hosted)
            await connecting
            if number % 5 == 0:
                assert (await run(channel, f"echo {number}")).stdout == f"{number}\n"
        finally:
            await channel.close()

    async def main() -> None:
        for number in range(500):
            await host(number)

    asyncio.run(main())


def test_a_ping_is_answered_while_every_slot_has_a_command(hosted: HostedAgent) -> None:
    async def body(channel: AgentChannel) -> None:
        busy = [asyncio.ensure_future(run(channel, "sleep 1000")) for _ in range(2 * SLOTS)]
        await channel.ping()
        cut = asyncio.ensure_future(channel.ping())
        await asyncio.sleep(0)
        cut.cancel()
        await channel.ping()
        for command in busy:
            assert not command.done()
            command.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
        assert (await run(channel, "echo on")).stdout == "on\n"

    with_agent(hosted, body)
