"""A process that writes to a store until it is killed, and says what was committed.

Started once with a home (and a database's address) as arguments; for each line on its stdin it
forks a writer, which prints "PID", then the number of each change once its transaction is over.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sqlalchemy.orm import Session
from tests.unit.manager.store.rows import add_disk, add_machine

from vmlab.hypervisors.ownership import Home
from vmlab.manager.settings import Settings
from vmlab.manager.store import queries
from vmlab.manager.store.changes import add_event
from vmlab.manager.store.database import Database


def step(s: Session, number: int) -> None:
    """A change of several tables that belongs together: each machine has a disk and an event."""
    machine = add_machine(s, f"m{number}")
    add_disk(s, f"d{number}", machine=machine, device="d")
    counter = queries.find_machine(s, "counter")
    counter.labels["count"] = str(int(counter.labels["count"]) + 1)
    if number % 3 == 2:
        gone = queries.find_machine(s, f"m{number - 1}")
        disk = queries.find_disk(s, f"d{number - 1}")
        s.delete(disk)
        s.flush()
        s.delete(gone)
        add_event(s, "machine.deleted", subject=gone.id, name=gone.name)


def begin(s: Session) -> int:
    """The number of the next step; the first one makes the counter."""
    counter = next(iter(queries.list_machines(s, name="counter").items), None)
    if counter is None:
        add_machine(s, "counter", labels={"count": "0"})
        return 0
    return int(counter.labels["count"])


def write(settings: Settings) -> None:
    """Steps, for ever."""
    database = Database.open(settings)
    number = database.write_now(begin)
    while True:
        database.write_now(step, number)
        number += 1
        os.write(1, f"{number}\n".encode())


def main() -> None:
    """Fork a writer for each line."""
    home, *url = sys.argv[1:]
    settings = Settings(home=Home.open(Path(home)), database_url=url[0] if url else None)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            os.write(1, f"{os.getpid()}\n".encode())
            write(settings)
        os.waitpid(child, 0)
        os.write(1, b"dead\n")


if __name__ == "__main__":
    main()
