"""Who asks, and what they may do: tokens of three scopes, by their hashes.

A token is 256 random bits, so its SHA-256 needs no salt and no slow hash: nothing can be guessed
from it. On the unix socket the file's permissions are the authentication, and nothing here is
asked. A browser shows its token in a cookie that no script and no other site can use (RFC 6265bis,
SameSite=Strict; the page's login sets it), and what it changes has to come from the manager's own
pages.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timedelta
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from starlette.datastructures import Headers

from vmlab.machine.errors import ResourceNotFound
from vmlab.machine.fields import Name
from vmlab.manager.api.problems import Forbidden, Unauthenticated
from vmlab.manager.store.failures import Conflict
from vmlab.manager.store.tables import TokenRow, UserRow, now

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from vmlab.manager.store.database import Database

__all__ = [
    "COOKIE",
    "LOCAL",
    "NOBODY",
    "Authenticator",
    "IssuedToken",
    "NewToken",
    "Principal",
    "Scope",
    "TokenDocument",
    "issue",
    "list_tokens",
    "presented",
    "refuse_other_sites",
    "required_scope",
    "revoke",
]

Scope = Literal["read", "operate", "admin"]
_RANK: Final[dict[str, int]] = {"read": 0, "operate": 1, "admin": 2}

COOKIE: Final = "vmlab-token"
"""The cookie that a browser shows its token in."""

_PREFIX: Final = "vml_"
"""What a token begins with, so that secret scanners and people know one when they see it."""

_TRUSTED_SECONDS: Final = 5.0
"""How long a token that was found valid is not looked up again; a revoked one dies no later."""
_USED_EVERY: Final = timedelta(minutes=1)
_MOST_TRUSTED: Final = 1024

_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a user by a token, or whoever may open the socket.

    Args:
        name: Of the user; "local" on the socket.
        scope: The most that they may do.
        token: Id of the token, if there is one.
    """

    name: str
    scope: Scope
    token: str | None = None

    @property
    def actor(self) -> str:
        """The name under which it is written down what they did."""
        return self.name

    def need(self, scope: Scope, what: str) -> None:
        """Go on only if they may do what takes `scope`.

        Raises:
            Forbidden: saying which scope it takes.
        """
        if _RANK[self.scope] < _RANK[scope]:
            raise Forbidden(
                f"{what} takes a token of the scope {scope!r}; {self.name}'s is {self.scope!r}",
                hint=f"`vmlab token create --scope {scope}`, where the manager runs, makes one",
            )


LOCAL: Final = Principal("local", "admin")
"""Whoever may open the manager's socket."""

NOBODY: Final = Principal("nobody", "read")
"""Who shows no token, where that is allowed: at what says nothing about anybody's machines."""


class TokenDocument(BaseModel):
    """A token, without the token itself: that is told once, when it is made."""

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    user: str
    scope: Scope
    created: datetime
    expires: datetime | None = None
    last_used: datetime | None = None


class NewToken(BaseModel):
    """A token that is to be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name = Field(description="what it is for")
    user: Name = Field("admin", description="whose it is; a new name is a new user")
    scope: Scope = "operate"
    expires_in: Annotated[timedelta, Field(gt=timedelta(0), le=timedelta(days=3650))] | None = (
        Field(None, description="how long it is good for; for ever if left out")
    )


class IssuedToken(TokenDocument):
    """A new token, with what has to be kept secret."""

    token: str = Field(description="the token itself, told this once")


def hashed(token: str) -> str:
    """What the store has of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def _document(row: TokenRow) -> TokenDocument:
    return TokenDocument(
        id=row.id,
        name=row.name,
        user=row.user.name,
        scope=row.scope,
        created=row.created,
        expires=row.expires,
        last_used=row.last_used,
    )


def issue(session: Session, wanted: NewToken) -> IssuedToken:
    """Make a token; a user of that name is made if there is none.

    Raises:
        Conflict: the user has a valid token of that name.
    """
    user = session.scalar(select(UserRow).where(UserRow.name == wanted.user))
    if user is None:
        user = UserRow(name=wanted.user)
        session.add(user)
        session.flush()
    if user.disabled:
        raise Conflict(f"user {user.name!r} is disabled", hint="make the token for another user")
    taken = session.scalar(
        select(TokenRow.id).where(
            TokenRow.user_id == user.id, TokenRow.name == wanted.name, TokenRow.revoked.is_(None)
        )
    )
    if taken is not None:
        raise Conflict(
            f"{user.name} has a token {wanted.name!r} already",
            hint=f"revoke it first (`vmlab token revoke {taken}`), or choose another name",
        )
    token = _PREFIX + secrets.token_urlsafe(32)
    row = TokenRow(
        user=user,
        name=wanted.name,
        hash=hashed(token),
        scope=wanted.scope,
        expires=now() + wanted.expires_in if wanted.expires_in is not None else None,
    )
    session.add(row)
    session.flush()
    return IssuedToken(**_document(row).model_dump(), token=token)


