"""Whether a guest gives a sign of life, counted so that a host that stands still makes none silent.

Silence is counted in rounds, not in seconds on the wall: a second counts only if the guest could
have used it. A round counts for nothing if this process was late for it, if the hypervisor did not
answer promptly in it, or if the machine did not run all the time; and never for more than its
length. How long the host stood still is remembered, since it explains what a guest's own watchdogs
say of it (a soft lockup of 22 s after a stall of 25 s).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from vmlab.hypervisors.base import Machine
from vmlab.lab.incident import IncidentKind
from vmlab.machine.errors import InvalidState, VmlabError
from vmlab.machine.states import MachineState

ROUND: Final = 5.0
"""Seconds from one question to the next."""
_LATE: Final = 2.0
"""Seconds by which a round or an answer may be late on a host that is only busy."""
_LONGEST_QUESTION: Final = 40.0
"""Seconds after which an unanswered question is asked anew; each gets twice as many as the last."""
_REMEMBERED: Final = 180.0
"""Seconds for which a stall of the host's is remembered: hung_task's own limit is 120."""
_UNANSWERED: Final = 120.0
"""Seconds for which a hypervisor that runs need not answer, lateness of this process apart."""


class Pulse:
    """When the guest gave its last sign of life, and how long the host stood still lately."""

    def __init__(self) -> None:
        self.signs = 0
        self._stalls: deque[tuple[float, float]] = deque(maxlen=256)

    def sign_of_life(self) -> None:
        """The guest has just done something that can be seen."""
        self.signs += 1

    def stalled(self, seconds: float) -> None:
        """The host stood still for so long until now."""
        self._stalls.append((asyncio.get_running_loop().time(), seconds))

    def recent_stall(self) -> float:
        """Seconds for which the host stood still in the last minutes."""
        now = asyncio.get_running_loop().time()
        return sum(seconds for at, seconds in self._stalls if at > now - _REMEMBERED)


class Heartbeat:
    """Asks a guest for signs of life.

    Args:
        machine: Whose guest.
        ask: Returns when the guest has answered.
        pulse: Where signs of life and stalls are noted.
        limit: Seconds of silence that are too many.
        tell: Told what is wrong, once for each silence.
    """

    def __init__(
        self,
        machine: Machine,
        ask: Callable[[], Awaitable[object]],
        pulse: Pulse,
        limit: float,
        tell: Callable[[IncidentKind, str], None],
    ) -> None:
        self._machine = machine
        self._ask = ask
        self._pulse = pulse
        self._limit = limit
        self._tell = tell
        self._silent = 0.0
        self._unanswered = 0.0
        self._cpu_before: float | None = None
        self._told = False
        self._patience = ROUND
        self._question: asyncio.Task[None] | None = None
        self._asked_at = 0.0

    async def run(self) -> None:
        """Ask until cancelled."""
        try:
            while True:
                await self._round()
        finally:
            await self._take_back()

    async def _round(self) -> None:
        clock = asyncio.get_running_loop().time
        signs, began = self._pulse.signs, clock()
        running = self._machine.state is MachineState.RUNNING
        if running:
            self._keep_asking(began)
        await asyncio.sleep(ROUND)
        late = clock() - began - ROUND
        if late > _LATE:
            self._pulse.stalled(late)
        if not running or self._machine.state is not MachineState.RUNNING:
            self._forget()
            return
        asked = clock()
        answered = await self._hypervisor_answers()
        took = clock() - asked
        if took > _LATE:
            self._pulse.stalled(took)
        if self._pulse.signs != signs:
            self._forget(keep_question=True)
        elif late <= _LATE and answered and took <= _LATE:
            self._silent += ROUND
        if self._silent >= self._limit and not self._told:
            self._told = True
            self._tell(IncidentKind.SILENCE, await self._description())
        self._unanswered = 0.0 if answered else self._unanswered + ROUND
        if self._unanswered >= _UNANSWERED and not self._told:
            self._told = True
            said = f"it has not answered for {self._unanswered:g} s, though its process runs"
            self._tell(IncidentKind.HYPERVISOR_LOST, said)

    def _forget(self, *, keep_question: bool = False) -> None:
        self._silent = self._unanswered = 0.0
        self._told = False
        self._cpu_before = None
        if not keep_question:
            self._patience = ROUND

    async def _hypervisor_answers(self) -> bool:
        """Whether the hypervisor tells what the machine uses."""
        try:
            used = await self._machine.metrics(timeout=ROUND)
        except InvalidState:
            # It is being stopped.
            return True
        except VmlabError:
            return False
        if self._cpu_before is None:
            self._cpu_before = used.cpu.seconds
        return True

    async def _description(self) -> str:
        said = f"no sign of life for {self._silent:g} s in which the guest could have given one"
        try:
            now = (await self._machine.metrics(timeout=ROUND)).cpu.seconds
        except VmlabError:
            return said
        used = now - (self._cpu_before if self._cpu_before is not None else now)
        return f"{said}; its vCPUs used {used:.1f} s meanwhile"

    # Questions.

    def _keep_asking(self, now: float) -> None:
        question = self._question
        if question is not None and not question.done():
            if now - self._asked_at < self._patience:
                return
            # What it waits for may have been lost, and it may be in others' way.
            question.cancel()
            self._patience = min(2 * self._patience, _LONGEST_QUESTION)
        self._asked_at = now
        self._question = asyncio.create_task(self._put(), name=f"ping {self._machine.name}")

    async def _put(self) -> None:
        try:
            await self._ask()
        except VmlabError:
            # Whether there will be an answer is seen at the next question.
            return
        self._patience = ROUND
        self._pulse.sign_of_life()

    async def _take_back(self) -> None:
        if self._question is not None:
            self._question.cancel()
            await asyncio.gather(self._question, return_exceptions=True)
