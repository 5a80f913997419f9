"""What the driver says to QEMU when QEMU refuses, is late, or is gone: hot-plug, jobs, migrations.

The other side is scripted, a stand-in for a QEMU that fails on cue; the real one is in
tests/integration/qemu.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.monitored.emulator import COMMAND_LINE
from vmlab.hypervisors.qemu import display, faults, hotplug, memory, migration
from vmlab.hypervisors.qemu.command_line import PID_FILE
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qmp import QmpDeviceNotFound, QmpError, QmpLost, QmpTimeout
from vmlab.machine.errors import MachineCrashed, MigrationFailed, OperationFailed
from vmlab.machine.faults import DiskError

DISK = DiskFile("data", Path("data.raw"), "raw", 512, readonly=False, made=True)


def refused(command: str, message: str = "no") -> QmpError:
    return QmpError(message, command=command)


class Script:
    """An emulator that answers each command from a list: a value, or an error to raise."""

    machine = "vm"

    def __init__(self, answers: dict[str, list[Any]], *, running: bool = True) -> None:
        self.answers = answers
        self.running = running
        self.said: list[str] = []
        self.deleted: list[Any] = []
        self.qmp = SimpleNamespace(listen=self._listen)

    async def execute(self, command: str, arguments: Any = None) -> Any:
        self.said.append(command)
        answers = self.answers.get(command, [])
        answer = answers.pop(0) if answers else {}
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @contextmanager
    def _listen(self, *names: str, match: Callable[[Any], bool]) -> Any:
        async def wait(timeout: float) -> Any:
            answer = self.deleted.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        yield SimpleNamespace(wait=wait)

    async def crashed(self, operation: str, error: QmpLost) -> MachineCrashed:
        return MachineCrashed(f"{operation} failed: it is gone")


def options(*arguments: Any) -> dict[str, Any]:
    return {"id": "x"}


@pytest.fixture(autouse=True)
def _plain_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplug, "disk_options", options)
    monkeypatch.setattr(hotplug, "nic_options", options)
    monkeypatch.setattr(hotplug, "_RELEASE_S", 0.0)
    monkeypatch.setattr(migration, "_POLL_S", 0.0)


@pytest.mark.parametrize("running", [True, False])
def test_a_disk_that_is_refused_leaves_no_node(running: bool) -> None:
    script = Script({"device_add": [refused("device_add")]}, running=running)
    with pytest.raises(QmpError, match="device_add"):
        asyncio.run(hotplug.add_disk(script, None, None, DISK))
    assert script.said == ["blockdev-add", "device_add", *(["blockdev-del"] if running else [])]


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ({"blockdev-add": [asyncio.CancelledError()]}, asyncio.CancelledError),
        ({"blockdev-add": [QmpTimeout("no answer")]}, QmpTimeout),
        (
            {"blockdev-add": [refused("blockdev-add")], "blockdev-del": [refused("blockdev-del")]},
            QmpError,
        ),
    ],
    ids=["cancelled", "late", "refused"],
)
def test_a_saving_that_is_cut_short_leaves_no_node(
    tmp_path: Path, answers: dict[str, list[Any]], error: type[BaseException]
) -> None:
    # Whether the node came about is not known then.
    script = Script(answers)
    with pytest.raises(error):
        asyncio.run(memory.save_stream(script, tmp_path, whole=True))
    assert script.said == ["migrate-set-capabilities", "blockdev-add", "blockdev-del"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [refused("qom-set"), QmpTimeout("no answer")])
def test_a_fault_that_does_not_come_about_leaves_the_disk_as_it_was(error: Exception) -> None:
    script = Script({"qom-set": [error]})
    with pytest.raises(type(error)):
        asyncio.run(faults.fail_disk(script, DISK, "virtio", DiskError(disk="data")))
    assert script.said == ["blockdev-add", "qom-set", "qom-set", "blockdev-del"]


def test_a_picture_that_nobody_waits_for_any_more_is_removed_once_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = Script({})
    script.directory = tmp_path

    async def test() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slowly(command: str, arguments: dict[str, str]) -> None:
            begun.set()
            await go_on.wait()
            await asyncio.to_thread(Path(arguments["filename"]).write_bytes, b"late")

        monkeypatch.setattr(script, "execute", slowly)
        taking = asyncio.create_task(display.screenshot(script))
        await begun.wait()
        taking.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await taking

    asyncio.run(asyncio.wait_for(test(), 60))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("running", [True, False])
def test_a_nic_that_is_refused_leaves_no_backend(running: bool) -> None:
    script = Script({"device_add": [refused("device_add")]}, running=running)
    with pytest.raises(QmpError, match="device_add"):
        asyncio.run(hotplug.add_nic(script, None, None, "n", {}))
    assert script.said == ["netdev_add", "device_add", *(["netdev_del"] if running else [])]


@pytest.mark.parametrize("add", [hotplug.add_disk, hotplug.add_nic])
def test_an_adding_that_is_cancelled_is_left_to_be_taken_back(add: Any) -> None:
    # QEMU may be at it yet, so that the node or the backend is in use a moment later.
    script = Script({"device_add": [asyncio.CancelledError()]})
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(add(script, None, None, *((DISK,) if add is hotplug.add_disk else ("n", {}))))
    assert script.said[1:] == ["device_add"]


def test_a_disk_whose_adding_was_interrupted_is_taken_back_as_far_as_it_got() -> None:
    gone = QmpDeviceNotFound("not found", command="device_del")
    script = Script({"blockdev-del": [refused("blockdev-del", "Node is in use")]})
    script.deleted = ["gone"]
    asyncio.run(hotplug.take_back(script, DISK))
    assert script.said == ["device_del", "blockdev-del", "blockdev-del"]
    script = Script({"device_del": [gone], "blockdev-del": [refused("blockdev-del", "no node")]})
    asyncio.run(hotplug.take_back(script, DISK))
    assert script.said == ["device_del", "blockdev-del"]
    script = Script({}, running=False)
    asyncio.run(hotplug.take_back(script, DISK))
    asyncio.run(hotplug.take_back_nic(script, "n"))
    assert script.said == []
    script = Script({"device_del": [gone], "netdev_del": [refused("netdev_del")]})
    asyncio.run(hotplug.take_back_nic(script, "n"))
    assert script.said == ["device_del", "netdev_del"]


def test_a_taken_back_disk_whose_node_stays_in_use_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hotplug, "_HELD_S", 0.0)
    script = Script({"blockdev-del": [refused("blockdev-del", "is in use")]})
    script.deleted = ["gone"]
    with pytest.raises(QmpError, match="in use"):
        asyncio.run(hotplug.take_back(script, DISK))


@pytest.mark.parametrize("patience", [3600.0, 0.0])
@pytest.mark.parametrize("status", ["running", "paused"])
@pytest.mark.parametrize("ends", [True, False])
def test_a_node_in_use_is_dropped_as_soon_as_it_is_free(
    monkeypatch: pytest.MonkeyPatch, patience: float, status: str, ends: bool
) -> None:
    monkeypatch.setattr(hotplug, "_STUCK_S", patience)
    monkeypatch.setattr(hotplug, "_HELD_S", 3600.0)
    script = Script(
        {
            "blockdev-del": [refused("blockdev-del", "Node is in use") for _ in range(2)],
            "query-status": [{"status": status}] * 2,
            "cont": [refused("cont", "Resetting the Virtual Machine is required")] * ends,
        }
    )
    asyncio.run(hotplug.drop_node(script, "node"))
    between = []
    if patience == 0:
        # A guest in a loop keeps QEMU from letting go of the node.
        between = ["query-status", *(["stop", "cont"] if status == "running" else [])]
    assert script.said == ["blockdev-del", *between] * 2 + ["blockdev-del"]


def test_a_node_that_stays_in_use_or_is_refused_otherwise_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hotplug, "_HELD_S", 0.0)
    script = Script({"blockdev-del": [refused("blockdev-del", "is in use")]})
    with pytest.raises(QmpError, match="in use"):
        asyncio.run(hotplug.drop_node(script, "node"))
    script = Script({"blockdev-del": [refused("blockdev-del", "no such node")]})
    with pytest.raises(QmpError, match="no such node"):
        asyncio.run(hotplug.drop_node(script, "node"))


def test_a_device_is_asked_for_until_the_guest_lets_go() -> None:
    script = Script({"device_del": [{}, refused("device_del", "already in process of unplug")]})
    script.deleted = [QmpTimeout("late"), "gone"]
    asyncio.run(hotplug.remove_device(script, "d"))
    assert script.said == ["device_del", "device_del"]


def test_a_device_that_is_gone_needs_no_more() -> None:
    gone = QmpDeviceNotFound("not found", command="device_del")
    script = Script({"device_del": [gone]})
    asyncio.run(hotplug.remove_device(script, "d"))
    assert script.said == ["device_del"]


def test_a_removal_that_is_refused_or_loses_qemu_says_so() -> None:
    script = Script({"device_del": [refused("device_del", "not hot-pluggable")]})
    with pytest.raises(QmpError, match="not hot-pluggable"):
        asyncio.run(hotplug.remove_device(script, "d"))
    script = Script({})
    script.deleted = [QmpLost("the end")]
    with pytest.raises(MachineCrashed, match="device_del"):
        asyncio.run(hotplug.remove_device(script, "d"))


@pytest.mark.parametrize("running", [True, False])
def test_what_was_half_added_is_taken_back_where_qemu_lives(running: bool) -> None:
    missing = QmpDeviceNotFound("not found", command="device_del")
    script = Script({"device_del": [missing] * 2, "netdev_del": [refused("x")]}, running=running)
    asyncio.run(hotplug.take_back(script, DISK))
    asyncio.run(hotplug.take_back_nic(script, "n"))
    said = ["device_del", "blockdev-del", "device_del", "netdev_del"]
    assert script.said == (said if running else [])


def migrate(script: Script, **arguments: Any) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []

    async def nothing(*_: Any, **__: Any) -> None:
        """Capabilities are the memory module's."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migration, "set_capabilities", nothing)
        asyncio.run(
            migration.send(script, "unix:x", progress=lambda *pair: seen.append(pair), **arguments)
        )
    return seen


