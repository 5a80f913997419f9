"""The database: opened, brought up to date, and given work as transactions in threads.

SQLAlchemy is used synchronously: a function of a session runs in one transaction in a thread, and
what it returns are documents or plain values, never rows. One thread writes (SQLite has one writer;
for PostgreSQL it saves retries), a few read. SQLite keeps a write-ahead log (sqlite.org/wal.html);
PostgreSQL's writes are serializable and are run again when the server says so (SQLSTATE 40001,
40P01).
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

from sqlalchemy import URL, Engine, create_engine, event, func, insert, make_url, select
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from vmlab.hypervisors.locks import FileLock
from vmlab.machine.errors import VmlabError
from vmlab.manager.documents import EventDocument
from vmlab.manager.settings import Settings
from vmlab.manager.store import changes, migrations, pruning, queries
from vmlab.manager.store.events import EventStream
from vmlab.manager.store.failures import Conflict, StoreUnavailable
from vmlab.manager.store.tables import EventRow
from vmlab.report.write_ahead import write_ahead

__all__ = ["Database", "claim", "engine", "sqlite_file", "store_url", "unavailable"]

P = ParamSpec("P")
R = TypeVar("R")

_READERS: Final = 4
_BUSY_SECONDS: Final = 30.0
_ATTEMPTS: Final = 20
_AGAIN: Final = {"40001", "40P01"}
"""SQLSTATEs of a transaction that may be run again: serialization failure, deadlock."""
_CLAIM: Final = "SELECT pg_try_advisory_lock(%s, hashtext(coalesce(current_schema(), '')))"
_LET_GO: Final = _CLAIM.replace("_try_advisory_lock", "_advisory_unlock")
_MANAGERS: Final = 0x766D6C62
"""What managers' locks are called: nobody else's in the same database."""
_CLAIM_SECONDS: Final = 15.0
_LOOK_SECONDS: Final = 0.1
_INSERT_EVENTS: Final = insert(EventRow.metadata.tables["events"])
"""Events are no objects of the session: nothing is to be known of them but that they are there."""


class Database:
    """An open store. `read` and `write` run a function of a session in one transaction.

    `events` is the stream of what was committed. `url` has no password when it is printed.
    """

    def __init__(self, url: URL, settings: Settings) -> None:
        self.url = url
        self._settings = settings
        self._lock: FileLock | None = None
        self._reading = engine(url, settings, write=False)
        self._writing = engine(url, settings, write=True)
        self._writer = threading.Lock()
        self._read_threads = ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")
        self._write_thread = ThreadPoolExecutor(1, thread_name_prefix="store-write")
        self.events = EventStream(self._load_events, oldest=1, latest=0)

    @classmethod
    def open(cls, settings: Settings, *, alone: bool = False) -> Self:
        """Open the store that the settings name; make it, or bring it up to date, if need be.

        Args:
            settings: Where it is, and how much of it is kept.
            alone: Be the one who manages it, until it is closed: a store has one manager.

        Raises:
            StoreUnavailable: it cannot be opened.
            VmlabError: it is of a newer vmlab than this one, its address is none, or another
                manager has it.
        """
        url = store_url(settings)
        try:
            database = cls(url, settings)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise VmlabError(
                f"VMLAB_DATABASE_URL is no database that vmlab can use: {error}",
                hint='such as "postgresql://user@host/name", with vmlab[postgres] installed; '
                "or leave it out for SQLite",
            ) from None
        try:
            if alone:
                database._lock = claim(database._writing, url, settings)
            database._prepare(settings)
        except BaseException as error:
            database.close()
            # SQLite says of a file that is no database that it is a DatabaseError, and no more.
            if isinstance(error, OperationalError) or type(error) is DatabaseError:
                raise unavailable(url, error) from error
            raise
        return database

    def _prepare(self, settings: Settings) -> None:
        migrating = engine(self.url, settings, write=True, foreign_keys=False)
        try:
            migrations.upgrade(migrating)
        finally:
            migrating.dispose()
        oldest, latest = self.read_now(_range_of_events)
        self.events = EventStream(self._load_events, oldest=oldest, latest=latest)

    def close(self) -> None:
        """Finish what runs and close the database; subscribers are told that it ends."""
        self.events.close()
        self._write_thread.shutdown()
        self._read_threads.shutdown()
        self._reading.dispose()
        self._writing.dispose()
        if self._lock is not None:
            self._lock.release()

    # ------------------------------------------------------------------ transactions

    async def read(
        self,
        fn: Callable[Concatenate[Session, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """`fn(session, ...)` in a transaction that sees one state of the store, unchanged."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._read_threads, lambda: self.read_now(fn, *args, **kwargs)
        )

    async def write(
        self,
        fn: Callable[Concatenate[Session, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """`fn(session, ...)` in one transaction, which is committed unless it raises.

        It may run more than once, so it changes nothing but rows. A caller that is cancelled
        meanwhile does not stop it: it is committed or not as it would have been.

        Raises:
            Conflict: a constraint or another's change is against it; nothing was changed.
            StoreUnavailable: the database does not answer.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._write_thread, lambda: self.write_now(fn, *args, **kwargs)
        )

    def read_now(
        self,
        fn: Callable[Concatenate[Session, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """As `read`, in the thread that calls it."""
        try:
            with Session(self._reading, autoflush=False) as session:
                return fn(session, *args, **kwargs)
        except OperationalError as error:
            raise unavailable(self.url, error) from error

    def write_now(
        self,
        fn: Callable[Concatenate[Session, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """As `write`, in the thread that calls it."""
        with self._writer:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    return self._transaction(lambda session: fn(session, *args, **kwargs))
                except DBAPIError as error:
                    if isinstance(error, IntegrityError):
                        raise changes.conflict(error) from error
                    if getattr(error.orig, "sqlstate", None) not in _AGAIN:
                        if isinstance(error, OperationalError):
                            raise unavailable(self.url, error) from error
                        raise
                    if attempt == _ATTEMPTS:
                        raise Conflict(
                            f"others changed the same {_ATTEMPTS} times while it was tried",
                            hint="try again",
                        ) from error
                    time.sleep(random.uniform(0, 0.002 * 2 ** min(attempt, 8)))
                except StaleDataError as error:
                    raise Conflict(
                        "it was changed by somebody else meanwhile",
                        hint="read it again, and decide again",
                    ) from error
        raise AssertionError("unreachable")

    def _transaction(self, fn: Callable[[Session], R]) -> R:
        with Session(self._writing) as session, session.begin():
            result = fn(session)
            session.flush()
            events, oldest = self._number(session)
        if events:
            self.events.publish(events, oldest=oldest)
        return result

    def _number(self, session: Session) -> tuple[Sequence[EventDocument], int]:
        """Write the events of this transaction, numbered after the last one's; remove old ones.

        As late as can be: from here on, other processes' writes wait for this one.
        """
        pending: list[dict[str, Any]] = session.info.pop(changes.EVENTS, [])
        if not pending:
            return (), 0
        last = changes.count(session, "events", len(pending))
        first = last - len(pending) + 1
        rows = [{"id": first + n, **values} for n, values in enumerate(pending)]
        session.connection().execute(_INSERT_EVENTS, rows)
        oldest = self.events.oldest()
        kept = self._settings.events_kept
        # In steps, so that not each transaction has to remove something.
        if last - oldest + 1 >= kept + max(1, kept // 100):
            oldest = pruning.prune_events(session, last=last, kept=kept)
            pruning.prune_findings(session, kept=self._settings.findings_kept)
            pruning.prune_operations(session, kept=self._settings.operations_kept)
        return [EventDocument.model_validate(row) for row in rows], oldest

    async def _load_events(self, after: int, limit: int) -> Sequence[EventDocument]:
        return (await self.read(queries.list_events, after=after, limit=limit)).items


def store_url(settings: Settings) -> URL:
    """The address of the database: the one that was given, or SQLite's file in the home.

    Raises:
        VmlabError: what was given is no address.
    """
    if settings.database_url is None:
        return URL.create("sqlite", database=str(settings.directory / "manager.sqlite3"))
    try:
        url = make_url(settings.database_url)
    except (ArgumentError, ValueError):  # ValueError: of a port that is no number
        raise VmlabError(
            "VMLAB_DATABASE_URL is no address of a database",
            hint='such as "postgresql://user@host/name"; or leave it out for SQLite',
        ) from None
    if url.drivername in {"postgresql", "postgres"}:
        url = url.set(drivername="postgresql+psycopg")
    return url


def sqlite_file(url: URL) -> Path | None:
    """The file of a store in SQLite; None if it is in another database."""
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def _range_of_events(session: Session) -> tuple[int, int]:
    """The numbers of the oldest event that is there and of the last that ever was."""
    latest = changes.counted(session, "events")
    oldest = session.scalar(select(func.min(EventRow.id)))
    return (latest + 1 if oldest is None else oldest), latest


def unavailable(url: URL, error: DBAPIError) -> StoreUnavailable:
    """What it means to a person that a database does not answer."""
    shown = sqlite_file(url) or url.render_as_string(hide_password=True)
    return StoreUnavailable(
        f"the store {shown} does not answer: {' '.join(str(error.orig).split())}",
        hint="look whether it is there, may be read and written, and has space left",
    )


def _managed(url: URL) -> VmlabError:
    """What a second manager is told."""
    shown = sqlite_file(url) or url.render_as_string(hide_password=True)
    return VmlabError(
        f"another manager has the store {shown}",
        hint="use that one by VMLAB_URL, or give this home a store of its own by "
        "VMLAB_DATABASE_URL",
    )


# ------------------------------------------------------------------------ engines


def claim(writing: Engine, url: URL, settings: Settings) -> FileLock | None:
    """Be the only manager of a store as long as `writing` has connections.

    Returns:
        What is to be released afterwards as well.

    Raises:
        StoreUnavailable: it cannot be opened.
        VmlabError: another manager has it.
    """
    file = sqlite_file(url)
    if file is None:
        _claim_connections(writing, url)
        writing.connect().close()
    elif file.parent != settings.directory:
        # In the home it is the home's manager's anyway.
        try:
            lock = FileLock.take(file.with_name(f"{file.name}.lock"))
        except OSError as error:
            raise StoreUnavailable(
                f"nothing can be written beside the store {file}: {error.strerror}",
                hint="look whether its directory is there, and may be written",
            ) from error
        if lock is None:
            raise _managed(url)
        return lock
    return None


def _claim_connections(writing: Engine, url: URL) -> None:
    """Have each new connection hold a lock that ends with it (PostgreSQL 13.3.5).

    So who lost its connection, and the store to another manager meanwhile, writes no more.
    """

    @event.listens_for(writing, "connect")
    def hold(connection: Any, _: object) -> None:
        # One that was killed is gone from the server a moment after it is gone from here. Looks are
        # counted, and not the time that this process may have stood still between two of them.
        for look in range(1 + int(_CLAIM_SECONDS / _LOOK_SECONDS)):
            if look:
                time.sleep(_LOOK_SECONDS)
            with connection.cursor() as cursor:
                cursor.execute(_CLAIM, [_MANAGERS])
                (claimed,) = cursor.fetchone()
            connection.commit()
            if claimed:
                return
        connection.close()
        raise _managed(url)

    broken = writing.dialect.loaded_dbapi.Error

    @event.listens_for(writing, "close")
    def let_go(connection: Any, _: object) -> None:
        # The server comes to the end of a session a while after it was closed here.
        with suppress(broken), connection.cursor() as cursor:
            cursor.execute(_LET_GO, [_MANAGERS])


def engine(url: URL, settings: Settings, *, write: bool, foreign_keys: bool = True) -> Engine:
    """Connections for transactions that write, or for those that only read."""
    match url.get_backend_name():
        case "sqlite":
            return _sqlite_engine(url, settings, write=write, foreign_keys=foreign_keys)
        case "postgresql":
            return create_engine(
                url,
                isolation_level="SERIALIZABLE" if write else "REPEATABLE READ",
                pool_size=1 if write else _READERS,
                max_overflow=0,
                execution_options={"postgresql_readonly": not write},
                # A server that was restarted has left dead connections behind.
                pool_pre_ping=True,
            )
        case other:
            raise VmlabError(
                f"vmlab keeps its store in SQLite or PostgreSQL, not in {other!r}",
                hint='set VMLAB_DATABASE_URL to "postgresql://user@host/name", or leave it out',
            )


def _sqlite_engine(url: URL, settings: Settings, *, write: bool, foreign_keys: bool) -> Engine:
    made = create_engine(
        url,
        pool_size=1 if write else _READERS,
        max_overflow=0 if write else 1,
        connect_args={"timeout": _BUSY_SECONDS, "check_same_thread": False},
    )

    @event.listens_for(made, "connect")
    def prepare(connection: sqlite3.Connection, _: object) -> None:
        # Python's module would begin transactions when it sees fit; here they begin below.
        connection.isolation_level = None
        write_ahead(connection, _BUSY_SECONDS)
        cursor = connection.cursor()
        # NORMAL: what is committed survives the process's death, and the database any death of
        # the host; FULL: what is committed survives that, too.
        cursor.execute(f"PRAGMA synchronous = {'FULL' if settings.power_safe else 'NORMAL'}")
        cursor.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
        # As PostgreSQL's LIKE.
        cursor.execute("PRAGMA case_sensitive_like = ON")
        if not write:
            cursor.execute("PRAGMA query_only = ON")
        cursor.close()

    @event.listens_for(made, "begin")
    def begin(connection: Any) -> None:
        # A transaction that begins to read and then writes could not wait for another writer.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return made
