"""WebSockets of the service (RFC 6455): one that is used by several tasks, and how it ends.

What goes wrong before a connection is accepted is told as HTTP does; afterwards as a last text
message {"error": record} of `VmlabError.to_record`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from vmlab.machine.errors import VmlabError

if TYPE_CHECKING:
    from vmlab.manager.api.service import Service

__all__ = ["Link", "linked", "until_first"]

_PIECE: Final = 1 << 20
"""Bytes of the largest message that is sent."""
_NORMAL: Final = 1000
_GOING_AWAY: Final = 1001
_INTERNAL_ERROR: Final = 1011
"""Close codes (RFC 6455, 7.4.1)."""

_GONE: Final = (WebSocketDisconnect, RuntimeError, OSError)
"""What sending to who has gone raises."""


class Left(Exception):
    """The other side has gone."""


class Link:
    """A WebSocket that was accepted."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._turn = asyncio.Lock()

    async def receive(self) -> bytes | str:
        """The next message.

        Raises:
            Left: the other side has gone.
        """
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise Left
        data: bytes | None = message.get("bytes")
        return data if data is not None else str(message.get("text") or "")

    async def send(self, data: bytes, *, stream: int | None = None) -> None:
        """Send bytes, with a byte in front that says of which stream they are.

        Raises:
            Left: the other side has gone.
        """
        mark = b"" if stream is None else bytes([stream])
        for start in range(0, len(data), _PIECE):
            async with self._turn:
                try:
                    await self._socket.send_bytes(mark + data[start : start + _PIECE])
                except _GONE as error:
                    raise Left from error

    async def tell(self, message: Mapping[str, object]) -> None:
        """Send a text message; who has gone is not told."""
        async with self._turn:
            with suppress(*_GONE):
                await self._socket.send_text(json.dumps(message, default=str))

    async def close(self, code: int = _NORMAL) -> None:
        """End it, if it has not ended."""
        if self._socket.application_state is WebSocketState.CONNECTED:
            with suppress(*_GONE):
                await self._socket.close(code)


@asynccontextmanager
async def linked(here: Service, socket: WebSocket) -> AsyncIterator[Link]:
    """Accept a connection; what goes wrong in the block is told, and it is closed afterwards.

    Raises:
        TooFast: too much is open already; it is not accepted.
    """
    with here.streams.place():
        socket.scope["state"]["streaming"] = True
        await socket.accept()
        here.meters.streams.inc()
        link = Link(socket)
        code = _NORMAL
        try:
            yield link
        except Left:
            pass
        except VmlabError as error:
            code = _INTERNAL_ERROR
            await link.tell({"error": error.to_record()})
        except BaseException:
            code = _INTERNAL_ERROR
            raise
        finally:
            here.meters.streams.dec()
            await link.close(_GOING_AWAY if here.closing.is_set() else code)


async def until_first(here: Service, *parts: Callable[[], Awaitable[object]]) -> int:
    """Do several things at once until one of them has ended, or the service ends.

    Returns:
        Which one ended, by its place; -1 if the service ends.

    Raises:
        Exception: what the first to end raised.
    """
    tasks = [asyncio.ensure_future(_run(part)) for part in parts]
    closing = asyncio.ensure_future(here.closing.wait())
    try:
        await asyncio.wait({*tasks, closing}, return_when=asyncio.FIRST_COMPLETED)
        for number, task in enumerate(tasks):
            if task.done():
                task.result()
                return number
        return -1
    finally:
        for each in (*tasks, closing):
            each.cancel()
        await asyncio.wait({*tasks, closing})
        for task in tasks:
            if not task.cancelled():
                task.exception()  # seen: the first one that ended says what happened


async def _run(part: Callable[[], Awaitable[object]]) -> None:
    await part()
