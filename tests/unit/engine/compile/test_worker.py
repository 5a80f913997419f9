"""The compile worker answers, refuses and ends with who started it."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from vmlab.engine.compile.client import CompileFailed, CompileWorker
from vmlab.engine.compile.worker import read_message, write_message


def test_messages_keep_their_length() -> None:
    stream = io.BytesIO()
    for body in (b"", b"one", b"x" * 70_000):
        write_message(stream, body)
    stream.seek(0)
    assert [read_message(stream) for _ in range(4)] == [b"", b"one", b"x" * 70_000, None]


def test_a_message_that_ends_early_is_an_error() -> None:
    with pytest.raises(EOFError):
        read_message(io.BytesIO(b"\x05\0\0\0abc"))


def test_a_module_that_is_none_is_refused_and_the_worker_lives_on() -> None:
    with CompileWorker() as worker:
        with pytest.raises(CompileFailed, match="LLVM refuses the module"):
            worker.module("this is no module", optimize=0)
        made = worker.module("define void @f() {\n ret void\n}", optimize=0)
        assert made.startswith(b"\x7fELF")


def test_a_worker_that_dies_is_told() -> None:
    with CompileWorker() as worker:
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(CompileFailed, match="died with status -9"):
            worker.module("", optimize=0)


def test_the_worker_ends_with_its_input() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmlab.engine.compile.worker"],
        input=b"",
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
