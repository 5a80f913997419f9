"""Starting and stopping machines: start, stop, restart, pause, resume.

Each begins with a step that says in the store what the machine is about to do and ends with one
that says what it does. Whatever fails in between leaves the state that the hypervisor tells, or
`failed` with the reason where a machine did not come up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy.orm import Session

from vmlab.hypervisors import processes
from vmlab.hypervisors.base import Hypervisor, Machine
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import (
    DeadlineExceeded,
    HypervisorUnavailable,
    InvalidState,
    MachineNotFound,
    VmlabError,
)
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import LIVE, OPERATIONS, MachineState
from vmlab.manager.networks.addresses import release
from vmlab.manager.operator.admission import Need, drop_reservation, reserve
from vmlab.manager.operator.handler import (
    Handler,
    PlannedStep,
    Target,
    key,
    operation_of,
    register,
)
from vmlab.manager.operator.journal import Step, Work
from vmlab.manager.operator.placement import (
    Placed,
    actual_state,
    defined,
    look,
    on_some_host,
    placed,
    refuse_unless,
    specification,
)
from vmlab.manager.operator.wiring import (
    connect,
    ended,
    is_untold,
    knows,
    reseed,
    tell_guest,
    write_spec,
)
from vmlab.manager.requests import (
    PauseMachine,
    RestartMachine,
    ResumeMachine,
    StartMachine,
    StopMachine,
)
from vmlab.manager.store.changes import set_machine_state
from vmlab.manager.store.queries import find_machine
from vmlab.manager.store.tables import MachineRow

__all__ = ["BOOT_STEPS", "boot", "claim_room", "machine_target"]

T = TypeVar("T")
Way = Callable[[Machine], Awaitable[str]]
"""Does something with a machine, and says why that did not do; "" if it did."""
M = TypeVar("M", StartMachine, StopMachine, RestartMachine, PauseMachine, ResumeMachine)

_TERMINATE_S: Final = 10.0
"""Seconds that a hypervisor's process has to end when it is told to (SIGTERM)."""
_LOOK_S: Final = 0.05
_SETTLED: Final = OPERATIONS["start"]
_REFRESH: Final = "have its guest know the time, and who and where it is"
_TO_STOP: Final = "say that it is to stop"

BOOT_STEPS: Final = (
    PlannedStep("claim", "have its memory and vCPUs, and its addresses"),
    PlannedStep("network", "have its networks up"),
    PlannedStep("boot", "boot it"),
)


def machine_target(row: MachineRow) -> Target:
    """An operation that changes one machine."""
    return Target(row.id, row.name, frozenset({key("machine", row.id)}), row.version)


class _OnMachine(Handler[M]):
    """What operations on one machine share: which states they begin in, and their target."""

    retry_safe = True
    allowed: frozenset[MachineState]

    async def prepare(self, request: M) -> M:
        await look(self.manager, request.machine)
        return request

    def check(self, session: Session, request: M) -> Target:
        row = find_machine(session, request.machine)
        refuse_unless(self.manager, row, self.verb, self.allowed)
        return machine_target(row)

    @property
    def verb(self) -> str:
        """What is done to the machine, in a word."""
        return self.kind.partition(".")[2]

    def claim(
        self,
        session: Session,
        work: Work[M],
        via: MachineState,
        wanted: str | None,
    ) -> None:
        """Have the store say what the machine is about to do.

        Raises:
            InvalidState: its state does not allow that any more.
        """
        row = session.get(MachineRow, work.target_id) or find_machine(session, work.target_id)
        state = actual_state(self.manager, row)
        # One that was under way before has left its states already.
        if not work.recovered and state not in self.allowed:
            raise InvalidState(
                self.verb,
                expected=tuple(state.value for state in MachineState if state in self.allowed),
                actual=state.value,
                machine=row.name,
                hypervisor=row.hypervisor,
            )
        if wanted is not None:
            row.wanted = wanted
        set_machine_state(session, row, via, operation=work.operation_id)

    async def step_on_machine(
        self,
        work: Work[M],
        via: MachineState,
        to: MachineState,
        text: str,
        act: Callable[[Machine], Awaitable[object]],
        *,
        wanted: str | None,
    ) -> None:
        """An operation of one step: `act`, unless the machine is in `to` already after a crash."""
        async with work.step(
            self.verb,
            text,
            before=lambda session: self.claim(session, work, via, wanted),
        ) as step:
            work.on_undo(step, partial(settle, work))
            if not step.done_before:
                machine = await work.database.read(placed, work.target_id)

                async def action(hypervisor: Hypervisor) -> None:
                    found = await _at(hypervisor, machine)
                    if work.recovered and (await found.status()).state is to:
                        return
                    await act(found)

                await on_some_host(work, machine, action, movable=False)
                step.also(write_state, work.target_id, to, work.operation_id)


