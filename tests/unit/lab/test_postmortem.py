"""What a failed test left is found in its report, or what to do where it left nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmlab.lab.evidence import MEMORY_SNAPSHOT, SUMMARY
from vmlab.lab.postmortem import find_remains, with_remains
from vmlab.machine.errors import InvalidSpec, ResourceNotFound, VmlabError
from vmlab.report import Recorder


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """A run of which some tests left the memory of their machines."""
    directory = tmp_path / "run"
    with Recorder.create(directory, tool="vmlab test") as recorder:
        for name, machines, said in (
            ("test_panics", (), "memory: none, it is failed, and its memory is gone\n"),
            ("test_oops", ("vm",), ""),
            ("test_oops_of_two", ("web", "db"), ""),
        ):
            attempt = recorder.start("test_it.py", name, hypervisor="qemu")
            for machine in machines:
                attempt.machine(machine, hypervisor="qemu")
                attempt.attach(f"{machine}-{MEMORY_SNAPSHOT}", b"packed")
            if said:
                attempt.attach(f"vm-{SUMMARY}", said)
            attempt.finish("fail", reason="it died")
        recorder.start("test_it.py", "test_passes", hypervisor="qemu").finish("pass")
    return directory


def test_the_machine_of_a_test_is_found_by_a_part_of_its_name(result: Path) -> None:
    remains = find_remains(result, "two", "db")
    assert (remains.machine, remains.hypervisor) == ("db", "qemu")
    assert remains.test == "test_it.py::test_oops_of_two"
    assert remains.path.read_bytes() == b"packed"


def test_a_whole_name_comes_before_parts_of_others(result: Path) -> None:
    assert find_remains(result, "test_oops").machine == "vm"
    assert find_remains(result, "test_it.py::test_oops").machine == "vm"
    assert find_remains(result / "report.json", "test_oops").path.exists()


def test_several_that_fit_are_listed(result: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"test_oops \(vm\), .*_of_two \(web\), .*\(db\)"):
        find_remains(result)
    with pytest.raises(InvalidSpec, match="web"):
        find_remains(result, "of_two")


def test_where_nothing_was_left_it_is_said_why_and_what_to_do(result: Path) -> None:
    with pytest.raises(ResourceNotFound, match="its memory is gone") as caught:
        find_remains(result, "panics")
    assert "--vm-sit" in (caught.value.hint or "")
    with pytest.raises(ResourceNotFound, match="nothing was kept of those that passed"):
        find_remains(result, "passes")
    with pytest.raises(ResourceNotFound, match="no test 'meteor'"):
        find_remains(result, "meteor")
    with pytest.raises(VmlabError, match="cannot read a report"):
        find_remains(result / "nowhere")


def test_memory_that_is_gone_meanwhile_is_told(result: Path) -> None:
    remains = find_remains(result, "test_oops")
    remains.path.unlink()

    async def body(session: object, interrupts: object) -> None:
        raise AssertionError("there is none")

    with pytest.raises(ResourceNotFound, match=r"not at .* any more"):
        with_remains(remains, body)
