"""Files that commands lend a manager: names that last as long as their command."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmlab.manager.lending import forget_lent, forget_passing, is_lent, lent, passing_name

LENDER = """
import sys, time
from pathlib import Path
from vmlab.manager.lending import lent
with lent(Path(sys.argv[1]), Path(sys.argv[2]), copying=lambda: None) as name:
    print(name, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "web1.tar"
    path.write_bytes(b"archive")
    return path


@pytest.fixture(params=["linked", "copied"])
def exports(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Where names go: into a directory to which files can be linked, or have to be copied."""
    if request.param == "copied":

        def elsewhere(*args: object, **options: object) -> None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "link", elsewhere)
    return tmp_path / "exports"


def test_a_file_has_a_second_name_for_as_long_as_it_is_lent(file: Path, exports: Path) -> None:
    copied: list[bool] = []
    with lent(file, exports, copying=lambda: copied.append(True)) as name:
        assert is_lent(name)
        assert (exports / name).read_bytes() == b"archive"
        assert ((exports / name).stat().st_ino == file.stat().st_ino) is not bool(copied)
        forget_lent(exports, ())
        assert [path.name for path in exports.iterdir()] == [name]
    assert list(exports.iterdir()) == []
    assert file.read_bytes() == b"archive"


def test_what_cannot_be_read_is_not_lent(tmp_path: Path, exports: Path) -> None:
    with (
        pytest.raises(FileNotFoundError),
        lent(tmp_path / "nothing", exports, copying=lambda: None),
    ):
        pytest.fail("it was lent")
    assert list(exports.iterdir()) == []


def test_a_killed_command_leaves_a_name_that_goes_unless_an_import_wants_it(
    file: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "exports"
    directory.mkdir()
    mine = directory / "import-mine.tar"
    mine.write_bytes(b"an archive of a name that is none")
    with subprocess.Popen(
        [sys.executable, "-c", LENDER, str(file), str(directory)], stdout=subprocess.PIPE, text=True
    ) as lender:
        assert lender.stdout is not None
        name = lender.stdout.readline().strip()
        forget_lent(directory, ())
        assert (directory / name).exists()
        lender.send_signal(signal.SIGKILL)
        lender.wait(60)
    forget_lent(directory, {name})
    assert (directory / name).exists()
    forget_lent(directory, {"import-0123456789abcdef"})
    assert list(directory.iterdir()) == [mine]
    assert file.read_bytes() == b"archive"


def test_what_nobody_has_taken_away_goes_after_a_week(tmp_path: Path) -> None:
    old, wanted, fresh = (passing_name() for _ in range(3))
    named = "once-i-was-a-machine"
    for name, days in ((old, 8), (wanted, 8), (named, 8), (fresh, 6)):
        path = tmp_path / name
        path.write_bytes(b"archive")
        written = time.time() - days * 86400
        os.utime(path, (written, written))
    forget_passing(tmp_path, {wanted})
    assert {path.name for path in tmp_path.iterdir()} == {wanted, named, fresh}