def test_a_migration_tells_how_far_it_is_and_stops_for_the_switchover_once() -> None:
    ram = {"transferred": 10, "remaining": 5}
    states = [{}, {"status": "active", "ram": ram}, *[{"status": "pre-switchover"}] * 2]
    script = Script({"query-migrate": [*states, {"status": "completed"}]})
    stops: list[int] = []

    async def at_switchover() -> None:
        stops.append(len(script.said))

    assert migrate(script, at_switchover=at_switchover) == [(10, 15)]
    assert len(stops) == script.said.count("migrate-continue") == 1


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_migration_that_fails_says_why(status: str) -> None:
    script = Script({"query-migrate": [{"status": status, "error-desc": "no room"}]})
    with pytest.raises(MigrationFailed, match="no room"):
        migrate(script)


def test_cancelling_waits_until_the_migration_has_ended() -> None:
    script = Script({"query-migrate": [{"status": "cancelling"}, {"status": "cancelled"}]})
    asyncio.run(migration.cancel(script))
    assert script.said == ["migrate_cancel", "query-migrate", "query-migrate"]
    script = Script({"migrate_cancel": [refused("migrate_cancel")]})
    asyncio.run(migration.cancel(script))
    assert script.said == ["migrate_cancel"]
    script = Script({}, running=False)
    asyncio.run(migration.cancel(script))
    assert script.said == []


