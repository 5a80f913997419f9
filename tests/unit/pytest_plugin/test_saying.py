"""What tests wait for is told at once: on pytest's terminal, to `vmlab test`, and from workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.unit.pytest_plugin.conftest import Project

from vmlab.pytest_plugin.saying import Listener, _write

pytest_plugins = ["pytester"]

FETCHES = """
    from vmlab.images.progress import ProgressEvent
    from vmlab.lab import boot
    from vmlab.images.errors import ImageError

    def fetch(wish, store, *, progress):
        for done in (0, 10, 20):
            progress(ProgressEvent("fetching it", done, 20, finished=done == 20))
        raise ImageError("there is none")

    def test_it(vm_factory, monkeypatch):
        monkeypatch.setattr(boot, "find_image", fetch)
        vm_factory(image="debian-13-riscv64-tiny")

    def test_waits(vm_factory):
        vm_factory._run.lab.tell("vm waits for memory")
"""


def test_a_line_on_the_terminal_tells_it(project: Project) -> None:
    project.write(test_it=FETCHES)
    done = project.run(on=("--vm-hypervisor", "embedded"))
    lines = done.stdout.str().splitlines()
    assert "vmlab: vm waits for memory" in lines
    told = "vmlab: the image debian-13-riscv64-tiny is made ready first: fetching it"
    assert lines.count(told) == 1


def test_workers_tell_their_controller(project: Project) -> None:
    project.write(test_it=FETCHES)
    done = subprocess.run(
        project.command("-n", "2", on=("--vm-hypervisor", "embedded")),
        cwd=project.path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    told = "vmlab: the image debian-13-riscv64-tiny is made ready first: fetching it"
    # A dot of the controller's own thread may come just before either.
    assert done.stdout.count(f"{told}\n") == 1, done.stdout
    assert done.stdout.count("vmlab: vm waits for memory\n") == 1, done.stdout


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "workers"])
def test_vmlab_test_shows_how_far_it_is(project: Project, workers: tuple[str, ...]) -> None:
    project.write(test_it=FETCHES)
    words = ["--vm-hypervisor=embedded", f"--vm-report={project.reports}", *workers]
    done = subprocess.run(
        [sys.executable, "-m", "vmlab", "test", "-p", "no:cacheprovider", *words],
        cwd=project.path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "note      vm waits for memory" in done.stderr, done.stderr
    assert "the image debian-13-riscv64-tiny is made ready first: fetching it" in done.stderr
    assert "image     fetching it (0.0 MiB)" in done.stderr


def test_a_pipe_that_nobody_listens_to_holds_nobody_up(tmp_path: Path) -> None:
    heard: list[object] = []
    enough = threading.Event()

    def hear(message: object) -> None:
        heard.append(message)
        enough.set()

    _write(tmp_path / "said", {"text": "too early"})
    listener = Listener(tmp_path / "said", hear)
    _write(tmp_path / "said", {"text": "now"})
    assert enough.wait(60)
    listener.close()
    _write(tmp_path / "said", {"text": "too late"})
    assert json.dumps(heard) == '[{"text": "now"}]'


def test_what_was_said_before_the_end_is_heard_by_who_is_late(tmp_path: Path) -> None:
    heard: list[object] = []
    began, late = threading.Event(), threading.Event()

    def hear(message: object) -> None:
        heard.append(message)
        began.set()
        assert late.wait(60)

    listener = Listener(tmp_path / "said", hear)
    _write(tmp_path / "said", {"text": "one"})
    assert began.wait(60)
    _write(tmp_path / "said", {"text": "two"})
    descriptor = os.open(tmp_path / "said", os.O_WRONLY)
    os.write(descriptor, b'{"text": "of one who was kil')
    os.close(descriptor)
    timer = threading.Timer(0.3, late.set)
    timer.start()
    listener.close()
    timer.join()
    assert json.dumps(heard) == '[{"text": "one"}, {"text": "two"}]'
