"""A simulated data centre: hosts, machines and a day of virtual time in which much goes wrong.

For demonstrations: each machine has a keeper that changes, breaks, moves and mends it through the
contract alone, and checks that its disk still holds what was written to it. The same seed gives
the same day.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from vmlab.hypervisors.base import Machine
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.simulated.chances import Chances
from vmlab.hypervisors.simulated.clock import VirtualClockLoop
from vmlab.hypervisors.simulated.guest import PROBE
from vmlab.hypervisors.simulated.hypervisor import SimulatedHypervisor
from vmlab.hypervisors.simulated.profile import BUILT_IN, Luck
from vmlab.machine.errors import OperationFailed, VmlabError
from vmlab.machine.faults import KillFault, PauseFault, PowerCut
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

DAY: Final = 86_400.0
ROUND: Final = 1_200.0
"""Seconds between two visits of a keeper."""
_ACTIONS: Final = {
    "nothing": 60,
    "snapshot": 8,
    "restore": 4,
    "migrate": 8,
    "restart": 4,
    "pause": 6,
    "kill": 3,
    "power-cut": 3,
    "stall": 4,
}
"""What a keeper does on a visit, and how often of a hundred times."""
PROFILE: Final = BUILT_IN["standard"].model_copy(
    update={
        "name": "data-centre",
        "luck": Luck(
            failures={"any": 0.01, "migrate": 0.05},
            partial_failures={"any": 0.005},
            hangs={"any": 0.001},
            lost_events=0.01,
            crashes=0.00015,
            back_after=900,
        ),
    }
)


@dataclass(slots=True)
class HostDay:
    """What one host went through."""

    name: str
    machines: int = 0
    operations: int = 0
    failures: int = 0
    crashes: int = 0
    arrivals: int = 0
    departures: int = 0


@dataclass(slots=True)
class MachineDay:
    """What one machine went through."""

    name: str
    visits: int = 0
    answered: int = 0
    mended: int = 0
    mixed_up: int = 0
    runs_at_end: bool = False
    done: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def availability(self) -> float:
        """Share of the visits at which it answered."""
        return self.answered / self.visits if self.visits else 0.0


@dataclass(slots=True)
class Day:
    """What a whole day was like."""

    seed: int
    seconds: float
    hosts: list[HostDay]
    machines: list[MachineDay]
    events: int = 0


class DataCentre:
    """Hosts with machines on them.

    Args:
        hosts: How many hypervisors there are.
        machines: How many machines there are on all of them.
        seed: Source of all that happens.
        on_progress: Told now and then which share of the day is over.
    """

    def __init__(
        self,
        *,
        hosts: int = 3,
        machines: int = 60,
        seed: int = 0,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        chances = Chances(seed)
        self._hosts = [
            SimulatedHypervisor(
                Owner("run", f"host-{number}", Path()),
                PROFILE,
                seed=int.from_bytes(chances.raw(8, "host", number), "big"),
            )
            for number in range(1, hosts + 1)
        ]
        self._days = [MachineDay(f"vm-{number:03}") for number in range(1, machines + 1)]
        self._seed = seed
        self._on_progress = on_progress
        self._traffic = {host.owner.id: HostDay(host.owner.id) for host in self._hosts}

    def run(self, seconds: float = DAY) -> Day:
        """Live through `seconds` of virtual time."""
        with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
            return runner.run(self._run(seconds))

    async def _run(self, seconds: float) -> Day:
        try:
            keepers = [
                Keeper(day, self._hosts, turn, random.Random(f"{self._seed}/{day.name}"))
                for turn, day in enumerate(self._days)
            ]
            teller = asyncio.ensure_future(self._tell(seconds))
            async with asyncio.TaskGroup() as group:
                for keeper in keepers:
                    group.create_task(keeper.keep(seconds))
            teller.cancel()
            await asyncio.gather(teller, return_exceptions=True)
            return await self._report(seconds, keepers)
        finally:
            for host in self._hosts:
                await host.close()

    async def _tell(self, seconds: float) -> None:
        while self._on_progress is not None:
            self._on_progress(min(1.0, asyncio.get_running_loop().time() / seconds))
            await asyncio.sleep(seconds / 200)

    async def _report(self, seconds: float, keepers: list[Keeper]) -> Day:
        if self._on_progress is not None:
            self._on_progress(1.0)
        day = Day(self._seed, seconds, list(self._traffic.values()), self._days)
        for host in self._hosts:
            told = self._traffic[host.owner.id]
            events = Counter(event.type.value for event in await host.events())
            told.operations = events["operation-finished"] + events["operation-failed"]
            told.failures = events["operation-failed"]
            told.crashes = events["hypervisor-lost"]
            told.departures = events["migrated"]
            told.machines = len(host.world.machines)
            day.events += sum(events.values())
        for keeper in keepers:
            for name in keeper.arrivals:
                self._traffic[name].arrivals += 1
        return day


class Keeper:
    """Looks after one machine for a day.

    Args:
        day: What happens is noted here.
        hosts: Where the machine can be.
        turn: Its number; it says where the machine begins.
        luck: What the keeper decides by.
    """

    def __init__(
        self, day: MachineDay, hosts: list[SimulatedHypervisor], turn: int, luck: random.Random
    ) -> None:
        self.day = day
        self.arrivals: list[str] = []
        self._hosts = hosts
        self._home = hosts[turn % len(hosts)]
        self._luck = luck
        self._written = 0
        self._possible = {0}
        self._saved: int | None = None
        self._machine: Machine | None = None

    async def keep(self, seconds: float) -> None:
        """Visit the machine every now and then, until `seconds` are over."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._luck.random() * 60)
        while loop.time() < seconds:
            self.day.visits += 1
            if await self._tried("answer", self._look) is not None:
                self.day.answered += 1
                action = self._luck.choices(list(_ACTIONS), list(_ACTIONS.values()))[0]
                await self._tried(action, partial(self._do, action))
            else:
                self.day.mended += self._machine is not None
                await self._tried("mend", self._mend)
            await asyncio.sleep(ROUND * (0.5 + self._luck.random()))
        for _ in range(20):
            # At the end of the day all that can run runs.
            if await self._tried("answer", self._look) is not None:
                self.day.runs_at_end = True
                return
            await self._tried("mend", self._mend)
            await asyncio.sleep(60)

    async def _tried(self, what: str, action: Callable[[], Awaitable[bool]]) -> bool | None:
        """Do something that may fail; None if it did."""
        try:
            result = await action()
        except VmlabError as error:
            self.day.failures[type(error).__name__] += 1
            return None
        self.day.done[what] += 1
        return result

    async def _look(self) -> bool:
        """Ask the guest for what it has on its disk, and let it write the next number."""
        if self._machine is None:
            raise OperationFailed("there is no machine yet")
        held = bytes.fromhex(
            str(await self._ask({"do": "read_disk", "disk": "data", "offset": 0, "length": 8}))
        )
        if int.from_bytes(held, "big") not in self._possible:
            self.day.mixed_up += 1
        await self._write(max(self._possible) + 1)
        return True

    async def _write(self, number: int) -> None:
        data = number.to_bytes(8, "big").hex()
        # A write that is not answered may have been done, or may be done later.
        self._possible.add(number)
        await self._ask({"do": "write_disk", "disk": "data", "offset": 0, "data": data})
        await self._ask({"do": "flush", "disk": "data"})
        self._written, self._possible = number, {number}

    async def _ask(self, request: dict[str, Any]) -> Any:
        assert self._machine is not None, "only a machine that exists is asked"
        async with await self._machine.channel(PROBE) as channel:
            await channel.write(json.dumps({"id": 1, **request}).encode() + b"\n")
            try:
                async with asyncio.timeout(60):
                    answer = await channel.read()
            except TimeoutError:
                raise OperationFailed("the guest does not answer") from None
        if not answer:
            raise OperationFailed("the guest is gone")
        return json.loads(answer).get("result")

    async def _do(self, action: str) -> bool:
        machine = self._machine
        assert machine is not None, "only a machine that answered is worked on"
        match action:
            case "snapshot":
                if self._saved is not None:
                    await machine.delete_snapshot("kept")
                    self._saved = None
                await machine.snapshot("kept")
                self._saved = self._written
            case "restore" if self._saved is not None:
                await machine.restore("kept")
                self._possible = {self._saved}
            case "migrate":
                target = self._luck.choice([h for h in self._hosts if h is not self._home])
                self._machine = await machine.migrate(target)
                self._home = target
                self.arrivals.append(target.owner.id)
            case "restart":
                await machine.restart()
            case "pause":
                await machine.pause()
                await asyncio.sleep(5)
                await machine.resume()
            case "kill":
                await machine.inject(KillFault())
            case "power-cut":
                await machine.inject(PowerCut())
            case "stall":
                await machine.inject(PauseFault(duration=30))
            case _:
                return False
        return True

    async def _mend(self) -> bool:
        """Make the machine if there is none, and see to it that it runs."""
        if self._machine is None:
            self._machine = await self._home.create(
                MachineSpec.of(
                    name=self.day.name,
                    cpus=2,
                    memory=512 * MIB,
                    disks=[{"name": "data", "size": "4G"}],
                    nics=[{"name": "net", "network": "segment:rack"}],
                    channels=[PROBE],
                )
            )
        state = (await self._machine.status()).state
        if state in (MachineState.CREATED, MachineState.STOPPED, MachineState.FAILED):
            await self._machine.start()
        elif state is MachineState.PAUSED:
            await self._machine.resume()
        elif state is MachineState.UNKNOWN:
            await self._machine.kill()
            await self._machine.start()
        return True
