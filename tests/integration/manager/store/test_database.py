"""The store in SQLite and in PostgreSQL: transactions, constraints, relations, lists alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select
from sqlalchemy.orm import Session
from tests.integration.manager.store.conftest import PostgresServer
from tests.unit.manager.store.rows import add_disk, add_host, add_machine, add_network, add_nic

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import MachineNotFound, ResourceNotFound
from vmlab.manager.settings import Settings
from vmlab.manager.store import queries
from vmlab.manager.store.changes import (
    Conflict,
    PreconditionFailed,
    add_event,
    check_version,
    set_machine_state,
)
from vmlab.manager.store.database import Database
from vmlab.manager.store.failures import StoreUnavailable
from vmlab.manager.store.tables import (
    AddressRow,
    FindingRow,
    MachineRow,
    NicRow,
    OperationRow,
    ReservationRow,
    SnapshotRow,
    StepRow,
    TemplateRow,
    TokenRow,
    UserRow,
)

Write = Callable[[Session], object]


def refused(database: Database, fn: Write) -> Conflict:
    """The conflict that a write ends with; nothing of it is there, and no event was told."""
    before = database.events.latest()

    def also(s: Session) -> None:
        add_event(s, "test.never")
        fn(s)

    with pytest.raises(Conflict) as found:
        database.write_now(also)
    assert database.events.latest() == before
    assert found.value.hint
    return found.value


@pytest.mark.parametrize("noun", ["machine", "disk", "network", "template"])
def test_names_are_unique(database: Database, noun: str) -> None:
    makers: dict[str, Write] = {
        "machine": lambda s: add_machine(s, "twice"),
        "disk": lambda s: add_disk(s, "twice"),
        "network": lambda s: add_network(s, "twice"),
        "template": lambda s: s.add(TemplateRow(name="twice", memory=1)),
    }
    database.write_now(makers[noun])
    error = refused(database, makers[noun])
    assert error.message.startswith(f"there is a {noun}")
    assert "names are unique" in error.message


def test_address_is_unique_in_its_network_however_it_is_written(database: Database) -> None:
    def two(s: Session) -> None:
        one, other = add_network(s, "one"), add_network(s, "other")
        s.add(AddressRow(network=one, address="fd00::7"))
        s.add(AddressRow(network=other, address="fd00::7"))
        s.add(AddressRow(network=one, address="10.0.0.7"))

    database.write_now(two)
    error = refused(
        database,
        lambda s: s.add(
            AddressRow(network=queries.find_network(s, "one"), address="FD00:0:0::0007")
        ),
    )
    assert error.message.startswith("that address of the network is taken")


def test_addresses_are_listed_in_their_order(database: Database) -> None:
    addresses = ["10.0.0.10", "fd00::2", "10.0.0.9", "fd00::10", "9.255.255.255"]

    def add(s: Session) -> None:
        network = add_network(s, "lan", subnet="10.0.0.0/24")
        nic = add_nic(s, add_machine(s, "m"), network)
        for address in addresses:
            s.add(AddressRow(network=network, nic=nic, machine=nic.machine, address=address))

    database.write_now(add)
    page = database.read_now(queries.list_addresses, network="lan", limit=3)
    rest = database.read_now(queries.list_addresses, machine="m", cursor=page.next)
    told = [document.address for document in (*page.items, *rest.items)]
    assert told == ["9.255.255.255", "10.0.0.9", "10.0.0.10", "fd00::2", "fd00::10"]
    assert {(each.machine, each.nic, each.network) for each in page.items} == {("m", "net0", "lan")}


@pytest.mark.parametrize(
    ("second", "saying"),
    [
        (lambda s, m: s.add(NicRow(machine=m, name="net0", mode="user", mac="b")), "NIC of that"),
        (lambda s, m: s.add(NicRow(machine=m, name="net1", mode="user", mac="a")), "MAC address"),
        (lambda s, m: s.add(SnapshotRow(machine=m, name="s")), "snapshot of that name"),
        (lambda s, m: add_disk(s, "d2", machine=m, device="d"), "disk of that device"),
        (
            lambda s, m: s.add(
                FindingRow(code="c", subject=m.id, severity="error", message="again")
            ),
            "open finding",
        ),
        (
            lambda s, m: s.add(
                OperationRow(kind="k", request={}, actor="me", idempotency_key="once")
            ),
            "idempotency key",
        ),
        (
            lambda s, m: s.add(TokenRow(user=UserRow(name="u2"), hash="h", scope="read")),
            "token is there",
        ),
    ],
)
def test_what_is_unique_beside_names_is_refused_in_words(
    database: Database, second: Callable[[Session, MachineRow], object], saying: str
) -> None:
    def first(s: Session) -> None:
        machine = add_machine(s, "m")
        s.add(NicRow(machine=machine, name="net0", mode="user", mac="a"))
        s.add(SnapshotRow(machine=machine, name="s"))
        add_disk(s, "d1", machine=machine, device="d")
        s.add(FindingRow(code="c", subject=machine.id, severity="error", message="once"))
        s.add(OperationRow(kind="k", request={}, actor="me", idempotency_key="once"))
        s.add(TokenRow(user=UserRow(name="u1"), hash="h", scope="read"))

    database.write_now(first)
    assert saying in refused(database, lambda s: second(s, queries.find_machine(s, "m"))).message


def test_resolved_finding_can_be_found_again(database: Database) -> None:
    def found(s: Session, resolved: datetime | None = None) -> None:
        s.add(FindingRow(code="c", subject="x", severity="info", message="m", resolved=resolved))

    moment = datetime.now(UTC)
    database.write_now(found, moment)
    database.write_now(found, moment)
    database.write_now(found)
    refused(database, found)
    assert len(database.read_now(queries.list_findings, resolved=True).items) == 2
    assert len(database.read_now(queries.list_findings, resolved=False).items) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s: add_machine(s, "m2", host="nowhere") if s.get(MachineRow, "x") else _no_host(s),
        lambda s: add_disk(s, "d", machine_id="0" * 32),
        lambda s: s.delete(queries.find_network(s, "lan")),
        lambda s: s.delete(queries.find_template(s, "t")),
        lambda s: s.delete(queries.find_host(s, "simulated")),
        lambda s: s.add(ReservationRow(operation_id="0" * 32)),
        lambda s: s.add(SnapshotRow(machine_id="0" * 32, name="s")),
    ],
)
def test_relations_hold(database: Database, wrong: Write) -> None:
    def add(s: Session) -> None:
        template = TemplateRow(name="t", memory=1)
        add_nic(s, add_machine(s, "m", template=template), add_network(s, "lan"))

    database.write_now(add)
    assert "belongs to it" in refused(database, wrong).message


def _no_host(s: Session) -> None:
    s.add(
        MachineRow(
            name="m2",
            host="nowhere",
            hypervisor="simulated",
            architecture="x86_64",
            vcpus=1,
            memory=1,
            spec={},
        )
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s: add_network(s, "n", mode="wireless"),
        lambda s: add_network(s, "n", vlan=4095),
        lambda s: add_disk(s, "d", format="vmdk"),
        lambda s: add_disk(s, "d", size=-1),
        lambda s: add_machine(s, "m", wanted="happy"),
        lambda s: s.add(OperationRow(kind="k", request={}, state="lost")),
        lambda s: s.add(NicRow(machine=add_machine(s, "m"), name="a", mode="network", mac="a")),
    ],
)
def test_values_that_mean_nothing_are_refused(database: Database, wrong: Write) -> None:
    assert "the store refuses it" in refused(database, wrong).message


def test_parts_of_a_machine_go_with_it_and_disks_do_not(database: Database) -> None:
    def add(s: Session) -> None:
        machine = add_machine(s, "m")
        network = add_network(s, "lan")
        nic = add_nic(s, machine, network)
        s.add(AddressRow(network=network, nic=nic, machine=machine, address="10.0.0.2"))
        s.add(SnapshotRow(machine=machine, name="s"))
        add_disk(s, "d", machine=machine, device="d")

    def delete(s: Session) -> None:
        machine = queries.find_machine(s, "m")
        for disk in list(machine.disks):
            disk.machine = None
            disk.device = None
        s.flush()
        s.delete(machine)

    database.write_now(add)
    database.write_now(delete)

    def left(s: Session) -> list[int]:
        tables = (MachineRow, NicRow, AddressRow, SnapshotRow)
        return [len(s.scalars(select(table)).all()) for table in tables]

    assert database.read_now(left) == [0, 0, 0, 0]
    disk = database.read_now(lambda s: queries.disk_document(s, queries.find_disk(s, "d")))
    assert (disk.machine, disk.device) == (None, None)


def test_version_counts_changes_and_an_older_one_is_refused(database: Database) -> None:
    database.write_now(add_machine, "m")

    def change(s: Session, if_match: int | None) -> int:
        row = queries.find_machine(s, "m")
        check_version(row, if_match)
        row.labels["n"] = str(row.version)
        s.flush()
        return row.version

    assert database.write_now(change, 1) == 2
    with pytest.raises(PreconditionFailed, match="machine 'm' is at version 2, not 1"):
        database.write_now(change, 1)
    assert database.write_now(change, None) == 3


def test_row_that_another_changed_meanwhile_is_no_longer_written(database: Database) -> None:
    """Optimistic locking below all else: the row's version is part of the UPDATE."""
    database.write_now(add_machine, "m")

    def race(s: Session) -> None:
        row = queries.find_machine(s, "m")
        s.connection().exec_driver_sql("UPDATE machines SET version = version + 1")
        row.reason = "mine"

    with pytest.raises(Conflict, match="somebody else meanwhile"):
        database.write_now(race)
    assert database.read_now(lambda s: queries.find_machine(s, "m").version) == 1


