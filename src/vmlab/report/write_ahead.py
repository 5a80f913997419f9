"""SQLite's write-ahead log, in which readers and a writer are in nobody's way (sqlite.org/wal)."""

from __future__ import annotations

import sqlite3
import time
from typing import Final

_PAUSE_S: Final = 0.005


def write_ahead(connection: sqlite3.Connection, patience: float) -> None:
    """Have a database written to a log first.

    Whoever makes it, changes its mode or is the last to close it has all of it for a moment, for
    which this statement does not wait by itself.

    Args:
        connection: To the database.
        patience: Seconds after which it is given up.

    Raises:
        sqlite3.OperationalError: somebody else has it for longer, or it cannot be written.
    """
    until = time.monotonic() + patience
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > until:
                raise
            time.sleep(_PAUSE_S)
