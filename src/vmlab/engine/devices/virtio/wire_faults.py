"""What can befall the frames of one NIC on their way: they are lost, or come later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmlab.engine.devices.clock import Clock
from vmlab.engine.devices.occasions import ALWAYS, Occasions, Trigger


@dataclass(frozen=True)
class WireFault:
    """What happens to frames, in both directions.

    Attributes:
        ratio: The share of them that is lost.
        delay: Seconds, of the machine's time, that they take longer.
        jitter: Seconds more, at the most.
        when: To which of them.
    """

    ratio: float = 0.0
    delay: float = 0.0
    jitter: float = 0.0
    when: Trigger = ALWAYS


class WireFaults:
    """The faults at work on one NIC's wire; from any thread.

    Args:
        clock: The machine's.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._armed: dict[str, tuple[WireFault, Occasions]] = {}

    def add(self, name: str, fault: WireFault) -> None:
        """Have a fault at work from now on, instead of one that had its name."""
        self._armed[name] = fault, Occasions(fault.when, self._clock.nanoseconds)

    def remove(self, name: str) -> bool:
        """End a fault; what is late already stays so. False: there is none."""
        return self._armed.pop(name, None) is not None

    def take(self, deliver: Callable[[], object]) -> bool:
        """Take a frame over that is lost, or that `deliver` is called for later; else False."""
        if not self._armed:
            return False
        delay = 0.0
        for fault, occasions in list(self._armed.values()):
            if not occasions.strikes():
                continue
            if fault.ratio and occasions.draw() < fault.ratio:
                return True
            if fault.delay or fault.jitter:
                delay += fault.delay + occasions.draw() * fault.jitter
        if delay <= 0:
            return False
        moment = self._clock.nanoseconds() + int(delay * 1e9)
        self._clock.call_at(moment, lambda: _ignore(deliver()))
        return True


def _ignore(_answer: object) -> None:
    """A frame that nobody takes when it is late is lost."""
