from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmlab.hypervisors import leftovers, ownership
from vmlab.hypervisors.leftovers import ReapItem
from vmlab.hypervisors.locks import FileLock
from vmlab.hypervisors.ownership import SOCKET_PATH_LIMIT, Home, Owner, Run, Store
from vmlab.hypervisors.process_identity import ProcessIdentity, boot_id
from vmlab.hypervisors.records import MachineRecords
from vmlab.machine.errors import OperationFailed, VmlabError


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.open(tmp_path / "home")


@pytest.fixture
def short_home() -> Iterator[Home]:
    """A home so short that its runs need no directory of sockets elsewhere."""
    directory = Path(tempfile.mkdtemp(prefix="v", dir="/tmp"))
    yield Home.open(directory)
    shutil.rmtree(directory)


# ------------------------------------------------------------------- the home


def test_home_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMLAB_HOME", str(tmp_path / "here"))
    assert Home.path() == tmp_path / "here"
    assert Home.open().directory == tmp_path / "here"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VMLAB_HOME", "~/there")
    assert Home.path() == tmp_path / "there"


def test_home_is_the_platform_s_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMLAB_HOME", raising=False)
    assert Home.path() == Path(os.environ["XDG_DATA_HOME"]) / "vmlab"


def test_home_is_private(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "a" / "b")
    for directory in (home.directory, home.runs, home.stores):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert Home.open(tmp_path / "a" / "b").directory == home.directory
    assert repr(home) == f"Home('{home.directory}')"


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
@pytest.mark.parametrize("room", ["", "runs", "stores"])
def test_home_that_others_can_write_is_refused(tmp_path: Path, mode: int, room: str) -> None:
    home = Home.open(tmp_path / "home")
    (home.directory / room).chmod(mode)
    with pytest.raises(VmlabError, match=f"written by others .mode 0{mode:o}") as caught:
        Home.open(tmp_path / "home")
    assert caught.value.hint == f"chmod go-w {home.directory / room}"


def test_home_that_others_can_read_is_not(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    Home.open(tmp_path / "home")


def test_home_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.geteuid()
    monkeypatch.setattr(ownership.os, "geteuid", lambda: mine + 1)
    with pytest.raises(VmlabError, match=f"belongs to user {mine}, not to user {mine + 1}"):
        Home.open(tmp_path)


def test_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    with pytest.raises(VmlabError, match="cannot hold vmlab's machines") as caught:
        Home.open(tmp_path / "home")
    assert "VMLAB_HOME" in str(caught.value.hint)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "runs").touch()
    with pytest.raises(VmlabError, match="cannot hold vmlab's machines"):
        Home.open(tmp_path / "second")


def test_a_device_is_no_home(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(VmlabError, match="is not a directory"):
        ownership._refuse_shared(tmp_path / "runs")


# ------------------------------------------------------------------- owners


def test_owner_says_who_it_is(tmp_path: Path) -> None:
    assert str(Owner("run", "a1", tmp_path)) == "run:a1"
    assert Owner("run", "a1", Path("/d")).socket("q") == Path("/d/q")
    assert Owner("run", "a1", Path("/d"), Path("/r")).socket("q") == Path("/r/q")


def test_a_socket_with_too_long_a_path_is_refused() -> None:
    owner = Owner("run", "a1", Path("/d"))
    longest = "x" * (SOCKET_PATH_LIMIT - 3)
    assert len(str(owner.socket(longest))) == SOCKET_PATH_LIMIT
    with pytest.raises(OperationFailed, match=f"path of {SOCKET_PATH_LIMIT + 1} bytes"):
        owner.socket(longest + "x")


def test_the_limit_of_socket_paths_is_the_system_s() -> None:
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        exact = directory / ("x" * (SOCKET_PATH_LIMIT - len(str(directory)) - 1))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(exact))
        with socket.socket(socket.AF_UNIX) as listener, pytest.raises(OSError, match="too long"):
            listener.bind(str(exact) + "x")
    finally:
        shutil.rmtree(directory)


# ------------------------------------------------------------------- runs


