"""The store: what it builds, what it refuses, and what it survives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmlab.images import ImageStore, ProgressEvent
from vmlab.images.errors import (
    ImageError,
    ImageNotFound,
    MirrorError,
    PackageGone,
    StoreError,
    TamperedFile,
    UntrustedArchive,
)
from vmlab.images.formats import cpio
from vmlab.machine.architecture import Architecture

MakeStore = Callable[..., ImageStore]


def paths_of(initrd: Path | None) -> dict[str, cpio.CpioEntry]:
    assert initrd is not None
    with initrd.open("rb") as file:
        return {entry.path: entry for entry in cpio.read(file, source="initrd")}


def test_tiny_image_holds_kernel_busybox_agent_and_the_modules_with_what_they_need(
    make_store: MakeStore, recipe_file: Path, forms: dict[str, Callable[..., bytes]]
) -> None:
    image = make_store().ensure(recipe_file)
    assert image.architecture is Architecture.RISCV64
    assert image.kernel is not None
    assert image.kernel.read_bytes() == forms["riscv"]()
    assert image.kernel_release == "6.99-test"
    assert image.channels == ("agent", "console")
    tree = paths_of(image.initrd)
    modules = "usr/lib/modules/6.99-test"
    assert tree["usr/bin/busybox"].data == forms["busybox"]()
    assert tree["usr/bin/modprobe"].data == b"busybox"
    assert tree["bin"].data == b"usr/bin"
    assert b"virtio-serial" in tree["usr/lib/vmlab/agent"].data
    assert tree["init"].mode == 0o755
    assert tree["dev/console"].device == (5, 1)
    assert tree["usr/lib/vmlab/modules.load"].data == b"virtio_console\n"
    assert tree["usr/lib/vmlab/modules.late"].data == b"virtio_net\n"
    found = {path.rpartition("/")[2] for path in tree if path.endswith(".ko")}
    assert found == {"virtio_console.ko", "virtio_ring.ko", "virtio_net.ko", "failover.ko",
                     "crc32c.ko"}  # fmt: skip
    assert tree[f"{modules}/kernel/drivers/char/virtio_console.ko"].data[:4] == b"\x7fELF"
    dep = tree[f"{modules}/modules.dep"].data.decode().splitlines()
    assert "kernel/drivers/char/virtio_console.ko: kernel/drivers/virtio/virtio_ring.ko" in dep
    assert b"alias virtio:d00000003v* virtio_console" in tree[f"{modules}/modules.alias"].data
    assert b"softdep virtio_net pre: crc32c" in tree[f"{modules}/modules.softdep"].data
    assert "usr/share/doc/busybox/README" not in tree


def test_same_recipe_and_index_give_the_same_bytes_in_another_store(
    make_store: MakeStore, recipe_file: Path
) -> None:
    one = make_store("one").ensure(recipe_file)
    time.sleep(0.01)
    two = make_store("elsewhere").ensure(recipe_file)
    assert one.digest == two.digest
    assert one.directory != two.directory
    assert (one.directory / "manifest.json").read_bytes() == (
        two.directory / "manifest.json"
    ).read_bytes()
    assert one.initrd is not None
    assert two.initrd is not None
    assert one.initrd.read_bytes() == two.initrd.read_bytes()
    entries = paths_of(one.initrd).values()
    assert {entry.mtime for entry in entries} == {1_700_000_000}


def test_building_again_gives_the_same_bytes(make_store: MakeStore, recipe_file: Path) -> None:
    store = make_store()
    recipe = store.recipe(recipe_file)
    assert recipe is not None
    _, differences = store.build_twice(recipe)
    assert differences == {}


def test_another_file_or_command_line_gives_another_digest(
    make_store: MakeStore, recipe_file: Path
) -> None:
    store = make_store()
    first = store.ensure(recipe_file).digest
    text = recipe_file.read_text()
    recipe_file.write_text(text + '[[files]]\npath = "/etc/motd"\nsource = "motd"\n')
    motd = recipe_file.with_name("motd")
    motd.write_text("one")
    second = store.ensure(recipe_file)
    assert paths_of(second.initrd)["etc/motd"].data == b"one"
    motd.write_text("two")
    third = store.ensure(recipe_file)
    assert len({first, second.digest, third.digest}) == 3


def test_warm_store_asks_nobody(
    make_store: MakeStore, recipe_file: Path, mirror: object, behaviour: object
) -> None:
    requests = behaviour.requests  # the conftest's own class
    store = make_store()
    image = store.ensure(recipe_file)
    before = len(requests)
    assert before > 0
    again = make_store(debian_mirror="http://127.0.0.1:9/closed").ensure(recipe_file)
    assert again == image
    assert len(requests) == before


def test_warm_cache_builds_another_recipe_without_network(
    make_store: MakeStore, recipe_file: Path
) -> None:
    make_store().ensure(recipe_file)
    recipe_file.write_text(recipe_file.read_text().replace("small-tiny", "other-tiny"))
    offline = make_store(debian_mirror="http://127.0.0.1:9/closed")
    assert offline.ensure(recipe_file).name == "other-tiny"


def test_cold_store_without_network_says_so(make_store: MakeStore, recipe_file: Path) -> None:
    store = make_store(debian_mirror="http://127.0.0.1:9/closed")
    with pytest.raises(MirrorError, match="could not be fetched") as caught:
        store.ensure(recipe_file)
    assert "network" in (caught.value.hint or "")


# ---------------------------------------------------------------------- what is refused


def test_tampered_release_is_refused_and_nothing_is_kept(
    make_store: MakeStore, recipe_file: Path, archive: object
) -> None:
    inrelease = archive.root / "dists" / "trixie" / "InRelease"
    data = inrelease.read_bytes()
    inrelease.write_bytes(data.replace(b"Version: 13.0", b"Version: 13.9"))
    store = make_store()
    with pytest.raises(UntrustedArchive, match=r"InRelease has no valid signature"):
        store.ensure(recipe_file)
    assert store.images() == []
    inrelease.write_bytes(data)
    assert store.ensure(recipe_file).name == "small-tiny"


def test_text_around_the_signed_part_is_not_believed(
    make_store: MakeStore, recipe_file: Path, archive: object
) -> None:
    inrelease = archive.root / "dists" / "trixie" / "InRelease"
    data = inrelease.read_bytes()
    for forged in (b"Suite: evil\n\n" + data, data + b"\nSHA256:\n 0 0 evil\n"):
        inrelease.write_bytes(forged)
        store = make_store()
        try:
            release = store.suite("debian", "trixie").snapshot().main
        except ImageError:
            continue
        assert release.suite == "stable"
        assert set(release.files) == {"main/binary-riscv64/Packages.xz"}


def test_release_signed_by_a_strange_key_is_refused(
    make_store: MakeStore, recipe_file: Path, archive: object
) -> None:
    import pysequoia

    archive.key = pysequoia.Tsk.generate("Stranger")
    archive.publish()
    with pytest.raises(UntrustedArchive, match="no valid signature of a known archive key"):
        make_store().ensure(recipe_file)


def test_debians_own_keys_do_not_vouch_for_the_small_archive(
    make_store: MakeStore, recipe_file: Path
) -> None:
    with pytest.raises(UntrustedArchive):
        make_store(debian_keyring=None).ensure(recipe_file)


def test_another_suite_under_this_name_is_refused(
    make_store: MakeStore, recipe_file: Path, archive: object
) -> None:
    dists = archive.root / "dists"
    (dists / "trixie").rename(dists / "bookworm")
    recipe_file.write_text(recipe_file.read_text().replace('"trixie"', '"bookworm"'))
    with pytest.raises(UntrustedArchive, match="not of 'bookworm'"):
        make_store().ensure(recipe_file)


def test_expired_index_is_refused_unless_told_otherwise(
    make_store: MakeStore, recipe_file: Path, archive: object
) -> None:
    archive.valid_until = 1_700_100_000.0
    archive.publish()
    with pytest.raises(UntrustedArchive, match="has expired") as caught:
        make_store().ensure(recipe_file)
    assert "Check-Valid-Until" in (caught.value.hint or "")
    assert make_store(check_valid_until=False).ensure(recipe_file).name == "small-tiny"


def test_index_from_the_future_is_refused(
    make_store: MakeStore, recipe_file: Path, archive: object
) -> None:
    archive.date = time.time() + 3600
    archive.publish()
    with pytest.raises(UntrustedArchive, match="made in the future"):
        make_store().ensure(recipe_file)


def test_older_index_does_not_replace_a_newer_one(
    make_store: MakeStore, recipe_file: Path, archive: object
) -> None:
    store = make_store()
    newer = store.suite("debian", "trixie").snapshot()
    archive.date -= 86_400
    archive.publish()
    assert store.suite("debian", "trixie").snapshot(refresh=True).digest == newer.digest
    archive.date += 2 * 86_400
    archive.publish()
    assert store.suite("debian", "trixie").snapshot(refresh=True).date > newer.date


def test_tampered_package_is_refused_by_name_and_the_right_one_fetched_afterwards(
    make_store: MakeStore, recipe_file: Path, archive: object
) -> None:
    path = archive.path("busybox-static")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    store = make_store()
    with pytest.raises(TamperedFile, match=r"busybox-static_1\.0_riscv64\.deb"):
        store.ensure(recipe_file)
    assert store.images() == []
    assert list((store.root / "work").iterdir()) == []
    path.write_bytes(data)
    assert store.ensure(recipe_file).name == "small-tiny"


def test_tampered_index_is_refused(
    make_store: MakeStore, recipe_file: Path, archive: object
) -> None:
    for path in (archive.root / "dists").rglob("*"):
        if path.is_file() and path.name != "InRelease":
            data = path.read_bytes()
            path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    with pytest.raises(TamperedFile, match=r"Packages\.xz"):
        make_store().ensure(recipe_file)


def test_package_of_another_size_is_refused(
    make_store: MakeStore, recipe_file: Path, archive: object
) -> None:
    path = archive.path("busybox-static")
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(MirrorError, match="the index promises"):
        make_store().ensure(recipe_file)


@pytest.mark.parametrize("role", ["kernel", "initrd"])
def test_changed_file_in_the_store_is_named_and_built_again(
    make_store: MakeStore, recipe_file: Path, role: str
) -> None:
    store = make_store()
    image = store.ensure(recipe_file)
    path = image.directory / role
    good = path.read_bytes()
    times = path.stat()
    path.chmod(0o644)
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a clever intruder would
    told: list[ProgressEvent] = []
    again = make_store().ensure(recipe_file, progress=told.append)
    assert path.read_bytes() == good
    assert again == image
    assert any(str(path) in event.step and "again" in event.step for event in told)
    assert store.verify() == []


def test_verify_reads_every_byte_and_names_what_is_wrong(
    make_store: MakeStore, recipe_file: Path
) -> None:
    store = make_store()
    image = store.ensure(recipe_file)
    assert store.verify() == []
    for name, data, what in (
        ("kernel", b"short", "has 5 bytes instead of"),
        ("initrd", None, "is missing"),
    ):
        path = image.directory / name
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        problem = next(found for found in store.verify(image.digest) if found.role == name)
        assert what in problem.what
        assert str(path) in problem.what


def test_missing_file_and_broken_manifest_are_built_again(
    make_store: MakeStore, recipe_file: Path
) -> None:
    store = make_store()
    image = store.ensure(recipe_file)
    (image.directory / "initrd").unlink()
    assert store.ensure(recipe_file) == image
    (image.directory / "manifest.json").write_text("{")
    assert store.ensure(recipe_file) == image
    assert image.initrd is not None
    assert image.initrd.is_file()


def test_corrupt_cached_package_is_fetched_again(
    make_store: MakeStore, recipe_file: Path, archive: object
) -> None:
    store = make_store()
    store.ensure(recipe_file)
    for path in (store.root / "cache" / "sha256").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    store.remove("small-tiny")
    assert store.ensure(recipe_file).name == "small-tiny"


def test_changed_snapshot_in_the_store_is_not_used(
    make_store: MakeStore, recipe_file: Path
) -> None:
    store = make_store()
    store.ensure(recipe_file)
    (snapshot,) = (store.root / "index" / "debian-trixie").glob("*.InRelease")
    snapshot.write_bytes(snapshot.read_bytes().replace(b"13.0", b"13.1"))
    store.remove("small-tiny")
    assert store.ensure(recipe_file).source["version"] == "13.0"


# ---------------------------------------------------------------------- mirrors that fail


def test_mirror_that_dies_in_the_middle_is_resumed_where_it_died(
    make_store: MakeStore, recipe_file: Path, behaviour: object
) -> None:
    behaviour.cut["busybox-static_1.0_riscv64.deb"] = [100, 150]
    make_store().ensure(recipe_file)
    ranges = [
        wanted
        for path, wanted in behaviour.requests
        if path.endswith("busybox-static_1.0_riscv64.deb")
    ]
    assert ranges == [None, "bytes=100-", "bytes=250-"]


def test_mirror_without_ranges_that_dies_is_survived_too(
    make_store: MakeStore, recipe_file: Path, behaviour: object
) -> None:
    behaviour.ranges = False
    behaviour.cut["busybox-static_1.0_riscv64.deb"] = [100, 250]
    assert make_store().ensure(recipe_file).name == "small-tiny"


def test_mirror_that_dies_for_good_leaves_a_download_that_the_next_run_resumes(
    make_store: MakeStore, recipe_file: Path, behaviour: object
) -> None:
    name = "busybox-static_1.0_riscv64.deb"
    behaviour.cut[name] = [200] + [0] * 10
    with pytest.raises(MirrorError, match=r"busybox-static.*the connection ended") as caught:
        make_store().ensure(recipe_file)
    assert "goes on where it stopped" in (caught.value.hint or "")
    behaviour.cut.clear()
    behaviour.requests.clear()
    make_store().ensure(recipe_file)
    assert (f"/pool/{name}", "bytes=200-") in behaviour.requests


def test_wrong_bytes_from_an_earlier_download_are_replaced(
    make_store: MakeStore, recipe_file: Path, behaviour: object
) -> None:
    name = "busybox-static_1.0_riscv64.deb"
    behaviour.cut[name] = [200] + [0] * 10
    store = make_store()
    with pytest.raises(MirrorError):
        store.ensure(recipe_file)
    (partial,) = (store.root / "cache" / "partial").iterdir()
    partial.write_bytes(b"x" * 200)
    behaviour.cut.clear()
    assert store.ensure(recipe_file).name == "small-tiny"


def test_overloaded_mirror_is_asked_again(
    make_store: MakeStore, recipe_file: Path, behaviour: object
) -> None:
    behaviour.replies["InRelease"] = [503, 503]
    assert make_store().ensure(recipe_file).name == "small-tiny"


def test_mirror_without_the_suite_says_so(make_store: MakeStore, recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace('"trixie"', '"forky"'))
    with pytest.raises(MirrorError, match="has no suite 'forky'") as caught:
        make_store().ensure(recipe_file)
    assert "setting" in (caught.value.hint or "")


def test_silent_mirror_ends_in_an_error_not_in_a_hang(
    make_store: MakeStore, recipe_file: Path, behaviour: object
) -> None:
    behaviour.silent.add("InRelease")
    with pytest.raises(MirrorError, match="silent for too long"):
        make_store(timeout_seconds=0.2).ensure(recipe_file)


def test_mirror_without_by_hash_is_read(
    make_store: MakeStore, recipe_file: Path, archive: object, behaviour: object
) -> None:
    make_store("one").ensure(recipe_file)
    assert any("by-hash" in path for path, _ in behaviour.requests)
    archive.by_hash = False
    archive.publish()
    behaviour.requests.clear()
    make_store("two").ensure(recipe_file)
    asked = behaviour.requests
    assert not any("by-hash" in path for path, _ in asked)


def test_directory_can_be_the_mirror(
    make_store: MakeStore, recipe_file: Path, archive: object
) -> None:
    url = archive.root.as_uri()
    assert make_store(debian_mirror=url).ensure(recipe_file).name == "small-tiny"


def test_package_that_a_point_release_dropped_renews_the_index(
    make_store: MakeStore, recipe_file: Path, archive: object
) -> None:
    store = make_store()
    old = store.suite("debian", "trixie").snapshot()
    archive.path("busybox-static").unlink()
    busybox = archive.packages.pop("busybox-static")
    control, data = busybox
    archive.packages["busybox-static"] = (
        control.replace("Version: 1.0", "Version: 1.1"), data + b"\n" * (len(data) % 2),
    )  # fmt: skip
    archive.date += 86_400
    store.suite("debian", "trixie").index(old, components=["main"], architecture="riscv64")
    with pytest.raises(PackageGone):
        store.ensure(recipe_file, index=old.digest)
    archive.publish()
    archive.path("busybox-static").write_bytes(data)
    image = store.ensure(recipe_file, refresh=True)
    assert image.source["packages"]["busybox-static"] == "1.1"


def test_pin_keeps_the_index_although_there_is_a_newer_one(
    make_store: MakeStore, recipe_file: Path, archive: object
) -> None:
    store = make_store()
    first = store.ensure(recipe_file)
    archive.date += 86_400
    archive.publish()
    newer = store.ensure(recipe_file, refresh=True)
    assert newer.digest != first.digest
    assert store.ensure(recipe_file).digest == newer.digest
    pinned = make_store(pins={"trixie": first.source["index"]})
    assert pinned.ensure(recipe_file).digest == first.digest
    assert store.ensure(recipe_file, index=str(first.source["index"])).digest == first.digest


# ---------------------------------------------------------------------- keeping house


def test_list_find_and_remove(make_store: MakeStore, recipe_file: Path) -> None:
    store = make_store()
    assert store.find(recipe_file) is None
    image = store.ensure(recipe_file)
    assert store.images() == [image]
    assert store.find(recipe_file) == image
    assert store.ensure(image.digest[:10]) == image
    assert store.remove("small-tiny") == [image]
    assert store.images() == []
    with pytest.raises(ImageNotFound, match="no image or recipe 'small-tiny'"):
        store.remove("small-tiny")


def test_unknown_image_suggests_one(make_store: MakeStore) -> None:
    with pytest.raises(ImageNotFound) as caught:
        make_store().ensure("debian-13-riscv64-tyni")
    assert "debian-13-riscv64-tiny" in (caught.value.hint or "")


def test_held_image_is_neither_removed_nor_pruned(make_store: MakeStore, recipe_file: Path) -> None:
    store = make_store()
    image = store.ensure(recipe_file)
    with image.hold():
        with pytest.raises(StoreError, match="in use"):
            store.remove("small-tiny")
        store.prune(0)
        assert store.images() == [image]
    store.prune(0)
    assert store.images() == []


def test_size_limit_does_not_take_what_is_held_however_old(
    make_store: MakeStore, recipe_file: Path
) -> None:
    store = make_store(limit=1)
    old = store.ensure(recipe_file)
    recipe_file.write_text(recipe_file.read_text().replace("small-tiny", "young-tiny"))
    with old.hold():
        os.utime(old.directory / "manifest.json", (1, 1))
        store.ensure(recipe_file)
        assert {image.name for image in store.images()} == {"small-tiny", "young-tiny"}
    os.utime(old.directory / "manifest.json", (1, 1))
    recipe_file.write_text(recipe_file.read_text().replace("young-tiny", "new-tiny"))
    store.ensure(recipe_file)
    assert {image.name for image in store.images()} == {"young-tiny", "new-tiny"}


LOCKING_LIKE_QEMU = """
import fcntl, struct, sys
file = open(sys.argv[1], "rb")
fcntl.fcntl(file, 37, struct.pack("hh4xqqi4x", fcntl.F_RDLCK, 0, 100, 1, 0))  # F_OFD_SETLK
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, for its locks")
def test_image_whose_files_a_program_has_locked_stays_although_nobody_holds_it(
    make_store: MakeStore, recipe_file: Path
) -> None:
    store = make_store()
    image = store.ensure(recipe_file)
    with subprocess.Popen(
        [sys.executable, "-c", LOCKING_LIKE_QEMU, str(image.initrd)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(StoreError, match="in use"):
            store.remove("small-tiny")
        assert store.prune(0).images == []
        process.communicate()
    assert store.prune(0).images == [image.digest]


def test_image_that_was_removed_meanwhile_cannot_be_held(
    make_store: MakeStore, recipe_file: Path
) -> None:
    store = make_store()
    image = store.ensure(recipe_file)
    store.remove("small-tiny")
    with pytest.raises(StoreError, match="has just been") as caught, image.hold():
        pytest.fail("it is gone")
    assert "again" in (caught.value.hint or "")


def test_image_of_a_process_that_died_is_held_no_more(
    make_store: MakeStore, recipe_file: Path
) -> None:
    store = make_store()
    image = store.ensure(recipe_file)
    script = (
        "import sys; from pathlib import Path; from vmlab.images.image import read\n"
        "with read(Path(sys.argv[1])).hold():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(image.directory)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert store.prune(0).images == []
        process.kill()
        process.communicate()
    assert store.prune(0).images == [image.digest]


def test_prune_takes_what_was_used_longest_ago_and_keeps_imports(
    make_store: MakeStore, recipe_file: Path, tmp_path: Path, forms: dict[str, Callable[..., bytes]]
) -> None:
    from vmlab.images.importing import Parts, import_image

    store = make_store()
    kernel = tmp_path / "Image"
    kernel.write_bytes(forms["riscv"]())
    imported = import_image(store, "mine", Parts(kernel=kernel))
    old = store.ensure(recipe_file)
    recipe_file.write_text(recipe_file.read_text().replace("small-tiny", "young-tiny"))
    young = store.ensure(recipe_file)
    for image, age in ((imported, 9000), (old, 7000), (young, 5000)):
        stamp = time.time() - age
        os.utime(image.directory / "manifest.json", (stamp, stamp))
    for path in (store.root / "cache" / "sha256").rglob("*"):
        os.utime(path, (time.time() - 100, time.time() - 100))
    keep = sum(
        file.stat().st_blocks * 512
        for image in (imported, young)
        for file in image.directory.iterdir()
    )
    freed = store.prune(keep)
    assert freed.files > 0
    assert freed.images == [old.digest]
    assert {image.name for image in store.images()} == {"mine", "young-tiny"}
    assert store.prune(everything=True).images == [young.digest]
    assert [image.name for image in store.images()] == ["mine"]


def test_store_larger_than_its_limit_prunes_itself_but_not_what_is_fresh(
    make_store: MakeStore, recipe_file: Path
) -> None:
    store = make_store(limit=1)
    image = store.ensure(recipe_file)
    assert store.images() == [image]


def test_progress_tells_steps_with_sizes(make_store: MakeStore, recipe_file: Path) -> None:
    told: list[ProgressEvent] = []
    make_store().ensure(recipe_file, progress=told.append)
    fetching = [event for event in told if event.step.startswith("fetching busybox-static")]
    assert fetching[-1].finished
    assert fetching[-1].done == fetching[-1].total
    assert (fetching[-1].total or 0) > 0
    unfinished = {event.step for event in told} - {event.step for event in told if event.finished}
    assert unfinished == set()


def test_manifest_tells_where_everything_came_from(
    make_store: MakeStore, recipe_file: Path
) -> None:
    image = make_store().ensure(recipe_file)
    data = json.loads((image.directory / "manifest.json").read_text())
    assert data["source"]["suite"] == "trixie"
    assert data["source"]["index_date"] == 1_700_000_000
    assert data["source"]["packages"] == {"busybox-static": "1.0", "linux-image-6.99-test": "1.0"}
    assert set(data["files"]) == {"kernel", "initrd"}
