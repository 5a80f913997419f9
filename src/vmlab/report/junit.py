"""The report as JUnit XML, for CI systems.

Valid against the schema that Jenkins' xUnit plugin checks (`junit-10.xsd`), which Maven Surefire's
and pytest's files satisfy too. JUnit knows less than vmlab does, so:

    error, fail     <error>, <failure>
    pending         <error type="pending">: what never ended must not look green
    skip, xfail     <skipped type="skip">, <skipped type="xfail">
    earlier attempts    <flakyError>, <flakyFailure> where a later one was ok, else <rerunError>,
                        <rerunFailure> (Surefire's names)

Machines, phases, faults, checks, metrics, messages and artifacts are told in <system-out>.
Characters that XML cannot hold are written out visibly (`escape.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree

from vmlab.report.escape import escape_xml
from vmlab.report.model import Attempt, Outcome, Run, Severity, Suite, Test, Totals, describe
from vmlab.report.parts import describe_fault, describe_machine, describe_phase

__all__ = ["render"]

_ERRORS = (Outcome.ERROR, Outcome.PENDING)


def render(run: Run) -> bytes:
    """`run` as a JUnit XML document in UTF-8."""
    seconds = run.duration_s
    if seconds is None:
        seconds = sum(suite.duration_s for suite in run.suites)
    root = ElementTree.Element(
        "testsuites",
        {"name": escape_xml(run.tool), **_counts(run.totals), "time": _seconds(seconds)},
    )
    for number, suite in enumerate(run.suites):
        root.append(_suite(run, suite, number))
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'.encode()


def _counts(totals: Totals) -> dict[str, str]:
    return {
        "tests": str(totals.tests),
        "failures": str(totals.failed),
        "errors": str(totals.errors + totals.pending),
    }


def _seconds(value: float | None) -> str:
    return f"{value or 0.0:.6f}"


def _child(parent: ElementTree.Element, tag: str, text: str = "", **attributes: str) -> None:
    shown = {name: escape_xml(value) for name, value in attributes.items()}
    ElementTree.SubElement(parent, tag, shown).text = escape_xml(text) or None


def _suite(run: Run, suite: Suite, number: int) -> ElementTree.Element:
    element = ElementTree.Element(
        "testsuite",
        {
            "name": escape_xml(suite.name),
            "id": str(number),
            **_counts(suite.totals),
            "skipped": str(suite.totals.skipped + suite.totals.xfailed),
            "time": _seconds(suite.duration_s),
            "timestamp": (suite.started or run.started).isoformat(timespec="milliseconds"),
        },
    )
    if "hostname" in run.environment:
        element.set("hostname", escape_xml(str(run.environment["hostname"])))
    properties = ElementTree.SubElement(element, "properties")
    for name, value in _facts(run, suite):
        _child(properties, "property", name=name, value=value)
    for test in suite.tests:
        element.append(_case(test))
    return element


def _facts(run: Run, suite: Suite) -> Iterator[tuple[str, str]]:
    yield "run", run.id
    yield "tool", f"{run.tool} {run.version}"
    if run.seed is not None:
        yield "seed", str(run.seed)
    if run.command:
        yield "command", run.command_line
    for name, fact in run.environment.items():
        yield f"environment.{name}", str(fact)
    for name, label in {**run.labels, **suite.labels}.items():
        yield f"label.{name}", label


def _case(test: Test) -> ElementTree.Element:
    element = ElementTree.Element(
        "testcase",
        name=escape_xml(test.title),
        classname=escape_xml(test.suite),
        time=_seconds(test.duration_s),
    )
    outcome, reason = test.outcome, test.reason
    details = _details(test.last) if test.last else ""
    if outcome is Outcome.FAIL:
        _child(element, "failure", details, message=reason, type="fail")
    elif outcome in _ERRORS:
        _child(element, "error", details, message=reason, type=outcome.value)
    elif outcome is not Outcome.PASS:
        _child(element, "skipped", message=reason, type=outcome.value)
    for attempt in test.attempts[:-1]:
        _earlier(element, attempt, later_ok=outcome.ok)
    if test.last is not None:
        if told := "".join(f"{line}\n" for line in _told(test)):
            _child(element, "system-out", told)
        for output in test.last.output:
            tag = "system-err" if output.stream == "stderr" else "system-out"
            _child(element, tag, output.text)
    return element


def _earlier(case: ElementTree.Element, attempt: Attempt, *, later_ok: bool) -> None:
    if attempt.outcome.ok:
        return
    kind = "Error" if attempt.outcome in _ERRORS else "Failure"
    element = ElementTree.SubElement(
        case,
        ("flaky" if later_ok else "rerun") + kind,
        message=escape_xml(attempt.reason),
        type=attempt.outcome.value,
    )
    _child(element, "stackTrace", _details(attempt))
    for tag, streams in (
        ("system-out", [output for output in attempt.output if output.stream != "stderr"]),
        ("system-err", [output for output in attempt.output if output.stream == "stderr"]),
    ):
        if streams:
            _child(element, tag, "".join(output.text for output in streams))


def _details(attempt: Attempt) -> str:
    """What went wrong, at length: messages about errors and the checks that are not ok."""
    pieces = [
        f"{message.text}\n{message.details}".rstrip("\n")
        for message in attempt.messages
        if message.severity is Severity.ERROR
    ]
    pieces += [describe(check) for check in attempt.checks if not check.outcome.ok]
    return "\n".join(pieces)


def _told(test: Test) -> Iterator[str]:
    """What JUnit has no place for, a line each."""
    assert test.last is not None
    if test.hypervisor is not None:
        yield f"hypervisor: {test.hypervisor}"
    for name, label in test.labels.items():
        yield f"label {name}: {label}"
    for machine in test.machines:
        yield f"machine {describe_machine(machine)}"
    for phase in test.phases:
        yield f"phase {describe_phase(phase)}"
    for fault in test.faults:
        yield f"fault {describe_fault(fault)}"
    for check in test.checks:
        yield f"check {check.name}: {check.outcome.value}"
    for metric in test.metrics:
        yield f"metric {metric.name}: {metric.value:g} {metric.unit}".rstrip()
    for message in test.messages:
        if message.severity is not Severity.ERROR:
            source = f" ({message.source})" if message.source else ""
            yield f"{message.severity.value}{source}: {message.text}"
    for artifact in test.artifacts:
        yield f"artifact {artifact.name}: {artifact.path}"
