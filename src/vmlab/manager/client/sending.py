"""Requests and answers over HTTP, to a socket or a URL, again where that is safe.

A home's own manager leaves when nothing needs it and may be killed at any moment: who does not
reach it starts it and asks again. Changes carry an idempotency key, so that asking twice is once.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final, TypeVar
from urllib.parse import quote, urlsplit

import httpx

from vmlab.manager.client.address import Address
from vmlab.manager.client.replies import Unreachable, checked

__all__ = ["Sender", "path_of"]

T = TypeVar("T")
Revive = Callable[[], Awaitable[None]]
"""Starts the manager if it does not run, and returns when it answers."""

_ATTEMPTS: Final = 5
"""How often a home's own manager is started for one request before it is given up."""
_CONNECT: Final = 10.0
"""Seconds to reach a manager; an answer may take as long as it takes."""

_LONGEST: Final = 30.0
"""Seconds that are waited at most before the same is asked again."""

_BROKEN: Final = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.ReadError,
    httpx.WriteError,
    httpx.CloseError,
    httpx.RemoteProtocolError,
)
"""How a connection ends that the other side, or the way there, broke."""
_STALE: Final = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
"""How one ends that was kept for the next request, and that the other side gave up meanwhile."""


def path_of(*parts: str) -> str:
    """A path of the service, of words that may be anything: "/v1/machines/web%2F1"."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


class Sender:
    """Speaks HTTP with one manager.

    Args:
        address: Where it is.
        revive: Starts it if it does not run; None for one that is not ours to start.
        transport: Carries requests instead of a connection, such as `httpx.ASGITransport`.
    """

    def __init__(
        self,
        address: Address,
        *,
        revive: Revive | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.address = address
        self._revive = revive
        self._reviving: asyncio.Lock = asyncio.Lock()
        if transport is None and address.socket is not None:
            transport = httpx.AsyncHTTPTransport(uds=str(address.socket))
        self._http = httpx.AsyncClient(
            base_url=address.url,
            transport=transport,
            headers=self.headers,
            # What is on this host is not reached through a proxy.
            trust_env=not address.loopback,
            verify=self.tls or True,
            timeout=httpx.Timeout(None, connect=_CONNECT),
        )

    @property
    def headers(self) -> dict[str, str]:
        """What every request says of who asks."""
        token = self.address.token
        return {"Authorization": f"Bearer {token}"} if token else {}

    @property
    def tls(self) -> ssl.SSLContext | None:
        """How connections are secured, by SSL_CERT_FILE where that is set; None is not."""
        secure = urlsplit(self.address.url).scheme == "https"
        return httpx.create_ssl_context(trust_env=True) if secure else None

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int | float | bool | None] | None = None,
        json: object | None = None,
        content: Callable[[], AsyncIterator[bytes]] | None = None,
        headers: Mapping[str, str] | None = None,
        safe: bool = True,
    ) -> httpx.Response:
        """One answer, whole.

        Args:
            method: HTTP's method.
            path: As `path_of` makes it.
            query: Parameters; those that are None are left out.
            json: The body, as JSON.
            content: Makes the body, piece by piece, anew for each attempt.
            headers: More headers.
            safe: Whether it may be asked again when nobody knows what became of the first time.

        Raises:
            Unreachable: no manager answers.
            VmlabError: what the manager raised.
        """

        async def ask() -> httpx.Response:
            return await self._http.request(
                method,
                path,
                params=_given(query),
                json=json,
                content=content() if content is not None else None,
                headers=headers,
            )

        response = await self.attempt(ask, safe=safe)
        for _ in range(_ATTEMPTS):
            if response.status_code != HTTPStatus.TOO_MANY_REQUESTS:
                break
            await asyncio.sleep(_seconds(response.headers.get("Retry-After", "")))
            response = await self.attempt(ask, safe=safe)
        checked(response.status_code, response.content, self.address)
        return response

    @asynccontextmanager
    async def stream(
        self,
        path: str,
        *,
        query: Mapping[str, str | int | float | bool | None] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """An answer that is read as it comes.

        Raises:
            Unreachable: no manager answers.
            VmlabError: what the manager raised.
        """

        async def ask() -> httpx.Response:
            request = self._http.build_request("GET", path, params=_given(query), headers=headers)
            return await self._http.send(request, stream=True)

        response = await self.attempt(ask)
        try:
            if response.status_code >= 400:
                checked(response.status_code, await response.aread(), self.address)
            yield response
        except _BROKEN as error:
            raise self._unreachable(error) from error
        finally:
            await response.aclose()

    async def attempt(self, ask: Callable[[], Awaitable[T]], *, safe: bool = True) -> T:
        """What `ask` returns; a manager of ours that does not answer is started first.

        Another one is asked once more where its connection broke: a server ends those on which
        nothing came for a while, whatever is on its way to it.

        Raises:
            Unreachable: it does not answer all the same.
        """
        for number in range(1, _ATTEMPTS + 1):
            try:
                return await ask()
            except (*_BROKEN, OSError) as error:
                sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | OSError)
                again = _ATTEMPTS if self._revive is not None else 1 + isinstance(error, _STALE)
                if number >= again or (sent and not safe):
                    raise self._unreachable(error) from error
            if self._revive is None:
                continue
            async with self._reviving:
                await self._revive()
        raise AssertionError("the last attempt returns or raises")

    def _unreachable(self, error: Exception) -> Unreachable:
        came = str(error) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in came:
            hint = "SSL_CERT_FILE names the certificates of an authority of your own"
        elif self._revive is not None:
            hint = "`vmlab serve --stop` ends it, and the next command starts another one"
        elif self.address.socket is not None:
            hint = f"`vmlab serve --socket {self.address.socket}` serves there"
        else:
            hint = "is the address right, and does `vmlab serve` run there?"
        return Unreachable(f"the manager at {self.address} does not answer: {came}", hint=hint)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def _seconds(retry_after: str) -> float:
    """How long a manager that is asked too much wants to be left alone (RFC 9110, 10.2.3)."""
    return min(float(retry_after), _LONGEST) if retry_after.isdecimal() else 1.0


def _given(
    query: Mapping[str, str | int | float | bool | None] | None,
) -> dict[str, str | int | float | bool] | None:
    if query is None:
        return None
    return {name: value for name, value in query.items() if value is not None}
