"""What a build survives: a full disk, a kill at any moment, other builds, another user's rights."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vmlab.images
from vmlab.images import ImageStore
from vmlab.images import recipe as recipes
from vmlab.images.errors import StoreError
from vmlab.images.store import disk

MakeStore = Callable[..., ImageStore]

# A process with a store: its arguments are the store, the mirror, the keyring and the recipe.
WITH_A_STORE = """
import json, os, sys
from pathlib import Path
from vmlab.images import ImageStore
from vmlab.images.debian.apt import AptConfiguration
from vmlab.images.settings import ImageSettings
from vmlab.machine.errors import VmlabError
root, mirror, keyring, recipe, *more = sys.argv[1:]
def a_store(root=root):
    return ImageStore(settings=ImageSettings(store=Path(root), debian_mirror=mirror,
                      debian_keyring=Path(keyring), retry_seconds=0),
                      apt=AptConfiguration(), environment={})
"""
IN_A_PROCESS = (
    WITH_A_STORE
    + """
store = a_store()
try:
    print(store.ensure(Path(recipe)).digest)
except VmlabError as error:
    print(type(error).__name__, error.message, error.hint)
    sys.exit(error.exit_code)
"""
)
SECONDS = 300  # for what takes two on a machine that has nothing else to do


def command_line(store: ImageStore, recipe: Path, script: str = IN_A_PROCESS) -> list[str]:
    settings = store.settings
    return [sys.executable, "-c", script, str(store.root), str(settings.debian_mirror),
            str(settings.debian_keyring), str(recipe)]  # fmt: skip


def small_file_limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_file_size_limit_is_reported_and_leaves_nothing_half_made(
    make_store: MakeStore, recipe_file: Path
) -> None:
    store = make_store()
    result = subprocess.run(
        command_line(store, recipe_file), preexec_fn=small_file_limit,
        capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert result.returncode == 3, result.stderr
    assert "StoreError" in result.stdout
    assert "cannot be written" in result.stdout
    assert "prune" in result.stdout
    assert store.images() == []
    assert list((store.root / "work").glob("*/initrd")) == []
    assert store.ensure(recipe_file).name == "small-tiny"


def private_mounts() -> list[str] | None:
    """The command that may mount for itself and for nobody else; None where that is not allowed."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return None
    words = [unshare, "--mount"] if os.geteuid() == 0 else [unshare, "-Ur", "--mount"]
    tried = subprocess.run([*words, "mount", "-t", "tmpfs", "x", "/mnt"],
                           capture_output=True, check=False)  # fmt: skip
    return words if tried.returncode == 0 else None


ON_A_SMALL_DISK = (
    WITH_A_STORE
    + """
import subprocess
def mount(*words):
    subprocess.run(["mount", *words, root], check=True)
tried = []
for option in more:
    mount("-t", "tmpfs", "-o", option, "small")
    said = {"option": option, "error": None}
    try:
        a_store().ensure(Path(recipe))
    except VmlabError as error:
        said |= {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    said["work"] = [str(path) for path in Path(root, "work").glob("*")]
    said["images"] = [str(path) for path in Path(root, "images").glob("*")]
    said["new"] = [str(path) for path in Path(root).rglob(".new-*")]
    mount("-o", "remount,size=64M,nr_inodes=0")
    said["digest"] = a_store().ensure(Path(recipe)).digest
    said["problems"] = len(a_store().verify())
    tried.append(said)
    subprocess.run(["umount", root], check=True)
print(json.dumps(tried))
"""
)


