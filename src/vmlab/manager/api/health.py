"""`/health`: whether every part of the manager works, and which does not. VMAN's form (`checks`).

200 if all that the manager itself consists of works; 503 if not. A hypervisor that this host does
not have is told and is no failure, unlike VMAN's: machines run on the others.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Row, select

from vmlab.manager.store.tables import HostRow

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from vmlab.manager.manager import Manager

__all__ = ["Health", "health", "is_running"]

_SECONDS: Final = 10.0
"""How long the store may take to answer before it is taken to be out of order."""
_LEAST_FREE: Final = 64 << 20
"""Bytes without which neither the store nor a disk can be written."""


class Health(BaseModel):
    """How the manager is, part by part; if it is out of order, a problem's fields stand beside."""

    model_config = ConfigDict(frozen=True, extra="allow")

    status: Literal["ok", "degraded"]
    service: str = "vmlab"
    checks: dict[str, str] = Field(description='what each part is: "ok", or what is wrong with it')


async def health(manager: Manager) -> Health:
    """Look at every part."""
    checks: dict[str, str] = {}
    failing: list[str] = []

    def note(part: str, found: str, *, works: bool) -> None:
        checks[part] = found
        if not works:
            failing.append(part)

    hosts: Sequence[Row[str, bool, str, str]] = ()
    try:
        async with asyncio.timeout(_SECONDS):
            hosts = await manager.database.read(_hosts)
    except TimeoutError:
        note("database", f"error: no answer within {_SECONDS:g} s", works=False)
    except Exception as error:
        # Whatever it is, it is what is wrong with the store.
        note("database", f"error: {error}", works=False)
    else:
        note("database", "ok", works=True)

    trouble = _trouble_with_storage(manager)
    note("storage", trouble or "ok", works=not trouble)
    for part in ("operator", "observer"):
        running = is_running(manager, part)
        note(part, "running" if running else "stopped", works=running)
    for host in hosts:
        if not host.available:
            checks[f"host:{host.name}"] = f"not available: {host.reason}"
        elif host.breaker == "open":
            checks[f"host:{host.name}"] = "left alone after failures"
        else:
            checks[f"host:{host.name}"] = "ok"
    for program, part in (("qemu-system-x86_64", "qemu"), ("qemu-img", "qemu-img")):
        checks[part] = "available" if shutil.which(program) else "not found"
    if not failing:
        return Health(status="ok", checks=checks)
    first = failing[0]
    return Health(
        status="degraded",
        checks=checks,
        kind="HypervisorUnavailable",
        title="Service Unavailable",
        detail=f"{first}: {checks[first]}",
        message=f"the manager is out of order: {first}: {checks[first]}",
        hint="look at the manager's log",
        failing=failing,
    )


def _hosts(session: Session) -> Sequence[Row[str, bool, str, str]]:
    """What is known of each host, without what is taken of it."""
    columns = (HostRow.name, HostRow.available, HostRow.reason, HostRow.breaker)
    return session.execute(select(*columns).order_by(HostRow.name)).all()


def is_running(manager: Manager, part: str) -> bool:
    """Whether a part of the manager is there and does what it is there for."""
    found = getattr(manager, part, None)
    return found is not None and bool(found.running)


def _trouble_with_storage(manager: Manager) -> str:
    """Why nothing can be kept in the manager's directory; empty where it can."""
    directory = manager.settings.directory
    if not os.access(directory, os.W_OK | os.X_OK):
        return "error: not accessible"
    free = shutil.disk_usage(directory).free
    return f"error: {free >> 20} MiB free" if free < _LEAST_FREE else ""
