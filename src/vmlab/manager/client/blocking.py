"""The manager's client for programs that do not `await`: the same methods, which return when done.

Each is made of its asynchronous twin, whose documentation holds; they run on a loop in a thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import httpx

from vmlab.hypervisors.ownership import Home
from vmlab.lab.loop import LoopThread
from vmlab.manager.client import nouns
from vmlab.manager.client.asynchronous import AsyncClient
from vmlab.manager.documents import EventDocument

if TYPE_CHECKING:
    from vmlab.manager.client.streams import Exit

__all__ = ["Client"]

P = ParamSpec("P")
T = TypeVar("T")
N = TypeVar("N")


class blocking(Generic[N, P, T]):
    """A method that waits for an asynchronous one."""

    def __init__(self, method: Callable[Concatenate[N, P], Coroutine[Any, Any, T]]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: _Blocking[N], owner: type) -> Callable[P, T]:
        method, run, inner = self._method, instance._run, instance._inner

        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return run(method(inner, *args, **kwargs))

        call.__doc__ = method.__doc__
        call.__name__ = getattr(method, "__name__", "call")
        return call


class _Blocking(Generic[N]):
    """Something whose methods are waited for."""

    def __init__(self, inner: N, loop: LoopThread) -> None:
        self._inner = inner
        self._run = loop.run


class Machines(_Blocking[nouns.Machines]):
    """Machines."""

    page = blocking(nouns.Machines.page)
    list = blocking(nouns.Machines.list)
    show = blocking(nouns.Machines.show)
    create = blocking(nouns.Machines.create)
    update = blocking(nouns.Machines.update)
    start = blocking(nouns.Machines.start)
    stop = blocking(nouns.Machines.stop)
    restart = blocking(nouns.Machines.restart)
    pause = blocking(nouns.Machines.pause)
    resume = blocking(nouns.Machines.resume)
    resize = blocking(nouns.Machines.resize)
    delete = blocking(nouns.Machines.delete)
    snapshot = blocking(nouns.Machines.snapshot)
    snapshots = blocking(nouns.Machines.snapshots)
    delete_snapshot = blocking(nouns.Machines.delete_snapshot)
    restore = blocking(nouns.Machines.restore)
    clone = blocking(nouns.Machines.clone)
    migrate = blocking(nouns.Machines.migrate)
    export = blocking(nouns.Machines.export)
    import_ = blocking(nouns.Machines.import_)
    log = blocking(nouns.Machines.log)
    metrics = blocking(nouns.Machines.metrics)
    copy_in = blocking(nouns.Machines.copy_in)
    copy_out = blocking(nouns.Machines.copy_out)

    def execute(
        self, machine: str, argv: Sequence[str], *, stdin: bytes = b""
    ) -> tuple[Exit, bytes, bytes]:
        """Run a command in its guest; how it ended, and all of its stdout and stderr."""

        async def given() -> AsyncIterator[bytes]:
            yield stdin

        collected = bytearray(), bytearray()

        async def stdout(data: bytes) -> None:
            collected[0].extend(data)

        async def stderr(data: bytes) -> None:
            collected[1].extend(data)

        exit_ = self._run(
            self._inner.execute(
                machine, argv, stdin=given() if stdin else None, stdout=stdout, stderr=stderr
            )
        )
        return exit_, bytes(collected[0]), bytes(collected[1])


class Disks(_Blocking[nouns.Disks]):
    """Disks of the store's."""

    page = blocking(nouns.Disks.page)
    list = blocking(nouns.Disks.list)
    show = blocking(nouns.Disks.show)
    create = blocking(nouns.Disks.create)
    attach = blocking(nouns.Disks.attach)
    detach = blocking(nouns.Disks.detach)
    resize = blocking(nouns.Disks.resize)
    delete = blocking(nouns.Disks.delete)


class Networks(_Blocking[nouns.Networks]):
    """Networks."""

    page = blocking(nouns.Networks.page)
    list = blocking(nouns.Networks.list)
    show = blocking(nouns.Networks.show)
    create = blocking(nouns.Networks.create)
    delete = blocking(nouns.Networks.delete)
    addresses = blocking(nouns.Networks.addresses)


