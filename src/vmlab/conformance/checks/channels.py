"""Guest channels: bytes through unchanged, and an end when the guest ends."""

from __future__ import annotations

from vmlab.conformance.bench import Bench
from vmlab.conformance.registry import Means, check
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import ChannelClosed
from vmlab.machine.states import MachineState

NEEDS = [Capability.GUEST_CHANNELS]


@check(
    "channel.bytes",
    clause="a channel carries any bytes, any number of them, unchanged and in order, in pieces no "
    "larger than asked for",
    needs=NEEDS,
    means=[Means.ECHO],
)
async def any_bytes(lab: Bench) -> None:
    machine = await lab.run()
    name = lab.profile.echo_channel or ""
    if lab.profile.probe is not None:
        await lab.guest(machine).echo(name)
    sent = bytes(range(256)) + b"\r\n\0\x04\x1b{}\n" + lab.bytes(200_000)
    async with await machine.channel(name) as channel:
        writing = lab.spawn(channel.write(sent))
        received = bytearray()
        while len(received) < len(sent):
            so_far = f"more comes back, after {len(received)} of {len(sent)} bytes"
            piece = await lab.within(channel.read(1000), so_far)
            lab.true(0 < len(piece) <= 1000, "a read gives at least one byte and at most 1000")
            received += piece
        await lab.within(writing, "a write ends when all that was written has come back")
    lab.equal(bytes(received), sent, "what came back")


@check(
    "channel.end",
    clause="when the guest ends, an open channel ends: read gives nothing, write raises "
    "ChannelClosed, and after start it can be opened again",
    needs=NEEDS,
)
async def end(lab: Bench) -> None:
    machine = await lab.run()
    channel = await machine.channel(machine.spec.channels[0])
    reading = lab.spawn(channel.read())
    await machine.kill()
    what = "a read that waited when the guest ended"
    lab.equal(await lab.within(reading, what), b"", what)
    lab.equal(await channel.read(), b"", "a read after the guest ended")
    await lab.refuses(ChannelClosed, channel.write(b"x"), "a write after the guest ended")
    await channel.close()
    await channel.close()
    await machine.start()
    async with await machine.channel(machine.spec.channels[0]):
        await lab.is_in(machine, MachineState.RUNNING, "with a channel opened anew")
