"""What is said to QEMU when vCPUs and memory come, and what becomes of a guest's refusal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from vmlab.hypervisors.qemu import growth
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qmp import QmpDeviceNotFound, QmpError, QmpLost
from vmlab.machine.errors import MachineCrashed, OperationFailed
from vmlab.machine.sizes import MIB


class Guest:
    """A QEMU with three places for vCPUs, whose guest answers with `answer`."""

    machine = "vm"
    running = True

    def __init__(self, answer: Any = 0, *, refuses: str = "") -> None:
        self.answer = answer
        self.refuses = refuses
        self.present = 1
        self.said: list[tuple[str, Any]] = []
        self.qmp = SimpleNamespace(listen=self._listen)

    async def execute(self, command: str, arguments: Any = None) -> Any:
        if command == self.refuses:
            kind = QmpDeviceNotFound if command == "device_del" else QmpError
            raise kind("no", command=command)
        self.said.append((command, arguments))
        if command == "query-hotpluggable-cpus":
            return [self._slot(number) for number in (2, 1, 0)]
        self.present += command == "device_add"
        return {}

    def _slot(self, number: int) -> dict[str, Any]:
        slot = {"type": "max-cpu", "props": {"core-id": number}}
        return slot | ({"qom-path": "/there"} if number < self.present else {})

    @contextmanager
    def _listen(self, *names: str, match: Callable[[Any], bool]) -> Iterator[Any]:
        async def wait(timeout: float | None = None) -> Any:
            if isinstance(self.answer, BaseException):
                raise self.answer
            if self.answer is None:
                await asyncio.Event().wait()
            return SimpleNamespace(data={"info": {"status": self.answer}})

        yield SimpleNamespace(wait=wait)

    async def crashed(self, operation: str, error: QmpLost) -> MachineCrashed:
        return MachineCrashed(f"{operation} failed: it is gone")


def emulator(guest: Guest) -> Emulator:
    return guest  # a guest answers as an emulator does


def test_vcpus_come_one_after_the_other_at_the_first_free_places() -> None:
    guest, came = Guest(), []
    asyncio.run(growth.add_vcpus(emulator(guest), 3, came))
    expected = [
        {"driver": "max-cpu", "id": f"vcpu-{number}", "core-id": number} for number in (1, 2)
    ]
    assert came == expected
    assert [options for command, options in guest.said if command == "device_add"] == expected
    for count, why in ((4, "room for 3 vCPUs only"), (2, "cannot go on with 2")):
        with pytest.raises(OperationFailed, match=why):
            asyncio.run(growth.add_vcpus(emulator(guest), count, came))
    assert came == expected


@pytest.mark.parametrize("running", [True, False])
def test_a_vcpu_whose_adding_was_interrupted_is_told_if_it_came(running: bool) -> None:
    guest, came = Guest(answer=asyncio.CancelledError()), []
    guest.running = running
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(growth.add_vcpus(emulator(guest), 3, came))
    assert [options["id"] for options in came] == (["vcpu-1"] if running else [])
    guest, came = Guest(refuses="device_add"), []
    with pytest.raises(QmpError):
        asyncio.run(growth.add_vcpus(emulator(guest), 3, came))
    assert came == []


def test_what_a_guest_does_not_take_is_asked_back() -> None:
    guest, came = Guest(answer=1), []
    with pytest.raises(OperationFailed, match="did not take vcpu-1"):
        asyncio.run(growth.add_vcpus(emulator(guest), 2, came))
    assert came == []
    assert guest.said[-1] == ("device_del", {"id": "vcpu-1"})
    gone = Guest(answer=QmpLost("gone"))
    with pytest.raises(MachineCrashed):
        asyncio.run(growth.add_vcpus(emulator(gone), 2, came))


def test_memory_that_qemu_refuses_leaves_no_object() -> None:
    guest = Guest(refuses="device_add")
    with pytest.raises(QmpError):
        asyncio.run(growth.add_memory(emulator(guest), 1, 128 * MIB))
    assert [command for command, _ in guest.said] == ["object-add", "object-del"]
    with pytest.raises(OperationFailed, match="blocks of 128M"):
        asyncio.run(growth.add_memory(emulator(guest), 1, 127 * MIB))


def test_memory_is_taken_back_unless_the_guest_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a device that is not there any more, and of one that the guest never lets go of.
    guest = Guest(refuses="device_del")
    assert asyncio.run(growth.take_memory_back(emulator(guest), 1))
    assert guest.said == [("object-del", {"id": "ram1"})]
    monkeypatch.setattr(growth, "_TAKE_BACK_S", 0.01)
    keeps = Guest(answer=None)
    assert not asyncio.run(growth.take_memory_back(emulator(keeps), 1))
    keeps.running = False
    assert asyncio.run(growth.take_memory_back(emulator(keeps), 1))
