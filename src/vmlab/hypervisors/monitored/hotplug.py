"""Devices that go while the machine runs.

One is gone when the process says so (DEVICE_DELETED), which a guest may have to agree to; only then
is its other side on the host taken away.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from vmlab.hypervisors.monitored.emulator import Emulator
from vmlab.hypervisors.qmp import QmpDeviceNotFound, QmpError, QmpLost, QmpTimeout

_ASK_AGAIN_S: Final = 5.0
"""Seconds after which a guest that has not let go of a device is asked again."""


async def remove_device(emulator: Emulator, device: str) -> None:
    """Ask for a device's removal and wait for it, however long the guest takes.

    Raises:
        MachineCrashed: the process ended meanwhile.
    """
    with emulator.qmp.listen(
        "DEVICE_DELETED", match=lambda event: event.data.get("device") == device
    ) as deleted:
        while True:
            try:
                await emulator.execute("device_del", {"id": device})
            except QmpDeviceNotFound:
                # It went after an earlier request that nobody waited for any more.
                return
            except QmpError as error:
                # The guest was asked already and has not answered.
                if "unplug" not in error.message:
                    raise
            with suppress(QmpTimeout):
                try:
                    await deleted.wait(_ASK_AGAIN_S)
                    return
                except QmpLost as error:
                    raise await emulator.crashed("device_del", error) from error
            await asyncio.sleep(0)
