"""QMP conversations, with a scripted server in place of QEMU: what it says is the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmlab.hypervisors.qmp import (
    QmpCommandNotFound,
    QmpConnection,
    QmpDeviceNotFound,
    QmpError,
    QmpEvent,
    QmpLost,
    QmpTimeout,
    connect_socket,
)
from vmlab.machine.errors import OperationFailed, ResourceNotFound, from_record

GREETING = {"QMP": {"version": {"qemu": {"major": 7}, "package": ""}, "capabilities": []}}
Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


def said(message: object) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


async def fine(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(said({"return": {"of": request["execute"]}, "id": request.get("id")}))


async def requests_in(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects in a stream; a client need not end them with a newline."""
    text, decoder = "", json.JSONDecoder()
    while data := await reader.read(4096):
        text += data.decode()
        while text := text.lstrip():
            try:
                request, end = decoder.raw_decode(text)
            except ValueError:
                break
            text = text[end:]
            yield request


class ScriptedServer:
    """A fake QMP server: greets, agrees on capabilities, then does as the test says."""

    def __init__(self, answer: Answer = fine, *, greeting: bytes | None = None) -> None:
        self.answer = answer
        self.greeting = said(GREETING) if greeting is None else greeting
        self.requests: list[dict[str, Any]] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError):
            writer.write(self.greeting)
            async for request in requests_in(reader):
                if request.get("execute") == "qmp_capabilities":
                    writer.write(said({"return": {}, "id": request.get("id")}))
                    continue
                self.requests.append(request)
                await self.answer(request, writer)
        writer.close()

    def say(self, message: object) -> None:
        self.writers[-1].write(said(message))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Path]:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "qmp.sock"
            server = await asyncio.start_unix_server(self.serve, path)
            try:
                yield path
            finally:
                server.close()
                for writer in self.writers:
                    writer.close()
                await asyncio.sleep(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 100))


def talking(
    body: Callable[[QmpConnection, ScriptedServer], Awaitable[None]],
    answer: Answer = fine,
    **options: Any,
) -> None:
    """Run `body` in a conversation with a server that answers as told."""

    async def test() -> None:
        server = ScriptedServer(answer)
        async with (
            server.running() as path,
            await QmpConnection.open(path, machine="m", hypervisor="h", **options) as qmp,
        ):
            await body(qmp, server)

    run(test())


def test_command_returns_what_the_server_returns() -> None:
    async def body(qmp: QmpConnection, server: ScriptedServer) -> None:
        assert await qmp.execute("query-status", {"a": 1}) == {"of": "query-status"}
        assert server.requests[0]["arguments"] == {"a": 1}
        assert qmp.greeting["version"]["qemu"]["major"] == 7

    talking(body)


