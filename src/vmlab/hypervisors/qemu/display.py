"""The display of a QEMU process, without anybody looking at it: pictures, and keys."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Final

from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.picture import Picture
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import OperationFailed

_HELD_MS: Final = 40
"""Milliseconds that keys are held down; a guest's keyboard driver looks more often than that."""


async def screenshot(emulator: Emulator) -> Picture:
    """What the guest's first display shows.

    Raises:
        OperationFailed: QEMU wrote no picture.
    """
    # PPM is what every QEMU writes; PNG needs one of 7.1 or later that was built with libpng.
    file = emulator.directory / f"screen-{secrets.token_hex(4)}.ppm"
    try:
        # To its end: otherwise QEMU would write the file after it was removed.
        await uninterrupted(emulator.execute("screendump", {"filename": str(file)}))
        return await done_in_thread(lambda: Picture.of_ppm(file.read_bytes()))
    except (OSError, ValueError) as error:
        raise OperationFailed(
            f"QEMU wrote no picture: {error}",
            hint="look whether there is space where its files are",
            machine=emulator.machine,
            hypervisor="qemu",
            operation="screenshot",
        ) from error
    finally:
        file.unlink(missing_ok=True)


async def send_keys(emulator: Emulator, keys: Sequence[tuple[str, ...]]) -> None:
    """Press keys, each item's together and one item after the other."""
    for chord in keys:
        pressed = [{"type": "qcode", "data": key} for key in chord]
        await emulator.execute("send-key", {"keys": pressed, "hold-time": _HELD_MS})
        # QEMU lets go of them by itself, by a clock that stands still while the guest does.
        await asyncio.sleep(2 * _HELD_MS / 1000)
