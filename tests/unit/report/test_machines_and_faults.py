"""Phases, machines with their timelines, and faults: recorded at once, read back after a death."""

from __future__ import annotations

import enum
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from vmlab.machine.errors import VmlabError
from vmlab.report import (
    Attempt,
    AttemptRecorder,
    MachineRecord,
    Outcome,
    Recorder,
    Test,
    read_run,
)
from vmlab.report.journal import read_journals


def _seen(recorder: Recorder) -> Test:
    return recorder.snapshot().test("s", "t")


class Kind(enum.Enum):
    NVME = "nvme"


def test_phases_say_when_they_began_and_how_they_ended(
    recorder: Recorder, attempt: AttemptRecorder, turnable: Any
) -> None:
    turnable.pass_(3)
    attempt.phase("boot", Outcome.PASS, duration_s=2.5)
    attempt.phase("build", "fail", duration_s=1, started_s=-0.5, message=b"make: \xff")
    attempt.phase("tidy", "skip")
    assert [
        (p.name, p.outcome, p.started_s, p.duration_s, p.message) for p in _seen(recorder).phases
    ] == [
        ("boot", "pass", 0.5, 2.5, ""),
        ("build", "fail", -0.5, 1, "make: \\xff"),
        ("tidy", "skip", 3, None, ""),
    ]
    assert attempt.elapsed_s == 3
    assert attempt.finish() is Outcome.PASS, "checks decide, phases tell"


def test_a_phase_that_never_ended_is_pending(
    recorder: Recorder, attempt: AttemptRecorder, turnable: Any
) -> None:
    attempt.phase("boot", "pending")
    assert [phase.outcome for phase in _seen(recorder).phases] == ["pending"]
    turnable.pass_(2)
    attempt.phase("boot", "pass", duration_s=2)
    attempt.phase("boot", "pass", duration_s=1)
    attempt.phase("run", "pending")
    assert [(p.name, p.outcome, p.duration_s) for p in _seen(recorder).phases] == [
        ("boot", "pass", 2),
        ("boot", "pass", 1),
        ("run", "pending", None),
    ]


def test_a_machine_and_its_timeline_in_order_of_time(
    recorder: Recorder, attempt: AttemptRecorder, turnable: Any
) -> None:
    attempt.machine("a", hypervisor="qemu")
    attempt.machine("b", hypervisor="embedded", accelerator="jit")
    attempt.machine(
        "a",
        hypervisor="qemu",
        accelerator="tcg",
        architecture="x86_64",
        image="tiny",
        spec={
            "memory": 2**30,
            "disks": ({"bus": Kind.NVME, "path": Path("/d")},),
            "bad": float("nan"),
            "raw": b"\xff",
            "none": None,
            "live": True,
            "half": 0.5,
        },
    )
    turnable.pass_(4)
    attempt.mark("a", "boot", duration_s=3)
    attempt.mark("a", "template", "forked", at_s=-7.5)
    attempt.mark("a", "panic", b"not syncing \xff")
    attempt.mark("b", "off")
    first, second = _seen(recorder).machines
    assert (first.name, first.hypervisor, first.accelerator, first.architecture, first.image) == (
        "a",
        "qemu",
        "tcg",
        "x86_64",
        "tiny",
    )
    assert first.spec == {
        "memory": 2**30,
        "disks": [{"bus": "nvme", "path": "/d"}],
        "bad": "nan",
        "raw": "\\xff",
        "none": None,
        "live": True,
        "half": 0.5,
    }
    assert [(m.at_s, m.kind, m.text, m.duration_s) for m in first.timeline] == [
        (-7.5, "template", "forked", None),
        (1, "boot", "", 3),
        (4, "panic", "not syncing \\xff", None),
    ]
    assert (second.name, second.accelerator, [m.kind for m in second.timeline]) == (
        "b",
        "jit",
        ["off"],
    )


