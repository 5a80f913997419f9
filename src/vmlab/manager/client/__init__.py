"""The manager's client: `Client` for programs that wait, `AsyncClient` for those that `await`.

Not the service, which `vmlab.manager.api` is. What goes in and comes out are the models of
`vmlab.manager.requests` and `vmlab.manager.documents`.
"""

from __future__ import annotations

from vmlab.manager.client.asynchronous import AsyncClient
from vmlab.manager.client.blocking import Client
from vmlab.manager.client.replies import Unreachable
from vmlab.manager.client.streams import Exit, RemoteCommand, RemoteConsole

__all__ = ["AsyncClient", "Client", "Exit", "RemoteCommand", "RemoteConsole", "Unreachable"]
