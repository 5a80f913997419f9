"""Schemas: the newest is what the tables say, older ones are brought to it with their data."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, select, text
from tests.unit.manager.store.rows import add_machine

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import VmlabError
from vmlab.manager.settings import Settings
from vmlab.manager.store import migrations, queries
from vmlab.manager.store.database import Database, engine, store_url
from vmlab.manager.store.tables import Base, FindingRow

Raw = Callable[[Settings], Engine]


@pytest.fixture
def raw() -> Iterator[Raw]:
    """Opens the database that settings name as a migration does, without a look at its schema."""
    engines: list[Engine] = []

    def open_raw(settings: Settings) -> Engine:
        opened = engine(store_url(settings), settings, write=True, foreign_keys=False)
        engines.append(opened)
        return opened

    yield open_raw
    for opened in engines:
        opened.dispose()


def described(connection: Connection) -> dict[str, Any]:
    """All that the database itself knows of the tables."""
    look = inspect(connection)
    names = sorted(set(look.get_table_names()) - {"alembic_version"})

    def plain(rows: Any) -> list[str]:
        return sorted(repr([(key, written(row[key])) for key in sorted(row)]) for row in rows)

    def written(value: Any) -> str:
        if isinstance(value, dict):  # of a partial index: its condition
            return str([(key, str(value[key])) for key in sorted(value)])
        return str(value)

    return {
        name: {
            "columns": plain(look.get_columns(name)),
            "key": look.get_pk_constraint(name),
            "foreign": plain(look.get_foreign_keys(name)),
            "unique": plain(look.get_unique_constraints(name)),
            "checks": plain(look.get_check_constraints(name)),
            "indexes": plain(look.get_indexes(name)),
        }
        for name in names
    }


def test_newest_schema_is_what_the_tables_say(
    settings: Settings, new_url: Callable[[], str | None], raw: Raw, tmp_path: Path
) -> None:
    there = raw(settings)
    migrations.upgrade(there)
    other = raw(Settings(home=Home.open(tmp_path / "other"), database_url=new_url()))
    with other.begin() as connection:
        Base.metadata.create_all(connection)
        expected = described(connection)
    with there.connect() as connection:
        assert described(connection) == expected
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_head_is_the_last_version_there_is() -> None:
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert scripts.get_heads() == [migrations.HEAD]


# ------------------------------------------------------------------------ from version 1

_IDS = {"machine": "a" * 32, "odd": "b" * 32, "disk": "c" * 32, "nic": "d" * 32, "lan": "e" * 32}


def fill_version_1(connection: Connection) -> None:
    """What a store of version 1 may hold, in that version's words."""
    at = "2026-11-21 12:00:00.000000"
    true = "1" if connection.dialect.name == "sqlite" else "true"
    machine = (
        "INSERT INTO machines (id, name, state, wanted, reason, host, hypervisor, architecture, "
        "vcpus, memory, spec, labels, policy, metadata, operation_id, created, updated, version) "
        "VALUES ('{id}', '{name}', '{state}', 'running', '', 'simulated', 'simulated', 'x86_64', "
        "2, 1024, '{{\"a\": [1]}}', '{{\"team\": \"a\"}}', '{{\"autostart\": true}}', '{{}}', "
        f"'{'f' * 32}', '{at}', '{at}', 7)"
    )
    statements = [
        f"INSERT INTO hosts VALUES ('simulated', 'simulated', '{{}}', {true}, '', 'closed', 0, "
        f"'{{}}', '{at}', 1)",
        "INSERT INTO operations (id, number, kind, state, dry_run, lock_keys, request, progress, "
        "message, attempts, cancelling, actor, created, version) VALUES "
        f"('{'f' * 32}', 1, 'machine.start', 'running', NOT {true}, '[]', '{{}}', 0.5, '', 1, "
        f"NOT {true}, 'local', '{at}', 2)",
        machine.format(id=_IDS["machine"], name="web", state="running"),
        machine.format(id=_IDS["odd"], name="odd", state="confused"),
        "INSERT INTO networks (id, name, mode, dns, ranges, reserved, dhcp, data, created, "
        f"updated, version) VALUES ('{_IDS['lan']}', 'lan', 'isolated', '[]', '[]', '[]', {true}, "
        f"'{{}}', '{at}', '{at}', 1)",
        "INSERT INTO nics (id, machine_id, position, name, mode, network_id, mac, data) VALUES "
        f"('{_IDS['nic']}', '{_IDS['machine']}', 0, 'net0', 'network', '{_IDS['lan']}', 'm', "
        "'{}')",
        "INSERT INTO addresses (id, network_id, address, number, machine_id, nic_id, since) VALUES "
        f"('{'9' * 32}', '{_IDS['lan']}', '10.0.0.2', '4{10 << 24 | 2:032x}', "
        f"'{_IDS['machine']}', '{_IDS['nic']}', '{at}')",
        "INSERT INTO disks (id, name, size, format, state, reason, machine_id, device, readonly, "
        f"created, updated, version) VALUES ('{_IDS['disk']}', 'data', 5, 'raw', 'attached', '', "
        f"'{_IDS['machine']}', 'disk1', NOT {true}, '{at}', '{at}', 3)",
        "INSERT INTO findings (id, code, severity, subject, message, hint, evidence, policy, "
        f"actions, first_seen, last_seen) VALUES ('{'8' * 32}', 'clock-drift', 'warning', "
        f"'{_IDS['machine']}', 'm', '', '{{\"drift\": 7.5, \"source\": \"guest:a\", "
        f"\"touches\": [\"{_IDS['machine']}\"]}}', 'report', '[]', '{at}', '{at}')",
        "INSERT INTO events (id, at, kind, data) "
        f"VALUES (41, '{at}', 'machine.created', '{{\"n\": 1}}')",
        "INSERT INTO counters VALUES ('events', 41), ('operations', 1)",
    ]
    for statement in statements:
        connection.exec_driver_sql(statement)


