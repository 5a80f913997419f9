"""Backups: all that a store holds, as of one moment, in a file; and a store made of one again.

The file is text, one JSON document a line, compressed (Zstandard, RFC 8878): a header, the rows of
each table, and a last line that says how many those are. It is written from one snapshot of the
database, whatever is written meanwhile, and belongs to no database in particular: what was saved
from SQLite can be restored to PostgreSQL. A restored store is as one whose manager was killed at
the moment of the backup. The files of disks are listed, not held.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Final

import zstandard
from sqlalchemy import JSON, Connection, DateTime, Engine, MetaData, Table, insert, select, update
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, OperationalError, StatementError

from vmlab import __version__
from vmlab.hypervisors.locks import FileLock
from vmlab.machine.errors import OperationFailed
from vmlab.manager.settings import Settings
from vmlab.manager.storage import Storage
from vmlab.manager.store import migrations
from vmlab.manager.store.database import claim, engine, sqlite_file, store_url, unavailable
from vmlab.manager.store.tables import Base, now

__all__ = ["Backup", "DiskFile", "Restored", "read", "restore", "save"]

_FORMAT: Final = 1
"""Version of the file's format; that of the schema is another matter."""

_BATCH: Final = 500
"""Rows of a line, and of an INSERT."""

_TABLES: Final = frozenset(Base.metadata.tables)
"""The tables of the store; its database may hold others. One that a version drops stays here."""

_LINE: Final = 256 << 20
"""Characters of the longest line that is read: a batch of rows, each of which holds documents."""


@dataclass(frozen=True, slots=True)
class DiskFile:
    """A file of a disk of the store's: it is not in the backup.

    `allocated` is the bytes that it took up when the backup was made, None if it was not there.
    """

    disk: str
    path: str
    size: int
    allocated: int | None


@dataclass(frozen=True, slots=True)
class Backup:
    """What is in a backup. `rows` counts those of each table."""

    path: Path
    created: datetime
    vmlab: str
    database: str
    schema: str
    rows: Mapping[str, int]
    disks: tuple[DiskFile, ...]


@dataclass(frozen=True, slots=True)
class Restored:
    """What a store was made of.

    `replaced` is a backup of what was there before, `missing` are disks whose file is not there.
    """

    backup: Backup
    replaced: Path | None
    missing: tuple[DiskFile, ...]


# ------------------------------------------------------------------------ saving


