"""Hypervisors whose displays and keyboards are not what they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mutants.base import BrokenMachine, mutant
from vmlab.hypervisors.picture import Picture
from vmlab.machine.states import MachineState


@mutant("display.picture")
class ShowsOldPicture(BrokenMachine):
    """Shows the first picture that was taken for ever."""

    first: Picture | None = None

    async def _do_screenshot(self) -> Picture:
        seen = await super()._do_screenshot()
        self.first = self.first or seen
        return self.first


@mutant("display.picture", only=False)
class SendsHalfPicture(BrokenMachine):
    """Cuts the image off."""

    async def screenshot(self, **options: Any) -> bytes:
        return (await super().screenshot(**options))[:-20]


@mutant("display.keys")
class LetsGoOfShift(BrokenMachine):
    """Presses only the last one of the keys that are to be held together."""

    async def _do_send_keys(self, keys: Sequence[tuple[str, ...]]) -> None:
        await super()._do_send_keys([chord[-1:] for chord in keys])


@mutant("display.absent")
class ShowsWhatIsNotThere(BrokenMachine):
    """Shows a black picture where there is no display."""

    async def screenshot(self, **options: Any) -> bytes:
        if self.spec.display or self.state is not MachineState.RUNNING:
            return await super().screenshot(**options)
        return Picture(1, 1, b"\0\0\0").png()
