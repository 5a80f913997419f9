"""Opening a store: addresses that are none, places that cannot be used, what a database is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from tests.unit.manager.store.rows import add_machine

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import VmlabError, from_record
from vmlab.manager.settings import Settings
from vmlab.manager.store.changes import (
    Conflict,
    PreconditionFailed,
    conflict,
    count,
    counted,
    set_machine_state,
)
from vmlab.manager.store.database import Database, sqlite_file, store_url
from vmlab.manager.store.failures import StoreUnavailable
from vmlab.manager.store.tables import MachineRow


@pytest.mark.parametrize(
    ("url", "saying"),
    [
        ("postgres", "VMLAB_DATABASE_URL is no address of a database"),
        ("mysql://host/db", "not in 'mysql'"),
        ("oracle://host/db", "not in 'oracle'"),
        ("nosql://host/db", "not in 'nosql'"),
        ("postgresql+nodriver://host/db", "no database that vmlab can use"),
        ("postgresql://host:port/db", "VMLAB_DATABASE_URL is no address of a database"),
    ],
)
def test_address_of_a_database_that_cannot_be_is_refused(
    tmp_path: Path, url: str, saying: str
) -> None:
    settings = Settings(home=Home.open(tmp_path), database_url=url)
    with pytest.raises(VmlabError, match=saying) as error:
        Database.open(settings)
    assert "postgresql://user@host/name" in (error.value.hint or "")


def test_file_of_sqlite_can_be_elsewhere(tmp_path: Path) -> None:
    settings = Settings(
        home=Home.open(tmp_path / "home"), database_url=f"sqlite:///{tmp_path / 'my.db'}"
    )
    Database.open(settings).close()
    assert sqlite_file(store_url(settings)) == tmp_path / "my.db"
    assert (tmp_path / "my.db").exists()


def test_place_where_no_file_can_be_is_told(tmp_path: Path) -> None:
    settings = Settings(
        home=Home.open(tmp_path / "home"), database_url=f"sqlite:///{tmp_path / 'no' / 'my.db'}"
    )
    with pytest.raises(StoreUnavailable, match="unable to open database file") as error:
        Database.open(settings)
    assert error.value.exit_code == 4
    assert str(tmp_path / "no" / "my.db") in error.value.message


@pytest.mark.parametrize(("power_safe", "synchronous"), [(False, 1), (True, 2)])
def test_disk_is_waited_for_where_power_may_fail(
    tmp_path: Path, power_safe: bool, synchronous: int
) -> None:
    settings = Settings(home=Home.open(tmp_path), power_safe=power_safe)
    database = Database.open(settings)

    def pragma(s: Session, name: str) -> object:
        return s.connection().exec_driver_sql(f"PRAGMA {name}").scalar()

    assert database.write_now(pragma, "synchronous") == synchronous
    assert database.write_now(pragma, "journal_mode") == "wal"
    assert database.write_now(pragma, "foreign_keys") == 1
    assert database.read_now(pragma, "foreign_keys") == 1
    database.close()


def test_store_that_went_away_is_told_as_unavailable(settings: Settings, tmp_path: Path) -> None:
    database = Database.open(settings)

    def vanish(s: Session) -> None:
        s.connection().exec_driver_sql("DROP TABLE counters")
        s.connection().exec_driver_sql("DROP TABLE hosts")

    database.write_now(vanish)
    with pytest.raises(StoreUnavailable, match="no such table"):
        database.write_now(add_machine, "m")
    with pytest.raises(StoreUnavailable, match="no such table"):
        database.read_now(lambda s: s.connection().exec_driver_sql("SELECT * FROM hosts"))
    database.close()


def test_counters_give_each_number_once(database: Database) -> None:
    assert database.read_now(counted, "c") == 0
    assert database.write_now(count, "c") == 1
    assert database.write_now(count, "c", 5) == 6
    assert database.read_now(counted, "c") == 6


def test_values_inside_of_documents_are_written_when_they_change(database: Database) -> None:
    database.write_now(add_machine, "m", labels={"a": "1"}, spec={"disks": [1]})

    def change(s: Session) -> None:
        row = s.scalars(select(MachineRow)).one()
        row.labels["b"] = "2"
        row.spec["vcpus"] = 3

    database.write_now(change)
    row = database.read_now(lambda s: s.scalars(select(MachineRow)).one())
    assert (dict(row.labels), dict(row.spec)) == ({"a": "1", "b": "2"}, {"disks": [1], "vcpus": 3})
    assert row.version == 2


def test_start_is_the_moment_it_began_to_run(database: Database) -> None:
    database.write_now(add_machine, "m")

    def state(s: Session, *states: str) -> list[object]:
        row = s.scalars(select(MachineRow)).one()
        found: list[object] = []
        for each in states:
            set_machine_state(s, row, each)
            found.append(row.started)
        return found

    began = database.write_now(state, "starting", "running", "pausing", "paused", "running")
    assert began[0] is None and began[1] is not None
    assert began[1] == began[2] == began[3] == began[4]
    again = database.write_now(state, "restarting", "starting", "running", "unknown")
    assert again[2] == again[3] and again[2] != began[4]
    assert database.write_now(state, "stopped") == [None]
    with pytest.raises(ValueError, match="happy"):
        database.write_now(state, "happy")


def test_versions_travel_with_the_error() -> None:
    error = PreconditionFailed("machine 'm'", expected=1, actual=2)
    again = from_record(error.to_record())
    assert isinstance(again, PreconditionFailed)
    assert (again.expected, again.actual, again.message) == (1, 2, error.message)


def test_constraint_that_nobody_foresaw_is_told_with_its_own_words() -> None:
    error = conflict(IntegrityError("INSERT", {}, Exception("NOT NULL constraint failed: a.b")))
    assert isinstance(error, Conflict)
    assert "NOT NULL constraint failed: a.b" in error.message
