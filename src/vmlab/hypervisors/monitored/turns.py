"""Whose turn it is to change a machine: one process's at a time, by the lock beside its record.

A store's machine may be used by several processes. Each of them sees when the machine's process
ends, and only who had its turn knows why. A run's machine is one process's, which always has it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from vmlab.hypervisors.locks import POLL_S, FileLock
from vmlab.hypervisors.records import LOCK

if TYPE_CHECKING:
    from vmlab.hypervisors.records import MachineRecords


class Turns:
    """A process's turns at a machine, each of which begins with what others did meanwhile.

    Args:
        records: The records of the machine's owner.
        machine: Its id.
        catch_up: Called at the beginning of each turn, before anything else of this process has
            it.
    """

    def __init__(
        self, records: MachineRecords, machine: str, catch_up: Callable[[], Awaitable[None]]
    ) -> None:
        self._records = records
        self._machine = machine
        self._path = records.directory(machine) / LOCK
        self._needed = records.owner.kind == "store"
        self._catch_up = catch_up
        self._lock: FileLock | None = None
        # An operation and what sees to an end may have the same turn.
        self._users = 0
        self._closed = False

    @property
    def ours(self) -> bool:
        """Whether it is this process's turn, so that what it writes down is the latest."""
        return not self._needed or self._lock is not None

    async def begin(self, busy: Callable[[], None]) -> None:
        """Wait for a turn; `end` ends it.

        Args:
            busy: Called again and again while another process has its turn.

        Raises:
            MachineNotFound: the machine is gone.
        """
        while not await self._begun():
            busy()
            await asyncio.sleep(POLL_S)

    def end(self) -> None:
        """Leave the turn, which is over when all have left it."""
        self._users -= 1
        if self._users == 0 and self._lock is not None:
            self._lock.release()
            self._lock = None

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[bool]:
        """Have the turn that an operation of this process has, or wait for one.

        Yields whether there is one: there is none once `close` was called.

        Raises:
            MachineNotFound: the machine is gone.
        """
        while True:
            begun = await self._begun()
            if begun or self._closed:
                break
            await asyncio.sleep(POLL_S)
        try:
            yield begun
        finally:
            if begun:
                self.end()

    @asynccontextmanager
    async def at_once(self) -> AsyncIterator[bool]:
        """Have a turn if no other process has one; yields whether it is so.

        Raises:
            MachineNotFound: the machine is gone.
        """
        begun = await self._begun()
        try:
            yield begun
        finally:
            if begun:
                self.end()

    def close(self) -> None:
        """Nobody waits for a turn in `shared` any more."""
        self._closed = True

    async def _begun(self) -> bool:
        """Begin a turn, or share the one that this process has; False if another one has it."""
        if not self.ours:
            try:
                lock = FileLock.take(self._path)
            except FileNotFoundError as error:
                raise self._records.gone(self._machine) from error
            if lock is None:
                return False
            try:
                lock.write(str(os.getpid()))
                await self._catch_up()
            except BaseException:
                lock.release()
                raise
            self._lock = lock
        self._users += 1
        return True
