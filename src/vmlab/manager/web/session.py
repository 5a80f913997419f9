"""Logging in and out: a browser shows its token as a cookie that no script can read."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from vmlab.machine.errors import VmlabError
from vmlab.manager.api.problems import Unauthenticated, status_of
from vmlab.manager.api.security import COOKIE
from vmlab.manager.web.forms import Form, read_form
from vmlab.manager.web.rendering import headers, render
from vmlab.manager.web.visit import HOME, Pages

if TYPE_CHECKING:
    from vmlab.manager.api.service import Service

__all__ = ["routes"]


def routes(pages: Pages) -> list[BaseRoute]:
    """The routes of it; nobody has to be known for these."""

    async def form(request: Request) -> Response:
        return _form(request.query_params.get("next", ""))

    async def login(request: Request) -> Response:
        service: Service = request.app.state.service
        filled = Form()
        try:
            pages.guard.refuse_other_pages(request)
            filled = await read_form(request)
            token = filled.raw("token").strip()
            if not token:
                raise Unauthenticated("no token was given")
            if service.authenticator is not None:
                await service.authenticator.principal(token)
        except VmlabError as error:
            return _form(filled.raw("next"), wrong=error)
        reply = RedirectResponse(_inside(filled.raw("next")), HTTPStatus.SEE_OTHER, headers())
        reply.set_cookie(
            COOKIE,
            token,
            path="/",
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return reply

    async def logout(request: Request) -> Response:
        try:
            pages.guard.refuse_other_pages(request)
        except VmlabError as error:
            return _form("", wrong=error)
        reply = RedirectResponse("/ui/login", HTTPStatus.SEE_OTHER, headers())
        reply.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return reply

    return [
        Route("/ui/login", form, methods=["GET"]),
        Route("/ui/login", login, methods=["POST"]),
        Route("/ui/logout", logout, methods=["POST"]),
    ]


def _inside(address: str) -> str:
    """A page of ours to go on with: never another site's."""
    parts = urlsplit(address)
    inside = not parts.scheme and not parts.netloc and parts.path.startswith("/ui/")
    return parts.path if inside and "\\" not in address else HOME


def _form(after: str, wrong: VmlabError | None = None) -> Response:
    context = {"here": "/ui/login", "next": _inside(after), "wrong": wrong and str(wrong)}
    status = 200 if wrong is None else status_of(wrong)
    return HTMLResponse(render("login", context), status, headers())