_FINDINGS = select(FindingRow)


def test_store_of_version_1_is_upgraded_with_all_it_holds(settings: Settings, raw: Raw) -> None:
    there = raw(settings)
    migrations.upgrade(there, to="0001")
    with there.begin() as connection:
        fill_version_1(connection)
    there.dispose()

    database = Database.open(settings)
    odd, web = database.read_now(queries.list_machines).items
    assert (web.name, web.state, web.version, web.operation) == ("web", "running", 7, "f" * 32)
    assert (web.spec, web.labels, web.policy.autostart) == ({"a": [1]}, {"team": "a"}, True)
    assert [(disk.id, disk.device) for disk in web.disks] == [(_IDS["disk"], "disk1")]
    assert [(nic.network, nic.addresses) for nic in web.nics] == [("lan", ("10.0.0.2",))]
    assert (odd.state, odd.version) == ("unknown", 8)
    assert odd.reason == "its state was written down as confused"
    assert database.events.latest() == 41
    (finding,) = database.read_now(queries.list_findings).items
    assert finding.evidence == {"drift": 7.5}
    kept = database.read_now(lambda s: [(row.source, row.touches) for row in s.scalars(_FINDINGS)])
    assert kept == [("guest:a", [_IDS["machine"]])]
    # And it works as a new one does.
    database.write_now(add_machine, "new")
    assert database.events.latest() == 42
    with pytest.raises(VmlabError, match="the store refuses it"):
        database.write_now(add_machine, "wrong", state="confused")
    database.write_now(lambda s: s.delete(queries.find_machine(s, "odd")))
    database.close()
    Database.open(settings).close()  # there is nothing left to do


# ------------------------------------------------------------------------ what can go wrong

_NEXT = """
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{head}"


def upgrade():
    with op.batch_alter_table("machines") as batch:
        batch.add_column(sa.Column("rack", sa.String(8), server_default="r1", nullable=False))
    {then}
"""


def next_version(directory: Path, then: str = "pass") -> tuple[Path, ...]:
    """A version after the newest one, as a later vmlab may have it."""
    directory.mkdir()
    (directory / "v9999_next.py").write_text(_NEXT.format(head=migrations.HEAD, then=then))
    return (directory,)


def columns(there: Engine, table: str) -> set[str]:
    with there.connect() as connection:
        return {column["name"] for column in inspect(connection).get_columns(table)}


def test_table_is_replaced_without_loss_of_what_refers_to_it(
    settings: Settings, raw: Raw, tmp_path: Path
) -> None:
    database = Database.open(settings)
    database.close()
    there = raw(settings)
    with there.begin() as connection:
        fill_version_1_machine(connection)
    assert migrations.upgrade(there, to="9999", versions=next_version(tmp_path / "more")) == (
        migrations.HEAD
    )
    with there.connect() as connection:
        count = {
            table: connection.scalar(text(f"SELECT count(*) FROM {table}"))
            for table in ("machines", "nics", "addresses", "disks")
        }
        rack = connection.scalar(text("SELECT DISTINCT rack FROM machines"))
    assert (count, rack) == ({"machines": 2, "nics": 1, "addresses": 1, "disks": 1}, "r1")


