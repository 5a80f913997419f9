"""What every request passes, whatever it asks for: the gate in front of all routes.

Pure ASGI 3, so that event streams and WebSockets pass as they are. In this order: the request gets
its id; who asks is found out and may be refused; the body is counted as it comes; what came of it
is logged and counted. A mistake of the manager's own becomes a problem without a traceback, which
is in the log under the same id.
"""

from __future__ import annotations

import re
import time
import uuid
from http import HTTPStatus
from typing import Any, Final

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vmlab.machine.errors import VmlabError
from vmlab.manager.api.limits import Limits, TokenBucket
from vmlab.manager.api.logs import logger
from vmlab.manager.api.meters import Meters
from vmlab.manager.api.problems import BadRequest, TooLarge, Unauthenticated, response_of
from vmlab.manager.api.security import (
    LOCAL,
    NOBODY,
    Authenticator,
    Principal,
    presented,
    refuse_other_sites,
    required_scope,
)

__all__ = ["Gate", "MistakeOfOurs"]

REQUEST_ID: Final = "X-Request-Id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
"""What browsers are told with every answer that says nothing else."""

_UPLOAD = re.compile(r"/v1/(machines/[^/]+/files|(images|exports)/[^/]+)")
"""Paths whose PUT is a file or a tree, and no document."""

_PUBLIC: Final = frozenset({"/", "/ui", "/health", "/openapi.json", "/openapi.yaml"})
_PUBLIC_BELOW: Final = ("/ui/",)
"""What says nothing about anybody's machines; and the page, which has people log in by itself."""


class MistakeOfOurs(VmlabError):
    """Something in the manager went wrong that should not have; the log has the traceback."""


class Gate:
    """Lets requests through to `app`, or not.

    Args:
        app: What is behind it.
        authenticator: Finds out whose a token is; None lets everybody in who gets here.
        limits: How much is taken of one client.
        meters: Counts requests.
        rate: Requests per second of one client; None is any number.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        authenticator: Authenticator | None,
        limits: Limits,
        meters: Meters,
        rate: float | None,
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._limits = limits
        self._meters = meters
        self._bucket = TokenBucket(rate) if rate is not None else None
        self._failures = TokenBucket(limits.failures)
        self._log = logger("api")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get(REQUEST_ID, "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        answer = _Answer(scope, send, request_id)
        begun = time.perf_counter()
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                state["principal"] = await self._admit(scope, headers)
                await self._app(scope, self._counted(scope, headers, receive), answer.send)
            except VmlabError as error:
                await self._refuse(scope, receive, answer, error)
            except HTTPException as error:
                # Only from `_counted`, where nothing was there to catch it.
                await self._refuse(scope, receive, answer, TooLarge(str(error.detail)))
            except Exception:
                self._log.exception("a request failed", path=scope["path"])
                mistake = MistakeOfOurs(
                    "the manager made a mistake; its log says which",
                    hint=f"look for {request_id} in the manager's log, and report it",
                )
                await self._refuse(scope, receive, answer, mistake)
            finally:
                self._note(scope, answer, time.perf_counter() - begun)

    async def _admit(self, scope: Scope, headers: Headers) -> Principal:
        """Who asks, if they may ask this.

        Raises:
            VmlabError: they may not, not so fast, or it is no request.
        """
        path: str = scope["path"]
        kind: str = scope["type"]
        method: str = scope.get("method", "")
        if "\0" in path or b"%00" in scope.get("query_string", b""):
            raise BadRequest("a NUL in the address", hint="no name or id has one")
        client = scope["client"][0] if scope.get("client") else "local"
        if self._authenticator is None:
            refuse_other_sites(kind, method, headers, local=scope.get("client") is not None)
            principal = LOCAL
        else:
            principal = await self._identified(path, client, kind, method, headers)
        if self._bucket is not None:
            self._bucket.take(principal.token or client)
        return principal

    async def _identified(
        self, path: str, client: str, kind: str, method: str, headers: Headers
    ) -> Principal:
        assert self._authenticator is not None
        public = path in _PUBLIC or path.startswith(_PUBLIC_BELOW)
        try:
            token, browser = presented(headers)
            if token is None and not public:
                raise Unauthenticated(
                    "this takes a token",
                    hint='send "Authorization: Bearer TOKEN"; `vmlab token create`, where the '
                    "manager runs, makes one",
                )
            principal = NOBODY
            if token is not None:
                principal = await self._authenticator.principal(token)
        except Unauthenticated:
            self._failures.take(client)
            if not public:
                raise
            # A cookie that is no good any more must not keep anybody from logging in anew.
            return NOBODY
        if browser:
            refuse_other_sites(kind, method, headers, local=False)
        if not public:
            principal.need(required_scope(kind, method, path), f"{method or 'WebSocket'} {path}")
        return principal

    def _counted(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """`receive` that refuses a body of too many bytes, told or untold."""
        if scope["type"] != "http":
            return receive
        upload = scope["method"] == "PUT" and _UPLOAD.fullmatch(scope["path"])
        most = self._limits.upload if upload else self._limits.body
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > most:
                    raise HTTPException(
                        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                        f"the body has more than {most} bytes",
                    )
            return message

        said = headers.get("content-length", "")
        if said.isdigit() and len(said) < 20 and int(said) > most:
            raise TooLarge(f"the body has {said} bytes; {most} are taken")
        return counted

    async def _refuse(
        self, scope: Scope, receive: Receive, answer: _Answer, error: VmlabError
    ) -> None:
        """Tell why not, if nothing was told yet."""
        if answer.begun:
            if scope["type"] == "http":
                # Half an answer must not look like a whole one.
                raise ConnectionAbortedError(str(error))
            return
        status = HTTPStatus.INTERNAL_SERVER_ERROR if isinstance(error, MistakeOfOurs) else None
        reply = response_of(
            error,
            instance=scope["path"],
            request_id=scope["state"]["request_id"],
            status=status,
        )
        if scope["type"] == "websocket" and "websocket.http.response" not in (
            scope.get("extensions") or {}
        ):
            await answer.send({"type": "websocket.close", "code": 1008, "reason": str(error)[:120]})
            return
        await reply(scope, receive, answer.send)

    def _note(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "(none)"
        method = scope.get("method", "WEBSOCKET")
        status = str(answer.status or 0)
        self._meters.requests.labels(method, route, status).inc()
        state: dict[str, Any] = scope["state"]
        if scope["type"] == "http" and not state.get("streaming"):
            self._meters.seconds.labels(method, route).observe(seconds)
        principal = state.get("principal")
        self._log.info(
            "request",
            method=method,
            path=scope["path"],
            status=answer.status,
            milliseconds=round(seconds * 1000, 2),
            actor=principal.name if principal is not None else None,
            client=scope["client"][0] if scope.get("client") else None,
            operation=state.get("operation"),
        )


class _Answer:
    """What is sent back, with what every answer carries."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self._scope = scope
        self._send = send
        self._request_id = request_id
        self.status: int | None = None
        self.begun = False

    async def send(self, message: Message) -> None:
        """Send one message on."""
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            self.begun = True
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[REQUEST_ID] = self._request_id
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        elif message["type"] == "websocket.accept":
            self.begun = True
            self.status = HTTPStatus.SWITCHING_PROTOCOLS
        await self._send(message)
