"""What the suite does where there is nothing to ask: no limits, and guests that cannot tell."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from mutants.base import PROFILE, BrokenHypervisor, BrokenProvider

from vmlab.conformance import agent_probe
from vmlab.conformance.agent_probe import AgentProbe
from vmlab.conformance.probe import GuestCannotTell
from vmlab.conformance.registry import checks
from vmlab.conformance.runner import Subject, run_check
from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Limits
from vmlab.machine.errors import DeadlineExceeded
from vmlab.machine.faults import FaultKind
from vmlab.machine.states import MachineState


class Boundless(BrokenHypervisor):
    """Declares no limit."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._capabilities = self._capabilities.model_copy(update={"limits": Limits()})


def test_limits_that_are_not_declared_are_not_asked_for() -> None:
    result = run_check(checks()["errors.limits"], Subject(BrokenProvider(Boundless), PROFILE))
    assert result.findings == []
    assert "declares no limit" in result.reason


class Faultless(BrokenHypervisor):
    """Declares one kind of fault, of the disks."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        only = {"faults": frozenset({FaultKind.DISK_ERROR})}
        self._capabilities = self._capabilities.model_copy(update=only)


def test_why_a_fault_does_not_exist_is_said_where_it_is_known() -> None:
    profile = PROFILE.with_changes(
        faultless={FaultKind.DISK_SLOW: "no clock", FaultKind.LOST_EVENT: "tells nothing"}
    )
    subject = Subject(BrokenProvider(Faultless), profile)
    skipped = run_check(checks()["fault.hypervisor"], subject)
    assert skipped.reason == (
        "declares no fault of lost-event (tells nothing), stale-status, hypervisor-crash"
    )
    partly = run_check(checks()["fault.disks"], subject)
    assert "the fault disk-slow is not declared (no clock)" in partly.notes


class Told(AgentProbe):
    """A probe whose guest is played: what it prints is given, by a piece of the command."""

    def __init__(self, architecture: str = "riscv64", **answers: bytes) -> None:
        machine: Any = SimpleNamespace(
            spec=SimpleNamespace(architecture=Architecture(architecture))
        )
        super().__init__(machine)
        self.answers = answers
        self.asked: list[str] = []

    async def ask(self, command: str, data: bytes | None = None) -> bytes:
        self.asked.append(command)
        return next((said for piece, said in self.answers.items() if piece in command), b"")


def test_memory_is_read_from_a_device_tree_where_there_is_no_smbios() -> None:
    ranges = struct.pack(">4Q", 0x8000_0000, 96 << 20, 0x1_0000_0000, 32 << 20)
    assert asyncio.run(Told(devicetree=ranges).memory()) == 128 << 20
    with pytest.raises(GuestCannotTell, match="neither SMBIOS nor a device tree"):
        asyncio.run(Told().memory())


def test_what_a_guest_cannot_tell_is_said() -> None:
    probe = Told(block_size_bytes=b"0\n")
    with pytest.raises(GuestCannotTell, match="no memory blocks"):
        asyncio.run(probe.nodes())
    probe = Told(block_size_bytes=b"40000000\n1 0\n")
    with pytest.raises(GuestCannotTell, match="in blocks of 1"):
        asyncio.run(probe.nodes())
    with pytest.raises(GuestCannotTell, match="nobody has told it"):
        asyncio.run(Told(hostname=b"vmlab\n").hostname())
    assert asyncio.run(Told(hostname=b"named\n").hostname()) == "named"


def test_a_display_is_drawn_on_by_its_terminal_or_by_its_registers() -> None:
    for architecture, way in (
        ("x86_64", "/dev/tty1"),
        ("riscv64", "devmem"),
        ("aarch64", "devmem"),
    ):
        probe = Told(architecture)
        asyncio.run(probe.show("text"))
        (command,) = probe.asked
        assert way in command


def test_disks_are_told_scsi_first_in_the_order_of_their_targets() -> None:
    rows = "late vda 8 0 ../../../vda\nb sdb 16 1 ../../../0:0:1:0\na sda 8 0 ../../../0:0:0:0\n"
    found = asyncio.run(Told(sys=rows.encode()).disks())
    assert [(disk.name, disk.size, disk.readonly) for disk in found] == [
        ("a", 4096, False),
        ("b", 8192, True),
        ("late", 4096, False),
    ]


class Silent:
    """A machine whose guest never answers; its console has something to say, if it has one."""

    def __init__(self, *consoles: str) -> None:
        self.spec = SimpleNamespace(consoles=consoles)

    async def status(self) -> Any:
        return SimpleNamespace(state=MachineState.RUNNING)

    async def channel(self, name: str) -> Any:
        await asyncio.Event().wait()

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Any]:
        async def log() -> bytes:
            return b"Kernel panic - not syncing: \xff"

        yield SimpleNamespace(log=log)

    async def console(self) -> Any:
        return self._open()


@pytest.mark.parametrize(
    ("consoles", "told"),
    [(("serial",), "running; the end of its console:\nKernel panic"), ((), "has no console")],
)
def test_what_a_silent_guest_did_last_is_told(
    monkeypatch: pytest.MonkeyPatch, consoles: tuple[str, ...], told: str
) -> None:
    monkeypatch.setattr(agent_probe, "_CONNECT", 0.01)
    machine: Any = Silent(*consoles)
    with pytest.raises(DeadlineExceeded) as caught:
        asyncio.run(AgentProbe(machine).ticks())
    (note,) = caught.value.__notes__
    assert told in note
