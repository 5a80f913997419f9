"""What the demo puts into its report: examples, whatever became of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmlab.images.progress import ProgressEvent
from vmlab.lab.demonstration import _Clock, find_examples, run_examples
from vmlab.lab.timeline import Step
from vmlab.machine.errors import OperationFailed
from vmlab.report import Outcome, Recorder

EXAMPLES = """
import pytest

def test_well():
    pass

def test_wrong():
    assert 1 == 2, "one is not two"

def test_left_out():
    pytest.skip("not here")

@pytest.fixture
def broken():
    raise RuntimeError("no machine")

def test_in_error(broken):
    pass
"""


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder.create(tmp_path / "run", tool="test")


def run(tmp_path: Path, recorder: Recorder, text: str) -> bool:
    examples = tmp_path / "examples"
    examples.mkdir()
    (examples / "pytest.ini").write_text("[pytest]\n")
    (examples / "test_it.py").write_text(text)
    return run_examples(examples, tmp_path, recorder, quiet=True)


def test_each_example_is_a_test_with_its_outcome(tmp_path: Path, recorder: Recorder) -> None:
    assert not run(tmp_path, recorder, EXAMPLES)
    report = recorder.close()
    assert report is not None
    outcomes = {test.name.rpartition("::")[2]: test.outcome for test in report.suites[0].tests}
    assert outcomes == {
        "test_well": Outcome.PASS,
        "test_wrong": Outcome.FAIL,
        "test_left_out": Outcome.SKIP,
        "test_in_error": Outcome.ERROR,
    }


def test_examples_that_are_all_well_are_told_so(tmp_path: Path, recorder: Recorder) -> None:
    assert run(tmp_path, recorder, "def test_well():\n    pass\n")
    report = recorder.close()
    assert report is not None and report.outcome is Outcome.PASS


def test_examples_that_cannot_be_collected_are_an_error(tmp_path: Path, recorder: Recorder) -> None:
    assert not run(tmp_path, recorder, "import nothing_of_that_name\n")
    report = recorder.close()
    assert report is not None and report.outcome is Outcome.ERROR


def test_a_pytest_that_does_not_begin_is_an_error(tmp_path: Path, recorder: Recorder) -> None:
    with pytest.raises(OperationFailed, match="did not run the examples"):
        run_examples(tmp_path / "nothing", tmp_path, recorder, quiet=True)


def test_examples_are_those_that_are_named_or_those_of_this_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_examples(None) is None
    quickstart = tmp_path / "examples" / "quickstart"
    quickstart.mkdir(parents=True)
    assert find_examples(None) is None
    (quickstart / "test_one.py").touch()
    assert find_examples(None) == Path("examples/quickstart")
    assert find_examples(tmp_path) == tmp_path
    with pytest.raises(OperationFailed, match="nowhere"):
        find_examples(tmp_path / "nowhere")


def test_the_making_of_an_image_is_timed_step_by_step() -> None:
    passed: list[ProgressEvent] = []
    told: list[tuple[Step, int]] = []
    clock = _Clock(passed.append, lambda step, size: told.append((step, size)))
    events = [
        ProgressEvent("fetching a", 0, 10),
        ProgressEvent("fetching b", 1),
        ProgressEvent("fetching a", 10, 10, finished=True),
        ProgressEvent("fetching b", 7, finished=True),
        ProgressEvent("fetching a", finished=True),
    ]
    for event in events:
        clock(event)
    assert passed == events
    assert [(step.name, size) for step, size in told] == [
        ("fetching a", 10), ("fetching b", 7), ("fetching a", 0)
    ]  # fmt: skip
    assert told == clock.steps
