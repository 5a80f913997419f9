"""Any run there can be: it survives JSON, satisfies both schemas, and prints safely."""

from __future__ import annotations

import json
from datetime import UTC
from typing import Any

import jsonschema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from junitparser import JUnitXml
from lxml import etree

from vmlab.report import (
    Artifact,
    Attempt,
    Check,
    Direction,
    FaultRecord,
    MachineRecord,
    Mark,
    Message,
    Metric,
    Outcome,
    Output,
    Phase,
    Run,
    Severity,
    Suite,
    Test,
    ctrf,
    html,
    junit,
    parse,
    results,
    schema,
    text,
)
from vmlab.report.json_report import render

# Everything that a guest can print: controls, surrogates (undecodable bytes), noncharacters.
wild = st.text(st.characters(exclude_categories=[]), max_size=12)
names = wild.filter(bool)
seconds = st.floats(0, 1e6)
moments = st.datetimes(timezones=st.timezones() | st.just(UTC))
labels = st.dictionaries(wild, wild, max_size=2)
checks = st.builds(
    Check,
    name=names,
    outcome=st.sampled_from(Outcome),
    message=wild,
    expected=st.none() | wild,
    actual=st.none() | wild,
)
messages = st.builds(
    Message,
    text=wild,
    severity=st.sampled_from(Severity),
    details=wild,
    source=st.none() | wild,
)
metrics = st.builds(
    Metric,
    name=names,
    value=st.floats(allow_nan=False, allow_infinity=False),
    unit=wild,
    direction=st.sampled_from(Direction),
    at_s=st.none() | seconds,
)
artifacts = st.builds(
    Artifact,
    name=names,
    path=st.from_regex(r"\A[a-z0-9_ -]{1,5}(/[a-z0-9_ -]{1,5}){0,2}\Z"),
    media_type=st.sampled_from(["text/plain", "image/png"]),
    sha256=st.from_regex(r"\A[0-9a-f]{64}\Z"),
    size=st.integers(0, 2**63),
)
offsets = st.floats(-1e6, 1e6)
data = st.dictionaries(
    wild,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | wild | st.binary(max_size=4),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(wild, inner, max_size=2),
        max_leaves=4,
    ),
    max_size=2,
)
phases = st.builds(
    Phase,
    name=names,
    outcome=st.sampled_from(Outcome),
    started_s=offsets,
    duration_s=st.none() | seconds,
    message=wild,
)
marks = st.builds(Mark, at_s=offsets, kind=names, text=wild, duration_s=st.none() | seconds)
faults = st.builds(
    FaultRecord,
    id=names,
    kind=names,
    machine=names,
    at_s=offsets,
    cleared_s=st.none() | offsets,
    parameters=data,
    refused=wild,
)
outputs = st.builds(Output, stream=names, text=wild, omitted=st.integers(0, 2**40))


