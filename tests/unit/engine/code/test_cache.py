"""Objects are made once, and again when they are broken."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from vmlab.engine.code import cache
from vmlab.engine.code.cache import ObjectCache


class Maker:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return b"object %d" % self.calls


def test_an_object_is_made_once(tmp_path: Path) -> None:
    made = Maker()
    assert ObjectCache(tmp_path).get("a", made) == b"object 1"
    assert ObjectCache(tmp_path).get("a", made) == b"object 1"
    assert ObjectCache(tmp_path).get("b", made) == b"object 2"


@pytest.mark.parametrize("damage", ["", "short", "flipped"])
def test_a_broken_object_is_made_anew(tmp_path: Path, damage: str) -> None:
    made, objects = Maker(), ObjectCache(tmp_path)
    objects.get("a", made)
    path = objects.path("a")
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    path.write_bytes({"": b"", "short": whole[:-1], "flipped": flipped}[damage])
    assert objects.get("a", made) == b"object 2"
    assert objects.get("a", made) == b"object 2"


def test_other_sources_or_another_processor_are_another_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = ObjectCache(tmp_path)
    before = objects.path("a")
    monkeypatch.setattr(cache, "source_digest", lambda: "another")
    assert objects.path("a") != before


def test_many_at_once_make_it_once(tmp_path: Path) -> None:
    made, found = Maker(), []
    start = threading.Barrier(6)

    def get() -> None:
        start.wait()
        found.append(ObjectCache(tmp_path).get("a", made))

    threads = [threading.Thread(target=get) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"object 1"] * 6
    assert made.calls == 1


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        ObjectCache(tmp_path).get("a", fail)
    assert [path.suffix for path in tmp_path.iterdir()] in ([".lock"], [])
    assert ObjectCache(tmp_path).get("a", Maker()) == b"object 1"


def test_where_nothing_can_be_kept_it_is_made_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, objects = Maker(), ObjectCache(tmp_path / "file" / "folder")
    (tmp_path / "file").touch()
    assert objects.get("a", made) == b"object 1"
    assert objects.get("a", made) == b"object 2"

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    assert ObjectCache(tmp_path / "there").get("a", made) == b"object 3"
