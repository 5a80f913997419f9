"""Replies that come piece by piece: event streams, and files of guests.

Not for WebSockets: those are `vmlab.manager.api.sockets`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

__all__ = ["EVENT_STREAM", "of_type", "streamed"]

EVENT_STREAM: Final = "text/event-stream"
"""Server-sent events (HTML, 9.2)."""


def of_type(media_type: str, what: str) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI is told of a reply that is a file, for a route's `responses`."""
    schema = {"schema": {"type": "string", "format": "binary"}}
    return {200: {"description": what, "content": {media_type: schema}}}


async def streamed(
    request: Request,
    pieces: AsyncGenerator[bytes],
    *,
    media_type: str,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A reply of pieces, the first of which is made before it begins.

    Args:
        request: What it is the reply to.
        pieces: At least one. What they hold is let go when they are closed, and that they are
            whatever becomes of the reply: who asked may have gone before its first byte.
        media_type: Of all of them together.
        headers: More headers.

    Raises:
        VmlabError: what the first piece raised, while that can still be answered.
    """
    first = await anext(pieces)
    request.state.streaming = True
    told = dict(headers or {})
    if media_type == EVENT_STREAM:
        # nginx would collect the stream before it hands it on.
        told["X-Accel-Buffering"] = "no"
    return _Streamed(first, pieces, media_type, told)


class _Streamed(StreamingResponse):
    def __init__(
        self,
        first: bytes,
        pieces: AsyncGenerator[bytes],
        media_type: str,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(_after(first, pieces), headers=headers, media_type=media_type)
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, as far as somebody takes them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._pieces.aclose()


async def _after(first: bytes, pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    yield first
    async for piece in pieces:
        yield piece
