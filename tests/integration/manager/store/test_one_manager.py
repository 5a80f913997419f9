"""A store has one manager at a time, whoever else may read it, and whatever ends that manager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.orm import Session
from tests.integration.manager.store.conftest import PostgresServer
from tests.unit.manager.store.rows import add_machine

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import VmlabError
from vmlab.manager.settings import Settings
from vmlab.manager.store import backup, queries
from vmlab.manager.store import database as databases
from vmlab.manager.store.database import Database
from vmlab.manager.store.failures import StoreUnavailable

REFUSED = "another manager has the store"


@pytest.fixture
def homes(
    new_url: Callable[[], str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Settings]:
    """Two homes with one store, of either kind."""
    monkeypatch.setattr(databases, "_CLAIM_SECONDS", 0.3)
    url = new_url() or f"sqlite:///{tmp_path}/shared.sqlite3"
    return [Settings(home=Home.open(tmp_path / name), database_url=url) for name in ("a", "b")]


def test_a_store_that_was_closed_is_free_at_once(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for a server that comes to the end of a session later."""
    monkeypatch.setattr(databases, "_CLAIM_SECONDS", 0)
    url = postgres.new_database()
    first, second = (
        Settings(home=Home.open(tmp_path / name), database_url=url) for name in ("a", "b")
    )
    closed = Database.open(first, alone=True)

    def leave_much_behind(s: Session) -> None:
        # The server drops them when the session ends, before it lets go of anything.
        tables = "FOR n IN 1..1500 LOOP EXECUTE 'CREATE TEMP TABLE t' || n || ' (a int)'; END LOOP"
        s.connection().exec_driver_sql(f"DO $$ BEGIN {tables}; END $$")

    closed.write_now(leave_much_behind)
    closed.close()
    Database.open(second, alone=True).close()


def test_a_second_manager_is_refused_until_the_first_has_gone(homes: list[Settings]) -> None:
    first = Database.open(homes[0], alone=True)
    with pytest.raises(VmlabError, match=REFUSED) as refused:
        Database.open(homes[1], alone=True)
    assert "VMLAB_URL" in str(refused.value.hint)
    first.write_now(add_machine, "web")
    reader = Database.open(homes[1])
    assert [each.name for each in reader.read_now(queries.list_machines).items] == ["web"]
    reader.close()
    first.close()
    second = Database.open(homes[1], alone=True)
    second.write_now(add_machine, "db")
    second.close()


def test_a_store_that_another_homes_manager_has_is_not_replaced(
    homes: list[Settings], tmp_path: Path
) -> None:
    first = Database.open(homes[0], alone=True)
    first.write_now(add_machine, "web")
    backup.save(homes[0], tmp_path / "backup")
    with pytest.raises(VmlabError, match=REFUSED):
        backup.restore(homes[1], tmp_path / "backup", replace=True)
    first.write_now(add_machine, "db")
    first.close()
    backup.restore(homes[1], tmp_path / "backup", replace=True)
    second = Database.open(homes[1], alone=True)
    assert [each.name for each in second.read_now(queries.list_machines).items] == ["web"]
    second.close()


def test_a_store_that_is_nowhere_is_told(tmp_path: Path) -> None:
    nowhere = f"sqlite:///{tmp_path}/missing/shared.sqlite3"
    with pytest.raises(StoreUnavailable, match=r"missing/shared\.sqlite3: No such file"):
        Database.open(Settings(home=Home.open(tmp_path), database_url=nowhere), alone=True)


def test_stores_of_one_server_have_a_manager_each(postgres: PostgresServer, tmp_path: Path) -> None:
    both = [
        Database.open(
            Settings(home=Home.open(tmp_path / name), database_url=postgres.new_database()),
            alone=True,
        )
        for name in ("a", "b")
    ]
    for database in both:
        database.write_now(add_machine, "web")
        database.close()


def test_who_lost_a_store_to_another_manager_writes_no_more(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "_CLAIM_SECONDS", 0.3)
    url = postgres.new_database()
    first, second = (
        Settings(home=Home.open(tmp_path / name), database_url=url) for name in ("a", "b")
    )
    lost = Database.open(first, alone=True)
    with psycopg.connect(url, autocommit=True) as administrator:
        administrator.execute(
            "SELECT pg_terminate_backend(pid, 60000) FROM pg_locks "
            "WHERE locktype = 'advisory' AND classid = %s "
            "AND objid = (hashtext(current_schema())::bigint & 4294967295)::oid",
            [databases._MANAGERS],
        )
    found = Database.open(second, alone=True)
    for _ in range(2):
        with pytest.raises(VmlabError, match=REFUSED):
            lost.write_now(add_machine, "never")
    found.write_now(add_machine, "web")
    assert [each.name for each in lost.read_now(queries.list_machines).items] == ["web"]
    found.close()
    lost.write_now(add_machine, "db")
    lost.close()