class Templates(_Blocking[nouns.Templates]):
    """Templates."""

    page = blocking(nouns.Templates.page)
    list = blocking(nouns.Templates.list)
    show = blocking(nouns.Templates.show)
    create = blocking(nouns.Templates.create)
    delete = blocking(nouns.Templates.delete)


class Snapshots(_Blocking[nouns.Snapshots]):
    """Snapshots of all machines."""

    page = blocking(nouns.Snapshots.page)
    list = blocking(nouns.Snapshots.list)


class Hosts(_Blocking[nouns.Hosts]):
    """Hypervisors that machines run on."""

    page = blocking(nouns.Hosts.page)
    list = blocking(nouns.Hosts.list)
    show = blocking(nouns.Hosts.show)


class Findings(_Blocking[nouns.Findings]):
    """What the observer has found."""

    page = blocking(nouns.Findings.page)
    list = blocking(nouns.Findings.list)
    show = blocking(nouns.Findings.show)
    repair = blocking(nouns.Findings.repair)


class Operations(_Blocking[nouns.Operations]):
    """Changes that were asked for."""

    page = blocking(nouns.Operations.page)
    list = blocking(nouns.Operations.list)
    show = blocking(nouns.Operations.show)
    wait = blocking(nouns.Operations.wait)
    cancel = blocking(nouns.Operations.cancel)


class Exports(_Blocking[nouns.Exports]):
    """Archives that machines were exported to, and those that machines can be made of."""

    list = blocking(nouns.Exports.list)
    download = blocking(nouns.Exports.download)
    upload = blocking(nouns.Exports.upload)
    delete = blocking(nouns.Exports.delete)


class Tokens(_Blocking[nouns.Tokens]):
    """Tokens of who may ask a manager that is not asked over its unix socket."""

    list = blocking(nouns.Tokens.list)
    create = blocking(nouns.Tokens.create)
    revoke = blocking(nouns.Tokens.revoke)


class Client(_Blocking[AsyncClient]):
    """Speaks with one manager; use it as a context manager, or call `close`.

    Attributes:
        machines, disks, networks, templates, snapshots, hosts, findings, operations, exports,
            tokens: The nouns.
    """

    submit = blocking(AsyncClient.submit)
    past_events = blocking(AsyncClient.past_events)
    health = blocking(AsyncClient.health)

    def __init__(self, inner: AsyncClient, loop: LoopThread) -> None:
        super().__init__(inner, loop)
        self.machines = Machines(inner.machines, loop)
        self.disks = Disks(inner.disks, loop)
        self.networks = Networks(inner.networks, loop)
        self.templates = Templates(inner.templates, loop)
        self.snapshots = Snapshots(inner.snapshots, loop)
        self.hosts = Hosts(inner.hosts, loop)
        self.findings = Findings(inner.findings, loop)
        self.operations = Operations(inner.operations, loop)
        self.exports = Exports(inner.exports, loop)
        self.tokens = Tokens(inner.tokens, loop)

    @classmethod
    def connect(
        cls, url: str | None = None, *, token: str | None = None, home: Home | None = None
    ) -> Self:
        """A client of the manager at `url`; as `AsyncClient.connect`."""
        return cls._made(lambda: AsyncClient.connect(url, token=token, home=home))

    @classmethod
    def over(cls, transport: httpx.AsyncBaseTransport, *, token: str | None = None) -> Self:
        """A client whose requests are carried by `transport`."""
        return cls._made(lambda: AsyncClient.over(transport, token=token))

    @classmethod
    def _made(cls, make: Callable[[], AsyncClient]) -> Self:
        loop = LoopThread.shared()

        async def made() -> AsyncClient:
            return make()

        return cls(loop.run(made()), loop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; closing it again does nothing."""
        self._run(self._inner.close())

    def events(
        self, after: int | None = None, *, kind: str | None = None, subject: str | None = None
    ) -> Iterator[EventDocument]:
        """Every event after one, as it happens, without an end; as `AsyncClient.events`."""
        stream = self._inner.events(after, kind=kind, subject=subject)

        async def following() -> EventDocument:
            return await anext(stream)

        try:
            while True:
                yield self._run(following())
        finally:
            closing = getattr(stream, "aclose", None)
            if closing is not None:
                self._run(closing())