def save(settings: Settings, path: Path, *, replace: bool = False) -> Backup:
    """Save the store that the settings name; others may read and write it meanwhile.

    Args:
        settings: Whose store.
        path: The file to be written; whoever may read it may read the hashes of tokens.
        replace: Write over a file that is there.

    Raises:
        OperationFailed: there is no store, or the file is there or cannot be written.
        StoreUnavailable: the database does not answer.
    """
    url = store_url(settings)
    file = sqlite_file(url)
    if file is not None and not file.exists():
        raise OperationFailed(
            f"there is no store in {settings.home.directory}: nothing to save",
            hint="set VMLAB_HOME or VMLAB_DATABASE_URL to where it is",
        )
    if path.exists() and not replace:
        raise OperationFailed(
            f"{path} is there already", hint="name another file, or replace it with --force"
        )
    reading = engine(url, settings, write=False)
    try:
        with _written(path) as out, reading.begin() as connection:
            return _dump(connection, settings, path, out)
    except DBAPIError as error:
        raise unavailable(url, error) from error
    finally:
        reading.dispose()


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    """A compressed file that gets its name when it is whole, for its user's eyes alone."""
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as raw:
                compressor = zstandard.ZstdCompressor(level=6, write_checksum=True)
                with compressor.stream_writer(raw, closefd=False) as out:
                    yield out
                raw.flush()
                os.fsync(raw.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OperationFailed(
            f"cannot write {path}: {error.strerror or error}",
            hint="name a file in a directory that you may write to and that has space left",
        ) from error


def _dump(connection: Connection, settings: Settings, path: Path, out: IO[bytes]) -> Backup:
    schema = migrations.schema_of(connection)
    if schema is None:
        raise OperationFailed(
            "the database is empty: nothing to save",
            hint="set VMLAB_HOME or VMLAB_DATABASE_URL to where the store is",
        )
    tables = _reflected(connection)
    disks = _disk_files(connection, tables["disks"], settings)
    backup = Backup(
        path=path,
        created=now(),
        vmlab=__version__,
        database=connection.dialect.name,
        schema=schema,
        rows={},
        disks=disks,
    )
    _write(
        out,
        {
            "vmlab-backup": _FORMAT,
            "created": backup.created.isoformat(),
            "vmlab": backup.vmlab,
            "database": backup.database,
            "schema": schema,
            "disks": [[disk.disk, disk.path, disk.size, disk.allocated] for disk in disks],
        },
    )
    rows: dict[str, int] = {}
    for name, table in tables.items():
        rows[name] = 0
        columns = [column.name for column in table.columns]
        found = connection.execution_options(yield_per=_BATCH).execute(
            select(table).order_by(*table.primary_key.columns)
        )
        values: list[list[Any]] = []
        for part in found.partitions():
            values = [[_plain(value) for value in row] for row in part]
            _write(out, {"table": name, "columns": columns, "rows": values})
            rows[name] += len(values)
        if not values:
            _write(out, {"table": name, "columns": columns, "rows": []})
    _write(out, {"end": rows})
    return Backup(**{**_fields(backup), "rows": rows})


def _fields(backup: Backup) -> dict[str, Any]:
    return {name: getattr(backup, name) for name in Backup.__slots__}


def _write(out: IO[bytes], document: Mapping[str, Any]) -> None:
    out.write(json.dumps(document, separators=(",", ":")).encode() + b"\n")


def _plain(value: Any) -> Any:
    """A value as JSON; a time is a table of one field, which no column of documents begins with."""
    if isinstance(value, datetime):
        moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        return {"time": moment.astimezone(UTC).isoformat()}
    return value


def _reflected(connection: Connection) -> dict[str, Table]:
    """The store's tables as the database has them, whatever the version; what is referred to first.

    They are not those of `tables`: those are the newest version's.
    """
    metadata = MetaData()
    metadata.reflect(connection, only=lambda name, _: name in _TABLES, resolve_fks=False)
    for table in metadata.tables.values():
        for column in table.columns:
            if isinstance(column.type, JSON):
                column.type = JSON(none_as_null=True)
    return {table.name: table for table in metadata.sorted_tables}


def _disk_files(connection: Connection, disks: Table, settings: Settings) -> tuple[DiskFile, ...]:
    storage = Storage(settings.directory / "disks")
    columns = disks.columns
    found = []
    for id_, name, size, format_ in connection.execute(
        select(columns["id"], columns["name"], columns["size"], columns["format"]).order_by(
            columns["name"]
        )
    ):
        path = storage.path(id_, format_)
        found.append(DiskFile(name, str(path), size, _allocated(path)))
    return tuple(found)


def _allocated(path: Path) -> int | None:
    try:
        return path.stat().st_blocks * 512  # the unit of st_blocks: stat(2)
    except FileNotFoundError:
        return None


# ------------------------------------------------------------------------ reading


def read(path: Path) -> Backup:
    """What is in a backup, once all of it was read and found whole.

    Raises:
        OperationFailed: it is none, or is damaged, or of a newer vmlab.
    """
    with _opened(path) as (header, batches):
        rows: Counter[str] = Counter()
        for table, _, values in batches:
            rows[table] += len(values)
        return _backup(path, header, rows)


Batch = tuple[str, list[str], list[list[Any]]]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, Any], Iterator[Batch]]]:
    """The header of a backup, and what will read its rows; it is whole once all were read."""
    try:
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            header = _document(lines, path)
            if not isinstance(header.get("vmlab-backup"), int):
                raise _damaged(path, "it does not begin as one")
            if header["vmlab-backup"] > _FORMAT:
                raise OperationFailed(
                    f"{path} was written by vmlab {header.get('vmlab')}, which is newer",
                    hint="restore it with that version",
                )
            yield header, _batches(lines, path)
    except OSError as error:
        raise OperationFailed(
            f"cannot read {path}: {error.strerror or error}",
            hint="name a file that `vmlab backup` has written",
        ) from error
    except zstandard.ZstdError as error:
        raise _damaged(path, str(error)) from error


