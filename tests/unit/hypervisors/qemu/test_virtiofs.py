"""virtiofsd: where it is found, what it is told, and what is said where it is not to be had."""

from __future__ import annotations

import asyncio
import ctypes
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from vmlab.hypervisors.ownership import Home, Run
from vmlab.hypervisors.qemu import private_view, virtiofs
from vmlab.hypervisors.qemu.virtiofs import Daemon, Daemons
from vmlab.machine.errors import OperationFailed
from vmlab.machine.spec import MachineSpec, Share

RUST = "echo 'Usage: virtiofsd [OPTIONS]'; echo '      --shared-dir <SHARED_DIR>'"
IN_C = "echo '    -o source=PATH             shared directory tree'"

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a program of a text where it is looked for, and nowhere else is one."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin") + ":/usr/bin:/bin")
    places = (str(tmp_path / "libexec"), str(tmp_path / "lib"))
    monkeypatch.setattr(virtiofs, "OUT_OF_PATH", {virtiofs.PROGRAM: places})

    def put(place: str, text: str) -> Path:
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    return put


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    virtiofs.why_not.cache_clear()
    yield
    virtiofs.why_not.cache_clear()


def test_the_one_in_path_is_taken_before_those_that_distributions_hide(install: Install) -> None:
    assert virtiofs.find_daemon() is None
    hidden = install("lib", IN_C)
    assert virtiofs.find_daemon() == Daemon(str(hidden), rust=False)
    better = install("libexec", RUST)
    assert virtiofs.find_daemon() == Daemon(str(better), rust=True)
    first = install("bin/virtiofsd", RUST)
    assert virtiofs.find_daemon() == Daemon(str(first), rust=True)


def test_a_program_that_is_neither_or_does_not_run_is_none(install: Install) -> None:
    install("lib", "echo something else")
    assert virtiofs.find_daemon() is None
    install("libexec", "exit 0").write_bytes(b"\x7fELF, but not really")
    assert virtiofs.find_daemon() is None


def test_a_program_that_goes_while_it_is_looked_at_is_none(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: str) -> Any:
        raise FileNotFoundError(path)

    install("lib", IN_C)
    monkeypatch.setattr(virtiofs, "facts_of", gone)
    assert virtiofs.find_daemon() is None


def test_why_there_is_no_virtiofs_is_told(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert virtiofs.why_not() == "virtiofsd is not installed"
    install("lib", IN_C)
    for user, works, why in (
        (1000, True, "virtiofsd has to be started by root"),
        (0, False, "virtiofsd may not make namespaces of its own here"),
        (0, True, None),
    ):
        virtiofs.why_not.cache_clear()
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)

        def answered(question: str, about: Any, ask: Any, works: bool = works) -> bool:
            return works and "options" not in question

        monkeypatch.setattr(virtiofs, "remembered", answered)
        assert virtiofs.why_not() == why


def test_whether_namespaces_work_is_tried_by_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        assert virtiofs._namespaces_work() in {True, False}
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert not virtiofs._namespaces_work()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert not virtiofs._namespaces_work()


def test_each_program_is_told_the_same_in_its_own_words() -> None:
    share = Share(tag="t", source=Path("/a,b"), target="/t")
    rust = Daemon("/v", rust=True).arguments(share, 7)
    assert rust[:3] == ["/v", "--fd=7", "--shared-dir=/a,b"]
    assert "--sandbox=namespace" in rust
    in_c = Daemon("/v", rust=False).arguments(share, 7)
    assert in_c[:5] == ["/v", "--fd=7", "-f", "-o", r"source=/a\,b"]
    assert "sandbox=namespace" in in_c


def test_a_share_that_finds_its_own_way_goes_by_virtiofs_only_where_that_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = [
        {"tag": kind, "source": "/a", "target": "/a", "kind": kind}
        for kind in ("auto", "virtiofs", "9p", "copy")
    ]
    spec = MachineSpec.of(name="m", shares=shares)
    monkeypatch.setattr(virtiofs, "why_not", lambda: None)
    assert virtiofs.by_virtiofs(spec) == ("auto", "virtiofs")
    monkeypatch.setattr(virtiofs, "why_not", lambda: "because")
    assert virtiofs.by_virtiofs(spec) == ("virtiofs",)


# ------------------------------------------------------------------- processes


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.begin(Home.open(tmp_path / "home"), reap=False) as run:
        yield run


def started(run: Run, directory: Path, **fields: Any) -> Any:
    share = Share(**({"tag": "t", "source": directory, "target": "/t", "readonly": False} | fields))
    return Daemons.start([(3, share)], directory, owner=run.owner, machine="m")