def test_saying_a_machine_again_takes_nothing_back(
    recorder: Recorder, attempt: AttemptRecorder
) -> None:
    attempt.machine("a", hypervisor="qemu", image="tiny", spec={"cpus": 1})
    attempt.mark("a", "boot")
    attempt.machine("a", hypervisor="embedded")
    (machine,) = _seen(recorder).machines
    assert (machine.hypervisor, machine.image, machine.spec) == ("embedded", "tiny", {"cpus": 1})
    assert [mark.kind for mark in machine.timeline] == ["boot"]


def test_a_mark_needs_its_machine(attempt: AttemptRecorder) -> None:
    with pytest.raises(VmlabError, match="no machine 'a' that 'boot' could") as refused:
        attempt.mark("a", "boot")
    assert "recorded are: none yet" in str(refused.value.hint)
    attempt.machine("b", hypervisor="qemu")
    with pytest.raises(VmlabError) as refused:
        attempt.mark("a", "boot")
    assert "'b'" in str(refused.value.hint)


def test_faults_are_injected_cleared_and_refused(
    recorder: Recorder, attempt: AttemptRecorder, turnable: Any
) -> None:
    turnable.pass_(1)
    attempt.fault("slow", "disk-slow", "a", parameters={"delay_s": 0.5, "disks": ("root",)})
    attempt.fault("slow", "disk-slow", "b", at_s=0.25)
    attempt.fault("cut", "power-cut", "a", refused="the hypervisor cannot")
    turnable.pass_(1)
    attempt.fault_cleared("slow", "a")
    attempt.fault("slow", "disk-slow", "a")
    attempt.fault_cleared("slow", "a", at_s=9)
    assert [
        (f.id, f.kind, f.machine, f.at_s, f.cleared_s, f.parameters, f.refused)
        for f in _seen(recorder).faults
    ] == [
        ("slow", "disk-slow", "a", 1, 2, {"delay_s": 0.5, "disks": ["root"]}, ""),
        ("slow", "disk-slow", "b", 0.25, None, {}, ""),
        ("cut", "power-cut", "a", 1, None, {}, "the hypervisor cannot"),
        ("slow", "disk-slow", "a", 2, 9, {}, ""),
    ]


def test_a_fault_ends_once_and_only_where_it_began(attempt: AttemptRecorder) -> None:
    attempt.fault("slow", "disk-slow", "a")
    attempt.fault("cut", "power-cut", "a", refused="cannot")
    for id_, machine in [("slow", "b"), ("fast", "a"), ("cut", "a")]:
        with pytest.raises(VmlabError, match="it is not in effect"):
            attempt.fault_cleared(id_, machine)
    with pytest.raises(VmlabError, match="cleared_s = nan"):
        attempt.fault_cleared("slow", "a", at_s=float("nan"))
    attempt.fault_cleared("slow", "a")
    with pytest.raises(VmlabError, match="it is not in effect"):
        attempt.fault_cleared("slow", "a")


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (lambda a: a.phase("", "pass", duration_s=1), "phase cannot be recorded: name = ''"),
        (lambda a: a.phase("p", "green", duration_s=1), "outcome = 'green'"),
        (lambda a: a.phase("p", "pass", duration_s=-1), "duration_s = -1"),
        (lambda a: a.machine("m", hypervisor=""), "machine cannot be recorded: hypervisor = ''"),
        (lambda a: a.machine("m", hypervisor="q", spec=7), "spec = 7"),
        (lambda a: a.mark("m", "boot", at_s=float("inf")), "at_s = inf"),
        (lambda a: a.fault("", "k", "m"), "fault cannot be recorded: id = ''"),
    ],
)
def test_what_cannot_stand_in_a_report_is_refused(
    attempt: AttemptRecorder, record: Any, problem: str
) -> None:
    with pytest.raises(VmlabError) as refused:
        record(attempt)
    assert problem in str(refused.value)