def test_state_and_its_event_are_one_transaction(database: Database) -> None:
    database.write_now(add_machine, "m")

    def start(s: Session, state: str, reason: str = "") -> None:
        set_machine_state(s, queries.find_machine(s, "m"), state, reason=reason, operation="o" * 32)

    for state in ("starting", "running", "running"):
        database.write_now(start, state)
    told = database.read_now(queries.list_events, kind="machine.state", subject="m").items
    assert [(each.data["before"], each.data["state"]) for each in told] == [
        ("created", "starting"),
        ("starting", "running"),
    ]
    assert {each.operation for each in told} == {"o" * 32}

    def document(s: Session) -> Any:
        return queries.machine_document(s, queries.find_machine(s, "m"))

    assert database.read_now(document).started is not None
    database.write_now(start, "failed", "its process died")
    failed = database.read_now(document)
    assert (failed.started, failed.reason) == (None, "its process died")


def test_times_come_back_as_they_were_in_utc(database: Database) -> None:
    from datetime import timezone

    moment = datetime(2026, 7, 1, 12, 30, 15, 123456, tzinfo=timezone(timedelta(hours=9)))

    def add(s: Session) -> None:
        s.add(SnapshotRow(machine=add_machine(s, "m"), name="s", expires=moment))

    database.write_now(add)
    (snapshot,) = database.read_now(queries.list_snapshots, machine="m").items
    assert snapshot.expires == moment
    assert snapshot.expires is not None and snapshot.expires.utcoffset() == timedelta(0)


