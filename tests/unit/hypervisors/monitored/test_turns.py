"""Several processes use one machine of a store: who had its turn knows what became of it.

Two hypervisors on one store stand for two processes; the machine's process is a stand-in, whose
end each of them is told when the test says so. The engine itself is in
tests/integration/embedded/test_processes.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors import processes
from vmlab.hypervisors.embedded import hypervisor as embedded
from vmlab.hypervisors.embedded.machine import EmbeddedMachine, EngineProcess
from vmlab.hypervisors.locks import FileLock
from vmlab.hypervisors.monitored.turns import Turns
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.qmp import QmpEvent, QmpLost
from vmlab.hypervisors.records import LOCK, MachineRecords
from vmlab.machine.errors import (
    DeadlineExceeded,
    InvalidState,
    MachineCrashed,
    MachineNotFound,
    OperationFailed,
)
from vmlab.machine.events import EventType
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

RUNNING, PAUSED, STOPPED, FAILED = (
    MachineState.RUNNING,
    MachineState.PAUSED,
    MachineState.STOPPED,
    MachineState.FAILED,
)


class Process:
    """The machine's process, as the records of the host tell of it."""

    pid = 7
    argv = ("python", "-m", "vmlab.engine")
    returncode = None

    def __init__(self) -> None:
        self.running = True
        self.status = "running"
        self.talks: list[Talk] = []
        self.deaf: set[Talk] = set()

    def kill(self) -> bool:
        if self.running:
            self.running = False
            for talk in self.talks:
                self.tell(talk)
        return True

    async def wait(self, timeout: float | None = None) -> None:
        assert not self.running

    def tell(self, talk: Talk) -> None:
        """Tell `talk` that the process has ended, unless the test keeps that from it."""
        if talk not in self.deaf and not talk.ending and talk.on_end is not None:
            talk.on_end("the engine has ended")


class Talk:
    """One process's conversation with the machine's process."""

    program = "the engine"
    exited = False

    def __init__(self, process: Process, directory: Path) -> None:
        self.process = process
        self.directory = directory
        self.ending = False
        self.on_end: Callable[[str], None] | None = None
        # Cleared to hold up whoever ends the process, once that has ended.
        self.may_return = asyncio.Event()
        self.may_return.set()
        self.may_execute = asyncio.Event()
        self.may_execute.set()
        process.talks.append(self)

    @property
    def running(self) -> bool:
        return self.process.running

    def watch(self, on_end: Callable[[str], None]) -> None:
        self.on_end = on_end

    async def noticed(self) -> None:
        """The stand-in tells of its end at once."""

    async def execute(self, command: str, arguments: Any = None) -> Any:
        await self.may_execute.wait()
        if not self.running:
            raise MachineCrashed(f"{command} failed: the engine has ended")
        self.process.status = {"stop": "paused", "cont": "running"}.get(
            command, self.process.status
        )
        return {"status": self.process.status}

    async def end(self) -> None:
        self.ending = True
        self.process.kill()
        await self.may_return.wait()

    quit = end

    async def release(self) -> None:
        self.ending = True

    def clear(self) -> None:
        """The stand-in has no files."""


class Host:
    """A store with one machine, and the processes of that machine."""

    def __init__(self, directory: Path) -> None:
        self.owner = Owner("store", "s1", directory)
        self.processes: list[Process] = []
        self.id = ""

    async def open(self) -> EmbeddedMachine:
        """The machine, as another process has it."""
        found = embedded.EmbeddedHypervisor(self.owner)
        if not self.id:
            spec = MachineSpec.of(
                name="vm",
                architecture="riscv64",
                memory="8M",
                boot={"kernel": self.owner.directory / "kernel"},
                consoles=(),
                channels=(),
            )
            self.id = (await found.create(spec)).id
        machine = await found.get("vm")
        assert isinstance(machine, EmbeddedMachine)
        return machine

    async def both(self) -> tuple[EmbeddedMachine, EmbeddedMachine]:
        """The machine, running, as two processes have it."""
        first = await self.open()
        await first.start()
        second = await self.open()
        assert second.state is RUNNING
        assert talk(second) is not talk(first)
        assert talk(second).process is talk(first).process
        return first, second

    def record(self) -> dict[str, Any]:
        path = self.owner.directory / "machines" / "embedded" / self.id / "machine.json"
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def recorded(self) -> tuple[str, str]:
        found = self.record()
        return found["state"], found["reason"]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    (tmp_path / "kernel").write_bytes(b"x")
    made = Host(tmp_path)

    async def start(argv: Any, directory: Path, **_: Any) -> Talk:
        made.processes.append(Process())
        return Talk(made.processes[-1], directory)

    async def adopt(process: Process, directory: Path, **_: Any) -> Talk:
        return Talk(process, directory)

    def found(owner: Owner, machine: str | None = None) -> list[Process]:
        return [process for process in made.processes if process.running]

    monkeypatch.setattr(embedded, "_compile", lambda: None)
    monkeypatch.setattr(EngineProcess, "start", start)
    monkeypatch.setattr(EngineProcess, "adopt", adopt)
    monkeypatch.setattr(processes, "adopt", found)
    return made