def fill_version_1_machine(connection: Connection) -> None:
    """As `fill_version_1`, with nothing that later versions refuse."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("PRAGMA ignore_check_constraints = ON")
        fill_version_1(connection)
        connection.exec_driver_sql("UPDATE machines SET state = 'unknown' WHERE name = 'odd'")
        connection.exec_driver_sql("PRAGMA ignore_check_constraints = OFF")
    else:
        connection.exec_driver_sql("ALTER TABLE machines DROP CONSTRAINT ck_machines_state")
        fill_version_1(connection)
        connection.exec_driver_sql("UPDATE machines SET state = 'unknown' WHERE name = 'odd'")


def test_newer_store_is_refused_and_left_alone(
    settings: Settings, raw: Raw, tmp_path: Path
) -> None:
    there = raw(settings)
    migrations.upgrade(there, to="9999", versions=next_version(tmp_path / "more"))
    there.dispose()
    with pytest.raises(migrations.SchemaUnknown, match="version '9999' of the schema") as error:
        Database.open(settings)
    assert "newer vmlab" in (error.value.hint or "")
    assert "rack" in columns(there, "machines")


@pytest.mark.parametrize(
    ("then", "saying"),
    [
        ("raise RuntimeError('on purpose')", "on purpose"),
        ("op.execute('INSERT INTO nowhere VALUES (1)')", "nowhere"),
    ],
)
def test_upgrade_that_fails_leaves_the_store_as_it_was(
    settings: Settings, raw: Raw, tmp_path: Path, then: str, saying: str
) -> None:
    there = raw(settings)
    migrations.upgrade(there)
    with pytest.raises(Exception, match=saying):
        migrations.upgrade(there, to="9999", versions=next_version(tmp_path / "more", then))
    assert "rack" not in columns(there, "machines")
    Database.open(settings).close()


def test_upgrade_that_would_leave_rows_alone_is_undone(tmp_path: Path, raw: Raw) -> None:
    settings = Settings(home=Home.open(tmp_path / "home"))
    there = raw(settings)
    migrations.upgrade(there)
    with there.begin() as connection:
        fill_version_1_machine(connection)
    versions = next_version(tmp_path / "more", "op.execute('DELETE FROM machines')")
    with pytest.raises(VmlabError, match="rows of addresses, disks, nics refer to nothing"):
        migrations.upgrade(there, to="9999", versions=versions)
    with there.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM machines")) == 2


def test_database_of_something_else_is_refused(settings: Settings, raw: Raw) -> None:
    there = raw(settings)
    with there.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE machines (serial int)")
    with pytest.raises(migrations.SchemaUnknown, match="holds machines, but not vmlab's"):
        Database.open(settings)
    assert columns(there, "machines") == {"serial"}


def test_who_opens_a_store_waits_until_nobody_else_has_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=Home.open(tmp_path / "home"))
    file = Path(store_url(settings).database or "")
    file.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("CREATE TABLE theirs (number INTEGER)")
        other.execute("BEGIN IMMEDIATE")
        waited: list[float] = []

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 3:
                other.execute("COMMIT")

        clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
        monkeypatch.setattr("vmlab.report.write_ahead.time", clock)
        Database.open(settings).close()
    assert len(waited) == 3


def test_two_that_open_a_new_store_at_once_make_it_once(settings: Settings) -> None:
    start = threading.Barrier(4)
    outcomes: list[object] = []

    def open_it() -> None:
        start.wait(120)
        try:
            database = Database.open(settings)
            outcomes.append(database.events.latest())
            database.close()
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert outcomes == [0, 0, 0, 0]


def test_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    settings = Settings(home=Home.open(tmp_path / "home"))
    (settings.directory / "manager.sqlite3").write_bytes(b"not a database, but long enough" * 99)
    with pytest.raises(VmlabError, match="file is not a database") as error:
        Database.open(settings)
    assert str(settings.directory) in error.value.message


def test_foreign_keys_are_on_again_after_an_upgrade(tmp_path: Path) -> None:
    settings = Settings(home=Home.open(tmp_path / "home"))
    database = Database.open(settings)
    assert database.write_now(
        lambda s: s.connection().exec_driver_sql("PRAGMA foreign_keys").scalar()
    )
    database.close()
