"""One operation on a machine: its deadline, its end from elsewhere, and its undoing.

What `uninterrupted` runs, and the recovery of an operation, go on to their end even if the caller
is cancelled again meanwhile.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar

from vmlab.machine.errors import (
    DeadlineExceeded,
    InvalidSpec,
    OperationFailed,
    SpecProblem,
    VmlabError,
)
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
    "status": 30,
    "info": 30,
    "metrics": 30,
    "console": 30,
    "channel": 30,
    "screenshot": 30,
    "send_keys": 60,
    "snapshots": 30,
}
"""Seconds that an operation has when its caller names no timeout; a host may stand still for 10."""

UNDO_TIMEOUT: Final = 90.0
"""Seconds that undoing has before the machine is given up as `unknown`."""

HOST_ERRORS: Final = (OSError, EOFError, ValueError, LookupError, RuntimeError)
"""What the host or a library raises when it fails; an operation makes OperationFailed of it.

Anything else (TypeError, AssertionError, ...) is a mistake in the program and comes out as it is.
"""


def seconds_allowed(operation: str, timeout: float | None) -> float:
    """The seconds that `operation` has: `timeout`, or its default where that is None.

    Zero allows what needs no waiting; infinity is no deadline.

    Raises:
        InvalidSpec: `timeout` is negative, NaN or no number.
    """
    default = DEFAULT_TIMEOUTS[operation]
    if timeout is None:
        return default
    if not _is_duration(timeout):
        expected = f"a number of seconds from 0 on, or None for the default of {default:g}"
        raise InvalidSpec(
            [SpecProblem("timeout", timeout, expected)],
            what=operation,
            operation=operation,
            hint="leave `timeout` out to take the default",
        )
    try:
        return float(timeout)
    except OverflowError:
        return math.inf


def _is_duration(value: object) -> bool:
    # Not `not value < 0`, which NaN would pass.
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end even if the caller is cancelled, and raise the cancellation then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            # `wait` never raises what the task raises: a CancelledError here is the caller's own.
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    try:
        raise cancelled from None if task.cancelled() else task.exception()
    finally:
        # An exception in a local of its own traceback's frame would be a cycle.
        cancelled = None


class Operation:
    """One operation under way: its id, its deadline, and ways to end it early or not at all.

    Args:
        name: One of DEFAULT_TIMEOUTS.
        number: What tells it from others of the name.
        timeout: Its deadline in seconds from now; None is the default, infinity is none.

    Raises:
        InvalidSpec: `timeout` is negative, NaN or no number.
    """

    __slots__ = (
        "_failure",
        "aborted_by",
        "awaiting",
        "before",
        "begun",
        "committed",
        "disturbs",
        "ending",
        "forced",
        "holds",
        "hypervisor",
        "id",
        "machine",
        "name",
        "over",
        "repause",
        "scope",
        "started",
        "target",
        "timeout",
    )

    def __init__(self, name: str, number: int, timeout: float | None) -> None:
        self.name = name
        self.id = f"{name}-{number}"
        self.timeout = seconds_allowed(name, timeout)
        # Names for errors, which `run` is told.
        self.machine: str | None = None
        self.hypervisor: str | None = None
        # It is the machine's turn; it was allowed and announced; it ended, well or not.
        self.holds = False
        self.begun = False
        self.over = False
        self.started = 0.0
        # The machine's state before, and the one that is wanted.
        self.before = MachineState.UNKNOWN
        self.target: MachineState | None = None
        # Whether the machine's end is wanted; whether anything that happens to it is.
        self.ending = False
        self.disturbs = False
        # Whether it ends what other processes do with the machine; what it waits for, for errors.
        self.forced = False
        self.awaiting: str | None = None
        # Whether undoing it pauses the machine again: it was resumed only for the operation.
        self.repause = False
        self.aborted_by: VmlabError | None = None
        self.committed = False
        self._failure: BaseException | None = None
        self.scope = asyncio.timeout(self.timeout if self.timeout < math.inf else None)

    def abort(self, error: VmlabError) -> None:
        """End the operation now, so that it fails with `error`; a committed one runs on."""
        if self.committed or self.over or self.aborted_by is not None or self.scope.expired():
            return
        self.aborted_by = error
        self.scope.reschedule(asyncio.get_running_loop().time())

    def check(self) -> None:
        """Fail if the operation was ended from elsewhere but ran on for a moment.

        Raises:
            VmlabError: what `abort` was given.
        """
        if self.aborted_by is not None and not self.committed:
            raise self.aborted_by

    def allow(self, seconds: float) -> None:
        """Give the operation `seconds` from now on, instead of what was left of its deadline."""
        if self.over or self.committed or self.aborted_by is not None or self.scope.expired():
            return
        now = asyncio.get_running_loop().time()
        self.scope.reschedule(now + seconds if seconds < math.inf else None)

    def commit(self) -> None:
        """The point of no return: from here on neither deadline nor abort ends the operation.

        Raises:
            VmlabError: what `abort` was given; it came first.
        """
        self.check()
        self.committed = True
        self._lift_deadline()

    async def conclude(self, work: Coroutine[Any, Any, T], *, grace: float = 0.0) -> T:
        """Commit, and run `work` to its end whether the caller is cancelled or not.

        Args:
            work: The last part of the operation.
            grace: Seconds that it has at least, should the deadline be nearer than that.

        Raises:
            DeadlineExceeded: it took longer, and was cancelled for that.
        """
        deadline = self.scope.when()
        if deadline is not None:
            deadline = max(deadline, asyncio.get_running_loop().time() + grace)

        async def bounded() -> T:
            limit = asyncio.timeout_at(deadline)
            try:
                async with limit:
                    return await work
            except TimeoutError:
                if limit.expired():
                    raise self._late() from None
                raise

        try:
            self.commit()
            return await uninterrupted(bounded())
        finally:
            # It may never have begun: the operation was aborted before, or the loop is ending.
            work.close()

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
        self.machine, self.hypervisor = machine, hypervisor
        try:
            async with self.scope:
                try:
                    result = await action()
                    self.over = True
                    return result
                except BaseException as error:
                    # Neither deadline nor abort cuts the undoing short.
                    self.over = True
                    self._lift_deadline()
                    await uninterrupted(recover(error))
                    raise
        except Exception as error:
            failure = self.failure(error)
            if failure is error:
                raise
            # The cancellation by which deadline and abort work explains nothing.
            ended_by_scope = self.scope.expired() and type(error) is TimeoutError
            raise failure from (None if ended_by_scope else error)

    def failure(self, error: BaseException) -> BaseException:
        """Why the operation failed, as its caller is told, where `error` is what came out of it."""
        if self._failure is None:
            self._failure = self._explained(error)
        return self._failure

    def _explained(self, error: BaseException) -> BaseException:
        expected = isinstance(error, (VmlabError, *HOST_ERRORS, asyncio.CancelledError))
        if not expected:
            return error
        if self.aborted_by is not None:
            return self.aborted_by
        if self.scope.expired():
            return error if isinstance(error, DeadlineExceeded) else self._late()
        if isinstance(error, VmlabError | asyncio.CancelledError):
            return error
        return OperationFailed(
            f"{self.name} failed: {type(error).__name__}: {error}",
            machine=self.machine,
            hypervisor=self.hypervisor,
            operation=self.name,
        )

    def _late(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            self.name,
            seconds=self.timeout,
            machine=self.machine,
            hypervisor=self.hypervisor,
            hint=self.awaiting,
        )