def test_time_without_a_zone_is_a_mistake(database: Database) -> None:
    def add(s: Session) -> None:
        s.add(SnapshotRow(machine=add_machine(s, "m"), name="s", expires=datetime(2026, 1, 1)))

    with pytest.raises(Exception, match="has no time zone"):
        database.write_now(add)


def test_reader_sees_one_state_and_holds_no_writer_up(database: Database) -> None:
    database.write_now(add_machine, "a")

    def look(s: Session) -> tuple[int, int]:
        before = len(queries.list_machines(s).items)
        database.write_now(add_machine, "b")
        s.expire_all()
        return before, len(queries.list_machines(s).items)

    assert database.read_now(look) == (1, 1)
    assert len(database.read_now(queries.list_machines).items) == 2


def test_read_cannot_write(database: Database) -> None:
    def write(s: Session) -> None:
        add_host(s)
        s.flush()

    with pytest.raises(Exception, match=r"(?i)read.?only"):
        database.read_now(write)


def test_two_processes_that_write_at_once_lose_nothing(settings: Settings) -> None:
    """Each opened by itself, as processes do: one waits for the other, or is run again."""
    one, two = Database.open(settings), Database.open(settings)
    runs = 0

    def add(s: Session, name: str) -> None:
        nonlocal runs
        runs += 1
        machine = queries.find_machine(s, "counter")
        machine.labels["count"] = str(int(machine.labels["count"]) + 1)
        add_event(s, "test.counted", name=name)

    one.write_now(lambda s: add_machine(s, "counter", labels={"count": "0"}))

    async def story() -> None:
        await asyncio.gather(
            *(database.write(add, str(n)) for n in range(40) for database in (one, two))
        )

    asyncio.run(story())
    machine = two.read_now(
        lambda s: queries.machine_document(s, queries.find_machine(s, "counter"))
    )
    assert machine.labels == {"count": "80"}
    assert machine.version == 81
    assert runs >= 80
    events = one.read_now(queries.list_events, limit=1000).items
    assert [each.id for each in events] == list(range(1, 82))
    one.close()
    two.close()


