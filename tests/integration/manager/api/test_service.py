"""The service over the wire: changes, versions, keys, pages, events, VMAN's routes."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect, unix_connect

SPEC = {"memory": "64M"}
WAIT = {"wait": 100}
"""Less than a client's own patience."""
OPEN = 120.0
"""Seconds until a WebSocket is open."""


def name() -> str:
    return f"m-{uuid.uuid4().hex[:8]}"


def done(answer: httpx.Response) -> dict[str, Any]:
    """The operation that an answer tells of, which has to have succeeded."""
    assert answer.status_code == 200, answer.text
    operation = answer.json()
    assert operation["state"] == "succeeded", operation
    return dict(operation)


@pytest.fixture
def machine(http: httpx.Client) -> Iterator[str]:
    """A machine that runs."""
    made = name()
    done(http.post("/v1/machines", params=WAIT, json={"name": made, "spec": SPEC, "start": True}))
    yield made
    http.delete(f"/v1/machines/{made}", params={"force": True, **WAIT})


# ------------------------------------------------------------------- changes


def test_a_change_is_an_operation_that_can_be_followed(http: httpx.Client) -> None:
    made = name()
    answer = http.post("/v1/machines", json={"name": made, "spec": SPEC})
    assert answer.status_code == 202
    where = answer.headers["Location"]
    assert where == f"/v1/operations/{answer.json()['id']}"
    ended = http.get(where, params=WAIT).json()
    assert (ended["state"], ended["target_name"]) == ("succeeded", made)
    assert {step["state"] for step in ended["steps"]} <= {"done", "skipped"}
    assert ended["steps"]
    listed = http.get("/v1/operations", params={"target": made, "kind": "machine.*"}).json()
    assert [each["id"] for each in listed["items"]] == [ended["id"]]
    for action, state in (("start", "running"), ("pause", "paused"), ("resume", "running")):
        done(http.post(f"/v1/machines/{made}/actions/{action}", params=WAIT))
        assert http.get(f"/v1/machines/{made}").json()["state"] == state
    done(http.post(f"/v1/machines/{made}/actions/stop", params=WAIT, json={"graceful": False}))
    done(http.delete(f"/v1/machines/{made}", params=WAIT))
    assert http.get(f"/v1/machines/{made}").status_code == 404


def test_any_change_can_be_asked_for_in_one_place(http: httpx.Client) -> None:
    made = name()
    wanted = {"kind": "machine.create", "name": made, "spec": SPEC}
    done(http.post("/v1/operations", params=WAIT, json=wanted))
    done(http.post("/v1/operations", params=WAIT, json={"kind": "machine.delete", "machine": made}))


def test_a_dry_run_says_what_would_be_done_and_does_nothing(http: httpx.Client) -> None:
    made = name()
    answer = http.post(
        "/v1/machines", json={"name": made, "spec": SPEC}, headers={"Vmlab-Dry-Run": "true"}
    )
    assert answer.status_code == 200
    told = answer.json()
    assert told["dry_run"]
    assert {step["state"] for step in told["steps"]} == {"planned"}
    assert http.get(f"/v1/machines/{made}").status_code == 404


def test_the_same_idempotency_key_is_the_same_operation(http: httpx.Client) -> None:
    key = {"Idempotency-Key": uuid.uuid4().hex}
    wanted = {"name": name(), "spec": SPEC}
    first = http.post("/v1/machines", json=wanted, headers=key)
    again = http.post("/v1/machines", json=wanted, headers=key)
    assert first.json()["id"] == again.json()["id"]
    other = http.post("/v1/machines", json={**wanted, "name": name()}, headers=key)
    assert (other.status_code, other.json()["kind"]) == (409, "Conflict")


@pytest.mark.parametrize(
    ("deadline", "why"),
    [("2027-01-01T00:00:00", "zone"), ("0001-01-01T00:00:00+23:59", "years 1 to 9999")],
    ids=["no-zone", "no-year"],
)
def test_a_deadline_is_a_time_of_a_calendar(
    http: httpx.Client, machine: str, deadline: str, why: str
) -> None:
    path = f"/v1/machines/{machine}/actions/pause"
    answer = http.post(path, params={"deadline": deadline})
    assert answer.status_code == 422
    assert why in answer.text
    assert http.get(f"/v1/machines/{machine}").json()["state"] == "running"


