"""A manager's life: what it answers on, how it ends, what it leaves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import OperationFailed
from vmlab.manager.client import AsyncClient
from vmlab.manager.client.address import directory_of, socket_of
from vmlab.manager.service import serving
from vmlab.manager.service.holding import hold, holder
from vmlab.manager.service.listening import Listening, tcp_listener
from vmlab.manager.service.serving import _config, serve
from vmlab.manager.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_environment(home=Home.open(tmp_path / "home"))


async def begun(settings: Settings, listening: Listening, **more: Any) -> tuple[Any, list[str]]:
    """A manager that answers, and where."""
    ready: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
    life = asyncio.ensure_future(serve(settings, listening, ready=ready.set_result, **more))
    await asyncio.wait({life, ready}, return_when=asyncio.FIRST_COMPLETED)
    if life.done():
        life.result()
    return life, list(ready.result()["urls"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(number: int, settings: Settings, tmp_path: Path) -> None:
    async def story() -> None:
        life, urls = await begun(settings, Listening(port=0, socket=tmp_path / "other.sock"))
        assert len(urls) == 3
        for url in urls:
            async with AsyncClient.connect(url) as client:
                assert (await client.health())["status"] == "ok"
        os.kill(os.getpid(), number)
        await life

    asyncio.run(story())
    assert not (tmp_path / "other.sock").exists()
    assert not socket_of(settings.home).exists()
    assert holder(directory_of(settings.home)) is None


def test_threads_take_turns_more_often_while_it_answers(settings: Settings) -> None:
    before = sys.getswitchinterval()

    async def story() -> None:
        life, _ = await begun(settings, Listening())
        assert sys.getswitchinterval() < before / 5
        os.kill(os.getpid(), signal.SIGTERM)
        await life

    asyncio.run(story())
    assert sys.getswitchinterval() == before


def test_who_reads_events_is_told_that_it_ends(settings: Settings) -> None:
    async def story() -> None:
        life, urls = await begun(settings, Listening())
        async with AsyncClient.connect(urls[0]) as client:
            await client.disks.create("data", size="1M")
            stream = client.events(0)
            first = await anext(stream)
            assert first.id == 1
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(life, 120)
            await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(story())


def test_it_leaves_when_nobody_asks(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def patient(*arguments: Any) -> Any:
        config = _config(*arguments)
        config.timeout_keep_alive = 3600  # uvicorn would end a connection on which nothing comes
        return config

    monkeypatch.setattr(serving, "_config", patient)

    async def story() -> None:
        life, urls = await begun(settings, Listening(), linger=0.1, background=True)
        async with AsyncClient.connect(urls[0]) as client:
            await client.health()
            # Somebody who is connected may ask in a moment.
            await asyncio.sleep(1)
            assert not life.done()
        await asyncio.wait_for(life, 120)

    asyncio.run(story())
    assert holder(directory_of(settings.home)) is None


def test_nobody_is_taken_for_gone_because_they_stand_still_for_a_while() -> None:
    """Who is stopped, or on a host that stutters, is at their console when they go on."""
    assert _config(None).ws_ping_interval is None
    assert (_config(None, Listening(port=0)).ws_ping_timeout or 0) >= 120


def test_a_place_that_is_taken_leaves_nothing_behind(settings: Settings) -> None:
    with tcp_listener("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OperationFailed, match=f"port {port}"):
            asyncio.run(serve(settings, Listening(port=port)))
    assert not socket_of(settings.home).exists()
    hold(directory_of(settings.home), background=False).release()


def test_in_the_background_it_says_where_it_answers_or_why_not(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")

    def run(**more: str) -> tuple[int, dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "vmlab.manager.service"],
            env={**os.environ, "VMLAB_HOME": str(home.directory), **more},
            capture_output=True,
            check=False,
            timeout=240,
        )
        return done.returncode, json.loads(done.stdout)

    status, error = run(VMLAB_WORKERS="0")
    assert (status, error["kind"]) == (2, "InvalidSpec")
    status, facts = run(VMLAB_LINGER_SECONDS="600")
    assert status == 0
    found = holder(directory_of(home))
    assert found is not None
    try:
        assert (found.pid, list(found.urls)) == (facts["pid"], facts["urls"])
        assert found.background
        assert os.getsid(found.pid) == found.pid
    finally:
        os.kill(found.pid, signal.SIGTERM)
    # The next one waits for the place.
    hold(directory_of(home), background=False).release()


def test_what_ends_without_a_word_is_said_to_have(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from vmlab.manager.service.detaching import detached\n"
        "from vmlab.machine.errors import VmlabError\n"
        "def life(ready):\n"
        "    print('my last words', flush=True)\n"
        "    os._exit(1)\n"
        "try:\n"
        "    detached(Path(sys.argv[1]), life)\n"
        "except VmlabError as error:\n"
        "    print(error, error.hint, error.__notes__)\n"
    )
    log = tmp_path / "log"
    log.write_bytes(b"x" * (17 << 20))
    done = subprocess.run(
        [sys.executable, "-c", code, str(log)], capture_output=True, text=True, check=True,
        timeout=240,
    )  # fmt: skip
    assert "ended before it answered" in done.stdout
    assert "['my last words']" in done.stdout
    assert str(log) in done.stdout
    assert log.read_text() == "my last words\n"
    assert log.with_name("log.1").stat().st_size == 17 << 20