def test_operations_are_numbered_in_the_order_they_came(database: Database) -> None:
    def add(s: Session) -> None:
        for kind in ("first", "second", "third"):
            s.add(OperationRow(kind=kind, request={"kind": kind}))
            s.flush()

    database.write_now(add)
    page = database.read_now(queries.list_operations, limit=2, count=True)
    assert ([each.kind for each in page.items], page.total) == (["third", "second"], 3)
    rest = database.read_now(queries.list_operations, cursor=page.next)
    assert ([each.kind for each in rest.items], rest.next) == (["first"], None)
    assert list(database.read_now(lambda s: s.scalars(select(OperationRow.number)).all())) == [
        1,
        2,
        3,
    ]


def test_operation_is_told_with_its_journal(database: Database) -> None:
    error = {"kind": "VmlabError", "message": "no"}

    def add(s: Session) -> str:
        row = OperationRow(
            kind="machine.start", request={"machine": "m"}, target="i", target_name="m", error=error
        )
        row.steps.append(StepRow(name="b", position=1, state="running", data={"pid": 1}))
        row.steps.append(StepRow(name="a", position=0, state="done"))
        s.add(row)
        s.flush()
        return row.id

    id_ = database.write_now(add)
    document = database.read_now(
        lambda s: queries.operation_document(s, queries.find_operation(s, id_[:8]))
    )
    assert (document.id, document.error, document.result) == (id_, error, None)
    assert [(step.name, step.state, step.data) for step in document.steps] == [
        ("a", "done", {}),
        ("b", "running", {"pid": 1}),
    ]
    for key in (id_[:7], "z" * 32, id_[:8] + "%", ""):
        with pytest.raises(ResourceNotFound, match="there is no operation"):
            database.read_now(queries.find_operation, key)
    filters: list[dict[str, Any]] = [
        {"state": "queued"},
        {"state": ["running", "queued"]},
        {"kind": "machine.*"},
        {"target": "m"},
        {"target": "i"},
    ]
    for given in filters:
        assert len(database.read_now(queries.list_operations, **given).items) == 1
    for given in ({"state": "failed"}, {"kind": "machine"}, {"target": "x"}):
        assert len(database.read_now(queries.list_operations, **given).items) == 0


