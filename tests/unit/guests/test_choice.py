"""The choice of a channel: the best declared one that answers, and what was passed over."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmlab.guests import choice as choice_module
from vmlab.guests.agent import CHANNELS, AgentChannel
from vmlab.guests.choice import FACTORIES, Choice, ChosenChannel, Login, forwarded
from vmlab.guests.command import Command, CommandChannel, Sink
from vmlab.guests.console import ConsoleChannel
from vmlab.guests.qga import PORT, QgaChannel
from vmlab.guests.ssh import SshChannel
from vmlab.hypervisors.base import Machine, NicInfo
from vmlab.hypervisors.simulated.clock import VirtualClockLoop
from vmlab.machine.errors import (
    ChannelClosed,
    DeadlineExceeded,
    OperationFailed,
    ResourceNotFound,
    VmlabError,
)
from vmlab.machine.spec import MachineSpec


def machine(**fields: Any) -> Machine:
    """A machine that has a specification and a name; nothing else of it is asked here."""
    base: dict[str, Any] = {
        "name": "vm",
        "memory": "64M",
        "channels": (*CHANNELS, PORT),
        "nics": [{"name": "lan", "forwards": [{"guest": 22}]}],
    }

    async def info() -> Any:
        nic = NicInfo(
            name="lan", network="user", mac="52:54:00:00:00:01", forwards=(("tcp", 4022, 22),)
        )
        return SimpleNamespace(nics=(nic,))

    def opened(name: str) -> None:
        raise AssertionError("nothing is opened by choosing")

    spec = MachineSpec.of(**(base | fields))
    made = SimpleNamespace(name="vm", spec=spec, info=info, channel=opened, console=opened)
    return cast("Machine", made)


class Scripted(CommandChannel):
    """A channel whose answer to `connect` is given; it notes what it was asked."""

    def __init__(self, answer: VmlabError | None) -> None:
        self.answer = answer
        self.timeouts: list[float] = []
        self.calls: list[Any] = []

    async def connect(self, *, timeout: float) -> None:
        self.timeouts.append(timeout)
        if self.answer is not None:
            raise self.answer

    async def run(
        self,
        command: Command,
        *,
        stdout: Sink,
        stderr: Sink,
        started: Callable[[int], None] | None = None,
    ) -> int:
        self.calls.append(command)
        return 3

    async def signal(self, process: int, number: int) -> None:
        self.calls.append((process, number))

    async def close(self) -> None:
        self.calls.append("closed")


LATE = DeadlineExceeded("waiting for it", seconds=1)


def scripted(patch: pytest.MonkeyPatch, **answers: VmlabError | None) -> dict[str, Scripted]:
    made = {name: Scripted(answer) for name, answer in answers.items()}

    def factory(name: str) -> Callable[[Machine, Login], CommandChannel]:
        return lambda machine, login: made[name]

    patch.setattr(choice_module, "FACTORIES", {name: factory(name) for name in answers})
    return made


def test_the_order_is_agent_qga_ssh_console_and_each_is_made_of_the_machine() -> None:
    kinds = {"agent": AgentChannel, "qga": QgaChannel, "ssh": SshChannel, "console": ConsoleChannel}
    assert list(FACTORIES) == list(kinds)
    for name, factory in FACTORIES.items():
        assert isinstance(factory(machine(), Login()), kinds[name])


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("agent", {"channels": ()}, "no port"),
        ("qga", {"channels": ()}, "no port"),
        ("ssh", {"nics": ()}, "port 22"),
        ("ssh", {"nics": [{"name": "l", "forwards": [{"guest": 22, "protocol": "udp"}]}]}, "22"),
        ("console", {"consoles": [{"name": "t", "kind": "virtio"}]}, "no serial console"),
    ],
)
def test_a_channel_that_the_machine_has_no_place_for_is_not_tried(
    name: str, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(OperationFailed, match=f"no way to talk to the guest: {name}: .*{reason}"):
        asyncio.run(ChosenChannel(machine(**fields), [name]).connect(timeout=60))


def test_ssh_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_module, "find_spec", lambda name: None)
    with pytest.raises(OperationFailed, match=r"pip install .vmlab\[ssh\]"):
        asyncio.run(ChosenChannel(machine(), ["ssh"]).connect(timeout=60))
    assert importlib.util.find_spec("asyncssh") is not None


def test_the_first_that_answers_is_taken_and_the_others_are_not_touched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = scripted(monkeypatch, agent=None, ssh=None)
    chosen = ChosenChannel(machine(), ["ssh", "agent"])
    with caplog.at_level(logging.INFO, "vmlab"):
        asyncio.run(chosen.connect(timeout=60))
    assert chosen.choice == Choice("agent")
    assert made["ssh"].timeouts == []
    assert [(each.levelno, each.message) for each in caplog.records] == [
        (logging.INFO, "guest 'vm' is talked to by agent")
    ]


def test_what_was_passed_over_is_told_in_the_order_of_preference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = OperationFailed("it may not run commands", hint="allow it", operation="connect")
    made = scripted(monkeypatch, agent=LATE, qga=refused, ssh=None, console=None)

    def lacking(machine: Machine, login: Login) -> CommandChannel:
        raise choice_module.Unfit("nobody forwards it")

    monkeypatch.setitem(cast("dict[str, Any]", choice_module.FACTORIES), "ssh", lacking)
    told: list[Choice] = []
    chosen = ChosenChannel(machine(), FACTORIES, told=told.append)
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(chosen.connect(timeout=80))
    assert chosen.choice is not None
    assert chosen.choice.name == "console"
    assert [name for name, _ in chosen.choice.passed_over] == ["agent", "qga", "ssh"]
    assert told == [chosen.choice]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "by console (agent: waiting for it" in record.message
    assert "ssh: nobody forwards it" in record.message
    # Each has half of what is left; the last one has all of it.
    assert made["agent"].timeouts == pytest.approx([40])
    assert made["qga"].timeouts == pytest.approx([40])
    assert made["console"].timeouts == pytest.approx([80])


def test_only_what_the_image_declares_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scripted(monkeypatch, agent=None, console=None)
    chosen = ChosenChannel(machine(), ["console"])
    asyncio.run(chosen.connect(timeout=60))
    assert chosen.choice == Choice("console")
    assert made["agent"].timeouts == []


def test_a_choice_is_kept_when_the_guest_is_connected_to_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = scripted(monkeypatch, agent=LATE, ssh=None)
    chosen = ChosenChannel(machine(), FACTORIES)

    async def body() -> None:
        await chosen.connect(timeout=60)
        made["agent"].answer = None
        await chosen.connect(timeout=50)

    asyncio.run(body())
    assert (len(made["agent"].timeouts), made["ssh"].timeouts[1]) == (1, 50)


def test_none_that_answers_is_a_deadline_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = OperationFailed("another host key", hint="look", operation="connect")
    scripted(monkeypatch, agent=LATE, ssh=refused)
    with pytest.raises(DeadlineExceeded, match=r"agent: waiting for it.*; ssh: another host key"):
        asyncio.run(ChosenChannel(machine(), FACTORIES).connect(timeout=60))


def test_all_that_refuse_are_told_and_so_is_an_unknown_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = OperationFailed("another host key", hint="look", operation="connect")
    scripted(monkeypatch, ssh=refused)
    with pytest.raises(OperationFailed, match="ssh: another host key"):
        asyncio.run(ChosenChannel(machine(), FACTORIES).connect(timeout=60))
    with pytest.raises(OperationFailed, match="telepathy") as caught:
        asyncio.run(ChosenChannel(machine(), ["telepathy"]).connect(timeout=60))
    assert "agent, " not in (caught.value.hint or "")  # only what can be declared here
    assert "ssh" in (caught.value.hint or "")


def test_a_machine_that_ends_is_not_asked_further(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scripted(monkeypatch, agent=ChannelClosed("the machine ended"), console=None)
    with pytest.raises(ChannelClosed, match="the machine ended"):
        asyncio.run(ChosenChannel(machine(), FACTORIES).connect(timeout=60))
    assert made["console"].timeouts == []


def test_what_is_asked_goes_to_the_chosen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scripted(monkeypatch, agent=None)
    chosen = ChosenChannel(machine(), ["agent"])
    command = Command("true")

    async def drop(data: bytes) -> None:
        raise AssertionError("a scripted channel gives nothing")

    async def body() -> None:
        await chosen.close()
        with pytest.raises(ChannelClosed, match="not connected"):
            await chosen.run(command, stdout=drop, stderr=drop)
        await chosen.connect(timeout=60)
        assert await chosen.run(command, stdout=drop, stderr=drop) == 3
        await chosen.signal(7, 15)
        await chosen.close()

    asyncio.run(body())
    assert made["agent"].calls == [command, (7, 15), "closed"]


def test_a_forwarded_port_is_looked_up() -> None:
    assert asyncio.run(forwarded(machine(), 22)) == 4022
    with pytest.raises(ResourceNotFound, match="tcp port 80"):
        asyncio.run(forwarded(machine(), 80))
