"""The service against a model of it: whatever is asked, both say the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

NAMES = ("a", "b", "c")
DISKS = ("d", "e")
SPEC = {"memory": "64M"}
WAIT = {"wait": 100}
REST = {"created", "stopped"}


@dataclass
class Known:
    """A machine as it has to be."""

    state: str = "created"
    labels: dict[str, str] = field(default_factory=dict)
    snapshots: set[str] = field(default_factory=set)


class Model(RuleBasedStateMachine):
    """What is asked for, and what has to come of it."""

    url: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.http = httpx.Client(base_url=self.url, timeout=120, trust_env=False)
        self.machines: dict[str, Known] = {}
        self.disks: dict[str, str | None] = {}

    def teardown(self) -> None:
        for kind, query in (("machines", {"force": True}), ("disks", {})):
            for item in self.http.get(f"/v1/{kind}").json()["items"]:
                answer = self.http.delete(f"/v1/{kind}/{item['id']}", params={**WAIT, **query})
                assert answer.json()["state"] == "succeeded", answer.text
        self.http.close()

    @initialize()
    def begin(self) -> None:
        assert self.http.get("/v1/machines").json()["items"] == []

    def ask(self, method: str, path: str, status: int, **more: Any) -> dict[str, Any]:
        """An answer of that status; of a change that was taken, that it succeeded."""
        query = {**WAIT, **more.pop("params", {})}
        answer = self.http.request(method, path, params=query, **more)
        assert answer.status_code == status, (method, path, more, answer.status_code, answer.text)
        told: dict[str, Any] = answer.json()
        if status == 200 and method != "GET":
            assert told["state"] == "succeeded", told
        return told

    def expect(self, name: str, allowed: bool) -> int:
        """The status of a change of a machine."""
        if name not in self.machines:
            return 404
        return 200 if allowed else 409

    def state(self, name: str) -> str:
        return self.machines[name].state if name in self.machines else ""

    @rule(name=st.sampled_from(NAMES), start=st.booleans())
    def create(self, name: str, start: bool) -> None:
        status = 409 if name in self.machines else 200
        self.ask("POST", "/v1/machines", status, json={"name": name, "spec": SPEC, "start": start})
        if status == 200:
            self.machines[name] = Known("running" if start else "created")

    @rule(name=st.sampled_from(NAMES))
    def start(self, name: str) -> None:
        status = self.expect(name, self.state(name) in REST)
        self.ask("POST", f"/v1/machines/{name}/actions/start", status)
        if status == 200:
            self.machines[name].state = "running"

    @rule(name=st.sampled_from(NAMES), graceful=st.booleans())
    def stop(self, name: str, graceful: bool) -> None:
        status = self.expect(name, self.state(name) in {"running", "paused"})
        self.ask("POST", f"/v1/machines/{name}/actions/stop", status, json={"graceful": graceful})
        if status == 200:
            self.machines[name].state = "stopped"

    @rule(name=st.sampled_from(NAMES))
    def pause(self, name: str) -> None:
        status = self.expect(name, self.state(name) == "running")
        self.ask("POST", f"/v1/machines/{name}/actions/pause", status)
        if status == 200:
            self.machines[name].state = "paused"

    @rule(name=st.sampled_from(NAMES))
    def resume(self, name: str) -> None:
        status = self.expect(name, self.state(name) == "paused")
        self.ask("POST", f"/v1/machines/{name}/actions/resume", status)
        if status == 200:
            self.machines[name].state = "running"

    @rule(name=st.sampled_from(NAMES))
    def restart(self, name: str) -> None:
        status = self.expect(name, self.state(name) == "running")
        self.ask("POST", f"/v1/machines/{name}/actions/restart", status)

    @rule(name=st.sampled_from(NAMES), value=st.sampled_from(("x", "y")), stale=st.booleans())
    def label(self, name: str, value: str, stale: bool) -> None:
        headers = {}
        if name in self.machines:
            version = self.ask("GET", f"/v1/machines/{name}", 200)["version"]
            headers["If-Match"] = f'"{version - stale}"'
        status = self.expect(name, True)
        if status == 200 and stale:
            status = 412
        self.ask(
            "PATCH", f"/v1/machines/{name}", status, json={"labels": {"l": value}}, headers=headers
        )
        if status == 200:
            self.machines[name].labels = {"l": value}

    @rule(name=st.sampled_from(NAMES), force=st.booleans())
    def delete(self, name: str, force: bool) -> None:
        status = self.expect(name, force or self.state(name) in REST)
        self.ask("DELETE", f"/v1/machines/{name}", status, params={"force": force})
        if status == 200:
            del self.machines[name]
            self.disks = {
                disk: None if holder == name else holder for disk, holder in self.disks.items()
            }

    @rule(disk=st.sampled_from(DISKS))
    def create_disk(self, disk: str) -> None:
        status = 409 if disk in self.disks else 200
        self.ask("POST", "/v1/disks", status, json={"name": disk, "size": "1M"})
        if status == 200:
            self.disks[disk] = None

    @precondition(lambda self: self.disks and self.machines)
    @rule(disk=st.sampled_from(DISKS), name=st.sampled_from(NAMES))
    def attach(self, disk: str, name: str) -> None:
        if disk not in self.disks or name not in self.machines:
            status = 404
        else:
            free = self.disks[disk] is None and self.state(name) in {"running", "paused", *REST}
            status = 200 if free else 409
        self.ask("POST", f"/v1/disks/{disk}/actions/attach", status, json={"machine": name})
        if status == 200:
            self.disks[disk] = name

    @precondition(lambda self: self.disks)
    @rule(disk=st.sampled_from(DISKS))
    def detach(self, disk: str) -> None:
        if disk not in self.disks:
            status = 404
        else:
            holder = self.disks[disk]
            held = holder is not None and self.state(holder) in {"running", "paused", *REST}
            status = 200 if held else 409
        self.ask("POST", f"/v1/disks/{disk}/actions/detach", status)
        if status == 200:
            self.disks[disk] = None

    @precondition(lambda self: self.disks)
    @rule(disk=st.sampled_from(DISKS))
    def delete_disk(self, disk: str) -> None:
        if disk not in self.disks:
            status = 404
        else:
            holder = self.disks[disk]
            status = 200 if holder is None or self.state(holder) in REST else 409
        self.ask("DELETE", f"/v1/disks/{disk}", status)
        if status == 200:
            del self.disks[disk]

    @invariant()
    def both_say_the_same(self) -> None:
        machines = self.http.get("/v1/machines").json()["items"]
        told = {each["name"]: (each["state"], each["labels"]) for each in machines}
        assert told == {name: (known.state, known.labels) for name, known in self.machines.items()}
        disks = self.http.get("/v1/disks").json()["items"]
        assert {each["name"]: each["machine"] for each in disks} == self.disks
        assert all(each["operation"] is None for each in machines)


def run(live: Any, examples: int, steps: int, *, known: bool = False) -> None:
    """Ask for so many sequences of so many steps: the same ones each time if they are `known`."""
    url = live.serve(authenticate=False)
    of_url = type("ModelOf", (Model,), {"url": url})
    run_state_machine_as_test(
        of_url,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=known,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_service_does_what_its_model_does(living_with: Any) -> None:
    with living_with() as live:
        run(live, 6, 20, known=True)


@pytest.mark.soak
def test_the_service_does_what_its_model_does_for_long(living_with: Any) -> None:
    with living_with() as live:
        run(live, 300, 60)
