"""A simulated hypervisor on the virtual clock for each test, and the guest's probe."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors.base import Channel, Machine
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.simulated.hypervisor import SimulatedHypervisor
from vmlab.hypervisors.simulated.profile import SimulationProfile
from vmlab.machine.errors import ChannelClosed
from vmlab.machine.spec import MachineSpec

Body = Callable[[SimulatedHypervisor], Awaitable[None]]


class Probe:
    """Asks a simulated guest over its probe channel."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._count = 0
        self._rest = b""

    @classmethod
    async def of(cls, machine: Machine) -> Probe:
        return cls(await machine.channel("vmlab.probe"))

    async def answer(self) -> dict[str, Any]:
        while b"\n" not in self._rest:
            data = await self.channel.read()
            if not data:
                raise ChannelClosed("the guest is gone")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    async def send(self, do: str, **arguments: Any) -> None:
        self._count += 1
        request = {"id": self._count, "do": do, **arguments}
        await self.channel.write(json.dumps(request).encode() + b"\n")

    async def __call__(self, do: str, **arguments: Any) -> Any:
        await self.send(do, **arguments)
        answer = await self.answer()
        assert answer["id"] == self._count
        if "error" in answer:
            raise GuestRefused(answer["error"])
        return answer["result"]


class GuestRefused(Exception):
    """The guest answered with an error."""


def make_spec(name: str = "vm", **fields: Any) -> MachineSpec:
    whole: dict[str, Any] = {
        "name": name,
        "cpus": 2,
        "memory": "64M",
        "disks": [{"name": "data", "size": "1M"}],
        "nics": [{"name": "net", "network": "segment:a"}],
        "channels": ["vmlab.probe", "vmlab.agent"],
        **fields,
    }
    return MachineSpec.of(**whole)


def make_profile(base: str = "standard", **fields: Any) -> SimulationProfile:
    data = SimulationProfile.load(base).model_dump() | fields
    return SimulationProfile.model_validate(data)


def open_simulated(
    profile: SimulationProfile | str = "standard", *, seed: int = 1, **options: Any
) -> SimulatedHypervisor:
    if isinstance(profile, str):
        profile = SimulationProfile.load(profile)
    owner = options.pop("owner", Owner("run", "test", Path("/nonexistent")))
    return SimulatedHypervisor(owner, profile, seed=seed, **options)


@pytest.fixture
def live() -> Callable[..., SimulatedHypervisor]:
    """Runs a test's body on a hypervisor and closes that; nothing may be left of it then."""

    def run(body: Body, profile: SimulationProfile | str = "standard", **options: Any) -> Any:
        hypervisor = open_simulated(profile, **options)

        async def whole() -> None:
            try:
                await body(hypervisor)
            finally:
                await hypervisor.close()
            assert hypervisor.world.machines == {}
            assert len(hypervisor.world.ports) == 0
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            assert left == []

        with asyncio.Runner(loop_factory=hypervisor.loop_factory()) as runner:
            runner.run(whole())
        return hypervisor

    return run


@pytest.fixture
def probe() -> type[Probe]:
    return Probe


@pytest.fixture
def refused() -> type[GuestRefused]:
    return GuestRefused


@pytest.fixture
def spec() -> Callable[..., MachineSpec]:
    return make_spec


@pytest.fixture
def profile() -> Callable[..., SimulationProfile]:
    return make_profile


@pytest.fixture
def opened() -> Callable[..., SimulatedHypervisor]:
    return open_simulated