def test_machine_is_found_by_name_and_by_id_and_told_whole(database: Database) -> None:
    def add(s: Session) -> str:
        template = TemplateRow(name="t", memory=1)
        machine = add_machine(
            s,
            "web-1",
            template=template,
            labels={"team": "a"},
            policy={"autostart": True},
            metadata_={"hostname": "web"},
        )
        lan = add_network(s, "lan", subnet="10.0.0.0/29")
        nic = add_nic(s, machine, lan)
        add_nic(s, machine)
        s.add(AddressRow(network=lan, nic=nic, machine=machine, address="10.0.0.3"))
        add_disk(s, "data", machine=machine, device="disk1", state="attached")
        return machine.id

    id_ = database.write_now(add)
    told = [
        database.read_now(
            lambda s, key=key: queries.machine_document(s, queries.find_machine(s, key))
        )
        for key in ("web-1", id_)
    ]
    assert told[0] == told[1]
    machine = told[0]
    assert (machine.template, machine.policy.autostart, machine.metadata.hostname) == (
        "t",
        True,
        "web",
    )
    assert [(nic.name, nic.network, nic.addresses) for nic in machine.nics] == [
        ("net0", "lan", ("10.0.0.3",)),
        ("net1", "user", ()),
    ]
    assert [(disk.name, disk.device) for disk in machine.disks] == [("data", "disk1")]
    (network,) = database.read_now(queries.list_networks).items
    assert (network.used, network.free) == (1, 4)  # .2 to .6 without .3; .1 is the gateway's
    (template,) = database.read_now(queries.list_templates).items
    assert template.machines == 1
    with pytest.raises(MachineNotFound, match="there is no machine 'web-2'") as error:
        database.read_now(queries.find_machine, "web-2")
    assert error.value.hint == "there is web-1"


def test_free_addresses_are_those_of_the_ranges(database: Database) -> None:
    def add(s: Session) -> None:
        lan = add_network(
            s,
            "lan",
            subnet="10.0.0.0/24",
            subnet6="fd00::/64",
            ranges=["10.0.0.10-10.0.0.19"],
            reserved=["10.0.0.15"],
        )
        for address in ("10.0.0.10", "10.0.0.200", "fd00::9"):
            s.add(AddressRow(network=lan, address=address))
        add_network(s, "none")

    database.write_now(add)
    lan, none = database.read_now(queries.list_networks).items
    assert (lan.used, lan.free) == (3, 8)
    assert (none.used, none.free) == (0, None)


def test_machines_are_filtered(database: Database) -> None:
    def add(s: Session) -> None:
        add_host(s, "other")
        add_machine(s, "web-1", labels={"team": "a", "tier": "front"}, state="running")
        add_machine(s, "web-2", labels={"team": "b"}, host="other")
        add_machine(
            s, "db_1", labels={'odd "key"': "50%"}, template=TemplateRow(name="t", memory=1)
        )

    database.write_now(add)
    expected: dict[str, list[dict[str, Any]]] = {
        "web-1": [{"state": "running"}, {"label": "team=a"}, {"label": "tier"}, {"name": "*-1"}],
        "web-2": [{"host": "other"}, {"label": "team=b"}],
        "db_1": [{"template": "t"}, {"label": 'odd "key"=50%'}, {"name": "db_?"}],
        "web-1 web-2": [{"label": "team"}, {"name": "web-?"}, {"name": "web*"}],
        "": [{"name": "WEB*"}, {"name": "db-1"}, {"label": "team=c"}, {"label": "team="}],
        "db_1 web-2": [{"state": ["created", "failed"]}],
    }
    for names, filters in expected.items():
        for given in filters:
            page = database.read_now(queries.list_machines, count=True, **given)
            assert [each.name for each in page.items] == names.split(), given
            assert page.total == len(names.split())


