"""Two clients at one machine: every answer is one that some order of their requests would give."""

from __future__ import annotations

import threading
import uuid
from typing import Any

import httpx

SPEC = {"memory": "64M"}
WAIT = {"wait": 100}


def at_once(*calls: Any) -> list[httpx.Response]:
    """What calls give that begin at the same moment."""
    barrier = threading.Barrier(len(calls))
    answers: list[Any] = [None] * len(calls)

    def call(number: int) -> None:
        barrier.wait()
        answers[number] = calls[number]()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
        assert not thread.is_alive(), "nobody answers"
    return answers


def test_one_of_two_who_make_a_machine_of_one_name_has_made_it(url: str) -> None:
    with (
        httpx.Client(base_url=url, timeout=120, trust_env=False) as one,
        httpx.Client(base_url=url, timeout=120, trust_env=False) as two,
    ):
        for _ in range(5):
            wanted = {"name": f"m-{uuid.uuid4().hex[:8]}", "spec": SPEC}

            def make(client: httpx.Client, wanted: dict[str, Any] = wanted) -> httpx.Response:
                return client.post("/v1/machines", params=WAIT, json=wanted)

            answers = at_once(lambda: make(one), lambda: make(two))
            assert sorted(answer.status_code for answer in answers) == [200, 409]
            (refused,) = [answer for answer in answers if answer.status_code == 409]
            assert refused.json()["kind"] == "Conflict"
            listed = one.get("/v1/machines", params={"name": wanted["name"]}).json()["items"]
            assert len(listed) == 1


def test_of_two_changes_of_one_version_one_is_done(url: str) -> None:
    name = f"m-{uuid.uuid4().hex[:8]}"
    with (
        httpx.Client(base_url=url, timeout=120, trust_env=False) as one,
        httpx.Client(base_url=url, timeout=120, trust_env=False) as two,
    ):
        one.post("/v1/machines", params=WAIT, json={"name": name, "spec": SPEC})
        for turn in range(5):
            version = one.get(f"/v1/machines/{name}").headers["ETag"]

            def change(
                client: httpx.Client, label: str, version: str = version, turn: int = turn
            ) -> Any:
                return client.patch(
                    f"/v1/machines/{name}",
                    params=WAIT,
                    json={"labels": {"by": label, "turn": str(turn)}},
                    headers={"If-Match": version},
                )

            answers = at_once(lambda: change(one, "one"), lambda: change(two, "two"))
            done = [
                answer.status_code == 200 and answer.json()["state"] == "succeeded"
                for answer in answers
            ]
            # Both may have been taken before either was done; then one after the other was.
            assert any(done)
            for answer, was_done in zip(answers, done, strict=True):
                assert was_done or answer.status_code == 412, answer.text
            labels = one.get(f"/v1/machines/{name}").json()["labels"]
            assert labels["turn"] == str(turn)
            assert labels["by"] in {
                label for label, was_done in zip(("one", "two"), done, strict=True) if was_done
            }


def test_a_machine_that_one_stops_and_another_deletes_is_gone_and_nothing_is_left(
    url: str, live: Any
) -> None:
    with (
        httpx.Client(base_url=url, timeout=120, trust_env=False) as one,
        httpx.Client(base_url=url, timeout=120, trust_env=False) as two,
    ):
        for _ in range(5):
            name = f"m-{uuid.uuid4().hex[:8]}"
            made = one.post(
                "/v1/machines", params=WAIT, json={"name": name, "spec": SPEC, "start": True}
            ).json()
            stopped, deleted = at_once(
                lambda name=name: one.post(f"/v1/machines/{name}/actions/stop", params=WAIT),
                lambda name=name: two.delete(
                    f"/v1/machines/{name}", params={"force": True, **WAIT}
                ),
            )
            assert deleted.json()["state"] == "succeeded", deleted.text
            if stopped.status_code == 200:
                assert stopped.json()["state"] in {"succeeded", "failed"}, stopped.text
            else:
                assert stopped.status_code in {404, 409}, stopped.text
            assert one.get(f"/v1/machines/{name}").status_code == 404
            there = live.call(names_at_the_hypervisor(live.manager))
            assert f"m-{made['target'][:12]}" not in there


async def names_at_the_hypervisor(manager: Any) -> list[str]:
    """What machines the simulated host has."""
    return [machine.name for machine in await (await manager.hosts.get("simulated")).list()]
