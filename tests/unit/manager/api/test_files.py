"""Files and trees into a guest and out of it, as tar streams."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from vmlab.manager.api import Limits

Serving = Callable[..., TestClient]
FILES = "/v1/machines/web/files"


def tar(name: str, data: bytes = b"hello") -> bytes:
    """A tar stream of one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_a_file_goes_in_and_comes_out_as_it_was(serving: Serving, tmp_path: Path) -> None:
    target = tmp_path / "in" / "a b"
    data = bytes(range(256)) * 5000
    with serving() as http:
        sent = http.put(FILES, params={"path": str(target)}, content=tar("a b", data))
        assert (sent.status_code, sent.content) == (204, b"")
        assert target.read_bytes() == data
        came = http.get(FILES, params={"path": str(target)})
        assert came.headers["Content-Type"] == "application/x-tar"
        with tarfile.open(fileobj=io.BytesIO(came.content)) as archive:
            (member,) = archive.getmembers()
            file = archive.extractfile(member)
            assert file is not None
            assert (member.name, file.read()) == ("a b", data)


def test_a_long_name_goes_in_too(serving: Serving, tmp_path: Path) -> None:
    target = tmp_path / ("n" * 150)
    with serving() as http:
        sent = http.put(FILES, params={"path": str(target)}, content=tar(target.name))
        assert sent.status_code == 204, sent.text
    assert target.read_bytes() == b"hello"


def test_what_is_not_there_is_404_before_anything_is_sent(serving: Serving, tmp_path: Path) -> None:
    with serving() as http:
        answer = http.get(FILES, params={"path": str(tmp_path / "none")})
    assert (answer.status_code, answer.json()["kind"]) == (404, "ResourceNotFound")


def test_what_the_guest_refuses_is_409_and_nothing_of_it_is_left(
    serving: Serving, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    with serving() as http:
        answer = http.put(FILES, params={"path": str(tmp_path / "here")}, content=tar("here"))
    assert (answer.status_code, answer.json()["kind"]) == (409, "CommandFailed")
    assert list(tmp_path.iterdir()) == [tmp_path / "here"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "a tar stream"),
        (b"no tar", "a tar stream"),
        (b"x" * 2048, "a tar stream"),
        (tar("other"), "a tar stream of 'file', the last name of the path"),
        (tar("../file"), "a tar stream of 'file', the last name of the path"),
    ],
    ids=["empty", "short", "noise", "other", "outside"],
)
def test_what_is_no_such_tar_is_refused(
    serving: Serving, tmp_path: Path, content: bytes, expected: str
) -> None:
    with serving() as http:
        answer = http.put(FILES, params={"path": str(tmp_path / "file")}, content=content)
    assert answer.status_code == 422, answer.text
    assert [each["expected"] for each in answer.json()["problems"]] == [expected]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["relative", "/", "/a/", "/a/../b", ""])
def test_a_path_is_absolute_and_has_a_name(serving: Serving, path: str) -> None:
    with serving() as http:
        for answer in (
            http.get(FILES, params={"path": path}),
            http.put(FILES, params={"path": path}, content=tar("a")),
        ):
            assert answer.status_code == 422, answer.text
            assert [each["field"] for each in answer.json()["problems"]] == ["path"]


def test_too_much_is_refused_told_or_untold(serving: Serving, tmp_path: Path) -> None:
    target = tmp_path / "file"
    with serving(limits=Limits(upload=4096)) as http:
        query = {"path": str(target)}
        told = http.put(FILES, params=query, content=tar("file", b"x" * 8192))
        untold = http.put(FILES, params=query, content=iter([tar("file", b"x" * 8192)[:2048]] * 4))
    assert (told.status_code, untold.status_code) == (413, 413)
    assert list(tmp_path.iterdir()) == []


def test_what_is_too_large_breaks_off(serving: Serving, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (1 << 20))
    with serving(limits=Limits(download=4096)) as http:
        answer = http.get(FILES, params={"path": str(tmp_path / "file")})
    assert answer.status_code == 413


def test_a_machine_that_does_not_run_has_no_files(serving: Serving) -> None:
    with serving("stopped") as http:
        answer = http.get(FILES, params={"path": "/etc/hostname"})
        assert (answer.status_code, answer.json()["actual"]) == (409, "stopped")
        assert http.get("/v1/machines/db/files", params={"path": "/x"}).status_code == 404
