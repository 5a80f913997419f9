"""Talking to the manager from a command: the one of VMLAB_URL, or the home's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from vmlab.machine.errors import VmlabError

if TYPE_CHECKING:
    from vmlab.manager.client import AsyncClient

__all__ = ["ExtraMissing", "ask", "extra"]

T = TypeVar("T")

_EXTRA: Final = frozenset(
    {
        "alembic",
        "fastapi",
        "httpx",
        "prometheus_client",
        "psycopg",
        "pyroute2",
        "sqlalchemy",
        "starlette",
        "structlog",
        "uvicorn",
        "websockets",
    }
)
"""What the extras `manager` and `postgres` bring."""


class ExtraMissing(VmlabError):
    """A command needs packages that are not installed with vmlab alone."""

    exit_code = 4


@contextmanager
def extra() -> Iterator[None]:
    """Say what to install where one of the manager's packages is missing.

    Raises:
        ExtraMissing: one is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        which = "manager,postgres" if package == "psycopg" else "manager"
        raise ExtraMissing(
            f"the manager needs {package}, which is not installed",
            hint=f"pip install 'vmlab[{which}]'",
        ) from error


def ask(body: Callable[[AsyncClient], Coroutine[Any, Any, T]]) -> T:
    """Call `body` with a client of the manager, and return what it returns.

    Raises:
        ExtraMissing: the manager's packages are not installed.
        VmlabError: what the manager, or `body`, raised.
    """
    with extra():
        from vmlab.manager.client import AsyncClient

        async def asking() -> T:
            async with AsyncClient.connect() as client:
                return await body(client)

        return asyncio.run(asking())
