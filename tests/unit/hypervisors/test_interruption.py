"""Every operation, interrupted at every one of its awaits, in every way there is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.unit.hypervisors.toy import (
    FAILED,
    PAUSED,
    RUNNING,
    STOPPED,
    ToyHypervisor,
    ToyMachine,
    of_type,
)

from vmlab.hypervisors.ownership import Owner
from vmlab.machine.errors import (
    DeadlineExceeded,
    InvalidState,
    MachineCrashed,
    MigrationFailed,
    OperationAborted,
    OperationFailed,
    VmlabError,
)
from vmlab.machine.events import EventType
from vmlab.machine.faults import DiskError
from vmlab.machine.spec import Disk, MachineSpec, Nic
from vmlab.machine.states import MachineState

CREATED, UNKNOWN, DELETED = MachineState.CREATED, MachineState.UNKNOWN, MachineState.DELETED


@dataclass
class Scene:
    """Two hypervisors and a machine on the first."""

    here: ToyHypervisor
    there: ToyHypervisor
    machine: ToyMachine
    creates: bool

    def check(self) -> None:
        self.here.check()
        self.there.check()

    @property
    def undone(self) -> list[str]:
        """What was undone of the machine, but for copies of it that came not to be."""
        name = "a:" if not self.creates else "b:"
        return [entry for entry in self.here.undone if entry.startswith(name)]

    async def clear(self) -> None:
        """Everything can be deleted, and then nothing is left."""
        self.here.before.clear()
        self.here.after.clear()
        for hypervisor in (self.here, self.there):
            for machine in await hypervisor.list():
                await machine.delete(force=True)
            hypervisor.check()
            assert hypervisor.things == set()


Call = Callable[[Scene], Coroutine[Any, Any, Any]]


@dataclass
class Case:
    name: str
    state: MachineState
    call: Call
    prepare: Callable[[ToyMachine], Awaitable[Any]] | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.name}-{self.state.value}"

    async def scene(self) -> Scene:
        here = ToyHypervisor(Owner("run", "r1", Path("nowhere")))
        there = ToyHypervisor(Owner("run", "r2", Path("nowhere")))
        machine = await here.machine(self.state, **self.fields)
        if self.prepare is not None:
            await self.prepare(machine)
        here.undone.clear()
        return Scene(here, there, machine, self.name == "create")


DISK = Disk(name="data", size=1 << 20)
NIC = Nic(name="net0")
NIC_N = {"name": "n"}


async def _snapshot(machine: ToyMachine) -> None:
    await machine.snapshot("s", memory=machine.state.is_live)


async def _fault(machine: ToyMachine) -> None:
    machine.faults.add("f")


CASES = [
    *(Case("start", state, lambda s: s.machine.start()) for state in (CREATED, STOPPED, FAILED)),
    *(Case("stop", state, lambda s: s.machine.stop()) for state in (RUNNING, PAUSED, UNKNOWN)),
    *(
        Case("stop-only-asking", state, lambda s: s.machine.stop(kill=False))
        for state in (RUNNING, PAUSED)
    ),
    Case("stop-at-once", RUNNING, lambda s: s.machine.stop(graceful=False)),
    *(
        Case("kill", state, lambda s: s.machine.kill())
        for state in (RUNNING, PAUSED, FAILED, UNKNOWN)
    ),
    Case("pause", RUNNING, lambda s: s.machine.pause()),
    Case("resume", PAUSED, lambda s: s.machine.resume()),
    Case("restart", RUNNING, lambda s: s.machine.restart()),
    Case("reset", RUNNING, lambda s: s.machine.restart(graceful=False)),
    *(
        Case("delete", state, lambda s: s.machine.delete())
        for state in (CREATED, STOPPED, FAILED, UNKNOWN)
    ),
    *(
        Case("delete-with-force", state, lambda s: s.machine.delete(force=True))
        for state in (RUNNING, PAUSED, STOPPED, UNKNOWN)
    ),
    *(
        Case("snapshot", state, lambda s: s.machine.snapshot("s"))
        for state in (CREATED, RUNNING, PAUSED, STOPPED)
    ),
    Case("delete-snapshot", RUNNING, lambda s: s.machine.delete_snapshot("s"), _snapshot),
    *(
        Case("restore", state, lambda s: s.machine.restore("s"), _snapshot)
        for state in (CREATED, RUNNING, PAUSED, STOPPED)
    ),
    *(Case("fork", state, lambda s: s.machine.fork("b")) for state in (RUNNING, PAUSED)),
    *(
        Case("migrate", state, lambda s: s.machine.migrate(s.there))
        for state in (CREATED, RUNNING, PAUSED, STOPPED)
    ),
    *(
        Case("plug-disk", state, lambda s: s.machine.plug_disk(DISK))
        for state in (STOPPED, RUNNING)
    ),
    Case("unplug-disk", RUNNING, lambda s: s.machine.unplug_disk("root")),
    Case("resize-disk", RUNNING, lambda s: s.machine.resize_disk("root", 1 << 21)),
    Case("plug-nic", RUNNING, lambda s: s.machine.plug_nic(NIC)),
    Case("unplug-nic", RUNNING, lambda s: s.machine.unplug_nic("n"), fields={"nics": [NIC_N]}),
    *(
        Case("resize", state, lambda s: s.machine.resize(vcpus=2, memory=1 << 30))
        for state in (STOPPED, RUNNING)
    ),
    Case("pin", RUNNING, lambda s: s.machine.pin({0: (0, 1)})),
    Case("inject", RUNNING, lambda s: s.machine.inject(DiskError(disk="root"))),
    Case("clear-fault", RUNNING, lambda s: s.machine.clear_fault("f"), _fault),
    Case("create", CREATED, lambda s: s.here.create(MachineSpec.of(name="b"))),
]
ON_A_MACHINE = [case for case in CASES if case.name != "create"]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_case_on_a_machine = pytest.mark.parametrize("case", ON_A_MACHINE, ids=lambda case: case.id)


async def after(steps: int, task: asyncio.Task[Any]) -> bool:
    """Whether `task` is still under way after so many turns of the event loop."""
    for _ in range(steps):
        await asyncio.sleep(0)
        if task.done():
            return False
    return not task.done()


def at_every_await(scenario: Callable[[int], Coroutine[Any, Any, bool]]) -> int:
    """Run `scenario(n)` for n = 0, 1, ... until it says that the operation was over before."""
    steps = 0
    while asyncio.run(scenario(steps)):
        steps += 1
        assert steps < 200
    return steps


def begun_and_failed(scene: Scene) -> tuple[int, int]:
    """How many operations began after the scene was set, and how many of them failed."""
    events = of_type(scene.here, EventType.OPERATION_STARTED)
    failed = of_type(scene.here, EventType.OPERATION_FAILED)
    return len(events), len(failed)


@every_case
def test_cancelled_operation_leaves_a_stable_state_and_is_undone_once(case: Case) -> None:
    async def scenario(steps: int) -> bool:
        scene = await case.scene()
        had_begun, had_failed = begun_and_failed(scene)
        task = asyncio.create_task(case.call(scene))
        if not await after(steps, task):
            await task
            return False
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled(), "a cancelled operation tells its caller"
        scene.check()
        begun, failed = begun_and_failed(scene)
        assert failed - had_failed == len(scene.undone)
        assert len(scene.undone) <= begun - had_begun <= 1
        if case.name != "create" and scene.machine.state is not DELETED:
            assert (await scene.machine.status()).state is scene.machine.state
        await scene.clear()
        return True

    assert at_every_await(scenario) >= 2


@every_case
def test_operation_whose_deadline_passes_anywhere_is_undone_once(case: Case) -> None:
    async def scenario(steps: int) -> bool:
        scene = await case.scene()
        task = asyncio.create_task(case.call(scene))
        if not await after(steps, task):
            await task
            return False
        operations = scene.here._making if case.name == "create" else scene.machine._pending
        ended = False
        for operation in [*(operations.values() if case.name == "create" else operations)]:
            if not (operation.over or operation.committed):
                operation.scope.reschedule(asyncio.get_running_loop().time())
                ended = True
        await asyncio.wait((task,))
        error = task.exception()
        assert error is None or isinstance(error, DeadlineExceeded)
        scene.check()
        assert len(scene.undone) <= 1
        if error is not None:
            assert ended
            told = of_type(scene.here, EventType.OPERATION_FAILED)[-1:]
            assert not scene.undone or told[0].data["error"] == "DeadlineExceeded"
        await scene.clear()
        return True

    assert at_every_await(scenario) >= 2


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in {"start", "snapshot", "fork", "migrate", "create"}],
    ids=lambda case: case.id,
)
def test_second_cancellation_does_not_cut_the_undoing_short(case: Case) -> None:
    async def scenario(steps: int, later: int) -> bool:
        scene = await case.scene()
        task = asyncio.create_task(case.call(scene))
        if not await after(steps, task):
            return False
        task.cancel()
        await after(later, task)
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()
        scene.check()
        assert len(scene.undone) <= 1
        # Undoing that was cut short would leave nobody knowing what the machine does.
        assert scene.machine.state is not UNKNOWN
        await scene.clear()
        return True

    for later in range(1, 7):
        at_every_await(lambda steps, later=later: scenario(steps, later))


@every_case_on_a_machine
def test_kill_ends_any_operation_of_a_live_machine(case: Case) -> None:
    async def scenario(steps: int) -> bool:
        scene = await case.scene()
        task = asyncio.create_task(case.call(scene))
        # At least one turn: what was not even called before the kill is not ended by it.
        if not await after(steps + 1, task):
            await task
            return False
        machine = scene.machine
        killable = machine.state.is_live or machine.state in {FAILED, UNKNOWN}
        try:
            await machine.kill()
        except InvalidState as error:
            assert not killable
            assert error.operation == "kill"
        await asyncio.wait((task,))
        assert not task.cancelled()
        failure = task.exception()
        if case.name in {"kill", "delete", "delete-with-force"}:
            assert failure is None or (not killable and isinstance(failure, VmlabError))
        elif failure is not None:
            assert isinstance(failure, OperationAborted | InvalidState)
        if killable:
            assert machine.state in {CREATED, STOPPED, DELETED}
        assert len(scene.undone) <= 1
        scene.check()
        await scene.clear()
        return True

    at_every_await(scenario)


@pytest.mark.parametrize("how", [FAILED, STOPPED], ids=["crash", "shutdown"])
@every_case_on_a_machine
def test_machine_that_ends_underneath_an_operation_is_known_to_have_ended(
    case: Case, how: MachineState
) -> None:
    event = EventType.CRASHED if how is FAILED else EventType.GUEST_SHUTDOWN

    async def scenario(steps: int) -> bool:
        scene = await case.scene()
        machine = scene.machine
        task = asyncio.create_task(case.call(scene))
        if not await after(steps, task):
            await task
            return False
        lives = machine.guest in {RUNNING, PAUSED}
        under_way = machine._current
        undoing = under_way is not None and under_way.over
        if lives:
            machine.befall(how, event, "it ended by itself")
        await asyncio.wait((task,))
        error = task.exception()
        scene.check()
        assert len(scene.undone) <= 1
        kinds: tuple[type[VmlabError], ...] = (InvalidState,)
        kinds += (MachineCrashed,) if how is FAILED else (OperationAborted,)
        if case.name == "migrate":
            kinds += (MigrationFailed,)  # when it ends while it is handed over
        if case.name in {"inject", "clear-fault"}:
            kinds += (OperationFailed,)  # faults end machines, so that does not end these
        assert error is None or isinstance(error, kinds)
        ends = case.name.partition("-")[0] in {"stop", "kill", "delete"}
        if lives and error is not None and not undoing:
            assert machine.state is how
        if lives and under_way is not None and not ends and case.name != "restart":
            # The machine that arrived elsewhere had left; no other operation brings it to life.
            wanted = machine.state is DELETED or case.name in {"inject", "clear-fault"}
            assert error is not None or wanted
        await scene.clear()
        return True

    at_every_await(scenario)


@every_case_on_a_machine
def test_forced_delete_ends_any_operation(case: Case) -> None:
    async def scenario(steps: int) -> bool:
        scene = await case.scene()
        task = asyncio.create_task(case.call(scene))
        if not await after(steps, task):
            await task
            return False
        await scene.machine.delete(force=True)
        await asyncio.wait((task,))
        assert isinstance(task.exception(), OperationAborted | InvalidState | None)
        assert scene.machine.state is DELETED
        scene.check()
        await scene.clear()
        return True

    at_every_await(scenario)
