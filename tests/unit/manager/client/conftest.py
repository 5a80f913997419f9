"""A client of a manager on the simulated hypervisor: through the application, or over a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from vmlab.hypervisors.ownership import Home
from vmlab.manager.api import create_app
from vmlab.manager.client import AsyncClient
from vmlab.manager.manager import Manager
from vmlab.manager.service.listening import Listening
from vmlab.manager.service.serving import serve
from vmlab.manager.settings import Settings

SPEC = {"memory": "64M", "disks": [{"name": "root", "size": "16M"}]}
"""A machine that boots at once on the simulated hypervisor."""

Story = Callable[[AsyncClient], Awaitable[None]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home of the test's own, whose manager has nothing but the simulator and looks when told."""
    hosts = [{"name": "simulated", "hypervisor": "simulated"}]
    monkeypatch.setenv("VMLAB_HOSTS", json.dumps(hosts))
    monkeypatch.setenv("VMLAB_SWEEP_SECONDS", "86400")
    return Home.open(tmp_path / "home")


@pytest.fixture
def tell(home: Home) -> Callable[[Story], None]:
    """Run a story with a client whose requests are answered by the application itself."""

    async def told(story: Story) -> None:
        async with await Manager.open(Settings.from_environment(home=home)) as manager:
            app = create_app(manager, authenticate=False)
            async with AsyncClient.over(httpx.ASGITransport(app)) as client:
                await story(client)

    return lambda story: asyncio.run(told(story))


@pytest.fixture
def tell_over_socket(home: Home) -> Callable[[Story], None]:
    """Run a story with a client of a manager that is served in this process, on its socket."""

    async def told(story: Story) -> None:
        ready = asyncio.Event()
        settings = Settings.from_environment(home=home)
        serving = asyncio.ensure_future(
            serve(settings, Listening(), ready=lambda facts: ready.set())
        )
        waiting = asyncio.ensure_future(ready.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        try:
            if serving.done():
                serving.result()
            async with AsyncClient.connect(home=home) as client:
                await story(client)
        finally:
            serving.cancel()
            await asyncio.wait({serving})

    return lambda story: asyncio.run(told(story))