def test_a_change_of_another_version_is_refused(http: httpx.Client, machine: str) -> None:
    shown = http.get(f"/v1/machines/{machine}")
    version = shown.headers["ETag"]
    assert version == f'"{shown.json()["version"]}"'
    path = f"/v1/machines/{machine}"
    change = {"params": WAIT, "json": {"labels": {"a": "1"}}}
    done(http.patch(path, headers={"If-Match": version}, **change))
    late = http.patch(path, headers={"If-Match": version}, **change)
    assert (late.status_code, late.json()["kind"]) == (412, "PreconditionFailed")
    assert late.json()["hint"] == "read it again, and decide again"
    done(http.patch(path, headers={"If-Match": "*"}, **change))
    weak = http.patch(path, headers={"If-Match": 'W/"1"'}, **change)
    assert weak.status_code == 400


def test_what_contradicts_what_is_there_is_409(http: httpx.Client, machine: str) -> None:
    for answer, kind in (
        (http.post("/v1/machines", json={"name": machine, "spec": SPEC}), "Conflict"),
        (http.post(f"/v1/machines/{machine}/actions/resume"), "InvalidState"),
        (http.delete(f"/v1/machines/{machine}"), "InvalidState"),
    ):
        assert (answer.status_code, answer.json()["kind"]) == (409, kind), answer.text
        assert answer.headers["Content-Type"] == "application/problem+json"


def test_a_cancelled_operation_that_has_ended_stays_as_it_ended(
    http: httpx.Client, machine: str
) -> None:
    ended = done(http.post(f"/v1/machines/{machine}/actions/pause", params=WAIT))
    answer = http.post(f"/v1/operations/{ended['id']}/cancel")
    assert (answer.status_code, answer.json()["kind"]) == (409, "Conflict")


# ------------------------------------------------------------------- errors


def test_every_field_that_is_wrong_is_named(http: httpx.Client, machine: str) -> None:
    answer = http.post(
        f"/v1/machines/{machine}/actions/resize",
        params={"wait": -1},
        json={"vcpus": "2", "memory": "1Q", "vcpu": 1},
    )
    assert answer.status_code == 422
    problems = {each["field"]: each["expected"] for each in answer.json()["problems"]}
    assert problems.keys() == {"wait", "vcpus", "memory", "vcpu"}
    assert problems["vcpus"] == "a whole number"
    assert problems["vcpu"] == "no such field; did you mean 'vcpus'?"


def test_an_unknown_kind_of_change_is_told_the_near_one(http: httpx.Client) -> None:
    answer = http.post("/v1/operations", json={"kind": "machine.strat", "machine": "a"})
    assert answer.status_code == 422
    (problem,) = answer.json()["problems"]
    assert problem["field"] == "kind"
    assert problem["expected"].endswith("did you mean 'machine.start'?")


