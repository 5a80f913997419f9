"""Sending the state of one QEMU process to another: started, followed, cancelled.

Disks are not sent: both processes open the same files, and QEMU hands them over
(docs/devel/migration.rst). Where the files cannot be the same ones, the sender stops before it
hands over, and whoever called copies them then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qemu.memory import set_capabilities
from vmlab.hypervisors.qmp import QmpError
from vmlab.machine.errors import MigrationFailed

_POLL_S: Final = 0.05
_CANCEL_S: Final = 60.0
BANDWIDTH = 0
"""Bytes a second that a migration may take; 0 is no limit."""
SOCKET: Final = "migration.sock"
"""Where a process that waits for another's state listens, in its directory."""


async def listen(target: Emulator) -> str:
    """Have a process that waits for a state listen for it; returns the address to send it to."""
    await set_capabilities(target, x_ignore_shared=False, events=True)
    await target.execute("migrate-incoming", {"uri": f"unix:{SOCKET}"})
    # The directory that it works in: a short path, wherever that is.
    return f"unix:/proc/{target.process.pid}/cwd/{SOCKET}"


async def send(
    source: Emulator,
    uri: str,
    *,
    progress: Callable[[int, int], None],
    at_switchover: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Send the state to `uri`; the guest stands still here afterwards.

    Args:
        source: The process to send from.
        uri: Where to.
        progress: Told the bytes sent and those to send in all.
        at_switchover: Called when the guest stands still and its disks are flushed, before the
            other side may have them.

    Raises:
        MigrationFailed: it did not arrive, with QEMU's reason.
        MachineCrashed: the process ended.
    """
    await set_capabilities(
        source,
        x_ignore_shared=False,
        events=True,
        pause_before_switchover=at_switchover is not None,
    )
    await source.execute("migrate-set-parameters", {"max-bandwidth": BANDWIDTH})
    await source.execute("migrate", {"uri": uri})
    continued = False
    while True:
        found: dict[str, Any] = await source.execute("query-migrate")
        status = found.get("status")
        if "ram" in found:
            progress(int(found["ram"]["transferred"]), _total(found["ram"]))
        if status == "completed":
            return
        if status in {"failed", "cancelled", "cancelling"}:
            raise MigrationFailed(
                f"QEMU's migration {status}: {found.get('error-desc', 'it does not say why')}",
                hint="the machine runs on where it was",
                machine=source.machine,
                hypervisor="qemu",
                operation="migrate",
            )
        if status == "pre-switchover" and at_switchover is not None and not continued:
            await at_switchover()
            await source.execute("migrate-continue", {"state": "pre-switchover"})
            continued = True
        await asyncio.sleep(_POLL_S)


def _total(ram: dict[str, Any]) -> int:
    """Bytes to send in all: what was sent and what is left."""
    return int(ram["transferred"]) + int(ram["remaining"])


async def cancel(source: Emulator) -> None:
    """End a migration that is under way, and wait until it has ended."""
    await uninterrupted(_cancel(source))


async def _cancel(source: Emulator) -> None:
    if not source.running:
        return
    try:
        await source.execute("migrate_cancel")
    except QmpError:
        # None was under way.
        return
    async with asyncio.timeout(_CANCEL_S):
        while await _under_way(source):  # noqa: ASYNC110 (its event may have come already)
            await asyncio.sleep(_POLL_S)


async def _under_way(source: Emulator) -> bool:
    status = (await source.execute("query-migrate")).get("status")
    return status in {"setup", "active", "cancelling", "pre-switchover", "device"}
