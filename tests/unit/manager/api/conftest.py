"""The service's routes over a manager that is made of what a test needs."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmlab.guests.command import Command, CommandChannel, Sink
from vmlab.guests.guest import Guest
from vmlab.manager.api import create_app

with warnings.catch_warnings():
    # It is being moved to a successor of httpx, which is not among the project's dependencies.
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient


class Shell(CommandChannel):
    """A guest that is this host's own shell."""

    name = "shell"

    def __init__(self) -> None:
        self.signals: list[tuple[int, int]] = []
        self.running: list[asyncio.subprocess.Process] = []

    async def connect(self, *, timeout: float) -> None:
        """It is there."""

    async def run(
        self,
        command: Command,
        *,
        stdout: Sink,
        stderr: Sink,
        started: Callable[[int], None] | None = None,
    ) -> int:
        """Run it here."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", command.script(), stdin=pipe, stdout=pipe, stderr=pipe
        )
        self.running.append(process)
        if started is not None:
            started(process.pid)

        async def give() -> None:
            assert process.stdin is not None
            try:
                if isinstance(command.input, bytes):
                    process.stdin.write(command.input)
                elif command.input is not None:
                    async for piece in command.input:
                        process.stdin.write(piece)
                        await process.stdin.drain()
            except (BrokenPipeError, ConnectionResetError):
                return
            finally:
                process.stdin.close()

        async def take(stream: asyncio.StreamReader | None, sink: Sink) -> None:
            assert stream is not None
            while data := await stream.read(65536):
                await sink(data)

        giving = asyncio.ensure_future(give())
        taking = asyncio.gather(take(process.stdout, stdout), take(process.stderr, stderr))
        try:
            await asyncio.wait({giving, taking}, return_when=asyncio.FIRST_COMPLETED)
            if giving.done():
                giving.result()
            await taking
            status = await process.wait()
            return status if status >= 0 else 128 - status
        finally:
            for task in (giving, taking):
                task.cancel()
            await asyncio.gather(giving, taking, return_exceptions=True)
            if process.returncode is None:
                process.terminate()
            # What nobody reads keeps its pipes open, and asyncio waits for those too.
            for stream in (process.stdout, process.stderr):
                while stream is not None and await stream.read(65536):
                    continue
            await process.wait()

    async def signal(self, process: int, number: int) -> None:
        """Send it."""
        self.signals.append((process, number))
        next(each for each in self.running if each.pid == process).send_signal(number)

    async def close(self) -> None:
        """Nothing was opened."""


class Terminal:
    """A console of a machine, whose other side a test has."""

    def __init__(self) -> None:
        self.coming: asyncio.Queue[bytes] = asyncio.Queue()
        self.typed: list[bytes] = []
        self.written = asyncio.Event()

    async def read(self, size: int = 65536) -> bytes:
        """What it prints."""
        return await self.coming.get()

    async def write(self, data: bytes) -> None:
        """What is typed."""
        self.typed.append(data)
        self.written.set()

    async def __aenter__(self) -> Terminal:
        return self

    async def __aexit__(self, *exception: object) -> None:
        """It stays as it is."""


class Rows:
    """A store that knows one machine."""

    def __init__(self, state: str) -> None:
        self.row = SimpleNamespace(id="a" * 32, name="web", state=state)
        self.events = SimpleNamespace(latest=lambda: 0)

    async def read(self, fn: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """What `fn` says of a session that finds that machine."""
        return fn(self, *args, **more)

    def get(self, table: Any, key: str) -> Any:
        """By its id."""
        return self.row if key == self.row.id else None

    def scalar(self, query: Any) -> Any:
        """By its name."""
        return self.row if self.row.name in query.compile().params.values() else None

    def scalars(self, query: Any) -> Any:
        """The names that there are."""
        return SimpleNamespace(all=lambda: [self.row.name])


@pytest.fixture
def shell() -> Shell:
    """The guest's side."""
    return Shell()


@pytest.fixture
def terminal() -> Terminal:
    """The machine's terminal."""
    return Terminal()


@pytest.fixture
def serving(
    shell: Shell, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., TestClient]:
    """The service of a manager that has one machine, whose guest is this host's shell."""

    def serve(state: str = "running", **options: Any) -> TestClient:
        async def console(name: str, *, timeout: float | None = None) -> Terminal:
            return terminal

        machine: Any = SimpleNamespace(name="web", console=console)
        guest = Guest(machine, shell)

        async def get(machine_id: str, *, timeout: float) -> Guest:
            assert machine_id == "a" * 32
            return guest

        settings = SimpleNamespace(rate_limit=None, directory=tmp_path, sweep_seconds=5.0)
        manager: Any = SimpleNamespace(
            settings=settings, database=Rows(state), guests=SimpleNamespace(get=get)
        )
        app = create_app(manager, authenticate=False, **options)
        return TestClient(app, headers={"Host": "localhost"})

    return serve
