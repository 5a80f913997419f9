"""A process that was started, and whose manager was killed before the record told of it, kept all
machines of its store from being found: it was looked for in the directory of the one before it.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.needs import need

from vmlab.hypervisors import processes
from vmlab.hypervisors.ownership import Home, Store
from vmlab.hypervisors.registry import provider
from vmlab.machine.states import MachineState

KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from vmlab.hypervisors.monitored.recorded import RecordedMachine
from vmlab.hypervisors.ownership import Home, Store
from vmlab.hypervisors.registry import provider
from vmlab.machine.spec import MachineSpec

async def attach(self, emulator):
    os.kill(os.getpid(), signal.SIGKILL)

async def main(home, starts):
    owner = Store.open(Home.open(Path(home)), "kept").owner
    hypervisor = provider("qemu").open(owner, {})
    machine = await hypervisor.create(MachineSpec.of(name="m", memory="64M"))
    for _ in range(starts):
        await machine.start()
        await machine.kill()
    RecordedMachine.attach = attach
    await machine.start()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


@pytest.fixture
def home() -> Iterator[Home]:
    """A home with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="vmlab-t-") as name:
        home = Home.open(Path(name))
        yield home
        # What is not found again, nothing else ends.
        for process in processes.adopt(Store.open(home, "kept").owner):
            process.kill()
            asyncio.run(process.wait(60))


@pytest.mark.parametrize("starts", [0, 1], ids=["first", "second"])
def test_machine_whose_start_was_killed_is_found_and_starts_again(home: Home, starts: int) -> None:
    need("qemu-system-x86_64")
    command = [sys.executable, "-c", KILLED, str(home.directory), str(starts)]
    killed = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    owner = Store.open(home, "kept").owner
    assert len(processes.adopt(owner)) == 1, "QEMU lives on without who started it"

    async def story() -> None:
        hypervisor = provider("qemu").open(owner, {})
        (machine,) = await hypervisor.list()
        assert machine.state is MachineState.FAILED
        assert processes.adopt(owner) == []
        await machine.start()
        assert (await machine.status()).state is MachineState.RUNNING
        await machine.delete(force=True)
        await hypervisor.close()

    asyncio.run(story())
