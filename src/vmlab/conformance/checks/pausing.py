"""Pause and resume: nothing in a paused guest advances."""

from __future__ import annotations

from vmlab.conformance.bench import Bench
from vmlab.conformance.registry import Means, check
from vmlab.machine.capabilities import Capability
from vmlab.machine.states import MachineState


@check(
    "pause.stands-still",
    clause="while a machine is paused its guest does not advance, and resume lets it run on with "
    "its memory where it was",
    needs=[Capability.PAUSE, Capability.RESUME],
    means=[Means.GUEST],
)
async def stands_still(lab: Bench) -> None:
    machine = await lab.run()
    guest = lab.guest(machine)
    marker = lab.bytes()
    await guest.write_memory(4096, marker)
    await lab.wait()
    # On a slow host a question takes its time: the guest ran at most from its beginning to the
    # end of pause, and again from the beginning of resume.
    begun = lab.now()
    before = await guest.ticks()
    await machine.pause()
    ran = lab.now() - begun
    still = 20 * lab.profile.settle
    await lab.wait(still)
    await lab.is_in(machine, MachineState.PAUSED, "a while after pause")
    begun = lab.now()
    await machine.resume()
    after = await guest.ticks()
    ran += lab.now() - begun
    lab.true(before <= after, "the guest's time does not run back")
    lab.true(
        (after - before) / 1000 <= ran + still / 4,
        f"the guest's time stands still while it is paused ({after - before} ms passed in it)",
    )
    lab.equal(await guest.read_memory(4096, len(marker)), marker, "memory after resume")
    await lab.wait()
    lab.true(await guest.ticks() > after, "the guest runs on after resume")
