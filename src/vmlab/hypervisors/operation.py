"""One operation on a machine: its deadline, its end from elsewhere, and its undoing.

What `uninterrupted` runs, and the recovery of an operation, go on to their end even if the caller
is cancelled again meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar

from vmlab.machine.errors import DeadlineExceeded, OperationFailed, VmlabError
from vmlab.machine.states import MachineState

T = TypeVar("T")

DEFAULT_TIMEOUTS: Mapping[str, float] = {
    "create": 120,
    "create_from": 120,
    "start": 120,
    "stop": 30,
    "kill": 30,
    "pause": 30,
    "resume": 30,
    "restart": 180,
    "delete": 60,
    "snapshot": 300,
    "delete_snapshot": 60,
    "restore": 300,
    "fork": 60,
    "migrate": 1800,
    "plug_disk": 60,
    "unplug_disk": 60,
    "resize_disk": 60,
    "plug_nic": 60,
    "unplug_nic": 60,
    "resize": 60,
    "pin": 30,
    "inject": 30,
    "clear_fault": 30,
    "status": 10,
    "info": 10,
    "metrics": 10,
    "console": 10,
    "channel": 30,
    "snapshots": 10,
}
"""Seconds that an operation has when its caller names no timeout."""

UNDO_TIMEOUT: Final = 30.0
"""Seconds that undoing has before the machine is given up as `unknown`."""


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end even if the caller is cancelled, and raise the cancellation then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except Exception:
            # The task's own failure: it is raised by result() below.
            break
    if cancelled is not None:
        if (failure := task.exception()) is not None:
            raise cancelled from failure
        raise cancelled
    return task.result()


class Operation:
    """One operation under way: its id, its deadline, and ways to end it early or not at all."""

    __slots__ = (
        "aborted_by",
        "before",
        "begun",
        "committed",
        "id",
        "name",
        "scope",
        "started",
        "timeout",
    )

    def __init__(self, name: str, number: int, timeout: float | None) -> None:
        self.name = name
        self.id = f"{name}-{number}"
        self.timeout = DEFAULT_TIMEOUTS[name] if timeout is None else timeout
        self.begun = False
        self.started = 0.0
        self.before = MachineState.UNKNOWN
        self.aborted_by: VmlabError | None = None
        self.committed = False
        self.scope = asyncio.timeout(self.timeout)

    def abort(self, error: VmlabError) -> None:
        """End the operation now, so that it fails with `error`; a committed one runs on."""
        if self.committed or self.aborted_by is not None or self.scope.expired():
            return
        self.aborted_by = error
        self.scope.reschedule(asyncio.get_running_loop().time())

    def commit(self) -> None:
        """The point of no return: from here on neither deadline nor abort ends the operation."""
        self.committed = True
        self._lift_deadline()

    def _lift_deadline(self) -> None:
        if not self.scope.expired():
            self.scope.reschedule(None)

    async def run(
        self,
        action: Callable[[], Awaitable[T]],
        recover: Callable[[BaseException], Coroutine[Any, Any, None]],
        *,
        machine: str,
        hypervisor: str,
    ) -> T:
        """`action` within the deadline; when it does not succeed, `recover`, to its end.

        Raises:
            DeadlineExceeded: the deadline passed.
            VmlabError: what `abort` was given, or what `action` raised; an error of the host is
                wrapped in OperationFailed.
        """

        async def guarded() -> T:
            try:
                return await action()
            except BaseException as error:
                self._lift_deadline()
                await uninterrupted(recover(error))
                raise

        try:
            async with self.scope:
                return await guarded()
        except VmlabError:
            raise
        except TimeoutError as error:
            if self.aborted_by is not None:
                raise self.aborted_by from None
            if self.scope.expired():
                raise DeadlineExceeded(
                    self.name, seconds=self.timeout, machine=machine, hypervisor=hypervisor
                ) from None
            raise self._wrap(error, machine, hypervisor) from error
        except (OSError, ValueError, LookupError, RuntimeError) as error:
            raise self._wrap(error, machine, hypervisor) from error

    def _wrap(self, error: Exception, machine: str, hypervisor: str) -> OperationFailed:
        return OperationFailed(
            f"{self.name} failed: {type(error).__name__}: {error}",
            machine=machine,
            hypervisor=hypervisor,
            operation=self.name,
        )
