"""JUnit XML: what each outcome becomes, and that CI systems can read it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped
from junitparser.xunit2 import JUnitXml as JenkinsXml
from lxml import etree

from vmlab.report import Run, junit


def _case(run: Run, name: str) -> etree._Element:
    found = etree.fromstring(junit.render(run)).xpath(f"//testcase[@name='{name}']")
    assert len(found) == 1
    return found[0]


def _tags(case: etree._Element) -> list[str]:
    return [child.tag for child in case]


def test_it_is_valid_and_its_counts_are_true(run: Run, junit_schema: etree.XMLSchema) -> None:
    root = etree.fromstring(junit.render(run))
    junit_schema.assertValid(root)
    assert dict(root.attrib) == {
        "name": "vmlab conformance",
        "tests": "8",
        "failures": "2",
        "errors": "2",
        "time": "7.000000",
    }
    first = root[0]
    assert first.get("timestamp") == "2026-11-21T09:30:00.000+00:00"
    assert (first.get("hostname"), first.get("skipped"), root[1].get("skipped")) == (
        "lab",
        "0",
        "2",
    )


def test_junitparser_reads_every_outcome(run: Run) -> None:
    results = {
        case.name: [type(result) for result in case.result]
        for suite in JUnitXml.fromstring(junit.render(run))
        for case in suite
    }
    assert results == {
        "test_boot[qemu]": [],
        "test_pause": [Failure],
        "test_fork": [Error],
        "test_never_begun": [Error],
        "test_gpu": [Skipped],
        "test_known_bug": [Skipped],
        "test_flaky": [],
        "test_broken_twice": [Failure],
    }


def test_junitparser_reads_earlier_attempts_in_jenkins_dialect(run: Run) -> None:
    cases = {
        case.name: case for suite in JenkinsXml.fromstring(junit.render(run)) for case in suite
    }
    flaky = cases["test_flaky"]
    assert [r.system_out for r in flaky.flaky_failures()] == ["first out"]
    assert [r.system_err for r in flaky.flaky_failures()] == ["first err"]
    assert [r.message for r in flaky.flaky_errors()] == ["begun, never finished"]
    assert len(cases["test_broken_twice"].rerun_errors()) == 1
    assert cases["test_broken_twice"].rerun_failures() == []


def test_what_never_ended_is_not_green(run: Run) -> None:
    (error,) = _case(run, "test_never_begun")
    assert (error.tag, error.get("type"), error.get("message")) == (
        "error",
        "pending",
        "planned, never begun",
    )


def test_an_expected_failure_is_a_skip_that_says_so(run: Run) -> None:
    skipped = _case(run, "test_known_bug")[0]
    assert (skipped.tag, skipped.get("type")) == ("skipped", "xfail")


def test_illegal_characters_are_visible(run: Run) -> None:
    (error,) = _case(run, "test_fork")[:1]
    assert error.get("message") == r"the machine died: \x1b[31mkernel panic\x1b[0m \xff"
    assert r"\x00<&>]]>" in error.text


def test_a_failure_tells_what_was_expected_and_found(run: Run) -> None:
    failure = _case(run, "test_pause")[0]
    assert failure.get("message") == "check 'state': fail (expected paused, got running)"


def test_what_junit_has_no_place_for_is_told_in_system_out(run: Run) -> None:
    case = _case(run, "test_boot[qemu]")
    assert _tags(case) == ["system-out", "system-out", "system-err"]
    assert case[0].text.splitlines() == [
        "hypervisor: qemu",
        "label image: debian",
        "check exists: pass",
        "metric boot_s: 1.25 s",
        "metric exits: 12",
        "info (image): warm",
        "info: quiet",
        "artifact console.log: artifacts/console.log",
    ]
    assert (case[1].text, case[2].text) == ("out\n", r"err\x0d")


def test_machines_phases_and_faults_are_told(
    run_with_machines: Run, junit_schema: etree.XMLSchema
) -> None:
    junit_schema.assertValid(etree.fromstring(junit.render(run_with_machines)))
    told = _case(run_with_machines, "test_panic[qemu]").find("system-out").text.splitlines()
    assert told == [
        "hypervisor: qemu",
        "machine web: qemu, tcg, x86_64, debian-12",
        "phase boot: pass, 1.25 s",
        "phase build: fail, 1.00 s, exit status 2",
        "fault slow: disk-slow on web at 1.50 s, cleared at 1.75 s",
        "fault cut: power-cut on web refused: it cannot",
        "fault lag: net-delay on web at 2.00 s",
    ]


def test_the_suite_says_how_to_run_it_again(run: Run) -> None:
    root = etree.fromstring(junit.render(run))
    facts = {p.get("name"): p.get("value") for p in root[1].iter("property")}
    assert facts["seed"] == str(2**63)
    assert facts["command"] == run.command_line
    assert facts["environment.kvm"] == "False"
    assert (facts["label.branch"], facts["label.owner"]) == ("main", "me")


def test_an_empty_unfinished_run_is_valid(run: Run, junit_schema: etree.XMLSchema) -> None:
    bare = Run(id="r", tool="t", version="1", started=run.started)
    root = etree.fromstring(junit.render(bare))
    junit_schema.assertValid(root)
    assert root.get("time") == "0.000000"
    with_suites = run.model_copy(update={"finished": None, "duration_s": None, "seed": None})
    assert etree.fromstring(junit.render(with_suites)).get("time") == "7.375000"


@pytest.mark.parametrize(
    "document",
    [
        "<testsuites><testcase name='x'/></testsuites>",
        "<testsuites><testsuite name='x' failures='0' errors='0'/></testsuites>",
        "<testsuite name='x' tests='1' failures='0' errors='0'><testcase/></testsuite>",
        "<testsuite name='x' tests='1' failures='0' errors='0' time='soon'/>",
        "<testsuite name='x' tests='1' failures='0' errors='0'>"
        "<testcase name='x'><flakyError/></testcase></testsuite>",
    ],
)
def test_the_schema_refuses_what_is_wrong(document: str, junit_schema: etree.XMLSchema) -> None:
    assert not junit_schema.validate(etree.fromstring(document))


def test_the_schema_accepts_what_pytest_writes(
    tmp_path: Path, junit_schema: etree.XMLSchema
) -> None:
    (tmp_path / "test_it.py").write_text("def test_ok(): pass\ndef test_no(): assert 0\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=x.xml"]
    subprocess.run(
        [*command, "--rootdir=."], cwd=tmp_path, check=False, capture_output=True, timeout=280
    )
    junit_schema.assertValid(etree.parse(tmp_path / "x.xml"))
