"""What hypervisors and guests say of a disk is believed, and not that it was told to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vmlab.guests.command import CommandResult
from vmlab.machine.errors import ChannelClosed, HypervisorUnavailable
from vmlab.machine.sizes import MIB
from vmlab.manager.operator import attachments
from vmlab.manager.requests import AttachDisk, CreateDisk, DetachDisk, StartMachine

Tell = Callable[..., None]


class Guest:
    """A guest that says what it is told to say of its disks."""

    def __init__(self, *said: str) -> None:
        self.said = list(said)
        self.commands: list[str] = []

    async def succeed(self, command: str, *, timeout: float) -> CommandResult:
        text = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        if text == "dies":
            raise ChannelClosed("the guest died")
        return CommandResult(command, 0, text.encode(), b"", 0.0)

    async def wait_until_succeeds(self, command: str, *, timeout: float) -> None:
        self.commands.append("wait")

    async def execute(self, command: str, *, timeout: float) -> None:
        self.commands.append(command)


async def running(asking: Any, monkeypatch: pytest.MonkeyPatch, *said: str) -> Guest:
    """A machine that runs, whose guest says that, and a disk."""
    await asking.create("one", start=True)
    await asking.do(CreateDisk(name="data", size=MIB))
    guest = Guest(*said)

    async def get(machine_id: str, **_: Any) -> Guest:
        return guest

    monkeypatch.setattr(asking.manager.guests, "get", get)
    return guest


def test_guest_is_waited_for_until_it_finds_the_disk(
    tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(asking: Any) -> None:
        guest = await running(asking, monkeypatch, "", "disk data vdb 2048\n")
        result = await asking.do(AttachDisk(disk="data", machine="one"))
        assert (result["guest"], guest.commands) == ("/dev/vdb", ["wait"])

    tell(story)


@pytest.mark.parametrize(
    ("said", "told"),
    [("", "does not find disk 'data'"), ("disk data vdb 4096\n", "finds 2M at disk 'data'")],
)
def test_disk_that_the_guest_does_not_have_is_taken_back(
    tell: Tell, monkeypatch: pytest.MonkeyPatch, said: str, told: str
) -> None:
    async def story(asking: Any) -> None:
        await running(asking, monkeypatch, said)
        assert told in await asking.fail(AttachDisk(disk="data", machine="one"))
        disk = await asking.disk("data")
        assert (disk.state, disk.machine) == ("available", None)
        assert list((await asking.guest("one")).disks) == ["root"]

    tell(story)


def test_disk_that_is_mounted_is_not_detached(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(asking: Any) -> None:
        guest = await running(asking, monkeypatch, "disk data vdb 2048\n")
        await asking.do(AttachDisk(disk="data", machine="one"))
        guest.said = ["disk data vdb 2048\nmount vdb1 /srv\n"]
        assert "mounted at /srv" in await asking.fail(DetachDisk(disk="data"))
        assert (await asking.disk("data")).state == "attached"
        guest.said = ["disk data vdb 2048\n"]
        await asking.do(DetachDisk(disk="data"))
        assert guest.commands == ["sync"]

    tell(story)


def test_guest_that_dies_meanwhile_keeps_nothing_back(
    tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(asking: Any) -> None:
        await running(asking, monkeypatch, "dies")
        result = await asking.do(AttachDisk(disk="data", machine="one"))
        assert result["guest"] == "(the guest died)"
        await asking.do(DetachDisk(disk="data"))

    tell(story)


def test_failed_machine_lets_go_of_its_disk(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one", start=True)
        await asking.do(CreateDisk(name="data", size=MIB))
        await asking.do(AttachDisk(disk="data", machine="one"))
        hardware = await asking.guest("one")
        hardware.write_disk((await asking.disk("data")).device, 0, b"kept")
        hardware.die("crashed", "for the test")
        await asking.do(DetachDisk(disk="data"))
        disk = await asking.disk("data")
        path = asking.manager.storage.path(disk.id, "raw")
        assert (disk.state, path.read_bytes()[:4]) == ("available", b"kept")
        assert (await asking.machine("one")).state == "stopped"

    tell(story)


@pytest.mark.parametrize("lie", ["nothing", "another size"])
def test_hypervisor_that_says_yes_and_does_not_is_not_believed(
    tell: Tell, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    async def story(asking: Any) -> None:
        machine = await asking.create("one", start=True)
        await asking.do(CreateDisk(name="data", size=MIB))
        found = await asking.manager.machine(machine.id)
        info = found.info

        async def lying() -> Any:
            told = await info()
            *kept, last = told.disks
            other = () if lie == "nothing" else (last.model_copy(update={"size": 512}),)
            return told.model_copy(update={"disks": (*kept, *other)})

        monkeypatch.setattr(found, "info", lying)
        said = await asking.fail(AttachDisk(disk="data", machine="one"))
        assert ("does not have" if lie == "nothing" else "512 bytes") in said
        assert (await asking.disk("data")).state == "available"

    tell(story)


def test_disk_that_stays_with_its_machine_is_attached_still(
    tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(asking: Any) -> None:
        machine = await asking.create("one", start=True)
        await asking.do(CreateDisk(name="data", size=MIB))
        await asking.do(AttachDisk(disk="data", machine="one"))
        found = await asking.manager.machine(machine.id)

        async def nothing(name: str) -> None:
            """It says that it did."""

        monkeypatch.setattr(found, "unplug_disk", nothing)
        assert "still has disk 'data'" in await asking.fail(DetachDisk(disk="data"))
        assert (await asking.disk("data")).state == "attached"

    tell(story)


def test_disk_of_which_nobody_knows_who_has_it_is_failed(
    tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one", start=True)
        await asking.do(CreateDisk(name="data", size=MIB))
        machine = asking.manager.machine

        async def away(machine_id: str) -> Any:
            raise HypervisorUnavailable("it is away", hypervisor="simulated")

        monkeypatch.setattr(attachments.AttachDiskHandler, "retry_safe", False)
        monkeypatch.setattr(asking.manager, "machine", away)
        assert "it is away" in await asking.fail(AttachDisk(disk="data", machine="one"))
        assert (await asking.disk("data")).state == "failed"
        monkeypatch.setattr(asking.manager, "machine", machine)
        # Whoever looks again finds that no machine has it.
        await asking.do(DetachDisk(disk="data"))
        assert (await asking.disk("data")).state == "available"
        await asking.do(AttachDisk(disk="data", machine="one"))

    tell(story)


def test_claims_are_given_back_by_what_never_began(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.do(CreateDisk(name="data", size=MIB))
        operator = asking.manager.operator
        async with operator.alone(f"disk:{(await asking.disk('data')).id}"):
            for request in (AttachDisk(disk="data", machine="one"),):
                waiting = await operator.submit(request)
                assert (await asking.disk("data")).state == "attaching"
                await operator.cancel(waiting.id)
                assert (await asking.disk("data")).state == "available"
        await asking.do(AttachDisk(disk="data", machine="one"))
        async with operator.alone(f"disk:{(await asking.disk('data')).id}"):
            waiting = await operator.submit(DetachDisk(disk="data"))
            await operator.cancel(waiting.id)
            assert (await asking.disk("data")).state == "attached"
        await asking.do(StartMachine(machine="one"))

    tell(story)