def talk(machine: EmbeddedMachine) -> Talk:
    found: Any = machine.emulator
    assert isinstance(found, Talk)
    return found


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 250))


async def until(machine: EmbeddedMachine, state: MachineState) -> None:
    while machine.state is not state:  # noqa: ASYNC110 (a state tells nobody)
        await asyncio.sleep(0.001)


async def several_polls() -> None:
    """Long enough for what waits for a turn to have looked for it."""
    for _ in range(3):
        await asyncio.sleep(0.03)


def kinds(machine: EmbeddedMachine) -> set[EventType]:
    return {event.type for event in machine.hypervisor.log.since(0)}


def test_who_sees_the_end_before_it_is_recorded_waits_for_the_record(host: Host) -> None:
    async def test() -> None:
        first, second = await host.both()
        held = talk(first)
        held.may_return.clear()
        stopping = asyncio.create_task(first.stop(graceful=False))
        while held.running:  # noqa: ASYNC110 (the stand-in tells nobody)
            await asyncio.sleep(0)
        await several_polls()
        assert (first.state, second.state) == (MachineState.STOPPING, RUNNING)
        assert host.recorded()[0] == "running"
        held.may_return.set()
        await stopping
        await until(second, STOPPED)
        assert host.recorded() == ("stopped", "stop")
        assert (await second.status()).reason == "stop"
        assert EventType.CRASHED not in kinds(second)

    run(test())


def test_who_sees_the_end_after_it_was_recorded_takes_it_from_the_record(host: Host) -> None:
    async def test() -> None:
        first, second = await host.both()
        late = talk(second)
        late.process.deaf.add(late)
        await first.stop(graceful=False)
        assert (host.recorded(), second.state) == (("stopped", "stop"), RUNNING)
        late.process.deaf.clear()
        late.process.tell(late)
        assert (await second.status()).state is STOPPED
        assert (second.reason, host.recorded()) == ("stop", ("stopped", "stop"))
        assert EventType.CRASHED not in kinds(second)
        assert second.emulator is None

    run(test())


def test_a_status_learns_what_another_process_did_with_a_machine_at_rest(host: Host) -> None:
    async def test() -> None:
        first, second = await host.both()
        await first.kill()
        await until(second, STOPPED)
        await first.start()
        assert second.state is STOPPED
        assert (await second.status()).state is RUNNING
        assert talk(second).process is talk(first).process is host.processes[1]
        # While another one is at it, what was known last is told.
        await first.kill()
        await until(second, STOPPED)
        lock = FileLock.take(host.owner.directory / "machines" / "embedded" / host.id / LOCK)
        assert lock is not None
        assert (await second.status()).state is STOPPED
        lock.release()
        await first.delete()
        assert (await second.status()).state is MachineState.DELETED

    run(test())


def test_a_crash_is_recorded_by_whoever_sees_it_first_and_believed_by_the_other(host: Host) -> None:
    async def test() -> None:
        first, second = await host.both()
        host.processes[0].kill()
        await until(first, FAILED)
        await until(second, FAILED)
        assert first.reason == second.reason == "the engine has ended"
        assert host.recorded() == ("failed", "the engine has ended")
        assert EventType.CRASHED in kinds(first) | kinds(second)

    run(test())


def test_what_the_guest_did_is_told_by_all_who_heard_it(host: Host) -> None:
    async def test() -> None:
        first, second = await host.both()
        event = QmpEvent("GUEST_PANICKED", {"info": "oops"}, 0.0)
        for machine in (first, second):
            machine.watcher(1)(event)
        await until(first, FAILED)
        await until(second, FAILED)
        assert first.reason == second.reason == "oops"
        for machine in (first, second):
            assert EventType.GUEST_PANIC in kinds(machine)
            assert EventType.CRASHED not in kinds(machine)

    run(test())


