"""A backup taken under load restores to a consistent store, in either database."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
import zstandard
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from tests.integration.manager.store.conftest import PostgresServer
from tests.integration.manager.store.test_killed_writers import agrees_with_itself
from tests.integration.manager.store.writer import step
from tests.unit.manager.store.rows import add_disk, add_machine, add_network, add_nic

from vmlab.hypervisors.locks import FileLock
from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import OperationFailed
from vmlab.manager.settings import Settings
from vmlab.manager.storage import Storage
from vmlab.manager.store import backup, migrations, queries
from vmlab.manager.store.database import Database
from vmlab.manager.store.failures import StoreUnavailable
from vmlab.manager.store.tables import (
    AddressRow,
    Base,
    EventRow,
    OperationRow,
    StepRow,
    TokenRow,
    UserRow,
)

NewSettings = Callable[[], Settings]


@pytest.fixture
def new_settings(new_url: Callable[[], str | None], tmp_path: Path) -> NewSettings:
    """Makes settings of another empty store of the same kind."""
    homes = 0

    def make() -> Settings:
        nonlocal homes
        homes += 1
        return Settings(home=Home.open(tmp_path / f"other{homes}"), database_url=new_url())

    return make


def fill(s: Session) -> None:
    """Something in each table, and each kind of value."""
    network = add_network(s, "lan", subnet="10.0.0.0/24", dns=["10.0.0.1"], dhcp=False)
    machine = add_machine(s, "web", labels={"team": "ä", "time": "x"}, started=datetime.now(UTC))
    nic = add_nic(s, machine, network)
    s.add(AddressRow(network=network, nic=nic, machine=machine, address="10.0.0.2"))
    add_disk(s, "data", machine=machine, device="disk1")
    user = UserRow(name="ann")
    s.add(TokenRow(user=user, hash="h", scope="admin"))
    undone = OperationRow(id="f" * 32, kind="machine.create", request={"a": None}, progress=0.25)
    s.add(undone)
    s.flush()
    undo = OperationRow(id="0" * 32, kind="machine.delete", request={}, undo_of=undone.id)
    undo.steps.append(StepRow(name="a", data={"deep": [{"time": "not a moment"}]}))
    s.add(undo)


def everything(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables."""

    def look(s: Session) -> dict[str, list[tuple[Any, ...]]]:
        return {
            name: [
                tuple(row)
                for row in s.connection().execute(
                    select(table).order_by(*table.primary_key.columns)
                )
            ]
            for name, table in Base.metadata.tables.items()
        }

    return database.read_now(look)


def test_restored_store_is_the_one_that_was_saved(
    settings: Settings, new_settings: NewSettings, tmp_path: Path
) -> None:
    database = Database.open(settings)
    database.write_now(fill)
    expected = everything(database)
    saved = backup.save(settings, tmp_path / "b")
    database.close()
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600
    assert saved.rows["machines"] == 1 and saved.rows["operations"] == 2
    assert backup.read(tmp_path / "b") == saved

    other = new_settings()
    restored = backup.restore(other, tmp_path / "b")
    assert restored.backup == saved and restored.replaced is None
    database = Database.open(other)
    assert everything(database) == expected
    # It goes on where the other was.
    assert database.events.latest() == saved.rows["events"]
    database.write_now(add_machine, "next")
    assert database.events.latest() == saved.rows["events"] + 1
    database.close()


def test_store_moves_from_one_database_to_the_other(
    settings: Settings, postgres: Any, tmp_path: Path
) -> None:
    database = Database.open(settings)
    database.write_now(fill)
    expected = everything(database)
    database.close()
    backup.save(settings, tmp_path / "b")
    url = None if settings.database_url is not None else postgres.new_database()
    other = Settings(home=Home.open(tmp_path / "other"), database_url=url)
    backup.restore(other, tmp_path / "b")
    database = Database.open(other)
    assert everything(database) == expected
    database.close()