async def _at(hypervisor: Hypervisor, machine: Placed) -> Machine:
    from vmlab.manager.operator.hosts import machine_name

    return await hypervisor.get(machine_name(machine.id))


def write_state(
    session: Session,
    machine_id: str,
    state: MachineState,
    operation: str,
    *,
    reason: str = "",
    wanted: str | None = None,
) -> None:
    """Have the store say what a machine does; one that is gone is no error."""
    row = session.get(MachineRow, machine_id)
    if row is not None:
        if wanted is not None:
            row.wanted = wanted
        set_machine_state(session, row, state, reason=reason, operation=operation)


async def settle(work: Work[Any]) -> None:
    """After a failure, have the store say what the machine does: as its hypervisor tells."""
    machine_id = work.target_id
    state, reason = await found_state(work, machine_id)
    wanted = {MachineState.RUNNING: "running", MachineState.PAUSED: "paused"}.get(state)
    await work.database.write(
        write_state, machine_id, state, work.operation_id, reason=reason, wanted=wanted
    )


async def found_state(work: Work[Any], machine_id: str) -> tuple[MachineState, str]:
    """What a machine does, and why, as its hypervisor says; unknown where it cannot say."""
    try:
        machine = await work.manager.machine(machine_id)
        status = await machine.status()
    except MachineNotFound:
        return MachineState.FAILED, "its hypervisor does not have it any more"
    except VmlabError as error:
        return MachineState.UNKNOWN, error.message
    return status.state, status.reason


# ------------------------------------------------------------------------ start


def claim_room(
    session: Session, handler: Handler[Any], row: MachineRow, operation: str, *, keep: bool
) -> None:
    """Refuse to boot a machine for which there is no room, and promise it if it is to `keep`.

    Raises:
        ResourceExhausted: naming the limits.
    """
    reserve(
        session,
        handler.manager.settings,
        Need(vcpus=row.vcpus, memory=row.memory),
        operation=operation,
        host=row.host,
        machine=row.id,
        what=f"start {row.name!r}",
        keep=keep,
    )


@register
class StartHandler(_OnMachine[StartMachine]):
    """Boots a machine."""

    kind = "machine.start"
    allowed = OPERATIONS["start"]

    def check(self, session: Session, request: StartMachine) -> Target:
        target = super().check(session, request)
        row = find_machine(session, request.machine)
        if actual_state(self.manager, row) not in LIVE:
            claim_room(session, self, row, operation_of(session), keep=True)
            self.manager.networks.prepare(session, row, operation=operation_of(session))
        return target

    def plan(self, session: Session, request: StartMachine) -> Sequence[PlannedStep]:
        return BOOT_STEPS

    def withdrawn(self, session: Session, request: StartMachine, target: str | None) -> None:
        row = session.get(MachineRow, target) if target is not None else None
        if row is not None and MachineState(row.state) not in LIVE:
            release(session, row.id, when="stop")

    async def run(self, work: Work[StartMachine]) -> dict[str, Any] | None:
        await boot(self, work)
        return None