def test_pages_hide_and_repeat_nothing_while_things_come_and_go(database: Database) -> None:
    def add(s: Session) -> None:
        for number in range(0, 20, 2):
            add_machine(s, f"m{number:02}")

    database.write_now(add)
    seen: list[str] = []
    cursor = None
    for turn in range(100):
        page = database.read_now(queries.list_machines, limit=3, cursor=cursor)
        seen += [each.name for each in page.items]
        if page.next is None:
            break
        cursor = page.next
        # Every other time the last one of the page goes; one comes before the place.
        if turn % 2:
            last = page.items[-1].name
            database.write_now(lambda s, name=last: s.delete(queries.find_machine(s, name)))
        database.write_now(add_machine, f"a{turn}")
    assert seen == [f"m{number:02}" for number in range(0, 20, 2)]


def test_list_costs_the_same_few_queries_however_long_it_is(database: Database) -> None:
    def add(s: Session, first: int, count: int) -> None:
        lan = s.scalar(select(MachineRow.id).limit(1)) and queries.find_network(s, "lan")
        lan = lan or add_network(s, "lan", subnet="10.0.0.0/16")
        template = TemplateRow(name=f"t{first}", memory=1)
        for number in range(first, first + count):
            machine = add_machine(s, f"m{number:03}", template=template)
            nic = add_nic(s, machine, lan)
            address = f"10.0.{number >> 8}.{number & 255}"
            s.add(AddressRow(network=lan, nic=nic, machine=machine, address=address))
            add_disk(s, f"d{number:03}", machine=machine, device="d")
            s.add(SnapshotRow(machine=machine, name="s"))
            row = OperationRow(kind="k", request={})
            row.steps.append(StepRow(name="a"))
            s.add(row)
            add_network(s, f"n{number:03}", subnet="10.1.0.0/24", ranges=["10.1.0.5-10.1.0.9"])
            add_host(s, f"h{number:03}")

    lists: list[Callable[..., Any]] = [
        queries.list_machines,
        queries.list_disks,
        queries.list_networks,
        queries.list_addresses,
        queries.list_templates,
        queries.list_snapshots,
        queries.list_operations,
        queries.list_hosts,
    ]

    def cost(list_: Callable[..., Any]) -> tuple[int, int]:
        said: list[str] = []

        def count(_c: object, _cursor: object, statement: str, *_: object) -> None:
            said.append(statement)

        def look(s: Session) -> int:
            event.listen(s.connection(), "before_cursor_execute", count)
            return len(list_(s).items)

        return database.read_now(look), len(said)

    database.write_now(add, 0, 2)
    few = [cost(list_)[1] for list_ in lists]
    database.write_now(add, 2, 60)
    many = [cost(list_) for list_ in lists]
    assert [number for _, number in many] == few
    assert max(few) <= 5
    assert [items for items, _ in many] == [62, 62, 63, 62, 2, 62, 62, 63]


