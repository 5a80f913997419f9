"""The manager: its parts, put together, and their life from `open` to `close`.

Parts know each other through it. Its machines outlive it: `close` lets go of them, and the next one
finds them again.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from vmlab.hypervisors.base import Machine
from vmlab.hypervisors.locks import POLL_S, FileLock
from vmlab.machine.errors import VmlabError
from vmlab.manager.guests import Guests
from vmlab.manager.networks.networks import Networks
from vmlab.manager.observer.observer import Observer
from vmlab.manager.operator import handlers as _handlers  # registers the kinds of requests
from vmlab.manager.operator.exports import clear_exports
from vmlab.manager.operator.hosts import Hosts
from vmlab.manager.operator.operator import Operator
from vmlab.manager.operator.placement import placed
from vmlab.manager.operator.recovery import hosts_with_machines
from vmlab.manager.operator.schedules import Schedules
from vmlab.manager.settings import Settings
from vmlab.manager.storage import BootFiles, Storage
from vmlab.manager.store.database import Database

__all__ = ["Manager"]

_LOG: Final = logging.getLogger(__name__)
_ADOPT_SECONDS: Final = 30.0
_LOOKS: Final = 100
"""Times that the lock is tried: for about two seconds, and more where all stands still."""
assert _handlers.__all__


class Part(Protocol):
    """What has a life of its own within a manager."""

    async def start(self) -> None:
        """Begin."""

    async def close(self) -> None:
        """End; what it did in the world stays."""


class Manager:
    """A manager, opened by `Manager.open`; a context manager that starts and closes it, too."""

    def __init__(self, settings: Settings, database: Database, lock: FileLock) -> None:
        self.settings = settings
        self.database = database
        self._lock = lock
        self._machines: dict[str, Machine] = {}
        self._started: list[Part] = []
        self.hosts = Hosts(self)
        self.storage = Storage(settings.directory / "disks")
        self.boot_files = BootFiles(settings.directory / "boot")
        self.guests = Guests(self)
        self.networks = Networks(settings, database)
        self.operator = Operator(self)
        self.schedules = Schedules(self)
        self.observer = Observer(self)

    @property
    def parts(self) -> list[Part]:
        """Its parts, in the order in which they begin; they end in the opposite one."""
        return [
            self.hosts,
            self.storage,
            self.networks,
            self.guests,
            self.operator,
            self.schedules,
            self.observer,
        ]

    @classmethod
    async def open(cls, settings: Settings) -> Self:
        """The manager of a home, which has one at a time.

        Raises:
            VmlabError: another process is the manager of this home or of its store, or that cannot
                be opened.
        """
        path = settings.directory / "manager.lock"
        try:
            lock = await _lock(path)
        except OSError as error:
            raise VmlabError(
                f"{path} cannot be opened: {error.strerror}",
                hint="set VMLAB_HOME to a directory that you can write to",
            ) from error
        if lock is None:
            raise VmlabError(
                f"another process manages {settings.home.directory} already",
                hint="use that one: commands find it by themselves, or by VMLAB_URL",
            )
        try:
            database = await asyncio.to_thread(Database.open, settings, alone=True)
        except BaseException:
            lock.release()
            raise
        return cls(settings, database, lock)

    async def start(self) -> None:
        """Begin: take up what was left, find the machines again, carry out what comes."""
        try:
            for part in self.parts:
                self._started.append(part)
                await part.start()
                if part is self.hosts:
                    await self._adopt()
                elif part is self.storage:
                    await clear_exports(self)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End; machines live on. Closing it again does nothing."""
        while self._started:
            await self._started.pop().close()
        self._machines.clear()
        await asyncio.to_thread(self.database.close)
        self._lock.release()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _adopt(self) -> None:
        """Open the hosts that have machines, so that these are found again."""
        names = await self.database.read(hosts_with_machines)

        async def adopt(name: str) -> None:
            try:
                async with asyncio.timeout(_ADOPT_SECONDS), self.hosts.guarded(name):
                    await (await self.hosts.get(name)).list()
            except (VmlabError, TimeoutError) as error:
                # Its machines are unknown until it is back; the others are not.
                _LOG.warning("the machines of host %s are not found again: %s", name, error)

        await asyncio.gather(*map(adopt, names))

    # ------------------------------------------------------------------ machines

    async def machine(self, machine_id: str) -> Machine:
        """A machine at its hypervisor, by id (or name).

        Raises:
            MachineNotFound: there is none, or its hypervisor has lost it.
            HypervisorUnavailable: its host cannot be used.
        """
        known = await self.database.read(placed, machine_id)
        machine = await self.hosts.machine(known.host, known.id)
        self._machines[known.id] = machine
        return machine

    def known_machine(self, machine_id: str, host: str) -> Machine | None:
        """A machine that was asked for before, if it is still on that host."""
        machine = self._machines.get(machine_id)
        if machine is None or machine.hypervisor is not self.hosts.opened(host):
            return None
        return machine

    def forget_machine(self, machine_id: str) -> None:
        """Let go of a machine that is gone, or is elsewhere now."""
        self._machines.pop(machine_id, None)


async def _lock(path: Path) -> FileLock | None:
    """The lock of a home, of which a manager that was killed may have it for a moment still."""
    for _ in range(_LOOKS):
        lock = FileLock.take(path)
        if lock is not None:
            return lock
        # What it was about to start has the file open until it is another program.
        await asyncio.sleep(POLL_S)
    return FileLock.take(path)