@pytest.mark.parametrize(
    ("error_class", "kind"),
    [
        ("GenericError", QmpError),
        ("CommandNotFound", QmpCommandNotFound),
        ("DeviceNotFound", QmpDeviceNotFound),
    ],
)
def test_refusal_is_an_error_with_command_class_and_machine(
    error_class: str, kind: type[QmpError]
) -> None:
    async def refuse(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        error = {"class": error_class, "desc": "no such thing"}
        writer.write(said({"error": error, "id": request["id"]}))

    async def body(qmp: QmpConnection, server: ScriptedServer) -> None:
        with pytest.raises(QmpError) as caught:
            await qmp.execute("device_del")
        error = caught.value
        assert type(error) is kind
        assert (error.command, error.error_class) == ("device_del", error_class)
        assert (error.machine, error.hypervisor) == ("m", "h")
        assert "no such thing" in error.message
        again = from_record(error.to_record())
        assert type(again) is kind
        assert again.to_record() == error.to_record()

    talking(body, refuse)
    assert issubclass(QmpDeviceNotFound, ResourceNotFound)


def test_command_without_an_answer_ends_at_its_deadline_and_the_next_one_works() -> None:
    async def forget_the_first(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if request["execute"] != "stop":
            await fine(request, writer)

    async def body(qmp: QmpConnection, server: ScriptedServer) -> None:
        with pytest.raises(QmpTimeout, match=r"stop got no answer within 0\.05 s"):
            await qmp.execute("stop", timeout=0.05)
        assert await qmp.execute("cont") == {"of": "cont"}

    talking(body, forget_the_first)


def test_answer_that_comes_too_late_is_no_answer_to_the_next_command() -> None:
    async def late(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if request["execute"] == "stop":
            await asyncio.sleep(0.1)
        await fine(request, writer)

    async def body(qmp: QmpConnection, server: ScriptedServer) -> None:
        with pytest.raises(QmpTimeout):
            await qmp.execute("stop", timeout=0.02)
        assert await qmp.execute("cont") == {"of": "cont"}

    talking(body, late)


def test_deadline_of_the_caller_is_the_callers_own() -> None:
    async def never(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        return

    async def body(qmp: QmpConnection, server: ScriptedServer) -> None:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.02):
                await qmp.execute("stop")
        assert not isinstance(caught.value, OperationFailed)

    talking(body, never)


def test_event_before_the_answer_is_not_missed() -> None:
    async def event_first(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(said({"event": "DEVICE_DELETED", "data": {"device": "other"}}))
        stamp = {"seconds": 12, "microseconds": 500000}
        writer.write(said({"event": "DEVICE_DELETED", "data": {"device": "d"}, "timestamp": stamp}))
        await fine(request, writer)

    async def body(qmp: QmpConnection, server: ScriptedServer) -> None:
        with qmp.listen(
            "DEVICE_DELETED", match=lambda event: event.data["device"] == "d"
        ) as deleted:
            await qmp.execute("device_del")
            event = await deleted.wait(60)
        assert event == QmpEvent("DEVICE_DELETED", {"device": "d"}, 12.5)

    talking(body, event_first)


def test_events_come_in_their_order_to_every_listener_and_to_the_handler() -> None:
    seen: list[str] = []

    async def body(qmp: QmpConnection, server: ScriptedServer) -> None:
        with qmp.listen() as everything, qmp.listen("B", "C") as some:
            for name in "ABC":
                server.say({"event": name})
            assert [(await everything.wait(60)).name for _ in "abc"] == ["A", "B", "C"]
            assert [(await some.wait(60)).name for _ in "bc"] == ["B", "C"]
        server.say({"event": "D"})
        await qmp.execute("query-status")
        assert seen == ["A", "B", "C", "D"]

    talking(body, on_event=lambda event: seen.append(event.name))


def test_event_that_does_not_come_is_a_timeout_that_names_it() -> None:
    async def body(qmp: QmpConnection, server: ScriptedServer) -> None:
        with qmp.listen("STOP", "RESUME") as either:
            with pytest.raises(QmpTimeout, match=r"no STOP or RESUME came within 0\.01 s"):
                await either.wait(0.01)
            server.say({"event": "STOP"})
            assert (await either.wait(60)).name == "STOP"

    talking(body)


@pytest.mark.parametrize("garbage", [b"no json\n", b"[1]\n", b"\xff\xfe\n", b'{"return": '])
def test_garbage_ends_the_conversation_and_everybody_is_told(garbage: bytes) -> None:
    lost: list[str] = []

    async def answer(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(garbage)
        writer.close()

    async def body(qmp: QmpConnection, server: ScriptedServer) -> None:
        with qmp.listen("STOP") as stopped:
            with pytest.raises(QmpLost, match="stop got no answer"):
                await qmp.execute("stop", timeout=60)
            for _ in "12":
                with pytest.raises(QmpLost, match="waiting for STOP ended"):
                    await stopped.wait(60)
        with pytest.raises(QmpLost, match="was not sent"):
            await qmp.execute("cont")
        with qmp.listen("STOP") as stopped, pytest.raises(QmpLost):
            await stopped.wait(60)

    talking(body, answer, on_lost=lost.append)
    assert len(lost) == 1


def test_answer_without_return_or_error_is_an_error() -> None:
    async def answer(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        error = {"error": {"class": 1}} if request["execute"] == "stop" else {}
        writer.write(said({**error, "id": request["id"]}))

    async def body(qmp: QmpConnection, server: ScriptedServer) -> None:
        for command in ("stop", "cont"):
            with pytest.raises(QmpLost):
                await qmp.execute(command)

    talking(body, answer)


def test_connection_is_made_as_soon_as_somebody_listens(tmp_path: Path) -> None:
    async def test() -> None:
        server = ScriptedServer()
        async with server.running() as path:
            elsewhere = tmp_path / "late.sock"
            opening = asyncio.create_task(QmpConnection.open(elsewhere, timeout=60))
            await asyncio.sleep(0.05)
            assert not opening.done()
            elsewhere.symlink_to(path)
            async with await opening as qmp:
                assert await qmp.execute("stop") == {"of": "stop"}

    run(test())


def test_waiting_ends_when_the_process_has_ended(tmp_path: Path) -> None:
    async def test() -> None:
        with pytest.raises(QmpLost, match="nobody answers QMP: it died"):
            await QmpConnection.open(tmp_path / "none.sock", ended=lambda: "it died")

    run(test())


def test_waiting_ends_at_the_deadline(tmp_path: Path) -> None:
    async def test() -> None:
        with pytest.raises(QmpTimeout, match="no QMP server answered at"):
            await QmpConnection.open(tmp_path / "none.sock", timeout=0.05)

    run(test())


def test_server_that_says_nothing_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    async def test() -> None:
        async with ScriptedServer(greeting=b"").running() as path:
            with pytest.raises(QmpTimeout):
                await QmpConnection.open(path, timeout=0.05)

    run(test())


@pytest.mark.parametrize("greeting", [b"hello\n", b"{}\n", b'{"QMP": 1}\n', b"QEMU 7.2 monitor\n"])
def test_what_does_not_greet_as_qmp_is_refused(greeting: bytes) -> None:
    async def test() -> None:
        async with ScriptedServer(greeting=greeting).running() as path:
            with pytest.raises(QmpLost, match="no QMP conversation came about"):
                await QmpConnection.open(path, timeout=60)

    run(test())


def test_whole_conversation_is_logged_with_times(tmp_path: Path) -> None:
    log = tmp_path / "qmp.log"

    async def body(qmp: QmpConnection, server: ScriptedServer) -> None:
        server.say({"event": "STOP"})
        await qmp.execute("query-status")

    talking(body, log=log)
    lines = [line.split(" ", 2) for line in log.read_text().splitlines()]
    assert all(float(stamp) > 1e9 for stamp, _, _ in lines)
    told = [(direction, json.loads(message)) for _, direction, message in lines]
    assert told[0] == ("<", GREETING)
    assert [
        (direction, message.get("execute") or message.get("event") or "return")
        for direction, message in told[1:-1]
    ] == [
        (">", "qmp_capabilities"),
        ("<", "return"),
        *sorted([(">", "query-status"), ("<", "STOP")], key=lambda line: line != told_at(told, 3)),
        ("<", "return"),
    ]
    assert told[-1][0] == "!"


def told_at(told: list[tuple[str, Any]], position: int) -> tuple[str, str]:
    """Command and event cross on their way: either may be written down first."""
    direction, message = told[position]
    return direction, message.get("execute") or message.get("event")


def test_full_disk_under_the_log_does_not_end_the_conversation() -> None:
    async def body(qmp: QmpConnection, server: ScriptedServer) -> None:
        assert await qmp.execute("stop") == {"of": "stop"}

    talking(body, log=Path("/dev/full"))


def test_closing_is_no_loss_and_may_be_repeated() -> None:
    lost: list[str] = []

    async def body(qmp: QmpConnection, server: ScriptedServer) -> None:
        await qmp.close()
        await qmp.close()
        with pytest.raises(QmpLost, match="it was closed here"):
            await qmp.execute("stop")

    talking(body, on_lost=lost.append)
    assert lost == []


def test_server_that_hangs_up_is_noticed_without_a_command() -> None:
    async def test() -> None:
        gone = asyncio.get_running_loop().create_future()
        server = ScriptedServer()
        async with (
            server.running() as path,
            await QmpConnection.open(path, on_lost=gone.set_result) as qmp,
        ):
            server.writers[-1].close()
            assert await gone == "the other side hung up"
            assert qmp.lost == "the other side hung up"

    run(test())


def test_socket_with_a_path_too_long_for_the_kernel_is_reached(tmp_path: Path) -> None:
    async def test() -> None:
        server = ScriptedServer()
        async with server.running() as path:
            directory = tmp_path / ("d" * 100) / ("e" * 100)
            directory.mkdir(parents=True)
            (directory / "qmp.sock").symlink_to(path)
            async with await QmpConnection.open(directory / "qmp.sock") as qmp:
                assert await qmp.execute("stop") == {"of": "stop"}

    run(test())


def test_socket_that_nobody_listens_on_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(FileNotFoundError):
            connect_socket(tmp_path / "none.sock")
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


# ------------------------------------------------------------------- fuzz

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
_MESSAGES = st.one_of(
    st.builds(lambda name, data: said({"event": name, "data": data}), _JSON, _JSON),
    st.builds(lambda stamp: said({"event": "STOP", "timestamp": stamp}), _JSON),
    st.builds(lambda value, id_: said({"return": value, "id": id_}), _JSON, _JSON),
    st.builds(lambda value, id_: said({"error": value, "id": id_}), _JSON, _JSON),
    st.builds(said, _JSON),
    st.binary(max_size=40),
    st.just(b"\n"),
)
_SPLITS = st.lists(st.integers(1, 30), max_size=5)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    before=st.lists(_MESSAGES, max_size=4),
    answers=st.sampled_from(["fine", "twice", "half", "never", "hang up"]),
    splits=_SPLITS,
)
def test_whatever_a_server_says_ends_in_an_answer_or_an_error(
    before: list[bytes], answers: str, splits: list[int]
) -> None:
    async def answer(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        reply = said({"return": 7, "id": request["id"]})
        told = {"fine": reply, "twice": reply * 2, "half": reply[: len(reply) // 2]}
        data = b"".join(before) + told.get(answers, b"")
        for length in splits:
            writer.write(data[:length])
            data = data[length:]
            await asyncio.sleep(0)
        writer.write(data)
        if answers in {"half", "hang up"}:
            writer.close()

    async def test() -> None:
        server = ScriptedServer(answer)
        async with server.running() as path, await QmpConnection.open(path) as qmp:
            with qmp.listen("STOP") as stopped:
                try:
                    assert await qmp.execute("stop", timeout=0.2) == 7
                    assert answers in {"fine", "twice"}
                except (QmpError, QmpLost, QmpTimeout) as error:
                    assert error.message
                with contextlib.suppress(QmpLost, QmpTimeout):
                    assert (await stopped.wait(0.01)).name == "STOP"

    run(test())


@settings(max_examples=100)
@given(greeting=_MESSAGES)
def test_whatever_a_server_greets_with_ends_in_an_error(greeting: bytes) -> None:
    async def test() -> None:
        async with ScriptedServer(greeting=greeting).running() as path:
            with pytest.raises((QmpLost, QmpTimeout)):
                await QmpConnection.open(path, timeout=0.05)

    run(test())