async def boot(handler: Handler[Any], work: Work[Any], *, allowed: Any = _SETTLED) -> None:
    """Boot the machine that an operation is about: the steps of BOOT_STEPS.

    Args:
        handler: Whose operation it is.
        work: The operation.
        allowed: States that the machine may be in.

    Raises:
        VmlabError: it did not come up; it is in state failed, with the reason.
    """
    manager, machine_id = work.manager, work.target_id
    fresh: list[bool] = []

    def claim(session: Session) -> None:
        row = find_machine(session, machine_id)
        state = actual_state(manager, row)
        if not work.recovered and state not in allowed:
            raise InvalidState(
                "start",
                expected=tuple(state.value for state in MachineState if state in allowed),
                actual=state.value,
                machine=row.name,
                hypervisor=row.hypervisor,
            )
        fresh[:] = [row.state == MachineState.CREATED]
        if row.state != MachineState.STARTING:
            # From now on it counts as live, which takes the place of what was promised.
            claim_room(session, handler, row, work.operation_id, keep=False)
            drop_reservation(session, work.operation_id)
            manager.networks.prepare(session, row, operation=work.operation_id)
        row.wanted = "running"
        knows(row)  # what it boots finds its NICs by itself
        set_machine_state(session, row, MachineState.STARTING, operation=work.operation_id)

    async with work.step("claim", BOOT_STEPS[0].text, before=claim) as step:
        work.on_undo(step, partial(_not_booted, work))
        if not step.done_before:
            step.data["fresh"] = bool(fresh and fresh[0])
    movable = bool(step.data.get("fresh"))
    async with work.step("network", BOOT_STEPS[1].text) as step:
        if not step.done_before:
            machine = await work.database.read(placed, machine_id)
            await connect(manager, machine_id, machine.host)
    async with work.step("boot", BOOT_STEPS[2].text) as step:
        if not step.done_before:
            machine = await work.database.read(placed, machine_id)

            async def action(hypervisor: Hypervisor) -> MachineSpec:
                found = (
                    await defined(hypervisor, machine, specification(machine))
                    if movable
                    else await _at(hypervisor, machine)
                )
                if (await found.status()).state is not MachineState.RUNNING:
                    await reseed(manager, machine_id, found)
                    await found.start()
                return found.spec

            spec = await on_some_host(work, machine, action, movable=movable)
            step.also(write_spec, machine_id, spec)
            step.also(write_state, machine_id, MachineState.RUNNING, work.operation_id)


async def _not_booted(work: Work[Any]) -> None:
    """A start failed or was cancelled: nothing of the machine runs, and the store says why."""
    machine_id = work.target_id
    try:
        machine = await work.manager.machine(machine_id)
        status = await machine.status()
        if status.state.is_live or status.state is MachineState.UNKNOWN:
            await machine.kill()
            status = await machine.status()
        state, reason = status.state, status.reason
    except VmlabError as error:
        state, reason = MachineState.FAILED, error.message
        if isinstance(error, HypervisorUnavailable):
            state = MachineState.UNKNOWN
    if not work.cancelled and not state.is_live and state is not MachineState.UNKNOWN:
        state = MachineState.FAILED
        reason = work.failure.message if work.failure is not None else ""
    wanted = "stopped" if work.cancelled else None
    if not state.is_live and state is not MachineState.UNKNOWN:
        await ended(work.manager, machine_id)
    await work.database.write(
        write_state, machine_id, state, work.operation_id, reason=reason, wanted=wanted
    )


# ------------------------------------------------------------------------ stop


