from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.main import main
from vmlab.cli.schema import Document, schema_of
from vmlab.machine.faults import FaultSchedule, PowerCut
from vmlab.machine.spec import MachineSpec


@pytest.mark.parametrize("document", list(Document))
def test_every_schema_is_one_of_draft_2020_12_with_id_and_title(
    document: Document, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schema", document.value]) == ExitCode.OK
    printed = json.loads(capsys.readouterr().out)
    assert printed == schema_of(document)
    jsonschema.Draft202012Validator.check_schema(printed)
    assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert printed["$id"] == f"urn:vmlab:{document.value}:1"
    assert printed["title"]


def test_the_machine_s_is_printed_if_nothing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["$id"] == "urn:vmlab:machine:1"


def test_a_schema_accepts_what_vmlab_does_and_refuses_what_it_does() -> None:
    validator = jsonschema.Draft202012Validator(schema_of(Document.MACHINE))
    validator.validate(MachineSpec(name="web").model_dump(mode="json", exclude_none=True))
    assert not validator.is_valid({"name": "web", "memmory": "1G"})
    assert not validator.is_valid({})
    faults = jsonschema.Draft202012Validator(schema_of(Document.FAULTS))
    faults.validate(FaultSchedule(faults=(PowerCut(),)).model_dump(mode="json", exclude_none=True))
    assert not faults.is_valid({"faults": [{"kind": "no-such-fault"}]})


def test_it_can_be_written_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "faults", "--output", str(tmp_path / "faults.json")]) == ExitCode.OK
    assert capsys.readouterr().out == ""
    text = (tmp_path / "faults.json").read_text()
    assert json.loads(text) == schema_of(Document.FAULTS)
    assert text.endswith("}\n")


def test_a_file_that_cannot_be_written_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "missing" / "x.json"
    assert main(["schema", "-o", str(path)]) == ExitCode.CANNOT
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot write {path}: No such file or directory\nhint: ")


def test_an_unknown_document_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "machines"]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert "'machines'" in error
    assert "'machine', 'faults'" in error