def _tuples(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(strategy, max_size=2).map(tuple)


machines = st.builds(
    MachineRecord,
    name=names,
    hypervisor=names,
    accelerator=wild,
    architecture=wild,
    image=st.none() | wild,
    spec=data,
    timeline=_tuples(marks),
)


@st.composite
def attempts(draw: st.DrawFn) -> Attempt:
    outcome = draw(st.sampled_from(Outcome))
    ended = outcome is not Outcome.PENDING
    good = checks.filter(lambda check: check.outcome.ok)
    return Attempt(
        outcome=outcome,
        started=draw(st.none() | moments),
        finished=draw(st.none() | moments) if ended else None,
        duration_s=draw(st.none() | seconds) if ended else None,
        worker=draw(st.none() | wild),
        skip_reason=draw(names) if outcome is Outcome.SKIP else None,
        checks=draw(_tuples(good if outcome is Outcome.PASS else checks)),
        messages=draw(_tuples(messages)),
        metrics=draw(_tuples(metrics)),
        artifacts=draw(_tuples(artifacts)),
        output=draw(_tuples(outputs)),
        phases=draw(_tuples(phases)),
        machines=tuple(
            draw(st.lists(machines, max_size=2, unique_by=lambda machine: machine.name))
        ),
        faults=draw(_tuples(faults)),
    )


@st.composite
def suites(draw: st.DrawFn, name: str) -> Suite:
    name = Suite(name=name).name
    tests = draw(
        st.lists(
            st.builds(
                Test,
                suite=st.just(name),
                name=names,
                hypervisor=st.none() | names,
                labels=labels,
                attempts=_tuples(attempts()),
            ),
            max_size=3,
            unique_by=lambda test: (test.name, test.hypervisor),
        )
    )
    return Suite(name=name, labels=draw(labels), tests=tuple(tests))


@st.composite
def runs(draw: st.DrawFn) -> Run:
    finished = draw(st.none() | moments)
    unique = draw(st.lists(names, max_size=2, unique_by=lambda name: Suite(name=name).name))
    return Run(
        id=draw(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z")),
        tool=draw(names),
        version=draw(names),
        started=draw(moments),
        finished=finished,
        duration_s=None if finished is None else draw(st.none() | seconds),
        seed=draw(st.none() | st.integers()),
        command=draw(_tuples(wild)),
        environment=draw(
            st.dictionaries(
                wild,
                wild
                | st.integers()
                | st.booleans()
                | st.none()
                | st.floats(allow_nan=False, allow_infinity=False),
                max_size=2,
            )
        ),
        labels=draw(labels),
        messages=draw(_tuples(messages)),
        artifacts=draw(_tuples(artifacts)),
        suites=tuple(draw(suites(name)) for name in unique),
    )


thorough = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@thorough
@given(runs())
def test_json_round_trip(run: Run) -> None:
    again = parse(render(run))
    assert again == run
    assert render(again) == render(run)
    assert again.totals.tests == sum(len(suite.tests) for suite in run.suites)


@thorough
@given(runs())
def test_every_run_satisfies_the_published_schema(run: Run) -> None:
    jsonschema.Draft202012Validator(schema()).validate(json.loads(render(run)))


@thorough
@given(runs())
def test_every_run_is_valid_junit_with_the_same_sums(
    junit_schema: etree.XMLSchema, run: Run
) -> None:
    document = junit.render(run)
    junit_schema.assertValid(etree.fromstring(document))
    seen = JUnitXml.fromstring(document)
    totals = run.totals
    assert (seen.tests, seen.failures, seen.errors) == (
        totals.tests,
        totals.failed,
        totals.errors + totals.pending,
    )
    seen.update_statistics()
    assert (seen.tests, seen.failures, seen.errors, seen.skipped) == (
        totals.tests,
        totals.failed,
        totals.errors + totals.pending,
        totals.skipped + totals.xfailed,
    )


@thorough
@given(runs())
def test_no_run_can_command_a_terminal(run: Run) -> None:
    shown = text.render(run).decode()
    controls = {c for c in shown if ord(c) < 32 or 127 <= ord(c) < 160}
    assert controls <= {"\n", "\t"}


@thorough
@given(runs())
def test_every_run_is_valid_ctrf_with_the_same_sums(
    ctrf_schema: jsonschema.protocols.Validator, run: Run
) -> None:
    document = json.loads(ctrf.render(run))
    ctrf_schema.validate(document)
    summary, totals = document["results"]["summary"], run.totals
    assert [test["rawStatus"] for test in document["results"]["tests"]] == [
        test.outcome for test in run.tests()
    ]
    assert summary["tests"] == totals.tests == len(document["results"]["tests"])
    assert summary["failed"] == totals.failed + totals.errors


@thorough
@given(runs())
def test_the_sums_of_every_run_agree(run: Run) -> None:
    document = json.loads(results.render(run))
    counted = document["totals"]
    assert counted.pop("tests") == sum(counted.values()) == len(list(run.tests()))
    ran = counted["passed"] + counted["failed"] + counted["errors"] + counted["pending"]
    rate = document["success_rate"]
    assert (rate is None) == (ran == 0)
    assert (rate == 100) == (ran > 0 and counted["passed"] == ran)


@thorough
@given(runs())
def test_every_run_has_a_page_that_holds_nothing_but_the_pages_own_markup(run: Run) -> None:
    page = etree.HTML(html.render(run).decode())
    assert len(page.findall(".//script")) == len(page.findall(".//style")) == 1
    titles = page.xpath("//*[contains(@class, 'title')][parent::summary]")
    assert len(titles) == run.totals.tests
    shown = "".join(page.itertext())
    controls = {c for c in shown if ord(c) < 32 or 127 <= ord(c) < 160}
    assert controls <= {"\n", "\t"}
