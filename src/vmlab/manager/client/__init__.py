"""The manager's client: `Client` for programs that wait, `AsyncClient` for those that `await`.

Not the service, which `vmlab.manager.api` is. What goes in and comes out are the models of
`vmlab.manager.requests` and `vmlab.manager.documents`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmlab.manager.client.asynchronous import AsyncClient
from vmlab.manager.client.replies import Unreachable

if TYPE_CHECKING:
    from vmlab.manager.client.blocking import Client

__all__ = ["AsyncClient", "Client", "Unreachable"]


def __getattr__(name: str) -> object:
    # A program that awaits has no need of a loop in a thread, nor of what that needs.
    if name == "Client":
        from vmlab.manager.client.blocking import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
