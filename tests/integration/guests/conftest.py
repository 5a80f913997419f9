"""A real guest for a module's tests: booted once on QEMU, talked to by the agent."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from tests.needs import need
from tests.store import IMAGE_STORE

from vmlab.guests.agent import CHANNELS, AgentChannel
from vmlab.guests.guest import Guest
from vmlab.hypervisors.accelerators import QEMU_BINARIES
from vmlab.hypervisors.base import Machine
from vmlab.hypervisors.operation import DEFAULT_TIMEOUTS
from vmlab.hypervisors.ownership import Home, Run
from vmlab.hypervisors.qemu import QemuHypervisor, provider
from vmlab.images import ImageStore
from vmlab.machine.architecture import Architecture
from vmlab.machine.spec import MachineSpec

T = TypeVar("T")

PATIENCE = 900.0
"""Seconds: whatever hangs is ended; what is slow is not."""

IMAGES = {
    Architecture.X86_64: "debian-12-amd64-tiny",
    Architecture.RISCV64: "debian-13-riscv64-tiny",
}


class Lab:
    """A run with QEMU in it, an event loop, and one booted machine with its guest."""

    def __init__(self, architecture: Architecture) -> None:
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp(prefix="vmlab-g-"))
        self.run = Run.begin(Home.open(self.directory))
        hypervisor = provider.open(self.run.owner)
        assert isinstance(hypervisor, QemuHypervisor)
        self.hypervisor = hypervisor
        image = ImageStore(IMAGE_STORE).ensure(IMAGES[architecture])
        self.spec = MachineSpec.of(
            name="vm",
            architecture=architecture,
            memory="512M",
            boot={"kernel": image.kernel, "initrd": image.initrd, "cmdline": image.cmdline},
            channels=CHANNELS,
        )
        self.machine = self.runner.run(self._boot("vm"))
        self.guest = Guest(self.machine, AgentChannel(self.machine.channel))
        self.do(lambda guest: guest.connect(timeout=PATIENCE))

    async def _boot(self, name: str) -> Machine:
        machine = await self.hypervisor.create(self.spec.with_changes(name=name))
        await machine.start()
        return machine

    def do(self, body: Callable[[Guest], Awaitable[T]], *, seconds: float = PATIENCE) -> T:
        """Run a coroutine function with the guest."""

        async def main() -> T:
            async with asyncio.timeout(seconds):
                return await body(self.guest)

        return self.runner.run(main())

    def close(self) -> None:
        async def main() -> None:
            await self.guest.close()
            await self.hypervisor.close()

        self.runner.run(main())
        self.runner.close()
        self.run.close()
        shutil.rmtree(self.directory)


@pytest.fixture(scope="module", autouse=True)
def _patient() -> Iterator[None]:
    """What a hypervisor is asked for without a timeout is not given up on a slow host."""
    with pytest.MonkeyPatch.context() as patch:
        for operation, seconds in list(DEFAULT_TIMEOUTS.items()):
            patch.setitem(DEFAULT_TIMEOUTS, operation, max(seconds, PATIENCE))
        yield


@pytest.fixture(scope="module", params=IMAGES, ids=lambda architecture: architecture.value)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    need(QEMU_BINARIES[request.param])
    lab = Lab(request.param)
    yield lab
    lab.close()
