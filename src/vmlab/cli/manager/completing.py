"""Completion of names in the shell: what the manager has, if it answers without being started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["completed"]

_SECONDS = 2.0
"""A shell that completes does not wait longer for its manager."""


def completed(noun: str) -> Callable[[str], list[str]]:
    """What completes the names of a noun of the client's, such as "machines"."""

    def names(incomplete: str) -> list[str]:
        try:
            found = _names(noun)
        except Exception:
            # Whatever is wrong is told by the command itself, not in the middle of a line.
            return []
        return [name for name in found if name.startswith(incomplete)]

    return names


def _names(noun: str) -> list[str]:
    from vmlab.manager.client import address
    from vmlab.manager.client.asynchronous import AsyncClient
    from vmlab.manager.client.sending import Sender

    async def asking() -> list[str]:
        # Without what starts a manager: a key that was pressed is no reason for a process.
        async with AsyncClient(Sender(address.find())) as client, asyncio.timeout(_SECONDS):
            page = await getattr(client, noun).page(limit=500)
            return [getattr(item, "name", None) or item.id for item in page.items]

    return asyncio.run(asking())
