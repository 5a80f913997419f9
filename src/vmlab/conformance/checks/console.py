"""The serial console: what the guest prints is kept, what is typed arrives."""

from __future__ import annotations

from vmlab.conformance.bench import Bench
from vmlab.conformance.registry import Means, check
from vmlab.machine.capabilities import Capability

NEEDS = [Capability.CONSOLE]


@check(
    "console.log",
    clause="the log of the console has all that the guest printed since it was created, in order, "
    "across a restart and after its death",
    needs=NEEDS,
    means=[Means.GUEST],
)
async def log(lab: Bench) -> None:
    machine = await lab.run()
    printed: list[str] = []
    for end in (machine.restart, machine.kill):
        for word in ("first", "second"):
            printed.append(f"conformance {word} {len(printed)}")
            await lab.guest(machine).print(printed[-1])
        await end()
        async with await machine.console() as console:
            kept = (await console.log()).decode(errors="replace")
        lines = [line for line in kept.splitlines() if line.startswith("conformance ")]
        lab.equal(lines, printed, f"the log after {end.__name__}")


@check(
    "console.live",
    clause="an open console gives what the guest prints from then on, and ends at the latest when "
    "the machine is deleted",
    needs=NEEDS,
    means=[Means.GUEST],
)
async def live(lab: Bench) -> None:
    machine = await lab.run()
    guest = lab.guest(machine)
    await guest.print("conformance before")
    console = await machine.console()
    await guest.print("conformance live")
    seen = b""
    while b"conformance live" not in seen:
        piece = await lab.within(console.read(), "what the guest prints comes")
        lab.true(bool(piece), "an open console does not end while the guest lives")
        lab.true(len(piece) <= 65536, "a read gives no more than was asked for")
        seen += piece
    await machine.delete(force=True)
    while await lab.within(console.read(), "a console ends when its machine is deleted"):
        """What is left is read to its end."""
    await console.close()
    await console.close()


@check(
    "console.input",
    clause="what is written to the console arrives in the guest as it was typed",
    needs=NEEDS,
    means=[Means.GUEST],
)
async def typed(lab: Bench) -> None:
    machine = await lab.run()
    text = b"echo conformance; \t\xc3\xa4\n"
    before = await lab.guest(machine).typed()
    lab.true(text not in before, "nothing of it is in the guest before it is typed")
    async with await machine.console() as console:
        for piece in (text[:7], text[7:]):
            await console.write(piece)

    async def arrived() -> bool:
        return text in await lab.guest(machine).typed()

    await lab.until(arrived, "what was typed is in the guest")