def test_what_is_no_request_is_400_or_405_or_413(http: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    broken = http.post("/v1/operations", content="{", headers=headers)
    assert broken.status_code == 400
    assert "is not JSON" in broken.json()["detail"]
    unsaid = http.post("/v1/operations", content="{}")
    assert unsaid.status_code == 400
    assert "Content-Type" in unsaid.json()["hint"]
    assert http.get("/v1/machines/a%00b").status_code == 400
    assert http.get("/v1/machines", params={"name": "a\0"}).status_code == 400
    method = http.put("/v1/machines")
    assert (method.status_code, method.headers["Allow"]) == (405, "GET, POST")
    large = http.post("/v1/operations", content=b" " * (3 << 20), headers=headers)
    assert large.status_code == 413

    def untold() -> Iterator[bytes]:
        for _ in range(48):
            yield b" " * (1 << 16)

    assert http.post("/v1/operations", content=untold(), headers=headers).status_code == 413


def test_a_request_keeps_the_id_that_it_came_with(http: httpx.Client) -> None:
    mine = http.get("/v1/machines/nobody", headers={"X-Request-Id": "mine-1"})
    assert mine.headers["X-Request-Id"] == mine.json()["request_id"] == "mine-1"
    other = http.get("/v1/machines", headers={"X-Request-Id": "no good\x7f"})
    assert len(other.headers["X-Request-Id"]) == 32


def test_the_request_of_an_operation_is_known(http: httpx.Client) -> None:
    headers = {"X-Request-Id": uuid.uuid4().hex}
    told = http.post("/v1/machines", json={"name": name(), "spec": SPEC}, headers=headers).json()
    assert told["request_id"] == headers["X-Request-Id"]


# ------------------------------------------------------------------- lists


def test_lists_come_in_pages_that_miss_nothing(http: httpx.Client) -> None:
    label = uuid.uuid4().hex[:8]
    names = sorted(f"{label}-{number}" for number in range(5))
    for each in names:
        done(
            http.post(
                "/v1/machines",
                params=WAIT,
                json={"name": each, "spec": SPEC, "labels": {"of": label}},
            )
        )
    found: list[str] = []
    query: dict[str, Any] = {"label": f"of={label}", "limit": 2}
    while True:
        page = http.get("/v1/machines", params=query).json()
        found += [each["name"] for each in page["items"]]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]
    assert found == names
    counted = http.get("/v1/machines", params={"name": f"{label}*", "count": True, "limit": 1})
    assert counted.json()["total"] == 5
    assert http.get("/v1/machines", params={"cursor": "!"}).status_code == 422
    created = http.get("/v1/machines", params={"state": ["created", "failed"], "name": names[0]})
    assert len(created.json()["items"]) == 1


# ------------------------------------------------------------------- events