def test_backup_under_load_restores_to_a_consistent_store(
    settings: Settings, new_settings: NewSettings, tmp_path: Path
) -> None:
    database = Database.open(settings)
    database.write_now(lambda s: add_machine(s, "counter", labels={"count": "0"}))
    enough = threading.Event()
    running = threading.Event()
    more = threading.Event()
    written = 0

    def load() -> None:
        nonlocal written
        while not enough.is_set():
            database.write_now(step, written)
            written += 1
            more.set()
            if written >= 10:
                running.set()

    async def story() -> list[Path]:
        writer = asyncio.ensure_future(asyncio.to_thread(load))
        try:
            assert await asyncio.to_thread(running.wait, 240), f"{written} steps"
            files = [tmp_path / f"b{number}" for number in range(3)]
            for file in files:
                await asyncio.to_thread(backup.save, settings, file)
                # The load goes on: what comes next may be in this backup, and not be told yet.
                wanted = written + 2
                while written < wanted:
                    more.clear()
                    if written < wanted:
                        assert await asyncio.to_thread(more.wait, 240), f"{written} steps"
        finally:
            enough.set()
            await writer
        return files

    files = asyncio.run(story())
    assert database.read_now(agrees_with_itself) == written
    database.close()
    found = []
    for file in files:
        other = new_settings()
        backup.restore(other, file)
        restored = Database.open(other)
        found.append(restored.read_now(agrees_with_itself))
        restored.close()
    assert 10 <= found[0] < found[-1] <= written


def test_store_of_an_older_version_is_restored_and_brought_up_to_date(
    settings: Settings, new_settings: NewSettings, tmp_path: Path
) -> None:
    from tests.integration.manager.store.test_migrations import fill_version_1

    from vmlab.manager.store.database import engine, store_url

    old = engine(store_url(settings), settings, write=True, foreign_keys=False)
    migrations.upgrade(old, to="0001")
    with old.begin() as connection:
        fill_version_1(connection)
    old.dispose()
    saved = backup.save(settings, tmp_path / "b")
    assert saved.schema == "0001"
    other = new_settings()
    backup.restore(other, tmp_path / "b")
    database = Database.open(other)
    assert [machine.state for machine in database.read_now(queries.list_machines).items] == [
        "unknown",
        "running",
    ]
    database.close()


def test_store_that_is_there_is_not_replaced_unless_told_and_is_saved_first(
    settings: Settings, tmp_path: Path
) -> None:
    database = Database.open(settings)
    database.write_now(add_machine, "old")
    backup.save(settings, tmp_path / "b")
    database.write_now(add_machine, "new")
    database.close()
    with pytest.raises(OperationFailed, match="there is a store in") as error:
        backup.restore(settings, tmp_path / "b")
    assert "--replace" in (error.value.hint or "")

    def names() -> list[str]:
        opened = Database.open(settings)
        found = [machine.name for machine in opened.read_now(queries.list_machines).items]
        opened.close()
        return found

    assert names() == ["new", "old"]
    replaced = backup.restore(settings, tmp_path / "b", replace=True).replaced
    assert names() == ["old"]
    assert replaced is not None and replaced.parent == settings.directory
    backup.restore(settings, replaced, replace=True)
    assert names() == ["new", "old"]