def emulator(script: Script) -> Any:
    made = object.__new__(Emulator)
    made.__dict__.update(machine="vm", execute=script.execute)
    return made


def test_a_job_that_failed_says_why_and_one_that_is_left_is_dismissed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Emulator, "running", property(lambda self: True))
    jobs = [[{"id": "j", "status": "concluded", "error": "disk full"}]]
    script = Script({"query-jobs": list(jobs)})
    with pytest.raises(OperationFailed, match="disk full"):
        asyncio.run(emulator(script)._dismiss("j", "snapshot-save"))
    assert script.said == ["query-jobs", "job-dismiss"]
    running = [{"id": "j", "status": "running"}]
    script = Script({"query-jobs": [running, *jobs]})
    asyncio.run(emulator(script)._settle_job("j"))
    assert script.said == ["query-jobs", "query-jobs", "job-dismiss"]
    script = Script({"query-jobs": [[]]})
    asyncio.run(emulator(script)._settle_job("j"))
    assert script.said == ["query-jobs"]


@pytest.mark.parametrize(
    ("status", "file", "well"),
    [
        (0, True, True),
        (1, False, False),
        (-9, True, False),
        # Another process's child: QEMU takes its PID file away when it exits.
        (None, False, True),
        (None, True, False),
    ],
)
def test_only_an_exit_with_status_0_is_a_good_end(
    tmp_path: Path, status: int | None, file: bool, well: bool
) -> None:
    async def wait(timeout: float) -> int | None:
        return status

    (tmp_path / COMMAND_LINE).write_text("qemu-system-riscv64\n-pidfile qemu.pid\n")
    if file:
        (tmp_path / PID_FILE).write_text("7\n")
    made = emulator(Script({}))
    process = SimpleNamespace(wait=wait, returncode=status, running=False)
    made.__dict__.update(process=process, directory=tmp_path, ending=False)
    assert asyncio.run(made.ended_well()) is well
    process.running = True
    assert made.exited is (status == 0)


def test_of_a_qemu_that_had_no_pid_file_nothing_is_known(tmp_path: Path) -> None:
    assert not Emulator.exited_in(tmp_path)
    (tmp_path / COMMAND_LINE).write_text("qemu-system-riscv64\n-S\n")
    assert not Emulator.exited_in(tmp_path)


@pytest.mark.parametrize("ending", [True, False])
def test_a_process_that_still_runs_has_not_ended_well(ending: bool) -> None:
    limits: list[float] = []

    async def wait(timeout: float) -> int | None:
        limits.append(timeout)
        raise TimeoutError

    made = emulator(Script({}))
    made.__dict__.update(process=SimpleNamespace(wait=wait), ending=ending)
    assert asyncio.run(made.ended_well()) is False
    # One that hung up by itself ends soon, on whatever host; one that was left alone lives on.
    assert (limits[0] >= 30) is not ending
