"""Stop, as asked and by force: the guest has its time, and no more."""

from __future__ import annotations

from vmlab.conformance.bench import Bench, of_type
from vmlab.conformance.registry import Means, check
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import DeadlineExceeded, OperationAborted
from vmlab.machine.events import EventType
from vmlab.machine.states import MachineState


@check(
    "stop.paused",
    clause="a graceful stop of a paused machine lets the guest shut down: what it had written and "
    "not flushed is there",
    needs=[Capability.PAUSE],
    means=[Means.GUEST],
)
async def paused(lab: Bench) -> None:
    machine = await lab.run()
    data = lab.bytes()
    disk = lab.scratch[0]
    await lab.guest(machine).write_disk(disk, 0, data)
    await machine.pause()
    await machine.stop()
    await lab.is_in(machine, MachineState.STOPPED, "a paused machine after stop")
    await machine.start()
    found = await lab.guest(machine).read_disk(disk, 0, len(data))
    lab.equal(found, data, "what the guest had written before it was paused and stopped")


@check(
    "stop.then-kill",
    clause="a guest that does not shut down in its time is killed, and not before",
    means=[Means.GUEST],
)
async def then_kill(lab: Bench) -> None:
    machine = await lab.run()
    await lab.guest(machine).ignore_powerdown(True)
    grace = 5 * lab.profile.settle
    begun = lab.now()
    await machine.stop(timeout=grace)
    took = lab.now() - begun
    await lab.is_in(machine, MachineState.STOPPED, "a machine that had to be killed")
    lab.true(took >= grace, f"the guest was given its {grace:g} s ({took:g} s)")
    lab.true(took < grace + lab.profile.slack, f"it was killed when they were over ({took:g} s)")


@check(
    "stop.without-kill",
    clause="with kill=False a guest that does not shut down in its time runs on as before, and "
    "stop raises DeadlineExceeded with the time that it was given",
    means=[Means.GUEST],
)
async def without_kill(lab: Bench) -> None:
    machine = await lab.run()
    marker = lab.bytes()
    await lab.guest(machine).ignore_powerdown(True)
    await lab.guest(machine).write_memory(0, marker)
    states = [MachineState.RUNNING]
    if lab.has(Capability.PAUSE, Capability.RESUME):
        states.append(MachineState.PAUSED)
    for state in states:
        if state is MachineState.PAUSED:
            await machine.pause()
        stop = machine.stop(kill=False, timeout=lab.profile.settle)
        what = f"stop of a {state.value} machine that does not shut down"
        error = await lab.refuses(DeadlineExceeded, stop, what)
        lab.equal(error.seconds, lab.profile.settle, f"{what}: seconds in the error")
        await lab.is_in(machine, state, f"after {what}")
        if state is MachineState.PAUSED:
            await machine.resume()
        found = await lab.guest(machine).read_memory(0, len(marker))
        lab.equal(found, marker, f"memory after {what}")


@check(
    "stop.ungraceful",
    clause="stop with graceful=False does not ask the guest and does not wait for it",
    means=[Means.GUEST],
)
async def ungraceful(lab: Bench) -> None:
    machine = await lab.run()
    await lab.guest(machine).ignore_powerdown(True)
    begun = lab.now()
    await machine.stop(graceful=False, timeout=100 * lab.profile.slack)
    lab.true(
        lab.now() - begun < lab.profile.slack,
        f"a guest that ignores requests was not waited for ({lab.now() - begun:g} s)",
    )
    await lab.is_in(machine, MachineState.STOPPED, "after a stop that does not ask")


@check(
    "stop.kill-interrupts",
    clause="kill ends an operation that is under way, which fails with OperationAborted",
    means=[Means.GUEST],
)
async def kill_interrupts(lab: Bench) -> None:
    machine = await lab.run()
    await lab.guest(machine).ignore_powerdown(True)
    stopping = lab.spawn(machine.stop(timeout=100 * lab.profile.slack))
    await lab.wait()
    lab.equal(machine.state.value, MachineState.STOPPING.value, "the state during a long stop")
    status = await machine.status()
    lab.true(
        status.operation is not None and status.operation.startswith("stop"),
        f"status tells the operation under way ({status.operation})",
    )
    begun = lab.now()
    await machine.kill()
    took = lab.now() - begun
    lab.true(took < lab.profile.slack, f"kill did not wait for stop ({took:g} s)")
    await lab.refuses(OperationAborted, stopping, "the operation that kill interrupted")
    await lab.is_in(machine, MachineState.STOPPED, "after a kill in the middle of a stop")


@check(
    "stop.by-guest",
    clause="a guest that powers down by itself leaves its machine stopped, an event tells it, and "
    "the machine starts again",
    means=[Means.GUEST],
)
async def by_guest(lab: Bench) -> None:
    machine = await lab.run()
    await lab.guest(machine).poweroff()
    await lab.until(
        lambda: lab.status_is(machine, MachineState.STOPPED), "a guest that powered down is stopped"
    )
    lab.equal(machine.state.value, MachineState.STOPPED.value, "its state")
    told = await of_type(lab.hypervisor, EventType.GUEST_SHUTDOWN, machine)
    lab.equal(len(told), 1, "events that tell of the guest's shutdown")
    await machine.start()
    await lab.answers(machine, "after a start")


@check(
    "crash.panic",
    clause="a guest that panics leaves its machine failed with the reason, an event tells it, its "
    "console has the last words, and the machine starts again",
    means=[Means.GUEST],
)
async def panic(lab: Bench) -> None:
    machine = await lab.run()
    words = "conformance asked for this"
    await lab.guest(machine).panic(words)
    await lab.until(
        lambda: lab.status_is(machine, MachineState.FAILED), "a guest that panicked has failed"
    )
    lab.equal(machine.state.value, MachineState.FAILED.value, "its state")
    lab.true(bool((await machine.status()).reason), "status tells the reason")
    told = await of_type(lab.hypervisor, EventType.GUEST_PANIC, machine)
    lab.equal(len(told), 1, "events that tell of the panic")
    if lab.has(Capability.CONSOLE):
        async with await machine.console() as console:
            lab.true(words.encode() in await console.log(), "the panic is in the console's log")
    await machine.start()
    await lab.answers(machine, "after a start")
