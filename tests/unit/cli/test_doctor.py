from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.main import main
from vmlab.hypervisors import doctor
from vmlab.hypervisors.doctor import Diagnosis, Finding, Status

FINDINGS = (
    Finding(topic="kernel", name="kernel", status=Status.OK, detail="linux 6.1"),
    Finding(
        topic="programs",
        name="passt",
        status=Status.MISSING,
        detail="not installed",
        hint="apt-get install passt",
    ),
)


@pytest.fixture
def diagnosed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the doctor find that."""

    def use(**changes: object) -> None:
        known = {"system": "Debian", "findings": FINDINGS, "usable": True} | changes
        monkeypatch.setattr(doctor, "diagnose", lambda: Diagnosis.model_validate(known))

    return use


def test_every_finding_is_a_line(
    diagnosed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    diagnosed(install="apt-get install passt")
    assert main(["doctor"]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Debian"
    assert ["ok", "kernel", "linux", "6.1"] in [line.split() for line in lines]
    assert any(line.endswith("apt-get install passt") for line in lines)
    assert lines[-2:] == [
        "1 ok, 0 warn, 1 missing",
        "install what is missing: apt-get install passt",
    ]


def test_nothing_that_works_is_the_exit_status(
    diagnosed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    diagnosed(usable=False)
    assert main(["doctor"]) == ExitCode.UNAVAILABLE
    assert capsys.readouterr().out.splitlines()[-1] == "no hypervisor works here"
    assert main(["doctor", "--json"]) == ExitCode.UNAVAILABLE
    told = json.loads(capsys.readouterr().out)
    assert told["usable"] is False
    assert [finding["name"] for finding in told["findings"]] == ["kernel", "passt"]


def test_this_host_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert status == (ExitCode.OK if told["usable"] else ExitCode.UNAVAILABLE)
    assert {finding["status"] for finding in told["findings"]} <= {"ok", "warn", "missing"}