def _document(lines: IO[str], path: Path) -> dict[str, Any]:
    try:
        line = lines.readline(_LINE)
        if not line.endswith("\n"):
            raise _damaged(path, "it ends too early")
        document = json.loads(line)
    except ValueError as error:
        raise _damaged(path, f"a line of it is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise _damaged(path, "a line of it is no document")
    return document


def _batches(lines: IO[str], path: Path) -> Iterator[Batch]:
    counted: Counter[str] = Counter()
    while "end" not in (document := _document(lines, path)):
        try:
            table, columns, rows = document["table"], document["columns"], document["rows"]
            counted[table] += len(rows)
        except (LookupError, TypeError) as error:
            raise _damaged(path, "a line of it holds no rows") from error
        yield table, columns, rows
    if counted != Counter(document["end"]) or lines.read(1):
        raise _damaged(path, "it does not hold the rows that it should")


def _backup(path: Path, header: Mapping[str, Any], rows: Mapping[str, int]) -> Backup:
    try:
        return Backup(
            path=path,
            created=datetime.fromisoformat(header["created"]),
            vmlab=str(header["vmlab"]),
            database=str(header["database"]),
            schema=str(header["schema"]),
            rows=dict(rows),
            disks=tuple(DiskFile(*disk) for disk in header["disks"]),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise _damaged(path, "its first line does not say what it is") from error


def _damaged(path: Path, why: str) -> OperationFailed:
    return OperationFailed(
        f"{path} is no whole backup: {why}", hint="name a file that `vmlab backup` has written"
    )


# ------------------------------------------------------------------------ restoring


def restore(settings: Settings, path: Path, *, replace: bool = False) -> Restored:
    """Make a store of a backup, in one transaction, and bring it up to date.

    Args:
        settings: Where to; no manager may run there.
        path: The backup.
        replace: Put it in the place of a store that is there; that one is saved first.

    Raises:
        OperationFailed: a manager runs, there is a store already, or the backup is damaged.
        SchemaUnknown: it is of a newer vmlab.
        StoreUnavailable: the database does not answer.
        VmlabError: a manager of another home has the store.
    """
    backup = read(path)
    url = store_url(settings)
    lock = FileLock.take(settings.directory / "manager.lock")
    if lock is None:
        raise OperationFailed(
            f"a manager runs in {settings.home.directory}: its store cannot be changed",
            hint="end it with `vmlab serve --stop`; its machines live on",
        )
    writing = engine(url, settings, write=True, foreign_keys=False)
    shared = None
    try:
        shared = claim(writing, url, settings)
        replaced = _save_present(settings, writing, path, replace=replace)
        _load(writing, path, backup)
    except DBAPIError as error:
        raise unavailable(url, error) from error
    finally:
        writing.dispose()
        if shared is not None:
            shared.release()
        lock.release()
    storage = Storage(settings.directory / "disks")
    missing = tuple(
        DiskFile(disk.disk, str(place), disk.size, disk.allocated)
        for disk in backup.disks
        if not (place := storage.directory / Path(disk.path).name).exists()
    )
    return Restored(backup, replaced, missing)


def _save_present(settings: Settings, writing: Engine, path: Path, *, replace: bool) -> Path | None:
    """Save the store that is there, if there is one; returns where."""
    with writing.connect() as connection:
        if migrations.schema_of(connection) is None:
            return None
    if not replace:
        raise OperationFailed(
            f"there is a store in {settings.home.directory} already",
            hint=f"`vmlab restore-backup --replace {shlex.quote(str(path))}` saves that one and "
            "puts the backup in its place",
        )
    stamp = now().strftime("%Y%m%dT%H%M%S.%f")
    place = settings.directory / f"replaced-{stamp}.vmlab-backup"
    save(settings, place)
    return place


def _load(writing: Engine, path: Path, backup: Backup) -> None:
    with writing.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection = connection.execution_options(isolation_level="READ COMMITTED")
        with connection.begin(), _opened(path) as (_, batches):
            if migrations.schema_of(connection) is not None:
                _drop(connection)
            migrations.upgrade_within(connection, None, to=backup.schema)
            tables = _reflected(connection)
            later: list[tuple[Table, dict[str, Any]]] = []
            try:
                for table, columns, rows in batches:
                    later += _insert(connection, tables[table], columns, rows)
                for of, value in later:
                    same = [column == value.pop(column.name) for column in of.primary_key.columns]
                    connection.execute(update(of).where(*same).values(value))
            except (KeyError, TypeError, ValueError) as error:
                raise _damaged(path, f"its rows do not fit its schema: {error}") from error
            except (IntegrityError, DataError, StatementError) as error:
                if isinstance(error, OperationalError):
                    raise
                reason = " ".join(str(error.orig).split())
                raise _damaged(path, f"its rows do not fit each other: {reason}") from error
            migrations.check_relations(connection, backup.schema)
            if backup.schema != migrations.HEAD:
                migrations.upgrade_within(connection, backup.schema)


def _drop(connection: Connection) -> None:
    """Drop the store's tables, and no others."""
    present = MetaData()
    known = {*_TABLES, "alembic_version"}
    present.reflect(connection, only=lambda name, _: name in known, resolve_fks=False)
    present.drop_all(connection)


def _insert(
    connection: Connection, table: Table, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> list[tuple[Table, dict[str, Any]]]:
    """Insert rows; returns what is to be filled in when the rows that it refers to are there."""
    own = [
        column.name
        for column in table.columns
        if any(key.column.table is table for key in column.foreign_keys)
    ]
    times = {column.name for column in table.columns if isinstance(column.type, DateTime)}
    naive = connection.dialect.name == "sqlite"
    later = []
    values = []
    for row in rows:
        value = dict(zip(columns, row, strict=True))
        for name in times & value.keys():
            if value[name] is not None:
                moment = datetime.fromisoformat(value[name]["time"])
                value[name] = moment.replace(tzinfo=None) if naive else moment
        referring = {name: value[name] for name in own if value[name] is not None}
        if referring:
            key = {column.name: value[column.name] for column in table.primary_key.columns}
            later.append((table, {**key, **referring}))
        values.append({**value, **dict.fromkeys(own)})
    if values:
        connection.execute(insert(table), values)
    return later