def test_a_run_has_a_directory_while_it_lasts(home: Home) -> None:
    with Run.begin(home) as run:
        assert run.owner.kind == "run"
        assert run.owner.id == run.id == run.directory.name
        assert run.directory.parent == home.runs
        assert stat.S_IMODE(run.directory.stat().st_mode) == 0o700
        said = json.loads((run.directory / "run.json").read_text())
        assert ProcessIdentity(said["pid"], said["start"]) == ProcessIdentity.of(os.getpid())
        assert said["boot"] == boot_id()
        assert said["id"] == run.id
        assert FileLock.take(run.directory / "lock") is None
    assert not run.directory.exists()
    assert list(home.runs.iterdir()) == []
    assert run.close() == []


def test_runs_do_not_meet(home: Home) -> None:
    with Run.begin(home) as one, Run.begin(home) as other:
        assert one.directory != other.directory
        assert one.owner != other.owner


def test_run_begins_in_the_default_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMLAB_HOME", str(tmp_path / "home"))
    with Run.begin() as run:
        assert run.directory.parent == tmp_path / "home" / "runs"


def test_sockets_of_a_long_home_are_elsewhere_and_go_with_the_run(tmp_path: Path) -> None:
    home = Home.open(tmp_path / ("long" * 20))
    with Run.begin(home) as run:
        path = run.owner.socket("0123456789abcdef0123456789abcdef/qmp.sock")
        assert path.parents[1] == run.owner.runtime
        assert path.parents[1].parent == Path(os.environ["XDG_RUNTIME_DIR"])
        path.parent.mkdir()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
        assert stat.S_IMODE(path.parents[1].stat().st_mode) == 0o700
    assert not path.parents[1].exists()


def test_sockets_of_a_short_home_are_in_the_run_s_directory(short_home: Home) -> None:
    with Run.begin(short_home) as run:
        assert run.owner.runtime is None
        assert run.owner.socket("q").parent == run.directory


def test_sockets_go_to_tmp_where_there_is_no_runtime_directory(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("long" * 20)))
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    with Run.begin(Home.open(tmp_path / ("long" * 20))) as run:
        assert run.owner.runtime is not None
        assert run.owner.runtime.parent == Path("/tmp")


def test_no_place_for_sockets_is_an_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home.open(tmp_path / ("long" * 20))
    monkeypatch.setattr(ownership.os, "access", lambda path, mode: False)
    with pytest.raises(VmlabError, match="no directory has a short enough path"):
        Run.begin(home)
    assert list(home.runs.iterdir()) == []


def test_a_run_that_cannot_begin_says_why(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ownership, "write_document", full)
    with pytest.raises(VmlabError, match="No space left on device"):
        Run.begin(home)
    assert list(home.runs.iterdir()) == []


