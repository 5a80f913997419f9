"""Which way a guest is talked to: the best of what its image declares that answers, and said so.

The order is agent, qga, ssh, console. What a channel needs of the machine (a port, a forwarded
port, a console) is looked up first, so one that cannot work costs no time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Final

from vmlab.guests import agent, qga
from vmlab.guests.agent import AgentChannel
from vmlab.guests.command import Command, CommandChannel, Sink
from vmlab.guests.console import ConsoleChannel
from vmlab.guests.qga import QgaChannel
from vmlab.guests.ssh import SshChannel
from vmlab.guests.ssh_keys import MachineKeys
from vmlab.hypervisors.base import Machine
from vmlab.machine.errors import (
    ChannelClosed,
    DeadlineExceeded,
    OperationFailed,
    ResourceNotFound,
    VmlabError,
)

_LOG: Final = logging.getLogger(__name__)

_SSH_PORT: Final = 22


@dataclass(frozen=True, slots=True)
class Login:
    """Who logs in, for the channels that ask; a lab's own images have an empty password."""

    user: str = "root"
    password: str = ""
    keys: MachineKeys | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """How a guest is talked to: the channel's name, and why not by those before it."""

    name: str
    passed_over: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over)
        return f"{self.name} ({reasons})" if reasons else self.name


class Unfit(Exception):
    """A machine lacks what a channel needs."""


def _agent(machine: Machine, login: Login) -> CommandChannel:
    if agent.CONTROL not in machine.spec.channels:
        raise Unfit("the machine has no port for it")
    return AgentChannel(machine.channel)


def _qga(machine: Machine, login: Login) -> CommandChannel:
    if qga.PORT not in machine.spec.channels:
        raise Unfit("the machine has no port for it")
    return QgaChannel(machine.channel)


def _ssh(machine: Machine, login: Login) -> CommandChannel:
    forwards = [forward for nic in machine.spec.nics for forward in nic.forwards]
    if not any((each.guest, each.protocol) == (_SSH_PORT, "tcp") for each in forwards):
        raise Unfit(f"no port of the host leads to the guest's port {_SSH_PORT}")
    if find_spec("asyncssh") is None:
        raise Unfit('asyncssh is not installed (pip install "vmlab[ssh]")')

    async def address() -> tuple[str, int]:
        return "127.0.0.1", await forwarded(machine, _SSH_PORT)

    return SshChannel(address, user=login.user, password=login.password, keys=login.keys)


def _console(machine: Machine, login: Login) -> CommandChannel:
    serial = [each.name for each in machine.spec.consoles if each.kind == "serial"]
    if not serial:
        raise Unfit("the machine has no serial console")
    return ConsoleChannel(
        lambda: machine.console(serial[0]), user=login.user, password=login.password
    )


FACTORIES: Final[Mapping[str, Callable[[Machine, Login], CommandChannel]]] = {
    "agent": _agent,
    "qga": _qga,
    "ssh": _ssh,
    "console": _console,
}
"""What makes each channel, the best first; they raise Unfit."""


async def forwarded(machine: Machine, port: int, protocol: str = "tcp") -> int:
    """The port of the host that leads to a port of the guest.

    Raises:
        ResourceNotFound: none does.
    """
    for nic in (await machine.info()).nics:
        for kind, host, guest in nic.forwards:
            if (kind, guest) == (protocol, port):
                return host
    raise ResourceNotFound(
        f"no port of the host leads to the guest's {protocol} port {port}",
        hint="declare it in the specification: a NIC's `forwards`",
        machine=machine.name,
        operation="forward_port",
    )


class ChosenChannel(CommandChannel):
    """The best channel of those declared that answers.

    Args:
        machine: Whose guest.
        declared: Names of the channels that its image has (`Image.channels`).
        login: Who logs in where that is asked for.
        told: Called with each choice, for a timeline or a report; it is logged in any case.
    """

    name: ClassVar[str] = "chosen"

    def __init__(
        self,
        machine: Machine,
        declared: Iterable[str] = tuple(FACTORIES),
        *,
        login: Login | None = None,
        told: Callable[[Choice], None] | None = None,
    ) -> None:
        self._machine = machine
        self._declared = frozenset(declared)
        self._login = login or Login()
        self._told = told
        self._channel: CommandChannel | None = None
        self.choice: Choice | None = None
        """What was chosen; None before `connect`."""

    async def connect(self, *, timeout: float) -> None:
        """Try the declared channels, the best first; what was chosen once is kept.

        Each but the last gets half of the time that is left.

        Raises:
            DeadlineExceeded: none answers within `timeout` seconds.
            OperationFailed: none can work, or all refuse; each one's reason is told.
            ChannelClosed: the machine ended meanwhile.
        """
        if self._channel is not None:
            await self._channel.connect(timeout=timeout)
            return
        passed: list[tuple[str, str]] = []
        candidates: list[tuple[str, CommandChannel]] = []
        for name, factory in FACTORIES.items():
            if name in self._declared:
                try:
                    candidates.append((name, factory(self._machine, self._login)))
                except Unfit as error:
                    passed.append((name, str(error)))
        clock = asyncio.get_running_loop()
        end = clock.time() + timeout
        late = False
        for position, (name, channel) in enumerate(candidates):
            left = max(0.0, end - clock.time())
            share = left if position == len(candidates) - 1 else left / 2
            try:
                await channel.connect(timeout=share)
            except ChannelClosed:
                raise
            except VmlabError as error:
                late = late or isinstance(error, DeadlineExceeded)
                passed.append((name, error.message))
                continue
            self._settle(name, channel, passed)
            return
        self._fail(passed, timeout, late=late)

    def _settle(self, name: str, channel: CommandChannel, passed: list[tuple[str, str]]) -> None:
        # In the order of preference, not in that of finding out.
        order = list(FACTORIES)
        better = [each for each in passed if order.index(each[0]) < order.index(name)]
        better.sort(key=lambda each: order.index(each[0]))
        self._channel, self.choice = channel, Choice(name, tuple(better))
        level = logging.WARNING if better else logging.INFO
        _LOG.log(level, "guest %r is talked to by %s", self._machine.name, self.choice)
        if self._told is not None:
            self._told(self.choice)

    def _fail(self, passed: list[tuple[str, str]], timeout: float, *, late: bool) -> None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed)
        if late:
            raise DeadlineExceeded(
                f"connecting to the guest ({reasons})",
                seconds=timeout,
                machine=self._machine.name,
                hint="its console's log tells how far it came",
            )
        unknown = ", ".join(sorted(self._declared - FACTORIES.keys()))
        raise OperationFailed(
            f"there is no way to talk to the guest: {reasons or unknown or 'none is declared'}",
            hint=f"an image declares one or more of {', '.join(FACTORIES)}",
            machine=self._machine.name,
            operation="connect",
        )

    def _chosen(self) -> CommandChannel:
        if self._channel is None:
            raise ChannelClosed(
                "the guest was not connected to",
                machine=self._machine.name,
                operation="execute",
                hint="call `connect` first",
            )
        return self._channel

    async def run(
        self,
        command: Command,
        *,
        stdout: Sink,
        stderr: Sink,
        started: Callable[[int], None] | None = None,
    ) -> int:
        return await self._chosen().run(command, stdout=stdout, stderr=stderr, started=started)

    async def ping(self) -> None:
        await self._chosen().ping()

    async def signal(self, process: int, number: int) -> None:
        await self._chosen().signal(process, number)

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
