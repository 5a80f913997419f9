"""That a change was asked for by a person on a page of ours.

The service's gate (`vmlab.manager.api.gate`) finds out who asks and refuses other sites' pages.
Pages are stricter than programs: what asks for a change has to say that it is a page of ours
(Origin, RFC 6454; Sec-Fetch-Site, Fetch Metadata), and where there are tokens, each form has a word
that only pages of its token know.
"""

from __future__ import annotations

import hmac
import secrets
from typing import Final

from starlette.requests import HTTPConnection

from vmlab.manager.api.problems import Forbidden
from vmlab.manager.api.security import presented, refuse_other_sites

__all__ = ["CSRF_FIELD", "Guard"]

CSRF_FIELD: Final = "csrf"
_HINT: Final = "use the page that this service itself shows; programs use /v1"


class Guard:
    """Tells pages of ours from others; each process knows its own."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def word(self, connection: HTTPConnection) -> str:
        """What forms of this connection's token have to hold; empty where it shows none."""
        token, _ = presented(connection.headers)
        return "" if token is None else hmac.digest(self._key, token.encode(), "sha256").hex()

    def refuse_other_pages(self, connection: HTTPConnection) -> None:
        """Let pass only what a page of this origin asked for; for changes and WebSockets.

        Raises:
            Forbidden: Another site's page asked, or what is no browser and does not say.
        """
        method = connection.scope.get("method", "")
        refuse_other_sites(connection.scope["type"], method, connection.headers, local=False)
        fetched = connection.headers.get("sec-fetch-site")
        if fetched not in (None, "same-origin"):
            raise Forbidden(f"the request comes from another site ({fetched})", hint=_HINT)
        if fetched is None and "origin" not in connection.headers:
            raise Forbidden("the request does not say which page it comes from", hint=_HINT)

    def refuse_other_words(self, connection: HTTPConnection, said: str) -> None:
        """Let pass only a form that came from a page of the same token.

        Raises:
            Forbidden: It has another word, or none.
        """
        if not hmac.compare_digest(self.word(connection).encode(), said.encode()):
            raise Forbidden(
                "the form is of another session, or older than this service",
                hint="load the page anew and try again",
            )