@register
class StopHandler(_OnMachine[StopMachine]):
    """Shuts a machine down: asks its guest, tells its process to end, kills it; each if need be."""

    kind = "machine.stop"
    allowed = OPERATIONS["stop"]
    seconds = 3900.0

    def plan(self, session: Session, request: StopMachine) -> Sequence[PlannedStep]:
        seconds = self._seconds(request)
        asked = f"ask the guest to shut down, and give it {seconds:g} s"
        return [
            PlannedStep("claim", _TO_STOP),
            *([PlannedStep("ask", asked)] if request.graceful else []),
            PlannedStep("terminate", "if it still runs: tell its process to end (SIGTERM)"),
            PlannedStep("kill", "if it still runs: kill it"),
            PlannedStep("release", "give back what it had"),
        ]

    def _seconds(self, request: StopMachine) -> float:
        if "timeout" in request.model_fields_set:
            return request.timeout
        return self.manager.settings.stop_seconds

    async def run(self, work: Work[StopMachine]) -> dict[str, Any] | None:
        request = work.request
        async with work.step(
            "claim",
            _TO_STOP,
            before=lambda session: self.claim(session, work, MachineState.STOPPING, "stopped"),
        ) as step:
            work.on_undo(step, partial(settle, work))
        seconds = self._seconds(request)
        how = await stop_by_steps(work, work.target_id, seconds if request.graceful else None)
        async with work.step("release", "give back what it had") as step:
            if not step.done_before:
                await work.database.write(
                    write_state, work.target_id, MachineState.STOPPED, work.operation_id
                )
                await ended(self.manager, work.target_id)
        return {"how": how}


async def stop_by_steps(work: Work[Any], machine_id: str, seconds: float | None) -> str:
    """Stop a machine by the mildest means that work: each is a step that can be seen.

    Args:
        work: The operation.
        machine_id: Of the machine.
        seconds: That its guest is given; None does not ask it.

    Returns:
        What it took: "ask", "terminate", "kill", or "" if nothing of it ran.
    """
    ways: list[tuple[str, str, Way]] = [
        ("terminate", "tell its process to end (SIGTERM)", _terminate),
        ("kill", "kill it", _kill),
    ]
    if seconds is not None:
        text = f"ask the guest to shut down, and give it {seconds:g} s"
        ways.insert(0, ("ask", text, partial(_ask, seconds=seconds)))
    took = ""
    for name, text, way in ways:
        async with work.step(name, text) as step:
            if step.done_before:
                took = name if step.state == "done" else took
                continue
            machine = await work.database.read(placed, machine_id)
            why = await on_some_host(
                work, machine, partial(_try, machine, way, step), movable=False
            )
            if step.state == "skipped":
                continue
            if why:
                step.failed(why)
            else:
                took = name
    return took


async def _try(machine: Placed, way: Way, step: Step, hypervisor: Hypervisor) -> str:
    """Try one way of stopping; why it did not do, or "" if it did."""
    try:
        found = await _at(hypervisor, machine)
    except MachineNotFound:
        step.skip("its hypervisor does not have it")
        return ""
    status = await found.status()
    if not status.state.is_live and status.state is not MachineState.UNKNOWN:
        step.skip("nothing of it runs")
        return ""
    return await way(found)


async def _ask(machine: Machine, *, seconds: float) -> str:
    try:
        await machine.stop(graceful=True, kill=False, timeout=seconds)
    except DeadlineExceeded:
        return f"the guest did not shut down within {seconds:g} s"
    except HypervisorUnavailable:
        raise
    except VmlabError as error:
        return str(error)
    return ""


async def _terminate(machine: Machine) -> str:
    owner = machine.hypervisor.owner
    found = await done_in_thread(processes.adopt, owner, machine.id)
    if not found:
        return "it has no process of its own"
    for process in found:
        process.terminate()
    try:
        async with asyncio.timeout(_TERMINATE_S):
            for process in found:
                await process.wait()
            # What follows from that, its hypervisor sees a moment later.
            while (await machine.status()).state.is_live:  # noqa: ASYNC110  # nobody would set it
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        return f"it still runs {_TERMINATE_S:g} s after SIGTERM"
    return ""


async def _kill(machine: Machine) -> str:
    await machine.kill()
    return ""


# ------------------------------------------------------------------------ restart, pause, resume


