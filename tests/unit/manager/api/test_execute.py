"""Commands in a guest over a WebSocket: streams, signals, terminals, and who goes away."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketDenialResponse

from vmlab.machine.errors import from_record

Serving = Callable[..., TestClient]
EXEC = "/v1/machines/web/exec"


def rest(socket: Any) -> tuple[dict[int, bytes], dict[str, Any]]:
    """What comes on each stream until the last message, and that."""
    streams: dict[int, bytes] = {1: b"", 2: b""}
    while True:
        message = socket.receive()
        if message.get("bytes") is not None:
            streams[message["bytes"][0]] += message["bytes"][1:]
            continue
        return streams, json.loads(message["text"])


def test_a_command_has_its_streams_and_its_status(serving: Serving) -> None:
    with serving() as http, http.websocket_connect(EXEC) as socket:
        script = 'echo "$0 $A $PWD"; cat; echo oops >&2; exit 3'
        words = ["sh", "-c", script, "it's $HOME"]
        socket.send_text(json.dumps({"argv": words, "env": {"A": "b c"}, "cwd": "/"}))
        socket.send_bytes(b"\x00one ")
        socket.send_bytes(b"\x00")
        socket.send_bytes(b"\x00two\n")
        socket.send_text('{"eof": true}')
        streams, last = rest(socket)
        assert streams == {1: b"it's $HOME b c /\none two\n", 2: b"oops\n"}
        assert last == {"exit": 3, "signal": None}
        assert socket.receive()["code"] == 1000


def test_a_lot_of_output_comes_whole(serving: Serving) -> None:
    with serving() as http, http.websocket_connect(EXEC) as socket:
        socket.send_text(json.dumps({"argv": ["head", "-c", "5000000", "/dev/zero"]}))
        streams, last = rest(socket)
        assert streams[1] == bytes(5_000_000)
        assert last["exit"] == 0


def test_a_signal_reaches_the_command(serving: Serving, shell: Any) -> None:
    with serving() as http, http.websocket_connect(EXEC) as socket:
        socket.send_text(json.dumps({"argv": ["sh", "-c", "echo ready; exec sleep 600"]}))
        assert socket.receive_bytes() == b"\x01ready\n"
        socket.send_text(json.dumps({"signal": signal.SIGTERM}))
        _, last = rest(socket)
        assert last == {"exit": 143, "signal": 15}
        assert [number for _, number in shell.signals] == [15]


def test_who_leaves_ends_the_command(serving: Serving, shell: Any) -> None:
    with serving() as http:
        with http.websocket_connect(EXEC) as socket:
            socket.send_text(json.dumps({"argv": ["sh", "-c", "echo ready; exec sleep 600"]}))
            assert socket.receive_bytes() == b"\x01ready\n"
        (process,) = shell.running
        assert http.portal is not None
        assert http.portal.call(process.wait) != 0


def test_the_end_of_the_service_ends_the_command(serving: Serving, shell: Any) -> None:
    http = serving()
    with http, http.websocket_connect(EXEC) as socket:
        socket.send_text(json.dumps({"argv": ["sh", "-c", "echo ready; exec sleep 600"]}))
        assert socket.receive_bytes() == b"\x01ready\n"
        closing = http.app.state.service.closing
        assert http.portal is not None
        http.portal.call(closing.set)
        message = socket.receive()
        assert (message["type"], message["code"]) == ("websocket.close", 1001)


@pytest.mark.parametrize(
    ("first", "field"),
    [
        ('{"argv": []}', "argv"),
        ('{"argv": ["a\\u0000b"]}', "argv.0"),
        ('{"argv": ["true"], "env": {"a;b": "c"}}', "env"),
        ('{"argv": ["true"], "shell": true}', "shell"),
        ('{"argv": ["true"], "tty": 1}', "tty"),
        ("nonsense", "line 1"),
    ],
)
def test_what_is_no_command_is_told(serving: Serving, first: str, field: str) -> None:
    with serving() as http, http.websocket_connect(EXEC) as socket:
        socket.send_text(first)
        error = from_record(json.loads(socket.receive_text())["error"])
        assert field in str(error)
        assert socket.receive()["code"] == 1011


def test_messages_that_are_none_end_the_command(serving: Serving, shell: Any) -> None:
    for wrong in (b"\x01data", b"", "{}}", '{"signal": 99}', '{"sgnal": 1}'):
        with serving() as http, http.websocket_connect(EXEC) as socket:
            socket.send_text(json.dumps({"argv": ["sleep", "600"]}))
            if isinstance(wrong, bytes):
                socket.send_bytes(wrong)
            else:
                socket.send_text(wrong)
            assert "error" in json.loads(socket.receive_text())
            assert socket.receive()["code"] == 1011
    assert all(process.returncode is not None for process in shell.running)


def test_a_first_message_of_bytes_is_no_command(serving: Serving) -> None:
    with serving() as http, http.websocket_connect(EXEC) as socket:
        socket.send_bytes(b"\x00")
        assert json.loads(socket.receive_text())["error"]["kind"] == "BadRequest"


def test_a_machine_that_does_not_run_runs_no_command(serving: Serving) -> None:
    with serving("paused") as http:
        for path, status in ((EXEC, 409), ("/v1/machines/db/exec", 404)):
            with pytest.raises(WebSocketDenialResponse) as refused, http.websocket_connect(path):
                raise AssertionError("it is accepted")
            assert refused.value.status_code == status


def test_a_command_on_a_terminal(
    serving: Serving, terminal: Any, shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts: list[str] = []
    release = threading.Event()

    async def run(command: Any, *, stdout: Any, stderr: Any, started: Any = None) -> int:
        import asyncio

        scripts.append(command.script())
        if started is None:
            return 0
        started(7)
        await asyncio.to_thread(release.wait, 120)
        mark = re.search(r"end ([0-9a-f]{16})", scripts[0])
        assert mark is not None
        await terminal.coming.put(b"last\x01end " + mark[1].encode())
        return 5

    monkeypatch.setattr(shell, "run", run)
    wanted = {"argv": ["vi", "a b"], "tty": True, "rows": 50, "columns": 132}
    http = serving()
    with http, http.websocket_connect(EXEC) as socket:
        socket.send_text(json.dumps(wanted))
        socket.send_bytes(b"\x00:q\r")
        assert http.portal is not None
        http.portal.call(terminal.written.wait)
        assert terminal.typed == [b":q\r"]
        with http.websocket_connect(EXEC) as second:
            second.send_text(json.dumps(wanted))
            assert json.loads(second.receive_text())["error"]["kind"] == "Conflict"
        socket.send_text('{"resize": [24, 80]}')
        http.portal.call(terminal.coming.put, b"screen")
        assert socket.receive_bytes() == b"\x01screen"
        release.set()
        streams, last = rest(socket)
        assert streams[1] == b"last"
        assert last == {"exit": 5, "signal": None}
    assert "rows 50 cols 132" in scripts[0]
    assert any("rows 24 cols 80" in script for script in scripts[1:])
