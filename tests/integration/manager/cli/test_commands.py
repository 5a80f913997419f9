"""Each command of the manager's, on the simulated hypervisor: what it does and what it says."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.manager.cli.conftest import PATIENCE, Person

Make = Callable[..., str]


def test_a_machine_s_life_in_sentences(person: Person, machine: Make) -> None:
    said = person.says("create", "life", "--spec", str(person.spec), "-H", "simulated")
    assert (said.status, said.out) == (0, "life\n")
    assert "next: `vmlab start life`" in said.err
    machine_is = {"start": "life runs", "pause": "life is paused", "resume": "life runs on",
                  "restart": "life has been restarted"}  # fmt: skip
    for command, sentence in machine_is.items():
        assert person.does(command, "life") == sentence
    assert person.does("stop", "--force", "life") == "life is stopped"
    assert person.does("delete", "life") == "life is gone"


def test_the_list_and_what_is_left_out_of_it(person: Person, machine: Make) -> None:
    machine("listed", "--label", "role=db")
    table = person.does("list", "--label", "role=db").splitlines()
    assert table[0].split()[:3] == ["machine", "state", "host"]
    assert table[1].split()[:6] == ["listed", "created", "simulated", "1", "64", "MiB"]
    (row,) = person.says("list", "--label", "role=db", "--json").json
    assert (row["name"], row["state"], row["labels"]) == ("listed", "created", {"role": "db"})
    assert person.says("list", "--state", "paused").out == (
        "no machines; `vmlab launch --image debian-12-amd64-tiny` makes one\n"
    )
    wrong = person.says("list", "--state", "asleep")
    assert wrong.status == 2
    assert "state" in wrong.err


def test_what_is_known_of_one(person: Person, machine: Make) -> None:
    machine("shown", "--label", "a=b", "--on", "machine-state-mismatch=reconcile")
    person.does("start", "shown")
    person.does("snapshot", "shown", "first", "--expires", "7d")
    text = person.does("show", "shown")
    for part in ("running", "simulated", "a=b", "reconcile", "first", "CPU time", "until"):
        assert part in text
    data = person.says("show", "shown", "--json").json
    assert data["snapshots"][0]["name"] == "first"
    assert data["metrics"]["cpu"]["seconds"] >= 0


def test_several_at_once_and_one_that_is_not_there(person: Person, machine: Make) -> None:
    machine("one")
    machine("two")
    said = person.says("start", "one", "nobody", "two")
    assert said.status == 3
    assert said.out.splitlines() == ["one runs", "two runs"]
    assert "there is no machine 'nobody'" in said.err
    documents = person.says("stop", "--force", "--json", "one", "two").json
    assert [each["state"] for each in documents] == ["succeeded", "succeeded"]


def test_a_dry_run_says_what_would_be_done(person: Person, machine: Make) -> None:
    machine("planned")
    text = person.does("start", "planned", "--dry-run")
    assert text.splitlines()[0] == "start of planned would:"
    assert text.splitlines()[1].startswith("  1. ")
    assert person.says("show", "planned", "--json").json["state"] == "created"
    assert person.says("start", "planned", "--dry-run", "--json").json["dry_run"] is True


def test_what_nobody_waits_for_can_be_waited_for(person: Person, machine: Make) -> None:
    machine("later")
    said = person.says("start", "later", "--no-wait")
    operation = said.out.strip()
    assert f"`vmlab operations wait {operation}`" in said.err
    assert person.does("operations", "wait", operation) == "start of later has succeeded"
    text = person.does("operations", "show", operation)
    assert text.startswith("machine.start later: succeeded")
    assert "done" in text
    listed = person.does("operations", "list", "--target", "later").splitlines()
    assert operation in listed[1]
    (first, *_) = person.says("operations", "list", "--json", "-n", "1").json
    assert first["kind"] == "machine.start"
    ended = person.says("operations", "cancel", operation)
    assert ended.status == 3


def test_names_labels_and_policy_are_changed(person: Person, machine: Make) -> None:
    machine("before", "--label", "keep=1", "--label", "drop=1")
    try:
        person.does(
            "update", "before", "--name", "after", "--label", "new=2", "--unlabel", "drop",
            "--snapshot-every", "6h", "--on", "clock-drift=report",
        )  # fmt: skip
        data = person.says("show", "after", "--json").json
        assert data["labels"] == {"keep": "1", "new": "2"}
        assert data["policy"]["snapshot_every"] == "PT6H"
        assert data["policy"]["findings"] == {"clock-drift": "report"}
        person.does("update", "after", "--no-snapshots")
        data = person.says("show", "after", "--json").json
        assert data["policy"]["snapshot_every"] is None
        assert data["policy"]["findings"] == {"clock-drift": "report"}
        nothing = person.says("update", "after")
        assert nothing.status == 2
        assert "what to change" in nothing.err
    finally:
        person.does("delete", "after")


def test_snapshots_come_back(person: Person, machine: Make) -> None:
    machine("saved")
    assert person.does("snapshot", "saved", "one") == "one"
    assert len(person.does("snapshot", "saved")) == len("20261121-120000")
    rows = person.says("snapshot", "saved", "--list", "--json").json
    assert len(rows) == 2
    assert person.does("restore", "saved", "one") == "saved is as it was in one"
    assert person.does("snapshot", "saved", "one", "--delete") == "snapshot one is gone"
    missing = person.says("restore", "saved", "one")
    assert missing.status == 3
    nameless = person.says("snapshot", "saved", "--delete")
    assert nameless.status == 2


def test_a_clone_is_a_second_one(person: Person, machine: Make) -> None:
    machine("original")
    assert person.does("clone", "original", "copy") == "copy"
    try:
        assert set(person.does("list", "-q").split()) >= {"original", "copy"}
    finally:
        person.does("delete", "copy")


def test_a_machine_is_resized_and_moved(person: Person, machine: Make) -> None:
    machine("grown")
    assert person.does("resize", "grown", "--memory", "128M", "--cpus", "2") == "grown is resized"
    data = person.says("show", "grown", "--json").json
    assert (data["memory"], data["vcpus"]) == (128 << 20, 2)
    assert person.does("migrate", "grown", "slow") == "grown is on slow"
    assert person.says("show", "grown", "--json").json["host"] == "slow"
    assert person.says("resize", "grown").status == 2


@pytest.mark.parametrize("elsewhere", [False, True], ids=["own", "elsewhere"])
def test_a_machine_goes_through_a_file(
    person: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    if elsewhere:
        person.does("list")  # the manager is there
        monkeypatch.setenv("VMLAB_URL", f"unix:{person.home / 'manager' / 'manager.sock'}")
    # What the simulated hypervisor has of disks of its own is no file.
    person.spec.with_name("bare.toml").write_text('name = "bare"\nmemory = "64M"\n')
    person.does("disk", "create", "cargo", "16M")
    bare = str(person.spec.with_name("bare.toml"))
    person.does("create", "packed", "--spec", bare, "-H", "simulated", "--disk", "cargo")
    file = tmp_path / "packed.tar"
    assert person.does("export", "packed", str(file)) == str(file)
    taken = person.says("export", "packed", str(file))
    assert taken.status == 2
    assert "a place that is free" in taken.err
    assert person.does("import", str(file), "unpacked") == "unpacked"
    try:
        assert person.says("show", "unpacked", "--json").json["memory"] == 64 << 20
    finally:
        person.does("delete", "unpacked", "packed")
        disks = [disk["name"] for disk in person.says("disk", "list", "--json").json]
        person.does("disk", "delete", *disks)
    exports = person.home / "manager" / "exports"
    assert list(exports.iterdir()) == []
    missing = person.says("import", str(tmp_path / "nothing.tar"))
    assert missing.status == 2
    assert "a file that can be read" in missing.err


def test_disks(person: Person, machine: Make) -> None:
    machine("with-disk")
    assert person.does("disk", "create", "data", "16M") == "data"
    assert person.does("disk", "attach", "data", "with-disk") == "with-disk has data"
    (row,) = person.says("disk", "list", "--machine", "with-disk", "--json").json
    assert (row["name"], row["machine"], row["size"]) == ("data", "with-disk", 16 << 20)
    assert "16 MiB" in person.does("disk", "show", "data")
    assert "data" in person.does("show", "with-disk")
    assert person.does("disk", "detach", "data") == "data is nobody's"
    assert person.does("disk", "resize", "data", "32M") == "data has 32M"
    assert person.does("disk", "create", "second", "--source", "data") == "second"
    assert person.says("disk", "show", "second", "--json").json["size"] == 32 << 20
    assert person.does("disk", "delete", "data", "second") == "data is gone\nsecond is gone"
    wrong = person.says("disk", "create", "bad", "lots")
    assert wrong.status == 2
    assert "size = 'lots'" in wrong.err


def test_networks(person: Person, machine: Make) -> None:
    assert person.does("network", "create", "lan", "--subnet", "10.79.0.0/24") == "lan"
    machine("wired", "--network", "lan,address=10.79.0.9")
    person.does("start", "wired")
    text = person.does("network", "show", "lan")
    assert "10.79.0.9" in text
    assert "10.79.0.9" in person.does("list")
    assert person.says("network", "show", "lan", "--json").json["addresses"][0]["machine"] == (
        "wired"
    )
    refused = person.says("network", "delete", "lan")
    assert refused.status == 3
    person.does("delete", "--force", "wired")
    assert person.does("network", "delete", "lan") == "lan is gone"
    assert "no networks" in person.does("network", "list")
    wrong = person.says("create", "x", "--image", "tiny", "--network", "lan,colour=red")
    assert wrong.status == 2
    assert "NETWORK[,address=ADDRESS]" in wrong.err


def test_templates(person: Person) -> None:
    person.does("template", "create", "small", "--spec", str(person.spec), "--memory", "32M")
    assert "small" in person.does("template", "list")
    assert person.does("create", "from-template", "-t", "small", "-H", "simulated") == (
        "from-template"
    )
    assert person.says("template", "show", "small", "--json").json["machines"] == 1
    refused = person.says("template", "delete", "small")
    assert refused.status == 3
    person.does("delete", "from-template")
    assert person.does("template", "delete", "small") == "small is gone"
    nothing = person.says("template", "create", "empty")
    assert nothing.status == 2
    assert "--image or --spec" in nothing.err


def test_events_are_told_and_end(person: Person, machine: Make) -> None:
    machine("eventful")
    lines = person.says("events", "--subject", "eventful", "--json").out.splitlines()
    events = [json.loads(line) for line in lines]
    assert "machine.created" in [event["kind"] for event in events]
    assert [event["id"] for event in events] == sorted(event["id"] for event in events)
    assert person.does("events", "--tail", "0") == ""
    mine = [event["id"] for event in events]
    tail = person.says("events", "-n", "2", "--subject", "eventful", "--json").out.splitlines()
    assert [json.loads(line)["id"] for line in tail] == mine[-2:]

    every, (one, three, more, rest) = while_nothing_happens(
        person,
        lambda every: [
            person.says("events", "-n", "1").out.splitlines(),
            person.says("events", "-n", "3").out.splitlines(),
            person.says("events", "-n", str(len(every) + 5)).out.splitlines(),
            person.says("events", "--after", every[-1].split()[0]).out.splitlines(),
        ],
    )
    assert every[-1].split()[0].isdigit()
    assert (one, three, more, rest) == (every[-1:], every[-3:], every, [])


def while_nothing_happens(
    person: Person, ask: Callable[[list[str]], list[list[str]]]
) -> tuple[list[str], list[list[str]]]:
    """All events, and what `ask` says of them: it is asked anew if one came, of whoever it is."""
    every = person.says("events").out.splitlines()
    for _ in range(100):
        asked = ask(every)
        now = person.says("events").out.splitlines()
        if now == every:
            return every, asked
        every = now
    pytest.fail(f"something happens all the time: {every[-10:]}")


@pytest.mark.parametrize(("tail", "shown"), [((), 10), (("-n", "3"), 3)], ids=["ten", "three"])
def test_events_are_followed_from_the_last_ones_on(
    person: Person, machine: Make, tail: tuple[str, ...], shown: int
) -> None:
    machine("before")
    past = [int(line.split()[0]) for line in person.does("events").splitlines()]
    assert len(past) > 3
    with person.begins("events", "--follow", *tail, "--json") as follower:
        assert follower.stdout is not None
        first = json.loads(follower.stdout.readline())["id"]
        # It has asked for all that there is by now, and follows what comes after that; nothing
        # comes but what somebody else's business is, such as a finding.
        latest = int(person.does("events", "-n", "1").split()[0])
        shown = min(shown, len(past))
        assert past[-shown] <= first <= latest - shown + 1
        machine("afterwards")
        for number, line in enumerate(follower.stdout, first + 1):
            event = json.loads(line)
            assert event["id"] == number, "none is left out or comes twice"
            if (event["kind"], event["name"]) == ("machine.created", "afterwards"):
                assert number > past[-1]
                break
        else:
            pytest.fail("it ended before it told")
        follower.send_signal(signal.SIGINT)
        follower.communicate(timeout=PATIENCE)
        assert follower.returncode == 130


def test_hosts(person: Person, machine: Make) -> None:
    machine("hosted")
    person.does("start", "hosted")
    text = person.does("host", "list")
    assert "slow" in text
    assert person.says("host", "show", "simulated", "--json").json["live"] >= 1
    missing = person.says("host", "show", "nowhere")
    assert missing.status == 3


def test_emergency_stop_ends_what_it_was_told_to(person: Person, machine: Make) -> None:
    machine("ended", "--label", "fleet=a")
    machine("spared", "--label", "fleet=b")
    person.does("start", "ended", "spared")
    nothing = person.says("emergency-stop")
    assert nothing.status == 2
    assert "which machines" in nothing.err
    assert person.says("emergency-stop", "--all", "--host", "slow").status == 2
    text = person.does("emergency-stop", "--label", "fleet=a")
    assert "ended" in text
    assert person.says("show", "ended", "--json").json["state"] == "stopped"
    assert person.says("show", "spared", "--json").json["state"] == "running"


def test_nothing_is_found_wrong(person: Person) -> None:
    found = person.says("findings", "list", "--code", "orphan-disk")
    assert (found.status, found.out) == (0, "nothing is found wrong\n")
    missing = person.says("findings", "show", "0" * 32)
    assert missing.status == 3


def test_tokens_are_for_whoever_has_none(person: Person) -> None:
    said = person.says("token", "create", "laptop", "--scope", "read", "--expires", "30d")
    assert said.out.startswith("vml_")
    (row,) = person.says("token", "list", "--json").json
    assert (row["name"], row["scope"]) == ("laptop", "read")
    assert person.does("token", "revoke", row["id"]) == f"{row['id']} is revoked"
    assert "no tokens" in person.does("token", "list")
    wrong = person.says("token", "create", "x", "--expires", "soon")
    assert wrong.status == 2
    assert "--expires = 'soon'" in wrong.err


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (("create", "x"), 2, "--image, --template or --spec"),
        (("create", "x", "--template", "nothing"), 3, "nothing"),
        (("create", "x", "--spec", "/no/such/file"), 2, "/no/such/file"),
        (("create", "!", "--image", "tiny"), 2, "name = '!'"),
        (("create", "x", "--image", "tiny", "--memory", "much"), 2, "memory = 'much'"),
        (("create", "x", "--image", "tiny", "--user-data", "/none"), 2, "--user-data"),
        (("create", "x", "--image", "tiny", "--label", "=y"), 2, "--label"),
        (("start", "nobody"), 3, "there is no machine 'nobody'"),
        (("delete", "nobody"), 3, "there is no machine 'nobody'"),
        (("shell", "nobody"), 3, "there is no machine 'nobody'"),
        (("exec", "nobody", "--", "true"), 3, "there is no machine 'nobody'"),
        (("console", "nobody"), 3, "there is no machine 'nobody'"),
        (("operations", "wait", "0" * 32), 3, "operation"),
        (("findings", "repair", "0" * 32, "adopt"), 3, "finding"),
    ],
)
def test_what_cannot_be_is_said_without_a_traceback(
    words: tuple[str, ...], status: int, text: str, person: Person
) -> None:
    said = person.says(*words)
    assert said.status == status, said
    assert text in said.err
    assert "hint: " in said.err
    assert "Traceback" not in said.err


def test_a_running_machine_is_deleted_only_by_force(person: Person, machine: Make) -> None:
    machine("alive")
    person.does("start", "alive")
    refused = person.says("delete", "alive")
    assert refused.status == 3
    assert person.does("delete", "--force", "alive") == "alive is gone"


def test_its_console_has_a_log(person: Person, machine: Make) -> None:
    machine("talks")
    person.does("start", "talks")
    child = person.begins("console", "--log", "talks")
    out, err = child.communicate(timeout=240)
    assert child.returncode == 0, err
    assert out