def test_store_on_which_others_have_built_is_not_replaced(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    url = postgres.new_database()
    settings = Settings(home=Home.open(tmp_path / "home"), database_url=url)
    database = Database.open(settings)
    database.write_now(add_machine, "kept")
    backup.save(settings, tmp_path / "b")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE VIEW fleet AS SELECT name FROM machines")
        with pytest.raises(StoreUnavailable, match="view fleet depends on table machines"):
            backup.restore(settings, tmp_path / "b", replace=True)
        assert connection.execute("SELECT name FROM fleet").fetchall() == [("kept",)]
        connection.execute("DROP VIEW fleet")
        backup.restore(settings, tmp_path / "b", replace=True)
    assert [row.name for row in database.read_now(queries.list_machines).items] == ["kept"]
    database.close()


def test_store_is_not_restored_under_a_manager(settings: Settings, tmp_path: Path) -> None:
    Database.open(settings).close()
    backup.save(settings, tmp_path / "b")
    lock = FileLock.take(settings.directory / "manager.lock")
    assert lock is not None
    with pytest.raises(OperationFailed, match="a manager runs") as error:
        backup.restore(settings, tmp_path / "b", replace=True)
    assert "vmlab serve --stop" in (error.value.hint or "")
    lock.release()
    backup.restore(settings, tmp_path / "b", replace=True)


def test_files_of_disks_are_listed_and_missed(
    settings: Settings, new_settings: NewSettings, tmp_path: Path
) -> None:
    database = Database.open(settings)
    storage = Storage(settings.directory / "disks")

    def add(s: Session) -> list[str]:
        return [add_disk(s, name).id for name in ("here", "lost")]

    here, lost = database.write_now(add)
    database.close()

    async def make() -> None:
        await storage.start()
        await storage.create(here, "raw", 1 << 20)

    asyncio.run(make())
    saved = backup.save(settings, tmp_path / "b")
    assert [(disk.disk, disk.path, disk.size, disk.allocated) for disk in saved.disks] == [
        ("here", str(storage.path(here, "raw")), 1 << 20, 0),
        ("lost", str(storage.path(lost, "raw")), 1 << 20, None),
    ]
    assert [
        disk.disk for disk in backup.restore(settings, tmp_path / "b", replace=True).missing
    ] == ["lost"]
    elsewhere = backup.restore(new_settings(), tmp_path / "b").missing
    assert [disk.disk for disk in elsewhere] == ["here", "lost"]


# ------------------------------------------------------------------------ what can go wrong


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A backup of a store in SQLite with something in it."""
    settings = Settings(home=Home.open(tmp_path / "saved"))
    database = Database.open(settings)
    database.write_now(fill)
    database.close()
    path = tmp_path / "backup"
    backup.save(settings, path)
    return path


def altered(path: Path, change: Callable[[list[str]], list[str]]) -> Path:
    """The same backup with other lines."""
    with zstandard.open(path, "rt") as file:
        lines = file.readlines()
    other = path.with_name("altered")
    with zstandard.open(other, "wt") as file:
        file.writelines(change(lines))
    return other


def with_line(index: int, old: str, new: str) -> Callable[[list[str]], list[str]]:
    """Another text in a line that has the old one."""

    def change(lines: list[str]) -> list[str]:
        assert old in lines[index]
        lines[index] = lines[index].replace(old, new)
        return lines

    return change


def in_table(table: str, old: str, new: str) -> Callable[[list[str]], list[str]]:
    """Another text in the rows of a table."""

    def change(lines: list[str]) -> list[str]:
        (index,) = [n for n, line in enumerate(lines) if line.startswith(f'{{"table":"{table}"')]
        return with_line(index, old, new)(lines)

    return change


@pytest.mark.parametrize(
    ("change", "saying"),
    [
        (lambda lines: lines[:-1], "it ends too early"),
        (lambda lines: lines[:3] + lines[4:], "it does not hold the rows that it should"),
        (lambda lines: [*lines, "more\n"], "it does not hold the rows that it should"),
        (lambda lines: lines[1:], "it does not begin as one"),
        (lambda lines: ["[]\n", *lines], "a line of it is no document"),
        (lambda lines: ["{\n", *lines], "a line of it is no JSON"),
        (lambda lines: [lines[0], "{}\n", *lines[1:]], "a line of it holds no rows"),
        (with_line(0, '"created"', '"made"'), "does not say what it is"),
        (in_table("nics", '"mac"', '"mac2"'), "its rows do not fit"),
        (in_table("machines", '"time":"2', '"time":"x'), "its rows do not fit its schema"),
        (in_table("machines", '"version"]', '"version","more"]'), "its rows do not fit"),
        (in_table("disks", '"raw"', '"vmdk"'), "its rows do not fit each other"),
        (in_table("users", '"users"', '"losers"'), "it does not hold the rows"),
    ],
)
def test_damaged_backup_is_refused_and_nothing_is_changed(
    saved: Path, tmp_path: Path, change: Callable[[list[str]], list[str]], saying: str
) -> None:
    settings = Settings(home=Home.open(tmp_path / "home"))
    database = Database.open(settings)
    database.write_now(add_machine, "kept")
    database.close()
    with pytest.raises(OperationFailed, match=saying):
        backup.restore(settings, altered(saved, change), replace=True)
    database = Database.open(settings)
    assert [machine.name for machine in database.read_now(queries.list_machines).items] == ["kept"]
    database.close()


def test_file_that_was_cut_or_changed_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for number, wrong in enumerate(
        (data[:-20], data[: len(data) // 2], b"", b"plain text\n", _flipped(data))
    ):
        path = saved.with_name(f"wrong{number}")
        path.write_bytes(wrong)
        with pytest.raises(OperationFailed, match="is no whole backup"):
            backup.read(path)


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_rows_that_refer_to_nothing_are_refused(saved: Path, tmp_path: Path) -> None:
    wrong = altered(saved, in_table("steps", '"' + "0" * 32, '"' + "1" * 32))
    with pytest.raises(Exception, match=r"1 rows of steps refer to nothing"):
        backup.restore(Settings(home=Home.open(tmp_path / "home")), wrong)


def test_backup_of_a_newer_vmlab_is_refused(saved: Path, tmp_path: Path) -> None:
    settings = Settings(home=Home.open(tmp_path / "home"))
    newer = altered(saved, with_line(0, '"vmlab-backup":1', '"vmlab-backup":2'))
    with pytest.raises(OperationFailed, match="which is newer"):
        backup.read(newer)
    newer = altered(saved, with_line(0, f'"schema":"{migrations.HEAD}"', '"schema":"0999"'))
    with pytest.raises(migrations.SchemaUnknown, match="'0999'"):
        backup.restore(settings, newer)


def test_there_has_to_be_a_store_and_a_place_for_the_backup(
    settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(OperationFailed, match="nothing to save"):
        backup.save(settings, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    Database.open(settings).close()
    (tmp_path / "b").write_text("mine")
    with pytest.raises(OperationFailed, match="is there already"):
        backup.save(settings, tmp_path / "b")
    assert (tmp_path / "b").read_text() == "mine"
    backup.save(settings, tmp_path / "b", replace=True)
    assert backup.read(tmp_path / "b").rows["machines"] == 0
    with pytest.raises(OperationFailed, match=r"cannot write .*/none/b: No such file"):
        backup.save(settings, tmp_path / "none" / "b")
    with pytest.raises(OperationFailed, match=r"cannot read .*/none: No such file"):
        backup.read(tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_what_else_a_database_holds_is_left_alone(settings: Settings, tmp_path: Path) -> None:
    database = Database.open(settings)

    def other(s: Session) -> None:
        s.connection().exec_driver_sql("CREATE TABLE theirs (serial int)")
        s.connection().exec_driver_sql("INSERT INTO theirs VALUES (5)")

    database.write_now(other)
    database.close()
    backup.save(settings, tmp_path / "b")
    assert "theirs" not in backup.read(tmp_path / "b").rows
    backup.restore(settings, tmp_path / "b", replace=True)
    database = Database.open(settings)
    assert (
        database.read_now(
            lambda s: s.connection().exec_driver_sql("SELECT serial FROM theirs").scalar()
        )
        == 5
    )
    assert database.read_now(lambda s: s.scalar(select(func.count()).select_from(EventRow))) == 0
    database.close()
