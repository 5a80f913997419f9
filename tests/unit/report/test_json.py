"""The JSON document: its schema, its versions, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

import vmlab.report
from vmlab.machine.errors import VmlabError
from vmlab.report import Recorder, Run, parse, read_run, schema
from vmlab.report.json_report import render, render_schema

CHECKED_IN = Path(vmlab.report.__file__).parent / "schema" / "report-1.json"


def test_the_checked_in_schema_is_what_the_model_generates() -> None:
    assert CHECKED_IN.read_bytes() == render_schema(), (
        "write it again: python -c 'import sys; from vmlab.report.json_report import "
        f"render_schema; sys.stdout.buffer.write(render_schema())' > {CHECKED_IN.name}"
    )


def test_the_schema_is_one_and_a_report_is_valid_under_it(run: Run) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(json.loads(render(run)), schema())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["schema"], "vmlab.report/2"),
        (["outcome"], "passed"),
        (["totals", "pass"], "many"),
        (["suites", 0, "tests", 0, "attempts", 0, "duration_s"], -1),
        (["suites", 0, "tests", 0, "attempts", 0, "artifacts", 0, "sha256"], "abc"),
        (["suites", 0, "tests", 0, "name"], ""),
        (["id"], "no spaces allowed"),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(
    run: Run, path: list[str | int], value: object
) -> None:
    document = json.loads(render(run))
    holder = document
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema())
    with pytest.raises(VmlabError):
        parse(json.dumps(document))


def test_a_later_field_is_allowed_by_the_schema_and_ignored_by_the_reader(run: Run) -> None:
    document = json.loads(render(run))
    document["farm"] = {"hosts": 3}
    document["suites"][0]["tests"][0]["attempts"][0]["weather"] = []
    document["suites"][0]["tests"][0]["attempts"][0]["checks"][0]["severity"] = 1
    jsonschema.validate(document, schema())
    assert parse(json.dumps(document)) == run


def test_an_error_names_field_value_and_what_is_right(run: Run) -> None:
    document = json.loads(render(run))
    document["suites"][0]["tests"][1]["attempts"][0]["outcome"] = "green"
    with pytest.raises(VmlabError) as refused:
        parse(json.dumps(document), source="r.json")
    message = str(refused.value)
    assert "r.json" in message
    assert "suites.0.tests.1.attempts.0.outcome" in message
    assert "'green'" in message
    assert "'xfail'" in message


def test_of_many_errors_the_first_five_are_told(run: Run) -> None:
    document = json.loads(render(run))
    for metric in range(8):
        document["messages"].append({"text": metric})
    with pytest.raises(VmlabError, match="and 3 more"):
        parse(json.dumps(document))


def test_other_documents_are_refused_by_name(run: Run) -> None:
    for data, problem in [
        (b"{", "is not JSON"),
        (b"\xff\xfe\xfd", "is not JSON"),
        (b"[]", "schema = None"),
        (render(run).replace(b"vmlab.report/1", b"vmlab.report/9"), "'vmlab.report/9'"),
    ]:
        with pytest.raises(VmlabError, match=problem):
            parse(data)


def test_a_run_is_read_from_its_file_or_its_directory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(render(run))
    assert read_run(tmp_path) == run
    assert read_run(str(tmp_path / "report.json")) == run


def test_an_unfinished_run_is_read_from_its_journals(tmp_path: Path) -> None:
    with Recorder.create(tmp_path, tool="t") as recorder:
        recorder.plan("s", ["t"])
        assert read_run(tmp_path).finished is None
    assert read_run(tmp_path).finished is not None


def test_a_place_without_a_run_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "report.json", tmp_path / "none"):
        with pytest.raises(VmlabError, match="cannot read a report from") as refused:
            read_run(path)
        assert str(tmp_path) in str(refused.value)
