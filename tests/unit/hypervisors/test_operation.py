"""One operation: deadlines, cancellation, aborts, and work that nothing interrupts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from tests.unit.hypervisors.toy import in_loop

from vmlab.hypervisors.operation import (
    DEFAULT_TIMEOUTS,
    Operation,
    seconds_allowed,
    uninterrupted,
)
from vmlab.machine.errors import (
    DeadlineExceeded,
    InvalidSpec,
    OperationAborted,
    OperationFailed,
    ResourceNotFound,
    VmlabError,
)
from vmlab.machine.states import OPERATIONS


async def nothing(error: BaseException) -> None:
    """Recover from nothing."""


def run(
    operation: Operation,
    action: Callable[[], Awaitable[Any]],
    recover: Callable[[BaseException], Coroutine[Any, Any, None]] = nothing,
) -> Coroutine[Any, Any, Any]:
    return operation.run(action, recover, machine="m", hypervisor="h")


async def forever() -> None:
    await asyncio.Event().wait()


# Deadlines.


def test_every_operation_has_a_default_deadline() -> None:
    assert set(OPERATIONS) <= set(DEFAULT_TIMEOUTS)
    assert all(0 < seconds < math.inf for seconds in DEFAULT_TIMEOUTS.values())
    assert seconds_allowed("start", None) == DEFAULT_TIMEOUTS["start"]


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan"), -math.inf, True, "5", [1]])
def test_a_timeout_that_is_no_duration_is_refused(timeout: Any) -> None:
    with pytest.raises(InvalidSpec) as caught:
        seconds_allowed("start", timeout)
    (problem,) = caught.value.problems
    assert problem.field == "timeout"
    assert "a number of seconds from 0 on, or None for the default of 120" in problem.expected
    assert str(caught.value).startswith("start has 1 problem:\n  timeout = ")
    assert caught.value.operation == "start"


@in_loop
async def test_zero_seconds_allow_what_needs_no_waiting() -> None:
    async def at_once() -> int:
        return 5

    assert await run(Operation("start", 1, 0), at_once) == 5
    with pytest.raises(DeadlineExceeded):
        await run(Operation("start", 1, 0), forever)


@pytest.mark.parametrize("timeout", [math.inf, 10**400])
@in_loop
async def test_infinity_is_no_deadline(timeout: float) -> None:
    operation = Operation("start", 1, timeout)

    async def action() -> float | None:
        await asyncio.sleep(0)
        return operation.scope.when()

    assert await run(operation, action) is None


@in_loop
async def test_a_late_operation_is_undone_and_tells_its_deadline() -> None:
    undone: list[BaseException] = []

    async def recover(error: BaseException) -> None:
        await asyncio.sleep(0.02)  # longer than the deadline, which does not count any more
        undone.append(operation.failure(error))

    operation = Operation("start", 1, 0.01)
    with pytest.raises(DeadlineExceeded) as caught:
        await run(operation, forever, recover)
    assert undone == [caught.value]
    assert (caught.value.seconds, caught.value.machine, caught.value.hypervisor) == (0.01, "m", "h")
    assert caught.value.__cause__ is None


@in_loop
async def test_a_late_operation_is_late_whatever_its_hook_makes_of_the_cancellation() -> None:
    async def stubborn() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            raise ConnectionResetError("gone") from None

    with pytest.raises(DeadlineExceeded) as caught:
        await run(Operation("start", 1, 0.01), stubborn)
    assert isinstance(caught.value.__cause__, ConnectionResetError)


@in_loop
async def test_a_deadline_within_an_operation_is_kept_apart_from_its_own() -> None:
    async def inner() -> None:
        async with asyncio.timeout(0.01):
            await forever()

    with pytest.raises(OperationFailed, match="start failed: TimeoutError"):
        await run(Operation("start", 1, 3600), inner)

    async def nested() -> None:
        await run(Operation("info", 2, 0.01), forever)

    with pytest.raises(DeadlineExceeded, match="info did not finish"):
        await run(Operation("start", 1, 3600), nested)


@in_loop
async def test_a_deadline_around_an_operation_is_the_caller_s() -> None:
    undone: list[BaseException] = []

    async def recover(error: BaseException) -> None:
        undone.append(error)
        await asyncio.sleep(0.01)

    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.01):
            await run(Operation("start", 1, 3600), forever, recover)
    assert not isinstance(caught.value, VmlabError)
    assert len(undone) == 1
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@in_loop
async def test_a_deadline_passes_also_in_a_task_that_was_cancelled_before() -> None:
    async def cleaning_up() -> str:
        try:
            await forever()
        except asyncio.CancelledError:
            try:
                await run(Operation("delete", 1, 0.01), forever)
            except DeadlineExceeded:
                return "late"
        return "never"

    task = asyncio.create_task(cleaning_up())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "late"


@in_loop
async def test_more_time_can_be_allowed_but_not_once_it_is_over() -> None:
    operation = Operation("stop", 1, 0.01)

    async def action() -> None:
        operation.allow(5)
        await asyncio.sleep(0.02)
        operation.allow(math.inf)
        assert operation.scope.when() is None

    await run(operation, action)
    operation.allow(1)
    assert operation.over


# Aborts.


@in_loop
async def test_an_aborted_operation_fails_with_what_it_was_given() -> None:
    operation, error = Operation("start", 1, 3600), OperationAborted("killed")
    task = asyncio.create_task(run(operation, forever))
    await asyncio.sleep(0)
    operation.abort(error)
    operation.abort(OperationAborted("once more"))
    with pytest.raises(OperationAborted) as caught:
        await task
    assert caught.value is error


@in_loop
async def test_what_fails_because_it_was_aborted_fails_with_what_it_was_given() -> None:
    operation, error = Operation("start", 1, 3600), OperationAborted("killed")

    async def action() -> None:
        operation.abort(error)
        raise OSError("the process is gone")

    with pytest.raises(OperationAborted) as caught:
        await run(operation, action)
    assert caught.value is error
    assert isinstance(caught.value.__cause__, OSError)


@in_loop
async def test_an_abort_comes_too_late_for_what_is_being_undone() -> None:
    operation = Operation("start", 1, 3600)
    gate = asyncio.Event()

    async def action() -> None:
        raise ResourceNotFound("no disk")

    async def recover(error: BaseException) -> None:
        await gate.wait()

    task = asyncio.create_task(run(operation, action, recover))
    await asyncio.sleep(0)
    operation.abort(OperationAborted("killed"))
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(ResourceNotFound):
        await task


@in_loop
async def test_a_cancellation_is_not_hidden_by_an_abort() -> None:
    operation = Operation("start", 1, 3600)
    task = asyncio.create_task(run(operation, forever))
    await asyncio.sleep(0)
    operation.abort(OperationAborted("killed"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# Errors.


@pytest.mark.parametrize("error", [OSError("disk full"), EOFError(), KeyError("x"), ValueError()])
@in_loop
async def test_an_error_of_the_host_fails_the_operation(error: Exception) -> None:
    async def action() -> None:
        raise error

    with pytest.raises(OperationFailed, match=f"start failed: {type(error).__name__}") as caught:
        await run(Operation("start", 1, 3600), action)
    assert caught.value.__cause__ is error
    assert (caught.value.machine, caught.value.operation) == ("m", "start")


@pytest.mark.parametrize("error", [TypeError("bug"), AssertionError(), ResourceNotFound("x")])
@in_loop
async def test_mistakes_and_vmlab_s_own_errors_come_out_as_they_are(error: Exception) -> None:
    recovered: list[BaseException] = []

    async def action() -> None:
        raise error

    async def recover(found: BaseException) -> None:
        recovered.append(found)

    with pytest.raises(type(error)) as caught:
        await run(Operation("start", 1, 3600), action, recover)
    assert caught.value is error
    assert recovered == [error]


@in_loop
async def test_a_mistake_is_not_hidden_by_an_abort() -> None:
    operation = Operation("start", 1, 3600)

    async def action() -> None:
        operation.abort(OperationAborted("killed"))
        raise TypeError("bug")

    with pytest.raises(TypeError):
        await run(operation, action)


# The point of no return.


@in_loop
async def test_what_is_committed_is_neither_aborted_nor_late() -> None:
    operation = Operation("start", 1, 0.01)

    async def action() -> str:
        operation.commit()
        operation.abort(OperationAborted("killed"))
        operation.allow(0)
        operation.check()
        await asyncio.sleep(0.02)
        return "done"

    assert await run(operation, action) == "done"


@in_loop
async def test_what_was_aborted_cannot_be_committed() -> None:
    operation, error = Operation("start", 1, 3600), OperationAborted("killed")
    ran: list[str] = []

    async def last() -> None:
        ran.append("last")

    async def action() -> None:
        operation.abort(error)
        await operation.conclude(last())

    with pytest.raises(OperationAborted):
        await run(operation, action)
    assert ran == []


@in_loop
async def test_the_conclusion_is_not_cancelled() -> None:
    operation = Operation("delete", 1, 3600)
    ran: list[str] = []
    begun = asyncio.Event()

    async def last() -> None:
        ran.append("begun")
        begun.set()
        await asyncio.sleep(0.01)
        ran.append("ended")

    task = asyncio.create_task(run(operation, lambda: operation.conclude(last())))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ran == ["begun", "ended"]


@in_loop
async def test_the_deadline_ends_the_conclusion_but_for_its_grace() -> None:
    operation = Operation("delete", 1, 0.01)
    with pytest.raises(DeadlineExceeded, match=r"delete did not finish within 0\.01 s"):
        await run(operation, lambda: operation.conclude(forever()))

    async def slow() -> str:
        await asyncio.sleep(0.05)
        return "done"

    patient = Operation("migrate", 1, 0.01)
    assert await run(patient, lambda: patient.conclude(slow(), grace=3600)) == "done"
    endless = Operation("migrate", 1, math.inf)
    assert await run(endless, lambda: endless.conclude(slow())) == "done"


@in_loop
async def test_a_timeout_in_the_conclusion_that_is_not_its_deadline_is_an_error_of_the_host() -> (
    None
):
    operation = Operation("delete", 1, 3600)

    async def last() -> None:
        raise TimeoutError("the socket's")

    with pytest.raises(OperationFailed, match="the socket's"):
        await run(operation, lambda: operation.conclude(last()))


# Work that nothing interrupts.


@in_loop
async def test_uninterrupted_work_returns_and_raises_what_it_does() -> None:
    async def give() -> int:
        await asyncio.sleep(0)
        return 3

    async def refuse() -> None:
        raise KeyError("x")

    assert await uninterrupted(give()) == 3
    with pytest.raises(KeyError):
        await uninterrupted(refuse())


@pytest.mark.parametrize("times", [1, 2, 5])
@in_loop
async def test_work_goes_on_to_its_end_however_often_its_caller_is_cancelled(times: int) -> None:
    gate, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await gate.wait()
        ended.set()

    task = asyncio.create_task(uninterrupted(work()))
    for turn in range(times):
        await asyncio.sleep(0)
        task.cancel(f"number {turn}")
    await asyncio.sleep(0)
    assert not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    assert task.cancelling() == times


@in_loop
async def test_a_cancelled_caller_learns_why_the_work_failed() -> None:
    gate = asyncio.Event()

    async def work() -> None:
        await gate.wait()
        raise KeyError("x")

    task = asyncio.create_task(uninterrupted(work()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("caller_too", [False, True])
@in_loop
async def test_work_that_is_itself_cancelled_is_a_cancellation(caller_too: bool) -> None:
    inner: asyncio.Future[asyncio.Task[Any] | None] = asyncio.Future()

    async def work() -> None:
        inner.set_result(asyncio.current_task())
        await forever()

    task = asyncio.create_task(uninterrupted(work()))
    worker = await inner
    assert worker is not None
    if caller_too:
        task.cancel()
    worker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert worker.cancelled()


@in_loop
async def test_a_timeout_around_work_comes_when_the_work_is_done() -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        await asyncio.sleep(0.03)
        ended = True

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await uninterrupted(work())
    assert ended
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@in_loop
async def test_a_group_that_fails_waits_for_work_and_tells_its_own_failure() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(0.02)
        ended.set()

    async def fails() -> None:
        await asyncio.sleep(0.01)
        raise KeyError("x")

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(uninterrupted(work()))
            group.create_task(fails())
    assert [type(error) for error in caught.value.exceptions] == [KeyError]
    assert ended.is_set()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_the_end_of_the_program_is_not_swallowed(kind: type[BaseException]) -> None:
    async def work() -> None:
        await asyncio.sleep(0)
        raise kind

    with pytest.raises(kind):
        asyncio.run(uninterrupted(work()))


def test_the_end_of_the_program_in_an_operation_still_recovers() -> None:
    recovered: list[BaseException] = []

    async def action() -> None:
        raise KeyboardInterrupt

    async def recover(error: BaseException) -> None:
        await asyncio.sleep(0)
        recovered.append(error)

    async def main() -> None:
        await run(Operation("start", 1, 3600), action, recover)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert [type(error) for error in recovered] == [KeyboardInterrupt]