def test_daemons_are_ended_with_what_they_forked(
    install: Install, run: Run, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "told")
    serve = f"sleep 1000 & echo $! >{tmp_path}/told; wait"
    install("lib", f'case "$*" in *help*) {IN_C} ;; *) {serve} ;; esac')
    directory = tmp_path / "launch"

    async def test() -> None:
        daemons = await started(run, directory)
        made = (directory / "virtiofs-3.sock").stat().st_mode
        assert (stat.S_ISSOCK(made), stat.S_IMODE(made)) == (True, 0o600)
        child = psutil.Process(int(await asyncio.to_thread((tmp_path / "told").read_text)))
        assert await daemons.give_up() == ""
        assert daemons.processes == []
        assert not psutil.wait_procs([child], timeout=60)[1]
        await daemons.end()

    asyncio.run(asyncio.wait_for(test(), 100))


def test_one_that_stays_although_qemu_has_gone_is_killed(
    install: Install, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("lib", f'case "$*" in *help*) {IN_C} ;; *) exec sleep 1000 ;; esac')
    monkeypatch.setattr(virtiofs, "_END_GRACE", 0.01)

    async def test() -> None:
        daemons = await started(run, tmp_path / "launch")
        (process,) = daemons.processes
        await daemons.end()
        assert not process.running

    asyncio.run(asyncio.wait_for(test(), 60))


def test_one_that_ends_by_itself_is_noticed_with_what_it_said(
    install: Install, run: Run, tmp_path: Path
) -> None:
    install("lib", f'case "$*" in *help*) {IN_C} ;; *) echo first; echo no such thing >&2 ;; esac')

    async def test() -> None:
        daemons = await started(run, tmp_path / "launch")
        await daemons.one_ended()
        assert daemons.last_words().endswith("for ever: no such thing")
        assert await daemons.give_up() == "no such thing"
        silent = Daemons(tmp_path / "nothing")
        assert silent.last_words().endswith("for ever")
        waiting = asyncio.ensure_future(silent.one_ended())
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_what_cannot_be_started_is_refused_and_leaves_nothing(
    install: Install, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        with pytest.raises(OperationFailed, match="not installed") as refused:
            await started(run, tmp_path / "launch")
        assert '"9p"' in str(refused.value.hint)
        install("lib", IN_C)
        await started(run, tmp_path / "launch")
        with pytest.raises(OperationFailed, match="cannot make the socket"):
            await started(run, tmp_path / "launch")
        none = await Daemons.start([], tmp_path / "no", owner=run.owner, machine="m")
        assert none.processes == []
        assert not (tmp_path / "no").exists()

    asyncio.run(asyncio.wait_for(test(), 60))


# ------------------------------------------------------------------- the read-only view


class Libc:
    """Notes what is asked of the kernel, and refuses one of it."""

    def __init__(self, refused: str | None = None) -> None:
        self.refused = refused
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.asked.append(name)
            if name != self.refused:
                return 0
            ctypes.set_errno(1)
            return -1

        return call


@pytest.mark.parametrize("refused", ["unshare", "mount", "syscall", None])
def test_a_view_that_the_kernel_refuses_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, refused: str | None
) -> None:
    libc = Libc(refused)
    ran: list[list[str]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: libc)
    monkeypatch.setattr(os, "execv", lambda path, words: ran.append(words))
    if refused is None:
        private_view.main(["/a", "/bin/x", "y"])
        assert ran == [["/bin/x", "y"]]
        assert libc.asked == ["unshare", "mount", "mount", "syscall"]
        private_view.main(["--try"])
        return
    with pytest.raises(SystemExit, match="read-only: Operation not permitted"):
        private_view.main(["/a", "/bin/x", "y"])
    assert ran == []


@pytest.mark.skipif(
    virtiofs.why_not() is not None, reason="needs root with namespaces, and virtiofsd"
)
def test_a_program_sees_a_directory_read_only_and_only_that(tmp_path: Path) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    script = f"echo x >{other}/y; cat {shared}/a; echo b >{shared}/a"
    (shared / "a").write_text("seen")
    done = subprocess.run(
        [sys.executable, "-I", "-S", private_view.__file__, shared, "/bin/sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, (other / "y").read_text()) == ("seen", "x\n")
    assert "Read-only file system" in done.stderr
    assert (shared / "a").read_text() == "seen"
    assert subprocess.run(
        [sys.executable, "-I", "-S", private_view.__file__, tmp_path / "no", "/bin/true"],
        capture_output=True,
        text=True,
        check=False,
    ).stderr.startswith(f"cannot make {tmp_path}/no read-only: No such file")