def test_nothing_is_told_of_an_attempt_that_ended(attempt: AttemptRecorder) -> None:
    attempt.machine("a", hypervisor="qemu")
    attempt.fault("f", "disk-slow", "a")
    attempt.finish()
    for record in (
        lambda: attempt.phase("p", "pass", duration_s=1),
        lambda: attempt.machine("b", hypervisor="qemu"),
        lambda: attempt.mark("a", "boot"),
        lambda: attempt.fault("g", "disk-slow", "a"),
        lambda: attempt.fault_cleared("f", "a"),
    ):
        with pytest.raises(VmlabError, match="has ended already"):
            record()


def test_two_machines_of_one_name_contradict_each_other() -> None:
    machine = MachineRecord(name="a", hypervisor="qemu")
    with pytest.raises(ValueError, match="more than one machine named 'a'"):
        Attempt(outcome=Outcome.PASS, machines=(machine, machine))


def test_it_is_in_the_journal_at_once_and_in_the_report(
    recorder: Recorder, attempt: AttemptRecorder
) -> None:
    attempt.phase("boot", "pass", duration_s=0)
    attempt.machine("a", hypervisor="qemu")
    attempt.mark("a", "boot")
    attempt.fault("f", "disk-slow", "a")
    attempt.fault_cleared("f", "a")
    killed = read_journals(recorder.directory).test("s", "t")
    assert killed.outcome is Outcome.PENDING
    attempt.finish()
    run = recorder.close()
    assert run is not None and run == read_run(recorder.directory)
    told = run.test("s", "t")
    assert (told.phases, told.machines, told.faults) == (
        killed.phases,
        killed.machines,
        killed.faults,
    )
    assert told.faults[0].cleared_s is not None


def test_any_thread_may_tell(recorder: Recorder, attempt: AttemptRecorder) -> None:
    def tell(number: int) -> None:
        name = f"vm{number}"
        attempt.machine(name, hypervisor="simulated")
        for turn in range(20):
            attempt.mark(name, "tick", str(turn), at_s=turn)
            attempt.fault(f"f{turn}", "pause", name)
            attempt.fault_cleared(f"f{turn}", name)

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    test = _seen(recorder)
    assert sorted(machine.name for machine in test.machines) == [f"vm{n}" for n in range(6)]
    for machine in test.machines:
        assert [mark.text for mark in machine.timeline] == [str(turn) for turn in range(20)]
    assert len(test.faults) == 120
    assert all(fault.cleared_s is not None for fault in test.faults)


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        ({"event": "mark", "machine": "b", "mark": {"at_s": 1, "kind": "boot"}}, "'b', which is"),
        ({"event": "mark", "machine": "a", "mark": {"kind": "boot"}}, "for Mark"),
        ({"event": "cleared", "fault": "f", "machine": "b", "at_s": 1}, "did not begin"),
        ({"event": "cleared", "fault": "r", "machine": "a", "at_s": 1}, "did not begin"),
        ({"event": "cleared", "fault": "f", "machine": "a", "at_s": "soon"}, "for FaultRecord"),
        ({"event": "phase", "phase": {"name": "p"}}, "for Phase"),
        ({"event": "machine", "machine": {"name": "z"}}, "for MachineRecord"),
    ],
)
def test_a_damaged_line_is_left_out_and_reported(
    recorder: Recorder, attempt: AttemptRecorder, event: dict[str, Any], problem: str
) -> None:
    attempt.machine("a", hypervisor="qemu")
    attempt.fault("f", "disk-slow", "a")
    attempt.fault("r", "disk-slow", "a", refused="cannot")
    before = recorder.snapshot()
    journal = recorder.directory / "journal" / "main.jsonl"
    with journal.open("a") as lines:
        lines.write(json.dumps({"n": 1, **event}) + "\n")
    after = recorder.snapshot()
    assert after.suites == before.suites
    (message,) = after.messages
    assert "is damaged" in message.text
    assert problem in message.details
