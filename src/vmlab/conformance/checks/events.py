"""Events: who follows them misses none.

That they are in order, numbered and true is audited after every check.
"""

from __future__ import annotations

from vmlab.conformance.bench import Bench
from vmlab.conformance.registry import check
from vmlab.machine.events import Event, EventType


@check(
    "events.follow",
    clause="who follows the events from some number on gets all after it, in order and only once, "
    "those that were and those that come",
)
async def follow(lab: Bench) -> None:
    machine = await lab.create()
    known = len(await lab.hypervisor.events())
    heard: dict[str, list[Event]] = {"from the first": [], "from now on": []}

    async def listen(who: str, since: int | None) -> None:
        async for event in lab.hypervisor.subscribe(since):
            heard[who].append(event)
            if event.type is EventType.DELETED:
                return

    listeners = [lab.spawn(listen("from the first", 0)), lab.spawn(listen("from now on", None))]
    await lab.wait()
    at_call = lab.hypervisor.subscribe()
    await machine.start()
    await machine.stop()
    await machine.delete()
    for listener in listeners:
        await listener
    told = list(await lab.hypervisor.events())
    first = await anext(at_call)
    lab.equal(first.sequence, known + 1, "the first event of who begins to follow and reads later")
    for who, since in (("from the first", 0), ("from now on", known)):
        got = heard[who]
        lab.equal(got, told[since : since + len(got)], f"events heard {who}")
        lab.equal(got[-1].type, EventType.DELETED, f"the last event heard {who}")
    lab.equal(list(await lab.hypervisor.events(known)), told[known:], "events(since)")
    wrong = {event.hypervisor for event in told} - {lab.hypervisor.name}
    lab.equal(wrong, set(), "other hypervisors in the events")
    unnamed = [event for event in told if (event.machine, event.name) != (machine.id, machine.name)]
    lab.equal(unnamed, [], "events without the machine's id and name")
