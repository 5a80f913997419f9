"""A manager on the simulator with its service on a port of its own, and a browser before it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from sqlalchemy import select
from tests.needs import need

from vmlab.hypervisors.ownership import Home
from vmlab.manager.api.app import create_app, end_streams
from vmlab.manager.api.security import NewToken, Scope, issue
from vmlab.manager.documents import MachineDocument, OperationDocument
from vmlab.manager.manager import Manager
from vmlab.manager.requests import (
    CreateMachine,
    CreateTemplate,
    DeleteMachine,
    DeleteNetwork,
    UpdateMachine,
)
from vmlab.manager.settings import HostSetting, Settings
from vmlab.manager.store.queries import find_machine, machine_document
from vmlab.manager.store.tables import NetworkRow, NicRow

# Generous: a browser on a busy machine is slow, and no test is about how fast it is.
PATIENCE_MS = 240_000
PATIENCE = PATIENCE_MS / 1000
SIMULATED = HostSetting(
    name="simulated",
    hypervisor="simulated",
    options={"clock": "wall", "profile": "performance", "seed": "1"},
)
SPEC = {"architecture": "x86_64", "memory": "64M", "nics": []}

T = TypeVar("T")


class Site:
    """A manager and its service, in a thread with a loop of its own.

    Playwright's synchronous interface has an event loop run in the test's thread.

    Args:
        directory: Of the manager's home.
        host: Where its machines are; the simulator if left out.
        authenticate: Whether tokens are asked for.
    """

    def __init__(
        self, directory: Path, *, host: HostSetting = SIMULATED, authenticate: bool = False
    ) -> None:
        self._directory = directory
        self._host = host
        self._authenticate = authenticate
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.manager: Manager
        self.url = ""

    def __enter__(self) -> Site:
        self._thread.start()
        self._ready.wait(PATIENCE)
        if self._failure is not None:
            raise self._failure
        assert self.url, "the service did not begin"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the service does not end"

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        try:
            settings = Settings(
                home=Home.open(self._directory), hosts=(self._host,), sweep_seconds=86400
            )
            async with await Manager.open(settings) as self.manager:
                await self._serve()
        except BaseException as failure:
            self._failure = failure
            raise
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        app = create_app(self.manager, authenticate=self._authenticate)
        server = _Server(
            uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off")
        )
        serving = asyncio.ensure_future(server.serve())
        await server.begun.wait()
        port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._ready.set()
        await self._end.wait()
        end_streams(app)
        server.should_exit = True
        await serving

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine function where the manager is."""

        async def whole() -> T:
            async with asyncio.timeout(PATIENCE):
                return await work()

        return asyncio.run_coroutine_threadsafe(whole(), self._loop).result()

    def do(self, request: Any) -> OperationDocument:
        """Have something done that has to work."""

        async def done() -> OperationDocument:
            operation = await self.manager.operator.submit(request)
            return await self.manager.operator.wait(operation.id, PATIENCE)

        operation = self.run(done)
        assert operation.state == "succeeded", operation.error
        return operation

    def machine(self, name: str) -> MachineDocument:
        """A machine as the store has it."""
        return self.run(
            lambda: self.manager.database.read(lambda s: machine_document(s, find_machine(s, name)))
        )

    def machine_of(self, name: str, **fields: Any) -> MachineDocument:
        """A machine of that name, which is at rest unless `start` is true."""
        self.do(CreateMachine(name=name, host="simulated", spec=SPEC, **fields))
        return self.machine(name)

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Have an operation hold a machine's turn as long as the block runs."""
        go_on = asyncio.Event()

        async def hold(work: Any) -> None:
            async with work.step("hold", "hold its turn"):
                await go_on.wait()

        handler = self.manager.operator._handlers["machine.update"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(handler, "run", hold)
            request = UpdateMachine(machine=name, labels={})
            operation = self.run(lambda: self.manager.operator.submit(request))
            try:
                yield
            finally:
                self._loop.call_soon_threadsafe(go_on.set)
                self.run(lambda: self.manager.operator.wait(operation.id, PATIENCE))

    def remove_networks(self) -> None:
        """Remove every network, and the machines that are on one: they have processes."""

        def on_networks(session: Any) -> tuple[list[str], list[str]]:
            machines = session.scalars(select(NicRow.machine_id).where(NicRow.mode == "network"))
            return list(set(machines)), list(session.scalars(select(NetworkRow.id)))

        machines, networks = self.run(lambda: self.manager.database.read(on_networks))
        for machine in machines:
            self.do(DeleteMachine(machine=machine, force=True))
        for network in networks:
            self.do(DeleteNetwork(network=network))

    def token(self, name: str, scope: Scope) -> str:
        """A new token."""
        wanted = NewToken(name=name, scope=scope)
        return self.run(lambda: self.manager.database.write(issue, wanted)).token


class _Server(uvicorn.Server):
    """A server that says when it has begun, and leaves signals to pytest."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.begun = asyncio.Event()

    async def startup(self, *arguments: Any, **named: Any) -> None:
        try:
            await super().startup(*arguments, **named)
        finally:
            self.begun.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A service that nobody has to log in to, for the tests of a file."""
    directory = Path(tempfile.mkdtemp(prefix="vmlab-w-"))
    with Site(directory) as made:
        made.do(CreateTemplate(name="small", memory="64M", spec=SPEC))
        yield made
    shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def _no_networks_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A network has processes as long as it is there, whoever made it."""
    yield
    if "site" in request.fixturenames:
        request.getfixturevalue("site").remove_networks()


@pytest.fixture(scope="module")
def guarded_site() -> Iterator[Site]:
    """A service that asks for tokens."""
    directory = Path(tempfile.mkdtemp(prefix="vmlab-w-"))
    with Site(directory, authenticate=True) as made:
        yield made
    shutil.rmtree(directory)


@pytest.fixture
def browser() -> Iterator[Browser]:
    """Debian's Chromium, headless, for one test."""
    chromium = need("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, timeout=PATIENCE_MS)
        yield browser
        browser.close()


class Reader:
    """A person at a browser, and everything that the page asked for or complained about."""

    def __init__(self, context: BrowserContext, site: Site) -> None:
        self.site = site
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page: Page = context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))

    def mark(self) -> None:
        """Mark the page: a page that was loaded anew has no mark."""
        self.page.evaluate("window.marked = true")

    def is_the_same(self) -> bool:
        """Whether the page is the one that was marked."""
        return bool(self.page.evaluate("window.marked === true"))

    def open(self, path: str) -> Page:
        """Go to a page, and wait until it is live."""
        self.page.goto(self.site.url + path)
        self.page.get_by_role("status").filter(has_text="live").first.wait_for()
        return self.page


@pytest.fixture
def reader(browser: Browser, site: Site) -> Iterator[Reader]:
    """A person at a browser; nothing that a page does may be worth a complaint."""
    with reading(browser, site) as person:
        yield person


@contextmanager
def reading(browser: Browser, site: Site) -> Iterator[Reader]:
    """Have a person at a browser before a site, who has nothing to complain about."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    person = Reader(context, site)
    yield person
    complaints = person.complaints[:]
    context.close()
    # A browser tells of every request that was refused, which some tests are about; and a machine
    # that is not at its hypervisor yet has no console: the page tries again.
    refusals = ("Failed to load resource: the server responded with a status of 4", "/console?")
    assert [text for text in complaints if not any(each in text for each in refusals)] == []
