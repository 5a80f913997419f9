"""A machine's life: made, booted, shut down, booted again, gone."""

from __future__ import annotations

from vmlab.conformance.bench import Bench, names
from vmlab.conformance.registry import Means, check
from vmlab.machine.errors import InvalidState
from vmlab.machine.states import MachineState


@check(
    "lifecycle.round-trip",
    clause="a machine is created at rest, runs when start returns, is off when stop returns, and "
    "status tells its id, name and state at each step",
)
async def round_trip(lab: Bench) -> None:
    machine = await lab.create()
    lab.equal(machine.name in await names(lab.hypervisor), True, "a new machine is listed")
    for step, state in (
        (None, MachineState.CREATED),
        (machine.start, MachineState.RUNNING),
        (machine.stop, MachineState.STOPPED),
        (machine.start, MachineState.RUNNING),
        (machine.kill, MachineState.STOPPED),
        (machine.delete, MachineState.DELETED),
    ):
        if step is not None:
            await step()
        status = await machine.status()
        what = f"after {step.__name__ if step else 'create'}"
        lab.equal(status.state.value, state.value, f"{what}: status")
        lab.equal((status.id, status.name), (machine.id, machine.name), f"{what}: whose status")
        lab.equal(status.operation, None, f"{what}: no operation is under way")
        if state is MachineState.RUNNING:
            await lab.answers(machine, what)
            usage = await machine.metrics()
            lab.true(usage.uptime_seconds >= 0, f"{what}: a running machine has an uptime")
        elif state is not MachineState.DELETED:
            await lab.refuses(InvalidState, machine.metrics(), f"{what}: metrics of no guest")


@check(
    "lifecycle.restart",
    clause="restart boots the guest anew, asked or by reset: its memory and time begin again",
    means=[Means.GUEST],
)
async def restart(lab: Bench) -> None:
    machine = await lab.run()
    for graceful in (True, False):
        guest = lab.guest(machine)
        marker = lab.bytes()
        await guest.write_memory(0, marker)
        await lab.wait(3 * lab.profile.settle)
        before = await guest.ticks() / 1000
        begun = lab.now()
        await machine.restart(graceful=graceful)
        how = "asked to" if graceful else "by reset"
        guest = lab.guest(machine)
        # However long the boot took: a time that goes on would be all of `before` ahead.
        ran = await guest.ticks() / 1000
        lab.true(
            ran < lab.now() - begun + before / 2,
            f"the guest's time begins again when booted {how} ({ran:g} s, {before:g} s before)",
        )
        lab.true(
            await guest.read_memory(0, len(marker)) != marker,
            f"the guest's memory is empty when booted {how}",
        )


@check(
    "lifecycle.disks-stay",
    clause="what a guest wrote to its disks is there after stop and restart, and what it flushed "
    "is there even after kill",
    means=[Means.GUEST],
)
async def disks_stay(lab: Bench) -> None:
    machine = await lab.run()
    kept: dict[tuple[str, int], bytes] = {}
    for position, end in enumerate(("stop", "restart", "reset", "kill")):
        guest = lab.guest(machine)
        for disk in lab.scratch:
            data = lab.bytes()
            await guest.write_disk(disk, position * 4096, data)
            if end in {"reset", "kill"}:
                await guest.flush(disk)
            kept[disk, position * 4096] = data
        match end:
            case "stop":
                await machine.stop()
            case "restart":
                await machine.restart()
            case "reset":
                await machine.restart(graceful=False)
            case _:
                await machine.kill()
        if not machine.state.is_live:
            await machine.start()
        guest = lab.guest(machine)
        for (disk, offset), data in kept.items():
            lab.equal(await guest.read_disk(disk, offset, len(data)), data, f"{disk} after {end}")
