"""Of a machine whose test failed is kept what can be had, and nothing about it can go wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmlab.guests.command import CommandResult
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.simulated.hypervisor import SimulatedHypervisor
from vmlab.hypervisors.simulated.profile import SimulationProfile
from vmlab.lab import evidence
from vmlab.lab.evidence import (
    MEMORY_SNAPSHOT,
    SUMMARY,
    TEXT_LIMIT,
    Evidence,
    bounded,
    collect_evidence,
)
from vmlab.machine.errors import ChannelClosed, OperationFailed
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState


class FakeGuest:
    """A guest whose commands print what they are told to."""

    def __init__(self, **prints: bytes) -> None:
        self.prints = prints
        self.alive = True
        self.asked: list[str] = []

    async def ping(self) -> None:
        if not self.alive:
            await asyncio.Event().wait()

    async def execute(self, command: str, *, stdout: Any, timeout: float) -> CommandResult:
        name = command.split()[0]
        self.asked.append(name)
        if name == "dmesg":
            await stdout(self.prints.get("dmesg", b"[    0.000000] Linux\n"))
            return CommandResult(command, 0, b"", b"", 0.0)
        return CommandResult(command, 127, b"", b"", 0.0)


class EndlessGuest(FakeGuest):
    """A guest that never stops talking, and does not let itself be stopped soon."""

    async def execute(self, command: str, *, stdout: Any, timeout: float) -> CommandResult:
        while True:
            await stdout(b"more and more and more\n" * 1000)
            await asyncio.sleep(0.1)


class BrokenGuest(FakeGuest):
    async def execute(self, command: str, *, stdout: Any, timeout: float) -> CommandResult:
        await stdout(b"so far\n")
        raise ChannelClosed("the guest is gone")


@pytest.fixture
def collected(tmp_path: Path) -> Callable[..., dict[str, Evidence]]:
    """The evidence of a simulated machine, by name."""

    def collect(
        guest: Any = None, prepare: Any = None, memory: bool = True, **fields: Any
    ) -> dict[str, Evidence]:
        owner = Owner("run", "test", Path("/nonexistent"))
        hypervisor = SimulatedHypervisor(owner, SimulationProfile.load("standard"), seed=1)

        async def whole() -> list[Evidence]:
            try:
                spec = MachineSpec.of(name="vm", memory="64M", channels=["vmlab.probe"], **fields)
                machine = await hypervisor.create(spec)
                await machine.start()
                if prepare is not None:
                    machine = await prepare(hypervisor, machine) or machine
                return await collect_evidence(machine, guest, run_directory=tmp_path, memory=memory)
            finally:
                await hypervisor.close()

        with asyncio.Runner(loop_factory=hypervisor.loop_factory()) as runner:
            found = runner.run(whole())
        assert found[0].name == SUMMARY
        names = [each.name for each in found]
        assert len(set(names)) == len(names)
        return {each.name: each for each in found}

    return collect


def told(found: dict[str, Evidence]) -> str:
    content = found[SUMMARY].content
    assert isinstance(content, bytes)
    return content.decode()


def test_a_machine_that_is_well_leaves_all_that_there_is(collected) -> None:
    found = collected(FakeGuest(), display=True)
    assert b"Linux version" in found["console-serial.log"].content
    assert json.loads(found["machine-spec.json"].content)["name"] == "vm"
    state = json.loads(found["machine-state.json"].content)
    assert state["status"]["state"] == "running" and state["metrics"]["cpu"]["seconds"] >= 0
    assert b'"state"' in found["events.jsonl"].content
    assert found["dmesg.txt"].content == b"[    0.000000] Linux\n"
    assert found["screen.png"].content.startswith(b"\x89PNG")
    text = told(found)
    assert "journal: none, the guest has none" in text
    assert "memory: none, snapshots of simulated do not outlive the run" in text
    assert "process: none" in text
    assert "console-serial.log:" in text


def test_the_kernel_s_reports_are_a_piece_of_their_own(collected) -> None:
    async def warn(hypervisor: SimulatedHypervisor, machine: Any) -> None:
        hypervisor.world.machines[machine.id].print("[    9.000000] kernel BUG at a.c:1!\n")

    found = collected(prepare=warn)
    assert b"bug: kernel BUG at a.c:1!" in found["kernel-reports.txt"].content
    assert "kernel-reports.txt" not in collected()


def test_a_machine_that_died_leaves_what_its_hypervisor_has(collected) -> None:
    guest = FakeGuest()

    async def die(hypervisor: SimulatedHypervisor, machine: Any) -> None:
        hypervisor.world.machines[machine.id].die("crashed", "its process was killed")
        await asyncio.sleep(3)
        assert machine.state is MachineState.FAILED

    found = collected(guest, prepare=die)
    assert "console-serial.log" in found
    assert guest.asked == []
    assert "dmesg, journal: none, failed" in told(found)
    assert "memory: none, it is failed" in told(found)


def test_a_guest_that_does_not_answer_is_asked_for_nothing(collected) -> None:
    guest = FakeGuest()
    guest.alive = False
    found = collected(guest)
    assert guest.asked == []
    assert "dmesg, journal: missing, it was not there within 15 s" in told(found)


def test_a_guest_that_never_stops_talking_is_cut_off_and_its_end_is_kept(collected) -> None:
    found = collected(EndlessGuest())
    assert "dmesg: missing, it was not there within" in told(found)
    assert "console-serial.log" in found
    assert found["dmesg.txt"].content.startswith(b"more and more")


def test_what_a_guest_said_before_it_died_is_kept(collected) -> None:
    found = collected(BrokenGuest())
    assert found["dmesg.txt"].content == b"so far\n"
    assert "dmesg: missing, the guest is gone" in told(found)


def test_a_long_text_keeps_its_beginning_and_its_end(collected) -> None:
    long = b"first\n" + b"x" * (3 * TEXT_LIMIT) + b"\nlast"
    found = collected(FakeGuest(dmesg=long))
    kept = found["dmesg.txt"].content
    assert kept.startswith(b"first\n") and kept.endswith(b"\nlast")
    assert len(bounded(long)) < TEXT_LIMIT + 100
    assert bounded(long).startswith(b"first\n") and bounded(long).endswith(b"\nlast")
    assert b"bytes left out" in bounded(long)
    assert bounded(b"short") == b"short"


def test_output_in_many_pieces_is_kept_at_both_ends_and_no_larger() -> None:
    async def main() -> bytes:
        out = evidence._Bounded(1000)
        for number in range(10_000):
            await out(f"line {number}\n".encode())
        return out.text()

    kept = asyncio.run(main())
    assert kept.startswith(b"line 0\n") and kept.endswith(b"line 9999\n")
    assert b"bytes left out" in kept and len(kept) < 1200


def test_a_mistake_in_collecting_is_told_and_hides_nothing(
    collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(log: bytes) -> str:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(evidence, "_reports", wrong)
    found = collected()
    assert "consoles: missing, ZeroDivisionError: a mistake" in told(found)
    assert "machine-spec.json" in found


class Exporting:
    """A machine whose snapshots can be packed, around a simulated one."""

    def __init__(self, machine: Any, fails: bool = False) -> None:
        self._machine = machine
        self._fails = fails

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machine, name)

    async def export_snapshot(self, name: str, target: Path) -> None:
        if self._fails:
            raise OperationFailed("no room")
        await asyncio.to_thread(target.write_bytes, b"packed")


def test_memory_is_packed_into_a_file_and_the_snapshot_goes(collected) -> None:
    machines = []

    async def exporting(hypervisor: SimulatedHypervisor, machine: Any) -> Any:
        machines.append(Exporting(machine))
        return machines[0]

    found = collected(prepare=exporting)
    path = found[MEMORY_SNAPSHOT].content
    assert isinstance(path, Path) and path.read_bytes() == b"packed"
    unasked = collected(prepare=exporting, memory=False)
    assert MEMORY_SNAPSHOT not in unasked and "memory: none, it was not asked" in told(unasked)


def test_memory_that_cannot_be_packed_leaves_no_snapshot(collected) -> None:
    async def failing(hypervisor: SimulatedHypervisor, machine: Any) -> Any:
        return Exporting(machine, fails=True)

    found = collected(prepare=failing)
    assert MEMORY_SNAPSHOT not in found and "memory: missing, no room" in told(found)


def test_files_of_the_last_process_are_read_and_no_others(tmp_path: Path) -> None:
    assert evidence._process_files(tmp_path) == []
    for number in (1, 2, 10):
        launch = tmp_path / "launches" / str(number)
        launch.mkdir(parents=True)
        (launch / "command-line").write_text(f"qemu {number}")
        (launch / "qmp.log").write_bytes(b"a" * (TEXT_LIMIT + 10) + b"end")
        (launch / "qmp.sock").write_text("")
        (launch / "link").symlink_to("/etc/passwd")
    found = dict(evidence._process_files(tmp_path))
    assert set(found) == {"command-line", "qmp.log"}
    assert found["command-line"] == b"qemu 10"
    assert found["qmp.log"].endswith(b"end") and b"13 bytes left out" in found["qmp.log"]


def test_a_machine_without_a_console_says_so(collected) -> None:
    assert "consoles: none, it has no console" in told(collected(consoles=[]))


def test_a_cancelled_collection_ends(tmp_path: Path) -> None:
    async def main() -> None:
        hanging = asyncio.Event()

        async def hang() -> None:
            await hanging.wait()

        machine: Any = SimpleNamespace(name="vm")
        collection = evidence._Collection(machine, None, tmp_path)
        task = asyncio.ensure_future(collection.piece("x", hang, 1000))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
