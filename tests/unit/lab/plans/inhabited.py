"""A guest that is this host: the agent's real script over pseudo-terminals, without a machine."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from tests.unit.guests.ports import HostedAgent

from vmlab.guests.agent import AgentChannel
from vmlab.guests.guest import Guest
from vmlab.hypervisors.base import Machine
from vmlab.lab.loop import LoopThread
from vmlab.lab.vm import Expecting
from vmlab.machine.errors import InvalidState

T = TypeVar("T")


class Host:
    """What `run_plan` needs of a machine."""

    name = "host"
    watchdog: Expecting | None = None

    def __init__(self, agent: HostedAgent, loop: LoopThread) -> None:
        self.agent = agent
        machine = cast("Machine", SimpleNamespace(name="host"))  # only its name is used
        self.guest: Guest | None = Guest(machine, AgentChannel(agent.open))
        self._loop = loop
        self.greetings = 0

    def inside(self, operation: str) -> Guest:
        if self.guest is None:
            raise InvalidState(operation, expected=("running",), actual="off", machine="host")
        return self.guest

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        return self._loop.run(coroutine, timeout)

    async def greeted(self, *, step: str = "boot", timeout: float | None = None) -> None:
        self.greetings += 1


@contextmanager
def this_host(directory: Path) -> Iterator[Host]:
    loop = LoopThread()
    agent = HostedAgent(directory, ["/bin/busybox", "sh"])
    try:
        host = Host(agent, loop)
        assert host.guest is not None
        host.run(host.guest.connect(timeout=280))
        yield host
        loop.run(host.guest.close() if host.guest is not None else asyncio.sleep(0))
    finally:
        agent.stop()
        loop.close()