@register
class RestartHandler(_OnMachine[RestartMachine]):
    """Boots a running machine again."""

    kind = "machine.restart"
    allowed = OPERATIONS["restart"]

    def plan(self, session: Session, request: RestartMachine) -> Sequence[PlannedStep]:
        return [planned for planned, _ in self._ways(request)]

    def _ways(self, request: RestartMachine) -> list[tuple[PlannedStep, Way]]:
        if not request.graceful:
            return [(PlannedStep("restart", "reset it"), _reset)]
        asked = PlannedStep("restart", "have the guest shut down, and boot it again")
        ask = partial(_ask, seconds=self.manager.settings.stop_seconds)
        return [(asked, ask), (PlannedStep("reset", "if it does not: reset it"), _reset)]

    async def run(self, work: Work[RestartMachine]) -> dict[str, Any] | None:
        def claim(session: Session) -> None:
            self.claim(session, work, MachineState.RESTARTING, "running")

        done = False
        for number, (planned, way) in enumerate(self._ways(work.request)):
            before = claim if number == 0 else None
            async with work.step(planned.name, planned.text, before=before) as step:
                work.on_undo(step, partial(settle, work))
                if not step.done_before and done:
                    step.skip("it has booted again")
                elif not step.done_before:
                    machine = await work.database.read(placed, work.target_id)
                    act = partial(_boot_again, work, machine, way)
                    if why := await on_some_host(work, machine, act, movable=False):
                        step.failed(why)
                    step.also(write_state, work.target_id, MachineState.RUNNING, work.operation_id)
            done = "passed" not in step.data
        return None


async def _boot_again(
    work: Work[RestartMachine], machine: Placed, way: Way, hypervisor: Hypervisor
) -> str:
    """Try one way of booting a machine again; why it did not do, or "" if it did."""
    found = await _at(hypervisor, machine)
    # Of one that is off already, a crash came between its end and its beginning.
    if (await found.status()).state not in OPERATIONS["start"] and (why := await way(found)):
        return why
    if (await found.status()).state in OPERATIONS["start"]:
        await reseed(work.manager, work.target_id, found)
        await work.database.write(write_spec, work.target_id, found.spec)
        await found.start()
    return ""


async def _reset(machine: Machine) -> str:
    await machine.restart(graceful=False)
    return ""


@register
class PauseHandler(_OnMachine[PauseMachine]):
    """Stops a machine's vCPUs."""

    kind = "machine.pause"
    allowed = OPERATIONS["pause"]

    def plan(self, session: Session, request: PauseMachine) -> Sequence[PlannedStep]:
        return [PlannedStep("pause", "stop its vCPUs")]

    async def run(self, work: Work[PauseMachine]) -> dict[str, Any] | None:
        await self.step_on_machine(
            work,
            MachineState.PAUSING,
            MachineState.PAUSED,
            "stop its vCPUs",
            lambda machine: machine.pause(),
            wanted="paused",
        )
        return None


@register
class ResumeHandler(_OnMachine[ResumeMachine]):
    """Lets a machine's vCPUs run on."""

    kind = "machine.resume"
    allowed = OPERATIONS["resume"]

    def plan(self, session: Session, request: ResumeMachine) -> Sequence[PlannedStep]:
        return [PlannedStep("resume", "let its vCPUs run on"), PlannedStep("refresh", _REFRESH)]

    async def run(self, work: Work[ResumeMachine]) -> dict[str, Any] | None:
        await self.step_on_machine(
            work,
            MachineState.RESUMING,
            MachineState.RUNNING,
            "let its vCPUs run on",
            lambda machine: machine.resume(),
            wanted="running",
        )
        async with work.step("refresh", _REFRESH) as step:
            if not step.done_before:
                if await self.manager.database.read(is_untold, work.target_id):
                    await tell_guest(self.manager, work.target_id, MachineState.RUNNING, step)
                else:
                    step.skip("it knows")
        return None
