"""One request to the page, from its arrival to the reply: who asks, what they get, what went wrong.

A handler is a coroutine of a `Visit` that returns a reply or raises a VmlabError, which becomes a
page, or a part of one, in the words of the error.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar
from urllib.parse import quote, urlsplit

from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from vmlab.machine.errors import InvalidSpec, VmlabError
from vmlab.manager.api.problems import request_id_of, status_of
from vmlab.manager.api.security import NOBODY, Principal, Scope
from vmlab.manager.documents import OperationDocument
from vmlab.manager.requests import Request
from vmlab.manager.web.forms import Form, by_field, read_form
from vmlab.manager.web.protection import CSRF_FIELD, Guard
from vmlab.manager.web.rendering import REGION, headers, render

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from vmlab.manager.manager import Manager

__all__ = ["HOME", "Handler", "Pages", "Visit", "login_address", "nonce", "problems_of"]

P = ParamSpec("P")
R = TypeVar("R")

HOME: Final = "/ui/machines"
"""The page that everybody begins with."""

Handler = Callable[["Visit"], Awaitable[Response]]

_ALWAYS: Final = ("operation",)
"""What every page is told of: an operation that was begun on it is shown until it ends."""


class Visit:
    """A request, and what its handler needs to answer it.

    `latest` is the number of the last event before anything was read for the reply: what happens
    after it, the page is told.
    """

    def __init__(
        self, request: HttpRequest, manager: Manager, guard: Guard, principal: Principal
    ) -> None:
        self.request = request
        self.manager = manager
        self.guard = guard
        self.principal = principal
        self.form = Form()
        self.latest = manager.database.events.latest()
        self.partial = request.headers.get("hx-request") == "true"
        """Whether a part of a page is asked for by its script."""

    # -------------------------------------------------------------------- what is asked

    def path(self, name: str) -> str:
        """A part of the path that was asked for."""
        return str(self.request.path_params[name])

    def query(self, name: str) -> str | None:
        """A field of the query; None where it is empty or not there."""
        return self.request.query_params.get(name, "").strip() or None

    def filters(self, *names: str) -> dict[str, str | None]:
        """What a list is filtered by, and which page of it is asked for."""
        return {name: self.query(name) for name in (*names, "cursor")}

    def may(self, scope: Scope) -> bool:
        """Whether who asks may do what takes that scope."""
        order = ("read", "operate", "admin")
        return order.index(self.principal.scope) >= order.index(scope)

    async def read(
        self, fn: Callable[Concatenate[Session, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """`fn(session, ...)` on the store."""
        return await self.manager.database.read(fn, *args, **kwargs)

    async def submit(self, change: Request) -> OperationDocument:
        """Ask for a change.

        Raises:
            VmlabError: It cannot work.
        """
        return await self.manager.operator.submit(
            change, actor=self.principal.name, request_id=request_id_of(self.request)
        )

    # -------------------------------------------------------------------- what is replied

    def page(
        self,
        template: str,
        *,
        status: int = 200,
        topics: tuple[str, ...] = (),
        style_nonce: str | None = None,
        **context: Any,
    ) -> Response:
        """A page, or its live region alone if a script asks for it.

        Args:
            template: Name of its template.
            status: Of the reply.
            topics: Nouns whose events concern it: "machine", "disk".
            style_nonce: As for `headers`.
            context: What it tells.
        """
        block = REGION if self.partial and self.request.method == "GET" else None
        text = render(
            template,
            self._context(topics=(*topics, *_ALWAYS), style_nonce=style_nonce) | context,
            block=block,
        )
        return HTMLResponse(text, status, headers(style_nonce=style_nonce))

    def part(self, template: str, *, status: int = 200, **context: Any) -> Response:
        """A part of a page, from a template of its own."""
        return HTMLResponse(render(template, self._context() | context), status, headers())

    def went_on(self, operation: OperationDocument, back: str) -> Response:
        """The reply to a change that was asked for: what becomes of it, where it was asked for.

        Args:
            operation: What became of the request.
            back: The page to go on with where there are no scripts.
        """
        if self.partial:
            return self.part("said", operation=operation, error=None)
        return self.see(back)

    def see(self, address: str) -> Response:
        """Have the browser go on with another page."""
        return RedirectResponse(address, HTTPStatus.SEE_OTHER, headers())

    def status_of(self, error: VmlabError) -> int:
        """The status of a reply that says why something cannot be done."""
        return status_of(error)

    def refused(self, error: VmlabError) -> Response:
        """What cannot be done, and why: beside what was asked for, or as a page."""
        status = status_of(error)
        if self.partial and self.request.method != "GET":
            return self.part("said", status=status, operation=None, error=error)
        return self.page("refused", status=status, error=error)

    def _context(self, **more: Any) -> dict[str, Any]:
        return {
            "here": self.request.url.path,
            "query": self.request.url.query,
            "latest": self.latest,
            "principal": self.principal,
            "tokens": bool(self.principal.token),
            "csrf": self.guard.word(self.request),
            "may_operate": self.may("operate"),
            "topics": _ALWAYS,
            "style_nonce": None,
            "problems": {},
            **more,
        }


def problems_of(error: InvalidSpec) -> dict[str, str]:
    """What is wrong with a form, by the name of its field."""
    return by_field(error.problems)


class Pages:
    """Makes routes of handlers: what holds for every request is seen to here."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.guard = Guard()

    def get(self, path: str, handler: Handler) -> Route:
        """A page that may be looked at."""

        async def looked_at(request: HttpRequest) -> Response:
            visit = self._visit(request)
            if visit is None:
                return _login(request)
            try:
                return await handler(visit)
            except VmlabError as error:
                return visit.refused(error)

        return Route(f"/ui{path}", looked_at, methods=["GET"], include_in_schema=False)

    def post(self, path: str, handler: Handler, *, scope: Scope = "operate") -> Route:
        """A change that may be asked for by a form."""

        async def asked_for(request: HttpRequest) -> Response:
            visit = self._visit(request)
            if visit is None:
                return _login(request)
            try:
                self.guard.refuse_other_pages(request)
                visit.form = await read_form(request)
                self.guard.refuse_other_words(request, visit.form.raw(CSRF_FIELD))
                visit.principal.need(scope, "this change")
                return await handler(visit)
            except VmlabError as error:
                return visit.refused(error)

        return Route(f"/ui{path}", asked_for, methods=["POST"], include_in_schema=False)

    def _visit(self, request: HttpRequest) -> Visit | None:
        """The visit of somebody who is known; None if it is nobody."""
        principal: Principal = request.state.principal
        if principal is NOBODY:
            return None
        return Visit(request, self.manager, self.guard, principal)


def _login(request: HttpRequest) -> Response:
    """Where somebody who is not known is sent."""
    if request.headers.get("hx-request") == "true":
        # The page that asked is one; what it would get is a part of one.
        where = urlsplit(request.headers.get("hx-current-url", "")).path
        return Response(
            status_code=HTTPStatus.UNAUTHORIZED,
            headers={**headers(), "HX-Redirect": login_address(where)},
        )
    where = request.url.path if request.method == "GET" else ""
    return RedirectResponse(login_address(where), HTTPStatus.SEE_OTHER, headers())


def login_address(after: str) -> str:
    """The page to log in by, which goes on with the page `after`."""
    return f"/ui/login?next={quote(after if after.startswith('/ui/') else HOME)}"


def nonce() -> str:
    """A word that style sheets of one reply are known by."""
    return secrets.token_urlsafe(18)
