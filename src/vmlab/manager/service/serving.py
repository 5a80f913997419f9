"""A manager's life in a process: it takes the lock, opens the store, answers, and goes in order.

Going is the reverse: no more is taken, what is under way is answered, the manager is closed, the
lock is let go. Being killed at any moment loses nothing: the journal tells the next one what was
begun.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from vmlab.machine.errors import OperationFailed
from vmlab.manager.client.address import socket_of
from vmlab.manager.service.collecting import collected_rarely, settled
from vmlab.manager.service.holding import hold
from vmlab.manager.service.idle import Activity, until_idle
from vmlab.manager.service.listening import Listening, UnixListener, tcp_listener

if TYPE_CHECKING:
    from vmlab.manager.settings import Settings

__all__ = ["LINGER", "serve"]

LINGER: Final = 60.0
"""Seconds after its last answer that a manager in the background stays; VMLAB_LINGER_SECONDS."""

_GRACE: Final = 10
"""Seconds that answers under way have when it is to end; event streams never end by themselves."""

_PING: Final = 20.0
_PONG: Final = 120.0
"""Seconds between pings to who is at a console or a command on another host, and to answer one."""

_SWITCH: Final = 0.0005
"""Seconds that a thread may keep the interpreter while others wait for it (Python's own: 0.005)."""

Ready = Callable[[Mapping[str, Any]], None]
"""Is told where the manager answers, when it does."""


class _Server(uvicorn.Server):
    """A server that leaves signals to whoever runs it, and tells when it answers."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self.listener = listener
        self.answering = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are caught once, for all servers."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does it; then it answers."""
        await super().startup(sockets)
        self.answering.set()

    async def live(self) -> None:
        """Answer until it is told to end."""
        try:
            await self.serve(sockets=[self.listener])
        except SystemExit as error:
            # uvicorn ends the process where its application does not begin.
            raise OperationFailed(
                "the manager's service did not begin", hint="its log says why"
            ) from error


async def serve(
    settings: Settings,
    listening: Listening,
    *,
    background: bool = False,
    linger: float | None = None,
    ready: Ready = lambda facts: None,
) -> None:
    """Be the manager of a home, until a signal comes (SIGTERM, SIGINT) or nothing needs it.

    Args:
        settings: Of the manager.
        listening: Where it answers beside the home's own socket.
        background: Whether another one may take its place.
        linger: Seconds without a question after which it leaves if nothing needs it; None stays.
        ready: Is told where it answers, when it does.

    Raises:
        OperationFailed: another manager runs in this home, or it cannot listen.
        VmlabError: the store or a part of the manager cannot be opened.
    """
    from vmlab.manager.api import create_app, end_streams
    from vmlab.manager.manager import Manager

    listening.check()
    ending = asyncio.Event()
    with collected_rarely(), _switched_soon(), _signals(ending), ExitStack() as stack:
        held = await asyncio.to_thread(hold, settings.directory, background=background)
        stack.callback(held.release)
        listeners = [UnixListener(socket_of(settings.home))]
        stack.callback(listeners[0].close)
        if listening.socket is not None and listening.socket.absolute() != listeners[0].path:
            listeners.append(UnixListener(listening.socket.absolute()))
            stack.callback(listeners[1].close)
        urls = [f"unix:{each.path}" for each in listeners]
        tcp = None
        if listening.port is not None:
            tcp = tcp_listener(listening.host, listening.port)
            stack.callback(tcp.close)
            urls.append(_url(listening, tcp))
        # Who comes from here on waits until it answers.
        manager = await Manager.open(settings)
        try:
            await manager.start()
            settled()
            apps = [create_app(manager, authenticate=False)]
            servers: list[_Server] = []
            activity = Activity(
                apps[0], lambda: any(each.server_state.connections for each in servers)
            )
            servers += [_Server(_config(activity), each.socket) for each in listeners]
            if tcp is not None:
                apps.append(create_app(manager, authenticate=True))
                servers.append(_Server(_config(apps[1], listening), tcp))

            def begun() -> None:
                held.tell(urls)
                ready({"pid": os.getpid(), "urls": urls})

            def leaving() -> None:
                for each in listeners:
                    each.unlink()
                for app in apps:
                    end_streams(app)

            idle = None if linger is None else until_idle(activity, manager.database, linger)
            await _live(servers, ending, idle, begun, leaving)
        finally:
            await manager.close()


@contextmanager
def _switched_soon() -> Iterator[None]:
    """Within it, no thread keeps the interpreter for long: decision 53."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


async def _live(
    servers: list[_Server],
    ending: asyncio.Event,
    idle: Coroutine[Any, Any, None] | None,
    begun: Callable[[], None],
    leaving: Callable[[], None],
) -> None:
    """Have servers answer until one fails, a signal comes or nothing needs them."""
    living = [asyncio.ensure_future(server.live()) for server in servers]
    answering = asyncio.ensure_future(_all_answer(servers))
    ends = [asyncio.ensure_future(_set(ending))]
    if idle is not None:
        ends.append(asyncio.ensure_future(idle))
    try:
        await asyncio.wait({answering, *living, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            begun()
            await asyncio.wait({*living, *ends}, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            if end.done():
                end.result()
    finally:
        # Who comes from here on finds nobody, and begins the next one, which waits for the lock.
        leaving()
        for task in (answering, *ends):
            task.cancel()
        for server in servers:
            server.should_exit = True
        await asyncio.wait({*living, *ends})
        for task in living:
            task.result()


async def _set(event: asyncio.Event) -> None:
    await event.wait()


async def _all_answer(servers: list[_Server]) -> None:
    for server in servers:
        await server.answering.wait()


@contextmanager
def _signals(ending: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT end it; of a terminal that goes it takes no notice."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _config(app: Any, listening: Listening | None = None) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        # The manager logs by itself.
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
        # Who is at a socket of this host is gone when the kernel says so, and not before.
        ws_ping_interval=None if listening is None else _PING,
        ws_ping_timeout=None if listening is None else _PONG,
    )
    if listening is not None and listening.certificate is not None:
        config.ssl_certfile = str(listening.certificate)
        config.ssl_keyfile = str(listening.key)
        config.ssl_version = ssl.PROTOCOL_TLS_SERVER
    return config


def _url(listening: Listening, tcp: socket.socket) -> str:
    scheme = "https" if listening.certificate is not None else "http"
    host = f"[{listening.host}]" if ":" in listening.host else listening.host
    return f"{scheme}://{host}:{tcp.getsockname()[1]}"
