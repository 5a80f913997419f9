"""The manager's client for programs that `await`: what the service offers, as methods.

`AsyncClient.connect()` speaks with the manager of VMLAB_URL, or with the home's own one, which is
started if it does not run. Errors are raised as the manager raised them.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, Self, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import DeadlineExceeded
from vmlab.manager.client import address, events, nouns
from vmlab.manager.client.background import start
from vmlab.manager.client.replies import ended, page_of, told
from vmlab.manager.client.sending import Sender, path_of
from vmlab.manager.documents import ENDED, EventDocument, OperationDocument, Page

__all__ = ["AsyncClient"]

T = TypeVar("T")
D = TypeVar("D", bound=BaseModel)

_WAIT: Final = 20.0
"""Seconds that the manager is asked to hold its answer for, while an operation is waited for."""
_WATCH: Final = 0.4
"""The same when somebody watches it."""
_PAUSE: Final = 0.2
"""Seconds between questions to a manager that does not hold its answers."""


class AsyncClient:
    """Speaks with one manager; use it as an asynchronous context manager, or call `close`.

    Attributes:
        machines, disks, networks, templates, snapshots, hosts, findings, operations, exports,
            tokens: The nouns.
        sender: What carries requests.
    """

    def __init__(self, sender: Sender) -> None:
        self.sender = sender
        self.machines = nouns.Machines(self)
        self.disks = nouns.Disks(self)
        self.networks = nouns.Networks(self)
        self.templates = nouns.Templates(self)
        self.snapshots = nouns.Snapshots(self)
        self.hosts = nouns.Hosts(self)
        self.findings = nouns.Findings(self)
        self.operations = nouns.Operations(self)
        self.exports = nouns.Exports(self)
        self.tokens = nouns.Tokens(self)

    @classmethod
    def connect(
        cls, url: str | None = None, *, token: str | None = None, home: Home | None = None
    ) -> Self:
        """A client of the manager at `url`; nothing is sent yet.

        Args:
            url: "http://HOST:PORT", "https://HOST:PORT" or "unix:/PATH"; VMLAB_URL if left out, and
                without that the home's own manager, which the first request starts.
            token: What the manager at a URL is shown; VMLAB_TOKEN if left out.
            home: The home whose manager is meant; `Home.open()` if left out.

        Raises:
            InvalidSpec: `url` is none.
        """
        where = address.find(url, token=token, home=home)
        if where.home is None:
            return cls(Sender(where))
        directory = where.home

        async def revive() -> None:
            await asyncio.to_thread(start, Home.open(directory))

        return cls(Sender(where, revive=revive))

    @classmethod
    def over(cls, transport: httpx.AsyncBaseTransport, *, token: str | None = None) -> Self:
        """A client whose requests are carried by `transport`, such as `httpx.ASGITransport`."""
        return cls(Sender(address.Address("http://localhost", token=token), transport=transport))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; closing it again does nothing."""
        await self.sender.close()

    # ------------------------------------------------------------------------------- changes

    async def submit(
        self,
        request: BaseModel,
        *,
        wait: bool = True,
        dry_run: bool = False,
        if_match: int | None = None,
        idempotency_key: str | None = None,
    ) -> OperationDocument:
        """Ask for a change.

        Args:
            request: A model of `vmlab.manager.requests`.
            wait: Until it has ended; else it is told as it was taken.
            dry_run: Only have the manager say, step by step, what it would do.
            if_match: Refuse it unless what is changed has this version.
            idempotency_key: Two requests with one key are one; a key of its own if left out.

        Raises:
            VmlabError: it cannot be; or, with `wait`, what it failed with.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        if dry_run:
            headers["Vmlab-Dry-Run"] = "true"
        if if_match is not None:
            headers["If-Match"] = f'"{if_match}"'
        data = {
            "kind": getattr(request, "kind", None),
            **request.model_dump(mode="json", exclude_unset=True),
        }
        operation = await self.post(path_of("operations"), OperationDocument, data, headers)
        return ended(await self.wait(operation.id, known=operation)) if wait else operation

    async def wait(
        self,
        operation: str,
        *,
        timeout: float | None = None,
        watch: nouns.Watch | None = None,
        known: OperationDocument | None = None,
    ) -> OperationDocument:
        """Wait for an operation's end, however that is.

        Args:
            operation: Its id.
            timeout: Seconds that it is waited for; None is as long as it takes.
            watch: Is told of it as it goes, some times in a second.
            known: What is known of it already.

        Raises:
            DeadlineExceeded: it goes on after `timeout` seconds.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        path = path_of("operations", operation)
        while known is None or known.state not in ENDED:
            patience = _WAIT if watch is None else _WATCH
            if deadline is not None:
                patience = min(patience, deadline - loop.time())
                if patience <= 0 and known is not None:
                    assert timeout is not None
                    raise DeadlineExceeded(
                        f"waiting for operation {operation}",
                        seconds=timeout,
                        hint="it goes on; wait for it again, or cancel it",
                    )
            asked = loop.time()
            known = await self.get(path, OperationDocument, {"wait": max(0.0, patience)})
            if watch is not None:
                await watch(known)
            if known.state not in ENDED and loop.time() - asked < min(patience, _PAUSE):
                await asyncio.sleep(_PAUSE)
        return known

    # ------------------------------------------------------------------------------ asking

    def events(
        self, after: int | None = None, *, kind: str | None = None, subject: str | None = None
    ) -> AsyncIterator[EventDocument]:
        """Every event after one, as it happens, without an end and without a gap.

        Args:
            after: Number of the last one that is known; None begins with the next one.
            kind: Only of this kind, such as "machine.state".
            subject: Only of the thing with this id.

        Raises:
            EventsGone: not all events after that one are kept; read everything anew.
        """
        return events.follow(self.sender, after, {"kind": kind, "subject": subject})

    async def past_events(
        self,
        after: int | None = None,
        *,
        before: int | None = None,
        latest: bool = False,
        limit: int | None = None,
        kind: str | None = None,
        subject: str | None = None,
    ) -> tuple[EventDocument, ...]:
        """Events that have happened, in their order.

        Args:
            after: Number of the event before the first.
            before: Number of the event after the last.
            latest: The last ones if there are more than `limit`, instead of the first.
            limit: How many at most, up to 1,000.
            kind: Only of this kind, such as "machine.*".
            subject: Only of the thing with this id or name.
        """
        page = await self.get(
            path_of("events"),
            Page[EventDocument],
            {
                "after": after,
                "before": before,
                "latest": latest or None,
                "limit": limit,
                "kind": kind,
                "subject": subject,
            },
        )
        return page.items

    async def health(self) -> dict[str, Any]:
        """How the manager is.

        Raises:
            VmlabError: a part of it is out of order.
        """
        return await self.get("/health", dict[str, Any])

    async def get(
        self,
        path: str,
        model: type[T] | TypeAdapter[T],
        query: Mapping[str, str | int | float | bool | None] | None = None,
    ) -> T:
        """The document at a path."""
        response = await self.sender.request("GET", path, query=query)
        return told(model, response.content, self.sender.address)

    async def get_bytes(self, path: str) -> bytes:
        """What is at a path, as it is."""
        return (await self.sender.request("GET", path)).content

    async def all_of(self, path: str, model: type[D]) -> tuple[D, ...]:
        """All documents at a path, page by page."""
        found: list[D] = []
        cursor = None
        while True:
            page = await self.get(path, page_of(model), {"cursor": cursor})
            found += page.items
            cursor = page.next
            if cursor is None:
                return tuple(found)

    async def post(
        self,
        path: str,
        model: type[T],
        data: object,
        headers: Mapping[str, str] | None = None,
        *,
        safe: bool = True,
    ) -> T:
        """What comes back for a document that is sent to a path; `safe` as `Sender.request` has."""
        response = await self.sender.request("POST", path, json=data, headers=headers, safe=safe)
        return told(model, response.content, self.sender.address)
