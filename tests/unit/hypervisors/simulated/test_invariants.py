"""Whatever is asked in whatever order, and whatever goes wrong: no wrong state, nothing left."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from vmlab.machine.errors import MachineNotFound, VmlabError
from vmlab.machine.faults import (
    At,
    HypervisorCrash,
    KillFault,
    NetPartition,
    PauseFault,
    PowerCut,
    StaleStatus,
)
from vmlab.machine.spec import Disk, Nic
from vmlab.machine.states import OFF, MachineState

NAMES = [f"m{number}" for number in range(6)]
NICS = [{"name": "net", "forwards": [{"guest": 22}]}]
FAULTS = [
    KillFault(when=At(seconds=1)),
    PauseFault(duration=3),
    PowerCut(restart=True),
    NetPartition(nic="net", duration=1),
    KillFault(),
    StaleStatus(duration=3),
    HypervisorCrash(restart_after=1),
]


class Walk:
    """A random walk over the contract, drawn from a seed."""

    def __init__(self, hv, spec, seed):
        self.hv, self.spec, self.rng = hv, spec, random.Random(seed)
        self.ends = Counter()

    async def go(self, rounds):
        for _ in range(rounds):
            await asyncio.gather(*(self.step() for _ in range(self.rng.choice([1, 1, 3, 6]))))
        # What was armed has its time, and one that is down comes back.
        await asyncio.sleep(4000)
        self.hv.restart()

    async def step(self):
        name, timeout = self.rng.choice(NAMES), self.rng.choice([None, None, 0.01, 0.5])
        cancel = self.rng.random() * 0.3 if self.rng.random() < 0.2 else None
        task = asyncio.ensure_future(self.act(name, timeout))
        try:
            if cancel is not None:
                await asyncio.sleep(cancel)
                task.cancel()
            await task
        except asyncio.CancelledError:
            self.ends["cancelled"] += 1
        except VmlabError as error:
            self.ends[type(error).__name__] += 1
        else:
            self.ends["done"] += 1

    async def act(self, name, timeout):
        rng = self.rng
        try:
            machine = await self.hv.get(name)
        except MachineNotFound:
            await self.hv.create(self.spec(name, nics=NICS), timeout=timeout)
            return
        do = rng.choice(
            ["start", "start", "start", "stop", "kill", "pause", "resume", "restart", "delete",
             "force", "status", "info", "metrics", "fork", "plug", "unplug", "plug_nic",
             "unplug_nic", "resize", "inject", "snapshot", "restore", "delete_snapshot"]
        )  # fmt: skip
        match do:
            case "force":
                await machine.delete(force=True, timeout=timeout)
            case "fork":
                await machine.fork(rng.choice(NAMES), timeout=timeout)
            case "plug":
                await machine.plug_disk(Disk(name="more", size=1 << 20), timeout=timeout)
            case "unplug":
                await machine.unplug_disk("more", timeout=timeout)
            case "plug_nic":
                nic = Nic(name="late", forwards=[{"guest": 80}])
                await machine.plug_nic(nic, timeout=timeout)
            case "unplug_nic":
                await machine.unplug_nic("late", timeout=timeout)
            case "resize":
                await machine.resize(vcpus=rng.choice([1, 2, 4]), timeout=timeout)
            case "inject":
                await machine.inject(rng.choice(FAULTS), timeout=timeout)
            case "snapshot" | "restore" | "delete_snapshot":
                await getattr(machine, do)("s", timeout=timeout)
            case _:
                await getattr(machine, do)(timeout=timeout)

    async def check(self):
        hv = self.hv
        # From here on nothing goes wrong by itself any more.
        hv.closing = True
        machines = await hv.list()
        for machine in machines:
            state = (await machine.status()).state
            assert state.is_stable
            hardware = hv.world.machines.get(machine.id)
            if hardware is None:
                # A delete that failed half-way; it can be repeated.
                assert state is MachineState.UNKNOWN
                continue
            assert machine.seen is state or (machine.seen is MachineState.STOPPED and state in OFF)
            info = await machine.info()
            assert info.vcpus == machine.spec.cpus.count
            assert [disk.name for disk in info.disks] == [disk.name for disk in machine.spec.disks]
            assert [nic.name for nic in info.nics] == [nic.name for nic in machine.spec.nics]
        assert set(hv.world.machines) <= {machine.id for machine in machines}
        used = sum(
            len(nic.forwards)
            for hardware in hv.world.machines.values()
            for nic in hardware.nics.values()
        )
        assert used == len(hv.world.ports)


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_200_seeds_of_a_bad_day_end_clean(live, spec, profile, first):
    ends = Counter()
    unreliable = profile("unreliable", without=frozenset())

    for seed in range(first, first + 25):

        async def body(hv, seed=seed):
            walk = Walk(hv, spec, seed)
            await walk.go(40)
            await walk.check()
            ends.update(walk.ends)

        try:
            live(body, unreliable, seed=seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    # The walk has gone somewhere, and has met what it is about.
    assert ends["done"] > 500
    assert min(ends[name] for name in ("FaultInjected", "cancelled", "DeadlineExceeded")) > 20
