"""A display and its keyboard: what the guest shows is seen, what is pressed arrives."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

from vmlab.conformance.bench import Bench
from vmlab.conformance.registry import Means, check
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import InvalidSpec, UnsupportedOperation
from vmlab.machine.states import MachineState

NEEDS = [Capability.DISPLAY]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SAMPLES: Mapping[int, int] = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples of a pixel by the colour type (ISO/IEC 15948:2004, table 9)."""


def pixels_of(image: bytes) -> tuple[int, int, bytes]:
    """Width, height and the filtered lines of a PNG image.

    Raises:
        ValueError: it is none, or not whole.
    """
    if not image.startswith(_SIGNATURE):
        raise ValueError("it does not begin as a PNG image does")
    parts: dict[bytes, bytes] = {}
    position = len(_SIGNATURE)
    while position < len(image):
        length, kind = struct.unpack_from(">I4s", image, position)
        data = image[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", image, position + 8 + length)
        if zlib.crc32(kind + data) != checksum:
            raise ValueError(f"its part {kind!r} is damaged")
        parts[kind] = parts.get(kind, b"") + data
        position += 12 + length
    if b"IEND" not in parts:
        raise ValueError("it has no end")
    width, height, depth, colours = struct.unpack_from(">IIBB", parts.get(b"IHDR", b""))
    lines = zlib.decompress(parts.get(b"IDAT", b""))
    if len(lines) != height * (1 + -(-width * depth * _SAMPLES[colours] // 8)):
        raise ValueError(f"it has {len(lines)} bytes for {width} x {height} pixels")
    return width, height, lines


def _whole(lab: Bench, image: bytes) -> None:
    try:
        width, height, _ = pixels_of(image)
    except (ValueError, KeyError, struct.error, zlib.error) as error:
        lab.equal(str(error), "a whole PNG image", "a screenshot")
    else:
        lab.true(width > 0 and height > 0, "a screenshot has pixels")


@check(
    "display.picture",
    clause="a screenshot is a whole PNG image of what the guest shows now, also of a paused "
    "machine, whose picture stands still",
    needs=NEEDS,
    means=[Means.GUEST],
)
async def picture(lab: Bench) -> None:
    machine = await lab.run(display=True)
    guest = lab.guest(machine)
    seen: list[bytes] = []
    for text in ("one", "another"):
        await guest.show(f"conformance shows {text}")

        async def is_new() -> bool:
            image = await machine.screenshot()
            _whole(lab, image)
            if image in seen:
                return False
            seen.append(image)
            return True

        await lab.until(is_new, f"a picture of {text!r} that is not one of what was there before")
    if lab.has(Capability.PAUSE):
        await machine.pause()
        still = await machine.screenshot()
        _whole(lab, still)
        await lab.wait(lab.profile.settle)
        lab.true(await machine.screenshot() == still, "the picture of a paused machine is the same")


@check(
    "display.keys",
    clause="keys that are pressed arrive in the guest in their order, those held together as such; "
    "one that there is not is refused and none of them is pressed",
    needs=NEEDS,
    means=[Means.GUEST],
)
async def keys(lab: Bench) -> None:
    machine = await lab.run(display=True)
    guest = lab.guest(machine)
    before = tuple(await guest.pressed())
    await lab.refuses(InvalidSpec, machine.send_keys(["a", "no-such-key"]), "a key that is none")
    await machine.send_keys(["b", "shift-c"])
    await machine.send_keys(["ret"])
    expected = (*before, "b", "shift-c", "ret")

    async def arrived() -> bool:
        return len(await guest.pressed()) >= len(expected)

    await lab.until(arrived, "what was pressed is in the guest")
    lab.equal(tuple(await guest.pressed()), expected, "the keys that the guest saw")


@check(
    "display.absent",
    clause="a machine whose specification has no display refuses screenshots and keys with "
    "UnsupportedOperation",
    needs=NEEDS,
)
async def absent(lab: Bench) -> None:
    machine = await lab.run(display=False)
    what = "a screenshot of a machine without a display"
    error = await lab.refuses(UnsupportedOperation, machine.screenshot(), what)
    lab.equal(error.capability, Capability.DISPLAY.value, f"{what}: the error names it")
    what = "keys of a machine without a display"
    error = await lab.refuses(UnsupportedOperation, machine.send_keys(["a"]), what)
    lab.equal(error.capability, Capability.DISPLAY.value, f"{what}: the error names it")
    await lab.is_in(machine, MachineState.RUNNING, "after what was refused")