def test_a_run_whose_new_directory_is_reaped_at_once_takes_another(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = FileLock.take
    fates = iter(["removed", "locked", "taken", "kept"])
    seen: list[Path] = []

    def interfere(path: Path, *, create: bool = True, exclusive: bool = False) -> FileLock | None:
        if not exclusive:
            return take(path, create=create)
        seen.append(path.parent)
        match next(fates):
            case "removed":
                path.parent.rmdir()
            case "locked":
                return None
            case "taken":
                path.touch()
        return take(path, exclusive=True)

    monkeypatch.setattr(ownership.FileLock, "take", staticmethod(interfere))
    with Run.begin(home, reap=False) as run:
        assert run.directory == seen[-1]
        assert len(set(seen)) == 4


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12, threads
def test_a_fork_of_a_run_s_process_does_not_end_the_run(home: Home) -> None:
    with Run.begin(home) as run:
        pid = os.fork()
        if pid == 0:
            try:
                left = run.close()
                os._exit(len(left))
            finally:
                os._exit(99)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert run.directory.exists()
        assert FileLock.take(run.directory / "lock") is None


def test_what_a_run_cannot_remove_is_an_error_and_stays_for_the_reaper(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(directory: Path) -> list[ReapItem]:
        return [
            ReapItem(directory.name, "process", "kill", pid=7),
            ReapItem(directory.name, "mount", "unmount", "/m", error="Operation not permitted"),
        ]

    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "clear_run", refuse)
        behind = "1 things behind: mount /m: Operation not"
        with pytest.raises(OperationFailed, match=behind), Run.begin(home):
            pass
        first = "the first error counts"
        with pytest.raises(KeyError, match=first), Run.begin(home, reap=False):
            raise KeyError(first)
    assert len(list(home.runs.iterdir())) == 2
    with Run.begin(home) as run:
        assert list(home.runs.iterdir()) == [run.directory], "beginning a run reaps dead ones"


# ------------------------------------------------------------------- stores


def test_a_store_outlives_its_object(home: Home) -> None:
    first = Store.open(home, "lab")
    assert str(first.owner) == "store:lab"
    again = Store.open(home, "lab")
    assert again.owner == first.owner
    assert [store.name for store in Store.all(home)] == ["lab"]


def test_stores_have_names(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMLAB_HOME", str(home.directory))
    assert Store.open().name == "default"
    Store.open(name="lab")
    assert [store.id for store in Store.all()] == ["default", "lab"]


@pytest.mark.parametrize("name", ["", "../x", "a b", ".x"])
def test_what_is_no_name_is_refused(home: Home, name: str) -> None:
    with pytest.raises(VmlabError, match="is no name for a store"):
        Store.open(home, name)


def test_a_store_with_a_long_path_keeps_its_directory_of_sockets(tmp_path: Path) -> None:
    home = Home.open(tmp_path / ("long" * 20))
    store = Store.open(home, "lab")
    runtime = store.owner.runtime
    assert runtime is not None
    assert runtime.is_dir()
    # A reboot empties such directories.
    runtime.rmdir()
    assert Store.open(home, "lab").owner.runtime == runtime
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700


def test_a_store_with_a_short_path_needs_none(short_home: Home) -> None:
    assert Store.open(short_home, "lab").owner.runtime is None
    assert Store.open(short_home, "lab").owner.runtime is None


def test_a_directory_of_sockets_that_others_made_is_refused(tmp_path: Path) -> None:
    home = Home.open(tmp_path / ("long" * 20))
    runtime = Store.open(home, "lab").owner.runtime
    assert runtime is not None
    runtime.chmod(0o777)
    with pytest.raises(VmlabError, match="can be written by others"):
        Store.open(home, "lab")
    runtime.rmdir()
    (tmp_path / "trap").mkdir()
    runtime.symlink_to(tmp_path / "trap")
    with pytest.raises(VmlabError, match="symbolic link"):
        Store.open(home, "lab")
    runtime.unlink()


@pytest.mark.parametrize("text", ["{", "{}", '{"runtime": 3}'])
def test_a_damaged_store_is_refused(home: Home, text: str) -> None:
    store = Store.open(home, "lab")
    (store.directory / "store.json").write_text(text)
    with pytest.raises(VmlabError, match=r"store\.json is damaged"):
        Store.open(home, "lab")


def test_a_store_that_cannot_be_made_says_why(home: Home) -> None:
    (home.stores / "lab").touch()
    with pytest.raises(VmlabError, match="cannot open the store 'lab'"):
        Store.open(home, "lab")


def test_an_empty_store_can_be_deleted(tmp_path: Path) -> None:
    home = Home.open(tmp_path / ("long" * 20))
    store = Store.open(home, "lab")
    records = MachineRecords(store.owner, "qemu")
    records.create("m1")
    records.save("m1", {})
    with pytest.raises(OperationFailed, match="has 1 machines: m1"):
        store.delete()
    assert store.directory.exists()
    records.remove("m1")
    store.delete()
    assert not store.directory.exists()
    assert store.owner.runtime is not None
    assert not store.owner.runtime.exists()
    store.delete()
    assert Store.all(home) == []


def test_a_store_that_cannot_be_deleted_says_why(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    store = Store.open(home, "lab")
    monkeypatch.setattr(ownership.shutil, "rmtree", refuse)
    with pytest.raises(OperationFailed, match="cannot remove the store 'lab': Read-only"):
        store.delete()