@pytest.mark.timeout(2 * SECONDS)
def test_full_disk_at_any_stage_is_an_error_and_once_there_is_room_the_build_goes_on(
    make_store: MakeStore, recipe_file: Path
) -> None:
    private = private_mounts()
    if private is None:
        pytest.skip("needs root, or user namespaces, to mount a file system of its own")
    whole = make_store("whole")
    digest = whole.ensure(recipe_file).digest
    page = 4096
    files = [path for path in whole.root.rglob("*") if path.is_file()]
    pages = sum(-(-path.stat().st_size // page) for path in files)
    store = make_store("small")
    store.root.mkdir()
    options = [f"size={max(pages * tenth // 10, 1) * page}" for tenth in (0, 2, 4, 6, 8)]
    options += ["size=64M,nr_inodes=4", "size=64M,nr_inodes=20"]
    result = subprocess.run(
        [*private, *command_line(store, recipe_file, ON_A_SMALL_DISK), *options],
        capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    tried = json.loads(result.stdout)
    assert len(tried) == len(options)
    for said in tried:
        assert said["error"] == "StoreError", said
        assert "No space left on device" in said["message"]
        assert "vmlab image prune" in said["hint"]
        assert (said["work"], said["images"], said["new"]) == ([], [], []), said
        assert (said["digest"], said["problems"]) == (digest, 0)


KILLED_AT_EVERY_MOMENT = (
    WITH_A_STORE
    + """
import signal
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.utime",
           "fcntl.flock", "socket.connect"}
def build(root, moment):
    # Builds in a process that is killed at its change number `moment`; how many there were.
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0
        def changed(event, arguments):
            nonlocal count
            if event in CHANGES or event == "open" and (arguments[2] or 0) & WRITING:
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(changed)
        try:
            a_store(root).ensure(Path(recipe))
            os.write(writer, str(count).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        words = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, int(words or 0)
def files_of(root):
    return sorted(str(path.relative_to(root)) for path in Path(root).rglob("*")
                  if path.is_file() and not path.name.endswith("lock"))
status, changes = build(root + "-whole", 0)
whole = files_of(root + "-whole")
tried = []
for tenth in range(10):
    place = f"{root}-{tenth}"
    moment = 1 + (changes - 2) * tenth // 9
    status, _ = build(place, moment)
    store = a_store(place)
    image = store.ensure(Path(recipe))
    tried.append({"moment": moment, "status": status, "digest": image.digest,
                  "problems": len(store.verify()), "work": os.listdir(place + "/work"),
                  "differs": sorted(set(files_of(place)) ^ set(whole))})
print(json.dumps({"changes": changes, "whole": whole, "tried": tried}))
"""
)


@pytest.mark.timeout(2 * SECONDS)
def test_build_killed_at_ten_moments_leaves_nothing_that_the_next_does_not_clear_or_finish(
    make_store: MakeStore, recipe_file: Path
) -> None:
    result = subprocess.run(
        command_line(make_store("killed"), recipe_file, KILLED_AT_EVERY_MOMENT),
        capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    digest = make_store().ensure(recipe_file).digest
    assert found["changes"] > 50
    assert f"images/{digest}/initrd" in found["whole"]
    assert len({said["moment"] for said in found["tried"]}) == 10
    for said in found["tried"]:
        assert said["status"] == -9, said
        assert (said["digest"], said["problems"]) == (digest, 0), said
        assert (said["work"], said["differs"]) == ([], []), said


def test_directory_of_a_build_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with disk.working_directory(work, "one") as directory:
        (directory / "file").write_text("half")
        abandoned = work / "two.1.x"
        abandoned.mkdir()
        assert disk.clear_abandoned(work) == [abandoned]
        assert (directory / "file").is_file()
    assert list(work.iterdir()) == []


def test_file_that_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / ".new-file").write_bytes(b"half of something long")
    with disk.replacing(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), disk.replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_writers_of_one_file_do_so_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(number: int) -> None:
        for _ in range(20):
            with disk.replacing(path) as file:
                for _ in range(10):
                    file.write(bytes([number]) * 100)
                    file.flush()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            data = path.read_bytes()
            assert len(data) == 1000
            assert len(set(data)) == 1
    for thread in threads:
        thread.join()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


NOBODY = 65534


def as_nobody(work: Callable[[], object]) -> tuple[int, str]:
    """Do `work` in a process that gave up root for good; returns its exit status and last words.

    A fork, not a new interpreter: nobody may not be allowed to run this one.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        words = "it ended without a word"
        status = 1
        try:
            os.close(reader)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            words, status = str(work()), 0
        except BaseException as error:
            words = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, words.encode()[:4000])
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        words = file.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), words


@pytest.fixture
def for_all() -> Iterator[Path]:
    """A directory that every user may enter: pytest closes its own to others, again and again."""
    directory = Path(tempfile.mkdtemp(prefix="vmlab-u-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def store_for_all(store: ImageStore, directory: Path) -> ImageStore:
    """An empty store in `directory`, with all that it reads in there as well."""
    assert store.settings.debian_keyring is not None
    keyring = directory / "keyring"
    shutil.copyfile(store.settings.debian_keyring, keyring)
    settings = store.settings.model_copy(
        update={"store": directory / "store", "debian_keyring": keyring}
    )
    made = ImageStore(settings=settings, apt=store.apt, environment={})
    made.root.mkdir()
    return made


def readable_by_all(path: Path) -> bool:
    return all(place.stat().st_mode & stat.S_IROTH for place in (path, *path.parents))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.skipif(
    not readable_by_all(Path(vmlab.images.__file__)),
    reason="needs a checkout that every user may read",
)
def test_unprivileged_user_builds_an_image(
    make_store: MakeStore, recipe_file: Path, for_all: Path
) -> None:
    make_store("roots").ensure(recipe_file)  # so that all that is imported later is imported
    store = store_for_all(make_store(), for_all)
    recipe = recipes.read(recipe_file)
    os.chown(store.root, NOBODY, NOBODY)
    status, words = as_nobody(lambda: store.build(recipe).digest)
    assert status == 0, words
    image = store.directory_of(words)
    assert image.stat().st_uid == NOBODY
    assert (image / "initrd").stat().st_uid == NOBODY
    assert store.verify() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_store_that_may_not_be_written_is_an_error_with_a_hint(
    make_store: MakeStore, recipe_file: Path, for_all: Path, mode: int
) -> None:
    make_store("roots").ensure(recipe_file)
    store = store_for_all(make_store(), for_all)
    store.root.chmod(mode)

    def refused() -> str:
        with pytest.raises(StoreError, match="cannot be written") as caught:
            store.ensure("debian-12-amd64-tiny")
        return caught.value.hint or ""

    status, words = as_nobody(refused)
    assert status == 0, words
    assert "VMLAB_IMAGE_STORE" in words


def build_in_process(arguments: list[str]) -> tuple[int, str]:
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=SECONDS)
    return result.returncode, result.stdout


@pytest.mark.timeout(2 * SECONDS)
def test_parallel_builds_of_one_image_build_it_once(
    make_store: MakeStore, recipe_file: Path, behaviour: Any
) -> None:
    store = make_store()
    results: list[tuple[int, str]] = []

    def one() -> None:
        results.append(build_in_process(command_line(store, recipe_file)))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [code for code, _ in results] == [0, 0, 0, 0], results
    assert len({out for _, out in results}) == 1
    fetched = [path for path, _ in behaviour.requests]
    assert len(fetched) == len(set(fetched))
    assert len(store.images()) == 1
    assert list((store.root / "work").iterdir()) == []


def test_directory_with_something_mounted_in_it_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "with space"
    (directory / "mnt").mkdir(parents=True)
    escaped = str(directory / "mnt").replace(" ", "\\040")
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(f"36 35 98:0 / {escaped} rw - ext4 /dev/x rw\n")
    monkeypatch.setattr(
        disk, "Path", lambda path: mountinfo if path == "/proc/self/mountinfo" else Path(path)
    )
    with pytest.raises(StoreError, match="is mounted in it"):
        disk.remove_tree(directory)
    assert (directory / "mnt").is_dir()
    mountinfo.write_text("36 35 98:0 / /elsewhere rw - ext4 /dev/x rw\n")
    disk.remove_tree(directory)
    assert not directory.exists()
