"""Operations themselves: journal, undoing, cancelling, deadlines, tries, keys, and recovery."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.orm import Session

from vmlab.machine.errors import HypervisorUnavailable, OperationFailed, ResourceNotFound
from vmlab.manager.manager import Manager
from vmlab.manager.operator import handler as module
from vmlab.manager.operator import worker
from vmlab.manager.operator.handler import Handler, PlannedStep, Target, key
from vmlab.manager.operator.journal import Work
from vmlab.manager.requests import CreateMachine, DeleteMachine, StartMachine, UpdateMachine
from vmlab.manager.store.changes import Conflict
from vmlab.manager.store.database import Database
from vmlab.manager.store.queries import list_events
from vmlab.manager.store.tables import OperationRow, now

SPEC = {"memory": "64M"}
Body = Callable[[Work[UpdateMachine]], Any]


class Scripted(Handler[UpdateMachine]):
    """Does what a test wants, in place of machine.update."""

    kind = "machine.update"
    body: Body
    done: list[str]
    withdrew: list[str]

    def check(self, session: Session, request: UpdateMachine) -> Target:
        return Target(request.machine, request.machine, frozenset({key("thing", request.machine)}))

    def plan(self, session: Session, request: UpdateMachine) -> Sequence[PlannedStep]:
        return [PlannedStep("one", "the first"), PlannedStep("two", "the second")]

    async def run(self, work: Work[UpdateMachine]) -> dict[str, Any] | None:
        result: dict[str, Any] | None = await type(self).body(work)
        return result

    def withdrawn(self, session: Session, request: UpdateMachine, target: str | None) -> None:
        self.withdrew.append(request.machine)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type[Scripted]]:
    """Puts a handler in place of machine.update that does what it is told."""

    def make(body: Body, **fields: Any) -> type[Scripted]:
        made = type(
            "Told", (Scripted,), {"body": staticmethod(body), "done": [], "withdrew": [], **fields}
        )
        monkeypatch.setitem(module._KINDS, "machine.update", made)
        return made

    return make


def a_thing(name: str = "a") -> UpdateMachine:
    return UpdateMachine(machine=name)


async def never() -> None:
    await asyncio.Event().wait()


# ------------------------------------------------------------------------ journal and undoing


def test_a_failure_undoes_the_steps_that_were_begun_the_last_first(
    place: Any, doing: Any, scripted: Any
) -> None:
    async def body(work: Work[UpdateMachine]) -> None:
        for name in ("one", "two", "three"):
            async with work.step(name, f"do {name}") as step:
                work.on_undo(step, lambda name=name: undo(name))
                if name == "three":
                    raise OperationFailed("three does not work")

    async def undo(name: str) -> None:
        made.done.append(name)
        if name == "two":
            raise OperationFailed("two stays")

    made = scripted(body)

    async def story() -> None:
        async with place.manager() as manager:
            ended = await doing.do(manager, a_thing())
            assert ended.state == "failed"
            assert made.done == ["three", "two", "one"]
            assert [(step.name, step.state) for step in ended.steps] == [
                ("one", "undone"),
                ("two", "done"),
                ("three", "undone"),
            ]
            assert ended.error is not None
            assert ended.error["message"] == "three does not work"
            assert ended.error["notes"] == ["two could not be undone: two stays"]

    asyncio.run(story())


def test_what_is_kept_is_not_undone(place: Any, doing: Any, scripted: Any) -> None:
    async def body(work: Work[UpdateMachine]) -> None:
        async with work.step("one") as step:
            work.on_undo(step, lambda: undo("one"))
        work.keep()
        async with work.step("two") as step:
            work.on_undo(step, lambda: undo("two"))
            raise OperationFailed("no")

    async def undo(name: str) -> None:
        made.done.append(name)

    made = scripted(body)

    async def story() -> None:
        async with place.manager() as manager:
            await doing.do(manager, a_thing())
            assert made.done == ["two"]

    asyncio.run(story())


def test_a_mistake_in_a_handler_is_told_as_one_and_undone(
    place: Any, doing: Any, scripted: Any
) -> None:
    async def body(work: Work[UpdateMachine]) -> None:
        async with work.step("one") as step:
            work.on_undo(step, undo)
            raise KeyError("oops")

    async def undo() -> None:
        made.done.append("one")

    made = scripted(body)

    async def story() -> None:
        async with place.manager() as manager:
            ended = await doing.do(manager, a_thing())
            assert ended.state == "failed"
            assert ended.error is not None
            assert "KeyError" in ended.error["message"]
            assert "mistake in vmlab" in ended.error["hint"]
            assert made.done == ["one"]

    asyncio.run(story())


def test_what_belongs_to_a_step_is_written_with_it_or_not_at_all(
    place: Any, doing: Any, scripted: Any
) -> None:
    async def body(work: Work[UpdateMachine]) -> dict[str, Any]:
        async with work.step("one") as step:
            step.data["seen"] = 1
            step.also(lambda session: made.done.append("also"))
        async with work.step("two") as step:
            step.skip("nothing to do")
            step.also(lambda session: made.done.append("not this"))
        return {"ok": True}

    made = scripted(body)

    async def story() -> None:
        async with place.manager() as manager:
            ended = await doing.did(manager, a_thing())
            assert made.done == ["also"]
            assert ended.result == {"ok": True}
            assert ended.steps[0].data == {"seen": 1}
            assert (ended.steps[1].state, ended.steps[1].text) == ("skipped", "nothing to do")
            assert ended.progress == 1

    asyncio.run(story())


# ------------------------------------------------------------------------ cancelling, deadlines


def test_one_that_runs_is_interrupted_and_undone_when_it_is_cancelled(
    place: Any, doing: Any, scripted: Any
) -> None:
    running = asyncio.Event()

    async def body(work: Work[UpdateMachine]) -> None:
        async with work.step("one") as step:
            work.on_undo(step, undo)
            running.set()
            await never()

    async def undo() -> None:
        made.done.append("one")

    made = scripted(body)

    async def story() -> None:
        async with place.manager() as manager:
            operation = await manager.operator.submit(a_thing())
            await running.wait()
            asked = await manager.operator.cancel(operation.id)
            assert asked.cancelling or asked.state == "cancelled"
            ended = await manager.operator.wait(operation.id, 120)
            assert ended.state == "cancelled"
            assert made.done == ["one"]
            assert made.withdrew == []
            with pytest.raises(Conflict, match="cancelled already"):
                await manager.operator.cancel(operation.id)

    asyncio.run(story())


def test_one_that_waits_is_cancelled_at_once_and_gives_back_what_it_claimed(
    place: Any, doing: Any, scripted: Any
) -> None:
    running = asyncio.Event()

    async def body(work: Work[UpdateMachine]) -> None:
        made.done.append("ran")
        running.set()
        await never()

    made = scripted(body)

    async def story() -> None:
        async with place.manager() as manager:
            first = await manager.operator.submit(a_thing())
            second = await manager.operator.submit(a_thing())
            await running.wait()
            assert (await manager.operator.cancel(second.id)).state == "cancelled"
            assert made.withdrew == ["a"]
            await manager.operator.cancel(first.id)
            assert (await manager.operator.wait(first.id, 120)).state == "cancelled"
            assert made.done == ["ran"]

    asyncio.run(story())


def test_what_nothing_stops_is_not_cancelled_once_it_runs(
    place: Any, doing: Any, scripted: Any
) -> None:
    running, go_on = asyncio.Event(), asyncio.Event()

    async def body(work: Work[UpdateMachine]) -> None:
        running.set()
        await go_on.wait()

    scripted(body, cancellable=False)

    async def story() -> None:
        async with place.manager() as manager:
            operation = await manager.operator.submit(a_thing())
            await running.wait()
            with pytest.raises(Conflict, match="not stopped any more"):
                await manager.operator.cancel(operation.id)
            go_on.set()
            assert (await manager.operator.wait(operation.id, 120)).state == "succeeded"

    asyncio.run(story())


def test_one_that_is_not_done_by_its_deadline_fails_and_is_undone(
    place: Any, doing: Any, scripted: Any
) -> None:
    async def body(work: Work[UpdateMachine]) -> None:
        async with work.step("one") as step:
            work.on_undo(step, undo)
            await never()

    async def undo() -> None:
        made.done.append("one")

    made = scripted(body)

    async def story() -> None:
        async with place.manager() as manager:
            ended = await doing.do(manager, a_thing(), deadline=now() + timedelta(seconds=1))
            assert ended.state == "failed"
            assert ended.error is not None
            assert ended.error["kind"] == "DeadlineExceeded"
            # On a host so busy that the time was over before, nothing was begun.
            assert made.done == ["one" for step in ended.steps]

    asyncio.run(story())


# ------------------------------------------------------------------------ tries


def test_what_may_pass_is_tried_again_from_the_step_that_failed(
    place: Any, doing: Any, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmlab.manager.operator.worker._FIRST_DELAY_S", 0.01)

    async def body(work: Work[UpdateMachine]) -> None:
        async with work.step("one") as step:
            work.on_undo(step, never)
            if not step.done_before:
                made.done.append("one")
        async with work.step("two"):
            made.done.append("two")
            if made.done.count("two") < 3:
                raise HypervisorUnavailable("gone for a moment")

    made = scripted(body, retry_safe=True)

    async def story() -> None:
        async with place.manager() as manager:
            ended = await doing.did(manager, a_thing())
            assert made.done == ["one", "two", "two", "two"]
            assert ended.attempts == 3
            assert ended.error is None

    asyncio.run(story())


def test_what_is_not_safe_to_try_again_is_not_and_nothing_is_for_ever(
    place: Any, doing: Any, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmlab.manager.operator.worker._FIRST_DELAY_S", 0.001)

    async def body(work: Work[UpdateMachine]) -> None:
        made.done.append("try")
        raise HypervisorUnavailable("gone")

    async def other(work: Work[UpdateMachine]) -> None:
        made.done.append("try")
        raise OperationFailed("no use")

    async def story() -> None:
        async with place.manager() as manager:
            assert (await doing.do(manager, a_thing())).state == "failed"

    made = scripted(body)
    asyncio.run(story())
    assert made.done == ["try"]
    made = scripted(body, retry_safe=True)
    asyncio.run(story())
    assert len(made.done) == 6
    made = scripted(other, retry_safe=True)
    asyncio.run(story())
    assert made.done == ["try"]


def test_one_that_waits_for_its_next_try_can_be_cancelled(
    place: Any, doing: Any, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmlab.manager.operator.worker._FIRST_DELAY_S", 600)
    monkeypatch.setattr("vmlab.manager.operator.worker._LONGEST_DELAY_S", 600)

    async def body(work: Work[UpdateMachine]) -> None:
        async with work.step("one") as step:
            work.on_undo(step, undo)
            raise HypervisorUnavailable("gone")

    async def undo() -> None:
        made.done.append("undone")

    made = scripted(body, retry_safe=True)

    async def story() -> None:
        async with place.manager() as manager:
            operation = await manager.operator.submit(a_thing())

            async def postponed() -> bool:
                return "tried again" in (await manager.operator.document(operation.id)).message

            await doing.eventually(postponed, "it is postponed")
            await manager.operator.cancel(operation.id)
            assert (await manager.operator.wait(operation.id, 120)).state == "cancelled"
            assert made.done == ["undone"]

    asyncio.run(story())


def test_one_that_is_cancelled_while_its_next_try_is_written_down_does_not_wait_for_that(
    place: Any, doing: Any, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmlab.manager.operator.worker._FIRST_DELAY_S", 600)
    monkeypatch.setattr("vmlab.manager.operator.worker._LONGEST_DELAY_S", 600)

    async def body(work: Work[UpdateMachine]) -> None:
        async with work.step("one") as step:
            work.on_undo(step, undo)
            raise HypervisorUnavailable("gone")

    async def undo() -> None:
        made.done.append("undone")

    made = scripted(body, retry_safe=True)

    async def story() -> None:
        async with place.manager() as manager:
            surely = worker.surely

            async def meanwhile(database: Database, fn: Any, *words: Any, **options: Any) -> Any:
                if fn is worker._postpone:
                    await manager.operator.cancel(words[0])
                return await surely(database, fn, *words, **options)

            monkeypatch.setattr(worker, "surely", meanwhile)
            operation = await manager.operator.submit(a_thing())
            ended = await manager.operator.wait(operation.id, 120)
            assert (ended.state, made.done) == ("cancelled", ["undone"]), ended

    asyncio.run(story())


# ------------------------------------------------------------------------ keys


def test_the_same_key_is_the_same_operation_and_another_request_with_it_is_refused(
    place: Any, doing: Any
) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            request = CreateMachine(name="web", spec=SPEC)
            first = await doing.did(manager, request, idempotency_key="k")
            again = await manager.operator.submit(request, idempotency_key="k")
            assert (again.id, again.state) == (first.id, "succeeded")
            other = await manager.operator.submit(
                StartMachine(machine="web"), idempotency_key="k", actor="somebody else"
            )
            assert other.id != first.id
            with pytest.raises(Conflict, match="another request"):
                await manager.operator.submit(
                    CreateMachine(name="db", spec=SPEC), idempotency_key="k"
                )
            await manager.operator.wait(other.id, 120)

    asyncio.run(story())


def test_two_that_ask_at_once_with_one_key_get_one_operation(place: Any, doing: Any) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            request = CreateMachine(name="web", spec=SPEC)
            asked = await asyncio.gather(
                *(manager.operator.submit(request, idempotency_key="k") for _ in range(5))
            )
            assert len({each.id for each in asked}) == 1
            await manager.operator.wait(asked[0].id, 120)
            assert len(await doing.at_hypervisors(manager)) == 1

    asyncio.run(story())


def test_who_waits_for_what_is_not_there_is_told(place: Any) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            with pytest.raises(ResourceNotFound):
                await manager.operator.wait("f" * 32)
            with pytest.raises(ResourceNotFound):
                await manager.operator.cancel("f" * 32)

    asyncio.run(story())


def test_waiting_gives_up_after_its_time_and_the_operation_goes_on(
    place: Any, scripted: Any
) -> None:
    go_on = asyncio.Event()

    async def body(work: Work[UpdateMachine]) -> None:
        await go_on.wait()

    scripted(body)

    async def story() -> None:
        async with place.manager() as manager:
            operation = await manager.operator.submit(a_thing())
            assert (await manager.operator.wait(operation.id, 0.01)).state in {"queued", "running"}
            go_on.set()
            assert (await manager.operator.wait(operation.id)).state == "succeeded"

    asyncio.run(story())


# ------------------------------------------------------------------------ dry run


def test_a_dry_run_says_the_steps_and_touches_nothing(place: Any, doing: Any) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            told = await manager.operator.submit(
                CreateMachine(name="web", spec=SPEC, start=True), dry_run=True
            )
            assert (told.state, told.dry_run) == ("succeeded", True)
            assert [(step.name, step.state) for step in told.steps] == [
                ("register", "planned"),
                ("define", "planned"),
                ("claim", "planned"),
                ("network", "planned"),
                ("boot", "planned"),
            ]
            assert await manager.operator.wait(told.id) == told
            assert await doing.at_hypervisors(manager) == {}
            with pytest.raises(ResourceNotFound):
                await doing.machine(manager, "web")
            events = await manager.database.read(list_events)
            assert [each.kind for each in events.items if each.kind.startswith("machine")] == []
            await doing.did(manager, CreateMachine(name="web", spec=SPEC))
            with pytest.raises(Conflict):
                await manager.operator.submit(CreateMachine(name="web", spec=SPEC), dry_run=True)

    asyncio.run(story())


def test_settings_make_every_run_dry(place: Any, doing: Any) -> None:
    async def story() -> None:
        async with place.manager() as manager:
            await doing.did(manager, CreateMachine(name="web", spec=SPEC, start=True))
        async with place.manager(dry_run=True) as manager:
            told = await manager.operator.submit(
                DeleteMachine(machine="web", force=True), dry_run=False
            )
            assert told.dry_run
            assert (await doing.machine(manager, "web")).state == "running"
            assert list((await doing.at_hypervisors(manager)).values()) == ["running"]

    asyncio.run(story())


# ------------------------------------------------------------------------ the next manager


def test_what_was_under_way_goes_on_at_its_first_step_that_is_not_done(
    place: Any, doing: Any, scripted: Any
) -> None:
    running = asyncio.Event()

    async def body(work: Work[UpdateMachine]) -> dict[str, Any]:
        async with work.step("one") as step:
            if not step.done_before:
                made.done.append("one")
                step.data["made"] = 7
        async with work.step("two"):
            made.done.append("two")
            if made.done.count("two") == 1:
                running.set()
                await never()
        return {"made": step.data["made"], "recovered": work.recovered}

    made = scripted(body)

    async def story() -> None:
        async with place.manager() as manager:
            first = await manager.operator.submit(a_thing())
            behind = await manager.operator.submit(a_thing())
            await running.wait()
        async with place.manager() as manager:
            ended = await manager.operator.wait(first.id, 120)
            assert ended.state == "succeeded", ended.error
            assert ended.result == {"made": 7, "recovered": True}
            assert (await manager.operator.wait(behind.id, 120)).state == "succeeded"
            assert made.done == ["one", "two", "two", "one", "two"]

    asyncio.run(story())


def test_what_was_being_undone_goes_on_being_undone(place: Any, doing: Any, scripted: Any) -> None:
    undoing = asyncio.Event()

    async def body(work: Work[UpdateMachine]) -> None:
        async with work.step("one") as step:
            work.on_undo(step, lambda: undo("one"))
            if not step.done_before:
                made.done.append("do one")
        async with work.step("two") as step:
            work.on_undo(step, lambda: undo("two"))
            made.done.append("do two")
            raise OperationFailed("no")
        async with work.step("three"):
            made.done.append("do three")

    async def undo(name: str) -> None:
        made.done.append(f"undo {name}")
        if name == "one" and not undoing.is_set():
            undoing.set()
            await never()

    made = scripted(body)

    async def story() -> None:
        async with place.manager() as manager:
            operation = await manager.operator.submit(a_thing())
            await undoing.wait()
        async with place.manager() as manager:
            ended = await manager.operator.wait(operation.id, 120)
            assert ended.state == "failed"
            assert ended.error is not None
            assert ended.error["message"] == "no"
            assert made.done == ["do one", "do two", "undo two", "undo one", "undo one"]

    asyncio.run(story())


def test_one_home_has_one_manager_at_a_time(place: Any) -> None:
    async def story() -> None:
        async with place.manager():
            with pytest.raises(Exception, match="another process manages"):
                async with place.manager():
                    pass
        async with place.manager():
            pass

    asyncio.run(story())


def test_a_home_is_taken_from_a_manager_that_is_about_to_be_gone(place: Any) -> None:
    async def story() -> None:
        before = await Manager.open(place.make())
        closing = asyncio.get_running_loop().call_later(0.1, before._lock.release)
        async with place.manager():
            assert closing.when() <= asyncio.get_running_loop().time()
        before.database.close()

    asyncio.run(story())


def test_one_that_ends_before_its_first_step_gives_back_what_it_claimed(
    place: Any, doing: Any, scripted: Any
) -> None:
    running = asyncio.Event()

    async def waits(work: Work[UpdateMachine]) -> None:
        running.set()
        await never()

    async def refuses(work: Work[UpdateMachine]) -> None:
        def no(session: Session) -> None:
            raise OperationFailed("no")

        async with work.step("one", before=no):
            made.done.append("one")

    async def story() -> None:
        async with place.manager() as manager:
            if made.body is refuses:
                assert (await doing.do(manager, a_thing())).steps == ()
                return
            operation = await manager.operator.submit(a_thing())
            await running.wait()
            await manager.operator.cancel(operation.id)
            assert (await manager.operator.wait(operation.id, 120)).state == "cancelled"

    for body in (waits, refuses):
        made = scripted(body)
        asyncio.run(story())
        assert (made.withdrew, made.done) == (["a"], [])


def test_one_that_is_cancelled_and_left_before_its_first_step_gives_back_what_it_claimed(
    place: Any, doing: Any, scripted: Any
) -> None:
    running = asyncio.Event()

    async def body(work: Work[UpdateMachine]) -> None:
        running.set()
        if work.failure is None:
            await never()
        async with work.step("one"):
            made.done.append("one")

    made = scripted(body)

    async def story() -> None:
        async with place.manager() as manager:
            operation = await manager.operator.submit(a_thing())
            await running.wait()

        database = Database.open(place.make())
        database.write_now(_want_its_end, operation.id)
        database.close()
        async with place.manager() as manager:
            assert (await manager.operator.wait(operation.id, 120)).state == "cancelled"

    asyncio.run(story())
    assert (made.withdrew, made.done) == (["a"], [])


def test_a_cancellation_that_comes_while_a_step_is_written_down_undoes_the_step(
    place: Any, doing: Any, scripted: Any
) -> None:
    told = threading.Event()

    async def body(work: Work[UpdateMachine]) -> None:
        loop = asyncio.get_running_loop()
        execution = work.manager.operator._executions[work.operation_id]

        def cancel() -> None:
            execution.cancel()
            told.set()

        def before(session: Session) -> None:
            loop.call_soon_threadsafe(cancel)
            assert told.wait(120)

        async with work.step("one", before=before) as step:
            work.on_undo(step, undo)
            made.done.append("begun")
            await never()

    async def undo() -> None:
        made.done.append("undone")

    made = scripted(body)

    async def story() -> None:
        async with place.manager() as manager:
            ended = await doing.do(manager, a_thing())
            assert ended.state == "cancelled"
            assert [(step.name, step.state) for step in ended.steps] == [("one", "undone")]
            assert made.done == ["begun", "undone"]

    asyncio.run(story())


@pytest.mark.parametrize("how", ["told", "left"])
def test_who_cancels_what_is_all_done_is_too_late(
    place: Any, doing: Any, scripted: Any, how: str
) -> None:
    told = threading.Event()
    done = asyncio.Event()

    async def body(work: Work[UpdateMachine]) -> dict[str, Any]:
        loop = asyncio.get_running_loop()

        def cancel() -> None:
            work.manager.operator._executions[work.operation_id].cancel()
            told.set()

        def last(session: Session) -> None:
            loop.call_soon_threadsafe(cancel)
            assert told.wait(120)

        async with work.step("one") as step:
            work.on_undo(step, undo)
            if not step.done_before and how == "told":
                step.also(last)
        if how == "left" and work.failure is None:
            done.set()
            await never()
        return {"done": True}

    async def undo() -> None:
        made.done.append("undone")

    made = scripted(body)

    async def story() -> None:
        async with place.manager() as manager:
            operation = await manager.operator.submit(a_thing())
            if how == "told":
                ended = await manager.operator.wait(operation.id, 120)
            else:
                await done.wait()
        if how == "left":
            database = Database.open(place.make())
            database.write_now(_want_its_end, operation.id)
            database.close()
            async with place.manager() as manager:
                ended = await manager.operator.wait(operation.id, 120)
        assert (ended.state, ended.result, made.done) == ("succeeded", {"done": True}, [])

    asyncio.run(story())


def _want_its_end(session: Session, operation: str) -> None:
    session.get_one(OperationRow, operation).cancelling = True
