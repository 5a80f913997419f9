"""A manager's service as its clients meet it: a server with a loop and a thread of its own."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from vmlab.hypervisors.ownership import Home
from vmlab.manager.api import create_app, end_streams
from vmlab.manager.manager import Manager
from vmlab.manager.settings import HostSetting, Settings

WAIT = 120.0
"""Seconds that anything may take; nothing depends on how long it does."""

INSTANT = "\n".join(
    f"{name} = 0"
    for name in (
        *("create", "start", "stop", "kill", "pause", "resume", "delete", "status", "network"),
        *("disk", "snapshot", "restore", "fork", "resize", "fault", "migration"),
    )
)


class Live:
    """A manager on a simulated host, and servers in front of it."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.loop = asyncio.new_event_loop()
        self._settings = settings
        self._thread = threading.Thread(target=self._run, name="manager", daemon=True)
        self._servers: list[tuple[uvicorn.Server, Any, asyncio.Task[None], Any]] = []
        self.manager: Manager

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the manager's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT)

    def begin(self) -> None:
        self._thread.start()
        profile = self.directory / "profile.toml"
        profile.write_text(f'extends = "performance"\n[latency]\n{INSTANT}\n', encoding="utf-8")
        host = HostSetting(
            name="simulated",
            hypervisor="simulated",
            options={"clock": "wall", "profile": str(profile), "seed": "1"},
        )
        settings = Settings(
            **{"home": Home.open(self.directory / "home"), "hosts": (host,), **self._settings}
        )
        self.manager = self.call(Manager.open(settings))
        self.call(self.manager.start())

    def serve(self, *, unix: bool = False, **options: Any) -> str:
        """Put a server in front of it; returns its URL, or the path of its socket."""
        return self.call(self._serve(unix, options))

    async def _serve(self, unix: bool, options: dict[str, Any]) -> str:
        app = create_app(self.manager, **options)
        family = socket.AF_UNIX if unix else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        where = str(self.directory / f"s{len(self._servers)}.sock") if unix else ("127.0.0.1", 0)
        listener.bind(where)
        listener.listen(64)
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=60, server_header=False)
        )
        server.capture_signals = _nothing
        task = self.loop.create_task(server.serve(sockets=[listener]))
        self._servers.append((server, app, task, listener))
        return str(where) if unix else f"http://127.0.0.1:{listener.getsockname()[1]}"

    def app(self, number: int = 0) -> Any:
        """The application of a server."""
        return self._servers[number][1]

    def end(self) -> None:
        for server, app, task, listener in self._servers:
            self.loop.call_soon_threadsafe(end_streams, app)
            self.loop.call_soon_threadsafe(setattr, server, "should_exit", True)
            self.call(_ended(task))
            listener.close()
        self.call(self.manager.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT)
        self.loop.close()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


async def _ended(task: asyncio.Task[None]) -> None:
    await task


@contextmanager
def living(**settings: Any) -> Iterator[Live]:
    # A unix socket's path is short.
    directory = Path(tempfile.mkdtemp(prefix="vmlab-a-"))
    live = Live(directory, **settings)
    try:
        live.begin()
        yield live
        live.end()
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A manager with nobody to ask for tokens, shared by a module's tests."""
    with living() as made:
        yield made


@pytest.fixture
def living_with() -> Callable[..., Any]:
    """A manager of a test's own: a context manager."""
    return living


@pytest.fixture(scope="module")
def url(live: Live) -> str:
    """Where the shared manager answers, without tokens."""
    return live.serve(authenticate=False)


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    """A client of the shared manager."""
    with httpx.Client(base_url=url, timeout=WAIT, trust_env=False) as client:
        yield client
