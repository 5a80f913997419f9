"""What holds for every test: nothing of the user's is touched, nothing is left running."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import xdist
from hypothesis import HealthCheck, settings

# Slow machines are no failures; a failing example is printed so that anybody can run it again.
settings.register_profile(
    "vmlab", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("vmlab")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Who starts tests in the background has them, and all that they start, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

_NOBODY = 65534  # the kernel's overflow uid, which owns nothing

_XDG = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME")


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Nothing that a killed process left of its coverage stops pytest-cov, which comes after."""
    result = yield
    coverage = session.config.pluginmanager.get_plugin("_cov")
    if coverage is not None and coverage.cov_controller and not xdist.is_xdist_worker(session):
        from coverage_data import take_out_unfinished

        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        base = coverage.cov_controller.cov.get_option("run:data_file")
        take_out_unfinished(Path(base).absolute(), lambda said: reporter.write_line(f"\n{said}"))
    return result


@pytest.fixture(scope="session", autouse=True)
def _own_directories() -> Iterator[None]:
    """Runs, stores, caches and settings of the tests are the tests' own, and go with them."""
    # Not pytest's tmp_path: a unix socket's path may have 107 bytes and no more.
    base = Path(tempfile.mkdtemp(prefix="vmlab-t-"))
    with pytest.MonkeyPatch.context() as patch:
        for variable in _XDG:
            folder = base / variable.removeprefix("XDG_").partition("_")[0].lower()
            folder.mkdir(mode=0o700)
            patch.setenv(variable, str(folder))
        for variable in [name for name in os.environ if name.startswith("VMLAB_")]:
            patch.delenv(variable)
        patch.delenv("NO_COLOR", raising=False)
        patch.delenv("FORCE_COLOR", raising=False)
        yield
    for _ in range(30):
        # A process that has been killed may still be on its way out, and what it had with it.
        with suppress(OSError):
            shutil.rmtree(base)
            return
        time.sleep(1)
    shutil.rmtree(base)


@pytest.fixture
def ordinary_user() -> Iterator[Path]:
    """A directory of an ordinary user's, who the test is from here on, even if root runs it."""
    # pytest's tmp_path lies below a directory that only its maker may enter.
    base = Path(tempfile.mkdtemp(prefix="vmlab-u-"))
    user = os.geteuid()
    if user == 0:
        os.chown(base, _NOBODY, -1)
        os.seteuid(_NOBODY)
    try:
        yield base
    finally:
        os.seteuid(user)
        shutil.rmtree(base)


@pytest.fixture(autouse=True)
def _umask_of_its_own() -> Iterator[None]:
    """Programs set it for themselves, also where a test runs one in this process."""
    umask = os.umask(0o022)
    os.umask(umask)
    yield
    os.umask(umask)


def _children() -> dict[int, psutil.Process]:
    return {child.pid: child for child in psutil.Process().children()}


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    """A test that leaves a child process behind fails, whatever else it found."""
    before = set(_children())
    yield
    left = _left(before)
    for child in left:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    if left:
        psutil.wait_procs(left, timeout=5)
        pytest.fail(f"the test left processes behind: {sorted(map(str, left))}")


def _left(before: set[int]) -> list[psutil.Process]:
    """Children that were not there before; for one that has ended somebody may be about to wait."""
    deadline = time.monotonic() + 10
    while True:
        left, ended = [], False
        for pid, child in _children().items():
            if pid not in before:
                try:
                    # Python's own helper lives as long as the test process.
                    if not any("multiprocessing" in word for word in child.cmdline()):
                        left.append(child)
                except psutil.ZombieProcess:
                    left.append(child)
                    ended = True
                except psutil.NoSuchProcess:
                    continue
        if not ended or time.monotonic() > deadline:
            return left
        time.sleep(0.01)
