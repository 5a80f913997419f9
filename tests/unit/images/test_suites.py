"""A suite with its pockets: where the newest package comes from, and what is asked of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmlab.images import ImageStore
from vmlab.images.errors import ImageNotFound, MirrorError, TamperedFile, UntrustedArchive

MakeStore = Callable[..., ImageStore]


@pytest.fixture
def pocket(archive: Any, tmp_path: Path) -> Callable[..., Any]:
    """Publishes a pocket of the small archive with a newer busybox."""

    def make(kind: str, version: str, *, root: Path | None = None) -> Any:
        made = type(archive)(
            root or archive.root, archive.key, codename=f"trixie-{kind}",
            suite=f"stable-{kind}", version=version,
        )  # fmt: skip
        made.add_usual()
        made.packages = {"busybox-static": made.packages["busybox-static"]}
        made.publish()
        return made

    return make


def busybox_of(image: Any) -> str:
    return str(image.source["packages"]["busybox-static"])


def test_newest_package_of_suite_updates_and_security_goes_into_the_image(
    make_store: MakeStore, recipe_file: Path, pocket: Callable[..., Any], tmp_path: Path
) -> None:
    plain = make_store("plain").ensure(recipe_file)
    assert (busybox_of(plain), plain.source["suites"]) == ("1.0", ["trixie"])
    pocket("updates", "1.1")
    updated = make_store("updated").ensure(recipe_file)
    assert busybox_of(updated) == "1.1"
    assert updated.source["suites"] == ["trixie", "trixie-updates"]
    pocket("security", "1.2", root=tmp_path / "security")
    secure = {"debian_security_mirror": f"file://{tmp_path / 'security'}"}
    secured = make_store("secured", **secure).ensure(recipe_file)
    assert busybox_of(secured) == "1.2"
    assert secured.source["suites"] == ["trixie", "trixie-updates", "trixie-security"]
    assert len({plain.digest, updated.digest, secured.digest}) == 3
    again = make_store("again", **secure).ensure(recipe_file)
    assert again.digest == secured.digest
    assert make_store("main only", pockets=(), **secure).ensure(recipe_file).digest == plain.digest


def test_suite_without_pockets_has_the_digest_of_its_release_file(
    make_store: MakeStore, behaviour: Any
) -> None:
    snapshot = make_store().suite("debian", "trixie").snapshot()
    assert snapshot.pockets == {}
    assert snapshot.digest == snapshot.main.digest
    asked = [path for path, _ in behaviour.requests]
    assert asked == ["/dists/trixie/InRelease", "/dists/trixie-updates/InRelease"]


def test_snapshot_with_pockets_is_kept_and_can_be_pinned(
    make_store: MakeStore, recipe_file: Path, pocket: Callable[..., Any], behaviour: Any
) -> None:
    updates = pocket("updates", "1.1")
    store = make_store()
    image = store.ensure(recipe_file)
    pinned = store.suite("debian", "trixie").pinned()
    assert pinned == image.source["index"]
    asked = len(behaviour.requests)
    assert store.ensure(recipe_file) == image
    assert store.suite("debian", "trixie").snapshot(refresh=True).digest == pinned
    assert len(behaviour.requests) == asked + 2
    updates.date += 1000
    updates.publish()
    newer = store.suite("debian", "trixie").snapshot(refresh=True)
    assert newer.digest != pinned
    assert newer.date == updates.date
    assert store.suite("debian", "trixie").pinned() == newer.digest
    assert store.ensure(recipe_file, index=pinned) == image


def test_older_index_of_a_pocket_does_not_replace_a_newer_one(
    make_store: MakeStore, pocket: Callable[..., Any]
) -> None:
    updates = pocket("updates", "1.1")
    suite = make_store().suite("debian", "trixie")
    before = suite.snapshot()
    updates.date -= 1000
    updates.publish()
    assert suite.snapshot(refresh=True).digest == before.digest


@pytest.mark.parametrize("suite", ["trixie", "trixie-updates"])
def test_tampered_release_file_of_any_of_them_is_refused(
    make_store: MakeStore, recipe_file: Path, pocket: Callable[..., Any], archive: Any, suite: str
) -> None:
    pocket("updates", "1.1")
    path = archive.root / "dists" / suite / "InRelease"
    path.write_bytes(path.read_bytes().replace(b"Origin: Debian", b"Origin: debian"))
    store = make_store()
    with pytest.raises(UntrustedArchive, match=f"{suite}/InRelease has no valid signature"):
        store.ensure(recipe_file)
    assert store.suite("debian", "trixie").pinned() is None


def test_pocket_passed_off_as_another_is_refused(
    make_store: MakeStore, pocket: Callable[..., Any], archive: Any
) -> None:
    pocket("updates", "1.1")
    main = archive.root / "dists" / "trixie" / "InRelease"
    (archive.root / "dists" / "trixie-updates" / "InRelease").write_bytes(main.read_bytes())
    with pytest.raises(UntrustedArchive, match="not of 'trixie-updates'"):
        make_store().suite("debian", "trixie").snapshot()


def test_mirror_that_fails_for_a_pocket_is_an_error_not_a_smaller_index(
    make_store: MakeStore, pocket: Callable[..., Any], behaviour: Any
) -> None:
    pocket("updates", "1.1")
    behaviour.replies["trixie-updates/InRelease"] = [503] * 10
    store = make_store()
    with pytest.raises(MirrorError, match="trixie-updates/InRelease could not be fetched"):
        store.suite("debian", "trixie").snapshot()
    assert store.suite("debian", "trixie").pinned() is None


def test_security_archive_that_was_asked_for_but_is_nowhere_is_named(
    make_store: MakeStore,
) -> None:
    with pytest.raises(MirrorError) as caught:
        make_store(pockets=("security",)).suite("debian", "trixie").snapshot()
    assert "VMLAB_DEBIAN_SECURITY_MIRROR" in (caught.value.hint or "")


def test_changed_list_of_a_snapshot_is_noticed_and_fetched_again(
    make_store: MakeStore, pocket: Callable[..., Any]
) -> None:
    pocket("updates", "1.1")
    store = make_store()
    digest = store.suite("debian", "trixie").snapshot().digest
    path = store.root / "index" / "debian-trixie" / f"{digest}.snapshot"
    whole = path.read_text()
    path.write_text(whole.splitlines(keepends=True)[0])
    with pytest.raises(TamperedFile, match="was changed since it was written"):
        store.suite("debian", "trixie").snapshot(digest)
    again = store.suite("debian", "trixie").snapshot()
    assert (again.digest, list(again.pockets)) == (digest, ["trixie-updates"])
    assert path.read_text() == whole


def test_snapshot_that_is_not_there_names_those_that_are(
    make_store: MakeStore, pocket: Callable[..., Any]
) -> None:
    pocket("updates", "1.1")
    suite = make_store().suite("debian", "trixie")
    digest = suite.snapshot().digest
    with pytest.raises(ImageNotFound, match="no snapshot 'abc' of trixie") as caught:
        suite.snapshot("abc")
    assert digest in (caught.value.hint or "")


def test_pocket_without_packages_of_the_architecture_is_passed_over(
    make_store: MakeStore, recipe_file: Path, pocket: Callable[..., Any], archive: Any
) -> None:
    import pysequoia

    updates = pocket("updates", "1.1")
    path = archive.root / "dists" / "trixie-updates" / "InRelease"
    text = pysequoia.verify(
        bytes=path.read_bytes(), store=lambda ids: [updates.key.extract_certificate()]
    ).bytes
    assert text is not None
    other = bytes(text).replace(b"binary-riscv64", b"binary-s390x")
    path.write_bytes(
        bytes(pysequoia.sign(updates.key.signer(), other, mode=pysequoia.SignatureMode.CLEAR))
    )
    assert busybox_of(make_store().ensure(recipe_file)) == "1.0"


def test_store_that_knew_no_pockets_goes_on_with_what_it_has(
    make_store: MakeStore, recipe_file: Path, pocket: Callable[..., Any], behaviour: Any
) -> None:
    image = make_store(pockets=()).ensure(recipe_file)
    pocket("updates", "1.1")
    asked = len(behaviour.requests)
    store = make_store()
    assert store.ensure(recipe_file) == image
    assert len(behaviour.requests) == asked
    assert busybox_of(store.ensure(recipe_file, refresh=True)) == "1.1"


def test_pocket_whose_mirror_is_out_of_step_with_its_index_is_left_out_and_that_is_told(
    make_store: MakeStore, recipe_file: Path, pocket: Callable[..., Any], archive: Any
) -> None:
    pocket("updates", "1.1")
    folder = archive.root / "dists" / "trixie-updates" / "main" / "binary-riscv64"
    (hashed,) = (folder / "by-hash" / "SHA256").iterdir()
    hashed.unlink()
    (folder / "Packages.xz").write_bytes(b"yesterday's")
    store = make_store()
    told: list[str] = []
    image = store.ensure(recipe_file, progress=lambda event: told.append(event.step))
    assert (busybox_of(image), image.source["suites"]) == ("1.0", ["trixie"])
    (line,) = [step for step in told if step.startswith("leaving out")]
    assert "leaving out trixie-updates: " in line
    assert "has 11 bytes, but the index promises" in line


def test_index_file_that_went_away_after_the_snapshot_was_taken_renews_the_snapshot(
    make_store: MakeStore, recipe_file: Path, pocket: Callable[..., Any], archive: Any
) -> None:
    pocket("updates", "1.1")
    store = make_store()
    taken = store.suite("debian", "trixie").snapshot()
    assert list(taken.pockets) == ["trixie-updates"]
    folder = archive.root / "dists" / "trixie-updates" / "main" / "binary-riscv64"
    (hashed,) = (folder / "by-hash" / "SHA256").iterdir()
    hashed.unlink()
    (folder / "Packages.xz").unlink()
    image = store.ensure(recipe_file)
    assert image.source["suites"] == ["trixie"]
    assert image.source["index"] != taken.digest
