"""One manager for a home: who has the place, who gives it up, who is waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from vmlab.hypervisors.locks import FileLock
from vmlab.machine.errors import OperationFailed
from vmlab.manager.service import holding
from vmlab.manager.service.holding import end_holder, hold, holder

CODE = """
import signal, sys
from pathlib import Path
from vmlab.manager.service.holding import hold
held = hold(Path(sys.argv[1]), background=sys.argv[2] == "background")
held.tell(["unix:/x"])
def end(number, frame):
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("held", flush=True)
signal.pause()
"""

Begin = Callable[[str], "subprocess.Popen[bytes]"]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Have another process be the manager."""
    children: list[subprocess.Popen[bytes]] = []

    def begun(kind: str) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, "-c", CODE, str(tmp_path), kind], stdout=subprocess.PIPE
        )
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        return child

    yield begun
    for child in children:
        child.kill()
        child.communicate()


def test_nobody_has_it_before_and_after(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    held = hold(tmp_path, background=True)
    held.tell(["unix:/x", "http://y"])
    found = holder(tmp_path)
    assert found is not None
    assert (found.pid, found.background) == (os.getpid(), True)
    assert found.urls == ("unix:/x", "http://y")
    assert found.process is not None
    held.release()
    assert holder(tmp_path) is None


def test_one_that_was_killed_has_it_no_more(tmp_path: Path, begin: Begin) -> None:
    child = begin("foreground")
    assert holder(tmp_path) is not None
    child.kill()
    child.wait()
    assert holder(tmp_path) is None
    hold(tmp_path, background=False).release()


def test_one_in_the_foreground_is_not_disturbed(tmp_path: Path, begin: Begin) -> None:
    child = begin("foreground")
    with pytest.raises(OperationFailed, match=f"process {child.pid}, at unix:/x"):
        hold(tmp_path, background=False)
    assert child.poll() is None


def test_one_that_was_killed_is_in_nobodys_way_while_somebody_looks(
    tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = begin("foreground")
    child.kill()
    child.wait()
    looking = FileLock.take(tmp_path / "service.lock")
    assert looking is not None
    waiting = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: looking.release())
    monkeypatch.setattr(holding, "time", waiting)
    hold(tmp_path, background=False).release()


def test_one_in_the_background_makes_place(tmp_path: Path, begin: Begin) -> None:
    child = begin("background")
    held = hold(tmp_path, background=False)
    assert child.wait(60) == 0
    held.release()


def test_one_in_the_background_is_waited_for_if_it_is_not_to_be_replaced(
    tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = begin("background")
    monkeypatch.setattr(holding, "_PATIENCE", 0.1)
    with pytest.raises(OperationFailed, match="the place of the manager is in use"):
        hold(tmp_path, background=True, replace=False)
    assert child.poll() is None


def test_it_is_ended_when_somebody_says_so(tmp_path: Path, begin: Begin) -> None:
    assert end_holder(tmp_path) is None
    child = begin("foreground")
    found = end_holder(tmp_path)
    assert found is not None
    assert found.pid == child.pid
    assert child.wait(60) == 0


def test_one_that_does_not_end_is_told_of(
    tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = begin("foreground")
    os.kill(child.pid, signal.SIGSTOP)
    monkeypatch.setattr(holding, "_PATIENCE", 0.1)
    with pytest.raises(OperationFailed, match="does not end") as raised:
        end_holder(tmp_path)
    assert f"kill -KILL {child.pid}" in (raised.value.hint or "")


def test_what_the_file_says_of_another_process_ends_nobody(tmp_path: Path, begin: Begin) -> None:
    """The lock is one's, the number in the file another's: it has been given to another since."""
    child = begin("foreground")
    path = tmp_path / "service.lock"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"start": said["start"] - 1}))
    found = holder(tmp_path)
    assert found is not None
    assert found.process is None
    assert holding._tell_to_end(found) is False
    assert child.poll() is None


@pytest.mark.parametrize("text", ["", "no json", "{}", '{"pid": "x"}'])
def test_one_that_is_just_beginning_says_nothing_yet(
    text: str, tmp_path: Path, begin: Begin
) -> None:
    begin("foreground")
    (tmp_path / "service.lock").write_text(text)
    assert holder(tmp_path) is None