@contextmanager
def stream(url: str, **options: Any) -> Iterator[Iterator[dict[str, str]]]:
    """The messages of an event stream."""
    headers = {"Accept": "text/event-stream", **options.pop("headers", {})}
    with (
        httpx.Client(base_url=url, timeout=120, trust_env=False) as client,
        client.stream("GET", "/v1/events", headers=headers, **options) as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert next(lines).startswith(":")

        def messages() -> Iterator[dict[str, str]]:
            message: dict[str, str] = {}
            for line in lines:
                if not line:
                    if "data" in message:
                        yield message
                    message = {}
                elif line and not line.startswith(":"):
                    field, _, value = line.partition(": ")
                    message[field] = value

        yield messages()


def test_events_are_told_as_they_happen_and_again_after_a_reconnection(
    http: httpx.Client, url: str
) -> None:
    made = name()
    with stream(url, params={"subject": made}) as messages:
        done(http.post("/v1/machines", params=WAIT, json={"name": made, "spec": SPEC}))
        first = next(messages)
        event = json.loads(first["data"])
        assert first["id"] == str(event["id"])
        assert first["event"] == event["kind"]
        assert event["name"] == made
    done(http.post(f"/v1/machines/{made}/actions/start", params=WAIT))
    with stream(url, headers={"Last-Event-ID": first["id"]}) as messages:
        number = int(first["id"])
        kinds = []
        while "machine.state" not in kinds:
            message = next(messages)
            number += 1
            assert int(message["id"]) == number, "there is a gap"
            kinds.append(message["event"])
    past = http.get("/v1/events", params={"after": first["id"], "limit": 1000, "subject": made})
    assert [each["kind"] for each in past.json()["items"]].count("machine.state") >= 1


def test_who_was_away_for_too_long_is_told_to_read_anew(living_with: Any) -> None:
    # More than one machine tells of itself, and less than eight do.
    with living_with(events_kept=40) as live:
        url = live.serve(authenticate=False)
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
            for _ in range(8):
                done(http.post("/v1/machines", params=WAIT, json={"name": name(), "spec": SPEC}))
            with stream(url, headers={"Last-Event-ID": "1"}) as messages:
                message = next(messages)
                assert message["event"] == "resync"
                said = json.loads(message["data"])
                assert 1 < said["oldest"] <= said["latest"]
                assert int(message["id"]) == said["latest"]
                done(http.post("/v1/machines", params=WAIT, json={"name": name(), "spec": SPEC}))
                following = next(messages)
                assert following["event"] != "resync"
                assert int(following["id"]) == said["latest"] + 1


def test_streams_and_waiting_end_with_the_service(living_with: Any) -> None:
    with living_with() as live:
        url = live.serve(authenticate=False)
        ended = threading.Event()
        with stream(url) as messages:
            reader = threading.Thread(target=lambda: (list(messages), ended.set()))
            reader.start()
            live.loop.call_soon_threadsafe(live.app().state.service.closing.set)
            assert ended.wait(120)
            reader.join()


def test_an_event_id_that_is_none_is_refused(http: httpx.Client) -> None:
    answer = http.get(
        "/v1/events", headers={"Accept": "text/event-stream", "Last-Event-ID": "newest"}
    )
    assert answer.status_code == 422


# ------------------------------------------------------------------- what a machine says


def test_a_console_is_read_and_typed_on(http: httpx.Client, url: str, machine: str) -> None:
    log = http.get(f"/v1/machines/{machine}/console")
    assert log.status_code == 200
    assert log.content
    tail = http.get(f"/v1/machines/{machine}/console", params={"tail": 5})
    assert tail.content == log.content[-5:] or len(tail.content) == 5
    where = f"ws{url.removeprefix('http')}/v1/machines/{machine}/console?history=20"
    with connect(where, proxy=None, open_timeout=OPEN, ping_interval=None) as console:
        assert console.recv(timeout=120)
        console.send(b"hello\n")
        done(http.post(f"/v1/machines/{machine}/actions/restart", params=WAIT))
        assert console.recv(timeout=120)


def test_what_is_not_there_is_told_before_a_websocket_is_accepted(url: str, machine: str) -> None:
    base = f"ws{url.removeprefix('http')}/v1/machines"
    for path, status in (
        ("nobody/console", 404),
        (f"{machine}/console?name=none", 404),
        ("nobody/exec", 404),
        (f"{machine}/console?history=x", 403),
    ):
        with pytest.raises(InvalidStatus) as refused:
            connect(f"{base}/{path}", proxy=None, open_timeout=OPEN)
        assert refused.value.response.status_code == status, path


def test_metrics_of_a_machine_and_of_the_manager(http: httpx.Client, machine: str) -> None:
    used = http.get(f"/v1/machines/{machine}/metrics").json()
    assert used["memory"]["total_bytes"] == 64 << 20
    done(http.post(f"/v1/machines/{machine}/actions/stop", params=WAIT))
    assert http.get(f"/v1/machines/{machine}/metrics").status_code == 409
    text = http.get("/metrics").text
    assert 'vmlab_machines{host="simulated",state="stopped"}' in text
    assert 'vmlab_http_requests_total{method="GET",route="/v1/machines/{machine}/metrics"' in text
    assert "vmlab_operations{" in text


def test_a_unix_socket_answers_too(live: Any) -> None:
    path = live.serve(unix=True, authenticate=False)
    transport = httpx.HTTPTransport(uds=path)
    with httpx.Client(transport=transport, base_url="http://manager", timeout=120) as client:
        assert client.get("/v1/machines").status_code == 200
    where = "ws://manager/v1/machines/x/console"
    with pytest.raises(InvalidStatus), unix_connect(path, where, open_timeout=OPEN):
        raise AssertionError("there is no such machine")


# ------------------------------------------------------------------- VMAN


def test_vmans_clients_find_what_they_know(http: httpx.Client) -> None:
    size = name()
    made = http.post("/templates", json={"name": size, "cpu_count": 1, "ram_amount": 1})
    assert (made.status_code, made.json()) == (
        201,
        {"name": size, "cpu_count": 1, "ram_amount": 1},
    )
    assert http.post("/templates", json=made.json()).status_code == 400
    assert made.json() in http.get("/templates").json()
    assert http.post("/vms", json={"template_name": "none"}).status_code == 400
    vm = name()
    created = http.post("/vms", json={"template_name": size, "name": vm})
    assert created.status_code == 201
    assert created.json() == {
        "id": vm,
        "vm_template": made.json(),
        "state": "stopped",
        "local_ip": None,
    }
    assert http.post("/vms", json={"template_name": size, "name": vm}).status_code == 400
    unnamed = http.post("/vms", json={"template_name": size}).json()["id"]
    assert str(uuid.UUID(unnamed)) == unnamed
    for action, status, state in (
        ("start", "started", "running"),
        ("restart", "restarted", "running"),
        ("stop", "stopped", "stopped"),
        ("restart", "restarted", "running"),
    ):
        answer = http.post(f"/vms/{vm}/actions/{action}")
        assert (answer.status_code, answer.json()) == (202, {"status": status})
        assert http.get(f"/vms/{vm}").json()["state"] == state
    assert http.post(f"/vms/{vm}/actions/start").status_code == 400
    running = [each["id"] for each in http.get("/vms", params={"state": "running"}).json()]
    assert vm in running
    assert unnamed not in running
    assert http.get("/vms", params={"state": "lost"}).status_code == 422
    console = http.get(f"/vms/{vm}/console").json()
    assert console["vm_id"] == vm
    assert console["size"] == len(console["console"]) <= 50 * 1024
    assert http.delete(f"/templates/{size}").status_code == 400
    assert http.delete(f"/vms/{vm}").status_code == 204
    assert http.get(f"/vms/{vm}").status_code == 404
    assert http.delete(f"/vms/{unnamed}").status_code == 204
    assert http.delete(f"/templates/{size}").status_code == 204
    assert http.delete(f"/templates/{size}").status_code == 404


def test_vmans_metadata_is_set_merged_and_cleared(http: httpx.Client, machine: str) -> None:
    path = f"/vms/{machine}/metadata"
    assert set(http.get(path).json().values()) == {machine, None}
    first = http.put(path, json={"hostname": "web", "ssh_keys": "ssh-ed25519 A a\nssh-rsa B b"})
    assert first.status_code == 200
    http.put(path, json={"user_data": "#!/bin/sh\ntrue\n"})
    told = http.get(path).json()
    assert told["hostname"] == "web"
    assert told["ssh_keys"] == "ssh-ed25519 A a\nssh-rsa B b"
    assert told["user_data"] == "#!/bin/sh\ntrue\n"
    assert told["created_at"]
    assert http.delete(path).status_code == 204
    assert http.get(path).json()["hostname"] is None
    assert http.get("/vms/nobody/metadata").status_code == 404


def test_vmans_disks_are_made_attached_detached_and_deleted(
    http: httpx.Client, machine: str
) -> None:
    made = http.post("/disks", json={"size": 1, "mount_point": "/data"})
    assert made.status_code == 201
    disk = made.json()
    assert disk == {"id": disk["id"], "size": 1, "mount_point": "/data", "state": "available"}
    assert disk in http.get("/disks").json()
    path = f"/disks/{disk['id']}"
    attached = http.post(f"{path}/attach", json={"vm_id": machine})
    assert (attached.status_code, attached.json()) == (200, {"status": "attached"}), attached.text
    assert http.get(path).json()["state"] == "attached"
    assert http.get(path).json()["mount_point"] == "/data"
    assert http.post(f"{path}/attach", json={"vm_id": machine}).status_code == 400
    assert http.delete(path).status_code == 400
    detached = http.post(f"{path}/detach")
    assert (detached.status_code, detached.json()) == (200, {"status": "detached"})
    assert http.post(f"{path}/detach").status_code == 400
    assert http.delete(path).status_code == 204
    assert http.get(path).status_code == 404
    assert http.post("/disks", json={"size": 0}).status_code == 422


def test_vmans_services_are_told_of(http: httpx.Client) -> None:
    health = http.get("/health").json()
    assert {"database", "storage", "qemu", "qemu-img", "observer"} <= health["checks"].keys()
    observer = http.get("/observer/status").json()
    assert observer["last_issues_count"] == len(observer["last_issues"])
    assert http.get("/network/config").json() == {"status": "not_configured"}
    described = http.get("/openapi.yaml")
    assert described.headers["Content-Type"].startswith("application/yaml")
    assert "/vms/{vm_id}/actions/start" in json.loads(described.text)["paths"]