def list_tokens(session: Session) -> list[TokenDocument]:
    """The tokens that were not revoked, by user and name."""
    rows = session.scalars(
        select(TokenRow)
        .join(TokenRow.user)
        .where(TokenRow.revoked.is_(None))
        .order_by(UserRow.name, TokenRow.name, TokenRow.id)
    )
    return [_document(row) for row in rows]


def revoke(session: Session, token: str) -> None:
    """Have a token be good for nothing from now on.

    Raises:
        ResourceNotFound: there is no such token.
    """
    row = session.get(TokenRow, token)
    if row is None or row.revoked is not None:
        raise ResourceNotFound(
            f"there is no token {token!r}", hint="`vmlab token list` tells the ids"
        )
    row.revoked = now()


def _principal(session: Session, digest: str) -> Principal | None:
    row = session.scalar(select(TokenRow).where(TokenRow.hash == digest))
    moment = now()
    if row is None or row.revoked is not None or row.user.disabled:
        return None
    if row.expires is not None and row.expires <= moment:
        return None
    scope: Scope = next(one for one in ("read", "operate", "admin") if one == row.scope)
    return Principal(row.user.name, scope, row.id)


def _note_use(session: Session, token: str) -> None:
    row = session.get(TokenRow, token)
    moment = now()
    if row is not None and (row.last_used is None or moment - row.last_used > _USED_EVERY):
        row.last_used = moment


class Authenticator:
    """Finds out whose a token is, and remembers it for a few seconds."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._trusted: OrderedDict[str, tuple[float, Principal]] = OrderedDict()

    async def principal(self, token: str) -> Principal:
        """Whose token it is.

        Raises:
            Unauthenticated: it is nobody's.
        """
        digest = hashed(token)
        known = self._trusted.get(digest)
        if known is not None and time.monotonic() < known[0]:
            return known[1]
        self._trusted.pop(digest, None)
        found = await self._database.read(_principal, digest)
        if found is None:
            raise Unauthenticated(
                "the token is not valid: it is unknown, revoked or has expired",
                hint="`vmlab token create`, where the manager runs, makes one",
            )
        assert found.token is not None
        await self._database.write(_note_use, found.token)
        self._trusted[digest] = time.monotonic() + _TRUSTED_SECONDS, found
        while len(self._trusted) > _MOST_TRUSTED:
            self._trusted.popitem(last=False)
        return found

    def forget(self) -> None:
        """Look every token up again: one was revoked."""
        self._trusted.clear()


def presented(headers: Headers) -> tuple[str | None, bool]:
    """The token that a request shows, if any, and whether a browser did so by itself, as a cookie.

    Raises:
        Unauthenticated: it says who it is in a way that is not known here.
    """
    said = headers.get("authorization")
    if said is not None:
        scheme, _, token = said.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated(
                "the Authorization header has no bearer token",
                hint='send "Authorization: Bearer TOKEN" (RFC 6750)',
            )
        return token.strip(), False
    jar: SimpleCookie = SimpleCookie()
    try:
        jar.load(headers.get("cookie", ""))
    except CookieError:
        return None, False
    return (jar[COOKIE].value, True) if COOKIE in jar else (None, False)


def required_scope(kind: str, method: str, path: str) -> Scope:
    """The scope that a request takes, by what it is; routes may ask for more.

    Args:
        kind: "http" or "websocket".
        method: HTTP's method; "" for a WebSocket.
        path: The path asked for.
    """
    if path == "/v1/tokens" or path.startswith("/v1/tokens/"):
        return "admin"
    if kind == "http" and method in _SAFE_METHODS:
        return "read"
    return "operate"


def refuse_other_sites(kind: str, method: str, headers: Headers, *, local: bool) -> None:
    """Refuse what a page of another site has a browser ask for.

    Args:
        kind: "http" or "websocket".
        method: HTTP's method.
        headers: Of the request.
        local: Nobody has to say who they are, and it came over TCP: then the name that the manager
            is called by has to be this host's own, or a name that another site has pointed here
            would do (DNS rebinding).

    Raises:
        Forbidden: it is such a request.
    """
    host = headers.get("host", "")
    origin = headers.get("origin")
    if origin is not None and (kind == "websocket" or method not in _SAFE_METHODS):
        try:
            same = urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:
            same = False
        if not same:
            raise Forbidden(
                f"a page of {origin} asked, which is not the manager's own",
                hint="open the manager's own page",
            )
    if local and not _is_this_host(host):
        raise Forbidden(
            f"the manager is not known as {host!r}",
            hint="call it localhost or by its address, or have it ask for tokens",
        )


def _is_this_host(host: str) -> bool:
    """Whether a Host header is an address, or the one name that cannot be led elsewhere."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
