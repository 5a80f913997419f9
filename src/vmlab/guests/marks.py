"""A stream of bytes in which marks stand: a command's output, and what is told of the command.

A mark is a line that begins with a random token; it may begin anywhere, also behind output that
ends without a newline.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable

from vmlab.guests.command import Sink


class MarkedStream:
    """Bytes up to the next mark, and the next; a wait for one can be cancelled and repeated.

    Args:
        read: The next bytes; b"" when there will be none.
    """

    def __init__(self, read: Callable[[], Awaitable[bytes]]) -> None:
        self._read = read
        self._held = b""

    async def until(self, mark: bytes, sink: Sink | None = None) -> bytes | None:
        """Give what comes before `mark` to `sink`; returns the rest of the mark's line.

        None if the stream ends first; all of it has then been given to `sink`.
        """
        while True:
            held = self._held
            position = held.find(mark)
            if position < 0:
                position = _safe_length(held, mark)
            elif b"\n" in held[position:]:
                line, _, self._held = held[position + len(mark) :].partition(b"\n")
                if sink is not None and position:
                    await sink(held[:position])
                return line.strip()
            self._held = held[position:]
            if sink is not None and position:
                await sink(held[:position])
            data = await self._read()
            if not data:
                held, self._held = self._held, b""
                if sink is not None and held:
                    await sink(held)
                return None
            self._held += data


def _safe_length(held: bytes, mark: bytes) -> int:
    """How many bytes of `held`, in which `mark` is not, cannot be the beginning of it."""
    # The first that may be: a mark that repeats its first byte begins anew within itself.
    start = held.find(mark[:1], max(0, len(held) - len(mark) + 1))
    while start >= 0 and not mark.startswith(held[start:]):
        start = held.find(mark[:1], start + 1)
    return len(held) if start < 0 else start


async def blocks(given: bytes | AsyncIterable[bytes] | None) -> AsyncIterator[bytes]:
    """A command's input, however it is given."""
    if isinstance(given, bytes):
        yield given
    elif given is not None:
        async for block in given:
            yield block
