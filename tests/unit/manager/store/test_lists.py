"""Lists and look-ups: what they refuse, and what they say of what is not there."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import Session
from tests.unit.manager.store.rows import add_disk, add_host, add_machine, add_network

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import InvalidSpec, ResourceNotFound, SnapshotNotFound, VmlabError
from vmlab.manager.settings import Settings
from vmlab.manager.store import queries
from vmlab.manager.store.database import Database
from vmlab.manager.store.tables import FindingRow, SnapshotRow, TemplateRow
from vmlab.manager.store.words import is_id, is_text, pattern

LISTS: list[Callable[..., Any]] = [
    queries.list_machines,
    queries.list_disks,
    queries.list_networks,
    queries.list_addresses,
    queries.list_templates,
    queries.list_snapshots,
    queries.list_operations,
    queries.list_findings,
]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """An empty store, for tests that only read."""
    settings = Settings(home=Home.open(tmp_path_factory.mktemp("empty")))
    database = Database.open(settings)
    yield database
    database.close()


def cursor(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


@pytest.mark.parametrize("list_", LISTS)
@pytest.mark.parametrize(
    "wrong", ["", "?", "a", "AAAA", cursor({}), cursor([]), cursor([[]]), cursor([1, 2, 3, 4])]
)
def test_cursor_that_no_page_had_is_refused(
    empty: Database, list_: Callable[..., Any], wrong: str
) -> None:
    with pytest.raises(InvalidSpec, match="cursor"):
        empty.read_now(list_, cursor=wrong)


@pytest.mark.parametrize(
    ("list_", "value"),
    [
        (queries.list_machines, [3]),
        (queries.list_machines, ["a\0b"]),
        (queries.list_machines, ["\ud800"]),
        (queries.list_operations, ["3"]),
        (queries.list_operations, [True]),
        (queries.list_operations, [1 << 70]),
        (queries.list_snapshots, ["yesterday", "a"]),
        (queries.list_snapshots, ["2026-01-01T00:00:00", "a"]),
        (queries.list_snapshots, ["0001-01-01T00:00:00+23:59", "a"]),
        (queries.list_snapshots, [5, "a"]),
    ],
)
def test_cursor_of_other_types_is_refused(
    empty: Database, list_: Callable[..., Any], value: list[Any]
) -> None:
    with pytest.raises(InvalidSpec, match="cursor"):
        empty.read_now(list_, cursor=cursor(value))


@pytest.mark.parametrize("list_", LISTS)
@pytest.mark.parametrize("limit", [0, -1, 1001, 1 << 70])
def test_page_has_at_least_one_item_and_at_most_a_thousand(
    empty: Database, list_: Callable[..., Any], limit: int
) -> None:
    with pytest.raises(InvalidSpec, match=r"limit = -?\d+: 1 to 1000"):
        empty.read_now(list_, limit=limit)


@pytest.mark.parametrize(
    ("list_", "filters", "saying"),
    [
        (queries.list_machines, {"state": "happy"}, "state = 'happy': one of created, starting"),
        (queries.list_machines, {"state": ["running", "x"]}, "state = 'x'"),
        (queries.list_machines, {"name": "a\0"}, "name = 'a"),
        (queries.list_machines, {"label": "\ud800"}, "label"),
        (queries.list_machines, {"host": "\0"}, "host"),
        (queries.list_machines, {"template": "\0"}, "template"),
        (queries.list_operations, {"state": "x"}, "one of queued, running"),
        (queries.list_operations, {"target": "\0"}, "target"),
        (queries.list_findings, {"severity": "bad"}, "one of info, warning"),
        (queries.list_findings, {"code": "\0"}, "code"),
        (queries.list_disks, {"state": "\0"}, "state"),
        (queries.list_disks, {"machine": "none"}, "there is no machine 'none'"),
        (queries.list_networks, {"mode": "\0"}, "mode"),
        (queries.list_addresses, {"network": "\0"}, "there is no network"),
        (queries.list_snapshots, {"machine": "\ud800"}, "there is no machine"),
        (queries.list_events, {"after": 1 << 70}, "the number of an event"),
        (queries.list_events, {"before": 1 << 70}, "the number of an event"),
        (queries.list_events, {"subject": "\0"}, "subject"),
    ],
)
def test_filter_that_means_nothing_is_refused(
    empty: Database, list_: Callable[..., Any], filters: dict[str, Any], saying: str
) -> None:
    with pytest.raises(VmlabError, match=saying):
        empty.read_now(list_, **filters)


def test_findings_are_listed_by_what_they_are(database: Database) -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)

    def add(s: Session) -> None:
        for number, (code, severity) in enumerate(
            [("orphan-disk", "warning"), ("storage-low", "critical"), ("orphan-disk", "info")]
        ):
            seen = moment + timedelta(minutes=number)
            row = FindingRow(code=code, severity=severity, subject=f"s{number}", message="m")
            row.name, row.first_seen = f"n{number}", seen
            s.add(row)

    database.write_now(add)

    def found(**filters: Any) -> list[str]:
        page = database.read_now(queries.list_findings, **filters)
        return [finding.subject for finding in page.items]

    assert found() == ["s2", "s1", "s0"]
    assert found(code="orphan-disk") == ["s2", "s0"]
    assert found(severity="critical") == found(subject="n1") == found(subject="s1") == ["s1"]
    page = database.read_now(queries.list_findings, limit=2)
    rest = database.read_now(queries.list_findings, cursor=page.next, limit=2)
    assert ([each.subject for each in rest.items], rest.next) == (["s0"], None)
    assert database.read_now(queries.find_finding, page.items[0].id[:10]) is not None


def test_disks_networks_and_templates_are_filtered(database: Database) -> None:
    def add(s: Session) -> None:
        machine = add_machine(s, "m")
        add_disk(s, "d1", machine=machine, state="attached")
        add_disk(s, "d2")
        add_network(s, "lan")
        add_network(s, "nat", mode="user")
        s.add(TemplateRow(name="small", memory=1, spec={"a": 1}))

    database.write_now(add)

    def names(list_: Callable[..., Any], **filters: Any) -> list[str]:
        return [item.name for item in database.read_now(list_, **filters).items]

    assert names(queries.list_disks, machine="m") == names(queries.list_disks, name="?1") == ["d1"]
    assert names(queries.list_disks, state="available") == ["d2"]
    assert names(queries.list_networks, mode="user") == ["nat"]
    assert names(queries.list_networks, name="l*") == ["lan"]
    assert names(queries.list_templates, name="s*") == ["small"]
    assert names(queries.list_templates, name="t*") == []


def test_the_latest_events_are_listed_in_their_order_and_back_from_there(
    database: Database,
) -> None:
    for name in ("a", "b", "c", "d"):
        database.write_now(add_machine, name)

    def found(**of: Any) -> tuple[list[int], str | None]:
        page = database.read_now(queries.list_events, **of)
        return [event.id for event in page.items], page.next

    assert found(latest=True, limit=2) == ([3, 4], "3")
    assert found(latest=True, limit=2, before=3) == ([1, 2], None)
    assert found(latest=True, after=2, before=4) == ([3], None)
    assert found(before=3) == ([1, 2], None)
    assert found(before=1) == found(latest=True, after=4) == ([], None)


def test_events_are_listed_from_a_number_on(database: Database) -> None:
    for name in ("a", "b", "c"):
        database.write_now(add_machine, name)
    page = database.read_now(queries.list_events, after=1, limit=1)
    assert ([event.name for event in page.items], page.next) == (["b"], "2")
    rest = database.read_now(queries.list_events, after=int(page.next or 0))
    assert ([event.name for event in rest.items], rest.next) == (["c"], None)
    assert database.read_now(queries.list_events, kind="machine.state").items == ()
    assert [event.name for event in database.read_now(queries.list_events, subject="a").items] == [
        "a"
    ]


# ------------------------------------------------------------------------ what is not there

FINDERS: list[tuple[Callable[..., Any], str]] = [
    (queries.find_machine, "machine"),
    (queries.find_disk, "disk"),
    (queries.find_network, "network"),
    (queries.find_template, "template"),
    (queries.find_host, "host"),
]


@pytest.mark.parametrize(("find", "noun"), FINDERS)
def test_where_there_is_none_yet_that_is_said(
    empty: Database, find: Callable[..., Any], noun: str
) -> None:
    with pytest.raises(ResourceNotFound, match=f"there is no {noun} 'x'") as error:
        empty.read_now(find, "x")
    assert error.value.hint == "there is none yet"


def test_names_that_come_close_are_told_also_among_many(database: Database) -> None:
    def add(s: Session) -> None:
        for number in range(1100):
            add_disk(s, f"disk-{number:04}")
        add_disk(s, "web-data")

    database.write_now(add)
    with pytest.raises(ResourceNotFound, match="'web-dta'") as error:
        database.read_now(queries.find_disk, "web-dta")
    assert error.value.hint == "there is web-data"


def test_id_goes_before_a_name_that_looks_like_one(database: Database) -> None:
    def add(s: Session) -> str:
        id_ = add_machine(s, "first").id
        add_machine(s, id_)
        return id_

    id_ = database.write_now(add)
    assert database.read_now(lambda s: queries.find_machine(s, id_).name) == "first"
    assert database.read_now(lambda s: queries.find_machine(s, "first").id) == id_


def test_snapshot_is_found_among_those_of_its_machine(database: Database) -> None:
    def add(s: Session) -> None:
        s.add(SnapshotRow(machine=add_machine(s, "a"), name="clean"))
        add_machine(s, "b")

    database.write_now(add)

    def find(s: Session, machine: str, name: str) -> str:
        return queries.find_snapshot(s, queries.find_machine(s, machine), name).name

    assert database.read_now(find, "a", "clean") == "clean"
    for machine, name, hint in (("a", "claen", "there is clean"), ("b", "clean", "there is none")):
        with pytest.raises(SnapshotNotFound, match=f"no snapshot '{name}' of machine") as error:
            database.read_now(find, machine, name)
        assert (error.value.hint or "").startswith(hint)


def test_operations_with_ids_alike_have_to_be_told_apart(database: Database) -> None:
    from vmlab.manager.store.tables import OperationRow

    def add(s: Session) -> None:
        for end in "ab":
            s.add(OperationRow(id="12345678" + end * 24, kind="k", request={}))

    database.write_now(add)
    with pytest.raises(ResourceNotFound, match="more than one operation has an id like"):
        database.read_now(queries.find_operation, "12345678")
    assert database.read_now(lambda s: queries.find_operation(s, "12345678a").id[8:]) == "a" * 24


def test_hosts_tell_what_their_live_machines_take(database: Database) -> None:
    def add(s: Session) -> None:
        add_host(s, "idle")
        add_machine(s, "on", state="running", vcpus=2, memory=5)
        add_machine(s, "waiting", state="paused", vcpus=1, memory=1)
        add_machine(s, "off", state="stopped", vcpus=4, memory=9)

    database.write_now(add)
    idle, busy = database.read_now(queries.list_hosts).items
    assert (idle.machines, idle.live, idle.vcpus, idle.memory) == (0, 0, 0, 0)
    assert (busy.machines, busy.live, busy.vcpus, busy.memory) == (3, 2, 3, 6)
    assert (
        database.read_now(lambda s: queries.host_document(s, queries.find_host(s, "idle"))) == idle
    )


# ------------------------------------------------------------------------ words


@given(st.text(max_size=8))
def test_pattern_without_wildcards_matches_its_own_text_alone(text: str) -> None:
    import sqlite3

    plain = text.replace("*", "").replace("?", "").replace("\0", "")
    if not is_text(plain):
        return
    connection = sqlite3.connect(":memory:")
    connection.execute("PRAGMA case_sensitive_like = ON")

    def like(subject: str) -> bool:
        query = "SELECT ? LIKE ? ESCAPE ?"
        return bool(connection.execute(query, (subject, pattern(plain), "\\")).fetchone()[0])

    assert like(plain)
    assert not like(plain + "x")
    assert not like("x" + plain)
    connection.close()


def test_ids_are_lower_case_hexadecimal() -> None:
    assert is_id("0123456789abcdef" * 2)
    assert not is_id("0123456789ABCDEF" * 2)
    assert not is_id("0123456789abcdef" * 2 + "0")
    assert not is_id("٣" * 32)
