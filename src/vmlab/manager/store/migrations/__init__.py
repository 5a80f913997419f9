"""Brings a store's schema up to date: Alembic's migrations, as part of the package.

A store is upgraded in one transaction, by one process at a time; what goes wrong leaves it as it
was. There is no way back but a backup. A store that a newer vmlab has made is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, inspect, text

from vmlab.machine.errors import VmlabError
from vmlab.manager.store.tables import Base

__all__ = ["HEAD", "SchemaUnknown", "check_relations", "schema_of", "upgrade", "upgrade_within"]

HEAD: Final = "0005"
"""The newest version of the schema: the one that `tables` describes."""

_LOCK: Final = 0x766D6C6162
"""Number of PostgreSQL's advisory lock that is held while a schema is upgraded: "vmlab"."""


class SchemaUnknown(VmlabError):
    """The database is not a store of this vmlab's, or of a newer one."""


def schema_of(connection: Connection) -> str | None:
    """The version of the schema that a database has; None if it is empty.

    Raises:
        SchemaUnknown: it has tables of the store's names that vmlab has not made.
    """
    tables = set(inspect(connection).get_table_names())
    if "alembic_version" in tables:
        found = connection.scalar(text("SELECT version_num FROM alembic_version"))
        if found is not None:
            return str(found)
    if strange := sorted(tables & set(Base.metadata.tables)):
        raise SchemaUnknown(
            f"the database holds {', '.join(strange[:3])}, but not vmlab's version of them",
            hint="it is something else's: give vmlab a database of its own",
        )
    return None


def upgrade(engine: Engine, *, to: str = HEAD, versions: tuple[Path, ...] = ()) -> str | None:
    """Bring a database to a version of the schema; returns the version that it had.

    Args:
        engine: Its connections write, and SQLite's do not mind foreign keys: a table that is
            replaced is dropped with all that refers to it. All are checked at the end.
        to: The version.
        versions: Directories of more versions than this package has.

    Raises:
        SchemaUnknown: its version is none of those that are known.
        VmlabError: what it holds does not fit together afterwards; it is as it was.
    """
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            # With a snapshot of the beginning, what another process did meanwhile would be unseen.
            connection = connection.execution_options(isolation_level="READ COMMITTED")
        with connection.begin():
            found = schema_of(connection)
            if found == to:
                return found
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
                found = schema_of(connection)
            if found != to:
                upgrade_within(connection, found, to=to, versions=versions)
            return found


def upgrade_within(
    connection: Connection,
    found: str | None,
    *,
    to: str = HEAD,
    versions: tuple[Path, ...] = (),
) -> None:
    """As `upgrade`, in the transaction of a connection, from the version that was found there."""
    # Imported where there is something to do: most stores are up to date.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    here = Path(__file__).parent
    config = Config()
    config.set_main_option("script_location", _escaped(here))
    config.set_main_option("path_separator", "newline")
    locations = [_escaped(path) for path in (here / "versions", *versions)]
    config.set_main_option("version_locations", "\n".join(locations))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise SchemaUnknown(
            f"the store has version {found!r} of the schema; this vmlab knows {to} and older",
            hint="it was written by a newer vmlab: use that one, or restore a backup from before",
        )
    if to not in known:
        raise SchemaUnknown(
            f"version {to!r} of the schema is none that this vmlab knows",
            hint="it is of a newer vmlab: use that one",
        )
    command.upgrade(config, to)
    check_relations(connection, to)


def check_relations(connection: Connection, version: str) -> None:
    """Refuse rows that refer to nothing, where the database has not minded them.

    Raises:
        VmlabError: which tables have them.
    """
    if connection.dialect.name == "sqlite":
        broken = connection.execute(text("PRAGMA foreign_key_check")).fetchall()
        if broken:
            tables = ", ".join(sorted({str(row[0]) for row in broken}))
            raise VmlabError(
                f"{len(broken)} rows of {tables} refer to nothing in version {version}",
                hint="the store is as it was; please report it",
            )


def _escaped(path: Path) -> str:
    """As an option of a file that has % for interpolation."""
    return str(path).replace("%", "%%")