def test_who_sees_an_old_process_end_finds_the_new_one(host: Host) -> None:
    async def test() -> None:
        first, second = await host.both()
        late = talk(second)
        late.process.deaf.add(late)
        await first.kill()
        await first.start()
        late.process.deaf.clear()
        late.process.tell(late)
        while second.launches == 1:  # noqa: ASYNC110 (a number tells nobody)
            await asyncio.sleep(0.001)
        assert (await second.status()).state is RUNNING
        assert (second.state, second.launches) == (RUNNING, 2)
        assert talk(second).process is talk(first).process is host.processes[1]
        await second.pause()
        assert (host.recorded(), host.record()["launches"]) == (("paused", "pause"), 2)

    run(test())


def test_an_operation_does_not_wait_for_who_waits_for_its_turn(host: Host) -> None:
    async def test() -> None:
        first, second = await host.both()
        # Told of the end under an operation that has the turn, and that waits for the telling.
        held = talk(first)
        held.may_execute.clear()
        pausing = asyncio.create_task(first.pause())
        await until(first, MachineState.PAUSING)
        host.processes[0].kill()
        held.may_execute.set()
        with pytest.raises(MachineCrashed):
            await pausing
        assert first.state is FAILED
        await until(second, FAILED)
        await asyncio.gather(first.kill(), second.kill())
        assert (first.state, second.state, host.recorded()[0]) == (STOPPED, STOPPED, "stopped")

    run(test())


def test_an_operation_begins_with_what_others_have_done(host: Host) -> None:
    async def test() -> None:
        first, second = await host.both()
        await first.kill()
        await until(second, STOPPED)
        await first.resize(vcpus=2)
        await first.start()
        assert second.spec.cpus.count == 1
        with pytest.raises(InvalidState):
            await second.start()
        assert (second.state, second.spec.cpus.count) == (RUNNING, 2)
        assert talk(second).process is talk(first).process
        await first.delete(force=True)
        with pytest.raises(InvalidState, match="deleted"):
            await second.pause()
        await second.delete()
        assert second.state is MachineState.DELETED
        with pytest.raises(MachineNotFound):
            await second.hypervisor.get("vm")

    run(test())


def test_who_sees_the_end_of_a_machine_that_was_deleted_forgets_it(host: Host) -> None:
    async def test() -> None:
        first, second = await host.both()
        await first.delete(force=True)
        await until(second, MachineState.DELETED)
        assert EventType.DELETED in kinds(second)
        assert await second.hypervisor.list() == []

    run(test())


def test_a_kill_breaks_in_on_what_another_process_does(host: Host) -> None:
    async def test() -> None:
        first, second = await host.both()
        held = talk(first)
        held.may_execute.clear()
        pausing = asyncio.create_task(first.pause())
        await until(first, MachineState.PAUSING)
        with pytest.raises(DeadlineExceeded) as late:
            await second.pause(timeout=0.1)
        assert late.value.hint is not None and "another process" in late.value.hint
        killing = asyncio.create_task(second.kill())
        while host.processes[0].running:  # noqa: ASYNC110 (the stand-in tells nobody)
            await asyncio.sleep(0.001)
        held.may_execute.set()
        with pytest.raises(MachineCrashed):
            await pausing
        await killing
        assert host.recorded() == ("stopped", "kill")

    run(test())


def test_what_is_only_seen_is_not_written_over_what_another_did(host: Host) -> None:
    async def test() -> None:
        first, second = await host.both()
        await first.pause()
        before = host.record()
        assert (await second.status()).state is PAUSED
        assert host.record() == before

    run(test())


def test_who_closes_waits_for_nobody(host: Host) -> None:
    async def test() -> None:
        first, second = await host.both()
        held = talk(first)
        held.may_return.clear()
        stopping = asyncio.create_task(first.stop(graceful=False))
        while held.running:  # noqa: ASYNC110 (the stand-in tells nobody)
            await asyncio.sleep(0)
        await second.hypervisor.close()
        assert not stopping.done()
        held.may_return.set()
        await stopping
        assert host.recorded() == ("stopped", "stop")

    run(test())


def test_a_machine_at_which_another_is_at_work_is_found_but_left_alone(host: Host) -> None:
    async def test() -> None:
        first, _ = await host.both()
        held = talk(first)
        held.may_return.clear()
        stopping = asyncio.create_task(first.stop(graceful=False))
        while held.running:  # noqa: ASYNC110 (the stand-in tells nobody)
            await asyncio.sleep(0)
        third = await host.open()
        assert (third.state, host.recorded()[0]) == (FAILED, "running")
        host.processes[0].running = True
        host.processes[0].status = "shutdown"
        fourth = await host.open()
        assert (fourth.state, host.processes[0].running) == (STOPPED, True)
        host.processes[0].running = False
        held.may_return.set()
        await stopping
        assert (await host.open()).state is STOPPED

    run(test())


