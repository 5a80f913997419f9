"""Archives of machines over HTTP: out, in, made machines of; what is no archive leaves nothing."""

from __future__ import annotations

import base64
import hashlib
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

SPEC = {"memory": "32M"}
WAIT = {"wait": 100}


def digest(content: bytes) -> dict[str, str]:
    told = base64.b64encode(hashlib.sha256(content).digest()).decode()
    return {"Content-Digest": f"sha-256=:{told}:"}


def new_name(noun: str) -> str:
    return f"{noun}-{uuid.uuid4().hex[:8]}"


def done(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    operation: dict[str, Any] = answer.json()
    assert operation["state"] == "succeeded", operation["error"]
    return operation


@pytest.fixture(scope="module")
def machine(url: str) -> str:
    """A machine at rest."""
    made = new_name("m")
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
        done(http.post("/v1/machines", params=WAIT, json={"name": made, "spec": SPEC}))
    return made


@pytest.fixture(scope="module")
def archive(url: str, machine: str) -> bytes:
    """Its archive, as it is downloaded; it is gone from the manager."""
    name = new_name("e")
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
        path = f"/v1/machines/{machine}/actions/export"
        told = done(http.post(path, params=WAIT, json={"path": name}))["result"]
        listed = {each["name"]: each["size"] for each in http.get("/v1/exports").json()["items"]}
        answer = http.get(f"/v1/exports/{name}")
        assert answer.status_code == 200
        assert int(answer.headers["Content-Length"]) == len(answer.content) == listed[name]
        assert hashlib.sha256(answer.content).hexdigest() == told["sha256"]
        assert http.delete(f"/v1/exports/{name}").status_code == 204
        assert http.get(f"/v1/exports/{name}").status_code == 404
        assert http.delete(f"/v1/exports/{name}").status_code == 404
    return answer.content


def uploads(live: Any) -> list[Path]:
    """What is left of what was uploaded."""
    return list((live.manager.settings.directory / "exports").glob(".*"))


def test_an_archive_from_elsewhere_is_made_a_machine(
    live: Any, http: httpx.Client, archive: bytes, machine: str
) -> None:
    name, made = new_name("e"), new_name("m")
    told = f"sha-512=:AAAA:, {digest(archive)['Content-Digest']}"
    answer = http.put(f"/v1/exports/{name}", content=archive, headers={"Content-Digest": told})
    assert answer.status_code == 201
    assert answer.headers["Location"] == f"/v1/exports/{name}"
    assert (answer.json()["name"], answer.json()["size"]) == (name, len(archive))
    wanted = {"kind": "machine.import", "path": name, "name": made}
    done(http.post("/v1/operations", params=WAIT, json=wanted))
    one, other = (http.get(f"/v1/machines/{each}").json() for each in (machine, made))
    assert (other["memory"], other["architecture"]) == (one["memory"], one["architecture"])
    assert http.get(f"/v1/exports/{name}").content == archive
    assert uploads(live) == []


def test_what_is_there_is_never_overwritten(http: httpx.Client, archive: bytes) -> None:
    name = new_name("e")
    for _ in range(2):
        assert http.put(f"/v1/exports/{name}", content=archive).status_code == 201
    answer = http.put(f"/v1/exports/{name}", content=archive + bytes(512))
    assert (answer.status_code, answer.json()["kind"]) == (409, "Conflict")
    assert http.get(f"/v1/exports/{name}").content == archive


def test_what_is_no_archive_leaves_nothing(live: Any, http: httpx.Client, archive: bytes) -> None:
    name = new_name("e")
    for content, headers, status in (
        (b"no archive", {}, 422),
        (b"", {}, 422),
        (archive, digest(b"other"), 400),
        (archive, {"Content-Digest": "sha-256=:nothing:"}, 400),
        (archive, {"Content-Digest": "sha-512=:AAAA:"}, 400),
    ):
        answer = http.put(f"/v1/exports/{name}", content=content, headers=headers)
        assert answer.status_code == status, answer.text
        assert str(live.directory) not in answer.text
    assert http.get(f"/v1/exports/{name}").status_code == 404
    assert uploads(live) == []


def test_a_file_that_a_command_lends_is_nobody_elses(
    live: Any, http: httpx.Client, archive: bytes
) -> None:
    name = f"import-{uuid.uuid4().hex[:16]}"
    assert http.put(f"/v1/exports/{name}", content=archive).status_code == 422
    lent = live.manager.settings.directory / "exports" / name
    lent.write_bytes(archive)
    try:
        assert http.get(f"/v1/exports/{name}").status_code == 404
        assert http.delete(f"/v1/exports/{name}").status_code == 404
        assert name not in http.get("/v1/exports").text
        assert lent.read_bytes() == archive
    finally:
        lent.unlink()
