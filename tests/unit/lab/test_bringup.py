"""A guest that will not answer is given up with what its console printed, and not waited for."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from vmlab.guests.agent import CHANNELS
from vmlab.images.image import Image
from vmlab.lab import bringup
from vmlab.lab.boot import Bootable
from vmlab.lab.timeline import Timeline
from vmlab.lab.ways import declared_by, label_of
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import ChannelClosed, MachineCrashed, OperationFailed
from vmlab.machine.spec import MachineSpec

PANIC = (
    b"[    1.000000] Kernel panic - not syncing: VFS: Unable to mount root fs\n"
    b"[    1.000100] Call Trace:\n"
)


class PrintingConsole:
    """A console that prints what it is given, a piece at a time, and then stands still or ends."""

    def __init__(self, pieces: list[bytes], ends: bool) -> None:
        self._pieces = list(pieces)
        self._all = b"".join(pieces)
        self._ends = ends

    async def read(self) -> bytes:
        if not self._pieces and not self._ends:
            await asyncio.Event().wait()
        return self._pieces.pop(0) if self._pieces else b""

    async def log(self) -> bytes:
        return self._all

    async def __aenter__(self) -> PrintingConsole:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


class MuteMachine:
    """A machine whose agent never answers."""

    name = "mute"

    def __init__(self, *pieces: bytes, ends: bool = False, **fields: Any) -> None:
        base = {"channels": CHANNELS} | fields
        self.spec = MachineSpec.of(name="mute", architecture="x86_64", **base)
        self._pieces = list(pieces)
        self._ends = ends

    async def start(self) -> None:
        pass

    async def console(self, name: str = "serial") -> PrintingConsole:
        assert name == "serial"
        return PrintingConsole(self._pieces, self._ends)

    async def channel(self, name: str) -> None:
        if self._ends:
            raise ChannelClosed("the guest is gone")
        await asyncio.Event().wait()


def bring_up(machine: MuteMachine, started: Any = None) -> None:
    async def main() -> None:
        image = Image("0" * 64, "i", Architecture.X86_64, Path("/"), {})
        wanted = Bootable(machine.spec, image, machine.spec)
        async with bringup.booted(machine, wanted, Timeline(), started):
            raise AssertionError("it does not answer")

    asyncio.run(asyncio.wait_for(main(), 280))


@pytest.mark.parametrize("cut", [1, 20, 40, len(PANIC)])
def test_a_panic_ends_the_wait_with_its_lines_wherever_they_are_cut(cut: int) -> None:
    machine = MuteMachine(
        b"booting\n" + PANIC[:cut], PANIC[cut:], b"[    1.000200] ---[ end Kernel panic ]---\n"
    )
    with pytest.raises(MachineCrashed, match="panicked while it booted") as caught:
        bring_up(machine)
    assert "Unable to mount root fs" in str(caught.value)
    assert "Call Trace" in str(caught.value) and "booting" not in str(caught.value)


def test_a_kernel_that_restarts_without_a_last_line_is_given_up_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bringup, "_REST_OF_PANIC", 0.01)
    with pytest.raises(MachineCrashed, match="panicked"):
        bring_up(MuteMachine(PANIC))


def test_a_machine_that_ends_by_its_kernels_panic_is_told_so() -> None:
    with pytest.raises(MachineCrashed, match="panicked while it booted") as caught:
        bring_up(MuteMachine(PANIC, ends=True))
    assert "Unable to mount root fs" in str(caught.value)


END = b"[    1.000200] ---[ end Kernel panic - not syncing ]---\n"


class LateConsole(PrintingConsole):
    """What it prints is there a moment after the agent's channel has ended."""

    async def read(self) -> bytes:
        await asyncio.sleep(0.05)
        return await super().read()


class StalledConsole(PrintingConsole):
    """The process that reads it stands still until after the time that a panic has."""

    stalled = False

    async def read(self) -> bytes:
        if not StalledConsole.stalled:
            StalledConsole.stalled = True
            await asyncio.sleep(0.1)
            asyncio.get_running_loop().call_soon(time.sleep, 1.5)
            await asyncio.sleep(0.02)
            # From who looks at the log to who reads.
            for _ in range(3):
                await asyncio.sleep(0)
        return await super().read()


class StoppedByPanic(MuteMachine):
    """A machine that its hypervisor stops when the kernel panics: its console never ends."""

    kind: type[PrintingConsole] = LateConsole

    async def console(self, name: str = "serial") -> PrintingConsole:
        return self.kind(self._pieces, ends=False)

    async def channel(self, name: str) -> None:
        raise ChannelClosed("the guest is gone")


def test_a_panic_that_is_read_late_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bringup, "_REST_OF_PANIC", 300.0)
    with pytest.raises(MachineCrashed, match="panicked while it booted"):
        bring_up(StoppedByPanic(PANIC, END))


def test_a_panic_is_told_where_this_process_stands_still_longer_than_it_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bringup, "_REST_OF_PANIC", 1.0)
    monkeypatch.setattr(StoppedByPanic, "kind", StalledConsole)
    monkeypatch.setattr(StalledConsole, "stalled", False)
    with pytest.raises(MachineCrashed, match="panicked while it booted"):
        bring_up(StoppedByPanic(PANIC, END))


def test_a_machine_that_ends_is_told_with_its_console() -> None:
    with pytest.raises(ChannelClosed, match="the guest is gone") as caught:
        bring_up(MuteMachine(b"No bootable device.\n", ends=True))
    assert "No bootable device" in str(caught.value)


def test_a_machine_that_printed_nothing_is_told_so() -> None:
    with pytest.raises(ChannelClosed, match="printed nothing"):
        bring_up(MuteMachine(ends=True))


def test_whoever_wants_to_know_is_told_that_it_has_started() -> None:
    told: list[str] = []
    with pytest.raises(ChannelClosed):
        bring_up(MuteMachine(ends=True), lambda: told.append("started"))
    assert told == ["started"]


def test_channels_are_those_of_the_image_and_known_again_by_the_machine() -> None:
    labels = label_of(("qga", "ssh", "console"))
    assert declared_by(MachineSpec.of(name="m", labels=labels)) == ("qga", "ssh", "console")
    assert declared_by(MachineSpec.of(name="m", labels=label_of(()))) == ("agent",)


def test_a_guest_that_declares_nothing_that_works_is_told_so() -> None:
    with pytest.raises(
        OperationFailed, match=r"no way to talk.*no port for it(?s:.*)printed nothing"
    ):
        bring_up(MuteMachine(channels=(), labels=label_of(("qga",))))