def test_postgresql_transaction_that_met_another_is_run_again(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    settings = Settings(home=Home.open(tmp_path), database_url=postgres.new_database())
    one, two = Database.open(settings), Database.open(settings)
    one.write_now(lambda s: add_machine(s, "m", labels={"count": "0"}))
    seen: list[str] = []

    def add(s: Session) -> None:
        machine = queries.find_machine(s, "m")
        machine.labels["count"] = str(int(machine.labels["count"]) + 1)
        add_event(s, "test.counted", name=machine.labels["count"])

    def meet(s: Session) -> None:
        seen.append(queries.find_machine(s, "m").labels["count"])
        if len(seen) < 3:
            two.write_now(add)
        add(s)

    one.write_now(meet)
    assert seen == ["0", "1", "2"]
    machine = one.read_now(lambda s: queries.machine_document(s, queries.find_machine(s, "m")))
    assert machine.labels == {"count": "3"}
    counted = one.read_now(queries.list_events, kind="test.counted").items
    assert [each.name for each in counted] == ["1", "2", "3"]
    one.close()
    two.close()


def test_postgresql_transaction_that_always_meets_another_ends_with_a_conflict(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmlab.manager.store.database._ATTEMPTS", 2)
    settings = Settings(home=Home.open(tmp_path), database_url=postgres.new_database())
    one, two = Database.open(settings), Database.open(settings)
    one.write_now(add_machine, "m")

    def add(s: Session) -> None:
        machine = queries.find_machine(s, "m")
        machine.reason += "x"

    def meet(s: Session) -> None:
        queries.find_machine(s, "m")
        two.write_now(add)
        add(s)

    with pytest.raises(Conflict, match="others changed the same 2 times"):
        one.write_now(meet)
    assert one.read_now(lambda s: queries.find_machine(s, "m").reason) == "xx"
    one.close()
    two.close()


def test_store_forgets_what_is_old_and_ended(settings: Settings) -> None:
    kept = {"events_kept": 100, "operations_kept": 3, "findings_kept": 2}
    database = Database.open(settings.model_copy(update=kept))
    moment = datetime.now(UTC)

    def add(s: Session) -> None:
        under_way = OperationRow(id="a" * 32, kind="under way", request={}, state="running")
        s.add(under_way)
        held = OperationRow(id="b" * 32, kind="held", request={}, ended=moment)
        s.add(held)
        s.flush()
        add_machine(s, "m", operation_id=held.id)
        undone = OperationRow(id="c" * 32, kind="undone", request={}, ended=moment)
        undone.steps.append(StepRow(name="a"))
        s.add(undone)
        s.flush()
        for number in range(5):
            row = OperationRow(kind=f"k{number}", request={}, ended=moment)
            row.steps.append(StepRow(name="a"))
            if number == 4:
                row.undo_of = undone.id
            s.add(row)
            s.flush()
        for number in range(5):
            seen = moment + timedelta(minutes=number)
            finding = FindingRow(code="c", subject="s", severity="info", message=str(number))
            finding.first_seen, finding.resolved = seen, seen
            s.add(finding)
            s.flush()
        s.add(FindingRow(code="c", subject="s", severity="info", message="open"))

    def tell(s: Session) -> None:
        add_event(s, "test.happened")

    database.write_now(add)
    for _ in range(150):
        database.write_now(tell)
    operations = database.read_now(queries.list_operations).items
    assert [each.kind for each in operations] == ["k4", "k3", "k2", "undone", "held", "under way"]
    assert [len(each.steps) for each in operations] == [1, 1, 1, 1, 0, 0]
    findings = database.read_now(queries.list_findings).items
    assert sorted(each.message for each in findings) == ["3", "4", "open"]
    events = database.read_now(queries.list_events, limit=1000).items
    assert 100 <= len(events) <= 101
    assert events[-1].id == 151
    database.close()


def test_postgresql_that_drops_a_connection_costs_one_transaction_and_no_more(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    url = postgres.new_database()
    database = Database.open(Settings(home=Home.open(tmp_path), database_url=url))
    database.write_now(add_machine, "before")

    def drop(s: Session) -> None:
        import psycopg

        add_machine(s, "never")
        mine = s.connection().exec_driver_sql("SELECT pg_backend_pid()").scalar()
        with psycopg.connect(url, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s, 60000)", [mine])
        add_machine(s, "never either")

    with pytest.raises(StoreUnavailable, match="does not answer") as error:
        database.write_now(drop)
    assert "vmlab@" in error.value.message
    database.write_now(add_machine, "after")

    async def story() -> list[str]:
        page = await database.read(queries.list_machines)
        told = [await anext(events) for _ in range(2)]
        assert [event.id for event in told] == [1, 2]
        return [machine.name for machine in page.items]

    events = database.events.subscribe(0)
    assert asyncio.run(story()) == ["after", "before"]
    database.close()