@pytest.mark.parametrize(
    ("ends", "state"), [(True, FAILED), (False, MachineState.UNKNOWN)], ids=["ends", "lives"]
)
def test_a_process_that_hangs_up_while_it_is_found_ends_or_nobody_knows(
    host: Host, monkeypatch: pytest.MonkeyPatch, ends: bool, state: MachineState
) -> None:
    async def hangs_up(process: Process, directory: Path, **_: Any) -> Talk:
        raise QmpLost("the other side hung up")

    async def wait(timeout: float | None = None) -> None:
        # Killed just now, it was alive a moment longer.
        if not ends:
            raise TimeoutError
        host.processes[0].running = False

    async def test() -> None:
        await (await host.open()).start()
        monkeypatch.setattr(EngineProcess, "adopt", hangs_up)
        monkeypatch.setattr(host.processes[0], "wait", wait)
        assert (await host.open()).state is state

    run(test())


def test_a_machine_that_does_not_answer_is_killed_all_the_same(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(process: Process, directory: Path, **_: Any) -> Talk:
        raise OperationFailed("it does not answer")

    async def test() -> None:
        first = await host.open()
        for action in ("kill", "delete"):
            await first.start()
            monkeypatch.setattr(EngineProcess, "adopt", silent)
            second = await host.open()
            assert second.state is MachineState.UNKNOWN
            await getattr(second, action)()
            assert not host.processes[-1].running
        with pytest.raises(MachineNotFound):
            await host.open()

    run(test())


# ------------------------------------------------------------------- turns by themselves


@pytest.fixture
def records(tmp_path: Path) -> MachineRecords:
    made = MachineRecords(Owner("store", "s1", tmp_path), "qemu")
    made.create("m1")
    return made


def turns(records: MachineRecords, begun: list[str] | None = None) -> Turns:
    async def catch_up() -> None:
        if begun is not None:
            begun.append("caught up")

    return Turns(records, "m1", catch_up)


def never() -> None:
    pytest.fail("another one has the turn")


def test_turns_do_not_overlap_but_within_a_process(records: MachineRecords) -> None:
    order: list[str] = []

    async def hold(name: str) -> None:
        async with turns(records, order).shared() as begun:
            assert begun
            order.append(f"+{name}")
            await asyncio.sleep(0)
            order.append(f"-{name}")

    async def test() -> None:
        await asyncio.gather(*(hold(name) for name in "abc"))
        order[:] = [entry for entry in order if entry != "caught up"]
        assert all(order[i][1] == order[i + 1][1] for i in (0, 2, 4)), order
        own, seen = turns(records, order), turns(records)
        order.clear()
        await own.begin(never)
        async with own.shared() as begun, own.at_once() as again, seen.at_once() as other:
            assert (begun, again, other) == (True, True, False)
            own.end()
            async with seen.at_once() as other:
                assert not other
        assert order == ["caught up"]
        async with seen.at_once() as other:
            assert other

    run(test())


def test_a_run_has_its_turn_always(tmp_path: Path) -> None:
    records = MachineRecords(Owner("run", "r1", tmp_path), "qemu")
    begun: list[str] = []

    async def test() -> None:
        one = turns(records, begun)
        assert one.ours
        await one.begin(never)
        async with turns(records).at_once() as other:
            assert other
        one.end()

    run(test())
    assert begun == []


def test_a_turn_whose_beginning_fails_is_free(records: MachineRecords) -> None:
    async def fail() -> None:
        raise OperationFailed("the record is damaged")

    async def test() -> None:
        damaged = Turns(records, "m1", fail)
        with pytest.raises(OperationFailed, match="damaged"):
            await damaged.begin(never)
        assert not damaged.ours
        await turns(records).begin(never)

    run(test())


def test_there_is_no_turn_at_a_machine_that_was_deleted(records: MachineRecords) -> None:
    async def test() -> None:
        held = turns(records)
        await held.begin(never)
        records.remove("m1")
        held.end()
        with pytest.raises(MachineNotFound, match="has no machine"):
            await turns(records).begin(never)
        records.create("m1")
        async with turns(records).at_once() as begun:
            assert begun

    run(test())


def test_who_has_a_turn_is_asked_for_it_again_and_again(records: MachineRecords) -> None:
    asked: list[int] = []

    async def test() -> None:
        lock = FileLock.take(records.directory("m1") / LOCK)
        assert lock is not None

        def busy() -> None:
            asked.append(len(asked))
            if len(asked) == 3:
                lock.release()

        await turns(records).begin(busy)

    run(test())
    assert asked == [0, 1, 2]
