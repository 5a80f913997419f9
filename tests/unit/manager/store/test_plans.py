"""What SQLite does for the questions that are asked most: it finds the answer by an index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from vmlab.manager.store import queries
from vmlab.manager.store.database import Database


def plans(database: Database, ask: Callable[[Session], Any]) -> list[str]:
    """The plan of each statement on machines that `ask` has executed."""
    asked: list[tuple[str, Any]] = []

    def look(session: Session) -> list[str]:
        connection = session.connection()

        def note(_: Any, __: Any, statement: str, parameters: Any, *rest: Any) -> None:
            if "FROM machines" in statement:
                asked.append((statement, parameters))

        event.listen(connection, "before_cursor_execute", note)
        ask(session)
        event.remove(connection, "before_cursor_execute", note)
        found = []
        for statement, parameters in asked:
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            found.append("; ".join(row.detail for row in rows))
        return found

    return database.read_now(look)


def test_a_page_of_machines_in_one_state_is_read_in_its_order(database: Database) -> None:
    (plan,) = plans(database, lambda s: queries.list_machines(s, state="running", name="web-*"))
    assert "ix_machines_state_name" in plan
    assert "TEMP B-TREE" not in plan


def test_what_machines_take_of_a_host_is_counted_without_a_look_at_them(
    database: Database,
) -> None:
    (plan,) = plans(database, queries.crowds)
    assert "COVERING INDEX ix_machines_host_state_vcpus_memory" in plan
    assert "TEMP B-TREE" not in plan
