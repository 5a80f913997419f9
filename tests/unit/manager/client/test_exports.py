"""Archives where there is no room for them, and those that vanish while they are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.unit.manager.client.conftest import Story

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import OperationFailed, ResourceExhausted, ResourceNotFound
from vmlab.manager.api import uploads
from vmlab.manager.api.v1 import exports as routes
from vmlab.manager.client import AsyncClient, copying
from vmlab.manager.client.address import directory_of

Tell = Callable[[Story], None]

FULL = Path("/dev/full")
"""Takes no byte (full(4))."""


@pytest.mark.parametrize("size", [10, 1 << 20], ids=["when-closed", "when-written"])
def test_an_upload_for_which_the_manager_has_no_room(
    tell: Tell, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    fresh = uploads.fresh_parts

    async def full(directory: Path) -> None:
        await fresh(directory)
        (directory / "file").symlink_to(FULL)

    monkeypatch.setattr(uploads, "fresh_parts", full)
    source = tmp_path / "one.tar"
    source.write_bytes(bytes(size))

    async def story(client: AsyncClient) -> None:
        with pytest.raises(ResourceExhausted, match="no room for the upload"):
            await client.exports.upload("one.tar", source)
        assert list((directory_of(home) / "exports").iterdir()) == []

    tell(story)


@pytest.mark.parametrize("size", [10, 1 << 20], ids=["when-closed", "when-written"])
def test_a_download_for_which_there_is_no_room(
    tell: Tell, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    scratch: Any = copying.trees.scratch

    @contextmanager
    def full(target: Path) -> Iterator[Path]:
        with scratch(target) as directory:
            (directory / "archive").symlink_to(FULL)
            yield directory

    monkeypatch.setattr(copying.trees, "scratch", full)

    async def story(client: AsyncClient) -> None:
        exports = directory_of(home) / "exports"
        (exports / "one.tar").write_bytes(bytes(size))
        with pytest.raises(OperationFailed, match=r"here\.tar cannot be written: No space left"):
            await client.exports.download("one.tar", tmp_path / "here.tar")
        assert not (tmp_path / "here.tar").exists()

    tell(story)


def test_an_archive_that_vanishes_is_not_there(
    tell: Tell, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, path_of = routes._document, routes._path_of

    def removed(path: Path) -> Any:
        if path.name == "gone.tar":
            path.unlink()
        return document(path)

    def found_and_removed(here: Any, export: str) -> Path:
        path = path_of(here, export)
        path.unlink()
        return path

    monkeypatch.setattr(routes, "_document", removed)
    monkeypatch.setattr(routes, "_path_of", found_and_removed)

    async def story(client: AsyncClient) -> None:
        exports = directory_of(home) / "exports"
        for name in ("gone.tar", "here.tar"):
            (exports / name).write_bytes(b"archive")
        assert [each.name for each in await client.exports.list()] == ["here.tar"]
        with pytest.raises(ResourceNotFound, match=r"no archive 'here\.tar'"):
            await client.exports.download("here.tar", tmp_path / "here.tar")

    tell(story)
