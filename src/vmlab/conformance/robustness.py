"""Random walks over the contract on a hypervisor on which things go wrong: every failure is clean.

One seed is one walk: machines are made, changed, cancelled, killed and deleted as the seed says.
An operation may fail with any VmlabError; afterwards the machine is in a state that lasts, its
hypervisor agrees, its guest is where the state says with its own contents, and in the end all of
it can be deleted and nothing is left. The seed is all that is needed to walk again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from vmlab.conformance.bench import Bench, CheckFailed
from vmlab.conformance.registry import Check
from vmlab.hypervisors.base import Hypervisor, Machine
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import VmlabError
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import Disk, Nic
from vmlab.machine.states import OFF, OPERATIONS, MachineState

T = TypeVar("T")
C = Capability

STEPS: Final = 40
"""Operations of one walk."""
MACHINES: Final = 3
"""Machines that a walk has at the most."""
RETRIES: Final = 40
"""How often something is asked again that fails by chance; at 5% each, never in practice."""
_CANCELLED: Final = 0.15
_KILLED: Final = 0.2
"""Shares of the operations that are cancelled, and (less those) ended by a kill in the middle."""
_RULES: Final = {"boot": "start", "mark": "restart"}
"""Steps that are no operations of their own, and the operation whose states they need."""
_MARK: Final = 64
"""Bytes that tell whose disk it is."""


@dataclass
class Walker:
    """One machine of a walk, and the bytes that its first scratch disk may hold."""

    machine: Machine
    marks: set[bytes] = field(default_factory=lambda: {bytes(_MARK)})
    snapshots: list[str] = field(default_factory=list)
    disks: list[str] = field(default_factory=list)
    nics: list[str] = field(default_factory=list)


async def patiently(ask: Callable[[], Awaitable[T]], what: str) -> T:
    """The answer to something that fails by chance, asked until it comes.

    Raises:
        CheckFailed: it failed every time.
    """
    last: VmlabError | None = None
    for _attempt in range(RETRIES):
        try:
            return await ask()
        except VmlabError as error:
            last = error
            await asyncio.sleep(1)
    raise CheckFailed(what, f"success within {RETRIES} attempts", f"{type(last).__name__}: {last}")


class Walk:
    """One walk on a bench."""

    def __init__(self, lab: Bench, target: Hypervisor) -> None:
        self.lab = lab
        self.target = target
        self.walkers: list[Walker] = []
        self.failures = 0

    async def step(self) -> None:
        """One operation on one machine, and the look at what became of it."""
        chance = self.lab.random
        if not self.walkers or (len(self.walkers) < MACHINES and chance.random() < 0.2):
            await self._try(self._make(), None, None)
            return
        walker = chance.choice(self.walkers)
        name, call = self._choose(walker)
        timeout = chance.choice([None, None, None, 0.01, 0.5, 5.0])
        await self._try(call(timeout), walker, name)

    async def _make(self) -> None:
        self.walkers.append(Walker(await self.lab.create()))

    async def _try(self, call: Awaitable[object], walker: Walker | None, name: str | None) -> None:
        """Let it happen, perhaps cancelled, perhaps with a kill in the middle."""
        chance = self.lab.random
        task = asyncio.ensure_future(_whole(call))
        self.lab.tasks.append(task)
        fate = chance.random()
        if fate < _CANCELLED:
            await asyncio.sleep(chance.random() * 0.5)
            task.cancel()
        elif fate < _KILLED and walker is not None:
            await asyncio.sleep(chance.random() * 0.5)
            await self._kill(walker)
        try:
            await task
        except (VmlabError, TimeoutError):
            self.failures += 1
        except asyncio.CancelledError:
            if fate >= _CANCELLED:
                raise
        await self.look(name or "create")

    async def _kill(self, walker: Walker) -> None:
        try:
            await walker.machine.kill()
        except VmlabError:
            self.failures += 1

    def _choose(self, walker: Walker) -> tuple[str, Callable[[float | None], Awaitable[object]]]:
        machine, lab, number = walker.machine, self.lab, self.lab.random.randrange(10**6)
        calls: dict[str, Callable[[float | None], Awaitable[object]]] = {
            "start": lambda t: machine.start(timeout=t),
            "boot": lambda t: machine.start(),
            "stop": lambda t: machine.stop(timeout=t),
            "kill": lambda t: machine.kill(timeout=t),
            "restart": lambda t: machine.restart(timeout=t),
            "pause": lambda t: machine.pause(timeout=t),
            "resume": lambda t: machine.resume(timeout=t),
            "info": lambda t: machine.info(timeout=t),
            "metrics": lambda t: machine.metrics(timeout=t),
            "mark": lambda t: self._mark(walker),
            "plug_disk": lambda t: machine.plug_disk(
                Disk(name=f"d{number}", size=MIB, bus=lab.profile.bus), timeout=t
            ),
            "unplug_disk": lambda t: self._unplug_disk(walker, t),
            "plug_nic": lambda t: machine.plug_nic(
                Nic(name=f"n{number}", network="none"), timeout=t
            ),
            "resize": lambda t: machine.resize(vcpus=1 + number % 2, timeout=t),
            "pin": lambda t: machine.pin({0: (0,)}, timeout=t),
            "delete": lambda t: machine.delete(force=bool(number % 2), timeout=t),
        }
        if lab.has(C.SNAPSHOT, C.RESTORE):
            calls["snapshot"] = lambda t: self._snapshot(walker, f"s{number}", t)
            calls["restore"] = lambda t: self._restore(walker, t)
        if lab.has(C.FORK):
            calls["fork"] = lambda t: self._fork(walker, t)
        if lab.has(C.LIVE_MIGRATION, C.COLD_MIGRATION):
            calls["migrate"] = lambda t: self._migrate(walker, t)
        fitting = [name for name in calls if machine.state in OPERATIONS[_RULES.get(name, name)]]
        if machine.state in OFF and lab.random.random() < 0.3:
            return "boot", calls["boot"]
        # Now and then something that the state does not allow.
        name = lab.random.choice(fitting if fitting and lab.random.random() < 0.9 else list(calls))
        return name, calls[name]

    async def _mark(self, walker: Walker) -> None:
        mark = self.lab.bytes(_MARK)
        walker.marks.add(mark)
        guest, disk = self.lab.guest(walker.machine), self.lab.scratch[0]
        async with asyncio.timeout(60):
            await guest.write_disk(disk, 0, mark)
            await guest.flush(disk)

    async def _unplug_disk(self, walker: Walker, timeout: float | None) -> None:
        extra = [d.name for d in walker.machine.spec.disks if d.name not in self.lab.scratch]
        if extra:
            await walker.machine.unplug_disk(self.lab.random.choice(extra), timeout=timeout)

    async def _snapshot(self, walker: Walker, name: str, timeout: float | None) -> None:
        await walker.machine.snapshot(name, timeout=timeout)
        walker.snapshots.append(name)

    async def _restore(self, walker: Walker, timeout: float | None) -> None:
        if walker.snapshots:
            name = self.lab.random.choice(walker.snapshots)
            await walker.machine.restore(name, timeout=timeout)

    async def _fork(self, walker: Walker, timeout: float | None) -> None:
        if len(self.walkers) < MACHINES:
            child = await walker.machine.fork(self.lab.name(), timeout=timeout)
            self.walkers.append(Walker(self.lab.keep(child), marks=set(walker.marks)))

    async def _migrate(self, walker: Walker, timeout: float | None) -> None:
        there = self.target if walker.machine.hypervisor is self.lab.hypervisor else None
        target = there or self.lab.hypervisor
        walker.machine = self.lab.keep(await walker.machine.migrate(target, timeout=timeout))
        walker.snapshots.clear()

    # What has to be so, whatever happened.

    async def look(self, after: str) -> None:
        """State that every machine is where it says, with its own contents."""
        lab = self.lab
        for walker in list(self.walkers):
            machine = walker.machine
            what = f"{machine.name} after {after}"
            lab.true(machine.state.is_stable, f"{what}: {machine.state.value} lasts")
            await self._agree(machine, what)
            if machine.state is MachineState.DELETED:
                self.walkers.remove(walker)
            elif machine.state is MachineState.RUNNING and lab.profile.probe is not None:
                await self._contents(walker, what)

    async def _agree(self, machine: Machine, what: str) -> None:
        """The hypervisor may answer what was, but not for ever."""
        said: list[str] = []
        for _attempt in range(RETRIES):
            status = await patiently(machine.status, f"{what}: status is told")
            said.append(status.state.value)
            if status.state is machine.state and status.state is not MachineState.UNKNOWN:
                return
            await asyncio.sleep(1)
        self.lab.equal(said[-1], machine.state.value, f"{what}: the hypervisor agrees")

    async def _contents(self, walker: Walker, what: str) -> None:
        lab, machine = self.lab, walker.machine

        async def read() -> bytes | None:
            if machine.state is not MachineState.RUNNING:
                return None
            try:
                async with asyncio.timeout(60):
                    return await lab.guest(machine).read_disk(lab.scratch[0], 0, _MARK)
            except VmlabError:
                # It may have died without a word: then its hypervisor says so when asked.
                await machine.status()
                raise

        found = await patiently(read, f"{what}: the guest answers")
        if found is not None:
            lab.true(found in walker.marks, f"{what}: the disk is its own")

    async def end(self) -> None:
        """State that everything can be deleted, and delete it."""
        for hypervisor in (self.lab.hypervisor, self.target):
            for machine in await patiently(hypervisor.list, "the machines are listed"):
                await patiently(
                    partial(machine.delete, force=True), f"{machine.name} can be deleted"
                )
            left = await patiently(hypervisor.list, "the machines are listed")
            self.lab.equal([each.name for each in left], [], "machines in the end")


async def _whole(call: Awaitable[object]) -> None:
    await call


async def walk(lab: Bench) -> None:
    """One walk by the bench's seed."""
    it = Walk(lab, lab.another())
    for _step in range(STEPS):
        await it.step()
        if it.walkers and lab.random.random() < 0.1:
            await _crash(lab, it)
    lab.note(f"{it.failures} of {STEPS} operations failed, all of them cleanly")
    await it.end()


async def _crash(lab: Bench, it: Walk) -> None:
    """Let one of the live machines die."""
    live = [each.machine for each in it.walkers if each.machine.state.is_live]
    if not live or lab.profile.crasher(lab.capabilities.faults) is None:
        return
    machine = lab.random.choice(live)
    try:
        await lab.crash(machine, lab.random.random())
    except VmlabError:
        it.failures += 1
    await lab.wait()
    await it.look("a crash")
    lab.true(machine.state in OFF or machine.state.is_stable, "a crash leaves a lasting state")


def walk_of(seed: int) -> Check:
    """The walk of one seed, to be run like a check."""
    return Check(
        f"robustness.seed-{seed}",
        "an operation that fails leaves every machine in a true and lasting state, with its own "
        "contents, and nothing behind",
        walk,
    )
